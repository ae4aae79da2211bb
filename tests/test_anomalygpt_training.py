"""Training of the head: pairs, resume after a kill, feedback, few pictures, what is refused."""

import contextlib
import itertools
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_anomalygpt as tiny
import torch
from failing_drive import is_killed
from safetensors.torch import load_file

from helpers import data, files, training
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt import pairs as p
from helpers.anomalygpt import training as t
from helpers.data import images
from helpers.records import Sample
from helpers.synthesis import LOCAL_KINDS

SMALL = p.HeadTraining(
    n_epochs=2, batch_size=4, micro_batch=2, n_tuning=3, patience=None, wording="short", checkpoint_every=1, seed=3
)
ONE_EPOCH = replace(SMALL, n_epochs=1, checkpoint_every=0)
STEEP = replace(ONE_EPOCH, n_epochs=3, learning_rate=1e-2, batch_size=2)


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


@pytest.fixture(scope="module")
def samples(dataset):
    return dataset.select(split="train")


@pytest.fixture()
def model():
    return tiny.talker()


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A chain with a trained head, how that went, and its folder."""
    model, folder = tiny.talker(), tmp_path_factory.mktemp("head")
    return model, t.train_head(model, dataset, folder=folder, settings=STEEP), folder


def test_pairs_depend_on_seed_epoch_and_place_only(samples):
    with pytest.raises(ValueError, match="1 test pictures"):
        p.PairDataset([*samples, replace(samples[3], split="test")], SMALL)
    first, second = (p.PairDataset(samples, SMALL) for _ in range(2))
    second.set_epoch(1)
    other = second[0]
    second.set_epoch(0)
    a, _, b = first[0], second[5], second[0]  # another place read before changes nothing
    assert (a.category, a.cells) == (b.category, b.cells) and np.array_equal(a.anomalous, b.anomalous)
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
    assert {pair.reference is None for pair in pairs} == {True, False}


def test_real_anomalies_and_confirmed_pictures_are_learnt_from(samples, tmp_path):
    pictures = np.random.default_rng(5).integers(0, 255, (4, 60, 45, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        images.save_png(tmp_path / f"{number}.png", picture)
    mask = np.zeros((60, 45), dtype=bool)
    mask[25:35, 3:8] = True
    images.save_png(tmp_path / "mask.png", mask)
    real = Sample(tmp_path / "0.png", "one", True, tmp_path / "mask.png", "train", "crack", "a", "a")
    cells = {0: "left", 1: "top left", 2: "bottom right", 3: None}  # the last is genuine
    confirmed = [p.Confirmed(tmp_path / f"{number}.png", "one", cells[number]) for number in (1, 2, 3)]
    pairs = drawn(p.PairDataset([*samples, real], SMALL, confirmed=confirmed))
    assert {pair.category for pair in pairs[1::2]} == {"one"}  # from the confirmed genuine picture
    squashed, taken = [p.squash(picture) for picture in pictures], set()
    for pair in pairs:
        for number in (n for n in range(3) if np.array_equal(pair.anomalous, squashed[n])):
            assert (pair.category, pair.cells) == ("one", (cells[number],))
            assert number == 0 or pair.mask.mean() == pytest.approx(1 / 9, abs=0.01)
            taken.add(number)
    assert 0 in taken and len(taken) > 1
    thin = np.zeros((1200, 900), dtype=bool)
    thin[:, 450] = True
    assert p.squash_mask(thin).shape == (224, 224) and p.squash_mask(thin).sum() == 224  # a crack survives


def test_sources_stay_together_and_what_is_held_out_is_not_learnt_from(dataset, samples, monkeypatch):
    damaged_view = Mock(wraps=p.damaged_view)
    monkeypatch.setattr(p, "damaged_view", damaged_view)
    grouped = [replace(s, group=f"g{i // 2}") for i, s in enumerate(samples)]
    given = (*dataset.select(split="calibration"), *grouped)
    parts = p.pairs_of(data.Dataset(dataset.folder, given, "hash", kinds_held_out=tuple(LOCAL_KINDS[1:])), SMALL)
    group_of = {s.image_path: (s.category, s.group) for s in grouped}
    learnt, tuning = ({path for path, _ in part.normals} for part in parts)
    assert learnt and tuning and learnt | tuning == {s.image_path for s in grouped}
    assert not {group_of[path] for path in learnt} & {group_of[path] for path in tuning}
    assert {category for _, category in parts[1].normals} == {"one", "two"}
    assert [len(drawn(part)) for part in parts]
    assert {call.kwargs.get("kind") for call in damaged_view.call_args_list} == {None, LOCAL_KINDS[0]}


def test_presets_are_the_report_s_and_settings_are_checked():
    assert [tuple(preset.values()) for preset in p.PRESETS.values()] == [(15, 8), (15, 16), (20, 16), (25, 16)]
    for change in ({"micro_batch": 3}, {"learning_rate": 0.0}, {"n_epochs": 0}):
        with pytest.raises(ValueError, match="must divide batch_size, and all must be positive"):
            replace(SMALL, **change)


def test_recomputing_changes_no_number_and_a_gpu_s_types_give_the_head_alone_gradients(model, samples):
    pairs, gradients = p.PairDataset(samples, SMALL), []
    batch = t.batch_of([pairs[i] for i in range(4)], model, "short")
    for inside in (contextlib.nullcontext(), t.recomputing(model.language.model)):
        model.head.zero_grad()
        with inside:
            t.head_loss(model, model.head, batch)["loss"].backward()
        gradients.append(model.head.prompt_learner.base_prompts.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    assert not model.language.model.training
    model.head.zero_grad()
    model.language.model.to(torch.bfloat16)  # as on an L4, with taps in fp16 and the head in fp32
    loss = t.head_loss(model, model.head, batch | {"taps": batch["taps"].half()})["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.head.parameters())
    assert all(w.grad is None for w in model.language.model.parameters())


def test_maps_of_another_method_make_the_prompts_others_start_anew(trained, samples, dataset, tmp_path):
    (model, _, folder), pair, maps = trained, p.PairDataset(samples, SMALL)[0], tiny.GivenMaps()
    batch = t.batch_of([pair], model, "short", maps)
    assert maps.asked == [((224, 224, 3), pair.category)] * 2
    assert torch.equal(batch["few_shot"][0], torch.from_numpy(maps.unit_map(pair.normal, "")))
    settings, heads = replace(ONE_EPOCH, max_pairs=2), [model.head.state_dict()]
    for factor in (1.0, 0.5, 0.5):  # the same again: training is complete
        second, maps = anomalygpt.with_head(model, tmp_path, folder), tiny.GivenMaps(factor)
        t.train_head(second, dataset, folder=tmp_path / "second", settings=settings, maps_from=maps)
        heads.append(second.head.state_dict())
    equal = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(heads)]
    assert equal == [False, False, True]
    second.head.zero_grad()
    t.head_loss(second, second.head, batch)["answer"].backward()
    assert not second.head.image_decoder.fc[0].weight.grad.any()  # the words do not reach the decoder's map


def test_training_lowers_the_loss_and_writes_the_head_alone_in_the_published_layout(trained):
    model, result, folder = trained
    losses, tuning = ([row[key] for row in result.history if key in row] for key in ("loss", "score"))
    assert np.mean(losses[-3:]) < 0.9 * losses[0] and result.best_score == max(tuning) and tuning[-1] > tuning[0]
    assert "loss falls from" in t.told(result)
    before = tiny.talker().language.model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.language.model.state_dict().items())
    stored, card = load_file(folder / "model.safetensors"), files.read_json(folder / "training.json")
    assert len(stored) == 21 and all(tensor.dtype == torch.float16 for tensor in stored.values())
    again = anomalygpt.AnomalyHead.from_state(stored).state_dict()
    for key, tensor in model.head.state_dict().items():
        torch.testing.assert_close(again[key], tensor, atol=2e-3, rtol=1e-3)
    assert card["kinds"] == list(LOCAL_KINDS) and card["best_epoch"] == result.best_epoch


def test_what_a_full_memory_or_a_longer_run_asks_for_is_resumed(trained, model, dataset, tmp_path):
    _, before, folder = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for change, n_epochs in (({"micro_batch": 1}, 3), ({"n_epochs": 4, "patience": 9}, 4)):
        changed = t.train_head(model, dataset, folder=tmp_path, settings=replace(STEEP, **change))
        assert changed.n_steps == before.n_steps // 3 * n_epochs
    for other in ({"learning_rate": 5e-4}, {"batch_size": 4}, {"wording": "published"}):
        with pytest.raises(ValueError, match="other settings"):
            t.train_head(model, dataset, folder=tmp_path, settings=replace(STEEP, **other))


@pytest.mark.parametrize("n", [1, 2])
def test_few_genuine_pictures_are_trained_with(model, dataset, tmp_path, n):
    few = [s for s in dataset.samples if s.split != "train" or int(s.image_path.stem[-1]) < n]
    result = t.train_head(model, data.Dataset(dataset.folder, tuple(few), "few"), folder=tmp_path, settings=ONE_EPOCH)
    assert result.n_steps >= 1 and (tmp_path / "model.safetensors").exists() and t.told(result)


def train_few_pairs(folder: Path, dataset: data.Dataset, **options) -> training.TrainingResult:
    settings = replace(SMALL, max_pairs=4, batch_size=2, micro_batch=1, n_tuning=1)
    return t.train_head(tiny.talker(), dataset, folder=folder, settings=settings, **options)


def die_at_the_second_step(checkpoint: Path) -> None:
    if checkpoint.name == "step_00000002":
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_training_resumes_bit_for_bit(dataset, tmp_path):
    dying = partial(train_few_pairs, on_checkpoint=die_at_the_second_step)
    assert is_killed(dying, tmp_path / "b", dataset, context="forkserver")
    assert not (tmp_path / "b" / "model.safetensors").exists()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads, and the killed process had one
    try:
        straight, resumed = (train_few_pairs(tmp_path / name, dataset) for name in "ab")
    finally:
        torch.set_num_threads(n_threads)
    steps = [row["step"] for row in resumed.history if "loss" in row]
    assert len(steps) > 2 and steps == list(range(1, straight.n_steps + 1))  # two of them before the kill
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
