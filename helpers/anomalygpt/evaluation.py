"""Tests of AnomalyGPT: maps with and without references, answers, places, and controls that a sham would fail.

Two scores come from each picture: the maximum of its anomaly map, and what the language model says. The latter needs no
threshold: the answer is read, or the logits of "Yes" and "No" at its first position are compared.

Source: Gu et al., AnomalyGPT, AAAI 2024, and its test scripts at f21c51b; the source report's evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from helpers import files, results
from helpers.anomalygpt import conversations
from helpers.anomalygpt.imagebind import ImageFeatures
from helpers.anomalygpt.model import MAP_SIZE, AnomalyGPT, Look
from helpers.anomalygpt.training import MapSource
from helpers.data import Dataset, images, mask_of
from helpers.judge import metrics, statistics
from helpers.records import Sample, Scored
from helpers.synthesis import rng_for

_TABLES = ("map_values.csv", "answers.csv")
_WORDS = {True: "yes", False: "no", None: "unclear"}
_PLACES = {True: "right", False: "wrong", None: ""}
Words = tuple[float, str]
"""What an answer begins with: logit(Yes) - logit(No), and the most likely first token."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is tested and how."""

    shots: tuple[int, ...] = (0, 1, 2, 4)  # numbers of references (all there are, if fewer); 0: the decoder's map
    n_draws: int = 3  # of the references, for each number above 0
    row_shots: int = 4  # the number whose first draw is the row of the comparison; chosen beforehand
    wording: str = "published"  # of the question, see conversations.question
    n_sentences: int = 1000  # pictures per category answered in full; of others the first token, which decides
    n_controls: int = 20  # pictures per category that the controls are run on
    max_new_tokens: int = 64  # length limit of the sentences
    batch_size: int = 16  # pictures per pass
    alpha: float = 0.05  # wanted false-alarm rate of the map's threshold
    seed: int = 2024  # of the draws


class Evaluation(NamedTuple):
    """What :func:`run` measured."""

    maps: pd.DataFrame  # one number of the maps a row: category, shots, draw, metric, value
    answers: pd.DataFrame  # one answer a row: shots, control ("" for the plain question), and as answer_row
    result: results.MethodResult  # the row of the comparison


def run(
    model: AnomalyGPT, dataset: Dataset, *, folder: Path, settings: EvaluationSettings, profile: str,
    checkpoint: str | Path = "", maps_from: MapSource | None = None, method: str = "anomalygpt",
) -> Evaluation:  # fmt: skip
    """Test on every category of a dataset. Answers are written as they come; a complete run is read back.

    The results ``folder`` gets ``map_values.csv`` and ``answers.csv``, too; ``checkpoint``, as the chain was loaded
    with it, says what the head was trained on (the folder of notebook 06); ``maps_from`` gives the maps of the row, of
    its calibration and of its prompts, in place of the published few-shot maps.
    """
    folder, bench, card = Path(folder), Bench(model, dataset, settings, maps_from), Path(checkpoint) / "training.json"
    trained = files.read_json(card) if card.exists() else {}
    seen = f"genuine pictures with simulated anomalies, epoch {trained.get('best_epoch')}"
    result = results.predict(
        folder, method=method, dataset=dataset, score=bench.score, calibration=bench.calibration, alpha=settings.alpha,
        profile=profile, settings={**asdict(settings), "map": maps_from.identity if maps_from else "own"},
        checkpoint_hash=model.checkpoint_id, trained_on=seen if trained else "published head, industrial pictures",
        trained_on_kinds=trained.get("kinds", ()), batch_size=settings.batch_size,
        answers_say=conversations.answers_say,
    )  # fmt: skip
    if not all((folder / name).exists() for name in _TABLES):
        said = {one.sample: one.answer for one in result.predictions}
        measured = [bench.measure(category, said) for category in dataset.categories]
        for name, tables in zip(_TABLES, zip(*measured)):
            files.write_text(folder / name, pd.DataFrame(list(chain(*tables))).to_csv(index=False))
    return Evaluation(*(pd.read_csv(folder / name, keep_default_na=False) for name in _TABLES), result)


def answers_before_after(model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings) -> pd.DataFrame:
    """First words about all test pictures, rows as in :attr:`Evaluation.answers`; two such tables, made before and
    after the head has learnt from feedback, are compared by a paired test."""
    bench, rows = Bench(model, dataset, settings), []
    for category in dataset.categories:
        samples = dataset.select(split="test", category=category)
        words = bench.words(bench.look(samples, settings.row_shots), bench.question(category))
        rows += [answer_row(sample, *found) for sample, found in zip(samples, words)]
    return pd.DataFrame(rows)


