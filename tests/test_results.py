"""Results are complete or resumable, and never read for another dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import files as storage
from helpers import results
from helpers.records import Prediction, Sample


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Three test pictures, one of them anomalous; the files themselves are not read here."""
    folder = tmp_path / "data"
    return [
        Sample(folder / "mona" / "test" / kind / f"{i}.png", "mona", kind != "good", kind=kind, sha256=f"{i:064x}")
        for i, kind in enumerate(["good", "box", "good"])
    ]


@pytest.fixture
def writer(tmp_path: Path, samples: list[Sample]):
    def make(method: str = "clip_lof", dataset_hash: str = "a" * 64, **changes) -> results.Writer:
        settings = {
            "samples": samples,
            "dataset_dir": tmp_path / "data",
            "dataset_hash": dataset_hash,
            "profile": "mini",
            "settings": {"k": 3, "sizes": (1, 2)},
        }
        return results.Writer(tmp_path / "results" / method, method=method, **settings | changes)

    return make


def _predict(sample: Sample, score: float = 0.25) -> Prediction:
    anomaly_map = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    return Prediction(sample, score, anomaly_map, threshold=0.5, p_value=0.1, seconds=0.01, answer='Yes, "top" left')


def test_write_then_read_gives_the_predictions_back(tmp_path: Path, samples: list[Sample], writer) -> None:
    with writer() as run:
        for index, sample in enumerate(samples):
            run.add(_predict(sample, score=index / 3))
    result = results.read(tmp_path / "results" / "clip_lof", samples, tmp_path / "data", "a" * 64)
    assert [p.sample for p in result.predictions] == samples
    assert [p.anomaly_score for p in result.predictions] == [0.0, 1 / 3, 2 / 3]
    assert [p.is_predicted_anomalous for p in result.predictions] == [False, False, True]
    assert result.predictions[0].answer == 'Yes, "top" left'
    np.testing.assert_allclose(result.anomaly_map(result.predictions[1]), _predict(samples[1]).anomaly_map, atol=1e-3)
    assert result.manifest["versions"]["numpy"] == np.__version__
    header = (result.folder / results.PREDICTIONS).read_text().splitlines()[0]
    assert header == (
        "image_path,sha256,category,kind,is_anomalous,anomaly_score,threshold,is_predicted_anomalous,p_value,seconds,answer"
    )


def test_interrupted_run_resumes_where_it_stopped(tmp_path: Path, samples: list[Sample], writer) -> None:
    with pytest.raises(KeyboardInterrupt), writer() as run:
        run.add(_predict(samples[0]))
        raise KeyboardInterrupt
    assert not (tmp_path / "results" / "clip_lof").exists()
    with writer() as run:
        assert run.done == {samples[0].image_path}
        for sample in samples[1:]:
            run.add(_predict(sample))
    result = results.read(tmp_path / "results" / "clip_lof", samples, tmp_path / "data", "a" * 64)
    assert len(result.predictions) == 3
    assert result.anomaly_map(result.predictions[0]) is not None


def test_interrupted_run_with_other_settings_starts_over(samples: list[Sample], writer) -> None:
    with pytest.raises(KeyboardInterrupt), writer() as run:
        run.add(_predict(samples[0]))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), writer(settings={"k": 4}) as run:
        assert run.done == frozenset()
        raise KeyboardInterrupt


def test_torn_last_line_costs_one_picture(tmp_path: Path, samples: list[Sample], writer) -> None:
    with pytest.raises(KeyboardInterrupt), writer() as run:
        run.add(_predict(samples[0]))
        run.add(_predict(samples[1]))
        raise KeyboardInterrupt
    journal = tmp_path / "results" / ".clip_lof.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    with pytest.raises(KeyboardInterrupt), writer() as run:
        assert run.done == {samples[0].image_path}
        raise KeyboardInterrupt


def test_failed_second_run_leaves_the_complete_one_alone(tmp_path: Path, samples: list[Sample], writer) -> None:
    with writer() as run:
        for sample in samples:
            run.add(_predict(sample))
    with pytest.raises(KeyboardInterrupt), writer(settings={"k": 9}) as run:
        run.add(_predict(samples[0], score=0.9))
        raise KeyboardInterrupt
    result = results.read(tmp_path / "results" / "clip_lof", samples, tmp_path / "data", "a" * 64)
    assert result.manifest["settings"]["k"] == 3


def test_run_on_another_dataset_is_kept_aside(tmp_path: Path, samples: list[Sample], writer) -> None:
    for dataset_hash in ("a" * 64, "b" * 64):
        with writer(dataset_hash=dataset_hash) as run:
            for sample in samples:
                run.add(_predict(sample))
    kept = tmp_path / "results" / "other_datasets" / ("a" * 12) / "clip_lof"
    assert storage.read_json(kept / results.MANIFEST)["dataset_hash"] == "a" * 64
    with pytest.raises(
        ValueError, match="clip_lof was measured on dataset bbbbbbbbbbbb, the dataset in use is aaaaaaaaaaaa"
    ):
        results.read(tmp_path / "results" / "clip_lof", samples, tmp_path / "data", "a" * 64)


def test_every_picture_needs_exactly_one_prediction(samples: list[Sample], writer) -> None:
    with (
        pytest.raises(ValueError, match="2 of 3 test pictures have no prediction, first mona/test/box/1.png"),
        writer() as run,
    ):
        run.add(_predict(samples[0]))
    with pytest.raises(ValueError, match="twice"), writer(settings={}) as run:
        run.add(_predict(samples[0]))
        run.add(_predict(samples[0]))
    stranger = Sample(Path("elsewhere.png"), "mona", False)
    with pytest.raises(ValueError, match="not among the 3 test pictures"), writer(settings={}) as run:
        run.add(_predict(stranger))


