"""InnerLoop: the inner loop of MAML, a network and its gradient steps on the support sets of many tasks at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pml_fewshot.checks import UsageError, check_choice
from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.trainers.maml.autograd import DoubleBackward, Recompute
from pml_fewshot.trainers.maml.task_parallel import Mode, Weights, fastest, labels_of, loop, normalizes, vmap
from pml_fewshot.trainers.pml_compat import WITH_MEMORY

TaskLoss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, D) and labels (B,) to a scalar: a function or a module
LearnedRates = Literal["per_layer", "per_layer_per_step"]
Parallel = Literal["auto", "loop", "vmap", "threads"]


class _Shared:
    """Whether something has been done already, shared by all copies of a module."""

    done = False

    def __deepcopy__(self, memo: object) -> "_Shared":
        return self


class InnerLoop(nn.Module):
    """Runs a network with the weights of T tasks, and adapts them to each task's support set.

    The network itself does not change: it is called functionally, with weights that are passed in. `loss` is that of a
    support set, and `gives_logits` requires an output for each way; the rest is as for MAMLTrainer.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: TaskLoss,
        gives_logits: bool,
        inner_lr: float,
        inner_steps: int,
        learn_inner_lr: LearnedRates | None,
        adapt: Sequence[str] | None,
        checkpoint_steps: bool,
        parallel: Parallel,
    ) -> None:
        super().__init__()
        if not 0 < inner_lr < float("inf"):
            raise UsageError(f"expected a finite inner_lr above 0, got {inner_lr}; the paper has 0.4 and 0.01")
        check_choice("parallel", parallel, get_args(Parallel))
        self.network, self.loss, self.gives_logits = network, loss, gives_logits
        self.inner_lr, self.checkpoint_steps, self.parallel = inner_lr, checkpoint_steps, parallel
        self._normalizes = any(isinstance(module, _BatchNorm) for module in network.modules())  # until it has run
        self._modes: dict[str, Mode] = {}  # how tasks are run, by device type
        self._seen_to_learn = _Shared()
        self.adapt = ("",) if adapt is None else (adapt,) if isinstance(adapt, str) else tuple(adapt)
        names = [name for name, _ in network.named_parameters()]
        if not self.adapt or not all(any(name.startswith(prefix) for name in names) for prefix in self.adapt):
            do = "give beginnings of their names"
            raise UsageError(f"expected parameters to adapt, got {names} for adapt={adapt}; {do}")
        layers = dict.fromkeys(name.rpartition(".")[0] for name in names if name.startswith(self.adapt))
        self.layers = {layer: number for number, layer in enumerate(layers)}
        self.learned_lr: nn.Parameter | None = None  # (steps, layers), or (1, layers) for all steps
        if learn_inner_lr is not None:
            check_choice("learn_inner_lr", learn_inner_lr, get_args(LearnedRates))
            rows = inner_steps if learn_inner_lr == "per_layer_per_step" else 1
            self.learned_lr = nn.Parameter(torch.full((rows, len(layers)), float(inner_lr)))

    @property
    def normalizes(self) -> bool:
        """Whether the network has a batch norm; before its first run, whether one of its modules is one."""
        return self._normalizes

    @property
    def adapted(self) -> list[str]:
        """Names of the parameters that a step changes: those requested, without the frozen ones."""
        return [n for n, p in self.network.named_parameters() if p.requires_grad and n.startswith(self.adapt)]

    def mode(self, images: Tensor) -> Mode:
        """The fastest way to run tasks of images (B, *item) on their device; tested once there, waiting for a GPU."""
        device = images.device.type
        if device not in self._modes:
            self._normalizes = normalizes(self.network, images)
            self._modes[device] = fastest(self.network, images) if self.parallel == "auto" else self.parallel
        return self._modes[device]

    def weights(self, tasks: int) -> Weights:
        """The network's own weights, repeated for each task without a copy: (T, *shape) each."""
        own = self.network.named_parameters()  # those made in inference mode take no gradient, but their copies do
        return {name: (p.clone() if p.is_inference() else p).expand(tasks, *p.shape) for name, p in own}

    def outputs(self, weights: Weights, images: Tensor, ways: int, stats_of: Tensor | None = None) -> Tensor:
        """Runs the network for T tasks: images (T, B, *item) to outputs (T, B, D).

        Outputs are float32 or better: under autocast, losses and distances need more than bfloat16's 8 bits. Batch norm
        uses the statistics of `stats_of`, other images of the same tasks, or of the images themselves when None.
        """
        mode, num_stat_items = self.mode(images[0]), None
        if stats_of is not None:
            num_stat_items = stats_of.shape[1]
            images = torch.cat([stats_of, images], dim=1)
        run = vmap if mode == "vmap" else loop
        # without gradients, a network may fold batch norm with its running statistics into other weights
        with torch.enable_grad():
            outputs = run(self.network, weights, images, num_stat_items)
        if self.gives_logits:
            if outputs.ndim != 3 or outputs.shape[2] < ways:
                do = f"make its last layer at least {ways} wide, or give a head that classifies embeddings"
                got = f"outputs of shape {tuple(outputs.shape[2:])}"
                raise UsageError(f"expected a network with at least {ways} outputs, one a way, got {got}; {do}")
            outputs = outputs[:, :, :ways]
        return outputs[:, num_stat_items:].to(torch.promote_types(outputs.dtype, torch.float32))

    def steps(self, weights: Weights, support: Tensor, steps: int, second_order: bool) -> Iterator[Weights]:
        """Yields the weights after each step on support (T, W, K, *item): theta - rate * gradient of the loss.

        Second order keeps the graph of the gradients, through which derivatives with respect to the initial weights
        flow; without it gradients count as constants, the first-order approximation. Under `torch.no_grad()`, nothing
        links weights to earlier ones, which can then be freed.

        Source: Finn, Abbeel and Levine 2017, algorithm 1, lines 5 and 6.
        """
        images, labels, ways = support.flatten(1, 2), labels_of(support), support.shape[1]
        names, adapted = list(weights), self.adapted
        if not adapted:
            raise UsageError("expected parameters to adapt, got frozen ones only; unfreeze some")
        loss_parameters = list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

        def step(values: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor]:
            """Maps all weights, and the rates of the adapted ones, to the adapted ones after the step."""
            before = dict(zip(names, values[: len(names)], strict=True))
            if not torch.is_grad_enabled():
                before |= {name: before[name].detach().requires_grad_() for name in adapted}
            wanted = [before[name] for name in adapted]
            with torch.enable_grad(), DoubleBackward() if second_order else nullcontext():
                # tasks share nothing, so the gradient of the sum holds that of each
                total = task_losses(self.loss, self.outputs(before, images, ways), labels).sum()
                # (zeros for a parameter that the network does not use)
                gradients = torch.autograd.grad(total, wanted, create_graph=create_graph, materialize_grads=True)
            return [w - rate * g for w, rate, g in zip(wanted, values[len(names) :], gradients, strict=True)]

        for number in range(steps):
            rates = [torch.tensor(self.inner_lr, dtype=torch.float64)] * len(adapted)
            if self.learned_lr is not None:
                of_layers = self.learned_lr[min(number, len(self.learned_lr) - 1)]
                rates = [of_layers[self.layers[name.rpartition(".")[0]]] for name in adapted]
            values = [*weights.values(), *rates]
            if self.checkpoint_steps and second_order:
                after: Sequence[Tensor] = Recompute.apply(step, len(values), *values, *loss_parameters)
            else:
                after = step(values, second_order)
            if not self._seen_to_learn.done and support.shape[2] == 1:  # looks once, because it waits for a GPU
                if all(torch.equal(weights[name], new) for name, new in zip(adapted, after, strict=True)):
                    got = getattr(self.loss, "__name__", type(self.loss).__name__)
                    raise UsageError(
                        f"expected an inner loss that learns from one image of each class, got {got}, whose gradient is"
                        " 0 without positive pairs; give cross-entropy or a loss with class weights, or more shots"
                    )
                self._seen_to_learn.done = True
            weights = {**weights, **dict(zip(adapted, after, strict=True))}
            yield weights

    def adapt_to(self, support: Tensor, steps: int) -> Weights:
        """The weights after `steps` first-order steps on support (T, W, K, *item), starting from the network's own."""
        with torch.no_grad():
            weights = self.weights(len(support))
            for after in self.steps(weights, support, steps, second_order=False):
                weights = after
        return weights


def as_task_loss(loss: Any) -> TaskLoss:
    """The loss given to MAMLTrainer, built if it is a partial of a class; functions and their partials stay as is."""
    is_function = isinstance(loss, partial) and not isinstance(loss.func, type)
    built = loss if is_function else instantiate(loss)
    if isinstance(built, type):
        raise UsageError(f"expected a loss to call, got the class {built.__name__}; write {built.__name__}()")
    for part in built.modules() if isinstance(built, nn.Module) else ():
        if isinstance(part, WITH_MEMORY):  # which would carry state from one task to the next
            name = type(part).__name__
            raise UsageError(f"expected a loss that remembers nothing, got {name}; take another for MAML")
    return built


def task_losses(loss: TaskLoss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss (T,) of each of T tasks with outputs (T, B, D) and the same labels (B,)."""
    losses = [loss(of_task, labels) for of_task in outputs]
    if losses[0].shape != ():
        got = tuple(losses[0].shape)
        raise UsageError(f'expected a loss that is one number for a task, got shape {got}; use reduction="mean"')
    return torch.stack(losses)
