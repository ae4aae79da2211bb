"""A conversation about one picture: what every detector says of it, and every question with its answer.

A picture is looked at once, whatever is asked afterwards. *Where is it?* and *How sure are you?* are answered from the
map and the numbers, because a language model invents both; where its words contradict the map, a comment says so.
"""

from __future__ import annotations

import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers import files
from helpers.anomalygpt import conversations
from helpers.anomalygpt.evaluation import Bench, EvaluationSettings
from helpers.anomalygpt.language import PromptTooLong
from helpers.anomalygpt.model import AnomalyGPT
from helpers.chat.detectors import CHAT, Detectors, Verdict
from helpers.data import Dataset, images
from helpers.records import Sample, Scored
from helpers.results import category_label, method_label

ASKED, WHERE, DESCRIBE, SURE = conversations.QUESTION, "Where is it?", "Describe the painting.", "How sure are you?"
FIXED_QUESTIONS = (ASKED, WHERE, DESCRIBE, SURE)  # without history: an invention must not become a fact
MODEL, NUMBERS = "AnomalyGPT", "from the map and the numbers"
MAX_QUESTION, MAX_UPLOAD_BYTES, MAX_SIDE = 1_000, 40_000_000, 1024
"""Characters of a question; size of an uploaded file; longer side in pixels to which a picture is shrunk."""


class BadInput(ValueError):
    """Something the user gave cannot be used; the message says what came, what is allowed and what to do."""


@dataclass(frozen=True)
class Picture:
    """A picture to talk about: uint8 RGB ``(H, W, 3)``, its name for readers, the hash of its file's bytes; ``path`` is
    None for uploads, which are not kept; ``category`` the painting it should show, None when unknown."""

    image: np.ndarray
    name: str
    sha256: str
    path: Path | None = None
    category: str | None = None


@dataclass(frozen=True)
class Turn:
    """A question, the prompt that the model got for it (with a sentence on the artwork), and the answer; ``source`` is
    :data:`MODEL` or :data:`NUMBERS`; ``comment`` says what contradicts the answer, or that nothing has checked it."""

    question: str
    prompt: str
    answer: str
    source: str
    comment: str = ""


def open_picture(path: str | Path, *, category: str | None = None) -> Picture:
    """Read a picture from a path; ``~`` is understood, quotes around it are dropped. BadInput: no readable picture."""
    text = str(path).strip().strip("\"'")
    if not text or "://" in text:
        raise BadInput("Give the path of a picture file, for example /content/photo.jpg; web addresses are not opened.")
    place = Path(text).expanduser().absolute()
    try:
        image = images.load_image(place, max_side=MAX_SIDE)
    except (images.ImageError, OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    return Picture(image, place.name, files.sha256_file(place), place, category)


def receive_picture(name: str, content: bytes) -> Picture:
    """Read an uploaded picture; its file is not kept. BadInput: too large, or no readable picture."""
    name = Path(name.replace("\\", "/")).name or "upload"
    if len(content) > MAX_UPLOAD_BYTES:
        sizes = f"{len(content) / 1e6:.0f} MB; an upload may have {MAX_UPLOAD_BYTES / 1e6:.0f}"
        raise BadInput(f"{name} has {sizes}. Give the file's path instead.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        return replace(open_picture(Path(folder) / name), path=None)


def sample_pictures(dataset: Dataset) -> dict[str, Sample]:
    """Test pictures to try by words such as ``"Mona Lisa: letter"``: of each painting two marks whose place is known, a
    change of the whole picture and a genuine one; of each kind the most visible."""
    found: dict[str, Sample] = {}
    for category in dataset.categories:
        kinds: dict[str, Sample] = {}
        for sample in sorted(dataset.select(split="test", category=category), key=lambda one: -(one.visibility or 0)):
            kinds.setdefault(sample.kind.replace("_", " ") if sample.is_anomalous else "genuine", sample)
        marks = [kind for kind, sample in kinds.items() if sample.mask_path is not None]
        whole = sorted((kind for kind in kinds if kind not in [*marks, "genuine"]), key=lambda kind: kind != "replica")
        for kind in [*marks[:2], *whole[:1], *(["genuine"] if "genuine" in kinds else [])]:
            found[f"{category_label(category)}: {kind}"] = kinds[kind]
    return found


def clean_question(text: str) -> str:
    """The question on one line, without control characters; emoji and other scripts stay as they are. BadInput: nothing
    is left, or more than :data:`MAX_QUESTION` characters."""
    question = "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cs"))
    if not question:
        raise BadInput(f"The question is empty. Type one, for example “{ASKED}”")
    if len(question) > MAX_QUESTION:
        raise BadInput(f"The question has {len(question):,} characters; {MAX_QUESTION:,} are allowed. Shorten it.")
    return question


