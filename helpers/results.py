"""Results of a method on a dataset: written picture by picture, read back only for the same dataset.

A results folder holds ``predictions.csv``, ``maps/`` (float16 arrays) and, written last, ``manifest.json``, the mark of
a complete run. :func:`predict` is the one loop over test pictures of all methods.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from helpers import files
from helpers.records import Prediction, Sample, Scored

METHOD_LABELS: Mapping[str, str] = {
    "clip_resnet50": "CLIP + CNN similarity",
    "clip_cross_entropy": "CLIP cross-entropy head",
    "clip_isolation_forest": "CLIP Isolation Forest",
    "clip_lof": "CLIP LOF",
    "clip_patch_knn": "CLIP patch k-NN",
    "anomalyclip": "AnomalyCLIP",
    "aligned": "Reference comparison",
    "dinov2_memory": "DINOv2 patch memory",
    "dinov2_subspace": "DINOv2 subspace",
    "anomalygpt": "AnomalyGPT",
    "anomalygpt_aligned": "AnomalyGPT with aligned map",
    "always_anomaly": "Always “anomaly”",
}
"""What a reader sees instead of a method's file name, in the order of the comparison's rows."""
METHODS = tuple(METHOD_LABELS)

MANIFEST, PREDICTIONS = "manifest.json", "predictions.csv"
_KNOWN = ("category", "kind", "is_anomalous")
_VERDICT = ("anomaly_score", "threshold", "is_predicted_anomalous", "p_value", "seconds", "answer")
_NUMBERS = ("anomaly_score", "threshold", "p_value", "seconds")
_SMALL_WORDS = ("a", "an", "and", "at", "by", "de", "in", "la", "of", "on", "the", "with")


@dataclass(frozen=True)
class MethodResult:
    """A complete run of one method on a dataset."""

    method: str  # name of the row in the comparison
    folder: Path
    manifest: Mapping[str, Any]  # settings, versions, dataset_hash, checkpoint_hash, profile, and predict's facts
    predictions: Sequence[Prediction]  # one per test picture, in the dataset's order; their maps stay on disk

    dataset_hash = property(lambda self: self.manifest["dataset_hash"])

    def frame(self) -> pd.DataFrame:
        """One row a test picture: the columns of ``predictions.csv`` but its path and hash, and ``method``."""
        rows = [_row(prediction) for prediction in self.predictions]
        return pd.DataFrame(rows, columns=(*_KNOWN, *_VERDICT)).assign(method=self.method)

    def anomaly_map(self, prediction: Prediction) -> np.ndarray | None:
        """The picture's anomaly map, float32 ``(H, W)``, raw; None when the method made none."""
        path = map_path(self.folder, prediction.sample)
        return np.load(path).astype(np.float32) if path.exists() else None


