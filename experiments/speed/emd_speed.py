"""Earth mover's distance: episodes per minute of each solver and of OpenCV in a loop, and a large chunk's memory.

    python -m experiments.speed.emd_speed                # two minutes; OpenCV: pip install opencv-python-headless

5-way 1-shot episodes with 15 queries per class, each with 375 comparisons of two maps of 25 nodes, from a bank of
random maps with 64 channels (Conv4 at 84 x 84). Masses and costs come from the maps as in DeepEMD. OpenCV's line does
what the authors' evaluation does for each pair, given our masses and costs.
"""

import argparse
import resource
import time
from functools import partial

import torch
from torch import Tensor

from pml_fewshot import (
    EarthMoversDistance,
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    nearest_neighbour,
    nearest_prototype,
)
from pml_fewshot.checks import UsageError, import_extra
from pml_fewshot.distances import earth_movers
from pml_fewshot.embedders.embedder import keep_memory
from pml_fewshot.evaluation.heads import Head

NODES = 25
SPEC = EpisodeSpec(ways=5, shots=1, queries=15)


def maps(classes: int, each: int, channels: int) -> EmbeddingBank:
    """Returns feature maps after a ReLU, random around one map per class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    centers = torch.randn(classes, channels * NODES, generator=generator)
    noise = torch.randn(len(labels), channels * NODES, generator=generator)
    return EmbeddingBank((centers[labels] + 2 * noise).relu(), labels)


def by_opencv(costs: Tensor, a: Tensor, b: Tensor, *_: object) -> Tensor:
    """Returns the result of transport_value, with one OpenCV call per problem."""
    cv2 = import_extra("bench", "to compare with", "cv2")
    a, b = (masses / masses.sum(dim=1, keepdim=True) for masses in (a, b))
    problems = zip(costs.numpy(), a.unsqueeze(2).numpy(), b.unsqueeze(2).numpy(), strict=True)
    return torch.tensor([cv2.EMD(x, y, cv2.DIST_USER, cost)[0] for cost, x, y in problems])


def measure(name: str, bank: EmbeddingBank, head: Head, episodes: int) -> float:
    """Prints a line and returns the accuracy."""
    EpisodicEvaluator(SPEC, 10, head=head).evaluate(bank)  # warms up threads and memory
    start = time.perf_counter()
    result = EpisodicEvaluator(SPEC, episodes, head=head).evaluate(bank)
    seconds = time.perf_counter() - start
    rate, each = 60 * episodes / seconds, 1e6 * seconds / (375 * episodes)
    print(f"| {name} | {episodes:,} | {rate:,.0f} | {each:.0f} | {100 * result.mean:.2f} |", flush=True)
    return result.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    episodes = parser.parse_args().episodes
    keep_memory(torch.device("cpu"))
    bank = maps(20, 100, 64)
    print(f"{torch.get_num_threads()} threads\n\n| solver | episodes | episodes a minute | us a pair | accuracy, % |")
    print("|" + " --- |" * 5)
    for solver, epsilon, count in (("exact", 0.003, episodes), ("sinkhorn", 0.003, episodes // 5)):
        distance = EarthMoversDistance(NODES, solver, epsilon)  # type: ignore[arg-type]
        measure(solver, bank, partial(nearest_prototype, distance=distance), count)
    own = earth_movers.transport_value
    try:
        earth_movers.transport_value = by_opencv  # type: ignore[assignment]
        loop = partial(nearest_prototype, distance=EarthMoversDistance(NODES))
        measure("OpenCV in a loop", bank, loop, episodes // 5)
    except UsageError as error:
        print(f"| OpenCV in a loop | | | | {error} |")
    finally:
        earth_movers.transport_value = own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide, spec = maps(20, 20, 640), EpisodeSpec(ways=20, shots=5, queries=15)
    held = wide.embeddings.nbytes / 2**20
    head = partial(nearest_neighbour, distance=EarthMoversDistance(NODES))
    EpisodicEvaluator(spec, 4, head=head).evaluate(wide)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - held
    print(
        f"\n20-way 5-shot, 100 support maps of 640 channels compared: {more:,.0f} MiB, besides the bank's {held:,.0f}"
    )


if __name__ == "__main__":
    main()