def answer_table(answers: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Right answers in each group of :attr:`Evaluation.answers`, with interval and the trivial rule."""

    def told(group: pd.DataFrame) -> dict[str, Any]:
        n, right, truth = len(group), int(group["is_right"].sum()), group["is_anomalous"]
        low, high = statistics.wilson(right, n)
        placed = group["place"][group["place"] != ""]
        return {
            "right answers": f"{right} of {n}",
            "right %": f"{100 * right / n:.0f} ({100 * low:.0f} to {100 * high:.0f})",
            "“yes” to all would be right %": f"{100 * truth.mean():.0f}",
            "says yes %": f"{100 * (group['says'] == 'yes').mean():.0f}",
            "unclear": int((group["says"] == "unclear").sum()),
            "AUROC of yes - no": f"{metrics.image_auroc(group['yes_no_score'], truth):.2f}",
            "place right": f"{(placed == 'right').sum()} of {len(placed)}" if len(placed) else "–",
        }

    groups = answers.assign(painting=answers["category"].map(results.category_label)).groupby(list(by), sort=False)
    return pd.DataFrame({key: told(group) for key, group in groups}).T.rename_axis(by)


def panel(sample: Sample, anomaly_map: np.ndarray, said: str) -> dict[str, Any]:
    """Arguments of :class:`helpers.judge.figures.Panel` for a picture about which something was said."""
    picture, kind = images.load_image(sample.image_path), sample.kind if sample.is_anomalous else "genuine"
    shown = {"image": picture, "mask": mask_of(sample, picture.shape[:2]), "anomaly_map": anomaly_map}
    return shown | {"caption": f"{kind.replace('_', ' ')}: {said}"}


class Bench:
    """A chain in front of a dataset: references, maps and answers."""

    def __init__(
        self, model: AnomalyGPT, dataset: Dataset, settings: EvaluationSettings, maps_from: MapSource | None = None
    ) -> None:
        self.model, self.dataset, self.settings, self.has_maps = model, dataset, settings, maps_from is not None
        # Pictures are looked at and asked about for the row, and again for the tables.
        self.embed = functools.lru_cache(maxsize=4)(self.embed)
        self.map = functools.cache(lambda one: maps_from.unit_map(images.load_image(one.image_path), one.category))
        self.row_words: dict[Sample, Words] = {}

    def calibration(self) -> dict[str, list[float]]:
        """Scores of genuine pictures that nothing was learnt from."""
        normals = {c: self.dataset.select(split="calibration", category=c, is_anomalous=False)
                   for c in self.dataset.categories}  # fmt: skip
        return {c: self.look(part, self.settings.row_shots).scores.tolist() for c, part in normals.items() if part}

    def score(self, category: str, samples: Sequence[Sample]) -> list[Scored]:
        """Map and answer of test pictures: a sentence for those of a fixed shuffle, else the first token."""
        look = self.look(samples, self.settings.row_shots)
        texts = [text for _, text in self.words_of_row(samples, look)]
        if in_full := self.among(samples, "sentences", self.settings.n_sentences):
            limit = self.settings.max_new_tokens
            said = self.model.ask(look.take(in_full), self.question(category), max_new_tokens=limit)
            for i, text in zip(in_full, said):
                texts[i] = text
        rows = zip(look.scores.tolist(), look.maps.numpy(), texts, strict=True)
        return [Scored(score, anomaly_map, answer=text) for score, anomaly_map, text in rows]

    def measure(self, category: str, said: Mapping[Sample, str]) -> tuple[list[dict], list[dict]]:
        """Rows of both tables: all numbers of references, all draws; answers without and with references (what was
        ``said`` in the row), and the controls."""
        samples, chosen, maps, answers = self.dataset.select(split="test", category=category), self.settings, [], []
        sentences = self.among(samples, "sentences", chosen.n_sentences)
        for shots in [chosen.row_shots] if self.has_maps else sorted({*chosen.shots, chosen.row_shots}):
            for draw in range(chosen.n_draws if shots and not self.has_maps else 1):
                look, place = self.look(samples, shots, draw), {"category": category, "shots": shots}
                maps += [place | {"draw": draw, "metric": m, "value": v} for m, v in _map_values(look, samples).items()]
                if draw == 0 and shots == chosen.row_shots:
                    for i, (sample, (yes_no, _)) in enumerate(zip(samples, self.words_of_row(samples, look))):
                        answers.append(place | answer_row(sample, yes_no, said[sample], is_sentence=i in sentences))
                    answers += [place | row for row in self.controls(samples, look)]
                elif shots == 0:
                    words = self.words(look, self.question(category))
                    answers += [place | answer_row(sample, *found) for sample, found in zip(samples, words)]
        return maps, answers

    def controls(self, samples: Sequence[Sample], look: Look) -> list[dict[str, Any]]:
        """First words about some pictures: as they are, of a blank one, beside another painting, without the noun."""
        numbers, category = self.among(samples, "controls", self.settings.n_controls), samples[0].category
        if not numbers:
            return []
        chosen, question, categories = [samples[i] for i in numbers], self.question(category), self.dataset.categories
        blank = self.model.look([np.full((MAP_SIZE, MAP_SIZE, 3), 127, dtype=np.uint8)])
        words = {"as it is": self.words_of_row(chosen, look.take(numbers))}
        words["blank image"] = self.words(blank, question) * len(numbers)
        if len(categories) > 1 and self.settings.row_shots and not self.has_maps:
            others = [name for name in categories if name != category]
            other = others[categories.index(category) % len(others)]
            words["other references"] = self.words(self.look(chosen, self.settings.row_shots, beside=other), question)
        words["noun removed"] = self.words(look.take(numbers), conversations.QUESTION)
        return [answer_row(one, *w, control=name) for name, said in words.items() for one, w in zip(chosen, said)]

    def question(self, category: str) -> str:
        return conversations.question(category, wording=self.settings.wording)

    def among(self, samples: Sequence[Sample], name: str, n: int) -> list[int]:
        """Which of these pictures are among the first n of a fixed shuffle of their painting's test pictures."""
        everything = self.dataset.select(split="test", category=samples[0].category)
        order = rng_for(self.settings.seed, f"{name} {samples[0].category}").permutation(len(everything))
        chosen = {everything[i] for i in order[:n]}
        return [i for i, sample in enumerate(samples) if sample in chosen]

    def bank(self, category: str, shots: int, draw: int = 0) -> torch.Tensor | None:
        """References: genuine training pictures drawn at random, reproducibly; all there are when these are fewer."""
        if not shots or self.has_maps:
            return None
        normals = self.dataset.select(split="train", category=category, is_anomalous=False)
        order = rng_for(self.settings.seed, f"references {category} {shots} {draw}").permutation(len(normals))
        return self.model.bank(self.embed(tuple(normals[i] for i in order[:shots])))

    def embed(self, samples: tuple[Sample, ...]) -> ImageFeatures:
        """Features on the CPU, taps in half precision: 2.6 MB per picture at full size."""
        pictures = [images.load_image(sample.image_path) for sample in samples]
        found = self.model.image_tower.embed_images(pictures, batch_size=self.settings.batch_size)
        return ImageFeatures(found.embedding.cpu(), found.taps.half().cpu())

    def look(self, samples: Sequence[Sample], shots: int, draw: int = 0, *, beside: str | None = None) -> Look:
        """The model's look at pictures, in batches, beside references of their painting or of another one."""
        seen, looks = self.embed(tuple(samples)), []
        bank = self.bank(beside or samples[0].category, shots, draw)
        for part in self.batches(len(samples)):
            maps = np.stack([self.map(sample) for sample in samples[part]]) if self.has_maps else None
            features = ImageFeatures(seen.embedding[part], seen.taps[:, part])
            looks.append(self.model.look(features, references=bank, maps=maps))
        return Look(*map(torch.cat, zip(*looks)))

    def words_of_row(self, samples: Sequence[Sample], look: Look) -> list[Words]:
        """First words in the comparison's row, asked for once."""
        if left := [i for i, sample in enumerate(samples) if sample not in self.row_words]:
            found = self.words(look.take(left), self.question(samples[0].category))
            self.row_words |= {samples[i]: words for i, words in zip(left, found)}
        return [self.row_words[sample] for sample in samples]

    def words(self, look: Look, question: str) -> list[Words]:
        """First words about the pictures, in batches."""
        asked = [self.model.first_token(look.take(part), question) for part in self.batches(len(look.maps))]
        return [(float(score), text) for batch in asked for score, text in zip(*batch)]

    def batches(self, n: int) -> list[slice]:
        return [slice(start, start + self.settings.batch_size) for start in range(0, n, self.settings.batch_size)]


def answer_row(sample: Sample, yes_no: float, text: str, *, control: str = "", is_sentence: bool = False) -> dict:
    """A row of the answers: a sentence may name the right or the wrong place; empty where nothing is known."""
    mask = mask_of(sample) if is_sentence and sample.is_anomalous else None
    place = None if mask is None else conversations.place_is_right(text, mask)
    says = conversations.answers_say(text)
    return {
        "image_path": str(sample.image_path), "control": control, "is_anomalous": sample.is_anomalous, "answer": text,
        "is_sentence": is_sentence, "says": _WORDS[says], "is_right": says == sample.is_anomalous,
        "yes_no_score": yes_no, "place": _PLACES[place],
    }  # fmt: skip


def _map_values(look: Look, samples: Sequence[Sample]) -> dict[str, float]:
    """What the maps of a category are worth; an anomaly without a known mask says nothing about pixels."""
    masks = [mask_of(sample, None if sample.is_anomalous else (MAP_SIZE, MAP_SIZE)) for sample in samples]
    maps = [one for one, mask in zip(look.maps.numpy(), masks) if mask is not None]
    known = [mask for mask in masks if mask is not None]
    return {
        "pixel AUROC": metrics.pixel_auroc(maps, known), "AUPRO": metrics.aupro(maps, known),
        "image AUROC": metrics.image_auroc(look.scores, [sample.is_anomalous for sample in samples]),
    }  # fmt: skip
