"""Layouts, labels, bad files, duplicates and manifests, on real files in the public folder layouts."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.data import images, layouts
from helpers.data import manifest as data
from helpers.records import SPLITS, Sample


def draw(path: Path, seed: int, *, marked: bool = False) -> Path:
    """A picture that looks unlike those of other seeds: a smooth random landscape, 30 x 44 pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    picture = cv2.resize(coarse, (44, 30), interpolation=cv2.INTER_CUBIC)
    if marked:
        picture[10:14, 20:26] = 255 - picture[10:14, 20:26]
    images.save_png(path, picture)
    return path


def draw_many(folder: Path, n: int, *, start: int, stem: str = "{:03d}") -> None:
    for index in range(n):
        draw(folder / f"{stem.format(index)}.png", start + index)


def mask(path: Path, value: int = 255) -> None:
    picture = np.zeros((30, 44), np.uint8)
    picture[10:14, 20:26] = value
    images.save_png(path, picture)


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    root = tmp_path / "sets"
    for number, category in enumerate(("mona_lisa", "girl_with_a_pearl_earring")):
        base = root / category
        draw_many(base / "train" / "good", 4, start=100 * number)
        draw_many(base / "test" / "good", 2, start=100 * number + 10)
        draw_many(base / "test" / "box", 3, start=100 * number + 20)
        draw_many(base / "test" / "replica", 1, start=100 * number + 30)
        for index in range(3):
            mask(base / "ground_truth" / "box" / f"{index:03d}_mask.png")
    return root


