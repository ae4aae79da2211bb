"""Finished work outlives the machine: saved to a disk that fails, brought back whole, whenever the session ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from helpers import files as storage
from helpers.colab import keep as persistence
from helpers.colab.keep import Archive
from helpers.weights import fetch as downloads

sys.path.insert(0, str(Path(__file__).parent / "fake_colab"))
from failing_drive import FailingDrive

COMPLETE = {
    "weights/imagebind": ("model.safetensors", "config.json", "READY.json"),
    "weights/anomalygpt/train_visa": ("model.safetensors", "READY.json"),
    "data/embedded": ("manifest.csv", "girl/test/good/001.png", "manifest.json"),
    "results/clip_lof": ("predictions.csv", "maps/ab.npy", "manifest.json"),
    "results/report_2024/clip_lof": ("predictions.csv", "manifest.json"),
    "checkpoints/anomalygpt/c4cb/step_00000010": ("model.safetensors", "state.pt", "training.json"),
    "checkpoints/anomalygpt/c4cb": ("model.safetensors", "training.json"),
    "checkpoints/clip_lof": ("girl.json", "mona_lisa.json"),
    "report": ("comparison.csv", "figures/auroc.png", "index.html"),
    "files": ("history.csv",),
}
UNFINISHED = (
    "weights/vicuna/model-00001-of-00003.safetensors",
    "weights/vicuna/journal.json",
    "weights/llama/READY.json",
    "weights/raw/imagebind_huge.pth.part",
    "data/embedded.partial/girl/test/good/001.png",
    "results/.anomalyclip.partial/journal.jsonl",
    "checkpoints/anomalygpt/c4cb/.partial-1f/model.safetensors",
    "features/45d2/ab.npz",
    "executed/01_prepare_weights.json",
)


def write(home: Path, unit: str, version: int = 1) -> None:
    folder = home if unit == "files" else home / unit
    for name in COMPLETE[unit]:
        content = f"{unit}/{name}, version {version}\n".encode() * (50 * version)
        storage.write_bytes(folder / name, content)


def workspace(home: Path, version: int = 1) -> Path:
    for unit in COMPLETE:
        write(home, unit, version)
    for name in UNFINISHED:
        storage.write_bytes(home / name, b"half")
    return home


def contents(home: Path) -> dict[str, dict[str, bytes]]:
    """Unit -> relative name -> bytes."""
    return {
        unit: {path.relative_to(home).as_posix(): path.read_bytes() for path in files}
        for unit, files in persistence.find_units(home).items()
    }


def archive_of(folder: Path, disk: FailingDrive | None = None, **options: object) -> Archive:
    reconnect = None if disk is None else disk.reconnect
    return Archive(folder / "art-anomaly" / "mini", reconnect, **{"wait_seconds": 0, **options})


def states(outcomes: list[persistence.Outcome]) -> dict[str, str]:
    return {outcome.unit: outcome.state for outcome in outcomes}


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    (tmp_path / "cloud").mkdir()
    return tmp_path / "cloud"


def test_units_are_the_finished_folders_and_their_marks_come_last(tmp_path: Path) -> None:
    units = persistence.find_units(workspace(tmp_path))
    assert units.keys() == COMPLETE.keys()
    assert units["weights/imagebind"][-1].name in ("READY.json", "config.json")
    assert units["results/clip_lof"][-1].name == "manifest.json"
    assert units["checkpoints/anomalygpt/c4cb"][-1].name == "training.json"


def test_a_fresh_machine_gets_every_unit_back_and_nothing_unfinished(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud)
    assert persistence.restore(home, archive) == []
    assert set(states(persistence.save(home, archive)).items()) == {(unit, "saved") for unit in COMPLETE}
    fresh = tmp_path / "fresh"
    assert set(states(persistence.restore(fresh, archive)).values()) == {"restored"}
    assert contents(fresh) == contents(home)
    assert not [name for name in UNFINISHED if (fresh / name).exists()]


def test_what_is_up_to_date_costs_no_access(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud)
    persistence.restore(home, archive)
    persistence.save(home, archive)
    with FailingDrive(cloud).installed() as disk:
        assert persistence.save(home, archive) == []
        assert disk.n_calls == 0
    fresh = tmp_path / "fresh"
    persistence.restore(fresh, archive)
    assert persistence.save(fresh, archive) == [], "restored units are not sent back"


def test_a_changed_unit_replaces_the_older_archive(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud)
    persistence.restore(home, archive)
    persistence.save(home, archive)
    write(home, "results/clip_lof", version=2)
    assert states(persistence.save(home, archive)) == {"results/clip_lof": "saved"}
    assert len(list(archive.folder.glob("results+clip_lof.*.tar"))) == 1
    persistence.restore(tmp_path / "fresh", archive)
    assert contents(tmp_path / "fresh") == contents(home)


def test_local_work_is_never_replaced_by_the_archive(tmp_path: Path, cloud: Path) -> None:
    archive = archive_of(cloud)
    persistence.restore(workspace(tmp_path / "old"), archive)
    persistence.save(tmp_path / "old", archive)
    home = tmp_path / "home"
    write(home, "results/clip_lof", version=2)
    mine = contents(home)["results/clip_lof"]
    assert states(persistence.restore(home, archive))["results/clip_lof"] == "here"
    assert contents(home)["results/clip_lof"] == mine
    assert states(persistence.save(home, archive)) == {"results/clip_lof": "saved"}, "the newer version is kept, too"


def test_a_folder_without_its_mark_gives_way_to_the_complete_one(tmp_path: Path, cloud: Path) -> None:
    archive = archive_of(cloud)
    persistence.restore(workspace(tmp_path / "old"), archive)
    persistence.save(tmp_path / "old", archive)
    home = workspace(tmp_path / "home")
    (home / "weights/imagebind/READY.json").unlink()
    (home / "weights/imagebind/half.safetensors").write_bytes(b"half")
    assert states(persistence.restore(home, archive))["weights/imagebind"] == "restored"
    assert not (home / "weights/imagebind/half.safetensors").exists()


def test_checkpoints_that_training_dropped_leave_the_archive(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud)
    persistence.restore(home, archive)
    persistence.save(home, archive)
    shutil.rmtree(home / "checkpoints/anomalygpt/c4cb/step_00000010")
    persistence.save(home, archive)
    assert not list(archive.folder.glob("*step_*"))
    persistence.restore(tmp_path / "fresh", archive)
    assert contents(tmp_path / "fresh") == contents(home)


def test_a_unit_too_large_for_drive_is_named_once(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud, max_unit_bytes=12_000)
    persistence.restore(home, archive)
    write(home, "weights/imagebind", version=9)
    found = states(persistence.save(home, archive))
    assert found["weights/imagebind"] == "too large" and found["report"] == "saved"
    assert persistence.save(home, archive) == []


def test_a_unit_that_changes_while_it_is_packed_is_not_kept(
    tmp_path: Path, cloud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, archive = tmp_path / "home", archive_of(cloud)
    write(home, "results/clip_lof")
    persistence.restore(home, archive)
    hashing = storage.sha256_file

    def change(path: Path) -> str:
        if path.name == "manifest.json":
            os.utime(path, (1, 1))
        return hashing(path)

    monkeypatch.setattr(storage, "sha256_file", change)
    (outcome,) = persistence.save(home, archive)
    assert outcome.state == "failed" and "changed while it was packed" in outcome.problem
    assert not list(archive.folder.iterdir())


def test_saving_before_the_archive_was_seen_is_refused(tmp_path: Path, cloud: Path) -> None:
    """A lost Drive at the start of a session must not lead to older work being replaced unseen."""
    home = workspace(tmp_path / "home")
    (outcome,) = persistence.save(home, archive_of(cloud))
    assert outcome.state == "failed" and "Run the set-up cell again" in outcome.problem
    assert not list(cloud.iterdir())


def test_what_could_not_be_restored_is_not_replaced(tmp_path: Path, cloud: Path) -> None:
    archive = archive_of(cloud, n_tries=2)
    persistence.restore(workspace(tmp_path / "old"), archive)
    persistence.save(tmp_path / "old", archive)
    (tar,) = archive.folder.glob("results+clip_lof.*.tar")
    good = tar.read_bytes()
    tar.write_bytes(good[:100] + b"x" + good[101:])
    home = tmp_path / "home"
    outcome = next(o for o in persistence.restore(home, archive) if o.state == "failed")
    assert outcome.unit == "results/clip_lof" and "delete results+clip_lof.json" in outcome.problem
    assert not (home / "results/clip_lof").exists()
    write(home, "results/clip_lof", version=2)
    (outcome,) = persistence.save(home, archive)
    assert outcome.state == "failed" and "not replaced" in outcome.problem
    tar.write_bytes(good)
    assert states(persistence.restore(home, archive))["results/clip_lof"] == "here"
    assert states(persistence.save(home, archive)) == {"results/clip_lof": "saved"}


def test_files_that_join_a_folder_come_one_by_one_and_the_mark_last(
    tmp_path: Path, cloud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(cloud)
    persistence.restore(workspace(tmp_path / "old"), archive)
    persistence.save(tmp_path / "old", archive)
    replace, moved = os.replace, []

    def watched(source: Path, target: Path) -> None:
        moved.append(Path(target).relative_to(tmp_path / "home").as_posix())
        replace(source, target)

    (tmp_path / "home/checkpoints/anomalygpt/c4cb").mkdir(parents=True)
    monkeypatch.setattr(os, "replace", watched)
    persistence.restore(tmp_path / "home", archive)
    order = [name for name in moved if name.startswith("checkpoints/anomalygpt/c4cb/") and "step_" not in name]
    assert order == [f"checkpoints/anomalygpt/c4cb/{name}" for name in ("model.safetensors", "training.json")]
    assert "results/clip_lof" in moved, "a folder that is not there yet appears at once"


def test_archives_cannot_write_outside_the_workspace(tmp_path: Path, cloud: Path) -> None:
    import tarfile

    archive = archive_of(cloud, n_tries=1)
    persistence.restore(tmp_path / "old", archive)
    (tmp_path / "evil").write_bytes(b"x")
    tar = archive.folder / "report.0.tar"
    with tarfile.open(tar, "w") as packed:
        packed.add(tmp_path / "evil", arcname="../../outside")
    index = {"unit": "report", "archive": tar.name, "sha256": storage.sha256_file(tar), "files": {}}
    storage.write_json(archive.folder / "report.json", index)
    (outcome,) = persistence.restore(tmp_path / "home", archive)
    assert outcome.state == "failed" and "leads outside" in outcome.problem


# --- a disk that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_failures_lose_nothing_and_leave_nothing_half(tmp_path: Path, cloud: Path, seed: int) -> None:
    """Error 107, files that seem gone, input/output errors and short copies, in a tenth of all calls."""
    home = workspace(tmp_path / "home")
    with FailingDrive(cloud, seed=seed, rate=0.1).installed() as disk:
        archive = archive_of(cloud, disk, n_tries=30)
        persistence.restore(home, archive)
        saved = states(persistence.save(home, archive))
        fresh = tmp_path / "fresh"
        back = states(persistence.restore(fresh, archive))
        assert disk.n_failures > 10 and disk.n_reconnects > 0
    assert set(saved.values()) == {"saved"} and set(back.values()) == {"restored"}
    assert contents(fresh) == contents(home)


def test_a_dead_disk_is_reported_and_the_next_round_goes_on(tmp_path: Path, cloud: Path) -> None:
    home = workspace(tmp_path / "home")
    with FailingDrive(cloud).installed() as disk:
        archive = archive_of(cloud, n_tries=3)
        persistence.restore(home, archive)
        disk.is_lost = True
        (outcome,) = persistence.save(home, archive)
        assert outcome.state == "failed" and "Transport endpoint is not connected" in outcome.problem
        assert "in 3 attempts" in outcome.problem
        disk.is_lost = False
        assert len(persistence.save(home, archive)) == len(COMPLETE)
    persistence.restore(tmp_path / "fresh", archive)
    assert contents(tmp_path / "fresh") == contents(home)


def test_a_copy_that_fails_leaves_the_older_one(tmp_path: Path, cloud: Path) -> None:
    target = cloud / "index.json"
    target.write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    with (
        FailingDrive(cloud, is_full=True).installed(),
        pytest.raises(downloads.DownloadError, match=r"in 2 attempts .*Free space"),
    ):
        downloads.copy_verified(tmp_path / "new", target, n_tries=2, wait_seconds=0)
    assert target.read_bytes() == b"old" and os.listdir(cloud) == ["index.json"]


def test_a_lost_mount_does_not_become_a_local_folder(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "content" / "drive", n_tries=2)
    (outcome,) = persistence.restore(workspace(tmp_path / "home"), archive)
    assert outcome.state == "failed" and "cannot be listed" in outcome.problem
    assert not (tmp_path / "content").exists()


def test_a_full_drive_keeps_what_it_has(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud, n_tries=2)
    persistence.restore(home, archive)
    persistence.save(home, archive)
    before = contents(home)
    write(home, "results/clip_lof", version=2)
    with FailingDrive(cloud, is_full=True).installed():
        (outcome,) = persistence.save(home, archive)
    assert (
        outcome.state == "failed" and os.strerror(errno.ENOSPC) in outcome.problem and "Free space" in outcome.problem
    )
    persistence.restore(tmp_path / "fresh", archive)
    assert contents(tmp_path / "fresh") == before


def test_leftovers_are_swept_up_after_a_day(tmp_path: Path, cloud: Path) -> None:
    home, archive = workspace(tmp_path / "home"), archive_of(cloud)
    persistence.restore(home, archive)
    persistence.save(home, archive)
    n_before = len(list(archive.folder.iterdir()))
    for name, age in (("old.tar", 2), ("old.json.part", 2), ("new.tar", 0)):
        (archive.folder / name).write_bytes(b"orphan")
        os.utime(archive.folder / name, (time.time() - age * 86_400,) * 2)
    persistence.restore(tmp_path / "fresh", archive)
    assert {path.name for path in archive.folder.iterdir()} >= {"new.tar"}
    assert len(list(archive.folder.iterdir())) == n_before + 1


# --- a session that ends at any moment ------------------------------------------------------------------------------


def _session(home: Path, cloud: Path, seed: int, kill_at: int, log: Path) -> None:
    """A machine's life: restore, then work and save by turns. Ends at its ``kill_at``-th change of a file."""
    disk = FailingDrive(cloud, seed=seed, rate=0.1, kill_at=kill_at)
    archive = archive_of(cloud, disk, n_tries=30)
    with disk.installed():
        persistence.restore(home, archive)
        for version in (1, 2):
            for unit in COMPLETE:
                write(home, unit, version)
            done = [f"{o.unit} {version}\n" for o in persistence.save(home, archive) if o.state == "saved"]
            with open(log, "a") as file:
                file.writelines(done)


