"""Training of the head: pairs, resume after a kill, feedback, few pictures, what is refused."""

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

from helpers import data, training
from helpers.anomalygpt import language
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt import pairs as p
from helpers.anomalygpt import training as t
from helpers.data import images
from helpers.records import Sample
from helpers.synthesis import LOCAL_KINDS

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
SMALL = p.HeadTraining(
    n_epochs=2, batch_size=4, micro_batch=2, n_tuning=3, patience=None, wording=None, checkpoint_every=1, seed=3
)


def make_dataset(folder: Path, *, n: int = 6, held_out: tuple[str, ...] = ()) -> data.Dataset:
    """n small textured pictures of each of two paintings, not square; one test picture."""
    random, samples = np.random.default_rng(0), []
    for number in range(2 * n):
        small = random.integers(40, 220, (9, 7, 3), dtype=np.uint8)
        path = folder / f"{number:02d}.png"
        images.save_png(path, small.repeat(9, axis=0).repeat(8, axis=1))
        samples.append(Sample(path, f"painting_{number % 2}", False, split="train", group=path.stem, sha256=path.stem))
    images.save_png(folder / "test.png", images.load_image(folder / "00.png")[::-1])
    samples.append(Sample(folder / "test.png", "painting_0", False, group="test"))
    return data.Dataset(folder, tuple(samples), "hash", kinds_held_out=held_out)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pictures"))


@pytest.fixture()
def samples(dataset):
    return dataset.select(split="train")


@pytest.fixture()
def model():
    return tiny.talkative(tiny.build(FIXTURE)[0])


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_depend_on_seed_epoch_and_place_only(samples):
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
    dataset = p.PairDataset(samples, SMALL)
    pairs = [dataset[i] for i in range(len(dataset))]
    assert sorted(pair.category for pair in pairs) == sorted(s.category for s in samples)
    for pair in pairs:
        assert pair.is_anomalous and pair.cells and pair.mask.shape == (224, 224)
        changed = np.abs(pair.anomalous.astype(int) - pair.normal).sum(axis=-1) > 0
        assert changed[pair.mask > 0.3].mean() > 0.25  # dots lie inside their mask, they do not fill it
        assert pair.reference is None or not np.array_equal(pair.reference, pair.normal)
    assert any(pair.reference is None for pair in pairs) and any(pair.reference is not None for pair in pairs)


def test_kinds_that_are_held_out_are_not_learnt_from(tmp_path, model, monkeypatch):
    held_out = tuple(LOCAL_KINDS[1:])
    seen = []

    def spy(picture, *, seed, kind=None):
        seen.append(kind)
        return damaged_view(picture, seed=seed, kind=kind)

    damaged_view = p.damaged_view
    monkeypatch.setattr(p, "damaged_view", spy)
    settings = dataclasses.replace(SMALL, n_epochs=1, checkpoint_every=0)
    dataset = make_dataset(tmp_path, held_out=held_out)
    t.train_head(model, dataset, folder=tmp_path / "run", settings=settings)
    assert set(seen) == {None, LOCAL_KINDS[0]}
    from helpers import files

    assert files.read_json(tmp_path / "run" / "training.json")["kinds"] == [LOCAL_KINDS[0]]


def test_real_anomalies_with_masks_are_learnt_from(samples, tmp_path):
    picture = images.load_image(samples[0].image_path)
    picture[30:50, 20:40] = 255
    mask = np.zeros(picture.shape[:2], dtype=bool)
    mask[30:50, 20:40] = True
    images.save_png(tmp_path / "a.png", picture)
    images.save_png(tmp_path / "a_mask.png", mask)
    real = Sample(tmp_path / "a.png", "painting_0", True, tmp_path / "a_mask.png", "train", "crack", "a", "a")
    dataset = p.PairDataset([*samples, real], SMALL)
    taken = [pair for pair in map(dataset.__getitem__, range(12)) if np.array_equal(pair.anomalous, p.squash(picture))]
    assert taken and all(pair.category == "painting_0" and pair.cells == ("center",) for pair in taken)


def test_thin_cracks_survive_the_shrinking():
    mask = np.zeros((1200, 900), dtype=bool)
    mask[:, 450] = True
    assert p.squash_mask(mask).shape == (224, 224) and p.squash_mask(mask).sum() == 224
    enlarged = p.squash_mask(mask[:100, 400:500])
    assert enlarged.sum() >= 224 and set(np.unique(enlarged)) == {0.0, 1.0}


