"""The notebooks just run reach the quality of the recorded run: runs after them, on what they wrote."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from helpers import comparison, profiles, readme, results

TOLERANCE = 0.08
"""Other processors and library versions round otherwise, which moves scores, searches and, a little, ranks."""


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    return comparison.read(profiles.active().report_dir / "comparison.csv")


def _value(table: pd.DataFrame, method: str, category: str, metric: str) -> float:
    row = table[
        (table["method"] == method)
        & (table["category"] == category)
        & (table["kind"] == "all")
        & (table["metric"] == metric)
    ]
    assert len(row) == 1, f"{len(row)} rows for {method}, {category}, {metric}"
    return float(row["value"].iloc[0])


def test_every_method_is_measured_on_one_dataset(fresh: pd.DataFrame) -> None:
    assert set(fresh["method"]) == set(results.METHODS)
    assert fresh["dataset_hash"].nunique() == 1


@pytest.mark.parametrize("method", ["clip_resnet50", "clip_cross_entropy", "clip_isolation_forest", "clip_lof"])
def test_trained_features_find_anomalies_as_recorded(fresh: pd.DataFrame, method: str) -> None:
    """The methods that rest on the ImageNet-trained CNN; the small CLIP alone has random weights."""
    recorded = comparison.read(readme.RECORDED)
    for category in sorted(set(recorded["category"])):
        now, then = (_value(table, method, category, "image_auroc") for table in (fresh, recorded))
        assert now > then - TOLERANCE, f"{category}: image AUROC fell from {then:.3f} to {now:.3f}"


def test_maps_and_answers_are_there(fresh: pd.DataFrame) -> None:
    for method in ("clip_patch_knn", "anomalyclip", "anomalygpt"):
        assert not math.isnan(_value(fresh, method, "all", "aupro"))
    assert _value(fresh, "clip_patch_knn", "all", "pixel_auroc") > 0.75
