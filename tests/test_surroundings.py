"""Every public function gives the same figures whatever surrounds it: modes, autocast, 16 bits, memory layout, threads.

`FIGURES` and `WITHOUT_FIGURES` together are all public names, so that a new one cannot slip by.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor, nn

import pml_fewshot as p
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.sampling.episodes import EpisodeSpec
from tests.tiny_experiments import EMBEDDER, TINY_EXPERIMENTS, TRUNK, tiny_set, tiny_splits

SPEC = EpisodeSpec(ways=4, shots=2, queries=3)
WAYS, DIMS = 4, 32
LABELS = torch.arange(6).repeat_interleave(10)
Given = Callable[[Tensor], Tensor]  # how the figures' own inputs are given


def exact(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that float16 holds, but so near each other that bfloat16's products cannot tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    return 8 + torch.randint(-64, 65, shape, generator=generator).float() / 128


def rows(seed: int = 0) -> Tensor:
    """(60, DIMS) embeddings of six classes."""
    near = exact(6, 1, DIMS, seed=seed) + exact(6, 10, DIMS, seed=seed + 1) / 2
    return near.mul(128).round().div(128).flatten(0, 1)


def bank(given: Given = lambda x: x, seed: int = 0) -> p.EmbeddingBank:
    return p.EmbeddingBank(given(rows(seed)), LABELS)


def built(make: Callable[[], Any]) -> Any:
    """A part made from the same random weights, outside of all modes, as those are that a user brings."""
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        return make()


def with_statistics(module: nn.Module) -> nn.Module:
    """In train mode, its batch norms with running statistics of their own."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for seed in (1, 2):
            module.train()(torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return module


def conv4() -> p.Embedder:
    return with_statistics(built(lambda: p.Embedder(p.Conv4(channels=8))))


def images() -> p.FewShotDataset:
    pixels = torch.randint(256, (60, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return p.FewShotDataset(pixels, LABELS, list("abcdef"))


SQUARED = LpDistance(normalize_embeddings=False, power=2)


def of_head(head: Any) -> Callable[..., Any]:
    def logits(given: Given, folder: Path) -> Any:
        return head(given(exact(5, WAYS, 2, DIMS)), given(exact(5, 6, DIMS, seed=3)))

    return logits


def of_classifier(given: Given, folder: Path) -> Any:
    classifier = p.FewShotClassifier().fit(given(rows()).float(), LABELS)
    asked, left_out = given(rows(5)).float(), p.leave_one_out(classifier, draws=5)
    answers = classifier.decision_function(asked), classifier.predict_proba(asked), classifier.similarity(asked)
    return [*map(torch.from_numpy, answers), left_out.similarity, left_out.certainty, left_out.others]


def of_loss(make: Callable[[], Any]) -> Callable[..., Any]:
    def value(given: Given, folder: Path) -> Any:
        return built(make)(given(rows()[:12]), LABELS[::5], ref_emb=given(rows(5)[:12]), ref_labels=LABELS[::5])

    return value


def of_distances(given: Given, folder: Path) -> Any:
    made = [built(partial(p.WeightedL1Similarity, *size)) for size in ((), (DIMS,), (DIMS, 4))]
    return [distance(given(rows()[:5]), given(rows(3)[:4])) for distance in made]


def of_maps(given: Given, folder: Path) -> Any:
    spread = [given((rows(seed)[:5] - 8) * 8) for seed in (0, 3)]
    made = [p.EarthMoversDistance(2, "sinkhorn"), p.LocalNeighborSimilarity(2, k=1)]
    return [distance(*spread) for distance in made]


def of_relation(given: Given, folder: Path) -> Any:
    distance = built(lambda: p.RelationSimilarity(16, channels=4, hidden=3, dim=32)).eval()
    return distance(given(exact(3, 32)), given(exact(2, 32, seed=1)))


def of_context(given: Given, folder: Path) -> Any:
    context = built(lambda: p.SetToSet(DIMS)).eval()
    return context(given(exact(2, WAYS, 2, DIMS)).float(), given(exact(2, 3, DIMS, seed=1)).float())


def of_variable(given: Given, folder: Path) -> Any:
    near = p.EmbeddingBank(given(exact(60, DIMS)), LABELS)
    return p.EpisodicEvaluator(p.VariableEpisodeSpec(2, 4), 20).evaluate(near).per_episode


def of_trainer(make: Callable[..., Any]) -> Callable[..., Any]:
    def bank_and_logits(given: Given, folder: Path) -> Any:
        trainer = built(lambda: make(EMBEDDER())).train()
        dataset = tiny_set("a", 6, 0)
        support, query = given(exact(3, 4, 2, 8)), given(exact(3, 5, 8, seed=2))
        return trainer.bank(dataset), trainer.classify(support, query)

    return bank_and_logits


def maml() -> p.MAMLTrainer:
    network = partial(nn.Sequential, partial(nn.Flatten), partial(nn.BatchNorm1d, 16), partial(nn.Linear, 16, WAYS))
    return built(lambda: p.MAMLTrainer(network, 0.1, 2)).train()


def of_maml(given: Given, folder: Path) -> Any:
    return maml().classify(given(exact(2, WAYS, 1, 1, 4, 4)), given(exact(2, 6, 1, 4, 4, seed=2)))


def of_curve(given: Given, folder: Path) -> Any:
    return [r.per_episode for r in p.adaptation_curve(maml(), tiny_set("a", 6, 0), EpisodeSpec(WAYS, 1, 3), 20)]


def of_fit(given: Given, folder: Path) -> Any:
    trainer = built(lambda: p.ProtoNetTrainer(EMBEDDER()))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout draws from it
        stream = p.EpisodeStream(tiny_set("a", 8, 0), SPEC, 0, RandomAffine())
        p.fit(trainer, stream, torch.optim.Adam(trainer.parameters()), 3, progress=False)
    return list(trainer.state_dict().values())


def of_run(given: Given, folder: Path) -> Any:
    config = replace(TINY_EXPERIMENTS["protonet"], steps=4, run_dir=folder / "run")
    table = p.run(config)
    trained = p.load_trained(folder / "run", config)
    return [row.value for row in table.rows], list(trained.state_dict().values())


def of_sweep(given: Given, folder: Path) -> Any:
    config = replace(TINY_EXPERIMENTS["siamese"], steps=3)
    return [row.value for row in p.sweep([config], folder / "sweep").rows]


def of_search(given: Given, folder: Path) -> Any:
    def config_of_trial(trial: Any) -> p.ExperimentConfig:
        return replace(TINY_EXPERIMENTS["siamese"], steps=3, loss_lr=trial.suggest_float("rate", 0.01, 0.1))

    found = p.search(config_of_trial, 2, folder / "search")
    return [row.value for row in found.table.rows], [trial.value for trial in found.study.trials]


def of_encode(given: Given, folder: Path) -> Any:
    return conv4().encode(images(), batch_size=7).embeddings, p.Embedder.encode(conv4(), images()).embeddings


def of_other_trunks(given: Given, folder: Path) -> Any:
    color = p.FewShotDataset(images().images.repeat(1, 3, 3, 3)[:4], LABELS[:4], ["a"])
    resnet = built(lambda: p.Embedder(p.ResNet12())).train()
    layers = nn.Flatten, partial(nn.Linear, 3 * 48 * 48, 6), partial(nn.BatchNorm1d, 6), partial(nn.Linear, 6, 2)
    model = built(lambda: nn.Sequential(*(layer() for layer in layers)))
    views = built(lambda: p.Embedder(p.DihedralViews(nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 6))))).train()
    others = (views, p.Embedder(p.TorchvisionTrunk(model.train())))
    return [embedder.encode(color).embeddings for embedder in (resnet, *others)]


def of_files(given: Given, folder: Path) -> Any:
    folder.mkdir()
    p.save_bank(folder / "bank.safetensors", bank(given))
    p.export_embedder(folder / "embedder.safetensors", conv4())
    p.load_embedder(folder / "embedder.safetensors", other := built(lambda: p.Embedder(p.Conv4(channels=8))))
    return p.load_bank(folder / "bank.safetensors").normalized().embeddings, list(other.state_dict().values())


def of_bank(given: Given, folder: Path) -> Any:
    own = bank(given)
    return own.mean(), own.centered(own.mean()).embeddings, own.normalized().embeddings


def of_evaluator(given: Given, folder: Path) -> Any:
    evaluator, trainer = p.EpisodicEvaluator(SPEC, 40), p.ProtoNetTrainer(conv4())
    methods = (bank(given),), (conv4(), images()), (trainer, images())
    results = [evaluator.evaluate(*method) for method in methods]
    return [result.per_episode for result in results], p.compare(results[1], results[2]).difference


def of_fixed(given: Given, folder: Path) -> Any:
    query = p.EmbeddingBank(given(rows(5)), LABELS)
    results = [p.evaluate_fixed(bank(given), bank(given), query)]
    results.append(p.evaluate_fixed(conv4(), images(), images(), shots=2))
    return [result["accuracy"] for result in results]


def of_retrieval(given: Given, folder: Path) -> Any:
    tester = p.RetrievalTester(("precision_at_1", "mean_average_precision_at_r"))
    results = [tester.test(bank(given)), tester.test(bank(given), bank(given, 5)), tester.test(conv4(), images())]
    return [dict(result) for result in results]


def of_gallery(given: Given, folder: Path) -> Any:
    return p.Gallery(bank(given), "flat").search(given(rows(9)[:5]), 4).indices


def of_sharded_gallery(given: Given, folder: Path) -> Any:
    gallery = p.build_gallery(bank(given), folder / "gallery", "IVF2,Flat", "nprobe=2")
    return gallery.search(given(rows(9)[:5]), 4).indices


def of_benchmark(given: Given, folder: Path) -> Any:
    methods = {"bank": bank(given), "trainer": p.ProtoNetTrainer(conv4())}
    return [row.value for row in p.benchmark(methods, images(), [SPEC], num_episodes=30, timed=False).rows]


def of_streams(given: Given, folder: Path) -> Any:
    each = p.PerImage(lambda image: image * torch.rand(()))
    episodes = p.EpisodeStream(images(), SPEC, 0, [RandomAffine(), p.RandomWarp(), each])
    batches = p.BatchStream(images(), p.BatchSpec(4, 2), 0, RandomAffine())
    index = p.EpisodeSampler(LABELS, SPEC, torch.Generator().manual_seed(0)).sample(5)
    return [next(episodes).support, next(batches).images, index.support, index.query]


def of_photo_augmentation(given: Given, folder: Path) -> Any:
    photos = given(torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0)).mul(256).round() / 256)
    steps = (p.RandomResizedCrop(8), p.RandomHorizontalFlip(), p.ColorJitter(0.4, 0.4, 0.4, 0.1))
    return [step(photos, torch.Generator().manual_seed(1)).float() for step in steps]


