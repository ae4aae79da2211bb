"""AnomalyGPT's parts: sizes, loading, decoding, memory, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_anomalygpt as tiny
import torch
from safetensors.torch import load_file, save_file

from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt import model as anomalygpt

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"


@pytest.fixture(scope="module")
def chain():
    return tiny.build(FIXTURE)


@pytest.fixture(scope="module")
def model(chain):
    return tiny.talkative(chain[0])


@pytest.fixture(scope="module")
def look(chain, model):
    return model.look([tiny.image(chain[2], name) for name in ("query", "normal0", "normal1")])


# --- true size, on the meta device -----------------------------------------------------------------------------------


def published_head(hidden: int) -> dict[str, torch.Tensor]:
    """Names and shapes of the published checkpoints, as the specification lists them."""
    shapes: dict[str, tuple[int, ...]] = {"prompt_learner.base_prompts": (9, hidden)}
    for tap in range(4):
        shapes |= {f"image_decoder.fc.{tap}.weight": (1024, 1280), f"image_decoder.fc.{tap}.bias": (1024,)}
    for number, (n_in, n_out) in enumerate(itertools.pairwise((1, 4, 16, 64, 256, 1024))):
        key = f"prompt_learner.meta_net.{3 * number}"
        shapes |= {f"{key}.weight": (n_out, n_in, 3, 3), f"{key}.bias": (n_out,)}
    shapes |= {"prompt_learner.meta_net.15.weight": (hidden, 1024, 5, 5), "prompt_learner.meta_net.15.bias": (hidden,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_every_published_key_is_consumed_at_true_size():
    state = published_head(4096)
    assert len(state) == 21 and sum(tensor.numel() for tensor in state.values()) == 112_663_480
    head = anomalygpt.AnomalyHead.from_state(state)
    assert set(head.state_dict()) == set(state)
    assert sum(p.numel() for p in head.image_decoder.parameters()) == 5_246_976
    assert sum(p.numel() for p in head.prompt_learner.parameters()) == 107_416_504


def test_imagebind_config_at_true_size():
    import open_clip

    config = {
        "embed_dim": 1024,
        "vision_cfg": {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14, "image_size": 224},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
    with pytest.raises(ValueError, match="1e-6"):  # open_clip's default would be silently different
        imagebind.build_clip(config, {}, part="visual")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["norm_kwargs"] = {"eps": 1e-6}
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    visual = {key: tensor for key, tensor in state.items() if key.startswith("visual.")}
    model = imagebind.build_clip(config, visual, part="visual")
    rest = {key: tensor for key, tensor in state.items() if key not in visual}
    text = imagebind.build_clip(config, rest, part="text")
    assert (len(visual), len(rest)) == (392, 294)
    norms = [m for tower in (model.visual, text) for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 115 and all(norm.eps == 1e-6 for norm in norms)
    tower = imagebind.image_tower(model, device="meta")
    assert (tower.taps, tower.grid, tower.width, tower.joint_width) == ((7, 15, 23, 31), (16, 16), 1280, 1024)
    del visual["visual.proj"]
    with pytest.raises(ValueError, match=r'Missing key\(s\) in state_dict: "proj"'):
        imagebind.build_clip(config, visual, part="visual")


def test_a_7b_model_trains_the_head_alone_on_the_meta_device():
    """32 blocks in bf16, forward and backward to the prompts: shapes and types fit, only prompts get gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32001, **sizes)).to(torch.bfloat16).requires_grad_(False)
        embeds = torch.empty(8, 126, 4096, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(8, 1, 126, 126, dtype=torch.bfloat16)  # four axes: taken as it is
        speaker = language.Language(llama, None)
        states = speaker.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        logits = llama.get_output_embeddings()(states)
        logits.float().sum().backward()
    assert sum(p.numel() for p in llama.parameters()) == 6_738_423_808
    assert logits.shape == (8, 126, 32001) and embeds.grad.shape == embeds.shape
    assert all(parameter.grad is None for parameter in llama.parameters())


# --- the head and its maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda s: s.pop("image_decoder.fc.0.weight"), "no AnomalyGPT checkpoint"),
        (lambda s: s.pop("image_decoder.fc.2.bias"), "Missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected"),
        (lambda s: s.update({"prompt_learner.meta_net.15.bias": torch.zeros(3)}), "size mismatch"),
    ],
)
def test_a_wrong_checkpoint_is_refused(chain, spoil, word):
    state = dict(chain[0].head.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=f"{word}.*notebook 0"):
        anomalygpt.AnomalyHead.from_state(state)


