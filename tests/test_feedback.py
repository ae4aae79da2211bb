"""The feedback file: what is written, what survives, what is refused, and which judgements may be learnt from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_comparison as tiny

from helpers import files as journal
from helpers import files as storage
from helpers.chat import _old_clip_features as features
from helpers.chat import feedback
from helpers.data import images
from helpers.data import manifest as data

WRITER = """
import sys
from pathlib import Path
from helpers import files as journal
for i in range(60):
    journal.append_line(Path(sys.argv[1]), sys.argv[2] * 3000 + f" {i}", header="header")
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> data.Dataset:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


def judge(path: Path, image: np.ndarray | None = None, **changes) -> dict:
    values = {"image_path": None, "verdict": "wrong", "label": "anomalous", "region": 4, "comment": "a scratch"}
    values |= {"context": {"category": "harbour", "is_predicted_anomalous": False}} | changes
    return feedback.record(path, image=tiny.picture(90) if image is None else image, **values)


def saved(folder: Path, seed: int) -> tuple[Path, np.ndarray]:
    path = folder / f"upload_{seed}.png"
    images.save_png(path, tiny.picture(seed))
    return path, tiny.picture(seed)


# ------------------------------------------------------------------------------------------------- the file


def test_a_judgement_comes_back_as_it_was_given(tmp_path):
    path = tmp_path / "deep" / "feedback.jsonl"
    comment = 'ärgerlich <script>"x"</script>\n\u2028 🎨 الفن'
    line = judge(path, comment=comment, context={"category": "harbour", "score": 0.25, "question": "?"})
    log = feedback.read(path)
    (entry,) = log.entries
    assert (entry.verdict, entry.label, entry.region, entry.comment) == ("wrong", "anomalous", 4, comment)
    assert entry.context == {"category": "harbour", "score": 0.25, "question": "?"}
    assert entry.pixels_sha256 == line["pixels_sha256"] == features.image_id(tiny.picture(90))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    assert "1 judgements (0 correct, 1 wrong, 0 unsure) on 1 pictures" in log.describe()


def test_the_picture_is_kept_only_when_allowed(tmp_path):
    path = tmp_path / "feedback.jsonl"
    judge(path)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == ["feedback.jsonl"]
    judge(path, tiny.picture(91), keep_image=True)
    log = feedback.read(path)
    assert feedback.picture_of(log.entries[0], log) is None
    np.testing.assert_array_equal(feedback.picture_of(log.entries[1], log)[1], tiny.picture(91))


def test_a_file_that_changed_since_is_not_the_picture_that_was_judged(tmp_path):
    path, picture = saved(tmp_path, 92)
    judge(tmp_path / "log.jsonl", picture, image_path=path)
    log = feedback.read(tmp_path / "log.jsonl")
    found, pixels = feedback.picture_of(log.entries[0], log)
    assert found == path
    np.testing.assert_array_equal(pixels, picture)
    images.save_png(path, tiny.picture(93))
    assert feedback.picture_of(log.entries[0], log) is None


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_reported_kept_and_left_apart_from_the_next(tmp_path, cut):
    path = tmp_path / "feedback.jsonl"
    judge(path, tiny.picture(1))
    whole = path.read_bytes()
    judge(path, tiny.picture(2))
    torn = path.read_bytes()[: len(whole) + cut]
    path.write_bytes(torn)
    log = feedback.read(path)
    assert len(log.entries) == 1
    assert log.skipped == (f"the last line is torn ({cut} bytes): its writer was stopped",)
    judge(path, tiny.picture(3))
    log = feedback.read(path)
    assert [entry.pixels_sha256 for entry in log.entries] == [features.image_id(tiny.picture(i)) for i in (1, 3)]
    assert log.skipped == (f"line 2 is torn ({cut} bytes): its writer was stopped",)
    assert path.read_bytes().startswith(torn)
    assert "left out: line 2" in log.describe()


def test_a_character_cut_in_half_is_a_torn_line(tmp_path):
    path = tmp_path / "feedback.jsonl"
    judge(path, comment="ä")
    path.write_bytes(path.read_bytes()[: path.read_bytes().index("ä".encode()) + 1])
    log = feedback.read(path)
    assert not log.entries
    assert "torn" in log.skipped[0]


def test_two_sessions_lose_nothing(tmp_path):
    path = tmp_path / "log.txt"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    header, *lines = path.read_text().splitlines()
    assert header == "header"
    assert sorted(lines) == sorted(f"{letter * 3000} {i}" for letter in "ab" for i in range(60))


def test_a_busy_file_is_waited_for_and_then_named(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".log.txt.lock"), pytest.raises(TimeoutError, match="log.txt"):
        journal.append_line(tmp_path / "log.txt", "x")


