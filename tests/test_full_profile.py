"""The ``full`` profile as far as a machine without GPU and without the published files can prove it.

Every value is handed to what it is for; CLIP runs once at its true size with random numbers in place of weights, and
AnomalyCLIP's two streams on torch's meta device, which computes shapes without memory; memory and disk are compared
with an L4. What stays unproven is in the README: arithmetic on a GPU, quantisation, downloads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from helpers import profiles
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalyclip import training as anomalyclip_training
from helpers.anomalygpt import evaluation, language, pairs
from helpers.clip import backbones, features
from helpers.colab import preflight
from helpers.weights import catalog, mini, steps


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> profiles.Profile:
    monkeypatch.setenv("ART_PROFILE", "full")
    monkeypatch.setenv("ART_HOME", str(tmp_path))
    monkeypatch.delenv("ART_DATA", raising=False)
    return profiles.active()


def test_every_value_is_accepted_by_what_it_is_for(full: profiles.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, gpt, prompts = full.clip, full.anomalygpt, full.anomalyclip
    assert (clip.model, clip.pretrained) in open_clip.list_pretrained() and timm.is_model_pretrained(clip.cnn_model)
    patch = open_clip.get_model_config(clip.model)["vision_cfg"]["patch_size"]
    assert clip.image_size % patch == 0 and prompts.image_size % patch == 0
    training = pairs.HeadTraining(**pairs.PRESETS[gpt.preset], **gpt.training)
    assert training.batch_size % training.micro_batch == 0 and training.n_epochs == 15
    evaluation.EvaluationSettings(alpha=full.alpha, seed=full.seed, **gpt.testing)
    assert {gpt.precision, gpt.training_precision} <= set(language.BYTES_PER_WEIGHT)
    assert prompts.row in ("published", "own", "best")
    route = catalog.route(full.weights_dir, full.weights)
    needed = {f"anomalyclip/{prompts.prompts}", f"anomalygpt/{gpt.checkpoint}", "vicuna", "imagebind", "pandagpt"}
    assert needed <= {file.component for file in route.files}
    monkeypatch.setenv("ART_PROFILE", "mini")
    other = profiles.active()
    for field in dataclasses.fields(profiles.Profile):
        ours, theirs = getattr(full, field.name), getattr(other, field.name)
        assert ours is None or theirs is None or type(ours) is type(theirs), field.name


def test_disk_of_the_route_is_what_card_and_preflight_say(full: profiles.Profile) -> None:
    peak = catalog.route(full.weights_dir, full.weights).disk_bytes / 1e9
    assert peak <= preflight.STAGES["01_prepare_weights"].disk_gb < peak + 1.5
    others = sum(stage.disk_gb for name, stage in preflight.STAGES.items() if not name.startswith("01"))
    assert peak + others <= preflight.NEEDS["full"][2] < peak + others + 3


def test_anomalyclip_needs_nobodys_consent(full: profiles.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route without LLaMA: notebook 01 prepares the prompts of 04 before it stops for a licence."""
    route, fetched = catalog.route(full.weights_dir, full.weights), []

    def fetch(url: str, target: Path, *, sha256: str | None) -> None:
        assert sha256 and "AnomalyCLIP/45ed4dd3" in url
        fetched.append(target)
        mini.write("anomalyclip/trained_on_visa", target)

    monkeypatch.setattr(steps.fetch, "fetch", fetch)
    for _ in range(2):  # what is ready is not fetched again
        steps.obtain_free(route)
        assert len(fetched) == 2
    with pytest.raises(PermissionError, match="ACCEPT_LICENCES"):
        steps.obtain(route, accept_licences=False)


@pytest.fixture(scope="module")
def clip_large() -> backbones.Network:
    """CLIP ViT-L/14@336 as the profile loads it, but for the download: 428 million random numbers, 1.7 GB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return backbones.load_clip("ViT-L-14-336-quickgelu", pretrained=None, image_size=336, device="cpu")


def test_clip_large_embeds_a_picture(clip_large: backbones.Network, tmp_path: Path) -> None:
    assert sum(p.numel() for p in clip_large.model.parameters()) == 427_944_193
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    found = features.embed(["one"], lambda row: picture, features.Models(clip_large, None, tmp_path))
    assert (found.clip.shape, found.clip.dtype) == ((1, 768), np.float32)
    assert (found.patches.shape, found.patches.dtype) == ((1, 24, 24, 2048), np.float16)
    norms = np.linalg.norm(found.patches.astype(np.float32).reshape(-1, 2, 1024), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_prompts_of_clip_large_train(clip_large: backbones.Network, full: profiles.Profile) -> None:
    """A step of notebook 04's training on features of the true shapes: 37 x 37 patches at 518 px."""
    learner = anomalyclip.PromptLearner(clip_large.model, clip_large.tokenizer)
    side = full.anomalyclip.image_size
    tokens, mask = F.normalize(torch.randn(2, 1, (side // 14) ** 2, 768), dim=-1), torch.zeros(2, side, side)
    mask[1, 100:200, 100:200] = 1
    batch = {"feature": torch.randn(2, 768), "tokens": tokens, "mask": mask}
    batch |= {"label": torch.tensor([0, 1]), "has_mask": torch.tensor([True, True])}
    anomalyclip_training.prompts_loss(clip_large)(learner, batch)["loss"].backward()
    assert sum(p.numel() for p in learner.parameters()) == 2 * 12 * 768 + 8 * 4 * 768
    # The last deep prompt vectors replace contexts of later blocks; all of them see a gradient.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    assert not any(p.grad is not None for p in clip_large.model.parameters())


def test_both_streams_of_anomalyclip_at_518_px(full: profiles.Profile) -> None:
    config = {k: v for k, v in open_clip.get_model_config(full.clip.model).items() if not k.startswith("_")}
    with torch.device("meta"), torch.no_grad():
        visual = open_clip.CLIP(**config).visual.eval()
        images = torch.empty(full.anomalyclip.batch_size, 3, *[full.anomalyclip.image_size] * 2)
        feature, tokens = anomalyclip.dual_path(visual, images, first_dual_block=5, taps=(6, 12, 18, 24))
    assert feature.shape == (8, 768) and [tuple(t.shape) for t in tokens] == [(8, 1370, 768)] * 4
