"""compare: the difference of two methods on the same episodes, with its interval."""

from dataclasses import dataclass

from pml_fewshot.checks import require
from pml_fewshot.evaluation.episodic import EpisodicResult


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two accuracies, as fractions of 1.

    Args:
        difference: mean over the episodes of the first's accuracy minus the second's.
        ci95: half its 95 % interval, 1.96 standard errors of the mean of the differences.
        num_episodes: how many episodes both were judged on.
    """

    difference: float
    ci95: float
    num_episodes: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves 0 out: chance alone would do so for one in twenty pairs of equal methods."""
        return abs(self.difference) > self.ci95

    def __str__(self) -> str:
        verdict = "significant" if self.significant else "not significant, the interval holds 0"
        return (
            f"{100 * self.difference:+.2f} +- {100 * self.ci95:.2f} points on the same {self.num_episodes:,} episodes: "
            f"{verdict} (95 %)"
        )


def compare(a: EpisodicResult, b: EpisodicResult) -> Comparison:
    """Compares two results episode by episode: the difficulty of an episode, most of the spread, cancels out.

    Raises:
        ValueError: the results are on different episodes.
    """
    require(
        a.episodes_hash == b.episodes_hash,
        "two results on the same episodes (equal episodes_hash)",
        f"{a.spec}, seed {a.seed}, {a.episodes_hash} and {b.spec}, seed {b.seed}, {b.episodes_hash}",
        "evaluate both with one spec, number of episodes and seed on one data set",
    )
    differences = a.per_episode - b.per_episode
    ci95 = 1.96 * differences.std() / len(differences) ** 0.5
    return Comparison(differences.mean().item(), ci95.item(), len(differences))
