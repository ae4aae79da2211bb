"""ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP: published keys and shapes, true size and small, and wrong files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import files, weights
from helpers.weights import WeightFileError, folders, mini, published

LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40}
SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30}
LLAMA_MINI = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def quiet(_: str) -> None: ...


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tower(stem: str, n_layers: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(n_layers):
        block = {
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "norm_1.weight": (width,), "norm_1.bias": (width,), "norm_2.weight": (width,), "norm_2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
        }  # fmt: skip
        shapes |= {f"{stem}.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def imagebind_shapes(
    *, width: int = 1280, layers: int = 32, patch: int = 14, grid: int = 16, text: int = 1024, text_layers: int = 24,
    joint: int = 1024, n_tokens: int = 49408,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Vision and text keys of ``imagebind_huge.pth``, from the table of the specification."""
    return {
        "modality_preprocessors.vision.cls_token": (1, 1, width),
        "modality_preprocessors.vision.rgbt_stem.proj.1.weight": (width, 3, 2, patch, patch),
        "modality_preprocessors.vision.pos_embedding_helper.pos_embed": (1, grid * grid + 1, width),
        "modality_trunks.vision.pre_transformer_layer.0.weight": (width,),
        "modality_trunks.vision.pre_transformer_layer.0.bias": (width,),
        **tower("modality_trunks.vision.blocks", layers, width),
        "modality_heads.vision.0.weight": (width,),
        "modality_heads.vision.0.bias": (width,),
        "modality_heads.vision.2.weight": (joint, width),
        "modality_preprocessors.text.token_embedding.weight": (n_tokens, text),
        "modality_preprocessors.text.pos_embed": (1, 77, text),
        "modality_preprocessors.text.mask": (77, 77),
        **tower("modality_trunks.text.blocks", text_layers, text),
        "modality_heads.text.proj.0.weight": (text,),
        "modality_heads.text.proj.0.bias": (text,),
        "modality_heads.text.proj.1.weight": (joint, text),
        "modality_postprocessors.text.1.log_logit_scale": (),
    }


def pandagpt_shapes(config: dict, *, rank: int = 32, n_image: int = 1024) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    n_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"llama_proj.weight": (hidden, n_image), "llama_proj.bias": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        for module, n_out in (("q_proj", hidden), ("k_proj", n_value), ("v_proj", n_value), ("o_proj", hidden)):
            key = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes[f"{key}.lora_A.default.weight"] = (rank, hidden)
            shapes[f"{key}.lora_B.default.weight"] = (n_out, rank)
    return shapes


def anomalygpt_shapes(hidden: int = 4096, *, joint: int = 1024, width: int = 1280) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"prompt_learner.base_prompts": (9, hidden)}
    for i in range(4):
        shapes |= {f"image_decoder.fc.{i}.weight": (joint, width), f"image_decoder.fc.{i}.bias": (joint,)}
    sizes = {0: (4, 1, 3, 3), 3: (16, 4, 3, 3), 6: (64, 16, 3, 3), 9: (256, 64, 3, 3), 12: (1024, 256, 3, 3)}
    for place, shape in (sizes | {15: (hidden, 1024, 5, 5)}).items():
        shapes[f"prompt_learner.meta_net.{place}.weight"] = shape
        shapes[f"prompt_learner.meta_net.{place}.bias"] = shape[:1]
    return shapes


def anomalyclip_shapes(width: int = 768, *, n_deep: int = 8) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for side in ("pos", "neg"):
        shapes[f"prompt_learner.ctx_{side}"] = (1, 1, 12, width)
        shapes[f"prompt_learner.token_prefix_{side}"] = (1, 1, 1, width)
        shapes[f"prompt_learner.token_suffix_{side}"] = (1, 1, 64, width)
        shapes[f"prompt_learner.tokenized_prompts_{side}"] = (1, 1, 77)
    for i in range(n_deep):
        shapes[f"prompt_learner.compound_prompts_text.{i}"] = (4, width)
        shapes[f"prompt_learner.compound_prompt_projections.{i}.weight"] = (896, width)
        shapes[f"prompt_learner.compound_prompt_projections.{i}.bias"] = (896,)
    return shapes


