"""New pictures dropped into a folder, each scored once: ``<folder>/<painting>/[<kind>/]picture``.

A picture in a folder of its kind (``good`` for a genuine one) has a label and is counted; one directly in the
painting's folder is only scored. Scores are appended to ``scores.csv`` as they come: a second run scores new hashes
only, also after it was stopped, and all of them again when the detector has changed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from helpers import files as journal
from helpers import files as storage
from helpers import synthesis
from helpers.data import images, names
from helpers.data.manifest import Dataset
from helpers.records import NORMAL_KIND, Prediction, Sample

SCORES = "scores.csv"
COLUMNS = (
    "time",
    "method",
    "detector",
    "image_path",
    "category",
    "kind",
    "anomaly_score",
    "threshold",
    "p_value",
    "is_predicted_anomalous",
    "sha256",
)
"""``kind`` is empty for a picture without a label; ``sha256``, of fixed length, shows whether a line is whole."""

Scorer = Callable[[Sequence[Sample]], Iterable[Prediction]]


@dataclass(frozen=True)
class Round:
    """What one look into the folder brought.

    Attributes:
        new: rows scored now, columns :data:`COLUMNS`.
        all: rows of every picture scored by this detector so far.
        left_out: files that were not scored, with why.
    """

    new: pd.DataFrame
    all: pd.DataFrame
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Counts in words: new and all, and how many labelled ones were called rightly."""
        labelled = self.all[self.all["kind"] != ""]
        n_right = int((labelled["is_predicted_anomalous"] == (labelled["kind"] != NORMAL_KIND)).sum())
        words = f"{len(self.new)} new pictures scored, {len(self.all)} in all; of {len(labelled)} with a label "
        return "\n".join([f"{words}{n_right} were called rightly.", *(f"Left out: {why}." for why in self.left_out)])


def look(folder: Path | str, dataset: Dataset, *, method: str, detector: str, score: Scorer) -> Round:
    """Score the pictures of a folder that this detector has not scored yet.

    Args:
        folder: the inbox.
        dataset: its paintings are the known ones; its own pictures are left out, they say nothing new.
        method: name of the row.
        detector: identifies the trained detector and its thresholds, for example
            :func:`helpers.clip.methods.fitted_id`.
        score: samples -> predictions, one for each.
    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: ``scores.csv`` has other columns.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Make it, with a folder for each painting inside.")
    done = _read(folder / SCORES)
    done = done[(done["method"] == method) & (done["detector"] == detector)]
    fresh, left_out = _fresh(folder, dataset, set(done["sha256"]))
    kinds = {sample.sha256: kind for sample, kind in fresh}
    for prediction in score([sample for sample, _ in fresh]) if fresh else ():
        kind = kinds[prediction.sample.sha256]
        _append(folder, prediction, method=method, detector=detector, kind=kind)
    scored = _read(folder / SCORES)
    scored = scored[(scored["method"] == method) & (scored["detector"] == detector)]
    return Round(scored[scored["sha256"].isin(kinds)], scored, tuple(left_out))


def fill(folder: Path | str, samples: Sequence[Sample], *, n: int, seed: int) -> list[Path]:
    """Put ``n`` new photographs of normal pictures into an inbox for a trial, every second one damaged.

    Returns:
        the files; the same seed gives the same bytes.
    """
    written = []
    for number, sample in enumerate(samples[:n]):
        rng = synthesis.rng_for(seed, f"inbox/{sample.sha256}")
        picture, _ = synthesis.rephotograph(images.load_image(sample.image_path), rng)
        kind = NORMAL_KIND
        if number % 2:
            kind = str(rng.choice(synthesis.LOCAL_KINDS))
            picture = synthesis.synthesize(picture, kind, rng)[0]
        written.append(Path(folder) / sample.category / kind / f"new_{number:03d}.png")
        images.save_png(written[-1], picture)
    return written


def _fresh(folder: Path, dataset: Dataset, done: set[str]) -> tuple[list[tuple[Sample, str]], list[str]]:
    """Pictures to score with their kinds, and files left out with why. A copy of a picture is scored once."""
    known = {sample.sha256: sample for sample in dataset.samples}
    found, left_out = [], []
    for path, category, kind in _files(folder):
        name = path.relative_to(folder)
        if category not in dataset.categories:
            left_out.append(f"{name}: the dataset has no painting {category!r}, only {', '.join(dataset.categories)}")
            continue
        sha256 = storage.sha256_file(path)
        if sha256 in known:
            left_out.append(f"{name}: it is a picture of the dataset, split {known[sha256].split}")
        elif sha256 not in done:
            try:
                images.load_image(path)
            except images.ImageError as error:
                left_out.append(f"{name}: {error}")
                continue
            done.add(sha256)
            found.append((Sample(path, category, False, group=f"inbox/{sha256[:16]}", sha256=sha256), kind))
    return found, left_out


def _files(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Picture files with painting and kind (empty: no label)."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_picture = path.suffix.lower() in images.IMAGE_SUFFIXES and not any(map(names.is_hidden, parts))
        if is_picture and path.is_file() and len(parts) in (2, 3):
            yield path, parts[0], names.kind_of(parts[1]) if len(parts) == 3 else ""


def _append(folder: Path, prediction: Prediction, *, method: str, detector: str, kind: str) -> None:
    sample = prediction.sample
    values = [
        datetime.now(UTC).isoformat(timespec="seconds"),
        method,
        detector,
        sample.image_path.relative_to(folder).as_posix(),
        sample.category,
        kind,
        repr(float(prediction.anomaly_score)),
        repr(float(prediction.threshold)),
        repr(float(prediction.p_value)),
        bool(prediction.is_predicted_anomalous),
        sample.sha256,
    ]
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    journal.append_line(folder / SCORES, line.getvalue(), header=",".join(COLUMNS))


def _read(path: Path) -> pd.DataFrame:
    """The scores so far; torn lines are left out, so that their pictures are scored again."""
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if header != ",".join(COLUMNS):
        raise ValueError(f"{path} has the columns {header[:200]!r}, not {','.join(COLUMNS)!r}. Move it aside.")
    rows = [next(csv.reader([line]), []) for line in lines]  # one by one: a torn line may leave a quote open
    rows = [values for values in rows if len(values) == len(COLUMNS) and len(values[-1]) == 64]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = ["anomaly_score", "threshold", "p_value"]
    return table.assign(
        **{name: table[name].astype(float) for name in numbers},
        is_predicted_anomalous=table["is_predicted_anomalous"] == "True",
    )
