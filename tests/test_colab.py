"""Colab's services with their failures, the preflight table, and what the set-up cell does on a machine that fails."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from helpers import files as storage
from helpers import profiles, runner
from helpers.colab import keep as persistence
from helpers.colab import preflight, session
from helpers.colab import session as colab
from helpers.weights import fetch as downloads

FAKE = str(Path(__file__).parent / "fake_colab")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``google.colab`` is loaded, as in Colab's kernels, and My Drive is an empty folder."""
    monkeypatch.syspath_prepend(FAKE)
    import google.colab

    google.colab.state.reset()
    google.colab.state.cloud = tmp_path / "cloud"
    google.colab.state.cloud.mkdir()
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "content" / "drive")
    yield google.colab
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ART_DRIVE", "ART_DRIVE_LIMIT_GB", "ART_DATA", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ART_PROFILE", "mini")
    monkeypatch.setenv("ART_HOME", str(tmp_path / "home"))


# --- Drive, secrets, the end of a session ---------------------------------------------------------------------------


def test_drive_is_mounted_once(fake: ModuleType) -> None:
    root = colab.mount_drive()
    assert root == colab.MOUNT_POINT / "MyDrive" and colab.is_reachable(root)
    assert colab.mount_drive() == root
    assert fake.state.calls == ["drive.mount"]


def test_a_lost_mount_is_mounted_with_force(fake: ModuleType) -> None:
    colab.mount_drive()
    (colab.MOUNT_POINT / "MyDrive").unlink()
    assert colab.is_reachable(colab.mount_drive())
    assert fake.state.calls == ["drive.mount", "drive.mount(force)"]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ValueError("mount failed: timeout during initial read of root folder"), "too many files"),
        (RuntimeError("credential propagation was unsuccessful"), "allow access"),
        (NotImplementedError("unsupported in this environment"), "ART_DRIVE"),
    ],
)
def test_a_mount_that_fails_says_why_and_work_goes_on(fake: ModuleType, error: Exception, advice: str) -> None:
    fake.state.mount_errors = [error]
    lines: list[str] = []
    assert colab.mount_drive(log=lines.append) is None
    assert str(error) in lines[0] and advice in lines[0]
    assert colab.is_reachable(colab.mount_drive()), "the next try may succeed"


def test_elsewhere_nothing_is_mounted_and_nothing_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "no" / "drive")
    lines: list[str] = []
    assert colab.mount_drive(log=lines.append) is None
    colab.disconnect(log=lines.append)
    assert len(lines) == 2 and all("not on Colab" in line for line in lines)


def test_drive_is_flushed_before_the_machine_goes(fake: ModuleType) -> None:
    colab.disconnect()
    assert fake.state.calls == ["drive.flush_and_unmount", "runtime.unassign"]


def test_secret_is_found_and_never_shown(fake: ModuleType, capsys: pytest.CaptureFixture) -> None:
    fake.state.secrets = {"HF_TOKEN": "hf_secret"}
    assert downloads.find_token() == "hf_secret"
    assert "hf_secret" not in capsys.readouterr().out


@pytest.mark.parametrize("failure", ["SecretNotFoundError", "NotebookAccessError", "TimeoutException"])
def test_secret_that_cannot_be_had_is_named(fake: ModuleType, failure: str, capsys: pytest.CaptureFixture) -> None:
    from google.colab import userdata

    fake.state.secrets = {"HF_TOKEN": getattr(userdata, failure)("HF_TOKEN")}
    assert downloads.find_token() is None
    assert failure in capsys.readouterr().out


# --- the session ----------------------------------------------------------------------------------------------------


