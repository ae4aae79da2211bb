"""The active profile follows the environment and the GPU, and says why."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import profiles


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ART_PROFILE", "ART_HOME", "ART_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("gpu", "name", "reason"),
    [
        (None, "mini", "no CUDA device"),
        (("Tesla T4", 15.8), "mini", "Tesla T4 has 15.8 GB, full needs 20"),
        (("NVIDIA L4", 23.8), "full", "NVIDIA L4 with 23.8 GB"),
    ],
)
def test_profile_follows_the_gpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[str, float] | None, name: str, reason: str
) -> None:
    monkeypatch.setattr(profiles, "_cuda_gpu", lambda: gpu)
    profile = profiles.active()
    assert (profile.name, profile.reason) == (name, reason)
    assert profile.device == ("cuda" if gpu else "cpu")
    assert reason in str(profile)


@pytest.mark.parametrize("name", profiles.NAMES)
def test_asked_profile_wins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ART_PROFILE", name)
    assert profiles.active().name == name


def test_unknown_profile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ART_PROFILE", "maxi")
    with pytest.raises(ValueError, match="ART_PROFILE is 'maxi'; allowed are mini, full"):
        profiles.active()


def test_home_holds_the_profile_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ART_HOME", str(tmp_path))
    monkeypatch.setenv("ART_PROFILE", "mini")
    profile = profiles.active()
    assert profile.results_dir("clip_lof") == tmp_path / "mini" / "results" / "clip_lof"
    assert profile.data_dir == tmp_path / "mini" / "data" / "embedded"


def test_own_folder_is_found_from_the_repository_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ART_DATA", "helpers")
    monkeypatch.chdir(tmp_path)
    profile = profiles.active()
    assert profile.data_source == profiles.REPOSITORY / "helpers"
    assert profile.dataset_name.startswith("helpers_")


def test_two_folders_of_one_name_are_two_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = set()
    for place in ("a", "b"):
        (tmp_path / place / "my pictures").mkdir(parents=True)
        monkeypatch.setenv("ART_DATA", str(tmp_path / place / "my pictures"))
        names.add(profiles.active().dataset_name)
    assert len(names) == 2
    assert all(name.startswith("my_pictures_") for name in names)


def test_missing_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ART_DATA", "no/such/folder")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        profiles.active()


def test_a_profile_cannot_be_changed_by_a_cell() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        profiles.active().seed = 1  # type: ignore[misc]


def test_importing_helpers_loads_no_torch() -> None:
    code = "import sys, helpers.profiles, helpers.results, helpers.clip.backbones; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=profiles.REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_mini_and_full_differ_in_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in profiles.NAMES:
        monkeypatch.setenv("ART_PROFILE", name)
        found.append(profiles.active())
    mini, full = found
    assert (mini.clip.model, full.clip.model) == ("art-vit-mini", "ViT-L-14-336-quickgelu")
    assert mini.clip_model == mini.clip.model and full.anomalyclip_image_size == full.anomalyclip.image_size == 518
    assert mini.prompt_epochs == mini.anomalyclip.n_epochs == 10
    with pytest.raises(AttributeError, match="A profile has no 'n_trails'"):
        _ = mini.n_trails
