"""Questions, trained answers, and the strict reading of answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.anomalygpt import conversations as c

CELLS = [cell for row in c.CELLS for cell in row]
FLAWLESS = "without any damage, flaw, defect, scratch, hole or broken part"


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ("bottle", f"a bottle for anomaly detection, which should be round, {FLAWLESS}"),
        ("metal_nut", f"a metal nut for anomaly detection, which should be {FLAWLESS}, and shouldn't be fliped"),
        ("fryum", f"a fryum for anomaly detection on green background, which should be {FLAWLESS}"),
        ("tile", f"tile for anomaly detection, which should be {FLAWLESS}"),
        ("pipe_fryum", f"a pipe fryum for anomaly detection, which should be {FLAWLESS}"),
        ("mona_lisa", f"the painting mona lisa for anomaly detection, which should be {FLAWLESS}"),
    ],
)
def test_descriptions_are_the_published_ones_and_a_painting_is_named(category, expected):
    assert c.question(category) == f"This is a photo of {expected}. Is there any anomaly in the image?"
    with pytest.raises(ValueError, match="allowed are published, short"):
        c.question(category, wording="long")


def test_cells():
    points = [(0, 0), (1 / 3, 1 / 3), (0.34, 0.5), (2 / 3, 0.67), (1, 0.5)]
    assert [c.cell_of(*point) for point in points] == ["top left", "top left", "center", "right", "bottom"]
    mask = np.zeros((90, 120), dtype=bool)
    mask[70:85, 90:115] = mask[5:12, 5:15] = mask[45, 60] = True  # the largest, another one, a crumb
    assert c.cells_of_mask(mask) == ("bottom right", "top left")
    assert c.cells_of_mask(np.zeros((5, 5), dtype=bool)) == ()


@given(st.lists(st.sampled_from(CELLS), min_size=1, max_size=5))
def test_what_is_said_is_read_back(cells):
    assert c.parse_answer(c.answer(True, cells)) == (True, frozenset(cells))


@pytest.mark.parametrize(
    ("verdict", "texts"),
    [
        (False, ["No, there is no anomaly in the image.", " no."]),
        (True, ["Yes", '"Yes", there is a defect.']),
        (None, ["", "Note the frame.", "Yesterday it was whole.", "I cannot say.", "Yes/No", "Yes or no?"]),
        (None, ["The image shows a woman. No, there is no anomaly.", "Yes, there is no anomaly in the image."]),
        (None, ["No, there is an anomaly in the image."]),
    ],
)
def test_strict_verdicts(verdict, texts):
    assert [c.answers_say(text) for text in texts] == [verdict] * len(texts)


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text_is_read_without_error(text):
    assert c.answers_say(text) in (True, False, None)


def test_place_must_be_named_and_not_everything():
    mask, dots = np.zeros((2, 90, 90), dtype=bool)
    mask[5:20, 70:85] = True
    said = [c.answer(True, cells) for cells in (["top right"], ["top"], CELLS, [])]
    assert [c.place_is_right(text, mask) for text in said] == [True, False, False, False]
    assert c.place_is_right("Yes.", np.zeros((9, 9), dtype=bool)) is None
    for y, x in ((5, 5), (5, 85), (40, 10), (40, 80)):  # scattered dots lie where their centre is
        dots[y : y + 4, x : x + 4] = True
    assert c.cell_of_center(dots) == "top"
    assert [c.place_is_right(c.answer(True, [cell]), dots) for cell in ("top", "bottom")] == [True, False]