def test_without_gpu_and_drive_the_set_up_only_prints(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    profile = session.start()
    assert profile.name == "mini"
    out = capsys.readouterr().out
    for name in ("GPU", "bfloat16", "memory", "disk", "kept files", "network", "versions"):
        assert f" {name} " in out
    assert "next: 01_prepare_weights" in out and session.checkpoint_keeper() is None
    assert not (tmp_path / "home").exists()


def test_a_gpu_asks_for_drive_and_the_user_may_refuse(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.lasting_folder("cpu") is None and fake.state.calls == []
    assert session.lasting_folder("cuda") == colab.MOUNT_POINT / "MyDrive" / "art-anomaly"
    monkeypatch.setenv("ART_DRIVE", "off")
    assert session.lasting_folder("cuda") is None
    monkeypatch.setenv("ART_DRIVE", "/somewhere/else")
    assert session.lasting_folder("cpu") == Path("/somewhere/else")


def test_pictures_on_drive_are_reached_before_they_are_looked_for(
    fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake.state.cloud / "pictures").mkdir()
    colab.MOUNT_POINT.parent.mkdir()
    monkeypatch.chdir(colab.MOUNT_POINT.parent)
    monkeypatch.setenv("ART_DATA", "drive/MyDrive/pictures")
    assert session.start().data_source == fake.state.cloud / "pictures"
    assert fake.state.calls == ["drive.mount"]


def test_largest_kept_unit_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert session._limit_bytes() == persistence.MAX_UNIT_BYTES == 2e9
    monkeypatch.setenv("ART_DRIVE_LIMIT_GB", "14.5")
    assert session._limit_bytes() == 14.5e9
    monkeypatch.setenv("ART_DRIVE_LIMIT_GB", "much")
    with pytest.raises(ValueError, match="is 'much'; give a number of GB"):
        session._limit_bytes()


@pytest.mark.parametrize(("asked", "passed"), [("kept", "{cwd}/kept"), ("off", "off"), ("", "")])
def test_all_notebooks_of_a_run_keep_in_one_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, passed: str
) -> None:
    """Kernels start in the notebooks' folder, so that a relative path would mean another place there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ART_DRIVE", asked)
    monkeypatch.setenv("ART_DATA", "")
    runner._pass_on(profiles.active())
    assert os.environ["ART_DRIVE"] == passed.format(cwd=tmp_path)


@pytest.fixture
def shell() -> Iterator[object]:
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    session._forget_current()
    InteractiveShell.clear_instance()


def _finish(home: Path, text: str = "1") -> None:
    storage.write_bytes(home / "results" / "clip_lof" / "predictions.csv", text.encode())
    storage.write_json(home / "results" / "clip_lof" / "manifest.json", {"text": text})


def test_what_a_cell_finishes_is_kept_when_it_ends_and_comes_back(
    shell: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ART_DRIVE", str(tmp_path / "lasting"))
    lines: list[str] = []
    profile = session.start(log=lines.append)
    shell.run_cell("1 + 1")
    assert not [line for line in lines if "clip_lof" in line]
    _finish(profile.home)
    shell.run_cell("1 + 1")
    shell.run_cell("1 + 1")
    assert len([line for line in lines if line.startswith("kept: results/clip_lof")]) == 1
    monkeypatch.setenv("ART_HOME", str(tmp_path / "fresh"))
    fresh = session.start(log=lines.append)
    assert (fresh.home / "results" / "clip_lof" / "manifest.json").exists()
    assert any("restored" in line for line in lines)


def test_a_set_up_cell_that_runs_twice_keeps_once(
    shell: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ART_DRIVE", str(tmp_path / "lasting"))
    calls: list[Path] = []
    monkeypatch.setattr(persistence, "save", lambda home, archive: calls.append(home) or [])
    session.start()
    session.start()
    shell.run_cell("1 + 1")
    assert len(calls) == 1


def test_a_dead_drive_is_said_once_and_not_at_every_cell(
    shell: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ART_DRIVE", str(tmp_path / "lasting"))
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    lines: list[str] = []
    profile = session.start(log=lines.append)
    _finish(profile.home)
    shutil.rmtree(tmp_path / "lasting")
    (tmp_path / "lasting").write_text("a lost mount cannot be listed")
    for _ in range(3):
        shell.run_cell("1 + 1")
    assert len([line for line in lines if "failed" in line]) == 1
    assert callable(session.checkpoint_keeper())


# --- preflight ------------------------------------------------------------------------------------------------------


def _gpu(monkeypatch: pytest.MonkeyPatch, *, name: str, free: float, total: float, capability: tuple[int, int]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 1e9, total * 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


@pytest.mark.parametrize(
    ("name", "free", "total", "is_ok", "fix"),
    [
        ("NVIDIA L4", 23.0, 23.8, True, ""),
        ("NVIDIA L4", 9.0, 23.8, False, "Manage sessions"),
        ("Tesla T4", 15.0, 15.8, False, "Change runtime type"),
    ],
)
def test_gpu_memory_that_is_short_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str, free: float, total: float, is_ok: bool, fix: str
) -> None:
    _gpu(monkeypatch, name=name, free=free, total=total, capability=(8, 9))
    check = preflight._gpu("cuda", preflight.NEEDS["full"].gpu_gb)
    assert check.is_ok == is_ok and name in check.found and fix in check.fix


def test_full_without_gpu_and_a_gpu_without_bfloat16_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not preflight._gpu("cpu", 20).is_ok and preflight._gpu("cpu", 0).is_ok
    _gpu(monkeypatch, name="Tesla T4", free=15, total=15.8, capability=(7, 5))
    assert not preflight._bf16("cuda").is_ok and "fp16" in preflight._bf16("cuda").fix
    _gpu(monkeypatch, name="NVIDIA L4", free=23, total=23.8, capability=(8, 9))
    assert preflight._bf16("cuda").is_ok


def test_memory_and_disk_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=11e9, total=13e9))
    assert not preflight._memory(12).is_ok and preflight._memory(3).is_ok
    monkeypatch.setattr(storage, "free_bytes", lambda path: int(50e9))
    assert not preflight._disk(tmp_path, 55).is_ok
    assert "55.0 needed" in preflight._disk(tmp_path, 55).found
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(int(41e9))  # sparse: what is there already is not needed again
    check = preflight._disk(tmp_path, 55)
    assert check.is_ok and "14.0 needed" in check.found


def test_kept_files_need_a_folder_that_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert preflight._lasting(None).is_ok and preflight._lasting(tmp_path).is_ok
    assert not preflight._lasting(tmp_path / "lost").is_ok
    monkeypatch.setattr(storage, "free_bytes", lambda path: int(0.3e9))
    assert not preflight._lasting(tmp_path).is_ok


def test_versions_are_compared_with_the_requirements(tmp_path: Path) -> None:
    assert preflight._versions(profiles.REPOSITORY / "requirements.txt").is_ok
    (tmp_path / "requirements.txt").write_text("numpy>=99\n# torch>=99\nno-such-package\n")
    check = preflight._versions(tmp_path / "requirements.txt")
    assert not check.is_ok and "numpy>=99 is needed" in check.found and "no-such-package is missing" in check.found


def test_consent_is_asked_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    class Gated(GatedRepoError):
        def __init__(self) -> None: ...

    class Absent(RepositoryNotFoundError):
        def __init__(self) -> None: ...

    answers = {"free/model": None, "gated/model": Gated(), "no/model": Absent(), "broken/model": RuntimeError("x")}

    def auth_check(self: object, repo_id: str, *, token: object) -> None:
        if answers[repo_id] is not None:
            raise answers[repo_id]

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(preflight, "_unreachable", lambda address: "")
    checks = list(preflight._hub(list(answers)))
    assert [check.is_ok for check in checks] == [True, True, True, False, False, False]
    assert "https://huggingface.co/gated/model, accept the licence" in checks[3].fix
    assert "HF_TOKEN" in checks[4].fix and "RuntimeError" in checks[5].found


def test_no_network_is_one_line_and_asks_for_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "HUB", "http://127.0.0.1:9")
    (check,) = preflight._hub(["lmsys/vicuna-7b-delta-v0"])
    assert not check.is_ok and "refused" in check.found and "by hand" in check.fix
    assert [check.found for check in preflight._hub([])] == ["nothing is left to download"]


def test_full_asks_for_the_repositories_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ART_PROFILE", "full")
    assert preflight._hub_repositories(profiles.active()) == [
        "FantasticGNU/AnomalyGPT",
        "lmsys/vicuna-7b-delta-v0",
        "openllmplayground/pandagpt_7b_max_len_1024",
    ]


def test_costs_are_estimates_with_the_rate_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mini = preflight.costs(profiles.active())
    assert set(mini["compute units"]) == {"none"}
    assert list(mini["minutes"])[2] == round(preflight.STAGES["03_clip"].mini_seconds / 60, 1)
    monkeypatch.setenv("ART_PROFILE", "full")
    profile = profiles.active()
    full = preflight.costs(profile, "NVIDIA L4").set_index("notebook")
    assert full.loc["06_anomalygpt_train", "compute units"] == f"{1.71 * 2:.1f}"
    assert full.loc["06_anomalygpt_train", "state"] == "to do"
    assert set(preflight.costs(profile, "Unknown GPU")["compute units"]) == {"unknown"}
    note = preflight.cost_note(profile, "NVIDIA A100-SXM4-80GB")
    assert note.startswith("Estimates") and "7.52" in note and "2026-03-10" in note


def test_what_is_done_is_seen_in_the_workspace(tmp_path: Path) -> None:
    assert "nothing yet" in preflight.where_am_i(tmp_path)
    storage.write_json(tmp_path / "weights" / "pandagpt" / "READY.json", {})
    storage.write_json(tmp_path / "data" / "embedded" / "manifest.json", {})
    assert preflight.where_am_i(tmp_path) == "done here: 01, 02; next: 03_clip"


def test_every_notebook_has_its_costs() -> None:
    assert {path.stem for path in (profiles.REPOSITORY / "notebooks").glob("*.ipynb")} <= preflight.STAGES.keys()
