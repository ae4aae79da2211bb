"""AnomalyGPT's parts: sizes, loading, decoding, memory, and what is refused."""

import contextlib
import sys
import weakref
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import tiny_anomalygpt as tiny
import tiny_weights
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt import model as anomalygpt
from helpers.weights import published


@pytest.fixture(scope="module")
def chain():
    return tiny.build(tiny.FIXTURE)


@pytest.fixture(scope="module")
def model(chain):
    return tiny.talkative(chain[0])


@pytest.fixture(scope="module")
def look(chain, model):
    return model.look([tiny.image(chain[2], name) for name in ("query", "normal0", "normal1")])


def test_every_published_key_is_consumed_at_true_size():
    shapes = tiny_weights.anomalygpt_shapes()
    head = anomalygpt.AnomalyHead.from_state({key: torch.empty(s, device="meta") for key, s in shapes.items()})
    assert {key: tuple(tensor.shape) for key, tensor in head.state_dict().items()} == shapes
    sizes = [sum(p.numel() for p in part.parameters()) for part in (head.image_decoder, head.prompt_learner)]
    assert len(shapes) == 21 and sizes == [5_246_976, 107_416_504]


def test_imagebind_is_tapped_in_quarters_and_another_configuration_is_refused():
    _, config = published.inspect("imagebind", tiny_weights.imagebind_shapes())
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    tower = imagebind.image_tower(imagebind.build_clip(config, state))
    assert (tower.taps, tower.grid, tower.width, tower.joint_width) == ((7, 15, 23, 31), (16, 16), 1280, 1024)
    with pytest.raises(RuntimeError, match=r'Missing key.*"visual.proj"'):
        imagebind.build_clip(config, {name: tensor for name, tensor in state.items() if name != "visual.proj"})
    del config["text_cfg"]["norm_kwargs"]  # open_clip's default would be silently different
    with pytest.raises(ValueError, match="1e-6"):
        imagebind.build_clip(config, state)


