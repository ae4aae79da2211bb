"""Training of the head: samples, resume after a kill, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_anomalygpt as tiny
import torch
from safetensors.torch import load_file

from helpers import training_old as training
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt import training as t
from helpers.data import images
from helpers.records import Sample

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
SMALL = t.HeadTraining(
    n_epochs=2, batch_size=4, micro_batch=2, n_tuning=3, patience=None, wording=None, checkpoint_every=1, seed=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def make_pictures(folder: Path) -> Path:
    """Twelve small textured pictures of two paintings, not square."""
    random = np.random.default_rng(0)
    for number in range(12):
        small = random.integers(40, 220, (9, 7, 3), dtype=np.uint8)
        images.save_png(folder / f"{number:02d}.png", small.repeat(9, axis=0).repeat(8, axis=1))
    return folder


def samples_of(folder: Path) -> list[Sample]:
    paths = sorted(folder.glob("[0-9]*.png"))
    return [
        Sample(p, f"painting_{i % 2}", False, split="train", group=p.stem, sha256=p.stem) for i, p in enumerate(paths)
    ]


@pytest.fixture()
def model():
    return tiny.talkative(tiny.build(FIXTURE)[0])


def test_pairs_depend_on_seed_epoch_and_place_only(folder):
    first, second = (t.PairDataset(samples_of(folder), SMALL) for _ in range(2))
    second.set_epoch(1)
    other = second[0]
    second.set_epoch(0)
    [second[i] for i in (5, 2)]  # other places read before change nothing
    a, b = first[0], second[0]
    assert a.index == b.index and a.cells == b.cells and a.reference == b.reference
    np.testing.assert_array_equal(a.anomalous, b.anomalous)
    assert not np.array_equal(a.anomalous, other.anomalous)


def test_pairs_are_visible_and_named_where_they_are(folder):
    dataset = t.PairDataset(samples_of(folder), SMALL)
    pairs = [dataset[i] for i in range(len(dataset))]
    assert sorted(pair.index for pair in pairs) == list(range(12))  # a permutation of the pictures
    for pair in pairs:
        assert pair.is_anomalous and pair.cells
        normal = dataset.picture(dataset.normals[pair.index])
        changed = np.abs(pair.anomalous.astype(int) - normal).sum(axis=-1) > 0
        assert changed[pair.mask > 0.3].mean() > 0.3  # dots lie inside their mask, they do not fill it
        if pair.reference is not None:
            same = dataset.normals[pair.reference].category == dataset.normals[pair.index].category
            assert same and pair.reference != pair.index
    assert any(pair.reference is None for pair in pairs) and any(pair.reference is not None for pair in pairs)


def test_own_share_chooses_the_maker_of_anomalies(folder, monkeypatch):
    def not_wanted(*args, **kwargs):
        raise AssertionError("not asked for")

    monkeypatch.setattr(t.nsa, "simulate_visible", not_wanted)
    only_own = t.PairDataset(samples_of(folder), dataclasses.replace(SMALL, own_share=1.0))
    [only_own[i] for i in range(3)]
    monkeypatch.undo()
    monkeypatch.setattr(t.synthesis, "synthesize", not_wanted)
    only_nsa = t.PairDataset(samples_of(folder), dataclasses.replace(SMALL, own_share=0.0))
    [only_nsa[i] for i in range(3)]


def test_real_anomalies_with_masks_are_learnt_from(folder, tmp_path):
    picture = images.load_image(folder / "00.png")
    picture[30:50, 20:40] = 255
    mask = np.zeros(picture.shape[:2], dtype=bool)
    mask[30:50, 20:40] = True
    images.save_png(tmp_path / "a.png", picture)
    images.save_png(tmp_path / "a_mask.png", mask)
    real = Sample(tmp_path / "a.png", "painting_0", True, tmp_path / "a_mask.png", "train", "crack", "a", "a")
    dataset = t.PairDataset([*samples_of(folder), real], SMALL)
    pairs = [dataset[i] for i in range(len(dataset))]
    taken = [pair for pair in pairs if np.array_equal(pair.anomalous, t.squash(picture))]
    assert taken and all(dataset.normals[pair.index].category == "painting_0" for pair in taken)
    assert taken[0].cells == ("center",)


def test_thin_cracks_survive_the_shrinking():
    mask = np.zeros((1200, 900), dtype=bool)
    mask[:, 450] = True
    small = t.squash_mask(mask)
    assert small.shape == (224, 224) and small.sum() == 224
    enlarged = t.squash_mask(mask[:100, 400:500])
    assert enlarged.sum() >= 224 and set(np.unique(enlarged)) == {0.0, 1.0}


def test_tuning_keeps_groups_together(folder):
    samples = [dataclasses.replace(s, group=f"g{i // 4}") for i, s in enumerate(samples_of(folder))]
    learning, tuning = t.split_for_tuning(samples, 0.3)
    assert learning and tuning and len(learning) + len(tuning) == 12
    assert not {(s.category, s.group) for s in learning} & {(s.category, s.group) for s in tuning}
    assert {s.category for s in tuning} == {"painting_0", "painting_1"}


def test_schedule_warms_up_and_decays():
    factors = [t.warm_up_and_decay(step, n_steps=100, warm_up=10) for step in range(101)]
    assert factors[9] == 1.0 and factors[100] == 0.0 and factors[55] == pytest.approx(0.5)
    assert all(a < b for a, b in itertools.pairwise(factors[:10]))


def test_presets_are_the_report_s():
    assert [(p.n_epochs, p.batch_size) for p in t.PRESETS.values()] == [(15, 8), (15, 16), (20, 16), (25, 16)]
    assert all(p.learning_rate == 1e-3 and p.max_length == 1024 for p in t.PRESETS.values())
    with pytest.raises(ValueError, match="15x8"):
        t.from_preset("15x9")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"micro_batch": 3}, "divide"),
        ({"own_share": 1.5}, "share"),
        ({"learning_rate": 0.0}, "positive"),
        ({"tuning_share": 1.0}, "between"),
    ],
)
def test_settings_are_checked(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(SMALL, **change)


def test_a_question_that_fills_the_length_is_refused(model):
    with pytest.raises(ValueError, match="max_length"):
        t.question_and_answer(model.language, "word " * 50, "No.", max_length=40)


def test_test_pictures_are_refused(folder):
    samples = samples_of(folder)
    samples[3] = dataclasses.replace(samples[3], split="test")
    with pytest.raises(ValueError, match="1 test pictures"):
        t.PairDataset(samples, SMALL)


def test_nothing_but_the_head_is_trained(model):
    module = t.HeadLoss(model.head, model.language, model.projection, model.eyes.grid)
    trained = {name.removeprefix("head.") for name, p in module.named_parameters() if p.requires_grad}
    assert trained == set(model.head.state_dict()) and len(trained) == 20 + 1


def test_accumulation_gives_the_gradient_of_equal_parts(model, folder):
    dataset = t.PairDataset(samples_of(folder), dataclasses.replace(SMALL, few_shot_share=0.0))
    collate = t.Collate(model, dataset, SMALL)
    module = t.HeadLoss(model.head, model.language, model.projection, model.eyes.grid)
    pixels = [module(collate([dataset[i]]))["focal"] for i in range(2)]
    torch.testing.assert_close(module(collate([dataset[0], dataset[1]]))["focal"], sum(pixels) / 2)


def test_gradient_checkpointing_changes_no_number(model, folder):
    dataset = t.PairDataset(samples_of(folder), SMALL)
    batch = t.Collate(model, dataset, SMALL)([dataset[0], dataset[1]])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.language.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = t.HeadLoss(model.head, model.language, model.projection, model.eyes.grid).train()
        model.head.zero_grad()
        module(batch)["loss"].backward()
        gradients.append(model.head.prompt_learner.base_prompts.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_training_lowers_the_loss_and_exports_the_published_layout(model, folder, tmp_path):
    settings = dataclasses.replace(SMALL, n_epochs=6, learning_rate=3e-3, checkpoint_every=0)
    trained = t.train_head(model, samples_of(folder), folder=tmp_path, settings=settings)
    losses = [row["loss"] for row in trained.result.history if "loss" in row]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    tuning = [row["score"] for row in trained.result.history if "score" in row]
    assert trained.result.best_score == max(tuning) and tuning[-1] > tuning[0]
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) == 21 and all(tensor.dtype == torch.float16 for tensor in stored.values())
    again = anomalygpt.AnomalyHead.from_state(stored)
    for key, tensor in model.head.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, atol=2e-3, rtol=1e-3)


def test_nan_loss_stops_and_keeps_the_last_checkpoint(model, folder, tmp_path):
    with torch.no_grad():
        model.head.prompt_learner.base_prompts[0, 0] = float("nan")
    with pytest.raises(training.TrainingStopped, match="not finite"):
        t.train_head(model, samples_of(folder), folder=tmp_path, settings=SMALL)
    assert not (tmp_path / "model.safetensors").exists()


def test_resume_with_other_settings_is_refused(model, folder, tmp_path):
    one_epoch = dataclasses.replace(SMALL, n_epochs=1)
    t.train_head(model, samples_of(folder), folder=tmp_path, settings=one_epoch)
    with pytest.raises(ValueError, match="other settings"):
        changed = dataclasses.replace(one_epoch, learning_rate=5e-4)
        t.train_head(model, samples_of(folder), folder=tmp_path, settings=changed)


SCRIPT = """
import sys, os, signal
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
import tiny_anomalygpt as tiny, test_anomalygpt_training as me
from helpers import anomalygpt_training as t
def die_at(path):
    if path.name == {kill_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
model = tiny.talkative(tiny.build(me.FIXTURE)[0])
t.train_head(model, me.samples_of(Path({pictures!r})), folder=Path({target!r}), settings=me.SMALL, on_checkpoint=die_at)
"""


def test_killed_training_resumes_bit_for_bit(folder, tmp_path):
    here = Path(__file__).parent
    script = SCRIPT.format(
        root=str(here.parent), tests=str(here), kill_at="step_00000003", pictures=str(folder),
        target=str(tmp_path / "killed"),
    )  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: sums depend on the number of threads
    try:
        for name in ("straight", "killed"):
            fresh = tiny.talkative(tiny.build(FIXTURE)[0])
            trained = t.train_head(fresh, samples_of(folder), folder=tmp_path / name, settings=SMALL)
            assert trained.result.n_steps == 6
    finally:
        torch.set_num_threads(n_threads)
    steps = [row["step"] for row in trained.result.history if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]  # 3 of them before the kill, in the middle of the second epoch
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed"))
    for key in straight:
        assert torch.equal(straight[key], resumed[key]), key
