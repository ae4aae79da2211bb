"""Results of a method on a dataset: written picture by picture, read back only for the same dataset.

A results folder holds ``predictions.csv``, ``maps/`` (float16 arrays) and, written last, ``manifest.json``: its
presence means that the run is complete. :func:`predict` is the one loop over test pictures of all methods.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

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
    "aligned": "Laid on its reference",
    "dinov2_memory": "DINOv2 patch memory",
    "dinov2_subspace": "DINOv2 subspace",
    "anomalygpt": "AnomalyGPT",
    "anomalygpt_aligned": "AnomalyGPT with aligned map",
    "always_anomaly": "Always “anomaly”",
}
"""What a reader sees instead of a method's file name, in the order of the comparison's rows."""

METHODS = tuple(METHOD_LABELS)
"""The rows of the comparison, in the order of the table."""

_SMALL_WORDS = ("a", "an", "and", "at", "by", "de", "in", "la", "of", "on", "the", "with")
MANIFEST = "manifest.json"
PREDICTIONS = "predictions.csv"
_JOURNAL = "journal.jsonl"
_VERSIONED = ("torch", "transformers", "peft", "open_clip_torch", "timm", "scikit-learn", "numpy", "opencv-python")


@dataclass(frozen=True)
class MethodResult:
    """A complete run of one method: what :func:`read` and :func:`predict` return."""

    method: str  # name of the row in the comparison
    folder: Path
    manifest: Mapping[str, Any]  # settings, versions, dataset_hash, checkpoint_hash, profile, and predict's facts
    predictions: Sequence[Prediction]  # one per test picture, in the dataset's order; their maps stay on disk

    @property
    def dataset_hash(self) -> str:
        return self.manifest["dataset_hash"]

    def frame(self) -> pd.DataFrame:
        """One row a test picture: ``method, category, kind, is_anomalous, anomaly_score, threshold,
        is_predicted_anomalous, p_value, seconds, answer``."""
        names = ("anomaly_score", "threshold", "is_predicted_anomalous", "p_value", "seconds", "answer")
        known = ("category", "kind", "is_anomalous")
        rows = [[*(getattr(p.sample, k) for k in known), *(getattr(p, n) for n in names)] for p in self.predictions]
        return pd.DataFrame(rows, columns=[*known, *names]).assign(method=self.method)

    def anomaly_map(self, prediction: Prediction) -> np.ndarray | None:
        """The picture's anomaly map, float32 ``(H, W)``, raw; None when the method made none."""
        path = map_path(self.folder, prediction.sample)
        return np.load(path).astype(np.float32) if path.exists() else None


def predict(
    folder: Path,
    *,
    method: str,
    dataset: Any,
    score: Callable[[str, Sequence[Sample]], Sequence[Scored]],
    calibration: Mapping[str, Sequence[float]] | Callable[[], Mapping[str, Sequence[float]]],
    alpha: float,
    profile: str,
    settings: Mapping[str, Any],
    checkpoint_hash: str = "",
    trained_on: str = "",
    trained_on_kinds: Sequence[str] = (),
    calibration_groups: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 16,
    answers_say: Callable[[str], bool | None] | None = None,
) -> MethodResult:
    """Score every test picture, call those above the conformal threshold anomalous, write all of it as it comes.

    A complete run on this dataset with these settings and weights is returned as it is; an interrupted one is
    finished without scoring a picture twice.

    Args:
        folder, method, profile: results folder, name of the row (see :data:`METHODS`), name of the profile.
        dataset: a :class:`helpers.data.Dataset`; its test pictures are predicted, painting by painting.
        score: (category, ``batch_size`` test pictures of it) -> one :class:`~helpers.records.Scored` each, in their
            order; where ``seconds`` is 0 the time of the call is shared among them.
        calibration: category -> scores of genuine pictures that the detector has not learnt from, higher = more
            anomalous; or a function that gives them, called only when pictures are left to predict.
        alpha: false-alarm rate that the thresholds aim at.
        settings, checkpoint_hash: JSON values and weights (empty: none) that determine scores and calibration.
        trained_on, trained_on_kinds: what the weights have seen, in words, and the kinds of synthetic marks among it.
        calibration_groups: category -> source picture of each calibration score (default: of the calibration split).
        answers_say: answer -> True (anomalous), False (normal) or None (neither), for methods that answer.
    Raises:
        ValueError: a painting without calibration scores, or a wrong number of scores.
    """
    head = {"dataset_hash": dataset.hash, "settings": {**settings, "alpha": alpha}, "checkpoint_hash": checkpoint_hash}
    if not is_complete(folder, **head):
        normals = calibration() if callable(calibration) else calibration
        calibrated = _calibration_facts(method, dataset, normals, calibration_groups or {})
        facts = {"trained_on": trained_on, "trained_on_kinds": sorted(trained_on_kinds), "calibration": calibrated}
        samples = dataset.select(split="test")
        with Writer(folder, method, samples, dataset.folder, profile=profile, facts=facts, **head) as writer:
            _score_all(writer, score, normals, alpha, batch_size)
            if answers_say is not None:
                facts["answers_say"] = {path: answers_say(answer) for path, answer in writer.answers.items()}
    return read(folder, dataset.samples, dataset.folder, dataset.hash)


