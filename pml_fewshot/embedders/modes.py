"""Keeps results independent of what surrounds a call: train mode, autocast, grad and inference mode, 16 bits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_in_eval: dict[nn.Module, tuple[int, bool]] = {}  # part -> how many blocks hold it in eval mode, its own mode


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """The settings of every evaluation: eval mode, no gradient, and no autocast, whatever the caller has set."""
    with torch.inference_mode(False), torch.no_grad(), no_autocast(), eval_mode(*modules):
        yield


def plainly() -> bool:
    """Whether operations run as they are called: not under `torch.func`'s transforms, and neither compiled nor traced.

    Under those, a function of our own or of NumPy's would be refused or become a constant.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not (transformed or torch.compiler.is_compiling() or torch.jit.is_tracing())


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Puts modules and their parts into eval mode, then restores each one's own mode, even that of a frozen batch norm.

    Several threads may hold one module at the same time: the last to leave restores the modes.
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    with _lock:
        for module in modules:
            _mark_frozen(module)
        for part in parts:
            blocks, training = _in_eval.get(part, (0, part.training))
            _in_eval[part] = blocks + 1, training
        for module in modules:
            module.eval()
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                blocks, training = _in_eval.pop(part)
                if blocks > 1:
                    _in_eval[part] = blocks - 1, training
                else:
                    part.training = training


FROZEN = "_pml_fewshot_frozen"  # a mark on parts that were in eval mode within a module in train mode


@contextmanager
def train_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into train mode, except for the parts frozen by hand, and into eval mode at the end.

    Parts in eval mode within a module in train mode are frozen. They stay frozen in a second training too, when the
    whole module is in eval mode, until somebody calls their `train()`. Gradients are on and autocast is off.
    """
    _mark_frozen(module)
    frozen = [part for part in module.modules() if FROZEN in vars(part) and not part.training]
    module.train()
    for part in frozen:
        part.training = False
    try:
        with ordinary_modes():
            yield
    finally:
        module.eval()


def _mark_frozen(module: nn.Module) -> None:
    """Marks the frozen parts of a module in train mode, in copies too: eval mode of the whole would hide them."""
    for part in module.modules() if module.training else ():
        if part.training:
            vars(part).pop(FROZEN, None)
        else:
            vars(part)[FROZEN] = True


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Gradients on and autocast off, whatever the caller has set."""
    with torch.inference_mode(False), torch.enable_grad(), no_autocast():
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off on CPU and CUDA: bfloat16's 8 bits cannot distinguish nearby embeddings."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def in_float32(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function of tensors compute in at least float32, whatever their type and autocast say.

    float16 overflows when values above 255 are squared, and cannot represent a norm below 1e-7.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        wide = {id(each): widened(each) for each in (*args, *kwargs.values())}  # one tensor given twice stays one
        with no_autocast():
            return function(*(wide[id(a)] for a in args), **{name: wide[id(a)] for name, a in kwargs.items()})

    return wrapped


def widened(value: Any) -> Any:
    """A float tensor in at least float32; anything else unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value
