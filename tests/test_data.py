"""Bad files, copies, manifests and frozen datasets, on real files in the public folder layouts."""

import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pictures import MARKED, SHAPE, mask, picture, put, tree

from helpers import data
from helpers.data import images
from helpers.records import Sample


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    parts = ["train/good 4", "test/good 2", "test/box 3", "test/replica 1", "ground_truth/box m3"]
    for number, category in enumerate(("mona_lisa", "pearl_earring")):
        tree(tmp_path / "sets" / category, *parts, start=100 * number)
    return tmp_path / "sets"


def by_kind(samples: Sequence[Sample]) -> dict[str, int]:
    return Counter(f"{sample.category}/{sample.split}/{sample.kind}" for sample in samples)


def info(manifest_csv: Path) -> dict:
    return json.loads((manifest_csv.parent / "manifest.json").read_text())


def test_a_folder_becomes_a_dataset(mvtec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.build_manifest(mvtec) == mvtec / "manifest.csv"
    dataset = data.open_dataset(mvtec)
    parts = {"train/good": 4, "test/good": 2, "test/box": 3, "test/replica": 1}
    assert by_kind(dataset.samples) == {f"{c}/{part}": n for c in dataset.categories for part, n in parts.items()}
    boxes = dataset.select(kind="box")
    assert len(boxes) == 6 and all(data.mask_of(sample).sum() == MARKED for sample in boxes)
    assert [data.mask_of(sample) for sample in dataset.select(kind="replica")] == [None, None]
    assert not data.mask_of(dataset.select(split="train")[0], (5, 6)).any()
    assert len(dataset.select()) == 20
    assert len(dataset.select(split="test", is_anomalous=False, category="mona_lisa")) == 2
    with pytest.raises(ValueError, match="there are mona_lisa"):
        dataset.select(category="monalisa")
    moved = data.open_dataset(shutil.move(mvtec, mvtec.with_name("moved")))
    assert moved.hash == dataset.hash and all(s.image_path.is_relative_to(moved.folder) for s in moved.samples)
    words = capsys.readouterr().out
    assert re.search(r"test +box +3 +3\n +good +2 +0\n +replica +1 +0", words)


def test_bad_files_are_listed_and_stop_nothing(mvtec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, box = mvtec / "mona_lisa" / "train" / "good", mvtec / "mona_lisa" / "ground_truth" / "box"
    (good / "zero.png").write_bytes(b"")
    (good / "cut.png").write_bytes((good / "000.png").read_bytes()[:900])
    (good / "broken_link.png").symlink_to("nowhere.png")
    shutil.copy(good / "000.png", os.fsencode(good) + b"/latin_\xe9.png")
    (box / "000.png").write_bytes(b"broken")
    put(box / "001.png", np.zeros(SHAPE, np.uint8))
    put(box / "002.png", mask(shape=(44, 30)))
    written = data.build_manifest(mvtec)
    samples = data.load_manifest(written)
    assert by_kind(samples)["mona_lisa/train/good"] == 4
    assert all(s.mask_path is None for s in samples if s.category == "mona_lisa")  # pictures stay, masks go
    reasons = {"zero.png": "0 bytes", "cut.png": "cannot be read", "latin_?.png": "not valid UTF-8"}
    reasons |= {"broken_link.png": "link to nothing", "000.png": "cannot be read"}
    reasons |= {"001.png": "mask is empty", "002.png": "proportions"}
    listed = {Path(entry["path"]).name: entry["reason"] for entry in info(written)["left_out"]}
    assert set(listed) == set(reasons) and all(words in listed[name] for name, words in reasons.items())
    assert "Files left out: 7" in capsys.readouterr().out


def test_what_was_noticed_in_files_is_said_once(mvtec: Path) -> None:
    base = mvtec / "mona_lisa"
    turned = Image.Exif()
    turned[0x112] = 6
    for name in ("a", "b"):
        put(base / "train" / "good" / f"{name}.tif", picture(ord(name))[..., 0].astype(np.uint16) * 16)
    put(base / "test" / "box" / "000.jpg", picture(7), exif=turned)
    (base / "test" / "box" / "000.png").unlink()
    put(base / "ground_truth" / "box" / "001.png", 255 - mask())
    put(base / "ground_truth" / "box" / "002.png", mask()[::2, ::2])
    reading = data.read_folder(mvtec)
    notes = reading.describe()
    for words in ("a.tif, b.tif: its values fill 12 of 16", "000.jpg: drawn before", "001.png: more than half"):
        assert words in notes
    box = [s for s in reading.samples if (s.category, s.kind) == ("mona_lisa", "box")]
    assert all(s.mask_path for s in box)
    upright = images.load_image(box[0].image_path).shape[:2]
    assert upright == SHAPE[::-1] and (data.mask_of(box[0], upright) == np.rot90(mask() > 0, -1)).all()


@pytest.mark.parametrize("place", ["test/good", "validation/good", "test/box"])
def test_one_file_in_two_splits_or_with_two_labels_is_refused(mvtec: Path, place: str) -> None:
    base = mvtec / "mona_lisa"
    (base / place).mkdir(parents=True, exist_ok=True)
    original = base / ("test/good" if place == "test/box" else "train/good") / "001.png"
    shutil.copy(original, base / place / "copy.png")
    with pytest.raises(data.DatasetError, match=r"(?s)001\.png \(.*copy\.png \(.*Delete one"):
        data.build_manifest(mvtec)
    assert not (mvtec / "manifest.csv").exists()


def test_copies_in_one_split_or_of_another_artwork_are_reported(mvtec: Path) -> None:
    good, other = mvtec / "mona_lisa" / "train" / "good", mvtec / "pearl_earring" / "test" / "other_painting"
    other.mkdir()
    shutil.copy(good / "001.png", good / "again.png")
    shutil.copy(good / "002.png", other / "wrong.png")  # another painting is a fair anomaly
    reading = data.read_folder(mvtec)
    notes = reading.describe()
    assert re.search(r"001\.png.* = .*again\.png.*, .*002\.png.* = .*wrong\.png.* more than once", notes)
    assert "one scan" not in notes  # copies of two artworks are not one scan in two splits
    groups = {s.image_path.name: s.group for s in reading.samples if s.image_path.parent == good}
    assert groups["001.png"] == groups["again.png"] != groups["002.png"]


@pytest.mark.parametrize("size, gain, suffix", [((400, 280), 1, ".jpg"), ((100, 70), 0.8, ".png"), (None, 1, ".jpg")])
def test_near_duplicates_across_splits_share_a_group(mvtec: Path, size: tuple, gain: float, suffix: str) -> None:
    base, scan = mvtec / "mona_lisa", picture(77, (140, 200))
    put(base / "train" / "good" / "002.png", scan)
    photo = np.asarray(Image.fromarray(scan).resize(size)) if size else scan[3:-3, 4:-4]  # a crop of 2 % a side
    put(base / "test" / "good" / f"photo{suffix}", (photo * gain).astype(np.uint8))
    reading = data.read_folder(mvtec)
    assert re.search(rf"002\.png.* = .*photo\{suffix}.*: one scan in two splits", reading.describe())
    groups = {f"{s.split}/{s.image_path.name}": s.group for s in reading.samples if s.category == "mona_lisa"}
    assert groups["train/002.png"] == groups[f"test/photo{suffix}"]
    frozen = data.open_dataset(data.build_manifest(mvtec).parent)
    assert "optimistic" in frozen.limits["mona_lisa"] and set(frozen.limits) == {"mona_lisa"}


def test_pictures_of_one_colour_or_of_a_fixed_camera_are_no_copies(mvtec: Path) -> None:
    for place, grey in (("train/good/black.png", 0), ("test/good/grey.png", 90)):
        put(mvtec / "mona_lisa" / place, np.full((20, 20, 3), grey, np.uint8))
    assert "one scan" not in data.read_folder(mvtec).describe()
    rng = np.random.default_rng(0)
    for index in range(12):
        noise = rng.normal(0, 1, (72, 96, 3))
        put(mvtec / "belt" / f"{index}.png", np.clip(picture(1, (72, 96)) + noise, 0, 255).astype(np.uint8))
    reading = data.read_folder(mvtec / "belt")
    assert len({s.group for s in reading.samples}) == 12
    assert "look the same" in reading.describe()


def test_round_trip_keeps_every_field(mvtec: Path, tmp_path: Path) -> None:
    odd = put(tmp_path / "out" / 'with "quotes", comma é.png', picture(999))
    seen = {"visibility": 0.1 + 0.2, "synthesis_seed": 2**63}
    samples = [*data.read_folder(mvtec).samples, Sample(odd, "ünï, códe", True, None, "test", "swap", "g,1", **seen)]
    path = data.write_manifest(tmp_path / "out", samples, info={"made_by": "test"})
    loaded, text, about = data.load_manifest(path), path.read_text(), info(path)
    assert loaded == [*samples[:-1], replace(samples[-1], sha256=loaded[-1].sha256)] and len(loaded[-1].sha256) == 64
    assert '"with ""quotes"", comma é.png"' in text and str(mvtec) in text  # relative below the manifest, else absolute
    assert about["made_by"] == "test" and about["dataset_hash"] == data.dataset_hash(loaded)


CHANGES = {"sha256": "0" * 64, "category": "other", "split": "calibration", "kind": "line", "mask_path": None}
CHANGES |= {"group": "other", "is_anomalous": False}


def test_the_hash_sees_every_meaningful_change(mvtec: Path) -> None:
    samples = list(data.read_folder(mvtec).samples)
    reference = data.dataset_hash(samples)
    assert data.dataset_hash(random.Random(0).sample(samples, len(samples))) == reference
    box = next(i for i, s in enumerate(samples) if s.kind == "box")
    for name, value in CHANGES.items():
        changed = {name: value, **({"kind": "good"} if name == "is_anomalous" else {})}
        assert data.dataset_hash([*samples[:box], replace(samples[box], **changed), *samples[box + 1 :]]) != reference
    assert data.dataset_hash(samples[1:]) != reference
    put(samples[box].mask_path, mask(129))
    assert data.dataset_hash(samples) != reference  # the mask file itself


def test_open_dataset_notices_what_changed(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="notebook 02"):
        data.open_dataset(mvtec)
    written = data.build_manifest(mvtec)
    text = written.read_text()
    written.write_text(text.replace("test,False,good", "train,False,good", 1))
    with pytest.raises(data.DatasetError, match="changed after it was frozen"):
        data.open_dataset(mvtec)
    written.write_text(text)
    (mvtec / "mona_lisa" / "test" / "good" / "000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files .* gone.*000\.png"):
        data.open_dataset(mvtec)
    samples = data.read_folder(mvtec).samples
    with pytest.raises(data.DatasetError, match="No pictures"):
        data.write_manifest(mvtec, [])
    monkeypatch.setattr("helpers.files.write_json", lambda *_: 1 / 0)  # stopped before the mark
    with pytest.raises(ZeroDivisionError):
        data.write_manifest(mvtec, samples[:3])
    with pytest.raises(FileNotFoundError, match="notebook 02"):
        data.open_dataset(mvtec)


def test_a_source_picture_in_two_splits_needs_a_limit(mvtec: Path) -> None:
    mine = [replace(s, group="scan") if s.category == "mona_lisa" else s for s in data.read_folder(mvtec).samples]
    data.write_manifest(mvtec, mine)
    with pytest.raises(data.DatasetError, match="in two splits: .*mona_lisa"):
        data.open_dataset(mvtec)
    about = {"limits": {"mona_lisa": "One genuine picture."}, "kinds_held_out": ["box"]}
    data.write_manifest(mvtec, mine, info=about)
    dataset = data.open_dataset(mvtec)
    assert dataset.limits == about["limits"] and dataset.kinds_held_out == ("box",)


BROKEN = [("is_anomalous", "label", "is_anomalous"), (",True,", ",maybe,", r"row \d+: 'maybe'")]
BROKEN += [(",train,", ",trian,", "split is 'trian'")]


@pytest.mark.parametrize("right, wrong, words", BROKEN)
def test_broken_manifests_are_refused_in_words(mvtec: Path, right: str, wrong: str, words: str) -> None:
    written = data.build_manifest(mvtec)
    written.write_text(written.read_text().replace(right, wrong, 1))
    with pytest.raises(data.DatasetError, match=words):
        data.load_manifest(written)


def test_a_second_call_reads_new_pictures_but_frozen_and_foreign_manifests_stay(mvtec: Path) -> None:
    (mvtec / "manifest.csv").write_text("name,price\nx,3\n")
    with pytest.raises(data.DatasetError, match="is left as it is"):
        data.build_manifest(mvtec)
    (mvtec / "manifest.csv").unlink()
    data.build_manifest(mvtec)  # a manifest of ours is no table of the user's
    put(mvtec / "mona_lisa" / "train" / "good" / "new.png", picture(4000))
    samples = data.load_manifest(data.build_manifest(mvtec))
    assert len(samples) == 21
    frozen = data.write_manifest(mvtec, samples, info={"made_by": "02_synthesize_anomalies"}).read_bytes()
    with pytest.raises(data.DatasetError, match="is left as it is"):
        data.build_manifest(mvtec)
    assert (mvtec / "manifest.csv").read_bytes() == frozen
