"""Networks with real weights in the right places, and their features: the towers' own outputs, the same numbers from
the cache, never old ones, and honest seconds."""

import copy
import dataclasses
import time

import numpy as np
import pytest
import skimage.data
import timm
import tiny_clip
import torch
from tiny_clip import draw
from tiny_dataset import write_pictures

from helpers.clip import backbones, features
from helpers.clip.features import STEPS, Features, Models
from helpers.data import images
from helpers.records import Sample


@pytest.fixture(scope="module")
def clip() -> backbones.Network:
    return backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")


@pytest.fixture
def models(clip, tmp_path) -> Models:
    """With a small CNN; the trained one is tested below and is too slow for every test here."""
    return Models(clip, tiny_clip.cnn(), tmp_path / "cache", 3)


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    return write_pictures(tmp_path, "art", {"train": ["good"] * 7}, shape=(24, 30))


@pytest.fixture
def pictures(samples) -> list[np.ndarray]:
    return [images.load_image(sample.image_path) for sample in samples]


def test_features_are_the_towers_own_outputs(models, samples, pictures):
    found, clip, cnn = features.embed_samples(samples, models), models.clip, models.cnn
    batch = torch.stack([clip.preprocess(picture) for picture in pictures])
    with torch.inference_mode():
        np.testing.assert_allclose(found.clip, clip.model.encode_image(batch).numpy(), atol=1e-5)
        x, layers = clip.model.visual._embeds(batch), {}  # naive patch tokens: run the tower block by block
        for i, block in enumerate(clip.model.visual.transformer.resblocks):
            layers[i] = x = block(x)
        wanted = [layers[i][:, 1:] for i in features.patch_layers(len(layers))]
        wanted = torch.cat([layer / layer.norm(dim=-1, keepdim=True) for layer in wanted], dim=-1)
        pooled = cnn.model(torch.stack([cnn.preprocess(picture) for picture in pictures])).numpy()
    np.testing.assert_allclose(found.patches.reshape(wanted.shape), wanted.numpy(), atol=2e-3)
    np.testing.assert_allclose(found.cnn, pooled, atol=1e-5)
    assert (found.patches.dtype, found.clip.dtype, found.cnn.dtype) == (np.float16, np.float32, np.float32)
    assert found.patches.shape == (7, 14, 14, 2 * 256)
    assert found.seconds.shape == (7, 3) and (found.seconds > 0).all()
    assert [features.patch_layers(n) for n in (24, 6, 1, 2)] == [(11, 17), (2, 3), (0,), (0,)]


def test_the_time_to_read_is_counted_for_the_picture_that_took_it(models, pictures):
    def read(row: int) -> np.ndarray:
        time.sleep(0.3 if row == 1 else 0.0)
        return pictures[row]

    seconds = features.embed(["a", "b", "c"], read, models).seconds[:, STEPS.index("read")]
    assert seconds[1] >= 0.3 and seconds[[0, 2]].max() < 0.1