def write(path: Path, shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype = torch.float32) -> dict:
    """A torch file with seeded numbers; dots in AnomalyCLIP's prefix become its nested dict."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for name in state:
        if "tokenized" in name:
            state[name] = torch.randint(0, 49408, shapes[name], generator=generator, dtype=torch.int32)
    prefix = "prompt_learner."
    nested = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    torch.save({"prompt_learner": nested} if f"{prefix}ctx_pos" in state else state, path)
    return state


# --- true size, without the files -------------------------------------------------------------------------------


def test_imagebind_huge_maps_exactly_onto_open_clip() -> None:
    import open_clip

    shapes = imagebind_shapes()
    assert len(shapes) == 687
    rules, config = published.inspect("imagebind", shapes)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(rules) == 686
    assert {rule.name: rule.shape for rule in rules} == expected
    assert {rule.source for rule in rules} == shapes.keys() - {"modality_preprocessors.text.mask"}
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 115 and {norm.eps for norm in norms} == {1e-6}
    assert model.visual.transformer.resblocks[0].attn.num_heads == 16
    assert model.transformer.resblocks[0].attn.num_heads == 16
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)


@pytest.mark.parametrize(("config", "n_keys", "n_numbers"), [(LLAMA_7B, 258, 37_752_832), (LLAMA_13B, 322, 57_676_800)])
def test_pandagpt_maps_exactly_onto_peft(config: dict, n_keys: int, n_numbers: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    rules, settings = published.inspect("pandagpt", pandagpt_shapes(config), language_model=config)
    rank = settings["r"]
    assert len(rules) == n_keys and rank == 32
    assert sum(torch.Size(rule.shape).numel() for rule in rules) == n_numbers
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config, intermediate_size=11008, vocab_size=32001))
        wrapped = get_peft_model(model, LoraConfig(**settings))
    lora = {f"llama_model.{k}": tuple(v.shape) for k, v in wrapped.state_dict().items() if ".lora_" in k}
    assert {rule.name: rule.shape for rule in rules if "lora" in rule.name} == lora


def test_anomalygpt_has_21_tensors_and_anomalyclip_keeps_16_of_32() -> None:
    rules, _ = published.inspect("anomalygpt", anomalygpt_shapes(), language_model=LLAMA_7B)
    assert len(rules) == 21
    assert 2 * sum(torch.Size(rule.shape).numel() for rule in rules) == 225_326_960
    shapes = anomalyclip_shapes()
    rules, _ = published.inspect("anomalyclip", shapes)
    assert len(shapes) == 32 and len(rules) == 16
    assert 4 * sum(torch.Size(shape).numel() for shape in shapes.values()) == 22_620_776  # bytes, as published
    assert not [rule for rule in rules if "projections" in rule.name]


# --- numbers -----------------------------------------------------------------------------------------------------

SMALL = {"width": 24, "layers": 2, "patch": 4, "grid": 3, "text": 16, "text_layers": 2, "joint": 20, "n_tokens": 50}


def test_imagebind_towers_give_the_numbers_of_the_original_formulas(tmp_path: Path) -> None:
    """A picture as two equal frames through a 3-D convolution, blocks and head, written out from ImageBind's rules."""
    import open_clip

    shapes = imagebind_shapes(**SMALL)
    source = {k: v.half().float() for k, v in write(tmp_path / "ib.pth", shapes).items()}
    for name in source:  # a random stack explodes; norms near one keep it in range
        if "norm" in name or "pre_transformer" in name or name.endswith(("vision.0.weight", "proj.0.weight")):
            source[name] = (1 + 0.1 * source[name]).half().float() if name.endswith("weight") else source[name]
        elif source[name].ndim >= 2:
            source[name] = (0.2 * source[name]).half().float()
    source["modality_preprocessors.vision.rgbt_stem.proj.1.weight"] /= 4  # sums of two halves stay exact halves
    torch.save(source, tmp_path / "ib.pth")
    target = published.convert("imagebind", tmp_path / "ib.pth", tmp_path / "out", heads=(2, 2), log=quiet)
    config = weights.read_ready(target)["settings"]["config"]
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict({k: v.float() for k, v in load(target).items()}, strict=True)
    image = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.encode_image(image)
    torch.testing.assert_close(found, original_vision(source, image), atol=2e-3, rtol=2e-3)


