"""What mini ships for AnomalyGPT: conversations about scenes, the head's start without a language model, the files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_anomalygpt as tiny
import torch
from safetensors.torch import load_file

from helpers import anomalygpt, anomalygpt_pretraining, anomalygpt_training, checkpoints, language, scenes, standins

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"


class Maker:
    """Scenes of noise; every second one has a bright square at the top right."""

    kinds = ("box",)

    def __call__(self, *seed: int) -> scenes.Scene:
        picture = self.photographs(1, *seed)[0]
        mask = np.zeros((224, 224), bool)
        is_damaged = seed[-1] % 2 == 1
        if is_damaged:
            mask[20:60, 160:200] = True
        image = np.where(mask[..., None], np.uint8(255), picture)
        return scenes.Scene(picture, image, mask, *((0, 0, 2) if is_damaged else (-1, -1, -1)))

    def photographs(self, n: int, *seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(85, 95, (224, 224, 3), np.uint8) for _ in range(n)]


@pytest.fixture(scope="module")
def model() -> anomalygpt.AnomalyGPT:
    return tiny.talkative(tiny.build(FIXTURE)[0])


@pytest.fixture(scope="module")
def conversations(model) -> anomalygpt_pretraining.SceneConversations:
    text = model.text_pair_of("object")
    return anomalygpt_pretraining.SceneConversations(model.eyes, Maker(), model.language, text, n=6, seed=1)


def test_damaged_scenes_are_answered_with_their_place(conversations, model) -> None:
    assert conversations.labels.tolist() == [False, True] * 3
    for index, label in enumerate(conversations.labels):
        ids, targets = conversations.text(conversations[index], "short")
        said = [i for i, target in zip(ids, targets) if target != anomalygpt_training.IGNORED]
        place = model.language.tokens.encode("at the top right of the image")
        assert len(said) > 3 and (str(place[1:-1])[1:-1] in str(said)) == bool(label)


def test_image_vector_and_references_are_hidden_half_of_the_time(conversations) -> None:
    hidden, without = 0, 0
    for epoch in range(20):
        conversations.set_epoch(epoch)
        items = [conversations[i] for i in range(len(conversations))]
        hidden += sum(not item["embedding"].any() for item in items)
        without += sum(bool(item["few_shot"].isnan().all()) for item in items)
    conversations.set_epoch(0)
    assert 40 <= hidden <= 80 and 40 <= without <= 80  # of 120
    assert conversations.row(0)["embedding"].any() and conversations.row(0)["few_shot"].isfinite().all()
    again = [torch.equal(conversations[i]["embedding"], items[i]["embedding"]) for i in range(6)]
    assert not all(again)  # another epoch, another draw


def test_distance_is_large_where_the_reference_differs(conversations) -> None:
    few_shot = conversations.row(1)["few_shot"]
    inside = few_shot[2:4, 10:12].mean()
    assert inside > 1.4 * few_shot.median()


def test_shown_map_is_the_few_shot_one_where_there_is_one(conversations, model) -> None:
    items = [conversations.row(i) for i in (0, 1)]
    items[0] = items[0] | {"few_shot": torch.full_like(items[0]["few_shot"], math.nan)}
    batch = conversations.collate(items)
    probability, maps = anomalygpt_training.shown_maps(model.head, batch, model.eyes.grid)
    torch.testing.assert_close(maps[0], anomalygpt.decoder_map(probability)[0])
    corners = maps[1][[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, items[1]["few_shot"][[0, 0, -1, -1], [0, -1, 0, -1]])


def test_a_batch_has_the_wording_of_its_first_scene(conversations) -> None:
    items = [conversations[i] for i in range(6)]
    lengths = []
    for wording in anomalygpt_pretraining.WORDINGS:
        batch = conversations.collate([items[0] | {"wording": wording}, *items[1:]])
        asked = [row[0] for row in (conversations.text(item, wording) for item in items)]
        assert [row[row != 0].tolist()[:5] for row in batch["ids"]] == [ids[:5] for ids in asked]
        lengths.append(batch["ids"].shape[1])
    assert lengths[0] < lengths[1] == lengths[2] < lengths[3]  # bare, short, short, published
    drawn = []
    for epoch in range(8):
        conversations.set_epoch(epoch)
        drawn += [conversations[i]["wording"] for i in range(6)]
    conversations.set_epoch(0)
    assert set(drawn) == set(anomalygpt_pretraining.WORDINGS)


def test_cleared_map_is_high_on_the_damage_alone(conversations) -> None:
    few_shot, mask = conversations.row(1)["few_shot"], torch.zeros(224, 224, dtype=torch.bool)
    mask[:28, 98:126] = True  # in the two upper rows of patches of 14 px, not where the bright square is
    cleared = anomalygpt_pretraining.cleared(few_shot, mask)
    rows, columns = (cleared > few_shot.median()).nonzero().T
    assert set(rows.tolist()) == {0, 1} and set(columns.tolist()) == {7, 8}
    assert (cleared[:2, 7:9] > few_shot.max()).all()
    nothing = anomalygpt_pretraining.cleared(few_shot, torch.zeros_like(mask))
    assert nothing.max() == few_shot.median()


def test_some_maps_are_cleared(conversations) -> None:
    n_cleared = 0
    for epoch in range(20):
        conversations.set_epoch(epoch)
        items = [conversations[i]["few_shot"] for i in range(6)]
        n_cleared += sum(
            bool(map_.isfinite().all()) and not torch.equal(map_, conversations.row(i)["few_shot"])
            for i, map_ in enumerate(items)
        )
    conversations.set_epoch(0)
    assert 6 <= n_cleared <= 26  # an eighth of 120 is expected


def test_head_learns_words_from_masks_alone(conversations, model) -> None:
    torch.manual_seed(0)
    head = anomalygpt.AnomalyHead(model.eyes.width, model.eyes.joint_width, model.language.hidden, (4, 8, 8, 8, 8))
    words, calm = torch.randn(9, head.hidden), torch.randn(head.hidden)
    start = anomalygpt_pretraining.HeadStart(head, model.eyes.grid, words, calm)
    batch = conversations.collate([conversations.row(i) for i in range(2)])
    optimizer = torch.optim.AdamW(start.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        found = start(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in found.items()})
    assert losses[-1]["cells"] < 0.5 * losses[0]["cells"] and losses[-1]["loss"] < losses[0]["loss"]
    _, maps = anomalygpt_training.shown_maps(head, batch, model.eyes.grid)
    prompts = head.prompt_learner(maps)[1, anomalygpt.N_BASE_PROMPTS :].detach()  # of the damaged scene
    nearest = torch.cdist(prompts, torch.cat([words, calm[None]])).argmin(dim=-1)
    assert nearest[2] == 2  # the square is at the top right: "top right"
    assert (nearest[[0, 3, 4, 6, 7, 8]] == 9).all()  # "normal"


def test_words_are_the_embeddings_of_the_places(model) -> None:
    words, calm = anomalygpt_pretraining.word_vectors(model.language)
    table, encode = model.language.model.get_input_embeddings().weight, model.language.tokens.encode
    torch.testing.assert_close(words[5], table[encode(" right")].mean(dim=0))
    torch.testing.assert_close(words[6], table[encode(" bottom left")].mean(dim=0))
    torch.testing.assert_close(calm, table[encode(" normal")].mean(dim=0))
    assert words.shape == (9, model.language.hidden) and not words.requires_grad


def test_evaluation_tells_knowing_answers_from_blind_ones(conversations, model, monkeypatch) -> None:
    """A language model that reads the truth off the map scores 1, one that says yes to all scores by the share."""
    projection = torch.nn.Linear(model.eyes.joint_width, model.language.hidden)
    places = {1: "top right", 2: "left"}
    tokens = dataclasses.replace(model.language.tokens, decode=lambda ids: places[ids[0]])
    speaker = dataclasses.replace(model.language, tokens=tokens)
    module = anomalygpt_training.HeadLoss(model.head, speaker, projection, model.eyes.grid).requires_grad_(False)
    asked = []

    def logits(speaker, rows):
        found = torch.zeros(len(rows), max(tokens.yes_id, tokens.no_id) + 1)
        labels = conversations.labels if knows else np.ones(len(rows), bool)
        found[:, tokens.yes_id] = torch.tensor(np.where(labels, 1.0, -1.0), dtype=torch.float32)
        asked.append(len(rows))
        return found

    def named(speaker, rows, *, max_new_tokens):
        return [[1 if knows else 2] for _ in rows]

    monkeypatch.setattr(language, "next_logits", logits)
    monkeypatch.setattr(language, "generate", named)
    knows = True
    sure = anomalygpt_pretraining.evaluate(module, conversations)
    assert sure["few_shot_answer_accuracy"] == sure["few_shot_place_accuracy"] == 1
    knows = False
    blind = anomalygpt_pretraining.evaluate(module, conversations)
    assert blind["decoder_place_accuracy"] == 0
    assert blind["decoder_answer_accuracy"] == blind["decoder_answer_auroc"] == 0.5
    assert 0 <= blind["few_shot_pixel_auroc"] <= 1 and set(asked) == {6}


def test_shipped_files_have_the_published_layouts() -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(standins.ASSETS / "pandagpt.safetensors").items()}
    _, rank = checkpoints.pandagpt_rules(shapes, {"hidden_size": 576, "num_hidden_layers": 30})
    assert rank == anomalygpt_pretraining.RANK
    head = anomalygpt.AnomalyHead.from_state(load_file(standins.ASSETS / "anomalygpt.safetensors"))
    assert head.hidden == 576 and len(head.state_dict()) == 21
