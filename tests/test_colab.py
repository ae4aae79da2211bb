"""Colab's services with their failures, the preflight table, and what the set-up cell does on a machine that fails."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from helpers import files, profiles
from helpers.colab import keep, preflight, session

pytestmark = pytest.mark.usefixtures("clean_environment")


class FakeDrive(SimpleNamespace):
    """``google.colab`` with ``drive`` and ``runtime``: My Drive is a link; mounting fails as often as a test says."""

    def __init__(self, cloud: Path) -> None:
        calls: list[str] = []
        super().__init__(cloud=cloud, errors=[], calls=calls, drive=self, runtime=self)
        self.flush_and_unmount, self.unassign = (partial(calls.append, name) for name in ("flush", "unassign"))

    def mount(self, mountpoint: str, force_remount: bool = False) -> None:
        self.calls.append("mount(force)" if force_remount else "mount")
        if self.errors:
            raise self.errors.pop(0)
        if any(Path(mountpoint).glob("*")):
            raise ValueError("Mountpoint must not already contain files")
        Path(mountpoint).mkdir(parents=True, exist_ok=True)
        (Path(mountpoint) / "MyDrive").symlink_to(self.cloud, target_is_directory=True)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDrive:
    """``google.colab`` is loaded, as in Colab's kernels, and My Drive is an empty folder."""
    found = FakeDrive(tmp_path / "cloud")
    found.cloud.mkdir()
    monkeypatch.setitem(sys.modules, "google.colab", found)
    monkeypatch.setattr(session, "MOUNT_POINT", tmp_path / "content" / "drive")
    return found


def test_drive_is_mounted_once_and_again_when_it_was_lost(fake: FakeDrive, monkeypatch) -> None:
    assert session.lasting_folder("cpu") is None and fake.calls == []
    root = session.mount_drive()
    assert session.lasting_folder("cuda") == root / "art-anomaly" and root == session.MOUNT_POINT / "MyDrive"
    assert fake.calls == ["mount"] and preflight.is_reachable(root)
    root.unlink()
    assert preflight.is_reachable(session.mount_drive()) and fake.calls == ["mount", "mount(force)"]
    session.disconnect()
    assert fake.calls[2:] == ["flush", "unassign"], "Drive is flushed before the machine goes"
    monkeypatch.setenv("ART_DRIVE", "off")
    assert session.lasting_folder("cuda") is None
    monkeypatch.setenv("ART_DRIVE", "/somewhere/else")
    assert session.lasting_folder("cpu") == Path("/somewhere/else")


def test_a_mount_that_fails_says_why_and_work_goes_on(fake: FakeDrive) -> None:
    for error, advice in (
        (ValueError("mount failed: timeout during initial read of root folder"), "too many files"),
        (RuntimeError("credential propagation was unsuccessful"), "allow access"),
        (NotImplementedError("unsupported in this environment"), "ART_DRIVE"),
    ):
        fake.errors, lines = [error], []
        assert session.mount_drive(log=lines.append) is None
        assert str(error) in lines[0] and advice in lines[0]
    assert preflight.is_reachable(session.mount_drive()), "the next try may succeed"


def test_without_gpu_and_drive_the_set_up_only_prints(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert session.start().name == "mini"
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in ("GPU", "memory", "disk", "kept files", "weights"))
    assert "to do: 01, 02" in out and session.checkpoint_keeper() is None
    assert not (tmp_path / "home").exists()
    session.disconnect()
    assert session.mount_drive() is None and capsys.readouterr().out.count("not on Colab") == 2


def test_pictures_on_drive_are_reached_before_they_are_looked_for(fake: FakeDrive, monkeypatch) -> None:
    (fake.cloud / "my pictures").mkdir()
    session.MOUNT_POINT.parent.mkdir()
    monkeypatch.chdir(session.MOUNT_POINT.parent)
    for asked in ("drive/MyDrive/my pictures", f'"{session.MOUNT_POINT}/MyDrive/my pictures"'):
        monkeypatch.setenv("ART_DATA", asked)
        assert session.start().data_source == fake.cloud / "my pictures" and fake.calls == ["mount"]


