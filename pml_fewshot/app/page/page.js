"use strict";
// The page holds no truth of its own: each change is sent, and the state that comes back is drawn.
// Names and messages are set as textContent alone, so that none of them can be markup.

const $ = id => document.getElementById(id);
const THUMBS = 24, BARS = 8, PEN = 13, WAIT = 120;
let state = null;
let asked = null;        // the picture in question: a Blob
let question = 0;        // number of the last question; answers to earlier ones are stale
let asking = null;       // aborts the request that is under way

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const named = text => make("bdi", {textContent: text});   // a name, whichever way it is written

// ---- talking to the server

function show(message) {
  $("alert").hidden = !message;
  $("alert-text").textContent = message || "";
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("expected the program to answer, got nothing; is it still running in its terminal?");
  }
  const answer = await response.json().catch(() => ({error: `expected an answer, got status ${response.status}`}));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// Runs what a user asked for; what goes wrong is shown, and false is the result.
async function attempt(action) {
  try {
    show("");
    return await action() ?? true;
  } catch (error) {
    show(error.message);
    return false;
  }
}

// The same for what teaches: a second click meanwhile would teach the same again.
let teaching = false;
async function attemptToTeach(action) {
  if (teaching) return false;
  teaching = true;
  try { return await attempt(action); } finally { teaching = false; }
}

async function change(path, given) {
  draw(await request(`/api/${path}`, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(given),
  }));
}

function checked(file) {
  if (file.size > state.most_megabytes * 2 ** 20)
    throw new Error(`expected a picture of at most ${state.most_megabytes} MB, got ${(file.size / 2 ** 20).toFixed(1)} MB: ${file.name}; choose a smaller one`);
  if (file.name && file.type && !file.type.startsWith("image/"))
    throw new Error(`expected an image, got ${file.type}: ${file.name}; choose a JPEG, PNG or WebP`);
  return file;
}

// Teaches pictures of one class, in as many requests as the limits want.
async function teach(name, files) {
  if (!name.trim()) {
    $("name").focus();
    throw new Error("expected a name for the class, got none; type one");
  }
  const batches = [[]];
  let bytes = 0;
  for (const file of files.map(checked)) {
    if (batches.at(-1).length && (batches.at(-1).length >= state.most_files || bytes + file.size > state.most_megabytes * 9e5)) {
      batches.push([]);
      bytes = 0;
    }
    batches.at(-1).push(file);
    bytes += file.size;
  }
  const refused = [];
  for (const batch of batches) {
    const form = new FormData();
    form.append("name", name);
    for (const file of batch) form.append("picture", file, file.name || "drawing.png");
    const answer = await request("/api/examples", {method: "POST", body: form});
    refused.push(...answer.refused);
    draw(answer);
  }
  if (refused.length) throw new Error(refused.length > 1 ? `${refused[0]} (and ${refused.length - 1} more)` : refused[0]);
}

async function teachFolder(found) {
  const groups = new Map();
  for (const [path, file] of found) {
    const parts = path.split("/").filter(Boolean);
    if (parts.length < 2 || parts.some(part => part.startsWith(".")) || !file.type.startsWith("image/")) continue;
    const name = parts.at(-2);
    groups.set(name, [...groups.get(name) || [], file]);
  }
  if (!groups.size) throw new Error("expected a folder with images, got none; choose another");
  const problems = [];
  let done = 0;
  $("progress").classList.add("shown");
  for (const [name, own] of groups) {
    $("progress").textContent = `${++done} of ${groups.size} classes: ${name}`;
    try { await teach(name, own); } catch (error) { problems.push(error.message); }
  }
  $("progress").textContent = "";
  $("progress").classList.remove("shown");
  if (problems.length) throw new Error(problems.length > 1 ? `${problems[0]} (and ${problems.length - 1} more)` : problems[0]);
}

// ---- drawing on paper

class Paper {
  constructor(canvas, changed) {
    Object.assign(this, {canvas, changed, strokes: [], pen: canvas.getContext("2d")});
    canvas.addEventListener("pointerdown", event => {
      if (event.button || this.pointer != null) return;     // one finger draws: a second one, or a palm, does not
      this.pointer = event.pointerId;
      canvas.setPointerCapture(event.pointerId);
      this.strokes.push([this.point(event)]);
      this.paint();
    });
    canvas.addEventListener("pointermove", event => {
      if (event.pointerId !== this.pointer || !this.strokes.length) return;
      const events = event.getCoalescedEvents?.() ?? [];
      this.strokes.at(-1).push(...(events.length ? events : [event]).map(each => this.point(each)));
      this.paint();
    });
    canvas.addEventListener("lostpointercapture", event => { if (event.pointerId === this.pointer) this.pointer = null; });
    this.paint(false);
  }
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.canvas.width / box.width, (event.clientY - box.top) * this.canvas.height / box.height];
  }
  paint(tell = true) {
    const {pen, canvas} = this;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    Object.assign(pen, {lineWidth: PEN, lineCap: "round", lineJoin: "round", strokeStyle: "#000"});
    for (const [first, ...rest] of this.strokes) {
      pen.beginPath();
      pen.moveTo(...first);
      for (const point of rest.length ? rest : [first]) pen.lineTo(...point);
      pen.stroke();
    }
    canvas.parentElement.classList.toggle("used", this.strokes.length > 0);
    if (tell) this.changed?.();
  }
  undo() { this.strokes.pop(); this.paint(); }
  clear() { this.strokes = []; this.paint(); }
  picture() { return new Promise(done => this.canvas.toBlob(done, "image/png")); }
}

