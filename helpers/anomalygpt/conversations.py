"""Questions for AnomalyGPT, the answers it is trained on, and a strict reading of what it says.

The questions and answers are the published ones, because the weights were trained with them. A sentence may name
places: the picture is divided into 3 x 3 cells, ``top left`` to ``bottom right``.

Source: Gu et al., AnomalyGPT, AAAI 2024; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

QUESTION = "Is there any anomaly in the image?"
WORDINGS = ("published", "short")
NORMAL_ANSWER = "No, there is no anomaly in the image."
CELLS = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
"""Words of the 3 x 3 cells, rows from top to bottom."""

_FLAWLESS = "without any damage, flaw, defect, scratch, hole or broken part"
# category -> (what it is a photo of, what it should be); {} stands for the flawless clause.
_INDUSTRIAL = {
    "bottle": ("a bottle", ", which should be round, {}"),
    "cable": ("three cables", ", they are green, blue and grey, which cannot be missed or swapped and should be {}"),
    "capsule": ("a capsule", ", which should be black and orange, with print '500', {}"),
    "leather": ("leather", ", which should be brown and {}"),
    "wood": ("wood", ", which should be brown with patterns, {}"),
    "metal_nut": ("a metal nut", ", which should be {}, and shouldn't be fliped"),
    "pill": ("a pill", ", which should be white, with print 'FF' and red patterns, {}"),
    "screw": ("a screw", ", which tail should be sharp, and {}"),
    "candle": ("4 candles", ", every candle should be round, {}"),
    "capsules": ("many small capsules", ", every capsule is green, should be {}"),
    "chewinggum": ("a chewinggom", ", which should be white, {}"),
    "fryum": ("a fryum", " on green background, which should be {}"),
}
_PLAIN = {  # and what should only be {}
    **{name: name for name in ("carpet", "grid", "tile")},
    **{f"pcb{n}": "pcb" for n in (1, 2, 3, 4)},
    **{f"macaroni{n}": "4 macaronis" for n in (1, 2)},
    **{n: f"a {n.replace('_', ' ')}" for n in "hazelnut toothbrush transistor zipper cashew pipe_fryum".split()},
}

_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_DENIAL = re.compile(r"\b(no|not any|without any|free (from|of)) (\w+ )?(anomal|defect|flaw|damage|irregular)", re.I)
_CLAIM = re.compile(r"\bthere (?:is|are) (?:an?|\d+|several|some) (?:\w+ )?(anomal|defect|flaw|irregular)", re.I)
# Longest first, so that "top left" is not read as "top" and "left".
_PLACE = re.compile(rf"\b({'|'.join(sorted(sum(CELLS, ()), key=len, reverse=True))})\b", re.IGNORECASE)


def question(category: str, *, wording: str = "published") -> str:
    """The question about a picture, with what it shows before it; a category that MVTec AD and VisA do not have is
    called a painting. ``wording`` is one of :data:`WORDINGS` (the short one has a third of the tokens).

    >>> question("mona_lisa", wording="short")
    'This is the painting mona lisa. Is there any anomaly in the image?'
    """
    if wording not in WORDINGS:
        raise ValueError(f"wording is {wording!r}; allowed are {', '.join(WORDINGS)}.")
    name = category.replace("_", " ")
    if wording == "short":
        return f"This is the painting {name}. {QUESTION}"
    plain = (_PLAIN.get(category, f"the painting {name}"), ", which should be {}")
    what, rest = _INDUSTRIAL.get(category, plain)
    return f"This is a photo of {what} for anomaly detection{rest.format(_FLAWLESS)}. {QUESTION}"


def cell_of(row: float, column: float) -> str:
    """Name of the cell of a point, given as shares of height and width; a limit belongs to the lower cell.

    >>> cell_of(1 / 3, 0.9)
    'top right'
    """
    row, column = (sum(share > third for third in (1 / 3, 2 / 3)) for share in (row, column))
    return CELLS[row][column]


def cell_of_center(mask: np.ndarray) -> str:
    """Cell of the centre of mass of all anomalous pixels of a bool mask ``(H, W)`` that has some."""
    rows, columns = np.nonzero(mask)
    return cell_of((rows.mean() + 0.5) / mask.shape[0], (columns.mean() + 0.5) / mask.shape[1])


def cells_of_mask(mask: np.ndarray, *, min_share: float = 0.05) -> tuple[str, ...]:
    """Cells of the centres of a bool mask's regions, the largest first, without crumbs below ``min_share`` of it."""
    import cv2

    joined = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    _, _, stats, centers = cv2.connectedComponentsWithStats(joined, connectivity=8)
    regions = sorted(zip(stats[1:, cv2.CC_STAT_AREA].tolist(), centers[1:].tolist()), reverse=True)
    height, width = mask.shape
    return tuple(
        cell_of((y + 0.5) / height, (x + 0.5) / width) for area, (x, y) in regions if area >= min_share * regions[0][0]
    )


def answer(is_anomalous: bool, cells: Sequence[str] = ()) -> str:
    """The sentence that AnomalyGPT is trained to say; one cell per anomaly, none when the place is unknown.

    >>> answer(True, ["top", "top", "left"])
    'Yes, there are 3 anomalies in the image, they are at the top and left of the image.'
    """
    if not is_anomalous:
        return NORMAL_ANSWER
    if len(cells) < 2:
        return f"Yes, there is an anomaly in the image{f', at the {cells[0]} of the image' if cells else ''}."
    *most, last = dict.fromkeys(cells)
    places = f"{', '.join(most)} and {last}" if most else last
    return f"Yes, there are {len(cells)} anomalies in the image, they are at the {places} of the image."


def parse_answer(text: str) -> tuple[bool | None, frozenset[str]]:
    """What an answer says, True (anomalous), False, or None without a clear verdict, and the cells that it names.

    It must begin with Yes or No and not contradict itself. (The published evaluation finds a "No" in "Note".)

    >>> parse_answer("Yes, there is an anomaly in the image, at the top left of the image.")
    (True, frozenset({'top left'}))
    """
    match = _VERDICT.match(text)
    if match is None:
        return None, frozenset()
    says_yes = match.group(1).lower() == "yes"
    rest = text[match.end() :]
    first_sentence = rest.split(".")[0]
    if _VERDICT.search(rest.partition("\n")[0][:8]) or (_DENIAL if says_yes else _CLAIM).search(first_sentence):
        return None, frozenset()
    return says_yes, frozenset(place.lower() for place in _PLACE.findall(first_sentence) if says_yes)


def answers_say(text: str) -> bool | None:
    """What an answer says of its picture: True anomalous, False normal, None unclear (an empty answer, too)."""
    return parse_answer(text)[0]


def place_is_right(text: str, mask: np.ndarray) -> bool | None:
    """Whether an answer about an anomalous picture names the place of its mask, bool ``(H, W)``: the cell of the centre
    of the largest region or of all, and no more cells than there are regions. None for an empty mask."""
    true_cells, named = cells_of_mask(mask), parse_answer(text)[1]
    if not true_cells:
        return None
    return bool({true_cells[0], cell_of_center(mask)} & named) and len(named) <= len(true_cells)