def _run_until_killed(home: Path, cloud: Path, seed: int, kill_at: int, log: Path) -> bool:
    """True when the session was killed, False when it came to its end before."""
    process = multiprocessing.get_context("fork").Process(target=_session, args=(home, cloud, seed, kill_at, log))
    process.start()
    process.join()
    assert process.exitcode in (0, -9), process.exitcode
    return process.exitcode == -9


def _versions(found: dict[str, bytes], unit: str) -> set[int]:
    return {
        version
        for version in (1, 2)
        for name, content in found.items()
        if content == f"{unit}/{name.removeprefix(unit + '/')}, version {version}\n".encode() * (50 * version)
    }


@pytest.mark.parametrize("seed", range(30))
def test_whenever_a_session_ends_the_next_machine_has_all_that_was_kept(tmp_path: Path, cloud: Path, seed: int) -> None:
    """Three machines in a row, each killed at a random moment; then a fresh one restores through failures."""
    draw, log = random.Random(seed), tmp_path / "saved.txt"
    log.touch()
    n_killed = sum(
        _run_until_killed(tmp_path / f"machine{number}", cloud, seed + number, draw.randrange(1, 900), log)
        for number in range(3)
    )
    promised: dict[str, int] = {}
    for line in log.read_text().splitlines():
        unit, version = line.split()
        promised[unit] = int(version)
    fresh = tmp_path / "fresh"
    with FailingDrive(cloud, seed=seed, rate=0.1).installed() as disk:
        outcomes = persistence.restore(fresh, archive_of(cloud, disk, n_tries=30))
    assert {outcome.state for outcome in outcomes} <= {"restored"}
    found = contents(fresh)
    assert found.keys() >= promised.keys(), "what was reported as saved is there"
    for unit, files in found.items():
        assert len(files) == len(COMPLETE[unit]) and len(_versions(files, unit)) == 1, f"{unit} is mixed or half"
    assert n_killed or len(promised) == len(COMPLETE)


