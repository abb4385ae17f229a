"""prepare: builds and tests the data and parts of an experiment before hours of training."""

import copy
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pml_fewshot.checks import UsageError
from pml_fewshot.data.augmentation import as_augmentation, augmented
from pml_fewshot.data.dataset import FewShotDataset, Splits, as_dataset, concat
from pml_fewshot.distributed import local_rank
from pml_fewshot.embedders.bank import EmbeddingBank
from pml_fewshot.environment import keep_memory
from pml_fewshot.evaluation.episodic import EpisodicEvaluator, EpisodicResult
from pml_fewshot.evaluation.gallery import EXACT, Gallery
from pml_fewshot.evaluation.retrieval import RetrievalTester
from pml_fewshot.experiment.config import Device, ExperimentConfig
from pml_fewshot.experiment.evaluate import evaluate
from pml_fewshot.io.checkpoint import check_exportable
from pml_fewshot.parts.instantiate import instantiate
from pml_fewshot.sampling.batch_stream import BatchStream
from pml_fewshot.sampling.batches import BatchSpec
from pml_fewshot.sampling.episode_stream import EpisodeStream
from pml_fewshot.sampling.randomness import seeded
from pml_fewshot.trainers.base import FewShotTrainer
from pml_fewshot.training.freezing import check_parts
from pml_fewshot.training.state import History


@dataclass
class Prepared:
    """An experiment whose parts have been built and fit together."""

    config: ExperimentConfig
    device: torch.device
    loaded: Splits  # as the loader returned them
    splits: Splits  # as they are evaluated
    trainer: FewShotTrainer
    stream: EpisodeStream | BatchStream
    optimizer: Optimizer
    scheduler: Any
    validate: Callable[[], EpisodicResult] | None
    tester: RetrievalTester | None


def prepare(config: ExperimentConfig) -> Prepared:
    """Loads the data and builds all parts; whatever is wrong with them raises here, before hours of training."""
    config, device = own_parts(config), resolve_device(config.device)
    keep_memory(device)
    loaded = load_data(config)
    splits = for_evaluation(config, loaded)
    train, val = loaded.train, None if splits.test_is_val else splits.val
    if config.train_on_validation and loaded.val is not None:
        if splits.test_is_val:
            raise UsageError("expected test classes beside val to train on val too, got none; leave that out")
        train, val = concat([train, loaded.val]), None
    for spec in config.eval_specs:
        EpisodicEvaluator(spec).check(splits.test)
    evaluator = EpisodicEvaluator(config.eval_specs[0], config.val_episodes, config.seed)
    if val is not None:
        evaluator.check(val)

    torch.manual_seed(config.seed)  # initial weights, from torch's own generator, do not depend on a loader's draws
    trainer = made_trainer(config, len(train.class_names)).to(device)
    seen = train if config.eval_transform is None else train.transformed(config.eval_transform)
    trainer.check(Splits(seen, val, splits.test, shared_classes=True), (config.train_spec, *config.eval_specs))
    for part in trainer.exports().values():
        check_exportable(part)
    train, splits = _on_device_if_small(train, device), splits.map(partial(_on_device_if_small, device=device))
    val = val and splits.val
    stream = _stream(config, train, trainer)
    check_parts(trainer, config.frozen or {})
    optimizer, scheduler = make_optimizer(config, trainer)
    tester = instance(config.retrieval)
    validate = None if val is None else partial(evaluator.evaluate, trainer, val)
    prepared = Prepared(config, device, loaded, splits, trainer, stream, optimizer, scheduler, validate, tester)
    rehearse(prepared)
    return prepared


def made_trainer(config: ExperimentConfig, num_classes: int) -> FewShotTrainer:
    """A trainer for an experiment, copied in case its factory returns the same object each time."""
    trainer = instance(config.trainer, num_classes=num_classes)
    if not hasattr(trainer, "parameter_groups"):
        got = f"got {type(trainer).__name__}; give ProtoNetTrainer or the like, or derive from FewShotTrainer"
        raise UsageError(f"expected a trainer, {got}")
    return copied(trainer)


def copied(part: Any) -> Any:
    """A deep copy in which tensors that belong to a graph (the old weight_norm's, a loss's memory) are constants."""
    modules = part.modules() if isinstance(part, nn.Module) else ()
    inner = [tensor for module in modules for tensor in vars(module).values() if isinstance(tensor, Tensor)]
    return copy.deepcopy(part, {id(tensor): tensor.detach().clone() for tensor in inner if not tensor.is_leaf})


def make_optimizer(config: ExperimentConfig, trainer: FewShotTrainer) -> tuple[Optimizer, Any]:
    """A new optimizer for a trainer, with the learning rates of its parts, and its scheduler or None."""
    rates = {**(config.part_lr or {}), **({} if config.loss_lr is None else {"loss": config.loss_lr})}
    optimizer = config.optimizer(trainer.parameter_groups(rates))
    return optimizer, _scheduler(config, optimizer)


def own_parts(config: ExperimentConfig) -> ExperimentConfig:
    """The config with copies of its parts: a run does not change instances, which the caller or another run may use."""
    parts = ("trainer", "optimizer", "scheduler", "sampler", "augment", "eval_transform", "retrieval")
    copies = {}
    for name in parts:
        try:
            copies[name] = copied(getattr(config, name))
        except (TypeError, RuntimeError) as error:  # from a lock, a file, a generator; from a graph
            do = "give a partial of its class, which every run calls"
            raise UsageError(
                f"expected a {name} that each run can copy, got one that cannot be ({error}); {do}"
            ) from error
    return replace(config, **copies)