def test_an_interrupted_pass_goes_on_and_the_cache_gives_the_same_in_any_order_without_files(models, samples):
    content = samples[4].image_path.read_bytes()
    samples[4].image_path.write_bytes(b"")
    with pytest.raises(images.ImageError):
        features.embed_samples(samples, models)
    samples[4].image_path.write_bytes(content)
    for sample in samples[:3]:  # the first batch is done and needs its files no more
        sample.image_path.unlink()
    first = features.embed_samples(samples, models)
    for sample in samples[3:]:
        sample.image_path.unlink()
    order = [4, 0, 6, 6, 1]
    again = features.embed_samples([samples[i] for i in order], models)
    for name in ("clip", "cnn", "patches", "seconds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name)[order])
    assert again.ids == tuple(samples[i].sha256 for i in order)


def test_rows_stay_together():
    joined = Features.join([draw(2, 0, "a", 1), draw(3, 5, "b", 2)])
    assert joined.take([4, 0]).ids == ("b2", "a0")
    np.testing.assert_array_equal(joined.take(np.array([0, 0, 1, 0, 1], bool)).clip, joined.clip[[2, 4]])
    samples = [Sample("x", "art", False, sha256=key) for key in ("b1", "a1")]
    np.testing.assert_array_equal(joined.of(samples).cnn, joined.cnn[[3, 1]])
    with pytest.raises(KeyError, match="0000"):
        joined.of([Sample("x", "art", False, sha256="0000")])


@pytest.mark.parametrize("part", ["clip", "cnn"])
def test_features_that_are_not_finite_and_pictures_without_names_are_refused(models, pictures, part):
    broken = copy.deepcopy(getattr(models, part))
    with torch.no_grad():
        (broken.model.visual.proj if part == "clip" else broken.model[0].weight).mul_(float("nan"))
    models = dataclasses.replace(models, **{part: broken})
    not_finite = f"2 pictures are not finite, first a. Check the weights of {broken.model_id}"
    for ids, words in ((["a", "b"], not_finite), ([], "sha256 for each"), (["a", ""], "sha256 for each")):
        with pytest.raises(ValueError, match=words):
            features.embed(ids, lambda row: pictures[row], models)


@pytest.mark.parametrize("part", ["clip", "cnn"])
def test_another_network_never_gets_old_features(models, samples, part):
    first = features.embed_samples(samples, models)
    other = dataclasses.replace(getattr(models, part), preprocess=lambda image: torch.zeros(3, 224, 224), model_id="x")
    found = features.embed_samples(samples, dataclasses.replace(models, **{part: other}))
    assert np.abs(getattr(found, part) - getattr(first, part)).max() > 1e-3


def test_efficientnet_lite0_names_what_it_sees_with_tensorflow_padding_and_pools_without_its_classifier():
    """ImageNet-1k: 281-285 are cats; 504 coffee mug, 967 espresso, 968 cup; 872 tripod. The plain timm variant takes
    the same tensors, but is less sure of the cat: its padding is another."""
    ours, cnn = backbones._efficientnet_lite0().eval(), backbones.load_cnn("efficientnet_lite0", device="cpu")
    plain = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    plain.load_state_dict(ours.state_dict())
    camera = np.stack([skimage.data.camera()] * 3, axis=-1)
    pictures = torch.stack([cnn.preprocess(one) for one in (skimage.data.chelsea(), skimage.data.coffee(), camera)])
    with torch.inference_mode():
        cat, coffee, photographer = ours(pictures).softmax(-1)
        less_sure = plain(pictures[:1]).softmax(-1)[0, 285]
        assert cnn.model(pictures[:1]).shape == (1, 1280)
    assert cat[281:286].sum() > 0.9 and coffee[[504, 967, 968]].sum() > 0.9 and photographer[872] > 0.9
    assert cat[285] > less_sure + 0.1
    # Black is -1 in the range that the weights were trained with.
    np.testing.assert_allclose(cnn.preprocess(np.zeros((30, 50, 3), np.uint8)).numpy(), -1.0)


@pytest.mark.parametrize(
    ("name", "pretrained", "side", "way_out"),
    [("ViT-L-14-336", "openai", 336, "ViT-L-14-336-quickgelu"), ("art-vit-mini", None, 230, "224 or 240")],
)
def test_the_quick_gelu_trap_and_sides_that_do_not_fit_are_refused(name, pretrained, side, way_out):
    with pytest.raises(ValueError, match=way_out):
        backbones.load_clip(name, pretrained=pretrained, image_size=side, device="cpu")


def test_mini_tower_is_the_same_each_time_and_squashes_what_it_sees(clip):
    """CLIP's own centre crop would cut off head and feet of a portrait."""
    before, first = torch.get_rng_state(), clip.model.state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in backbones.art_vit_mini().state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    tall = np.zeros((400, 100, 3), np.uint8)
    tall[:40] = 255
    tensor = backbones.square_preprocess(224, mean=(0.0,) * 3, std=(1.0,) * 3)(tall)
    assert tensor.shape == (3, 224, 224) and tensor[:, :18].min() > 0.9 and tensor[:, 28:].max() < 0.1
