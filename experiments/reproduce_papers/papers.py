"""The rows of the tables: every method with its paper, on Omniglot, miniImageNet and across datasets."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pytorch_metric_learning.distances import LpDistance

from experiments import (
    mini_imagenet_frn,
    mini_imagenet_maml,
    mini_imagenet_protonet,
    omniglot_maml,
    omniglot_maml_recipes,
    omniglot_matching,
    omniglot_metric,
    omniglot_protonet,
    omniglot_recipes,
    omniglot_siamese,
    omniglot_siamese_official,
    omniglot_strongest,
    quickstart,
)
from experiments.omniglot_siamese_official import evaluate_characters, load_rotated_for_training
from experiments.reproduce_papers.lake import evaluate_lake
from experiments.reproduce_papers.rows import Row
from pml_fewshot import (
    BatchSpec,
    Conv4,
    DenseNTXentLoss,
    EarthMoversDistance,
    Embedder,
    ExperimentConfig,
    FewShotDataset,
    MatchingLoss,
    MatchingTrainer,
    MetricTrainer,
    PrototypicalLoss,
    ResNet12,
    ResultTable,
    Splits,
    benchmark,
    load_glyphs,
    load_mini_imagenet,
    load_omniglot,
    swap,
)
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.experiment.prepare import instance, load_data
from pml_fewshot.trainers.base import FewShotTrainer

MAML_NOTE = "one network, trained on tasks of 120 ways; one step makes its last layer a classifier by class means"
SQUARED_EUCLID = partial(LpDistance, normalize_embeddings=False, power=2)


def rows_of_papers() -> list[Row]:
    """Returns the rows of methods and papers, without those of `lake_rows`."""
    return [*omniglot(), *mini_imagenet(), *across(), *official()]


def omniglot() -> list[Row]:
    """Returns the rows on the split of Vinyals et al. 2016, 28 x 28."""
    matching = omniglot_matching.CONFIG
    euclid = swap(
        matching,
        name="omniglot_matching_euclid",
        loss=partial(MatchingLoss, distance=SQUARED_EUCLID, scale=0.1, learn_scale=True),
    )
    return [
        PROTONET,
        Row("omniglot/matching", "Matching", matching),
        Row("omniglot/matching_context", "Matching, full context", in_context(matching)),
        Row("omniglot/matching_euclid", "Matching, Euclidean", euclid),
        Row("omniglot/matching_euclid_context", "Matching, Euclidean, full context", in_context(euclid)),
        Row("omniglot/siamese", "Siamese", omniglot_siamese.CONFIG),
        Row("omniglot/multi_similarity", "Multi-Similarity", omniglot_metric.CONFIG),
        Row("omniglot/maml", "MAML", omniglot_maml.CONFIG, note=MAML_NOTE),
        Row(
            "omniglot/maml_first_order",
            "MAML, first order",
            in_first_order(omniglot_maml.CONFIG),
            note=MAML_NOTE,
        ),
        STRONGEST,
    ]


STRONGEST = Row("omniglot/strongest", "strongest recipe", omniglot_strongest.CONFIG)
PROTONET = Row("omniglot/protonet", "ProtoNet", omniglot_protonet.CONFIG)


def in_context(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config with full-context embeddings."""
    return swap(config, name=f"{config.name}_context", context=partial(FullContext, dim=64))


def in_first_order(config: ExperimentConfig) -> ExperimentConfig:
    """Returns MAML's config without second derivatives, for which Finn et al. 2017 have no figures on Omniglot."""
    return swap(config, name=f"{config.name}_first_order", first_order=True)


def mini_imagenet() -> list[Row]:
    """Returns the rows on the split of Ravi and Larochelle 2017, 84 x 84: Conv4, and ResNet12, which needs a GPU."""
    protonet, conv4 = mini_imagenet_protonet.CONFIG, partial(Conv4, in_channels=3)
    matching = replace(
        protonet,
        name="mini_imagenet_matching",
        # Vinyals et al. 2016 have another split; these are of a later paper that ran their method again
        published={"Ravi and Larochelle 2017": {"5-way 1-shot": "43.40 +- 0.78", "5-way 5-shot": "51.09 +- 0.71"}},
        trainer=partial(MatchingTrainer, embedder=partial(Embedder, trunk=conv4), support_rotations=2),
    )
    metric = replace(
        protonet,
        name="mini_imagenet_metric",
        published=None,
        trainer=partial(
            MetricTrainer,
            embedder=partial(Embedder, trunk=partial(conv4, last_relu=False)),
            loss=partial(DenseNTXentLoss, temperature=0.1),
        ),
        train_spec=BatchSpec(classes=20, per_class=10),
    )
    pooled, maps = (partial(Embedder, trunk=partial(ResNet12, pool=pool)) for pool in (True, False))
    emd = partial(PrototypicalLoss, distance=partial(EarthMoversDistance, nodes=25), scale=12.5)
    resnet12 = {
        "ProtoNet, ResNet12": swap(protonet, "mini_imagenet_resnet12", embedder=pooled),
        "DeepEMD, ResNet12": swap(protonet, "mini_imagenet_resnet12_emd", embedder=maps, loss=emd),
        "FRN, ResNet12": swap(mini_imagenet_frn.CONFIG, "mini_imagenet_resnet12_frn", embedder=maps),
    }
    return [
        Row("mini_imagenet/protonet", "ProtoNet", protonet),
        Row("mini_imagenet/matching", "Matching", matching),
        Row("mini_imagenet/metric", "NT-Xent", metric),
        Row("mini_imagenet/maml", "MAML, first order", mini_imagenet_maml.CONFIG),
        *(
            Row(f"mini_imagenet/{each.name.removeprefix('mini_imagenet_')}", name, each, long=True)
            for name, each in resnet12.items()
        ),
    ]


