"""Features: same numbers from the cache, never old ones, the towers' own outputs, and honest seconds."""

from __future__ import annotations

import copy
import dataclasses
import time

import numpy as np
import pytest
import torch
from tiny_clip import draw

from helpers import files
from helpers.clip import backbones, features
from helpers.clip.features import STEPS, Features, Models
from helpers.data import images
from helpers.records import Sample


@pytest.fixture(scope="module")
def clip() -> backbones.Network:
    return backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")


@pytest.fixture(scope="module")
def cnn() -> backbones.Network:
    """A real small CNN; the trained one is tested in test_backbones and is too slow for every test here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pool = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), *pool)
    return backbones.Network(net.eval().requires_grad_(False), backbones.square_preprocess(32), "small/seed 3/32")


@pytest.fixture
def models(clip, cnn, tmp_path) -> Models:
    return Models(clip, cnn, tmp_path / "cache", 3)


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(7)]


@pytest.fixture
def samples(pictures, tmp_path) -> list[Sample]:
    paths = [tmp_path / f"picture {i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        images.save_png(path, picture)
    return [Sample(path, "art", False, split="train", sha256=files.sha256_file(path)) for path in paths]


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


def test_the_time_to_read_is_counted_for_the_picture_that_took_it(models, pictures):
    def read(row: int) -> np.ndarray:
        time.sleep(0.3 if row == 1 else 0.0)
        return pictures[row]

    seconds = features.embed(["a", "b", "c"], read, models).seconds
    assert seconds[1, STEPS.index("read")] >= 0.3
    assert seconds[[0, 2], STEPS.index("read")].max() < 0.1


def test_cache_round_trip_is_identity_in_any_order_and_needs_no_files(models, samples):
    first = features.embed_samples(samples, models)
    for sample in samples:
        sample.image_path.unlink()
    order = [4, 0, 6, 6, 1]
    again = features.embed_samples([samples[i] for i in order], models)
    for name in ("clip", "cnn", "patches", "seconds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name)[order])
    assert again.ids == tuple(samples[i].sha256 for i in order)


def test_rows_stay_together():
    joined = Features.join([draw(2, 0, "a", 1), draw(3, 5, "b", 2)])
    assert joined.take([4, 0]).ids == ("b2", "a0")
    mask = np.array([0, 0, 1, 0, 1], bool)
    np.testing.assert_array_equal(joined.take(mask).clip, joined.clip[[2, 4]])
    samples = [Sample("x", "art", False, sha256=key) for key in ("b1", "a1")]
    np.testing.assert_array_equal(joined.of(samples).cnn, joined.cnn[[3, 1]])
    with pytest.raises(KeyError, match="0000"):
        joined.of([Sample("x", "art", False, sha256="0000")])


def test_patch_layers_and_pictures_without_names(models):
    assert [features.patch_layers(n) for n in (24, 6, 1, 2)] == [(11, 17), (2, 3), (0,), (0,)]
    for ids in ([], ["a", ""]):
        with pytest.raises(ValueError, match="sha256 for each"):
            features.embed(ids, lambda row: None, models)


@pytest.mark.parametrize("part", ["clip", "cnn"])
def test_features_that_are_not_finite_are_refused_by_name(models, pictures, part):
    broken = copy.deepcopy(getattr(models, part))
    with torch.no_grad():
        (broken.model.visual.proj if part == "clip" else broken.model[0].weight).mul_(float("nan"))
    models = dataclasses.replace(models, **{"cnn": None, part: broken})
    with pytest.raises(ValueError, match=f"2 pictures are not finite, first a. Check the weights of {broken.model_id}"):
        features.embed(["a", "b"], lambda row: pictures[row], models)


@pytest.mark.parametrize("part", ["clip", "cnn"])
def test_another_network_never_gets_old_features(models, samples, tmp_path, part):
    first = features.embed_samples(samples, models)
    other = dataclasses.replace(getattr(models, part), preprocess=lambda image: torch.zeros(3, 224, 224), model_id="x")
    found = features.embed_samples(samples, dataclasses.replace(models, **{part: other}))
    assert np.abs(getattr(found, part) - getattr(first, part)).max() > 1e-3


def test_an_interrupted_pass_goes_on_where_it_stopped(models, samples):
    content = samples[4].image_path.read_bytes()
    samples[4].image_path.write_bytes(b"")
    with pytest.raises(images.ImageError):
        features.embed_samples(samples, models)
    samples[4].image_path.write_bytes(content)
    for sample in samples[:3]:  # the first batch is done and needs its files no more
        sample.image_path.unlink()
    assert len(features.embed_samples(samples, models)) == 7
