"""Synthetic anomalies: what lies outside a mask never changes, and the same seed gives the same bytes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import synthesis
from helpers.synthesis import colours, marks


def _noise(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _painting(shape: tuple[int, int] = (120, 96)) -> np.ndarray:
    """Smooth patches of several colours with some grain."""
    smooth = cv2.resize(_noise((6, 5), 5), shape[::-1], interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + _noise(shape) % 9 - 4, 0, 255).astype(np.uint8)


PICTURES = {
    "noise": _noise,
    "black": lambda shape: np.zeros((*shape, 3), np.uint8),
    "white": lambda shape: np.full((*shape, 3), 255, np.uint8),
    "grey": lambda shape: np.repeat(_noise(shape)[..., :1], 3, axis=2),
    "painting": _painting,
}


SHAPES = st.tuples(st.integers(16, 90), st.integers(16, 90)) | st.sampled_from([(16, 700), (700, 16), (240, 180)])


@pytest.mark.parametrize("kind", synthesis.LOCAL_KINDS)
@settings(max_examples=12, deadline=None)
@given(shape=SHAPES, picture=st.sampled_from(sorted(PICTURES)), seed=st.integers(0, 2**32))
def test_pixels_outside_the_mask_are_untouched(kind, shape, picture, seed):
    image = PICTURES[picture](shape)
    result, mask, record = synthesis.synthesize(image, kind, np.random.default_rng(seed))
    np.testing.assert_array_equal(image, PICTURES[picture](shape))
    np.testing.assert_array_equal(result[~mask], image[~mask])
    assert (mask.dtype, mask.shape, result.dtype, result.shape) == (np.bool_, shape, np.uint8, image.shape)
    assert mask.any() and record["delta_e"] >= marks.MIN_DELTA_E
    assert (record["delta_e"], record["visibility"]) == pytest.approx(marks.visibility(image, result, mask), abs=1e-4)
    assert json.loads(json.dumps(record)) == record and record["kind"] == kind


def test_what_cannot_be_seen_is_tinted_and_says_so():
    cases = [(np.zeros((64, 64, 3), np.uint8), "moved", True), (_painting(), "moved", False)]
    cases += [(_noise((side, side)), "poisson", False) for side in (16, 33, 64)]
    for image, kind, tinted in cases:
        for seed in range(5):
            assert synthesis.synthesize(image, kind, np.random.default_rng(seed))[2]["tinted"] == tinted


@pytest.mark.parametrize("kind", synthesis.REPORT_KINDS)
def test_a_drawn_mark_has_the_grain_of_the_picture_around_it(kind):
    """A perfectly smooth mark gives itself away: the level of fine detail inside was 0.15 to 0.23 of that around."""

    def fine(image: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        return np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 1.0))

    rough = cv2.GaussianBlur(_noise((300, 240), 3).astype(np.float32) - 128, (0, 0), 0.7) * 0.15
    image = np.clip(_painting((300, 240)) + rough, 0, 255).astype(np.uint8)
    ratios = []
    for seed in range(20):
        result, mask, _ = synthesis.synthesize(image, kind, np.random.default_rng(seed))
        grown = [cv2.dilate(mask.view(np.uint8), np.ones((side, side))) > 0 for side in (5, 15)]
        inside = cv2.erode(mask.view(np.uint8), np.ones((3, 3))) > 0
        if inside.sum() > 20:
            ratios.append(np.median(fine(result)[inside]) / np.median(fine(result)[grown[1] & ~grown[0]]))
    assert len(ratios) > 5 and 0.6 < np.median(ratios) < 1.6, np.median(ratios)  # a line's edges count, too


def digest() -> str:
    """Hash of a mark of each kind and of a photograph."""
    image, parts = _noise((80, 60)), []
    for kind in synthesis.LOCAL_KINDS:
        parts += synthesis.synthesize(image, kind, synthesis.rng_for(2024, f"{kind}_001.png"))
    parts.append(synthesis.rephotograph(image, synthesis.rng_for(2024, "again"))[0])
    kept = [part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode() for part in parts]
    return hashlib.sha256(b"".join(kept)).hexdigest()


def test_bytes_are_the_same_in_every_process_and_seeds_stay_what_they_were():
    """A seed is the first 8 bytes of the hash of seed, line break and name, without the last bit."""
    here = Path(__file__).parent  # there Python's own hash() differs
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": f"{here.parent}:{here}", "PATH": ""}
    run = [sys.executable, "-c", "import test_synthesis; print(test_synthesis.digest())"]
    there = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert there.strip() == digest()
    expected = int.from_bytes(hashlib.sha256(b"1\na.png").digest()[:8], "big") // 2
    assert synthesis.seed_for(1, "a.png") == expected < 2**63
    assert len({synthesis.seed_for(*key) for key in ((1, "a"), (2, "a"), (1, "b"))}) == 3


def test_marks_range_from_hidden_to_plain():
    keys = [(kind, seed) for kind in synthesis.REPORT_KINDS for seed in range(12)]
    records = [synthesis.synthesize(_painting(), kind, synthesis.rng_for(seed, kind))[2] for kind, seed in keys]
    assert {record["visibility_bin"] for record in records} == set(synthesis.VISIBILITY_BINS)
    contrasts = [record["delta_e"] for record in records]
    assert np.median(contrasts) > 10 and np.percentile(contrasts, 10) < 10


def test_visibility_is_difference_times_root_of_area():
    original, red = np.full((100, 100, 3), 120, np.uint8), np.full((100, 100, 3), (200, 60, 60), np.uint8)
    one = float(colours.delta_e2000(*colours.rgb_to_lab(np.array([original[0, 0], red[0, 0]]))))
    row, column = np.indices((100, 100))
    for side in (1, 2):  # one per cent: the value is the difference itself
        mask = (row < 10 * side) & (column < 10 * side)
        assert marks.visibility(original, red, mask) == pytest.approx((one, side * one))
    striped = np.where(column[..., None] % 2, original, red)  # the mean over all pixels, not a sample of one column
    assert marks.visibility(original, striped, row >= 0) == pytest.approx((one / 2, 10 * one / 2))


@pytest.mark.parametrize("variation", synthesis.VARIATIONS)
def test_every_variation_changes_a_picture_and_not_its_input(variation):
    image = _painting((640, 480))  # the blur of a photograph is a fraction of a pixel on a thumbnail
    result = synthesis.vary(image, variation, np.random.default_rng(0))
    assert np.array_equal(image, _painting((640, 480))) and not np.array_equal(result, image)
    assert result.dtype == np.uint8 and result.shape[2] == 3


@pytest.mark.parametrize("kind", [None, "stain", "invert"])
def test_a_damaged_view_is_a_rephotograph_with_damage(kind):
    view, mask, record = synthesis.damaged_view(_painting(), seed=5, kind=kind)
    plain, _, _ = synthesis.damaged_view(_painting(), seed=5)
    assert view.shape == plain.shape and 2 <= len(record["variations"]) <= 4
    assert set(record["variations"]) <= set(synthesis.NORMAL_VARIATIONS)
    assert (mask is None) == (kind != "stain") and (view == plain).all() == (kind is None)
    if mask is not None:
        assert record["kind"] == kind and (view[~mask] == plain[~mask]).all() and (view[mask] != plain[mask]).any()


def test_wrong_input_is_refused_in_words():
    small, grey, floats = np.zeros((15, 32, 3), np.uint8), np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3))
    wrong = [(_painting(), "boxes", "allowed are box"), (small, "box", "at least 16"), (grey, "box", "uint8 RGB")]
    for image, kind, message in [*wrong, (floats, "box", "float64")]:
        with pytest.raises(ValueError, match=message):
            synthesis.synthesize(image, kind, np.random.default_rng(0))
    with pytest.raises(ValueError, match="allowed are crop"):
        synthesis.vary(_painting(), "sharpen", np.random.default_rng(0))
