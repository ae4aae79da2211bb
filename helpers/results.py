"""Results of a method on a dataset: written picture by picture, read back only for the same dataset.

A results folder holds ``predictions.csv``, ``maps/`` (float16 arrays) and, written last, ``manifest.json``: its
presence means that the run is complete.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import files as storage
from helpers.records import Prediction, Sample

METHODS = (
    "clip_resnet50",
    "clip_cross_entropy",
    "clip_isolation_forest",
    "clip_lof",
    "clip_patch_knn",
    "anomalyclip",
    "anomalygpt",
    "always_anomaly",
)
"""The rows of the comparison, in the order of the table."""

METHOD_LABELS: Mapping[str, str] = {
    "clip_resnet50": "CLIP + CNN similarity",
    "clip_cross_entropy": "CLIP cross-entropy head",
    "clip_isolation_forest": "CLIP Isolation Forest",
    "clip_lof": "CLIP LOF",
    "clip_patch_knn": "CLIP patch k-NN",
    "anomalyclip": "AnomalyCLIP",
    "anomalygpt": "AnomalyGPT",
    "always_anomaly": "Always “anomaly”",
}
"""What a reader sees instead of a method's file name."""

_SMALL_WORDS = ("a", "an", "and", "at", "by", "de", "in", "la", "of", "on", "the", "with")
MANIFEST = "manifest.json"
PREDICTIONS = "predictions.csv"
_JOURNAL = "journal.jsonl"
_NUMBERS = ("anomaly_score", "threshold", "p_value", "seconds")
_VERSIONED = ("torch", "transformers", "peft", "open_clip_torch", "timm", "scikit-learn", "numpy", "opencv-python")


@dataclass(frozen=True)
class MethodResult:
    """A complete run of one method: what :func:`read` returns.

    Attributes:
        method: name of the row in the comparison.
        folder: the results folder.
        manifest: settings, versions, ``dataset_hash``, ``checkpoint_hash``, ``profile``.
        predictions: one per test picture, in the dataset's order; their maps stay on disk.
    """

    method: str
    folder: Path
    manifest: Mapping[str, Any]
    predictions: Sequence[Prediction]

    @property
    def dataset_hash(self) -> str:
        return self.manifest["dataset_hash"]

    def anomaly_map(self, prediction: Prediction) -> np.ndarray | None:
        """The picture's anomaly map, float32 ``(H, W)``, raw; None when the method made none."""
        path = map_path(self.folder, prediction.sample)
        return np.load(path).astype(np.float32) if path.exists() else None


