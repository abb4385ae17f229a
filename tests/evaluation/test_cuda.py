"""The evaluators give on a GPU what they give on a CPU. Run with `pytest -m gpu` on a machine with CUDA."""

import pytest
import torch

from pml_fewshot import (
    EmbeddingBank,
    EpisodeSpec,
    EpisodicEvaluator,
    RetrievalTester,
    k_nearest_neighbours,
    logistic_regression,
    nearest_prototype,
    ridge_regression,
)
from pml_fewshot.evaluation.exact_search import exact_search
from pml_fewshot.evaluation.ranking import Ranking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def bank() -> EmbeddingBank:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 60
    rows = torch.randn(60, 32, generator=generator)[labels] + torch.randn(3000, 32, generator=generator)
    return EmbeddingBank(rows, labels)


@pytest.mark.parametrize("head", [nearest_prototype, k_nearest_neighbours, ridge_regression, logistic_regression])
def test_episodes_on_a_gpu_equal_those_on_a_cpu(head):
    evaluator = EpisodicEvaluator(EpisodeSpec(5, 5, 15), 500, head=head)
    cpu, cuda = evaluator.evaluate(bank(), confusion=True), evaluator.evaluate(bank().to("cuda"), confusion=True)
    assert cuda.episodes_hash == cpu.episodes_hash
    # a query between two classes may fall to either, by rounding
    assert (cuda.per_episode - cpu.per_episode).abs().mean() < 1e-3
    assert cuda.confusion.sum() == cpu.confusion.sum()


def test_search_on_a_gpu_equals_that_on_a_cpu():
    rows = bank().embeddings
    for k in (5, 200):
        cpu, cuda = (exact_search(r, r, k, Ranking("Euclid")) for r in (rows, rows.cuda()))
        assert (cpu == cuda.cpu()).double().mean() > 0.999


def test_retrieval_on_a_gpu_equals_that_on_a_cpu():
    tester = RetrievalTester(("precision_at_1", "mean_average_precision_at_r", "mean_average_precision", "NMI"))
    cpu, cuda = tester.test(bank()), tester.test(bank().to("cuda"))
    for metric, value in cpu.items():
        assert cuda[metric] == pytest.approx(value, abs=2e-3)