def test_weights_of_another_width_are_refused(chain):
    other = anomalygpt.AnomalyHead(48, 32, 40, (4, 8))
    with pytest.raises(ValueError, match="prompt learner writes width 40, the language model has width 32"):
        anomalygpt.check_widths(chain[0].image_tower, other, chain[0].projection, 32)


def test_bank_finds_a_planted_patch():
    random = torch.Generator().manual_seed(0)
    taps = torch.randn(4, 1, 9, 8, generator=random)
    bank = anomalygpt.build_bank(torch.randn(4, 2, 9, 8, generator=random))
    bank[:, 5] = torch.nn.functional.normalize(taps[:, 0, 3], dim=-1)
    similarity = anomalygpt.bank_similarity(taps, bank)
    torch.testing.assert_close(similarity[:, 0, 3], torch.ones(4))
    naive = torch.stack([(torch.nn.functional.normalize(taps[i, 0], dim=-1) @ bank[i].T).amax(1) for i in range(4)])
    torch.testing.assert_close(similarity[:, 0], naive)


@pytest.mark.parametrize("shape", [(224, 224), (100, 400), (400, 100)])
def test_a_picture_beside_itself_has_nothing_anomalous(model, shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert float(model.look([picture], references=[picture]).maps.max()) < 1e-5


def test_cached_half_precision_features_are_compared_in_single_precision(chain, model):
    seen = model.image_tower.embed_images([tiny.image(chain[2], name) for name in ("query", "normal0")])
    cached = imagebind.ImageFeatures(seen.embedding, seen.taps.half())
    single = imagebind.ImageFeatures(seen.embedding, seen.taps.half().float())
    assert model.bank(cached).dtype == torch.float32
    maps = model.look(cached, references=model.bank(cached)).maps
    torch.testing.assert_close(maps, model.look(single, references=model.bank(single)).maps, atol=0, rtol=0)


def test_a_map_of_one_s_own_makes_the_prompts(chain, model):
    picture, given = tiny.image(chain[2], "query"), np.random.default_rng(0).random((1, 224, 224), dtype=np.float32)
    look = model.look([picture], maps=given)
    np.testing.assert_array_equal(look.maps.numpy(), given)
    assert not torch.equal(look.prompts, model.look([picture]).prompts)


def test_a_picture_must_be_uint8_rgb(model):
    with pytest.raises(ValueError, match="uint8 RGB"):
        model.look([np.zeros((5, 5), dtype=np.uint8)])


# --- answers ---------------------------------------------------------------------------------------------------------


def test_words_are_shown_as_they_come(model, look):
    shown = []
    answer = model.ask(look.take([0]), "Is it whole?", max_new_tokens=5, on_text=shown.append)[0]
    assert len(shown) == 5 and shown[-1] == answer and answer.startswith(shown[0])
    assert answer == model.ask(look.take([0, 1]), "Is it whole?", max_new_tokens=5)[0]


def test_the_stop_token_ends_each_row_by_itself(model, look):
    rows = model.prompt_rows(look, "Is it whole?")
    free = language.generate(model.language, rows, max_new_tokens=8)
    stop = free[1][3]
    tokens = dataclasses.replace(model.language.tokens, stop_ids=frozenset([stop]))
    assert any(stop not in row[:3] for row in free)
    stopped = language.generate(language.Language(model.language.model, tokens), rows, max_new_tokens=8)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_an_answer_may_be_empty(model, look):
    one = look.take([0])
    first = language.generate(model.language, model.prompt_rows(one, "Is it whole?"), max_new_tokens=1)[0][0]
    tokens = dataclasses.replace(model.language.tokens, stop_ids=frozenset([first]))
    mute = dataclasses.replace(model, language=language.Language(model.language.model, tokens))
    shown = []
    assert mute.ask(one, "Is it whole?", on_text=shown.append) == [""] and not shown


def test_a_question_longer_than_the_context_is_refused(model, look):
    with pytest.raises(language.PromptTooLong, match="Shorten the question"):
        model.ask(look.take([0]), "word " * 3000)


def test_prompt_text_and_cleaning():
    assert language.prompt_text("B?", [("A?", "No.")]) == "A?\n### Assistant: No.\n### Human: B?\n### Assistant:"
    assert language.clean_answer("Yes.\n##") == "Yes."
    assert language.clean_answer("Yes, no. 3") == "Yes, no. 3"  # nothing to cut, nothing cut


def test_stop_and_answer_ids_come_from_the_tokenizer():
    words = ["<s>", "</s>", "Yes", "No", ".", "\n", "###", " Yes", " No"]

    def encode(text):
        ids, pieces = [], sorted(words[2:], key=len, reverse=True)
        while text:
            piece = next(p for p in pieces if text.startswith(p))
            ids.append(words.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(ids):
        return "".join(words[i] for i in ids)

    tokens = language.ChatTokens.of(encode, decode, 0, 1, " ")
    assert tokens.stop_ids == {words.index("###")} and tokens.pad_id == 1
    assert (tokens.yes_id, tokens.no_id) == (words.index(" Yes"), words.index(" No"))


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture()
def weights_dir(tmp_path):
    return tiny.write_weights(tmp_path / "weights", FIXTURE)


def test_the_prepared_folders_load_to_the_same_chain(chain, weights_dir, tmp_path):
    model, _, fixture = chain
    loaded = anomalygpt.load(weights_dir, cache_dir=tmp_path)
    features = loaded.image_tower.embed_images([tiny.image(fixture, "query")])
    torch.testing.assert_close(features.embedding, fixture["vis.emb"], atol=3e-6, rtol=0)
    rows = [torch.randn(12, 32, generator=torch.Generator().manual_seed(0))]
    expected = language.next_logits(model.language, rows)
    torch.testing.assert_close(language.next_logits(loaded.language, rows), expected, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in loaded.language.model.parameters())
    assert loaded.text.shape == (2, 32)
    fresh = anomalygpt.load(weights_dir, checkpoint=None, seed=1, cache_dir=tmp_path)
    assert fresh.head.prompt_learner.base_prompts.shape == (9, 32) and fresh.checkpoint_id == "new head, seed 1"


def test_loading_again_empties_the_first_chain(weights_dir, tmp_path):
    first = anomalygpt.load(weights_dir, cache_dir=tmp_path)
    second = anomalygpt.load(weights_dir, cache_dir=tmp_path)
    for part in (first.language.model, first.image_tower.visual, first.head, first.projection):
        assert sum(parameter.numel() for parameter in part.parameters()) == 0
    assert second.language.model.lm_head.weight.numel() == 69 * 32


def test_text_features_are_computed_once(weights_dir, tmp_path, monkeypatch):
    first = imagebind.text_pair(weights_dir / "imagebind", cache_dir=tmp_path)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(2))
    monkeypatch.setattr(imagebind, "build_clip", None)  # would fail if the tower were loaded again
    again = imagebind.text_pair(weights_dir / "imagebind", cache_dir=tmp_path)
    assert torch.equal(first, again)


def test_missing_weights_name_the_notebook(weights_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="notebook 06"):
        anomalygpt.load_head(weights_dir, weights_dir / "nothing")
    with pytest.raises(FileNotFoundError, match="01"):
        anomalygpt.load_head(weights_dir, "train_visa")
    shutil.rmtree(weights_dir / "vicuna")
    with pytest.raises(FileNotFoundError, match="01"):
        anomalygpt.load(weights_dir, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop(next(iter(s))), "missing"),
        (
            lambda s: s.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}),
            "17",
        ),
        (lambda s: s.update({k: torch.zeros(4, 31) for k in list(s)[:1]}), "size mismatch"),
    ],
)
def test_a_lora_of_another_model_is_refused(chain, tmp_path, spoil, words):
    from transformers import LlamaForCausalLM

    folder = tiny.write_adapter(tmp_path, tiny.part(chain[2], "sd."), tiny.LORA_CONFIG)
    state = load_file(folder / "adapter_model.safetensors")
    spoil(state)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit.*{words}"):
        language.with_lora(LlamaForCausalLM(tiny.llama_config()), folder)


