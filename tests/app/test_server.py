"""The server: what it answers, to whom, and that nothing sent to it makes it fail."""

import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("python_multipart")

from starlette.testclient import TestClient

from pml_fewshot.app import command, server
from pml_fewshot.app.pictures import PictureEmbedder

ADDRESS = "http://127.0.0.1:8000"


def drawing(points: list[tuple[int, int]], shift: int = 0) -> bytes:
    image = Image.new("L", (120, 120), 255)
    ImageDraw.Draw(image).line([(x + shift, y + shift) for x, y in points], 0, 6)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


SHAPES = {"slash": [(20, 90), (90, 20)], "hat": [(15, 90), (50, 20), (90, 90)], "ell": [(20, 15), (20, 90), (90, 90)]}


def client_of(folder: Path, **options: Any) -> TestClient:
    app = server.application(EMBEDDER, folder / "sets", **options)
    return TestClient(app, base_url=ADDRESS, raise_server_exceptions=False)


EMBEDDER = PictureEmbedder.of("glyphs")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(tmp_path) as client:
        yield client


def teach(client: TestClient, name: str, *contents: bytes) -> Any:
    files = [("picture", (f"{n}.png", content)) for n, content in enumerate(contents)]
    return client.post("/api/examples", data={"name": name}, files=files)


def classify(client: TestClient, content: bytes) -> Any:
    return client.post("/api/classify", files={"picture": ("asked.png", content)})


def teach_all(client: TestClient) -> None:
    for name, points in SHAPES.items():
        assert teach(client, name, drawing(points), drawing(points, 5)).status_code == 200


