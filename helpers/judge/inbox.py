"""New pictures dropped into a folder, each scored once: ``<folder>/<painting>/[<kind>/]picture``.

A picture in a folder of its kind (``good``, ``genuine``, ``damaged`` ... as in any dataset folder) has a label and is
counted; one directly in the painting's folder is only scored. ``scores.csv`` is written whole at the end of each look:
a second look scores new pictures only, and all of them again when the detector has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import data, files
from helpers.data import images, names
from helpers.judge import statistics
from helpers.records import NORMAL_KIND, Scored

SCORES = "scores.csv"
_COLUMNS = ["time", "method", "detector", "image_path", "category", "label", "anomaly_score", "threshold", "p_value",
            "is_predicted_anomalous", "sha256"]  # fmt: skip


def score_new(
    folder: Path,
    dataset: data.Dataset,
    *,
    method: str,
    detector: str,
    score: Callable[[str, list[np.ndarray]], Sequence[Scored]],
    normal_scores: dict[str, Sequence[float]],
    alpha: float = 0.05,
) -> tuple[pd.DataFrame, list[str]]:
    """Score the pictures of a folder that this detector has not scored yet.

    Args:
        folder: the inbox.
        dataset: its paintings are the known ones; its own pictures are left out, they say nothing new.
        method: name of the row.
        detector: identifies the trained detector, for example the ``checkpoint_hash`` of its results.
        score: painting and uint8 RGB pictures -> one verdict each.
        normal_scores: painting -> scores of genuine pictures, from ``manifest.json`` of the results.
        alpha: wanted false-alarm rate.
    Returns:
        rows of every picture scored by this detector (``is_new`` marks those of this look; ``label`` is ``genuine``,
        ``anomalous`` or empty), and sentences about files that were left out.
    Raises:
        FileNotFoundError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Make it, with a folder for each painting inside.")
    path = folder / SCORES
    known = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=_COLUMNS)
    mine = (known.method == method) & (known.detector == detector)
    fresh, left_out = _fresh(folder, dataset, set(known.sha256[mine]))
    rows = []
    for category in sorted({one["category"] for one in fresh}):
        chosen = [one for one in fresh if one["category"] == category]
        found = score(category, [images.load_image(folder / one["image_path"]) for one in chosen])
        scores = np.array([verdict.anomaly_score for verdict in found])
        threshold = statistics.conformal_threshold(normal_scores[category], alpha)
        p_values = statistics.p_values(normal_scores[category], scores)
        head = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "method": method, "detector": detector}
        rows += [
            head
            | one
            | {"anomaly_score": s, "threshold": threshold, "p_value": p, "is_predicted_anomalous": s > threshold}
            for one, s, p in zip(chosen, scores, p_values)
        ]
    new = pd.DataFrame(rows, columns=_COLUMNS)
    if len(new):
        files.write_text(path, pd.concat([known, new]).to_csv(index=False))
    return pd.concat([known[mine].assign(is_new=False), new.assign(is_new=True)], ignore_index=True), left_out


def describe(scored: pd.DataFrame, left_out: Sequence[str]) -> str:
    """Counts in words: new and all, and how many labelled ones were called rightly."""
    labelled = scored[scored.label != ""]
    n_right = int((labelled.is_predicted_anomalous.astype(bool) == (labelled.label == "anomalous")).sum())
    words = f"{int(scored.is_new.sum())} new pictures scored, {len(scored)} in all; of {len(labelled)} with a label "
    return "\n".join([f"{words}{n_right} were called rightly.", *(f"Left out: {why}." for why in left_out)])


def _fresh(folder: Path, dataset: data.Dataset, done: set[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Pictures to score with their labels, and files left out with why. A copy of a picture is scored once."""
    known = {sample.sha256: sample for sample in dataset.samples}
    found, left_out = [], []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(map(names.is_hidden, parts)) or (len(parts) == 3 and names.roles_of(parts[1]) == ["mask"])
        if path.suffix.lower() not in images.IMAGE_SUFFIXES or is_hidden or len(parts) not in (2, 3):
            continue
        name, sha256 = "/".join(parts), files.sha256_file(path)
        category = next((c for c in dataset.categories if names.plain(c) == names.plain(parts[0])), parts[0])
        try:
            is_genuine = len(parts) == 3 and names.kind_of(parts[1]) == NORMAL_KIND
        except data.DatasetError as error:
            left_out.append(f"{name}: {error}")
            continue
        label = "" if len(parts) == 2 else "genuine" if is_genuine else "anomalous"
        if category not in dataset.categories:
            left_out.append(f"{name}: the dataset has no painting {category!r}, only {', '.join(dataset.categories)}")
        elif sha256 in known:
            left_out.append(f"{name}: it is a picture of the dataset, split {known[sha256].split}")
        elif sha256 not in done:
            try:
                images.load_image(path)
            except images.ImageError as error:
                left_out.append(f"{name}: {error}")
                continue
            done.add(sha256)
            found.append({"image_path": name, "category": category, "label": label, "sha256": sha256})
    return found, left_out


def __getattr__(name: str):  # notebook 03 uses the old form until it has moved
    from helpers.judge import _old_inbox

    return getattr(_old_inbox, name)
