"""Parity with the published AnomalyGPT: reference numbers made by the original code at a tiny size.

``PARITY_FIXTURES`` names the folder; every ``anomalygpt_seed*.safetensors`` in it is checked. Tolerances are ten times
the differences that a correct implementation showed (specification, Appendix A).
"""

import dataclasses

import numpy as np
import open_clip
import pytest
import tiny_anomalygpt as tiny
import torch

from helpers.anomalygpt import conversations, imagebind, language
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt import training as t
from tests.conftest import FIXTURES

FILES = sorted(FIXTURES.glob("anomalygpt_seed*.safetensors"))
assert FILES, f"no anomalygpt_seed*.safetensors in {FIXTURES}"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def chain(request):
    return tiny.build(request.param)


def close(found, expected, atol):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("picture", "mode", "key"),
    [("query", "squash", "query"), ("rect", "shortest", "rect_crop"), ("rect", "squash", "rect_squash")],
)
def test_preprocessing_is_identical(chain, picture, mode, key):
    model, _, fixture = chain
    pixels = fixture["in.rect_u8"].numpy() if picture == "rect" else tiny.image(fixture, picture)
    found = imagebind.preprocess(pixels, model.image_tower.image_size, mode=mode)
    close(found[:, ::7, ::7], fixture[f"pre.{key}_s7"], 0)


def test_image_embedding_and_taps(chain):
    model, _, fixture = chain
    features = model.image_tower.embed_images([tiny.image(fixture, "query")])
    close(features.embedding, fixture["vis.emb"], 3e-6)
    assert model.image_tower.taps == (1, 3, 5, 7)
    for tap, block in zip(features.taps, model.image_tower.taps, strict=True):
        close(tap, fixture[f"vis.tok{block}"][:, 1:], 2e-4)


@pytest.mark.parametrize("name", ["bottle", "object"])
def test_sentences_are_tokenised_and_embedded_as_published(chain, name):
    _, clip, fixture = chain
    tokens = [fixture[f"text.tokens_{name}_{state}"].long() for state in ("normal", "abnormal")]
    close(imagebind.encode_text_pair(clip, tokens), fixture[f"text.feats_{name}"][0], 6e-7)
    for published, sentences in zip(tokens, imagebind.sentences(name), strict=True):
        found = open_clip.get_tokenizer("ViT-H-14")(sentences)
        assert torch.equal(found, fixture["text.clip_ids_used"].long()[published])


def test_raw_text_embedding_carries_the_logit_scale(chain):
    _, clip, fixture = chain
    raw = clip.encode_text(fixture["text.tokens_bottle_normal"].long(), normalize=True)
    close(raw * clip.logit_scale.exp().clamp(max=100), fixture["text.raw_bottle_normal"], 1.2e-5)


def test_decoder(chain):
    model, _, fixture = chain
    features = model.image_tower.embed_images([tiny.image(fixture, "query")])
    decoder = model.head.image_decoder
    logits = decoder(features.taps, fixture["text.feats_bottle"][0])
    for i in range(4):
        close(decoder.fc[i](features.taps[i]), fixture[f"dec.patch{i}"], 2e-4)
        close(logits[i].transpose(1, 2).unflatten(2, (16, 16)), fixture[f"dec.logit16_{i}"], 2e-3)
    look = tiny.about(model, fixture, "bottle").look([tiny.image(fixture, "query")])
    close(look.maps[:, None], fixture["dec.map"], 1.4e-5)
    close(look.prompts, fixture["pl.out_unsup"], 1.2e-5)
    close(look.image_tokens, fixture["proj.img_embeds"], 5e-6)
    assert look.scores == pytest.approx(float(fixture["dec.map"].max()), abs=1.4e-5)


def test_one_shot_and_two(chain):
    model, _, fixture = chain
    query, normal, other = (tiny.image(fixture, name) for name in ("query", "normal0", "normal1"))
    features = model.image_tower.embed_images([query])
    bank = model.bank([normal])
    close(anomalygpt.bank_similarity(features.taps, bank)[:, 0].unflatten(1, (16, 16)), fixture["fs.sim16_1shot"], 8e-6)
    look = model.look(features, references=bank)
    close(look.maps[:, None], fixture["fs.map_1shot"], 8e-6)
    close(look.prompts, fixture["pl.out_1shot"], 1.2e-5)
    two = model.look([query, normal], references=[normal, other])
    close(two.maps[0, ::7, ::7], fixture["fs.map_2shot_s7"], 8e-6)


def test_rotated_bank(chain):
    model, _, fixture = chain
    pixels = model.image_tower.preprocess(tiny.image(fixture, "normal0"))[None]
    bank = anomalygpt.build_bank(model.image_tower.features(anomalygpt.rotations(pixels)).taps)
    features = model.image_tower.embed_images([tiny.image(fixture, "query")])
    found = anomalygpt.bank_similarity(features.taps, bank)[:, 0].unflatten(1, (16, 16))
    close(found, fixture["fs.sim16_1shot_aug"], 4.5e-5)


CASES = {
    "single": ("bottle", False, tiny.QUESTION, ()),
    "single_1shot": ("bottle", True, tiny.QUESTION, ()),
    "multi": ("object", False, tiny.SECOND_QUESTION, tiny.HISTORY),
}


