"""The notebooks just run reach the quality of the recorded run: runs after them, on what they wrote."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import record_results as readme
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers import files, profiles, results
from helpers.judge import comparison
from helpers.weights import WeightFileError, llama, talk

# Methods, of which the best counts -> metric -> goal for each painting with the weights that mini ships.
GOALS = {
    ("clip_patch_knn",): {"image_auroc": 0.85},
    ("clip_lof", "clip_isolation_forest"): {"image_auroc": 0.85},
    ("anomalyclip",): {"image_auroc": 0.75, "pixel_auroc": 0.80},
    ("anomalygpt",): {"pixel_auroc": 0.80},
    ("aligned",): {"image_auroc": 0.975, "pixel_auroc": 0.975, "aupro": 0.85},
    ("dinov2_memory",): {"image_auroc": 0.96, "pixel_auroc": 0.97, "aupro": 0.80},
    ("dinov2_subspace",): {"image_auroc": 0.94, "pixel_auroc": 0.95},
}
# Goals that the recorded run does not reach, with what it reaches. The goals were set on dataset c4cb28aeef77; that of
# today has marks with grain and two more kinds. Nothing was tuned on its test pictures to make up for it. AnomalyCLIP
# finds the portrait's marks as before (0.86, was 0.87); whole pictures are 10 of 34 (were 8), at 0.27 (were at 0.50).
MISSED = {
    ("anomalyclip", "portrait_in_orange", "image_auroc"): 0.689,
    ("aligned", "portrait_in_orange", "image_auroc"): 0.971,
    ("aligned", "still_life_with_coffee", "image_auroc"): 0.974,
    ("dinov2_memory", "portrait_in_orange", "pixel_auroc"): 0.956,
    ("dinov2_memory", "portrait_in_orange", "aupro"): 0.760,
    ("dinov2_subspace", "portrait_in_orange", "pixel_auroc"): 0.938,
}
TOLERANCE = 0.08
"""Other processors and library versions round otherwise, which moves scores, searches and, a little, ranks."""
RECORDED = comparison.read(readme.RECORDED)
DETECTORS = [method for method in dict.fromkeys(RECORDED.method) if method != comparison.ALWAYS]


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    return comparison.read(profiles.active().report_dir / "comparison.csv")


def _value(table: pd.DataFrame, method: str, category: str, metric: str) -> float:
    return comparison.numbers(table)[method, category, "all", metric]["value"]


def test_recorded_run_misses_only_the_goals_that_are_said_to_be_missed() -> None:
    """A run that misses others cannot become the record that others are measured by."""
    missed = {}
    for methods, goals in GOALS.items():
        for category in set(RECORDED["category"]) - {"all"}:
            for metric, goal in goals.items():
                best = max(_value(RECORDED, method, category, metric) for method in methods)
                if best < goal:
                    missed[methods[0], category, metric] = best
    assert missed == pytest.approx(MISSED, abs=0.001)


def test_a_language_model_with_queries_and_keys_in_meta_s_order_does_not_talk(tmp_path: Path) -> None:
    """That of notebook 01 does: its own cell has seen to it."""
    vicuna, wrong = profiles.active().weights_dir / "vicuna", tmp_path / "wrong"
    tokenizer = AutoTokenizer.from_pretrained(vicuna)
    text = "### Human: Is there any anomaly?\n### Assistant: In 1503, café ✓"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("1503").input_ids) == 4, "SmolLM cuts numbers into digits"
    order = torch.argsort(llama.halves_first(torch.arange(64.0)[:, None], 64)[:, 0])
    shutil.copytree(vicuna, wrong, copy_function=os.link)
    for path in wrong.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
            tensors[name] = tensors[name].reshape(-1, 64, 576)[:, order].reshape(tensors[name].shape).contiguous()
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeightFileError, match=r"does not talk sensibly.*nats per token.*wrong order"):
        talk.self_test(wrong, device="cpu")


def test_answers_are_no_habit() -> None:
    """Always yes and always no have a balanced accuracy of 0.5; the recorded run has 0.74."""
    folder = profiles.active().results_dir("anomalygpt")
    says = files.read_json(folder / "manifest.json")["answers_say"]
    rows = pd.read_csv(folder / "predictions.csv")
    said_yes = rows["image_path"].map(lambda path: says[path] is True)
    is_anomalous = rows["is_anomalous"]
    assert (said_yes[is_anomalous].mean() + 1 - said_yes[~is_anomalous].mean()) / 2 > 0.74 - TOLERANCE


@pytest.mark.parametrize("method", DETECTORS)
def test_every_method_finds_and_marks_anomalies_of_one_dataset_as_recorded(fresh: pd.DataFrame, method: str) -> None:
    look = comparison.numbers(RECORDED)
    assert set(fresh["method"]) == set(results.METHODS) and fresh["dataset_hash"].nunique() == 1
    for category in sorted(set(RECORDED["category"])):
        for metric in ("image_auroc", "pixel_auroc", "aupro"):
            if (method, category, "all", metric) in look and (metric == "image_auroc" or category == "all"):
                now, then = (_value(table, method, category, metric) for table in (fresh, RECORDED))
                assert now > then - TOLERANCE, f"{category}: {metric} fell from {then:.3f} to {now:.3f}"
