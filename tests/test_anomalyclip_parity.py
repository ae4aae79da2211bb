"""AnomalyCLIP equals the reference implementation on its random towers, number by number.

``tests/golden/anomalyclip_seed0.safetensors`` was written by zqhang/AnomalyCLIP at 45ed4dd on a CPU in float32; the
fixture holds inputs, weights, intermediate and final values. Another folder of fixtures: ``PARITY_FIXTURES``.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.anomalyclip import detector, model, training
from tests.conftest import FIXTURES

FILES = sorted(FIXTURES.glob("anomalyclip_seed*.safetensors"))
assert FILES, f"no anomalyclip_seed*.safetensors in {FIXTURES}"


class Reference:
    """A fixture and our model with its weights: open_clip's CLIP class, loaded strictly."""

    def __init__(self, path: Path, folder: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
            self.config = json.loads(file.metadata()["config"])
        vision, text = self.config["vision"], self.config["text"]
        vision_cfg = {key: vision[key] for key in ("image_size", "patch_size", "width", "layers")}
        vision_cfg["head_width"] = vision["width"] // vision["heads"]
        text_cfg = {key: text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")}
        clip = open_clip.CLIP(self.config["embed_dim"], vision_cfg, text_cfg, quick_gelu=self.config["quick_gelu"])
        state = {name[5:]: tensor for name, tensor in self.tensors.items() if name.startswith("clip.")}
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.row_ids")
        state["token_embedding.weight"] = torch.zeros(text["vocab_size"], text["width"])
        state["token_embedding.weight"][ids] = rows
        clip.load_state_dict(state, strict=True)
        tokenizer, prompts = open_clip.get_tokenizer("ViT-L-14-336"), folder / "model.safetensors"
        self.clip = SimpleNamespace(model=clip.eval().requires_grad_(False), tokenizer=tokenizer)
        self.clip.preprocess, self.clip.model_id = torch.from_numpy, "fixture/84"
        save_file({name[5:]: tensor for name, tensor in self.tensors.items() if name.startswith("ckpt.")}, prompts)
        self.learner = model.load_prompts(prompts, self.clip)
        self.first_dual_block = vision["layers"] - (self.config["dpam_layer"] - 1)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def look(self, images: str, tap: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Class feature, and tokens of a tap, of the fixture's pictures."""
        how = {"first_dual_block": self.first_dual_block, "taps": [tap]}
        feature, (tokens,) = model.dual_path(self.clip.model.visual, self[images], **how)
        return feature, tokens

    def detector(self, **settings: Any) -> detector.Detector:
        return detector.build_detector(self.clip, self.learner, **settings)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp("prompts"))


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours.detach(), theirs, atol=tolerance, rtol=0)


def test_prompts_tokens_and_text_features(reference: Reference) -> None:
    prompts, ids = reference.learner()
    assert torch.equal(prompts, reference["out.prompts"]) and torch.equal(ids, reference["out.tokenized_prompts"])
    raw = model.encode_text(reference.clip.model, reference.learner)
    assert_near(raw, reference["out.text_raw"])
    assert_near(F.normalize(raw, dim=-1), reference["out.text_features"][0])


def test_position_is_interpolated_from_the_stored_grid_every_time(reference: Reference) -> None:
    side = reference.config["image_size"] // reference.config["vision"]["patch_size"]
    for _ in range(2):
        position = model.interpolated_position(reference.clip.model.visual, (side, side))
        assert torch.equal(position, reference["out.positional_embedding_84"])
        assert_near(reference.look("in.images_native", 24)[1], reference["out.native.patch_tokens.24"])


def test_patch_tokens_and_probabilities(reference: Reference) -> None:
    for tap in (6, 12, 18, 24):
        _, tokens = reference.look("in.images", tap)
        assert_near(tokens, reference[f"out.patch_tokens.{tap}"])
        p_abnormal = model.abnormal_probability(tokens, reference["out.text_features"][0])
        assert_near(p_abnormal, reference[f"out.patch_probs.{tap}"][..., 1])
    for tap in (5, 24):  # at the native size, and before the dual blocks
        feature, tokens = reference.look("in.images_native", tap)
        assert_near(tokens, reference[f"out.native.patch_tokens.{tap}"])
        assert_near(feature, reference["out.native.image_features_raw"])


def test_class_feature_without_ln_post_and_scores_per_image(reference: Reference) -> None:
    feature, _ = reference.look("in.images", 24)
    assert_near(feature, reference["out.image_features_raw"])
    assert_near(F.normalize(feature, dim=-1), reference["out.image_features"])
    ours = reference.detector()
    assert ours.first_dual_block == reference.first_dual_block == 5 and ours.taps == (24,), "defaults as published"
    scores, _ = ours.detect(reference["in.images"])
    np.testing.assert_allclose(scores, reference["out.image_score"].numpy(), atol=1e-5, rtol=0)
    backwards, _ = ours.detect(reference["in.images"].flip(0))
    np.testing.assert_allclose(backwards[::-1], scores, atol=1e-5, rtol=0)


MAPS = [(f"map.{tap}", (tap,), 0) for tap in (6, 12, 18, 24)] + [("map24_sigma4", (24,), 4)]
MAPS += [(f"map_sum{end}", (6, 12, 18, 24), sigma) for end, sigma in (("", 0), ("_sigma4", 4))]


@pytest.mark.parametrize(("name", "taps", "sigma"), MAPS, ids=str)
def test_maps(reference: Reference, name: str, taps: tuple[int, ...], sigma: float) -> None:
    _, maps = reference.detector(taps=taps, sigma=sigma).detect(reference["in.images"])
    np.testing.assert_allclose(maps, reference[f"out.{name}"].numpy(), atol=1e-4, rtol=0)


def test_losses_gradients_and_two_optimiser_steps(reference: Reference) -> None:
    learner = model.PromptLearner(reference.clip.model, reference.clip.tokenizer)
    learner.load_state_dict(reference.learner.state_dict())
    loss_of, (feature, tokens) = training.prompts_loss(reference.clip), reference.look("in.images", 24)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, betas=(0.5, 0.999))
    batch = {"feature": feature, "tokens": tokens[:, None, 1:], "mask": reference["in.masks"]}
    batch |= {"label": reference["in.labels"], "has_mask": torch.ones(len(feature), dtype=torch.bool)}
    losses = loss_of(learner, batch)
    for name in ("focal", "dice_abnormal", "dice_normal", "image"):
        assert_near(losses[name], reference[f"train.loss_{name}"])
    assert_near(losses["loss"], reference["train.loss_total"])
    losses["loss"].backward()
    clear = {}  # where the gradient is not rounding noise, which Adam would blow up to a whole learning rate
    for name, parameter in learner.named_parameters():
        theirs = reference[f"train.grad.{name}"]
        assert_near(parameter.grad, theirs, 1e-3 * theirs.abs().max().item())
        clear[name] = parameter.grad.abs() > 1e-4 * parameter.grad.abs().max()
        assert clear[name].float().mean() > 0.5
    for moment, tolerance in (("after_step1", 1e-6), ("after_step2", 1e-5)):
        optimizer.step()
        for name, parameter in learner.named_parameters():
            chosen = clear[name]
            assert_near(parameter[chosen], reference[f"train.{moment}.{name}"][chosen], tolerance)
        optimizer.zero_grad()
        again = loss_of(learner, batch)["loss"]
        if moment == "after_step1":
            assert_near(again, reference["train.loss_total_step2"])
        again.backward()
