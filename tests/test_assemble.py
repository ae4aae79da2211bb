"""Source trees of tiny real pictures -> datasets: splits, counts, bytes, interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import data
from helpers.data import build as assemble
from helpers.data import images
from helpers.data.manifest import DatasetError
from helpers.records import NORMAL_KIND, SPLITS, Sample
from helpers.synthesis import marks as synthesis

COUNTS = {"n_train": 6, "n_calibration": 4, "n_test_normal": 4, "n_test_anomalous": 5}
SMALL = {**COUNTS, "max_side": 48, "seed": 7}


def picture(number: int, size: tuple[int, int] = (60, 50)) -> np.ndarray:
    """A smooth picture of (H, W), different for every number."""
    rough = np.random.default_rng(number).integers(0, 256, (5, 4, 3), np.uint8)
    return cv2.resize(rough, size[::-1], interpolation=cv2.INTER_CUBIC)


def write(path: Path, array: np.ndarray) -> Path:
    images.save_png(path, array)
    return path


def source_tree(folder: Path, *, train: int, good: int = 0, real: int = 0, first: int = 0) -> list[Sample]:
    """One artwork with genuine pictures and ``real`` anomalies, every second with a mask."""
    for i in range(train):
        write(folder / "saint/train/good" / f"photo {i}.png", picture(first + i))
    for i in range(good):
        write(folder / "saint/test/good" / f"later_{i}.png", picture(first + 100 + i))
    for i in range(real):
        write(folder / "saint/test/overpainted" / f"fake_{i}.png", picture(first + 200 + i))
        if i % 2 == 0:
            mask = np.zeros((60, 50), bool)
            mask[10:30, 5:25] = True
            write(folder / "saint/ground_truth/overpainted" / f"fake_{i}_mask.png", mask)
    return list(data.read_folder(folder).samples)


def build(samples: list[Sample], target: Path, **changes: object) -> data.Dataset:
    return data.open_dataset(assemble.build_dataset(samples, target, **{**SMALL, **changes}).parent, verify_files=True)


def disjoint(samples: list[Sample] | tuple[Sample, ...]) -> bool:
    for attribute in ("group", "sha256"):
        seen = [{getattr(s, attribute) for s in samples if s.split == split} - {""} for split in SPLITS]
        if any(seen[i] & seen[j] for i, j in ((0, 1), (0, 2), (1, 2))):
            return False
    return True


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], data.Dataset]:
    """A dataset of 5 genuine training pictures, 3 for testing and 4 real anomalies."""
    folder = tmp_path_factory.mktemp("assemble")
    samples = source_tree(folder / "source", train=5, good=3, real=4)
    return samples, build(samples, folder / "dataset")


# --- what is made ----------------------------------------------------------------------------------------------------


def test_counts_splits_and_layout(built: tuple[list[Sample], data.Dataset]) -> None:
    _, dataset = built
    counts = data.counts(dataset.samples)["saint"]
    assert counts["train"] == {NORMAL_KIND: 6} and counts["calibration"] == {NORMAL_KIND: 4}
    assert counts["test"] == {NORMAL_KIND: 4, "overpainted": 4} | dict.fromkeys(synthesis.REPORT_KINDS, 1)
    assert disjoint(dataset.samples)
    for sample in dataset.samples:
        folder = "test" if sample.split == "test" else "train"
        assert sample.image_path.parent == dataset.folder / "saint" / folder / sample.kind
        side = max(images.load_image(sample.image_path).shape)
        assert sample.image_path.suffix == ".png"
        assert 40 <= side <= 48, "re-photographs may be cropped by a few percent"
        if sample.mask_path is not None:
            name = f"{sample.image_path.stem}_mask.png"
            assert sample.mask_path == dataset.folder / "saint/ground_truth" / sample.kind / name


def test_synthetic_anomalies_are_test_normals_with_known_damage(built: tuple[list[Sample], data.Dataset]) -> None:
    _, dataset = built
    records = assemble.read_records(dataset.folder)
    assert set(records) == {sample.image_path for sample in dataset.samples}
    by_path = {sample.image_path: sample for sample in dataset.samples}
    made = [s for s in dataset.samples if records[s.image_path]["origin"] == "synthetic anomaly"]
    assert len(made) == 5
    for sample in made:
        model = by_path[dataset.folder / records[sample.image_path]["source_path"]]
        assert model.split == "test" and not model.is_anomalous and model.group == sample.group
        before, after = images.load_image(model.image_path), images.load_image(sample.image_path)
        mask = data.mask_of(sample)
        assert mask.any() and (before[~mask] == after[~mask]).all() and (before[mask] != after[mask]).any()
        assert sample.visibility == records[sample.image_path]["visibility"] > 0
        again, _, _ = synthesis.synthesize(before, sample.kind, np.random.default_rng(sample.synthesis_seed))
        assert (again == after).all()


def test_rephotographs_can_be_made_again_and_spread_over_groups(built: tuple[list[Sample], data.Dataset]) -> None:
    samples, dataset = built
    records = assemble.read_records(dataset.folder)
    for split in SPLITS:
        rows = [records[s.image_path] for s in dataset.select(split=split, is_anomalous=False)]
        per_group = Counter(row["group"] for row in rows)
        assert max(per_group.values()) - min(per_group.values()) <= 1
        for row in rows:
            if row["origin"] == "rephotographed":
                model = images.load_image(dataset.folder / row["source_path"])
                again, names = synthesis.rephotograph(model, np.random.default_rng(row["synthesis_seed"]))
                assert names == row["variations"]
                assert (again == images.load_image(dataset.folder / row["image_path"])).all()
    genuine = [row for row in records.values() if row["origin"] == "genuine"]
    assert sorted(row["source_path"] for row in genuine) == sorted(
        s.image_path.as_posix() for s in samples if not s.is_anomalous
    )


def test_real_anomalies_and_their_masks_are_kept_for_testing(built: tuple[list[Sample], data.Dataset]) -> None:
    samples, dataset = built
    kept = dataset.select(kind="overpainted")
    assert len(kept) == 4 and {s.split for s in kept} == {"test"}
    for sample in kept:
        source = next(s for s in samples if s.image_path.stem == sample.image_path.stem)
        assert (images.load_image(sample.image_path) == images.load_image(source.image_path, max_side=48)).all()
        assert (sample.mask_path is None) == (source.mask_path is None)
        if sample.mask_path is not None:
            expected = cv2.resize(
                images.load_mask(source.mask_path).astype(np.uint8), (40, 48), interpolation=cv2.INTER_NEAREST_EXACT
            )
            np.testing.assert_array_equal(data.mask_of(sample), expected.astype(bool))
    assert {s.kind for s in dataset.select(is_anomalous=True)} >= set(synthesis.REPORT_KINDS)


def test_summary_and_examples(built: tuple[list[Sample], data.Dataset]) -> None:
    _, dataset = built
    table = assemble.summary(dataset.folder)
    assert table.loc[("saint", "train"), "genuine"] + table.loc[("saint", "train"), "rephotographed"] == 6
    assert table.loc[("saint", "test")].tolist() == [3, 1, 4, 5, 7]
    examples = assemble.kind_examples(dataset.folder)
    assert [example[0] for example in examples] == list(synthesis.REPORT_KINDS)
    for _, original, anomalous, mask in examples:
        assert original.shape == anomalous.shape and mask.shape == original.shape[:2]
        assert (original[~mask] == anomalous[~mask]).all() and (original[mask] != anomalous[mask]).any()


def test_real_anomalies_may_count_towards_the_number(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=4, real=3)
    assert len(build(samples, tmp_path / "a", count_real=True).select(is_anomalous=True)) == 5
    fewer = build(samples, tmp_path / "b", count_real=True, n_test_anomalous=2)
    assert [s.kind for s in fewer.select(is_anomalous=True)] == ["overpainted"] * 3  # all kept, none added


def test_anomalous_training_pictures_are_only_tested_on(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=4, real=2)
    wrong = [replace(s, split="train") if s.is_anomalous else s for s in samples]
    dataset = build(wrong, tmp_path / "dataset")
    assert len(dataset.select(split="test", kind="overpainted")) == 2
    assert not any(s.is_anomalous for s in dataset.samples if s.split != "test")


def test_a_thin_mask_survives_the_smaller_size(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=3, real=1)
    mask = np.zeros((600, 500), bool)
    mask[:, 3] = True  # nearest neighbour at 1/12.5 would step over this column
    write(samples[-1].image_path, picture(1, (600, 500)))
    write(samples[-1].mask_path, mask)
    sample = build(samples, tmp_path / "dataset").select(kind="overpainted")[0]
    assert data.mask_of(sample).sum() == 48


@pytest.mark.parametrize("n", [1, 5, 8, 26, 34])
def test_report_kinds_have_the_largest_share(n: int) -> None:
    share = Counter(assemble._kind_turns(synthesis.LOCAL_KINDS, n))
    report = [share[kind] for kind in synthesis.REPORT_KINDS]
    others = [share[kind] for kind in synthesis.LOCAL_KINDS if kind not in synthesis.REPORT_KINDS]
    assert sum(report) + sum(others) == n and max(report) - min(report) <= 1 and max(others) - min(others) <= 1
    assert min(report) >= max(others) and (n < 15 or min(others) > 0) and (n < 26 or min(report) > max(others))


def test_changes_of_the_whole_picture_have_no_mask(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=3)
    kind = synthesis.ANOMALOUS_VARIATIONS[0]
    dataset = build(samples, tmp_path / "dataset", kinds=("box", kind), n_test_anomalous=6)
    counts = data.counts(dataset.samples)["saint"]["test"]
    assert counts == {NORMAL_KIND: 4, "box": 4, kind: 2}
    assert all(s.mask_path is None and s.visibility is None for s in dataset.select(kind=kind))


# --- splits ----------------------------------------------------------------------------------------------------------


@st.composite
def source_samples(draw: st.DrawFn) -> list[Sample]:
    """Any mixture of splits, groups and labels; no files, for plans only."""
    rows = draw(st.lists(st.tuples(st.sampled_from(SPLITS), st.booleans(), st.integers(0, 9)), min_size=1, max_size=24))
    return [
        Sample(Path(f"/p/{i:02d}.png"), "saint", bad, None, split, "fake" if bad else NORMAL_KIND, f"saint/{group}")
        for i, (split, bad, group) in enumerate(rows)
    ]


def planned(samples: list[Sample], seed: int, n: tuple[int, int, int, int]) -> assemble._Plan:
    counts = dict(zip(("train", "calibration", "test", "anomalous"), n, strict=True))
    plan = assemble._Plan(seed=seed, counts=counts, kinds=synthesis.LOCAL_KINDS, count_real=False)
    plan.add_category("saint", samples)
    return plan


@settings(max_examples=200, deadline=None)
@given(
    samples=source_samples(),
    seed=st.integers(0, 99),
    n=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 20)),
)
def test_no_group_crosses_splits_whatever_the_source(
    samples: list[Sample], seed: int, n: tuple[int, int, int, int]
) -> None:
    plan = planned(samples, seed, n)
    if all(sample.is_anomalous for sample in samples):
        assert not plan.jobs and plan.notes
        return
    groups = [{job.group for job in plan.jobs if job.split == split} for split in SPLITS]
    assert all(groups) and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert all(job.split == "test" for job in plan.jobs if job.kind != NORMAL_KIND)
    paths = [job.path for job in plan.jobs]
    assert len(set(paths)) == len(paths)
    real = [job.source for job in plan.jobs if job.origin == "real anomaly"]
    assert sorted(real) == sorted(s.image_path.as_posix() for s in samples if s.is_anomalous)
    assert sum(job.origin == "synthetic anomaly" for job in plan.jobs) == n[3]
    by_path = {job.path: job for job in plan.jobs}
    for split, asked in zip(SPLITS, n, strict=False):
        normals = [job for job in plan.jobs if job.split == split and job.kind == NORMAL_KIND]
        genuine = [job.source for job in normals if job.origin == "genuine"]
        assert asked <= len(normals) <= assemble.MOST_TIMES * asked and len(set(genuine)) == len(genuine)
        for job in normals:  # a re-photograph of another split's picture only where a warning says so
            if job.origin == "rephotographed" and by_path[job.source].split != split:
                assert plan.warnings and "~rephotograph" in job.group
    assert planned(samples, seed, n).jobs == plan.jobs


@pytest.mark.parametrize(
    ("train", "good", "expected"),
    [(10, 0, (5, 2, 3)), (30, 0, (15, 6, 9)), (3, 0, (1, 1, 1)), (10, 4, (7, 3, 4)), (2, 1, (1, 1, 1))],
)
def test_shares_of_genuine_pictures(train: int, good: int, expected: tuple[int, int, int]) -> None:
    def normal(i: int, split: str) -> Sample:
        return Sample(Path(f"/p/{split}{i}.png"), "saint", False, split=split, group=f"saint/{split}{i}")

    samples = [normal(i, "train") for i in range(train)] + [normal(i, "test") for i in range(good)]
    plan = planned(samples, 1, (50, 20, 16, 34))
    genuine = Counter(job.split for job in plan.jobs if job.origin == "genuine")
    assert tuple(genuine[split] for split in SPLITS) == expected and not plan.warnings


@pytest.mark.parametrize(("train", "good", "simulated"), [(1, 0, SPLITS[1:]), (2, 0, SPLITS[1:]), (1, 1, SPLITS[1:2])])
def test_one_or_two_pictures_make_a_dataset_and_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: int, good: int, simulated: tuple[str, ...]
) -> None:
    dataset = build(source_tree(tmp_path / "source", train=train, good=good), tmp_path / "dataset")
    printed = capsys.readouterr().out
    warnings = json.loads((dataset.folder / "manifest.json").read_text())["warnings"]
    assert len(warnings) == 1 and f"WARNING: {warnings[0]}" in printed and "simulated" in warnings[0]
    assert f"only {train} independent genuine picture" in warnings[0]
    for split in SPLITS:
        groups = [s.group for s in dataset.select(split=split, is_anomalous=False)]
        assert all("~rephotograph" in group for group in groups) == (split in simulated)
    assert disjoint(dataset.samples)
    assert len(dataset.select(split="train")) == 6 and len(dataset.select(split="calibration")) == 4


def test_a_test_pictures_twin_is_not_learnt_from(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=5, good=2)
    tested = next(s for s in samples if s.split == "test")
    samples = [replace(s, group=tested.group) if s.image_path.stem == "photo 3" else s for s in samples]
    dataset = build(samples, tmp_path / "dataset")
    twin = next(s for s in dataset.samples if s.image_path.stem == "photo_3")
    assert twin.split == "test" and disjoint(dataset.samples)
    assert any("became test pictures" in note for note in _manifest(dataset)["notes"])


def test_equal_pixels_in_two_files_are_one_source_picture(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=6)
    copy = tmp_path / "source/saint/train/good/copy.bmp"  # other bytes, same pixels
    cv2.imwrite(str(copy), cv2.imread(str(samples[0].image_path)))
    dataset = build([*samples, replace(samples[0], image_path=copy, group="", sha256="")], tmp_path / "dataset")
    twins = [s for s in dataset.samples if s.image_path.stem in (samples[0].image_path.stem.replace(" ", "_"), "copy")]
    assert len(twins) == 2 and twins[0].group == twins[1].group and twins[0].split == twins[1].split


def test_one_picture_with_two_labels_is_refused(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=3, real=1)
    write(samples[-1].image_path, images.load_image(samples[0].image_path))
    with pytest.raises(DatasetError, match=r"photo 0.*fake_0.*same picture"):
        build(samples, tmp_path / "dataset")


def test_many_genuine_pictures_are_used_up_to_a_limit(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=16, good=9)
    dataset = build(samples, tmp_path / "dataset", n_train=3, n_calibration=2)
    counts = data.counts(dataset.samples)["saint"]
    assert [counts[split][NORMAL_KIND] for split in SPLITS] == [9, 5, 9]  # 11 of them, at most 3 x 3; 5; 9
    notes = " ".join(_manifest(dataset)["notes"])
    assert "11 genuine pictures for train, more than the 3 asked for; 9 of them are used" in notes
    assert "9 genuine pictures for test, more than the 4 asked for; all are used" in notes


# --- bytes, interruptions, other settings ----------------------------------------------------------------------------


def _manifest(dataset: data.Dataset) -> dict:
    return json.loads((dataset.folder / "manifest.json").read_text(encoding="utf-8"))


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.suffix in (".png", ".csv")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_same_seed_same_bytes_wherever_the_source_lies(
    built: tuple[list[Sample], data.Dataset], tmp_path: Path
) -> None:
    _, dataset = built
    samples = source_tree(tmp_path / "elsewhere", train=5, good=3, real=4)
    again = build(samples, tmp_path / "dataset")
    assert again.hash == dataset.hash and _bytes(again.folder) == _bytes(dataset.folder)
    other = build(samples, tmp_path / "other", seed=8)
    changed = {name for name, content in _bytes(other.folder).items() if content != _bytes(dataset.folder).get(name)}
    assert other.hash != dataset.hash and any("synthetic" in name for name in changed)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """A real SIGKILL: what was written stays as it is, the rest follows, and the bytes are those of one run."""
    samples = source_tree(tmp_path / "source", train=5, good=2, real=2)
    options = {**SMALL, "n_train": 150}
    code = (
        "import sys; from helpers import assemble, data; "
        f"assemble.build_dataset(data.read_folder(sys.argv[1]).samples, sys.argv[2], **{options!r})"
    )
    target = tmp_path / "dataset"
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(target)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE)
    partial = tmp_path / "dataset.partial"
    progress = partial / "progress.jsonl"
    give_up = time.monotonic() + 60
    while not (progress.exists() and progress.read_bytes().count(b"\n") > 20):
        assert process.poll() is None and time.monotonic() < give_up, "finished before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    with open(progress, "ab") as file:
        file.write(b'{"image_path": "saint/train/go')  # a line cut off
    done = {
        row["image_path"]: (partial / row["image_path"]).stat().st_mtime_ns
        for row in map(json.loads, progress.read_text().splitlines()[:-1])
    }
    dataset = build(samples, target, n_train=150)
    assert all((target / name).stat().st_mtime_ns == mtime for name, mtime in done.items()) and len(done) > 20
    whole = build(samples, tmp_path / "whole", n_train=150)
    assert dataset.hash == whole.hash and _bytes(target) == _bytes(whole.folder)
    assert (target / "synthesis.jsonl").read_bytes() == (whole.folder / "synthesis.jsonl").read_bytes()
    assert not partial.exists() and not list(target.rglob("*progress*"))


def test_a_complete_dataset_is_left_alone_until_something_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = source_tree(tmp_path / "source", train=4)
    dataset = build(samples, tmp_path / "dataset")
    stamp = (dataset.folder / "manifest.csv").stat().st_mtime_ns
    assert build(list(reversed(samples)), tmp_path / "dataset").hash == dataset.hash
    assert (dataset.folder / "manifest.csv").stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().out

    more = build(samples, tmp_path / "dataset", n_train=7)
    assert len(more.select(split="train")) == 7 and more.hash != dataset.hash
    more.samples[0].image_path.unlink()  # a lost file is made again
    assert build(samples, tmp_path / "dataset", n_train=7).hash == more.hash
    write(samples[0].image_path, picture(999))  # another source picture under the same name
    assert build(samples, tmp_path / "dataset", n_train=7).hash != more.hash


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=3)
    with pytest.raises(DatasetError, match="holds other files"):
        build(samples, tmp_path / "source")
    assert len(list((tmp_path / "source").rglob("*.png"))) == 3
    dataset = build(samples, tmp_path / "dataset")
    with pytest.raises(DatasetError, match="lies in the folder of the dataset"):
        build(list(dataset.select(split="train")), tmp_path / "dataset")


def test_bad_files_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = source_tree(tmp_path / "source", train=6, real=3)
    samples[0].image_path.write_bytes(samples[0].image_path.read_bytes()[:200])
    samples[1].image_path.unlink()
    write(samples[2].image_path, picture(2, (300, 20)))
    with_mask = [s for s in samples if s.mask_path is not None]
    write(with_mask[0].mask_path, np.zeros((60, 50), bool))
    dataset = build(samples, tmp_path / "dataset")
    listed = {Path(file["path"]).name for file in _manifest(dataset)["bad_files"]}
    names = {s.image_path.name for s in samples[:3]} | {with_mask[0].mask_path.name}
    assert listed == names
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    kept = {s.image_path.stem: s for s in dataset.select(kind="overpainted")}
    assert len(kept) == 3 and kept[with_mask[0].image_path.stem].mask_path is None
    assert sum(row["origin"] == "genuine" for row in assemble.read_records(dataset.folder).values()) == 3


def test_no_normal_picture_at_all_is_refused(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=1, real=1)
    samples[0].image_path.write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"nothing to learn from(.|\n)*photo 0"):
        build(samples, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_train": 0}, "0 train pictures"),
        ({"n_test_anomalous": -1}, "-1 anomalous pictures"),
        ({"kinds": ("box", "burn")}, "burn"),
        ({"kinds": ()}, "are none"),
        ({"kinds": synthesis.NORMAL_VARIATIONS[:1]}, synthesis.NORMAL_VARIATIONS[0]),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build([], tmp_path / "dataset", **change)


def test_two_artworks_with_names_alike_stay_apart(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=3)
    twins = [replace(s, category="saint?", group="") for s in samples]
    samples = [replace(s, category="Saint?", group="") for s in samples]
    for i, sample in enumerate(twins):
        path = tmp_path / "twins" / sample.image_path.name
        twins[i] = replace(sample, image_path=write(path, picture(50 + i)), sha256="")
    dataset = build([*samples, *twins], tmp_path / "dataset")
    assert dataset.categories == ("Saint?", "saint?")
    assert {s.image_path.relative_to(dataset.folder).parts[0] for s in dataset.samples} == {"Saint", "saint_2"}


# --- sources ---------------------------------------------------------------------------------------------------------


def test_source_for_a_folder_describes_it(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "mine", train=3, real=1)
    source = assemble.source_for(tmp_path / "mine", builtin="embedded", target=tmp_path / "s", max_side=64, seed=1)
    assert list(source.samples) == samples and not source.count_real
    assert "saint" in source.description and "overpainted 1" in source.description
    assert not (tmp_path / "s").exists()


def test_unknown_built_in_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'embedded' and 'wikimedia'"):
        assemble.source_for(None, builtin="louvre", target=tmp_path, max_side=64, seed=1)


def test_records_of_no_dataset_name_the_notebook(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="notebook 02"):
        assemble.read_records(tmp_path)
