"""Checkpoints: whole or not at all, data and never code, and errors that name file and field."""

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from pml_fewshot.checkpoint import (
    check_exportable,
    export_embedder,
    load_checkpoint,
    load_embedder,
    save_checkpoint,
)
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.trainers.fit import fit
from pml_fewshot.trainers.training_state import TrainingState

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


# --- the state to go on from ------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", STATE)
    loaded = load_checkpoint(str(tmp_path / "last.pt"))
    assert loaded.keys() == STATE.keys()
    for name in ("losses", "stopped", "best"):
        assert loaded[name] == STATE[name]
    assert torch.equal(loaded["weights"]["a"], torch.arange(6.0).reshape(2, 3))
    assert loaded["weights"]["count"].dtype == torch.int64
    torch.Generator().set_state(loaded["generator"])
    assert os.listdir(tmp_path) == ["last.pt"]  # noqa: PTH208 - nothing is left behind


def test_saving_replaces_the_file_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "last.pt", {"step": step})
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 2}


class Unpicklable:
    def __reduce__(self) -> str:
        raise pickle.PicklingError("cannot be saved")


def test_failing_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(pickle.PicklingError):
        save_checkpoint(tmp_path / "last.pt", {"weights": torch.ones(1000), "wrong": Unpicklable()})
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 1}


@pytest.mark.parametrize("broken", ["save", "fsync"])
def test_interrupted_save_leaves_the_old_file_whole(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk or a kill would, in the middle of writing and when all is written but the rename."""
    save_checkpoint(tmp_path / "last.pt", {"step": 1})

    def fails(*args: object) -> None:
        if broken == "save":
            args[1].write(b"half of it")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if broken == "save" else (os, "fsync")), fails)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last.pt", {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 1}
    save_checkpoint(tmp_path / "last.pt", {"step": 3})  # what the failure left does not stand in the way
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 3}


def test_data_is_on_disk_before_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_replace = Path.replace

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    monkeypatch.setattr(Path, "replace", replace)
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    export_embedder(tmp_path / "embedder.safetensors", conv4())
    assert events == ["sync", "rename", "sync"] * 2  # the file, its name, the folder that has the name


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.pt"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", b"PK\x03\x04", b"\x80\x02.", b".", b"0", b"<html>404</html>"],
    ids=["empty", "text", "zip header", "pickle header", "stop", "pop", "html"],
)
def test_broken_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a checkpoint at .*last\.pt, got .* broken .*; use another"):
        load_checkpoint(tmp_path / "last.pt")


def test_checkpoint_cut_short_anywhere(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", STATE)
    whole = (tmp_path / "last.pt").read_bytes()
    others = {}
    for length in range(0, len(whole), 23):
        (tmp_path / "last.pt").write_bytes(whole[:length])
        try:
            load_checkpoint(tmp_path / "last.pt")
        except ValueError as error:
            assert "expected a checkpoint" in str(error)  # noqa: PT017
        except Exception as error:  # all that are wrong, not only the first
            others[length] = repr(error)
        else:
            others[length] = "was loaded"
    assert others == {}


class Trap:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [torch.save, None], ids=["torch.save", "pickle"])
def test_pickle_with_code_is_refused(writer: Callable[..., None] | None, tmp_path: Path) -> None:
    state = {"weights": torch.ones(2), "trap": Trap(tmp_path / "sprung")}
    if writer is None:
        (tmp_path / "last.pt").write_bytes(pickle.dumps(state, protocol=2))
    else:
        writer(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="holds more than data"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "sprung").exists()


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save({"trainer": nn.Linear(2, 2)}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="holds more than data"):
        load_checkpoint(tmp_path / "last.pt")


# --- of fit -----------------------------------------------------------------------------------------------------------


class Squares(nn.Module):
    """Of a line through no points: the least trainer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().mean()


def train(path: Path, steps: int, optimizer: partial[Optimizer], scheduler: partial[LRScheduler] | None = None) -> None:
    torch.manual_seed(0)
    trainer = Squares(nn.Linear(3, 1))
    parts = optimizer(trainer.parameters())
    batches = list(torch.rand(steps, 4, 3))
    fit(
        *(trainer, batches, parts, steps),
        scheduler=scheduler(parts) if scheduler else None,
        checkpoint=path,
        resume=path.exists(),
        progress=False,
    )


MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)
ADAM = partial(Adam, lr=0.1)
STEPS, COSINE = partial(StepLR, step_size=2), partial(CosineAnnealingLR, T_max=4)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ((ADAM,), (MOMENTUM,), "a Adam as optimizer, of which the checkpoint is, got SGD; resume with what it ran"),
        ((ADAM,), (partial(AdamW, lr=0.1),), "a Adam as optimizer, of which the checkpoint is, got AdamW"),
        ((ADAM, STEPS), (ADAM,), "a scheduler, as the checkpoint has one, got none; give the one"),
        ((ADAM, STEPS), (ADAM, COSINE), "a StepLR as scheduler, of which the checkpoint is, got CosineAnnealingLR"),
        ((ADAM,), (ADAM, STEPS), "trainer, optimizer, scheduler in the checkpoint, got no scheduler; resume what ran"),
    ],
)
def test_a_training_goes_on_with_its_own_parts_alone(
    then: tuple[Any, ...], now: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    train(tmp_path / "last.pt", 2, *then)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=f"^expected {said}"):
        train(tmp_path / "last.pt", 4, *now)
    assert (tmp_path / "last.pt").read_bytes() == before
    train(tmp_path / "last.pt", 4, *then)
    assert load_checkpoint(tmp_path / "last.pt")["history"]["steps"] == 4


