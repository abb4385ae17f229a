"""Times PML's NTXentLoss and TripletMarginLoss against their dense forms. One command, one table.

    python -m experiments.speed.loss_speed

A figure is the median time of a forward and a backward pass. All contenders run once first, and their values must
agree; then they take turns for `rounds` rounds. Nothing else should run on the machine: if one of torch's threads waits
for its core, every operation waits milliseconds for that thread. Otherwise measure with `--threads 1`.
"""

from collections.abc import Callable

import torch
import tyro
from pytorch_metric_learning.losses import NTXentLoss, TripletMarginLoss
from torch import Tensor, nn

from experiments.speed.side_by_side import check_equal, conditions, median_seconds
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss

REPEATS = 5  # runs of a dense loss per turn; one takes milliseconds
KINDS = ((NTXentLoss, DenseNTXentLoss), (TripletMarginLoss, DenseTripletMarginLoss))


def forward_backward(
    loss: nn.Module, embeddings: Tensor, *arguments: Tensor | None, repeats: int = 1
) -> Callable[[], float]:
    """Returns a step that computes a loss and its gradient `repeats` times and returns the value."""

    def step() -> float:
        for _ in range(repeats):
            value = loss(embeddings.clone().requires_grad_(), *arguments)
            value.backward()
        return value.item()

    return step


def compare(what: str, rounds: int, embeddings: Tensor, *arguments: Tensor | None) -> None:
    """Prints the lines for one kind of input."""
    contenders = {}
    for stock, dense in KINDS:
        contenders[stock.__name__] = forward_backward(stock(), embeddings, *arguments)
        contenders[dense.__name__] = forward_backward(dense(), embeddings, *arguments, repeats=REPEATS)
    first = {name: step() for name, step in contenders.items()}
    seconds = median_seconds(contenders, rounds)
    for stock, dense in KINDS:
        name = stock.__name__
        check_equal(dense.__name__, {"loss": first[dense.__name__]}, {"loss": first[name]})
        ours, theirs = 1e3 * seconds[dense.__name__] / REPEATS, 1e3 * seconds[name]
        print(f"| {name} | {what} | {theirs:,.2f} | {ours:,.2f} | {theirs / ours:,.1f} |", flush=True)


def main(rounds: int = 9, threads: int = 2, dims: int = 128, classes: int = 64, per_class: int = 4) -> None:
    """Prints the table.

    Args:
        rounds: rounds in which the contenders take turns.
        threads: torch's number of threads.
        dims: dimensions of the embeddings, float32.
        classes: classes in the batch.
        per_class: items of each class in the batch.
    """
    torch.set_num_threads(threads)
    print("\n".join(f"- {line}" for line in conditions(("torch", "pytorch-metric-learning"))))
    print(f"- medians of {rounds} rounds; default distances and reducers\n")
    print("| loss | input | PML, ms | dense, ms | ratio |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)

    def normal(items: int) -> Tensor:
        return torch.randn(items, dims, generator=generator)

    labels = torch.arange(classes).repeat_interleave(per_class)
    compare(f"batch of {len(labels)}, {per_class} a class", rounds, normal(len(labels)), labels)
    ways, shots, queries = 20, 5, 15
    support_labels, query_labels = (torch.arange(ways).repeat_interleave(n) for n in (shots, queries))
    support, query = normal(ways * shots), normal(ways * queries)
    what = f"episode of {ways} ways, {shots} shots, {queries} queries"
    compare(what, rounds, query, query_labels, None, support, support_labels)


if __name__ == "__main__":
    tyro.cli(main)