def by_kind(samples: list[Sample] | tuple[Sample, ...]) -> dict[str, int]:
    table: dict[str, int] = {}
    for sample in samples:
        key = f"{sample.category}/{sample.split}/{sample.kind}"
        table[key] = table.get(key, 0) + 1
    return table


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_mvtec_layout(mvtec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = data.build_manifest(mvtec)
    assert manifest == mvtec / "manifest.csv"
    dataset = data.open_dataset(mvtec)
    assert by_kind(dataset.samples) == {
        f"{category}/{place}": n
        for category in ("mona_lisa", "girl_with_a_pearl_earring")
        for place, n in {"train/good": 4, "test/good": 2, "test/box": 3, "test/replica": 1}.items()
    }
    boxes = dataset.select(kind="box")
    assert all(data.mask_of(sample)[10:14, 20:26].all() and data.mask_of(sample).sum() == 24 for sample in boxes)
    assert all(sample.mask_path.name == f"{sample.image_path.stem}_mask.png" for sample in boxes)
    assert [data.mask_of(sample) for sample in dataset.select(kind="replica")] == [None, None]
    assert not data.mask_of(dataset.select(split="train")[0], (5, 6)).any()
    groups = [sample.group for sample in dataset.samples]
    assert len(set(groups)) == len(groups)  # 000.png of train/good is not 000.png of test/good
    words = capsys.readouterr().out
    for part in ("MVTec layout, 20 pictures of 2 artworks", "good 2, box 3, replica 1", "3 of 4 anomalous pictures"):
        assert part in words


def test_one_mvtec_category_alone(mvtec: Path) -> None:
    reading = data.read_folder(mvtec / "mona_lisa")
    assert by_kind(reading.samples)["mona_lisa/test/box"] == 3
    assert not (mvtec / "mona_lisa" / "manifest.csv").exists()


@pytest.mark.parametrize("name", ["validation", "calibration", "Val"])
def test_calibration_folders(mvtec: Path, name: str) -> None:
    draw_many(mvtec / "mona_lisa" / name / "good", 2, start=700)
    assert by_kind(data.read_folder(mvtec).samples)["mona_lisa/calibration/good"] == 2


def test_pictures_directly_in_train_are_normal(mvtec: Path) -> None:
    shutil.rmtree(mvtec / "mona_lisa" / "train" / "good")
    draw_many(mvtec / "mona_lisa" / "train", 3, start=800)
    assert by_kind(data.read_folder(mvtec).samples)["mona_lisa/train/good"] == 3


def test_anomalies_below_train_are_left_out_and_said(mvtec: Path) -> None:
    draw_many(mvtec / "mona_lisa" / "train" / "box", 2, start=900)
    reading = data.read_folder(mvtec)
    assert "mona_lisa/train/box" not in by_kind(reading.samples)
    assert any("2 pictures not used" in note for note in reading.notes)


def test_mvtec_loco_joins_the_masks_of_a_picture(mvtec: Path) -> None:
    base = mvtec / "mona_lisa"
    draw_many(base / "test" / "logical_anomalies", 2, start=600)
    folder = base / "ground_truth" / "logical_anomalies"
    mask(folder / "000" / "000.png", 250)
    other = np.zeros((30, 44), np.uint8)
    other[0, 0] = 254
    images.save_png(folder / "000" / "001.png", other)
    samples = [s for s in data.read_folder(mvtec).samples if s.kind == "logical_anomalies"]
    assert [s.mask_path for s in samples] == [folder / "000", None]
    assert data.mask_of(samples[0]).sum() == 25
    before = data.dataset_hash(samples, mvtec)
    images.save_png(folder / "000" / "001.png", np.roll(other, 1))
    assert data.dataset_hash(samples, mvtec) != before


def test_visa_layout(tmp_path: Path) -> None:
    lines = ["object,split,label,image,mask"]
    for index in range(4):
        image = f"candle/Data/Images/Normal/{index:04d}.JPG"
        draw(tmp_path / "normal.png", index)
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "normal.png", tmp_path / image)
        lines.append(f"candle,{'train' if index < 3 else 'test'},normal,{image},")
    (tmp_path / "candle/Data/Images/Anomaly").mkdir()
    shutil.copy(draw(tmp_path / "x.png", 50), tmp_path / "candle/Data/Images/Anomaly/0000.JPG")
    mask(tmp_path / "candle/Data/Masks/Anomaly/0000.png", 2)  # VisA numbers its regions
    lines.append("candle,test,anomaly,candle/Data/Images/Anomaly/0000.JPG,candle/Data/Masks/Anomaly/0000.png")
    lines.append("candle,test,anomaly,candle/Data/Images/Anomaly/gone.JPG,")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(lines))
    reading = data.read_folder(tmp_path)
    assert reading.layout == layouts.VISA
    assert by_kind(reading.samples) == {
        "candle/train/good": 3,
        "candle/test/good": 1,
        "candle/test/anomaly": 1,
    }
    assert data.mask_of(next(s for s in reading.samples if s.is_anomalous)).sum() == 24
    assert [(path.name, reason) for path, reason in reading.bad_files] == [("gone.JPG", "does not exist.")]


@pytest.fixture
def report_trees(tmp_path: Path) -> Path:
    """The report's two trees, with every way of saying which painting a test picture shows."""
    root = tmp_path / "report"
    draw_many(root / "train" / "Mona Lisa", 3, start=0)
    draw_many(root / "train" / "girl_with_a_pearl_earring", 3, start=20)
    draw(root / "test" / "anomaly" / "monalisa_box_1.png", 40)
    draw(root / "test" / "anomaly" / "pearl-fake.png", 41)
    draw(root / "test" / "anomaly" / "Mona Lisa" / "7.png", 42)
    draw(root / "test" / "anomaly" / "replica" / "Girl with a pearl earring 2.png", 43)
    draw(root / "test" / "non_anomaly" / "LisaMona.png", 44)
    draw(root / "test" / "non_anomaly" / "girl_with_a_pearl_earring" / "8.png", 45)
    return root


