"""Tests of AnomalyGPT: maps with and without references, answers, places, and controls that a sham would fail.

Two scores come from each picture: the maximum of its anomaly map, and what the language model says. The latter needs
no threshold at all: the answer is read, or the logits of "Yes" and "No" at its first position are compared.
Everything is measured without and with k normal references, drawn several times. The paper's figures for MVTec AD and
VisA stand in its tables 2 and 3 (arXiv 2308.15366); datasets in MVTec's layout are tested like paintings.

Source: Gu et al., AnomalyGPT, AAAI 2024, and its test scripts at f21c51b; the source report's evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers import files, results
from helpers.anomalygpt import conversations
from helpers.anomalygpt.imagebind import ImageFeatures
from helpers.anomalygpt.model import MAP_SIZE, AnomalyGPT, Look
from helpers.anomalygpt.training import MapOf, normals_of
from helpers.data import Dataset, images, mask_of
from helpers.judge import metrics, statistics
from helpers.records import Sample, Scored
from helpers.synthesis import damaged_view, rng_for

EVALUATION, ANSWERS = "evaluation.csv", "answers.csv"
N_REPHOTOGRAPHS = 19
"""Of a painting's only genuine picture, to set its threshold with: the fewest that allow an alpha of 5 %."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is tested and how.

    Args:
        shots: numbers of normal references; 0 is the decoder's map without any. A painting with fewer genuine pictures
            takes what there is.
        n_draws: draws of the references for each number above 0.
        row_shots: which of ``shots`` (first draw) becomes the row of the comparison; chosen beforehand.
        answered_shots: which of ``shots`` the language model is asked in (first draw of each).
        wording: of the question, see :func:`helpers.anomalygpt.conversations.question`.
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

    shots: tuple[int, ...] = (0, 1, 2, 4)
    n_draws: int = 3
    row_shots: int = 4
    answered_shots: tuple[int, ...] = (0, 4)
    wording: str | None = "published"
    n_sentences: int = 1000
    n_controls: int = 20
    max_new_tokens: int = 64
    batch_size: int = 16
    alpha: float = 0.05
    seed: int = 2024

    def __post_init__(self) -> None:
        if not {self.row_shots, *self.answered_shots} <= set(self.shots) or self.row_shots not in self.answered_shots:
            raise ValueError(
                f"row_shots {self.row_shots} must be one of answered_shots {self.answered_shots}, and these among "
                f"shots {self.shots}."
            )


