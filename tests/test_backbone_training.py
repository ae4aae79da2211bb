"""The recipe of the embedded backbone: its targets and losses, what it exports, and what the shipped weights can do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import anomalyclip, backbone_training, backbones, imagebind, scenes

KINDS = ("box", "stain")


@pytest.fixture(scope="module")
def student() -> backbone_training.BackboneLoss:
    teacher = backbones.load_cnn(backbones.EFFICIENTNET_LITE0, device="cpu")
    torch.manual_seed(0)
    return backbone_training.BackboneLoss(backbones.art_vit_mini(), teacher, KINDS)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(224, 224, dtype=torch.bool)
    mask[40:80, 40:80] = True
    return {
        "pair": torch.randint(0, 255, (2, 2, 3, 224, 224), generator=generator, dtype=torch.uint8),
        "target": torch.stack([backbone_training.patch_target(m) for m in (mask, torch.zeros_like(mask))]),
        "labels": torch.tensor([[1, 0, 3, 4], [0, -1, -1, -1]]),
    }


# --- targets and losses ----------------------------------------------------------------------------------------------


def test_a_thin_line_marks_the_patches_it_crosses() -> None:
    mask = torch.zeros(224, 224, dtype=torch.bool)
    mask[24:26, :100] = True  # two pixels high: an eighth of a patch, half of a quarter patch
    target = backbone_training.patch_target(mask).view(14, 14)
    assert (target[1, :6] == 1).all() and target[0].max() == target[2:].max() == target[1, 7:].max() == 0


def test_state_loss_weighs_both_labels_alike() -> None:
    pairs = torch.eye(2)[None]  # flawless is the first axis
    wrong, right = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    pooled = torch.cat([wrong, right.expand(9, -1), wrong])  # one of ten flawless ones is wrong, the damaged one right
    labels = torch.tensor([0] * 10 + [1])
    logits = torch.tensor([0.0, 1.0]) / backbone_training.TEMPERATURE
    cost = F.cross_entropy(logits[None], torch.tensor([0])).item()
    found = backbone_training._state_loss(pooled, pairs, labels)
    assert found.item() == pytest.approx(0.5 * cost / 10, rel=1e-4)


def test_patch_loss_falls_when_marked_patches_look_damaged() -> None:
    pairs = torch.eye(2)[None]
    target = torch.tensor([[0.0, 0.0, 1.0]])
    good = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert backbone_training._patch_loss(good, pairs, target) < 0.05
    assert backbone_training._patch_loss(good.flip(1), pairs, target) > 1


def test_every_loss_reaches_the_towers_it_should_train(student, batch) -> None:
    student.train()
    losses = student(batch)
    assert losses.keys() == {"loss", *backbone_training._WEIGHTS}
    weighted = sum(weight * losses[name] for name, weight in backbone_training._WEIGHTS.items())
    assert torch.isclose(weighted, losses["loss"])
    vision, text = student.clip.visual.conv1.weight, student.clip.transformer.resblocks[0].attn.in_proj_weight
    for name in backbone_training._WEIGHTS:
        student.zero_grad()
        losses[name].backward(retain_graph=True)
        assert vision.grad.abs().sum() > 0, name
        trains_text = text.grad is not None and text.grad.abs().sum() > 0
        assert trains_text == (name in ("image", "patch", "factors")), name
    student.eval()


def test_reference_loss_wants_the_damaged_patch_far_and_the_others_near(student) -> None:
    torch.manual_seed(0)
    first = torch.randn(4, 1, 6, 8)
    moved = first.clone()
    moved[:, :, 2] = -10 * first.mean(dim=2)
    target = torch.tensor([[0.0, 0, 1, 0, 0, 0]])
    right, wrong = torch.stack([first, moved], dim=1), torch.stack([first, first], dim=1)
    damaged = torch.tensor([1])
    assert student._reference_loss(right, damaged, target) < student._reference_loss(wrong, damaged, target)


# --- towers ----------------------------------------------------------------------------------------------------------


def test_small_token_table_gives_the_same_text_features(student) -> None:
    texts = ["a photo of a flawless object.", "a painting with a red mark."]
    ids = backbones.clip_tokenizer()(texts)
    with torch.no_grad():
        small = student.clip.encode_text(torch.searchsorted(student.row_ids, ids), normalize=True)
        full = backbones.art_vit_mini().encode_text(ids, normalize=True)
    torch.testing.assert_close(small, full)


def test_tokens_are_those_that_the_methods_read(student) -> None:
    """The pass that training sees against AnomalyCLIP's and AnomalyGPT's own code."""
    visual = student.clip.visual
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = backbone_training.vision_tokens(visual, pixels)
        feature, (vv,) = anomalyclip.dual_path(visual, pixels, first_dual_block=1, taps=[4])
        taps = imagebind.image_tower(student.clip).features(pixels).taps
        plain = visual(pixels)
    torch.testing.assert_close(tokens["pooled_raw"], feature, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens["patches_vv"], vv[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens["blocks"], taps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens["pooled"], plain, rtol=1e-4, atol=1e-4)
    student.requires_grad_(True)


def test_export_comes_back(student, tmp_path: Path) -> None:
    backbone_training.export(student, tmp_path / "x.safetensors")
    found, table = backbones.art_vit_mini(tmp_path / "x.safetensors").state_dict(), student.clip.state_dict()
    rows = found.pop("token_embedding.weight")
    torch.testing.assert_close(rows[student.row_ids], table.pop("token_embedding.weight").half().float())
    untouched = torch.ones(len(rows), dtype=torch.bool)
    untouched[student.row_ids] = False
    assert not rows[untouched].any()
    for name, tensor in table.items():
        torch.testing.assert_close(found[name], tensor.half().float(), msg=name)


def test_start_is_white_on_the_pictures_it_was_made_from() -> None:
    class Maker:
        size = 224

        def __call__(self, *seed: int) -> scenes.Scene:
            rng = np.random.default_rng(seed)
            picture = np.cumsum(rng.normal(0, 6, (224, 224, 3)), axis=0).clip(-90, 90) + 128  # smooth downwards
            picture = picture.astype(np.uint8)
            return scenes.Scene(picture, picture, np.zeros((224, 224), bool), -1, -1, -1)

    visual = backbones.art_vit_mini(None).visual
    before = visual.positional_embedding.clone()
    backbone_training.start_from_pictures(visual, Maker(), seed=1, n_pictures=12)
    pixels = torch.stack([backbones.square_preprocess(224)(Maker()(1, i).image) for i in range(12)])
    with torch.no_grad():
        out = visual.conv1(pixels).flatten(2).transpose(1, 2).flatten(0, 1)  # (n * P, width)
    spread = out.std(dim=0)
    assert 0.6 < spread.min() and spread.max() < 1.1  # the least variance is halved, to bound the noise
    correlation = torch.corrcoef(out.T) - torch.eye(len(spread))
    assert correlation.abs().max() < 0.05
    places = visual.positional_embedding[1:].detach()
    distances = torch.cdist(places, places) + 1e3 * torch.eye(len(places))
    neighbours = distances.argmin(dim=1)
    assert torch.isin((neighbours - torch.arange(196)).abs(), torch.tensor([1, 14])).all()
    assert torch.equal(visual.positional_embedding[0], before[0])


def test_learning_rate_warms_up_and_ends_low() -> None:
    rates = [backbone_training._learning_rate(step, 10, 100) for step in (0, 9, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0.1, 1, 1, 0.51, 0.02], atol=1e-6)


def test_captions_cover_the_words_of_both_methods() -> None:
    captions = set(backbone_training.state_captions())
    normal, damaged = imagebind.sentences("object")
    assert {*normal, *damaged} <= captions
    assert len(backbone_training.factored_captions(KINDS)) == len(KINDS) + 12 + 9


# --- what the shipped weights can do ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """On pictures that training never showed; noise stands for the textiles, whose package is not installed here."""
    folder = tmp_path_factory.mktemp("scenes")
    patch = pytest.MonkeyPatch()
    rng = np.random.default_rng(0)
    scenes.images.save_png(folder / "noise.png", rng.integers(90, 160, (200, 200, 3), np.uint8))
    patch.setattr(scenes, "_textile_paths", lambda part: [folder / "noise.png"])
    patch.setattr(scenes, "_N_PAINTED", {"held_out": 6})
    clip = backbones.art_vit_mini().eval()
    found = {}
    for name, kinds in (("trained", scenes.TRAINED_KINDS), ("held out", scenes.HELD_OUT_KINDS)):
        maker = scenes.SceneMaker(folder, part="held_out", kinds=kinds)
        found[name] = backbone_training.evaluate(clip, maker, n=60, seed=5)
    patch.undo()
    return found


def test_shipped_backbone_finds_damage_on_unseen_pictures(quality) -> None:
    print(quality)
    assert quality["trained"]["pixel_auroc"] > 0.75
    assert quality["trained"]["reference_pixel_auroc"] > 0.85


def test_kinds_that_training_never_showed_are_found_nearly_as_well(quality) -> None:
    for metric in ("pixel_auroc", "pixel_auroc_vv", "reference_pixel_auroc"):
        assert quality["held out"][metric] > quality["trained"][metric] - 0.10, metric


def test_shipped_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size / 1e6 for path in backbones.ART_VIT_MINI_WEIGHTS.parent.iterdir()}
    assert sizes["art_vit_mini.safetensors"] <= 12 and sum(sizes.values()) <= 20, sizes