def _score_all(
    writer: Writer, score: Callable, normals: Mapping[str, Sequence[float]], alpha: float, batch_size: int
) -> None:
    """Score what is not done yet in batches of one painting; give it threshold and p-value."""
    from helpers.judge.statistics import conformal_threshold, p_values

    left = [sample for sample in writer.samples if sample.image_path not in writer.done]
    with tqdm(total=len(left), desc=method_label(writer.method), unit="picture", leave=False, delay=2) as bar:
        for category in dict.fromkeys(sample.category for sample in left):
            threshold = conformal_threshold(normals[category], alpha)
            own = [sample for sample in left if sample.category == category]
            for start in range(0, len(own), batch_size):
                batch, started = own[start : start + batch_size], time.perf_counter()
                found = list(score(category, batch))
                if len(found) != len(batch):
                    raise ValueError(f"{category}: {len(found)} scores for {len(batch)} pictures; one each is needed.")
                share = (time.perf_counter() - started) / len(batch)
                for sample, one in zip(batch, found):
                    p_value = float(p_values(normals[category], [one.anomaly_score])[0])
                    verdict = (threshold, p_value, one.seconds or share, one.answer)
                    writer.add(Prediction(sample, one.anomaly_score, one.anomaly_map, *verdict))
                bar.update(len(batch))


