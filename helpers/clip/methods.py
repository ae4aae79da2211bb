"""The CLIP methods on a dataset: what they learn from, one detector per painting, results on disk, sorted folders.
Detectors and thresholds are made of rows that refuse test pictures; these are scored afterwards and change nothing."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file
from sklearn.base import clone

from helpers import files, results, synthesis
from helpers.clip import features, tuning
from helpers.clip.features import Features, Models
from helpers.clip.one_class import DETECTORS, METHODS, SPACES, VIEW, Detector, Head, Rows
from helpers.data import Dataset, images
from helpers.judge import metrics, statistics
from helpers.records import NORMAL_KIND, Sample, Scored
from helpers.results import MethodResult

FORMAT = 3  # part of the key of every kept search; raised when the same options search otherwise
_read = lru_cache(maxsize=2)(images.load_image)
MIN_PICTURES = 12  # genuine ones of a painting; where there are fewer, re-photographs of them fill up


def learning_rows(
    dataset: Dataset, embedded: Features, models: Models, *, n_anomalies: int, seed: int
) -> dict[str, Rows]:
    """What each painting's detectors may learn from: its genuine pictures outside the test split (``embedded`` holds at
    least these), a view of each training picture, and ``n_anomalies`` made from them, every picture and kind as often
    as the others. A painting without a genuine picture is named and left out."""
    found = {}
    for category in dataset.categories:
        normals = [s for s in dataset.select(category=category, is_anomalous=False) if s.split != "test"]
        if not normals:
            print(f"{category} is left out: it has no genuine picture to learn from. Put some into train/good.")
            continue
        again = [normals[i % len(normals)] for i in range(MIN_PICTURES - len(normals))]
        if again:
            print(f"{category}: {len(normals)} genuine pictures only; {len(again)} re-photographs of them join.")
        seen = [sample for sample in normals if sample.split == "train"]
        made = [*again, *seen, *(s for i, s in enumerate(normals) for _ in range(i, n_anomalies, len(normals)))]
        kinds = [NORMAL_KIND] * len(again) + [VIEW] * len(seen) + deal_kinds(dataset, n_anomalies, seed)
        parts = [Rows.of(made, _made(made, kinds, models, seed), kinds)] if made else []
        found[category] = Rows.join([Rows.of(normals, embedded.of(normals)), *parts])
    return found


def deal_kinds(dataset: Dataset, n: int, seed: int) -> list[str]:
    """``n`` kinds of anomaly to train on, like cards from shuffled decks; none that the dataset holds out for the test.
    Changes of the whole picture share one card, so that together they weigh no more than a kind of mark."""
    rng = np.random.default_rng(seed)
    whole = sorted(set(synthesis.ANOMALOUS_VARIATIONS) - set(dataset.kinds_held_out))
    deck = [kind for kind in synthesis.LOCAL_KINDS if kind not in dataset.kinds_held_out] + [""] * bool(whole)
    cards = [card for _ in range(0, n, len(deck)) for card in rng.permutation(deck).tolist()][:n]
    return [card or str(rng.choice(whole)) for card in cards]


def make_picture(sample: Sample, kind: str, seed: int, number: int = 0) -> np.ndarray:
    """Another photograph of a genuine picture, uint8 RGB, damaged unless ``kind`` is good or a view."""
    damage = None if kind in (NORMAL_KIND, VIEW) else kind
    seed = synthesis.seed_for(seed, f"{number}/{kind}/{sample.sha256}")
    return synthesis.damaged_view(_read(sample.image_path), seed=seed, kind=damage)[0]


def _made(sources: Sequence[Sample], kinds: Sequence[str], models: Models, seed: int) -> Features:
    """Features of pictures made from others, kept by how they are made: a known one is not made again."""
    code = [files.sha256_file(path) for path in sorted(Path(synthesis.__file__).parent.glob("*.py"))]
    recipe = files.sha256_json([seed, code])[:16]
    ids = [f"{s.sha256}/{kind}/{row}/{recipe}" for row, (s, kind) in enumerate(zip(sources, kinds, strict=True))]
    return features.embed(ids, lambda row: make_picture(sources[row], kinds[row], seed, row), models)


@dataclass(frozen=True)
class Fitted:
    """A painting's detector, ready for test pictures; scores ``(n,)`` of its genuine pictures by detectors that had not
    seen their sources; and what :func:`helpers.clip.tuning.tune` found."""

    detector: Detector
    normal_scores: np.ndarray
    search: Mapping[str, Any]

    def score(self, embedded: Features) -> list[Scored]:
        """Scores (and maps of the patch memory), with the seconds of reading and of the networks that were used."""
        start = time.perf_counter()
        scores, maps = self.detector.look(embedded)
        seconds = (time.perf_counter() - start) / len(embedded) + self.detector.seconds(embedded)
        return [Scored(float(s), m, float(spent)) for s, m, spent in zip(scores, maps, seconds, strict=True)]


def _fit_all(method: str, learn_from: Mapping[str, Rows], profile: Any, **options: Any) -> dict[str, Fitted]:
    """A searched, fitted, calibrated detector for every painting; a search is kept and taken up when all is equal."""
    path, detector = profile.checkpoint_dir(method) / "fitted.json", clone(DETECTORS[method])
    own = {"seed": profile.seed, "max_epochs": profile.clip.max_epochs, "max_bank_rows": profile.clip.max_bank_rows}
    own["device"] = profile.device
    detector.set_params(**{name: value for name, value in own.items() if hasattr(detector, name)})
    kept, fitted = files.read_json(path) if path.exists() else {}, {}
    for category, rows in sorted(learn_from.items()):
        known, (clip, cnn) = rows.features, (rows.features.clip, rows.features.cnn)
        facts = [list(known.ids), rows.table.to_csv(), [clip.shape[1], cnn.shape[1]]]
        key = files.sha256_json([FORMAT, facts, detector.get_params(), SPACES[method], options])
        try:
            search = kept.get(category, {})
            if search.get("key") != key:
                search = {**tuning.tune(detector, SPACES[method], rows, **options), "key": key}
            chosen = clone(detector).set_params(**search["parameters"])
            chosen, scores = tuning.calibrate(chosen, rows, seed=profile.seed)
            fitted[category] = Fitted(chosen, scores[rows.has("kind", NORMAL_KIND)], search)
        except ValueError as error:
            print(f"{results.method_label(method)} leaves out {results.category_label(category)}: {error}")
    if not fitted:
        raise ValueError(f"{results.method_label(method)}: no painting could be learnt; the reasons stand above.")
    nets = [one.detector.net for one in fitted.values() if isinstance(one.detector, Head)]
    if nets:
        with files.atomic_path(path.with_name("heads.safetensors")) as temporary:
            save_file({f"{n}/{k}": t for n, net in enumerate(nets) for k, t in net.state_dict().items()}, temporary)
    files.write_json(path, {c: {"settings": one.detector.get_params(), **one.search} for c, one in fitted.items()})
    return fitted


def fit_and_test(
    methods: Sequence[str], dataset: Dataset, learn_from: Mapping[str, Rows], embedded: Features, *, profile: Any,
    n_trials: int, strategy: str = "random", alpha: float = 0.05,
) -> dict[str, MethodResult]:  # fmt: skip
    """Fit methods (of :data:`~helpers.clip.one_class.METHODS`) for every painting, then score the test pictures and
    write ``results/<method>/``; what was found is kept in ``checkpoints/<method>/`` for :func:`load`. A painting that
    cannot be fitted is named and stops no other; it is a ValueError when none can.

    ``learn_from`` and ``embedded`` are the dataset's :func:`learning_rows` and features; ``profile`` gives folders,
    device, seed and sizes; ``n_trials`` and ``strategy`` are :func:`helpers.clip.tuning.tune`'s; ``alpha`` is the
    false-alarm rate that the thresholds aim at."""
    found, kinds = {}, sorted({kind for rows in learn_from.values() for kind in rows.table["kind"][rows.is_anomaly]})
    groups = {c: rows.table["group"][rows.has("kind", NORMAL_KIND)].tolist() for c, rows in learn_from.items()}
    for method in methods:
        fitted = _fit_all(method, learn_from, profile, n_trials=n_trials, strategy=strategy, seed=profile.seed)
        learns, searched = method == "clip_cross_entropy", any(one.search["trials"] for one in fitted.values())
        words = "genuine pictures" + " and synthetic anomalies" * learns
        words += "; settings searched with synthetic anomalies" * searched
        found[method] = results.predict(
            profile.results_dir(method), method=method, profile=profile.name, alpha=alpha, batch_size=64,
            dataset=replace(dataset, samples=tuple(s for s in dataset.samples if s.category in fitted)),
            score=lambda category, samples, fitted=fitted: fitted[category].score(embedded.of(samples)),
            calibration={category: one.normal_scores for category, one in fitted.items()},
            calibration_groups=groups,
            settings={c: {**one.detector.get_params(), "key": one.search["key"]} for c, one in fitted.items()},
            trained_on=words, trained_on_kinds=kinds if searched or learns else (),
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Loaded:
    """A method as notebook 03 saved it: painting -> detector."""

    detectors: Mapping[str, Fitted]
    models: Models

    def score(self, category: str, pictures: Sequence[np.ndarray]) -> list[Scored]:
        """Scores of pictures uint8 RGB ``(H, W, 3)`` that should show the painting ``category``."""
        ids = [images.pixel_hash(picture) for picture in pictures]
        return self.detectors[category].score(features.embed(ids, lambda row: pictures[row], self.models))


def load(dataset: Dataset, models: Models, *, checkpoint_dir: Callable[[str], Path], seed: int) -> dict[str, Loaded]:
    """The detectors of notebook 03: stored heads, the others fitted again with the kept settings on the same pictures.
    ``checkpoint_dir`` is ``profile.checkpoint_dir``; a method with nothing saved is left out."""
    normals = [s for s in dataset.samples if not s.is_anomalous and s.split != "test"]
    learn_from = learning_rows(dataset, features.embed_samples(normals, models), models, n_anomalies=0, seed=seed)
    found = {}
    for method in METHODS:
        path, detectors = Path(checkpoint_dir(method)) / "fitted.json", {}
        for number, (category, kept) in enumerate(files.read_json(path).items() if path.exists() else ()):
            detector = clone(DETECTORS[method]).set_params(**kept["settings"])
            if isinstance(detector, Head):
                tensors = load_file(path.with_name("heads.safetensors")).items()
                detector.with_state({k.split("/")[1]: t for k, t in tensors if k.startswith(f"{number}/")})
            else:
                detector.fit(learn_from[category])
            detectors[category] = Fitted(detector, np.empty(0), kept)
        if detectors:
            found[method] = Loaded(detectors, models)
    return found


def table(predictions: pd.DataFrame) -> pd.DataFrame:
    """AUROC with its 95 % interval, what was found and what was passed, by method and painting."""
    rows = {}
    for (method, category), mine in predictions.groupby(["method", "category"], sort=False):
        labels, called = mine["is_anomalous"].to_numpy(), mine["is_predicted_anomalous"].to_numpy()
        auroc = metrics.image_auroc(mine["anomaly_score"], labels)
        low, high = statistics.auroc_interval(mine["anomaly_score"], labels)
        rows[results.method_label(method), results.category_label(category)] = {
            "AUROC": f"{auroc:.3f} [{low:.3f}, {high:.3f}]",
            "anomalies found": f"{(called & labels).sum()} of {labels.sum()}",
            "genuine passed": f"{(~called & ~labels).sum()} of {(~labels).sum()}",
            "accuracy": f"{(called == labels).mean():.1%}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["method", "painting"])


def sort_pictures(result: MethodResult, target: Path) -> Path:
    """Put every test picture into ``target/anomaly`` or ``target/non_anomaly``, by verdict, as the report did: links
    where the disk allows them, else copies, whose names say painting and true kind. An older sorting is replaced."""
    folders = {True: target / "anomaly", False: target / "non_anomaly"}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for one in result.predictions:
        words = (one.sample.category, "", one.sample.kind, "", one.sample.sha256[:8], one.sample.image_path.name)
        place = folders[one.is_predicted_anomalous] / re.sub(r"[^\w.-]+", "_", "_".join(words))[-180:]
        try:
            place.symlink_to(os.path.relpath(one.sample.image_path, place.parent))
        except OSError:
            shutil.copyfile(one.sample.image_path, place)
    return target