def predict(
    folder: Path, *, method: str, dataset: Any, score: Callable[[str, Sequence[Sample]], Sequence[Scored]],
    calibration: Mapping[str, Sequence[float]] | Callable[[], Mapping[str, Sequence[float]]], alpha: float,
    profile: str, settings: Mapping[str, Any], checkpoint_hash: str = "", trained_on: str = "",
    trained_on_kinds: Sequence[str] = (), calibration_groups: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 16, answers_say: Callable[[str], bool | None] | None = None,
) -> MethodResult:  # fmt: skip
    """Score every test picture, call those above the conformal threshold anomalous, write all of it as it comes.

    A complete run on this dataset with these settings and weights is returned as it is, an interrupted one finished;
    a run of others is replaced, or for another dataset moved aside, when this one is complete.

    Args:
        folder, method, profile: results folder, name of the row (see :data:`METHODS`), name of the profile.
        score: (category, up to ``batch_size`` test pictures of it) -> one :class:`~helpers.records.Scored` each, in
            order; where ``seconds`` is 0 the time of the call is shared among them.
        calibration: category -> scores of genuine pictures that the detector has not learnt from, or a function that
            gives them; ``calibration_groups``: the source picture of each (default: of the calibration split).
        alpha: false-alarm rate that the thresholds aim at.
        settings, checkpoint_hash: JSON values and weights (empty: none) that determine scores and calibration.
        trained_on, trained_on_kinds: what the weights have seen, in words, and the kinds of synthetic marks among it.
        answers_say: answer -> True (anomalous), False (normal) or None (neither), for methods that answer.

    ValueError: a painting without calibration scores, or a wrong number of scores.
    """
    folder, work = Path(folder), Path(folder).with_name(f".{Path(folder).name}.partial")
    head = {"method": method, "profile": profile, "dataset_hash": dataset.hash, "checkpoint_hash": checkpoint_hash}
    head = json.loads(json.dumps({**head, "settings": {**settings, "alpha": alpha}}))  # tuples become lists
    done = files.read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    if any(done.get(name) != value for name, value in head.items()):
        normals = calibration() if callable(calibration) else calibration
        facts = {"trained_on": trained_on, "trained_on_kinds": sorted(trained_on_kinds), "versions": versions()}
        facts["calibration"] = _calibrated(method, dataset, normals, calibration_groups or {})
        samples = {relative_path(sample, dataset.folder): sample for sample in dataset.select(split="test")}
        journal = work / "journal.jsonl"
        rows = _resume(journal, head)
        left = [sample for path, sample in samples.items() if path not in rows]
        for prediction in _verdicts(left, score, normals, alpha, batch_size, method_label(method)):
            path = relative_path(prediction.sample, dataset.folder)
            if prediction.anomaly_map is not None:
                with files.atomic_path(map_path(work, prediction.sample)) as temporary:
                    np.save(temporary, np.asarray(prediction.anomaly_map, dtype=np.float16))
            rows[path] = {"image_path": path, "sha256": prediction.sample.sha256, **_row(prediction)}
            files.append_line(journal, json.dumps(rows[path]))
        if answers_say:
            facts["answers_say"] = {path: answers_say(row["answer"]) for path, row in rows.items()}
        files.write_text(work / PREDICTIONS, pd.DataFrame([rows[path] for path in samples]).to_csv(index=False))
        files.write_json(work / MANIFEST, facts | head)
        if done.get("dataset_hash", dataset.hash) != dataset.hash:  # results of another dataset are kept
            aside = folder.parent / "other_datasets" / done["dataset_hash"][:12] / folder.name
            shutil.rmtree(aside, ignore_errors=True)
            os.renames(folder, aside)
        (folder / MANIFEST).unlink(missing_ok=True)  # from here on the earlier run is not complete
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
        for leftover in folder.glob("*journal.jsonl*"):  # and its lock
            leftover.unlink()
    return read(folder, dataset.samples, dataset.folder, dataset.hash)


