"""InnerLoop: a network and its gradient steps on the support sets of many tasks at once, the inner loop of MAML."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pml_fewshot.adaptation.grouped_tasks import NotGroupable
from pml_fewshot.adaptation.recomputed import recomputed
from pml_fewshot.adaptation.run_tasks import Weights, grouped, loop, vmap
from pml_fewshot.checks import check_choice, require
from pml_fewshot.modes import eval_mode
from pml_fewshot.parts import build

LearnedRates = Literal["per_layer", "per_layer_per_step"]
TaskLoss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, D) and labels (B,) to a scalar: a function or a module
Parallel = Literal["auto", "loop", "vmap", "grouped"]


def built_loss(loss: TaskLoss | Callable[[], nn.Module]) -> TaskLoss:
    """What a loss describes: functions stay as they are, with or without arguments of their own; classes are called."""
    function = loss.func if isinstance(loss, partial) else loss
    return cast(TaskLoss, loss if isinstance(function, FunctionType) else build(loss))


class InnerLoop(nn.Module):
    """Runs a network by the weights of T tasks, and adapts them to each task's support set.

    What it holds stays as it is: the network is called functionally, by weights that are passed in.

    Args:
        network: module from images (B, *item) to outputs (B, D).
        loss: of a support set, called as `loss(outputs (B, D), labels (B,))`.
        inner_lr, inner_steps, learn_inner_lr, adapt, checkpoint_steps, parallel: as for MAMLTrainer.

    Raises:
        ValueError: nothing to adapt, or an unknown way to learn the rates or to run the tasks.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: TaskLoss,
        inner_lr: float,
        inner_steps: int,
        learn_inner_lr: LearnedRates | None = None,
        adapt: Sequence[str] | None = None,
        checkpoint_steps: bool = False,
        parallel: Parallel = "auto",
    ) -> None:
        super().__init__()
        require(inner_lr > 0, "inner_lr above 0", str(inner_lr), "give the learning rate of the inner loop")
        check_choice("parallel", parallel, ("auto", "loop", "vmap", "grouped"))
        if learn_inner_lr is not None:
            check_choice("learn_inner_lr", learn_inner_lr, ("per_layer", "per_layer_per_step"))
        self.network = network
        self.loss = loss
        self.checkpoint_steps = checkpoint_steps
        self.parallel = parallel
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        self.adapted = names if adapt is None else [name for name in names if name.startswith(tuple(adapt))]
        require(
            len(self.adapted) > 0,
            "parameters to adapt",
            f"none that begins with {' or '.join(adapt)}" if adapt is not None else "frozen ones only",
            f"those of the network are {', '.join(names)}" if names else "unfreeze some",
        )
        modules = [name.rpartition(".")[0] for name in self.adapted]
        layers = list(dict.fromkeys(modules))  # in their order
        self.layer_of = [layers.index(module) for module in modules]  # of each adapted parameter
        self.inner_lr = inner_lr
        self.learned_lr: nn.Parameter | None = None  # (steps, layers), or (1, layers) for all steps
        if learn_inner_lr is not None:
            rows = inner_steps if learn_inner_lr == "per_layer_per_step" else 1
            self.learned_lr = nn.Parameter(torch.full((rows, len(layers)), float(inner_lr)))

    def weights(self, tasks: int) -> Weights:
        """The network's own weights, once for each task, without a copy: (T, *shape) each."""
        return {name: p.expand(tasks, *p.shape) for name, p in self.network.named_parameters()}

    def outputs(
        self, weights: Weights, images: Tensor, normalised_by: Tensor | None = None, twice: bool = False
    ) -> Tensor:
        """Runs the network for T tasks.

        Args:
            weights: of the tasks.
            images: (T, B, *item).
            normalised_by: other images of the same tasks, by whose statistics batch norm normalises; the images' own
                when None.
            twice: the outputs will be differentiated twice, for which another layout of memory is faster.

        Returns:
            (T, B, D).
        """
        if self.parallel == "auto":
            self.parallel = self._fastest(weights, images)
        of_first = None
        if normalised_by is not None:
            of_first = normalised_by.shape[1]
            images = torch.cat([normalised_by, images], dim=1)
        # where no gradient is wanted a network may fold batch norm with its running statistics into other weights
        with torch.enable_grad():
            if self.parallel == "grouped":
                outputs = grouped(self.network, weights, images, of_first, channels_last=not twice)
            else:
                outputs = (vmap if self.parallel == "vmap" else loop)(self.network, weights, images, of_first)
        return outputs[:, of_first:]

    def steps(
        self, weights: Weights, images: Tensor, labels: Tensor, steps: int, second_order: bool
    ) -> Iterator[Weights]:
        """Yields the weights after each step: theta' = theta - rate * gradient of the support set's loss.

        Args:
            weights: of T tasks.
            images: support sets (T, B, *item).
            labels: (B,), alike for all tasks.
            steps: how many.
            second_order: keep the graph of the gradients, for derivatives with respect to the weights at the start go
                through them. Without it they count as constants, which is the first-order approximation.

        Source: Finn, Abbeel and Levine 2017, algorithm 1, lines 5 and 6.
        """

        names = list(weights)
        of_loss = list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

        def step(values: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor]:
            """From the weights and rates before to the adapted ones after."""
            before = dict(zip(names, values[: len(names)], strict=True))
            outputs = self.outputs(before, images, twice=create_graph)
            losses = [self.loss(of_task, labels) for of_task in outputs]
            total = torch.stack(losses).sum()  # tasks share nothing, so its gradient holds that of each
            wanted = [before[name] for name in self.adapted]
            # (zeros for a parameter that the network does not use)
            gradients = torch.autograd.grad(total, wanted, create_graph=create_graph, materialize_grads=True)
            return [w - rate * g for w, rate, g in zip(wanted, values[len(names) :], gradients, strict=True)]

        for number in range(steps):
            values = [*weights.values(), *self._rates(number)]
            if self.checkpoint_steps and second_order:
                adapted: Sequence[Tensor] = recomputed(step, values, of_loss)
            else:
                adapted = step(values, second_order)
            weights = {**weights, **dict(zip(self.adapted, adapted, strict=True))}
            yield weights

    def _rates(self, step: int) -> Sequence[Tensor]:
        """The learning rate of each adapted parameter."""
        if self.learned_lr is None:
            return [torch.tensor(self.inner_lr, dtype=torch.float64)] * len(self.adapted)
        of_layers = self.learned_lr[min(step, len(self.learned_lr) - 1)]
        return [of_layers[layer] for layer in self.layer_of]

    def _fastest(self, weights: Weights, images: Tensor) -> Parallel:
        """How to run the tasks, by what was measured with Conv4; grouped convolutions where the network allows them."""
        if images.is_cuda:
            return "vmap"
        one_of_each = {name: weight[:1].detach() for name, weight in weights.items()}
        try:
            with eval_mode(self.network), torch.enable_grad():  # no dropout, which would draw
                grouped(self.network, one_of_each, images[:1])
        except NotGroupable:
            return "loop"
        return "grouped"
