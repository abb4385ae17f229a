"""The service of docs/how-to/serve.md, as the page shows it: good and bad uploads, many at a time."""

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pml_fewshot import FewShotClassifier, TorchvisionTrunk

for package in ("starlette", "python_multipart", "httpx"):
    pytest.importorskip(package)

PAGE = Path(__file__).parents[2] / "docs/how-to/serve.md"


def photo(red: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 60, (90, 100, 3), dtype=np.uint8)
    return Image.fromarray(pixels + np.array([red, 195 - red, 0], np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page's block defines."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "\napp = " in code]
    torch.manual_seed(0)
    classifier = FewShotClassifier(TorchvisionTrunk("mobilenet_v3_small"), reject=-1.0)
    classifier.fit([photo(red, seed) for red in (0, 195) for seed in (1, 2)], ["green", "green", "red", "red"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("serve"))
        classifier.save("animals")
        namespace: dict[str, Any] = {}
        exec(block, namespace)  # noqa: S102
        yield namespace


@pytest.fixture
def client(service: dict[str, Any]) -> Any:
    from starlette.testclient import TestClient

    return TestClient(service["app"])


def test_many_requests_at_a_time_get_their_own_answers(service: dict[str, Any], client: Any) -> None:
    photos = [photo(195 * (seed % 2), seed) for seed in range(3, 19)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: client.post("/", files={"photo": png(image)}), photos))
    assert {answer.status_code for answer in answers} == {200}
    expected = service["classifier"].answer(photos)
    for answer, wanted in zip(answers, expected, strict=True):
        got = answer.json()
        assert got.keys() == wanted._asdict().keys()
        assert (got["label"], got["nearest_label"]) == (wanted.label, wanted.nearest_label)
        assert got["probability"] == pytest.approx(wanted.probability, abs=1e-4)
        assert got["similarity"] == pytest.approx(wanted.similarity, abs=1e-4)
    assert {answer.json()["label"] for answer in answers} == {"green", "red"}


GOOD = png(photo(0))
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no image": ({"files": {"photo": b"no photo"}}, 415, "expected a readable image"),
    "cut off": ({"files": {"photo": GOOD[: len(GOOD) // 2]}}, 415, "expected a readable image"),
    "empty": ({"files": {"photo": b""}}, 400, "expected a photo, got none"),
    "no file": ({"files": {}, "data": {"photo": "text"}}, 415, "curl -F photo=@FILE"),
    "a text in the form": ({"files": {"photo": (None, "text")}}, 400, "expected a photo, got none"),
    "two": ({"files": [("photo", GOOD), ("photo", GOOD)]}, 400, "Too many files"),
    "too large": ({"files": {"photo": bytes(10 * 2**20)}}, 413, "expected at most 10485760 bytes, got 1048"),
    "of no known length": (
        {"content": iter([b"a"]), "headers": {"content-type": "multipart/form-data; boundary=a"}},
        *(413, "got no length"),
    ),
    "no form": ({"content": GOOD}, 415, "expected a form with a file"),
    "a broken form": ({"content": b"a", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
}


@pytest.mark.parametrize(("request_", "status", "text"), BAD.values(), ids=BAD)
def test_bad_uploads_are_told_what_to_do(client: Any, request_: dict[str, Any], status: int, text: str) -> None:
    answer = client.post("/", **request_)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text


def test_a_bug_is_no_bad_upload(service: dict[str, Any], client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FewShotClassifier, "answer", lambda self, photos: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client.post("/", files={"photo": GOOD})
