"""Feedback: what is written is read, test pictures are refused, learning is measured on the frozen test set."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_anomalygpt
import tiny_chat
import tiny_clip
import tiny_dataset
from sklearn.base import clone

from helpers.anomalygpt import pairs
from helpers.chat import feedback
from helpers.clip import features, methods, one_class
from helpers.data import images

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def record(path: Path, image: np.ndarray = IMAGE, **changes) -> feedback.Entry:
    return feedback.record(path, image, **({"verdict": "correct", "label": "normal"} | changes))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    log, file = tmp_path / "feedback.jsonl", tmp_path / "a.png"
    images.save_png(file, IMAGE)
    first = record(log, image_path=file, comment="line\nbreak \u2028 🎨", context={"category": "one"})
    second = record(log, label="anomalous", region="top left", keep_image=True)
    entries, skipped = feedback.read(log)
    assert entries == [first, second] and skipped == [] and first.name == "a.png"
    kept = tmp_path / feedback.PICTURES / second.kept_picture
    np.testing.assert_array_equal(images.load_image(kept), IMAGE)
    assert feedback.read(tmp_path / "none.jsonl") == ([], [])


def test_values_that_are_not_allowed(tmp_path: Path) -> None:
    for changes in (
        {"verdict": "maybe"}, {"label": "fake"}, {"region": "middle", "label": "anomalous"}, {"region": "top"},
        {"comment": "x" * 10_001}, {"context": {"score": float("nan")}},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            record(tmp_path / "feedback.jsonl", **changes)
    assert not (tmp_path / "feedback.jsonl").exists()


def test_torn_and_foreign_lines_are_named_and_stay(tmp_path: Path) -> None:
    log = tmp_path / "feedback.jsonl"
    record(log)
    with open(log, "ab") as file:
        file.write(b'[1]\n{"verdict": "correct"}\n{"pixels_sha')
    record(log)
    entries, skipped = feedback.read(log)
    assert len(entries) == 2 and [words.split()[1] for words in skipped] == ["2", "3", "4"]


def test_the_confirmed_label() -> None:
    for verdict, label, predicted, expected in (
        ("correct", None, True, True),
        ("wrong", None, True, False),
        ("wrong", "anomalous", True, True),
        ("unsure", "anomalous", True, None),
        ("correct", None, None, None),
    ):
        context = {} if predicted is None else {"is_predicted_anomalous": predicted}
        assert feedback.Entry("x", verdict, label, context=context).is_anomalous is expected


def test_test_pictures_are_refused_in_every_disguise(tmp_path: Path) -> None:
    dataset, log = tiny_dataset.write_dataset(tmp_path / "data"), tmp_path / "log" / "feedback.jsonl"
    shown, known = dataset.select(split="test")[0], dataset.select(split="train")[0]
    picture = images.load_image(shown.image_path)
    other = tmp_path / "same_pixels.tiff"
    images.Image.fromarray(picture).save(other)
    context = {"category": "one"}
    record(log, picture, image_path=shown.image_path, context=context)
    record(log, picture[::2], image_path=other, context=context)  # judged at another size than its file has
    record(log, IMAGE, context=context | {"group": shown.group}, keep_image=True)
    record(log, images.load_image(known.image_path), image_path=known.image_path, context=context)
    record(log, IMAGE[:10], context=context)
    record(log, IMAGE[:12], keep_image=True, context={"category": "unknown"})
    record(log, IMAGE[:14], keep_image=True, context=context, label="anomalous")
    record(log, IMAGE[:14], keep_image=True, context=context, label="normal")
    confirmed, refused, unused = feedback.sort_out(log, dataset)
    assert len(refused) == 3 and len(unused) == 3
    (one,) = confirmed
    assert not one.is_anomalous and one.category == "one", "the last judgement counts"
    np.testing.assert_array_equal(one.picture, IMAGE[:14])


def test_a_log_is_not_trusted_with_paths(tmp_path: Path) -> None:
    dataset, log = tiny_dataset.write_dataset(tmp_path / "data"), tmp_path / "log" / "feedback.jsonl"
    images.save_png(tmp_path / "secret.png", IMAGE)
    entry = record(log, context={"category": "one"}, keep_image=True)
    line = json.loads(log.read_text()) | {"kept_picture": "../../secret.png", "pixels_sha256": "f" * 64}
    log.write_text(json.dumps(line) + "\n")
    assert feedback.sort_out(log, dataset)[0] == [] and entry.kept_picture


def test_the_threshold_moves_into_the_gap_but_not_beyond_its_limits() -> None:
    normals = np.arange(1.0, 41.0)
    assert feedback.feedback_threshold(normals, np.array([60.0] * 4), alpha=0.05) == 39.0, "too few to move anything"
    assert feedback.feedback_threshold(normals, np.full(9, 38.0), alpha=0.05) == 37.5
    assert feedback.feedback_threshold(normals, np.full(9, 5.0), alpha=0.05) == 37.0, "at most 10 % false alarms"
    assert feedback.feedback_threshold(normals, np.full(9, 99.0), alpha=0.05) == 39.0


def test_clip_detectors_learn_and_are_measured_on_the_test_set(tmp_path: Path) -> None:
    dataset = tiny_clip.write_dataset(tmp_path / "data")
    models = features.Models(tiny_clip.clip(), tiny_clip.cnn(), tmp_path / "cache")
    embedded = features.embed_samples(dataset.samples, models)
    learn_from = methods.learning_rows(dataset, embedded, models, n_anomalies=0, seed=0)
    log = tmp_path / "feedback" / "simulated.jsonl"
    feedback.simulate_user(log, dataset, n_pictures=12, seed=0)
    entries, _ = feedback.read(log)
    assert len(entries) == 12 * len(dataset.categories) and {entry.is_anomalous for entry in entries} == {True, False}
    confirmed, refused, _ = feedback.sort_out(log, dataset)
    assert len(confirmed) == len(entries) and refused == []
    detector = one_class.DETECTORS["clip_resnet50"]
    fitted = {c: SimpleNamespace(detector=clone(detector).fit(rows)) for c, rows in learn_from.items()}
    loaded = {"clip_resnet50": SimpleNamespace(detectors=fitted)}
    known = {c: {"scores": fitted[c].detector.score(rows.features).tolist()} for c, rows in learn_from.items()}
    result = SimpleNamespace(manifest={"calibration": known})
    found = SimpleNamespace(dataset=dataset, results={"clip_resnet50": result})
    table = feedback.teach_clip(found, loaded, learn_from, confirmed, models, alpha=0.2, seed=0)
    assert list(table.index) == ["CLIP + CNN similarity"] and table["p_holm"].between(0, 1).all()
    nothing = feedback.teach_clip(found, loaded, learn_from, [], models, alpha=0.2, seed=0)
    assert (nothing["balanced accuracy before"] == nothing["after"]).all() and (nothing["p"] == 1).all()
    assert (nothing["balanced accuracy before"] == table["balanced accuracy before"]).all()


def test_the_head_of_anomalygpt_learns_and_other_feedback_is_another_run(tmp_path: Path) -> None:
    model = tiny_anomalygpt.talker()
    dataset, log = tiny_anomalygpt.write_dataset(tmp_path / "data"), tmp_path / "feedback.jsonl"
    feedback.simulate_user(log, dataset, n_pictures=2, seed=1)
    confirmed, _, _ = feedback.sort_out(log, dataset)
    settings = pairs.HeadTraining(n_epochs=1, batch_size=4, max_pairs=4, n_tuning=0, wording="short")
    about = {"settings": settings, "evaluation": tiny_chat.SETTINGS}
    before = model.head.prompt_learner.base_prompts.clone()
    table = feedback.teach_anomalygpt(model, dataset, confirmed, folder=tmp_path / "head", **about)
    assert table.index.tolist() == ["AnomalyGPT's words"] and 0 < table["p"].item() <= 1
    assert not before.equal(model.head.prompt_learner.base_prompts)
    feedback.teach_anomalygpt(model, dataset, confirmed[:2], folder=tmp_path / "head", **about)
    assert len(list(tmp_path.glob("head/*/model.safetensors"))) == 2