def test_test_pictures_are_refused(samples):
    samples[3] = dataclasses.replace(samples[3], split="test")
    with pytest.raises(ValueError, match="1 test pictures"):
        p.PairDataset(samples, SMALL)


def test_tuning_keeps_sources_together(dataset):
    grouped = [dataclasses.replace(s, group=f"g{i // 4}") for i, s in enumerate(dataset.select(split="train"))]
    learnt, tuning = t.training_samples(data.Dataset(dataset.folder, tuple(grouped), "hash"))
    assert learnt and tuning and len(learnt) + len(tuning) == 8  # four set thresholds
    assert not {(s.category, s.group) for s in learnt} & {(s.category, s.group) for s in tuning}
    assert {s.category for s in tuning} == {"painting_0", "painting_1"}


def test_pictures_that_set_thresholds_are_not_trained_on(dataset):
    learnt_from, held_out = t.normals_of(dataset, "painting_0")  # without a calibration split, as industrial folders
    assert len(learnt_from) == 4 and len(held_out) == 2
    used = {s.image_path for part in t.training_samples(dataset) for s in part}
    assert not {s.image_path for s in held_out} & used


def test_presets_are_the_report_s():
    assert list(p.PRESETS.values()) == [(15, 8), (15, 16), (20, 16), (25, 16)]
    assert p.from_preset("15x8").learning_rate == 1e-3
    with pytest.raises(ValueError, match="15x8"):
        p.from_preset("15x9")


@pytest.mark.parametrize(("change", "word"), [({"micro_batch": 3}, "divide"), ({"learning_rate": 0.0}, "positive")])
def test_settings_are_checked(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(SMALL, **change)


def test_schedule_warms_up_and_decays():
    factors = [t.warm_up_and_decay(step, n_steps=100) for step in range(101)]
    assert factors[9] == 1.0 and factors[100] == 0.0 and factors[55] == pytest.approx(0.5)
    assert all(a < b for a, b in itertools.pairwise(factors[:10]))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_question_that_fills_the_length_is_refused(model):
    with pytest.raises(ValueError, match="nothing is left for an answer"):
        t.question_and_answer(model.language.tokens, "word " * 1024, "No.")


def test_accumulation_gives_the_gradient_of_equal_parts(model, samples):
    dataset, collate = p.PairDataset(samples, SMALL), t.Collate(model, None)
    pixels = [t.head_loss(model, model.head, collate([dataset[i]]))["focal"] for i in range(2)]
    both = t.head_loss(model, model.head, collate([dataset[0], dataset[1]]))["focal"]
    torch.testing.assert_close(both, sum(pixels) / 2)


def test_gradient_checkpointing_changes_no_number(model, samples):
    dataset = p.PairDataset(samples, SMALL)
    batch = t.Collate(model, None)([dataset[0], dataset[1]])
    gradients = []
    for checkpointing in (False, True):
        t._recompute(model.language.model, checkpointing)
        model.head.zero_grad()
        t.head_loss(model, model.head, batch)["loss"].backward()
        gradients.append(model.head.prompt_learner.base_prompts.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_a_map_of_another_method_makes_the_prompts(model, samples):
    dataset = p.PairDataset(samples, SMALL)
    asked = []

    def map_of(picture, category):
        asked.append((picture.shape, category))
        return np.full((224, 224), 0.25, dtype=np.float32)

    batch = t.Collate(model, None, map_of)([dataset[0]])
    assert asked == [((224, 224, 3), dataset[0].category)] * 2
    assert batch["few_shot"].shape == (2, 224, 224) and float(batch["few_shot"].max()) == 0.25
    t.head_loss(model, model.head, batch)["answer"].backward()
    assert not model.head.image_decoder.fc[0].weight.grad.any()  # the words do not reach the decoder's map


def test_a_step_at_true_width_moves_the_head_alone():
    """Sizes and types of an L4: taps in fp16, a language model of width 4096 in bf16 (one block), the head in fp32."""
    from test_anomalygpt import published_head
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def tiled(shape: torch.Size) -> torch.Tensor:  # random numbers at the speed of a copy
        return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].reshape(shape)

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32001, **sizes)).to(torch.bfloat16)
    llama = llama.to_empty(device="cpu").requires_grad_(False)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=llama.config)  # angles are no weights
    for parameter in llama.parameters():
        parameter.copy_(tiled(parameter.shape) if parameter.ndim == 2 else torch.ones(parameter.shape))
    head = anomalygpt.AnomalyHead.from_state({k: tiled(v.shape) for k, v in published_head(4096).items()})
    tokens = language.ChatTokens(lambda text: [5, 6, 7], str, 1, 2, 0, frozenset(), 3, 4)
    tower = type("Tower", (), {"grid": (16, 16)})()
    projection, speaker = torch.nn.Linear(1024, 4096), language.Language(llama, tokens)
    text = torch.nn.functional.normalize(torch.randn(2, 1024), dim=-1)
    model = anomalygpt.AnomalyGPT(tower, head, projection.requires_grad_(False), speaker, text)
    ids = torch.tensor([[8, 9, 10, 11], [8, 9, 10, 0]])
    batch = {
        "embedding": torch.randn(2, 1024), "taps": torch.randn(4, 2, 256, 1280).half(), "ids": ids,
        "masks": torch.zeros(2, 224, 224), "targets": torch.where(ids > 9, ids, t.IGNORED),
        "few_shot": torch.stack([torch.rand(16, 16), torch.full((16, 16), float("nan"))]),
    }  # fmt: skip
    losses = t.head_loss(model, head, batch)
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32 and losses["loss"].isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())
    assert all(parameter.grad is None for parameter in llama.parameters())


