"""Questions, trained answers, and the strict reading of answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.anomalygpt import conversations as c

CELLS = [cell for row in c.CELLS for cell in row]


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        (
            "bottle",
            "This is a photo of a bottle for anomaly detection, which should be round, without any damage, flaw, "
            "defect, scratch, hole or broken part.",
        ),
        (
            "metal_nut",
            "This is a photo of a metal nut for anomaly detection, which should be without any damage, flaw, defect, "
            "scratch, hole or broken part, and shouldn't be fliped.",
        ),
        (
            "fryum",
            "This is a photo of a fryum for anomaly detection on green background, which should be without any "
            "damage, flaw, defect, scratch, hole or broken part.",
        ),
        (
            "tile",
            "This is a photo of tile for anomaly detection, which should be without any damage, flaw, defect, "
            "scratch, hole or broken part.",
        ),
    ],
)
def test_industrial_descriptions_are_the_published_ones(category, expected):
    assert c.question(category) == f"{expected} Is there any anomaly in the image?"


def test_a_painting_is_named():
    assert "the painting mona lisa for" in c.question("mona_lisa")


@pytest.mark.parametrize(
    ("row", "column", "cell"),
    [
        (0, 0, "top left"),
        (1 / 3, 1 / 3, "top left"),
        (0.34, 0.5, "center"),
        (2 / 3, 0.67, "right"),
        (0.99, 0.5, "bottom"),
    ],
)
def test_cells(row, column, cell):
    assert c.cell_of(row, column) == cell


def test_cells_of_mask_largest_first_without_crumbs():
    mask = np.zeros((90, 120), dtype=bool)
    mask[70:85, 90:115] = True
    mask[5:12, 5:15] = True
    mask[45, 60] = True  # a crumb
    assert c.cells_of_mask(mask) == ("bottom right", "top left")
    assert c.cells_of_mask(np.zeros((5, 5), dtype=bool)) == ()


@given(st.lists(st.sampled_from(CELLS), min_size=1, max_size=5))
def test_what_is_said_is_read_back(cells):
    parsed = c.parse_answer(c.answer(True, cells))
    assert parsed == c.ParsedAnswer(True, frozenset(cells))


def test_two_anomalies_in_one_cell_are_named_once():
    expected = "Yes, there are 2 anomalies in the image, they are at the top of the image."
    assert c.answer(True, ["top", "top"]) == expected


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("No, there is no anomaly in the image.", False),
        (" no.", False),
        ("Yes", True),
        ('"Yes", there is a defect.', True),
        ("", None),
        ("Note the frame.", None),
        ("Yesterday it was whole.", None),
        ("The image shows a woman. No, there is no anomaly.", None),
        ("Yes, there is no anomaly in the image.", None),
        ("No, there is an anomaly in the image.", None),
        ("Yes/No", None),
        ("Yes or no?", None),
        ("I cannot say.", None),
    ],
)
def test_strict_verdicts(text, verdict):
    assert c.answers_say(text) is verdict


@given(st.text(max_size=60))
def test_any_text_is_read_without_error(text):
    assert c.answers_say(text) in (True, False, None)


def test_place_must_be_named_and_not_everything():
    mask = np.zeros((90, 90), dtype=bool)
    mask[5:20, 70:85] = True
    assert c.place_is_right(c.answer(True, ["top right"]), mask)
    assert not c.place_is_right(c.answer(True, ["top"]), mask)
    assert not c.place_is_right(c.answer(True, CELLS), mask)
    assert not c.place_is_right("Yes.", mask)
    assert c.place_is_right("Yes.", np.zeros((9, 9), dtype=bool)) is None


def test_scattered_dots_lie_where_their_centre_is():
    mask = np.zeros((90, 90), dtype=bool)
    for y, x in ((5, 5), (5, 85), (40, 10), (40, 80)):
        mask[y : y + 4, x : x + 4] = True
    assert c.cell_of_center(mask) == "top"
    assert c.place_is_right(c.answer(True, ["top"]), mask)
    assert not c.place_is_right(c.answer(True, ["bottom"]), mask)
