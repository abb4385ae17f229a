"""Few-shot and metric learning on pytorch-metric-learning: episodes, trainers, and evaluation that can be trusted."""

from pml_fewshot.torchvision_import import ensure_torchvision

ensure_torchvision()  # before anything that imports torchvision

# ruff: noqa: E402
from pml_fewshot.checkpoint import export_embedder, load_checkpoint, load_embedder, save_checkpoint
from pml_fewshot.command_line import main
from pml_fewshot.data.augmentation import RandomAffine
from pml_fewshot.data.episode_stream import EpisodeStream
from pml_fewshot.data.fewshot_dataset import FewShotDataset, Splits, join
from pml_fewshot.data.glyphs import load_glyphs
from pml_fewshot.data.image_folder import load_image_folder
from pml_fewshot.data.mini_imagenet import load_mini_imagenet
from pml_fewshot.data.omniglot import load_omniglot
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.embedders.conv4 import Conv4
from pml_fewshot.embedders.embedder import Embedder
from pml_fewshot.embedders.resnet12 import ResNet12
from pml_fewshot.embedders.torchvision_trunk import TorchvisionTrunk
from pml_fewshot.episodes import Episode, EpisodeIndex, EpisodeSampler, EpisodeSpec
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult, evaluate_grid
from pml_fewshot.evaluation.heads import nearest_neighbour, nearest_prototype
from pml_fewshot.evaluation.retrieval import RetrievalResult, RetrievalTester
from pml_fewshot.evaluation.table import ResultRow, ResultTable
from pml_fewshot.experiment import ExperimentConfig, run
from pml_fewshot.losses.prototypical import PrototypicalLoss
from pml_fewshot.recording import Recorder
from pml_fewshot.trainers.fit import History, TrainingDiverged, fit
from pml_fewshot.trainers.protonet import ProtoNetTrainer

__version__ = "0.1.0"

__all__ = [
    "Conv4",
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
    "History",
    "ProtoNetTrainer",
    "PrototypicalLoss",
    "RandomAffine",
    "Recorder",
    "ResNet12",
    "ResultRow",
    "ResultTable",
    "RetrievalResult",
    "RetrievalTester",
    "Splits",
    "TorchvisionTrunk",
    "TrainingDiverged",
    "evaluate_grid",
    "export_embedder",
    "fit",
    "join",
    "load_checkpoint",
    "load_embedder",
    "load_glyphs",
    "load_image_folder",
    "load_mini_imagenet",
    "load_omniglot",
    "main",
    "nearest_neighbour",
    "nearest_prototype",
    "run",
    "save_checkpoint",
]
