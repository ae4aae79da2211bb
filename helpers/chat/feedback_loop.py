"""From confirmed verdicts to a better detector, measured before and after on the frozen test set.

Confirmed normals join the pictures that a detector knows; confirmed anomalies join those that its settings are tuned
on; both set its threshold anew. Without anomalies a threshold can only promise few false alarms; with some, it can be
put where both kinds of error together are smallest. Test pictures take no part: :func:`helpers.chat.feedback.sort_out`
refuses feedback on them, and :class:`helpers.clip.one_class.Training` refuses them once more.

:func:`simulate_user` makes the experiment repeatable: a user who is always right looks at new photographs of the
artworks, half of them damaged, none made from a test picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import results, synthesis
from helpers.chat import _old_clip_features as features
from helpers.chat import _old_clip_methods as clip_methods
from helpers.chat import _old_clip_one_class as one_class
from helpers.chat import _old_clip_tuning as tuning
from helpers.chat import feedback
from helpers.chat._old_clip_features import Features
from helpers.chat._old_clip_methods import Fitted
from helpers.chat._old_clip_one_class import CONFIRMED, Settings, Training
from helpers.chat.feedback import Confirmed, FeedbackLog
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import metrics, statistics
from helpers.judge import statistics as calibration
from helpers.records import Prediction, Sample

MIN_CONFIRMED = 5
"""Confirmed anomalies of a painting from which on they help to place its threshold; below, normals alone do."""
MAX_ALPHA = 0.25
"""Highest false-alarm rate that a threshold placed with the help of anomalies may aim at."""


@dataclass(frozen=True)
class Loop:
    """Detectors as they are, and what they were made from: the start of every round of feedback.

    Attributes:
        dataset: its test split is frozen.
        models: ``clip``, ``cnn``, ``cache_dir``, ``batch_size``, as for :func:`helpers.clip.features.embed_images`.
        embedded: features of the dataset's pictures.
        learn_from: painting -> what its detectors may learn from.
        fitted: method -> painting -> detector, as notebook 03 left it.
        options: ``n_trials, alpha, seed, device`` of :func:`helpers.clip.methods.fit_all`.
    """

    dataset: data.Dataset
    models: Mapping[str, Any]
    embedded: Features
    learn_from: Mapping[str, Training]
    fitted: Mapping[str, Mapping[str, Fitted]]
    options: Mapping[str, Any]


def open_loop(
    dataset: data.Dataset,
    *,
    models: Mapping[str, Any],
    checkpoint_dir: Callable[[str], Path],
    n_anomalies: int,
    n_trials: int,
    alpha: float,
    seed: int,
    bases: Mapping[str, Settings] | None = None,
    methods: Sequence[str] = one_class.METHODS,
    device: str = "cpu",
) -> Loop:
    """The detectors of notebook 03; features and searches come from its caches where it has run.

    Args:
        dataset: from :func:`helpers.data.manifest.open_dataset`.
        models: see :class:`Loop`.
        checkpoint_dir: method -> folder, ``profile.checkpoint_dir``.
        n_anomalies, n_trials, alpha, seed, bases, device: as notebook 03 gives them to
            :func:`helpers.clip.methods.trainings` and :func:`helpers.clip.methods.fit_all`.
        methods: some of :data:`helpers.clip.one_class.METHODS`.
    """
    embedded = features.embed_samples(dataset.samples, **models)
    learn_from = clip_methods.trainings(dataset, embedded, **models, n_anomalies=n_anomalies, seed=seed)
    options = {"n_trials": n_trials, "alpha": alpha, "seed": seed, "device": device}
    fitted = {
        method: clip_methods.fit_all(
            method, learn_from, base=(bases or {}).get(method), checkpoint_dir=checkpoint_dir(method), **options
        )
        for method in methods
    }
    return Loop(dataset, models, embedded, learn_from, fitted, options)


# ------------------------------------------------------------------------------------------------- the simulated user


def simulate_user(
    loop: Loop, path: Path | str, *, n_pictures: int = 24, seed: int, judged: str | None = None
) -> FeedbackLog:
    """Write the feedback of a user who is always right, on pictures made for it: the same seed, the same feedback.

    For each painting ``n_pictures`` new photographs (:func:`marks.rephotograph`) of pictures that are not
    tested on; every second one is damaged, kinds dealt as in :func:`helpers.clip.methods.synthetic_anomalies`. The
    user sees the verdict of one detector and says correct or wrong, with label and place.

    Args:
        loop: the detectors.
        path: the log; an older simulated one is replaced. Pictures lie beside it, in ``simulated_pictures/``.
        n_pictures: pictures per painting.
        seed: of the pictures.
        judged: method whose verdict the user sees; the first of ``loop.fitted`` by default.
    Raises:
        ValueError: the log holds feedback of a real user.
    """
    path = Path(path)
    _start_anew(path)
    judged = judged or next(iter(loop.fitted))
    for category, training in loop.learn_from.items():
        made = _new_pictures(training.samples, n_pictures, synthesis.seed_for(seed, f"feedback/{category}"))
        pictures = [picture for picture, _, _ in made]
        rows = _embed(loop, pictures)
        one = loop.fitted[judged][category]
        scores = one.detector.score(rows)
        for number, ((picture, group, mask), score) in enumerate(zip(made, scores, strict=True)):
            is_anomalous, is_predicted = mask is not None, bool(score > one.threshold)
            image_path = path.parent / "simulated_pictures" / category / f"{number:03d}.png"
            images.save_png(image_path, picture)
            feedback.record(
                path,
                image_path=image_path,
                image=picture,
                verdict="correct" if is_predicted == is_anomalous else "wrong",
                label="anomalous" if is_anomalous else "normal",
                region=_cell(mask) if is_anomalous else None,
                context={
                    "simulated": True,
                    "category": category,
                    "group": group,
                    "method": judged,
                    "score": float(score),
                    "threshold": float(one.threshold),
                    "is_predicted_anomalous": is_predicted,
                },
            )
    return feedback.read(path)


def _start_anew(path: Path) -> None:
    real = [entry for entry in feedback.read(path).entries if not entry.context.get("simulated")]
    if real:
        raise ValueError(f"{path} holds {len(real)} judgements of a real user. Give the simulated ones another file.")
    path.unlink(missing_ok=True)


def _new_pictures(
    normals: Sequence[Sample], n_pictures: int, seed: int
) -> list[tuple[np.ndarray, str, np.ndarray | None]]:
    """Picture, group of its source, and mask (None when it was left whole)."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(synthesis.LOCAL_KINDS).tolist()
    made = []
    for number, index in enumerate(np.resize(rng.permutation(len(normals)), n_pictures)):
        sample = normals[index]
        picture, _ = synthesis.rephotograph(images.load_image(sample.image_path), rng)
        mask = None
        if number % 2:
            picture, mask, _ = synthesis.synthesize(picture, kinds[number // 2 % len(kinds)], rng)
        made.append((picture, sample.group, mask))
    return made


def _cell(mask: np.ndarray) -> int:
    """Cell of the 3 x 3 grid that holds most of the mask."""
    rows, columns = np.nonzero(mask)
    cells = 3 * (rows * 3 // mask.shape[0]) + columns * 3 // mask.shape[1]
    return int(np.bincount(cells, minlength=feedback.N_REGIONS).argmax())


def _embed(loop: Loop, pictures: Sequence[np.ndarray]) -> Features:
    return features.embed_images(pictures, **loop.models, patches=True, n_pictures=len(pictures))


# ------------------------------------------------------------------------------------------------- applying it


@dataclass(frozen=True)
class Outcome:
    """What feedback did.

    Attributes:
        confirmed: the pictures that were learnt from.
        refused, unused: see :class:`helpers.chat.feedback.SortedOut`.
        fitted: method -> painting -> detector after feedback; paintings without feedback keep theirs.
        table: one row per method: balanced accuracy before and after on the frozen test set, its exact paired test
            (``p_value``, and ``p_holm`` over the methods), counts, and mean image AUROC before and after.
    """

    confirmed: tuple[Confirmed, ...]
    refused: tuple[str, ...]
    unused: tuple[str, ...]
    fitted: Mapping[str, Mapping[str, Fitted]]
    table: pd.DataFrame

    def describe(self) -> str:
        """The outcome in sentences, one a line."""
        n_anomalous = sum(one.is_anomalous for one in self.confirmed)
        lines = [f"Learnt from {len(self.confirmed)} confirmed pictures, {n_anomalous} of them anomalous."]
        lines += [f"Refused: {reason}." for reason in self.refused]
        lines += [f"Not used: {reason}." for reason in self.unused]
        lines += [_sentence(method, row) for method, row in self.table.iterrows()]
        before, after = self.table["before"].mean(), self.table["after"].mean()
        lines.append(f"Mean over {len(self.table)} methods: balanced accuracy {before:.3f} before, {after:.3f} after.")
        return "\n".join(lines)


def apply_feedback(
    loop: Loop, log: FeedbackLog, *, n_trials: int | None = None, max_alpha: float = MAX_ALPHA
) -> Outcome:
    """Learn from feedback and measure it on the frozen test set, which takes no part in the learning.

    For each painting with confirmed pictures: normals join memory bank and training set, anomalies join the tuning
    (and the cross-entropy head's training) as a kind of their own; settings are searched again, detectors fitted
    again, and the threshold is placed by :func:`feedback_threshold` on pictures scored out of fold.

    Args:
        loop: the detectors before; they are left as they are.
        log: from :func:`helpers.chat.feedback.read` or :func:`simulate_user`.
        n_trials: settings tried by the new search; those of ``loop`` by default, 1 keeps each detector's settings.
        max_alpha: see :func:`feedback_threshold`.
    """
    found = feedback.sort_out(log, loop.dataset)
    after: dict[str, dict[str, Fitted]] = {method: dict(paintings) for method, paintings in loop.fitted.items()}
    for category in sorted({one.category for one in found.confirmed}):
        chosen = [one for one in found.confirmed if one.category == category]
        training = _with_feedback(loop.learn_from[category], chosen, _embed(loop, [one.picture for one in chosen]))
        for method in after:
            after[method][category] = _fit_again(
                loop, loop.fitted[method][category], method, training, n_trials, max_alpha
            )
    return Outcome(found.confirmed, found.refused, found.unused, after, _before_and_after(loop, after))


def feedback_threshold(
    normal_scores: np.ndarray, confirmed_scores: np.ndarray, *, alpha: float, max_alpha: float = MAX_ALPHA
) -> float:
    """Threshold with the highest balanced accuracy on confirmed pictures; in the middle of the gap it lies in.

    It is kept between two conformal thresholds of the normals: at most ``max_alpha`` and at least ``alpha`` of fresh
    normal pictures may be called anomalous, so that a few odd judgements cannot make a detector shout or fall silent.

    Args:
        normal_scores: float ``(n,)``, normal pictures that the detector has not seen.
        confirmed_scores: float ``(m,)``, confirmed anomalies that it has not seen.
        alpha: false-alarm rate without feedback; used alone with fewer than :data:`MIN_CONFIRMED` anomalies.
        max_alpha: highest false-alarm rate.
    Raises:
        ValueError: ``max_alpha`` is below ``alpha``.
    """
    if max_alpha < alpha:
        raise ValueError(f"max_alpha is {max_alpha}; it must be at least alpha ({alpha}).")
    careful = calibration.conformal_threshold(normal_scores, alpha)
    if len(confirmed_scores) < MIN_CONFIRMED:
        return careful
    values = np.unique(np.concatenate([normal_scores, confirmed_scores]))
    cuts = np.concatenate([(values[:-1] + values[1:]) / 2, values[-1:]])
    sensitivity = (confirmed_scores[:, None] > cuts).mean(axis=0)
    specificity = (normal_scores[:, None] <= cuts).mean(axis=0)
    balanced = np.round((sensitivity + specificity) / 2, 9)
    best = cuts[len(cuts) - 1 - balanced[::-1].argmax()]  # among equals the one with the fewest false alarms
    return float(np.clip(best, calibration.conformal_threshold(normal_scores, max_alpha), careful))


def _with_feedback(training: Training, confirmed: Sequence[Confirmed], rows: Features) -> Training:
    """The training pictures and the confirmed ones of one painting."""
    normals = [i for i, one in enumerate(confirmed) if not one.is_anomalous]
    marks = [i for i, one in enumerate(confirmed) if one.is_anomalous]
    split_of = dict(zip(training.groups, (sample.split for sample in training.samples), strict=True))
    samples = [*training.samples, *(_sample(confirmed[i], split_of, i) for i in normals)]
    # An anomaly is held out together with a normal picture: that of its own group, or any one.
    of_group = dict(zip(training.groups, training.samples, strict=True))
    turns = [sample for sample in training.samples if sample.split == "calibration"] or list(training.samples)
    sources = [of_group.get(confirmed[i].group, turns[i % len(turns)]) for i in marks]
    parts = [rows.take(marks)] if training.anomalies is None else [training.anomalies, rows.take(marks)]
    return replace(
        training,
        samples=tuple(samples),
        normals=Features.join([training.normals, rows.take(normals)]),
        anomalies=Features.join(parts) if marks else training.anomalies,
        sources=(*training.sources, *sources),
        kinds=(*training.kinds, *[CONFIRMED] * len(marks)),
    )


def _sample(one: Confirmed, split_of: Mapping[str, str], turn: int) -> Sample:
    """A confirmed normal picture: in the split of its group, else in turns to learn from and to calibrate with."""
    split = split_of.get(one.group, "calibration" if turn % 4 == 0 else "train")
    return Sample(one.image_path, one.category, False, split=split, group=one.group, sha256=one.entry.pixels_sha256)


def _fit_again(
    loop: Loop, before: Fitted, method: str, training: Training, n_trials: int | None, max_alpha: float
) -> Fitted:
    seed, device, alpha = loop.options["seed"], loop.options["device"], loop.options["alpha"]
    n_trials = loop.options["n_trials"] if n_trials is None else n_trials
    tuned = before.tuned
    if n_trials > 1:
        options = {"n_trials": n_trials, "seed": seed, "device": device, "with_nested": False}
        tuned = tuning.tune(method, training, default=before.tuned.settings, **options)
    with tuning.one_thread():
        found = one_class.calibrate(tuned.settings, training, seed=seed, device=device)
    threshold = feedback_threshold(found.normal_scores, found.confirmed_scores, alpha=alpha, max_alpha=max_alpha)
    return Fitted(tuned, found.detector, found.normal_scores, threshold, math.nan)


# ------------------------------------------------------------------------------------------------- before and after


def _before_and_after(loop: Loop, after: Mapping[str, Mapping[str, Fitted]]) -> pd.DataFrame:
    samples = loop.dataset.select(split="test")
    labels = np.array([sample.is_anomalous for sample in samples])
    rows = []
    for method, paintings in loop.fitted.items():
        old, new = (_verdicts(loop, fitted, samples) for fitted in (paintings, after[method]))
        called = [np.array([p.is_predicted_anomalous for p in found]) for found in (old, new)]
        rates = [metrics.rates(labels, predicted) for predicted in called]
        test = statistics.balanced_accuracy_test(called[1] == labels, called[0] == labels, labels)
        rows.append(
            {
                "method": method,
                "before": test.value_b,
                "after": test.value_a,
                "difference": test.difference,
                "p_value": test.p_value,
                "found before": _count(rates[0].sensitivity),
                "found after": _count(rates[1].sensitivity),
                "passed before": _count(rates[0].specificity),
                "passed after": _count(rates[1].specificity),
                "AUROC before": _mean_auroc(old),
                "AUROC after": _mean_auroc(new),
                "n_images": len(samples),
            }
        )
    table = pd.DataFrame(rows).set_index("method")
    table.insert(4, "p_holm", statistics.holm(table["p_value"]))
    return table


def _verdicts(loop: Loop, fitted: Mapping[str, Fitted], samples: Sequence[Sample]) -> list[Prediction]:
    """Verdicts on the test pictures, in their order; scores of both rounds are made the same way."""
    found = {}
    for category in loop.dataset.categories:
        chosen = [sample for sample in samples if sample.category == category]
        rows = loop.embedded.of(chosen)
        found |= {p.sample.image_path: p for p in clip_methods.predictions(fitted[category], chosen, rows)}
    return [found[sample.image_path] for sample in samples]


def _mean_auroc(predictions: Sequence[Prediction]) -> float:
    """Mean over the paintings: scores of two detectors share no scale."""
    values = []
    for category in sorted({p.sample.category for p in predictions}):
        chosen = [p for p in predictions if p.sample.category == category]
        values.append(metrics.image_auroc([p.anomaly_score for p in chosen], [p.sample.is_anomalous for p in chosen]))
    return float(np.mean(values))


def _count(rate: metrics.Rate) -> str:
    return f"{rate.successes}/{rate.n}"


def _sentence(method: str, row: pd.Series) -> str:
    numbers = (
        f"balanced accuracy {row['before']:.3f} before, {row['after']:.3f} after feedback, on {row['n_images']} frozen "
        f"test pictures (anomalies found {row['found before']} and {row['found after']}, normals passed "
        f"{row['passed before']} and {row['passed after']}; exact paired test, corrected: p = {row['p_holm']:.3f})"
    )
    if row["p_holm"] < 0.05:
        verdict = "better than luck explains" if row["difference"] > 0 else "worse than luck explains"
    else:
        verdict = "no difference that these pictures can show" if row["difference"] else "no difference"
    return f"{results.method_label(method)}: {numbers}: {verdict}."
