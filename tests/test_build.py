"""Source trees of tiny real pictures -> datasets: splits, counts, bytes, what is kept and what is made again."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pictures import picture, put

from helpers import data, files, synthesis
from helpers.data import DatasetError, build, images
from helpers.profiles import DataSettings
from helpers.records import NORMAL_KIND, SPLITS, Sample

SIZES = DataSettings(max_image_side=96, n_train=6, n_calibration=4, n_test_normal=4, n_test_anomalous=5)


def draw(path: Path, number: int, size: tuple[int, int] = (120, 100)) -> Path:
    return put(path, picture(number, size))


def source_tree(folder: Path, *, train: int, good: int = 0, real: int = 0) -> list[Sample]:
    """One artwork with genuine pictures and ``real`` anomalies, every second with a mask."""
    for place, n in (("train/good/photo {}", train), ("test/good/later_{}", good), ("test/overpainted/fake_{}", real)):
        for i in range(n):
            draw(folder / "saint" / f"{place.format(i)}.png", 100 * len(place) + i)
    for i in range(0, real, 2):
        put(folder / f"saint/ground_truth/overpainted/fake_{i}_mask.png", np.eye(120, 100, dtype=np.uint8))
    return list(data.read_folder(folder).samples)


def make(samples: list[Sample], target: Path, *, sizes: DataSettings = SIZES, seed: int = 7) -> data.Dataset:
    source = data.FolderReading(target.parent, "", samples=samples)
    return data.open_dataset(build.build_dataset(source, target, sizes, seed=seed).parent)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], data.Dataset]:
    """A dataset of 5 genuine training pictures, 3 for testing and 4 real anomalies."""
    folder = tmp_path_factory.mktemp("build")
    samples = source_tree(folder / "source", train=5, good=3, real=4)
    return samples, make(samples, folder / "dataset")


def test_counts_splits_and_layout(built: tuple[list[Sample], data.Dataset]) -> None:
    _, dataset = built
    found = Counter((sample.split, sample.kind) for sample in dataset.samples)
    normal = {("train", NORMAL_KIND): 6, ("calibration", NORMAL_KIND): 4, ("test", NORMAL_KIND): 4}
    assert found == {**normal, ("test", "overpainted"): 4, **{("test", kind): 1 for kind in synthesis.REPORT_KINDS}}
    for sample in dataset.samples:
        folder = "test" if sample.split == "test" else "train"
        assert sample.image_path.parent == dataset.folder / "saint" / folder / sample.kind
        assert 80 <= max(images.load_image(sample.image_path).shape) <= 96, "crops take a few percent"
    assert dataset.kinds_held_out == synthesis.HELD_OUT_KINDS


def test_what_is_made_can_be_made_again_from_its_seed(built: tuple[list[Sample], data.Dataset]) -> None:
    _, dataset = built
    records = {row["image_path"]: row for row in build.read_records(dataset).to_dict("records")}
    by_path = {sample.image_path: sample for sample in dataset.samples}
    made = [s for s in dataset.samples if records[s.image_path]["origin"] == build.SYNTHETIC]
    assert set(records) == set(by_path) and len(made) == 5
    for sample in made:
        model = by_path[records[sample.image_path]["source_path"]]
        assert model.split == "test" and not model.is_anomalous and model.group == sample.group
        before, after = images.load_image(model.image_path), images.load_image(sample.image_path)
        mask = data.mask_of(sample)
        assert mask.any() and (before[~mask] == after[~mask]).all() and (before[mask] != after[mask]).any()
        again, _, _ = synthesis.synthesize(before, sample.kind, np.random.default_rng(sample.synthesis_seed))
        assert (again == after).all() and sample.visibility == records[sample.image_path]["visibility"] > 0
    for sample in (s for s in dataset.samples if records[s.image_path]["origin"] == build.REPHOTOGRAPHED):
        model = images.load_image(records[sample.image_path]["source_path"])
        again, names = synthesis.rephotograph(model, np.random.default_rng(sample.synthesis_seed))
        assert names == records[sample.image_path]["variations"]
        assert (again == images.load_image(sample.image_path)).all()
    for split in SPLITS:
        per_group = Counter(s.group for s in dataset.select(split=split, is_anomalous=False))
        assert max(per_group.values()) - min(per_group.values()) <= 1


def test_real_anomalies_and_their_masks_are_kept_for_testing(built: tuple[list[Sample], data.Dataset]) -> None:
    samples, dataset = built
    kept = dataset.select(kind="overpainted")
    assert len(kept) == 4 and {s.split for s in kept} == {"test"}
    for sample in kept:
        source = next(s for s in samples if s.image_path.stem == sample.image_path.stem)
        assert (images.load_image(sample.image_path) == images.load_image(source.image_path, max_side=96)).all()
        assert (sample.mask_path is None) == (source.mask_path is None)
        if sample.mask_path is not None:
            np.testing.assert_array_equal(data.mask_of(sample), images.load_mask(source.mask_path, (96, 80)))


def test_the_report_s_changes_of_the_whole_picture_are_tested_without_masks(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=3)
    dataset = make(samples, tmp_path / "dataset", sizes=replace(SIZES, n_test_anomalous=16))
    whole = {s.kind for s in dataset.select(is_anomalous=True) if s.mask_path is None and s.visibility is None}
    assert whole == set(synthesis.REPORT_VARIATIONS)
    counts = Counter(build.read_records(dataset).query("split == 'test'")["origin"])
    assert counts == {build.GENUINE: 1, build.REPHOTOGRAPHED: 3, build.SYNTHETIC: 16}


def test_a_scroll_keeps_its_proportions_down_to_a_limit(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=5)
    draw(samples[0].image_path, 1, (80, 700))
    draw(samples[1].image_path, 2, (10, 700))
    samples[2].image_path.write_bytes(samples[2].image_path.read_bytes()[:200])
    source = data.read_folder(tmp_path / "source")
    dataset = data.open_dataset(build.build_dataset(source, tmp_path / "dataset", SIZES, seed=7).parent)
    shapes = {images.load_image(s.image_path).shape for s in dataset.samples if s.image_path.stem == "photo_0"}
    assert shapes == {(44, 384, 3)}  # 96 px long it would be 11 px high; at most four times as long as the others
    left_out = files.read_json(dataset.folder / "manifest.json")["left_out"]
    assert [Path(file["path"]).name for file in left_out] == ["photo 1.png", "photo 2.png"]
    assert "cut it into parts" in left_out[0]["reason"]


def planned(samples: list[Sample], n: tuple[int, int, int, int], seed: int = 0):
    options = asdict(DataSettings(96, *n)) | {"seed": seed, "kinds": build.TEST_KINDS, "count_real": seed % 2 == 1}
    return build.plan(samples, options)


def rows(category: str, *parts: tuple[str, bool, int]) -> list[Sample]:
    """Source pictures without files: split, whether anomalous, and the number of the source of each."""
    return [
        Sample(Path(f"/{i:02d}.png"), category, bad, None, split, "fake" if bad else NORMAL_KIND, f"{category}/{group}")
        for i, (split, bad, group) in enumerate(parts)
    ]


@pytest.mark.parametrize("n", [0, 1, 5, 8, 26, 34])
def test_report_kinds_have_the_largest_share(n: int) -> None:
    jobs, _, _ = planned(rows("saint", *(("train", False, i) for i in range(3))), (1, 1, 1, n))
    share = Counter(job.kind for job in jobs if job.kind != NORMAL_KIND)
    report = [share[kind] for kind in synthesis.REPORT_KINDS]
    others = [share[kind] for kind in build.TEST_KINDS if kind not in synthesis.REPORT_KINDS]
    assert sum(report) + sum(others) == n and max(report) - min(report) <= 1 and max(others) - min(others) <= 1
    assert min(report) >= max(others) and (n < 26 or (min(others) > 0 and min(report) > max(others)))


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(SPLITS), st.booleans(), st.integers(0, 9)), min_size=1, max_size=24),
    seed=st.integers(0, 99),
    n=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 20)),
)
def test_no_group_crosses_splits_unless_a_limit_says_so(parts, seed, n) -> None:
    samples = rows("saint", *parts)
    jobs, notes, limits = planned(samples, n, seed)
    n_real = sum(sample.is_anomalous for sample in samples)
    if n_real == len(samples):
        assert not jobs and "saint is left out" in notes[0]
        return
    groups = [{job.group for job in jobs if job.split == split} for split in SPLITS]
    assert all(groups) and {job.group for job in jobs} <= {sample.group for sample in samples}  # no invented ones
    if groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2]:
        assert "optimistic" in limits["saint"]
    assert all(job.split == "test" for job in jobs if job.kind != NORMAL_KIND)
    assert len({job.image_path for job in jobs}) == len(jobs)
    assert sum(job.origin == build.REAL for job in jobs) == n_real
    assert sum(job.origin == build.SYNTHETIC for job in jobs) == max(0, n[3] - n_real * (seed % 2))
    genuine = [job.source_path for job in jobs if job.origin == build.GENUINE]
    assert len(set(genuine)) == len(genuine)
    for split, asked in zip(SPLITS, n, strict=False):
        assert asked <= sum(job.split == split and job.kind == NORMAL_KIND for job in jobs)
    assert planned(samples, n, seed)[0] == jobs


FEW = [(1, 0, (1, 1, 1), "Saint has few genuine pictures (1 to learn from, 0 for thresholds, 0 to test)")]
FEW += [(2, 0, (1, 1, 1), "(1 to learn from, 1 for thresholds, 0 to test)")]
FEW += [(1, 1, (1, 1, 1), "(1 to learn from, 0 for thresholds, 1 to test)")]
FEW += [(5, 0, (2, 1, 2), "rough"), (1, 4, (1, 1, 3), "rough"), (10, 4, (7, 3, 4), ""), (30, 0, (15, 6, 9), "")]


@pytest.mark.parametrize(("train", "good", "expected", "words"), FEW)
def test_few_pictures_make_a_plan_with_its_limits_said(train: int, good: int, expected: tuple, words: str) -> None:
    few = rows("saint", *(("train", False, i) for i in range(train)), *(("test", False, 50 + i) for i in range(good)))
    rich = rows("rich", *(("train", False, i) for i in range(15)))
    jobs, _, limits = planned([*rich, *few], (6, 4, 4, 5))
    sources = {(job.split, job.group) for job in jobs if job.category == "saint"}
    assert tuple(Counter(split for split, _ in sources)[split] for split in SPLITS) == expected
    limit = limits.get("saint", "")
    assert words in limit and bool(words) == bool(limit) and ("optimistic" in limit) == (train + good <= 2)
    assert "rich" not in limits


def test_same_seed_same_bytes_wherever_the_source_lies(built, tmp_path: Path) -> None:
    _, dataset = built
    samples = source_tree(tmp_path / "elsewhere", train=5, good=3, real=4)
    draw(tmp_path / "dataset.partial/saint/train/good/half.png", 1)  # what a killed run left
    again = make(samples, tmp_path / "dataset")
    assert again.hash == dataset.hash
    for file in (file for file in dataset.folder.rglob("*") if file.suffix in (".png", ".csv")):
        assert (again.folder / file.relative_to(dataset.folder)).read_bytes() == file.read_bytes()
    assert make(samples, tmp_path / "other", seed=8).hash != dataset.hash
    assert not list(tmp_path.glob("*.partial"))


def test_a_frozen_dataset_wins_over_another_library_machine_and_wording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = source_tree(tmp_path / "source", train=1)
    dataset = make(samples, tmp_path / "dataset")
    stamp = (dataset.folder / "manifest.csv").stat().st_mtime_ns
    recorded = files.read_json(dataset.folder / "manifest.json")
    recorded["machine"] |= {"opencv": "4.12.0", "machine": "a Xeon of Colab"}
    recorded["notes"] = ["worded otherwise"]
    files.write_json(dataset.folder / "manifest.json", recorded)
    monkeypatch.setattr(synthesis, "synthesize", None)  # and whatever the generators would draw today
    capsys.readouterr()
    assert make(samples[::-1], tmp_path / "dataset").hash == dataset.hash
    assert (dataset.folder / "manifest.csv").stat().st_mtime_ns == stamp
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and "opencv 4.12.0, here" in printed and "kept as it is" in printed
    assert dataset.limits["saint"] in printed


def test_what_changed_is_said_when_it_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, target = source_tree(tmp_path / "source", train=4), tmp_path / "dataset"
    hashes = [make(samples, target).hash]

    def again(words: str, pictures: list[Sample] = samples) -> str:
        capsys.readouterr()
        found = make(pictures, target, sizes=replace(SIZES, n_train=7)).hash
        assert f"is made again: {words}" in capsys.readouterr().out.replace("\n", " ")
        return found

    hashes.append(again("n_train was 6, is 7"))
    next(target.rglob("*.png")).unlink()
    assert again("") == hashes[-1]  # a lost file: the reader's words
    grouped = [replace(s, group="saint/one") if s.image_path.stem != "photo 3" else s for s in samples]
    hashes.append(again("hash of the source pictures", grouped))  # another table
    draw(samples[0].image_path, 999)  # another picture under the same name
    hashes.append(again("hash of the source pictures", list(data.read_folder(tmp_path / "source").samples)))
    assert len(set(hashes)) == 4


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    samples = source_tree(tmp_path / "source", train=1, real=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("three years of work")
    for target in (tmp_path / "source", tmp_path / "thesis"):
        with pytest.raises(DatasetError, match="holds other files"):
            make(samples, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "thesis"]
    assert len(list((tmp_path / "source").rglob("*.png"))) == 3 and (tmp_path / "thesis/thesis.txt").exists()


@pytest.mark.parametrize("kinds", [("box", "burn"), (), synthesis.NORMAL_VARIATIONS[:1]])
def test_impossible_kinds_are_refused(tmp_path: Path, kinds: tuple) -> None:
    with pytest.raises(ValueError, match="burn" if "burn" in kinds else kinds[0] if kinds else "are none"):
        build.build_dataset(data.FolderReading(tmp_path, ""), tmp_path / "dataset", SIZES, seed=1, kinds=kinds)


def test_two_artworks_with_names_alike_stay_apart() -> None:
    jobs, _, _ = planned([s for name in ("Saint?", "saint?") for s in rows(name, ("train", False, 1))], (1, 1, 1, 1))
    folders = {(job.category, job.image_path.parts[0]) for job in jobs}
    assert folders == {("Saint?", "Saint"), ("saint?", "saint_2")}