def test_the_reports_two_trees(report_trees: Path) -> None:
    draw(report_trees / "test" / "anomaly" / "IMG_0001.png", 46)
    reading = data.read_folder(report_trees)
    assert reading.layout == layouts.REPORT
    found = {(s.category, s.split, s.kind, s.image_path.name) for s in reading.samples if s.split == "test"}
    assert found == {
        ("Mona_Lisa", "test", "anomaly", "monalisa_box_1.png"),
        ("girl_with_a_pearl_earring", "test", "anomaly", "pearl-fake.png"),
        ("Mona_Lisa", "test", "anomaly", "7.png"),
        ("girl_with_a_pearl_earring", "test", "replica", "Girl with a pearl earring 2.png"),
        ("Mona_Lisa", "test", "good", "LisaMona.png"),
        ("girl_with_a_pearl_earring", "test", "good", "8.png"),
    }
    (path, reason), *rest = reading.bad_files
    assert path.name == "IMG_0001.png" and "cannot tell which painting" in reason and not rest


def test_report_trees_with_the_painting_above_the_label(report_trees: Path) -> None:
    draw(report_trees / "test" / "Mona Lisa" / "non_anomaly" / "a.png", 60)
    draw(report_trees / "test" / "Mona Lisa" / "letters" / "b.png", 61)
    draw(report_trees / "test" / "Mona Lisa" / "c.png", 62)
    draw(report_trees / "test" / "anomaly" / "good" / "lisa.png", 63)
    reading = data.read_folder(report_trees)
    kinds = {s.image_path.name: s.kind for s in reading.samples}
    assert kinds["a.png"] == "good" and kinds["b.png"] == "letters"
    assert {path.name for path, _ in reading.bad_files} == {"c.png", "lisa.png"}


@pytest.mark.parametrize("name", ["non_anomaly", "Non-Anomaly", "NON ANOMALY", "normal", "good", "NoN_anomalous"])
def test_a_label_is_the_whole_folder_name(report_trees: Path, name: str) -> None:
    (report_trees / "test" / "non_anomaly").rename(report_trees / "test" / name)
    assert sum(not s.is_anomalous for s in data.read_folder(report_trees).samples if s.split == "test") == 2


@pytest.mark.parametrize("name", ["non_anomaly_2", "normal_pictures", "not-anomalous-really", "good_copies", "good2"])
def test_a_name_that_only_begins_normal_is_refused(report_trees: Path, name: str) -> None:
    draw(report_trees / "test" / name / "lisa.png", 70)
    with pytest.raises(data.DatasetError, match="may mean normal"):
        data.read_folder(report_trees)


def test_flat_folder(tmp_path: Path) -> None:
    draw_many(tmp_path / "Nachtwache é", 3, start=0)
    reading = data.read_folder(tmp_path / "Nachtwache é")
    assert reading.layout == layouts.FLAT
    assert by_kind(reading.samples) == {"Nachtwache_é/train/good": 3}


def test_one_folder_per_painting(tmp_path: Path) -> None:
    draw_many(tmp_path / "a", 2, start=0)
    draw_many(tmp_path / "b" / "scans", 2, start=10)
    draw(tmp_path / "cover.png", 30)
    reading = data.read_folder(tmp_path)
    assert reading.layout == layouts.PER_PAINTING
    assert by_kind(reading.samples) == {"a/train/good": 2, "b/train/good": 2}
    assert any("cover.png" in note for note in reading.notes)


@pytest.mark.parametrize("below", ["", "guernica"])
def test_labelled_folders(tmp_path: Path, below: str) -> None:
    base = tmp_path / "guernica" if not below else tmp_path / "set" / below
    draw_many(base / "good", 3, start=0)
    draw_many(base / "tear", 2, start=10)
    mask(base / "ground_truth" / "tear" / "001.png")
    reading = data.read_folder(tmp_path / "guernica" if not below else tmp_path / "set")
    assert reading.layout == layouts.LABELLED
    assert by_kind(reading.samples) == {"guernica/train/good": 3, "guernica/test/tear": 2}
    assert [s.mask_path is not None for s in reading.samples if s.is_anomalous] == [False, True]


