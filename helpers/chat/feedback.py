"""What people say about a detector's verdicts: ``feedback.jsonl``, one judgement a line, and which of it may be used.

A line holds hashes of the picture, not the picture, unless the user allows to keep it. Whoever learns from feedback
asks :func:`sort_out`, which names and refuses every judgement on a picture of the frozen test set: a detector that
learnt from it would be measured on what it was told.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files as journal
from helpers import files as storage
from helpers.chat import _old_clip_features as features
from helpers.data import images
from helpers.data.manifest import Dataset
from helpers.records import Sample

SCHEMA = 1
"""Version of the lines; raised when a field changes its meaning."""
VERDICTS = ("correct", "wrong", "unsure")
LABELS = ("normal", "anomalous")
N_REGIONS = 9
"""Cells of the 3 x 3 grid over the picture, numbered row by row from 0."""
MAX_COMMENT = 10_000
PICTURES = "feedback_pictures"

_FIELDS = (
    "id",
    "time",
    "pixels_sha256",
    "file_sha256",
    "image_path",
    "kept_picture",
    "verdict",
    "label",
    "region",
    "comment",
    "context",
)


@dataclass(frozen=True)
class Entry:
    """One judgement.

    Attributes:
        id: names the line.
        time: UTC, ISO 8601.
        pixels_sha256: :func:`helpers.clip.features.image_id` of the picture that was looked at.
        file_sha256: hash of the picture file, empty when there was none.
        image_path: where the file lay, empty when there was none.
        kept_picture: PNG beside the log, relative to its folder; empty unless the user allowed to keep it.
        verdict: was the detector ``"correct"``, ``"wrong"``, or is the user ``"unsure"``?
        label: what the user says the picture is, ``"normal"`` or ``"anomalous"``; None when not said.
        region: cell 0 to 8 of the 3 x 3 grid, row by row, where the anomaly is; None when not said.
        comment: the user's words; not trusted, to be escaped before it becomes HTML.
        context: what was judged: ``category``, ``method``, ``is_predicted_anomalous``, ``score``, ``question`` ...
    """

    id: str
    time: str
    pixels_sha256: str
    file_sha256: str
    image_path: str
    kept_picture: str
    verdict: str
    label: str | None
    region: int | None
    comment: str
    context: Mapping[str, Any]

    @property
    def is_anomalous(self) -> bool | None:
        """The confirmed label: the user's own, else the prediction that was judged; None when it stays open."""
        if self.verdict == "unsure":
            return None
        if self.label is not None:
            return self.label == "anomalous"
        predicted = self.context.get("is_predicted_anomalous")
        if predicted is None:
            return None
        return bool(predicted) == (self.verdict == "correct")

    @property
    def category(self) -> str:
        """The artwork, empty when it was not recorded."""
        return str(self.context.get("category") or "")

    @property
    def name(self) -> str:
        """The picture for readers: file name, or the beginning of its hash."""
        return Path(self.image_path).name or f"picture {self.pixels_sha256[:12]}"


@dataclass(frozen=True)
class FeedbackLog:
    """A feedback file as it was read.

    Attributes:
        path: the file.
        entries: the judgements, in the file's order.
        skipped: lines that are no judgement, each with its number and why; they stay in the file.
    """

    path: Path
    entries: tuple[Entry, ...]
    skipped: tuple[str, ...] = ()

    def describe(self) -> str:
        """Counts in words, and the lines that could not be read."""
        counts = ", ".join(f"{sum(e.verdict == verdict for e in self.entries)} {verdict}" for verdict in VERDICTS)
        n_pictures = len({entry.pixels_sha256 for entry in self.entries})
        lines = [f"{self.path}: {len(self.entries)} judgements ({counts}) on {n_pictures} pictures"]
        return "\n".join([*lines, *(f"  left out: {reason}" for reason in self.skipped)])


# ------------------------------------------------------------------------------------------------- write and read


