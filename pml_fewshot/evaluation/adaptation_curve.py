"""adaptation_curve: accuracy after each step of an inner loop."""

from functools import partial
from typing import Any

from pml_fewshot.data.fewshot_dataset import FewShotDataset
from pml_fewshot.episodes import EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult


def adaptation_curve(
    trainer: Any, dataset: FewShotDataset, spec: EpisodeSpec, num_episodes: int = 1000, seed: int = 0
) -> list[EpisodicResult]:
    """Evaluates before the inner loop and after each of its steps at test time, all on the same episodes.

    Args:
        trainer: a MAMLTrainer; its `eval_inner_steps` are the steps.
        dataset: classes to judge on.
        spec: size of the episodes.
        num_episodes: 1,000 show the shape of the curve. Each number of steps is judged from the start, so S of them
            take about S + 1 times as long as one evaluation.
        seed: of the episodes.
    """
    bank = trainer.bank(dataset)
    after = [partial(trainer.classify, inner_steps=steps) for steps in range(trainer.eval_inner_steps + 1)]
    return [EpisodicEvaluator(spec, num_episodes, seed, head=head).evaluate(trainer, dataset, bank) for head in after]