FIGURES: dict[str, Callable[[Given, Path], Any]] = {
    **{head.__name__: of_head(head) for head in (p.nearest_prototype, p.nearest_neighbour, p.cosine_classifier)},
    "gallery_votes": of_head(partial(p.gallery_votes, k=2, index="flat")),
    "FewShotClassifier": of_classifier,
    "leave_one_out": of_classifier,
    **{head.__name__: of_head(head) for head in (p.ridge_regression, p.logistic_regression)},
    **{loss.__name__: of_loss(loss) for loss in (p.PrototypicalLoss, p.DenseNTXentLoss, p.DenseTripletMarginLoss)},
    "MatchingLoss": of_loss(partial(p.MatchingLoss, scale=10)),
    "ReconstructionLoss": of_loss(partial(p.ReconstructionLoss, 2)),
    "feature_map_reconstruction": of_head(partial(p.feature_map_reconstruction, nodes=2)),
    **{head.__name__: of_head(head) for head in (p.bd_cspn, p.laplacian_shot, p.pt_map, p.fine_tuning)},
    **{head.__name__: of_head(partial(head, steps=5)) for head in (p.alpha_tim, p.transductive_fine_tuning)},
    "structured_classifier": of_head(partial(p.structured_classifier, epochs=2, lr=0.1, distance=SQUARED)),
    **dict.fromkeys(("EarthMoversDistance", "LocalNeighborSimilarity"), of_maps),
    "RelationSimilarity": of_relation,
    "SetToSet": of_context,
    "FRNTrainer": of_trainer(partial(p.FRNTrainer, loss=partial(p.ReconstructionLoss, 2))),
    "VariableEpisodeSpec": of_variable,
    "PairVerificationLoss": of_loss(partial(p.PairVerificationLoss, balanced=False)),
    "WeightedL1Similarity": of_distances,
    **{make.__name__: of_trainer(make) for make in (p.ProtoNetTrainer, p.MatchingTrainer, p.SiameseTrainer)},
    "MetricTrainer": of_trainer(p.MetricTrainer),
    "MAMLTrainer": of_maml,
    "adaptation_curve": of_curve,
    "fit": of_fit,
    **dict.fromkeys(("run", "load_trained"), of_run),
    "sweep": of_sweep,
    "search": of_search,
    **dict.fromkeys(("Embedder", "Conv4"), of_encode),
    **dict.fromkeys(("DihedralViews", "ResNet12", "TorchvisionTrunk"), of_other_trunks),
    **dict.fromkeys(("save_bank", "load_bank", "export_embedder", "load_embedder"), of_files),
    "EmbeddingBank": of_bank,
    **dict.fromkeys(("EpisodicEvaluator", "compare"), of_evaluator),
    "evaluate_fixed": of_fixed,
    "RetrievalTester": of_retrieval,
    "Gallery": of_gallery,
    "build_gallery": of_sharded_gallery,
    "benchmark": of_benchmark,
    **dict.fromkeys(
        ("EpisodeStream", "BatchStream", "EpisodeSampler", "RandomAffine", "RandomWarp", "PerImage"), of_streams
    ),
    **dict.fromkeys(("RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter"), of_photo_augmentation),
}
WITHOUT_FIGURES = {
    *("Preprocessing", "ImageEmbedder", "export_onnx", "update_onnx", "export_program"),  # of photos, to files
    *("TimmTrunk", "TransformersTrunk"),  # of extras
    "encode_to_file",  # what encode gives
    *("UsageError", "FewShotDataset", "Splits", "Batch", "BatchSpec", "Episode", "EpisodeSpec", "ResultTable"),
    *("load_omniglot", "load_mini_imagenet", "load_image_folder", "load_glyphs"),  # of bytes
    *("load_images", "load_image_table"),
    *("ExperimentConfig", "swap", "main", "processes"),  # which are run
    *(name for name in p.__all__ if name.startswith("plot_") or name == "theme"),  # pictures
}


