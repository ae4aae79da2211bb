"""Synthetic anomalies: what lies outside a mask never changes, and the same seed gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import synthesis as package
from helpers.synthesis import colours
from helpers.synthesis import marks as synthesis

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPES = [(16, 16), (16, 700), (700, 16), (37, 51), (240, 180)]


def _noise(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _painting(shape: tuple[int, int] = (120, 96)) -> np.ndarray:
    """Smooth patches of several colours with some grain."""
    import cv2

    coarse = np.random.default_rng(5).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + _noise(shape) % 9 - 4, 0, 255).astype(np.uint8)


PICTURES = {
    "noise": _noise,
    "black": lambda shape: np.zeros((*shape, 3), np.uint8),
    "white": lambda shape: np.full((*shape, 3), 255, np.uint8),
    "grey": lambda shape: np.repeat(_noise(shape)[..., :1], 3, axis=2),
    "painting": _painting,
}


@pytest.mark.parametrize("kind", synthesis.LOCAL_KINDS)
@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    picture=st.sampled_from(sorted(PICTURES)),
    seed=st.integers(0, 2**32),
)
def test_pixels_outside_the_mask_are_untouched(kind, height, width, picture, seed):
    image = PICTURES[picture]((height, width))
    before = image.copy()
    result, mask, record = synthesis.synthesize(image, kind, np.random.default_rng(seed))
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(result[~mask], image[~mask])
    assert (mask.dtype, mask.shape, result.dtype, result.shape) == (np.bool_, (height, width), np.uint8, image.shape)
    assert mask.any() and record["delta_e"] >= synthesis.MIN_DELTA_E


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("picture", sorted(PICTURES))
def test_every_kind_fits_every_size(shape, picture):
    image = PICTURES[picture](shape)
    for kind in synthesis.LOCAL_KINDS:
        result, mask, _ = synthesis.synthesize(image, kind, synthesis.rng_for(1, kind))
        assert mask.any()
        np.testing.assert_array_equal(result[~mask], image[~mask])


def test_what_cannot_be_seen_is_tinted_and_says_so():
    image = PICTURES["black"]((64, 64))
    _, _, record = synthesis.synthesize(image, "moved", np.random.default_rng(0))
    assert record["parameters"]["tinted"] is True
    _, _, record = synthesis.synthesize(_painting(), "moved", np.random.default_rng(0))
    assert "tinted" not in record["parameters"]


@pytest.mark.parametrize("side", [16, 33, 64])
def test_poisson_blends_small_parts_instead_of_tinting_them(side):
    for seed in range(5):
        _, _, record = synthesis.synthesize(_noise((side, side)), "poisson", np.random.default_rng(seed))
        assert "tinted" not in record["parameters"]


@pytest.mark.parametrize("kind", synthesis.LOCAL_KINDS)
def test_record_describes_the_mask(kind):
    image = _painting()
    result, mask, record = synthesis.synthesize(image, kind, synthesis.rng_for(3, kind))
    rows, columns = np.nonzero(mask)
    x, y, width, height = record["bbox"]
    assert (x, y) == (columns.min(), rows.min())
    assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
    cell = 3 * int((rows.mean() + 0.5) * 3 // 120) + int((columns.mean() + 0.5) * 3 // 96)
    assert record["place"] == synthesis.PLACES[cell]
    seen = synthesis.visibility(image, result, mask)
    assert record["visibility"] == pytest.approx(seen.value, abs=1e-4)
    assert record["area"] == pytest.approx(mask.mean(), abs=1e-8)
    assert record["visibility_bin"] == synthesis.visibility_bin(seen.value)
    assert record["colours"] and json.loads(json.dumps(record)) == record


_HASH = """
import hashlib, numpy as np
from helpers import synthesis
image = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
digest = hashlib.sha256()
for kind in synthesis.LOCAL_KINDS:
    result, mask, record = synthesis.synthesize(image, kind, synthesis.rng_for(2024, f"{kind}_001.png"))
    digest.update(result.tobytes() + mask.tobytes() + repr(record).encode())
