"""MAMLTrainer: initial weights from which a few gradient steps learn a new task (Finn et al. 2017)."""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pml_fewshot.adaptation.inner_loop import InnerLoop, LearnedRates, Parallel
from pml_fewshot.adaptation.precomputed_gradient import with_gradient
from pml_fewshot.adaptation.run_tasks import Weights, fitting_tasks
from pml_fewshot.adaptation.task_loss import TaskLoss, built_loss, labels_of, task_losses
from pml_fewshot.checks import check_at_least_one, check_choice, require
from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.episodes import Episode
from pml_fewshot.evaluation.heads import Head
from pml_fewshot.modes import eval_mode
from pml_fewshot.parts import build
from pml_fewshot.trainers.episodic import distance_of

BatchNorm = Literal["transductive", "inductive"]
Learned = tuple[Tensor, Sequence[Tensor | None], Tensor]  # loss, its gradients, accuracy of each task (T,)


class MAMLTrainer(nn.Module):
    """Trains a classifier's weights such that a few gradient steps on a support set make it classify the queries.

    The network is called functionally (`torch.func`): no task patches, copies or changes it. What a task would change
    in its buffers is thrown away, and batch norm uses the statistics of the batch at hand, never running ones.

    Args:
        network: module (or factory) from images (B, *item) to logits (B, W), such as
            `partial(nn.Sequential, partial(Conv4, in_channels=1), partial(nn.Linear, 64, 5))`.
        inner_lr: learning rate of the inner loop; the paper has 0.4 for Omniglot and 0.01 for miniImageNet.
        inner_steps: gradient steps of the inner loop in training.
        eval_inner_steps: those at test time; `inner_steps` when None.
        first_order: leave out the second derivatives (the paper's section 5.2): less time and memory.
        learn_inner_lr: train the inner learning rates with the rest, one "per_layer" or "per_layer_per_step" (MAML++).
            A layer is a module with its weight and bias; steps beyond those of training use the last step's.
        loss: of the queries, called as `loss(outputs, labels)`: cross-entropy when None; a function, a module (or a
            factory of one), or any PML loss that takes embeddings and labels.
        batch_norm: "transductive" normalises a query by the statistics of all of the episode's queries, as the paper's
            figures do, which are higher for it. "inductive" takes those of the support set, so that the other queries
            do not matter. The support set is normalised by its own in both. (Statistics over a batch that a network
            takes without `F.batch_norm` are not seen.)
        task_chunk: tasks run at a time, each chunk with its own backward pass, so that memory does not grow with the
            tasks of a batch: when None up to 8 on a CPU and 64 on a GPU, fewer of large images. 1 needs the least
            memory.
        inner_loss: of the support set; `loss` when None. What parameters it has are trained by second order alone.
        step_weights: weight of the queries' loss after each inner step (MAML++'s multi-step loss); when None only
            what comes after the last step counts.
        checkpoint_steps: keep nothing of an inner step but its weights, and do it again for the backward pass.
        adapt: what the inner loop changes, as beginnings of parameters' names; everything when None. The head alone,
            `("1.",)` in the network above, is ANIL (Raghu et al. 2020).
        reptile: move the weights towards the adapted ones in place of MAML's gradient (Nichol et al. 2018). The inner
            loop then takes support and queries together, all of them in each step.
        head: how queries are classified by adapted embeddings (`nearest_prototype` and others), for a network that
            gives embeddings. None where it gives logits.
        parallel: how a chunk of tasks is run: "grouped" convolutions, "vmap" or a "loop", all with the same gradients.
            "auto" is vmap on a GPU and grouped on a CPU where the network allows them, else the loop.

    Frozen parameters are neither adapted nor trained. Dropout draws from torch's global generator, so its draws differ
    between chunks of other sizes and ways to run tasks; it is off in `classify`.

    Raises:
        ValueError: an option out of range, options that exclude each other, nothing to adapt.

    Source: Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks";
    MAML++ is Antoniou, Edwards and Storkey 2019, "How to train your MAML".
    """

    def __init__(
        self,
        network: nn.Module | Callable[[], nn.Module],
        inner_lr: float,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        learn_inner_lr: LearnedRates | None = None,
        loss: TaskLoss | Callable[[], nn.Module] | None = None,
        batch_norm: BatchNorm = "transductive",
        task_chunk: int | None = None,
        inner_loss: TaskLoss | Callable[[], nn.Module] | None = None,
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
        check_choice("batch_norm", batch_norm, ("transductive", "inductive"))
        require(
            not reptile or not (learn_inner_lr or step_weights or first_order or checkpoint_steps or adapt),
            "reptile alone",
            "it with learn_inner_lr, step_weights, first_order, checkpoint_steps or adapt",
            "leave out what belongs to MAML's gradient: Reptile trains what its inner loop changes",
        )
        self.step_weights = [0.0] * (inner_steps - 1) + [1.0] if step_weights is None else list(step_weights)
        require(
            len(self.step_weights) == inner_steps and min(self.step_weights) >= 0 < sum(self.step_weights),
            f"{inner_steps} step_weights of at least 0, one for each inner step, and not all of them 0",
            str(step_weights),
            "say how much the queries' loss counts after each step",
        )
        self.loss = built_loss(F.cross_entropy if loss is None else loss)
        own_loss = self.loss if inner_loss is None else built_loss(inner_loss)
        self.inner = InnerLoop(
            build(network),
            own_loss,
            head is None,
            inner_lr,
            inner_steps,
            learn_inner_lr,
            adapt,
            checkpoint_steps,
            parallel,
        )
        self.inner_steps = inner_steps
        self.eval_inner_steps = eval_inner_steps or inner_steps
        self.first_order = first_order
        self.reptile = reptile
        self.batch_norm = batch_norm
        self.task_chunk = task_chunk
        self.head = head
        self.batch_accuracy: Tensor | None = None  # of the last batch, to be shown while training

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    @property
    def when_diverged(self) -> str:
        """What else to do about a NaN, for the message of `fit`."""
        return f"lower the inner learning rate ({self.inner.inner_lr:g})"

    @property
    def transductive(self) -> bool:
        """Whether queries inform each other, as result tables say."""
        return self.inner.normalises and self.batch_norm == "transductive"

    def with_batch_norm(self, batch_norm: BatchNorm) -> "MAMLTrainer":
        """The same weights under one or the other protocol, so that both can be reported."""
        check_choice("batch_norm", batch_norm, ("transductive", "inductive"))
        other = copy.copy(self)
        other.batch_norm = batch_norm
        return other

    def forward(self, batch: Episode) -> Tensor:
        """Returns the mean loss over the tasks of a batch of episodes.

        Its gradient is computed within, one chunk of tasks after the other, and handed on by `backward()`.
        """
        kind = f"a {type(batch).__name__}"
        require(isinstance(batch, Episode), "an Episode", kind, "use train_spec=EpisodeSpec(...)")
        tasks, chunk = len(batch.support), self._chunk(batch.support, batch.query)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        sums: list[Tensor] = []
        total = batch.query.new_zeros(())
        correct = []
        for support, query in zip(batch.support.split(chunk), batch.query.split(chunk), strict=True):
            with torch.enable_grad():
                loss, gradients, accuracy = (self._reptile if self.reptile else self._maml)(support, query, parameters)
            total += loss.detach()
            correct.append(accuracy)
            sums = sums or [torch.zeros_like(parameter) for parameter in parameters]  # (lazy ones have a size by now)
            for summed, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    summed += gradient
        self.batch_accuracy = torch.cat(correct).mean()
        return with_gradient(total / tasks, parameters, [summed / tasks for summed in sums])

    def _maml(self, support: Tensor, query: Tensor, parameters: list[nn.Parameter]) -> Learned:
        """The summed loss of T tasks, support (T, W, K, *item) and query (T, W, Q, *item)."""
        queries, labels = query.flatten(1, 2), labels_of(query)
        loss = query.new_zeros(())
        start = self.inner.weights(len(support))
        steps = self.inner.steps(start, support, self.inner_steps, second_order=not self.first_order)
        for step_weight, weights in zip(self.step_weights, steps, strict=True):
            if step_weight > 0:
                judged, outputs = weights, self._query_outputs(weights, support, queries)
                loss = loss + step_weight * task_losses(self.loss, outputs, labels).sum()
        with torch.no_grad():
            accuracy = self._accuracy(judged, support, outputs, labels)
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True), accuracy

    def _reptile(self, support: Tensor, query: Tensor, parameters: list[nn.Parameter]) -> Learned:
        """Likewise; what the inner loop takes from the weights stands for the gradient (Nichol et al. 2018, eq. 2)."""
        images = torch.cat([support, query], dim=2)
        with torch.no_grad():
            start = self.inner.weights(len(images))
            end = self.inner.adapt_to(images, self.inner_steps)
            taken = {id(p): (start[name] - end[name]).sum(dim=0) for name, p in self.network.named_parameters()}
            labels = labels_of(images)
            outputs = self.inner.outputs(end, images.flatten(1, 2), images.shape[1])
            loss = task_losses(self.loss, outputs, labels).sum()
            accuracy = self._accuracy(end, images, outputs, labels)
        return loss, [taken.get(id(parameter)) for parameter in parameters], accuracy

    def bank(self, dataset: FewShotDataset) -> Tensor:
        """A whole set's images (M, *item) as floats in [0, 1]: each episode adapts to its own."""
        device = next(self.parameters()).device
        return dataset.floats(torch.arange(len(dataset))).to(device)

    def classify(self, support: Tensor, query: Tensor, inner_steps: int | None = None) -> Tensor:
        """Adapts to support (E, W, K, *item) and scores queries (E, N, *item): logits (E, N, W).

        Args:
            support: images in [0, 1].
            query: likewise.
            inner_steps: `eval_inner_steps` when None; 0 for the weights as they are.
        """
        steps = self.eval_inner_steps if inner_steps is None else inner_steps
        require(steps >= 0, "inner_steps of at least 0", str(steps), "0 classifies by the weights as they are")
        inference = torch.is_inference_mode_enabled()
        require(not inference, "no torch.inference_mode(), for gradients are taken here", "it", "use torch.no_grad()")
        chunk = self._chunk(support, query)
        with eval_mode(self), torch.no_grad():
            chunks = zip(support.split(chunk), query.split(chunk), strict=True)
            return torch.cat([self._classify(*of_chunk, steps) for of_chunk in chunks])

    def check(self, ways: int, item_shape: Sequence[int]) -> None:
        """Raises the ValueError that `classify` would, when the network does not fit episodes of so many ways."""
        images = torch.rand(1, ways, 1, *item_shape, generator=torch.Generator().manual_seed(0))
        images = images.to(next(self.parameters()))
        self.classify(images, images.squeeze(2), inner_steps=0)

    def _classify(self, support: Tensor, query: Tensor, steps: int) -> Tensor:
        weights = self.inner.adapt_to(support, steps)
        return self._logits(weights, support, self._query_outputs(weights, support, query))

    def _query_outputs(self, weights: Weights, support: Tensor, query: Tensor) -> Tensor:
        """Outputs (T, N, D) for queries (T, N, *item) by the weights of T tasks with support (T, W, K, *item)."""
        normalised_by = support.flatten(1, 2) if self.batch_norm == "inductive" else None
        return self.inner.outputs(weights, query, support.shape[1], normalised_by)

    def _logits(self, weights: Weights, support: Tensor, outputs: Tensor) -> Tensor:
        """Queries' outputs (T, N, D) as logits (T, N, W)."""
        if self.head is None:
            return outputs
        embedded = self.inner.outputs(weights, support.flatten(1, 2), support.shape[1]).unflatten(1, support.shape[1:3])
        distance = distance_of(self.loss) if isinstance(self.loss, nn.Module) else None
        return self.head(embedded, outputs, distance)

    def _accuracy(self, weights: Weights, support: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        return (self._logits(weights, support, outputs).argmax(dim=2) == labels).float().mean(dim=1)

    def _chunk(self, support: Tensor, query: Tensor) -> int:
        return self.task_chunk or fitting_tasks(support, query)
