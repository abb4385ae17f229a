"""Exports classifiers and embedders for programs without this library: ONNX, and torch.export's .pt2."""

import copy
import dataclasses
import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from pml_fewshot.checks import MissingFileError, UsageError, UsageTypeError, check_choice, import_extra
from pml_fewshot.classify.classifier import FewShotClassifier
from pml_fewshot.classify.trunks import name_of
from pml_fewshot.embedders.embedder import check_rows
from pml_fewshot.embedders.image_embedder import ImageEmbedder
from pml_fewshot.embedders.modes import evaluating
from pml_fewshot.evaluation.heads import name_of_head
from pml_fewshot.io.atomic import atomic_write
from pml_fewshot.io.checkpoint import check_exportable
from pml_fewshot.io.tensors import checksum_of

Images = Literal["uint8", "float"]

ENTRY = "pml_fewshot"  # name of the JSON in the file
OLDEST = 2, 7  # torch whose exporter handles these networks; 2.5's fails, 2.6's logs doubts about its results
OPSET = 18  # torch's exporter writes it without a conversion; a file's parts must have the same
TOLERANCE = 1e-4
BATCHES = (1, 5)  # sizes at which the file is compared with torch
EXPORTABLE = "nearest_prototype, cosine_classifier, ridge_regression or logistic_regression"
EMBEDDINGS, ANSWERS = "embeddings", ("probabilities", "similarities")


def export_onnx(
    what: FewShotClassifier | ImageEmbedder | nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    images: Images = "uint8",
) -> None:
    """Writes a classifier or an embedder as one ONNX file, which runs with any batch size.

    The input is `images` (B, C, H, W); the outputs are `embeddings` (B, D) and, for a classifier, `probabilities`
    (B, W), as in `predict_proba`, and `similarities` (B, W), the largest of which is that of `similarity`. Scaling of
    bytes and the trunk's normalization are included; decoding, resizing and cropping are not. The file's metadata has
    an entry "pml_fewshot", a JSON of `classes`, `threshold` (below which an image is unknown; null without `reject`),
    `temperature`, `calibrated`, `head`, `image_size`, `channels`, `images`, `preprocessing` (null if none of this size
    is known), `embedder` and `version`.

    The network computes in float32. Before it is written, the file is run in onnxruntime on noise at two batch sizes
    and compared with torch. The classifier, its modes and its device are not changed.

    Args:
        what: a classifier with an embedder, whose head is nearest_prototype, cosine_classifier, ridge_regression or
            logistic_regression; or an Embedder, a trunk or an ImageEmbedder.
        path: of the file to write; an existing file is replaced at the end.
        image_size: side, or (H, W), in pixels; when None, the size of the preprocessing.
        channels: of the images; when None, those of the preprocessing, or 3 without one.
        images: "uint8" for pixels from 0 to 255, or "float" for floats from 0 to 1.

    Raises:
        UsageError: no image_size and no preprocessing, another head, outputs that differ from torch's by more than 1e-4
            (for embeddings: relative to the largest value), or torch older than 2.7.
        MissingPackageError: onnx, onnxruntime or onnxscript is not installed.
        CannotWriteError: the system refused to write; the file at `path` is unchanged.
    """
    onnx = _onnx()
    source = _Source.of(what, image_size, channels, images)
    model = _onnx_of(source.network, source.example(2), ["images"], [EMBEDDINGS])
    _write_onnx(onnx, path, source, model)


def update_onnx(classifier: FewShotClassifier, path: str | Path) -> None:
    """Updates an exported file to what the classifier knows now: more or fewer classes, more examples, another head.

    The network in the file is kept, so this takes about two seconds, however large the network. The file is compared
    with torch as in `export_onnx`. An embedder's file becomes a classifier's.

    Args:
        classifier: has the same embedder as the file.
        path: of a file that `export_onnx` wrote.

    Raises:
        MissingFileError: there is no such file.
        UsageError: a file of another embedder (both are named) or of another tool, and as in `export_onnx`; the file
            is unchanged.
    """
    onnx = _onnx()
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"expected an ONNX file at {path}, got no such file; write it with export_onnx")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
        about = json.loads({each.key: each.value for each in model.metadata_props}[ENTRY])
    except Exception as error:  # protobuf's readers raise whatever they happen to meet
        got = "one of another tool" if isinstance(error, KeyError) else f"a broken one ({error})"
        raise UsageError(f"expected a file that export_onnx wrote at {path}, got {got}; export it again") from error
    source = _Source.of(classifier, tuple(about["image_size"]), about["channels"], about["images"])
    if about["embedder"] != source.about["embedder"]:
        got = f"that of a classifier with {source.about['embedder']}"
        raise UsageError(f"expected the embedder of {path}, {about['embedder']}, got {got}; export it to a new file")
    trunk = onnx.utils.Extractor(model).extract_model(["images"], [EMBEDDINGS])
    _write_onnx(onnx, path, source, trunk)


