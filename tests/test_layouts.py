"""Folders and tables as people have them: understood, or refused in words; nothing is swallowed."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pictures import mask, picture, put, tree

from helpers import data
from helpers.data import names


def found(folder: Path) -> tuple[dict[str, int], int, data.FolderReading]:
    """Pictures by ``category/split/kind``, the number of masks, and the reading."""
    reading = data.read_folder(folder)
    table = Counter(f"{sample.category}/{sample.split}/{sample.kind}" for sample in reading.samples)
    return table, sum(sample.mask_path is not None for sample in reading.samples), reading


def expected(words: str) -> dict[str, int]:
    """``"a/train/good 6, a/test/crack 2"`` as a table."""
    return {key: int(n) for key, n in (part.split() for part in words.split(","))}


# Folders with the number of pictures (m: masks) in the folder "s" -> what is understood, and how many masks are used.
UNDERSTOOD = [
    ("mona/train/good 4, mona/test/good 2, mona/test/crack 3, mona/ground_truth/crack m3, b/train/good 2",
        "mona/train/good 4, mona/test/good 2, mona/test/crack 3, b/train/good 2", 3),
    ("x/mona/train/good 4, x/mona/test/tear 1", "mona/train/good 4, mona/test/tear 1", 0),  # one folder too high
    ("train/good 4, Val/good 2", "s/train/good 4, s/calibration/good 2", 0),
    ("train/normal/images 4, test/normal/images 2, test/anomalous/images 2, test/anomalous/masks m2",
        "s/train/good 4, s/test/good 2, s/test/anomaly 2", 2),
    ("train/good 3, test/crack/c1 2, test/crack/c2 2, ground_truth/crack/c1 m2", "s/train/good 3, s/test/crack 4", 2),
    ("train/good 3, test/crack 2, test_maps/crack m2", "s/train/good 3, s/test/crack 2", 2),
    ("good 4, crack 3, mask/crack m3", "s/train/good 4, s/test/crack 3", 3),  # anomalib's hazelnut
    ("good 4, crack 3, crack_mask m3", "s/train/good 4, s/test/crack 3", 3),
    ("broken column/train/good 3", "broken_column/train/good 3", 0),
    ("M/genuine scans 3, M/known forgeries 2, M/the not damaged 1", "M/train/good 4, M/test/forgeries 2", 0),
    ("normal 4, normal_test 2, abnormal 1, mask m1", "s/train/good 4, s/test/good 2, s/test/anomaly 1", 1),
    ("candle/Data/Images/Normal 4, candle/Data/Images/Anomaly 2, candle/Data/Masks/Anomaly m2",  # VisA unpacked
        "candle/train/good 4, candle/test/anomaly 2", 2),
    ("train/mona 3, train/pearl 3, test/anomaly/fake/mona_1.png, test/non_anomaly/pearl 1",  # the report's two trees
        "mona/train/good 3, pearl/train/good 3, mona/test/fake 1, pearl/test/good 1", 0),
    ("train/mona 3, test/non_anomaly/mona 2, test/anomaly/mona 2, ground_truth/anomaly/mona m2",
        "mona/train/good 3, mona/test/good 2, mona/test/anomaly 2", 2),
    ("mona/authentic 3, mona/forged 2, pearl/not_damaged 2, pearl/damaged 1",
        "mona/train/good 3, mona/test/forged 2, pearl/train/good 2, pearl/test/damaged 1", 0),
    ("good/mona 3, good/pearl 3, fake/mona 1", "mona/train/good 3, pearl/train/good 3, mona/test/fake 1", 0),
    ("mona 3, mona/damaged 2", "mona/train/good 3, mona/test/damaged 2", 0),
    ("mona/good 3, mona/tear 2, mona/TEAR/x.png", "mona/train/good 3, mona/test/TEAR 3", 0),
    ("train/good 3, test/clean 2, test/crack 1", "s/train/good 3, s/test/good 2, s/test/crack 1", 0),
    ("train/0 3, test/0 2, test/1 2", "s/train/good 3, s/test/good 2, s/test/anomaly 2", 0),
    ("0 2, 1 2, 2 2, 3 2", "0/train/good 2, 1/train/good 2, 2/train/good 2, 3/train/good 2", 0),
    ("Mona Lisa/train/good 3, Mona_Lisa/train/good 2", "Mona_Lisa/train/good 3, Mona_Lisa_2/train/good 2", 0),
    ("Du╠êrer 2, Dürer/x.png", "Dürer/train/good 3", 0),
    ("mona 3, mona/@eaDir/000.png/SYNOFILE_THUMB_M.jpg, thumbnails 3, mona/.thumb 2", "mona/train/good 3", 0),
    ("mona/2019 2, mona/2020 2", "mona/train/good 4", 0),
    ("train/good 3, test/crack/000.png, test/crack/000_mask.png", "s/train/good 3, s/test/crack 1", 1),
]  # fmt: skip


@pytest.mark.parametrize(("places", "words", "n_masks"), UNDERSTOOD)
def test_trees_are_understood(tmp_path: Path, places: str, words: str, n_masks: int) -> None:
    table, masks, reading = found(tree(tmp_path / "s", *places.split(", ")))
    assert table == expected(words)
    assert masks == n_masks
    assert len({s.group for s in reading.samples}) == len(reading.samples)  # equal names are not equal pictures


# Folders and pictures -> a word of the refusal, when nothing genuine is left. What may be read two ways is not guessed.
REFUSED = {
    "0 2, 1 2": "may be labels or paintings",
    "mona/before 2, mona/after 2": "may be labels or paintings",
    "mona/class_0 2, mona/class_1 2": "may be labels or paintings",
    "images 2, masks m2": "no folder says what it is",
    "test/lesion 2, ground_truth/lesion m2": "lesion +2 +2",
    "train/defect 2, test/defect 1": "train/defect/000.png: anomalous",
    "mona 3, fake 2": "mona/000.png: no folder says what it is",
    "all.zip": "unpack it",
    "deep/a.png~": "a.png~: no picture",
}


@pytest.mark.parametrize("places", REFUSED)
def test_what_holds_nothing_genuine_is_refused_with_a_way_out(tmp_path: Path, places: str) -> None:
    tree(tmp_path / "set", *places.split(", "))
    with pytest.raises(data.DatasetError, match=f"(?s){REFUSED[places]}.*No normal picture is left.*MVTec layout"):
        data.build_manifest(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.read_folder(tmp_path / "nowhere")


# Folders and pictures -> the files that are left out, and a word of the reason.
LEFT_OUT = {
    "train/good 2, test/000.png": ("test/000.png", "no folder says"),
    "train/good 2, train/box 1": ("train/box/000.png", "normal pictures only"),
    "train/mona 2, train/mona/fake 1": ("train/mona/fake/000.png", "normal pictures only"),
    "good 2, good/old_copies 1": ("good/old_copies/000.png", "says otherwise"),
    "good 2, bad/good 1": ("bad/good/000.png", "two things"),
    "x.png, y.png, fake_1.png": ("fake_1.png", "says otherwise"),
    "train/mona 2, train/mona/mona forgery.png": ("train/mona/mona forgery.png", "says otherwise"),
    "mona_fake 1, pearl 3": ("mona_fake/000.png", "says otherwise"),
    "bad ones of mona 1, pearl 3": ("bad ones of mona/000.png", "says otherwise"),
    "train/mona 3, train/mona_forgeries 1, test/good/mona.png": ("train/mona_forgeries/000.png", "says otherwise"),
    "train/good 2, test/normal_2 1": ("test/normal_2/000.png", "'normal_2' may mean normal"),
    "train/good 2, test/good_copies 1": ("test/good_copies/000.png", "'good_copies' may mean normal"),
    "mona 2, x.png": ("x.png", "no folder says"),
    "mona/good 2, mona/x.png": ("mona/x.png", "no folder says"),
    "train 2, test/good 1, extras 1": ("extras/000.png", "no folder says"),
    "train/mona 2, train/pearl 2, test/fake/IMG_1.png": ("test/fake/IMG_1.png", "which painting does it show"),
    "good 2, tear 1, masks/tear m2": ("masks/tear/001.png", "not the one mask"),
    "good 2, tear 1, mask/good m1": ("mask/good/000.png", "not the one mask"),
    "train 2, test/good/0.png, test/good/0_mask.png, test/tear/0.png": ("test/good/0_mask.png", "not the one mask"),
    "good 2, tear/a.png, tear/a.jpg, mask/tear/a_mask.png": ("mask/tear/a_mask.png", "not the one mask"),
    "good 2, tear/a.png, mask/tear/a_mask_0.png, mask/tear/a_mask_1.png":
        ("mask/tear/a_mask_0.png,mask/tear/a_mask_1.png", "not the one mask"),
    "good 2, tear 1, tear/b_mask.png": ("tear/b_mask.png", "like a mask"),
}  # fmt: skip


@pytest.mark.parametrize("places", LEFT_OUT)
def test_what_is_not_used_is_listed(tmp_path: Path, places: str) -> None:
    paths, words = LEFT_OUT[places]
    reading = data.read_folder(tree(tmp_path / "set", *places.split(", ")))
    left_out = [(path.relative_to(tmp_path / "set").as_posix(), reason) for path, reason in reading.left_out]
    assert ",".join(path for path, _ in left_out) == paths and all(words in reason for _, reason in left_out)
    assert all(f"{path}: {reason}" in reading.describe() for path, reason in left_out)


def test_files_of_other_formats_are_listed_and_hidden_ones_named(tmp_path: Path) -> None:
    others = ("IMG_1.dng", "IMG_2.NEF", "a.jpg_large", "no suffix", "x.jpg~", "notes.txt")
    root = tree(tmp_path / "set", "000.png", "001.png", *others, "Thumbs.db", ".DS_Store")
    (root / "._000.png").write_bytes(b"\0\5\x16\7")
    reading = data.read_folder(root)
    assert {path.name for path, _ in reading.left_out} == {*others}
    assert ".DS_Store, ._000.png, Thumbs.db: hidden" in reading.describe()


def test_masks_are_found_by_all_usual_names(tmp_path: Path) -> None:
    forms = "{}_mask {} mask_{} {}_label {}_seg {}.jpg_mask {}_masks {}_mask_0 {}_anomaly_mask {}-GT".split()
    masks = [f"mask_dir/tear/{form.format(i)}.png" for i, form in enumerate(forms)]
    pictures = [f"tear/{i}.png" for i in range(len(forms))]
    assert found(tree(tmp_path / "set", "good 2", *pictures, *masks))[1] == len(forms)


def test_names_that_decide_are_said(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", "train/good 2", "test/gefälscht 1", "test/wahrhaftig 1", "train/good/fake1.png")
    notes = data.read_folder(root).describe().partition("Note: ")[2]
    assert "wahrhaftig" in notes and "gefälscht" not in notes  # the vocabulary knows one of them
    assert "fake1.png" in notes


def test_linked_folders_are_read_and_loops_end(tmp_path: Path) -> None:
    elsewhere, root = tree(tmp_path / "elsewhere", "train/good 3"), tmp_path / "set"
    root.mkdir()
    (root / "mona").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "train/good/loop").symlink_to(elsewhere, target_is_directory=True)
    assert found(root)[0] == {"mona/train/good": 3}


def test_part_of_a_name_decides_nothing() -> None:
    for name in ("xgood", "goodness", "refake", "imaginary", "testing ground", "anomalyx"):
        assert {names.meaning_of(spelling).kind for spelling in (name, f" {name.upper()} ")} == {None}


@settings(max_examples=50)
@given(st.text(max_size=100))
def test_no_name_becomes_a_path(name: str) -> None:
    safe = names.clean(name)
    assert Path(safe).name == safe and safe not in (".", "..") and len(safe) <= 80


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """``img/`` with six pictures, of which the last two are bad."""
    return tree(tmp_path / "set", "img 6")


def table(folder: Path, header: str, row: str, good: object = 0, bad: object = 1, **options: object) -> Path:
    """A CSV with a row per picture; ``{f}`` is its path, ``{l}`` its label."""
    rows = [row.format(f=f"img/{i:03d}.png", l=bad if i > 3 else good) for i in range(6)]
    path = folder / "t.csv"
    path.write_bytes("\n".join([header, *rows]).encode(**options))
    return path


# Header, row, what normal and anomalous pictures have as {l} -> the kind of the latter.
LABELS = [
    ("image_path,label", "{f},{l}", "0.0", "1.0", "anomaly"),
    ("file;is_anomalous", "{f};{l}", "False", "True", "anomaly"),
    ("image\tkind", "{f}\t{l}", "none", "crack", "crack"),
    ("image,kind", "{f},{l}", "n/a", "face swap", "face_swap"),
    ("image,label", "{f},{l}", "good", "bent", "bent"),
    ("image,is_defect", "{f},{l}", "no", "yes", "anomaly"),
    ("image,genuine", "{f},{l}", "yes", "no", "anomaly"),
    ("image,is_authentic", "{f},{l}", "1", "0", "anomaly"),
    ("image,fake", "{f},{l}", 0, 1, "anomaly"),
    (" Image , Label ,label", "{f}, {l} ,x", "genuine", "forgery", "forgery"),
]
# Header, row -> a word of the refusal.
NO_LABELS = [
    ("image_path,target", "{f},{l}", "target.*none of them is understood as a label"),
    ("image_path,label_index,artist", "{f},{l},Vermeer", "label_index, artist"),
    ("image_path,mask", "{f},m.png", "mask"),
    ("name,age", "ann,{l}", "columns name, age; one must name the picture"),
    ("image,label", "{f},-1", "label is '-1'"),
    ("image,label", r"C:\\img\\{f},{l}", "does not exist"),
]


@pytest.mark.parametrize("header, row, good, bad, kind", LABELS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_labels_of_tables(pictures: Path, header: str, row: str, good: str, bad: str, kind: str, encoding: str) -> None:
    counts = found(table(pictures, header, row, good, bad, encoding=encoding))[0]
    assert counts == {"set/train/good": 4, f"set/test/{kind}": 2}


def test_a_folder_inside_that_says_nothing_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "mona 3", "mona/odd 2")
    counts, _, reading = found(tmp_path)
    assert counts == {"mona/train/good": 5} and ["mona/odd"] in reading.notes.values()


@pytest.mark.parametrize("header, row, words", NO_LABELS)
def test_tables_that_do_not_say_what_is_genuine_are_refused(pictures: Path, header: str, row: str, words: str) -> None:
    with pytest.raises(data.DatasetError, match=f"(?s){words}"):
        data.read_folder(table(pictures, header, row))


def test_columns_are_never_guessed(pictures: Path) -> None:
    _, _, reading = found(table(pictures, "file,label,source,type,class", "{f},{l},Louvre,photo,A"))
    assert len({sample.group for sample in reading.samples}) == 6
    assert {sample.kind for sample in reading.samples} == {"good", "anomaly"}
    assert "source, type, class" in reading.describe()


def test_every_column_and_every_bad_row(pictures: Path) -> None:
    put(pictures / "m.png", mask())
    put(pictures / "ü c.png", picture(90))
    rows = [
        "Image;Painting;Split;Label;Kind;Mask;Group",
        "img/000.png;Dürer;training;normal;;;scan 1",
        "img/001.png;Dürer;;0;;nan;scan 1",
        "ü c.png;Dürer;validation;good;;;",
        "img\\002.png;Dürer;test;fake;stain;m.png;",
        "img/003.png;Dürer;train;anomaly;;;",
        "img/003.png;Dürer;test;perhaps;;;",
        "img/003.png;Dürer;test;normal;stain;;",
        "img/003.png;Dürer;test;;;;",
        "img/000.png;Dürer;test;normal;;;",
        "img/gone.png;Dürer;test;normal;;;",
        "img/004.png;../../evil;;good;;;",
        "img/005.png;nan;;good",
    ]
    path = pictures / "t.csv"
    path.write_bytes("\r\n".join(rows).encode("cp1252"))
    counts, n_masks, reading = found(path)
    assert counts == expected(
        "Dürer/train/good 2, Dürer/calibration/good 1, Dürer/test/stain 1, evil/train/good 1, set/train/good 1"
    )
    assert n_masks == 1
    assert [s.group for s in reading.samples if s.split == "train"] == [
        "scan 1",
        "scan 1",
        "evil/img/004.png",
        "set/img/005.png",
    ]
    reasons = " | ".join(reason for _, reason in reading.left_out)
    words = ("row 6", "'perhaps'", "row 8 of t.csv: two things", "label is ''", "earlier row", "does not exist")
    assert all(word in reasons for word in words) and len(reading.left_out) == 6
    path.write_bytes("\n".join([*rows[:3], f"{rows[3]};one;two;three"]).encode("cp1252"))
    with pytest.raises(data.DatasetError, match="line 4"):  # shifted cells would be labels of another kind
        data.read_folder(path)


def test_which_table_of_a_folder_is_read(pictures: Path) -> None:
    table(pictures, "image,label", "{f},{l}")
    assert data.read_folder(pictures).layout == "CSV table t.csv"
    shutil.copy(pictures / "t.csv", pictures / "u.csv")
    with pytest.raises(data.DatasetError, match=r"t\.csv.*u\.csv"):
        data.read_folder(pictures)
    tree(pictures, "good 2", start=50)  # folders with labels say more than a table that was not asked for
    reading = data.read_folder(pictures)
    assert "labelled folders" in reading.layout and "t.csv: no picture" in reading.describe()
    with pytest.raises(data.DatasetError, match="neither a folder nor a CSV"):
        data.read_folder(pictures / "img" / "000.png")


def test_visa_s_own_table(tmp_path: Path) -> None:
    images = "candle/Data/Images"  # paths start above the table, labels are kinds
    root = tree(tmp_path / "set", f"{images}/Normal 4", f"{images}/Anomaly 1", "candle/Data/Masks/Anomaly m1")
    rows = [f"candle,{'test' if i else 'train'},normal,{images}/Normal/{i:03d}.png," for i in range(4)]
    rows += [f"candle,test,bent,{images}/Anomaly/000.png,candle/Data/Masks/Anomaly/000.png"]
    (root / "candle" / "image_anno.csv").write_text("\n".join(["object,split,label,image,mask", *rows]))
    counts = expected("candle/train/good 1, candle/test/good 3, candle/test/bent 1")
    assert found(root / "candle" / "image_anno.csv")[:2] == (counts, 1)
