"""Files written by hand to run code, to reach out of their folder, or to take the machine down."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pml_fewshot import zip_archive
from pml_fewshot.checkpoint import export_embedder, load_checkpoint, load_embedder, save_checkpoint
from pml_fewshot.data.image_file import BrokenImageError, read_image
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.bank_file import load_bank, save_bank
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.index_file import index_checksum
from pml_fewshot.sizes import check_fits_memory
from pml_fewshot.tensor_file import read_tensors, write_tensors
from pml_fewshot.zip_archive import member_names, open_zip, read_member

ROWS = torch.from_numpy(np.random.default_rng(1).normal(size=(700, 4)).astype(np.float32))


@pytest.fixture(autouse=True)
def takes_little_time() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 5


# --- zips -------------------------------------------------------------------------------------------------------------


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_size(path: Path, real: int, claimed: int) -> Path:
    """The zip with another uncompressed size in all headers."""
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", real), struct.pack("<I", claimed)))
    return path


def test_a_member_larger_than_any_image_is_not_read(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"a.png": bytes(zip_archive.IMAGE + 1)})
    assert path.stat().st_size < 100_000
    with open_zip(path) as archive, pytest.raises(ValueError, match=r"expected a whole zip .*67,108,865 bytes, more"):
        read_member(archive, "a.png")


@pytest.mark.parametrize(("claimed", "message"), [(2**32 - 2, "which cannot be"), (1000, "Bad CRC-32|bytes that it")])
def test_a_member_that_lies_about_its_size_is_refused(claimed: int, message: str, tmp_path: Path):
    path = with_size(zipped(tmp_path / "a.zip", {"a.png": bytes(1_234_567)}), 1_234_567, claimed)
    with pytest.raises(ValueError, match=rf"expected a whole zip file .*({message})"), open_zip(path) as archive:
        read_member(archive, "a.png")


def test_members_that_overlap_are_refused(tmp_path: Path):
    """As in a bomb of one compressed block that each of a thousand members unpacks again."""
    path = zipped(tmp_path / "a.zip", {f"{i:03d}": os.urandom(200) for i in range(100)})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    first = content[directory : directory + 49]
    for start in range(directory, directory + 49 * 100, 49):
        content[start : start + 49] = first
        content[start + 46 : start + 49] = f"{(start - directory) // 49:03d}".encode()
        struct.pack_into("<I", content, start + 20, 20_000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="members that overlap"):
        open_zip(path)


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/tmp/out.png", "a\\..\\out.png", ".."])
def test_names_that_lead_out_of_a_folder_are_refused(name: str, tmp_path: Path):
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in" / "a.zip", {name: b"x"})
    with pytest.raises(ValueError, match="which leads out of a folder"):
        open_zip(path)
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "a.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"one")
        archive.writestr("a", b"two")
    with pytest.raises(ValueError, match="a name that stands in it twice"):
        open_zip(tmp_path / "a.zip")


def test_a_huge_list_of_members_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zip_archive, "DIRECTORY", 2**17)
    path = zipped(tmp_path / "a.zip", {f"{i:0200d}": b"" for i in range(1000)})
    with pytest.raises(ValueError, match=r"a list of members of more than 131,072 bytes"):
        open_zip(path)


def test_a_damaged_name_of_a_member_that_is_passed_over_is_seen(tmp_path: Path):
    path = zipped(tmp_path / "a.zip", {"a.png": b"one", "b.png": b"two"})
    content = path.read_bytes()
    place = content.rindex(b"b.png")
    path.write_bytes(content[:place] + b"b.pnh" + content[place + 5 :])
    with open_zip(path) as archive, pytest.raises(ValueError, match="expected a whole zip"):
        member_names(archive, lambda name: name.endswith(".png"))


def test_other_ways_of_packing_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", bytes(10_000))
    with pytest.raises(ValueError, match="packed by method 14, not stored or deflated"):
        open_zip(tmp_path / "a.zip")


# --- images -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_png_that_claims_ten_thousand_million_pixels_is_refused():
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    with pytest.raises(BrokenImageError, match="pixels"):
        read_image(content, 84, 3, "bomb.png")


# --- arrays -----------------------------------------------------------------------------------------------------------


def npy(descr: str, shape: tuple[int, ...], values: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + values


@pytest.mark.parametrize(
    "content",
    [
        npy("<f4", (10**12, 10**3)),
        npy("<f4", (2**62, 2**62)),
        npy("<f4", (-1, 4), bytes(16)),
        npy("<f4", (3, 4), bytes(47)),
        npy("<f4", (3, 4), bytes(49)),
        npy("<U0", (10**15,)),
        npy("<f4", (10**18, 0)),
        npy("|O", (3, 4), bytes(96)),
        b"\x93NUMPY\x01\x00\x10\x27" + b"-" * 9999 + b"1",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    ],
    ids=range(10),
)
def test_an_array_that_is_not_what_its_file_holds_is_refused(content: bytes, tmp_path: Path):
    np.save(tmp_path / "bank_labels.npy", np.arange(3))
    (tmp_path / "bank.npy").write_bytes(content)
    zipped(tmp_path / "bank.npz", {"embeddings.npy": content, "labels.npy": npy("<i8", (3,), bytes(24))})
    for name in ("bank.npy", "bank.npz"):
        with pytest.raises(ValueError, match=r"^expected "):
            load_bank(tmp_path / name)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_allocated(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"expected a to fit into memory, got one that would take 1,000,000,.* GB where"
    ):
        check_fits_memory(10**18, "a")
    with (tmp_path / "bank.safetensors").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(ValueError, match="would take 4,398"):
        load_bank(tmp_path / "bank.safetensors")


@pytest.mark.parametrize("length", [2**40, 2**63, 2**24 + 1])
def test_a_safetensors_header_of_absurd_length_is_refused(length: int, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=r"a header of .* bytes, more than the 16,777,216 that are read"):
        read_tensors(tmp_path / "a.safetensors")


def test_one_changed_bit_of_an_embedder_or_bank_is_seen(tmp_path: Path):
    export_embedder(tmp_path / "a.safetensors", nn.Linear(3, 2))
    save_bank(tmp_path / "b.safetensors", EmbeddingBank(ROWS, torch.arange(700)))
    for name in "ab":
        path = tmp_path / f"{name}.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match="with the checksum that was written"):
        load_embedder(tmp_path / "a.safetensors", nn.Linear(3, 2))
    with pytest.raises(ValueError, match="with the checksum that was written"):
        load_bank(tmp_path / "b.safetensors")


def test_weights_that_are_not_finite_or_of_another_type_are_named(tmp_path: Path):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, float("nan"))
    export_embedder(tmp_path / "nan.safetensors", model)
    with pytest.raises(ValueError, match=r"expected finite weights in .*, got NaN or infinity in bias"):
        load_embedder(tmp_path / "nan.safetensors", nn.Linear(3, 2))
    export_embedder(tmp_path / "double.safetensors", nn.Linear(3, 2).double())
    with pytest.raises(ValueError, match=r"expected torch.float32 for bias, got torch.float64"):
        load_embedder(tmp_path / "double.safetensors", nn.Linear(3, 2))


def test_embedders_exported_without_a_checksum_are_read(tmp_path: Path):
    model = nn.Linear(3, 2)
    save_file(dict(model.state_dict()), tmp_path / "old.safetensors")
    other = nn.Linear(3, 2)
    load_embedder(tmp_path / "old.safetensors", other)
    assert torch.equal(other.weight, model.weight)


# --- what torch.save writes -------------------------------------------------------------------------------------------


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A checkpoint whose structure is another pickle, all checksums right."""
    save_checkpoint(path, {"a": torch.arange(4.0)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


def doubled(times: int) -> bytes:
    """A pickle of pairs of pairs of ..., as the key of a dict: hashing it would take 2**times steps."""
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))
    return b"\x80\x02}K\x01" + pairs + b"K\x01s."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "posix system, which is more than data"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "builtins bytearray, which is more than data"),
        (b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", "torch FloatTensor, which is more than data"),
        (b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.", "a call of what is only to be named"),
        (b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85\x81.", "a call of what is only to be named"),
        (doubled(40), "a structure of more than 20,000,000 parts"),
        (b"\x80\x02]q\x00" + b"".join(b"(h\x00h\x00e" for _ in range(40)) + b".", "a structure of more than"),
        (b"\x80\x02" + b")0" * 4 * 10**5 + b").", "more than 500,000 steps of pickle"),
        (b"\x80\x02R.", "broken"),
        (b"\x80\x02K\x01.", "a int instead of a dict"),
    ],
    ids=["system", "bytearray", "tensor", "storage", "new storage", "pairs", "lists", "steps", "nothing", "number"],
)
def test_a_hostile_structure_is_refused_without_being_built(pickled: bytes, message: str, tmp_path: Path):
    path = with_pickle(tmp_path / "last.pt", pickled)
    with pytest.raises(ValueError, match=rf"expected a checkpoint at .*{message}"):
        load_checkpoint(path)
    if len(pickled) < 10**5:  # the long one takes its seconds once
        with pytest.raises(ValueError, match=r"^expected arrays in "):
            load_bank(path)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path):
    huge = torch.zeros(1).as_strided((10**9, 10**9), (0, 0))
    torch.save({"embeddings": huge, "labels": torch.zeros(1, dtype=torch.int64).expand(10**9)}, tmp_path / "a.pt")
    for read in (load_bank, load_checkpoint):
        with pytest.raises(ValueError, match=r"a tensor of shape .*, more than the values in the file"):
            read(tmp_path / "a.pt")
    save_checkpoint(tmp_path / "b.pt", {"a": torch.arange(4.0)})
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds more than data"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_wrong_checksum_in_a_checkpoint_is_seen(tmp_path: Path):
    save_checkpoint(tmp_path / "last.pt", {"a": torch.arange(1000.0)})
    content = bytearray(tmp_path.joinpath("last.pt").read_bytes())
    content[content.index(torch.arange(1000.0)[500:510].numpy().tobytes())] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    torch.load(tmp_path / "last.pt", weights_only=True)  # torch alone sees nothing
    with pytest.raises(ValueError, match="expected a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_tensors_marked_as_folders_are_refused(tmp_path: Path):
    """torch would give uninitialised memory for them."""
    save_checkpoint(tmp_path / "last.pt", {"a": torch.arange(4.0)})
    with zipfile.ZipFile(tmp_path / "last.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "last.pt", "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0x10 if name.endswith("data/0") else 0
            archive.writestr(member, content)
    with pytest.raises(ValueError, match=r"a folder, which torch\.save does not write"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_zip_with_a_second_one_behind_it_is_refused(tmp_path: Path):
    """Two readers could find two lists of members in it."""
    for name in ("a.pt", "b.pt"):
        save_checkpoint(tmp_path / name, {"name": name})
    both = (tmp_path / "a.pt").read_bytes() + (tmp_path / "b.pt").read_bytes()
    (tmp_path / "both.pt").write_bytes(both)
    with pytest.raises(ValueError, match="expected a checkpoint"):
        load_checkpoint(tmp_path / "both.pt")


def test_the_old_form_of_torch_save_is_refused(tmp_path: Path):
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    for name in ("old.pt", "plain.pt"):
        with pytest.raises(ValueError, match="expected a checkpoint"):
            load_checkpoint(tmp_path / name)


def test_lists_within_lists_are_no_labels(tmp_path: Path):
    deep: Any = [1]
    for _ in range(20):
        deep = [deep, deep]
    torch.save({"embeddings": torch.ones(2, 3), "labels": deep}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a list of other than numbers and texts"):
        load_bank(tmp_path / "a.pt")


# --- galleries --------------------------------------------------------------------------------------------------------


def forged(folder: Path, index: str, count: int, change: Callable[[Any], None]) -> Path:
    """A gallery whose index is changed and whose checksums are right."""
    gallery = Gallery(EmbeddingBank(ROWS[:count], torch.arange(count)), index)
    gallery.save(folder)
    change(gallery.faiss_index)
    faiss.write_index(gallery.faiss_index, str(folder / "index.faiss"))
    tensors, texts = read_tensors(folder / "labels.safetensors")
    about = json.loads(texts["gallery"]) | {"index": index_checksum(folder / "index.faiss")}
    write_tensors(folder / "labels.safetensors", tensors, {"gallery": json.dumps(about)})
    return folder


def set_neighbour(index: Any) -> None:
    faiss.rev_swig_ptr(index.hnsw.neighbors.data(), 10)[0] = 2 * 10**9


def set_number(index: Any) -> None:
    lists = faiss.downcast_index(index.base_index if isinstance(index, faiss.IndexRefine) else index).invlists
    place = next(place for place in range(lists.nlist) if lists.list_size(place))
    faiss.rev_swig_ptr(lists.get_ids(place), 1)[0] = 10**15


def set_twice(index: Any) -> None:
    lists = index.invlists
    place = next(place for place in range(lists.nlist) if lists.list_size(place) > 1)
    numbers = faiss.rev_swig_ptr(lists.get_ids(place), 2)
    numbers[0] = numbers[1]


def set_factor(index: Any) -> None:
    index.k_factor = 1e9


def set_metric(index: Any) -> None:
    index.metric_type = faiss.METRIC_INNER_PRODUCT


@pytest.mark.parametrize(
    ("index", "count", "change", "message"),
    [
        ("hnsw", 30, set_neighbour, "out of range|neighbours from -1 to 29"),
        ("ivf", 80, set_number, "references from 0 to 79 in the lists"),
        ("ivfpq", 650, set_number, "references from 0 to 649 in the lists"),
        ("ivfpq", 80, set_number, "references from 0 to 79 in the lists"),
        ("ivf", 80, set_twice, "every reference in a list"),
        ("ivfpq", 80, set_factor, "k_factor"),
        ("Flat", 80, set_metric, "an index for Euclid"),
    ],
    ids=["neighbour", "list", "product codes", "scalar codes", "twice", "factor", "metric"],
)
def test_an_index_that_a_search_would_read_beyond_is_refused(
    index: str, count: int, change: Callable[[Any], None], message: str, tmp_path: Path
):
    folder = forged(tmp_path / "gallery", index, count, change)
    assert len(Gallery.load(forged(tmp_path / "same", index, count, lambda _: None))) == count  # what is right is read
    with pytest.raises(ValueError, match=rf"expected a gallery in .*({message})"):
        Gallery.load(folder)


def test_parameters_that_ask_for_any_memory_are_refused(tmp_path: Path):
    gallery = Gallery(EmbeddingBank(ROWS, torch.arange(700)), "hnsw", "efSearch=100000")
    with pytest.raises(ValueError, match="efSearch from 1 to 4096"):
        gallery.save(tmp_path / "gallery")
    gallery = Gallery(EmbeddingBank(ROWS, torch.arange(700)), "ivf")
    gallery.parameters = "nprobe=1000000000"
    with pytest.raises(ValueError, match="parameters of at most 4096 for 700 references"):
        gallery.save(tmp_path / "gallery")
    gallery = Gallery(EmbeddingBank(ROWS, torch.arange(700)), "ivfpq", "k_factor_rf=2000")
    with pytest.raises(ValueError, match="k_factor from 1 to 1000"):
        gallery.save(tmp_path / "gallery")


def test_faiss_limits_are_given_back(tmp_path: Path):
    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    forged(tmp_path / "a", "Flat", 80, lambda _: None)
    Gallery.load(tmp_path / "a")
    (tmp_path / "a" / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="expected a gallery"):
        Gallery.load(tmp_path / "a")
    assert (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()) == before
