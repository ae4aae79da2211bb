"""Training of the head: pairs, resume after a kill, feedback, few pictures, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_anomalygpt as tiny
import torch
from safetensors.torch import load_file

from helpers import data, files
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt import pairs as p
from helpers.anomalygpt import training as t
from helpers.data import images
from helpers.records import Sample
from helpers.synthesis import LOCAL_KINDS

SMALL = p.HeadTraining(
    n_epochs=2, batch_size=4, micro_batch=2, n_tuning=3, patience=None, wording=None, checkpoint_every=1, seed=3
)
ONE_EPOCH = dataclasses.replace(SMALL, n_epochs=1, checkpoint_every=0)


def fresh() -> anomalygpt.AnomalyGPT:
    return tiny.talkative(tiny.build(tiny.FIXTURE)[0])


def drawn(dataset: p.PairDataset) -> list[p.Pair]:
    """The pairs of two epochs."""
    pairs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        pairs += [dataset[i] for i in range(len(dataset))]
    return pairs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("pictures"))


@pytest.fixture()
def samples(dataset):
    return dataset.select(split="train")


@pytest.fixture()
def model():
    return fresh()


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A chain whose head was trained for an epoch, how that went, and its folder."""
    model, folder = fresh(), tmp_path_factory.mktemp("head")
    return model, t.train_head(model, dataset, folder=folder, settings=ONE_EPOCH), folder


def test_pairs_depend_on_seed_epoch_and_place_only(samples):
    with pytest.raises(ValueError, match="1 test pictures"):
        p.PairDataset([*samples, dataclasses.replace(samples[3], split="test")], SMALL)
    first, second = (p.PairDataset(samples, SMALL) for _ in range(2))
    second.set_epoch(1)
    other = second[0]
    second.set_epoch(0)
    [second[i] for i in (5, 2)]  # other places read before change nothing
    a, b = first[0], second[0]
    assert a.category == b.category and a.cells == b.cells
    np.testing.assert_array_equal(a.anomalous, b.anomalous)
    assert not np.array_equal(a.anomalous, other.anomalous)


def test_pairs_are_visible_and_named_where_they_are(samples):
    pairs = drawn(p.PairDataset(samples, SMALL))
    assert sorted(pair.category for pair in pairs) == sorted(s.category for s in samples * 2)
    for pair in pairs:
        assert pair.cells and pair.mask.shape == (224, 224)
        assert [answer.split(",")[0] for answer in pair.answers] == ["No", "Yes"]
        changed = np.abs(pair.anomalous.astype(int) - pair.normal).sum(axis=-1) > 0
        assert changed[pair.mask > 0.3].mean() > 0.25  # dots lie inside their mask, they do not fill it
        assert pair.reference is None or not np.array_equal(pair.reference, pair.normal)
    assert any(pair.reference is None for pair in pairs) and any(pair.reference is not None for pair in pairs)


def test_kinds_that_are_held_out_are_not_learnt_from(dataset, monkeypatch):
    seen, damaged_view = [], p.damaged_view

    def spy(picture, *, seed, kind=None):
        seen.append(kind)
        return damaged_view(picture, seed=seed, kind=kind)

    monkeypatch.setattr(p, "damaged_view", spy)
    for pairs in p.pairs_of(dataclasses.replace(dataset, kinds_held_out=tuple(LOCAL_KINDS[1:])), SMALL):
        drawn(pairs)
    assert set(seen) == {None, LOCAL_KINDS[0]}


def test_real_anomalies_with_masks_are_learnt_from(samples, tmp_path):
    picture = images.load_image(samples[0].image_path)
    picture[30:50, 20:40] = 255
    mask = np.zeros(picture.shape[:2], dtype=bool)
    mask[30:50, 20:40] = True
    images.save_png(tmp_path / "a.png", picture)
    images.save_png(tmp_path / "a_mask.png", mask)
    real = Sample(tmp_path / "a.png", "one", True, tmp_path / "a_mask.png", "train", "crack", "a", "a")
    pairs = drawn(p.PairDataset([*samples, real], SMALL))
    taken = [pair for pair in pairs if np.array_equal(pair.anomalous, p.squash(picture))]
    assert taken and all(pair.category == "one" and pair.cells == ("left",) for pair in taken)


def test_thin_cracks_survive_the_shrinking():
    mask = np.zeros((1200, 900), dtype=bool)
    mask[:, 450] = True
    assert p.squash_mask(mask).shape == (224, 224) and p.squash_mask(mask).sum() == 224


