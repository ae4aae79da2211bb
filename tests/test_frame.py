"""The frame: profiles and records say what is wrong, files are whole or absent, results resume, notebooks run."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from failing_drive import is_killed

from helpers import files, profiles, results, runner
from helpers.caching import cached_arrays
from helpers.data.manifest import Dataset
from helpers.records import Prediction, Sample, Scored

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.mark.parametrize(
    ("asked", "gpu", "name", "reason"),
    [
        ("", None, "mini", "no CUDA device"),
        ("", ("Tesla T4", 15.8), "mini", "Tesla T4 has 15.8 GB, full needs 20"),
        ("", ("NVIDIA L4", 23.8), "full", "NVIDIA L4 has 23.8 GB, full needs 20"),
        ("mini", ("NVIDIA L4", 23.8), "mini", "ART_PROFILE=mini"),
        ("full", None, "full", "ART_PROFILE=full"),
    ],
)
def test_profile_follows_the_user_then_the_gpu_and_says_why(monkeypatch, tmp_path, asked, gpu, name, reason) -> None:
    card = SimpleNamespace(name=gpu and gpu[0], total_memory=gpu and gpu[1] * 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setenv("ART_PROFILE", asked)
    monkeypatch.setenv("ART_HOME", str(tmp_path))
    profile = profiles.active()
    assert (profile.name, profile.reason, profile.device) == (name, reason, "cuda" if gpu else "cpu")
    assert profile.results_dir("clip_lof") == tmp_path / name / "results" / "clip_lof"
    assert profile.clip.model == {"mini": "art-vit-mini", "full": "ViT-L-14-336-quickgelu"}[name]
    monkeypatch.setenv("ART_PROFILE", "maxi")
    with pytest.raises(ValueError, match="ART_PROFILE is 'maxi'; allowed are mini, full"):
        profiles.active()


@pytest.mark.parametrize(
    "form",
    ["{path}", "'{path}'", "“{path}”", "file://{quoted}", "$PLACE/my pictures", "{escaped}", "{back}", "my pictures"],
)
def test_own_pictures_are_found_however_the_path_was_copied(monkeypatch, tmp_path: Path, form: str) -> None:
    path = tmp_path / "my pictures"
    path.mkdir()
    spellings = {"path": path, "quoted": str(path).replace(" ", "%20"), "escaped": str(path).replace(" ", "\\ ")}
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ART_DATA", form.format(**spellings, back=str(path).replace("/", "\\")))
    assert profiles.active().data_source == path.resolve()
    assert re.fullmatch(r"my_pictures_\w{6}", profiles.active().dataset_name), "two folders of one name are two sets"
    for asked in ("https://drive.google.com/drive/1x", r"C:\Users\me\pictures", "$NO_SUCH_VARIABLE/x", "no/such"):
        monkeypatch.setenv("ART_DATA", asked)
        with pytest.raises(FileNotFoundError, match=r"/content/drive/MyDrive/<folder>, or unset ART_DATA"):
            profiles.active()


def test_importing_helpers_loads_no_torch() -> None:
    code = "import sys, helpers.profiles, helpers.results, helpers.caching; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=profiles.REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_impossible_records_are_refused() -> None:
    good = {"image_path": Path("a.png"), "category": "mona", "is_anomalous": False}
    for change in ({"split": "validation"}, {"is_anomalous": True}, {"kind": "box"}):
        with pytest.raises(ValueError, match=r"a\.png: "):
            Sample(**good | change)
    with pytest.raises(ValueError, match="must be finite"):
        Prediction(Sample(**good), float("nan"))
    called = [Prediction(Sample(**good), score, threshold=0.5).is_predicted_anomalous for score in (0.4, 0.5, 0.6)]
    assert called == [False, False, True] and not Prediction(Sample(**good), 99.0).is_predicted_anomalous


def write_half(path: Path) -> None:
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.npy"
    files.write_text(path, "old")
    assert is_killed(write_half, path) and path.read_text() == "old"
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        assert temporary.suffix == ".npy", "libraries choose a format by suffix"
        temporary.write_text("half")
        raise RuntimeError("the writer broke")
    assert path.read_text() == "old" and not temporary.exists()
    files.write_json(path, {"name": "Čapek"})
    assert files.read_json(path) == {"name": "Čapek"} and path.stat().st_mode & 0o444 == 0o444, "others may read it"
    with pytest.raises(ValueError):
        files.write_json(path, {"score": float("nan")})
    path.write_text("{'torn")
    with pytest.raises(ValueError, match=r"table\.npy is not readable JSON"):
        files.read_json(path)
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json(json.loads('{"b": [2], "a": 1}'))


def few_pictures(folder: Path, dataset_hash: str = "a" * 64) -> Dataset:
    """What results need of a dataset: two paintings, one of them with a single source, all files alike."""
    samples = []
    for name, split, i in itertools.product(("girl", "mona"), ("calibration", "test"), range(5)):
        kind, group = "box" if i % 2 and split == "test" else "good", f"{name}{0 if name == 'girl' else i}"
        made = {"split": split, "kind": kind, "group": group, "sha256": "f" * 64}
        samples.append(Sample(folder / name / split / f"{i}.png", name, kind != "good", **made))
    return Dataset(folder, samples, dataset_hash, limits={"girl": "Only one genuine picture: optimistic."})


class Scorer:
    """Scores a picture by its number; its answer looks like a missing value."""

    def __init__(self, die_after: int = 99) -> None:
        self.calls, self.die_after = [], die_after

    def __call__(self, category: str, samples) -> list[Scored]:
        if len(self.calls) >= self.die_after:
            raise KeyboardInterrupt
        self.calls.append((category, [int(s.image_path.stem) for s in samples]))
        return [Scored(n / 3, np.full((2, 2), n, np.float32), answer=["nan", "Yes"][n > 2]) for n in self.calls[-1][1]]


def predict(tmp_path: Path, dataset: Dataset, score, **changes) -> results.MethodResult:
    normals = {"girl": [0.1, 0.2, 0.3], "mona": [1.0, 2.0, 3.0]}
    options = {
        "method": "aligned", "alpha": 0.25, "profile": "mini", "settings": {"sizes": (1, 2)}, "batch_size": 2,
        "calibration": lambda: normals, "trained_on_kinds": ["line", "box"], "answers_say": {"Yes": True}.get,
    }  # fmt: skip
    return results.predict(tmp_path / "results" / "aligned", dataset=dataset, score=score, **options | changes)


def test_predictions_resume_and_say_what_their_thresholds_rest_on(tmp_path: Path) -> None:
    dataset, folder = few_pictures(tmp_path / "data"), tmp_path / "results" / "aligned"
    for die_after in (2, 2):
        with pytest.raises(KeyboardInterrupt):
            predict(tmp_path, dataset, Scorer(die_after))
        journal = folder.with_name(".aligned.partial") / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])  # a torn line costs one picture
    assert not folder.exists()
    scorer = Scorer()
    found = predict(tmp_path, dataset, scorer)
    counted = "Reference comparison: 2 of 4 anomalous pictures found, 2 false alarms on 6 genuine pictures"
    assert results.in_words(found.frame()) == counted
    assert results.category_label("girl_with_a_pearl_earring") == "Girl with a Pearl Earring"
    assert scorer.calls == [("mona", [1, 2]), ("mona", [3, 4])]
    assert [p.anomaly_score for p in found.predictions] == [n / 3 for n in range(5)] * 2
    assert [p.threshold for p in found.predictions] == [0.3] * 5 + [3.0] * 5
    assert [p.is_predicted_anomalous for p in found.predictions] == [n / 3 > 0.3 for n in range(5)] + [False] * 5
    assert found.predictions[5].p_value == 1.0 and all(p.seconds > 0 for p in found.predictions)
    assert found.predictions[0].answer == "nan"
    maps = [found.anomaly_map(p)[0, 0] for p in found.predictions]
    assert maps == [0, 1, 2, 3, 4] * 2, "equal files in two paintings are two maps"
    facts = found.manifest["calibration"]
    assert facts["girl"] == {"scores": [0.1, 0.2, 0.3], "n": 3, "n_sources": 1, "optimistic": True}
    assert (facts["mona"]["n_sources"], facts["mona"]["optimistic"]) == (5, False)
    assert found.manifest["trained_on_kinds"] == ["box", "line"] and found.manifest["settings"]["alpha"] == 0.25
    says = found.manifest["answers_say"]
    assert says["mona/test/3.png"] is True and says["mona/test/0.png"] is None
    assert (folder / results.PREDICTIONS).read_text().splitlines()[0] == (
        "image_path,sha256,category,kind,is_anomalous,anomaly_score,threshold,is_predicted_anomalous,p_value,seconds,answer"
    )
    assert {path.name for path in folder.iterdir()} == {"predictions.csv", "maps", "manifest.json"}
    predict(tmp_path, dataset, scorer)
    assert len(scorer.calls) == 2, "a complete run is not repeated"


def test_a_run_of_other_settings_or_another_dataset_starts_over(tmp_path: Path) -> None:
    dataset, folder = few_pictures(tmp_path / "data"), tmp_path / "results" / "aligned"
    predict(tmp_path, dataset, Scorer())
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path, dataset, Scorer(1), checkpoint_hash="c")
    kept = results.read(folder, dataset.samples, dataset.folder, dataset.hash)
    assert kept.manifest["checkpoint_hash"] == "", "the complete run stays until the next is complete"
    scorer = Scorer()
    predict(tmp_path, few_pictures(tmp_path / "data", "b" * 64), scorer)
    assert len(scorer.calls) == 6
    aside = tmp_path / "results" / "other_datasets" / ("a" * 12) / "aligned"
    assert files.read_json(aside / results.MANIFEST)["dataset_hash"] == dataset.hash
    with pytest.raises(ValueError, match="aligned was measured on dataset bbbbbbbbbbbb, the dataset in use is aaaa"):
        results.read(folder, dataset.samples, dataset.folder, dataset.hash)
    with pytest.raises(FileNotFoundError, match="Run the notebook that makes them"):
        results.read(tmp_path / "nothing", [], tmp_path, "")
    with pytest.raises(ValueError, match="mona has no calibration scores of Reference comparison"):
        predict(tmp_path, dataset, Scorer(), calibration={"girl": [1.0]})
    with pytest.raises(ValueError, match="0 scores for 2 pictures"):
        predict(tmp_path, dataset, lambda category, samples: [])


def cached(folder: Path, numbers: list[int], model: str = "a", die_after: int = 99) -> tuple[dict, list[int]]:
    """The cached rows of some numbers, checked, and which of them were computed now."""
    computed: list[int] = []

    def compute(indices: list[int]) -> dict[str, np.ndarray]:
        if len(computed) >= die_after:
            raise KeyboardInterrupt
        computed.extend(numbers[index] for index in indices)
        rows = np.array([numbers[index] for index in indices])
        return {"embedding": np.stack([rows, -rows], 1).astype(np.float32), "patches": rows.astype(np.float16)}

    found = cached_arrays(folder, {"model": model}, [f"p{number}" for number in numbers], compute, batch_size=3)
    np.testing.assert_array_equal(found["embedding"], np.stack([numbers, -np.array(numbers)], 1).astype(np.float32))
    np.testing.assert_array_equal(found["patches"], np.array(numbers, np.float16))
    return found, computed


def test_rows_are_computed_once_and_mapped_in_any_order(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, list(range(10)), die_after=6)
    with open(next(tmp_path.glob("*/records.bin")), "ab") as file:
        file.write(b"half a batch without its name")
    found, computed = cached(tmp_path, list(range(10)))
    assert computed == [6, 7, 8, 9] and isinstance(found["embedding"], np.memmap)
    assert isinstance(cached(tmp_path, [7, 8, 9])[0]["embedding"], np.memmap)
    assert cached(tmp_path, [7, 2, 11, 2, 12])[1] == [11, 12]
    assert cached(tmp_path, [0, 1], model="b")[1] == [0, 1]
    for rows in (np.zeros((2, 3)), np.zeros((1, 4))):
        with pytest.raises(ValueError, match="1 rows of .* were to be computed"):
            cached_arrays(tmp_path, {"model": "a"}, ["new"], lambda indices, rows=rows: {"x": rows})
    path = next(path for path in tmp_path.glob("*/records.bin") if path.stat().st_size > 100)
    os.truncate(path, path.stat().st_size - 5)
    assert cached(tmp_path, list(range(10)))[1] == [] and cached(tmp_path, [11, 12])[1] == [12]
    path.unlink()
    assert cached(tmp_path, list(range(9)))[1] == list(range(9)), "what is damaged or gone is computed again"


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a notebook of these cells into the runner's folder; own pictures, and all paths relative."""
    for name in ("notebooks", "some", "pictures"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    for name, value in {"HOME": "some", "DATA": "pictures", "DRIVE": "kept", "PROFILE": "mini"}.items():
        monkeypatch.setenv(f"ART_{name}", value)

    def write(name: str, *cells: str) -> None:
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n## 2 · Five detectors\nWords.")])
        made.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
        nbformat.write(made, tmp_path / "notebooks" / f"{name}.ipynb")

    return write


def test_notebooks_run_in_order_and_stop_at_the_failing_cell(notebooks, tmp_path: Path, capsys, monkeypatch) -> None:
    there = "[os.environ[name] for name in ('ART_HOME', 'ART_DATA', 'ART_DRIVE')]"
    notebooks("01_first", f"import os; open({str(tmp_path / 'said.txt')!r}, 'w').write(str({there}))")
    notebooks("02_second", "1 + 1", "raise ValueError('no pictures here')")
    notebooks("03_third", "2 + 2")
    monkeypatch.setattr(runner.sys.stdout, "isatty", lambda: True, raising=False)
    assert runner.main([]) == 1
    out = capsys.readouterr().out
    there = [str(tmp_path / name) for name in ("some", "pictures", "kept")]
    assert (tmp_path / "said.txt").read_text() == str(there), "kernels see absolute paths: they start in another folder"
    assert "[1/3] 01_first: cell 1 of 1, Five detectors" in out and re.search(r"01_first: \d+ s", out)
    assert len([line for line in out.split("\n") if "01_first" in line]) == 1, "one line a notebook on a terminal"
    assert "02_second: failed" in out and "ValueError: no pictures here" in out and "03_third" not in out
    assert "\x1b[3" not in out, "colour codes make logs unreadable"
    executed = tmp_path / "some" / "mini" / "executed" / "02_second.ipynb"
    assert "no pictures here" in executed.read_text()
    assert runner.main(["7"]) == 2 and "There are: 01_first, 02_second, 03_third" in capsys.readouterr().out


def test_a_notebook_runs_again_when_anything_before_it_changed(notebooks, monkeypatch) -> None:
    ran: list[str] = []

    def execute(path: Path, show) -> tuple[nbformat.NotebookNode, str]:
        ran.append(path.stem[:2])
        return nbformat.read(path, as_version=4), ""

    def run(*names: str) -> list[str]:
        ran.clear()
        assert runner.main(names) == 0
        return ran

    monkeypatch.setattr(runner, "execute", execute)
    for name in ("01_first", "02_second", "03_third"):
        notebooks(name, "1 + 1")
    assert run() == ["01", "02", "03"] and run() == ["02"], "02 looks at own pictures each time"
    files.write_json(profiles.active().data_dir / "manifest.json", {"dataset_hash": "new"})
    assert run("03") == ["03"] and run("01", "03") == []
    notebooks("01_first", "2 + 2")
    assert run("03") == ["03"], "a changed notebook makes all new"