@dataclass(frozen=True)
class TestRun:
    """What :func:`run` measured.

    Attributes:
        evaluation: one number a row: ``category, shots, draw, control, metric, value, ci_low, ci_high, n_images,
            n_anomalous``.
        answers: one answer a row: ``image_path, category, shots, is_anomalous, answer, is_sentence, says`` (yes, no or
            unclear), ``yes_no_score, place`` (right, wrong, or empty where it was not asked for or nothing is known).
        result: the row of the comparison.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    evaluation: pd.DataFrame
    answers: pd.DataFrame
    result: results.MethodResult


def run(
    model: AnomalyGPT,
    dataset: Dataset,
    *,
    folder: Path,
    settings: EvaluationSettings,
    profile: str,
    checkpoint: str | Path = "",
    map_of: MapOf | None = None,
    method: str = "anomalygpt",
) -> TestRun:
    """Test on every category of a dataset. Answers are written as they come; a complete run is read back.

    Args:
        model: the chain.
        dataset: normals of split ``train`` are the references, those of ``calibration`` set the thresholds.
        folder: results folder; gets ``evaluation.csv`` and ``answers.csv`` beside the common files.
        settings: see :class:`EvaluationSettings`.
        profile: its name.
        checkpoint: as the chain was loaded with it; the folder of notebook 06 says what the head was trained on.
        map_of: (picture uint8 RGB, category) -> float32 ``(224, 224)``: the maps of the row, of its calibration and of
            its prompts, in place of the published few-shot maps.
        method: name of the row.
    """
    folder, bench = Path(folder), _Bench(model, dataset, settings, map_of)
    card = Path(checkpoint) / "training.json"
    trained = files.read_json(card) if card.exists() else None
    result = results.predict(
        folder, method=method, dataset=dataset, score=bench.score, calibration=bench.calibration, alpha=settings.alpha,
        profile=profile, settings={**asdict(settings), "map": "own" if map_of is None else "given"},
        checkpoint_hash=model.checkpoint_id, trained_on=_trained_on(trained),
        trained_on_kinds=() if trained is None else trained["kinds"], batch_size=settings.batch_size,
        calibration_groups=bench.calibration_groups(), answers_say=conversations.answers_say,
    )  # fmt: skip
    if not (folder / ANSWERS).exists():
        said = {p.sample.image_path: p.answer for p in result.predictions}
        measured = [bench.measure(category, said) for category in dataset.categories]
        for name, number in ((EVALUATION, 0), (ANSWERS, 1)):
            table = pd.DataFrame([row for found in measured for row in found[number]])
            files.write_text(folder / name, table.to_csv(index=False))
    answers = pd.read_csv(folder / ANSWERS, keep_default_na=False)
    return TestRun(pd.read_csv(folder / EVALUATION), answers, result)


def _trained_on(trained: Mapping[str, Any] | None) -> str:
    if trained is None:
        return "published head: industrial pictures with simulated or real anomalies"
    return f"genuine training pictures with simulated anomalies (NSA and own marks), epoch {trained['best_epoch']}"


class _Bench:
    """A chain in front of a dataset: references, maps and answers, one category at a time."""

    def __init__(self, model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings, map_of: MapOf | None) -> None:
        self._model, self._dataset, self._settings, self._map_of = model, dataset, settings, map_of
        self._banks: dict[tuple[str, int, int], torch.Tensor] = {}

    # what results.predict asks for

    def calibration_groups(self) -> dict[str, list[str]]:
        """Source picture of each calibration score."""
        groups = {}
        for category in self._dataset.categories:
            normals, held_out = normals_of(self._dataset, category)
            groups[category] = [s.group for s in held_out] or [normals[0].group] * N_REPHOTOGRAPHS
        return groups

    def calibration(self) -> dict[str, list[float]]:
        """Scores of genuine pictures that nothing was learnt from; of re-photographs where there are none."""
        scores = {}
        for category in self._dataset.categories:
            normals, held_out = normals_of(self._dataset, category)
            pictures = [images.load_image(s.image_path) for s in held_out]
            if not pictures:
                only = images.load_image(normals[0].image_path)
                pictures = [damaged_view(only, seed=seed)[0] for seed in range(N_REPHOTOGRAPHS)]
            look = self.look(category, self.embed(pictures), pictures, self._settings.row_shots)
            scores[category] = look.scores.tolist()
        return scores

    def score(self, category: str, samples: Sequence[Sample]) -> list[Scored]:
        """Map and answer of test pictures: a sentence for those of a fixed shuffle, else the first token."""
        pictures = [images.load_image(sample.image_path) for sample in samples]
        look = self.look(category, self.embed(pictures), pictures, self._settings.row_shots)
        question = conversations.question(category, wording=self._settings.wording)
        chosen = self._shuffled(category, "sentences", self._settings.n_sentences)
        in_full = [i for i, sample in enumerate(samples) if sample in chosen]
        texts = [""] * len(samples)
        if len(in_full) < len(samples):
            texts = self._model.first_token(look, question)[1]
        if in_full:
            said = self._model.ask(look.take(in_full), question, max_new_tokens=self._settings.max_new_tokens)
            for i, text in zip(in_full, said):
                texts[i] = text
        return [
            Scored(float(score), anomaly_map, answer=text)
            for score, anomaly_map, text in zip(look.scores, look.maps.numpy(), texts)
        ]

    # what the notebook shows beside the row

    def measure(self, category: str, said: Mapping[Path, str]) -> tuple[list[dict], list[dict]]:
        """Rows of the evaluation and of the answers: all numbers of references, all draws, and the controls."""
        samples, settings = self._dataset.select(split="test", category=category), self._settings
        pictures = [images.load_image(sample.image_path) for sample in samples]
        features, rows, answers = self.embed(pictures), [], []
        question = conversations.question(category, wording=settings.wording)
        for shots in settings.shots if self._map_of is None else (settings.row_shots,):
            for draw in range(settings.n_draws if shots and self._map_of is None else 1):
                place = {"category": category, "shots": shots, "draw": draw, "control": "none"}
                look = self.look(category, features, pictures, shots, draw)
                rows += _map_rows(place, look, samples)
                if draw or shots not in settings.answered_shots:
                    continue
                scores, texts = self.first_tokens(look, question)
                if shots == settings.row_shots:
                    texts = [said[sample.image_path] for sample in samples]
                    if settings.n_controls:
                        rows += self._control_rows(place, category, samples, features, look, question)
                found = self.answers(place, samples, texts, scores)
                rows, answers = rows + _answer_rows(place, found, scores), answers + found
        return rows, answers

    def answers(
        self, place: Mapping[str, Any], samples: Sequence[Sample], texts: Sequence[str], scores: np.ndarray
    ) -> list[dict[str, Any]]:
        is_row = place["shots"] == self._settings.row_shots
        chosen = self._shuffled(place["category"], "sentences", self._settings.n_sentences if is_row else 0)
        rows = []
        for sample, text, score in zip(samples, texts, scores):
            mask = mask_of(sample) if sample in chosen and sample.is_anomalous else None
            place_is_right = None if mask is None else conversations.place_is_right(text, mask)
            rows.append(
                {
                    "image_path": str(sample.image_path), "category": sample.category, "shots": place["shots"],
                    "is_anomalous": sample.is_anomalous, "answer": text, "is_sentence": sample in chosen,
                    "says": {True: "yes", False: "no", None: "unclear"}[conversations.answers_say(text)],
                    "yes_no_score": float(score),
                    "place": {True: "right", False: "wrong", None: ""}[place_is_right],
                }
            )  # fmt: skip
        return rows

    def _control_rows(
        self, place: Mapping[str, Any], category: str, samples: Sequence[Sample], features: ImageFeatures, look: Look,
        question: str,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Answers about the same pictures, a blank one, references of another painting, and without the noun."""
        chosen = self._shuffled(category, "controls", self._settings.n_controls)
        numbers = [i for i, sample in enumerate(samples) if sample in chosen]
        others = [name for name in self._dataset.categories if name != category]
        blank = self._model.look([np.full((MAP_SIZE, MAP_SIZE, 3), 127, dtype=np.uint8)])
        controls = [("none", look.take(numbers), question), ("blank image", blank.take([0] * len(numbers)), question)]
        if others and place["shots"] and self._map_of is None:
            other = others[self._dataset.categories.index(category) % len(others)]
            swapped = self.look(other, features.take(numbers), [], place["shots"])
            controls.append(("swapped reference", swapped, question))
        controls.append(("noun removed", look.take(numbers), conversations.QUESTION))
        labels, rows = np.array([samples[i].is_anomalous for i in numbers]), []
        for control, controlled, asked in controls:
            scores, texts = self.first_tokens(controlled, asked)
            says = [conversations.answers_say(text) for text in texts]
            values = {
                "yes_share": says.count(True) / len(says),
                "accuracy": float(np.mean([said == label for said, label in zip(says, labels)])),
                "yes_no_score": float(scores.mean()), "map_maximum": float(controlled.scores.mean()),
            }  # fmt: skip
            there = {**place, "control": control}
            rows += [
                _row(there, f"control_{k}", v, n=len(says), n_anomalous=int(labels.sum())) for k, v in values.items()
            ]
        return rows

    # parts

    def _shuffled(self, category: str, name: str, n: int) -> list[Sample]:
        samples = self._dataset.select(split="test", category=category)
        order = rng_for(self._settings.seed, f"{name} {category}").permutation(len(samples))
        return [samples[i] for i in order[:n]]

    def embed(self, pictures: Sequence[np.ndarray]) -> ImageFeatures:
        """Features on the CPU, taps in half precision: 2.6 MB per picture at full size."""
        found = self._model.image_tower.embed_images(pictures, batch_size=self._settings.batch_size)
        return ImageFeatures(found.embedding.cpu(), found.taps.half().cpu())

    def look(
        self, category: str, features: ImageFeatures, pictures: Sequence[np.ndarray], shots: int, draw: int = 0
    ) -> Look:
        """The model's look at pictures, in batches."""
        maps, parts = None, []
        if self._map_of is not None:
            maps = np.stack([self._map_of(picture, category) for picture in pictures])
        for start in range(0, len(features), self._settings.batch_size):
            part = range(start, min(start + self._settings.batch_size, len(features)))
            given = None if maps is None else maps[start : part.stop]
            bank = self._bank(category, shots, draw) if shots and maps is None else None
            parts.append(self._model.look(features.take(part), references=bank, maps=given))
        return Look.join(parts)

    def _bank(self, category: str, shots: int, draw: int) -> torch.Tensor:
        """Memory bank of the drawn references; the last few are kept."""
        key = (category, shots, draw)
        if key not in self._banks:
            if len(self._banks) > 4:
                self._banks.clear()
            normals = normals_of(self._dataset, category)[0]
            chosen = draw_references(normals, shots, draw, self._settings.seed)
            self._banks[key] = self._model.bank(self.embed([images.load_image(s.image_path) for s in chosen]))
        return self._banks[key]

    def first_tokens(self, look: Look, question: str) -> tuple[np.ndarray, list[str]]:
        size = self._settings.batch_size
        parts = [
            self._model.first_token(look.take(range(start, min(start + size, len(look)))), question)
            for start in range(0, len(look), size)
        ]
        return np.concatenate([scores for scores, _ in parts]), [text for _, texts in parts for text in texts]


