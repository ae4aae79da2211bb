"""What people say about a detector's verdicts, which of it may be learnt from, and what learning from it changes.

``feedback.jsonl`` holds hashes of pictures, not pictures, unless the user allows to keep them. Judgements on the frozen
test set are refused; before and after are compared on that set by an exact paired test.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from helpers import files
from helpers.anomalygpt import conversations, pairs
from helpers.anomalygpt.evaluation import answers_before_after
from helpers.anomalygpt.training import train_head
from helpers.chat.detectors import Detectors
from helpers.clip import features, tuning
from helpers.clip.methods import Loaded
from helpers.clip.one_class import CONFIRMED, Rows
from helpers.data import Dataset, images
from helpers.judge import statistics
from helpers.records import NORMAL_KIND, Sample
from helpers.results import method_label
from helpers.synthesis import LOCAL_KINDS, damaged_view, seed_for

VERDICTS, LABELS = ("correct", "wrong", "unsure"), ("normal", "anomalous")
CELLS = tuple(cell for row in conversations.CELLS for cell in row)
MAX_COMMENT = 10_000
PICTURES = "feedback_pictures"
MIN_CONFIRMED = 5  # confirmed anomalies from which on they may move a threshold
MAX_ALPHA = 0.10  # the false-alarm rate that it may be moved to


@dataclass(frozen=True)
class Entry:
    """One judgement; a value that is not allowed is a ValueError.

    ``pixels_sha256`` names the picture (:func:`helpers.data.images.pixel_hash`); ``verdict`` is about the detector,
    ``label`` about the picture, ``region`` says in which of :data:`CELLS` the anomaly is; ``comment`` is not trusted:
    to be escaped before it becomes HTML; ``context`` is what was judged: ``category``, ``method``, ``score`` ...;
    ``kept_picture`` is a PNG beside the log, empty unless the user allowed to keep it.
    """

    pixels_sha256: str
    verdict: str
    label: str | None = None
    region: str | None = None
    comment: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    image_path: str = ""
    file_sha256: str = ""
    kept_picture: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        allowed = {"verdict": VERDICTS, "label": (*LABELS, None), "region": (*CELLS, None)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"The {name} is {getattr(self, name)!r}; allowed are {', '.join(map(str, values))}.")
        if self.region is not None and self.label == "normal":
            raise ValueError(f"The place {self.region!r} is marked, but the label is 'normal'. Clear one of the two.")
        if not isinstance(self.comment, str) or len(self.comment) > MAX_COMMENT:
            raise ValueError(f"A comment is a text of at most {MAX_COMMENT:,} characters. Shorten it.")

    @property
    def is_anomalous(self) -> bool | None:
        """The confirmed label: the user's own, else the prediction that was judged; None when it stays open."""
        predicted = self.context.get("is_predicted_anomalous")
        if self.verdict == "unsure" or (self.label is None and predicted is None):
            return None
        return self.label == "anomalous" if self.label is not None else bool(predicted) == (self.verdict == "correct")

    @property
    def name(self) -> str:
        """The picture for readers: file name, or the beginning of its hash."""
        return Path(self.image_path).name or f"picture {self.pixels_sha256[:12]}"


def record(
    path: Path, image: np.ndarray, *, image_path: Path | None = None, keep_image: bool = False, **judgement: Any
) -> Entry:
    """Append one ``judgement`` (values of :class:`Entry`) on a picture uint8 RGB ``(H, W, 3)``, flushed to disk; two
    sessions may write to one file. ``keep_image``: whether the user allows to keep the picture itself beside the log;
    without it, feedback can only be learnt from while the file ``image_path`` is there."""
    pixels, file = images.pixel_hash(image), Path(image_path) if image_path is not None else None
    entry = Entry(
        pixels,
        image_path="" if file is None else str(file.absolute()),
        file_sha256=files.sha256_file(file) if file is not None and file.is_file() else "",
        kept_picture=f"{pixels[:24]}.png" if keep_image else "",
        **judgement,
    )
    line = json.dumps(asdict(entry), allow_nan=False)
    if keep_image:
        images.save_png(Path(path).parent / PICTURES / entry.kept_picture, image)
    files.append_line(Path(path), line)
    return entry


def read(path: Path) -> tuple[list[Entry], list[str]]:
    """Judgements of a log, and why some lines are none (torn, or of another version); these stay in the file."""
    entries, skipped = [], []
    lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                values = json.loads(line)
                entries.append(Entry(**{one.name: values[one.name] for one in fields(Entry)}))
            except (ValueError, KeyError, TypeError) as error:
                skipped.append(f"line {number} is no judgement ({type(error).__name__}: {error})")
    return entries, skipped


