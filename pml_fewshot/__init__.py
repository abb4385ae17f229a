"""Few-shot and metric learning on pytorch-metric-learning: episodes, trainers, and evaluation that can be trusted."""

import importlib
from typing import TYPE_CHECKING, Any

from pml_fewshot.environment import prepare_imports

if TYPE_CHECKING:  # for type checkers and editors; the same names again below, for Python
    from pml_fewshot.checks import UsageError as UsageError
    from pml_fewshot.data.augmentation import RandomAffine as RandomAffine
    from pml_fewshot.data.dataset import FewShotDataset as FewShotDataset
    from pml_fewshot.data.dataset import Splits as Splits
    from pml_fewshot.data.glyphs import load_glyphs as load_glyphs
    from pml_fewshot.data.image_folder import load_image_folder as load_image_folder
    from pml_fewshot.data.mini_imagenet import load_mini_imagenet as load_mini_imagenet
    from pml_fewshot.data.omniglot import load_omniglot as load_omniglot
    from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity as WeightedL1Similarity
    from pml_fewshot.embedders.bank import EmbeddingBank as EmbeddingBank
    from pml_fewshot.embedders.bank import load_bank as load_bank
    from pml_fewshot.embedders.bank import save_bank as save_bank
    from pml_fewshot.embedders.conv4 import Conv4 as Conv4
    from pml_fewshot.embedders.embedder import Embedder as Embedder
    from pml_fewshot.embedders.resnet12 import ResNet12 as ResNet12
    from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk as TorchvisionTrunk
    from pml_fewshot.evaluation.benchmark import benchmark as benchmark
    from pml_fewshot.evaluation.episodic import EpisodicEvaluator as EpisodicEvaluator
    from pml_fewshot.evaluation.episodic import adaptation_curve as adaptation_curve
    from pml_fewshot.evaluation.gallery import Gallery as Gallery
    from pml_fewshot.evaluation.heads import nearest_neighbour as nearest_neighbour
    from pml_fewshot.evaluation.heads import nearest_prototype as nearest_prototype
    from pml_fewshot.evaluation.linear_heads import cosine_classifier as cosine_classifier
    from pml_fewshot.evaluation.linear_heads import logistic_regression as logistic_regression
    from pml_fewshot.evaluation.linear_heads import ridge_regression as ridge_regression
    from pml_fewshot.evaluation.retrieval import RetrievalTester as RetrievalTester
    from pml_fewshot.evaluation.statistics import compare as compare
    from pml_fewshot.evaluation.table import ResultTable as ResultTable
    from pml_fewshot.experiment.command_line import main as main
    from pml_fewshot.experiment.config import ExperimentConfig as ExperimentConfig
    from pml_fewshot.experiment.config import swap as swap
    from pml_fewshot.experiment.run import run as run
    from pml_fewshot.experiment.sweep import sweep as sweep
    from pml_fewshot.io.checkpoint import export_embedder as export_embedder
    from pml_fewshot.io.checkpoint import load_embedder as load_embedder
    from pml_fewshot.losses.dense import DenseNTXentLoss as DenseNTXentLoss
    from pml_fewshot.losses.dense import DenseTripletMarginLoss as DenseTripletMarginLoss
    from pml_fewshot.losses.matching import MatchingLoss as MatchingLoss
    from pml_fewshot.losses.pair_verification import PairVerificationLoss as PairVerificationLoss
    from pml_fewshot.losses.prototypical import PrototypicalLoss as PrototypicalLoss
    from pml_fewshot.sampling.batch_stream import BatchStream as BatchStream
    from pml_fewshot.sampling.batches import Batch as Batch
    from pml_fewshot.sampling.batches import BatchSpec as BatchSpec
    from pml_fewshot.sampling.episode_stream import EpisodeStream as EpisodeStream
    from pml_fewshot.sampling.episodes import Episode as Episode
    from pml_fewshot.sampling.episodes import EpisodeSampler as EpisodeSampler
    from pml_fewshot.sampling.episodes import EpisodeSpec as EpisodeSpec
    from pml_fewshot.trainers.maml.trainer import MAMLTrainer as MAMLTrainer
    from pml_fewshot.trainers.matching import MatchingTrainer as MatchingTrainer
    from pml_fewshot.trainers.metric import MetricTrainer as MetricTrainer
    from pml_fewshot.trainers.protonet import ProtoNetTrainer as ProtoNetTrainer
    from pml_fewshot.trainers.siamese import SiameseTrainer as SiameseTrainer
    from pml_fewshot.training.fit import fit as fit

__version__ = "0.6.0"

# PML takes longer to import than torch (it imports scipy.stats), so each name is imported when it is first used.
MODULES = {
    "checks": ["UsageError"],
    "data.augmentation": ["RandomAffine"],
    "data.dataset": ["FewShotDataset", "Splits"],
    "data.glyphs": ["load_glyphs"],
    "data.image_folder": ["load_image_folder"],
    "data.mini_imagenet": ["load_mini_imagenet"],
    "data.omniglot": ["load_omniglot"],
    "distances.weighted_l1": ["WeightedL1Similarity"],
    "embedders.bank": ["EmbeddingBank", "load_bank", "save_bank"],
    "embedders.conv4": ["Conv4"],
    "embedders.embedder": ["Embedder"],
    "embedders.resnet12": ["ResNet12"],
    "embedders.torchvision_trunk": ["TorchvisionTrunk"],
    "evaluation.benchmark": ["benchmark"],
    "evaluation.episodic": ["EpisodicEvaluator", "adaptation_curve"],
    "evaluation.gallery": ["Gallery"],
    "evaluation.heads": ["nearest_neighbour", "nearest_prototype"],
    "evaluation.linear_heads": ["cosine_classifier", "logistic_regression", "ridge_regression"],
    "evaluation.retrieval": ["RetrievalTester"],
    "evaluation.statistics": ["compare"],
    "evaluation.table": ["ResultTable"],
    "experiment.command_line": ["main"],
    "experiment.config": ["ExperimentConfig", "swap"],
    "experiment.run": ["run"],
    "experiment.sweep": ["sweep"],
    "io.checkpoint": ["export_embedder", "load_embedder"],
    "losses.dense": ["DenseNTXentLoss", "DenseTripletMarginLoss"],
    "losses.matching": ["MatchingLoss"],
    "losses.pair_verification": ["PairVerificationLoss"],
    "losses.prototypical": ["PrototypicalLoss"],
    "sampling.batch_stream": ["BatchStream"],
    "sampling.batches": ["Batch", "BatchSpec"],
    "sampling.episode_stream": ["EpisodeStream"],
    "sampling.episodes": ["Episode", "EpisodeSampler", "EpisodeSpec"],
    "trainers.maml.trainer": ["MAMLTrainer"],
    "trainers.matching": ["MatchingTrainer"],
    "trainers.metric": ["MetricTrainer"],
    "trainers.protonet": ["ProtoNetTrainer"],
    "trainers.siamese": ["SiameseTrainer"],
    "training.fit": ["fit"],
}
MODULE_OF = {name: module for module, names in MODULES.items() for name in names}
__all__ = sorted(MODULE_OF)

prepare_imports()


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
