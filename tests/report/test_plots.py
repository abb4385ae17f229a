"""The pictures hold the numbers that they were given, in both themes, in text that is readable there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.text import Text
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from scipy.stats import binomtest

from pml_fewshot import EmbeddingBank, Episode, EpisodeSpec, UsageError
from pml_fewshot.evaluation.episodic import EpisodicResult
from pml_fewshot.report import image_plots, result_plots
from pml_fewshot.report import theme as themes

WAYS, SHOTS, QUERIES = 3, 2, 2


@pytest.fixture(params=["light", "dark"], autouse=True)
def look(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs in each theme, and what it drew is rendered without a window (a warning would be an error)."""
    before = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    with themes.theme(request.param):
        yield request.param
        for number in pyplot.get_fignums():
            pyplot.figure(number).canvas.draw()
        pyplot.close("all")
    pyplot.switch_backend(before)


def ratio(color: Any, other: Any) -> float:
    """WCAG 2.2's contrast ratio, by its own definition of relative luminance."""

    def luminance(of: Any) -> float:
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(of))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(color), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def texts(ax: Axes) -> list[Text]:
    return [text for text in ax.findobj(Text) if text.get_text() and text.get_visible()]


def at(ax: Axes, x: float, y: float) -> list[str]:
    """The texts in the cell of an episode's table whose upper left corner is (x, y)."""
    inside = [text for text in ax.texts if x < text.get_position()[0] < x + 1 and y < text.get_position()[1] < y + 1]
    return [text.get_text() for text in inside]


def result(mean: float, ci95: float, ways: int = 5, shots: int = 1) -> EpisodicResult:
    return EpisodicResult(mean, ci95, torch.full((9,), mean), EpisodeSpec(ways, shots, 3), 0, "hash")


def an_episode() -> tuple[Episode, torch.Tensor]:
    """Two episodes of gray images, each of another gray, and the logits of the second's six queries."""
    images = torch.arange(2 * WAYS * (SHOTS + QUERIES)).div(24).reshape(2, WAYS, SHOTS + QUERIES, 1, 1, 1)
    images = images.expand(-1, -1, -1, 1, 4, 4)
    shares = torch.tensor([[70, 20, 10], [1.2, 98, 0.8], [20, 50, 30], [0.4, 98.4, 1.2], [1, 2, 97], [25, 26, 49]])
    return Episode(images[:, :, :SHOTS], images[:, :, SHOTS:]), torch.stack([torch.zeros(6, 3), shares.log() + 5])


def test_contrast_is_that_of_the_standard() -> None:
    assert themes.contrast("white", "black") == pytest.approx(21)
    assert themes.contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)  # the best-known gray that fails
    assert themes.contrast("#0063a0", "#0d1117") == pytest.approx(ratio("#0d1117", "#0063a0"))


def test_text_and_marks_of_the_themes_are_readable(look: str) -> None:
    page = rcParams["figure.facecolor"]
    assert page == {"light": "#ffffff", "dark": "#0d1117"}[look]
    assert rcParams["axes.facecolor"] == rcParams["savefig.facecolor"] == page
    colors = [rcParams[f"{name}color"] for name in ("text.", "axes.label", "xtick.label", "ytick.label", "axes.title")]
    for color in colors + rcParams["axes.prop_cycle"].by_key()["color"]:
        assert ratio(color, page) >= 4.5, color


def test_a_theme_ends_with_its_block_and_is_one_of_two() -> None:
    with pyplot.rc_context():
        matplotlib.rcdefaults()
        before = rcParams["text.color"]
        with themes.theme("dark"):
            assert rcParams["text.color"] != before
        assert rcParams["text.color"] == before
    with pytest.raises(UsageError, match=r"'light', 'dark', got 'drak'; did you mean 'dark'"):
        themes.theme("drak")  # type: ignore[arg-type]


