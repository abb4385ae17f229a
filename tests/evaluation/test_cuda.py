"""The evaluators give on a GPU what they give on a CPU. Run with `pytest -m gpu` on a machine with CUDA."""

from types import SimpleNamespace

import pytest
import torch

from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.evaluation.episodic import EpisodicEvaluator
from pml_fewshot.evaluation.heads import Head, k_nearest_neighbours, nearest_prototype
from pml_fewshot.evaluation.linear_heads import logistic_regression, ridge_regression
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.sampling.episodes import EpisodeSpec
from tests.tiny_experiments import tiny_set

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def bank() -> EmbeddingBank:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 60
    rows = torch.randn(60, 32, generator=generator)[labels] + torch.randn(3000, 32, generator=generator)
    return EmbeddingBank(rows, labels)


@pytest.mark.parametrize("head", [nearest_prototype, k_nearest_neighbours, ridge_regression, logistic_regression])
def test_episodes_on_a_gpu_equal_those_on_a_cpu(head: Head):
    evaluator = EpisodicEvaluator(EpisodeSpec(5, 5, 15), 500, head=head)
    cpu, cuda = evaluator.evaluate(bank(), confusion=True), evaluator.evaluate(bank().to("cuda"), confusion=True)
    assert cuda.episodes_hash == cpu.episodes_hash
    # a query between two classes may fall to either, by rounding
    assert (cuda.per_episode - cpu.per_episode).abs().mean() < 1e-3
    assert cuda.confusion is not None
    assert cuda.confusion.sum() == 500 * 75


def test_images_are_scaled_on_the_gpu():
    seen: list[torch.Tensor] = []

    def classify(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        seen.append(query)
        return nearest_prototype(support.flatten(3), query.flatten(2))

    adapting = SimpleNamespace(bank=lambda dataset: dataset.images.cuda(), classify=classify)
    EpisodicEvaluator(EpisodeSpec(5, 1, 5), 10).evaluate(adapting, tiny_set("a", 5, seed=0))
    assert (seen[0].is_cuda, seen[0].dtype) == (True, torch.float32)
    assert 0.9 < seen[0].max() <= 1


def test_retrieval_on_a_gpu_equals_that_on_a_cpu():
    tester = RetrievalTester(("precision_at_1", "mean_average_precision_at_r", "mean_average_precision", "NMI"))
    cpu, cuda = tester.test(bank()), tester.test(bank().to("cuda"))
    for metric, value in cpu.items():
        assert cuda[metric] == pytest.approx(value, abs=2e-3)
