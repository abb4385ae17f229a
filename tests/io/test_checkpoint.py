"""Checkpoints and exported embedders: exact round trips, data and never code, errors that name file and field."""

import pickle
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pml_fewshot import Conv4, Embedder, UsageError, WeightedL1Similarity, export_embedder, load_embedder
from pml_fewshot.checks import MissingFileError
from pml_fewshot.io.checkpoint import SEAL, check_exportable, check_weights, load_checkpoint, save_checkpoint
from pml_fewshot.io.tensors import checksum, read_tensors, write_tensors

STATE = {
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "losses": [(20, 0.5), (40, float("inf"))],
    "stopped": "all steps",
    "best": None,
    "generator": torch.Generator().manual_seed(1).get_state(),
}


def conv4(channels: int = 4, seed: int = 0) -> Embedder:
    torch.manual_seed(seed)
    return Embedder(Conv4(channels=channels), nn.Linear(channels, 3))


def test_a_checkpoint_comes_back_and_torch_alone_can_read_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    save_checkpoint(tmp_path / "last.pt", STATE)
    for loaded in (load_checkpoint(str(tmp_path / "last.pt")), torch.load(tmp_path / "last.pt", weights_only=True)):
        assert loaded.keys() == STATE.keys()
        for name in ("losses", "stopped", "best"):
            assert loaded[name] == STATE[name]
        assert torch.equal(loaded["weights"]["a"], torch.arange(6.0).reshape(2, 3))
        assert loaded["weights"]["count"].dtype == torch.int64
        torch.Generator().set_state(loaded["generator"])
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(tmp_path / "last.pt", {"weights": torch.ones(1000), "wrong": lambda: None})
    assert load_checkpoint(tmp_path / "last.pt")["losses"] == STATE["losses"]  # the old one stays
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"<html>404</html>", SEAL + b"crc32:00000000:0"])
def test_other_files_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"expected a checkpoint .*last\.pt, got "):
        load_checkpoint(tmp_path / "last.pt")
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(MissingFileError, match=r"expected a checkpoint at .*, got no such file"):
            load_checkpoint(missing)


def test_numbers_of_numpy_come_back_as_pythons(tmp_path: Path) -> None:
    state = {"lr": np.float64(0.1), "rates": [np.float32(2), (np.int64(3),)], "texts": {"a": np.str_("b")}}
    save_checkpoint(tmp_path / "last.pt", state)
    assert load_checkpoint(tmp_path / "last.pt") == {"lr": 0.1, "rates": [2.0, (3,)], "texts": {"a": "b"}}


def test_an_exported_embedder_comes_back_bit_for_bit_and_other_tools_can_read_it(tmp_path: Path) -> None:
    first, second, path = conv4(seed=0), conv4(seed=1), tmp_path / "embedder.safetensors"
    first(torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)))  # moves batch norm's statistics
    export_embedder(path, first)
    load_embedder(str(path), second)
    theirs = load_file(path)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(value, theirs[name]), name
    assert first.trunk.blocks[1].conv.weight.is_contiguous(memory_format=torch.channels_last)  # nothing changed in it
    content = path.read_bytes()
    export_embedder(path, second)
    assert path.read_bytes() == content  # the same weights give the same bytes


def test_tied_weights_are_exported_and_stay_tied(tmp_path: Path) -> None:
    first, second = (nn.Sequential(layer, layer) for layer in (nn.Linear(3, 3), nn.Linear(3, 3)))
    export_embedder(tmp_path / "network.safetensors", first)
    load_embedder(tmp_path / "network.safetensors", second)
    assert torch.equal(second[1].weight, first[0].weight)
    assert second[1].weight is second[0].weight


def test_states_that_are_no_tensors_cannot_be_exported(tmp_path: Path) -> None:
    counted = type("Counted", (nn.Linear,), {"get_extra_state": lambda self: {"calls": 3}})
    embedder = Embedder(nn.Sequential(nn.Flatten(), counted(3, 1)))
    for refuse in (partial(export_embedder, tmp_path / "embedder.safetensors"), check_exportable):
        with pytest.raises(UsageError, match=r"in the state of Embedder, got trunk\.1\._extra_state, a dict; make it"):
            refuse(embedder)
    assert not list(tmp_path.iterdir())
    check_exportable(conv4())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (partial(conv4, channels=8), r"float32 of shape \(3, 8\) for projection\.weight, got .* of shape \(3, 4\)"),
        (lambda: Embedder(Conv4(channels=4)), r"nothing for projection\.bias, got float32 of shape \(3,\)"),
        (lambda: Embedder(Conv4(channels=4), nn.Sequential(nn.Linear(4, 3))), r".* projection\.0\.bias, got nothing"),
        (lambda: conv4().double(), r"float64 of shape \(3,\) for projection\.bias, got float32 of shape \(3,\)"),
    ],
    ids=["wider", "too much in the file", "too little in the file", "other type"],
)
def test_another_architecture_names_the_weight(build: Callable[[], Embedder], expected: str, tmp_path: Path) -> None:
    export_embedder(tmp_path / "embedder.safetensors", conv4())
    other = build()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UsageError, match=f"expected {expected} in .*; build it with the trunk"):
        load_embedder(tmp_path / "embedder.safetensors", other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())  # nothing half-loaded


