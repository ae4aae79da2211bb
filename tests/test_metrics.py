"""Metrics against published numbers, scikit-learn, and plain versions written here from the definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from helpers.judge import _old_metrics as metrics

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def blobs(seed: int, n: int = 6, shape: tuple[int, int] = (40, 56)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps that find smooth random blobs with moderate success; the first mask is empty."""
    generator = np.random.default_rng(seed)
    maps, masks = [], []
    for i in range(n):
        field = ndimage.gaussian_filter(generator.normal(size=shape), 3)
        mask = field > np.quantile(field, 0.93) if i else np.zeros(shape, bool)
        maps.append((ndimage.gaussian_filter(generator.normal(size=shape), 2) * 5 + mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def aupro_by_definition(maps, masks, limit: float) -> float:
    """Every distinct score as a threshold, every region on its own, trapezoids, interpolation at the limit."""
    scores = np.concatenate([np.ravel(m) for m in maps]).astype(np.float64)
    thresholds = np.unique(scores)[::-1]
    normal = np.concatenate([m[~k] for m, k in zip(maps, masks)])
    rate, overlap = [0.0], [0.0]
    regions = []
    for anomaly_map, mask in zip(maps, masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [anomaly_map[labels == i + 1] for i in range(count)]
    for threshold in thresholds:
        rate.append(float((normal >= threshold).mean()))
        overlap.append(float(np.mean([(region >= threshold).mean() for region in regions])))
    rate, overlap = np.array(rate), np.array(overlap)
    inside = rate <= limit
    area = float(np.trapezoid(overlap[inside], rate[inside]))
    if not inside.all():
        last, first = inside.sum() - 1, inside.sum()
        slope = (overlap[first] - overlap[last]) / (rate[first] - rate[last])
        rest = limit - rate[last]
        area += rest * (overlap[last] + slope * rest / 2)
    return area / limit


def flat(maps, masks) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([m.ravel() for m in maps]), np.concatenate([k.ravel() for k in masks])


# --------------------------------------------------------------------------------------------- golden numbers


def test_published_code_gives_the_same_pixel_metrics(parity_fixtures: Path) -> None:
    files = sorted(parity_fixtures.glob("anomalyclip_seed*.safetensors"))
    assert files, f"no anomalyclip_seed*.safetensors in {parity_fixtures}"
    for file in files:
        tensors = load_file(file)
        maps, masks = tensors["in.metric.maps"], tensors["in.metric.masks"]
        histogram = metrics.PixelHistogram()
        for anomaly_map, mask in zip(maps, masks):
            histogram.add(anomaly_map, mask)
        ours = {
            "out.metric.aupro_original": metrics.aupro_reference(maps, masks),
            "out.metric.pixel_auroc": histogram.auroc(),
            "out.metric.pixel_ap": histogram.average_precision(),
        }
        for name, value in ours.items():
            assert value == pytest.approx(float(tensors[name]), abs=1e-6), (file.name, name)


def test_standard_aupro_of_the_golden_maps() -> None:
    tensors = load_file(Path(__file__).parent / "golden" / "anomalyclip_seed0.safetensors")
    # The published code says 0.8293 on these maps, the standard definition (adeval) 0.8323.
    assert metrics.aupro(tensors["in.metric.maps"], tensors["in.metric.masks"]) == pytest.approx(0.8323, abs=1e-4)


def test_aupro_by_hand() -> None:
    # Regions of 1 and 4 pixels, 10 normal pixels. In order of falling score: the small region, 1 normal pixel, half
    # of the large region, 1 normal pixel, the rest. PRO is 0.5, then 0.75 from FPR 0.1, then 1 from FPR 0.2.
    mask = np.array([[1, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    scores = np.array([[9, 8, 7, 7, 5], [6, 1, 1, 1, 5], [0, 0, 0, 0, 0]], np.float32)
    assert metrics.aupro([scores], [mask], fpr_limit=0.2) == pytest.approx((0.1 * 0.5 + 0.1 * 0.75) / 0.2)
    assert metrics.aupro([scores], [mask], fpr_limit=0.3) == pytest.approx((0.1 * 0.5 + 0.1 * 0.75 + 0.1) / 0.3)
    assert metrics.aupro([scores], [mask], fpr_limit=0.15) == pytest.approx((0.1 * 0.5 + 0.05 * 0.75) / 0.15)


def test_regions_touching_at_a_corner_are_one() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
    histogram = metrics.PixelHistogram()
    histogram.add(np.zeros((3, 3)), mask)
    assert histogram.n_regions == 1


# ------------------------------------------------------------------------------------- against plain versions


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_equals_its_definition(digits: int | None, limit: float) -> None:
    maps, masks = blobs(1, n=4, shape=(20, 24))
    maps = maps if digits is None else [np.round(m, digits) for m in maps]
    assert metrics.aupro(maps, masks, limit) == pytest.approx(aupro_by_definition(maps, masks, limit), abs=1e-9)


@pytest.mark.parametrize("digits", [None, 1], ids=["distinct", "ties"])
def test_pixel_metrics_equal_scikit_learn(digits: int | None) -> None:
    maps, masks = blobs(2)
    maps = maps if digits is None else [np.round(m, digits) for m in maps]
    histogram = metrics.PixelHistogram()
    for anomaly_map, mask in zip(maps, masks):
        histogram.add(anomaly_map, mask)
    scores, labels = flat(maps, masks)
    assert histogram.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert histogram.average_precision() == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    best = max(f1_score(labels, scores >= threshold) for threshold in np.unique(np.round(scores, 2))[::10])
    found = histogram.f1_max()
    assert found.value >= best - 1e-9
    assert f1_score(labels, scores > found.threshold) == pytest.approx(found.value, abs=1e-9)


@pytest.mark.parametrize("shape_of_scores", ["plain", "squashed", "outliers", "drifting", "ties"])
def test_compressed_summaries_stay_within_1e_4(monkeypatch: pytest.MonkeyPatch, shape_of_scores: str) -> None:
    """Memory for 20,000 pixels only, so that 330,000 pixels are merged over several levels."""
    maps, masks = blobs(3, n=40, shape=(96, 86))
    change = {
        "plain": lambda m, i: m,
        "squashed": lambda m, i: (1e-9 * np.exp(4 * m)).astype(np.float32),
        "outliers": lambda m, i: np.where(m > np.quantile(m, 0.999), m * 1e20, m).astype(np.float32),
        "drifting": lambda m, i: m + np.float32(0.1 * i),
        "ties": lambda m, i: np.maximum(np.round(m, 1), 0),
    }[shape_of_scores]
    maps = [change(m, i) for i, m in enumerate(maps)]
    exact = metrics.PixelHistogram()
    monkeypatch.setattr(metrics._Summary, "CAPACITY", 20_000)
    small = metrics.PixelHistogram()
    for anomaly_map, mask in zip(maps, masks):
        small.add(anomaly_map, mask)
    monkeypatch.undo()
    for anomaly_map, mask in zip(maps, masks):
        exact.add(anomaly_map, mask)
    assert len(small._normal._levels) >= 3 and not exact._normal._levels
    for metric in ("auroc", "aupro", "average_precision"):
        assert getattr(small, metric)() == pytest.approx(getattr(exact, metric)(), abs=3e-5), metric
    assert small.f1_max().value == pytest.approx(exact.f1_max().value, abs=1e-4)
    assert exact.auroc() == pytest.approx(roc_auc_score(flat(maps, masks)[1], flat(maps, masks)[0]), abs=1e-9)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Summary, "CAPACITY", 100_000)
    histogram = metrics.PixelHistogram()
    generator = np.random.default_rng(0)
    for _ in range(84):
        histogram.add(generator.normal(size=(64, 80)), np.zeros((64, 80), bool))
        # At most two bins for each of 16,384 shares and of the finer ones on top, in log2(pixels / capacity) levels.
        assert all(len(points.values) < 60_000 for points in histogram._normal._levels if points)
        assert histogram._normal._n_raw < 100_000
    assert histogram.n_pixels > 430_000 and len(histogram._normal._levels) == 3


def test_reference_aupro_relabels_nothing_but_agrees_with_the_loop_that_does() -> None:
    maps, masks = blobs(5, n=5)
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    rate, overlap = [], []
    for step in range(200):
        threshold = low + step * ((high - low) / 200)
        found = [m > threshold for m in maps]
        rate.append(np.mean(np.concatenate([f[~k] for f, k in zip(found, masks)])))
        parts = []
        for f, k in zip(found, masks):
            labels, count = ndimage.label(k, structure=np.ones((3, 3)))
            parts += [f[labels == i + 1].mean() for i in range(count)]
        overlap.append(np.mean(parts))
    rate, overlap = np.array(rate)[::-1], np.array(overlap)[::-1]
    kept = rate < 0.3
    stretched = (rate[kept] - rate[kept].min()) / (rate[kept].max() - rate[kept].min())
    assert metrics.aupro_reference(maps, masks) == pytest.approx(np.trapezoid(overlap[kept], stretched), abs=1e-12)


def test_image_histograms_of_a_resample_are_those_of_the_repeated_pictures() -> None:
    maps, masks = blobs(6)
    tables = metrics.image_histograms(maps, masks, n_bins=2048)
    counts = np.array([2, 0, 1, 3, 0, 1])
    chosen = np.repeat(np.arange(6), counts)
    again = [maps[i] for i in chosen], [masks[i] for i in chosen]
    assert tables.auroc(counts) == pytest.approx(metrics.pixel_auroc(*again), abs=5e-4)
    assert tables.aupro(counts) == pytest.approx(metrics.aupro(*again), abs=2e-3)
    assert tables.auroc() == pytest.approx(metrics.pixel_auroc(maps, masks), abs=5e-4)
    with pytest.raises(ValueError, match="6 pictures"):
        tables.auroc(counts[:3])


# ------------------------------------------------------------------------------------------------- properties

# Whole numbers: a monotone map must not merge scores by rounding.
pictures = hnp.arrays(np.float32, (6, 7), elements=st.integers(-40, 40).map(float))
truths = hnp.arrays(bool, (6, 7))


@settings(max_examples=60, deadline=None)
@given(pictures, truths)
def test_pixel_metrics_are_bounded_and_ignore_a_monotone_map(scores: np.ndarray, mask: np.ndarray) -> None:
    before = metrics.pixel_auroc([scores], [mask]), metrics.aupro([scores], [mask])
    after = metrics.pixel_auroc([scores * 4 - 100], [mask]), metrics.aupro([scores * 4 - 100], [mask])
    np.testing.assert_array_equal(before, after)
    if mask.any() and not mask.all():
        assert all(0 <= value <= 1 for value in before)
        assert before[0] == pytest.approx(1 - metrics.pixel_auroc([-scores], [mask]), abs=1e-12)
    else:
        assert all(math.isnan(value) for value in before)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=2, max_size=40))
def test_image_metrics_are_bounded_and_ignore_a_monotone_map(rows: list[tuple[float, bool]]) -> None:
    scores, labels = (np.array(column) for column in zip(*rows))
    values = [metrics.image_auroc(scores, labels), metrics.average_precision(scores, labels)]
    if labels.any() and not labels.all():
        ranks = np.unique(scores, return_inverse=True)[1]
        assert values == [metrics.image_auroc(ranks, labels), metrics.average_precision(ranks, labels)]
        assert all(0 <= value <= 1 for value in values)
    else:
        assert all(math.isnan(value) for value in values)


@settings(max_examples=40, deadline=None)
@given(truths.filter(lambda mask: mask.any() and not mask.all()), st.floats(0.01, 1.0))
def test_perfect_constant_and_inverted_maps(mask: np.ndarray, limit: float) -> None:
    perfect, constant = mask.astype(np.float32), np.full(mask.shape, 0.25, np.float32)
    assert (metrics.pixel_auroc([perfect], [mask]), metrics.aupro([perfect], [mask], limit)) == pytest.approx((1, 1))
    assert metrics.pixel_auroc([constant], [mask]) == pytest.approx(0.5)
    assert metrics.aupro([constant], [mask], limit) == pytest.approx(limit / 2)  # the chance line, cut at the limit
    assert metrics.pixel_auroc([-perfect], [mask]) == metrics.aupro([-perfect], [mask], limit) == 0
    histogram = metrics.PixelHistogram()
    histogram.add(constant, mask)
    assert histogram.average_precision() == pytest.approx(mask.mean())
    assert histogram.f1_max() == pytest.approx((2 * mask.mean() / (1 + mask.mean()), -math.inf))


# ------------------------------------------------------------------------------------------- edges of the input


def test_maps_of_other_types_and_sizes() -> None:
    maps, masks = blobs(7, n=3)
    maps, masks = [*maps, *blobs(8, n=2, shape=(24, 30))[0]], [*masks, *blobs(8, n=2, shape=(24, 30))[1]]
    exact = metrics.aupro(maps, masks)
    assert metrics.aupro([m.astype(np.float16) for m in maps], masks) == pytest.approx(exact, abs=1e-3)
    assert metrics.aupro((m for m in maps), (k.astype(np.uint8) for k in masks)) == exact
    assert metrics.aupro([m[:, ::-1] for m in maps], [k[:, ::-1] for k in masks]) == pytest.approx(exact)


def test_a_small_map_is_brought_to_the_masks_size() -> None:
    small = np.array([[0.0, 1.0]], np.float16)
    assert metrics.resize_map(small, (1, 4)).tolist() == [[0.0, 0.25, 0.75, 1.0]]  # pixel centres, not corners
    assert metrics.resize_map(small, (3, 2)).shape == (3, 2)
    assert metrics.pixel_auroc([small], [np.array([[False, False, False, True]])]) == 1


def test_the_callers_array_may_be_reused() -> None:
    buffer, histogram = np.zeros((4, 4), np.float32), metrics.PixelHistogram()
    histogram.add(buffer, np.zeros((4, 4), bool))
    buffer[:] = 5
    histogram.add(buffer, np.ones((4, 4), bool))
    assert histogram.auroc() == 1


def test_adding_after_reading_counts() -> None:
    maps, masks = blobs(9, n=4)
    histogram = metrics.PixelHistogram()
    for anomaly_map, mask in zip(maps, masks):
        histogram.add(anomaly_map, mask)
        histogram.auroc()
    assert histogram.auroc() == metrics.pixel_auroc(maps, masks)
    assert (histogram.n_images, histogram.n_pixels) == (4, 4 * 40 * 56)
    assert histogram.n_anomalous_pixels == sum(mask.sum() for mask in masks)


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool)], ids=["normal", "anomalous"])
def test_one_class_of_pixels_has_no_metric(mask: np.ndarray) -> None:
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    histogram = metrics.PixelHistogram()
    histogram.add(scores, mask)
    assert math.isnan(histogram.auroc()) and math.isnan(histogram.aupro()) and math.isnan(histogram.average_precision())
    assert math.isnan(metrics.aupro_reference([scores], [mask]))
    assert math.isnan(metrics.image_histograms([scores], [mask]).auroc())