def test_sources_stay_together_and_pictures_that_set_thresholds_are_not_trained_on(dataset):
    grouped = [dataclasses.replace(s, group=f"g{i // 2}") for i, s in enumerate(dataset.select(split="train"))]
    held_out = dataset.select(split="calibration")
    parts = p.pairs_of(data.Dataset(dataset.folder, (*held_out, *grouped), "hash"), SMALL)
    group_of = {s.image_path: (s.category, s.group) for s in grouped}
    learnt, tuning = ({path for path, _ in part.normals} for part in parts)
    assert learnt and tuning and learnt | tuning == {s.image_path for s in grouped}
    assert not {group_of[path] for path in learnt} & {group_of[path] for path in tuning}
    assert {category for _, category in parts[1].normals} == {"one", "two"}


def test_presets_are_the_report_s_and_settings_are_checked():
    assert [tuple(preset.values()) for preset in p.PRESETS.values()] == [(15, 8), (15, 16), (20, 16), (25, 16)]
    for change in ({"micro_batch": 3}, {"learning_rate": 0.0}, {"n_epochs": 0}):
        with pytest.raises(ValueError, match="must divide batch_size, and all must be positive"):
            dataclasses.replace(SMALL, **change)


def test_gradient_checkpointing_changes_no_number(model, samples):
    pairs = p.PairDataset(samples, SMALL)
    batch, gradients = t.batch_of([pairs[0], pairs[1]], model, None), []
    for inside in (contextlib.nullcontext(), t.recomputing(model.language.model)):
        model.head.zero_grad()
        with inside:
            t.head_loss(model, model.head, batch)["loss"].backward()
        gradients.append(model.head.prompt_learner.base_prompts.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    assert not model.language.model.training


def test_a_map_of_another_method_makes_the_prompts(model, samples):
    pair, maps = p.PairDataset(samples, SMALL)[0], tiny.GivenMaps()
    batch = t.batch_of([pair], model, None, maps)
    assert maps.asked == [((224, 224, 3), pair.category)] * 2
    assert torch.equal(batch["few_shot"][0], torch.from_numpy(maps.unit_map(pair.normal, "")))
    t.head_loss(model, model.head, batch)["answer"].backward()
    assert not model.head.image_decoder.fc[0].weight.grad.any()  # the words do not reach the decoder's map


def test_on_a_gpu_s_types_the_head_alone_gets_gradients(model, samples):
    """As on an L4: taps in fp16, the language model in bf16, the head in fp32."""
    pairs = p.PairDataset(samples, SMALL)
    batch = t.batch_of([pairs[i] for i in range(4)], model, None)
    model.language.model.to(torch.bfloat16)
    losses = t.head_loss(model, model.head, batch | {"taps": batch["taps"].half()})
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32 and losses["loss"].isfinite()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.head.parameters())
    assert all(w.grad is None for w in model.language.model.parameters())


def test_training_lowers_the_loss_and_moves_the_head_alone(model, dataset, tmp_path):
    settings = dataclasses.replace(ONE_EPOCH, n_epochs=6, learning_rate=3e-3)
    frozen = {name: w.clone() for name, w in model.language.model.named_parameters()}
    result = t.train_head(model, dataset, folder=tmp_path, settings=settings)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    tuning = [row["score"] for row in result.history if "score" in row]
    assert result.best_score == max(tuning) and tuning[-1] > tuning[0] and "loss falls from" in t.told(result)
    assert all(torch.equal(frozen[name], w) for name, w in model.language.model.named_parameters())


def test_the_published_layout_is_exported(trained):
    model, result, folder = trained
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == 21 and all(tensor.dtype == torch.float16 for tensor in stored.values())
    again = anomalygpt.AnomalyHead.from_state(stored)
    for key, tensor in model.head.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, atol=2e-3, rtol=1e-3)
    card = files.read_json(folder / "training.json")
    assert card["kinds"] == list(LOCAL_KINDS) and card["best_epoch"] == result.best_epoch


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"n_epochs": 2, "patience": 3}])
def test_what_a_full_memory_or_a_longer_run_asks_for_is_resumed(trained, model, dataset, tmp_path, change):
    _, before, folder = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    changed = t.train_head(model, dataset, folder=tmp_path, settings=dataclasses.replace(ONE_EPOCH, **change))
    assert changed.n_steps == before.n_steps * change.get("n_epochs", 1)
    for other in ({"learning_rate": 5e-4}, {"batch_size": 2}, {"wording": "short"}):
        with pytest.raises(ValueError, match="other settings"):
            t.train_head(model, dataset, folder=tmp_path, settings=dataclasses.replace(ONE_EPOCH, **other))


