"""TransformersTrunk: pooled outputs and preprocessing of tiny models of transformers, from objects and folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pml_fewshot  # noqa: F401  before transformers, which imports torchvision
from pml_fewshot.checks import UsageError
from pml_fewshot.embedders.transformers_trunk import TransformersTrunk
from tests.embedders.formulas import noise
from tests.embedders.test_preprocessing import difference, noise_image

hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
IMAGES = noise(2, 3, 32, 32, dtype=torch.float32)


def squared() -> Any:
    return hf.ViTImageProcessor(size={"height": 32, "width": 32})


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return hf.ViTModel(hf.ViTConfig(**TINY, intermediate_size=32), **options).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(**TINY, intermediate_size=32, projection_dim=12)
    text = hf.CLIPTextConfig(**TEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    return hf.CLIPModel(config).eval()


def test_the_pooled_output_is_taken_else_the_mean_over_tokens():
    pixels = (IMAGES - 0.5) / 0.5
    with torch.no_grad():
        trunk, model = TransformersTrunk(vit(), squared()), vit()
        torch.testing.assert_close(trunk(IMAGES), model(pixel_values=pixels).pooler_output)
        trunk = TransformersTrunk(vit(add_pooling_layer=False), squared())
        expected = vit(add_pooling_layer=False)(pixel_values=pixels).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(trunk(IMAGES), expected)
        torch.testing.assert_close(trunk(IMAGES[:, :1]), trunk(IMAGES[:, :1].expand(-1, 3, -1, -1)))
    assert trunk.width == 16


def test_maps_are_flattened_and_convolutional_statistics_start_in_eval_mode():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = hf.ResNetModel(config)
    model(pixel_values=IMAGES)
    trunk = TransformersTrunk(model, squared())
    assert not trunk.training
    assert trunk(IMAGES).shape == (2, 16)
    dino = hf.Dinov2Model(hf.Dinov2Config(**TINY)).eval()
    processor = hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    trunk = TransformersTrunk(dino, processor).eval()
    pixels = trunk.normalized(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(trunk(IMAGES), dino(pixel_values=pixels).pooler_output)


def test_clip_gives_the_image_in_the_space_shared_with_texts():
    model, processor = clip(), hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    whole = TransformersTrunk(model, processor).eval()
    vision = hf.CLIPVisionModelWithProjection(model.config.vision_config).eval()
    vision.load_state_dict({name: value for name, value in model.state_dict().items() if name in vision.state_dict()})
    alone = TransformersTrunk(vision, processor).eval()
    with torch.no_grad():
        expected = vision(pixel_values=whole.normalized(IMAGES)).image_embeds
        assert expected.shape == (2, 12)
        torch.testing.assert_close(whole(IMAGES), expected)
        torch.testing.assert_close(alone(IMAGES), expected)


@pytest.mark.parametrize(
    "processor",
    [
        lambda: hf.ViTImageProcessor(size={"height": 30, "width": 34}),
        lambda: hf.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 384}),
    ],
)
def test_preprocessing_and_normalization_are_those_of_the_image_processor(processor: Any):
    trunk, image = TransformersTrunk(vit(), processor()), noise_image(400, 500)
    expected = processor()(image, return_tensors="pt")["pixel_values"]
    pixels = ((expected * trunk.std + trunk.mean) * 255).round()[0]
    assert difference(trunk.preprocessing(image), pixels.numpy()) <= 1


def test_a_saved_folder_is_read_with_its_processor(tmp_path: Path):
    vit().save_pretrained(tmp_path)
    squared().save_pretrained(tmp_path)
    trunk = TransformersTrunk(tmp_path)
    assert not trunk.training
    torch.testing.assert_close(trunk(IMAGES), TransformersTrunk(vit(), squared()).eval()(IMAGES))


def test_what_cannot_be_loaded_or_has_no_processor_is_one_clear_error(tmp_path: Path):
    with pytest.raises(UsageError, match=r"a vision model at .*nowhere, got an error .*give its path"):
        TransformersTrunk(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="expected the image processor of ViTModel, got none; give processor="):
        TransformersTrunk(vit())
    with pytest.raises(UsageError, match=r"scales pixels by 1/255, got do_rescale=True by 1\.0"):
        TransformersTrunk(vit(), hf.ViTImageProcessor(rescale_factor=1.0))
    classifier = hf.ViTForImageClassification(hf.ViTConfig(**TINY, intermediate_size=32))
    with pytest.raises(UsageError, match=r"a pooled output or a last hidden state, got .*give its .base_model"):
        TransformersTrunk(classifier, squared())(IMAGES)