# --- the run ---------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_exports_the_published_layout(model, dataset, tmp_path):
    settings = dataclasses.replace(SMALL, n_epochs=6, learning_rate=3e-3, checkpoint_every=0)
    frozen = {name: w.clone() for name, w in model.language.model.named_parameters()}
    result = t.train_head(model, dataset, folder=tmp_path, settings=settings)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    tuning = [row["score"] for row in result.history if "score" in row]
    assert result.best_score == max(tuning) and tuning[-1] > tuning[0]
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) == 21 and all(tensor.dtype == torch.float16 for tensor in stored.values())
    again = anomalygpt.AnomalyHead.from_state(stored)
    for key, tensor in model.head.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, atol=2e-3, rtol=1e-3)
    assert all(torch.equal(frozen[name], w) for name, w in model.language.model.named_parameters())


def test_nan_loss_stops_and_keeps_the_last_checkpoint(model, dataset, tmp_path):
    with torch.no_grad():
        model.head.prompt_learner.base_prompts[0, 0] = float("nan")
    with pytest.raises(training.TrainingStopped, match="not finite"):
        t.train_head(model, dataset, folder=tmp_path, settings=SMALL)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"n_epochs": 2}, {"patience": 3}])
def test_what_a_full_memory_or_a_longer_run_asks_for_is_resumed(dataset, tmp_path, change):
    one_epoch = dataclasses.replace(SMALL, n_epochs=1)
    model = tiny.talkative(tiny.build(FIXTURE)[0])
    n_steps = t.train_head(model, dataset, folder=tmp_path, settings=one_epoch).n_steps
    model = tiny.talkative(tiny.build(FIXTURE)[0])
    changed = t.train_head(model, dataset, folder=tmp_path, settings=dataclasses.replace(one_epoch, **change))
    assert changed.n_steps == n_steps * change.get("n_epochs", 1)


@pytest.mark.parametrize("change", [{"learning_rate": 5e-4}, {"batch_size": 2}, {"wording": "short"}])
def test_resume_with_other_settings_is_refused(model, dataset, tmp_path, change):
    one_epoch = dataclasses.replace(SMALL, n_epochs=1)
    t.train_head(model, dataset, folder=tmp_path, settings=one_epoch)
    with pytest.raises(ValueError, match="other settings"):
        t.train_head(model, dataset, folder=tmp_path, settings=dataclasses.replace(one_epoch, **change))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_genuine_pictures_are_trained_with(model, tmp_path, n):
    settings = dataclasses.replace(SMALL, n_epochs=1)
    result = t.train_head(model, make_dataset(tmp_path, n=n), folder=tmp_path / "run", settings=settings)
    assert result.n_steps >= 1 and (tmp_path / "run" / "model.safetensors").exists()


SCRIPT = """
import sys, os, signal
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch; torch.set_num_threads(1)
import tiny_anomalygpt as tiny, test_anomalygpt_training as me
def die_at(path):
    if path.name == {kill_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
model = tiny.talkative(tiny.build(me.FIXTURE)[0])
pictures = Path({pictures!r})
me.t.train_head(model, me.make_dataset(pictures), folder=Path({target!r}), settings=me.SMALL, on_checkpoint=die_at)
"""


