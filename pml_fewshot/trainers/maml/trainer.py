"""MAMLTrainer: initial weights from which a few gradient steps learn a new task (Finn et al. 2017)."""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.checks import UsageError, check_at_least_one, check_choice
from pml_fewshot.data.dataset import FewShotDataset, Splits, as_dataset
from pml_fewshot.distributed import own_draws, summed, world
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.evaluation.heads import Head, name_of_head
from pml_fewshot.parts.instantiate import Part, instantiate
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episodes import Episode, EpisodeSpec
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.trainers.maml.autograd import WithGradient, differentiable_attention
from pml_fewshot.trainers.maml.inner_loop import InnerLoop, LearnedRates, Parallel, TaskLoss, as_task_loss, task_losses
from pml_fewshot.trainers.maml.task_parallel import (
    Weights,
    copies_for,
    in_threads,
    labels_of,
    max_tasks_per_chunk,
    one_at_a_time,
)

T = TypeVar("T")
BatchNorm = Literal["transductive", "inductive"]
Learned = tuple[Tensor, Sequence[Tensor], Tensor, Tensor]  # summed loss, its gradients, logits and labels


class MAMLTrainer(FewShotTrainer):
    """Trains a classifier's weights so that a few gradient steps on a support set make it classify the queries.

    The network, or a copy that shares its tensors, is called with other weights. Changes that a task would make to its
    buffers are discarded, and batch norm uses the statistics of the current batch, never running ones.

    Args:
        network: module from images (B, *item) to logits (B, W), such as
            `nn.Sequential(Conv4(in_channels=1), nn.Linear(64, 5))`. Tasks with fewer ways use its first outputs.
        inner_lr: learning rate of the inner loop; the paper uses 0.4 for Omniglot and 0.01 for miniImageNet.
        inner_steps: gradient steps of the inner loop in training.
        eval_inner_steps: gradient steps at test time; `inner_steps` when None.
        first_order: leave out the second derivatives (the paper's section 5.2): less time and memory.
        learn_inner_lr: train the inner learning rates too, one "per_layer" or "per_layer_per_step" (MAML++). A layer is
            a module with its weight and bias; steps beyond those of training use the last step's rates.
        loss: query loss, a function or module `loss(outputs, labels)`, any PML loss too; cross-entropy when None.
        batch_norm: "transductive" normalizes a query by the statistics of all queries of the episode, as in the paper,
            whose figures are higher for it; "inductive" by those of the support set, which itself is normalized by its
            own in both. (Batch statistics that a network computes without `F.batch_norm` are not seen.)
        task_chunk: tasks run at a time, with one backward pass, so that memory does not grow with the batch: when None,
            one in each thread, and up to 64 with vmap, fewer for large images.
        inner_loss: support loss; `loss` when None. Its own parameters are trained only with second order.
        step_weights: weights of the query loss after each inner step (MAML++'s multi-step loss); when None, only
            the loss after the last step counts.
        checkpoint_steps: keep nothing of an inner step but its weights, and recompute it in the backward pass.
        adapt: parameters that the inner loop changes, as prefixes of their names; all when None. The head alone,
            `("1.",)` in the network above, is ANIL (Raghu et al. 2020).
        reptile: move the weights toward the adapted ones instead of along MAML's gradient (Nichol et al. 2018). The
            inner loop then uses support and queries together, all of them in each step.
        head: classifies queries by adapted embeddings, for a network that returns those (`nearest_prototype` and
            others); None if it returns logits: without a head, the first dimensions of embeddings count as logits.
        parallel: how tasks are run, with the same gradients: in "threads" that each have a copy of the network with the
            same tensors, at once with "vmap", or one after the other in a "loop"; "auto" is vmap on a GPU and threads
            on a CPU if network, loss and head can be copied and draw no random numbers, else the loop. One that counts
            its calls or the like, other than in buffers, needs the loop: changes in the threads' copies are lost.

    Frozen parameters are neither adapted nor trained. Dropout draws from torch's global generator, so its draws depend
    on task_chunk and parallel. A step waits for a GPU only in the first forward pass, to test how the network can be
    run and, with one shot, to check that the inner loss learns.

    Raises:
        UsageError: an option out of range, options that exclude each other, nothing to adapt.

    Source: Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks";
    MAML++ is Antoniou, Edwards and Storkey 2019, "How to train your MAML".
    """

    def __init__(
        self,
        network: Part[nn.Module],
        inner_lr: float,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        learn_inner_lr: LearnedRates | None = None,
        loss: TaskLoss | None = None,
        batch_norm: BatchNorm = "transductive",
        task_chunk: int | None = None,
        inner_loss: TaskLoss | None = None,
        step_weights: Sequence[float] | None = None,
        checkpoint_steps: bool = False,
        adapt: Sequence[str] | None = None,
        reptile: bool = False,
        head: Head | None = None,
        parallel: Parallel = "auto",
    ) -> None:
        super().__init__()
        check_at_least_one("inner_steps", inner_steps)
        check_at_least_one("eval_inner_steps", inner_steps if eval_inner_steps is None else eval_inner_steps)
        check_at_least_one("task_chunk", 1 if task_chunk is None else task_chunk)
        check_choice("batch_norm", batch_norm, get_args(BatchNorm))
        if reptile and (learn_inner_lr or step_weights or first_order or checkpoint_steps or adapt):
            others = "learn_inner_lr, step_weights, first_order, checkpoint_steps or adapt"
            raise UsageError(f"expected reptile alone, got it with {others}; leave out what is of MAML's gradient")
        self.step_weights = [0.0] * (inner_steps - 1) + [1.0] if step_weights is None else list(step_weights)
        if len(self.step_weights) != inner_steps or not min(self.step_weights) >= 0 < sum(self.step_weights):
            wanted = f"{inner_steps} step_weights of at least 0, and not all of them 0"
            raise UsageError(f"expected {wanted}, got {step_weights}; give one for each of the inner_steps")
        built = instantiate(network)
        if not isinstance(built, nn.Module):
            raise UsageError(f"expected network as an nn.Module, got {built!r}; call it, or wrap it in partial")
        self.loss = as_task_loss(F.cross_entropy if loss is None else loss)
        support_loss = self.loss if inner_loss is None else as_task_loss(inner_loss)
        self.inner = InnerLoop(
            built, support_loss, head is None, inner_lr, inner_steps, learn_inner_lr, adapt, checkpoint_steps, parallel
        )
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps or inner_steps
        self.first_order, self.reptile, self.batch_norm = first_order, reptile, batch_norm
        self.task_chunk = None if task_chunk is None else int(task_chunk)
        self.head = head  # type: ignore[assignment]  # None: the network gives logits
        self._last_accuracy: Tensor | None = None
        self._tried: set[Callable[..., Any]] = set()  # what has run once, before threads do it

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    @property
    def divergence_hint(self) -> str:
        return f"lower the inner learning rate ({self.inner.inner_lr:g})"

    @property
    def classifier(self) -> str:
        steps = f"the network after {self.eval_inner_steps} inner steps"
        return steps if self.head is None else f"{name_of_head(self.head)} on {steps}"

    @property
    def adaptation_steps(self) -> int:
        return self.eval_inner_steps

    @property
    def transductive(self) -> bool:
        """Whether the queries of an episode inform each other: through the statistics of batch norm."""
        return self.inner.normalizes and self.batch_norm == "transductive"

    def with_batch_norm(self, batch_norm: BatchNorm) -> "MAMLTrainer":
        """Returns a trainer with the same weights and the given protocol, so that both can be reported."""
        check_choice("batch_norm", batch_norm, get_args(BatchNorm))
        other = copy.copy(self)
        other.batch_norm = batch_norm
        return other

    def forward(self, batch: Episode) -> Tensor:
        """Returns the mean loss over the tasks of a batch of episodes.

        Its gradient is computed here, one chunk of tasks after another, and passed on by `backward()`. Each of several
        processes runs its share of the tasks: the average of their losses and gradients is that of all tasks.
        """
        if not isinstance(batch, Episode):
            raise UsageError(f"expected an Episode, got a {type(batch).__name__}; use train_spec=EpisodeSpec(...)")
        tasks, parameters = len(batch.support), self._trained()
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        total, accuracy = batch.query.new_zeros(()), batch.query.new_zeros(())
        own_support, own_query = (each[world().share(tasks)] for each in (batch.support, batch.query))
        learn = type(self)._reptile if self.reptile else type(self)._maml
        attention = nullcontext() if self.first_order else differentiable_attention()
        results = self._in_chunks(learn, own_support, own_query)
        with one_at_a_time, own_draws(batch.query.device), torch.enable_grad(), attention, closing(results):
            for loss, gradients, logits, labels in results:
                total += loss.detach()
                accuracy += (logits.argmax(dim=2) == labels).float().mean(dim=1).sum()
                sums = [before + gradient for before, gradient in zip(sums, gradients, strict=True)]
        self._last_accuracy = summed(accuracy) / tasks
        each = world().size / tasks
        return WithGradient.apply(total * each, [one * each for one in sums], *parameters)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _in_chunks(self, work: Callable[..., T], support: Tensor, query: Tensor) -> Generator[T, None, None]:
        """Yields `work(trainer, support, query)` for each chunk of tasks; the trainer is this one or a copy of it."""
        if not len(support):  # more processes than tasks
            return
        mode = self.inner.mode(support[0].flatten(0, 1))
        size = self.task_chunk or max_tasks_per_chunk(support, query, mode)
        chunks = list(zip(support.split(size), query.split(size), strict=True))
        copies = copies_for(self, len(chunks)) if mode == "threads" else []
        kind = work.func if isinstance(work, partial) else work
        if copies and kind not in self._tried:
            # the first time, the first chunk alone: if a loss or a head draws, its order would be left to chance
            before = torch.get_rng_state()
            yield work(copies[0], *chunks.pop(0))
            self._tried.add(kind)
            if not torch.equal(before, torch.get_rng_state()):
                self.inner._modes["cpu"], copies = "loop", []
        if copies and chunks:
            yield from in_threads(copies, work, chunks)
        else:
            yield from (work(self, *chunk) for chunk in chunks)

    def _maml(self, support: Tensor, query: Tensor) -> Learned:
        """The summed loss of T tasks, support (T, W, K, *item) and query (T, W, Q, *item)."""
        queries, labels = query.flatten(1, 2), labels_of(query)
        loss = query.new_zeros(())
        start = self.inner.weights(len(support))
        steps = self.inner.steps(start, support, self.inner_steps, second_order=not self.first_order)
        for step_weight, weights in zip(self.step_weights, steps, strict=True):
            if step_weight > 0:
                final, outputs = weights, self._query_outputs(weights, support, queries)
                loss = loss + step_weight * task_losses(self.loss, outputs, labels).sum()
        with torch.no_grad():
            logits = self._logits(final, support, outputs).detach()
        return loss, torch.autograd.grad(loss, self._trained(), materialize_grads=True), logits, labels

    def _reptile(self, support: Tensor, query: Tensor) -> Learned:
        """Likewise; the step from the adapted weights back to the start is the gradient (Nichol et al. 2018, eq. 2)."""
        images = torch.cat([support, query], dim=2)
        labels = labels_of(images)
        with torch.no_grad():
            start = self.inner.weights(len(images))
            end = self.inner.adapt_to(images, self.inner_steps)
            moved = {id(p): (start[name] - end[name]).sum(dim=0) for name, p in self.network.named_parameters()}
            outputs = self.inner.outputs(end, images.flatten(1, 2), images.shape[1])
            loss = task_losses(self.loss, outputs, labels).sum()
            logits = self._logits(end, images, outputs)
        return loss, [moved.get(id(p), torch.zeros_like(p)) for p in self._trained()], logits, labels

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """All images of a dataset, (M, *item) as stored: each episode adapts to its own."""
        return as_dataset(dataset).images.to(next(self.parameters()).device)

    def classify(self, support: Tensor, query: Tensor, inner_steps: int | None = None) -> Tensor:
        """Adapts to support (E, W, K, *item) and scores queries (E, N, *item): logits (E, N, W).

        Images are floats in [0, 1]. `inner_steps` is `eval_inner_steps` when None; 0 leaves the weights unchanged.
        Threads that call it take turns.
        """
        steps = self.eval_inner_steps if inner_steps is None else inner_steps
        if steps < 0:
            raise UsageError(
                f"expected inner_steps of at least 0, got {steps}; 0 classifies by the weights as they are"
            )
        with evaluating(self), one_at_a_time:
            weight = next(self.network.parameters())
            # (gradients of tensors made in inference mode cannot be taken)
            support, query = (each.to(weight, copy=each.is_inference()) for each in (support, query))
            return torch.cat(list(self._in_chunks(partial(type(self)._classify, steps=steps), support, query)))

    @torch.no_grad()
    def _classify(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        weights = self.inner.adapt_to(support, steps)
        return self._logits(weights, support, self._query_outputs(weights, support, query))

    def accuracy(self, batch: Episode) -> Tensor | None:
        """The accuracy on the queries (Reptile: on all images) of the episodes last given to `forward`, a scalar."""
        return self._last_accuracy

    def check(self, splits: Splits, specs: Sequence[EpisodeSpec | BatchSpec]) -> None:
        """Raises a UsageError if the network, limited to some number of ways, does not fit the episodes of a spec."""
        for spec in specs:
            if not isinstance(spec, EpisodeSpec):
                raise UsageError(f"expected train_spec as an EpisodeSpec, got {spec}; MAML trains on episodes")
            images = torch.rand(1, spec.ways, 1, *splits.test.item_shape, generator=torch.Generator().manual_seed(0))
            images = images.to(next(self.parameters()))
            self.classify(images, images.squeeze(2), inner_steps=0)

    def exports(self) -> dict[str, nn.Module]:
        return {"network.safetensors": self.network}

    def _query_outputs(self, weights: Weights, support: Tensor, query: Tensor) -> Tensor:
        """Outputs (T, N, D) for queries (T, N, *item) with the weights of T tasks with support (T, W, K, *item)."""
        normalized_by = support.flatten(1, 2) if self.batch_norm == "inductive" else None
        return self.inner.outputs(weights, query, support.shape[1], normalized_by)

    def _logits(self, weights: Weights, support: Tensor, outputs: Tensor) -> Tensor:
        """Queries' outputs (T, N, D) as logits (T, N, W)."""
        if self.head is None:
            return outputs
        embedded = self.inner.outputs(weights, support.flatten(1, 2), support.shape[1]).unflatten(1, support.shape[1:3])
        return self.head(embedded, outputs, self.distance)
