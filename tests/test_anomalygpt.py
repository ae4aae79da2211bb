"""AnomalyGPT's parts: sizes, loading, chat, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_anomalygpt as tiny
import torch
from safetensors.torch import save_file

from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt import model as anomalygpt
from helpers.anomalygpt import training as t

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
    shapes = {"prompt_learner.base_prompts": (9, hidden)}
    for i in range(4):
        shapes |= {f"image_decoder.fc.{i}.weight": (1024, 1280), f"image_decoder.fc.{i}.bias": (1024,)}
    widths = (1, 4, 16, 64, 256, 1024)
    for number, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        key = f"prompt_learner.meta_net.{3 * number}"
        shapes |= {f"{key}.weight": (n_out, n_in, 3, 3), f"{key}.bias": (n_out,)}
    key = "prompt_learner.meta_net.15"
    shapes |= {f"{key}.weight": (hidden, 1024, 5, 5), f"{key}.bias": (hidden,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_every_published_key_is_consumed_at_true_size():
    state = published_head(4096)
    assert len(state) == 21 and sum(tensor.numel() for tensor in state.values()) == 112_663_480
    head = anomalygpt.AnomalyHead.from_state(state)
    assert set(head.state_dict()) == set(state)
    assert sum(p.numel() for p in head.image_decoder.parameters()) == 5_246_976
    assert sum(p.numel() for p in head.prompt_learner.parameters()) == 107_416_504


def test_lora_and_projection_are_consumed_and_nothing_else_is_trained_at_true_size():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32001, **sizes))
        lora = {
            f"llama_model.base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{side}.default.weight": torch.empty(
                (32, 4096) if side == "A" else (4096, 32), dtype=torch.float16
            )
            for i in range(32)
            for m in "qkvo"
            for side in "AB"
        }
        projection = {"llama_proj.weight": torch.empty(4096, 1024), "llama_proj.bias": torch.empty(4096)}
    assert len(lora | projection) == 258
    config = tiny.LORA_CONFIG | {"r": 32, "lora_alpha": 32}
    merged = language.merge_lora(base, lora | projection, config)
    names = {name for name, _ in merged.named_parameters()}
    assert len(names) == 32 * 9 + 3 and not any("lora" in name for name in names)
    missing = dict(list(lora.items())[:-1])
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32001, **sizes))
    with pytest.raises(ValueError, match="255 matrices, this language model needs 256"):
        language.merge_lora(base, missing, config)
    speaker = language.Language(merged, None)
    module = t.HeadLoss(
        anomalygpt.AnomalyHead.from_state(published_head(4096)), speaker,
        language.projection_from_state(projection), (16, 16),
    )  # fmt: skip
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 21 and sum(p.numel() for p in trained) == 112_663_480
    assert sum(p.numel() for p in module.parameters()) > 6.7e9


def test_imagebind_config_at_true_size():
    config = {
        "embed_dim": 1024,
        "vision_cfg": {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14, "image_size": 224},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
    with pytest.raises(ValueError, match="1e-6"):  # open_clip's default would be silently different
        imagebind.build_clip(config, {})
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["norm_kwargs"] = {"eps": 1e-6}
    import open_clip

    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    model = imagebind.build_clip(config, state)
    assert len(state) == 686
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    eyes = imagebind.image_tower(model, device="meta")
    assert (eyes.taps, eyes.grid, eyes.width, eyes.joint_width) == ((7, 15, 23, 31), (16, 16), 1280, 1024)
    del state["visual.proj"]
    with pytest.raises(ValueError, match=r"missing \['visual.proj'\]"):
        imagebind.build_clip(config, state)


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda s: s.pop("image_decoder.fc.0.weight"), "no AnomalyGPT checkpoint"),
        (lambda s: s.pop("image_decoder.fc.2.bias"), "missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected"),
        (lambda s: s.update({"prompt_learner.meta_net.15.bias": torch.zeros(3)}), "other shape"),
    ],
)
def test_a_wrong_checkpoint_is_refused(chain, spoil, word):
    state = dict(chain[0].head.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=word):
        anomalygpt.AnomalyHead.from_state(state)


def test_weights_of_another_width_are_refused(chain):
    model = chain[0]
    other = anomalygpt.AnomalyHead(48, 32, 40, (4, 8))
    with pytest.raises(ValueError, match="prompt learner writes width 40, the language model has hidden width 32"):
        anomalygpt.check_widths(model.eyes, other, model.projection, 32)


def test_bank_finds_a_planted_patch():
    random = torch.Generator().manual_seed(0)
    taps = torch.randn(4, 1, 9, 8, generator=random)
    bank = anomalygpt.build_bank(torch.randn(4, 2, 9, 8, generator=random))
    bank[:, 5] = torch.nn.functional.normalize(taps[:, 0, 3], dim=-1)
    similarity = anomalygpt.bank_similarity(taps, bank)
    torch.testing.assert_close(similarity[:, 0, 3], torch.ones(4))
    naive = torch.stack([(torch.nn.functional.normalize(taps[i, 0], dim=-1) @ bank[i].T).amax(1) for i in range(4)])
    torch.testing.assert_close(similarity[:, 0], naive)
    maps = anomalygpt.few_shot_map(taps, bank, (3, 3), size=3)
    assert maps.flatten().argmin() == 3


def test_new_pictures_get_new_numbers(chain, model):
    pictures = [tiny.image(chain[2], "query")]
    assert model.look(pictures).numbers != model.look(pictures).numbers


def test_cached_half_precision_features_are_compared_in_single_precision(chain, model):
    seen = model.eyes.embed_images([tiny.image(chain[2], name) for name in ("query", "normal0")])
    cached = imagebind.ImageFeatures(seen.embedding, seen.taps.half())
    single = imagebind.ImageFeatures(seen.embedding, seen.taps.half().float())
    assert model.bank(cached).dtype == torch.float32
    maps = model.look(cached, references=model.bank(cached)).maps
    torch.testing.assert_close(maps, model.look(single, references=model.bank(single)).maps, atol=0, rtol=0)


# --- chat ------------------------------------------------------------------------------------------------------------


def test_one_question_or_one_each(model, look):
    same = model.ask(look, "Is it whole?", max_new_tokens=5)
    assert same == model.ask(look, ["Is it whole?"] * 3, max_new_tokens=5)
    with pytest.raises(ValueError, match="2 questions for 3 pictures"):
        model.ask(look, ["a", "b"])


def test_a_chat_reuses_its_prefix_and_says_the_same(model, look):
    memory = language.PrefixMemory()
    one = look.take([0])
    first = model.ask(one, "Is it whole?", max_new_tokens=6, memory=memory)[0]
    assert memory.n_reused == 0
    history = [("Is it whole?", first)]
    second = model.ask(one, "Where?", history=history, max_new_tokens=6, memory=memory)[0]
    assert memory.n_reused >= 30 + len(model.language.tokens.encode("Is it whole?"))
    assert second == model.ask(one, "Where?", history=history, max_new_tokens=6)[0]
    other = model.ask(look.take([1]), "Where?", max_new_tokens=6, memory=memory)[0]  # another picture: no image reused
    assert memory.n_reused < 10
    assert other == model.ask(look.take([1]), "Where?", max_new_tokens=6)[0]


def test_an_answer_that_failed_half_way_leaves_no_broken_prefix(model, look):
    memory, one = language.PrefixMemory(), look.take([0])
    model.ask(one, "Is it whole?", max_new_tokens=6, memory=memory)

    def fail(text):
        raise RuntimeError("the page is gone")

    with pytest.raises(RuntimeError, match="gone"):
        model.ask(one, "Where is it?", max_new_tokens=6, memory=memory, on_text=fail)
    again = model.ask(one, "Is it whole?", max_new_tokens=6, memory=memory)[0]
    assert memory.n_reused == 0 and again == model.ask(one, "Is it whole?", max_new_tokens=6)[0]


def test_words_are_shown_as_they_come(model, look):
    shown = []
    answer = model.ask(look.take([0]), "Is it whole?", max_new_tokens=5, on_text=shown.append)[0]
    assert len(shown) == 5 and shown[-1] == answer and answer.startswith(shown[0])


def test_the_stop_token_ends_each_row_by_itself(model, look):
    rows, _ = model.prompt_rows(look, "Is it whole?")
    free = language.generate(model.language, rows, max_new_tokens=8)
    stop = free[1][3]
    tokens = dataclasses.replace(model.language.tokens, stop_ids=frozenset([stop]))
    assert any(stop not in row[:3] for row in free)
    stopped = language.generate(language.Language(model.language.model, tokens), rows, max_new_tokens=8)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_transformers_has_for_it(model, look, name, recwarn):
    """The installed version takes one of the names without a warning; here each is the only one that is known."""
    inner, seen = model.language.model, []

    class Renamed(torch.nn.Module):
        def forward(self, **inputs):
            seen.append(inputs.pop(name))
            return inner(**inputs, **{installed: seen[-1]})

    installed = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    known = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in ("inputs_embeds", name)]
    outer = Renamed()
    outer.forward.__func__.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *known]
    )
    outer.get_input_embeddings, outer.config, outer.device = inner.get_input_embeddings, inner.config, inner.device
    rows = model.prompt_rows(look, "Is there any anomaly in the image?")[0]
    found = language.generate(language.Language(outer, model.language.tokens), rows, max_new_tokens=3)
    assert found == language.generate(model.language, rows, max_new_tokens=3)
    assert len(seen) == 3 and seen[0] is seen[1] is not None
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]


def test_a_question_longer_than_the_context_is_refused(model, look):
    with pytest.raises(language.PromptTooLong, match="Shorten the question"):
        model.ask(look.take([0]), "word " * 3000)


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"top_p": 1.5}, {"temperature": -1.0}])
def test_senseless_sampling_is_refused(model, look, change):
    with pytest.raises(ValueError, match="allowed"):
        model.ask(look.take([0]), "Is it whole?", **change)


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

    tokens = language.ChatTokens.from_functions(encode, decode, bos_id=0, eos_id=1, pad_id=1, answer_prefix=" ")
    assert tokens.stop_ids == {words.index("###")}
    assert (tokens.yes_id, tokens.no_id) == (words.index(" Yes"), words.index(" No"))


# --- loading ---------------------------------------------------------------------------------------------------------


def write_language(folder: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "Yes", "No", "#", "###", "."] + [f"w{i}" for i in range(61)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture()
def weights_dir(chain, tmp_path):
    """The tiny chain in the folders of notebook 01."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers import files as storage

    _, _, fixture = chain
    plain = tiny.part(fixture, "sd.llama_model.base_model.model.")
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=69, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    base.load_state_dict({key: tensor for key, tensor in plain.items() if "lora_" not in key})
    write_language(tmp_path / "vicuna", base)
    states = {
        "imagebind": tiny.imagebind_to_open_clip(tiny.part(fixture, "sd.imagebind.")),
        "pandagpt": {k: v for k, v in tiny.part(fixture, "sd.").items() if "lora_" in k or k.startswith("llama_proj")},
        "anomalygpt/train_supervised": dict(chain[0].head.state_dict()),
    }
    for name, state in states.items():
        (tmp_path / name).mkdir(parents=True)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / name / "model.safetensors")
    storage.write_json(tmp_path / "imagebind" / "config.json", tiny.CLIP_CONFIG)
    storage.write_json(tmp_path / "pandagpt" / "config.json", tiny.LORA_CONFIG)
    for name in ("vicuna", *states):
        folder = tmp_path / name
        files = {
            p.name: {"bytes": p.stat().st_size, "sha256": storage.sha256_file(p)}
            for p in folder.iterdir()
            if p.is_file()
        }
        ready = {"component": name, "files": files, "source": {}, "notes": [], "details": {}, "format": 1}
        storage.write_json(folder / "READY.json", ready)
    return tmp_path