def error(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    text = answer.json()["error"]
    assert text.startswith("expected ")
    assert ", got " in text
    return text


def test_the_page_and_its_files_come_with_a_strict_policy(client: TestClient) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert "://" not in client.get("/").text.replace("http://www.w3.org/2000/svg", "")
    error(client.get("/page.py"), 404)
    error(client.get("/..%2fserver.py"), 404)
    error(client.get("/api/classify"), 405)


def test_classes_are_taught_asked_and_changed(client: TestClient) -> None:
    assert client.get("/api/state").json()["classes"] == []
    assert "teach one first" in error(classify(client, drawing(SHAPES["hat"])), 409)
    teach_all(client)
    answer = classify(client, drawing(SHAPES["hat"], 9)).json()
    assert answer["label"] == "hat"
    assert answer["nearest"][0]["name"] == "hat"
    assert len(answer["nearest"]) == 3  # a shifted drawing is the same, and counts once
    picture = client.get(f"/api/examples/{answer['nearest'][0]['example']}")
    assert picture.headers["content-type"] == "image/png"
    state = client.post("/api/classes/rename", json={"name": "hat", "to": "roof"}).json()
    assert [each["name"] for each in state["classes"]] == ["slash", "roof", "ell"]
    state = client.post("/api/examples/move", json={"example": 1, "to": "new"}).json()
    assert {each["name"]: len(each["examples"]) for each in state["classes"]} == {
        "new": 1,
        "slash": 1,
        "roof": 2,
        "ell": 2,
    }
    client.post("/api/examples/remove", json={"example": 1})
    state = client.post("/api/classes/remove", json={"name": "ell"}).json()
    assert [each["name"] for each in state["classes"]] == ["slash", "roof"]
    error(client.get("/api/examples/1"), 404)
    error(client.post("/api/examples/move", json={"example": 1, "to": "new"}), 404)
    error(client.post("/api/examples/move", json={"example": 3}), 400)
    assert client.post("/api/clear", json={}).json()["classes"] == []


def test_sets_are_saved_listed_loaded_and_deleted(client: TestClient) -> None:
    error(client.post("/api/sets/save", json={"name": "none"}), 400)
    teach_all(client)
    before = classify(client, drawing(SHAPES["ell"], 9)).json()
    state = client.post("/api/sets/save", json={"name": "letters"}).json()
    assert (state["sets"], state["saved_as"], state["changed"]) == (["letters"], "letters", False)
    error(client.post("/api/sets/save", json={"name": "letters"}), 409)
    assert teach(client, "more", drawing(SHAPES["hat"])).json()["changed"] is True
    client.post("/api/clear", json={})
    assert client.post("/api/sets/load", json={"name": "letters"}).json()["changed"] is False
    after = classify(client, drawing(SHAPES["ell"], 9)).json()
    for answer in (before, after):
        del answer["version"], answer["nearest"]
    assert after == before
    assert client.post("/api/sets/delete", json={"name": "letters"}).json()["sets"] == []
    error(client.post("/api/sets/load", json={"name": "letters"}), 404)
    for name in ("../../etc", "/etc/passwd", "a/b", ".x", "", None, 7, ["x"]):
        for action in ("save", "load", "delete"):
            error(client.post(f"/api/sets/{action}", json={"name": name}), 400)


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_no_picture_gets_a_message(client: TestClient) -> None:
    teach_all(client)
    whole = BytesIO()
    Image.effect_noise((300, 300), 80).save(whole, "PNG")
    bad = {
        "text": (b"hello", "a file of another kind"),
        "empty": (b"", "an empty file"),
        "broken": (whole.getvalue()[:20_000], "expected a readable image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a file of another kind"),
        "blank": (drawing([]), "draw first"),
        "bomb": (bomb(), "pixels"),
    }
    before = client.get("/api/state").json()
    for name, (content, message) in bad.items():
        status = 400 if name == "blank" else 415
        for answer in (teach(client, "bad", content), classify(client, content)):
            assert message in error(answer, status)
            assert " at 0x" not in answer.text
    assert client.get("/api/state").json() == before
    mixed = teach(client, "hat", b"hello", drawing(SHAPES["hat"], 7)).json()  # the good ones of several are taught
    assert len(mixed["added"]) == len(mixed["refused"]) == 1
    error(teach(client, "", drawing(SHAPES["hat"])), 400)
    error(teach(client, "x" * 201, drawing(SHAPES["hat"])), 400)


def test_requests_that_are_none_get_a_message(client: TestClient) -> None:
    post = client.post
    error(post("/api/classify"), 415)
    error(post("/api/classify", data={"picture": "text"}), 415)
    error(post("/api/classify", files={"other": b"x"}), 400)
    error(post("/api/classify", content=b"x", headers={"content-type": "multipart/form-data"}), 400)
    error(post("/api/classify", content=b"x", headers={"content-type": "multipart/form-data; boundary=a"}), 400)
    error(post("/api/classify", files=[("picture", b"x")] * (server.MOST_FILES + 1)), 400)
    error(post("/api/clear", content=b"{}"), 415)
    for body in (b"{", b"[]", b"\xff", b"7", b"[" * 100_000):
        error(post("/api/sets/load", content=body, headers={"content-type": "application/json"}), 400)
    for odd in (None, {}, [], "one", 2**80, 1.5):
        error(post("/api/examples/remove", json={"example": odd}), 404)
        error(post("/api/classes/remove", json={"name": odd}), 404)


def test_long_requests_are_refused_however_they_come(tmp_path: Path) -> None:
    with client_of(tmp_path, most_megabytes=0.1, most_examples=3) as client:
        large = bytes(200_000)
        assert "at most 0.1 MB" in error(classify(client, large), 413)
        chunks = (bytes(1000) for _ in range(200))  # without a content-length
        error(client.post("/api/classify", content=chunks, headers={"content-type": "multipart/form-data"}), 413)
        assert next(chunks, None) is None  # all of it was read: a browser hears the answer
        teach(client, "hat", drawing(SHAPES["hat"]), drawing(SHAPES["hat"], 5))
        assert "at most 3 examples" in error(teach(client, "hat", *[drawing(SHAPES["hat"], 9)] * 2), 413)


def test_only_this_page_is_answered(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "192.168.0.7",
            "",
            "[",
            "a@localhost.x",
        ):
            error(client.get("/api/state", headers={"host": host}), 400)
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            assert client.get("/api/state", headers={"host": host}).status_code == 200
        for origin in ("http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:8000"):
            error(client.post("/api/clear", json={}, headers={"origin": origin}), 400)
        assert client.post("/api/clear", json={}, headers={"origin": ADDRESS}).status_code == 200
    with client_of(tmp_path, host="0.0.0.0") as client:
        assert client.get("/api/state", headers={"host": "192.168.0.7:8000"}).status_code == 200
        error(client.get("/api/state", headers={"host": "evil.example:8000"}), 400)


def test_fifty_requests_at_once_lose_none(client: TestClient) -> None:
    shapes = list(SHAPES.items())

    def one(number: int) -> int:
        name, points = shapes[number % 3]
        content = drawing(points, number // 3 - 5)
        answers = teach(client, name, content), classify(client, content)
        assert answers[1].json()["nearest"][0]["similarity"] == pytest.approx(1)
        return answers[0].json()["added"][0]

    with ThreadPoolExecutor(25) as pool:
        numbers = list(pool.map(one, range(25)))  # two requests each
    classes = client.get("/api/state").json()["classes"]
    assert sorted(numbers) == sorted(n for each in classes for n in each["examples"]) == list(range(1, 26))
    assert {each["name"]: len(each["examples"]) for each in classes} == {"slash": 9, "hat": 8, "ell": 8}


def test_markup_in_names_stays_text(client: TestClient) -> None:
    name = "<img src=x onerror=alert(1)>"
    assert teach(client, name, drawing(SHAPES["hat"])).json()["classes"][0]["name"] == name
    script = client.get("/page.js").text
    assert not any(
        word in script for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
    )


def test_errors_of_the_command_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # which the command lowers
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (["--port", str(port)], f"expected to serve at 127.0.0.1 port {port}, got: Address already in use"),
            (["--port", "99999"], "expected a port from 0 to 65535, got 99999"),
            (["--port", "0", "--embedder", "resnet18"], "timm/resnet18?"),
        ):
            with pytest.raises(SystemExit) as stop:
                command.main(arguments)
            assert message in str(stop.value)
            assert "\n" not in str(stop.value)
    for arguments in (["--most-megabytes", "0"], ["--most-examples", "-1"], ["--most-megabytes", "nan"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
    assert "expected a number above 0" in capsys.readouterr().err


def test_without_the_extra_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r"pip install 'pml_fewshot\[app\]'"):
        command.main(["--port", "0"])


def test_it_warns_when_others_can_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # which the command lowers
    command.main(["--port", "0", "--host", "0.0.0.0", "--sets", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: served beyond this machine, without a password")
    assert printed.out.startswith("open http://0.0.0.0:")