class ChatSession:
    """A conversation with AnomalyGPT about a picture, beside the verdicts of all detectors.

    Args:
        model: the chain of notebook 06 or of the authors.
        detectors: from :func:`helpers.chat.detectors.load`; AnomalyGPT's results give its map's ``threshold``.
        settings: of notebook 07: wording, references and length of the answers are those of its row.
        profile: name of the profile, for the record.
    Attributes:
        picture, category, verdicts, history: what is talked about (None at first), the painting it is compared with,
            every detector's verdict on it, and the turns about it.
        errors: every unexpected exception, in words.
    ValueError: notebook 07 has not run on this dataset.
    """

    def __init__(
        self, model: AnomalyGPT, detectors: Detectors, *, settings: EvaluationSettings, profile: str = ""
    ) -> None:
        if CHAT in detectors.missing:
            raise ValueError(f"The chat needs the thresholds of AnomalyGPT. {detectors.missing[CHAT]}")
        self.model, self.detectors, self.profile = model, detectors, profile
        self.id, self._settings = uuid.uuid4().hex[:12], settings
        self.categories = tuple(detectors.results[CHAT].manifest["calibration"])
        self.category, self.threshold = self.categories[0], float("nan")
        self.picture: Picture | None = None
        self.verdicts, self.history, self.errors = [], [], []
        self._look, self._bench = None, Bench(model, detectors.dataset, settings)

    def choose(self, picture: Picture, *, category: str | None = None) -> None:
        """Talk about this picture from now on; every detector judges it, and the conversation starts anew. It is
        compared with ``category``, by default the painting that it should show, else the one before."""
        category = category or (picture.category if picture.category in self.categories else self.category)
        if category not in self.categories:
            raise BadInput(f"{category!r} is no painting of the dataset; there are {', '.join(self.categories)}.")
        bank = self._bench.bank(category, self._settings.row_shots)  # the references of the comparison's row
        look = self.model.look([picture.image], references=bank)
        own = Scored(float(look.scores[0]), look.maps[0].numpy())
        verdicts = self.detectors.judge(picture.image, category, sha256=picture.sha256, own=own)
        self.picture, self.category, self.verdicts, self._look, self.history = picture, category, verdicts, look, []
        self.threshold = self.own.threshold

    @property
    def own(self) -> Verdict:
        """AnomalyGPT's verdict by its map. BadInput: no picture is chosen."""
        if self.picture is None:
            raise BadInput("There is no picture yet. Choose a sample, give a path or upload one.")
        return next(one for one in self.verdicts if one.method == CHAT)

    @property
    def map_says(self) -> bool:
        """Whether AnomalyGPT's map exceeds the threshold anywhere."""
        return self.own.anomaly_score > self.threshold

    @property
    def words_say(self) -> bool | None:
        """What the last clear answer to :data:`ASKED` says; None before one."""
        spoken = [conversations.answers_say(turn.answer) for turn in self.history if turn.question == ASKED]
        return next((says for says in reversed(spoken) if says is not None), None)

    def verdict_line(self) -> tuple[str, str]:
        """All detectors in a headline, and what AnomalyGPT's map and words say, with a warning where they disagree."""
        says = [self.map_says if one.method == CHAT else one.is_anomalous for one in self.verdicts]
        says = [one for one in says if one is not None]
        share = sum(says) / len(says)
        verdict = "Probably anomalous" if share > 0.5 else "Undecided" if share > 0.25 else "Probably genuine"
        headline = f"{verdict}: {sum(says)} of {len(says)} detectors call it anomalous."
        words = {True: "yes", False: "no", None: "not asked yet, or unclear"}[self.words_say]
        details = f"Anomaly? AnomalyGPT's map: {'yes' if self.map_says else 'no'}. Its words: {words}."
        if self.words_say is not None and self.words_say != self.map_says:
            details += " They disagree: rely on neither alone."
        elif verdict == ("Probably genuine" if self.map_says else "Probably anomalous"):
            details += " Most detectors disagree with its map."
        return headline, details

    def ask(self, question: str, *, on_text: Callable[[str], None] | None = None) -> Turn:
        """Ask about the picture; free questions remember earlier free ones. ``on_text`` gets the growing answer.
        BadInput: no picture, no question, one that is too long, or a conversation that is."""
        asked, own = clean_question(question), self.own
        if asked in (WHERE, SURE):
            turn = Turn(asked, "", self._where() if asked == WHERE else self._how_sure(own), NUMBERS)
        else:
            about = conversations.question(self.category, wording=self._settings.wording)
            prompt = about.removesuffix(conversations.QUESTION) + asked
            free = [t for t in self.history if t.source == MODEL and t.question not in FIXED_QUESTIONS]
            history = [] if asked in FIXED_QUESTIONS else [(turn.prompt, turn.answer) for turn in free]
            options = {"max_new_tokens": self._settings.max_new_tokens, "on_text": on_text}
            try:
                (answer,) = self.model.ask(self._look, prompt, history=history, **options)
            except PromptTooLong as error:
                raise BadInput(f"{error} “Start over” clears it.") from error
            turn = Turn(asked, prompt, answer, MODEL, self._comment(asked, answer))
        self.history.append(turn)
        return turn

    def _where(self) -> str:
        """The place in words, from the maps of all detectors that exceed what genuine pictures show."""
        place = describe_place(self.own.anomaly_map, self.threshold)
        lines = [f"AnomalyGPT's map: {place}." if self.map_says else "AnomalyGPT's map exceeds the limit nowhere."]
        for one in self.verdicts:
            if one.method != CHAT and one.is_anomalous and one.anomaly_map is not None:
                lines.append(f"{method_label(one.method)}: {describe_place(one.anomaly_map, one.limit)}.")
        return " ".join(lines)

    def _how_sure(self, own: Verdict) -> str:
        n = len(self.detectors.results[CHAT].manifest["calibration"][self.category]["scores"])
        at_least = round(own.p_value * (n + 1)) - 1
        words, change = "exceeds" if self.map_says else "stays below", abs(own.anomaly_score / self.threshold - 1)
        reached = f"{words} the limit by {change:.0%}; {at_least} of {n} genuine pictures reach it"
        return f"The highest value of AnomalyGPT's map {reached}. {self.verdict_line()[0]}"

    def _comment(self, question: str, answer: str) -> str:
        """What speaks against an answer of the language model, or that nothing has checked it; empty when all agree."""
        says, headline = conversations.answers_say(answer), self.verdict_line()[0]
        if question != ASKED or says is None:
            return f"{'Words that nothing has checked.' if answer else 'No words.'} {headline}"
        against = [headline] if headline.startswith("Probably genuine" if says else "Probably anomalous") else []
        (_, named), marked = conversations.parse_answer(answer), self.own.anomaly_map > self.threshold
        if says != self.map_says or (named and not named & set(conversations.cells_of_mask(marked))):
            against.insert(0, f"Its own map: {describe_place(self.own.anomaly_map, self.threshold)}.")
        return " ".join(["Do not rely on these words.", *against]) if against else ""

    def start_over(self) -> None:
        """Forget the conversation; picture and verdicts stay."""
        self.history = []

    def context(self) -> Mapping[str, Any]:
        """What a judgement is about, as JSON values; the picture itself is not in it."""
        question, answer = (self.history[-1].question, self.history[-1].answer) if self.history else ("", "")
        where = {"method": CHAT, "picture": self.picture.name, "category": self.category, "session": self.id}
        judged = {"score": self.own.anomaly_score, "threshold": self.threshold, "question": question, "answer": answer}
        judged["is_predicted_anomalous"] = self.map_says if self.words_say is None else self.words_say
        return {**where, **judged, "checkpoint": self.model.checkpoint_id, "profile": self.profile}


def describe_place(anomaly_map: np.ndarray, limit: float) -> str:
    """Which of the nine places a map exceeds a limit in, and in how much of the picture, in words."""
    above = np.asarray(anomaly_map) > limit
    if not above.any():
        return "nothing exceeds the limit"
    cells = list(dict.fromkeys(conversations.cells_of_mask(above)))[:3]
    return f"{', '.join(cells)} ({above.mean():.1%} of the picture)"


def png_bytes(image: np.ndarray) -> bytes:
    """A picture uint8 RGB ``(H, W, 3)`` as PNG."""
    return cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))[1].tobytes()
