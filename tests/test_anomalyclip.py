"""AnomalyCLIP beyond parity: wrong inputs, predictions on disk, auxiliary data, training of prompts."""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from helpers import files as storage
from helpers import results
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalyclip import review as anomalyclip_review
from helpers.anomalyclip import training as prompts
from helpers.anomalyclip.model import DetectorSettings, PromptLearner
from helpers.clip.backbones import Clip, square_preprocess
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import figures
from helpers.judge.statistics import conformal_threshold
from helpers.records import Sample
from helpers.training_old import TrainingSettings, TrainingStopped, checkpoints

SIZE = DetectorSettings(image_size=32, sigma=1.0)


class Interrupt(Exception):
    pass


def tiny_clip(*, seed: int = 0, quick_gelu: bool = True, width: int = 32) -> Clip:
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 24, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 3},
        quick_gelu=quick_gelu,
    )
    model = model.eval().requires_grad_(False)
    return Clip(model, open_clip.get_tokenizer("ViT-B-32"), square_preprocess(24), f"tiny/seed {seed}/24")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture(scope="module")
def learner(clip: Clip) -> PromptLearner:
    return PromptLearner(clip.model, clip.tokenizer, seed=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def painting(rng: np.random.Generator, *, marked: bool) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture, 40 x 32, with a black square if marked."""
    coarse = rng.integers(90, 220, (5, 4, 3)).astype(np.uint8)
    image = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    mask = np.zeros(image.shape[:2], bool)
    if marked:
        row, column = rng.integers(0, 28), rng.integers(0, 20)
        mask[row : row + 12, column : column + 12] = True
        image[mask] = 0
    return image, mask


def make_dataset(folder: Path, categories: tuple[str, ...] = ("tower", "garden"), seed: int = 0) -> data.Dataset:
    rng, samples = np.random.default_rng(seed), []
    for category in categories:
        for split, n, marked in (("train", 6, False), ("calibration", 4, False), ("test", 3, False), ("test", 3, True)):
            for number in range(n):
                image, mask = painting(rng, marked=marked)
                kind = "box" if marked else "good"
                path = folder / category / split / kind / f"{number}.png"
                images.save_png(path, image)
                mask_path = folder / category / "ground_truth" / kind / f"{number}_mask.png" if marked else None
                if mask_path is not None:
                    images.save_png(mask_path, mask)
                group = f"{category}/{split}/{kind}/{number}"
                samples.append(Sample(path, category, marked, mask_path, split, kind, group))
    data.write_manifest(folder / "manifest.csv", samples)
    return data.open_dataset(folder)


def auxiliary(folder: Path, n: int = 24, seed: int = 7) -> tuple[list[Sample], list[Sample]]:
    """Training and tuning pictures of other things, half of them marked."""
    rng, samples = np.random.default_rng(seed), []
    for number in range(n):
        marked = bool(number % 2)
        image, mask = painting(rng, marked=marked)
        path, mask_path = folder / f"{number}.png", folder / f"{number}_mask.png"
        images.save_png(path, image)
        images.save_png(mask_path, mask)
        split = "calibration" if number >= n - 8 else "train"
        kind = "box" if marked else "good"
        sha256 = storage.sha256_file(path)
        samples.append(
            Sample(path, "other", marked, mask_path if marked else None, split, kind, f"other/{number}", sha256)
        )
    return [s for s in samples if s.split == "train"], [s for s in samples if s.split == "calibration"]


# --- the model and its inputs ----------------------------------------------------------------------------------------


def test_image_side_must_be_a_multiple_of_the_patch(clip: Clip, learner: PromptLearner) -> None:
    with pytest.raises(ValueError, match="patches are 8 px: a multiple is needed. Use 24 or 32"):
        anomalyclip.build_detector(clip, learner, DetectorSettings(image_size=30))
    with pytest.raises(ValueError, match="image side is 30 px"):
        anomalyclip.dual_path(clip.model.visual, torch.zeros(1, 3, 30, 24), first_dual_block=1, taps=[4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": (5,)}, "taps are \\(5,\\); this tower allows block numbers from 1 to 4"),
        ({"first_dual_block": 9}, "first_dual_block is 9; this tower of 4 blocks allows 0 to 4"),
    ],
)
def test_blocks_that_the_tower_does_not_have(clip: Clip, learner: PromptLearner, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anomalyclip.build_detector(clip, learner, replace(SIZE, **settings))


@pytest.mark.parametrize("changes", [{"image_size": 0}, {"sigma": -1.0}, {"taps": (2, 2)}, {"taps": (0,)}])
def test_settings_are_checked(changes: dict) -> None:
    with pytest.raises(ValueError):
        DetectorSettings(**changes)


def test_clip_without_quick_gelu_or_without_a_transformer_is_refused(learner: PromptLearner) -> None:
    import open_clip

    with pytest.raises(ValueError, match="GELU; OpenAI's weights need quick GELU"):
        anomalyclip.build_detector(tiny_clip(quick_gelu=False), learner, SIZE)
    resnet = open_clip.CLIP(16, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, {"width": 32, "heads": 2})
    with pytest.raises(ValueError, match="ModifiedResNet. Use ViT-L-14-336-quickgelu"):
        anomalyclip.check_clip(resnet)


def test_each_setting_matters(clip: Clip, learner: PromptLearner) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    _, plain = anomalyclip.detect(anomalyclip.build_detector(clip, learner, SIZE), pixels)
    for changes in ({"taps": (2,)}, {"taps": (2, 4)}, {"first_dual_block": 4}, {"first_dual_block": 0}, {"sigma": 0.0}):
        _, maps = anomalyclip.detect(anomalyclip.build_detector(clip, learner, replace(SIZE, **changes)), pixels)
        assert np.abs(maps - plain).max() > 1e-4, changes
    assert plain.shape == (2, 32, 32) and plain.dtype == np.float32


def test_without_dual_blocks_it_is_plain_clip(clip: Clip) -> None:
    """The switch of the ablation: patch tokens of the standard path, as open_clip computes them."""
    visual = clip.model.visual
    pixels = torch.randn(2, 3, 24, 24)
    feature, (tokens,) = anomalyclip.dual_path(visual, pixels, first_dual_block=4, taps=[4])
    plain = visual.transformer(visual._embeds(pixels))
    torch.testing.assert_close(tokens, visual.ln_post(plain) @ visual.proj, atol=1e-5, rtol=0)
    torch.testing.assert_close(feature, plain[:, 0] @ visual.proj, atol=1e-5, rtol=0)


def test_random_prompts_leave_the_random_state_alone(clip: Clip) -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    one = PromptLearner(clip.model, clip.tokenizer, seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.ctx_pos, PromptLearner(clip.model, clip.tokenizer, seed=5).ctx_pos)
    assert len(one.compound_prompts_text) == 2, "2/3 of three blocks"


@pytest.mark.parametrize("changes", [{"n_deep": 3}, {"n_context": 2, "deep_length": 4}])
def test_prompts_that_do_not_fit_the_text_tower(clip: Clip, changes: dict) -> None:
    with pytest.raises(ValueError, match="text tower of 3 blocks allows 0 to 2|overwrite at most the 2 contexts"):
        PromptLearner(clip.model, clip.tokenizer, **changes)


# --- prompt files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt_file(tmp_path: Path, learner: PromptLearner) -> Path:
    anomalyclip.save_prompts(learner, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path: Path, **changes: torch.Tensor | None) -> Path:
    state = {name: changes.get(name, tensor) for name, tensor in load_file(path).items()}
    state |= {name: tensor for name, tensor in changes.items() if name not in state}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def test_prompts_survive_the_file(clip: Clip, learner: PromptLearner, prompt_file: Path) -> None:
    loaded = anomalyclip.load_prompts(prompt_file, clip)
    for name, tensor in learner.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_published_pickle_is_read_without_running_it(clip: Clip, learner: PromptLearner, tmp_path: Path) -> None:
    dead = {f"compound_prompt_projections.{i}.weight": torch.zeros(9, 32) for i in range(2)}
    torch.save({"prompt_learner": dict(learner.state_dict()) | dead}, tmp_path / "epoch_15.pth")
    assert torch.equal(anomalyclip.load_prompts(tmp_path / "epoch_15.pth", clip).ctx_neg, learner.ctx_neg)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save({"prompt_learner": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        anomalyclip.load_prompts(tmp_path / "evil.pth", clip)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ctx_pos": None}, "missing \\['ctx_pos'\\]"),
        ({"compound_prompts_text.0": None}, "missing \\['compound_prompts_text.0'\\]"),
        ({"surprise": torch.zeros(1)}, "unexpected \\['surprise'\\]"),
        ({"ctx_pos": torch.zeros(1, 1, 12, 48)}, "width 48, the text tower of tiny/seed 0/24 has 32"),
        ({"ctx_neg": torch.zeros(1, 1, 9, 32)}, "does not fit .*ctx_neg \\(1, 1, 9, 32\\), not \\(1, 1, 12, 32\\)"),
        ({"ctx_neg": torch.full((1, 1, 12, 32), math.nan)}, "not finite in ctx_neg"),
        ({"token_prefix_pos": torch.zeros(1, 1, 1, 32)}, "made with another CLIP: its token_prefix_pos differs"),
        (
            {"tokenized_prompts_neg": torch.zeros(1, 1, 77, dtype=torch.int32)},
            "another CLIP: its tokenized_prompts_neg",
        ),
    ],
)
def test_wrong_prompt_files_are_refused(clip: Clip, prompt_file: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anomalyclip.load_prompts(rewrite(prompt_file, **changes), clip)


def test_prompts_of_another_clip_and_a_missing_file(prompt_file: Path) -> None:
    with pytest.raises(ValueError, match="another CLIP: its token_prefix_pos differs from that of tiny/seed 3/24"):
        anomalyclip.load_prompts(prompt_file, tiny_clip(seed=3))
    with pytest.raises(FileNotFoundError, match="01_prepare_weights"):
        anomalyclip.load_prompts(prompt_file.with_name("none.safetensors"), tiny_clip())


# --- predictions -----------------------------------------------------------------------------------------------------


def predict(dataset: data.Dataset, clip: Clip, learner: PromptLearner, folder: Path, **options):
    detector = anomalyclip.build_detector(clip, learner, SIZE)
    settings = {"profile": "mini", "checkpoint_hash": "abc", "trained_on": "nothing", "alpha": 0.2, "batch_size": 4}
    return detector, anomalyclip.predict(detector, dataset, folder=folder, **(settings | options))


def test_predictions_are_those_of_the_detector(dataset, clip, learner, tmp_path: Path) -> None:
    detector, result = predict(dataset, clip, learner, tmp_path)
    assert [p.sample for p in result.predictions] == dataset.select(split="test")
    normals = dataset.select(split="train") + dataset.select(split="calibration")
    calibration = anomalyclip.read_calibration(tmp_path)
    for prediction in result.predictions:
        pixels = detector.preprocess(images.load_image(prediction.sample.image_path))[None]
        scores, maps = anomalyclip.detect(detector, pixels)
        assert prediction.anomaly_score == pytest.approx(scores[0], abs=1e-6)
        np.testing.assert_allclose(result.anomaly_map(prediction), maps[0], atol=1e-3)
        mine = [one for one in normals if one.category == prediction.sample.category]
        one = calibration[prediction.sample.category]
        assert len(one.scores) == len(mine) == 10
        assert prediction.threshold == conformal_threshold(one.scores, 0.2)
        assert prediction.p_value == (1 + (one.scores >= prediction.anomaly_score).sum()) / 11
        assert prediction.seconds > 0
    assert result.manifest["settings"]["taps"] == [4] and result.manifest["settings"]["first_dual_block"] == 1


def test_interrupted_predictions_go_on_and_complete_ones_are_read(dataset, clip, learner, tmp_path, monkeypatch):
    """A torn run keeps its pictures; the next one predicts the rest only, a third one none."""
    real, seen, power_cuts = images.load_image, [], [26]  # 20 calibration pictures, then 6 of 12 test pictures

    def torn(path: Path, **options: object) -> np.ndarray:
        seen.append(Path(path))
        if len(seen) in power_cuts:
            power_cuts.clear()
            raise Interrupt
        return real(path, **options)

    monkeypatch.setattr(images, "load_image", torn)
    with pytest.raises(Interrupt):
        predict(dataset, clip, learner, tmp_path)
    with pytest.raises(FileNotFoundError):
        results.read(tmp_path, dataset.samples, dataset.folder, dataset.hash)
    seen.clear()
    _, result = predict(dataset, clip, learner, tmp_path)
    assert len(seen) == 20 + 8 and len(result.predictions) == 12
    seen.clear()
    predict(dataset, clip, learner, tmp_path)
    assert seen == []
    predict(dataset, clip, learner, tmp_path, checkpoint_hash="other prompts")
    assert len(seen) > 20


def test_calibration_split_of_few_shot_prompts(dataset, clip, learner, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="4 calibration normals cannot promise"):
        predict(dataset, clip, learner, tmp_path, calibration_splits=("calibration",), alpha=0.05)
    assert {len(one.scores) for one in anomalyclip.read_calibration(tmp_path).values()} == {4}


def test_artwork_without_normals_is_named(dataset, clip, learner, tmp_path: Path) -> None:
    left = tuple(s for s in dataset.samples if s.category == "tower" or s.split == "test")
    with pytest.raises(ValueError, match="garden has no train or calibration pictures"):
        predict(replace(dataset, samples=left), clip, learner, tmp_path)
    left = tuple(s for s in dataset.samples if s.category == "tower" or s.split != "test")
    with pytest.raises(ValueError, match="garden has no test pictures"):
        predict(replace(dataset, samples=left), clip, learner, tmp_path)


def test_thresholds_never_see_test_or_anomalous_pictures(dataset, clip, learner) -> None:
    detector = anomalyclip.build_detector(clip, learner, SIZE)
    with pytest.raises(ValueError, match="in split 'test': thresholds are set with normal"):
        anomalyclip.calibrate(detector, dataset.select(split="test", is_anomalous=False))
    with pytest.raises(ValueError, match="There is no picture to score"):
        list(anomalyclip.score_samples(detector, []))


# --- auxiliary data --------------------------------------------------------------------------------------------------


def test_pictures_under_test_are_not_trained_on(dataset, tmp_path: Path) -> None:
    train, tuning = auxiliary(tmp_path / "aux")
    assert prompts.check_auxiliary(train + tuning, dataset) == "auxiliary"
    test = dataset.select(split="test")[0]
    for few_shot in (False, True):
        with pytest.raises(ValueError, match="shows the test picture"):
            prompts.check_auxiliary(
                [*train, replace(test, category="other", split="train")], dataset, few_shot=few_shot
            )
    own = dataset.select(split="train")
    with pytest.raises(ValueError, match="is a picture of tower, which is under test"):
        prompts.check_auxiliary([*train, own[0]], dataset)
    assert prompts.check_auxiliary([*train, *own], dataset, few_shot=True) == "few-shot"


def test_a_resized_copy_of_a_test_picture_is_recognised(dataset, tmp_path: Path) -> None:
    test = dataset.select(split="test", is_anomalous=False)[0]
    image = images.load_image(test.image_path)
    copy = tmp_path / "copy.png"
    images.save_png(copy, np.kron(image, np.ones((3, 3, 1), np.uint8)))
    with pytest.raises(ValueError, match="copy.png shows the test picture"):
        prompts.check_auxiliary([Sample(copy, "other", False, split="train", group="copy")], dataset)


def test_another_picture_of_the_artwork_is_recognised_by_its_category(dataset, tmp_path: Path) -> None:
    path = tmp_path / "new.png"
    images.save_png(path, painting(np.random.default_rng(55), marked=False)[0])
    new = Sample(path, "tower", False, split="train", group="new")
    with pytest.raises(ValueError, match="picture of tower, which is under test"):
        prompts.check_auxiliary([new], dataset)
    assert prompts.check_auxiliary([new], dataset, few_shot=True) == "few-shot"


def test_published_layout_gives_its_test_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for kind, n in (("good", 8), ("crack", 8)):
        for number in range(n):
            image, mask = painting(rng, marked=kind == "crack")
            images.save_png(tmp_path / "bottle" / "test" / kind / f"{number:03d}.png", image)
            if kind == "crack":
                images.save_png(tmp_path / "bottle" / "ground_truth" / kind / f"{number:03d}_mask.png", mask)
    images.save_png(tmp_path / "bottle" / "train" / "good" / "000.png", painting(rng, marked=False)[0])
    samples = prompts.auxiliary_samples(tmp_path, tmp_path / "unused", n_views=2, max_side=64, seed=1)
    assert len(samples) == 16 and all("/test/" in s.image_path.as_posix() for s in samples)
    tuning = [sample for sample in samples if sample.split == "calibration"]
    assert sorted(sample.kind for sample in tuning) == ["crack"] * 2 + ["good"] * 2
    with pytest.raises(FileNotFoundError, match="'packages', 'best_artworks', or a folder"):
        prompts.auxiliary_samples("mvtec", tmp_path, n_views=2, max_side=64, seed=1)


@pytest.mark.parametrize(("rule", "expected"), [("bilinear", 0), ("any", 1)])
def test_small_defects_vanish_or_stay(tmp_path: Path, rule: str, expected: int) -> None:
    """A 2 x 2 px defect in a 1500 px mask is below one half everywhere at 518 px: the published rule teaches normal."""
    mask = np.zeros((1500, 1500), bool)
    mask[700:702, 700:702] = True
    images.save_png(tmp_path / "mask.png", mask)
    sample = Sample(tmp_path / "x.png", "c", True, tmp_path / "mask.png", "test", "dot")
    assert int(prompts.training_mask(sample, 518, rule).sum() > 0) == expected


def test_missing_masks_are_known_as_missing(tmp_path: Path, clip: Clip) -> None:
    train, _ = auxiliary(tmp_path)
    unknown = [replace(sample, mask_path=None) for sample in train]
    features = prompts.tower_features(clip, unknown, settings=SIZE, folder=tmp_path / "cache")
    flags = [bool(features[i]["has_mask"]) for i in range(4)]
    assert flags == [True, False, True, False]
    batch = torch.utils.data.default_collate([features[i] for i in range(4)])
    text = F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    losses = anomalyclip.prompt_losses(text, batch)
    known = {name: value[::2] for name, value in batch.items()}
    halved = anomalyclip.prompt_losses(text, known)
    for name in ("focal", "dice_abnormal", "dice_normal"):
        torch.testing.assert_close(losses[name], halved[name] / 2)
    assert losses["image"] != halved["image"], "the image loss counts all four"


# --- cached features and training ------------------------------------------------------------------------------------


def test_features_are_those_of_the_tower_and_are_read_again(tmp_path: Path, clip: Clip, monkeypatch) -> None:
    train, _ = auxiliary(tmp_path)
    settings = replace(SIZE, taps=(2, 4))
    features = prompts.tower_features(clip, train, settings=settings, folder=tmp_path / "cache", batch_size=5)
    pixels = torch.stack([square_preprocess(32)(images.load_image(s.image_path)) for s in train])
    with torch.inference_mode():
        feature, tokens = anomalyclip.dual_path(clip.model.visual, pixels, first_dual_block=1, taps=(2, 4))
    np.testing.assert_allclose(features.feature, feature.numpy(), atol=1e-5)
    np.testing.assert_allclose(features.tokens[:, 1], tokens[1][:, 1:].numpy(), atol=1e-5)
    monkeypatch.setattr(anomalyclip, "dual_path", None)  # a second computation would fail
    prompts.tower_features(clip, train, settings=settings, folder=tmp_path / "cache")
    for other in ({"settings": SIZE}, {"dtype": "float16"}, {"samples": train[:3]}):
        with pytest.raises(TypeError):
            prompts.tower_features(
                clip, **({"samples": train, "settings": settings} | other), folder=tmp_path / "cache"
            )


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"mask_rule": "some"}, {"samples": []}])
def test_wrong_feature_options(tmp_path: Path, clip: Clip, options: dict) -> None:
    train, _ = auxiliary(tmp_path, n=10)
    with pytest.raises(ValueError, match="allowed are|no picture to train on"):
        prompts.tower_features(clip, **({"samples": train} | options), settings=SIZE, folder=tmp_path)


def test_full_disk_is_said_before_it_is_full(tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = auxiliary(tmp_path)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match="float16"):
        prompts.tower_features(clip, train, settings=SIZE, folder=tmp_path / "cache")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, clip: Clip):
    return make_features(tmp_path_factory.mktemp("features"), clip)


def make_features(folder: Path, clip: Clip) -> tuple[prompts.TowerFeatures, prompts.TowerFeatures]:
    options = {"settings": SIZE, "folder": folder / "cache", "mask_rule": "any"}
    return tuple(prompts.tower_features(clip, part, **options) for part in auxiliary(folder))


def test_training_learns_and_keeps_the_best(tmp_path: Path, clip: Clip, features) -> None:
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    settings = TrainingSettings(n_epochs=6, batch_size=8, patience=4)
    own, result = prompts.train_prompts(clip, *features, folder=tmp_path, settings=settings, learning_rate=2e-2)
    start = PromptLearner(clip.model, clip.tokenizer, seed=settings.seed)
    tuned = prompts.tuning_score(prompts.prompts_text(clip, own), features[1])
    assert tuned == pytest.approx(result.best_score, abs=1e-6)
    assert tuned > prompts.tuning_score(prompts.prompts_text(clip, start), features[1]) + 0.1
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.model.state_dict().items())
    again = anomalyclip.load_prompts(tmp_path / "prompts.safetensors", clip)
    assert prompts.prompts_hash(again) == prompts.prompts_hash(own)
    assert not clip.model.training


def test_killed_training_of_prompts_resumes_bit_for_bit(tmp_path: Path, clip: Clip, features) -> None:
    settings = TrainingSettings(n_epochs=2, batch_size=4, checkpoint_every=1)

    def interrupt(path: Path) -> None:
        if path.name == "step_00000003":
            raise Interrupt

    whole, _ = prompts.train_prompts(clip, *features, folder=tmp_path / "whole", settings=settings)
    with pytest.raises(Interrupt):
        prompts.train_prompts(clip, *features, folder=tmp_path / "cut", settings=settings, on_checkpoint=interrupt)
    resumed, _ = prompts.train_prompts(clip, *features, folder=tmp_path / "cut", settings=settings)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_nan_loss_stops_and_keeps_the_last_good_prompts(tmp_path: Path, clip: Clip, features) -> None:
    settings = TrainingSettings(n_epochs=1, batch_size=4, checkpoint_every=1)
    broken = features[0].feature.copy()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(settings.seed * 1_000_003)).tolist()
    broken[order[-1]] = math.nan
    with pytest.raises(TrainingStopped, match="not finite: .*image nan"):
        prompts.train_prompts(
            clip, replace(features[0], feature=broken), features[1], folder=tmp_path, settings=settings
        )
    assert checkpoints(tmp_path)[-1].name == "step_00000003"
    assert all(t.isfinite().all() for t in load_file(checkpoints(tmp_path)[-1] / "model.safetensors").values())


def test_tuning_needs_both_labels_and_other_pictures(tmp_path: Path, clip: Clip, features) -> None:
    train, tuning = features
    with pytest.raises(ValueError, match="16 source pictures are in both splits"):
        prompts.train_prompts(clip, train, train, folder=tmp_path, settings=TrainingSettings(1, 8))
    normal = [i for i, sample in enumerate(tuning.samples) if not sample.is_anomalous]
    one_sided = replace(
        tuning,
        samples=tuple(tuning.samples[i] for i in normal),
        feature=tuning.feature[normal],
        tokens=tuning.tokens[normal],
    )
    with pytest.raises(ValueError, match="All 4 tuning pictures are normal"):
        prompts.train_prompts(clip, train, one_sided, folder=tmp_path, settings=TrainingSettings(1, 8))


def test_training_goes_on_from_given_prompts(tmp_path: Path, clip: Clip, learner: PromptLearner, features) -> None:
    settings = TrainingSettings(n_epochs=1, batch_size=16)
    own, _ = prompts.train_prompts(
        clip, *features, folder=tmp_path, settings=settings, learning_rate=1e-6, start=learner
    )
    torch.testing.assert_close(own.ctx_pos, learner.ctx_pos, atol=1e-5, rtol=0)
    assert not torch.equal(own.ctx_pos, learner.ctx_pos)


def test_every_second_view_is_damaged_and_pictures_keep_to_one_split(tmp_path: Path) -> None:
    pictures = prompts.package_pictures()[:4]
    assert not any(name in s.image_path.stem for s in pictures for name in ("astronaut", "coffee", "chelsea", "camera"))
    made = prompts.make_auxiliary(pictures, tmp_path / "views", n_views=4, max_side=64, seed=3)
    assert len(made) == 16 and sum(sample.is_anomalous for sample in made) == 8
    groups = [{s.group for s in made if s.split == split} for split in ("train", "calibration")]
    assert [len(group) for group in groups] == [3, 1] and not groups[0] & groups[1]
    for sample in made:
        image = images.load_image(sample.image_path)
        assert max(image.shape) <= 80  # 64 px, then perhaps another crop or perspective
        assert bool(data.mask_of(sample, image.shape[:2]).any()) == sample.is_anomalous
    assert len({sample.sha256 for sample in made}) == 16, "views differ"


def test_auxiliary_pictures_are_made_once_and_again_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"n_views": 2, "max_side": 48}
    pictures = prompts.package_pictures()[:3]
    made = prompts.make_auxiliary(pictures, tmp_path / "views", seed=3, **options)
    twin = prompts.make_auxiliary(pictures, tmp_path / "twin", seed=3, **options)
    assert [s.sha256 for s in made] == [s.sha256 for s in twin]
    monkeypatch.setattr(images, "save_png", None)  # writing anything would fail
    assert prompts.make_auxiliary(pictures, tmp_path / "views", seed=3, **options) == made
    with pytest.raises(TypeError):
        prompts.make_auxiliary(pictures, tmp_path / "views", seed=4, **options)


@pytest.mark.parametrize(("n_pictures", "n_views"), [(1, 2), (3, 3), (3, 0)])
def test_wrong_numbers_of_pictures_or_views(tmp_path: Path, n_pictures: int, n_views: int) -> None:
    with pytest.raises(ValueError, match="at least two|an even number"):
        pictures = prompts.package_pictures()[:n_pictures]
        prompts.make_auxiliary(pictures, tmp_path, n_views=n_views, max_side=48, seed=1)


def test_row_is_chosen_by_tuning_pictures(clip: Clip, features, tmp_path: Path) -> None:
    settings = TrainingSettings(n_epochs=4, batch_size=8)
    own, result = prompts.train_prompts(clip, *features, folder=tmp_path, settings=settings, learning_rate=2e-2)
    candidates = {"published": PromptLearner(clip.model, clip.tokenizer, seed=settings.seed), "own": own}
    chosen, scores = prompts.choose_prompts(candidates, clip, features[1])
    assert chosen == "own" and scores["own"] == pytest.approx(result.best_score, abs=1e-6)
    assert prompts.choose_prompts(candidates, clip, features[1], row="published")[0] == "published"
    with pytest.raises(ValueError, match="row is 'mvtec'; there are published, own, or 'best'"):
        prompts.choose_prompts(candidates, clip, features[1], row="mvtec")


@pytest.mark.parametrize("n_epochs", [0, 1])
def test_both_orders_of_the_notebook(tmp_path: Path, clip: Clip, n_epochs: int) -> None:
    """0 epochs: test only; more: train, and find the same prompts again without training."""
    train, tuning = auxiliary(tmp_path / "pictures")
    options = {"n_epochs": n_epochs, "folder": tmp_path / "ck", "features_dir": tmp_path / "features", "settings": SIZE}
    own, features, history = prompts.own_prompts(clip, train + tuning, **options)
    assert list(own) == ["own"] * n_epochs and len(features) == 8 and bool(history) == bool(n_epochs)
    again, _, same = prompts.own_prompts(clip, train + tuning, **options)
    assert same == history
    assert [prompts.prompts_hash(one) for one in again.values()] == [prompts.prompts_hash(one) for one in own.values()]


# --- reading the results ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(dataset, tmp_path_factory: pytest.TempPathFactory) -> results.MethodResult:
    """Results whose maps are the masks themselves, but for the first anomaly of each painting, which they miss."""
    folder = tmp_path_factory.mktemp("drawn") / "anomalyclip"
    test, missed = dataset.select(split="test"), set()
    head = {"dataset_hash": dataset.hash, "profile": "mini", "settings": {}}
    with results.Writer(folder, method="anomalyclip", samples=test, dataset_dir=dataset.folder, **head) as writer:
        for number, sample in enumerate(test):
            mask = data.mask_of(sample, images.load_image(sample.image_path).shape[:2]).astype(np.float32)
            if sample.is_anomalous and sample.category not in missed:
                missed.add(sample.category)
                mask = 0.3 * (1 - mask)
            score = 0.6 if sample.is_anomalous else 0.1 + 0.01 * number
            writer.add(results.Prediction(sample, score, mask, 0.65, 0.5, 0.1))
    normal = {"scores": [0.1] * 19, "map_maxima": [0.25] * 19}
    storage.write_json(folder / anomalyclip.CALIBRATION, dict.fromkeys(dataset.categories, normal))
    return results.read(folder, dataset.samples, dataset.folder, dataset.hash)


def test_table_per_painting(drawn: results.MethodResult) -> None:
    row = anomalyclip_review.per_painting({"own": drawn}).loc[("own", "Garden")]
    assert row["normal + anomalous"] == "3 + 3"
    assert row["image AUROC"].startswith("1.000 [") and row["image AP"] == "1.000"
    assert row["accuracy, conformal threshold"].startswith("3/6 = 50.0%"), "no score is above 0.65"
    assert row["accuracy, score > 0.5"].startswith("6/6 = 100.0%")
    assert row["always anomaly"].startswith("3/6")
    assert 0.5 < float(row["pixel AUROC"]) < 1.0


def test_marks_are_counted_by_place(drawn: results.MethodResult) -> None:
    thresholds = anomalyclip_review.map_thresholds(drawn, alpha=0.05)
    assert thresholds == {"tower": 0.25, "garden": 0.25}
    table = anomalyclip_review.marks(drawn, thresholds).loc["Tower"]
    assert table.loc["anomaly with mask"].drop("somewhere").tolist() == [3, 2, 2, 1]
    assert table.loc["genuine", ["pictures", "elsewhere"]].tolist() == [3, 0]


def test_panels_show_a_hit_a_miss_and_a_genuine_picture(drawn: results.MethodResult) -> None:
    thresholds = anomalyclip_review.map_thresholds(drawn, alpha=0.05)
    panels = anomalyclip_review.detections(drawn, "tower", thresholds)
    assert [panel.caption.split(";")[0] for panel in panels] == ["box, marked", "box, missed", "genuine, most marked"]
    low, high = anomalyclip_review.map_limits(drawn, thresholds)
    assert low <= 0.25 < high
    figure = figures.map_panels(panels, limits=(low, high), threshold=0.25, title="x")
    assert len(figure.axes) == 3 * 4 + 1
