"""Finished work outlives the machine: saved to a disk that fails, brought back whole, whenever the session ends."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from failing_drive import FailingDrive, is_killed

from helpers import files
from helpers.colab import keep
from helpers.colab.keep import Archive

COMPLETE = {
    "weights/imagebind": ("model.safetensors", "config.json", "READY.json"),
    "data/embedded": ("manifest.csv", "girl/test/good/001.png", "manifest.json"),
    "results/clip_lof": ("predictions.csv", "maps/ab.npy", "manifest.json"),
    "results/report_2024/clip_lof": ("predictions.csv", "manifest.json"),
    "checkpoints/anomalygpt/c4cb/step_00000010": ("model.safetensors", "checkpoint.json"),
    "checkpoints/anomalygpt/c4cb": ("model.safetensors", "training.json"),
    "report": ("comparison.csv", "figures/auroc.png", "index.html"),
    "files": ("history.csv",),
}
UNFINISHED = (
    "weights/vicuna/model-00001-of-00003.safetensors", "weights/llama/READY.json", "features/45d2/rows.jsonl",
    "weights/raw/imagebind_huge.pth.part", "results/.anomalyclip.partial/journal.jsonl",
    "checkpoints/anomalygpt/c4cb/.partial/model.safetensors", "executed/01_prepare_weights.json",
)  # fmt: skip


def made(unit: str, version: int) -> dict[str, bytes]:
    """Name -> bytes of a unit's files."""
    return {name: f"{unit}/{name}, version {version}\n".encode() * (50 * version) for name in COMPLETE[unit]}


def write(home: Path, unit: str, version: int = 1) -> None:
    for name, content in made(unit, version).items():
        files.write_bytes((home if unit == "files" else home / unit) / name, content)


def contents(home: Path) -> dict[str, dict[str, bytes]]:
    """Unit -> name -> bytes."""
    found, roots = keep.find_units(home), {"files": home}
    return {u: {str(p.relative_to(roots.get(u, home / u))): p.read_bytes() for p in found[u]} for u in found}


def archive_of(folder: Path, disk: FailingDrive | None = None, **options: object) -> Archive:
    return Archive(folder / "art-anomaly" / "mini", disk and disk.reconnect, **{"wait_seconds": 0, **options})


def states(outcomes: list[keep.Outcome]) -> dict[str, str]:
    return {outcome.unit: outcome.state for outcome in outcomes}


def failure(outcomes: list[keep.Outcome]) -> str:
    """What is said of the one unit that failed."""
    (failed,) = (str(outcome) for outcome in outcomes if outcome.state == "failed")
    return failed


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    (tmp_path / "cloud").mkdir()
    return tmp_path / "cloud"


@pytest.fixture
def kept(tmp_path: Path, cloud: Path) -> tuple[Path, Archive]:
    """A complete workspace, and the archive that holds all of it."""
    home, archive = tmp_path / "home", archive_of(cloud)
    assert keep.restore(home, archive) == []
    for unit in COMPLETE:
        write(home, unit)
    for name in UNFINISHED:
        files.write_bytes(home / name, b"half")
    assert states(keep.save(home, archive)) == dict.fromkeys(COMPLETE, "saved")
    return home, archive


def test_a_fresh_machine_gets_every_unit_back_and_nothing_unfinished(tmp_path: Path, kept, cloud: Path) -> None:
    home, archive = kept
    assert contents(home).keys() == COMPLETE.keys()
    fresh = tmp_path / "fresh"
    assert set(states(keep.restore(fresh, archive)).values()) == {"restored"}
    assert contents(fresh) == contents(home)
    assert not [name for name in UNFINISHED if (fresh / name).exists()]
    with FailingDrive(cloud).installed() as disk:
        assert keep.save(home, archive) == keep.save(fresh, archive) == [], "what is up to date costs no access"
        assert disk.n_calls == 0


def test_a_changed_unit_replaces_the_older_zip_and_leaves_nothing_in_the_bin(tmp_path, kept, monkeypatch) -> None:
    home, archive = kept
    unlink, sizes = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        sizes.extend([path.stat().st_size] if path.parent == archive.folder else [])
        unlink(path, missing_ok)

    write(home, "results/clip_lof", version=2)
    shutil.rmtree(home / "checkpoints/anomalygpt/c4cb/step_00000010")
    (archive.folder / "x.zip.part").write_bytes(b"of a session long ago")
    os.utime(archive.folder / "x.zip.part", (1, 1))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", watched)
        assert states(keep.save(home, archive)) == {"results/clip_lof": "saved"}
        keep.restore(tmp_path / "fresh", archive)
    assert sizes == [0, 0, 0], "deleted files would fill the bin for 30 days"
    assert len(list(archive.folder.iterdir())) == len(COMPLETE) - 1
    assert contents(tmp_path / "fresh") == contents(home)


def test_local_work_is_never_replaced_and_an_unmarked_folder_gives_way(tmp_path: Path, kept) -> None:
    archive, home = kept[1], tmp_path / "other"
    write(home, "results/clip_lof", version=2)
    write(home, "weights/imagebind", version=2)
    (home / "weights/imagebind/READY.json").unlink()
    found = states(keep.restore(home, archive))
    assert "results/clip_lof" not in found and found["weights/imagebind"] == "restored"
    assert contents(home)["results/clip_lof"] == made("results/clip_lof", 2)
    assert contents(home)["weights/imagebind"] == made("weights/imagebind", 1)
    assert states(keep.save(home, archive)) == {"results/clip_lof": "saved"}, "the newer version is kept, too"