def test_is_complete_compares_dataset_settings_and_weights(tmp_path: Path, samples: list[Sample], writer) -> None:
    folder = tmp_path / "results" / "clip_lof"
    same = {"dataset_hash": "a" * 64, "settings": {"k": 3, "sizes": (1, 2)}}
    assert not results.is_complete(folder, **same)
    with writer() as run:
        for sample in samples:
            run.add(_predict(sample))
    assert results.is_complete(folder, **same)
    assert not results.is_complete(folder, **same | {"settings": {"k": 4}})
    assert not results.is_complete(folder, **same | {"dataset_hash": "b" * 64})
    assert not results.is_complete(folder, **same, checkpoint_hash="c")


def test_missing_results_name_what_to_do(tmp_path: Path, samples: list[Sample]) -> None:
    with pytest.raises(FileNotFoundError, match="Run the notebook that makes them"):
        results.read(tmp_path / "results" / "anomalygpt", samples, tmp_path / "data", "a" * 64)


def test_numbers_may_be_missing_and_texts_may_look_so(tmp_path: Path, samples: list[Sample], writer) -> None:
    with writer() as run:
        for sample in samples:
            run.add(Prediction(sample, 1.0, answer="nan"))
    predictions = results.read(tmp_path / "results" / "clip_lof", samples, tmp_path / "data", "a" * 64).predictions
    assert all(np.isnan(p.threshold) and np.isnan(p.p_value) and p.answer == "nan" for p in predictions)


class FewPictures:
    """What :func:`results.predict` needs of a dataset: two paintings, one of them with a single source."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hash, self.categories = folder, "a" * 64, ("girl", "mona")
        self.limits = {"girl": "Only one genuine picture."}
        places = [(name, split) for name in self.categories for split in ("calibration", "test")]
        self.samples = [self._sample(*place, i) for place in places for i in range(5)]

    def _sample(self, name: str, split: str, i: int) -> Sample:
        kind = "box" if i % 2 == 1 and split == "test" else "good"
        group = f"{name}{0 if name == 'girl' else i}"
        path = self.folder / name / split / f"{i}.png"
        return Sample(path, name, kind != "good", split=split, kind=kind, group=group, sha256="f" * 64)

    def select(self, *, split=None, category=None, is_anomalous=None) -> list[Sample]:
        wanted = {"split": split, "category": category, "is_anomalous": is_anomalous}
        return [s for s in self.samples if all(v is None or getattr(s, n) == v for n, v in wanted.items())]


def test_predict_sets_thresholds_resumes_and_says_what_they_rest_on(tmp_path: Path) -> None:
    dataset, calls = FewPictures(tmp_path / "data"), []
    normals = {"girl": [0.1, 0.2, 0.3], "mona": [1.0, 2.0, 3.0]}

    def score(category: str, samples, die_after: int = 99) -> list[results.Scored]:
        if len(calls) >= die_after:
            raise KeyboardInterrupt
        calls.append((category, [s.image_path.name for s in samples]))
        numbers = [float(s.image_path.stem) for s in samples]
        return [results.Scored(n, np.full((2, 2), n, np.float32), answer="Yes" if n > 2 else "No") for n in numbers]

    options = {
        "method": "aligned",
        "dataset": dataset,
        "calibration": lambda: normals,
        "alpha": 0.25,
        "profile": "mini",
    }
    options |= {
        "settings": {"side": 384},
        "batch_size": 2,
        "trained_on": "genuine pictures",
        "trained_on_kinds": ["line", "box"],
    }
    options |= {"answers_say": {"Yes": True, "No": False}.get}
    with pytest.raises(KeyboardInterrupt):
        results.predict(tmp_path / "aligned", score=lambda c, s: score(c, s, die_after=2), **options)
    found = results.predict(tmp_path / "aligned", score=score, **options)
    assert calls == [
        ("girl", ["0.png", "1.png"]), ("girl", ["2.png", "3.png"]), ("girl", ["4.png"]),
        ("mona", ["0.png", "1.png"]), ("mona", ["2.png", "3.png"]), ("mona", ["4.png"]),
    ]  # fmt: skip
    assert [p.threshold for p in found.predictions] == [0.3] * 5 + [3.0] * 5
    assert [p.p_value for p in found.predictions[5:]] == [1.0, 1.0, 0.75, 0.5, 0.25]
    assert all(p.seconds > 0 for p in found.predictions)
    maps = [found.anomaly_map(p)[0, 0] for p in found.predictions]
    assert maps == [0, 1, 2, 3, 4] * 2, "equal bytes in two paintings are two maps"
    facts = found.manifest["calibration"]
    assert facts["girl"] == {"scores": [0.1, 0.2, 0.3], "n": 3, "n_sources": 1, "optimistic": True}
    assert (facts["mona"]["n_sources"], facts["mona"]["optimistic"]) == (5, False)
    assert found.manifest["trained_on_kinds"] == ["box", "line"] and found.manifest["settings"]["alpha"] == 0.25
    assert found.manifest["answers_say"]["mona/test/3.png"] is True
    results.predict(tmp_path / "aligned", score=score, **options)
    assert len(calls) == 6, "a complete run is not repeated"
    with pytest.raises(ValueError, match="mona has no calibration scores of Laid on its reference"):
        results.predict(tmp_path / "b", score=score, **options | {"calibration": {"girl": [1.0]}})
    with pytest.raises(ValueError, match="0 scores for 2 pictures"):
        results.predict(tmp_path / "b", score=lambda c, s: [], **options)
