"""LLaMA's tensors in Meta's files and in Hugging Face folders: names, shapes, order of rows, configuration.

Everything here is arithmetic on names and shapes, so it can be checked at 7B and 13B without their files.
Sources: transformers v4.28 ``convert_llama_weights_to_hf.py`` (names, axes), Meta's ``params.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""The two tensors with one row per token: the only ones that a delta may lengthen."""

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_SPLIT_COLUMNS = ("attention.wo", "feed_forward.w2")
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^rope\.freqs$")


@dataclass(frozen=True)
class MetaTensor:
    """How one Hugging Face tensor is made of Meta's shards.

    Attributes:
        name: Hugging Face key.
        meta_name: Meta's key, the same in every shard.
        shape: shape of the whole.
        axis: axis along which the shards are joined; None when each shard holds the same copy.
        head_dim: rows per attention head when Meta's interleaved rotary pairs must be reordered, else 0.
    """

    name: str
    meta_name: str
    shape: tuple[int, ...]
    axis: int | None
    head_dim: int = 0


def is_ignored(name: str) -> bool:
    """Whether a key is a rotary table, which every model recomputes (a delta holds zeros there, which would harm)."""
    return _IGNORED.search(name) is not None


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key and shape of a Hugging Face LLaMA with untied output, in the order of the layers.

    Args:
        config: values of ``config.json``: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers``,
            ``num_attention_heads``, ``num_key_value_heads``, ``vocab_size``.
    """
    hidden, inner, n_tokens = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    n_query = config["num_attention_heads"] * head_dim
    n_value = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n_tokens, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "self_attn.q_proj": (n_query, hidden), "self_attn.k_proj": (n_value, hidden),
            "self_attn.v_proj": (n_value, hidden), "self_attn.o_proj": (hidden, n_query),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (n_tokens, hidden)}


def meta_tensors(
    shards: Sequence[Mapping[str, tuple[int, ...]]], params: Mapping[str, Any]
) -> tuple[list[MetaTensor], dict[str, Any]]:
    """Plan of a conversion from the shapes in Meta's shards alone.

    Args:
        shards: shape by key, one mapping for each ``consolidated.NN.pth`` in order.
        params: content of ``params.json``. ``vocab_size`` is ignored (it says -1); rows are counted instead.
    Returns:
        the tensors in Hugging Face order, and the values of ``config.json``.
    Raises:
        ValueError: keys are missing, unknown or differ between shards, or shapes do not fit ``params.json``;
            lists all of them.
    """
    config = _config(shards, params)
    shapes = llama_shapes(config)
    embedding = shards[0]["tok_embeddings.weight"]
    # LLaMA 1 and 2 split the embedding over its columns, later models over its rows; the shape tells.
    embedding_axis = 1 if embedding[1] * len(shards) == config["hidden_size"] else 0
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    tensors = []
    for name, shape in shapes.items():
        meta_name = _meta_name(name)
        short = meta_name.split(".", 2)[2].removesuffix(".weight") if meta_name.startswith("layers.") else meta_name
        if name == "model.embed_tokens.weight":
            axis: int | None = embedding_axis
        elif len(shape) == 1:
            axis = None
        else:
            axis = 1 if short in _SPLIT_COLUMNS else 0
        rotated = head_dim if short in ("attention.wq", "attention.wk") else 0
        tensors.append(MetaTensor(name, meta_name, shape, axis, rotated))
    _check_shards(shards, tensors)
    return tensors, config


def pair_order(head_dim: int) -> list[int]:
    """Row order within one head: Meta rotates rows (2i, 2i+1), Hugging Face rows (i, i + head_dim / 2).

    >>> pair_order(6)
    [0, 2, 4, 1, 3, 5]
    """
    return [*range(0, head_dim, 2), *range(1, head_dim, 2)]


def model_size(config: Mapping[str, Any]) -> str:
    """``"7B"``, ``"13B"`` or the dimensions in words."""
    known = {(4096, 32): "7B", (5120, 40): "13B"}
    dims = (config["hidden_size"], config["num_hidden_layers"])
    return known.get(dims, f"{dims[0]} wide, {dims[1]} layers")


def looks_like_llama_2(config: Mapping[str, Any]) -> bool:
    """LLaMA 2 has the shapes of LLaMA 1 at 7B and 13B; only the epsilon of its norms differs."""
    return model_size(config) in ("7B", "13B") and math.isclose(config["rms_norm_eps"], 1e-5, rel_tol=1e-3)


def _config(shards: Sequence[Mapping[str, tuple[int, ...]]], params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = [name for name in ("dim", "n_heads", "n_layers", "norm_eps") if name not in params]
    if wanted:
        raise ValueError(f"params.json lacks {', '.join(wanted)}; it has {', '.join(sorted(params))}.")
    tensors_needed = ("tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight")
    absent = [name for name in tensors_needed if name not in shards[0]]
    if absent:
        raise ValueError(f"not Meta's LLaMA layout: {', '.join(absent)} is missing from consolidated.00.pth.")
    n_tokens = shards[0]["output.weight"][0] * len(shards)
    return {
        "hidden_size": params["dim"],
        "intermediate_size": shards[0]["layers.0.feed_forward.w1.weight"][0] * len(shards),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "vocab_size": n_tokens,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(params.get("rope_theta") or 10000.0),
        "max_position_embeddings": params.get("max_seq_len") or 2048,
    }


def _meta_name(name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    short = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}[rest.removesuffix(".weight")]
    return f"layers.{layer}.{short}.weight"


def _check_shards(shards: Sequence[Mapping[str, tuple[int, ...]]], tensors: Sequence[MetaTensor]) -> None:
    problems = []
    expected = {tensor.meta_name for tensor in tensors}
    for number, shard in enumerate(shards):
        keys = {name for name in shard if not is_ignored(name)}
        problems += [f"consolidated.{number:02d}.pth lacks {name}" for name in sorted(expected - keys)]
        problems += [f"consolidated.{number:02d}.pth has the unknown {name}" for name in sorted(keys - expected)]
    if not problems:
        for tensor in tensors:
            wanted = list(tensor.shape)
            if tensor.axis is not None:
                if wanted[tensor.axis] % len(shards):
                    problems.append(f"{tensor.meta_name}: {wanted} cannot be split over {len(shards)} shards")
                wanted[tensor.axis] //= len(shards)
            for number, shard in enumerate(shards):
                if shard[tensor.meta_name] != tuple(wanted):
                    problems.append(
                        f"consolidated.{number:02d}.pth: {tensor.meta_name} is {shard[tensor.meta_name]}, "
                        f"params.json and {len(shards)} shard(s) ask for {tuple(wanted)}"
                    )
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"These files are not one LLaMA model: {shown}.")
