"""Tests of AnomalyGPT: maps with and without references, answers, places, and controls that a sham would fail.

Two scores come from each picture: the maximum of its anomaly map, and what the language model says. The latter needs
no threshold at all: the answer is read, or the logits of "Yes" and "No" at its first position are compared. Datasets in
MVTec's layout are tested like paintings; the paper's own figures stand in its tables 2 and 3 (arXiv 2308.15366).

Source: Gu et al., AnomalyGPT, AAAI 2024, and its test scripts at f21c51b; the source report's evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from helpers.synthesis import rng_for

_TABLES = ("evaluation.csv", "answers.csv")
_WORDS = {True: "yes", False: "no", None: "unclear"}


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
        batch_size: pictures per pass.
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
        evaluation: one number a row: ``category, shots, draw, control, metric, value``.
        answers: one answer a row: ``image_path, category, shots, is_anomalous, answer, is_sentence, says`` (yes, no or
            unclear), ``yes_no_score, place`` (right, wrong, or empty where it was not asked for or nothing is known).
        result: the row of the comparison.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    evaluation: pd.DataFrame
    answers: pd.DataFrame
    result: results.MethodResult


def run(
    model: AnomalyGPT, dataset: Dataset, *, folder: Path, settings: EvaluationSettings, profile: str,
    checkpoint: str | Path = "", map_of: MapOf | None = None, method: str = "anomalygpt",
) -> TestRun:  # fmt: skip
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
    trained = files.read_json(card) if card.exists() else {}
    seen = f"genuine pictures with simulated anomalies, epoch {trained.get('best_epoch')}"
    result = results.predict(
        folder, method=method, dataset=dataset, score=bench.score, calibration=bench.calibration, alpha=settings.alpha,
        profile=profile, settings={**asdict(settings), "map": "own" if map_of is None else "given"},
        checkpoint_hash=model.checkpoint_id, trained_on=seen if trained else "published head, industrial pictures",
        trained_on_kinds=trained.get("kinds", ()), batch_size=settings.batch_size,
        calibration_groups={c: [s.group for s in normals_of(dataset, c)[1]] for c in dataset.categories},
        answers_say=conversations.answers_say,
    )  # fmt: skip
    if not all((folder / name).exists() for name in _TABLES):
        said = {p.sample.image_path: p.answer for p in result.predictions}
        measured = [bench.measure(category, said) for category in dataset.categories]
        for name, tables in zip(_TABLES, zip(*measured)):
            rows = pd.DataFrame([row for table in tables for row in table])
            files.write_text(folder / name, rows.to_csv(index=False))
    evaluation, answers = (pd.read_csv(folder / name, keep_default_na=False) for name in _TABLES)
    return TestRun(evaluation, answers, result)


def answers_before_after(model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings) -> pd.DataFrame:
    """First words of the answers about all test pictures: ``image_path, category, is_anomalous, says, yes_no_score``.

    Made before and after the head has learnt from feedback, two tables are compared by a paired test.
    """
    bench, rows = _Bench(model, dataset, settings, None), []
    for category in dataset.categories:
        samples = dataset.select(split="test", category=category)
        look = bench.look(category, [images.load_image(s.image_path) for s in samples], settings.row_shots)
        scores, texts = bench.first_tokens(look, bench.question(category))
        rows += bench.answers(samples, texts, scores, settings.row_shots)
    return pd.DataFrame(rows)[["image_path", "category", "is_anomalous", "says", "yes_no_score"]]


def draw_references(normals: Sequence[Sample], k: int, draw: int, seed: int) -> list[Sample]:
    """k normal references drawn at random, reproducibly; all there are when these are fewer."""
    category = normals[0].category if normals else ""
    order = rng_for(seed, f"references {category} {k} {draw}").permutation(len(normals))
    return [normals[i] for i in order[:k]]


class _Bench:
    """A chain in front of a dataset: references, maps and answers, one category at a time."""

    def __init__(self, model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings, map_of: MapOf | None) -> None:
        self._model, self._dataset, self._settings = model, dataset, settings
        self._map_of = map_of and _remembered(map_of)
        self._banks: dict[tuple[str, int, int], torch.Tensor] = {}

    def calibration(self) -> dict[str, list[float]]:
        """Scores of genuine pictures that nothing was learnt from."""
        scores = {}
        for category in self._dataset.categories:
            pictures = [images.load_image(s.image_path) for s in normals_of(self._dataset, category)[1]]
            if pictures:
                scores[category] = self.look(category, pictures, self._settings.row_shots).scores.tolist()
        return scores

    def score(self, category: str, samples: Sequence[Sample]) -> list[Scored]:
        """Map and answer of test pictures: a sentence for those of a fixed shuffle, else the first token."""
        pictures = [images.load_image(sample.image_path) for sample in samples]
        look, question = self.look(category, pictures, self._settings.row_shots), self.question(category)
        chosen = self.shuffled(category, "sentences", self._settings.n_sentences)
        in_full = [i for i, sample in enumerate(samples) if sample in chosen]
        texts = [""] * len(samples)
        if len(in_full) < len(samples):
            texts = self._model.first_token(look, question)[1]
        if in_full:
            said = self._model.ask(look.take(in_full), question, max_new_tokens=self._settings.max_new_tokens)
            for i, text in zip(in_full, said):
                texts[i] = text
        rows = zip(look.scores, look.maps.numpy(), texts, strict=True)
        return [Scored(float(score), anomaly_map, answer=text) for score, anomaly_map, text in rows]

    def measure(self, category: str, said: Mapping[Path, str]) -> tuple[list[dict], list[dict]]:
        """Rows of the evaluation and of the answers: all numbers of references, all draws, and the controls."""
        samples, settings = self._dataset.select(split="test", category=category), self._settings
        pictures = [images.load_image(sample.image_path) for sample in samples]
        features, rows, answers = self.embed(pictures), [], []
        for shots in settings.shots if self._map_of is None else (settings.row_shots,):
            for draw in range(settings.n_draws if shots and self._map_of is None else 1):
                place = {"category": category, "shots": shots, "draw": draw}
                look = self.look(category, pictures, shots, draw, features)
                rows += [place | {"control": "none"} | row for row in _map_rows(look, samples)]
                if draw or shots not in settings.answered_shots:
                    continue
                scores, texts = self.first_tokens(look, self.question(category))
                if shots == settings.row_shots:
                    texts = [said[sample.image_path] for sample in samples]
                    controls = self._controls(category, samples, features, look) if settings.n_controls else ()
                    rows += [place | row for row in controls]
                answers += self.answers(samples, texts, scores, shots)
        return rows, answers

    def answers(
        self, samples: Sequence[Sample], texts: Sequence[str], scores: np.ndarray, shots: int
    ) -> list[dict[str, Any]]:
        """One row per answer; only the sentences of the comparison's row can name a place."""
        n_sentences = self._settings.n_sentences if shots == self._settings.row_shots else 0
        chosen, rows = self.shuffled(samples[0].category, "sentences", n_sentences), []
        for sample, text, score in zip(samples, texts, scores, strict=True):
            mask = mask_of(sample) if sample in chosen and sample.is_anomalous else None
            place = None if mask is None else conversations.place_is_right(text, mask)
            rows.append(
                {
                    "image_path": str(sample.image_path), "category": sample.category, "shots": shots,
                    "is_anomalous": sample.is_anomalous, "answer": text, "is_sentence": sample in chosen,
                    "says": _WORDS[conversations.answers_say(text)], "yes_no_score": float(score),
                    "place": {True: "right", False: "wrong", None: ""}[place],
                }
            )  # fmt: skip
        return rows

    def _controls(
        self, category: str, samples: Sequence[Sample], features: ImageFeatures, look: Look
    ) -> list[dict[str, Any]]:
        """Answers about the same pictures, a blank one, references of another painting, and without the noun."""
        chosen = self.shuffled(category, "controls", self._settings.n_controls)
        numbers = [i for i, sample in enumerate(samples) if sample in chosen]
        others, question = [name for name in self._dataset.categories if name != category], self.question(category)
        blank = self._model.look([np.full((MAP_SIZE, MAP_SIZE, 3), 127, dtype=np.uint8)])
        controls = {"none": (look.take(numbers), question), "blank image": (blank.take([0] * len(numbers)), question)}
        if others and self._settings.row_shots and self._map_of is None:
            other = others[self._dataset.categories.index(category) % len(others)]
            swapped = self.look(other, [], self._settings.row_shots, features=features.take(numbers))
            controls["swapped reference"] = (swapped, question)
        controls["noun removed"] = (look.take(numbers), conversations.QUESTION)
        labels, rows = [samples[i].is_anomalous for i in numbers], []
        for control, (controlled, asked) in controls.items():
            scores, texts = self.first_tokens(controlled, asked)
            says = [conversations.answers_say(text) for text in texts]
            right = float(np.mean([said == label for said, label in zip(says, labels)]))
            values = {"says yes": says.count(True) / len(says), "right": right, "yes_no_score": float(scores.mean())}
            rows += [{"control": control, "metric": f"control {name}", "value": v} for name, v in values.items()]
        return rows

    def question(self, category: str) -> str:
        return conversations.question(category, wording=self._settings.wording)

    def shuffled(self, category: str, name: str, n: int) -> list[Sample]:
        """The first n test pictures of a fixed shuffle."""
        samples = self._dataset.select(split="test", category=category)
        order = rng_for(self._settings.seed, f"{name} {category}").permutation(len(samples))
        return [samples[i] for i in order[:n]]

    def embed(self, pictures: Sequence[np.ndarray]) -> ImageFeatures:
        """Features on the CPU, taps in half precision: 2.6 MB per picture at full size."""
        found = self._model.image_tower.embed_images(pictures, batch_size=self._settings.batch_size)
        return ImageFeatures(found.embedding.cpu(), found.taps.half().cpu())

    def look(
        self, category: str, pictures: Sequence[np.ndarray], shots: int, draw: int = 0,
        features: ImageFeatures | None = None,
    ) -> Look:  # fmt: skip
        """The model's look at pictures, in batches."""
        features = self.embed(pictures) if features is None else features
        maps, bank, parts = None, None, []
        if self._map_of is not None:
            maps = np.stack([self._map_of(picture, category) for picture in pictures])
        elif shots:
            key = (category, shots, draw)
            if key not in self._banks:
                chosen = draw_references(normals_of(self._dataset, category)[0], shots, draw, self._settings.seed)
                references = self.embed([images.load_image(s.image_path) for s in chosen])
                self._banks = {key: self._model.bank(references)}  # the last one is kept
            bank = self._banks[key]
        for start in range(0, len(features), self._settings.batch_size):
            part = range(start, min(start + self._settings.batch_size, len(features)))
            given = None if maps is None else maps[start : part.stop]
            parts.append(self._model.look(features.take(part), references=bank, maps=given))
        return Look.join(parts)

    def first_tokens(self, look: Look, question: str) -> tuple[np.ndarray, list[str]]:
        """As the model's own, in batches."""
        size = self._settings.batch_size
        batches = [look.take(range(i, min(i + size, len(look)))) for i in range(0, len(look), size)]
        scores, texts = zip(*(self._model.first_token(batch, question) for batch in batches))
        return np.concatenate(scores), [text for batch in texts for text in batch]


