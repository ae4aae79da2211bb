"""Backbones: real ImageNet weights in the right places, and features that do not depend on global random state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.clip import backbones


# ImageNet-1k indices: 281-285 are cats; 504 coffee mug, 967 espresso, 968 cup; 872 tripod.
@pytest.mark.parametrize(
    ("picture", "classes"), [("chelsea", range(281, 286)), ("coffee", (504, 967, 968)), ("camera", (872,))]
)
def test_efficientnet_lite0_names_what_it_sees(picture, classes):
    import skimage.data

    image = getattr(skimage.data, picture)()
    image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
    preprocess = backbones.square_preprocess(224, mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.inference_mode():
        probabilities = backbones._efficientnet_lite0().eval()(preprocess(image)[None]).softmax(-1)[0]
    assert probabilities[list(classes)].sum() > 0.9


def test_lite0_is_the_timm_variant_with_tensorflow_padding():
    """The plain timm variant takes the same tensors, but is less sure of the cat: its padding is another."""
    import skimage.data
    import timm

    ours = backbones._efficientnet_lite0().eval()
    plain = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    plain.load_state_dict(ours.state_dict())
    cat = backbones.square_preprocess(224, mean=(0.5,) * 3, std=(0.5,) * 3)(skimage.data.chelsea())[None]
    with torch.inference_mode():
        sure, less = (float(model(cat).softmax(-1)[0, 285]) for model in (ours, plain))
    assert sure > less + 0.1


def test_cnn_pools_to_its_number_of_features():
    cnn = backbones.load_cnn("efficientnet_lite0", device="cpu")
    picture = np.zeros((30, 50, 3), np.uint8)
    with torch.inference_mode():
        pooled = cnn.model(cnn.preprocess(picture)[None])
    assert pooled.shape == (1, 1280)
    # Black is -1 in the range that the weights were trained with.
    np.testing.assert_allclose(cnn.preprocess(picture).numpy(), -1.0)


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
    first, second = (
        backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu") for _ in range(2)
    )
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


def test_preprocessing_squashes_and_keeps_the_top_of_a_tall_painting():
    """CLIP's own centre crop would cut off head and feet of a portrait."""
    tall = np.zeros((400, 100, 3), np.uint8)
    tall[:40] = 255
    tensor = backbones.square_preprocess(224, mean=(0.0,) * 3, std=(1.0,) * 3)(tall)
    assert tensor.shape == (3, 224, 224)
    assert tensor[:, :18].min() > 0.9
    assert tensor[:, 28:].max() < 0.1