def test_an_episode_shows_each_image_probability_and_verdict() -> None:
    episode, logits = an_episode()
    ax = image_plots.plot_episode(episode, logits, number=1, class_names=["ant", "bee", "cat"])
    shown = {tuple(np.round(image.get_extent(), 2)): float(image.get_array()[0, 0, 0]) for image in ax.images}
    assert len(shown) == WAYS * (SHOTS + QUERIES)
    for way in range(WAYS):
        for place, images, left, top in (
            *((f"shot {k}", episode.support[1, way, k], k - SHOTS - 0.15, way) for k in range(SHOTS)),
            *((f"query {q}", episode.query[1, way, q], way * QUERIES + q, -1.15) for q in range(QUERIES)),
        ):
            extent = tuple(np.round((left + 0.07, left + 0.93, top + 0.93, top + 0.07), 2))
            assert shown[extent] == pytest.approx(float(images[0, 0, 0])), (way, place)
    percent = [["70", "20", "10"], ["1", "98", ""], ["20", "50", "30"], ["", "98", "1"], ["1", "2", "97"]]
    percent.append(["25", "26", "49"])
    bars = {bar.xy: bar for bar in ax.patches if bar.get_gid() == "bar"}
    framed = [box for box in ax.patches if box.get_gid() == "own"]
    shares = logits[1].softmax(dim=1)
    for column, best in enumerate(shares.argmax(dim=1).tolist()):
        right = best == column // QUERIES
        mark = "C0" if right else "C1"
        for way in range(WAYS):
            assert "".join(at(ax, column, way)) == percent[column][way]
            bar = bars[column + 0.07, way + 0.62]
            assert bar.get_width() == pytest.approx(0.86 * float(shares[column, way]), abs=1e-6)
            assert (to_hex(bar.get_facecolor()) == to_hex(mark)) == (way == best)
        assert at(ax, column, WAYS) == [themes.CHECK if right else themes.CROSS]
    assert [(box.get_x(), box.get_y()) for box in framed] == [(1.06, 0.06)]  # the only wrong one is column 1, of way 0
    names = {text.get_text(): text.get_position()[1] for text in ax.texts if text.get_position()[0] < -SHOTS}
    assert names == {"ant": 0.5, "bee": 1.5, "cat": 2.5}
    assert all(ratio(text.get_color(), rcParams["axes.facecolor"]) >= 4.5 for text in texts(ax))


def test_an_episode_shows_the_first_queries_of_each_class_alone_as_ink() -> None:
    episode, logits = an_episode()
    ax = pyplot.subplots()[1]
    assert image_plots.plot_episode(episode, logits, number=1, queries=1, ink=True, ax=ax) is ax
    assert [at(ax, column, WAYS) for column in range(4)] == [[themes.CHECK], [themes.CHECK], [themes.CHECK], []]
    assert "".join(at(ax, 2, 2)) == "97"
    last = ax.images[-1].get_array()  # the query of way 2: text's color, as opaque as the image is high
    assert to_hex(last[0, 0, :3]) == to_hex(rcParams["text.color"])
    assert last[0, 0, 3] == pytest.approx(float(episode.query[1, 2, 0, 0, 0, 0]))


