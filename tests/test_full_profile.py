"""The ``full`` profile as far as a machine without GPU and without the published files can prove it.

Every value is handed to what it is for; the image towers run at their true size on torch's meta device, which computes
shapes without memory; disk is compared with the table of costs. ``gpu_walk.py --size true`` runs them with numbers.
"""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch

from helpers import profiles
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalygpt import evaluation, language, pairs
from helpers.clip import features
from helpers.colab import preflight
from helpers.weights import catalog


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, clean_environment: None) -> profiles.Profile:
    monkeypatch.setenv("ART_PROFILE", "full")
    return profiles.active()


def test_every_value_is_accepted_by_what_it_is_for(full: profiles.Profile) -> None:
    clip, gpt, prompts = full.clip, full.anomalygpt, full.anomalyclip
    assert (clip.model, clip.pretrained) in open_clip.list_pretrained() and timm.is_model_pretrained(clip.cnn_model)
    patch = open_clip.get_model_config(clip.model)["vision_cfg"]["patch_size"]
    assert clip.image_size % patch == 0 and prompts.image_size % patch == 0
    training = pairs.HeadTraining(**pairs.PRESETS[gpt.preset], **gpt.training)
    assert training.batch_size % training.micro_batch == 0 and training.n_epochs == 15
    evaluation.EvaluationSettings(alpha=full.alpha, seed=full.seed, **gpt.testing)
    assert {gpt.precision, gpt.training_precision} <= set(language.BYTES_PER_WEIGHT)
    assert prompts.row in ("published", "own", "best")
    needed = {f"anomalyclip/{prompts.prompts}", f"anomalygpt/{gpt.checkpoint}", "vicuna", "imagebind", "pandagpt"}
    route = catalog.route(full.weights_dir, full.weights)
    assert needed <= {file.component for file in route.files}
    peak, disk = route.disk_bytes / 1e9, {name: stage.disk_gb for name, stage in preflight.STAGES.items()}
    assert peak <= disk["01_prepare_weights"] < peak + 1.5, "the table of costs says what the route needs"
    total = peak + sum(disk.values()) - disk["01_prepare_weights"]
    assert total <= preflight.NEEDS["full"][2] < total + 3, "and the check of the disk what all notebooks need"


def test_image_towers_have_the_true_shapes(full: profiles.Profile) -> None:
    """Patches of notebook 03 at 336 px, and both streams of AnomalyCLIP at 518 px."""
    config = {k: v for k, v in open_clip.get_model_config(full.clip.model).items() if not k.startswith("_")}
    with torch.device("meta"), torch.no_grad():
        clip = open_clip.CLIP(**config).eval()
        images = torch.empty(full.clip.batch_size, 3, *[full.clip.image_size] * 2)
        layers = list(features.patch_layers(24))
        found = clip.visual.forward_intermediates(images, indices=layers, output_fmt="NLC")
        images = torch.empty(full.anomalyclip.batch_size, 3, *[full.anomalyclip.image_size] * 2)
        feature, tokens = anomalyclip.dual_path(clip.visual, images, first_dual_block=5, taps=(6, 12, 18, 24))
    assert sum(p.numel() for p in clip.parameters()) == 427_944_193
    assert found["image_features"].shape == (32, 768)
    assert [tuple(layer.shape) for layer in found["image_intermediates"]] == [(32, 24 * 24, 1024)] * 2
    assert feature.shape == (8, 768) and [tuple(t.shape) for t in tokens] == [(8, 1370, 768)] * 4
