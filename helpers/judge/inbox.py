"""New pictures dropped into a folder, each scored once: ``<folder>/<painting>/[<kind>/]picture``. One in a folder of
its kind (``good``, ``genuine``, ``damaged`` ..., as in any dataset folder) has a label and is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import data, files
from helpers.data import images, names
from helpers.judge import statistics
from helpers.records import NORMAL_KIND, Scored

_COLUMNS = "detector image_path category label sha256 anomaly_score threshold p_value is_predicted_anomalous".split()


def score_new(
    folder: Path, dataset: data.Dataset, *, detector: str, score: Callable[[str, list[np.ndarray]], Sequence[Scored]],
    normal_scores: Mapping[str, Sequence[float]], alpha: float = 0.05,
) -> tuple[pd.DataFrame, list[str]]:  # fmt: skip
    """Score the pictures of a folder that this ``detector`` (a name) has not scored yet; ``scores.csv`` keeps all.

    ``score`` takes a painting of the dataset and uint8 RGB pictures, ``normal_scores`` are of its genuine pictures,
    ``alpha`` is the wanted false-alarm rate. The dataset's own pictures are left out. Returns a row for every picture
    scored by this detector (``is_new`` marks those of this look; ``label`` is ``genuine``, ``anomalous`` or empty),
    and sentences about files that were left out.
    """
    path = Path(folder) / "scores.csv"
    known = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=_COLUMNS)
    mine = known.detector == detector
    fresh, left_out = _fresh(Path(folder), dataset, set(known.sha256[mine]))
    parts = [pd.DataFrame(columns=_COLUMNS)]
    for category, chosen in pd.DataFrame(fresh).groupby("category") if fresh else ():
        verdicts = score(category, [images.load_image(Path(folder) / name) for name in chosen.image_path])
        scores = np.array([verdict.anomaly_score for verdict in verdicts])
        threshold = statistics.conformal_threshold(normal_scores[category], alpha)
        p_values = statistics.p_values(normal_scores[category], scores)
        facts = {"detector": detector, "anomaly_score": scores, "threshold": threshold, "p_value": p_values}
        parts.append(chosen.assign(**facts, is_predicted_anomalous=scores > threshold))
    new = pd.concat(parts[1:] or parts, ignore_index=True)
    if len(new):
        files.write_text(path, pd.concat([known, new])[_COLUMNS].to_csv(index=False))
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
        is_hidden = any(map(names.is_hidden, parts)) or (len(parts) == 3 and names.meaning_of(parts[1]).is_mask)
        if path.suffix.lower() not in images.IMAGE_SUFFIXES or is_hidden or len(parts) not in (2, 3):
            continue
        name, sha256 = "/".join(parts), files.sha256_file(path)
        category = next((c for c in dataset.categories if names.plain(c) == names.plain(parts[0])), "")
        try:
            kind = names.kind_of(parts[1]) if len(parts) == 3 else None
            label = {None: "", NORMAL_KIND: "genuine"}.get(kind, "anomalous")
            if not category:
                have = ", ".join(dataset.categories)
                raise data.DatasetError(f"the dataset has no painting {parts[0]!r}, only {have}")
            if sha256 in known:
                raise data.DatasetError(f"it is a picture of the dataset, split {known[sha256].split}")
            if sha256 not in done:
                images.load_image(path)
                done.add(sha256)
                found.append({"image_path": name, "category": category, "label": label, "sha256": sha256})
        except (data.DatasetError, images.ImageError) as error:
            left_out.append(f"{name}: {error}")
    return found, left_out