def draw_references(normals: Sequence[Sample], k: int, draw: int, seed: int) -> list[Sample]:
    """k normal references drawn at random, reproducibly; all there are when these are fewer."""
    category = normals[0].category if normals else ""
    order = rng_for(seed, f"references {category} {k} {draw}").permutation(len(normals))
    return [normals[i] for i in order[:k]]


def answers_before_after(model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings) -> pd.DataFrame:
    """First words of the answers about all test pictures: ``image_path, category, is_anomalous, says, yes_no_score``.

    Made before and after the head has learnt from feedback, two tables are compared by a paired test.
    """
    bench, rows = _Bench(model, dataset, settings, None), []
    for category in dataset.categories:
        samples = dataset.select(split="test", category=category)
        pictures = [images.load_image(sample.image_path) for sample in samples]
        look = bench.look(category, bench.embed(pictures), pictures, settings.row_shots)
        scores, texts = bench.first_tokens(look, conversations.question(category, wording=settings.wording))
        rows += bench.answers({"category": category, "shots": settings.row_shots}, samples, texts, scores)
    return pd.DataFrame(rows)[["image_path", "category", "is_anomalous", "says", "yes_no_score"]]


# --- numbers ---------------------------------------------------------------------------------------------------------


def _map_rows(place: Mapping[str, Any], look: Look, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    labels, scores = np.array([sample.is_anomalous for sample in samples]), look.scores
    counts = {"n": len(labels), "n_anomalous": int(labels.sum())}
    # a normal picture's mask is empty at any size; an anomaly without a known mask says nothing about pixels
    masks = [mask_of(sample, None if sample.is_anomalous else (MAP_SIZE, MAP_SIZE)) for sample in samples]
    known = [i for i, mask in enumerate(masks) if mask is not None]
    maps, known_masks = [look.maps[i].numpy() for i in known], [masks[i] for i in known]
    pixels = {"n": len(known), "n_anomalous": sum(bool(mask.any()) for mask in known_masks)}
    return [
        _row(
            place,
            "image_auroc",
            metrics.image_auroc(scores, labels),
            statistics.auroc_interval(scores, labels),
            **counts,
        ),
        _row(place, "image_ap", metrics.average_precision(scores, labels), **counts),
        _row(place, "pixel_auroc", metrics.pixel_auroc(maps, known_masks), **pixels),
        _row(place, "aupro", metrics.aupro(maps, known_masks), **pixels),
    ]


def _answer_rows(place: Mapping[str, Any], answers: Sequence[Mapping], scores: np.ndarray) -> list[dict[str, Any]]:
    labels = np.array([row["is_anomalous"] for row in answers])
    says = np.array([row["says"] for row in answers])
    right = int((says == np.where(labels, "yes", "no")).sum())
    n, n_anomalous = len(labels), int(labels.sum())
    counts = {"n": n, "n_anomalous": n_anomalous}
    placed = [row["place"] == "right" for row in answers if row["place"]]
    rows = [
        _row(
            place,
            "yes_no_auroc",
            metrics.image_auroc(scores, labels),
            statistics.auroc_interval(scores, labels),
            **counts,
        ),
        _row(place, "answer_accuracy", right / n, statistics.wilson(right, n), **counts),
        _row(place, "unclear_share", float((says == "unclear").mean()), **counts),
        _row(place, "yes_bias", (int((says == "yes").sum()) - n_anomalous) / n, **counts),
    ]
    if placed:
        found = statistics.wilson(sum(placed), len(placed))
        rows.append(
            _row(place, "place_accuracy", sum(placed) / len(placed), found, n=len(placed), n_anomalous=len(placed))
        )
    return rows


def _row(
    place: Mapping[str, Any], metric: str, value: float, interval: Any = (math.nan, math.nan), *, n: int,
    n_anomalous: int,
) -> dict[str, Any]:  # fmt: skip
    low, high = interval
    numbers = {"metric": metric, "value": float(value), "ci_low": float(low), "ci_high": float(high)}
    return {**place, **numbers, "n_images": n, "n_anomalous": n_anomalous}


# --- what the notebook shows -----------------------------------------------------------------------------------------


def map_table(run: TestRun) -> pd.DataFrame:
    """What the maps are worth, mean over draws: one row per painting and number of references."""
    columns = {
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO",
        "image_auroc": "image AUROC",
        "image_ap": "average precision",
    }
    return _pivot(run.evaluation, columns, "references", "shots")


def control_table(run: TestRun) -> pd.DataFrame:
    """Answers under the controls, one row per painting and control, at the row's number of references."""
    columns = {
        "control_yes_share": "says yes",
        "control_accuracy": "right",
        "control_yes_no_score": "logit(yes) - logit(no)",
    }
    return _pivot(run.evaluation, columns, "control", "control")


def _pivot(evaluation: pd.DataFrame, columns: Mapping[str, str], name: str, by: str) -> pd.DataFrame:
    chosen = evaluation[evaluation["metric"].isin(columns)]
    chosen = chosen.assign(
        painting=chosen["category"].map(results.category_label), metric=chosen["metric"].map(columns)
    )
    table = chosen.rename(columns={by: name}).pivot_table(
        index=["painting", name], columns="metric", values="value", sort=False
    )
    return table[[label for label in columns.values() if label in table.columns]].rename_axis(columns=None).round(3)


def answer_table(run: TestRun) -> pd.DataFrame:
    """Right answers per painting and number of references, with interval and the trivial rule."""
    rows = []
    for (category, shots), group in run.answers.groupby(["category", "shots"], sort=False):
        truth, n = np.where(group["is_anomalous"], "yes", "no"), len(group)
        right = int((group["says"] == truth).sum())
        low, high = statistics.wilson(right, n)
        auroc = metrics.image_auroc(group["yes_no_score"], group["is_anomalous"])
        placed = group["place"][group["place"] != ""]
        rows.append(
            {
                "painting": results.category_label(category), "references": shots, "right answers": f"{right} of {n}",
                "right %": f"{100 * right / n:.0f} ({100 * low:.0f} to {100 * high:.0f})",
                "“yes” to all would be right %": f"{100 * group['is_anomalous'].mean():.0f}",
                "says yes %": f"{100 * (group['says'] == 'yes').mean():.0f}",
                "unclear": int((group["says"] == "unclear").sum()), "AUROC of yes - no": f"{auroc:.2f}",
                "place right": f"{(placed == 'right').sum()} of {len(placed)}" if len(placed) else "–",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def first_look(model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings) -> list[dict[str, Any]]:
    """A plainly marked and a genuine test picture of the first painting, with map and answer, as panels."""
    category, panels = dataset.categories[0], []
    bench = _Bench(model, dataset, settings, None)
    samples = dataset.select(split="test", category=category)
    marked = sorted((s for s in samples if s.is_anomalous), key=lambda s: -(s.visibility or 0.0))
    question = conversations.question(category, wording=settings.wording)
    for sample in [*marked[:1], *[s for s in samples if not s.is_anomalous][:1]]:
        picture = images.load_image(sample.image_path)
        look = bench.look(category, bench.embed([picture]), [picture], settings.row_shots)
        said = model.ask(look, question, max_new_tokens=settings.max_new_tokens)[0]
        caption = f"{kind_label(sample)}: {said or '(no words)'}"
        panels.append(_panel(sample, look.maps[0].numpy(), caption, picture))
    return panels


def kind_label(sample: Sample) -> str:
    return sample.kind.replace("_", " ") if sample.is_anomalous else "genuine"


def _panel(sample: Sample, anomaly_map: np.ndarray, caption: str, picture: np.ndarray | None = None) -> dict[str, Any]:
    """Arguments of :class:`helpers.judge.figures.Panel`."""
    picture = images.load_image(sample.image_path) if picture is None else picture
    mask = mask_of(sample, picture.shape[:2])
    return {"image": picture, "mask": mask, "anomaly_map": anomaly_map, "caption": caption}


def genuine_maps(run: TestRun) -> Iterator[np.ndarray]:
    """Maps of the genuine test pictures, for one colour scale."""
    return (run.result.anomaly_map(p) for p in run.result.predictions if not p.sample.is_anomalous)


def answer_panels(run: TestRun, *, n: int = 6) -> list[dict[str, Any]]:
    """Pictures with what was said of them, uncut: wrong, right, see :func:`examples`."""
    by_path, panels = {str(p.sample.image_path): p for p in run.result.predictions}, []
    for row in examples(run, n=n).itertuples():
        one = by_path[row.image_path]
        mark = "✓ right" if row.is_right else "✗ unclear" if row.says == "unclear" else "✗ wrong"
        where = f", place {row.place}" if row.place else ""
        caption = f"{mark}{where} ({kind_label(one.sample)}): “{row.answer}”"
        panels.append(_panel(one.sample, run.result.anomaly_map(one), caption))
    return panels


def shot_lines(run: TestRun, metric: str = "pixel_auroc") -> tuple[pd.DataFrame, str]:
    """Mean over draws by number of references (``series, x, value, low, high``), and the finding as a title."""
    chosen = run.evaluation[(run.evaluation["metric"] == metric) & (run.evaluation["control"] == "none")]
    found = chosen.groupby(["category", "shots"], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    frame = found.set_axis(["series", "x", "value", "low", "high"], axis=1)
    frame["series"] = frame["series"].map(results.category_label)
    ends = frame.groupby("series", sort=False)["value"].agg(["first", "last"])
    told = "; ".join(f"{name} {a:.2f} → {b:.2f}" for name, a, b in ends.itertuples())
    return frame, f"Map with 0 → {frame['x'].max()} genuine pictures beside it, pixel AUROC: {told}"


def examples(run: TestRun, *, n: int = 6) -> pd.DataFrame:
    """Up to ``n`` full answers to be shown with their pictures: at most half of them wrong or unclear ones, then right
    ones, anomalies first; the paintings take turns.

    Returns:
        rows of ``run.answers`` with the column ``is_right``.
    """
    chosen = run.answers[
        run.answers["is_sentence"] & (run.answers["shots"] == run.result.manifest["settings"]["row_shots"])
    ]
    chosen = chosen.assign(is_right=chosen["says"] == np.where(chosen["is_anomalous"], "yes", "no"))
    masks = (
        ~chosen["is_right"],
        chosen["is_right"] & chosen["is_anomalous"],
        chosen["is_right"] & ~chosen["is_anomalous"],
    )
    parts = [chosen[mask] for mask in masks]
    wrong, *right = (part.iloc[part.groupby("category").cumcount().argsort(kind="stable")] for part in parts)
    return pd.concat([wrong.head(n // 2), *right]).head(n).reset_index(drop=True)
