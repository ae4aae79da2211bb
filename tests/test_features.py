"""Features: same numbers from the cache, never old ones, and the towers' own outputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from helpers import files as storage
from helpers.clip import backbones, features
from helpers.clip.features import Features
from helpers.data import images
from helpers.records import Sample


@pytest.fixture(scope="module")
def clip() -> backbones.Clip:
    return backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")


@pytest.fixture(scope="module")
def cnn() -> backbones.Cnn:
    """A real small CNN; the trained one is tested in test_backbones and is too slow for every test here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
    net = net.eval().requires_grad_(False)
    return backbones.Cnn(net, backbones.square_preprocess(32), "small/seed 3/32", 8)


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(7)]


@pytest.fixture
def samples(pictures, tmp_path) -> list[Sample]:
    made = []
    for i, picture in enumerate(pictures):
        path = tmp_path / f"picture {i}.png"
        images.save_png(path, picture)
        made.append(Sample(path, "art", False, split="train", sha256=storage.sha256_file(path)))
    return made


def test_features_are_the_towers_own_outputs(clip, cnn, pictures):
    found = features.embed_images(pictures, clip=clip, cnn=cnn, batch_size=3, patches=True)
    batch = torch.stack([clip.preprocess(picture) for picture in pictures])
    with torch.inference_mode():
        np.testing.assert_allclose(found.clip, clip.model.encode_image(batch).numpy(), atol=1e-5)
        # Naive patch tokens: run the tower block by block.
        x = clip.model.visual._embeds(batch)
        layers = {}
        for i, block in enumerate(clip.model.visual.transformer.resblocks):
            layers[i] = x = block(x)
        wanted = [layers[i][:, 1:] for i in features.patch_layers(len(layers))]
        wanted = torch.cat([layer / layer.norm(dim=-1, keepdim=True) for layer in wanted], dim=-1)
        pooled = cnn.model(torch.stack([cnn.preprocess(picture) for picture in pictures])).numpy()
    np.testing.assert_allclose(found.patches.reshape(wanted.shape), wanted.numpy(), atol=2e-3)
    np.testing.assert_allclose(found.cnn, pooled, atol=1e-5)
    assert (found.patches.dtype, found.clip.dtype, found.cnn.dtype) == (np.float16, np.float32, np.float32)
    assert found.patches.shape == (7, 14, 14, 2 * 256)
    assert (found.seconds > 0).all()