def test_lazy_weights_and_states_that_are_no_tensors_are_compared_too(tmp_path: Path) -> None:
    unseen, seen = WeightedL1Similarity(), WeightedL1Similarity()
    seen(torch.rand(2, 3))
    save_checkpoint(tmp_path / "last.pt", unseen.state_dict())
    unseen.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    check_weights(unseen.state_dict(), seen.state_dict(), "the checkpoint")
    check_weights(seen.state_dict(), unseen.state_dict(), "the checkpoint")
    with pytest.raises(UsageError, match="expected dict for calls, got int in the checkpoint"):
        check_weights({"calls": {}}, {"calls": 3}, "the checkpoint")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    network.bias.data[1] = float("nan")
    export_embedder(tmp_path / "nan.safetensors", network)
    with pytest.raises(UsageError, match=r"expected finite weights in .*, got NaN or infinity in bias"):
        load_embedder(tmp_path / "nan.safetensors", nn.Linear(3, 2))


def test_tensors_of_every_kind_and_texts_come_back(tmp_path: Path) -> None:
    tensors = {
        "view": torch.arange(12.0).reshape(3, 4).T[1:3],
        "half": torch.tensor([1.5, -2]).bfloat16(),
        "flag": torch.tensor([True, False]),
        "number": torch.tensor(2**60 + 1),
        "none": torch.empty(0, 3),
    }
    write_tensors(tmp_path / "a", tensors, {"source": "ä\n", "b": ""})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"b": "", "source": "ä\n"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()  # the order does not count
    loaded, texts = read_tensors(str(tmp_path / "a"))
    assert texts == {"source": "ä\n", "b": ""}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(("read", "step"), [(load_checkpoint, 61), (read_tensors, 3)])
def test_a_flipped_bit_or_a_cut_is_refused_or_changes_nothing(read: Callable, step: int, tmp_path: Path) -> None:
    """torch verifies no checksum, and one wrong bit in a zip's directory makes it hand out uninitialized memory."""
    path = tmp_path / "file"
    if read is load_checkpoint:
        save_checkpoint(path, STATE)
    else:
        write_tensors(path, {"a": torch.arange(20.0), "b": torch.ones(3)}, {"x": "y"})
    whole, before = path.read_bytes(), repr(read(path))
    passed = 0
    for place in {*range(0, len(whole), step), *range(len(whole) - 100, len(whole))}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        for content in (bytes(flipped), whole[:place]):
            path.write_bytes(content)
            try:
                assert repr(read(path)) == before
                passed += 1
            except UsageError as error:
                assert f"at {path}, got a" in str(error)  # noqa: PT017
    assert passed <= (0 if read is load_checkpoint else 9)  # a space in the header of safetensors may be another one


def test_files_of_other_tools_have_no_checksum_and_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "theirs.safetensors", {"format": "pt"})
    tensors, texts = read_tensors(tmp_path / "theirs.safetensors")
    assert torch.equal(tensors["a"], torch.ones(2))
    assert texts == {"format": "pt"}
    with pytest.raises(MissingFileError, match=r"expected a safetensors file at .*gone, got no such file"):
        read_tensors(tmp_path / "gone")


def test_the_checksum_is_crc32_over_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = [b"one", b"", memoryview(torch.arange(5).numpy()), b"two"]
    joined = b"".join(bytes(part) for part in parts)
    expected = f"crc32:{zlib.crc32(joined):08x}:{len(joined)}"
    assert checksum(parts) == expected
    monkeypatch.setattr("pml_fewshot.io.tensors.BLOCK", 7)
    assert checksum(parts) == expected


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager"), AveragedModel])
def test_wrapped_embedders_are_exported_to_plain_names_and_read_back_wrapped_or_not(
    wrap: Callable[[nn.Module], nn.Module], inside: bool, tmp_path: Path
) -> None:
    def around(embedder: Embedder) -> nn.Module:
        return Embedder(wrap(embedder.trunk), embedder.projection) if inside else wrap(embedder)

    plain = conv4(seed=1)
    wrapped = around(plain)
    export_embedder(tmp_path / "plain.safetensors", plain)
    export_embedder(tmp_path / "wrapped.safetensors", wrapped)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "wrapped.safetensors").read_bytes()
    for other in (conv4(), around(conv4())):
        load_embedder(tmp_path / "wrapped.safetensors", other)
        export_embedder(tmp_path / "again.safetensors", other)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_parts_that_only_have_a_wrappers_names_keep_them(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)

    export_embedder(tmp_path / "own.safetensors", Own())
    assert load_file(tmp_path / "own.safetensors").keys() == {"module.weight", "module.bias"}