@dataclass(frozen=True, kw_only=True)
class Confirmed(pairs.Confirmed):
    """A picture whose label a person confirmed, free to learn from; ``group`` is its source picture."""

    entry: Entry
    picture: np.ndarray
    is_anomalous: bool
    group: str


def sort_out(path: Path, dataset: Dataset) -> tuple[list[Confirmed], list[str], list[str]]:
    """Pictures of a log to learn from, and sentences on judgements that are refused or say nothing to learn.

    Of several on one picture the last one counts. Refused are pictures of the test split: by file, by pixels (saved in
    another format), and by group (another view or a damaged copy). A changed copy without a group is not recognised."""
    entries, unused = read(path)
    test = dataset.select(split="test")
    frozen = {sample.sha256 for sample in test}
    frozen |= {images.pixel_hash(images.load_image(sample.image_path)) for sample in test}
    groups = {sample.group for sample in test if sample.group and sample.category not in dataset.limits}
    learnt = {sample.sha256 for sample in dataset.samples if sample.split != "test"}
    confirmed, refused = [], []
    for entry in {entry.pixels_sha256: entry for entry in entries}.values():
        category, group = str(entry.context.get("category") or ""), str(entry.context.get("group") or "")
        found = _picture_of(entry, path)
        seen = {entry.pixels_sha256, entry.file_sha256} | ({images.pixel_hash(found[1])} if found else set())
        if seen & frozen:
            refused.append(f"{entry.name} is a test picture")
        elif group in groups:
            refused.append(f"{entry.name} stems from the same source as test pictures: {group}")
        elif entry.is_anomalous is None or category not in dataset.categories:
            unused.append(f"{entry.name}: no label is confirmed, or no painting of the dataset is named")
        elif entry.file_sha256 in learnt:
            unused.append(f"{entry.name} belongs to the dataset already")
        elif found is None:
            unused.append(f"{entry.name}: the picture was not kept and its file is gone or has changed")
        else:
            group = group or f"feedback/{entry.pixels_sha256[:16]}"
            facts = {"entry": entry, "picture": found[1], "is_anomalous": entry.is_anomalous, "group": group}
            confirmed.append(Confirmed(found[0], category, entry.region if entry.is_anomalous else None, **facts))
    return confirmed, refused, unused


def _picture_of(entry: Entry, path: Path) -> tuple[Path, np.ndarray] | None:
    """File and pixels of the picture that was judged; None when its file is gone or has changed."""
    source, kept = Path(entry.image_path), Path(path).parent / PICTURES / Path(entry.kept_picture).name
    if entry.image_path and source.is_file() and files.sha256_file(source) == entry.file_sha256:
        return source, images.load_image(source)
    if entry.kept_picture and kept.is_file():  # the name only: a log is not trusted with paths
        return kept, images.load_image(kept)
    return None