def test_the_prepared_folders_load_to_the_same_chain(chain, weights_dir):
    model, _, fixture = chain
    loaded = anomalygpt.load(weights_dir)
    picture = tiny.image(fixture, "query")
    features = loaded.eyes.embed_images([picture])
    torch.testing.assert_close(features.embedding, fixture["vis.emb"], atol=3e-6, rtol=0)
    rows = [torch.randn(12, 32, generator=torch.Generator().manual_seed(0))]
    expected = language.next_logits(model.language, rows)
    torch.testing.assert_close(language.next_logits(loaded.language, rows), expected, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in loaded.language.model.parameters())
    fresh = anomalygpt.load(weights_dir, checkpoint=None, seed=1)
    assert fresh.head.hidden == 32 and fresh.checkpoint_id == "new head, seed 1"


def test_missing_weights_name_the_notebook(weights_dir):
    import shutil

    with pytest.raises(FileNotFoundError, match="notebook 06"):
        anomalygpt.load_head(weights_dir, weights_dir / "nothing")
    with pytest.raises(FileNotFoundError, match="01"):
        anomalygpt.load_head(weights_dir, "train_visa")
    shutil.rmtree(weights_dir / "vicuna")
    with pytest.raises(FileNotFoundError, match="01"):
        anomalygpt.load(weights_dir)