def test_a_7b_model_trains_the_head_alone():
    """32 blocks without memory, forward and backward: shapes fit, only the prompts get gradients."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with FakeTensorMode():
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32001, **sizes)).requires_grad_(False)
        embeds = torch.empty(8, 126, 4096, requires_grad=True)
        mask = torch.empty(8, 1, 126, 126)  # four axes: taken as it is
        speaker = language.Language(llama, None)
        states = speaker.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        logits = llama.get_output_embeddings()(states)
        logits.float().sum().backward()
    assert sum(p.numel() for p in llama.parameters()) == 6_738_423_808
    assert logits.shape == (8, 126, 32001) and embeds.grad.shape == embeds.shape
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize(
    ("key", "tensor", "word"),
    [
        ("image_decoder.fc.0.weight", None, "no AnomalyGPT head"), ("image_decoder.fc.2.bias", None, "Missing"),
        ("extra", torch.zeros(1), "Unexpected"), ("prompt_learner.meta_net.15.bias", torch.zeros(3), "size mismatch"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_is_refused(chain, key, tensor, word):
    changed = chain[0].head.state_dict() | {key: tensor}
    with pytest.raises(ValueError, match=f"{word}.*notebook 0"):
        anomalygpt.AnomalyHead.from_state({name: value for name, value in changed.items() if value is not None})


def test_a_picture_beside_itself_has_nothing_anomalous_and_a_given_map_makes_the_prompts(model):
    random = np.random.default_rng(0)
    picture, given = random.integers(0, 256, (100, 400, 3), np.uint8), random.random((1, 224, 224), dtype=np.float32)
    beside, told = model.look([picture], references=[picture]), model.look([picture], maps=given)
    assert float(beside.maps.max()) < 1e-5 and np.array_equal(told.maps.numpy(), given)
    assert not torch.equal(told.prompts, beside.prompts)
    with pytest.raises(ValueError, match="uint8 RGB"):
        model.look([picture[0]])


def test_cached_half_precision_features_are_compared_in_single_precision(chain, model):
    seen = model.image_tower.embed_images([tiny.image(chain[2], name) for name in ("query", "normal0")])
    cached = imagebind.ImageFeatures(seen.embedding, seen.taps.half())
    single = imagebind.ImageFeatures(seen.embedding, seen.taps.half().float())
    assert model.bank(cached).dtype == torch.float32
    maps = model.look(cached, references=model.bank(cached)).maps
    torch.testing.assert_close(maps, model.look(single, references=model.bank(single)).maps, atol=0, rtol=0)


def test_words_are_shown_as_they_come(model, look):
    shown = []
    answer = model.ask(look.take([0]), "Is it whole?", max_new_tokens=5, on_text=shown.append)[0]
    assert len(shown) == 5 and shown[-1] == answer and answer.startswith(shown[0])
    assert answer == model.ask(look.take([0, 1]), "Is it whole?", max_new_tokens=5)[0]
    with pytest.raises(language.PromptTooLong, match="Shorten the question"):
        model.ask(look.take([0]), "word " * 3000)


def test_the_stop_token_ends_each_row_by_itself_and_an_answer_may_be_empty(model, look):
    def stopping(token):
        tokens = replace(model.language.tokens, stop_ids=frozenset([token]))
        return replace(model, language=language.Language(model.language.model, tokens))

    rows, shown = model.prompt_rows(look, "Is it whole?"), []
    free = language.generate(model.language, rows, max_new_tokens=8)
    stop = free[1][3]
    assert any(stop not in row[:3] for row in free)
    stopped = language.generate(stopping(stop).language, rows, max_new_tokens=8)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    mute = stopping(free[0][0])
    assert mute.ask(look.take([0]), "Is it whole?", on_text=shown.append) == [""] and not shown


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory):
    return tiny.write_weights(tmp_path_factory.mktemp("home") / "weights", tiny.FIXTURE)


def test_the_prepared_folders_load_to_the_same_chain_and_a_second_load_empties_the_first(chain, weights_dir):
    model, _, fixture = chain
    loaded = anomalygpt.load(weights_dir)
    features = loaded.image_tower.embed_images([tiny.image(fixture, "query")])
    torch.testing.assert_close(features.embedding, fixture["vis.emb"], atol=3e-6, rtol=0)
    torch.testing.assert_close(loaded.text.norm(dim=1), torch.ones(2))
    rows = [torch.randn(12, 32, generator=torch.Generator().manual_seed(0))]
    expected = language.next_logits(model.language, rows)
    torch.testing.assert_close(language.next_logits(loaded.language, rows), expected, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in loaded.language.model.parameters())
    tokens = loaded.language.tokens
    assert [tokens.decode([i]) for i in (*tokens.stop_ids, tokens.yes_id, tokens.no_id)] == ["###", "Yes", "No"]
    new = anomalygpt.load(weights_dir, checkpoint=None)
    assert new.head.prompt_learner.base_prompts.shape == (9, 32) and new.checkpoint_id == "new head"
    for part in (loaded.language.model, loaded.image_tower.visual, loaded.head, loaded.projection):
        assert sum(parameter.numel() for parameter in part.parameters()) == 0


def test_missing_weights_name_the_notebook(weights_dir, tmp_path):
    for checkpoint, notebook in ((weights_dir / "nothing", "notebook 06"), ("train_visa", "01")):
        with pytest.raises(FileNotFoundError, match=notebook):
            anomalygpt.load_head(weights_dir, checkpoint)
    with pytest.raises(FileNotFoundError, match="01"):
        anomalygpt.load(tmp_path)


def test_a_lora_beside_the_weights_speaks_as_the_merged_one(chain, tmp_path):
    """What quantised precisions do, on plain weights: unmerged, in train mode, with gradients to the prompts."""
    model, _, fixture = chain
    wrapped = language.with_lora(tiny.bare_llama(fixture), tiny.write_adapter(tmp_path, fixture))
    beside = language.Language(wrapped.train(), model.language.tokens)
    rows = [torch.randn(12, 32, generator=torch.Generator().manual_seed(0))]
    merged = language.next_logits(model.language, rows)
    torch.testing.assert_close(language.next_logits(beside, rows), merged, atol=2e-5, rtol=0)
    answer = language.generate(beside, rows, max_new_tokens=4)
    assert answer == language.generate(model.language, rows, max_new_tokens=4)
    row = rows[0][None].requires_grad_(True)
    beside.decoder(inputs_embeds=row, use_cache=False).last_hidden_state.sum().backward()
    assert float(row.grad.abs().sum()) > 0


@pytest.mark.parametrize(("precision", "device"), [("8bit", "cpu"), ("int3", "cpu"), ("4bit", "cuda")])
def test_precisions_that_cannot_be_are_refused(precision, device, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="GPU|allowed|pip install bitsandbytes"):
        language.load_language(tmp_path, lora=tmp_path, precision=precision, device=device)


def test_full_gpu_memory_is_one_sentence_and_lets_go_of_the_tensors():
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
    ("gigabytes", "precision", "fits"),
    [(23.6, "bf16", True), (23.6, "fp16", True), (15.8, "fp16", False), (15.8, "8bit", True), (23.6, "fp32", False)],
)
def test_what_fits_a_card(gigabytes, precision, fits, tmp_path, monkeypatch):
    """The true sizes, as files with holes: 13.5 GB of Vicuna, 1.97 GB of ImageBind."""
    for name, size in (("vicuna/model-1.safetensors", 13_476_847_616), ("imagebind/model.safetensors", 1_972_000_000)):
        (tmp_path / name).parent.mkdir()
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    monkeypatch.setattr(anomalygpt.weights, "require", lambda folder, name: folder / name)
    card = type("Properties", (), {"total_memory": gigabytes * 1e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    ask = {"device": "cuda", "precision": precision, "batch_size": 8, "training": precision == "bf16"}
    knobs = "Three knobs: precision '8bit'.* fewer pictures.* a GPU with more memory"
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=knobs):
        assert f"in {precision}" in anomalygpt.check_memory(tmp_path, **ask)