def simulate_user(path: Path, dataset: Dataset, *, n_pictures: int, seed: int) -> None:
    """Write the feedback of a user who is always right, on new photographs of genuine pictures outside the test split,
    ``n_pictures`` per painting, every second one damaged; they lie beside the log, which is replaced."""
    Path(path).unlink(missing_ok=True)
    for category in dataset.categories:
        normals = [s for s in dataset.select(category=category, is_anomalous=False) if s.split != "test"]
        for number in range(n_pictures):
            source = normals[number * 7 % len(normals)]
            kind = LOCAL_KINDS[number // 2 % len(LOCAL_KINDS)] if number % 2 else None
            view_seed = seed_for(seed, f"feedback/{category}/{number}")
            picture, mask, _ = damaged_view(images.load_image(source.image_path), seed=view_seed, kind=kind)
            image_path = Path(path).parent / "simulated_pictures" / category / f"{number:03d}.png"
            images.save_png(image_path, picture)
            label, region = ("normal", None) if mask is None else ("anomalous", conversations.cell_of_center(mask))
            about = {"label": label, "region": region, "context": {"category": category, "group": source.group}}
            record(path, picture, image_path=image_path, verdict="correct", **about)


def teach_clip(
    found: Detectors, loaded: Mapping[str, Loaded], learn_from: Mapping[str, Rows], confirmed: Sequence[Confirmed],
    models: features.Models, *, alpha: float, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Detectors of notebook 03 fitted again with confirmed pictures; verdicts before and after on the frozen test set.

    Genuine pictures are learnt like others; anomalies place the threshold, see :func:`feedback_threshold`. Settings
    stay as the search chose them; paintings without feedback stay as they are. A row per method has balanced
    accuracies, counts, the p-value of the exact paired test and Holm's correction.

    Args:
        found, confirmed: all detectors, for the thresholds before and the test pictures; from :func:`sort_out`.
        loaded, learn_from: from :func:`helpers.clip.methods.load` and :func:`~helpers.clip.methods.learning_rows`.
    """
    taught = {}
    for category in sorted({one.category for one in confirmed} & set(learn_from)):
        chosen = [one for one in confirmed if one.category == category]
        ids = [one.entry.pixels_sha256 for one in chosen]
        embedded = features.embed(ids, lambda row, chosen=chosen: chosen[row].picture, models)
        kinds = [CONFIRMED if one.is_anomalous else NORMAL_KIND for one in chosen]
        about = (category, False, None, "train", NORMAL_KIND)
        sources = [Sample(one.image_path, *about, one.group, one.entry.pixels_sha256) for one in chosen]
        taught[category] = Rows.join([learn_from[category], Rows.of(sources, embedded, kinds)])
    rows, dataset = {}, found.dataset
    embedded = features.embed_samples(dataset.select(split="test"), models)
    for method, one in loaded.items():
        called, labels = ([], []), []
        for category, fitted in one.detectors.items():
            samples = dataset.select(split="test", category=category)
            labels += [sample.is_anomalous for sample in samples]
            known, detector = found.results[method].manifest["calibration"][category], fitted.detector
            limit = statistics.conformal_threshold(known["scores"], alpha)
            called[0].extend(detector.score(embedded.of(samples)) > limit)
            if category in taught:
                mine = taught[category]
                detector, scores = tuning.calibrate(clone(detector), mine, seed=seed)
                known = np.isfinite(scores)
                normals, marks = (scores[mine.has("kind", kind) & known] for kind in (NORMAL_KIND, CONFIRMED))
                limit = feedback_threshold(normals, marks, alpha=alpha)
            called[1].extend(detector.score(embedded.of(samples)) > limit)
        rows[method_label(method)] = _paired(*called, labels)
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(p_holm=statistics.holm(table["p"]))


def feedback_threshold(normal_scores: np.ndarray, confirmed_scores: np.ndarray, *, alpha: float) -> float:
    """Threshold with the highest balanced accuracy on confirmed pictures; in the middle of the gap it lies in. It is
    kept between two conformal thresholds of the (unseen) normals: at most :data:`MAX_ALPHA` and at least ``alpha`` of
    fresh ones may be called anomalous, so that a few odd judgements cannot make a detector shout or fall silent."""
    careful = statistics.conformal_threshold(normal_scores, alpha)
    if len(confirmed_scores) < MIN_CONFIRMED:
        return careful
    values = np.unique(np.concatenate([normal_scores, confirmed_scores]))
    cuts = np.concatenate([(values[:-1] + values[1:]) / 2, values[-1:]])
    balanced = (confirmed_scores[:, None] > cuts).mean(axis=0) + (normal_scores[:, None] <= cuts).mean(axis=0)
    best = cuts[len(cuts) - 1 - np.round(balanced, 9)[::-1].argmax()]  # among equals the one with the fewest alarms
    return float(np.clip(best, min(careful, statistics.conformal_threshold(normal_scores, MAX_ALPHA)), careful))


def teach_anomalygpt(
    model: Any, dataset: Dataset, confirmed: Sequence[Confirmed], *, folder: Path, settings: Any, evaluation: Any
) -> pd.DataFrame:
    """AnomalyGPT's head learns from confirmed pictures; its words before and after, a row as in :func:`teach_clip`.

    The head is changed in place and written to a folder in ``folder`` for this very feedback; confirmed anomalies
    without a place are left out, and an unclear answer calls nothing anomalous. ``settings`` are
    :class:`helpers.anomalygpt.pairs.HeadTraining` with few epochs and pairs, because the place says where, not what
    shape; ``evaluation`` those of notebook 07."""
    taught = [one for one in confirmed if one.cell or not one.is_anomalous]
    facts = sorted([files.sha256_file(one.image_path), one.category, one.cell or ""] for one in taught)
    before = answers_before_after(model, dataset, evaluation)
    train_head(model, dataset, folder=folder / files.sha256_json(facts)[:12], settings=settings, confirmed=taught)
    after = answers_before_after(model, dataset, evaluation)
    row = _paired(before["says"] == "yes", after["says"] == "yes", before["is_anomalous"])
    return pd.DataFrame.from_dict({"AnomalyGPT's words": row}, orient="index")


def _paired(before: Sequence[bool], after: Sequence[bool], labels: Sequence[bool]) -> dict[str, Any]:
    before, after, labels = (np.asarray(values, dtype=bool) for values in (before, after, labels))
    test = statistics.accuracy_test(after == labels, before == labels, labels)
    counts = {}
    for words, called in (("before", before), ("after", after)):
        counts[f"found {words}"] = f"{(called & labels).sum()} of {labels.sum()}"
        counts[f"false alarms {words}"] = f"{(called & ~labels).sum()} of {(~labels).sum()}"
    accuracies = {"balanced accuracy before": round(test.value_b, 3), "after": round(test.value_a, 3)}
    return accuracies | counts | {"p": test.p_value}