def _calibration_facts(
    method: str, dataset: Any, normals: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """What the manifest says of each painting's threshold: scores, and on how many true sources they rest."""
    facts = {}
    for category in dataset.categories:
        if not len(normals.get(category, ())):
            raise ValueError(
                f"{category} has no calibration scores of {method_label(method)}: its threshold cannot be set. Add "
                "genuine pictures of it and run 02_synthesize_anomalies again."
            )
        held_out = dataset.select(split="calibration", category=category, is_anomalous=False)
        sources = set(groups.get(category) or [sample.group or str(sample.image_path) for sample in held_out])
        facts[category] = {
            "scores": [float(score) for score in normals[category]],
            "n": len(normals[category]),
            "n_sources": len(sources),
            "optimistic": "optimistic" in getattr(dataset, "limits", {}).get(category, ""),
        }
    return facts


@dataclass
class Writer:
    """Writes one method's predictions as they come, so that an interrupted run loses none.

    Use as a context manager. Pictures already predicted by an interrupted run with the same settings are in
    :attr:`done`. Leaving the block without error puts the run in place of an older one (a complete run on another
    dataset is moved to ``other_datasets/``); leaving it with an error keeps what was predicted, beside the untouched
    older run. A ValueError says which picture is unknown, was predicted twice, or, on leaving, has no prediction.
    """

    folder: Path
    method: str
    samples: Sequence[Sample]  # the test pictures; each must get exactly one prediction
    dataset_dir: Path
    dataset_hash: str
    profile: str
    settings: Mapping[str, Any]  # JSON values that determine the predictions
    checkpoint_hash: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)  # further JSON values for the manifest

    @property
    def done(self) -> frozenset[Path]:
        """Paths of the pictures that need no prediction any more."""
        return frozenset(self._by_path[path].image_path for path in self._rows)

    @property
    def answers(self) -> dict[str, str]:
        """Path of each predicted picture, as the manifest writes it -> its answer."""
        return {path: row["answer"] for path, row in self._rows.items()}

    def __enter__(self) -> Writer:
        names = ("method", "dataset_hash", "checkpoint_hash", "profile", "settings")
        self._head = {name: getattr(self, name) for name in names}
        self._by_path = {relative_path(sample, self.dataset_dir): sample for sample in self.samples}
        self._work = Path(self.folder).with_name(f".{Path(self.folder).name}.partial")
        key = files.sha256_json(self._head)
        self._rows = _read_journal(self._work / _JOURNAL, key)
        if not self._rows:
            shutil.rmtree(self._work, ignore_errors=True)
            files.append_line(self._work / _JOURNAL, json.dumps({"key": key}))
        return self

    def add(self, prediction: Prediction) -> None:
        """Write one prediction, and its map as float16, to disk."""
        sample = prediction.sample
        path = relative_path(sample, self.dataset_dir)
        if path not in self._by_path:
            raise ValueError(f"{path} is not among the {len(self._by_path)} test pictures of this run.")
        if path in self._rows:
            raise ValueError(f"{path} was predicted twice.")
        if prediction.anomaly_map is not None:
            with files.atomic_path(map_path(self._work, sample)) as temporary:
                np.save(temporary, np.asarray(prediction.anomaly_map, dtype=np.float16))
        row = _row(prediction, path)
        files.append_line(self._work / _JOURNAL, json.dumps(row))
        self._rows[path] = row

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: object) -> None:
        if error_type is not None:
            return
        missing = [path for path in self._by_path if path not in self._rows]
        if missing:
            raise ValueError(
                f"{self.method}: {len(missing)} of {len(self._by_path)} test pictures have no prediction, "
                f"first {missing[0]}."
            )
        table = pd.DataFrame([self._rows[path] for path in self._by_path])
        files.write_text(self._work / PREDICTIONS, table.to_csv(index=False))
        facts = {"n_images": len(table), "versions": versions(), "machine": machine()}
        files.write_json(self._work / MANIFEST, {**facts, **self.facts, **self._head})
        for journal in self._work.glob(f"*{_JOURNAL}*"):  # and its lock
            journal.unlink()
        _put_in_place(self._work, Path(self.folder), self.dataset_hash)


def read(folder: Path, samples: Sequence[Sample], dataset_dir: Path, dataset_hash: str) -> MethodResult:
    """Read a complete results folder that was made on this dataset.

    Raises:
        FileNotFoundError: the run is missing or not complete.
        ValueError: the run was made on another dataset, or its pictures are not the dataset's.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"No complete results in {folder}. Run the notebook that makes them.")
    manifest = files.read_json(folder / MANIFEST)
    if manifest["dataset_hash"] != dataset_hash:
        raise ValueError(
            f"{manifest['method']} was measured on dataset {manifest['dataset_hash'][:12]}, the dataset in use is "
            f"{dataset_hash[:12]}. Rows of different datasets are not compared: run the method's notebook again."
        )
    by_path = {relative_path(sample, dataset_dir): sample for sample in samples}
    numbers = ("anomaly_score", "threshold", "p_value", "seconds")
    # Only numbers may be missing: an answer "None" or a kind "nan" is a text. Older versions of pandas lose the last
    # digit by default, and a score on the threshold changes sides.
    options = {"keep_default_na": False, "na_values": {key: [""] for key in numbers}, "float_precision": "round_trip"}
    table = pd.read_csv(folder / PREDICTIONS, dtype={"answer": str}, **options)
    unknown = sorted(set(table["image_path"]) - set(by_path))
    if unknown:
        raise ValueError(
            f"{folder / PREDICTIONS} names {len(unknown)} pictures not in the dataset, first {unknown[0]}."
        )
    predictions = [
        Prediction(by_path[row["image_path"]], answer=row["answer"], **{name: float(row[name]) for name in numbers})
        for row in table.to_dict("records")
    ]
    return MethodResult(manifest["method"], folder, manifest, predictions)


def confirm(facts: Mapping[str, bool]) -> None:
    """Print a ✓ line for every fact, in words; the checks at the end of a notebook.

    Raises:
        AssertionError: some do not hold; the message names them.
    """
    for words, holds in facts.items():
        print("✓" if holds else "✗", words)
    failed = [words for words, holds in facts.items() if not holds]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(facts)} checks failed: {'; '.join(failed)}.")


def method_label(method: str) -> str:
    """The method's name for readers; rows of unknown methods keep their own."""
    return METHOD_LABELS.get(method, method)