class Writer:
    """Writes one method's predictions as they come, so that an interrupted run loses none.

    Use as a context manager. Pictures already predicted by an interrupted run with the same settings are in
    :attr:`done` and need not be predicted again. Leaving the block without error puts the run in place of an older
    one (a complete run on another dataset is moved to ``other_datasets/``); leaving it with an error keeps what was
    predicted, beside the untouched older run, for the next try.

    Args:
        folder: results folder of the method.
        method: name of the row.
        samples: the test pictures; each must get exactly one prediction.
        dataset_dir: folder of the dataset, to write relative paths.
        dataset_hash: hash of the dataset, see :func:`helpers.data.manifest.dataset_hash`.
        profile: name of the profile.
        settings: JSON values that determine the predictions (thresholds included).
        checkpoint_hash: hash of the trained or published weights, empty without any.
    Raises:
        ValueError: a prediction for a picture that is not in ``samples``, two for one picture, or, on leaving,
            pictures without any.
    """

    def __init__(
        self,
        folder: Path,
        *,
        method: str,
        samples: Sequence[Sample],
        dataset_dir: Path,
        dataset_hash: str,
        profile: str,
        settings: Mapping[str, Any],
        checkpoint_hash: str = "",
    ) -> None:
        self._folder = Path(folder)
        self._dataset_dir = Path(dataset_dir)
        self._samples = {relative_path(sample, self._dataset_dir): sample for sample in samples}
        self._head = {
            "method": method,
            "dataset_hash": dataset_hash,
            "checkpoint_hash": checkpoint_hash,
            "profile": profile,
            "settings": dict(settings),
        }
        self._rows: dict[str, dict[str, Any]] = {}
        self._work = self._folder.with_name(f".{self._folder.name}.partial")

    @property
    def done(self) -> frozenset[Path]:
        """Paths of the pictures that need no prediction any more."""
        return frozenset(self._samples[path].image_path for path in self._rows)

    def __enter__(self) -> Writer:
        key = storage.sha256_json(self._head)
        self._rows = _read_journal(self._work / _JOURNAL, key)
        if not self._rows:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
        self._file = open(self._work / _JOURNAL, "w", encoding="utf-8")
        self._append({"key": key})
        for row in self._rows.values():
            self._append(row)
        return self

    def add(self, prediction: Prediction) -> None:
        """Write one prediction, and its map as float16, to disk."""
        path = relative_path(prediction.sample, self._dataset_dir)
        if path not in self._samples:
            raise ValueError(f"{path} is not among the {len(self._samples)} test pictures of this run.")
        if path in self._rows:
            raise ValueError(f"{path} was predicted twice in one run.")
        if prediction.anomaly_map is not None:
            with storage.atomic_path(map_path(self._work, prediction.sample)) as temporary:
                np.save(temporary, np.asarray(prediction.anomaly_map, dtype=np.float16))
        self._rows[path] = row = _row(prediction, path)
        self._append(row)

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if error_type is not None:
            return
        missing = [path for path in self._samples if path not in self._rows]
        if missing:
            raise ValueError(
                f"{self._head['method']}: {len(missing)} of {len(self._samples)} test pictures have no prediction, "
                f"first {missing[0]}."
            )
        table = pd.DataFrame([self._rows[path] for path in self._samples])
        storage.write_text(self._work / PREDICTIONS, table.to_csv(index=False))
        storage.write_json(
            self._work / MANIFEST,
            self._head | {"n_images": len(table), "versions": versions(), "machine": machine()},
        )
        (self._work / _JOURNAL).unlink()
        _put_in_place(self._work, self._folder, self._head["dataset_hash"])

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read(folder: Path, samples: Sequence[Sample], dataset_dir: Path, dataset_hash: str) -> MethodResult:
    """Read a complete results folder that was made on this dataset.

    Raises:
        FileNotFoundError: the run is missing or not complete.
        ValueError: the run was made on another dataset, or its pictures are not the dataset's.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"No complete results in {folder}. Run the notebook that makes them.")
    manifest = storage.read_json(folder / MANIFEST)
    if manifest["dataset_hash"] != dataset_hash:
        raise ValueError(
            f"{manifest['method']} was measured on dataset {manifest['dataset_hash'][:12]}, the dataset in use is "
            f"{dataset_hash[:12]}. Rows of different datasets are not compared: run the method's notebook again."
        )
    by_path = {relative_path(sample, dataset_dir): sample for sample in samples}
    # Only numbers may be missing: an answer "None" or a kind "nan" is a text.
    numeric = {key: [""] for key in _NUMBERS}
    # Older versions of pandas lose the last digit by default, and a score on the threshold changes sides.
    options = {"keep_default_na": False, "na_values": numeric, "float_precision": "round_trip"}
    table = pd.read_csv(folder / PREDICTIONS, dtype={"answer": str}, **options)
    unknown = sorted(set(table["image_path"]) - set(by_path))
    if unknown:
        raise ValueError(
            f"{folder / PREDICTIONS} names {len(unknown)} pictures not in the dataset, first {unknown[0]}."
        )
    predictions = [_prediction(row, by_path[row["image_path"]]) for row in table.to_dict("records")]
    return MethodResult(manifest["method"], folder, manifest, predictions)


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
        manifest = storage.read_json(Path(folder) / MANIFEST)
    except FileNotFoundError:
        return False
    wanted = {"dataset_hash": dataset_hash, "settings": dict(settings), "checkpoint_hash": checkpoint_hash}
    same = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    return all(manifest.get(key) == value for key, value in same.items())


def map_path(folder: Path, sample: Sample) -> Path:
    """Where the anomaly map of a picture lies in a results folder."""
    return Path(folder) / "maps" / f"{sample.sha256[:24]}.npy"


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
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(work, folder)
    if (old / MANIFEST).exists():
        other = storage.read_json(old / MANIFEST)["dataset_hash"]
        if other != dataset_hash:
            archive = folder.parent / "other_datasets" / other[:12] / folder.name
            shutil.rmtree(archive, ignore_errors=True)
            archive.parent.mkdir(parents=True, exist_ok=True)
            os.replace(old, archive)
    shutil.rmtree(old, ignore_errors=True)


def _read_journal(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted run with the same settings; a torn last line is dropped."""
    if not path.exists():
        return {}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not rows or rows[0].get("key") != key:
        return {}
    return {row["image_path"]: row for row in rows[1:]}


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
        "is_predicted_anomalous": bool(prediction.is_predicted_anomalous),
        "p_value": float(prediction.p_value),
        "seconds": float(prediction.seconds),
        "answer": prediction.answer,
    }


def _prediction(row: Mapping[str, Any], sample: Sample) -> Prediction:
    return Prediction(sample, answer=row["answer"], **{key: float(row[key]) for key in _NUMBERS})