digest.update(synthesis.rephotograph(image, synthesis.rng_for(2024, "again"))[0].tobytes())
print(digest.hexdigest())
"""


def test_bytes_are_the_same_in_every_process():
    # Other hash seeds: Python's own hash() differs between these processes.
    found = {
        subprocess.run(
            [sys.executable, "-c", _HASH],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(found) == 1 and len(found.pop().strip()) == 64


def test_seed_and_name_both_matter():
    assert synthesis.seed_for(1, "a.png") != synthesis.seed_for(1, "b.png")
    assert synthesis.seed_for(1, "a.png") != synthesis.seed_for(2, "a.png")
    expected = int.from_bytes(hashlib.sha256(b"1\na.png").digest()[:8], "big") // 2
    assert synthesis.seed_for(1, "a.png") == expected < 2**63
    images = [synthesis.synthesize(_painting(), "box", synthesis.rng_for(seed, "a"))[0] for seed in (1, 2)]
    assert (images[0] != images[1]).any()


def test_marks_range_from_hidden_to_plain():
    image = _painting((256, 256))
    values = [
        synthesis.synthesize(image, kind, synthesis.rng_for(seed, kind))[2]["visibility"]
        for kind in synthesis.REPORT_KINDS
        for seed in range(12)
    ]
    assert {synthesis.visibility_bin(value) for value in values} == set(synthesis.VISIBILITY_BINS)


def test_visibility_is_difference_times_root_of_area():
    original = np.full((100, 100, 3), 120, np.uint8)
    changed, mask = original.copy(), np.zeros((100, 100), bool)
    mask[:10, :10] = True  # one per cent: the value is the difference itself
    changed[mask] = (200, 60, 60)
    one = synthesis.visibility(original, changed, mask)
    assert one.value == pytest.approx(one.delta_e)
    lab = colours.rgb_to_lab(np.array([[120, 120, 120], [200, 60, 60]], np.uint8))
    assert one.delta_e == pytest.approx(float(colours.delta_e2000(lab[0], lab[1])))
    mask[:20, :20] = True
    changed[mask] = (200, 60, 60)
    assert synthesis.visibility(original, changed, mask).value == pytest.approx(2 * one.value)


def test_lab_and_ciede2000_agree_with_skimage():
    from skimage import color

    rgb = np.random.default_rng(0).integers(0, 256, (400, 2, 3), dtype=np.uint8)
    lab = colours.rgb_to_lab(rgb)
    np.testing.assert_allclose(lab, color.rgb2lab(rgb), atol=0.01)
    expected = color.deltaE_ciede2000(lab[:, 0], lab[:, 1])
    np.testing.assert_allclose(colours.delta_e2000(lab[:, 0], lab[:, 1]), expected, atol=1e-9)
    np.testing.assert_array_equal(colours.lab_to_rgb(lab), rgb)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # Sharma, Wu, Dalal (2005), table 1, pairs 1, 7, 13 and 17
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, -0.001, 2.49), (50, 0.0009, -2.49), 4.8045),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ],
)
def test_ciede2000_of_the_paper(first, second, expected):
    assert float(colours.delta_e2000(np.array(first), np.array(second))) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("variation", [variation.name for variation in synthesis.VARIATIONS])
def test_every_variation_changes_a_picture_and_not_its_input(variation):
    image = _painting((640, 480))  # the blur of a photograph is a fraction of a pixel on a thumbnail
    before = image.copy()
    result = synthesis.vary(image, variation, np.random.default_rng(0))
    np.testing.assert_array_equal(image, before)
    assert result.dtype == np.uint8 and result.shape[2] == 3
    assert result.shape != image.shape or (result != image).any()


def test_the_table_decides_for_every_variation_once():
    names = [variation.name for variation in synthesis.VARIATIONS]
    assert len(names) == len(set(names))
    assert set(names) == {*synthesis.NORMAL_VARIATIONS, *synthesis.ANOMALOUS_VARIATIONS}
    assert set(synthesis.NORMAL_VARIATIONS).isdisjoint(synthesis.ANOMALOUS_VARIATIONS)
    table = synthesis.variations_table()
    assert list(table.index) == names and table["reason"].str.len().min() > 10


def test_rephotographs_use_normal_variations_only():
    for seed in range(20):
        _, names = synthesis.rephotograph(_painting(), np.random.default_rng(seed))
        assert 2 <= len(set(names)) == len(names) <= 4
        assert set(names) <= set(synthesis.NORMAL_VARIATIONS)


@pytest.mark.parametrize("kind", [None, "stain", "invert"])
def test_a_damaged_view_is_a_rephotograph_with_damage(kind):
    image = _painting((120, 96))
    view, mask, record = package.damaged_view(image, seed=5, kind=kind, max_side=64)
    plain, _, _ = package.damaged_view(image, seed=5, max_side=64)
    assert max(view.shape) == 64 and view.shape == plain.shape and record["variations"]
    assert (mask is None) == (kind != "stain") and (view == plain).all() == (kind is None)
    if mask is not None:
        assert record["kind"] == kind and (view[~mask] == plain[~mask]).all() and (view[mask] != plain[mask]).any()
    np.testing.assert_array_equal(view, package.damaged_view(image, seed=5, kind=kind, max_side=64)[0])


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (np.zeros((32, 32, 3), np.uint8), "boxes", "allowed are box"),
        (np.zeros((15, 32, 3), np.uint8), "box", "at least 16"),
        (np.zeros((32, 32), np.uint8), "box", "uint8 RGB"),
        (np.zeros((32, 32, 3), np.float32), "box", "float32"),
    ],
)
def test_wrong_input_is_refused_in_words(image, kind, message):
    with pytest.raises(ValueError, match=message):
        synthesis.synthesize(image, kind, np.random.default_rng(0))


def test_wrong_variation_and_empty_mask_are_refused():
    with pytest.raises(ValueError, match="allowed are crop"):
        synthesis.vary(_painting(), "sharpen", np.random.default_rng(0))
    with pytest.raises(ValueError, match="empty"):
        synthesis.visibility(_painting(), _painting(), np.zeros((120, 96), bool))


def test_seeds_stay_what_they_were():
    """The definition once more: the first 8 bytes of the hash of seed, line break and name, without the last bit."""
    expected = int(hashlib.sha256(b"2024\nmona_lisa/box_001.png").hexdigest()[:16], 16) >> 1
    assert synthesis.seed_for(2024, "mona_lisa/box_001.png") == expected
    assert 0 <= expected < 2**63


@pytest.mark.parametrize(("value", "name"), [(0.0, "faint"), (4.99, "faint"), (14.9, "moderate"), (15.0, "plain")])
def test_visibility_bins(value, name):
    assert synthesis.visibility_bin(value) == name


def test_drawn_marks_stand_out_by_more_than_the_least_contrast():
    image = _painting((240, 200))
    found = [synthesis.synthesize(image, "box", np.random.default_rng(i))[2]["delta_e"] for i in range(60)]
    assert np.median(found) > 12 and np.percentile(found, 10) < 10
