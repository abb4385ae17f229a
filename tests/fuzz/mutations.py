"""Seeded damage to the bytes of a file, from single bits to whole blocks."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

Random = np.random.Generator

INTERESTING = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def damaged(content: bytes, rng: Random) -> bytes:
    """One to four kinds of damage, one after the other."""
    kinds = [_bits, _bits, _bytes, _bytes, _number, _number, _cut, _insert, _swap, _repeat, _zero, _digit]
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        if content:
            content = kinds[rng.integers(len(kinds))](content, rng)
    return content


def damaged_headers(content: bytes, rng: Random) -> bytes:
    """Damage to what describes a zip: the headers of its members, its directory and its end."""
    places = [i for i in range(len(content) - 4) if content[i : i + 2] == b"PK" and content[i + 2] < 8]
    if not places:
        return damaged(content, rng)
    start = places[rng.integers(len(places))]
    end = start + 60
    return content[:start] + damaged(content[start:end], rng) + content[end:]


def damaged_member(content: bytes, rng: Random) -> bytes:
    """Damage inside a member (or to its name), in a zip whose checksums are right: what a hostile writer would make."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as new:
        members = archive.infolist()
        chosen = int(rng.integers(len(members)))
        pickles = [place for place, member in enumerate(members) if member.filename.endswith("/data.pkl")]
        if pickles and rng.random() < 0.6:  # else it would be one of the many tensors of a checkpoint
            chosen = pickles[0]
        for place, member in enumerate(members):
            data, name = archive.read(member), member.filename
            if place == chosen:
                if rng.random() < 0.1:
                    name = str(rng.choice(["../" + name, "/" + name, name.replace("/", "\\"), name + "x", "x/" + name]))
                else:
                    data = damaged(data, rng)
                    data = with_png_checksums(data) if rng.random() < 0.5 else data
            new.writestr(name, data, member.compress_type)
    return out.getvalue()


VALUES: list[Any] = [
    *(0, -1, 2**31, 2**63, 10**12, 1e308, float("nan"), float("inf"), "", "x", None, True, [], {}),
    *({"list": []}, {"tuple": [1]}, {"dict": {}}, {"path": "/"}, {"name": "torch.nn.modules.linear:Linear"}),
    {"partial": "torch.nn.modules.linear:Linear", "args": [], "keywords": {}},
]


def damaged_json(content: bytes, rng: Random) -> bytes:
    """Another value or another name at one or two places of a JSON text, which stays one."""
    whole = json.loads(content)
    for _ in range(int(rng.choice([1, 1, 2]))):
        places = [*_places(whole)]
        if not places:
            break
        holder, key = places[rng.integers(len(places))]
        value = VALUES[rng.integers(len(VALUES))]
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder[key] = json.loads(json.dumps(value))  # a copy: the next damage may fall into it
    return json.dumps(whole).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each list or dict within a value with each of its keys."""
    if isinstance(value, dict | list):
        for key, each in [*value.items()] if isinstance(value, dict) else [*enumerate(value)]:
            yield value, key
            yield from _places(each)


def with_png_checksums(content: bytes) -> bytes:
    """The same with the checksum of each part of a PNG made right, as far as its parts can be followed."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    whole, start = bytearray(content), 8
    while start + 12 <= len(whole):
        end = start + 8 + struct.unpack_from(">I", whole, start)[0]
        if end + 4 > len(whole):
            break
        struct.pack_into(">I", whole, end, zlib.crc32(whole[start + 4 : end]))
        start = end + 4
    return bytes(whole)


def _bits(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(len(changed), size=int(rng.choice([1, 1, 2, 8]))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _bytes(content: bytes, rng: Random) -> bytes:
    start, length = _block(content, rng, 16)
    return content[:start] + rng.bytes(length) + content[start + length :]


def _number(content: bytes, rng: Random) -> bytes:
    width = int(rng.choice([1, 2, 4, 8]))
    value = int(INTERESTING[rng.integers(len(INTERESTING))]) % 2 ** (8 * width)
    start = int(rng.integers(len(content)))
    return content[:start] + value.to_bytes(width, "little" if rng.random() < 0.7 else "big") + content[start + width :]


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _insert(content: bytes, rng: Random) -> bytes:
    start, length = _block(content, rng, 64)
    return content[:start] + rng.bytes(length) + content[start:]


def _swap(content: bytes, rng: Random) -> bytes:
    a, length = _block(content, rng, 64)
    b = int(rng.integers(len(content)))
    a, b = min(a, b), max(a, b)
    length = min(length, b - a, len(content) - b)
    return (
        content[:a]
        + content[b : b + length]
        + content[a + length : b]
        + content[a : a + length]
        + content[b + length :]
    )


def _repeat(content: bytes, rng: Random) -> bytes:
    start, length = _block(content, rng, 256)
    return (
        content[: start + length]
        + content[start : start + length] * int(rng.integers(1, 4))
        + content[start + length :]
    )


def _zero(content: bytes, rng: Random) -> bytes:
    start, length = _block(content, rng, 64)
    return content[:start] + bytes([int(rng.choice([0, 255]))]) * length + content[start + length :]


def _digit(content: bytes, rng: Random) -> bytes:
    """Another digit for one, in texts as CSV and JSON have them."""
    places = [i for i, byte in enumerate(content[:100_000]) if 48 <= byte < 58]
    if not places:
        return _bits(content, rng)
    place = places[rng.integers(len(places))]
    more = b"9" * int(rng.choice([1, 1, 1, 12, 5000]))
    return content[:place] + more + content[place + 1 :]


def _block(content: bytes, rng: Random, longest: int) -> tuple[int, int]:
    start = int(rng.integers(len(content)))
    return start, int(rng.integers(1, longest + 1))
