"""Metrics against published numbers, scikit-learn, and plain versions written here from the definitions."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from helpers.judge import metrics, statistics
from tests.conftest import FIXTURES

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def blobs(seed: int, n: int = 5, side: int = 256) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps that find smooth random blobs with moderate success; the first mask is empty."""
    generator = np.random.default_rng(seed)
    maps, masks = [], []
    for i in range(n):
        field, noise = (ndimage.gaussian_filter(generator.normal(size=(side, side)), width) for width in (9, 2))
        masks.append(field > np.quantile(field, 0.93) if i else np.zeros((side, side), bool))
        maps.append((noise * 5 + masks[-1]).astype(np.float32))
    return maps, masks


def regions_of(mask: np.ndarray) -> tuple[np.ndarray, int]:
    return ndimage.label(mask, structure=np.ones((3, 3)))


def aupro_by_definition(maps, masks, limit: float) -> float:
    """Every distinct score as a threshold, every region on its own, interpolation at the limit."""
    truth, scores = flat(masks, maps)
    labelled = [regions_of(mask) for mask in masks]
    weight = np.concatenate([(1 / np.bincount(labels.ravel())[labels]).ravel() for labels, _ in labelled]) * truth
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    rate = np.append(0, (np.cumsum(~truth[order]) / (~truth).sum())[last])
    overlap = np.append(0, (np.cumsum(weight[order]) / sum(n for _, n in labelled))[last])
    inside = rate <= limit
    edge = np.interp(limit, rate, overlap)
    return float(np.trapezoid([*overlap[inside], edge], [*rate[inside], limit])) / limit


def published_aupro(maps, masks) -> float:
    """AUPRO as AnomalyCLIP's public code computes it: 200 thresholds, rates below 0.3 stretched to [0, 1]."""
    low, high = min(m.min() for m in maps), max(m.max() for m in maps)
    rate, overlap = [], []
    for step in range(200):
        found = [m > low + step * ((high - low) / 200) for m in maps]
        rate.append(np.mean(np.concatenate([f[~k] for f, k in zip(found, masks)])))
        each = [(f, *regions_of(k)) for f, k in zip(found, masks)]
        overlap.append(np.mean([f[labels == i + 1].mean() for f, labels, n in each for i in range(n)]))
    rate, overlap = np.array(rate)[::-1], np.array(overlap)[::-1]
    kept = rate < 0.3
    stretched = (rate[kept] - rate[kept].min()) / (rate[kept].max() - rate[kept].min())
    return float(np.trapezoid(overlap[kept], stretched))


def flat(masks, maps) -> tuple[np.ndarray, np.ndarray]:
    """Truth and scores of all pixels, in scikit-learn's order."""
    return np.concatenate([np.ravel(k) for k in masks]), np.concatenate([np.ravel(m) for m in maps])


def assert_near_exact(maps, masks, limits=(0.3,)) -> None:
    assert metrics.pixel_auroc(maps, masks) == pytest.approx(roc_auc_score(*flat(masks, maps)), abs=1e-4)
    exact = [aupro_by_definition(maps, masks, limit) for limit in limits]
    assert [metrics.aupro(maps, masks, limit) for limit in limits] == pytest.approx(exact, abs=1e-4)


def test_published_code_and_ours_on_the_golden_maps() -> None:
    for file in FIXTURES.glob("anomalyclip_seed*.safetensors"):
        tensors = load_file(file)
        maps, masks = tensors["in.metric.maps"], tensors["in.metric.masks"].astype(bool)
        pixels = flat(masks, maps)
        exact = published_aupro(maps, masks), roc_auc_score(*pixels), average_precision_score(*pixels)
        golden = [float(tensors[f"out.metric.{name}"]) for name in ("aupro_original", "pixel_auroc", "pixel_ap")]
        assert exact == pytest.approx(golden, abs=1e-6), file.name
        # Ours is the standard AUPRO and counts at 256 pixels a side.
        masks = [cv2.resize(k.astype(np.float32), (256, 256), interpolation=cv2.INTER_AREA) >= 0.5 for k in masks]
        assert_near_exact([cv2.resize(m, (256, 256)) for m in maps], masks)