@pytest.mark.parametrize("delimiter, encoding", [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "cp1252")])
def test_csv(tmp_path: Path, delimiter: str, encoding: str) -> None:
    for index, name in enumerate(("a", "b", "ü c", "d", "e")):
        draw(tmp_path / "files" / f"{name}.png", index)
    mask(tmp_path / "m.png")
    rows = [
        ["Image", "Painting", "Split", "Label", "Kind", "Mask", "Group"],
        ["files/a.png", "Dürer", "training", "normal", "", "", "scan 1"],
        ["files/b.png", "Dürer", "", "0", "", "", "scan 1"],
        ["files\\ü c.png", "Dürer", "validation", "good", "", "", ""],
        [str(tmp_path / "files" / "d.png"), "Dürer", "test", "1", "stain", "m.png", ""],
        ["files/e.png", "Dürer", "train", "anomaly", "", "", ""],
        ["files/e.png", "Dürer", "test", "perhaps", "", "", ""],
        ["files/e.png", "Dürer", "test", "normal", "stain", "", ""],
        ["files/a.png", "Dürer", "test", "normal", "", "", ""],
        ["files/gone.png", "Dürer", "test", "normal", "", "", ""],
    ]
    table = tmp_path / "list.csv"
    table.write_bytes("\n".join(delimiter.join(row) for row in rows).encode(encoding))
    reading = data.read_folder(table)
    assert by_kind(reading.samples) == {"Dürer/train/good": 2, "Dürer/calibration/good": 1, "Dürer/test/stain": 1}
    assert [s.group for s in reading.samples if s.split == "train"] == ["scan 1", "scan 1"]
    reasons = " | ".join(reason for _, reason in reading.bad_files)
    assert len(reading.bad_files) == 5
    for words in ("row 6", "'perhaps'", "says normal but kind is 'stain'", "earlier row", "does not exist"):
        assert words in reasons
    assert data.read_folder(tmp_path).layout == layouts.CSV  # the only table in a folder is found by itself


