"""What the AnomalyGPT notebooks show: training pairs, maps, answers, and curves over the number of references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers.anomalygpt import conversations
from helpers.anomalygpt.evaluation import TestRun
from helpers.anomalygpt.training import HeadTraining, PairDataset, TrainedHead
from helpers.data import images
from helpers.data import manifest as data
from helpers.judge import figures, statistics
from helpers.judge.figures import Panel
from helpers.records import Prediction, Sample


def pair_panels(samples: Sequence[Sample], settings: HeadTraining, *, n: int = 4) -> list[Panel]:
    """Some training pictures: each normal one and its simulated anomaly with the answer that is to be learnt."""
    dataset = PairDataset(samples, settings)
    panels = []
    for position in range(min(n, len(dataset))):
        pair = dataset[position]
        normal = dataset.picture(dataset.normals[pair.index])
        panels.append(Panel(normal, caption=conversations.answer(False)))
        answer = conversations.answer(pair.is_anomalous, pair.cells)
        panels.append(Panel(pair.anomalous, mask=pair.mask > 0.3, caption=answer))
    return panels


def training_summary(trained: TrainedHead) -> str:
    """First and last losses, steps and the kept epoch, in words."""
    steps = [row for row in trained.result.history if "loss" in row]
    first, last = steps[0], steps[-1]
    parts = ", ".join(f"{name} {first[name]:.2f} -> {last[name]:.2f}" for name in ("answer", "focal", "dice"))
    best = trained.result.best_score
    tuned = "without tuning pictures" if best is None else f"loss on tuning pairs {-best:.2f}"
    return (
        f"{trained.result.n_steps} steps on {trained.n_train} pairs per epoch in {last['seconds']:.0f} s: loss "
        f"{first['loss']:.2f} -> {last['loss']:.2f} ({parts}); epoch {trained.result.best_epoch} kept, {tuned}"
    )


def step_history(trained: TrainedHead) -> list[dict[str, float]]:
    """Losses by optimiser step for :func:`helpers.judge.figures.loss_curve`."""
    keep = ("step", "loss", "answer", "focal", "dice", "token_accuracy")
    renamed = {"answer": "answer_loss", "focal": "focal_loss", "dice": "dice_loss"}
    rows = [row for row in trained.result.history if "loss" in row]
    return [{renamed.get(key, key): row[key] for key in keep if key in row} for row in rows]


def map_examples(run: TestRun, category: str, *, n: int = 2) -> list[Panel]:
    """Pictures of a painting with a mask, the highest and the middle scores, then the highest normal one."""
    found = [p for p in run.result.predictions if p.sample.category == category]
    marked = sorted((p for p in found if p.sample.mask_path is not None), key=lambda p: -p.anomaly_score)
    normal = sorted((p for p in found if not p.sample.is_anomalous), key=lambda p: -p.anomaly_score)
    middle = max(0, len(marked) // 2 - n // 2)
    chosen = [*marked[: n - n // 2], *marked[middle : middle + n // 2], *normal[:1]]
    return [_panel(run, prediction) for prediction in chosen]


def shot_points(run: TestRun, metric: str) -> dict[str, dict[int, list[float]]]:
    """category -> shots -> values of all draws, for :func:`helpers.judge.figures.shots_curve`."""
    chosen = run.evaluation[(run.evaluation["metric"] == metric) & (run.evaluation["control"] == "none")]
    points: dict[str, dict[int, list[float]]] = {}
    for row in chosen.itertuples():
        points.setdefault(row.category, {}).setdefault(int(row.shots), []).append(float(row.value))
    return points


def sentences(run: TestRun, *, n: int = 6) -> pd.DataFrame:
    """Up to ``n`` full answers beside what is true: at most half of them wrong ones, then right ones, anomalies first.

    The paintings take turns.
    """
    chosen = run.answers[run.answers["is_sentence"].astype(str) == "True"]
    is_anomalous = chosen["is_anomalous"].astype(str) == "True"
    is_right = chosen["verdict"] == np.where(is_anomalous, "yes", "no")
    table = chosen.assign(
        truth=np.where(is_anomalous, "anomalous", "normal"),
        place_right=chosen["place_is_right"].map(lambda value: "-" if pd.isna(value) or value == "" else str(value)),
    )[["category", "truth", "answer", "verdict", "place_right"]]
    parts = [table[~is_right], table[is_right & is_anomalous], table[is_right & ~is_anomalous]]
    wrong, *right = (part.iloc[part.groupby("category").cumcount().argsort(kind="stable")] for part in parts)
    return pd.concat([wrong.head(n // 2), *right]).head(n).reset_index(drop=True)


def answer_table(run: TestRun) -> pd.DataFrame:
    """Accuracy of the answers per painting and number of references, with interval, bias and the trivial rule."""
    rows = []
    for (category, shots), group in run.answers.groupby(["category", "shots"], sort=False):
        labels = (group["is_anomalous"].astype(str) == "True").tolist()
        counted = conversations.score_answers(group["answer"].astype(str).tolist(), labels)
        low, high = statistics.wilson(counted.n_correct, counted.n)
        rows.append(
            {
                "painting": figures.category_label(category),
                "references": shots,
                "right answers": f"{counted.n_correct} of {counted.n}",
                "accuracy %": round(100 * counted.accuracy, 1),
                "95 % interval": f"{100 * low:.0f} to {100 * high:.0f}",
                "unparseable": counted.n_unparseable,
                "too many yes %": round(100 * counted.yes_bias, 1),
                "always anomaly %": round(100 * counted.n_anomalous / counted.n, 1),
            }
        )
    return pd.DataFrame(rows)


def _panel(run: TestRun, prediction: Prediction) -> Panel:
    image = images.load_image(prediction.sample.image_path)
    mask = data.mask_of(prediction.sample, image.shape[:2])
    label = "normal" if not prediction.sample.is_anomalous else prediction.sample.kind.replace("_", " ")
    caption = f"{label}: “{prediction.answer}”"
    return Panel(image, mask=mask, anomaly_map=run.result.anomaly_map(prediction), caption=caption)