def across() -> list[Row]:
    """Returns the rows trained on one set of classes and tested on another's test classes; gray 28 x 28 images."""
    letters = Row("across/letters", "letters", quickstart.CONFIG)
    on_both = "trained on train and val classes"
    greek = f"{on_both}; Greek letters, and Omniglot's training characters have a Greek alphabet too"
    pairs: list[tuple[str, str, Row, Callable[..., Splits]]] = [
        ("letters to Omniglot", "", letters, load_omniglot),
        ("Omniglot to letters", greek, PROTONET, load_glyphs),
        ("Omniglot to miniImageNet", on_both, PROTONET, gray_mini_imagenet),
    ]
    rows = [letters]
    for method, note, trained_by, loader in pairs:
        evaluate, name = partial(on_test_classes, loader=loader), f"across/{method.lower().replace(' ', '_')}"
        rows.append(Row(name, method, trained_by.training, trained_by, evaluate, published={}, note=note))
    return rows


def on_test_classes(trainer: FewShotTrainer, config: ExperimentConfig, loader: Callable[..., Splits]) -> ResultTable:
    """Evaluates a trained network on the test classes of other data, with the episode sizes of its config."""
    test = load_data(replace(config, data=loader)).test
    sizes = config.eval_specs, instance(config.retrieval), config.num_episodes, config.eval_seed
    return benchmark({config.name: trainer}, test, *sizes, timed=False)


def gray_mini_imagenet(root: Path) -> Splits:
    """Loads miniImageNet in the form that the networks for drawings expect: gray, 28 x 28."""
    return load_mini_imagenet(root, image_size=28).map(gray)


def gray(photos: FewShotDataset) -> FewShotDataset:
    """Converts color images to luma (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    images = (photos.images * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)
    return FewShotDataset(images, photos.labels, photos.class_names, photos.note)


def official() -> list[Row]:
    """Returns the rows on Omniglot's own split, background and evaluation, for the task of Lake et al. 2015."""
    protonet = of_background(omniglot_protonet.CONFIG, load_rotated_for_training)
    strongest = of_background(omniglot_strongest.CONFIG, load_mirrored_for_training)
    return [
        Row("omniglot_official/protonet", "ProtoNet", protonet),
        Row("omniglot_official/siamese", "Siamese", omniglot_siamese_official.CONFIG),
        Row("omniglot_official/strongest", "strongest recipe", strongest),
    ]


def load_mirrored_for_training(root: Path) -> Splits:
    """Loads the official split, with the rotated training characters and their mirror images as separate classes."""
    splits = load_rotated_for_training(root)
    return Splits(splits.train.with_mirrors_as_classes(), None, splits.test)


def of_background(config: ExperimentConfig, data: Callable[..., Splits]) -> ExperimentConfig:
    """Returns an experiment trained on the background set alone; also evaluated on all 659 characters at once."""
    return replace(
        config,
        name=config.name.replace("omniglot", "omniglot_official"),
        published=None,
        data=data,
        train_on_validation=False,
        extra_evaluations=evaluate_characters,
    )


def ablations() -> list[Row]:
    """Returns the ablations of the strongest recipe and of MAML, evaluated on the validation characters."""
    tables = {"omniglot_recipes": omniglot_recipes.CONFIGS, "omniglot_maml_recipes": omniglot_maml_recipes.CONFIGS}
    return [
        Row(f"{table}/{config.name.lower().replace(',', '').replace(' ', '_')}", config.name, config)
        for table, configs in tables.items()
        for config in configs
    ]


def lake_rows(folder: Path) -> list[Row]:
    """Returns the rows of one-shot classification within alphabets by the networks of `official`."""
    papers = {"people, Lake et al. 2015": {"20-way 1-shot": "95.5"}, "BPL, Lake et al. 2015": {"20-way 1-shot": "96.7"}}
    return [
        Row(
            row.name.replace("omniglot_official", "lake"),
            row.method,
            row.training,
            row,
            partial(evaluate_lake, folder=folder),
            published=papers if number == 0 else {},
            options="--lake RUNS ",
        )
        for number, row in enumerate(official())
    ]
