"""A conversation about one picture: what is in it, its anomaly map, its score, and every question and answer.

No widget here (see :mod:`widgets`): notebooks, tests and other front ends drive the same session. A picture is
looked at once, whatever is asked afterwards; a further turn computes only the part of the prompt that is new.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import tempfile
import time
import traceback
import unicodedata
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np

from helpers import files as storage
from helpers.anomalygpt import conversations
from helpers.anomalygpt.language import PromptTooLong
from helpers.anomalygpt.model import AnomalyGPT, Look
from helpers.chat import references
from helpers.chat.detectors import Verdict
from helpers.chat.references import NO_REFERENCES, References
from helpers.data import images, names
from helpers.data import manifest as data
from helpers.judge import figures
from helpers.judge import statistics as calibration
from helpers.records import Sample

QUICK_QUESTIONS = (
    conversations.QUESTION,
    "Where is the anomaly?",
    "Describe the painting.",
    "How sure are you?",
)
VIEWS = ("original", "map", "overlay")
MAX_QUESTION = 1_000
"""Characters of a question."""
MAX_UPLOAD_BYTES = 40_000_000
"""Size of an uploaded file; a path may be of any size that :func:`helpers.data.images.load_image` reads."""
MAX_SIDE = 1024
"""Longer side in pixels to which a picture is shrunk."""

_N_SEEN = 8
_IS_REFERENCE = "This picture is itself one of the references: nothing in it can be unlike them."
_METHOD = "anomalygpt"
_OUTLINE = (0, 229, 255)


class BadInput(ValueError):
    """Something the user gave cannot be used; the message says what came, what is allowed and what to do."""


@dataclass(frozen=True)
class Picture:
    """A picture to talk about.

    Attributes:
        image: uint8 RGB ``(H, W, 3)``.
        name: for readers; may hold anything a file name may.
        sha256: of the file's bytes.
        path: None for uploads, which are not kept.
        category: the artwork it should show, None when unknown.
    """

    image: np.ndarray
    name: str
    sha256: str
    path: Path | None = None
    category: str | None = None


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: as the user typed it.
        prompt: as the model got it, with a sentence on the artwork before it.
        answer: what the model said.
        time: UTC, ISO 8601.
        seconds: until the answer was complete.
        n_reused: positions of the prompt that were known from earlier turns.
    """

    question: str
    prompt: str
    answer: str
    time: str
    seconds: float
    n_reused: int


@dataclass(frozen=True)
class _Seen:
    """A look and the seconds it took."""

    look: Look
    seconds: float


# --- pictures --------------------------------------------------------------------------------------------------------