def test_color_images_are_drawn_as_they_are() -> None:
    images = torch.rand(1, 2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    ax = image_plots.plot_episode(Episode(images[:, :, :1], images[:, :, 1:]), torch.eye(2)[None], ink=True)
    for image, wanted in zip(ax.images[:2], images[0, :, 0], strict=True):
        np.testing.assert_allclose(image.get_array(), wanted.permute(1, 2, 0))


def test_logits_of_other_episodes_are_refused() -> None:
    episode, logits = an_episode()
    with pytest.raises(UsageError, match=r"logits \(E, N, W\) of shape \(2, 6, 3\), got \(2, 5, 3\)"):
        image_plots.plot_episode(episode, logits[:, 1:])


def groups() -> tuple[EmbeddingBank, torch.Tensor]:
    """Three classes far apart, of 9 items each, with uint8 images that hold the item's number."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([7, 3, 5]).repeat_interleave(9)
    rows = 50 * torch.eye(4)[:3].repeat_interleave(9, 0) + torch.randn(27, 4, generator=generator)
    return EmbeddingBank(rows, labels), torch.arange(27, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6)


def test_a_map_keeps_classes_together_in_their_colors() -> None:
    bank, images = groups()
    ax = image_plots.plot_embedding_map(bank, images, thumbnails=2, perplexity=5)
    (drawn,) = ax.collections
    points, colors = np.asarray(drawn.get_offsets()), drawn.get_facecolors()
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (bank.labels[distances.argmin(axis=1)] == bank.labels).all()
    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    for number, label in enumerate((3, 5, 7)):
        np.testing.assert_allclose(colors[(bank.labels == label).numpy()], [to_rgba(cycle[number], 0.8)] * 9)
    boxes = [each for each in ax.artists if isinstance(each, AnnotationBbox)]
    for label, box in zip((3, 5), boxes, strict=True):
        own = points[(bank.labels == label).numpy()]
        np.testing.assert_allclose(box.xy, np.median(own, axis=0))
        (picture,) = box.findobj(OffsetImage)
        item = round(255 * float(picture.get_data()[0, 0, 0]))
        assert item == int(
            np.linalg.norm(points - np.asarray(box.xy), axis=1)[(bank.labels == label).numpy()].argmin()
        ) + (9 if label == 3 else 18)


def test_a_map_is_the_same_again_and_wants_an_image_for_each_embedding() -> None:
    bank, images = groups()
    maps = [image_plots.plot_embedding_map(bank, seed=1, perplexity=5).collections[0].get_offsets() for _ in range(2)]
    np.testing.assert_array_equal(*maps)
    with pytest.raises(UsageError, match="expected 27 images, one an embedding, got 26"):
        image_plots.plot_embedding_map(bank, images[1:], perplexity=5)
    with pytest.raises(UsageError, match="a perplexity below the 27 embeddings, got 30"):
        image_plots.plot_embedding_map(bank)


def test_a_grid_has_each_accuracy_in_its_row_and_column() -> None:
    figures = {(20, 1): (0.9, 0.002), (5, 1): (0.98464, 0.00071), (5, 5): (0.99456, 0.0005)}
    results = [result(*figure, *place) for place, figure in figures.items()]
    ax = result_plots.plot_accuracy_grid(results)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["5", "20"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "5"]
    written = {}
    for text in ax.texts:
        column, row = (round(place) for place in text.get_position())
        written.setdefault((row, column), []).append(text.get_text())
    assert written == {(0, 0): ["98.46", "± 0.07"], (0, 1): ["99.46", "± 0.05"], (1, 0): ["90.00", "± 0.20"]}
    (shown,) = ax.images
    grid = shown.get_array()
    np.testing.assert_allclose(grid.filled(0), [[98.464, 99.456], [90, 0]])
    assert grid.mask.tolist() == [[False, False], [False, True]]
    for text in ax.texts:
        column, row = (round(place) for place in text.get_position())
        assert ratio(text.get_color(), shown.to_rgba(grid)[row, column, :3]) >= 4.5
    with pytest.raises(UsageError, match="one result for each pair of ways and shots"):
        result_plots.plot_accuracy_grid([*results, results[0]])


@pytest.mark.parametrize("log", [False, True])
def test_bars_are_as_long_as_their_values_and_say_them(log: bool) -> None:
    values = {"ours": 110_105.0, "a peer": 1_332.4, "another": 5.913}
    ax = result_plots.plot_bars(values, "episodes/s", ours=["ours"], log=log)
    assert [bar.get_width() for bar in ax.patches] == list(values.values())
    assert [round(bar.get_y() + bar.get_height() / 2, 6) for bar in ax.patches] == [0, 1, 2]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(values)
    assert [text.get_text() for text in ax.texts] == ["110,105 episodes/s", "1,332 episodes/s", "5.91 episodes/s"]
    assert [text.xy for text in ax.texts] == [(value, row) for row, value in enumerate(values.values())]
    assert [to_hex(bar.get_facecolor()) == to_hex("C0") for bar in ax.patches] == [True, False, False]
    low, high = ax.get_ylim()
    assert low > high  # the first is on top
    assert ax.get_xscale() == ("log" if log else "linear")
    assert ax.get_xlim()[0] == (1 if log else 0)
    assert all(ratio(text.get_color(), rcParams["axes.facecolor"]) >= 4.5 for text in texts(ax))


@pytest.mark.parametrize(("values", "ours"), [({}, []), ({"a": 0.0}, []), ({"a": 1.0}, ["b"])])
def test_bars_of_nothing_or_of_unknown_names_are_refused(values: dict[str, float], ours: list[str]) -> None:
    with pytest.raises(UsageError, match="expected values above 0"):
        result_plots.plot_bars(values, ours=ours)


def test_an_adaptation_curve_goes_through_its_means_in_a_band_of_the_intervals() -> None:
    results = [result(0.2, 0.004), result(0.9123, 0.0061), result(0.95, 0.02)]
    ax = result_plots.plot_adaptation(results)
    (line,), (band,) = ax.lines, ax.collections
    np.testing.assert_allclose(line.get_xydata(), [[0, 20], [1, 91.23], [2, 95]])
    edge = band.get_paths()[0].vertices
    for step, (low, high) in enumerate([(19.6, 20.4), (90.62, 91.84), (93, 97)]):
        at_step = edge[edge[:, 0] == step, 1]
        np.testing.assert_allclose([at_step.min(), at_step.max()], [low, high])
    assert [(text.xy[0], text.get_text()) for text in ax.texts] == [
        (0, "20.0 ± 0.4"),
        (1, "91.2 ± 0.6"),
        (2, "95.0 ± 2.0"),
    ]


def test_on_a_transparent_page_the_grid_and_maps_suit_the_text(look: str) -> None:
    with pyplot.rc_context({"axes.facecolor": "none"}):
        ax = result_plots.plot_accuracy_grid([result(0.5, 0.1), result(0.9, 0.1, shots=5)])
        lowest = ax.images[0].to_rgba(ax.images[0].get_array())[0, 0, :3]
    assert (ratio(lowest, "white") < ratio(lowest, "black")) == (look == "light")


def test_columns_choose_the_queries_of_an_episode_and_their_order() -> None:
    episode, logits = an_episode()
    ax = image_plots.plot_episode(episode, logits, number=1, columns=[5, 1])
    assert [at(ax, column, WAYS) for column in range(3)] == [[themes.CHECK], [themes.CROSS], []]
    assert [at(ax, 0, way) for way in range(WAYS)] == [["25"], ["26"], ["49"]]
    drawn = {tuple(np.round(image.get_extent(), 2)): float(image.get_array()[0, 0, 0]) for image in ax.images}
    assert drawn[0.07, 0.93, -0.22, -1.08] == pytest.approx(float(episode.query[1, 2, 1, 0, 0, 0]))


def test_strips_hold_the_nearest_others_in_order_with_their_distances() -> None:
    bank, images = groups()
    rows, items = bank.embeddings.numpy(), [4, 20]
    ax = image_plots.plot_neighbours(bank, images, items, k=10)
    drawn = {
        tuple(np.round(image.get_extent(), 2)): round(255 * float(image.get_array()[0, 0, 0])) for image in ax.images
    }
    for strip, item in enumerate(items):
        distances = np.linalg.norm(rows - rows[item], axis=1)
        distances[item] = np.inf  # itself is no neighbor
        near = distances.argsort()[:10]
        top = 1.5 * strip
        assert drawn[-0.13, 0.73, round(top + 0.93, 2), round(top + 0.07, 2)] == item
        below = {round(t.get_position()[0]): t for t in ax.texts if abs(t.get_position()[1] - top - 1.17) < 1e-6}
        boxes = sorted((b for b in ax.patches if abs(b.get_y() - top - 0.03) < 1e-6), key=lambda b: b.get_x())
        for place, other in enumerate(near):
            left = place + 1.1
            assert drawn[tuple(np.round((left + 0.07, left + 0.93, top + 0.93, top + 0.07), 2))] == other
            right = bank.labels[other] == bank.labels[item]
            sign, mark = (themes.CHECK, "C0") if right else (themes.CROSS, "C1")
            assert below[place + 2].get_text() == f"{sign} {distances[other]:.3g}"
            assert to_hex(below[place + 2].get_color()) == to_hex(boxes[place].get_edgecolor()) == to_hex(mark)
    assert ax.texts[0].get_text() == "7"  # a bank without names has its labels


def test_strips_rank_by_the_given_distance_and_shorten_with_the_bank() -> None:
    rows = torch.tensor([[1.0, 0.0], [5.0, 0.1], [1.1, 0.9]])
    bank, images = EmbeddingBank(rows, torch.tensor([0, 0, 1])), torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1)
    for distance, order in ((LpDistance(normalize_embeddings=False), [2, 1]), (CosineSimilarity(), [1, 2])):
        found = image_plots.neighbors_in(bank, [0], 10, distance)
        assert found.indices.tolist() == [order]
        ax = image_plots.plot_neighbours(bank, images, [0], distance=distance)
        assert [round(255 * float(image.get_array()[0, 0, 0])) for image in ax.images] == [0, *order]
    same = EmbeddingBank(torch.ones(9, 2), torch.zeros(9, dtype=torch.int64))
    assert image_plots.neighbors_in(same, [8, 0], 3).indices.tolist() == [[0, 1, 2], [1, 2, 3]]  # all are as near
    with pytest.raises(UsageError, match="a bank of two items or more, got 1"):
        image_plots.neighbors_in(EmbeddingBank(rows[:1], torch.tensor([0])), [0])
    with pytest.raises(UsageError, match="expected 3 images, one an embedding, got 2"):
        image_plots.plot_neighbours(bank, images[1:], [0])


@pytest.mark.parametrize("size", [(1, 4), (2, 4), (3, 4), (12, 1), (6, 2)])
def test_few_or_equal_embeddings_have_a_map_too(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (torch.randn(size, generator=generator), torch.ones(size)):
        points = image_plots.embedding_points(EmbeddingBank(rows, torch.arange(len(rows))), perplexity=0.9)
        assert points.shape == (len(rows), 2)
        assert np.isfinite(points).all()


def confused() -> EpisodicResult:
    """Of four classes: 1 and 3 are often taken for each other, 0 for 1 once."""
    counts = torch.tensor([[99, 1, 0, 0], [0, 60, 0, 40], [0, 0, 100, 0], [0, 30, 0, 70]])
    return replace(result(0.8, 0.1), classes=("ant", "bee", "cat", "dog"), confusion=counts)


def test_the_most_confused_classes_come_first_with_their_shares() -> None:
    assert result_plots.hardest_classes(confused()) == [1, 3, 0]
    assert result_plots.hardest_classes(confused(), most=2) == [1, 3]
    images = {name: torch.full((1, 2, 2), shade / 4) for shade, name in enumerate(("ant", "bee", "cat", "dog"))}
    ax = result_plots.plot_confusion(confused(), images)
    written = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    expected = [["60", "40", ""], ["30", "70", ""], ["1", "", "99"]]
    assert written == {(column, row): expected[row][column] for row in range(3) for column in range(3)}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["bee", "dog", "ant"]
    assert [float(image.get_array()[0, 0, 0]) for image in ax.images] == [0.25, 0.25, 0.75, 0.75, 0, 0]
    behind = {tuple(np.round(box.get_xy(), 2)): box.get_facecolor() for box in ax.patches}
    for text in ax.texts:
        x, y = text.get_position()
        assert not text.get_text() or ratio(text.get_color(), behind[round(x - 0.48, 2), round(y - 0.48, 2)]) >= 4.5


def test_a_confusion_wants_its_matrix_and_a_mistake() -> None:
    with pytest.raises(UsageError, match="confusion matrix, got none"):
        result_plots.plot_confusion(result(0.8, 0.1))
    with pytest.raises(UsageError, match="classes that were taken for each other, got none"):
        result_plots.plot_confusion(replace(confused(), confusion=torch.eye(4)))


def test_intervals_stand_in_their_rows_and_gray_ones_may_be_chance() -> None:
    values = {"a": (2.5, 0.5), "b": (-1.0, 1.5), "c": (3.0, float("nan"))}
    ax = result_plots.plot_intervals(values, "points", zero=True)
    assert [text.get_text() for text in ax.texts] == ["+2.50 ± 0.50", "-1.00 ± 1.50", "+3.00"]
    assert [text.xy for text in ax.texts] == [(2.5, 0), (-1.0, 1), (3.0, 2)]
    colors = [to_hex(text.get_color()) == to_hex("C0") for text in ax.texts]
    assert colors == [True, False, False]  # of the third nobody knows
    bars = [segment for bar in ax.collections for segment in bar.get_segments()]
    np.testing.assert_allclose(bars, [[[2, 0], [3, 0]], [[-2.5, 1], [0.5, 1]]])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    with pytest.raises(UsageError, match="expected values to draw, got none"):
        result_plots.plot_intervals({})


def test_curves_go_through_their_values_in_a_band_of_their_intervals() -> None:
    ax = result_plots.plot_curves(
        {"loss": ([1, 20], [4.0, 0.5]), "other": ([10], [2.0], [0.5])}, ylabel="loss", log=True
    )
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 4], [20, 0.5]])
    edge = ax.collections[0].get_paths()[0].vertices
    assert (edge[:, 1].min(), edge[:, 1].max()) == (1.5, 2.5)
    assert ax.get_yscale() == "log"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["loss", "other"]
    assert result_plots.plot_curves({"loss": ([1, 2], [1.0, -1.0])}, log=True).get_yscale() == "linear"
    many = result_plots.plot_curves({str(n): ([0], [n]) for n in range(len(rcParams["axes.prop_cycle"]) + 1)})
    assert many.lines[0].get_color() == many.lines[-1].get_color()
    assert many.lines[0].get_linestyle() != many.lines[-1].get_linestyle()


def test_reliability_is_how_often_the_best_class_is_right() -> None:
    best = torch.tensor([0.55, 0.58, 0.7, 0.95, 0.91, 1.0])
    right = torch.tensor([1, 0, 1, 1, 1, 0])
    probabilities = torch.stack([best, 1 - best], dim=1)
    labels = 1 - right
    bins = result_plots.calibration_bins(probabilities, labels)
    assert [(round(b.low, 1), b.queries) for b in bins] == [(0.5, 2), (0.6, 1), (0.9, 3)]
    np.testing.assert_allclose([b.probability for b in bins], [0.565, 0.7, 2.86 / 3], rtol=1e-6)
    np.testing.assert_allclose([b.accuracy for b in bins], [0.5, 1, 2 / 3])
    for each, successes in zip(bins, (1, 1, 2), strict=True):
        interval = binomtest(successes, each.queries).proportion_ci(method="wilson")
        assert (each.lower, each.upper) == pytest.approx((interval.low, interval.high), abs=1e-4)
    error = (2 * 0.065 + 0.3 + 3 * (2.86 - 2) / 3) / 6
    assert result_plots.calibration_error(bins) == pytest.approx(error)
    ax = result_plots.plot_reliability(probabilities, labels)
    (dots,) = (each for each in ax.collections if len(each.get_offsets()) == 3)
    np.testing.assert_allclose(dots.get_offsets(), [[100 * b.probability, 100 * b.accuracy] for b in bins])
    sizes = dots.get_sizes() - 20
    np.testing.assert_allclose(sizes / sizes.sum(), [2 / 6, 1 / 6, 3 / 6])


def test_long_names_are_cut_in_their_middle() -> None:
    assert themes.shortened("a name\nof two lines") == "a name of two lines"
    cut = themes.shortened("GREEK SMALL LETTER ALPHA WITH PSILI", 12)
    assert (len(cut), cut[:6], cut[-5:]) == (12, "GREEK ", "PSILI")


def test_a_result_shows_an_episode_and_a_dot_for_each_accuracy() -> None:
    episode, logits = an_episode()
    accuracies = torch.tensor([6, 6, 6, 5, 3, 6]).double() / 6
    ax = image_plots.plot_result(accuracies, episode, logits, number=1)
    written = [text.get_text() for text in ax.texts]
    half = 1.96 * accuracies.std().item() / 6**0.5
    assert f"{100 * accuracies.mean():.2f} ± {100 * half:.2f} %" in written
    assert "1 episode: 3 new classes, 2 examples of each" in written
    assert "6 such episodes" in written
    assert written[-3:] == ["all 6 queries right: 66.7 % of episodes", "1 wrong: 16.7 %", "2 or more wrong: 16.7 %"]
    table, dots = ax.child_axes
    assert [at(table, column, WAYS)[0] for column in range(6)].count(themes.CROSS) == 1
    colors = dots.images[0].get_array().reshape(-1, 3)
    marks = [to_hex(color) for color in colors]
    assert marks[:3] == [to_hex("C0")] * 3
    assert marks[4] == to_hex("C1")
    assert marks[3] not in marks[:3]
    assert all(ratio(text.get_color(), rcParams["axes.facecolor"]) >= 4.5 for text in texts(ax))