def test_no_picture_has_no_metric() -> None:
    assert math.isnan(metrics.pixel_auroc([], [])) and math.isnan(metrics.aupro_reference([], []))
    assert math.isnan(metrics.PixelHistogram().f1_max().value)


def test_constant_maps_have_no_reference_aupro() -> None:
    assert math.isnan(metrics.aupro_reference([np.ones((2, 2))], [np.eye(2, dtype=bool)]))


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([np.array([[np.nan, 1.0]])], [np.array([[True, False]])], "1 values that are not finite"),
        ([np.array([[np.inf, 1.0]])], [np.array([[True, False]])], "not finite"),
        ([np.ones((2, 2))], [None], "leave an anomalous picture without a mask out"),
        ([np.ones((2, 2))], [np.full((2, 2), 255, np.uint8)], "from 255 to 255"),
        ([np.ones((2, 2))], [np.ones((1, 2, 2), bool)], r"expected \(H, W\)"),
        ([np.ones((1, 2, 2))], [np.ones((2, 2), bool)], r"expected \(H, W\)"),
        ([np.ones((2, 2))] * 2, [np.ones((2, 2), bool)], "more maps than masks"),
        ([np.ones((2, 2))], [np.ones((2, 2), bool)] * 2, "more masks than maps"),
    ],
)
def test_unusable_maps_and_masks_are_refused(maps: list, masks: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.pixel_auroc(maps, masks)


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, math.nan])
def test_limits_outside_0_1_are_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="fpr_limit"):
        metrics.aupro(*blobs(1, n=2), fpr_limit=limit)


