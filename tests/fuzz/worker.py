"""Damages and reads files, case after case, in a process of its own.

    python worker.py SEED COUNT FOLDER READER:START ...

Says "CASE <reader> <number>" before it starts a case, and "FAILED <reader> <number> <why>" after one that went wrong.
A case is well when the reader refuses the file with an error of ours, or gives the same as for the whole file, or,
where no checksum can tell, other data of the same form. Everything else is a failure: other errors, and files that
appear or change.
"""

import hashlib
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from mutations import damaged, damaged_headers, damaged_json, damaged_member
from readers import READERS

MORE_MEMORY = 3 * 2**30  # bytes that a worker may take beyond what it has at its start
WORKPLACES = ("cache", ".cache")  # where a reader may write


def digest(value: Any) -> str:
    """Of all that was read, with its types and shapes."""
    hasher = hashlib.blake2b(digest_size=16)

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous()
            hasher.update(f"tensor {part.dtype} {tuple(part.shape)}".encode())
            part = part.reshape(-1).view(torch.uint8).numpy() if part.numel() else np.empty(0, np.uint8)
            hasher.update(part.tobytes())
        elif isinstance(part, np.ndarray):
            hasher.update(f"array {part.dtype} {part.shape}".encode())
            hasher.update(part.tobytes())
        elif isinstance(part, dict):
            for key, each in part.items():
                add(key)
                add(each)
        elif isinstance(part, list | tuple):
            hasher.update(f"{type(part).__name__} {len(part)}".encode())
            for each in part:
                add(each)
        else:
            hasher.update(f"{type(part).__name__} {part!r}".encode(errors="surrogatepass"))

    add(value)
    return hasher.hexdigest()


def listing(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the places that are the reader's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not set(path.relative_to(folder).parts) & set(WORKPLACES)
        and not path.name.endswith("-lock")
    }


def run(name: str, seed: int, start: int, count: int, box: Path) -> None:
    reader = READERS[name]
    folder = box / "files"
    folder.mkdir(parents=True)
    reader.make(folder)
    whole = listing(folder)
    expected = digest(reader.read(folder))
    for index in range(start, count):
        print(f"CASE {name} {index}", flush=True)
        rng = np.random.default_rng([seed, index])
        names = sorted(reader.damages or whole)
        chosen = names[rng.integers(len(names))]
        content, hostile, mended = whole[chosen], False, 0.4
        kind = rng.random()
        if content[:2] == b"PK" and kind < 0.25:
            content = damaged_headers(content, rng)
        elif content[:2] == b"PK" and kind < 0.5:
            content, hostile = damaged_member(content, rng), True
        elif chosen.endswith(".json") and kind < 0.6:
            content, mended = damaged_json(content, rng), 0.9  # the checksum alone would see it else
        else:
            content = damaged(content, rng)
        (folder / chosen).unlink()  # a map of the file before is still open
        (folder / chosen).write_bytes(content)
        if reader.mend is not None and rng.random() < mended:
            reader.mend(folder)
            hostile = True
        for place in WORKPLACES:
            shutil.rmtree(folder / place, ignore_errors=True)
        before = listing(box)
        why = case(reader, folder, expected, hostile)
        after = listing(box)
        if after != before:
            changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
            why = f"files appeared or changed: {sorted(changed)[:5]}"
        if why:
            print(f"FAILED {name} {index} {chosen}: {why}".replace("\n", " ")[:600], flush=True)
        for path in listing(folder).keys() - whole.keys():
            (folder / path).unlink()
        for path, data in whole.items():
            if after.get(f"files/{path}") != data:
                (folder / path).unlink(missing_ok=True)
                (folder / path).write_bytes(data)


def case(reader: Any, folder: Path, expected: str, hostile: bool) -> str:
    """What went wrong, or nothing."""
    try:
        got = digest(reader.read(folder))
    except (ValueError, TypeError, FileNotFoundError) as error:
        return "" if str(error).startswith("expected ") else f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "" if got == expected or hostile or not reader.checked else "silently other data"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # nothing here has to outlast a power cut
    # (not the resident size: what is mapped counts against the limit)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for text in sys.argv[4:]:
        name, _, start = text.partition(":")
        run(name, int(sys.argv[1]), int(start), int(sys.argv[2]), Path(sys.argv[3]) / name)
    print("DONE", flush=True)