@pytest.mark.parametrize("seed", range(10))
def test_a_restore_that_is_killed_goes_on(tmp_path: Path, cloud: Path, seed: int) -> None:
    archive = archive_of(cloud)
    persistence.restore(workspace(tmp_path / "old"), archive)
    persistence.save(tmp_path / "old", archive)
    home, draw = tmp_path / "home", random.Random(seed)

    def killed() -> None:
        with FailingDrive(cloud, kill_at=draw.randrange(1, 250)).installed():
            persistence.restore(home, archive)

    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=killed)
        process.start()
        process.join()
        draw.random()
        for unit, files in contents(home).items() if home.exists() else ():
            is_marked = unit.split("/")[0] in ("weights", "data", "results")
            assert not is_marked or len(files) == len(COMPLETE[unit])
    persistence.restore(home, archive)
    assert contents(home) == contents(tmp_path / "old")


def test_checkpoints_in_a_long_cell_are_kept_now_and_then(tmp_path: Path, cloud: Path) -> None:
    home, archive, lines = workspace(tmp_path / "home"), archive_of(cloud), []
    persistence.restore(home, archive)
    keep = persistence.keeper(home, archive, min_seconds=3600, log=lines.append)
    keep(home / "checkpoints/anomalygpt/c4cb/step_00000010")
    assert len(lines) == len(COMPLETE) and lines[0].startswith("kept: ")
    write(home, "results/clip_lof", version=2)
    keep(home / "checkpoints/anomalygpt/c4cb/step_00000010")
    assert len(lines) == len(COMPLETE), "the second call came too early"


