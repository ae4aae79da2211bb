"""ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP: published keys and shapes, true size and small, and wrong files."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest
import tiny_weights as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_weights import SMALL
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import files, weights
from helpers.clip import backbones
from helpers.weights import WeightFileError, mini, published

LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_imagebind_huge_maps_exactly_onto_open_clip():
    shapes = tiny.imagebind_shapes()
    names, config = published.inspect("imagebind", shapes)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    assert len(shapes) == 687 and names.keys() == model.state_dict().keys() and len(names) == 686
    assert set(names.values()) == shapes.keys() - {"modality_preprocessors.text.mask"}
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 115 and {norm.eps for norm in norms} == {1e-6}
    for tower in (model.visual.transformer, model.transformer):
        assert tower.resblocks[0].attn.num_heads == 16 and isinstance(tower.resblocks[0].mlp.gelu, torch.nn.GELU)


@pytest.mark.parametrize(
    ("family", "shapes", "n_published", "n_kept", "n_numbers"),
    [
        ("pandagpt", tiny.pandagpt_shapes(LLAMA_7B), 258, 258, 37_752_832),
        ("anomalygpt", tiny.anomalygpt_shapes(), 21, 21, 225_326_960 // 2),
        ("anomalyclip", tiny.anomalyclip_shapes(), 32, 16, 22_620_776 // 4),  # its deep projections are never used
    ],
)
def test_as_many_tensors_and_numbers_as_published(family, shapes, n_published, n_kept, n_numbers):
    names, _ = published.inspect(family, shapes)
    assert (len(shapes), len(names)) == (n_published, n_kept) and not [name for name in names if "projections" in name]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == n_numbers


def test_imagebind_towers_give_the_numbers_of_the_original_formulas(tmp_path):
    """A picture as two equal frames through a 3-D convolution, blocks and head, written out from ImageBind's rules."""
    shapes = SMALL["imagebind"] | {"modality_trunks.imu.blocks.0.attn.in_proj_bias": (7,)}
    source = tiny.write_random(tmp_path / "ib.pth", shapes)
    target = published.convert("imagebind", tmp_path / "ib.pth", tmp_path / "out")
    found = load(target)
    model = open_clip.CLIP(**files.read_json(target / "config.json")).eval()
    model.load_state_dict({k: v.float() for k, v in found.items()}, strict=True)
    image = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.encode_image(image)
    torch.testing.assert_close(features, original_vision(source, image), atol=2e-3, rtol=2e-3)
    assert found["logit_scale"] == source["modality_postprocessors.text.1.log_logit_scale"]
    assert {str(t.dtype) for n, t in found.items() if n != "logit_scale"} == {"torch.float16"}