def _remembered(map_of: MapOf) -> MapOf:
    """Each map is made once: a picture is looked at for the row and again for the tables."""
    known: dict[tuple[str, str], np.ndarray] = {}

    def remembered(picture: np.ndarray, category: str) -> np.ndarray:
        key = category, images.pixel_hash(picture)
        if key not in known:
            known[key] = map_of(picture, category)
        return known[key]

    return remembered


def _map_rows(look: Look, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What the maps of a category are worth; an anomaly without a known mask says nothing about pixels."""
    labels = [sample.is_anomalous for sample in samples]
    masks = [mask_of(sample, None if sample.is_anomalous else (MAP_SIZE, MAP_SIZE)) for sample in samples]
    known = [i for i, mask in enumerate(masks) if mask is not None]
    maps, known_masks = [look.maps[i].numpy() for i in known], [masks[i] for i in known]
    values = {
        "pixel AUROC": metrics.pixel_auroc(maps, known_masks), "AUPRO": metrics.aupro(maps, known_masks),
        "image AUROC": metrics.image_auroc(look.scores, labels),
    }  # fmt: skip
    return [{"metric": name, "value": value} for name, value in values.items()]


# --- what the notebook shows -----------------------------------------------------------------------------------------


def table(run: TestRun, *, controls: bool = False) -> pd.DataFrame:
    """What the maps are worth per painting and number of references (mean over draws), or the answers per control."""
    chosen = run.evaluation[run.evaluation["metric"].str.startswith("control ") == controls]
    chosen = chosen.assign(
        painting=chosen["category"].map(results.category_label), references=chosen["shots"],
        metric=chosen["metric"].str.removeprefix("control ").replace("yes_no_score", "logit(yes) - logit(no)"),
    )  # fmt: skip
    index = ["painting", "control" if controls else "references"]
    found = chosen.pivot_table(index=index, columns="metric", values="value", sort=False)
    return found.rename_axis(columns=None).round(3)


def answer_table(run: TestRun) -> pd.DataFrame:
    """Right answers per painting and number of references, with interval and the trivial rule."""
    rows = []
    for (category, shots), group in run.answers.groupby(["category", "shots"], sort=False):
        n, right = len(group), int((group["says"] == np.where(group["is_anomalous"], "yes", "no")).sum())
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


def beside(run: TestRun, published: TestRun) -> str:
    """One sentence: right answers of a row beside those of the published way."""
    told = []
    for result in (run.result, published.result):
        right = sum(conversations.answers_say(p.answer) == p.sample.is_anomalous for p in result.predictions)
        told.append(f"{right} of {len(result.predictions)}")
    return f"{results.method_label(run.result.method)}: {told[0]} answers are right; the published way: {told[1]}."


def shot_lines(run: TestRun) -> tuple[pd.DataFrame, str]:
    """Pixel AUROC by number of references (``series, x, value, low, high``: of the draws), and the finding."""
    chosen = run.evaluation[run.evaluation["metric"] == "pixel AUROC"]
    found = chosen.groupby(["category", "shots"], sort=False)["value"].agg(["mean", "min", "max"])
    frame = found.reset_index().set_axis(["series", "x", "value", "low", "high"], axis=1)
    frame["series"] = frame["series"].map(results.category_label)
    ends = frame.groupby("series", sort=False)["value"].agg(["first", "last"])
    told = "; ".join(f"{name} {a:.2f} → {b:.2f}" for name, a, b in ends.itertuples())
    return frame, f"Map with {frame['x'].min()} → {frame['x'].max()} genuine pictures beside it, pixel AUROC: {told}"


def first_look(model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings) -> list[dict[str, Any]]:
    """A plainly marked and a genuine test picture of the first painting, with map and answer, as panels."""
    category, panels, bench = dataset.categories[0], [], _Bench(model, dataset, settings, None)
    samples = dataset.select(split="test", category=category)
    marked = sorted((s for s in samples if s.is_anomalous), key=lambda s: -(s.visibility or 0.0))
    for sample in [*marked[:1], *[s for s in samples if not s.is_anomalous][:1]]:
        look = bench.look(category, [images.load_image(sample.image_path)], settings.row_shots)
        said = model.ask(look, bench.question(category), max_new_tokens=settings.max_new_tokens)[0]
        panels.append(_panel(sample, look.maps[0].numpy(), said or "(no words)"))
    return panels


def answer_panels(run: TestRun, *, n: int = 6) -> list[dict[str, Any]]:
    """Pictures with what was said of them, uncut: at most half of them wrong or unclear, then right ones, anomalies
    first; the paintings take turns."""
    chosen = run.answers[run.answers["is_sentence"]]
    is_right = chosen["says"] == np.where(chosen["is_anomalous"], "yes", "no")
    groups = (chosen[~is_right], chosen[is_right & chosen["is_anomalous"]], chosen[is_right & ~chosen["is_anomalous"]])
    wrong, *right = (part.iloc[part.groupby("category").cumcount().argsort(kind="stable")] for part in groups)
    by_path, panels = {str(p.sample.image_path): p for p in run.result.predictions}, []
    for row in pd.concat([wrong.head(n // 2), *right]).head(n).itertuples():
        one = by_path[row.image_path]
        mark = "✗ unclear" if row.says == "unclear" else "✓ right" if is_right[row.Index] else "✗ wrong"
        said = f"“{row.answer}” {mark}{f', place {row.place}' if row.place else ''}"
        panels.append(_panel(one.sample, run.result.anomaly_map(one), said))
    return panels


def _panel(sample: Sample, anomaly_map: np.ndarray, said: str) -> dict[str, Any]:
    """Arguments of :class:`helpers.judge.figures.Panel`."""
    picture = images.load_image(sample.image_path)
    kind = sample.kind.replace("_", " ") if sample.is_anomalous else "genuine"
    mask = mask_of(sample, picture.shape[:2])
    return {"image": picture, "mask": mask, "anomaly_map": anomaly_map, "caption": f"{kind}: {said}"}