# --- what the notebooks make of it ----------------------------------------------------------------------------------


def _move_house(home: Path, cloud: Path, fresh: Path) -> None:
    archive = archive_of(cloud)
    persistence.restore(home, archive)
    assert {outcome.state for outcome in persistence.save(home, archive)} == {"saved"}
    assert {outcome.state for outcome in persistence.restore(fresh, archive)} == {"restored"}


def test_a_restored_dataset_is_found_complete_and_its_results_are_read(
    tmp_path: Path, cloud: Path, capsys: pytest.CaptureFixture
) -> None:
    import cv2
    import numpy as np

    from helpers import results
    from helpers.data import build as assemble
    from helpers.data import images
    from helpers.data import manifest as data
    from helpers.records import Prediction

    for i in range(6):
        rough = np.random.default_rng(i).integers(0, 256, (5, 4, 3), np.uint8)
        images.save_png(tmp_path / f"pictures/saint/train/good/{i}.png", cv2.resize(rough, (50, 60)))
    settings = {"n_train": 4, "n_calibration": 2, "n_test_normal": 2, "n_test_anomalous": 2, "max_side": 48, "seed": 7}

    def build(home: Path) -> data.Dataset:
        samples = data.read_folder(tmp_path / "pictures").samples
        return data.open_dataset(assemble.build_dataset(samples, home / "data" / "saint", **settings).parent)

    made = build(tmp_path / "home")
    test = made.select(split="test")
    run = {"method": "clip_lof", "dataset_hash": made.hash, "profile": "mini", "settings": {"k": 5}}
    folder = tmp_path / "home" / "results" / "clip_lof"
    with results.Writer(folder, samples=test, dataset_dir=made.folder, **run) as writer:
        for number, sample in enumerate(test):
            writer.add(Prediction(sample, float(number), np.ones((3, 2), np.float32), 1.0, 0.5, 0.1))
    _move_house(tmp_path / "home", cloud, tmp_path / "fresh")
    capsys.readouterr()
    found = build(tmp_path / "fresh")
    assert "nothing to do" in capsys.readouterr().out and found.hash == made.hash
    folder = tmp_path / "fresh" / "results" / "clip_lof"
    assert results.is_complete(folder, dataset_hash=made.hash, settings={"k": 5})
    read = results.read(folder, found.select(split="test"), found.folder, found.hash)
    assert [p.anomaly_score for p in read.predictions] == [float(n) for n in range(len(test))]
    assert read.anomaly_map(read.predictions[0]).shape == (3, 2)


def test_training_goes_on_from_a_restored_checkpoint(tmp_path: Path, cloud: Path) -> None:
    import torch

    from helpers import training_old as training

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((self.slope - 3) ** 2 * batch).mean()}

    def train(home: Path, n_epochs: int) -> tuple[training.TrainingResult, float]:
        module = Line()
        result = training.train(
            module, [torch.ones(1)] * 4, torch.optim.SGD(module.parameters(), lr=0.1),
            folder=home / "checkpoints" / "line",
            settings=training.TrainingSettings(n_epochs=n_epochs, batch_size=2, seed=1),
        )  # fmt: skip
        return result, module.slope.item()

    train(tmp_path / "home", 1)
    _move_house(tmp_path / "home", cloud, tmp_path / "fresh")
    (through, slope), (resumed, same) = train(tmp_path / "straight", 2), train(tmp_path / "fresh", 2)
    assert resumed.n_steps == through.n_steps == 4 and same == slope
    assert len(resumed.history) == len(through.history), "the first epoch was not trained again"
