"""InnerLoop: a network and its gradient steps on the support sets of many tasks at once, the inner loop of MAML."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pml_fewshot.checks import UsageError, check_choice
from pml_fewshot.instantiate import instantiate
from pml_fewshot.trainers.maml.autograd import DoubleBackward, recompute
from pml_fewshot.trainers.maml.task_parallel import Mode, Weights, fastest, grouped, labels_of, loop, normalizes, vmap
from pml_fewshot.trainers.pml_compat import check_remembers_nothing

TaskLoss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, D) and labels (B,) to a scalar: a function or a module
LearnedRates = Literal["per_layer", "per_layer_per_step"]
Parallel = Literal["auto", "loop", "vmap", "grouped"]


class InnerLoop(nn.Module):
    """Runs a network by the weights of T tasks, and adapts them to each task's support set.

    The network itself stays as it is: it is called functionally, by weights that are passed in. `loss` is that of a
    support set, and `gives_logits` says that the outputs must be one for each way; the rest is as for MAMLTrainer.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: TaskLoss,
        gives_logits: bool,
        inner_lr: float,
        inner_steps: int,
        learn_inner_lr: LearnedRates | None = None,
        adapt: Sequence[str] | None = None,
        checkpoint_steps: bool = False,
        parallel: Parallel = "auto",
    ) -> None:
        super().__init__()
        if not 0 < inner_lr < float("inf"):
            raise UsageError(f"expected a finite inner_lr above 0, got {inner_lr}; the paper has 0.4 and 0.01")
        check_choice("parallel", parallel, ("auto", "loop", "vmap", "grouped"))
        if learn_inner_lr is not None:
            check_choice("learn_inner_lr", learn_inner_lr, ("per_layer", "per_layer_per_step"))
        self.network, self.loss, self.gives_logits = network, loss, gives_logits
        self.inner_lr, self.checkpoint_steps, self.parallel = inner_lr, checkpoint_steps, parallel
        self.normalizes = any(isinstance(module, _BatchNorm) for module in network.modules())  # until it has run
        self.modes: dict[str, Mode] = {}  # how tasks are run, by type of device
        self.was_seen_to_learn = False
        self.adapt = ("",) if adapt is None else (adapt,) if isinstance(adapt, str) else tuple(adapt)
        names = [name for name, _ in network.named_parameters()]
        if not self.adapt or not all(any(name.startswith(prefix) for name in names) for prefix in self.adapt):
            raise UsageError(
                f"expected parameters to adapt, got {names} for adapt={adapt}; give beginnings of their names"
            )
        layers = dict.fromkeys(name.rpartition(".")[0] for name in names if name.startswith(self.adapt))
        self.layers = {layer: number for number, layer in enumerate(layers)}
        self.learned_lr: nn.Parameter | None = None  # (steps, layers), or (1, layers) for all steps
        if learn_inner_lr is not None:
            rows = inner_steps if learn_inner_lr == "per_layer_per_step" else 1
            self.learned_lr = nn.Parameter(torch.full((rows, len(layers)), float(inner_lr)))

    @property
    def adapted(self) -> list[str]:
        """Names of the parameters that a step changes: those asked for, without the frozen ones."""
        named = self.network.named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and name.startswith(self.adapt)]

    def mode(self, images: Tensor) -> Mode:
        """How tasks of images (B, *item) run fastest on their device; tried out there once, which waits for a GPU."""
        device = images.device.type
        if device not in self.modes:
            self.normalizes = normalizes(self.network, images)
            self.modes[device] = fastest(self.network, images) if self.parallel == "auto" else self.parallel
        return self.modes[device]

    def weights(self, tasks: int) -> Weights:
        """The network's own weights, once for each task, without a copy: (T, *shape) each."""
        return {name: p.expand(tasks, *p.shape) for name, p in self.network.named_parameters()}

    def outputs(
        self, weights: Weights, images: Tensor, ways: int, stats_of: Tensor | None = None, double_backward: bool = False
    ) -> Tensor:
        """Runs the network for T tasks: images (T, B, *item) to outputs (T, B, D).

        They are float32 or better: under autocast losses and distances want more than bfloat16's 8 bits.

        Args:
            weights, images, ways: of the tasks.
            stats_of: other images of the same tasks, whose statistics batch norm uses; the images' own when None.
            double_backward: the outputs will be differentiated twice, for which another memory layout is faster.
        """
        mode, num_stat_items = self.mode(images[0]), None
        if stats_of is not None:
            num_stat_items = stats_of.shape[1]
            images = torch.cat([stats_of, images], dim=1)
        # where no gradient is wanted a network may fold batch norm with its running statistics into other weights
        with torch.enable_grad():
            if mode == "grouped":
                outputs = grouped(self.network, weights, images, num_stat_items, channels_last=not double_backward)
            else:
                outputs = (vmap if mode == "vmap" else loop)(self.network, weights, images, num_stat_items)
        if self.gives_logits and outputs.shape[2:] != (ways,):
            do = f"make its last layer {ways} wide, or give a head that classifies embeddings"
            got = f"outputs of shape {tuple(outputs.shape[2:])}"
            raise UsageError(f"expected a network with {ways} outputs, one for each way, got {got}; {do}")
        return outputs[:, num_stat_items:].to(torch.promote_types(outputs.dtype, torch.float32))

    def steps(self, weights: Weights, support: Tensor, steps: int, second_order: bool) -> Iterator[Weights]:
        """Yields the weights after each step: theta' = theta - rate * gradient of the support set's loss.

        Under `torch.no_grad()` nothing links them to those before, which are then free to go.

        Args:
            weights, support: of T tasks, support (T, W, K, *item).
            steps: how many.
            second_order: keep the graph of the gradients, through which derivatives with respect to the weights at the
                start go. Without it they count as constants, which is the first-order approximation.

        Source: Finn, Abbeel and Levine 2017, algorithm 1, lines 5 and 6.
        """
        images, labels, ways = support.flatten(1, 2), labels_of(support), support.shape[1]
        names, adapted = list(weights), self.adapted
        if not adapted:
            raise UsageError("expected parameters to adapt, got frozen ones only; unfreeze some")
        loss_parameters = list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

        def step(values: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor]:
            """From all weights, and the rates of the adapted ones, to the adapted ones after the step."""
            before = dict(zip(names, values[: len(names)], strict=True))
            if not torch.is_grad_enabled():
                before |= {name: before[name].detach().requires_grad_() for name in adapted}
            wanted = [before[name] for name in adapted]
            with torch.enable_grad(), DoubleBackward() if second_order else nullcontext():
                outputs = self.outputs(before, images, ways, double_backward=second_order)
                # tasks share nothing, so the gradient of the sum holds that of each
                total = task_losses(self.loss, outputs, labels).sum()
                # (zeros for a parameter that the network does not use)
                gradients = torch.autograd.grad(total, wanted, create_graph=create_graph, materialize_grads=True)
            return [w - rate * g for w, rate, g in zip(wanted, values[len(names) :], gradients, strict=True)]

        for number in range(steps):
            values = [*weights.values(), *self._rates(number, adapted)]
            if self.checkpoint_steps and second_order:
                after: Sequence[Tensor] = recompute(step, values, loss_parameters)
            else:
                after = step(values, second_order)
            if not self.was_seen_to_learn and support.shape[2] == 1:
                self._check_change([weights[name] for name in adapted], after)  # once, because it waits for a GPU
            weights = {**weights, **dict(zip(adapted, after, strict=True))}
            yield weights

    def adapt_to(self, support: Tensor, steps: int) -> Weights:
        """The weights after so many first-order steps on support (T, W, K, *item), from the network's own."""
        with torch.no_grad():
            weights = self.weights(len(support))
            for after in self.steps(weights, support, steps, second_order=False):
                weights = after
        return weights

    def _check_change(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise UsageError(
                f"expected an inner loss that learns from one image of each class, got {name}, whose gradient is 0 "
                "without positive pairs; use cross-entropy or a loss with class weights as inner_loss, or more shots"
            )
        self.was_seen_to_learn = True

    def _rates(self, step: int, adapted: Sequence[str]) -> Sequence[Tensor]:
        """The learning rate of each adapted parameter."""
        if self.learned_lr is None:
            return [torch.tensor(self.inner_lr, dtype=torch.float64)] * len(adapted)
        of_layers = self.learned_lr[min(step, len(self.learned_lr) - 1)]
        return [of_layers[self.layers[name.rpartition(".")[0]]] for name in adapted]


def as_task_loss(loss: Any) -> TaskLoss:
    """The loss that MAMLTrainer was given, from a partial of a class too; functions stay, with arguments or without."""
    is_function = isinstance(loss, partial) and not isinstance(loss.func, type)
    built = loss if is_function else instantiate(loss)
    if isinstance(built, type):
        raise UsageError(f"expected a loss to call, got the class {built.__name__}; write {built.__name__}()")
    if isinstance(built, nn.Module):
        check_remembers_nothing(built)
    return built


def task_losses(loss: TaskLoss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss (T,) of each of T tasks with outputs (T, B, D) and the same labels (B,)."""
    losses = [loss(of_task, labels) for of_task in outputs]
    if losses[0].shape != ():
        got = tuple(losses[0].shape)
        raise UsageError(f'expected a loss that is one number for a task, got shape {got}; use reduction="mean"')
    return torch.stack(losses)