// ---- asking

let waiting = 0;
function askSoon() {
  if (askPaper.strokes.length) $("ask-photo").hidden = true;
  clearTimeout(waiting);
  $("answer").setAttribute("aria-busy", "true");          // until the answer is to what is drawn now
  question++;                                             // and no earlier one is shown
  waiting = setTimeout(async () => {
    asked = askPaper.strokes.length ? await askPaper.picture() : null;
    ask();
  }, WAIT);
}

async function ask() {
  const number = ++question;
  asking?.abort();
  $("answer").setAttribute("aria-busy", "true");
  if (!asked || !state?.classes.length) return answered(null);
  asking = new AbortController();
  try {
    const form = new FormData();
    form.append("picture", asked, asked.name || "drawing.png");
    const answer = await request("/api/classify", {method: "POST", body: form, signal: asking.signal});
    if (number === question) answered(answer);
  } catch (error) {
    if (error.name === "AbortError" || number !== question) return;
    answered(null);
    show(error.message);
  }
}

function askPhoto(file) {
  return attempt(() => {
    asked = checked(file);
    clearTimeout(waiting);
    askPaper.strokes = [];
    askPaper.paint(false);
    URL.revokeObjectURL($("ask-photo").src);
    $("ask-photo").src = URL.createObjectURL(file);
    $("ask-photo").hidden = false;
    $("ask-photo").parentElement.classList.add("used");
    return ask();
  });
}

function clearQuestion() {
  $("ask-photo").hidden = true;
  asked = null;
  askPaper.clear();
}

function percent(value) {
  return value > 0.995 && value < 1 ? "> 99 %" : value < 0.005 && value > 0 ? "< 1 %" : `${Math.round(100 * value)} %`;
}

function answered(answer) {
  $("answer").setAttribute("aria-busy", "false");
  const idle = !answer;
  $("answer").classList.toggle("rejected", Boolean(answer?.rejected));
  $("answer").dataset.version = answer ? answer.version : "";
  $("verdict").className = idle ? "idle" : answer.rejected ? "none" : "";
  $("nearest-box").hidden = $("correct-form").hidden = idle;
  $("bars").replaceChildren();
  $("verdict-note").textContent = "";
  if (idle) {
    if (!asked) $("verdict").textContent = "Draw something, or drop a photo.";
    else if (!state?.classes.length) $("verdict").textContent = "Teach a class first.";
    else $("verdict").textContent = "No answer: see the message above.";
    $("correct-form").hidden = !asked;
    return;
  }
  $("verdict").textContent = answer.rejected ? "none of these" : answer.label;
  const note = `Similarity ${answer.similarity.toFixed(3)}` + (answer.threshold === null
    ? "; nothing can be “none of these” yet." : answer.threshold <= -1 ? "; too few examples to say “none of these”."
    : `; “none of these” is below ${answer.threshold.toFixed(3)}.`);
  const rest = answer.rejected ? " The bars say which class it would be." : "";
  $("verdict-note").textContent = note + rest + (answer.calibrated || answer.classes.length < 2 ? "" : " The chances are a guess.");
  for (const each of answer.classes.slice(0, BARS)) {
    const fill = make("span", {className: "fill"});
    fill.style.width = `${100 * each.probability}%`;
    const bar = make("button", {type: "button", className: "bar", title: "Add this picture as an example of the class"},
      fill, make("span", {}, named(each.name)), make("span", {className: "number", textContent: percent(each.probability)}));
    bar.setAttribute("aria-label", `${each.name}: ${percent(each.probability)}. It is this: add it as an example`);
    bar.addEventListener("click", () => addAsked(each.name));
    $("bars").append(make("li", {}, bar));
  }
  const more = answer.classes.length - BARS;
  if (more > 0) $("bars").append(make("li", {className: "soft small", textContent: `and ${more} more, less likely`}));
  $("nearest").replaceChildren(...answer.nearest.map(each => make("li", {},
    make("img", {src: `/api/examples/${each.example}`, alt: `Example of ${each.name}`}),
    make("b", {}, named(each.name)), make("span", {className: "soft", textContent: each.similarity.toFixed(3)}))));
}

