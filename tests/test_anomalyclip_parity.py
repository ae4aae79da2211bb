"""AnomalyCLIP equals the reference implementation on its random towers, number by number.

``tests/golden/anomalyclip_seed0.safetensors`` was written by zqhang/AnomalyCLIP at 45ed4dd on a CPU in float32; the
fixture holds inputs, weights, intermediate and final values. Another folder of fixtures: ``PARITY_FIXTURES``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.anomalyclip import detector, model, training
from tests.conftest import GOLDEN

TEXT, TOKENS, MAPS, SCORE, LOSS, PARAMETER = 1e-4, 1e-4, 1e-4, 1e-5, 1e-4, 1e-6


@dataclass(frozen=True)
class Reference:
    """A fixture and our model with its weights."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    clip: SimpleNamespace
    learner: model.PromptLearner

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def first_dual_block(self) -> int:
        return self.config["vision"]["layers"] - (self.config["dpam_layer"] - 1)

    def detector(self, **settings: Any) -> detector.Detector:
        return detector.build_detector(self.clip, self.learner, **settings)


def fixture_files() -> list[Path]:
    folder = Path(os.environ.get("PARITY_FIXTURES") or GOLDEN)
    files = sorted(folder.glob("anomalyclip_seed*.safetensors"))
    if not files:
        raise FileNotFoundError(f"No anomalyclip_seed*.safetensors in {folder}.")
    return files


@pytest.fixture(scope="module", params=fixture_files(), ids=lambda path: path.stem)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    with safe_open(request.param, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    clip = reference_clip(tensors, config)
    path = tmp_path_factory.mktemp("prompts") / "model.safetensors"
    save_file({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("ckpt.")}, path)
    return Reference(tensors, config, clip, model.load_prompts(path, clip))


def reference_clip(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> SimpleNamespace:
    """open_clip's CLIP class with the fixture's weights, loaded strictly."""
    import open_clip

    vision, text = config["vision"], config["text"]
    clip = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        quick_gelu=config["quick_gelu"],
        vision_cfg={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["width"],
            "layers": vision["layers"],
            "head_width": vision["width"] // vision["heads"],
        },
        text_cfg={key: text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")},
    )
    state = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("clip.")}
    rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.row_ids")
    table = torch.zeros(text["vocab_size"], text["width"])
    table[ids] = rows
    state["token_embedding.weight"] = table
    clip.load_state_dict(state, strict=True)
    tokenizer = open_clip.get_tokenizer("ViT-L-14-336")
    return SimpleNamespace(
        model=clip.eval().requires_grad_(False), tokenizer=tokenizer, preprocess=torch.from_numpy, model_id="fixture/84"
    )


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.detach(), theirs, atol=tolerance, rtol=0)


def test_prompts_and_tokens(reference: Reference) -> None:
    prompts, ids = reference.learner()
    assert torch.equal(prompts, reference["out.prompts"])
    assert torch.equal(ids, reference["out.tokenized_prompts"])


def test_text_features(reference: Reference) -> None:
    raw = model.encode_text(reference.clip.model, reference.learner)
    assert_near(raw, reference["out.text_raw"], TEXT)
    assert_near(F.normalize(raw, dim=-1), reference["out.text_features"][0], TEXT)


def test_position_is_interpolated_from_the_stored_grid_every_time(reference: Reference) -> None:
    visual = reference.clip.model.visual
    side = reference.config["image_size"] // reference.config["vision"]["patch_size"]
    for _ in range(2):
        position = model.interpolated_position(visual, (side, side))
        assert torch.equal(position, reference["out.positional_embedding_84"])
        assert_near(_tokens(reference, "in.images_native", 24), reference["out.native.patch_tokens.24"], TOKENS)


@pytest.mark.parametrize("tap", [6, 12, 18, 24])
def test_patch_tokens_and_probabilities(reference: Reference, tap: int) -> None:
    tokens = _tokens(reference, "in.images", tap)
    assert_near(tokens, reference[f"out.patch_tokens.{tap}"], TOKENS)
    p_abnormal = model.abnormal_probability(tokens, reference["out.text_features"][0])
    assert_near(p_abnormal, reference[f"out.patch_probs.{tap}"][..., 1], TOKENS)


@pytest.mark.parametrize("tap", [5, 24])
def test_native_size_and_a_tap_before_the_dual_blocks(reference: Reference, tap: int) -> None:
    assert_near(_tokens(reference, "in.images_native", tap), reference[f"out.native.patch_tokens.{tap}"], TOKENS)