def test_a_lora_beside_the_weights_speaks_as_the_merged_one(chain, tmp_path):
    """What quantised precisions do, on plain weights: unmerged, in train mode, with gradients to the prompts."""
    from transformers import LlamaForCausalLM

    model, _, fixture = chain
    base = LlamaForCausalLM(tiny.llama_config())
    plain = tiny.part(fixture, "sd.llama_model.base_model.model.")
    base.load_state_dict({key: tensor for key, tensor in plain.items() if "lora_" not in key})
    wrapped = language.with_lora(base, tiny.write_adapter(tmp_path, tiny.part(fixture, "sd."), tiny.LORA_CONFIG))
    beside = language.Language(wrapped.eval(), model.language.tokens)
    rows = [torch.randn(12, 32, generator=torch.Generator().manual_seed(0))]
    merged = language.next_logits(model.language, rows)
    torch.testing.assert_close(language.next_logits(beside, rows), merged, atol=2e-5, rtol=0)
    answer = language.generate(beside, rows, max_new_tokens=4)
    assert answer == language.generate(model.language, rows, max_new_tokens=4)
    row = rows[0][None].requires_grad_(True)
    beside.decoder(inputs_embeds=row, use_cache=False).last_hidden_state.sum().backward()
    assert float(row.grad.abs().sum()) > 0


