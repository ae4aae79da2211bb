"""Weight files in their published layouts, at any size, from tables and plain loops of this file alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Shapes = dict[str, tuple[int, ...]]
DIMS = {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "inner": 96, "vocab": 128}
GROUPED = DIMS | {"n_heads": 8, "n_kv_heads": 4}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_NAMES = {  # Meta's -> Hugging Face's
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
}  # fmt: skip


def meta_model(dims: dict = DIMS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole random model under Meta's names, float16, not yet split."""
    generator = torch.Generator().manual_seed(seed)
    dim, inner, n_value = dims["dim"], dims["inner"], dims["dim"] // dims["n_heads"] * dims["n_kv_heads"]
    shapes: Shapes = {"tok_embeddings": (dims["vocab"], dim), "norm": (dim,), "output": (dims["vocab"], dim)}
    for layer in range(dims["n_layers"]):
        block = {
            "attention.wq": (dim, dim), "attention.wk": (n_value, dim), "attention.wv": (n_value, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (inner, dim), "feed_forward.w2": (dim, inner),
            "feed_forward.w3": (inner, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    drawn = {f"{name}.weight": torch.randn(*shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    return {name: (tensor + (1 if "norm" in name else 0)).half() for name, tensor in drawn.items()}


def write_meta(folder: Path, model: dict[str, torch.Tensor], dims: dict = DIMS, n_shards: int = 1) -> Path:
    """Meta's files: ``n_shards`` shards, tensors as views into shared storages, vocab_size -1, rotary table."""
    folder.mkdir(parents=True)
    columns = ("tok_embeddings", "attention.wo", "feed_forward.w2")
    for shard in range(n_shards):
        axes = {name: 1 if any(key in name for key in columns) else 0 for name in model}
        parts = {k: t if t.ndim == 1 else t.chunk(n_shards, dim=axes[k])[shard] for k, t in model.items()}
        storage = torch.cat([part.reshape(-1) for part in parts.values()])  # one storage, as in the originals
        views = storage.split([part.numel() for part in parts.values()])
        content = {name: view.view(part.shape) for (name, part), view in zip(parts.items(), views)}
        torch.save(content | {"rope.freqs": torch.ones(8)}, folder / f"consolidated.{shard:02d}.pth")
    params = {name: dims[name] for name in ("dim", "n_heads", "n_layers")}
    params |= {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
    if dims["n_kv_heads"] != dims["n_heads"]:
        params["n_kv_heads"] = dims["n_kv_heads"]
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def hugging_face(model: dict[str, torch.Tensor], dims: dict = DIMS) -> dict[str, torch.Tensor]:
    """Independent conversion, per head and per pair with plain loops (the rule of transformers 4.28)."""
    head, result = dims["dim"] // dims["n_heads"], {}
    for name, tensor in model.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads, pairs = range(0, len(tensor), head), range(0, head, 2)
            tensor = tensor[[first + pair + side for first in heads for side in (0, 1) for pair in pairs]]
        theirs, layer = name.removesuffix(".weight"), name.split(".")[1]
        if name.startswith("layers."):
            theirs = f"model.layers.{layer}.{_NAMES[theirs.removeprefix(f'layers.{layer}.')]}"
        result[f"{_NAMES.get(theirs, theirs)}.weight"] = tensor
    return result


def fastchat(base: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FastChat's rule, whole model in memory: resize with zero rows, then add in float16."""
    merged = {}
    for name, change in delta.items():
        grown = torch.zeros_like(change)
        grown[: len(base[name])] = base[name].half()
        merged[name] = grown + change.half()
    return merged


def make_delta(base: dict[str, torch.Tensor], extra_rows: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    delta = {}
    for name, tensor in base.items():
        rows = extra_rows if name in EMBEDDINGS else 0
        shape = (tensor.shape[0] + rows, *tensor.shape[1:])
        delta[name] = (torch.randn(*shape, generator=generator) * 0.001).half()
        if rows:
            delta[name][-1] = base[name].float().mean(0).half()
            delta[name][-1, 0] = -0.0  # 0 + (-0) is +0
    return delta


def write_hf(
    folder: Path, tensors: dict[str, torch.Tensor], dims: dict = DIMS, *, suffix: str = "bin", n_files: int = 2
) -> Path:
    """A Hugging Face folder with an index, in either format."""
    folder.mkdir(parents=True)
    names, stem = list(tensors), "pytorch_model" if suffix == "bin" else "model"
    weight_map = {}
    for number in range(n_files):
        keys = names[number * len(names) // n_files : (number + 1) * len(names) // n_files]
        name = f"{stem}-{number + 1:05d}-of-{n_files:05d}.{suffix}"
        part = {key: tensors[key].contiguous().clone() for key in keys}
        (torch.save if suffix == "bin" else save_file)(part, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "hidden_size": dims["dim"], "intermediate_size": dims["inner"], "num_hidden_layers": dims["n_layers"],
        "num_attention_heads": dims["n_heads"], "num_key_value_heads": dims["n_kv_heads"], "rms_norm_eps": 1e-6,
        "vocab_size": dims["vocab"], "model_type": "llama",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


# The smaller checkpoints: keys and shapes as published, from the tables of their repositories.


def tower(stem: str, n_layers: int, width: int) -> Shapes:
    block = {
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "norm_1.weight": (width,), "norm_1.bias": (width,), "norm_2.weight": (width,), "norm_2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    return {f"{stem}.{i}.{name}": shape for i in range(n_layers) for name, shape in block.items()}


def imagebind_shapes(
    *, width: int = 1280, layers: int = 32, patch: int = 14, grid: int = 16, text: int = 1024, text_layers: int = 24,
    joint: int = 1024, n_tokens: int = 49408,
) -> Shapes:  # fmt: skip
    """Vision and text keys of ``imagebind_huge.pth``."""
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


def pandagpt_shapes(config: dict, *, rank: int = 32, n_image: int = 1024) -> Shapes:
    hidden = config["hidden_size"]
    n_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"llama_proj.weight": (hidden, n_image), "llama_proj.bias": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        for module, n_out in (("q_proj", hidden), ("k_proj", n_value), ("v_proj", n_value), ("o_proj", hidden)):
            key = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes |= {f"{key}.lora_A.default.weight": (rank, hidden), f"{key}.lora_B.default.weight": (n_out, rank)}
    return shapes


def anomalygpt_shapes(
    hidden: int = 4096, *, joint: int = 1024, width: int = 1280, channels: tuple[int, ...] = (4, 16, 64, 256, 1024)
) -> Shapes:
    shapes: Shapes = {"prompt_learner.base_prompts": (9, hidden)}
    for i in range(4):
        shapes |= {f"image_decoder.fc.{i}.weight": (joint, width), f"image_decoder.fc.{i}.bias": (joint,)}
    for i, (n_in, n_out) in enumerate(zip((1, *channels), (*channels, hidden))):
        key, side = f"prompt_learner.meta_net.{3 * i}", 5 if i == len(channels) else 3
        shapes |= {f"{key}.weight": (n_out, n_in, side, side), f"{key}.bias": (n_out,)}
    return shapes


def anomalyclip_shapes(width: int = 768, *, n_deep: int = 8) -> Shapes:
    shapes: Shapes = {}
    for side in ("pos", "neg"):
        parts = {"ctx": (1, 1, 12, width), "token_prefix": (1, 1, 1, width), "token_suffix": (1, 1, 64, width)}
        shapes |= {f"{name}_{side}": shape for name, shape in (parts | {"tokenized_prompts": (1, 1, 77)}).items()}
    for i in range(n_deep):
        key = f"compound_prompt_projections.{i}"
        shapes |= {f"compound_prompts_text.{i}": (4, width), f"{key}.weight": (896, width), f"{key}.bias": (896,)}
    return {f"prompt_learner.{name}": shape for name, shape in shapes.items()}


SMALL_LLAMA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {
    "imagebind": imagebind_shapes(width=128, layers=2, patch=4, grid=3, text=64, text_layers=2, joint=20, n_tokens=50),
    "pandagpt": pandagpt_shapes(SMALL_LLAMA, rank=4, n_image=20),
    "anomalygpt": anomalygpt_shapes(64, joint=20, width=128, channels=(2, 4, 4, 8, 8)),
    "anomalyclip": anomalyclip_shapes(24, n_deep=3),
}  # fmt: skip
"""Shapes that fit each other and a language model that is 64 wide."""


def write_random(path: Path, shapes: Shapes, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A torch file with seeded numbers, small, exact in float16 but for scalars, and around one where a norm scales;
    dots in AnomalyCLIP's prefix become its nested dict."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith(".weight")
        drawn = 0.1 * torch.randn(shape, generator=generator) + is_norm
        state[name] = drawn.half().to(dtype) if shape else drawn
        if "tokenized" in name:
            state[name] = torch.randint(0, 49408, shape, generator=generator, dtype=torch.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nested = {name.removeprefix("prompt_learner."): tensor for name, tensor in state.items()}
    torch.save({"prompt_learner": nested} if "ctx_pos" in nested else state, path)
    return state