def test_killed_training_resumes_bit_for_bit(tmp_path):
    here = Path(__file__).parent
    (tmp_path / "pictures").mkdir()
    dataset = make_dataset(tmp_path / "pictures")
    target = tmp_path / "killed"
    names = {"root": str(here.parent), "tests": str(here), "pictures": str(dataset.folder), "target": str(target)}
    script = SCRIPT.format(kill_at="step_00000002", **names)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (target / "model.safetensors").exists()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: sums depend on the number of threads
    try:
        for name in ("straight", "killed"):
            fresh = tiny.talkative(tiny.build(FIXTURE)[0])
            result = t.train_head(fresh, dataset, folder=tmp_path / name, settings=SMALL)
    finally:
        torch.set_num_threads(n_threads)
    steps = [row["step"] for row in result.history if "loss" in row]
    assert len(steps) > 2 and steps == list(range(1, result.n_steps + 1))  # two of them before the kill
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed"))
    for key in straight:
        assert torch.equal(straight[key], resumed[key]), key


# --- feedback --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def confirmed(tmp_path):
    random, found = np.random.default_rng(5), []
    for number, cell in enumerate(("top left", "bottom right", None)):
        images.save_png(tmp_path / f"own_{number}.png", random.integers(0, 255, (50, 40, 3), dtype=np.uint8))
        found.append(p.Confirmed(tmp_path / f"own_{number}.png", "painting_0", cell))
    return found


def test_confirmed_pictures_take_part_with_their_place(samples, confirmed):
    dataset = p.PairDataset(samples, SMALL, confirmed=confirmed)
    pairs = [dataset[i] for i in range(12)]
    own = [p.squash(images.load_image(one.image_path)) for one in confirmed]
    genuine = [
        i for i, pair in enumerate(pairs) if np.array_equal(pair.normal, own[2]) or pair.category == "painting_0"
    ]
    assert set(range(1, 12, 2)) <= set(genuine)  # each other pair starts from the confirmed genuine picture
    taken = [pair for pair in pairs if any(np.array_equal(pair.anomalous, picture) for picture in own[:2])]
    assert taken and {pair.category for pair in taken} == {"painting_0"}
    for pair in taken:
        assert pair.cells in (("top left",), ("bottom right",))
        assert pair.mask.mean() == pytest.approx(1 / 9, abs=0.01)


def test_the_head_learns_from_feedback(model, dataset, confirmed, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    settings = dataclasses.replace(SMALL, n_epochs=1, max_pairs=4)
    result = t.learn_from_feedback(model, dataset, confirmed, folder=tmp_path / "head", settings=settings)
    assert result.n_steps == 1 and len(list((tmp_path / "head").glob("*/model.safetensors"))) == 1
    assert any(not tensor.equal(before[name]) for name, tensor in model.head.state_dict().items())
    t.learn_from_feedback(model, dataset, confirmed[:2], folder=tmp_path / "head", settings=settings)
    assert len(list((tmp_path / "head").glob("*/model.safetensors"))) == 2  # other feedback is another run


def test_feedback_never_teaches_the_test(model, dataset, confirmed, tmp_path):
    test = p.Confirmed(dataset.select(split="test")[0].image_path, "painting_0")
    for given, words in (([*confirmed, test], "1 test pictures among the 4.*test.png"), ([], "0 confirmed")):
        with pytest.raises(ValueError, match=words):
            t.learn_from_feedback(model, dataset, given, folder=tmp_path, settings=SMALL)


def test_a_second_head_learns_from_a_map_that_may_be_missing(model, dataset, tmp_path, capsys):
    def nothing(folder):
        raise FileNotFoundError("Run notebook 05.")

    assert t.map_or_say(nothing, tmp_path) is None and "Run notebook 05." in capsys.readouterr().out
    settings = dataclasses.replace(SMALL, n_epochs=1, max_pairs=2, checkpoint_every=0)
    t.train_head(model, dataset, folder=tmp_path / "first", settings=settings)
    second = anomalygpt.with_head(model, tmp_path, tmp_path / "first")
    flat = type("Fitted", (), {"unit_map": lambda self, picture, category: np.full((224, 224), 0.5, np.float32)})
    map_of = t.map_or_say(lambda folder: flat(), tmp_path)
    t.train_head(second, dataset, folder=tmp_path / "second", settings=settings, map_of=map_of)
    first = model.head.state_dict()
    assert any(not tensor.equal(first[name]) for name, tensor in second.head.state_dict().items())