def _verdicts(
    samples: Sequence[Sample], score: Callable, normals: Mapping[str, Any], alpha: float, batch_size: int, title: str
) -> Iterator[Prediction]:
    """Score pictures in batches of one painting, and hold every score against the painting's normal ones."""
    from helpers.judge.statistics import conformal_threshold, p_values

    batches = []
    for category in dict.fromkeys(sample.category for sample in samples):
        own = [sample for sample in samples if sample.category == category]
        batches += [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    for batch in tqdm(batches, desc=title, unit="batch", leave=False, delay=2):
        category, started = batch[0].category, time.perf_counter()
        found = list(score(category, batch))
        if len(found) != len(batch):
            raise ValueError(f"{category}: {len(found)} scores for {len(batch)} pictures; one each is needed.")
        share = (time.perf_counter() - started) / len(batch)
        threshold = conformal_threshold(normals[category], alpha)
        for sample, one, p_value in zip(batch, found, p_values(normals[category], [s.anomaly_score for s in found])):
            numbers = threshold, float(p_value), float(one.seconds) or share
            yield Prediction(sample, float(one.anomaly_score), one.anomaly_map, *numbers, one.answer)


def _row(prediction: Prediction) -> dict[str, Any]:
    """What tables say of a prediction, beside the picture's name."""
    known = {name: getattr(prediction.sample, name) for name in _KNOWN}
    return known | {name: getattr(prediction, name) for name in _VERDICT}


def _calibrated(method: str, dataset: Any, normals: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of each painting's threshold: scores, and on how many true sources they rest."""
    facts = {}
    for category in dataset.categories:
        scores = [float(score) for score in normals.get(category, ())]
        if not scores:
            raise ValueError(f"{category} has no calibration scores of {method_label(method)}: add genuine pictures.")
        held_out = dataset.select(split="calibration", category=category, is_anomalous=False)
        sources = set(groups.get(category) or [sample.group or str(sample.image_path) for sample in held_out])
        facts[category] = {"scores": scores, "n": len(scores), "n_sources": len(sources)}
        facts[category]["optimistic"] = "optimistic" in dataset.limits.get(category, "")
    return facts


def _resume(journal: Path, head: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by picture of an interrupted run with the same head; a torn line costs one picture."""
    lines = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    if lines[:1] == [head]:
        return {row["image_path"]: row for row in lines[1:]}
    shutil.rmtree(journal.parent, ignore_errors=True)
    files.append_line(journal, json.dumps(head))
    return {}


def read(folder: Path, samples: Sequence[Sample], dataset_dir: Path, dataset_hash: str) -> MethodResult:
    """Read a results folder: FileNotFoundError when it is not complete, ValueError when it is of another dataset."""
    if not (Path(folder) / MANIFEST).exists():
        raise FileNotFoundError(f"No complete results in {folder}. Run the notebook that makes them.")
    folder, manifest = Path(folder), files.read_json(Path(folder) / MANIFEST)
    if manifest["dataset_hash"] != dataset_hash:
        which = f"dataset {manifest['dataset_hash'][:12]}, the dataset in use is {dataset_hash[:12]}"
        way_out = "Rows of different datasets are not compared: run the method's notebook again."
        raise ValueError(f"{manifest['method']} was measured on {which}. {way_out}")
    by_path = {relative_path(sample, dataset_dir): sample for sample in samples}
    # Read as text: an answer "None" or a kind "nan" is one, and numbers keep their last digit.
    table = pd.read_csv(folder / PREDICTIONS, dtype=str, keep_default_na=False).to_dict("records")
    predictions = [
        Prediction(by_path[row["image_path"]], answer=row["answer"], **{n: float(row[n] or "nan") for n in _NUMBERS})
        for row in table
    ]
    return MethodResult(manifest["method"], folder, manifest, predictions)


def confirm(facts: Mapping[str, bool]) -> None:
    """Print a ✓ line for every fact, in words; an AssertionError names those that do not hold."""
    for words, holds in facts.items():
        print("✓" if holds else "✗", words)
    if failed := [words for words, holds in facts.items() if not holds]:
        raise AssertionError(f"{len(failed)} of {len(facts)} checks failed: {'; '.join(failed)}.")


def in_words(frame: pd.DataFrame) -> str:
    """What the methods of a :meth:`MethodResult.frame` found, a line each: the numbers to remember of a notebook."""
    lines = []
    for method, rows in frame.groupby("method", sort=False):
        found, alarms = (rows.is_predicted_anomalous[rows.is_anomalous == label] for label in (True, False))
        words = f"{found.sum()} of {len(found)} anomalous pictures found, {alarms.sum()} false alarms on {len(alarms)}"
        lines.append(f"{method_label(method)}: {words} genuine pictures")
    return "\n".join(lines)


def method_label(method: str) -> str:
    """The method's name for readers; rows of unknown methods keep their own."""
    return METHOD_LABELS.get(method, method)


def category_label(category: str) -> str:
    """Folder names for readers: "Girl with a Pearl Earring" instead of ``girl_with_a_pearl_earring``."""
    if category == "all":
        return "All paintings"
    words = category.replace("_", " ").split()
    return " ".join(word if n and word in _SMALL_WORDS else word[:1].upper() + word[1:] for n, word in enumerate(words))


def map_path(folder: Path, sample: Sample) -> Path:
    """Where the anomaly map of a picture lies in a results folder: one picture may stand in two categories."""
    place = "|".join((sample.category, sample.kind, Path(sample.image_path).name, sample.sha256))
    return Path(folder) / "maps" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.npy"


def relative_path(sample: Sample, dataset_dir: Path) -> str:
    """The picture's path as the manifest writes it: relative to the dataset, with forward slashes."""
    path = Path(sample.image_path)
    return (path.relative_to(dataset_dir) if path.is_relative_to(dataset_dir) else path).as_posix()


def versions() -> dict[str, str]:
    """Installed versions of the libraries that results depend on."""
    names = ("torch", "transformers", "peft", "open_clip_torch", "timm", "scikit-learn", "numpy")
    found = {"python": platform.python_version(), "opencv": cv2.__version__}
    return found | {name: metadata.version(name) for name in names}


def machine() -> str:
    """The machine in words, for the footers of tables: measured seconds mean nothing without it."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"