function addAsked(name) {
  return attemptToTeach(() => teach(name, [asked]));
}

// ---- what is taught

const thumbs = new Map();   // example -> its button, so that pictures are not loaded again at each change
const opened = new Set();   // classes all of whose examples are shown

function thumb(example, name) {
  let button = thumbs.get(example);
  if (!button) {
    button = make("button", {type: "button", className: "thumb"}, make("img", {loading: "lazy", src: `/api/examples/${example}`}));
    button.addEventListener("click", () => editExample(example, button.dataset.name));
    thumbs.set(example, button);
  }
  button.dataset.name = name;
  button.firstChild.alt = `Example of ${name}: move or remove`;
  return button;
}

function classBox({name, examples}) {
  const act = (text, action) => {
    const button = make("button", {type: "button", className: "quiet", textContent: text});
    button.setAttribute("aria-label", `${text} ${name}`);
    button.addEventListener("click", action);
    return button;
  };
  const all = opened.has(name) || examples.length <= THUMBS;
  const shown = make("div", {className: "thumbs"}, ...(all ? examples : examples.slice(0, THUMBS)).map(each => thumb(each, name)));
  if (!all) shown.append(act(`Show all ${examples.length}`, () => { opened.add(name); draw(state); }));
  const count = make("span", {textContent: ` · ${examples.length} example${examples.length > 1 ? "s" : ""}`});
  const box = make("div", {className: "class"}, make("div", {className: "row"}, make("h3", {}, named(name), count),
    make("div", {className: "actions"}, act("Teach more", () => { $("name").value = name; $("name").focus(); }),
      act("Rename", () => renameClass(name)), act("Remove", () => removeClass(name)))), shown);
  box.dataset.name = name;
  return box;
}

function draw(next) {
  const same = state?.session === next.session;
  if (same && next.version < state.version) return;    // an answer that another one has overtaken
  if (!same) thumbs.clear();                           // the program was started again, and numbers from 1 again
  const changed = !same || next.version !== state.version;
  state = next;
  $("embedder").textContent = state.embedder + (state.reads_ink ? " (drawings and writing)" : "");
  $("advice").replaceChildren(...state.advice.map(text => make("li", {textContent: text, dir: "auto"})));
  const focused = document.activeElement, box = focused?.closest("#classes .class");
  $("classes").replaceChildren(...state.classes.map(classBox));
  if (box) {                                              // what had the focus is drawn again, or gone
    const again = [...$("classes").querySelectorAll(".class")].find(each => each.dataset.name === box.dataset.name);
    const button = [...again?.querySelectorAll("button") ?? []].find(each => each.textContent === focused.textContent);
    (button ?? $("classes-title")).focus();
  }
  const there = new Set(state.classes.flatMap(each => each.examples));
  for (const example of thumbs.keys()) if (!there.has(example)) thumbs.delete(example);
  $("class-names").replaceChildren(...state.classes.map(each => make("option", {value: each.name})));
  $("forget").hidden = !state.classes.length;
  $("saved-state").textContent = state.changed ? (state.saved_as ? `Changed since it was saved as “${state.saved_as}”.` : "What is taught now is not saved.")
    : state.saved_as && state.classes.length ? `Saved as “${state.saved_as}”.` : "";
  if (state.saved_as && !$("set-name").value) $("set-name").value = state.saved_as;
  $("sets").replaceChildren(...state.sets.map(name => {
    const act = (text, action) => {
      const button = make("button", {type: "button", textContent: text});
      button.setAttribute("aria-label", `${text} ${name}`);
      button.addEventListener("click", action);
      return button;
    };
    return make("li", {}, make("span", {}, named(name)), act("Load", () => loadSet(name)), act("Delete", () => deleteSet(name)));
  }));
  if (changed) ask();
}

// ---- dialogs: what was chosen, "" where it was closed, and what stands in the field

function dialog({title, text = "", ok = "OK", label = "", value = "", picture = "", removable = false, risky = false}) {
  const box = $("dialog");
  $("dialog-title").textContent = title;
  $("dialog-text").textContent = text;
  $("dialog-ok").textContent = ok;
  $("dialog-label").textContent = label;
  $("dialog-field").hidden = !label;
  $("dialog-input").value = value;
  $("dialog-input").required = Boolean(label);
  $("dialog-picture").hidden = !picture;
  if (picture) Object.assign($("dialog-picture"), {src: picture, alt: title});
  $("dialog-remove").hidden = !removable;
  box.returnValue = "";
  box.showModal();
  if (risky) $("dialog-cancel").focus();                 // so that Enter alone destroys nothing
  return new Promise(done => box.addEventListener("close", () => done([box.returnValue, $("dialog-input").value]), {once: true}));
}