def test_a_line_is_one_line(tmp_path):
    for line in ("a\nb", "a\n", "a\rb"):
        with pytest.raises(ValueError, match="line break"):
            journal.append_line(tmp_path / "log.txt", line)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_version_is_named_and_not_added_to(tmp_path, version):
    path = tmp_path / "feedback.jsonl"
    path.write_text(json.dumps({"schema": version}) + "\n")
    for use in (feedback.read, judge):
        with pytest.raises(ValueError, match=f"Line 1 .* format version {version!r}; .* version 1"):
            use(path)
    assert path.read_text() == json.dumps({"schema": version}) + "\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"verdict": "maybe"}, "The verdict is 'maybe'"),
        ({"region": 9}, "The region is 9"),
        ({"comment": None}, "A comment is a text"),
        ({"context": []}, "context of the wrong type"),
        ({"image_path": 3}, "image_path of the wrong type"),
    ],
)
def test_a_line_that_is_no_judgement_is_reported(tmp_path, change, reason):
    path = tmp_path / "feedback.jsonl"
    line = judge(path)
    path.write_text(json.dumps(line | change) + "\n[1]\n" + json.dumps(line) + "\n")
    log = feedback.read(path)
    assert len(log.entries) == 1
    assert reason in log.skipped[0]
    assert "line 2 is no judgement: it holds list" in log.skipped[1]
    del line["verdict"]
    path.write_text(json.dumps(line))
    assert "verdict missing" in feedback.read(path).skipped[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "yes"}, "correct, wrong, unsure"),
        ({"label": "damaged"}, "normal, anomalous"),
        ({"region": 9}, "0 to 8"),
        ({"region": -1}, "0 to 8"),
        ({"region": True}, "0 to 8"),
        ({"label": "normal", "region": 2}, "Clear one"),
        ({"comment": "x" * 10_001}, "10,000"),
        ({"context": {"score": float("nan")}}, "JSON"),
        ({"context": {"score": np.zeros(2)}}, "JSON"),
        ({"image": np.zeros((4, 4))}, "uint8 RGB"),
    ],
)
def test_what_may_not_be_written_is_refused_before_anything_is(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        judge(tmp_path / "feedback.jsonl", **change)
    assert not (tmp_path / "feedback.jsonl").exists()


@pytest.mark.parametrize(
    ("verdict", "label", "predicted", "expected"),
    [
        ("correct", None, True, True),
        ("correct", None, False, False),
        ("wrong", None, False, True),
        ("wrong", "normal", True, False),
        ("correct", "anomalous", None, True),
        ("wrong", None, None, None),
        ("unsure", "normal", True, None),
    ],
)
def test_confirmed_label(tmp_path, verdict, label, predicted, expected):
    context = {"is_predicted_anomalous": predicted}
    judge(tmp_path / "log", verdict=verdict, label=label, region=None, context=context)
    assert feedback.read(tmp_path / "log").entries[0].is_anomalous is expected


# ------------------------------------------------------------------------------------------------- what may be used


def test_test_pictures_are_refused_by_file_by_pixels_and_by_group(dataset, tmp_path):
    path = tmp_path / "log.jsonl"
    test = dataset.select(split="test", category="harbour")
    # Judged at another size than the file has, and refused before its label is asked for.
    judge(path, tiny.picture(70), image_path=test[0].image_path, verdict="unsure", region=None)
    judge(path, images.load_image(test[1].image_path))
    upload, picture = saved(tmp_path, 80)
    judge(path, picture, image_path=upload, context={"category": "harbour", "group": test[2].group})
    copy = tmp_path / "copy.bmp"
    from PIL import Image

    Image.fromarray(images.load_image(test[3].image_path)).save(copy)
    judge(path, tiny.picture(71), image_path=copy)
    found = feedback.sort_out(feedback.read(path), dataset)
    assert not found.confirmed
    assert not found.unused
    for sentence, sample in zip(found.refused, (test[0], test[1], None, test[3]), strict=True):
        assert sample is None or f"is the test picture {sample.image_path.name} of harbour" in sentence
    assert f"upload_80.png stems from the same source as test pictures of harbour: {test[2].group}" in found.refused[2]


def test_a_free_picture_is_confirmed_with_its_last_judgement(dataset, tmp_path):
    path = tmp_path / "log.jsonl"
    upload, picture = saved(tmp_path, 81)
    judge(path, picture, image_path=upload, label="normal", region=None)
    judge(path, picture, image_path=upload)
    (one,) = feedback.sort_out(feedback.read(path), dataset).confirmed
    assert one.is_anomalous
    assert one.category == "harbour"
    assert one.group.startswith("feedback/")
    np.testing.assert_array_equal(one.picture, picture)
    judge(path, picture, image_path=upload, verdict="unsure", region=None)
    found = feedback.sort_out(feedback.read(path), dataset)
    assert not found.confirmed
    assert "no label was confirmed" in found.unused[0]


def test_what_teaches_nothing_is_listed_with_its_reason(dataset, tmp_path):
    path = tmp_path / "log.jsonl"
    train = dataset.select(split="train", category="harbour")
    for sample, label in zip(train, ("normal", "anomalous")):
        picture = images.load_image(sample.image_path)
        judge(path, picture, image_path=sample.image_path, label=label, region=None)
    judge(path, tiny.picture(82))
    judge(path, tiny.picture(83), context={"category": "sunflowers"})
    found = feedback.sort_out(feedback.read(path), dataset)
    assert not found.confirmed
    assert not found.refused
    expected = ("of split train already", "the dataset has it as good", "was not kept", "its artwork is 'sunflowers'")
    for sentence, words in zip(found.unused, expected, strict=True):
        assert words in sentence


def test_a_log_cannot_name_pictures_outside_its_folder(tmp_path):
    images.save_png(tmp_path / "secret.png", tiny.picture(84))
    path = tmp_path / "logs" / "log.jsonl"
    judge(path, tiny.picture(84))
    line = json.loads(path.read_text())
    storage.write_text(path, json.dumps(line | {"kept_picture": "../../secret.png"}) + "\n")
    log = feedback.read(path)
    assert feedback.picture_of(log.entries[0], log) is None


def test_a_kept_picture_that_was_exchanged_is_not_used(tmp_path):
    line = judge(tmp_path / "log.jsonl", keep_image=True)
    images.save_png(tmp_path / line["kept_picture"], tiny.picture(85))
    log = feedback.read(tmp_path / "log.jsonl")
    assert feedback.picture_of(log.entries[0], log) is None


def test_a_missing_file_is_an_empty_log(tmp_path):
    log = feedback.read(tmp_path / "none.jsonl")
    assert log.entries == log.skipped == ()