@pytest.mark.parametrize("case", CASES)
def test_prompt_logits_and_greedy_answer(chain, case):
    model, _, fixture = chain
    name, one_shot, question, history = CASES[case]
    references = [tiny.image(fixture, "normal0")] if one_shot else None
    look = tiny.about(model, fixture, name).look([tiny.image(fixture, "query")], references=references)
    rows = model.prompt_rows(look, question, history=history)
    close(rows[0][None], fixture[f"gen.{case}.inputs_embeds"], 1.2e-5)
    close(language.next_logits(model.language, rows), fixture[f"gen.{case}.logits"], 2.8e-5)
    expected = fixture[f"gen.{case}.tokens"][0].tolist()
    assert expected[0] == model.language.tokens.bos_id  # transformers 4.29 put it there
    answer = language.generate(unstoppable(model.language), rows, max_new_tokens=len(expected) - 1)
    assert answer == [expected[1:]]


def unstoppable(speaker):
    """The reference never stops, because it compares compacted ids with the real stop id."""
    tokens = dataclasses.replace(speaker.tokens, stop_ids=frozenset(), eos_id=-1)
    return language.Language(speaker.model, tokens)


def test_rows_of_different_length_answer_as_alone(chain):
    model, _, fixture = chain
    look = model.look([tiny.image(fixture, "query"), tiny.image(fixture, "normal1")])
    short = model.prompt_rows(look.take([0]), tiny.SECOND_QUESTION, history=tiny.HISTORY)
    long = model.prompt_rows(look.take([1]), tiny.QUESTION)
    speaker = unstoppable(model.language)
    together = language.generate(speaker, [*short, *long], max_new_tokens=12)
    assert together == [language.generate(speaker, rows, max_new_tokens=12)[0] for rows in (short, long)]
    alone = torch.cat([language.next_logits(speaker, rows) for rows in (short, long)])
    close(language.next_logits(speaker, [*short, *long]), alone, 1e-5)


def test_yes_no_score_is_the_difference_of_two_logits(chain):
    model, _, fixture = chain
    about_bottle = tiny.about(model, fixture, "bottle")
    logits = fixture["gen.single.logits"][0].double()
    tokens = model.language.tokens
    expected = float(logits[tokens.yes_id] - logits[tokens.no_id])
    found, _ = about_bottle.first_token(about_bottle.look([tiny.image(fixture, "query")]), tiny.QUESTION)
    np.testing.assert_allclose(found, [expected], atol=5e-5)


TRAINING = {"unsup": ("bottle", False, True), "fewshot": ("bottle", True, True), "sft": ("object", False, False)}


@pytest.mark.parametrize("case", TRAINING)
def test_losses_and_gradients(chain, case):
    """The case "sft" is ordinary instruction data: the answer's loss alone."""
    model, _, fixture = chain
    name, few_shot, with_pixels = TRAINING[case]
    head = anomalygpt.AnomalyHead.from_state({k: v.clone() for k, v in model.head.state_dict().items()})
    batch = tiny.training_batch(model, fixture, few_shot=few_shot)
    losses = t.head_loss(tiny.about(model, fixture, name), head, batch)
    trained = losses["loss" if with_pixels else "answer"]
    trained.backward()
    close(trained.detach()[None], fixture[f"train.{case}.loss"], 2e-5)
    if with_pixels:
        close(losses["answer"].detach()[None], fixture[f"train.{case}.ce"], 2e-5)
        close(losses["focal"].detach(), fixture[f"train.{case}.focal"].sum(), 2e-5)
        close(losses["dice"].detach(), fixture[f"train.{case}.dice"].sum(), 2e-5)
        close(losses["token_accuracy"][None], fixture[f"train.{case}.token_acc"], 1e-6)
        text = fixture[f"text.feats_{name}"][0]
        per_tap = anomalygpt.probabilities(head.image_decoder(batch["taps"], text), (16, 16))
        target = (batch["masks"] > t.MASK_LIMIT).float()
        for tap, focal, dice in zip(per_tap, fixture[f"train.{case}.focal"], fixture[f"train.{case}.dice"]):
            close(t.focal_loss(tap, target).detach(), focal, 2e-5)
            close(t.dice_loss(tap[:, 1], target).detach(), dice, 2e-5)
    gradients = {key: parameter.grad for key, parameter in head.named_parameters()}
    for key, expected in tiny.part(fixture, f"train.{case}.grad.").items():
        close(gradients[key], expected, 7e-4 if key.startswith("image_decoder") else 5e-4)
        scale = float(expected.abs().max())
        assert float((gradients[key] - expected).abs().max()) <= 3e-3 * scale, key


def test_conversation_targets_are_the_published_ones(chain):
    model, _, fixture = chain
    assert conversations.question("bottle") == tiny.QUESTION
    answers = [conversations.answer(False), conversations.answer(True, ["bottom right"])]
    texts = [t.question_and_answer(model.language.tokens, tiny.QUESTION, a) for a in answers]
    ids, targets = t.pad_texts(texts, model.language.tokens.pad_id)
    assert torch.equal(ids, fixture["train.input_ids"].long())
    assert torch.equal(targets, fixture["train.target_ids"].long())
    mask = (ids != model.language.tokens.pad_id).int()
    assert torch.equal(mask, fixture["train.attention_mask"].int())