def record(
    path: Path | str,
    *,
    image_path: Path | str | None,
    image: np.ndarray,
    verdict: str,
    label: str | None = None,
    region: int | None = None,
    comment: str = "",
    context: Mapping[str, Any] | None = None,
    keep_image: bool = False,
) -> dict[str, Any]:
    """Append one judgement, flushed to disk; two sessions may write to one file.

    Args:
        path: the log, for example ``profile.home / "feedback" / "feedback.jsonl"``.
        image_path: the picture file, None for a picture that only exists in memory.
        image: uint8 RGB ``(H, W, 3)``, the picture as it was judged.
        verdict, label, region, comment, context: see :class:`Entry`.
        keep_image: whether the user allows to keep the picture itself, in ``feedback_pictures/`` beside the log.
            Without it, feedback can only be learnt from while ``image_path`` is there.
    Returns:
        the line as it was written.
    Raises:
        ValueError: a value that is not allowed, a context that is not JSON, or a log of another version.
        TimeoutError, OSError: as :func:`helpers.files.append_line`.
    """
    path = Path(path)
    _check(verdict, label, region, comment)
    _check_version(path)
    pixels = features.image_id(image)
    source = None if image_path is None else Path(image_path)
    kept = ""
    if keep_image:
        kept = f"{PICTURES}/{pixels[:24]}.png"
        images.save_png(path.parent / kept, image)
    line = {
        "schema": SCHEMA,
        "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "pixels_sha256": pixels,
        "file_sha256": storage.sha256_file(source) if source is not None and source.is_file() else "",
        "image_path": "" if source is None else str(source.absolute()),
        "kept_picture": kept,
        "verdict": verdict,
        "label": label,
        "region": None if region is None else int(region),
        "comment": comment,
        "context": dict(context or {}),
    }
    try:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The context of a judgement must be JSON values ({error}). Write numbers as int or float, nan as None."
        ) from error
    # JSON leaves these three line breaks of Unicode as they are; a line must stay one line for every reader.
    for mark in ("\x85", "\u2028", "\u2029"):
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    journal.append_line(path, text)
    return line


def read(path: Path | str) -> FeedbackLog:
    """Read a log; a file that is not there is an empty log.

    A line that is torn (its writer died) or not a judgement is reported in ``skipped`` and does not stop the rest.

    Raises:
        ValueError: a line was written by another version of the format; the message says what to do.
    """
    path = Path(path)
    if not path.exists():
        return FeedbackLog(path, ())
    entries, skipped = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:  # not JSON, or cut in the middle of a character
            place = "the last line" if number == len(lines) else f"line {number}"
            skipped.append(f"{place} is torn ({len(line)} bytes): its writer was stopped")
            continue
        _refuse_version(path, number, values)
        problem = _problem(values)
        if problem:
            skipped.append(f"line {number} is no judgement: {problem}")
        else:
            entries.append(Entry(**{name: values[name] for name in _FIELDS}))
    return FeedbackLog(path, tuple(entries), tuple(skipped))


def picture_of(entry: Entry, log: FeedbackLog) -> tuple[Path, np.ndarray] | None:
    """File and pixels (uint8 RGB) of the picture that was judged.

    Returns:
        None when the picture was not kept and its file is gone or has changed.
    """
    source = Path(entry.image_path) if entry.image_path else None
    if source is not None and source.is_file() and storage.sha256_file(source) == entry.file_sha256:
        return source, images.load_image(source)
    kept = log.path.parent / PICTURES / Path(entry.kept_picture).name  # the name only: a log is not trusted with paths
    if entry.kept_picture and kept.is_file():
        picture = images.load_image(kept)
        return (kept, picture) if features.image_id(picture) == entry.pixels_sha256 else None
    return None


def _check(verdict: str, label: str | None, region: int | None, comment: str) -> None:
    if verdict not in VERDICTS:
        raise ValueError(f"The verdict is {verdict!r}; allowed are {', '.join(VERDICTS)}.")
    if label is not None and label not in LABELS:
        raise ValueError(f"The label is {label!r}; allowed are {', '.join(LABELS)}, or None when it is not known.")
    is_cell = isinstance(region, (int, np.integer)) and not isinstance(region, bool) and 0 <= region < N_REGIONS
    if region is not None and not is_cell:
        raise ValueError(f"The region is {region!r}; allowed are 0 to 8 (3 x 3 cells, row by row), or None.")
    if region is not None and label == "normal":
        raise ValueError(f"Region {region} is marked, but the label is 'normal'. Clear one of the two.")
    if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
        raise ValueError(f"A comment is a text of at most {MAX_COMMENT:,} characters. Shorten it.")


