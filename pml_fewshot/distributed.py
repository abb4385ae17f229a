"""Training and evaluation across processes that `torchrun` started, as in a single one: shares and messages.

All processes draw the same batches and episodes. Each embeds or scores its share, and all then have the whole: losses,
miners and memories see what a single process would see, and work that is not shared is simply done by all.
"""

import hashlib
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from pml_fewshot.checks import UsageError
from pml_fewshot.sampling.randomness import restored, seed_quickly

MINUTES = 10.0  # a process waits this long for the others, unless PML_FEWSHOT_TIMEOUT_MINUTES is set


@dataclass(frozen=True)
class World:
    """The processes that share the work: there are `size` of them, and this one is number `rank`."""

    rank: int = 0
    size: int = 1
    sync_batch_norm: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and reports."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's share of `count` items: every `size`-th, so that each process has some of all classes."""
        return slice(self.rank, count, self.size)


class ProcessLost(RuntimeError):
    """Another process did not answer: it was killed, ended with an error, or is waiting for something else."""

    def __init__(self, reason: object) -> None:
        text = shorten(re.sub(r"\[\S+:\d+\] ", "", str(reason)), 200)  # without locations in gloo's source
        do = "look for its own error, and resume the run by --run-dir and --resume"
        super().__init__(f"expected an answer of all processes, got none of one of them ({text}); {do}")


_world = World()
_opened = False  # whether a `processes` block is open
_lost = ""  # why the others no longer answer
_step, _calls = 0, 0  # the training step, and the number of `own_draws` blocks in it


def world() -> World:
    """The processes that share the current work: only this one, except within `processes`."""
    return _world


@contextmanager
def processes(device: str = "auto", sync_batch_norm: bool = False) -> Iterator[World]:
    """Context manager in which the processes that `torchrun` started share the work; without torchrun there is one.

    `run` enters it automatically. Your own script calls `fit`, `encode`, evaluators and testers within it, in the same
    order in all processes, from one thread. All processes but the first print nothing and issue no warnings.

    Args:
        device: "cpu" (gloo), "cuda" (NCCL, one GPU for each process on a machine) or "auto".
        sync_batch_norm: compute batch norm's statistics over all processes in training, so that N of them train as one
            does, up to rounding; by default over each process's own share. Costs two more messages per layer.

    Raises:
        UsageError: a process without its own GPU, a port in use, or no answer from the others in time.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    global _opened
    if started == 1 or _opened:
        yield _world
        return
    _join(device != "cpu" and torch.cuda.is_available())
    with _as(World(dist.get_rank(), dist.get_world_size(), sync_batch_norm)) as own, ExitStack() as quiet:
        if not own.is_first:
            quiet.enter_context(redirect_stdout(quiet.enter_context(Path(os.devnull).open("w"))))
            quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _opened = True
        try:
            yield own
        finally:
            _opened = False


@contextmanager
def alone() -> Iterator[None]:
    """Context manager in which each process works alone, for work that not all of them do or that each does in full."""
    with _as(World(sync_batch_norm=_world.sync_batch_norm)):
        yield


@contextmanager
def _as(other: World) -> Iterator[World]:
    global _world
    before, _world = _world, other
    try:
        yield other
    finally:
        _world = before


@cache
def _join(on_gpu: bool) -> None:
    """Adds this process to the group that torchrun started, until it exits."""
    timeout = timedelta(minutes=float(os.environ.get("PML_FEWSHOT_TIMEOUT_MINUTES", MINUTES)))
    local, address = local_rank(), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if on_gpu and local < torch.cuda.device_count():  # else `resolve_device` refuses it, in all processes
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # small messages go over the CPU, so that no GPU waits
    meeting: dict[str, Any] = {}  # by default taken from the environment
    try:
        if (memory := launch_memory()) is not None:  # it still has the addresses of the processes before these
            store = dist.PrefixStore(f"pml_fewshot/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", memory)
            rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
            meeting = {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(backend, timeout=timeout, **meeting)
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        reason = shorten(str(error), 200)
        do = "give torchrun another --master-port, or --standalone on one machine, and start all processes"
        raise UsageError(f"expected all processes to meet at {address}, got none there ({reason}); {do}") from error


def check_no_torchrun(what: str) -> None:
    """Raises a UsageError if torchrun started several processes, for work that independent ones share better."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        do = "start the same command once for each, without torchrun"
        raise UsageError(f"expected workers of {what} that are started one by one, got torchrun; {do}")


