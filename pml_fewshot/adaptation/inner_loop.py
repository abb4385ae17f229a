"""InnerLoop: a network and its gradient steps on the support sets of many tasks at once, the inner loop of MAML."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pml_fewshot.adaptation.recomputed import recomputed
from pml_fewshot.adaptation.run_tasks import Weights, fastest, grouped, loop, uses_batch_norm, vmap
from pml_fewshot.adaptation.second_derivatives import SecondDerivatives
from pml_fewshot.adaptation.task_loss import TaskLoss, labels_of, task_losses
from pml_fewshot.checks import check_choice, require

LearnedRates = Literal["per_layer", "per_layer_per_step"]
Parallel = Literal["auto", "loop", "vmap", "grouped"]


class InnerLoop(nn.Module):
    """Runs a network by the weights of T tasks, and adapts them to each task's support set.

    What it holds stays as it is: the network is called functionally, by weights that are passed in.

    Args:
        network: module from images (B, *item) to outputs (B, D).
        loss: of a support set, called as `loss(outputs (B, D), labels (B,))`.
        gives_logits: outputs must be one for each way.
        inner_lr, inner_steps, learn_inner_lr, adapt, checkpoint_steps, parallel: as for MAMLTrainer.

    Raises:
        ValueError: nothing to adapt, or an unknown way to learn the rates or to run the tasks.
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
        usable = 0 < inner_lr < float("inf")
        require(usable, "a finite inner_lr above 0", str(inner_lr), "give the learning rate of the inner loop")
        check_choice("parallel", parallel, ("auto", "loop", "vmap", "grouped"))
        if learn_inner_lr is not None:
            check_choice("learn_inner_lr", learn_inner_lr, ("per_layer", "per_layer_per_step"))
        self.network = network
        self.loss = loss
        self.gives_logits = gives_logits
        self.inner_lr = inner_lr
        self.checkpoint_steps = checkpoint_steps
        self.parallel = parallel
        self.has_batch_norm: bool | None = None  # not known before the first run
        self.was_seen_to_adapt = False
        self.adapt = ("",) if adapt is None else (adapt,) if isinstance(adapt, str) else tuple(adapt)
        names = [name for name, _ in network.named_parameters()]
        for beginning in self.adapt:
            require(
                any(name.startswith(beginning) for name in names),
                "parameters to adapt",
                f"none whose name begins with {beginning!r}" if beginning else "a network without any",
                f"the network's are {', '.join(names)}" if names else "give a network with weights",
            )
        self._check_adapted()
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.startswith(self.adapt)))
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

    @property
    def normalises(self) -> bool:
        """Whether the network has batch norm, as far as can be told before it has run."""
        if self.has_batch_norm is None:
            return any(isinstance(module, _BatchNorm) for module in self.network.modules())
        return self.has_batch_norm

    def _check_adapted(self) -> None:
        got = "frozen ones only" if self.adapt else "none named in adapt"
        require(len(self.adapted) > 0, "parameters to adapt", got, "unfreeze some" if self.adapt else "name some")

    def weights(self, tasks: int) -> Weights:
        """The network's own weights, once for each task, without a copy: (T, *shape) each."""
        return {name: p.expand(tasks, *p.shape) for name, p in self.network.named_parameters()}

    def outputs(
        self,
        weights: Weights,
        images: Tensor,
        ways: int,
        normalised_by: Tensor | None = None,
        twice: bool = False,
    ) -> Tensor:
        """Runs the network for T tasks.

        Args:
            weights: of the tasks.
            images: (T, B, *item).
            ways: of the tasks.
            normalised_by: other images of the same tasks, by whose statistics batch norm normalises; the images' own
                when None.
            twice: the outputs will be differentiated twice, for which another layout of memory is faster.

        Returns:
            (T, B, D).
        """
        if self.has_batch_norm is None:
            self.has_batch_norm = uses_batch_norm(self.network, images[0])
        if self.parallel == "auto":
            self.parallel = fastest(self.network, images[0])
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
        require(
            not self.gives_logits or outputs.shape[2:] == (ways,),
            f"a network with {ways} outputs, one for each way",
            f"outputs of shape {tuple(outputs.shape[2:])}",
            "give its last layer as many as the episodes have ways, or name a head that classifies embeddings",
        )
        return outputs[:, of_first:]

    def steps(self, weights: Weights, support: Tensor, steps: int, second_order: bool) -> Iterator[Weights]:
        """Yields the weights after each step: theta' = theta - rate * gradient of the support set's loss.

        Under `torch.no_grad()` nothing links them to those before, which are then free to go.

        Args:
            weights: of T tasks.
            support: (T, W, K, *item).
            steps: how many.
            second_order: keep the graph of the gradients, for derivatives with respect to the weights at the start go
                through them. Without it they count as constants, which is the first-order approximation.

        Raises:
            ValueError: all parameters are frozen by now, or the first step of all, from one image of each class,
                changes nothing.

        Source: Finn, Abbeel and Levine 2017, algorithm 1, lines 5 and 6.
        """
        self._check_adapted()
        images, labels, ways = support.flatten(1, 2), labels_of(support), support.shape[1]
        names, adapted = list(weights), self.adapted
        of_loss = list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

        def step(values: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor]:
            """From all weights, and the rates of the adapted ones, to the adapted ones after the step."""
            before = dict(zip(names, values[: len(names)], strict=True))
            if not torch.is_grad_enabled():
                before |= {name: before[name].detach().requires_grad_() for name in adapted}
            wanted = [before[name] for name in adapted]
            with torch.enable_grad(), SecondDerivatives() if second_order else nullcontext():
                outputs = self.outputs(before, images, ways, twice=second_order)
                # tasks share nothing, so the gradient of the sum holds that of each
                total = task_losses(self.loss, outputs, labels).sum()
                # (zeros for a parameter that the network does not use)
                gradients = torch.autograd.grad(total, wanted, create_graph=create_graph, materialize_grads=True)
            return [w - rate * g for w, rate, g in zip(wanted, values[len(names) :], gradients, strict=True)]

        for number in range(steps):
            values = [*weights.values(), *self._rates(number, adapted)]
            if self.checkpoint_steps and second_order:
                after: Sequence[Tensor] = recomputed(step, values, of_loss)
            else:
                after = step(values, second_order)
            if not self.was_seen_to_adapt and support.shape[2] == 1:  # once, for a GPU is waited for
                self._check_change([weights[name] for name in adapted], after)
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
        named = getattr(self.loss, "__name__", type(self.loss).__name__)
        require(
            any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)),
            "an inner loss that learns from one image of each class",
            f"{named}, whose gradient is 0 without positive pairs",
            "use cross-entropy or a loss with class weights as inner_loss, or more shots",
        )
        self.was_seen_to_adapt = True

    def _rates(self, step: int, adapted: Sequence[str]) -> Sequence[Tensor]:
        """The learning rate of each adapted parameter."""
        if self.learned_lr is None:
            return [torch.tensor(self.inner_lr, dtype=torch.float64)] * len(adapted)
        of_layers = self.learned_lr[min(step, len(self.learned_lr) - 1)]
        return [of_layers[self.layers[name.rpartition(".")[0]]] for name in adapted]