def original_vision(state: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    def norm(x: torch.Tensor, stem: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{stem}.weight"], state[f"{stem}.bias"], 1e-6)

    frames = image[:, :, None].expand(-1, -1, 2, -1, -1)
    kernel = state["modality_preprocessors.vision.rgbt_stem.proj.1.weight"]
    x = torch.nn.functional.conv3d(frames, kernel, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    cls = state["modality_preprocessors.vision.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1) + state["modality_preprocessors.vision.pos_embedding_helper.pos_embed"]
    x = norm(x, "modality_trunks.vision.pre_transformer_layer.0")
    for i in range(2):
        stem = f"modality_trunks.vision.blocks.{i}"
        h = norm(x, f"{stem}.norm_1")
        q, k, v = (h @ state[f"{stem}.attn.in_proj_weight"].T + state[f"{stem}.attn.in_proj_bias"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        h = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        h = h.transpose(1, 2).flatten(2)
        x = x + h @ state[f"{stem}.attn.out_proj.weight"].T + state[f"{stem}.attn.out_proj.bias"]
        h = norm(x, f"{stem}.norm_2") @ state[f"{stem}.mlp.fc1.weight"].T + state[f"{stem}.mlp.fc1.bias"]
        x = x + torch.nn.functional.gelu(h) @ state[f"{stem}.mlp.fc2.weight"].T + state[f"{stem}.mlp.fc2.bias"]
    return norm(x, "modality_heads.vision.0")[:, 0] @ state["modality_heads.vision.2.weight"].T


def test_other_senses_are_left_out_and_the_logit_scale_stays_exact(tmp_path: Path) -> None:
    shapes = imagebind_shapes(**SMALL) | {"modality_trunks.imu.blocks.0.attn.in_proj_bias": (7,)}
    source = write(tmp_path / "ib.pth", shapes)
    target = published.convert("imagebind", tmp_path / "ib.pth", tmp_path / "out", heads=(2, 2), log=quiet)
    found = load(target)
    assert not [name for name in found if "imu" in name]
    assert found["logit_scale"] == source["modality_postprocessors.text.1.log_logit_scale"]
    assert {str(t.dtype) for n, t in found.items() if n != "logit_scale"} == {"torch.float16"}
    assert torch.equal(found["visual.proj"], source["modality_heads.vision.2.weight"].T.half())


@pytest.mark.parametrize("spelling", ["lora_{}.default.weight", "lora_{}.weight"])
def test_pandagpt_keeps_its_numbers_in_either_spelling(tmp_path: Path, spelling: str) -> None:
    shapes = pandagpt_shapes(LLAMA_MINI, rank=4, n_image=20)
    source = write(tmp_path / "x.pt", shapes, dtype=torch.float16)
    renamed = {}
    for name, tensor in source.items():
        for letter in "AB":
            name = name.replace(f"lora_{letter}.default.weight", spelling.format(letter))
        renamed[name] = torch.nn.Parameter(tensor)
    torch.save(renamed, tmp_path / "x.pt")
    target = published.convert("pandagpt", tmp_path / "x.pt", tmp_path / "out", language_model=LLAMA_MINI, log=quiet)
    adapter = load_file(target / "adapter_model.safetensors")
    found = load(target) | {
        f"llama_model.{name.replace('.weight', '.default.weight')}": tensor for name, tensor in adapter.items()
    }
    assert found.keys() == source.keys() and len(load(target)) == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())
    config = files.read_json(target / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_anomalygpt_and_anomalyclip_keep_their_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "a.pt", anomalygpt_shapes(48, joint=20, width=24), dtype=torch.float16)
    target = published.convert("anomalygpt", tmp_path / "a.pt", tmp_path / "a", language_model=LLAMA_MINI, log=quiet)
    found = load(target)
    assert found.keys() == source.keys() and all(torch.equal(found[n], t) for n, t in source.items())
    source = write(tmp_path / "c.pth", anomalyclip_shapes(24, n_deep=3))
    target = published.convert("anomalyclip", tmp_path / "c.pth", tmp_path / "trained_on_visa", log=quiet)
    found = load(target)
    assert all(torch.equal(t, source[f"prompt_learner.{n}"]) for n, t in found.items()) and len(found) == 11
    ready = weights.read_ready(target)
    assert ready["component"] == "anomalyclip/trained_on_visa"
    n = "model.safetensors"
    assert ready["files"][n]["sha256"] == hashlib.sha256((target / n).read_bytes()).hexdigest()


def test_peft_loads_the_adapter_that_pandagpt_becomes(tmp_path: Path) -> None:
    """Merged by peft itself, each matrix is W + alpha / r * B A of the published file."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    source = write(tmp_path / "x.pt", pandagpt_shapes(LLAMA_MINI, rank=4, n_image=20))
    target = published.convert("pandagpt", tmp_path / "x.pt", tmp_path / "out", log=quiet)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_MINI, intermediate_size=64, vocab_size=50))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, target).merge_and_unload().state_dict()
    for name, tensor in before.items():
        stem = f"llama_model.base_model.model.{name.removesuffix('.weight')}"
        a, b = (source.get(f"{stem}.lora_{letter}.default.weight") for letter in "AB")
        torch.testing.assert_close(merged[name], tensor if a is None else tensor + b @ a)
    assert files.read_json(target / "adapter_config.json")["r"] == 4


# --- wrong files (row 19 of the failure table, and more) ----------------------------------------------------------

CASES = {
    "imagebind": imagebind_shapes(**SMALL),
    "pandagpt": pandagpt_shapes(LLAMA_MINI, rank=4, n_image=20),
    "anomalygpt": anomalygpt_shapes(48, joint=20, width=24),
    "anomalyclip": anomalyclip_shapes(24, n_deep=3),
}


def stops(name: str, shapes: dict, tmp_path: Path, match: str) -> None:
    write(tmp_path / "x.pt", shapes)
    with pytest.raises(WeightFileError, match=match):
        published.convert(name, tmp_path / "x.pt", tmp_path / "out", log=quiet)
    assert not list((tmp_path / "out").glob("*.safetensors")) and not (tmp_path / "out" / folders.READY).exists()


@pytest.mark.parametrize("name", CASES)
def test_19_a_missing_an_extra_and_a_misshapen_tensor_are_each_named(name: str, tmp_path: Path) -> None:
    shapes = CASES[name]
    key = {
        "imagebind": "modality_trunks.vision.blocks.1.mlp.fc2.bias",
        "pandagpt": "llama_model.base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight",
        "anomalygpt": "prompt_learner.meta_net.9.bias",
        "anomalyclip": "prompt_learner.token_suffix_neg",
    }[name]
    stops(name, {k: v for k, v in shapes.items() if k != key}, tmp_path, f"lacks .*{re.escape(key)}")
    stops(name, shapes | {"prompt_learner.stranger": (3,)}, tmp_path, "has the unknown .*stranger.*ALLOW_UNKNOWN")
    stops(
        name,
        shapes | {key: (*shapes[key][:-1], shapes[key][-1] + 1)},
        tmp_path,
        rf"{re.escape(key)} is \(.*, expected \(",
    )


@pytest.mark.parametrize("name", CASES)
def test_unknown_keys_are_left_out_when_allowed_and_missing_ones_never(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "x.pt", CASES[name] | {"prompt_learner.stranger": (3,)})
    target = published.convert(name, tmp_path / "x.pt", tmp_path / "out", heads=(2, 2), allow_unknown=True, log=quiet)
    assert not [key for key in load(target) if "stranger" in key] and source
    short = dict(list(CASES[name].items())[1:])
    write(tmp_path / "y.pt", short)
    with pytest.raises(WeightFileError, match="lacks|is missing"):
        published.convert(name, tmp_path / "y.pt", tmp_path / "out2", allow_unknown=True, log=quiet)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("given", CASES)
def test_19_one_checkpoint_given_for_another(name: str, given: str, tmp_path: Path) -> None:
    wrong = CASES[given] if name != given else {}
    stops(name, wrong, tmp_path, "another checkpoint|not a whole")


def test_13b_is_told_that_the_published_checkpoints_are_7b_only(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match="exist for 7B"):
        published.inspect("anomalygpt", anomalygpt_shapes(), language_model=LLAMA_13B)
    with pytest.raises(WeightFileError, match="40.*32|same size"):
        published.inspect("pandagpt", pandagpt_shapes(LLAMA_7B), language_model=LLAMA_13B)


# --- stand-ins ----------------------------------------------------------------------------------------------------


def test_standins_have_the_published_layout_and_fit_their_models(tmp_path: Path) -> None:
    for family, name in (("pandagpt", "pandagpt"), ("anomalygpt", "anomalygpt/train_visa")):
        mini.write(name, tmp_path / f"{family}.pt")
        raw, target = tmp_path / f"{family}.pt", tmp_path / family
        published.convert(family, raw, target, language_model=SMOLLM2, log=quiet)
    assert len(load(tmp_path / "anomalygpt")) == 21


def test_imagebind_standin_comes_back_as_the_embedded_backbone(tmp_path: Path) -> None:
    """Through ImageBind's names, frames and transposes and the converter: bit for bit, but for the epsilon."""
    from helpers.clip import backbones

    mini.write("imagebind", tmp_path / "ib.pth")
    published.convert("imagebind", tmp_path / "ib.pth", tmp_path / "ib", heads=(4, 3), log=quiet)
    found, shipped = load(tmp_path / "ib"), backbones.art_vit_mini().state_dict()
    assert found.keys() == shipped.keys()
    for name, tensor in shipped.items():
        assert torch.equal(found[name].float(), tensor), name


def test_anomalyclip_standin_carries_its_clip_s_own_embeddings(tmp_path: Path) -> None:
    from helpers.clip import backbones

    mini.write("anomalyclip/trained_on_visa", tmp_path / "c.pth")
    found = load(published.convert("anomalyclip", tmp_path / "c.pth", tmp_path / "c", log=quiet))
    clip = backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")
    table = clip.model.token_embedding.weight
    # ids of the specification: SOT, x, damaged, object, ".", EOT
    assert found["tokenized_prompts_neg"][0, 0, :18].tolist() == [49406, *[343] * 12, 13568, 14115, 269, 49407, 0]
    assert torch.equal(found["token_prefix_pos"][0, 0], table[[49406]])
    assert torch.equal(found["token_suffix_neg"][0, 0, :4], table[[13568, 14115, 269, 49407]])
    trained = load_file(mini.ASSETS / "anomalyclip.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in trained.items())
    assert {"ctx_pos", "ctx_neg", "compound_prompts_text.0"} <= trained.keys()
