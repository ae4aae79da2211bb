"""AnomalyCLIP beyond parity: wrong inputs, predictions on disk, auxiliary pictures, training of prompts."""

import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_dataset import write_dataset, write_pictures

from helpers import data, files
from helpers.anomalyclip import detector, model, training
from helpers.anomalyclip.model import PromptLearner
from helpers.clip.backbones import Network
from helpers.data import images
from helpers.judge.statistics import conformal_threshold
from helpers.records import Sample
from helpers.training import TrainingStopped


@pytest.fixture(scope="module")
def clip() -> Network:
    return tiny_clip.clip()


@pytest.fixture(scope="module")
def learner(clip: Network) -> PromptLearner:
    return PromptLearner(clip.model, clip.tokenizer, seed=1)


@pytest.fixture(scope="module")
def ours(clip: Network, learner: PromptLearner) -> detector.Detector:
    return detector.build_detector(clip, learner, sigma=1.0)


GOOD, BOX = ["good"], ["box"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    plan = {"train": GOOD * 6, "calibration": GOOD * 4, "test": GOOD * 3 + BOX * 3}
    return write_dataset(tmp_path_factory.mktemp("dataset"), ("tower", "garden"), plan, shape=(40, 32))


@pytest.fixture(scope="module")
def auxiliary(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Pictures of another thing, half of them marked: 16 to learn from, 8 to tune."""
    plan = {"train": GOOD * 8 + BOX * 8, "calibration": GOOD * 4 + BOX * 4}
    return write_pictures(tmp_path_factory.mktemp("auxiliary"), "other", plan, shape=(40, 32), seed=7)


def test_what_does_not_fit_is_refused(clip, learner: PromptLearner) -> None:
    for side, taps, message in ((30, [4], "a multiple is needed. Use 24 or 32"), (24, [5], "numbers from 1 to 4")):
        with pytest.raises(ValueError, match=message):
            model.dual_path(clip.model.visual, torch.zeros(1, 3, side, side), first_dual_block=1, taps=taps)
    with pytest.raises(ValueError, match="do not fit"):
        PromptLearner(clip.model, clip.tokenizer, n_deep=3)
    with pytest.raises(ValueError, match="quick GELU"):
        detector.build_detector(tiny_clip.clip(quick_gelu=False), learner)
    resnet = open_clip.CLIP(16, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, {"width": 32, "heads": 2})
    with pytest.raises(ValueError, match="vision transformer"):
        model.check_clip(resnet)


def test_without_dual_blocks_it_is_plain_clip_and_their_number_matters(clip, ours: detector.Detector) -> None:
    visual, pixels = clip.model.visual, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    maps = [replace(ours, first_dual_block=n).detect(pixels)[1] for n in (0, 1, 4)]
    assert all(np.abs(one - maps[2]).max() > 1e-4 for one in maps[:2]) and maps[0].dtype == np.float32
    feature, (tokens,) = model.dual_path(visual, pixels, first_dual_block=4, taps=[4])
    blocks = visual.transformer(visual._embeds(pixels))
    torch.testing.assert_close(tokens, visual.ln_post(blocks) @ visual.proj, atol=1e-5, rtol=0)
    torch.testing.assert_close(feature, blocks[:, 0] @ visual.proj, atol=1e-5, rtol=0)


def test_prompts_survive_the_file_belong_to_one_clip_and_wrong_ones_are_refused(clip, learner, tmp_path) -> None:
    path, state = tmp_path / "model.safetensors", torch.get_rng_state()
    again = PromptLearner(clip.model, clip.tokenizer, seed=1)  # leaves the global random state alone
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(again.ctx_pos, learner.ctx_pos)
    files.write_bytes(path, model.as_bytes(learner))
    loaded, state = model.load_prompts(path, clip), load_file(path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in learner.state_dict().items())
    assert model.prompts_hash(loaded) == model.prompts_hash(learner)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="another CLIP"):
        model.load_prompts(path, tiny_clip.clip(seed=3))
    with pytest.raises(FileNotFoundError, match="01_prepare_weights"):
        model.load_prompts(tmp_path / "none.safetensors", clip)
    for name, tensor in (
        ("ctx_pos", None),
        ("compound_prompts_text.0", None),
        ("surprise", torch.zeros(1)),
        ("ctx_pos", torch.zeros(1, 1, 12, 48)),
        ("ctx_neg", torch.zeros(1, 1, 9, 32)),
        ("ctx_neg", torch.full((1, 1, 12, 32), math.nan)),
        ("token_prefix_pos", torch.zeros(1, 1, 1, 32)),
        ("tokenized_prompts_neg", torch.zeros(1, 1, 77, dtype=torch.int32)),
    ):
        save_file({key: value for key, value in (state | {name: tensor}).items() if value is not None}, path)
        with pytest.raises(ValueError, match=name.partition(".")[0]):
            model.load_prompts(path, clip)


def test_published_pickle_is_read_without_running_it(clip, learner: PromptLearner, tmp_path: Path) -> None:
    dead = {f"compound_prompt_projections.{i}.weight": torch.zeros(9, 32) for i in range(2)}
    torch.save({"prompt_learner": dict(learner.state_dict()) | dead}, tmp_path / "epoch_15.pth")
    assert torch.equal(model.load_prompts(tmp_path / "epoch_15.pth", clip).ctx_neg, learner.ctx_neg)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"prompt_learner": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        model.load_prompts(tmp_path / "evil.pth", clip)
    assert not (tmp_path / "ran").exists()


def test_predictions_are_those_of_the_detector(dataset, clip, learner, ours: detector.Detector, tmp_path: Path) -> None:
    options = {"alpha": 0.2, "profile": "mini", "trained_on": "nothing"}
    result = detector.predict(ours, dataset, tmp_path / "results" / "anomalyclip", **options)
    assert [p.sample for p in result.predictions] == list(dataset.select(split="test"))
    for prediction in result.predictions:
        scores, maps = ours.detect(ours.preprocess(images.load_image(prediction.sample.image_path))[None])
        assert prediction.anomaly_score == pytest.approx(scores[0], abs=1e-6) and prediction.seconds > 0
        np.testing.assert_allclose(result.anomaly_map(prediction), maps[0], atol=1e-3)
        known = result.manifest["calibration"][prediction.sample.category]
        assert (known["n"], known["n_sources"]) == (10, 10), "genuine pictures of both splits outside the test"
        assert prediction.threshold == conformal_threshold(known["scores"], 0.2)
    assert result.manifest["settings"]["taps"] == [4] and result.manifest["settings"]["first_dual_block"] == 1
    other = model.as_bytes(PromptLearner(clip.model, clip.tokenizer))
    files.write_bytes(tmp_path / "weights/anomalyclip/a/model.safetensors", other)
    with pytest.raises(FileNotFoundError, match="04_anomalyclip"):
        detector.load(tmp_path, clip)
    files.write_bytes(tmp_path / "checkpoints/anomalyclip/b/prompts.safetensors", model.as_bytes(learner))
    shown = [images.load_image(prediction.sample.image_path) for prediction in result.predictions]
    again = detector.load(tmp_path, clip)("tower", shown)
    assert [one.anomaly_score for one in again] == pytest.approx([p.anomaly_score for p in result.predictions], 1e-5)
    left = tuple(s for s in dataset.samples if s.category == "tower" or s.split == "test")
    with pytest.raises(ValueError, match="garden has no genuine picture"):
        detector.predict(ours, replace(dataset, samples=left), tmp_path, **options)


def test_pictures_under_test_are_not_trained_on(dataset, auxiliary: list[Sample], tmp_path: Path) -> None:
    training.check_auxiliary(auxiliary, dataset)
    shown = dataset.select(split="test")[0]
    unseen = write_pictures(tmp_path, "tower", seed=55)[0]
    images.save_png(tmp_path / "copy.png", np.kron(images.load_image(shown.image_path), np.ones((3, 3, 1), np.uint8)))
    resized = Sample(tmp_path / "copy.png", "other", False, split="train", group="copy")
    same_source = replace(auxiliary[0], group=dataset.samples[0].group)
    for wrong in (replace(shown, category="other", group="x"), unseen, resized, same_source):
        with pytest.raises(ValueError, match="under test"):
            training.check_auxiliary([*auxiliary, wrong], dataset)


def test_every_second_view_is_damaged_and_pictures_keep_to_one_split(tmp_path: Path, monkeypatch) -> None:
    options = {"n_views": 2, "max_side": 48, "limit": 1, "kinds": ("box", "line")}
    made = training.auxiliary_samples("packages", tmp_path, seed=3, **options)
    assert sum(sample.is_anomalous for sample in made) == len(made) / 2
    assert {sample.kind for sample in made} == {"good", "box", "line"}
    groups = [{s.group for s in made if s.split == split} for split in ("train", "calibration")]
    assert all(groups) and not groups[0] & groups[1]
    for sample in made:
        assert bool(data.mask_of(sample, images.load_image(sample.image_path).shape[:2]).any()) == sample.is_anomalous
    assert len({sample.sha256 for sample in made}) == len(made), "views differ"
    monkeypatch.setattr(images, "save_png", None)  # writing anything would fail
    assert training.auxiliary_samples("packages", tmp_path, seed=3, **options) == made
    with pytest.raises(TypeError):
        training.auxiliary_samples("packages", tmp_path, seed=4, **options)
    with pytest.raises((FileNotFoundError, data.DatasetError), match="nowhere"):
        training.auxiliary_samples("nowhere", tmp_path, seed=3, **options)


def test_missing_masks_are_known_as_missing_and_small_ones_stay(clip, auxiliary: list[Sample], tmp_path: Path) -> None:
    mask = np.zeros((1500, 1500), bool)
    mask[700:702, 700:702] = True
    images.save_png(tmp_path / "mask.png", mask)
    anomalous = next(sample for sample in auxiliary if sample.is_anomalous)
    samples = [auxiliary[0], replace(anomalous, mask_path=None), replace(anomalous, mask_path=tmp_path / "mask.png")]
    features = training.tower_features(clip, samples, tmp_path / "cache")
    rows = [features[i] for i in range(3)]
    assert [bool(row["has_mask"]) for row in rows] == [True, False, True] and rows[2]["mask"].sum() > 0
    text = F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    known, two = (training.prompt_losses(text, torch.utils.data.default_collate(rows[:n])) for n in (1, 2))
    for name in ("focal", "dice_abnormal", "dice_normal"):
        torch.testing.assert_close(two[name], known[name] / 2)
    assert two["image"] != known["image"], "the image loss counts both"


def test_training_learns_keeps_the_best_and_is_found_again(tmp_path: Path, clip, auxiliary, monkeypatch) -> None:
    def train(samples: list[Sample], folder: str, n_epochs: int = 6) -> tuple:
        places = {"folder": tmp_path / folder, "features_dir": tmp_path / "cache"}
        return training.train_prompts(clip, samples, n_epochs=n_epochs, **places)

    monkeypatch.setattr(training, "LEARNING_RATE", 2e-2)
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    own, tuning, history = train(auxiliary, "prompts")
    start = PromptLearner(clip.model, clip.tokenizer)
    chosen, scores = training.choose_prompts({"published": start, "own": own}, clip, tuning)
    assert chosen == "own" and scores["own"] > scores["published"] + 0.1
    assert scores["own"] == pytest.approx(max(row["score"] for row in history if "score" in row), abs=1e-6)
    assert training.choose_prompts({"published": start}, clip, tuning, row="published")[0] == "published"
    with pytest.raises(ValueError, match="there are published"):
        training.choose_prompts({"published": start}, clip, tuning, row="mvtec")
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.model.state_dict().items())
    (path,) = tmp_path.glob("prompts/*/prompts.safetensors")
    again, _, same = train(auxiliary, "prompts")
    hashes = {model.prompts_hash(one) for one in (own, again, model.load_prompts(path, clip))}
    assert len(hashes) == 1 and same == history
    assert train(auxiliary, "prompts", n_epochs=0)[0] is None
    with pytest.raises(ValueError):  # tuning needs both labels
        train([s for s in auxiliary if not s.is_anomalous], "normal")
    monkeypatch.setattr(training, "_LAMBDA", math.nan)
    with pytest.raises(TrainingStopped):
        train(auxiliary, "nan")