@pytest.mark.parametrize("precision", ["8bit", "4bit", "int3"])
def test_quantising_on_a_cpu_is_refused(weights_dir, precision):
    with pytest.raises(ValueError, match="GPU|allowed"):
        anomalygpt.load(weights_dir, precision=precision)


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


def test_full_gpu_memory_is_one_sentence():
    with pytest.raises(RuntimeError, match=r"memory is full\. Use a smaller batch"):
        with language.memory_errors("a smaller batch"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; ...")


# --- text features and image features on disk ------------------------------------------------------------------------


def test_text_pairs_are_computed_once(chain, weights_dir, tmp_path):
    config = dict(tiny.CLIP_CONFIG) | {"text_cfg": tiny.CLIP_CONFIG["text_cfg"] | {"vocab_size": 49408}}
    state = tiny.imagebind_to_open_clip(tiny.part(chain[2], "sd.imagebind."))
    state["token_embedding.weight"] = torch.randn(49408, 32, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "full_vocabulary"
    folder.mkdir()
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    first = imagebind.text_pairs(folder, ["object", "metal_nut"], cache_dir=tmp_path / "cache")
    assert first["metal_nut"].shape == (2, 32)
    torch.testing.assert_close(first["object"].norm(dim=1), torch.ones(2))
    (folder / "config.json").write_text(json.dumps(config | {"embed_dim": 7}))  # would fail if it were read again
    again = imagebind.text_pairs(folder, ["metal nut", "object"], cache_dir=tmp_path / "cache")
    torch.testing.assert_close(again["metal nut"], first["metal_nut"])


def test_image_features_are_read_back(chain, tmp_path):
    from helpers.data import images
    from helpers.records import Sample

    model, _, fixture = chain
    samples = []
    for name in ("query", "normal0", "normal1"):
        images.save_png(tmp_path / f"{name}.png", tiny.image(fixture, name))
        samples.append(Sample(tmp_path / f"{name}.png", "x", False, sha256=name))
    cache = imagebind.FeatureCache(model.eyes, tmp_path / "cache", batch_size=2)
    first, seconds = cache.features(samples)
    torch.testing.assert_close(first.embedding[:1], fixture["vis.emb"], atol=3e-6, rtol=0)
    assert first.taps.dtype == torch.float16 and (seconds > 0).all()
    for sample in samples:
        sample.image_path.unlink()
    again, _ = cache.features(samples[::-1])
    assert torch.equal(again.taps, first.taps.flip(1))


def test_an_unreadable_picture_is_named(chain, tmp_path):
    from helpers.data import images
    from helpers.records import Sample

    (tmp_path / "broken.png").write_bytes(b"not a picture")
    cache = imagebind.FeatureCache(chain[0].eyes, None)
    with pytest.raises(images.ImageError, match="broken.png"):
        cache.features([Sample(tmp_path / "broken.png", "x", False, sha256="b")])
    with pytest.raises(ValueError, match="uint8 RGB"):
        chain[0].look([np.zeros((5, 5), dtype=np.uint8)])
