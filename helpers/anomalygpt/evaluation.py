"""Tests of AnomalyGPT: maps with and without references, answers, places, and controls that a sham would fail.

Two scores come from each picture: the maximum of its anomaly map, and what the language model says. The latter needs
no threshold at all: the answer is read, or the logits of "Yes" and "No" at its first position are compared.
Everything is measured without and with k normal references, drawn several times.

Source: Gu et al., AnomalyGPT, AAAI 2024, and its test scripts at f21c51b; the source report's evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers import files as storage
from helpers import results
from helpers.anomalygpt import conversations, imagebind
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt.imagebind import FeatureCache, ImageFeatures
from helpers.anomalygpt.model import AnomalyGPT, Look
from helpers.anomalygpt.training import ask_about, normals_of
from helpers.data import manifest as data
from helpers.data.manifest import Dataset
from helpers.judge import metrics, statistics
from helpers.judge import statistics as calibration
from helpers.records import Prediction, Sample
from helpers.synthesis import marks as seeds

METHOD = "anomalygpt"
EVALUATION, ANSWERS = "evaluation.csv", "answers.csv"
PROTOCOLS = ("art", "published")
CONTROLS = ("none", "blank image", "swapped reference", "noun removed")

# (benchmark, shots) -> image AUROC, pixel AUROC, accuracy in %; Gu et al., AAAI 2024, tables 2 and 3.
PUBLISHED = {
    ("MVTec AD", 0): (97.4, 93.1, 93.3),
    ("MVTec AD", 1): (94.1, 95.3, 86.1),
    ("MVTec AD", 2): (95.5, 95.6, 84.8),
    ("MVTec AD", 4): (96.3, 96.2, 85.0),
    ("VisA", 1): (87.4, 96.2, 77.4),
    ("VisA", 2): (88.6, 96.4, 77.5),
    ("VisA", 4): (90.6, 96.7, 77.7),
}
MVTEC_CATEGORIES = frozenset(
    "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood "
    "zipper".split()
)
VISA_CATEGORIES = frozenset(
    "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum".split()
)


@dataclass(frozen=True)
class TestSettings:
    """What is tested and how.

    Args:
        shots: numbers of normal references; 0 is the decoder's map without any.
        n_draws: draws of the references for each number above 0.
        row_shots: which of ``shots`` (first draw) becomes the row of the comparison; chosen beforehand.
        answered_shots: which of ``shots`` the language model is asked in (first draw of each).
        wording: of the question, see :func:`helpers.anomalygpt.conversations.question`; None names nothing.
        protocol: ``"art"``; or ``"published"``: centre crop, names matched in the question, references in file
            order, test wording.
        n_sentences: pictures per category that are answered in full sentences; the others give the first token of
            their answer, which decides between yes and no.
        n_controls: pictures per category that the controls are run on.
        max_new_tokens: length limit of the sentences.
        batch_size: pictures per pass of the language model.
        alpha: wanted false-alarm rate of the map's threshold.
        seed: of the draws.
    Raises:
        ValueError: values that contradict each other.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    shots: tuple[int, ...] = (0, 1, 2, 4)
    n_draws: int = 3
    row_shots: int = 4
    answered_shots: tuple[int, ...] = (0, 4)
    wording: str | None = "published"
    protocol: str = "art"
    n_sentences: int = 1000
    n_controls: int = 20
    max_new_tokens: int = 64
    batch_size: int = 16
    alpha: float = 0.05
    seed: int = 2024

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}; allowed are {', '.join(PROTOCOLS)}.")
        asked = {self.row_shots, *self.answered_shots}
        if not asked <= set(self.shots) or self.row_shots not in self.answered_shots:
            raise ValueError(
                f"row_shots {self.row_shots} must be one of answered_shots {self.answered_shots}, and these among "
                f"shots {self.shots}."
            )
        if min(self.shots) < 0 or self.n_draws < 1 or self.batch_size < 1:
            raise ValueError("shots must not be negative; n_draws and batch_size must be at least 1.")


@dataclass(frozen=True)
class TestRun:
    """What :func:`run` measured.

    Attributes:
        evaluation: one number a row: ``category, shots, draw, control, metric, value, ci_low, ci_high, n_images,
            n_anomalous``.
        answers: one answer a row: ``image_path, category, shots, control, is_anomalous, question, answer, is_sentence,
            verdict, yes_no_score, place_is_right``.
        result: the row of the comparison.
    """

    __test__ = False

    evaluation: pd.DataFrame
    answers: pd.DataFrame
    result: results.MethodResult