@pytest.mark.parametrize("twice", [metrics.aupro_reference, metrics.image_histograms])
def test_generators_are_refused_where_maps_are_read_twice(twice) -> None:
    maps, masks = blobs(1, n=2)
    with pytest.raises(ValueError, match="twice"):
        twice((m for m in maps), masks)


# --------------------------------------------------------------------------------------------------- pictures


def test_rates_carry_their_counts() -> None:
    # The trivial rule on 34 anomalous and 16 normal pictures: 68.0 % accuracy (source report's test set).
    rates = metrics.rates([True] * 34 + [False] * 16, [True] * 50)
    assert (rates.accuracy, rates.sensitivity, rates.specificity) == ((34, 50), (34, 34), (0, 16))
    assert (rates.accuracy.value, rates.balanced_accuracy, rates.n_images, rates.n_anomalous) == (0.68, 0.5, 50, 34)
    mixed = metrics.rates([1, 1, 1, 0, 0], [1, 0, 1, 1, 0])
    assert (mixed.accuracy, mixed.sensitivity, mixed.specificity) == ((3, 5), (2, 3), (1, 2))
    assert mixed.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert math.isnan(metrics.rates([1, 1], [1, 0]).specificity.value)


def test_f1_max_of_pictures() -> None:
    generator = np.random.default_rng(4)
    labels = generator.random(50) < 0.6
    scores = np.round(generator.normal(size=50) + labels, 1)
    found = metrics.f1_max(scores, labels)
    assert found.value == pytest.approx(max(f1_score(labels, scores >= t) for t in scores))
    assert f1_score(labels, scores > found.threshold) == pytest.approx(found.value)
    assert math.isnan(metrics.f1_max([1.0, 2.0], [0, 0]).value)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "1 of 2 scores are not finite, first at position 1"),
        ([0.1, 0.2, 0.3], [0, 1], "one score for each label"),
        ([0.1, 0.2], [0, 2], "0/1"),
        ([0.1, 0.2], ["no", "yes"], "0/1"),
    ],
)
def test_unusable_scores_are_refused(scores: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.image_auroc(scores, labels)
    with pytest.raises(ValueError, match="one verdict for each"):
        metrics.rates([0, 1, 1], [0, 1])