@pytest.mark.parametrize(("precision", "device"), [("8bit", "cpu"), ("4bit", "cpu"), ("int3", "cpu"), ("4bit", "cuda")])
def test_precisions_that_cannot_be_are_refused(weights_dir, precision, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="GPU|allowed|pip install bitsandbytes"):
        language.load_language(
            weights_dir / "vicuna", lora=weights_dir / "pandagpt", precision=precision, device=device
        )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}, "LLaMA-2"),
        ({"model_type": "llama", "vocab_size": 32016, "max_position_embeddings": 16384}, "CodeLlama"),
        ({"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768}, "mistral"),
    ],
)
def test_foreign_bases_are_refused(config, word):
    with pytest.raises(ValueError, match=word):
        language.check_base(config)


def test_a_base_without_the_pad_row_is_warned_about(recwarn):
    vicuna = {"model_type": "llama", "vocab_size": 32001, "max_position_embeddings": 2048}
    language.check_base(vicuna)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="32000 token rows"):
        language.check_base(vicuna | {"vocab_size": 32000})


# --- memory ----------------------------------------------------------------------------------------------------------


def test_full_gpu_memory_is_one_sentence_and_lets_go_of_the_tensors():
    import weakref

    held = []

    def step():
        activations = torch.zeros(9)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; ...")

    with pytest.raises(RuntimeError, match=r"memory is full\. Use a smaller batch") as caught:
        with language.memory_errors("a smaller batch"):
            step()
    assert held[0]() is None, caught  # the error is still there, what the failed step held is not


@pytest.mark.parametrize(
    ("precision", "training", "total", "fits"),
    [("bf16", True, 23.6e9, True), ("fp16", False, 23.6e9, True), ("fp16", False, 15.8e9, False),
     ("8bit", False, 15.8e9, True), ("4bit", False, 15.8e9, True), ("fp32", True, 23.6e9, False)],
)  # fmt: skip
def test_what_fits_a_card(tmp_path, monkeypatch, precision, training, total, fits):
    """The true sizes, as files with holes: 13.5 GB of Vicuna, 1.97 GB of ImageBind."""
    for name, size in (("vicuna/model-1.safetensors", 13_476_847_616), ("imagebind/model.safetensors", 1_972_000_000)):
        (tmp_path / name).parent.mkdir()
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    monkeypatch.setattr(anomalygpt.weights, "require", lambda folder, name: folder / name)
    properties = type("Properties", (), {"total_memory": total})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    ask = {"device": "cuda", "precision": precision, "batch_size": 8 if training else 16, "training": training}
    if fits:
        assert f"in {precision}" in anomalygpt.check_memory(tmp_path, **ask)
        return
    with pytest.raises(ValueError, match="Three knobs: precision '8bit'.* fewer pictures.* a GPU with more memory"):
        anomalygpt.check_memory(tmp_path, **ask)
