"""Records refuse what cannot be true."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.records import Prediction, Sample


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, "split is 'validation'"),
        ({"is_anomalous": True}, "labelled anomalous but its kind is 'good'"),
        ({"kind": "box"}, "labelled normal but its kind is 'box'"),
    ],
)
def test_impossible_samples_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(**{"image_path": Path("a.png"), "category": "mona", "is_anomalous": False} | changes)


def test_scores_must_be_finite() -> None:
    sample = Sample(Path("a.png"), "mona", False)
    with pytest.raises(ValueError, match="must be finite"):
        Prediction(sample, float("nan"))


@pytest.mark.parametrize(("score", "expected"), [(0.4, False), (0.5, False), (0.6, True)])
def test_only_scores_above_the_threshold_are_anomalous(score: float, expected: bool) -> None:
    assert Prediction(Sample(Path("a.png"), "mona", False), score, threshold=0.5).is_predicted_anomalous is expected


def test_without_a_threshold_nothing_is_called_anomalous() -> None:
    assert not Prediction(Sample(Path("a.png"), "mona", False), 99.0).is_predicted_anomalous
