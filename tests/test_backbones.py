"""Backbones: real ImageNet weights in the right places, and features that do not depend on global random state."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import timm
import torch

from helpers.clip import backbones


def test_efficientnet_lite0_names_what_it_sees_with_tensorflow_padding():
    """ImageNet-1k: 281-285 are cats; 504 coffee mug, 967 espresso, 968 cup; 872 tripod. The plain timm variant takes
    the same tensors, but is less sure of the cat: its padding is another."""
    ours = backbones._efficientnet_lite0().eval()
    preprocess = backbones.square_preprocess(224, mean=(0.5,) * 3, std=(0.5,) * 3)
    plain = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    plain.load_state_dict(ours.state_dict())
    camera = np.stack([skimage.data.camera()] * 3, axis=-1)
    pictures = torch.stack([preprocess(one) for one in (skimage.data.chelsea(), skimage.data.coffee(), camera)])
    with torch.inference_mode():
        cat, coffee, photographer = ours(pictures).softmax(-1)
        less_sure = plain(pictures[:1]).softmax(-1)[0, 285]
    assert cat[281:286].sum() > 0.9 and coffee[[504, 967, 968]].sum() > 0.9 and photographer[872] > 0.9
    assert cat[285] > less_sure + 0.1


def test_cnn_pools_to_its_number_of_features():
    cnn = backbones.load_cnn("efficientnet_lite0", device="cpu")
    picture = np.zeros((30, 50, 3), np.uint8)
    with torch.inference_mode():
        pooled = cnn.model(cnn.preprocess(picture)[None])
    assert pooled.shape == (1, 1280)
    # Black is -1 in the range that the weights were trained with.
    np.testing.assert_allclose(cnn.preprocess(picture).numpy(), -1.0)


@pytest.mark.parametrize(
    ("name", "pretrained", "side", "way_out"),
    [("ViT-L-14-336", "openai", 336, "ViT-L-14-336-quickgelu"), ("art-vit-mini", None, 230, "224 or 240")],
)
def test_the_quick_gelu_trap_and_sides_that_do_not_fit_are_refused(name, pretrained, side, way_out):
    with pytest.raises(ValueError, match=way_out):
        backbones.load_clip(name, pretrained=pretrained, image_size=side, device="cpu")


def test_mini_tower_is_the_same_each_time_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    given = {"pretrained": None, "image_size": 224, "device": "cpu"}
    first, second = (backbones.load_clip("art-vit-mini", **given).model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_preprocessing_squashes_and_keeps_the_top_of_a_tall_painting():
    """CLIP's own centre crop would cut off head and feet of a portrait."""
    tall = np.zeros((400, 100, 3), np.uint8)
    tall[:40] = 255
    tensor = backbones.square_preprocess(224, mean=(0.0,) * 3, std=(1.0,) * 3)(tall)
    assert tensor.shape == (3, 224, 224)
    assert tensor[:, :18].min() > 0.9
    assert tensor[:, 28:].max() < 0.1