def test_what_a_cell_finishes_is_kept_when_it_ends_and_comes_back(monkeypatch, tmp_path: Path) -> None:
    shell, lines = InteractiveShell.instance(), []
    monkeypatch.setattr(session, "_current", None)
    monkeypatch.setenv("ART_DRIVE", str(tmp_path / "lasting"))
    monkeypatch.setenv("ART_DRIVE_LIMIT_GB", "much")
    monkeypatch.setattr(keep.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="is 'much'; give a number of GB"):
        session.start(log=lines.append)
    monkeypatch.setenv("ART_DRIVE_LIMIT_GB", "14.5")
    session.start(log=lines.append)
    profile = session.start(log=lines.append)
    assert session._current.archive.max_unit_bytes == 14.5e9
    files.write_json(profile.home / "results" / "clip_lof" / "manifest.json", {})
    shell.run_cell("1 + 1"), shell.run_cell("1 + 1")
    assert len([line for line in lines if line.startswith("kept: results/clip_lof")]) == 1, "two set-ups keep once"
    session.checkpoint_keeper()(profile.home)
    monkeypatch.setenv("ART_HOME", str(tmp_path / "fresh"))
    fresh = session.start(log=lines.append)
    assert (fresh.home / "results" / "clip_lof" / "manifest.json").exists()
    assert any("restored" in line for line in lines)
    shutil.rmtree(tmp_path / "lasting")
    (tmp_path / "lasting").write_text("a lost mount cannot be listed")
    files.write_json(fresh.home / "report" / "index.json", {})
    for _ in range(3):
        shell.run_cell("1 + 1")
    InteractiveShell.clear_instance()
    said = [line for line in lines if "failed" in line]
    assert len(said) == 1, "a dead Drive is said once: not at every cell, not by two set-ups"


@pytest.mark.parametrize(
    ("name", "free", "total", "capability", "fixes"),
    [
        ("NVIDIA L4", 23.0, 23.8, (8, 9), []),
        ("NVIDIA L4", 9.0, 23.8, (8, 9), ["Manage sessions"]),
        ("Tesla T4", 15.0, 15.8, (7, 5), ["Change runtime type", "fp16"]),
    ],
)
def test_what_is_short_names_the_way_out(monkeypatch, tmp_path, name, free, total, capability, fixes) -> None:
    monkeypatch.setenv("ART_PROFILE", "full")
    profile = dataclasses.replace(profiles.active(), device="cuda")
    card = {"mem_get_info": (free * 1e9, total * 1e9), "get_device_capability": capability, "get_device_name": name}
    for function, value in card.items():
        monkeypatch.setattr(torch.cuda, function, lambda *index, value=value: value)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=11e9, total=13e9))
    monkeypatch.setattr(files, "free_bytes", lambda path: int(50e9))
    gpu, memory, disk, lasting, _ = preflight.run(profile, lasting=tmp_path)
    assert gpu.is_ok == (not fixes) and all(fix in gpu.fix for fix in fixes)
    assert (memory.is_ok, disk.is_ok, lasting.is_ok) == (False, False, True), "12 GB of memory, 65 GB of disk"
    profile.home.mkdir(parents=True)
    with open(profile.home / "weights", "wb") as file:
        file.truncate(int(41e9))  # sparse: what is there already is not needed again
    *_, disk, lasting, _ = preflight.run(profile, lasting=tmp_path / "lost")
    assert disk.is_ok and "24.0 needed" in disk.found and not lasting.is_ok


def test_a_fresh_machine_with_pandagpt_but_no_vicuna_is_not_done_with_01(monkeypatch) -> None:
    """What Drive brings back (Vicuna is too large for it); and what the licences ask is said without network."""
    monkeypatch.setenv("ART_PROFILE", "full")
    profile = profiles.active()
    assert "nothing yet" in preflight.where_am_i(profile.home)
    files.write_json(profile.home / "weights" / "pandagpt" / "READY.json", {})
    files.write_json(profile.home / "data" / "embedded" / "manifest.json", {})
    assert preflight.where_am_i(profile.home) == "done here: 02; to do: 01, 03, 04, 05, 06, 07, 09"
    assert "accept the licences" in preflight.run(profile)[-1].found
    files.write_json(profile.home / "weights" / "vicuna" / "READY.json", {})
    assert preflight.where_am_i(profile.home) == "done here: 01, 02; to do: 03, 04, 05, 06, 07, 09"
    assert "ready" in preflight.run(profile)[-1].found


def test_costs_are_estimates_with_the_rate_of_the_gpu(monkeypatch) -> None:
    stages = preflight.STAGES
    assert {path.stem for path in (profiles.REPOSITORY / "notebooks").glob("*.ipynb")} == stages.keys()
    mini = preflight.costs(profiles.active())
    assert set(mini["compute units"]) == {"none"} and mini["minutes"][2] == round(stages["03_clip"][0] / 60, 1)
    monkeypatch.setenv("ART_PROFILE", "full")
    profile = profiles.active()
    row = preflight.costs(profile, "NVIDIA L4").set_index("notebook").loc["06_anomalygpt_train"]
    units = f"{1.71 * stages['06_anomalygpt_train'].l4_minutes / 60:.1f}"
    assert (row["compute units"], row["state"]) == (units, "to do")
    assert set(preflight.costs(profile, "Unknown GPU")["compute units"]) == {"unknown"}
    assert "7.52 units an hour (users, 2026-03-10)" in preflight.cost_note(profile, "NVIDIA A100-SXM4-80GB")
