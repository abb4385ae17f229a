# What `pml_fewshot` offers: read by type checkers and, for the lazy imports of __init__.py, at run time.

from .checks import UsageError as UsageError
from .classify.classifier import FewShotClassifier as FewShotClassifier
from .classify.export import export_onnx as export_onnx
from .classify.export import export_program as export_program
from .classify.export import update_onnx as update_onnx
from .classify.leave_one_out import leave_one_out as leave_one_out
from .data.augmentation import PerImage as PerImage
from .data.augmentation import RandomAffine as RandomAffine
from .data.augmentation import RandomWarp as RandomWarp
from .data.dataset import FewShotDataset as FewShotDataset
from .data.dataset import Splits as Splits
from .data.glyphs import load_glyphs as load_glyphs
from .data.image_folder import load_image_folder as load_image_folder
from .data.image_folder import load_images as load_images
from .data.image_table import load_image_table as load_image_table
from .data.mini_imagenet import load_mini_imagenet as load_mini_imagenet
from .data.omniglot import load_omniglot as load_omniglot
from .data.photo_augmentation import ColorJitter as ColorJitter
from .data.photo_augmentation import RandomHorizontalFlip as RandomHorizontalFlip
from .data.photo_augmentation import RandomResizedCrop as RandomResizedCrop
from .distances.earth_movers import EarthMoversDistance as EarthMoversDistance
from .distances.local_neighbors import LocalNeighborSimilarity as LocalNeighborSimilarity
from .distances.relation import RelationSimilarity as RelationSimilarity
from .distances.weighted_l1 import WeightedL1Similarity as WeightedL1Similarity
from .distributed import processes as processes
from .embedders.bank import EmbeddingBank as EmbeddingBank
from .embedders.bank import load_bank as load_bank
from .embedders.bank import save_bank as save_bank
from .embedders.conv4 import Conv4 as Conv4
from .embedders.dihedral_views import DihedralViews as DihedralViews
from .embedders.embedder import Embedder as Embedder
from .embedders.embedder import encode_to_file as encode_to_file
from .embedders.image_embedder import ImageEmbedder as ImageEmbedder
from .embedders.preprocessing import Preprocessing as Preprocessing
from .embedders.resnet12 import ResNet12 as ResNet12
from .embedders.set_to_set import SetToSet as SetToSet
from .embedders.timm_trunk import TimmTrunk as TimmTrunk
from .embedders.torchvision_trunk import TorchvisionTrunk as TorchvisionTrunk
from .embedders.transformers_trunk import TransformersTrunk as TransformersTrunk
from .evaluation.benchmark import benchmark as benchmark
from .evaluation.episodic import EpisodicEvaluator as EpisodicEvaluator
from .evaluation.episodic import adaptation_curve as adaptation_curve
from .evaluation.fixed_support import evaluate_fixed as evaluate_fixed
from .evaluation.gallery import Gallery as Gallery
from .evaluation.gallery_votes import gallery_votes as gallery_votes
from .evaluation.heads import nearest_neighbour as nearest_neighbour
from .evaluation.heads import nearest_prototype as nearest_prototype
from .evaluation.linear_heads import (
    cosine_classifier as cosine_classifier,
)
from .evaluation.linear_heads import (
    logistic_regression as logistic_regression,
)
from .evaluation.linear_heads import (
    ridge_regression as ridge_regression,
)
from .evaluation.reconstruction import feature_map_reconstruction as feature_map_reconstruction
from .evaluation.retrieval import RetrievalTester as RetrievalTester
from .evaluation.sharded_gallery import build_gallery as build_gallery
from .evaluation.statistics import compare as compare
from .evaluation.structured import structured_classifier as structured_classifier
from .evaluation.table import ResultTable as ResultTable
from .evaluation.transductive_heads import alpha_tim as alpha_tim
from .evaluation.transductive_heads import bd_cspn as bd_cspn
from .evaluation.transductive_heads import laplacian_shot as laplacian_shot
from .evaluation.transductive_heads import pt_map as pt_map
from .evaluation.tuned_heads import fine_tuning as fine_tuning
from .evaluation.tuned_heads import transductive_fine_tuning as transductive_fine_tuning
from .experiment.command_line import main as main
from .experiment.config import ExperimentConfig as ExperimentConfig
from .experiment.config import swap as swap
from .experiment.run import run as run
from .experiment.search import search as search
from .experiment.sweep import sweep as sweep
from .experiment.trained import load_trained as load_trained
from .io.checkpoint import export_embedder as export_embedder
from .io.checkpoint import load_embedder as load_embedder
from .losses.dense import DenseNTXentLoss as DenseNTXentLoss
from .losses.dense import DenseTripletMarginLoss as DenseTripletMarginLoss
from .losses.matching import MatchingLoss as MatchingLoss
from .losses.pair_verification import PairVerificationLoss as PairVerificationLoss
from .losses.prototypical import PrototypicalLoss as PrototypicalLoss
from .losses.reconstruction import ReconstructionLoss as ReconstructionLoss
from .report.image_plots import plot_embedding_map as plot_embedding_map
from .report.image_plots import plot_episode as plot_episode
from .report.image_plots import plot_neighbours as plot_neighbours
from .report.image_plots import plot_result as plot_result
from .report.result_plots import plot_accuracy_grid as plot_accuracy_grid
from .report.result_plots import plot_adaptation as plot_adaptation
from .report.result_plots import plot_bars as plot_bars
from .report.result_plots import plot_confusion as plot_confusion
from .report.result_plots import plot_curves as plot_curves
from .report.result_plots import plot_intervals as plot_intervals
from .report.result_plots import plot_reliability as plot_reliability
from .report.theme import theme as theme
from .sampling.batch_stream import BatchStream as BatchStream
from .sampling.batches import Batch as Batch
from .sampling.batches import BatchSpec as BatchSpec
from .sampling.episode_stream import EpisodeStream as EpisodeStream
from .sampling.episodes import Episode as Episode
from .sampling.episodes import EpisodeSampler as EpisodeSampler
from .sampling.episodes import EpisodeSpec as EpisodeSpec
from .sampling.variable_episodes import VariableEpisodeSpec as VariableEpisodeSpec
from .trainers.frn import FRNTrainer as FRNTrainer
from .trainers.maml.trainer import MAMLTrainer as MAMLTrainer
from .trainers.matching import MatchingTrainer as MatchingTrainer
from .trainers.metric import MetricTrainer as MetricTrainer
from .trainers.protonet import ProtoNetTrainer as ProtoNetTrainer
from .trainers.siamese import SiameseTrainer as SiameseTrainer
from .training.fit import fit as fit

__version__: str