def category_label(category: str) -> str:
    """Folder names for readers; ``"all"`` becomes ``"All paintings"``.

    >>> category_label("girl_with_a_pearl_earring")
    'Girl with a Pearl Earring'
    """
    if category == "all":
        return "All paintings"
    words = category.replace("_", " ").split()
    kept = [word if n and word in _SMALL_WORDS else word[:1].upper() + word[1:] for n, word in enumerate(words)]
    return " ".join(kept) or category


def is_complete(folder: Path, *, dataset_hash: str, settings: Mapping[str, Any], checkpoint_hash: str = "") -> bool:
    """True when the folder holds a complete run on this dataset with these settings and weights."""
    try:
        manifest = files.read_json(Path(folder) / MANIFEST)
    except FileNotFoundError:
        return False
    wanted = {"dataset_hash": dataset_hash, "settings": dict(settings), "checkpoint_hash": checkpoint_hash}
    same = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    return all(manifest.get(key) == value for key, value in same.items())


def map_path(folder: Path, sample: Sample) -> Path:
    """Where the anomaly map of a picture lies in a results folder: one picture may stand in two categories."""
    place = "|".join((sample.category, sample.kind, Path(sample.image_path).name, sample.sha256))
    return Path(folder) / "maps" / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.npy"


def relative_path(sample: Sample, dataset_dir: Path) -> str:
    """The picture's path as the manifest writes it: relative to the dataset, with forward slashes."""
    path = Path(sample.image_path)
    try:
        return path.relative_to(dataset_dir).as_posix()
    except ValueError:
        return path.as_posix()


def versions() -> dict[str, str]:
    """Installed versions of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for package in (*_VERSIONED, "opencv-python-headless"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The machine in words, for the footers of tables: measured seconds mean nothing without it."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"


def _put_in_place(work: Path, folder: Path, dataset_hash: str) -> None:
    """Rename a finished run to its folder; an older run on another dataset is kept aside, on the same one replaced."""
    aside = folder.with_name(f".{folder.name}.old")
    if (folder / MANIFEST).exists():
        other = files.read_json(folder / MANIFEST)["dataset_hash"]
        if other != dataset_hash:
            aside = folder.parent / "other_datasets" / other[:12] / folder.name
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, aside)
    os.replace(work, folder)
    if aside.name.startswith("."):
        shutil.rmtree(aside, ignore_errors=True)


def _row(prediction: Prediction, path: str) -> dict[str, Any]:
    sample = prediction.sample
    return {
        "image_path": path,
        "sha256": sample.sha256,
        "category": sample.category,
        "kind": sample.kind,
        "is_anomalous": sample.is_anomalous,
        "anomaly_score": float(prediction.anomaly_score),
        "threshold": float(prediction.threshold),
        "is_predicted_anomalous": prediction.is_predicted_anomalous,
        "p_value": float(prediction.p_value),
        "seconds": float(prediction.seconds),
        "answer": prediction.answer,
    }


def _read_journal(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted run with the same settings; a torn line costs one picture."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    if not rows or rows[0].get("key") != key:
        return {}
    return {row["image_path"]: row for row in rows[1:]}