def _check_version(path: Path) -> None:
    """Refuse to add to a log of another version: one file, one format."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        first = file.readline()
    try:
        values = json.loads(first)
    except ValueError:  # a torn first line says nothing about the version
        return
    _refuse_version(path, 1, values)


def _refuse_version(path: Path, number: int, values: Any) -> None:
    version = values.get("schema", SCHEMA) if isinstance(values, dict) else SCHEMA
    if version != SCHEMA:
        raise ValueError(
            f"Line {number} of {path} has format version {version!r}; this suite reads and writes version {SCHEMA}. "
            "Use the version of the suite that wrote it, or move the file aside to start a new one."
        )


def _problem(values: Any) -> str:
    """Why a line of JSON is no judgement; empty when it is one."""
    if not isinstance(values, dict):
        return f"it holds {type(values).__name__}"
    missing = [name for name in ("schema", *_FIELDS) if name not in values]
    if missing:
        return f"{', '.join(missing)} missing"
    texts = ("id", "time", "pixels_sha256", "file_sha256", "image_path", "kept_picture")
    wrong = [name for name in texts if not isinstance(values[name], str)]
    if wrong or not isinstance(values["context"], dict):
        return f"{', '.join(wrong) or 'context'} of the wrong type"
    try:
        _check(values["verdict"], values["label"], values["region"], values["comment"])
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------- what may be used


@dataclass(frozen=True)
class Confirmed:
    """A picture whose label a person confirmed, free to learn from.

    Attributes:
        entry: the judgement.
        image_path: where it lies.
        picture: uint8 RGB.
        is_anomalous: the confirmed label.
        category: the artwork.
        group: its source picture, the picture itself when nothing else is known.
    """

    entry: Entry
    image_path: Path
    picture: np.ndarray
    is_anomalous: bool
    category: str
    group: str


@dataclass(frozen=True)
class SortedOut:
    """What :func:`sort_out` returns.

    Attributes:
        confirmed: pictures to learn from.
        refused: judgements on test pictures, as sentences that name them.
        unused: other judgements that say nothing to learn, with why.
    """

    confirmed: tuple[Confirmed, ...]
    refused: tuple[str, ...]
    unused: tuple[str, ...]


def sort_out(log: FeedbackLog, dataset: Dataset) -> SortedOut:
    """Which judgements may be learnt from. Of several on one picture the last one counts.

    Refused are pictures of the test split: by file, by pixels (the same picture saved in another format), and by
    group (another view or a damaged copy of a picture that is tested on). A changed copy of a test picture that names
    no group cannot be recognised; do not upload those.
    """
    test = dataset.select(split="test")
    frozen = {sample.sha256: sample for sample in test}
    frozen |= {features.image_id(images.load_image(sample.image_path)): sample for sample in test}
    frozen_groups = {(sample.category, sample.group) for sample in test if sample.group}
    learnt = {sample.sha256: sample for sample in dataset.samples if sample.split != "test"}
    confirmed, refused, unused = [], [], []
    for entry in {entry.pixels_sha256: entry for entry in log.entries}.values():
        twin = frozen.get(entry.pixels_sha256) or frozen.get(entry.file_sha256)
        group = str(entry.context.get("group") or "")
        if twin is not None:
            refused.append(f"{entry.name} is the test picture {twin.image_path.name} of {twin.category}")
        elif (entry.category, group) in frozen_groups:
            refused.append(f"{entry.name} stems from the same source as test pictures of {entry.category}: {group}")
        elif reason := _reason_against(entry, dataset.categories, learnt.get(entry.file_sha256)):
            unused.append(f"{entry.name}: {reason}")
        else:
            found = picture_of(entry, log)
            twin = None if found is None else frozen.get(features.image_id(found[1]))
            if found is None:
                unused.append(f"{entry.name}: the picture was not kept and its file is gone or has changed")
            elif twin is not None:  # judged at another size than its file has
                refused.append(f"{entry.name} is the test picture {twin.image_path.name} of {twin.category}")
            else:
                group = group or f"feedback/{entry.pixels_sha256[:16]}"
                confirmed.append(Confirmed(entry, *found, bool(entry.is_anomalous), entry.category, group))
    return SortedOut(tuple(confirmed), tuple(refused), tuple(unused))


def _reason_against(entry: Entry, categories: Sequence[str], known: Sample | None) -> str:
    """Why a judgement on a picture outside the test set teaches nothing; empty when it does."""
    if entry.is_anomalous is None:
        return "no label was confirmed"
    if entry.category not in categories:
        return f"its artwork is {entry.category!r}, the dataset has {', '.join(categories)}"
    if known is not None and entry.is_anomalous != known.is_anomalous:
        return f"the dataset has it as {known.kind} in split {known.split}; correct the dataset if that is wrong"
    if known is not None:
        return f"it is a picture of split {known.split} already"
    return ""