@pytest.mark.parametrize("size", ["", "native."])
def test_class_feature_without_ln_post(reference: Reference, size: str) -> None:
    images = reference["in.images_native" if size else "in.images"]
    feature, _ = model.dual_path(
        reference.clip.model.visual, images, first_dual_block=reference.first_dual_block, taps=[24]
    )
    assert_near(feature, reference[f"out.{size}image_features_raw"], TOKENS)
    if not size:
        assert_near(F.normalize(feature, dim=-1), reference["out.image_features"], TOKENS)


def test_default_dual_blocks_are_the_published_ones(reference: Reference) -> None:
    assert reference.detector().first_dual_block == reference.first_dual_block == 5
    assert reference.detector().taps == (24,)


def test_image_scores_are_per_image(reference: Reference) -> None:
    ours = reference.detector()
    scores, _ = ours.detect(reference["in.images"])
    np.testing.assert_allclose(scores, reference["out.image_score"].numpy(), atol=SCORE, rtol=0)
    backwards, _ = ours.detect(reference["in.images"].flip(0))
    np.testing.assert_allclose(backwards[::-1], scores, atol=SCORE, rtol=0)


@pytest.mark.parametrize(
    ("name", "taps", "sigma"),
    [
        ("map.6", (6,), 0),
        ("map.12", (12,), 0),
        ("map.18", (18,), 0),
        ("map.24", (24,), 0),
        ("map24_sigma4", (24,), 4),
        ("map_sum", (6, 12, 18, 24), 0),
        ("map_sum_sigma4", (6, 12, 18, 24), 4),
    ],
)
def test_maps(reference: Reference, name: str, taps: tuple[int, ...], sigma: float) -> None:
    _, maps = reference.detector(taps=taps, sigma=sigma).detect(reference["in.images"])
    np.testing.assert_allclose(maps, reference[f"out.{name}"].numpy(), atol=MAPS, rtol=0)


def test_losses_gradients_and_two_optimiser_steps(reference: Reference) -> None:
    learner = model.PromptLearner(reference.clip.model, reference.clip.tokenizer)
    learner.load_state_dict(reference.learner.state_dict())
    loss_of = training.prompts_loss(reference.clip)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, betas=(0.5, 0.999))
    batch = _batch(reference)
    losses = loss_of(learner, batch)
    for name in ("focal", "dice_abnormal", "dice_normal", "image"):
        assert_near(losses[name], reference[f"train.loss_{name}"], LOSS)
    assert_near(losses["loss"], reference["train.loss_total"], LOSS)
    losses["loss"].backward()
    gradients = {name: parameter.grad.clone() for name, parameter in learner.named_parameters()}
    for name, gradient in gradients.items():
        theirs = reference[f"train.grad.{name}"]
        assert_near(gradient, theirs, 1e-3 * theirs.abs().max().item())
    optimizer.step()
    _assert_parameters(learner, reference, gradients, "after_step1", PARAMETER)
    optimizer.zero_grad()
    second = loss_of(learner, batch)["loss"]
    assert_near(second, reference["train.loss_total_step2"], LOSS)
    second.backward()
    optimizer.step()
    _assert_parameters(learner, reference, gradients, "after_step2", 1e-5)


def _assert_parameters(
    learner: model.PromptLearner,
    reference: Reference,
    gradients: dict[str, torch.Tensor],
    moment: str,
    tolerance: float,
) -> None:
    """Compare where the gradient is not rounding noise, which Adam would blow up to a whole learning rate."""
    for name, parameter in learner.named_parameters():
        clear = gradients[name].abs() > 1e-4 * gradients[name].abs().max()
        assert clear.float().mean() > 0.5
        assert_near(parameter[clear], reference[f"train.{moment}.{name}"][clear], tolerance)


def _tokens(reference: Reference, images: str, tap: int) -> torch.Tensor:
    visual = reference.clip.model.visual
    return model.dual_path(visual, reference[images], first_dual_block=reference.first_dual_block, taps=[tap])[1][0]


def _batch(reference: Reference) -> dict[str, torch.Tensor]:
    feature, tokens = model.dual_path(
        reference.clip.model.visual, reference["in.images"], first_dual_block=reference.first_dual_block, taps=[24]
    )
    return {
        "feature": feature,
        "tokens": torch.stack([one[:, 1:] for one in tokens], dim=1),
        "mask": reference["in.masks"],
        "label": reference["in.labels"],
        "has_mask": torch.ones(len(feature), dtype=torch.bool),
    }