@pytest.mark.parametrize(
    "entry", ["kinds", "optimizer", "best", "lowest_loss", "recent", "history", "torch_generator", "cuda_generators"]
)
def test_what_a_checkpoint_lacks_is_named(entry: str, tmp_path: Path) -> None:
    train(tmp_path / "last.pt", 2, ADAM)
    state = load_checkpoint(tmp_path / "last.pt")
    del state[entry]
    save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(ValueError, match=rf"^expected .*trainer, .*, got no {entry}; "):
        train(tmp_path / "last.pt", 4, ADAM)


class Counted(nn.Linear):
    """A layer whose state is more than tensors."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def test_best_weights_with_states_that_are_no_tensors() -> None:
    layer = Counted(3, 1)
    trainer = Squares(layer)
    state = TrainingState(trainer, Adam(trainer.parameters()), None, [])
    for score in (0.25, 0.5, 0.75, 0.5):
        trainer(torch.ones(2, 3))
        layer.weight.data.fill_(score)
        if score == 0.5:
            kept = state.best["layer.weight"] if state.best else None
        state.keep_if_best(score)
    assert state.best is not None
    assert state.best["layer.weight"] is kept  # in place, where both are tensors
    state.restore_best()
    assert layer.weight.unique().tolist() == [0.75]
    assert layer.calls == 3


def test_embedders_with_states_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    embedder = Embedder(nn.Sequential(nn.Flatten(), Counted(3, 1)))
    said = r"^expected tensors alone in the state of Embedder, got trunk\.1\._extra_state, a dict; make it a buffer"
    with pytest.raises(ValueError, match=said):
        export_embedder(tmp_path / "embedder.safetensors", embedder)
    with pytest.raises(ValueError, match=said):
        check_exportable(embedder)
    assert not list(tmp_path.iterdir())
    check_exportable(conv4())


# --- the embedder alone -----------------------------------------------------------------------------------------------


def test_exported_embedder_comes_back_bit_for_bit(tmp_path: Path) -> None:
    first, second = conv4(seed=0), conv4(seed=1)
    first(torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)))  # moves batch norm's statistics
    export_embedder(tmp_path / "embedder.safetensors", first)
    load_embedder(str(tmp_path / "embedder.safetensors"), second)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert os.listdir(tmp_path) == ["embedder.safetensors"]  # noqa: PTH208


def test_export_changes_nothing_in_the_embedder(tmp_path: Path) -> None:
    embedder = conv4()
    weight = embedder.trunk.blocks[1].conv.weight
    export_embedder(tmp_path / "embedder.safetensors", embedder)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.requires_grad


def test_failing_export_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = conv4(seed=0)
    export_embedder(tmp_path / "embedder.safetensors", first)

    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        export_embedder(tmp_path / "embedder.safetensors", conv4(seed=1))
    second = conv4(seed=2)
    load_embedder(tmp_path / "embedder.safetensors", second)
    assert torch.equal(first.projection.weight, second.projection.weight)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (partial(conv4, channels=8), r"expected \(3, 8\) for projection\.weight, got \(3, 4\)"),
        (lambda: Embedder(Conv4(channels=4)), r"expected nothing for projection\.bias, got \(3,\)"),
        (
            lambda: Embedder(Conv4(channels=4), nn.Sequential(nn.Linear(4, 3))),
            r"expected \(3,\) for projection\.0\.bias, got nothing|expected nothing for projection\.bias, got \(3,\)",
        ),
    ],
    ids=["wider", "too much in the file", "too little in the file"],
)
def test_other_architecture_names_the_field(build: Callable[[], Embedder], expected: str, tmp_path: Path) -> None:
    export_embedder(tmp_path / "embedder.safetensors", conv4())
    other = build()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=expected):
        load_embedder(tmp_path / "embedder.safetensors", other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())  # nothing half-loaded


def test_missing_embedder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected an exported embedder at .*x\.safetensors, got no such file"):
        load_embedder(tmp_path / "x.safetensors", conv4())


def test_broken_embedder(tmp_path: Path) -> None:
    path = tmp_path / "embedder.safetensors"
    export_embedder(path, conv4())
    whole = path.read_bytes()
    for content in (b"", b"not tensors", whole[:100], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected a safetensors file at .*, got a broken one"):
            load_embedder(path, conv4())


def test_tied_weights_are_exported_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    first, second = tied(), tied()
    export_embedder(tmp_path / "network.safetensors", first)
    load_embedder(tmp_path / "network.safetensors", second)
    assert torch.equal(second[1].weight, first[0].weight)
    assert second[1].weight is second[0].weight