@dataclass(frozen=True)
class _Category:
    """A category's pictures and their features."""

    name: str
    test: list[Sample]
    calibration: list[Sample]
    references: list[Sample]
    features: ImageFeatures
    seconds: np.ndarray
    calibration_features: ImageFeatures
    reference_features: ImageFeatures
    masks: list[np.ndarray | None]

    @property
    def labels(self) -> np.ndarray:
        return np.array([sample.is_anomalous for sample in self.test])


def run(
    model: AnomalyGPT,
    dataset: Dataset,
    *,
    folder: Path,
    settings: TestSettings,
    profile: str,
    cache_dir: Path | None = None,
) -> TestRun:
    """Test on every category of a dataset; a complete run with the same settings is read back.

    Args:
        model: the chain.
        dataset: normals of split ``train`` are the references, those of ``calibration`` set the thresholds.
        folder: results folder; gets ``evaluation.csv`` and ``answers.csv`` beside the common files.
        settings: see :class:`TestSettings`.
        profile: its name.
        cache_dir: where features are kept.
    Raises:
        ValueError: a category has too few normals for the references or thresholds.
    """
    folder = Path(folder)
    test = dataset.select(split="test")
    stored = json_settings(settings)
    if _is_complete(folder, dataset, stored, model.checkpoint_id):
        return _read(folder, dataset)
    cache = FeatureCache(model.eyes, cache_dir, mode="crop" if settings.protocol == "published" else "squash")
    categories = [_open_category(dataset, name, cache, settings) for name in dataset.categories]
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    predictions: dict[Path, Prediction] = {}
    for number, category in enumerate(categories):
        other = categories[(number + 1) % len(categories)]
        predictions |= _test_category(model, category, other, settings, rows, answers)
    with results.Writer(
        folder, method=METHOD, samples=test, dataset_dir=dataset.folder, dataset_hash=dataset.hash, profile=profile,
        settings=stored, checkpoint_hash=model.checkpoint_id,
    ) as writer:  # fmt: skip
        for sample in test:
            if sample.image_path not in writer.done:
                writer.add(predictions[sample.image_path])
    storage.write_text(folder / EVALUATION, pd.DataFrame(rows).to_csv(index=False))
    storage.write_text(folder / ANSWERS, pd.DataFrame(answers).to_csv(index=False))
    return _read(folder, dataset)


def json_settings(settings: TestSettings) -> dict[str, Any]:
    """The settings as they stand in ``manifest.json``."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}


def draw_references(samples: Sequence[Sample], k: int, draw: int, settings: TestSettings) -> list[int]:
    """Indices of k normal references.

    ``"art"``: drawn at random, reproducibly; ``"published"``: the k pictures after 4 x draw in file order.

    Raises:
        ValueError: there are fewer than k.
    """
    if settings.protocol == "published":
        order = sorted(range(len(samples)), key=lambda i: samples[i].image_path.name)
        chosen = order[4 * draw : 4 * draw + k]
    else:
        name = f"references {samples[0].category if samples else ''} {k} {draw}"
        chosen = seeds.rng_for(settings.seed, name).permutation(len(samples))[:k].tolist()
    if len(chosen) < k:
        raise ValueError(f"{k} references of draw {draw} asked for, but there are {len(samples)} normal pictures.")
    return chosen


def beside_published(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Our figures beside the paper's, in %, for the benchmark that the categories belong to.

    Returns:
        columns ``benchmark, shots, metric, ours, paper, n_categories``; empty when the categories are neither MVTec
        AD's nor VisA's. Means over categories and draws. With few of the categories the two are not comparable, hence
        the count.
    """
    categories = frozenset(evaluation["category"])
    known = {"MVTec AD": MVTEC_CATEGORIES, "VisA": VISA_CATEGORIES}
    benchmark = next((name for name, all_of in known.items() if categories and categories <= all_of), None)
    rows = []
    plain = evaluation[evaluation["control"] == "none"]
    for (name, shots), published in PUBLISHED.items():
        if name != benchmark:
            continue
        for metric, paper in zip(("image_auroc", "pixel_auroc", "published_accuracy"), published, strict=True):
            found = plain[(plain["shots"] == shots) & (plain["metric"] == metric)].groupby("category")["value"].mean()
            ours = 100 * found.mean() if len(found) else math.nan
            rows.append(
                {"benchmark": name, "shots": shots, "metric": metric, "ours": ours, "paper": paper,
                 "n_categories": f"{len(found)} of {len(known[name])}"}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["benchmark", "shots", "metric", "ours", "paper", "n_categories"])