def load_data(config: ExperimentConfig) -> Splits:
    """Loads the data of an experiment from its data root."""
    root = config.data_root or Path(os.environ.get("PML_FEWSHOT_DATA", "data"))
    splits = config.data(**_needed(config.data, root=root))
    if not isinstance(splits, Splits):
        do = "give a loader of Splits, or divide one set by its split()"
        raise UsageError(f"expected Splits from data, got {type(splits).__name__}; {do}")
    return splits


def for_evaluation(config: ExperimentConfig, data: Any) -> Any:
    """Splits or a dataset as evaluated, with the experiment's `eval_transform` applied."""
    transform = config.eval_transform
    if transform is None:
        return data
    if isinstance(data, Splits):
        return data.map(lambda part: part.transformed(transform))
    return as_dataset(data).transformed(transform)


def resolve_device(wanted: Device) -> torch.device:
    """The device for "auto", "cpu" or "cuda" on this machine; each of several processes has its own GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("expected a CUDA device for device='cuda', got none; use device='cpu' or 'auto'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (own := local_rank()) >= torch.cuda.device_count():
        got = f"{torch.cuda.device_count()} for process {own} of this machine"
        raise UsageError(f"expected a GPU for each process, got {got}; lower --nproc-per-node or use --device cpu")
    return torch.device("cuda", own) if own else torch.device("cuda")


def instance(part: Any, **offers: Any) -> Any:
    """Calls a class, function or partial with the offered arguments that it needs; returns instances unchanged."""
    is_factory = isinstance(part, type | FunctionType | MethodType | partial)
    return instantiate(partial(part, **_needed(part, **offers))) if is_factory else part


def _needed(factory: Callable[..., Any], **offers: Any) -> dict[str, Any]:
    """The offered arguments that a function accepts but has no value for, such as the root for `load_omniglot`."""
    parameters = inspect.signature(factory).parameters
    return {name: offers[name] for name in offers.keys() & parameters if parameters[name].default is inspect._empty}


def _scheduler(config: ExperimentConfig, optimizer: Optimizer) -> Any:
    if config.scheduler is None:
        return None
    made = getattr(config.scheduler, "func", config.scheduler)
    set_by_user = getattr(config.scheduler, "keywords", {}).keys()
    given = {}
    for name, parameter in inspect.signature(config.scheduler).parameters.items():
        wanted = parameter.default is parameter.empty or isinstance(made, type)  # (a function's default is its own)
        if name in ("T_max", "total_steps", "total_iters") and name not in set_by_user and wanted:
            given[name] = config.steps
    if "epochs" in set_by_user:  # OneCycleLR accepts either
        given.pop("total_steps", None)
    before = {group["lr"] for group in optimizer.param_groups}
    scheduler = config.scheduler(optimizer, **given)
    if len(before) > len({group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}):
        got = f"got {type(scheduler).__name__}, which sets one for all; give it a list (max_lr=[..., ...])"
        raise UsageError(
            f"expected a scheduler that keeps loss_lr={config.loss_lr} and part_lr={config.part_lr}, {got}"
        )
    return scheduler


def rehearse(prepared: Prepared) -> None:
    """Runs everything that follows training, with an untrained trainer, so that errors there do not wait for training.

    It uses two episodes of each kind, eight queries, and mixtures of a few images' embeddings; the rest is unchanged.
    """
    trainer = copied(prepared.trainer)
    trainer.bank = partial(_mixed_bank, trainer.bank)
    config, tester = replace(prepared.config, num_episodes=2), copy.copy(prepared.tester)
    with seeded(config.seed):  # its draws must not affect the training
        if prepared.validate is not None and prepared.splits.val is not None:
            EpisodicEvaluator(config.eval_specs[0], 2, config.seed).evaluate(trainer, prepared.splits.val)
        if tester is not None:
            tester.num_queries = 8  # which search the whole set
            if tester.index not in EXACT:  # filling an "hnsw" index of 60,000 takes a minute
                bank = EmbeddingBank(trainer.bank(prepared.splits.test), prepared.splits.test.labels)
                Gallery.check(bank, tester.index, tester.parameters, tester.distance or trainer.distance)
                tester.index = "flat"
        evaluate(config, trainer, prepared.splits, tester, History())
        augment = as_augmentation(config.augment)
        augmented(prepared.stream.dataset.floats(slice(4)), augment, torch.Generator().manual_seed(0))


def _mixed_bank(bank: Callable[[FewShotDataset], Tensor], dataset: FewShotDataset) -> Tensor:
    """As many embeddings as a trainer's `bank` returns, as random means of a few; a bank of images is unchanged."""
    few = bank(dataset.first(8))
    if few.ndim > 2:
        return bank(dataset)
    shares = torch.rand(len(dataset), len(few), generator=torch.Generator().manual_seed(0)).to(few)
    return shares / shares.sum(dim=1, keepdim=True) @ few  # positive where embeddings are


def _on_device_if_small(dataset: FewShotDataset, device: torch.device) -> FewShotDataset:
    """Moves the dataset to the GPU if it takes less than a quarter of the free memory; else batches are moved."""
    if device.type != "cuda" or dataset.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return dataset
    return dataset.to(device)


def _stream(config: ExperimentConfig, train: FewShotDataset, trainer: FewShotTrainer) -> EpisodeStream | BatchStream:
    if isinstance(config.train_spec, BatchSpec):
        model = next(iter(trainer.exports().values()), None)  # for samplers that embed
        return BatchStream(train, config.train_spec, config.seed, config.augment, config.sampler, model)
    return EpisodeStream(train, config.train_spec, config.seed, config.augment, config.episodes_per_batch)
