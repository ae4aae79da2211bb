"""The ``full`` profile as far as a machine without GPU and without the published files can prove it.

Every value of the profile is handed to what it is for; the towers run once at their true size with random numbers in
place of weights, and a training step of AnomalyGPT at its true widths; the deep language model and AnomalyCLIP's two
streams run on torch's meta device, which computes shapes and types without memory; memory and disk are planned and
compared with an L4. What stays unproven is in the README: arithmetic on a GPU, quantisation, downloads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import profiles
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalyclip import training as anomalyclip_training
from helpers.anomalygpt import evaluation as anomalygpt_testing
from helpers.anomalygpt import language, pairs
from helpers.clip import backbones, features
from helpers.colab import preflight
from helpers.weights import catalog, mini, steps


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> profiles.Profile:
    monkeypatch.setenv("ART_PROFILE", "full")
    monkeypatch.setenv("ART_HOME", str(tmp_path))
    monkeypatch.delenv("ART_DATA", raising=False)
    return profiles.active()


# --- every value is accepted by what it is for ----------------------------------------------------------------------


def test_the_profiles_differ_in_values_and_never_in_kind(
    full: profiles.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ART_PROFILE", "mini")
    mini = profiles.active()
    for field in dataclasses.fields(profiles.Profile):
        ours, theirs = getattr(full, field.name), getattr(mini, field.name)
        assert ours is None or theirs is None or type(ours) is type(theirs), field.name


def test_models_of_the_profile_exist_with_trained_weights(full: profiles.Profile) -> None:
    import open_clip
    import timm

    assert (full.clip.model, full.clip.pretrained) in open_clip.list_pretrained()
    assert timm.is_model_pretrained(full.clip.cnn_model)
    patch = open_clip.get_model_config(full.clip.model)["vision_cfg"]["patch_size"]
    assert full.clip.image_size % patch == 0 and full.anomalyclip.image_size % patch == 0


def test_settings_of_the_profile_are_accepted(full: profiles.Profile) -> None:
    training = pairs.from_preset(full.anomalygpt.preset, **full.anomalygpt.training)
    assert training.batch_size % training.micro_batch == 0 and training.n_epochs == 15
    anomalygpt_testing.EvaluationSettings(alpha=full.alpha, seed=full.seed, **full.anomalygpt.testing)
    assert {full.anomalygpt.precision, full.anomalygpt.training_precision} <= set(language.BYTES_PER_WEIGHT)
    assert full.anomalyclip.row in ("published", "own", "best")


def test_notebook_01_prepares_what_the_other_notebooks_load(full: profiles.Profile) -> None:
    made = {file.component for file in catalog.route(full.weights_dir, full.weights).files}
    assert {"vicuna", "imagebind", "pandagpt"} <= made
    assert f"anomalyclip/{full.anomalyclip.prompts}" in made
    assert f"anomalygpt/{full.anomalygpt.checkpoint}" in made


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


# --- memory, disk, cost ---------------------------------------------------------------------------------------------


def test_disk_of_the_route_is_what_card_and_preflight_say(full: profiles.Profile) -> None:
    peak = catalog.route(full.weights_dir, full.weights).disk_bytes / 1e9
    assert peak <= preflight.STAGES["01_prepare_weights"].disk_gb < peak + 1.5
    others = sum(stage.disk_gb for name, stage in preflight.STAGES.items() if not name.startswith("01"))
    assert peak + others <= preflight.NEEDS["full"][2] < peak + others + 3


# --- the towers at their true size, random numbers as weights -------------------------------------------------------


@pytest.fixture(scope="module")
def clip_large() -> backbones.Network:
    """CLIP ViT-L/14@336 as the profile loads it, but for the download: 428 million random numbers, 1.7 GB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return backbones.load_clip("ViT-L-14-336-quickgelu", pretrained=None, image_size=336, device="cpu")


def test_clip_large_embeds_a_picture(clip_large: backbones.Network, full: profiles.Profile, tmp_path: Path) -> None:
    assert clip_large.model_id == f"{full.clip.model}/random/{full.clip.image_size}"
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
    loss_of = anomalyclip_training.prompts_loss(clip_large)
    side, n_patches = full.anomalyclip.image_size, (full.anomalyclip.image_size // 14) ** 2
    assert n_patches == 1369
    batch = {
        "feature": torch.randn(2, 768),
        "tokens": F.normalize(torch.randn(2, 1, n_patches, 768), dim=-1),
        "mask": torch.zeros(2, side, side),
        "label": torch.tensor([0, 1]),
        "has_mask": torch.tensor([True, True]),
    }
    batch["mask"][1, 100:200, 100:200] = 1
    loss_of(learner, batch)["loss"].backward()
    assert sum(p.numel() for p in learner.parameters()) == 2 * 12 * 768 + 8 * 4 * 768
    # The last deep prompt vectors replace contexts of later blocks; all of them see a gradient.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    assert not any(p.grad is not None for p in clip_large.model.parameters())


def test_both_streams_of_anomalyclip_at_518_px(full: profiles.Profile) -> None:
    import open_clip

    with torch.device("meta"):
        visual = open_clip.CLIP(**_config_of(full.clip.model)).visual.eval()
        images = torch.empty(full.anomalyclip.batch_size, 3, *[full.anomalyclip.image_size] * 2)
    with torch.no_grad():
        feature, tokens = anomalyclip.dual_path(visual, images, first_dual_block=5, taps=(6, 12, 18, 24))
    assert feature.shape == (8, 768) and [tuple(t.shape) for t in tokens] == [(8, 1370, 768)] * 4


def _config_of(name: str) -> dict:
    import open_clip

    return {key: value for key, value in open_clip.get_model_config(name).items() if not key.startswith("_")}