def export_program(
    what: FewShotClassifier | ImageEmbedder | nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    images: Images = "uint8",
) -> None:
    """Writes the same as `export_onnx` with torch.export, for programs that have only torch.

    `torch.export.load(path).module()(images)` returns (probabilities, similarities, embeddings), or the embeddings for
    an embedder. The JSON is in the extra file "pml_fewshot.json" (`torch.export.load(path, extra_files=...)`). Load
    only files that you trust: torch.export.load is not meant for others.

    Raises:
        UsageError: as in `export_onnx`.
        CannotWriteError: the system refused to write; the file at `path` is unchanged.
    """
    source = _Source.of(what, image_size, channels, images)
    whole = source.network if source.answers is None else _Whole(source.network, source.answers)
    file = io.BytesIO()
    with _quiet():
        torch.export.save(_program(whole, source.example(2)), file, extra_files={f"{ENTRY}.json": source.json()})
        loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    source.check(lambda batch: _tuple(loaded(batch)), "torch.export")
    with atomic_write(path) as temporary:
        temporary.write_bytes(file.getbuffer())


class _Network(nn.Module):
    """Embeddings (B, D) of images (B, C, H, W), uint8 or floats in [0, 1]."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, images: Tensor) -> Tensor:
        return check_rows(self.embedder(images if images.is_floating_point() else images.float() / 255), self.embedder)


class _Answers(nn.Module):
    """Probabilities and similarities (B, W) of embeddings (B, D), from what a classifier knows now."""

    temperature: Tensor

    def __init__(self, classifier: FewShotClassifier) -> None:
        super().__init__()
        model = classifier.model_
        scores, similarity = model.scores, model.similarities
        if not (isinstance(scores, nn.Module) and isinstance(similarity, nn.Module)):
            do = "choose one of them, or export the embedder"
            raise UsageError(f"expected {EXPORTABLE} as head, got {name_of_head(classifier.head)}; {do}")
        self.scores = copy.deepcopy(scores).float()
        self.similarity = copy.deepcopy(similarity).float()
        self.register_buffer("temperature", torch.tensor(model.temperature, dtype=torch.float32))
        self.about = {
            "classes": model.taught.classes.tolist(),
            "head": name_of_head(classifier.head),
            "temperature": model.temperature,
            "calibrated": model.calibrated,
            "threshold": model.threshold,
        }

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        query = embeddings[None]
        return (self.scores(query)[0] / self.temperature).softmax(dim=1), self.similarity(query)[0]


class _Whole(nn.Module):
    """Probabilities, similarities and embeddings of images."""

    def __init__(self, network: _Network, answers: _Answers) -> None:
        super().__init__()
        self.network, self.answers = network, answers

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        embeddings = self.network(images)
        return *self.answers(embeddings), embeddings


@dataclasses.dataclass(frozen=True)
class _Source:
    """The exported modules, copied to the CPU in float32, and their description in the file."""

    network: _Network
    answers: _Answers | None
    about: dict[str, Any]

    @staticmethod
    def of(what: Any, image_size: int | tuple[int, int] | None, channels: int | None, images: str) -> "_Source":
        check_choice("images", images, ("uint8", "float"))
        embedder, answers = what, None
        if isinstance(what, FewShotClassifier):
            check_is_fitted(what)
            embedder, answers = what.embedder, _Answers(what)
        preprocessing = getattr(embedder, "preprocessing", None)
        if isinstance(embedder, ImageEmbedder):
            embedder = embedder.embedder
            preprocessing = preprocessing or getattr(embedder, "preprocessing", None)
        if not isinstance(embedder, nn.Module):
            wanted = "a classifier with an embedder, or an embedder, that is a torch module"
            do = "give the classifier embedder=, or wrap the function as a module"
            raise UsageTypeError(f"expected {wanted}, got {embedder!r}; {do}")
        own_size = None if preprocessing is None else tuple(preprocessing.size)
        size = own_size if image_size is None else image_size
        if size is None:
            do = "give image_size= and channels= of the images that it was trained on"
            raise UsageError(f"expected a size of images, got {type(embedder).__name__} without preprocessing; {do}")
        height, width = (size, size) if isinstance(size, int) else size
        while "_orig_mod" in embedder._modules:  # of torch.compile, which would compile for each example
            embedder = embedder.get_submodule("_orig_mod")
        check_exportable(embedder)
        network = _Network(copy.deepcopy(embedder)).float().cpu().requires_grad_(False)
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        about = {
            "version": importlib.import_module("pml_fewshot").__version__,
            "embedder": f"{name_of(embedder)} of weights {checksum_of(weights)}",
            "images": images,
            "image_size": [height, width],
            "channels": channels or (3 if preprocessing is None else preprocessing.channels),
            "preprocessing": dataclasses.asdict(preprocessing)
            if preprocessing and own_size == (height, width)
            else None,
        }
        return _Source(network, answers, about | ({} if answers is None else answers.about))

    def json(self) -> str:
        return json.dumps(self.about, ensure_ascii=False)

    def example(self, batch: int) -> Tensor:
        """Noise (B, C, H, W)."""
        shape = batch, self.about["channels"], *self.about["image_size"]
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return pixels if self.about["images"] == "uint8" else pixels / 255

    def check(self, run: Callable[[Tensor], Sequence[Any]], where: str) -> None:
        """Raises a UsageError if the outputs of `run` differ from torch's."""
        for batch in BATCHES:
            images = self.example(batch)
            with evaluating(self.network, *([] if self.answers is None else [self.answers])):
                embeddings = self.network(images)
                wanted = {} if self.answers is None else dict(zip(ANSWERS, self.answers(embeddings), strict=True))
            wanted[EMBEDDINGS] = embeddings
            for (name, expected), given in zip(wanted.items(), run(images), strict=True):
                unit = expected.abs().max().clamp(min=torch.finfo().tiny) if name == EMBEDDINGS else 1
                difference = (torch.as_tensor(given) - expected).abs().max() / unit
                if not difference <= TOLERANCE:  # (raises for NaN too)
                    got = f"a difference of {difference:.1e} at {batch} images"
                    do = "nothing was written, as the exporter changed the network, or rounding alone moves it so far"
                    raise UsageError(f"expected {name} of {where} within {TOLERANCE} of torch's, got {got}; {do}")


