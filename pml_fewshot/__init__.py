"""Few-shot and metric learning on pytorch-metric-learning: episodes, trainers, and evaluation that can be trusted."""

from pml_fewshot.torchvision_import import ensure_torchvision

ensure_torchvision()  # before anything that imports torchvision

# ruff: noqa: E402
from pml_fewshot.atomic import CannotWriteError
from pml_fewshot.batches import Batch, BatchSpec
from pml_fewshot.checkpoint import export_embedder, load_checkpoint, load_embedder, save_checkpoint
from pml_fewshot.command_line import main
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.batch_stream import BatchStream
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits, join
from pml_fewshot.data.glyphs import load_glyphs
from pml_fewshot.data.image_folder import load_image_folder
from pml_fewshot.data.mini_imagenet import load_mini_imagenet
from pml_fewshot.data.omniglot import load_omniglot
from pml_fewshot.distances.weighted_l1 import WeightedL1Similarity
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.bank_file import load_bank, save_bank
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.full_context import FullContext
from pml_fewshot.embedders.koch import KochConv
from pml_fewshot.embedders.resnet12 import ResNet12
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk
from pml_fewshot.episodes import Episode, EpisodeIndex, EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation.adaptation_curve import adaptation_curve
from pml_fewshot.evaluation.benchmark import benchmark
from pml_fewshot.evaluation.comparison import Comparison, compare
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult, evaluate_grid
from pml_fewshot.evaluation.gallery import Gallery
from pml_fewshot.evaluation.heads import (
    k_nearest_neighbours,
    mean_similarity,
    nearest_neighbour,
    nearest_prototype,
    soft_nearest_neighbour,
)
from pml_fewshot.evaluation.linear_heads import cosine_classifier, logistic_regression, ridge_regression
from pml_fewshot.evaluation.result_row import ResultRow
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.evaluation.retrieval_result import RetrievalResult
from pml_fewshot.evaluation.table import ResultTable
from pml_fewshot.experiment import run
from pml_fewshot.experiment_config import ExperimentConfig
from pml_fewshot.losses.dense import DenseNTXentLoss, DenseTripletMarginLoss
from pml_fewshot.losses.matching import MatchingLoss
from pml_fewshot.losses.pair_verification import PairVerificationLoss
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.recording import Recorder
from pml_fewshot.sweeps import sweep, sweep_main
from pml_fewshot.trainers.divergence import TrainingDiverged
from pml_fewshot.trainers.fit import History, fit
from pml_fewshot.trainers.interruption import TrainingInterrupted
from pml_fewshot.trainers.maml import MAMLTrainer
from pml_fewshot.trainers.matching import MatchingTrainer
from pml_fewshot.trainers.metric import MetricTrainer
from pml_fewshot.trainers.protonet import ProtoNetTrainer
from pml_fewshot.trainers.siamese import SiameseTrainer

__version__ = "0.5.0"

__all__ = [
    "Batch",
    "BatchSpec",
    "BatchStream",
    "CannotWriteError",
    "Comparison",
    "Conv4",
    "DenseNTXentLoss",
    "DenseTripletMarginLoss",
    "Embedder",
    "EmbeddingBank",
    "Episode",
    "EpisodeIndex",
    "EpisodeSampler",
    "EpisodeSpec",
    "EpisodeStream",
    "EpisodicEvaluator",
    "EpisodicResult",
    "ExperimentConfig",
    "FewShotDataset",
    "FullContext",
    "Gallery",
    "History",
    "KochConv",
    "MAMLTrainer",
    "MatchingLoss",
    "MatchingTrainer",
    "MetricTrainer",
    "PairVerificationLoss",
    "ProtoNetTrainer",
    "PrototypicalLoss",
    "RandomAffine",
    "Recorder",
    "ResNet12",
    "ResultRow",
    "ResultTable",
    "RetrievalResult",
    "RetrievalTester",
    "SiameseTrainer",
    "Splits",
    "TorchvisionTrunk",
    "TrainingDiverged",
    "TrainingInterrupted",
    "WeightedL1Similarity",
    "adaptation_curve",
    "benchmark",
    "compare",
    "cosine_classifier",
    "evaluate_grid",
    "export_embedder",
    "fit",
    "join",
    "k_nearest_neighbours",
    "load_bank",
    "load_checkpoint",
    "load_embedder",
    "load_glyphs",
    "load_image_folder",
    "load_mini_imagenet",
    "load_omniglot",
    "logistic_regression",
    "main",
    "mean_similarity",
    "nearest_neighbour",
    "nearest_prototype",
    "ridge_regression",
    "run",
    "save_bank",
    "save_checkpoint",
    "soft_nearest_neighbour",
    "sweep",
    "sweep_main",
]