def test_aupro_by_hand() -> None:
    def big(rows: list[list[float]]) -> np.ndarray:  # 256 pixels a side, so that nothing is resized
        return np.kron(np.array(rows), np.ones((64, 64))).astype(np.float32)

    # Regions of 1 and 4 pixels, 11 genuine ones. In order of falling score: the small region, 1 genuine pixel, half
    # of the large region, 1 genuine pixel, the rest. PRO is 0.5, then 0.75 from FPR 1/11, then 1 from FPR 2/11.
    mask = big([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    scores = big([[9, 8, 7, 7], [6, 1, 1, 5], [0, 0, 0, 5], [0, 0, 0, 0]])
    f = 1 / 11
    for limit, area in ((2 * f, f * 0.5 + f * 0.75), (0.3, f * 0.5 + f * 0.75 + 0.3 - 2 * f), (1.5 * f, f * 0.875)):
        assert metrics.aupro([scores], [mask], fpr_limit=limit) == pytest.approx(area / limit, abs=1e-9)
    corner = big([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # touching at a corner: one region
    half = big([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert metrics.aupro([half], [corner], fpr_limit=1e-6) == pytest.approx(0.5, abs=1e-3)


TURNS = {
    "plain": lambda m: m,
    "ties": lambda m: np.maximum(np.round(m, 1), 0),
    "squashed": lambda m: (1e-9 * np.exp(4 * m)).astype(np.float32),
    "outliers": lambda m: np.where(m > np.quantile(m, 0.999), m * 1e20, m).astype(np.float32),
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_the_table_stays_within_1e_4_of_the_exact_values(turn) -> None:
    maps, masks = blobs(1, n=3)
    assert_near_exact([turn(m) for m in maps], masks, limits=(0.05, 0.3, 1.0))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_auroc_and_the_average_precision_of_redrawn_pictures_are_sklearns(drawn: st.DataObject) -> None:
    n = drawn.draw(st.integers(4, 12))
    scores = np.array(drawn.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=float)
    labels = np.array([False, True, *drawn.draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))])
    assert metrics.image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    counts = statistics.redraws(labels.tolist(), list(range(n)), n_draws=3)
    expected = [average_precision_score(*(np.repeat(x, row) for x in (labels, scores))) for row in counts]
    np.testing.assert_allclose(metrics.average_precisions(scores, labels, counts), expected)


def test_redrawn_pictures_give_the_pixel_metrics_of_those_pictures() -> None:
    maps, masks = blobs(4)
    counts = statistics.redraws([mask.any() for mask in masks], list(range(5)), n_draws=3)
    for row, found in zip(counts, metrics.pixel_metrics(metrics.pixel_table(maps, masks), counts)):
        taken = [[given[i] for i in np.repeat(np.arange(5), row)] for given in (maps, masks)]
        assert found == pytest.approx((metrics.pixel_auroc(*taken), metrics.aupro(*taken)), abs=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_perfect_constant_and_inverted_maps(seed: int, limit: float) -> None:
    maps, (_, mask) = blobs(seed, n=2)
    perfect, constant = mask.astype(np.float32), np.full(mask.shape, 0.25, np.float32)
    assert (metrics.pixel_auroc([perfect], [mask]), metrics.aupro([perfect], [mask], limit)) == pytest.approx((1, 1))
    assert metrics.pixel_auroc([constant], [mask]) == pytest.approx(0.5)
    assert metrics.aupro([constant], [mask], limit) == pytest.approx(limit / 2)  # the chance line, cut at the limit
    assert metrics.pixel_auroc([-perfect], [mask]) == metrics.aupro([-perfect], [mask], limit) == 0
    np.testing.assert_array_equal(metrics.pixel_table([maps[1]], [mask]), metrics.pixel_table([maps[1] * 4], [mask]))


def test_sizes_types_and_generators() -> None:
    maps, masks = blobs(7, n=3)
    exact = metrics.aupro(maps, masks)
    typed = (m.astype(np.float16) for m in maps), (k.astype(np.uint8) for k in masks)
    assert metrics.aupro(*typed) == pytest.approx(exact, abs=1e-3)
    assert metrics.aupro([m[:, ::-1] for m in maps], [k[:, ::-1] for k in masks]) == pytest.approx(exact)
    large = [np.kron(k, np.ones((5, 3), bool)) for k in masks]  # a large photograph of other proportions
    assert metrics.aupro(maps, large) == pytest.approx(exact, abs=2e-3)
    hair = np.zeros((4000, 3000), bool)
    hair[:, 1500] = True  # a mark of one pixel's width does not vanish
    assert math.isfinite(metrics.aupro([np.eye(8)], [hair]))
    for mask in (np.zeros((3, 4), bool), np.ones((3, 4), bool)):  # one class of pixels has no metric
        assert np.isnan(metrics.pixel_metrics(metrics.pixel_table([np.eye(3, 4)], [mask]))).all()


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([], [], "at least one picture"),
        ([np.zeros((2, 2))], [None], "A mask is None"),
        ([np.zeros((2, 2))] * 2, [np.zeros((2, 2))], "is shorter"),
        ([np.full((2, 2), np.inf)], [np.zeros((2, 2))], "4 values that are not finite"),
        ([np.zeros((2, 2))], [np.full((2, 2), 255)], "with values up to 255"),
    ],
)
def test_what_cannot_be_measured_is_named(maps: list, masks: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.pixel_table(maps, masks)