def test_what_is_not_understood_is_refused_with_the_tree_seen(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(data.DatasetError, match=r"(?s)no picture in it.*Seen:.*deep/.*MVTec layout: <category>"):
        data.build_manifest(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.build_manifest(tmp_path / "nowhere")
    (tmp_path / "empty" / "set.zip").write_bytes(b"PK")
    with pytest.raises(data.DatasetError, match=r"Unpack set\.zip first"):
        data.build_manifest(tmp_path / "empty")
    with pytest.raises(data.DatasetError, match="an archive"):
        data.build_manifest(tmp_path / "empty" / "set.zip")
    (tmp_path / "other.csv").write_text("name,age\nann,3\n")
    with pytest.raises(data.DatasetError, match="columns name, age; one must name the picture"):
        data.build_manifest(tmp_path / "other.csv")
    draw_many(tmp_path / "bad_only" / "anomaly", 2, start=0)
    with pytest.raises(data.DatasetError, match="none of normal ones"):
        data.build_manifest(tmp_path / "bad_only")
    draw_many(tmp_path / "twice" / "train" / "good", 1, start=0)
    draw_many(tmp_path / "twice" / "training" / "good", 1, start=5)
    with pytest.raises(data.DatasetError, match="both train/ and training/"):
        data.build_manifest(tmp_path / "twice")
    draw_many(tmp_path / "only_test" / "mona" / "test" / "box", 2, start=10)
    with pytest.raises(data.DatasetError, match=r"holds test/: if that is the dataset"):
        data.build_manifest(tmp_path / "only_test")
    draw_many(tmp_path / "outer" / "inner" / "train" / "mona", 2, start=20)
    draw_many(tmp_path / "outer" / "inner" / "test" / "anomaly", 2, start=30)
    with pytest.raises(data.DatasetError, match=r"give .*outer/inner instead"):
        data.build_manifest(tmp_path / "outer")


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(mvtec: Path) -> Path:
    good = mvtec / "mona_lisa" / "train" / "good"
    (good / "zero.png").write_bytes(b"")
    (good / "text.jpg").write_text("not a picture")
    (good / "cut.png").write_bytes((good / "000.png").read_bytes()[:900])
    (good / "broken_link.png").symlink_to("nowhere.png")
    (good / ".hidden.png").write_bytes(b"")
    shutil.copy(good / "000.png", os.fsencode(good) + b"/latin_\xe9.png")
    (good / "notes.txt").write_text("x")
    (good / "Thumbs.db").write_bytes(b"x")
    box = mvtec / "mona_lisa" / "ground_truth" / "box"
    (box / "000_mask.png").write_bytes(b"broken")
    images.save_png(box / "001_mask.png", np.zeros((30, 44), bool))
    images.save_png(box / "002_mask.png", np.ones((44, 30), bool))
    mask(box / "077_mask.png")
    return mvtec


def test_bad_files_are_listed_and_stop_nothing(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = data.build_manifest(hostile)
    samples = data.load_manifest(manifest)
    assert by_kind(samples)["mona_lisa/train/good"] == 4
    assert all(s.mask_path is None for s in samples if s.category == "mona_lisa")  # pictures stay, masks go
    listed = {Path(entry["path"]).name: entry["reason"] for entry in _info(manifest)["bad_files"]}
    expected = {
        "zero.png": "empty",
        "text.jpg": "no picture",
        "cut.png": "damaged",
        "latin_?.png": "not valid UTF-8",
        "broken_link.png": "link to nowhere.png",
        "000_mask.png": "no picture",
        "001_mask.png": "mask is empty",
        "002_mask.png": "proportions",
        "077_mask.png": "mask without a picture",
    }
    assert set(listed) == set(expected)
    for name, words in expected.items():
        assert words in listed[name]
    printed = capsys.readouterr().out
    assert "Files left out: 9" in printed and "zero.png: is empty (0 bytes)" in printed


def test_all_files_bad_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(data.DatasetError, match=r"(?s)no picture can be used.*a\.png: is empty"):
        data.build_manifest(tmp_path)


def test_only_anomalous_pictures_is_a_refusal(mvtec: Path) -> None:
    table = mvtec / "mona_lisa" / "test" / "list.csv"
    table.write_text("image,label\nbox/000.png,anomaly\nbox/001.png,anomaly\n")
    with pytest.raises(data.DatasetError, match="all 2 readable pictures are anomalous"):
        data.build_manifest(table)


def test_linked_folders_are_read_and_loops_end(mvtec: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.move(mvtec / "mona_lisa", tmp_path / "elsewhere" / "original")
    (mvtec / "mona_lisa").symlink_to(tmp_path / "elsewhere" / "original", target_is_directory=True)
    good = tmp_path / "elsewhere" / "original" / "train" / "good"
    (good / "loop").symlink_to(good, target_is_directory=True)
    assert by_kind(data.read_folder(mvtec).samples)["mona_lisa/train/good"] == 4


# --- duplicates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "validation"])
def test_one_file_in_two_splits_is_refused(mvtec: Path, split: str) -> None:
    base = mvtec / "mona_lisa"
    (base / split / "good").mkdir(parents=True, exist_ok=True)
    shutil.copy(base / "train" / "good" / "001.png", base / split / "good" / "copy.png")
    with pytest.raises(data.DatasetError, match=r"(?s)1 picture stand.*001\.png = .*copy\.png.*Delete one"):
        data.build_manifest(mvtec)
    assert not (mvtec / "manifest.csv").exists()


def test_one_file_with_two_labels_is_refused(mvtec: Path) -> None:
    test = mvtec / "mona_lisa" / "test"
    shutil.copy(test / "good" / "001.png", test / "box" / "copy.png")
    with pytest.raises(data.DatasetError, match="labelled normal and anomalous"):
        data.build_manifest(mvtec)


def test_copies_in_one_split_or_of_another_artwork_are_reported(mvtec: Path) -> None:
    good = mvtec / "mona_lisa" / "train" / "good"
    shutil.copy(good / "001.png", good / "again.png")
    other = mvtec / "girl_with_a_pearl_earring" / "test" / "other_painting"
    other.mkdir()
    shutil.copy(good / "002.png", other / "wrong.png")  # another painting is a fair anomaly
    reading = data.read_folder(mvtec)
    assert [{a.name, b.name} for a, b in reading.exact_duplicates] == [
        {"002.png", "wrong.png"},
        {"001.png", "again.png"},
    ]
    groups = {s.image_path.name: s.group for s in reading.samples if s.image_path.parent == good}
    assert groups["001.png"] == groups["again.png"] != groups["002.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((400, 280)),
        lambda image: image.resize((100, 70)),
        lambda image: Image.fromarray(np.clip(np.asarray(image) * 0.8 + 10, 0, 255).astype(np.uint8)),
    ],
    ids=["larger", "smaller", "darker"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_near_duplicates_across_splits_are_reported_and_share_a_group(mvtec: Path, change, suffix: str) -> None:
    base = mvtec / "mona_lisa"
    rng = np.random.default_rng(77)
    painting = cv2.resize(rng.integers(0, 256, (9, 13, 3), np.uint8), (200, 140), interpolation=cv2.INTER_CUBIC)
    images.save_png(base / "train" / "good" / "002.png", painting)
    with Image.open(base / "train" / "good" / "002.png") as image:
        change(image).save(base / "test" / "good" / f"photo{suffix}")
    reading = data.read_folder(mvtec)
    assert [{a.name, b.name} for a, b in reading.near_duplicates] == [{"002.png", f"photo{suffix}"}]
    groups = {f"{s.split}/{s.image_path.name}": s.group for s in reading.samples if s.category == "mona_lisa"}
    assert groups["train/002.png"] == groups[f"test/photo{suffix}"]
    assert len(set(groups.values())) == len(groups) - 1


def test_uniform_pictures_are_no_near_duplicates(mvtec: Path) -> None:
    base = mvtec / "mona_lisa"
    for place, grey in (("train/good/black.png", 0), ("test/good/grey.png", 90)):
        images.save_png(base / place, np.full((20, 20, 3), grey, np.uint8))
    assert data.read_folder(mvtec).near_duplicates == ()


def test_a_fixed_camera_does_not_make_one_group_of_everything(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (96, 72), interpolation=cv2.INTER_CUBIC)
    for index in range(12):
        noisy = np.clip(scene + rng.normal(0, 1, scene.shape), 0, 255).astype(np.uint8)
        images.save_png(tmp_path / "belt" / f"{index}.png", noisy)
    reading = data.read_folder(tmp_path / "belt")
    assert len({s.group for s in reading.samples}) == 12
    assert any("look the same" in note for note in reading.notes)


# --- manifests -------------------------------------------------------------------------------------------------------


def _info(manifest: Path) -> dict:
    return json.loads((manifest.parent / "manifest.json").read_text())


def test_round_trip_keeps_every_field(mvtec: Path, tmp_path: Path) -> None:
    samples = list(data.read_folder(mvtec).samples)
    odd = draw(tmp_path / "out" / 'with "quotes", comma é.png', 999)
    samples.append(
        Sample(odd, "ünï, códe", True, None, "test", "face_swap", "g,1", visibility=0.1 + 0.2, synthesis_seed=2**63)
    )
    path = data.write_manifest(tmp_path / "out", samples, info={"made_by": "test"})
    loaded = data.load_manifest(path)
    assert loaded[:-1] == samples[:-1]
    assert loaded[-1] == replace(samples[-1], sha256=loaded[-1].sha256) and len(loaded[-1].sha256) == 64
    assert path.read_text().splitlines()[0] == ",".join(data.COLUMNS)
    text = path.read_text()
    assert '"with ""quotes"", comma é.png"' in text  # relative below the manifest
    assert str(mvtec / "mona_lisa") in text  # absolute elsewhere
    info = _info(path)
    assert info["made_by"] == "test" and info["n_samples"] == len(samples)
    assert info["counts"]["ünï, códe"] == {"test": {"face_swap": 1}}
    assert info["dataset_hash"] == data.dataset_hash(loaded, path.parent)


def test_a_moved_dataset_opens_with_the_same_hash(mvtec: Path, tmp_path: Path) -> None:
    first = data.open_dataset(data.build_manifest(mvtec).parent)
    shutil.move(mvtec, tmp_path / "moved")
    second = data.open_dataset(tmp_path / "moved", verify_files=True)
    assert second.hash == first.hash
    assert all(str(s.image_path).startswith(str(tmp_path / "moved")) for s in second.samples)


def test_the_hash_sees_every_meaningful_change(mvtec: Path) -> None:
    samples = list(data.read_folder(mvtec).samples)
    reference = data.dataset_hash(samples, mvtec)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert data.dataset_hash(shuffled, mvtec) == reference
    box = next(i for i, s in enumerate(samples) if s.kind == "box")
    changes = {
        "picture": {"sha256": "0" * 64},
        "category": {"category": "other"},
        "split": {"split": "calibration"},
        "kind": {"kind": "line"},
        "label": {"is_anomalous": False, "kind": "good"},
        "mask": {"mask_path": None},
        "group": {"group": "other"},
    }
    for name, change in changes.items():
        changed = [replace(s, **change) if i == box else s for i, s in enumerate(samples)]
        assert data.dataset_hash(changed, mvtec) != reference, name
    assert data.dataset_hash(samples[1:], mvtec) != reference
    mask(samples[box].mask_path, 129)
    assert data.dataset_hash(samples, mvtec) != reference  # the mask file itself


def test_open_dataset_notices_what_changed(mvtec: Path) -> None:
    with pytest.raises(FileNotFoundError, match="notebook 02"):
        data.open_dataset(mvtec)
    manifest = data.build_manifest(mvtec)
    text = manifest.read_text()
    manifest.write_text(text.replace("test,False,good", "train,False,good", 1))
    with pytest.raises(data.DatasetError, match="changed after it was frozen"):
        data.open_dataset(mvtec)
    manifest.write_text(text)
    draw(mvtec / "mona_lisa" / "test" / "good" / "000.png", 5000)
    data.open_dataset(mvtec)
    with pytest.raises(data.DatasetError, match="changed after it was frozen"):
        data.open_dataset(mvtec, verify_files=True)
    (mvtec / "mona_lisa" / "test" / "good" / "000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files .* gone.*000\.png"):
        data.open_dataset(mvtec)


def test_select_and_categories(mvtec: Path) -> None:
    dataset = data.open_dataset(data.build_manifest(mvtec).parent)
    assert dataset.categories == ("girl_with_a_pearl_earring", "mona_lisa")
    assert len(dataset.select(split="test", is_anomalous=True)) == 8
    assert len(dataset.select(split="test", is_anomalous=False, category="mona_lisa")) == 2
    assert len(dataset.select()) == len(dataset.samples)
    for wrong in ({"category": "monalisa"}, {"split": "val"}, {"kind": "boxes"}):
        with pytest.raises(ValueError, match="there are"):
            dataset.select(**wrong)


def test_a_source_picture_in_two_splits_needs_a_limit(mvtec: Path) -> None:
    samples = [
        replace(s, group="one scan") if s.category == "mona_lisa" else s for s in data.read_folder(mvtec).samples
    ]
    data.write_manifest(mvtec, samples)
    with pytest.raises(data.DatasetError, match="mona_lisa stand in two splits"):
        data.open_dataset(mvtec)
    info = {"limits": {"mona_lisa": "One genuine picture."}, "kinds_held_out": ["box"]}
    data.write_manifest(mvtec, samples, info=info)
    dataset = data.open_dataset(mvtec)
    assert dataset.limits == info["limits"] and dataset.kinds_held_out == ("box",)
    assert dataset.n_sources("mona_lisa", "train") == 1
    assert dataset.n_sources("girl_with_a_pearl_earring", "train") == 4


def test_an_interrupted_write_is_no_dataset(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.build_manifest(mvtec)
    samples = list(data.read_folder(mvtec).samples)

    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "counts", stop)
    with pytest.raises(KeyboardInterrupt):
        data.write_manifest(mvtec, samples[:3])
    with pytest.raises(FileNotFoundError, match="notebook 02"):
        data.open_dataset(mvtec)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("is_anomalous", "label"), "no column is_anomalous"),
        (lambda text: text.replace(",True,", ",maybe,", 1), r"row \d+: is_anomalous is 'maybe'"),
        (lambda text: text.replace(",train,", ",trian,", 1), "split is 'trian'"),
        (lambda text: "", "has no column"),
    ],
)
def test_broken_manifests_are_refused_in_words(mvtec: Path, change, words: str) -> None:
    manifest = data.build_manifest(mvtec)
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(data.DatasetError, match=words):
        data.load_manifest(manifest)


def test_write_manifest_refuses_nothing_and_repeats(mvtec: Path, tmp_path: Path) -> None:
    samples = list(data.read_folder(mvtec).samples)
    with pytest.raises(data.DatasetError, match="No pictures"):
        data.write_manifest(tmp_path / "x", [])
    with pytest.raises(data.DatasetError, match="once is allowed"):
        data.write_manifest(tmp_path / "x", [*samples, samples[0]])


# --- where the manifest goes -----------------------------------------------------------------------------------------


def test_output_keeps_the_users_folder_clean(mvtec: Path, tmp_path: Path) -> None:
    before = sorted(mvtec.rglob("*"))
    for output in (tmp_path / "place", tmp_path / "place2" / "list.csv"):
        manifest = data.build_manifest(mvtec, output=output)
        assert manifest == (output if output.suffix else output / "manifest.csv")
        assert all(s.image_path.exists() for s in data.load_manifest(manifest))
    assert sorted(mvtec.rglob("*")) == before


def test_a_read_only_folder_is_not_written_to(
    mvtec: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    mvtec.chmod(0o555)
    try:
        manifest = data.build_manifest(mvtec)
        assert manifest.is_relative_to(tmp_path / "temporary")
        assert "manifest.csv" not in os.listdir(mvtec)
        assert "read-only" in capsys.readouterr().out
    finally:
        mvtec.chmod(0o755)


def test_a_second_call_reads_new_pictures_but_frozen_datasets_stay(mvtec: Path) -> None:
    data.build_manifest(mvtec)
    draw(mvtec / "mona_lisa" / "train" / "good" / "new.png", 4000)
    manifest = data.build_manifest(mvtec)
    samples = data.load_manifest(manifest)
    assert len(samples) == 21
    data.write_manifest(mvtec, samples, info={"made_by": "02_synthesize_anomalies"})
    frozen = manifest.read_bytes()
    draw(mvtec / "mona_lisa" / "train" / "good" / "newer.png", 4001)
    assert data.build_manifest(mvtec) == manifest
    assert manifest.read_bytes() == frozen


def test_a_foreign_manifest_is_not_overwritten(mvtec: Path, tmp_path: Path) -> None:
    (mvtec / "manifest.csv").write_text("name,price\nx,3\n")
    with pytest.raises(data.DatasetError, match="not a manifest of this suite"):
        data.build_manifest(mvtec)
    assert (mvtec / "manifest.csv").read_text() == "name,price\nx,3\n"
    data.build_manifest(mvtec, output=tmp_path / "out")


# --- properties ------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n/"), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(NAMES, NAMES, st.sampled_from(SPLITS), st.booleans(), NAMES, st.none() | st.floats(0, 100)),
        min_size=1,
        max_size=6,
        unique_by=lambda row: row[0],
    )
)
def test_any_names_survive_the_manifest(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("names")
    samples = [
        Sample(
            folder / f"{name}.png", category, bad, None, split, f"k{group}" if bad else "good", group, "0" * 64, seen
        )
        for name, category, split, bad, group, seen in rows
    ]
    assert data.load_manifest(data.write_manifest(folder, samples)) == samples


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_a_label_never_comes_from_part_of_a_name(name: str) -> None:
    label = layouts.label_of(name)
    assert (label == "good") == (layouts.plain(name) in layouts.NORMAL_NAMES)
    for around in (f"x{name}", f"{name}x"):
        if layouts.plain(around) not in layouts.NORMAL_NAMES | layouts.ANOMALY_NAMES:
            assert layouts.label_of(around) is None