def local_rank() -> int:
    """The number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _world.size > 1 or "RANK" in os.environ else 0


def launch_memory() -> "dist.TCPStore | None":
    """The store held by torchrun's agent, which outlives a process that torchrun restarts (--max-restarts)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))


@contextmanager
def _answered() -> Iterator[None]:
    global _lost
    if _lost:  # a process that continued would receive another message of the others
        raise ProcessLost(_lost)
    try:
        yield
    except RuntimeError as error:  # from gloo or NCCL, whose messages name sockets
        _lost = str(error)
        raise ProcessLost(error) from error


def told_by_all(value: Any) -> list[Any]:
    """The values of all processes, in their order: numbers, strings, or containers of them."""
    if _world.size == 1:
        return [value]
    told = [None] * _world.size
    with _answered():
        dist.all_gather_object(told, value)
    return told


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes."""
    if _world.size == 1:
        return flag
    flags = torch.tensor([float(flag)])
    return bool(summed(flags) > 0)


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if _world.size > 1:
        with _answered():
            dist.all_reduce(tensor)
    return tensor


def everyones(own: Tensor) -> list[Tensor]:
    """The tensors of all processes, in their order; all have the same shape."""
    if _world.size == 1:
        return [own]
    each = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(_world.size)]
    with _answered():
        dist.all_gather(each, own.contiguous())
    return each


def gathered(own: Tensor, count: int) -> Tensor:
    """All `count` rows in order, gathered from each process's share, `rows[world().share(count)]`."""
    if _world.size == 1:
        return own
    missing = -(-count // _world.size) - len(own)  # at most one, if the number of processes does not divide `count`
    padded = torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own
    return torch.stack(everyones(padded), dim=1).flatten(0, 1)[:count]


class _Gathered(torch.autograd.Function):
    """`gathered` for when all processes compute the same loss of all rows.

    The gradient of a process's own rows is complete, and no other process has it; it is multiplied by the number of
    processes, because gradients are averaged at the end. A loss's own weights get and keep the same gradient in all.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int) -> Tensor:
        ctx.world, ctx.count = _world, count
        return gathered(own, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope[ctx.world.share(ctx.count)] * ctx.world.size, None


class Summed(torch.autograd.Function):
    """`summed` of a copy; its gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return summed(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return summed(slope.clone())


def shared(module: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """Computes module(items) for rows (B, *item), each process running its share; also in training.

    Dropout draws differently in each process.

    Raises:
        UsageError: fewer items than processes, or than two per process if batch norm computes its statistics on them.
    """
    if _world.size == 1:
        return module(items)
    modules = module.modules() if isinstance(module, nn.Module) else ()
    normalizes = any(isinstance(each, _BatchNorm) and each.training for each in modules)
    least = 2 if normalizes and not _world.sync_batch_norm else 1
    if len(items) < least * _world.size:
        wanted = f"{least} items for each of {_world.size} processes"
        raise UsageError(f"expected {wanted}, got a batch of {len(items)}; start fewer processes")
    with own_draws(items.device):
        own = module(items[_world.share(len(items))])
    return _Gathered.apply(own, len(items)) if isinstance(own, Tensor) else own


@contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """Gives each process its own global generators within this block, and restores the common ones after it.

    A loss, miner or context then draws what it would in a single process. The seed is that of torch's generator with
    the training step, so that a resumed run makes the same draws.
    """
    global _calls
    if _world.size == 1:
        yield
        return
    _calls += 1
    text = f"{torch.initial_seed()} {_step} {_calls} {_world.rank}"
    with restored():
        seed_quickly(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"), device)
        yield


def begin_step(step: int) -> None:
    """Sets the training step that the next `own_draws` are for."""
    global _step, _calls
    _step, _calls = step, 0


def average_step(trainer: nn.Module, loss: Tensor) -> tuple[Tensor, bool]:
    """Averages a step's gradients over the processes; returns the mean loss, and whether any of them has learned.

    The running statistics of batch norm are averaged too, so that all processes have the same weights and buffers, bit
    for bit, after each step. Costs one message on the device, as large as the weights, and one on the CPU.
    """
    weights = [weight for weight in trainer.parameters() if weight.requires_grad]
    has = summed(torch.tensor([loss.requires_grad, *(weight.grad is not None for weight in weights)]).float())
    learned, *reached = (has > 0).tolist()
    for weight, some in zip(weights, reached, strict=True):
        if some and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    loss = loss.detach().clone()
    _average([loss, *(weight.grad for weight in weights if weight.grad is not None), *_own_buffers(trainer)])
    return loss, learned


def _of_shares(trainer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that see only a process's share; PML's losses and distances, and modules in them, see all items."""
    modules = dict(trainer.named_modules())
    of_all = tuple(f"{name}." for name, module in modules.items() if isinstance(module, ModuleWithRecords))
    return [(name, module) for name, module in modules.items() if not f"{name}.".startswith(of_all)]


def lazy_parts(trainer: nn.Module) -> list[str]:
    """The names of lazy weights, which have no shape before the first share arrives."""
    weights = [
        (f"{name}.{key}", each) for name, module in _of_shares(trainer) for key, each in module._parameters.items()
    ]
    return [name for name, weight in weights if weight is not None and is_lazy(weight)]


def _own_buffers(trainer: nn.Module) -> list[Tensor]:
    """Buffers that a process computes from its share: the running statistics of batch norm, where it is trained."""
    modules = [each for _, each in _of_shares(trainer) if isinstance(each, _NormBase) and each.training]
    statistics = [each for module in modules for each in (module.running_mean, module.running_var)]
    return list({id(each): each for each in statistics if each is not None}.values())


def _average(tensors: list[Tensor]) -> None:
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order everywhere
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = summed(torch.cat([tensor.detach().flatten() for tensor in same])).div_(_world.size)
        for tensor, mean in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))


@contextmanager
def together() -> Iterator[None]:
    """Raises an error of any process in all processes at the end of this block, which must send no messages.

    The first raises its own error or, naming the process, another's; `reported_elsewhere` tells the others it is shown.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as own:  # raised below
        if _world.size == 1:
            raise
        error = own
    if _world.size == 1:
        return
    known = isinstance(error, UsageError)
    told = told_by_all(None if error is None else str(error) if known else "".join(traceback.format_exception(error)))
    rank = next((number for number, text in enumerate(told) if text is not None), None)
    if rank is None:
        return
    if error is None:
        error = UsageError(f"process {rank}: {told[rank]}")
    if not _world.is_first:
        error.reported_elsewhere = True  # type: ignore[attr-defined]
    raise error


def check_same(what: dict[str, Any], do: str) -> None:
    """Raises a UsageError in all processes, naming the entries in which a process differs from the first."""
    first, *others = told_by_all(what)
    for number, other in enumerate(others, start=1):
        if differ := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            shown = [f"{n} ({shorten(str(other.get(n)), 60)}, not {shorten(str(first.get(n)), 60)})" for n in differ]
            got = f"in process {number} another {', '.join(shown)}"
            error = UsageError(f"expected the same in all processes, got {got}; {do}")
            if not _world.is_first:
                error.reported_elsewhere = True  # type: ignore[attr-defined]
            raise error