def _write_onnx(onnx: Any, path: str | Path, source: _Source, model: Any) -> None:
    """Appends what a classifier knows to the network, compares the whole with torch, and writes it."""
    names = [EMBEDDINGS]
    if source.answers is not None:
        with evaluating(source.network):
            embeddings = source.network(source.example(2))
        answers = _onnx_of(source.answers, embeddings, [EMBEDDINGS], list(ANSWERS))
        answers = onnx.compose.add_prefix(answers, "head/", rename_inputs=False, rename_outputs=False)
        answers.ir_version = model.ir_version
        names = [*ANSWERS, EMBEDDINGS]
        model = onnx.compose.merge_models(model, answers, [(EMBEDDINGS, EMBEDDINGS)], outputs=names)
    graph = model.graph
    outputs = [next(each for each in graph.output if each.name == name) for name in names]
    del graph.output[:]
    graph.output.extend(outputs)
    for value in (*graph.input, *graph.output):  # otherwise named after the exporter's symbols, which differ by part
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(model, {ENTRY: source.json()})
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    onnxruntime = import_extra("onnx", "for ONNX files", "onnxruntime")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    source.check(lambda images: session.run(names, {"images": images.numpy()}), "onnxruntime")
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _onnx_of(module: nn.Module, example: Tensor, inputs: list[str], outputs: list[str]) -> Any:
    """A module with one input as ONNX, for any batch size."""
    program = _program(module, example)
    with _quiet(), _translated("operations that torch can write as ONNX", "export_program takes more"):
        exported = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, opset_version=OPSET, verbose=False
        )
    assert exported is not None
    return exported.model_proto


def _program(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim("batch")},)
    do = "leave out what depends on values or on the number of images"
    with evaluating(module):
        module(example)  # first, so that its own errors keep their traceback
        with _quiet(), _translated("a network and a head that torch.export can trace", do):
            return torch.export.export(module, (example,), dynamic_shapes=batch, strict=False)


def _onnx() -> Any:
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        do = "pip install -U torch, or use export_program"
        raise UsageError(f"expected torch {OLDEST[0]}.{OLDEST[1]} or newer for ONNX, got {torch.__version__}; {do}")
    return import_extra("onnx", "for ONNX files", "onnx", "onnxruntime", "onnxscript")


@contextmanager
def _translated(wanted: str, do: str) -> Iterator[None]:
    """Turns an exporter's error about a module that runs, which may be of any class, into a UsageError."""
    try:
        yield
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        got = str(reason).strip().partition("\n")[0] or type(reason).__name__
        raise UsageError(f"expected {wanted}, got an error ({got}); {do}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warnings of torch's exporters about their internals, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