def apart(given: Tensor) -> Tensor:
    """The same numbers, each two places from the next."""
    return torch.stack([given, -given], dim=-1)[..., 0]


SURROUNDINGS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Given]] = {
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda x: x),
    "no_grad": (torch.no_grad, lambda x: x),
    "inference_mode": (torch.inference_mode, lambda x: x),
    "float16": (nullcontext, Tensor.half),
    "non-contiguous": (nullcontext, apart),
}
FUNCTIONS = {function: name for name, function in FIGURES.items()}  # each once


def flat(found: Any) -> list[float]:
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, Tensor):
        return found.double().flatten().tolist()
    return [number for each in found for number in flat(each)] if isinstance(found, list | tuple) else [float(found)]


def test_every_public_name_is_walked_over() -> None:
    assert FIGURES.keys() | WITHOUT_FIGURES == set(p.__all__)
    assert not FIGURES.keys() & WITHOUT_FIGURES


@pytest.mark.parametrize("function", FUNCTIONS, ids=FUNCTIONS.values())
def test_figures_are_the_same_whatever_surrounds_them(function: Callable[..., Any], tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    expected = flat(function(lambda x: x, tmp_path / "plain"))
    assert not all(number in (0, 1) for number in expected)
    for name, (surrounding, given) in SURROUNDINGS.items():
        with surrounding():
            found = flat(function(given, tmp_path / name))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True), name
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: module,
        nn.DataParallel,
        pytest.param(partial(torch.compile, backend="eager"), marks=pytest.mark.slow),  # compiling takes seconds
    ],
)
def test_threads_may_share_a_module_in_any_mode(wrap: Callable[..., nn.Module]) -> None:
    embedder, dataset = conv4(), images()
    embedder.trunk.blocks[1].eval()  # frozen by hand
    modes, before = [m.training for m in embedder.modules()], {n: v.clone() for n, v in embedder.state_dict().items()}
    shared, evaluator, threads = wrap(embedder), p.EpisodicEvaluator(SPEC, 30), torch.get_num_threads()
    right = p.EpisodicEvaluator(SPEC, 30).evaluate(embedder, dataset)
    rows = embedder.encode(dataset).embeddings
    trainer, learner = p.ProtoNetTrainer(shared), maml()
    small = tiny_set("a", 6, 0)
    adapted = p.EpisodicEvaluator(EpisodeSpec(WAYS, 1, 2), 10).evaluate(learner, small)

    def use(number: int) -> None:
        if number % 3 == 0:
            found = trainer.bank(dataset)
            torch.testing.assert_close(found, rows)
        elif number % 3 == 1:
            assert torch.equal(evaluator.evaluate(shared, dataset).per_episode, right.per_episode)
        else:
            again = p.EpisodicEvaluator(EpisodeSpec(WAYS, 1, 2), 10).evaluate(learner, small)
            assert torch.equal(again.per_episode, adapted.per_episode)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(36)))
    assert [module.training for module in embedder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:  # new threads have as many, too
        assert pool.submit(torch.get_num_threads).result() == threads


def test_two_runs_are_the_same_whatever_was_done_before_and_leave_the_callers_generators(tmp_path: Path) -> None:
    """The parts are instances, and the augmentation draws from global generators, which is nobody's best idea."""

    def careless(images: Tensor, generator: torch.Generator) -> Tensor:
        return (images + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(())) / 2  # noqa: NPY002

    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = p.ProtoNetTrainer(p.Embedder(TRUNK), p.PrototypicalLoss())
    weights = {name: value.clone() for name, value in trainer.state_dict().items()}
    config = replace(TINY_EXPERIMENTS["protonet"], trainer=trainer, steps=6, augment=careless)
    first = p.run(replace(config, run_dir=tmp_path / "first"))
    p.run(replace(config, run_dir=tmp_path / "between", seed=9, data=tiny_splits))
    p.EpisodicEvaluator(SPEC, 20).evaluate(bank())
    torch.rand(5, generator=None), np.random.rand(3), random.random()  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    second = p.run(replace(config, run_dir=tmp_path / "second"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert repr(second.rows) == repr(first.rows)
    assert (tmp_path / "first" / "train.csv").read_text() == (tmp_path / "second" / "train.csv").read_text()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.state_dict().items())