def original_vision(state: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    def norm(x: torch.Tensor, stem: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{stem}.weight"], state[f"{stem}.bias"], 1e-6)

    def linear(x: torch.Tensor, stem: str) -> torch.Tensor:
        return x @ state[f"{stem}weight"].T + state[f"{stem}bias"]

    frames = image[:, :, None].expand(-1, -1, 2, -1, -1)
    kernel = state["modality_preprocessors.vision.rgbt_stem.proj.1.weight"]
    x = functional.conv3d(frames, kernel, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    cls = state["modality_preprocessors.vision.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1) + state["modality_preprocessors.vision.pos_embedding_helper.pos_embed"]
    x = norm(x, "modality_trunks.vision.pre_transformer_layer.0")
    for i in range(2):
        stem = f"modality_trunks.vision.blocks.{i}"
        q, k, v = linear(norm(x, f"{stem}.norm_1"), f"{stem}.attn.in_proj_").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        h = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        x = x + linear(h.transpose(1, 2).flatten(2), f"{stem}.attn.out_proj.")
        x = x + linear(functional.gelu(linear(norm(x, f"{stem}.norm_2"), f"{stem}.mlp.fc1.")), f"{stem}.mlp.fc2.")
    return norm(x, "modality_heads.vision.0")[:, 0] @ state["modality_heads.vision.2.weight"].T


@pytest.mark.parametrize("spelling", [".default.weight", ".weight"])
def test_peft_loads_the_adapter_that_pandagpt_becomes(tmp_path, spelling):
    """Merged by peft itself, each matrix is W + alpha / r * B A of the published file, in either spelling."""
    source = tiny.write_random(tmp_path / "x.pt", SMALL["pandagpt"])
    renamed = {name.replace(".default.weight", spelling): torch.nn.Parameter(item) for name, item in source.items()}
    torch.save(renamed, tmp_path / "x.pt")
    target = published.convert("pandagpt", tmp_path / "x.pt", tmp_path / "out")
    found, config = load(target), files.read_json(target / "adapter_config.json")
    assert found.keys() == {"llama_proj.weight", "llama_proj.bias"} and (config["r"], config["lora_alpha"]) == (4, 4)
    assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())
    model = LlamaForCausalLM(LlamaConfig(**tiny.SMALL_LLAMA, intermediate_size=64, vocab_size=50))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, target).merge_and_unload().state_dict()
    for name, tensor in before.items():
        stem = f"llama_model.base_model.model.{name.removesuffix('.weight')}"
        a, b = (source.get(f"{stem}.lora_{letter}.default.weight") for letter in "AB")
        torch.testing.assert_close(merged[name], tensor if a is None else tensor + b @ a)


def test_anomalygpt_and_anomalyclip_keep_their_numbers(tmp_path):
    source = tiny.write_random(tmp_path / "a.pt", SMALL["anomalygpt"], dtype=torch.float16)
    tiny.assert_same_bits(load(published.convert("anomalygpt", tmp_path / "a.pt", tmp_path / "a")), source)
    source = tiny.write_random(tmp_path / "c.pth", SMALL["anomalyclip"])
    target = published.convert("anomalyclip", tmp_path / "c.pth", tmp_path / "trained_on_visa")
    found = load(target)
    assert all(torch.equal(t, source[f"prompt_learner.{n}"]) for n, t in found.items()) and len(found) == 11
    assert weights.read_ready(target)["component"] == "anomalyclip/trained_on_visa"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("imagebind", "modality_trunks.vision.blocks.1.mlp.fc2.bias"),
        ("pandagpt", "llama_model.base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight"),
        ("anomalygpt", "prompt_learner.meta_net.9.bias"),
        ("anomalyclip", "prompt_learner.token_suffix_neg"),
    ],
)
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_each_named(name, key, tmp_path):
    shapes, stranger, others = SMALL[name], {"prompt_learner.stranger": (3,)}, {**SMALL, name: {}}
    lacking = {k: v for k, v in shapes.items() if k != key}
    for given, words, options in (
        (lacking, f"lacks .*{re.escape(key)}", {}),
        (lacking | stranger, "lacks", {"allow_unknown": True}),
        (dict(list(shapes.items())[1:]), "lacks|is missing", {"allow_unknown": True}),
        (shapes | {key: (*shapes[key][:-1], shapes[key][-1] + 1)}, rf"{re.escape(key)} is \(.*, expected \(", {}),
        (shapes | stranger, "has the unknown .*stranger.*ALLOW_UNKNOWN", {}),
        *((other, "another checkpoint|not a whole", {}) for other in others.values()),
    ):
        tiny.write_random(tmp_path / "x.pt", given)
        with pytest.raises(WeightFileError, match=words):
            published.convert(name, tmp_path / "x.pt", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    tiny.write_random(tmp_path / "x.pt", shapes | stranger)
    target = published.convert(name, tmp_path / "x.pt", tmp_path / "out", allow_unknown=True)
    assert not [key for key in load(target) if "stranger" in key]


def test_standins_have_the_published_layout_and_fit_their_models(tmp_path):
    """ImageBind's comes back as the embedded backbone, bit for bit; AnomalyCLIP's carries its CLIP's own embeddings."""

    def made(component: str) -> dict[str, torch.Tensor]:
        family = component.split("/")[0]
        mini.write(component, tmp_path / f"{family}.pt")
        return load(published.convert(family, tmp_path / f"{family}.pt", tmp_path / family))

    model = backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu").model
    found, shipped = made("imagebind"), model.state_dict()
    assert found.keys() == shipped.keys()
    assert all(torch.equal(found[name].float(), tensor) for name, tensor in shipped.items())
    found, table = made("anomalyclip/trained_on_visa"), shipped["token_embedding.weight"]
    # ids of the specification: SOT, x, damaged, object, ".", EOT
    assert found["tokenized_prompts_neg"][0, 0, :18].tolist() == [49406, *[343] * 12, 13568, 14115, 269, 49407, 0]
    assert torch.equal(found["token_prefix_pos"][0, 0], table[[49406]])
    assert torch.equal(found["token_suffix_neg"][0, 0, :4], table[[13568, 14115, 269, 49407]])
    trained = load_file(mini.ASSETS / "anomalyclip.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in trained.items())
