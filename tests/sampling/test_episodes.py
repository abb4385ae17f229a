"""Episodes: the sizes' checks, and that episodes are drawn uniformly, without overlap and alike on every machine."""

import hashlib
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pml_fewshot.sampling import class_sampler
from pml_fewshot.sampling.class_sampler import draw_without_replacement
from pml_fewshot.sampling.episodes import Episode, EpisodeIndex, EpisodeSampler, EpisodeSpec

# Class label -> items: sizes, values and gaps are all different, and items of a class do not stand together.
SIZES = {-4: 5, 0: 9, 7: 6, 2**40: 8, 11: 12}


def uneven_labels() -> torch.Tensor:
    labels = torch.tensor([label for label, size in SIZES.items() for _ in range(size)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["ways", "shots", "queries"])
@pytest.mark.parametrize("value", [0, -2, True, 1.0, None])
def test_a_spec_takes_only_integers_of_at_least_one(name: str, value: object):
    sizes = {"ways": 5, "shots": 1, "queries": 15}
    with pytest.raises(ValueError, match=f"expected {name} to be an integer of at least 1, got {value!r}"):
        EpisodeSpec(**(sizes | {name: value}))  # type: ignore[arg-type]


def test_an_episode_needs_support_and_query_of_the_same_classes_and_items():
    episode = Episode(torch.zeros(2, 3, 1, 1, 4, 4), torch.zeros(2, 3, 5, 1, 4, 4))
    assert episode.to("cpu").query.shape == (2, 3, 5, 1, 4, 4)
    for support, query in [
        ((2, 3, 1, 4), (2, 2, 5, 4)),
        ((2, 3, 1, 4), (1, 3, 5, 4)),
        ((2, 3, 1, 4), (2, 3, 5, 3)),
        ((2, 3, 1), (2, 3, 5)),
    ]:
        with pytest.raises(ValueError, match=r"expected support \(E, W, K, \*item\) and query"):
            Episode(torch.zeros(support), torch.zeros(query))


def test_an_index_is_sliced_by_episodes_and_its_hash_covers_shape_and_roles():
    index = EpisodeSampler(uneven_labels(), EpisodeSpec(3, 2, 1), seeded(0)).sample(6)
    part = index[2:5]
    assert len(index) == 6
    assert len(part) == 3
    assert torch.equal(part.support, index.support[2:5])
    assert torch.equal(part.query, index.query[2:5])

    def by_hand(*arrays: np.ndarray) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for array in arrays:
            digest.update(str(tuple(array.shape)).encode())
            for number in array.flatten().tolist():
                digest.update(int(number).to_bytes(8, "little", signed=True))
        return digest.hexdigest()

    assert index.hash() == by_hand(index.support.numpy(), index.query.numpy())
    noncontiguous = EpisodeIndex(index.support.mT.contiguous().mT, index.query)
    assert noncontiguous.hash() == index.hash()
    others = [
        part,
        EpisodeIndex(index.query, index.support),
        EpisodeIndex(index.support.flip(0), index.query.flip(0)),
        EpisodeIndex(index.support.flip(1), index.query.flip(1)),
        EpisodeIndex(index.support.transpose(1, 2), index.query.transpose(1, 2)),
    ]
    assert len({index.hash(), *(other.hash() for other in others)}) == 6


def test_an_index_is_moved_whole():
    index = EpisodeSampler(uneven_labels(), EpisodeSpec(3, 2, 1), seeded(0)).sample(6)
    moved = index.to("cpu")
    assert torch.equal(moved.support, index.support)
    assert torch.equal(moved.query, index.query)
    assert moved.support.dtype == moved.query.dtype == torch.int64
    assert moved.hash("set") == index.hash("set") != index.hash()
    elsewhere = index.to(torch.device("meta"))  # a device without memory: shapes and places only
    assert elsewhere.support.device.type == elsewhere.query.device.type == "meta"
    assert (elsewhere.support.shape, elsewhere.query.shape) == ((6, 3, 2), (6, 3, 1))
    assert len(elsewhere) == 6
    assert index.support.device.type == index.query.device.type == "cpu"


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_draws_are_distinct_and_below_their_size(sizes: list[int], count: int, seed: int):
    bounds = torch.tensor([max(size, count) for size in sizes])
    drawn = draw_without_replacement(bounds, count, seeded(seed))
    assert drawn.dtype == torch.int64
    assert drawn.shape == (count, len(sizes))
    for row, bound in zip(drawn.T.tolist(), bounds.tolist(), strict=True):
        assert len(set(row)) == count
        assert min(row) >= 0
        assert max(row) < bound
        if count == bound:
            assert sorted(row) == list(range(bound))
    assert torch.equal(drawn, draw_without_replacement(bounds, count, seeded(seed)))


@pytest.mark.parametrize(("size", "count"), [(3, 3), (4, 4), (5, 2), (6, 3)])
def test_every_ordered_draw_is_equally_frequent(size: int, count: int):
    draws = 60_000
    drawn = draw_without_replacement(torch.full((draws,), size), count, seeded(5)).T
    found, counts = np.unique(drawn.numpy(), axis=0, return_counts=True)
    assert sorted(map(tuple, found.tolist())) == sorted(permutations(range(size), count))
    assert chisquare(counts).pvalue > 1e-3


def test_draws_equal_a_shuffle_of_the_whole_array_that_is_stopped_early():
    """The textbook Fisher-Yates shuffle, written out, from the same random numbers."""
    sizes = torch.tensor([7, 30, 5, 1000])
    uniform = torch.rand(5, len(sizes), generator=seeded(3), dtype=torch.float64)
    expected = []
    for row, size in enumerate(sizes.tolist()):
        array = list(range(size))
        for i in range(5):
            j = i + int(uniform[i, row].item() * (size - i))
            array[i], array[j] = array[j], array[i]
        expected.append(array[:5])
    assert draw_without_replacement(sizes, 5, seeded(3)).T.tolist() == expected


@given(
    sizes=st.lists(st.integers(3, 8), min_size=2, max_size=6),
    ways=st.integers(1, 6),
    shots=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_episodes_have_distinct_classes_and_disjoint_roles(sizes: list[int], ways: int, shots: int, seed: int):
    ways, queries = min(ways, len(sizes)), 3 - shots
    labels = torch.tensor([100 * c - 7 for c, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    index = EpisodeSampler(labels, EpisodeSpec(ways, shots, queries), seeded(seed)).sample(20)
    assert index.support.shape == (20, ways, shots)
    assert index.query.shape == (20, ways, queries)
    assert index.support.dtype == index.query.dtype == torch.int64
    for support, query in zip(index.support, index.query, strict=True):
        items = torch.cat([support, query], dim=1)
        assert len(items.unique()) == items.numel()
        class_of = labels[items]
        assert (class_of == class_of[:, :1]).all()
        assert len(class_of[:, 0].unique()) == ways


def test_each_item_and_class_is_drawn_equally_often_in_each_place():
    labels, episodes = uneven_labels(), 20_000
    spec = EpisodeSpec(3, 2, 2)
    index = EpisodeSampler(labels, spec, seeded(12)).sample(episodes)
    places = torch.cat([index.support, index.query], dim=2)
    for way in range(spec.ways):
        _, counts = labels[places[:, way, 0]].unique(return_counts=True)
        assert len(counts) == len(SIZES)
        assert chisquare(counts.numpy()).pvalue > 1e-3
        for place in range(4):
            drawn = torch.bincount(places[:, way, place], minlength=len(labels))
            for label in SIZES:
                assert chisquare(drawn[labels == label].numpy()).pvalue > 1e-4


def test_items_used_up_to_the_last_one_and_all_classes_are_possible():
    labels = torch.tensor([5, 5, 9, 9, 1, 1])
    index = EpisodeSampler(labels, EpisodeSpec(3, 1, 1), seeded(0)).sample(50)
    everything = torch.cat([index.support, index.query], dim=2).flatten(1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(6).expand(50, 6))


def test_the_same_seed_gives_the_same_episodes_on_every_machine():
    """Golden: a change of this hash makes every published number one over other episodes."""
    labels = torch.arange(20).repeat_interleave(20)
    assert EpisodeSampler(labels, EpisodeSpec(5, 1, 15), seeded(0)).sample(100).hash() == "ed0f60a88f351851"
    assert EpisodeSampler(uneven_labels(), EpisodeSpec(3, 2, 2), seeded(7)).sample(100).hash() == "d4cdaf1c54733cb7"


def test_only_the_given_generator_is_used():
    labels = uneven_labels()
    before = torch.get_rng_state()
    generator = seeded(0)
    sampler = EpisodeSampler(labels, EpisodeSpec(2, 1, 1), generator)
    first, second = sampler.sample(30), sampler.sample(30)
    assert torch.equal(before, torch.get_rng_state())
    assert first.hash() != second.hash()  # the generator has moved on
    generator.manual_seed(0)
    assert sampler.sample(30).hash() == first.hash()
    assert EpisodeSampler(labels, EpisodeSpec(2, 1, 1), seeded(1)).sample(30).hash() != first.hash()


def test_too_few_classes_or_items_are_named():
    labels = uneven_labels()
    with pytest.raises(ValueError, match=r"at least 6 classes for 6-way 1-shot 1-query, got 5 classes; ask for fewer"):
        EpisodeSampler(labels, EpisodeSpec(6, 1, 1), seeded(0))
    with pytest.raises(
        ValueError, match=r"at least 6 items \(2-way 1-shot 5-query\) in every class, got 5 in class -4 \(1 of 5"
    ):
        EpisodeSampler(labels, EpisodeSpec(2, 1, 5), seeded(0))
    large = torch.tensor([2**60, 2**60, 2**60, 2**60 + 1, 2**60 + 1])
    with pytest.raises(ValueError, match=f"got 2 in class {2**60 + 1} "):
        EpisodeSampler(large, EpisodeSpec(2, 1, 2), seeded(0))
    with pytest.raises(ValueError, match="got 0 classes"):
        EpisodeSampler(torch.empty(0, dtype=torch.int64), EpisodeSpec(2, 1, 2), seeded(0))


def test_wrong_labels_and_counts_are_refused():
    spec = EpisodeSpec(2, 1, 1)
    for wrong in (torch.zeros(4), torch.zeros(4, dtype=torch.int32), [0, 0, 1, 1]):
        with pytest.raises(TypeError, match="expected the sampler's labels as an int64 tensor"):
            EpisodeSampler(wrong, spec, seeded(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"):
        EpisodeSampler(torch.zeros(2, 2, dtype=torch.int64), spec, seeded(0))
    sampler = EpisodeSampler(torch.tensor([0, 0, 1, 1]), spec, seeded(0))
    for wrong_count in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="expected num_episodes to be an integer of at least 1"):
            sampler.sample(wrong_count)  # type: ignore[arg-type]


def test_small_and_large_classes_are_drawn_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small classes are shuffled as arrays, large ones by remembering what moved: the draw is the same."""
    sizes = torch.randint(16, 30, (500,), generator=torch.Generator().manual_seed(0))
    draws = []
    for small in (0, 64):
        monkeypatch.setattr(class_sampler, "SMALL", small)
        draws.append(draw_without_replacement(sizes, 16, torch.Generator().manual_seed(1)))
    assert torch.equal(*draws)


@pytest.mark.parametrize("ways", [33, 1692])
def test_many_ways_are_drawn_from_the_array_like_few_ones(ways: int) -> None:
    """The cost of many ways is linear (1,692 took 31 s when it was quadratic); the draws are a plain shuffle's."""
    sizes, rows = torch.full((3,), 1692), 3
    drawn = draw_without_replacement(sizes, ways, torch.Generator().manual_seed(0))
    uniform = torch.rand(ways, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row in range(rows):
        array, expected = list(range(1692)), []
        for step in range(ways):
            slot = step + int(uniform[step, row] * (1692 - step))
            array[step], array[slot] = array[slot], array[step]
            expected.append(array[step])
        assert drawn[:, row].tolist() == expected