def overview(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Mean over draws of each metric, one row per category and number of shots, controls left out."""
    plain = evaluation[evaluation["control"] == "none"]
    table = plain.pivot_table(index=["category", "shots"], columns="metric", values="value", sort=False)
    order = [
        "pixel_auroc", "aupro", "image_auroc", "yes_no_auroc", "answer_accuracy", "place_accuracy", "yes_bias",
        "unparseable_share",
    ]  # fmt: skip
    return table.reindex(columns=[name for name in order if name in table.columns])


def control_table(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Answers under the controls, one row per category and control, at the row's number of shots."""
    chosen = evaluation[evaluation["metric"].str.startswith("control_")]
    table = chosen.pivot_table(index=["category", "control"], columns="metric", values="value", sort=False)
    return table.rename(columns=lambda name: name.removeprefix("control_"))


# --- one category ----------------------------------------------------------------------------------------------------


def _open_category(dataset: Dataset, name: str, cache: FeatureCache, settings: TestSettings) -> _Category:
    test = dataset.select(split="test", category=name)
    normals, held_out = normals_of(dataset, name)
    if len(normals) < max(settings.shots) or not held_out:
        raise ValueError(
            f"{name} has {len(normals)} normal pictures to refer to and {len(held_out)} to set thresholds with; needed "
            f"are {max(settings.shots)} and 1. Add normal pictures or ask for fewer shots."
        )
    features, seconds = cache.features(test)
    return _Category(
        name, test, held_out, normals, features, seconds, cache.features(held_out)[0], cache.features(normals)[0],
        [_mask(sample, settings) for sample in test],
    )  # fmt: skip


def _test_category(
    model: AnomalyGPT,
    category: _Category,
    other: _Category,
    settings: TestSettings,
    rows: list[dict[str, Any]],
    answers: list[dict[str, Any]],
) -> dict[Path, Prediction]:
    """All shots and draws of a category; returns the predictions of the comparison's row."""
    question = _question(category.name, settings)
    name = imagebind.published_name(question) if settings.protocol == "published" else "object"
    predictions: dict[Path, Prediction] = {}
    for shots, draw in _modes(settings):
        bank = None
        if shots:
            chosen = draw_references(category.references, shots, draw, settings)
            bank = model.bank(category.reference_features.take(chosen))
        started = time.perf_counter()
        look = _look(model, category.features, bank, name, settings)
        seconds = (time.perf_counter() - started) / len(category.test)
        place = {"category": category.name, "shots": shots, "draw": draw, "control": "none"}
        rows += _map_rows(place, category, look)
        if draw > 0 or shots not in settings.answered_shots:
            continue
        is_row = shots == settings.row_shots
        started = time.perf_counter()
        said = _answers(model, category, look, question, settings, n_sentences=settings.n_sentences if is_row else 0)
        seconds += (time.perf_counter() - started) / len(category.test)
        rows += _answer_rows(place, category, said)
        answers += [place | row for row in said]
        if is_row:
            normal = _look(model, category.calibration_features, bank, name, settings).scores
            predictions = _predictions(category, look, said, normal, category.seconds + seconds, settings.alpha)
            if settings.n_controls:
                foreign = _foreign_bank(model, other, category, shots, settings)
                for control, controlled, asked in _controls(model, category, look, foreign, question, name, settings):
                    rows += _control_rows(place, control, model, category, controlled, asked, settings)
    return predictions


def _modes(settings: TestSettings) -> Iterator[tuple[int, int]]:
    """(shots, draw); without references there is nothing to draw."""
    for shots in settings.shots:
        for draw in range(settings.n_draws if shots else 1):
            yield shots, draw


def _look(
    model: AnomalyGPT, features: ImageFeatures, bank: torch.Tensor | None, name: str, settings: TestSettings
) -> Look:
    """The model's look at pictures, in batches."""
    parts = []
    for start in range(0, len(features), settings.batch_size):
        chosen = features.take(range(start, min(start + settings.batch_size, len(features))))
        parts.append(model.look(chosen, references=bank, name=name))
    return Look(
        torch.cat([part.maps for part in parts]),
        torch.cat([part.image_tokens for part in parts]),
        torch.cat([part.prompts for part in parts]),
        features,
        tuple(number for part in parts for number in part.numbers),
    )


def _answers(
    model: AnomalyGPT, category: _Category, look: Look, question: str, settings: TestSettings, *, n_sentences: int
) -> list[dict[str, Any]]:
    """One answer per test picture: a sentence for the first ``n_sentences`` of a fixed shuffle, else a first token."""
    scores, texts = _first_tokens(model, look, question, settings)
    shuffled = seeds.rng_for(settings.seed, f"sentences {category.name}").permutation(len(category.test))
    in_full = sorted(shuffled[:n_sentences].tolist())
    for start in range(0, len(in_full), settings.batch_size):
        chosen = in_full[start : start + settings.batch_size]
        said = model.ask(look.take(chosen), question, max_new_tokens=settings.max_new_tokens)
        for number, text in zip(chosen, said):
            texts[number] = text
    rows = []
    for number, sample in enumerate(category.test):
        parsed = conversations.parse_answer(texts[number])
        mask = category.masks[number]
        is_sentence = number in set(in_full)
        is_placed = is_sentence and sample.is_anomalous and mask is not None
        rows.append(
            {
                "image_path": str(sample.image_path),
                "is_anomalous": sample.is_anomalous,
                "question": question,
                "answer": texts[number],
                "is_sentence": is_sentence,
                "verdict": {True: "yes", False: "no", None: "unparseable"}[parsed.is_anomalous],
                "yes_no_score": float(scores[number]),
                "place_is_right": conversations.place_is_right(parsed, mask) if is_placed else None,
            }
        )
    return rows


def _first_tokens(model: AnomalyGPT, look: Look, question: str, settings: TestSettings) -> tuple[np.ndarray, list[str]]:
    scores: list[np.ndarray] = []
    texts: list[str] = []
    for start in range(0, len(look), settings.batch_size):
        batch = look.take(range(start, min(start + settings.batch_size, len(look))))
        found, words = model.first_token(batch, question)
        scores.append(found)
        texts += words
    return np.concatenate(scores), texts


def _predictions(
    category: _Category, look: Look, said: Sequence[Mapping[str, Any]], normal: np.ndarray, seconds: np.ndarray,
    alpha: float,
) -> dict[Path, Prediction]:  # fmt: skip
    threshold = calibration.conformal_threshold(normal, alpha)
    p_values = calibration.p_values(normal, look.scores)
    maps = look.maps.numpy()
    return {
        sample.image_path: Prediction(
            sample, float(look.scores[i]), maps[i], threshold, float(p_values[i]), float(seconds[i]), said[i]["answer"]
        )
        for i, sample in enumerate(category.test)
    }


# --- controls --------------------------------------------------------------------------------------------------------


def _foreign_bank(
    model: AnomalyGPT, other: _Category, category: _Category, shots: int, settings: TestSettings
) -> torch.Tensor | None:
    """References of another artwork; None without references or without another artwork."""
    if not shots or other.name == category.name:
        return None
    chosen = draw_references(other.references, shots, 0, settings)
    return model.bank(other.reference_features.take(chosen))


def _controls(
    model: AnomalyGPT, category: _Category, look: Look, foreign: torch.Tensor | None, question: str, name: str,
    settings: TestSettings,
) -> Iterator[tuple[str, Look, str]]:  # fmt: skip
    """(control, look, question) for the pictures of :func:`_controlled`."""
    chosen = _controlled(category, settings)
    yield "none", look.take(chosen), question
    blank = np.full((224, 224, 3), 127, dtype=np.uint8)
    blank_look = model.look([blank], references=None, name=name)
    yield "blank image", blank_look.take([0] * len(chosen)), question
    if foreign is not None:
        yield "swapped reference", _look(model, category.features.take(chosen), foreign, name, settings), question
    yield "noun removed", look.take(chosen), _question(None, settings)


def _controlled(category: _Category, settings: TestSettings) -> list[int]:
    shuffled = seeds.rng_for(settings.seed, f"controls {category.name}").permutation(len(category.test))
    return sorted(shuffled[: settings.n_controls].tolist())


def _control_rows(
    place: Mapping[str, Any], control: str, model: AnomalyGPT, category: _Category, controlled: Look, asked: str,
    settings: TestSettings,
) -> list[dict[str, Any]]:  # fmt: skip
    """Share of "yes", accuracy, mean and AUROC of the yes/no score, mean of the map's maximum."""
    chosen = _controlled(category, settings)
    scores, texts = _first_tokens(model, controlled, asked, settings)
    labels = category.labels[chosen]
    counted = conversations.score_answers(texts, labels)
    values = {
        "control_yes_share": counted.n_yes / counted.n,
        "control_accuracy": counted.accuracy,
        "control_yes_no_auroc": metrics.image_auroc(scores, labels),
        "control_yes_no_score": float(scores.mean()),
        "control_map_maximum": float(controlled.scores.mean()),
    }
    there = dict(place) | {"control": control}
    return [
        _row(there, metric, value, n=len(chosen), n_anomalous=int(labels.sum())) for metric, value in values.items()
    ]


# --- numbers ---------------------------------------------------------------------------------------------------------


def _map_rows(place: Mapping[str, Any], category: _Category, look: Look) -> list[dict[str, Any]]:
    labels, scores, maps = category.labels, look.scores, look.maps.numpy()
    n_anomalous = int(labels.sum())
    low, high = statistics.auroc_interval(scores, labels)
    rows = [
        _row(place, "image_auroc", metrics.image_auroc(scores, labels), low, high, len(labels), n_anomalous),
        _row(place, "image_ap", metrics.average_precision(scores, labels), n=len(labels), n_anomalous=n_anomalous),
    ]
    histogram = metrics.PixelHistogram()
    for anomaly_map, mask in zip(maps, category.masks):
        if mask is not None:  # an anomaly without a known mask says nothing about pixels
            histogram.add(anomaly_map, mask)
    n, n_marked = histogram.n_images, sum(mask is not None and bool(mask.any()) for mask in category.masks)
    return [
        *rows,
        _row(place, "pixel_auroc", histogram.auroc(), n=n, n_anomalous=n_marked),
        _row(place, "aupro", histogram.aupro(), n=n, n_anomalous=n_marked),
    ]


def _answer_rows(
    place: Mapping[str, Any], category: _Category, said: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    labels = category.labels
    texts = [row["answer"] for row in said]
    counted = conversations.score_answers(texts, labels)
    n, n_anomalous = counted.n, counted.n_anomalous
    scores = np.array([row["yes_no_score"] for row in said])
    low, high = statistics.auroc_interval(scores, labels)
    published = sum(conversations.published_is_correct(t, bool(label)) for t, label in zip(texts, labels))
    rows = [
        _row(place, "yes_no_auroc", metrics.image_auroc(scores, labels), low, high, n, n_anomalous),
        _rate(place, "answer_accuracy", counted.n_correct, n, n_anomalous),
        _rate(place, "published_accuracy", published, n, n_anomalous),
        _rate(place, "unparseable_share", counted.n_unparseable, n, n_anomalous),
        _rate(place, "answer_sensitivity", counted.n_right_yes, n_anomalous, n_anomalous),
        _row(place, "yes_bias", counted.yes_bias, n=n, n_anomalous=n_anomalous),
    ]
    placed = [row["place_is_right"] for row in said if row["place_is_right"] is not None]
    if placed:
        rows.append(_rate(place, "place_accuracy", sum(placed), len(placed), len(placed)))
    return rows


def _rate(place: Mapping[str, Any], metric: str, successes: int, n: int, n_anomalous: int) -> dict[str, Any]:
    low, high = statistics.wilson(successes, n)
    return _row(place, metric, successes / n if n else math.nan, low, high, n, n_anomalous)


def _row(
    place: Mapping[str, Any], metric: str, value: float, low: float = math.nan, high: float = math.nan, n: int = 0,
    n_anomalous: int = 0,
) -> dict[str, Any]:  # fmt: skip
    numbers = {"metric": metric, "value": float(value), "ci_low": float(low), "ci_high": float(high)}
    return dict(place) | numbers | {"n_images": n, "n_anomalous": n_anomalous}


def _question(category: str | None, settings: TestSettings) -> str:
    wording = "published_test" if settings.protocol == "published" else settings.wording
    return conversations.question(None) if category is None else ask_about(category, wording)


def _mask(sample: Sample, settings: TestSettings) -> np.ndarray | None:
    """The picture's mask at its own size; the published protocol sees (and scores) only the centre square."""
    shape = None
    if not sample.is_anomalous:
        shape = (anomalygpt.MAP_SIZE, anomalygpt.MAP_SIZE)  # all False, any size will do
    mask = data.mask_of(sample, shape)
    if mask is None or settings.protocol != "published" or not sample.is_anomalous:
        return mask
    side = min(mask.shape)
    top, left = (mask.shape[0] - side) // 2, (mask.shape[1] - side) // 2
    return mask[top : top + side, left : left + side]


# --- files -----------------------------------------------------------------------------------------------------------


def _is_complete(folder: Path, dataset: Dataset, stored: Mapping[str, Any], checkpoint_id: str) -> bool:
    done = results.is_complete(folder, dataset_hash=dataset.hash, settings=stored, checkpoint_hash=checkpoint_id)
    return done and (folder / EVALUATION).exists() and (folder / ANSWERS).exists()


def _read(folder: Path, dataset: Dataset) -> TestRun:
    result = results.read(folder, dataset.select(split="test"), dataset.folder, dataset.hash)
    answers = pd.read_csv(folder / ANSWERS, keep_default_na=False)
    return TestRun(pd.read_csv(folder / EVALUATION), answers, result)
