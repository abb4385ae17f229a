"""The rows of the tables: every method with its paper, on Omniglot, miniImageNet and across data sets."""

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
    omniglot_matching,
    omniglot_metric,
    omniglot_protonet,
    omniglot_siamese,
    omniglot_strongest,
    quickstart,
)
from experiments.omniglot_siamese_official import load_rotated_for_training
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
    Splits,
    load_glyphs,
    load_mini_imagenet,
    load_omniglot,
    swap,
)
from pml_fewshot.embedders.full_context import FullContext

SEEDS = (0, 1, 2)
SQUARED_EUCLID = partial(LpDistance, normalize_embeddings=False, power=2)


def rows_of_papers() -> list[Row]:
    """All but those of `lake_rows`; rows of miniImageNet that would take days without a GPU only where there is one."""
    rows = [*omniglot(), *mini_imagenet(), *across()]
    return rows + resnet12() if torch.cuda.is_available() else rows


def omniglot() -> list[Row]:
    """The split of Vinyals et al. 2016, 28 x 28."""
    matching = omniglot_matching.CONFIG
    euclid = replace(
        swap(matching, name="omniglot_matching_euclid", loss=partial(MatchingLoss, distance=SQUARED_EUCLID)),
        published=matching.published,
    )
    return [
        Row("omniglot/protonet", "ProtoNet", (omniglot_protonet.CONFIG,)),
        Row("omniglot/matching", "Matching", (matching,)),
        Row("omniglot/matching_context", "Matching, full context", (in_context(matching),)),
        Row("omniglot/matching_euclid", "Matching, Euclid", (euclid,)),
        Row("omniglot/matching_euclid_context", "Matching, Euclid, full context", (in_context(euclid),)),
        Row("omniglot/siamese", "Siamese", (omniglot_siamese.CONFIG,)),
        Row("omniglot/multi_similarity", "Multi-Similarity", (omniglot_metric.CONFIG,)),
        Row("omniglot/maml", "MAML", maml_trainings()),
        Row("omniglot/maml_first_order", "MAML, first order", maml_trainings(first_order=True)),
        Row("omniglot/strongest", "strongest recipe", (omniglot_strongest.CONFIG,)),
    ]


def in_context(config: ExperimentConfig) -> ExperimentConfig:
    """Matching networks with full-context embeddings."""
    return swap(config, name=f"{config.name}_context", context=partial(FullContext, dim=64))


def maml_trainings(first_order: bool = False) -> tuple[ExperimentConfig, ...]:
    """A network for each number of ways and shots."""
    paper = {(5, 1): "98.7", (5, 5): "99.9", (20, 1): "95.8", (20, 5): "98.9"}
    order = "_first_order" * first_order
    return tuple(
        replace(
            swap(omniglot_maml.CONFIG, name=f"{ways}way_{shots}shot{order}", first_order=first_order),
            published={"Finn et al. 2017, transductive": {f"{ways}-way {shots}-shot": figure}},
        )
        for (ways, shots), figure in paper.items()
    )


def mini_imagenet() -> list[Row]:
    """The split of Ravi and Larochelle 2017, 84 x 84; the copy at hand has 150 of the 600 images a class."""
    protonet = mini_imagenet_protonet.CONFIG
    matching = replace(
        protonet,
        name="mini_imagenet_matching",
        published={"Vinyals et al. 2016, 600 images a class": {"5-way 1-shot": "43.56", "5-way 5-shot": "55.31"}},
        trainer=partial(
            MatchingTrainer, embedder=partial(Embedder, trunk=partial(Conv4, in_channels=3)), support_rotations=2
        ),
    )
    metric = replace(
        protonet,
        name="mini_imagenet_metric",
        published=None,
        trainer=partial(
            MetricTrainer,
            embedder=partial(Embedder, trunk=partial(Conv4, in_channels=3, last_relu=False)),
            loss=partial(DenseNTXentLoss, temperature=0.1),
        ),
        train_spec=BatchSpec(classes=20, per_class=10),
    )
    return [
        Row("mini_imagenet/protonet", "ProtoNet", (protonet,)),
        Row("mini_imagenet/matching", "Matching", (matching,)),
        Row("mini_imagenet/metric", "NT-Xent", (metric,)),
        Row("mini_imagenet/maml", "MAML, first order", (mini_imagenet_maml.CONFIG,)),
    ]


def resnet12() -> list[Row]:
    """miniImageNet with ResNet12 and, of feature maps, DeepEMD and FRN."""
    protonet = mini_imagenet_protonet.CONFIG
    pooled, maps = (partial(Embedder, trunk=partial(ResNet12, pool=pool)) for pool in (True, False))
    emd = partial(PrototypicalLoss, distance=partial(EarthMoversDistance, nodes=25), scale=12.5)
    trainings = {
        "ProtoNet": swap(protonet, "protonet_resnet12", embedder=pooled),
        "DeepEMD": swap(protonet, "emd_resnet12", embedder=maps, loss=emd),
        "FRN": swap(mini_imagenet_frn.CONFIG, "frn_resnet12", embedder=maps),
    }
    return [Row(f"mini_imagenet/{each.name}", f"{name}, ResNet12", (each,)) for name, each in trainings.items()]


def across() -> list[Row]:
    """Trained on one set of classes, evaluated on those of another; gray images of 28 x 28."""
    letters, omniglot = (quickstart.CONFIG,), (replace(omniglot_protonet.CONFIG, published=None),)
    by_omniglot = "omniglot/protonet"
    return [
        Row("across/letters", "letters", letters),
        Row("across/letters_to_omniglot", "letters to Omniglot", letters, "across/letters", load_omniglot),
        Row("across/omniglot_to_letters", "Omniglot to letters", omniglot, by_omniglot, load_glyphs),
        Row("across/omniglot_to_photos", "Omniglot to miniImageNet", omniglot, by_omniglot, gray_mini_imagenet),
    ]


def gray_mini_imagenet(root: Path) -> Splits:
    """miniImageNet as the networks of drawings take it: gray, 28 x 28."""
    return load_mini_imagenet(root, image_size=28).map(gray)


def gray(photos: FewShotDataset) -> FewShotDataset:
    """The luma of color images (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    images = (photos.images * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)
    return FewShotDataset(images, photos.labels, photos.class_names, photos.note)


def lake_rows(folder: Path) -> list[Row]:
    """One-shot classification within alphabets, trained on Omniglot's own background set."""
    paper = {"Lake et al. 2015, people": {"20-way 1-shot": "95.5"}, "Lake et al. 2015, BPL": {"20-way 1-shot": "96.7"}}
    return [
        Row(
            f"lake/{name}",
            method,
            (
                replace(
                    config,
                    published=paper,
                    data=load_rotated_for_training,
                    train_on_validation=False,
                    extra_evaluations=partial(evaluate_lake, folder=folder),
                ),
            ),
        )
        for name, method, config in (
            ("protonet", "ProtoNet", omniglot_protonet.CONFIG),
            ("strongest", "strongest recipe", omniglot_strongest.CONFIG),
        )
    ]