@pytest.mark.parametrize("n", [1, 2])
def test_few_genuine_pictures_are_trained_with(model, dataset, tmp_path, n):
    few = [s for s in dataset.samples if s.split != "train" or int(s.image_path.stem[-1]) < n]
    result = t.train_head(model, data.Dataset(dataset.folder, tuple(few), "few"), folder=tmp_path, settings=ONE_EPOCH)
    assert result.n_steps >= 1 and (tmp_path / "model.safetensors").exists() and t.told(result)


SCRIPT = """
import sys, os, signal
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
import test_anomalygpt_training as me
def die_at(path):
    if path.name == {kill_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
dataset = me.tiny.write_dataset(Path({pictures!r}))
me.t.train_head(me.fresh(), dataset, folder=Path({target!r}), settings=me.SMALL, on_checkpoint=die_at)
"""


def test_killed_training_resumes_bit_for_bit(tmp_path):
    here, target = Path(__file__).parent, tmp_path / "killed"
    (tmp_path / "pictures").mkdir()
    dataset = tiny.write_dataset(tmp_path / "pictures")
    names = {"root": str(here.parent), "tests": str(here), "pictures": str(dataset.folder), "target": str(target)}
    script = SCRIPT.format(kill_at="step_00000002", **names)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (target / "model.safetensors").exists()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: sums depend on the number of threads
    try:
        for name in ("straight", "killed"):
            result = t.train_head(fresh(), dataset, folder=tmp_path / name, settings=SMALL)
    finally:
        torch.set_num_threads(n_threads)
    steps = [row["step"] for row in result.history if "loss" in row]
    assert len(steps) > 2 and steps == list(range(1, result.n_steps + 1))  # two of them before the kill
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed"))
    for key in straight:
        assert torch.equal(straight[key], resumed[key]), key


@pytest.fixture()
def confirmed(tmp_path):
    random, found = np.random.default_rng(5), []
    for number, cell in enumerate(("top left", "bottom right", None)):
        images.save_png(tmp_path / f"own_{number}.png", random.integers(0, 255, (50, 40, 3), dtype=np.uint8))
        found.append(p.Confirmed(tmp_path / f"own_{number}.png", "one", cell))
    return found


def test_confirmed_pictures_take_part_with_their_place(samples, confirmed):
    pairs = drawn(p.PairDataset(samples, SMALL, confirmed=confirmed))
    assert {pair.category for pair in pairs[1::2]} == {"one"}  # from the confirmed genuine picture
    own = [p.squash(images.load_image(one.image_path)) for one in confirmed[:2]]
    taken = [pair for pair in pairs if any(np.array_equal(pair.anomalous, picture) for picture in own)]
    assert taken and {pair.category for pair in taken} == {"one"}
    for pair in taken:
        assert pair.cells in (("top left",), ("bottom right",))
        assert pair.mask.mean() == pytest.approx(1 / 9, abs=0.01)


def test_the_head_learns_from_feedback(model, dataset, confirmed, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    settings, head = dataclasses.replace(ONE_EPOCH, max_pairs=4, n_tuning=0), tmp_path / "head"
    result = t.learn_from_feedback(model, dataset, confirmed, folder=head, settings=settings)
    assert result.n_steps == 1 and len(list(head.glob("*/model.safetensors"))) == 1
    assert any(not tensor.equal(before[name]) for name, tensor in model.head.state_dict().items())
    t.learn_from_feedback(model, dataset, confirmed[:2], folder=head, settings=settings)
    assert len(list(head.glob("*/model.safetensors"))) == 2  # other feedback is another run


def test_a_second_head_learns_from_another_map(trained, dataset, tmp_path):
    model, _, folder = trained
    settings, heads = dataclasses.replace(ONE_EPOCH, max_pairs=2), [model.head.state_dict()]
    for factor in (1.0, 0.5, 0.5):  # other maps: training starts anew; the same: it is complete
        second = anomalygpt.with_head(model, tmp_path, folder)
        about = {"settings": settings, "maps_from": tiny.GivenMaps(factor)}
        t.train_head(second, dataset, folder=tmp_path / "second", **about)
        heads.append(second.head.state_dict())
    equal = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(heads)]
    assert equal == [False, False, True]