async function editExample(example, name) {
  const [chosen, to] = await dialog({
    title: `Example of ${name}`, label: "It belongs to the class", value: name, ok: "Move", removable: true, picture: `/api/examples/${example}`,
  });
  if (chosen === "ok" && to !== name) attempt(() => change("examples/move", {example, to}));
  if (chosen === "remove") attempt(() => change("examples/remove", {example}));
}

async function renameClass(name) {
  const [chosen, to] = await dialog({title: `Rename ${name}`, text: "The name of another class merges the two.", label: "New name", value: name, ok: "Rename"});
  if (chosen === "ok" && to !== name) attempt(() => change("classes/rename", {name, to}));
}

async function confirmed(title, text, ok) {
  return (await dialog({title, text, ok, risky: true}))[0] === "ok";
}

async function removeClass(name) {
  if (await confirmed(`Remove ${name}?`, "Its examples are forgotten.", "Remove")) attempt(() => change("classes/remove", {name}));
}

async function loadSet(name) {
  if (!state.changed || await confirmed(`Load ${name}?`, "What is taught now is not saved, and is replaced.", "Load"))
    if (await attempt(() => change("sets/load", {name}))) $("set-name").value = name;
}

async function deleteSet(name) {
  if (await confirmed(`Delete ${name}?`, "Its folder is removed from the disk.", "Delete")) attempt(() => change("sets/delete", {name}));
}

async function saveSet() {
  const name = $("set-name").value.trim(), replace = state.sets.includes(name);
  if (!replace || state.saved_as === name || await confirmed(`Replace ${name}?`, "There is a set of that name.", "Replace"))
    attempt(() => change("sets/save", {name, replace}));
}

// ---- what a user can do

function onDrop(section, action) {
  const over = (event, on) => { event.preventDefault(); section.classList.toggle("dropping", on); };
  section.addEventListener("dragover", event => over(event, true));
  section.addEventListener("dragleave", event => over(event, false));
  section.addEventListener("drop", event => {
    over(event, false);
    const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry?.()).filter(Boolean);
    const files = [...event.dataTransfer.files], folders = entries.filter(entry => entry.isDirectory);
    if (files.length) action(files, folders);
  });
}

// Path and file of all that is below a dropped folder.
async function filesBelow(entry) {
  if (entry.isFile) return [[entry.fullPath, await new Promise((done, failed) => entry.file(done, failed))]];
  const reader = entry.createReader(), found = [];
  for (;;) {                                             // it gives up to 100 at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) return found;
    for (const each of some) found.push(...await filesBelow(each));
  }
}

function onFiles(input, action) {
  input.addEventListener("change", async () => {
    const files = [...input.files];
    input.value = "";             // so that the same file can be chosen again
    if (files.length) await action(files);
  });
}

const teachPaper = new Paper($("teach-canvas"));
const askPaper = new Paper($("ask-canvas"), askSoon);
$("teach-form").addEventListener("submit", event => {
  event.preventDefault();
  attemptToTeach(async () => {
    if (!teachPaper.strokes.length) throw new Error("expected a drawing, got empty paper; draw first, or choose photos");
    await teach($("name").value, [await teachPaper.picture()]);
    teachPaper.clear();
  });
});
$("correct-form").addEventListener("submit", event => { event.preventDefault(); addAsked($("correct").value); });
$("save-form").addEventListener("submit", event => { event.preventDefault(); saveSet(); });
$("teach-undo").addEventListener("click", () => teachPaper.undo());
$("teach-clear").addEventListener("click", () => teachPaper.clear());
$("ask-undo").addEventListener("click", () => askPaper.undo());
$("ask-clear").addEventListener("click", clearQuestion);
$("alert-close").addEventListener("click", () => show(""));
$("forget").addEventListener("click", async () => {
  if (await confirmed("Forget all?", "All classes and examples of this page; saved sets stay.", "Forget")) attempt(() => change("clear", {}));
});
onFiles($("photos"), files => attemptToTeach(() => teach($("name").value, files)));
onFiles($("folder"), files => attemptToTeach(() => teachFolder(files.map(file => [file.webkitRelativePath, file]))));
onFiles($("ask-file"), ([file]) => askPhoto(file));
onDrop($("teach"), (files, folders) => attemptToTeach(async () => {
  if (!folders.length) return teach($("name").value, files);
  return teachFolder((await Promise.all(folders.map(filesBelow))).flat());
}));
onDrop($("ask"), ([file], [folder]) => folder
  ? show("expected a photo, got a folder; drop it on Teach") : askPhoto(file));
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, event => event.preventDefault());
attempt(async () => draw(await request("/api/state")));