def test_cache_round_trip_is_identity_in_any_order(clip, cnn, samples, tmp_path):
    options = {"clip": clip, "cnn": cnn, "cache_dir": tmp_path / "cache", "batch_size": 3}
    first = features.embed_samples(samples, **options)
    order = [4, 0, 6, 6, 1]
    again = features.embed_samples([samples[i] for i in order], **options)
    for name in ("clip", "cnn", "patches", "seconds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name)[order])
    assert again.ids == tuple(samples[i].sha256 for i in order)


def test_the_cache_is_read_and_not_only_written(clip, cnn, samples, tmp_path):
    options = {"clip": clip, "cnn": cnn, "cache_dir": tmp_path / "cache", "batch_size": 3}
    features.embed_samples(samples, **options)
    for sample in samples:
        sample.image_path.unlink()
    assert len(features.embed_samples(samples, **options)) == 7


def test_interrupted_pass_resumes_where_it_stopped(clip, cnn, samples, tmp_path):
    options = {"clip": clip, "cnn": cnn, "cache_dir": tmp_path / "cache", "batch_size": 3}
    whole = features.embed_samples(samples, clip=clip, cnn=cnn, cache_dir=tmp_path / "other", batch_size=3)
    content = samples[4].image_path.read_bytes()
    samples[4].image_path.write_bytes(b"")
    with pytest.raises(images.ImageError):
        features.embed_samples(samples, **options)
    samples[4].image_path.write_bytes(content)
    for sample in samples[:3]:  # the first batch is done and needs its files no more
        sample.image_path.unlink()
    found = features.embed_samples(samples, **options)
    np.testing.assert_allclose(found.clip, whole.clip, atol=1e-5)


@pytest.mark.parametrize("part", ["picture", "clip", "cnn", "patches"])
def test_another_key_never_gets_old_features(clip, cnn, pictures, tmp_path, part):
    features.embed_images(pictures, clip=clip, cnn=cnn, cache_dir=tmp_path)
    options = {"clip": clip, "cnn": cnn, "cache_dir": tmp_path}
    if part == "picture":
        pictures = [picture ^ 1 for picture in pictures]
    elif part == "clip":
        other = backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")
        with torch.no_grad():
            other.model.visual.proj.mul_(-1)
        options["clip"] = dataclasses.replace(other, model_id="art-vit-mini/negative/224")
    elif part == "cnn":
        double = torch.nn.Sequential(cnn.model, _Double())
        options["cnn"] = dataclasses.replace(cnn, model=double, model_id="double")
    else:
        options["patches"] = True
    found = features.embed_images(pictures, **options)
    fresh = features.embed_images(pictures, **{**options, "cache_dir": None})
    np.testing.assert_allclose(found.clip, fresh.clip, atol=1e-5)
    np.testing.assert_allclose(found.cnn, fresh.cnn, atol=1e-5)
    assert (found.patches is None) == (part != "patches")


class _Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_damaged_cache_file_is_named_and_made_again(clip, cnn, pictures, tmp_path, capsys):
    first = features.embed_images(pictures, clip=clip, cnn=cnn, cache_dir=tmp_path)
    (shard,) = tmp_path.glob("*/*.npz")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    again = features.embed_images(pictures, clip=clip, cnn=cnn, cache_dir=tmp_path)
    np.testing.assert_allclose(again.clip, first.clip, atol=1e-6)
    assert "damaged" in capsys.readouterr().out


def test_pictures_may_stream(clip, cnn, pictures):
    held = features.embed_images(pictures, clip=clip, cnn=cnn, batch_size=2)
    streamed = features.embed_images((p for p in pictures), clip=clip, cnn=cnn, batch_size=2, n_pictures=7)
    np.testing.assert_array_equal(streamed.clip, held.clip)


def test_without_a_cnn_only_clip_looks(clip, cnn, pictures, tmp_path):
    whole = features.embed_images(pictures, clip=clip, cnn=cnn, cache_dir=tmp_path)
    found = features.embed_images(pictures, clip=clip, cnn=None, cache_dir=tmp_path)
    assert found.cnn.shape == (7, 0)
    np.testing.assert_allclose(found.clip, whole.clip, atol=1e-6)


def test_select_by_sample(clip, cnn, samples, tmp_path):
    found = features.embed_samples(samples, clip=clip, cnn=cnn, cache_dir=tmp_path / "c")
    np.testing.assert_array_equal(found.of([samples[5], samples[2]]).clip, found.clip[[5, 2]])
    assert len(found.of([])) == 0
    with pytest.raises(KeyError, match="1 pictures have no features"):
        found.of([dataclasses.replace(samples[0], sha256="0" * 64)])


def test_join_and_take_keep_rows_together():
    def rows(n, shift):
        return Features(
            tuple(f"{shift + i}" for i in range(n)),
            np.arange(n, dtype=np.float32)[:, None] + shift,
            np.zeros((n, 2), np.float32),
            None,
            np.ones(n, np.float32),
        )

    joined = Features.join([rows(2, 0), rows(3, 10)])
    assert joined.take([4, 0]).ids == ("12", "0")
    np.testing.assert_array_equal(joined.take(np.array([0, 0, 1, 0, 1], bool)).clip[:, 0], [10, 12])


@pytest.mark.parametrize(("layers", "wanted"), [(24, (11, 17)), (6, (2, 3)), (1, (0, 0)), (2, (0, 0))])
def test_patch_layers(layers, wanted):
    assert features.patch_layers(layers) == wanted


def test_refusals(clip, cnn, samples, pictures, tmp_path):
    nameless = dataclasses.replace(samples[0], sha256="")
    with pytest.raises(ValueError, match="no sha256"):
        features.embed_samples([nameless], clip=clip, cnn=cnn, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="selection is empty"):
        features.embed_samples([], clip=clip, cnn=cnn, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="uint8 RGB"):
        features.embed_images([pictures[0].astype(np.float32)], clip=clip, cnn=cnn)
    with pytest.raises(ValueError, match="at least 1"):
        features.embed_images(pictures, clip=clip, cnn=cnn, batch_size=0)
    with pytest.raises(ValueError, match="Load it with image_size=224"):
        small = backbones.load_clip("art-vit-mini", pretrained=None, image_size=64, device="cpu")
        features.embed_images(pictures, clip=small, cnn=cnn)
    with pytest.raises(ValueError, match="cnn has 1 rows"):
        Features(("a", "b"), np.zeros((2, 1)), np.zeros((1, 1)), None, np.zeros(2))


def test_features_that_are_not_finite_are_refused(clip, pictures):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(float("nan")))

        def forward(self, x):
            return x.flatten(1)[:, :4] * self.weight

    broken = backbones.Cnn(Broken(), backbones.square_preprocess(32), "broken", 4)
    with pytest.raises(ValueError, match="cnn features are not finite"):
        features.embed_images(pictures, clip=clip, cnn=broken)