def test_a_unit_too_large_is_named_once_and_kept_when_the_limit_is_raised(kept, cloud: Path) -> None:
    home, small = kept[0], archive_of(cloud, max_unit_bytes=12_000)
    write(home, "weights/imagebind", version=9)
    assert states(keep.save(home, small)) == {"weights/imagebind": "too large"} and keep.save(home, small) == []
    assert states(keep.save(home, kept[1])) == {"weights/imagebind": "saved"}
    assert keep.MAX_UNIT_BYTES > 1_972_218_882 * 1.05, "ImageBind in float16 belongs on Drive"


def test_nothing_is_replaced_unseen(tmp_path: Path, kept, cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = kept[1]
    assert "Run the set-up cell again" in failure(keep.save(tmp_path / "machine without Drive", archive))
    (packed,) = archive.folder.glob("results+clip_lof.*.zip")
    good = packed.read_bytes()
    packed.write_bytes(good[:100] + b"x" + good[101:])
    home, hasty = tmp_path / "other", archive_of(cloud, n_tries=2)
    assert "delete results+clip_lof.*.zip" in failure(keep.restore(home, hasty))
    assert not (home / "results/clip_lof").exists()
    write(home, "results/clip_lof", version=2)
    assert "not replaced" in failure(keep.save(home, hasty))
    packed.write_bytes(good)
    assert keep.restore(home, hasty) == [], "what is here already stays"
    for name in ("../outside", "/tmp/outside", "results/other/x", "results/evil/../../outside"):
        with zipfile.ZipFile(archive.folder / f"results+evil.{time.time_ns()}.zip", "w") as evil:
            evil.writestr(name, b"x")
        assert "leads outside" in failure(keep.restore(tmp_path / "fresh", archive))
    ticks = itertools.count()
    monkeypatch.setattr(keep, "_stamp", lambda home, paths: str(next(ticks)))
    assert "changed while it was packed" in failure(keep.save(home, hasty)[:1])


def test_a_dead_a_full_and_a_lost_disk_are_reported_and_keep_what_they_have(tmp_path: Path, kept, cloud: Path) -> None:
    home, before = kept[0], contents(kept[0])
    archive = archive_of(cloud, n_tries=2)
    write(home, "results/clip_lof", version=2)
    with FailingDrive(cloud, is_full=True).installed() as disk:
        assert re.search("No space left.*Free space", failure(keep.save(home, archive)))
        disk.is_lost = True
        assert re.search("endpoint is not connected.*in 2 attempts", failure(keep.save(home, archive)))
    keep.restore(tmp_path / "fresh", archive)
    assert contents(tmp_path / "fresh") == before
    assert states(keep.save(home, archive)) == {"results/clip_lof": "saved"}
    lost = archive_of(tmp_path / "content" / "drive", n_tries=2)
    assert "cannot be listed" in failure(keep.restore(tmp_path / "x", lost))
    assert not (tmp_path / "content").exists(), "a lost mount does not become a local folder"


def _session(home: Path, cloud: Path, seed: int, kill_at: int, log: Path) -> None:
    """A machine's life: restore, then work and save by turns. Ends at its ``kill_at``-th change of a file."""
    with FailingDrive(cloud, seed=seed, rate=0.1, kill_at=kill_at).installed() as disk:
        archive = archive_of(cloud, disk, n_tries=30)
        keep.restore(home, archive)
        for version in (1, 2):
            for unit in COMPLETE:
                write(home, unit, version)
            done = [f"{o.unit} {version}\n" for o in keep.save(home, archive) if o.state == "saved"]
            with open(log, "a") as file:
                file.writelines(done)


@pytest.mark.parametrize("seed", range(8))
def test_whenever_a_session_ends_the_next_machine_has_all_that_was_kept(tmp_path: Path, cloud: Path, seed: int) -> None:
    """Three machines in a row, each killed at a random moment; then a fresh one restores through failures."""
    draw, log = random.Random(seed), tmp_path / "saved.txt"
    log.touch()
    machines = [(tmp_path / f"machine{n}", cloud, seed + n, draw.randrange(1, 500), log) for n in range(3)]
    machines += [(tmp_path / "machine3", cloud, seed, 0, log)] * (seed % 2)  # every second life ends in peace
    n_killed = sum(is_killed(_session, *machine) for machine in machines)
    promised = {unit: int(version) for unit, version in map(str.split, log.read_text().splitlines())}
    fresh = tmp_path / "fresh"
    with FailingDrive(cloud, seed=seed, rate=0.1).installed() as disk:
        outcomes = keep.restore(fresh, archive_of(cloud, disk, n_tries=30))
    assert {outcome.state for outcome in outcomes} <= {"restored"}
    found = contents(fresh)
    assert found.keys() >= promised.keys(), "what was reported as saved is there"
    for unit, here in found.items():
        whole = [made(unit, version) for version in range(promised.get(unit, 1), 3)]
        assert here in whole, f"{unit} is mixed, half or older than promised"
    assert seed % 2 == 0 or contents(fresh) == {unit: made(unit, 2) for unit in COMPLETE}, "nothing is lost or half"
    assert n_killed and disk.n_failures