def open_picture(path: str | Path, *, category: str | None = None, max_side: int = MAX_SIDE) -> Picture:
    """Read a picture from a path.

    Args:
        path: of the file; ``~`` is understood, quotes around it are dropped.
        category: the artwork it should show.
        max_side: longer side in pixels to which it is shrunk.
    Raises:
        BadInput: there is no readable picture; says why.
    """
    text = str(path).strip().strip("\"'")
    if not text:
        raise BadInput("There is no path. Type one, for example /content/photo.jpg, or choose a sample.")
    if "://" in text:
        raise BadInput("Web addresses are not opened here. Save the picture and give the path of the file.")
    place = Path(text).expanduser().absolute()
    try:
        image = images.load_image(place, max_side=max_side)
    except (images.ImageError, OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    return Picture(image, place.name, storage.sha256_file(place), place, category)


def receive_picture(name: str, content: bytes, *, category: str | None = None, max_side: int = MAX_SIDE) -> Picture:
    """Read an uploaded picture; its file is not kept.

    Raises:
        BadInput: empty, larger than :data:`MAX_UPLOAD_BYTES`, or no readable picture.
    """
    name = Path(name.replace("\\", "/")).name or "upload"
    if len(content) > MAX_UPLOAD_BYTES:
        raise BadInput(
            f"{name} has {len(content) / 1e6:.0f} MB; an upload may have {MAX_UPLOAD_BYTES / 1e6:.0f}. Put the file on "
            "the machine and give its path, or save a smaller copy."
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "upload"
        place.write_bytes(content)
        try:
            image = images.load_image(place, max_side=max_side)
        except images.ImageError as error:
            raise BadInput(str(error).replace(str(place), name)) from error
    return Picture(image, name, hashlib.sha256(content).hexdigest(), None, category)


def sample_pictures(dataset: data.Dataset, *, n_normal: int = 2) -> dict[str, Sample]:
    """Test pictures to try: of each artwork some genuine ones and one of every kind of anomaly.

    Returns:
        words for a list, for example ``"Mona Lisa: face swap"`` -> the picture.
    """
    found: dict[str, Sample] = {}
    for category in dataset.categories:
        name = figures.category_label(category)
        test = dataset.select(split="test", category=category)
        genuine = [sample for sample in test if not sample.is_anomalous][:n_normal]
        found |= {f"{name}: genuine {number}": sample for number, sample in enumerate(genuine, start=1)}
        for sample in test:
            if sample.is_anomalous:
                found.setdefault(f"{name}: {sample.kind.replace('_', ' ')}", sample)
    return found


def telling_sample(samples: Mapping[str, Sample]) -> str:
    """The first anomalous sample, one whose place is known if there is any."""
    return max(samples, key=lambda name: (samples[name].is_anomalous, samples[name].mask_path is not None))


def pictures_in(folder: str | Path, *, max_side: int = MAX_SIDE, limit: int = 16) -> list[Picture]:
    """The first pictures of a folder, in the order of their names.

    Raises:
        BadInput: no such folder, no picture in it, or one that cannot be read.
    """
    place = Path(str(folder).strip().strip("\"'") or ".").expanduser().absolute()
    if not place.is_dir():
        raise BadInput(f"{place} is no folder. Give the folder that holds the genuine pictures.")
    found = (path for path in place.iterdir() if not names.is_hidden(path.name))
    files = sorted(path for path in found if path.suffix.lower() in images.IMAGE_SUFFIXES)
    if not files:
        raise BadInput(f"{place} holds no picture. Put genuine pictures of the artwork there.")
    return [open_picture(path, max_side=max_side) for path in files[:limit]]


def clean_question(text: str) -> str:
    """The question on one line, without control characters; emoji and other scripts stay as they are.

    Raises:
        BadInput: nothing is left, or more than :data:`MAX_QUESTION` characters.

    >>> clean_question("  Is it\\nwhole? ")
    'Is it whole?'
    """
    question = " ".join(text.split())
    question = "".join(c for c in question if unicodedata.category(c) not in ("Cc", "Cs"))
    if not question:
        raise BadInput(f"The question is empty. Type one, for example “{conversations.QUESTION}”")
    if len(question) > MAX_QUESTION:
        raise BadInput(f"The question has {len(question):,} characters; {MAX_QUESTION:,} are allowed. Shorten it.")
    return question


# --- the session -----------------------------------------------------------------------------------------------------


class ChatSession:
    """A conversation with AnomalyGPT about a picture.

    Args:
        model: the chain of notebook 06 or of the authors.
        known: what pictures can be compared with, from :func:`helpers.chat.references.of_dataset`.
        wording: of the sentence about the artwork before each question, see :func:`conversations.question`.
        max_new_tokens: length limit of an answer.
        profile: name of the profile, for the record.

    Attributes:
        id: of the session, for the record.
        known: key -> references; :data:`helpers.chat.references.NO_REFERENCES` is always there.
        picture: what is talked about, None at first.
        history: turns about it.
        errors: every unexpected exception, in words; empty when all is well.
        refused: every input that was refused, in words.
    """

    def __init__(
        self,
        model: AnomalyGPT,
        known: Mapping[str, References],
        *,
        wording: str = "published",
        max_new_tokens: int = 64,
        profile: str = "",
    ) -> None:
        if NO_REFERENCES not in known:
            raise ValueError(f"known lacks {NO_REFERENCES!r}, it has {sorted(known)}. Use references.of_dataset.")
        self.model, self.known = model, dict(known)
        self.wording, self.max_new_tokens, self.profile = wording, max_new_tokens, profile
        self.id = uuid.uuid4().hex[:12]
        self.picture: Picture | None = None
        self.history: list[Turn] = []
        self.errors: list[str] = []
        self.refused: list[str] = []
        self._key = NO_REFERENCES
        self._seen: _Seen | None = None
        self._all_seen: dict[tuple[str, str], _Seen] = {}

    # --- what is looked at

    def choose(self, picture: Picture) -> None:
        """Talk about this picture from now on, beside the references of its artwork; the conversation starts anew."""
        key = picture.category if picture.category in self.known else self._key
        self._seen = self._look_at(picture, key)
        self.picture, self._key, self.history = picture, key, []

    def compare_with(self, key: str) -> None:
        """Compare with other references; the map changes, so the conversation starts anew.

        Raises:
            BadInput: no such references.
        """
        if key not in self.known:
            raise BadInput(f"There are no references {key!r}; there are {', '.join(self.known)}.")
        if self.picture is not None:
            self._seen = self._look_at(self.picture, key)
        self._key, self.history = key, []

    def add_references(self, key: str, pictures: Sequence[Picture]) -> None:
        """Take genuine pictures of the user's artwork as references, and compare with them.

        Raises:
            BadInput: too few, or a key that is the dataset's.
        """
        if key in self.known and (key == NO_REFERENCES or self.known[key].category is not None):
            raise BadInput(f"{key!r} belongs to the dataset. Give your references another name.")
        if len(pictures) < references.MIN_OWN:
            raise BadInput(
                f"{len(pictures)} genuine picture given, at least {references.MIN_OWN} are needed: how far they differ "
                "among themselves sets the threshold."
            )
        members = [picture.sha256 for picture in pictures]
        self.known[key] = references.of_pictures(
            self.model, [one.image for one in pictures], label=key, members=members
        )
        self._all_seen = {place: seen for place, seen in self._all_seen.items() if place[1] != key}
        self.compare_with(key)

    @property
    def key(self) -> str:
        """Key of the references in use."""
        return self._key

    @property
    def references(self) -> References:
        """What the picture is compared with."""
        return self.known[self._key]

    @property
    def look(self) -> Look:
        """What the model sees in the picture.

        Raises:
            BadInput: no picture is chosen.
        """
        if self._seen is None:
            raise BadInput("There is no picture yet. Choose a sample, give a path or upload one.")
        return self._seen.look

    @property
    def anomaly_map(self) -> np.ndarray:
        """Of the picture: float32 ``(224, 224)``, raw, higher = more anomalous."""
        return self.look.maps[0].numpy()

    @property
    def anomaly_score(self) -> float:
        """Highest value of the map."""
        return float(self.look.scores[0])

    @property
    def says_anomalous(self) -> bool | None:
        """The label that the last clear answer gives; without one, True when the score is above the threshold."""
        if self.picture is None:
            return None
        spoken = [conversations.parse_answer(turn.answer).is_anomalous for turn in self.history]
        clear = [verdict for verdict in spoken if verdict is not None]
        return clear[-1] if clear else self.anomaly_score > self.references.threshold

    def verdict(self) -> Verdict:
        """AnomalyGPT's map as a verdict beside those of the other detectors."""
        against, score = self.references, self.anomaly_score
        p_value = float(calibration.p_values(against.normal_scores, [score])[0])
        note = _IS_REFERENCE if self.picture.sha256 in against.members else ""
        seconds = self._seen.seconds
        return Verdict(_METHOD, score, against.threshold, p_value, self.anomaly_map, against.limits, seconds, note)

    def yes_no(self) -> float:
        """logit(Yes) - logit(No) as the first word of the answer to the standard question; above 0 it leans to yes."""
        return float(self.model.first_token(self.look, self._prompt(conversations.QUESTION))[0][0])

    # --- questions

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None) -> Turn:
        """Ask about the picture; earlier turns are remembered.

        Args:
            question: any text.
            on_text: gets the answer so far each time it grows.
        Raises:
            BadInput: no picture, no question, one that is too long, or a conversation that is.
        """
        look, asked = self.look, clean_question(question)
        prompt = self._prompt(asked)
        started = time.perf_counter()
        try:
            answer = self.model.ask(
                look, prompt, history=[(turn.prompt, turn.answer) for turn in self.history],
                max_new_tokens=self.max_new_tokens, on_text=on_text,
            )[0]  # fmt: skip
        except PromptTooLong as error:
            raise BadInput(f"{error} “Start over” clears it.") from error
        seconds = time.perf_counter() - started
        self.history.append(Turn(asked, prompt, answer, _now(), seconds, 0))
        return self.history[-1]

    def start_over(self) -> None:
        """Forget the conversation; picture and map stay."""
        self.history = []

    def record_error(self, error: Exception) -> str:
        """Note an unexpected exception; returns its traceback."""
        self.errors.append(f"{type(error).__name__}: {error}")
        return "".join(traceback.format_exception(error))

    def context(self) -> dict[str, Any]:
        """What a judgement is about, as JSON values; the picture itself is not in it.

        Raises:
            BadInput: no picture is chosen.
        """
        score = self.anomaly_score
        last = self.history[-1] if self.history else None
        return {
            "session": self.id,
            "time": _now(),
            "method": _METHOD,
            "picture": self.picture.name,
            "sha256": self.picture.sha256,
            "category": self.picture.category or self.references.category,
            "references": self.references.label,
            "question": "" if last is None else last.question,
            "answer": "" if last is None else last.answer,
            "score": score,
            "threshold": self.references.threshold,
            "is_predicted_anomalous": self.says_anomalous,
            "checkpoint_hash": self.model.checkpoint_id,
            "profile": self.profile,
        }

    def _look_at(self, picture: Picture, key: str) -> _Seen:
        """The look at a picture; what was seen before is known."""
        place = (picture.sha256, key)
        if place in self._all_seen:
            return self._all_seen[place]
        started = time.perf_counter()
        look = self.model.look([picture.image], references=self.known[key].bank)
        self._all_seen[place] = _Seen(look, time.perf_counter() - started)
        if len(self._all_seen) > _N_SEEN:
            del self._all_seen[next(iter(self._all_seen))]
        return self._all_seen[place]

    def _prompt(self, question: str) -> str:
        """The question with the sentence on the artwork that the model was trained with."""
        category = self.references.category
        if category is None:
            return question
        about = conversations.question(category, wording=self.wording).removesuffix(conversations.QUESTION)
        return about + question


# --- what the map shows ----------------------------------------------------------------------------------------------


def draw_view(
    image: np.ndarray,
    anomaly_map: np.ndarray | None,
    limits: tuple[float, float],
    *,
    view: str = "overlay",
    opacity: float = 0.85,
    threshold: float = math.nan,
    max_side: int = 768,
) -> np.ndarray:
    """A picture, its map, or the map over it, with a line around what lies above the threshold.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        anomaly_map: float ``(h, w)``, raw; None shows the picture whatever the view.
        limits: ends of the colour scale.
        view: one of :data:`VIEWS`.
        opacity: of the highest values over the picture, in [0, 1].
        threshold: map value; nan draws no line.
        max_side: longer side of the result in pixels.
    Returns:
        uint8 RGB.
    Raises:
        ValueError: no such view.
    """
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}; allowed are {', '.join(VIEWS)}.")
    image = images.resize(image, max_side)
    if anomaly_map is None or view == "original":
        return image
    if view == "map":  # full colour at any height of the map
        low, high = limits
        levels = np.clip((_fitted(anomaly_map, image) - low) / (high - low), 0, 1)
        drawn = (mpl.colormaps[figures.MAP_COLORS](levels)[..., :3] * 255).astype(np.uint8)
    else:
        drawn = figures.overlay(image, anomaly_map, limits, opacity=opacity)
    if math.isnan(threshold):
        return drawn
    marked = (_fitted(anomaly_map, image) > threshold).astype(np.uint8)
    outlines, _ = cv2.findContours(marked, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = np.ascontiguousarray(drawn)
    cv2.drawContours(drawn, outlines, -1, _OUTLINE, thickness=max(1, round(max(image.shape) / 320)))
    return drawn


def describe_map(anomaly_map: np.ndarray, threshold: float) -> str:
    """What lies above the threshold, and where the map is highest, in words."""
    row, column = np.unravel_index(int(anomaly_map.argmax()), anomaly_map.shape)
    height, width = anomaly_map.shape
    cell = conversations.cell_of((row + 0.5) / height, (column + 0.5) / width)
    share = float((anomaly_map > threshold).mean())
    above = f"{share:.1%} of the picture lies above it" if share else "nothing lies above it"
    return f"Highest value {anomaly_map.max():.3f} ({cell}); threshold {threshold:.3f}: {above}."


def as_text(history: Sequence[Turn]) -> str:
    """Questions and answers as plain lines: saved notebooks keep these, and lose the widgets."""
    return "\n".join(f"You:        {turn.question}\nAnomalyGPT: {turn.answer}" for turn in history)


def png_bytes(image: np.ndarray) -> bytes:
    """A picture uint8 RGB ``(H, W, 3)`` as PNG."""
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))
    return encoded.tobytes()


def _fitted(anomaly_map: np.ndarray, image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(np.asarray(anomaly_map, dtype=np.float32), (width, height), interpolation=cv2.INTER_LINEAR)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
