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
