"""The language model: Meta's LLaMA -> Hugging Face folder, and base + delta -> merged Vicuna.

One pass over the files in pieces of 4 MB: memory does not grow with the model, numbers are moved or added exactly as
FastChat adds them, and an interrupted run goes on where it stopped (see :mod:`helpers.weights.folders`).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers import files
from helpers.weights import folders
from helpers.weights.folders import SHARD_BYTES, account
from helpers.weights.tensors import Tensor, WeightFileError, read_index

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # one row per token: all that a delta may lengthen

_LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
# Rotary tables: every model recomputes them, and a delta holds zeros there, which would harm.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^rope\.freqs$")
_SIZES = {(4096, 32): "7B", (5120, 40): "13B"}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
_CONFIG = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
_SENTENCEPIECE = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
    "clean_up_tokenization_spaces": False, "model_max_length": 2048, "bos_token": "<s>", "eos_token": "</s>",
    "unk_token": "<unk>",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A LLaMA on disk in either form: tensors by Hugging Face key, in the order of the file, and its configuration."""

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def size(self) -> str:
        dims = (self.config["hidden_size"], self.config["num_hidden_layers"])
        return _SIZES.get(dims, f"{dims[0]} wide, {dims[1]} layers")


def convert_llama(source: Path, target: Path, *, shard_bytes: int = SHARD_BYTES, allow_unknown: bool = False) -> Path:
    """Convert Meta's ``consolidated.*.pth`` into a Hugging Face folder; numbers are moved, never rounded.

    Args:
        source: folder with ``consolidated.00.pth`` ..., ``params.json`` and, there or above it, the tokenizer.
        target, shard_bytes: folder to write, and its largest file.
        allow_unknown: leave out keys that LLaMA does not have instead of stopping.
    Raises:
        FileNotFoundError, ValueError, OSError: files are missing (all are named); damaged, of another model, or the
            target belongs to another job; the disk is too small.
    """
    model = open_meta(Path(source), allow_unknown=allow_unknown)
    beside = [model.folder, model.folder.parent]
    return _write(model.tensors, model.config, target, "llama", beside, {"meta": str(source)}, shard_bytes)


def merge_delta(
    base: Path, delta: Path, target: Path, *, version: str | None = None, shard_bytes: int = SHARD_BYTES,
    allow_unknown: bool = False,
) -> Path:  # fmt: skip
    """Add delta weights to a base model; bit for bit what FastChat 0.1.10 (v0) and 0.2 (v1.1) write.

    Both are cast to float16, then added. Where the delta has one row more than the base (v0's ``[PAD]``), the base
    counts as zero there. Sources: lm-sys/FastChat @f34f28ce and @074f0b18, ``fastchat/model/apply_delta.py``.

    Args:
        base: Hugging Face folder (safetensors or ``.bin``), or Meta's folder: then the converted base is never written.
        delta: Hugging Face folder of the delta; its tokenizer is taken, as FastChat does.
        version: ``"v0"`` or ``"v1.1"`` to insist on one; None accepts either, told apart by their rows.
        target, shard_bytes, allow_unknown: as in :func:`convert_llama`.
    Raises:
        FileNotFoundError, ValueError, OSError: as in :func:`convert_llama`; base and delta that do not fit.
    """
    left = open_model(Path(base), allow_unknown=allow_unknown)
    right = open_folder(Path(delta), allow_unknown=allow_unknown)
    kind = _check_pair(left, right, version)
    ratio, notes = _compare(left, right)
    print(f"delta {kind} on {left.size}: {ratio:.2f} of the base in size")
    sums = {name: _sum(left.tensors[name], tensor) for name, tensor in right.tensors.items()}
    config = left.config | {"vocab_size": right.config["vocab_size"]}
    origin = {"base": str(base), "delta": str(delta), "version": kind, "delta_to_base": round(ratio, 3)}
    beside = [right.folder, left.folder, left.folder.parent]
    return _write(sums, config, target, "vicuna", beside, origin, shard_bytes, notes)


def adopt_merged(source: Path, target: Path, *, shard_bytes: int = SHARD_BYTES, allow_unknown: bool = False) -> Path:
    """Copy a Vicuna that was merged elsewhere as float16 safetensors; the rest as in :func:`merge_delta`."""
    model = open_folder(Path(source), allow_unknown=allow_unknown)
    _refuse_llama_2(model)
    halves = {name: replace(tensor, dtype=torch.float16) for name, tensor in model.tensors.items()}
    return _write(halves, model.config, target, "vicuna", [model.folder], {"merged": str(source)}, shard_bytes)


def _write(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], target: Path, component: str, beside: Sequence[Path],
    source: Mapping[str, Any], shard_bytes: int, notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """A model's folder, with the tokenizer of the first folder ``beside`` that has one."""
    found = [path for folder in beside for path in folder.glob("tokenizer.*") if path.suffix in (".model", ".json")]
    if not found:
        raise FileNotFoundError(f"no tokenizer.model in {', '.join(map(str, beside))}. Copy LLaMA's there.")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    small = partial(_write_small, config=config, dtype=dtype, tokenizer=found[0].parent)
    return folders.write_folder(
        target, tensors, small, component=component, settings={"config": config}, source=source, notes=notes,
        shard_bytes=shard_bytes,
    )  # fmt: skip


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key and shape of the LLaMA that a ``config.json`` describes, in the order of the layers."""
    hidden, inner, n_tokens = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (n_value, hidden),
        "self_attn.v_proj": (n_value, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS[0]: (n_tokens, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,), EMBEDDINGS[1]: (n_tokens, hidden)}


def open_model(folder: Path, *, allow_unknown: bool = False) -> Model:
    """A LLaMA in either form: Meta's files where there is a ``params.json`` and no ``config.json``."""
    is_meta = (folder / "params.json").exists() and not (folder / "config.json").exists()
    return (open_meta if is_meta else open_folder)(folder, allow_unknown=allow_unknown)


def open_meta(folder: Path, *, allow_unknown: bool = False) -> Model:
    """Meta's shards as one model; only tables of contents and the norms are read."""
    params = _read_settings(folder / "params.json", ("dim", "n_heads", "n_layers", "norm_eps"))
    there = sorted(path.name for path in folder.glob("consolidated*.pth"))
    n_files = max(1, len(there))
    names = [f"consolidated.{number:02d}.pth" for number in range(n_files)]
    if there != names:
        raise FileNotFoundError(
            f"{folder} holds {', '.join(there) or 'no weights'}, not {', '.join(names)}. Put the missing ones there, "
            f"and give each its name."
        )
    shards = [{name_of(key): item for key, item in _read(folder / name).items()} for name in names]
    gate = "model.layers.0.mlp.gate_proj.weight"
    if EMBEDDINGS[1] not in shards[0] or gate not in shards[0]:
        raise WeightFileError(f"{folder / names[0]} does not hold Meta's LLaMA: output or feed_forward.w1 is missing.")
    config = {
        "hidden_size": params["dim"], "num_hidden_layers": params["n_layers"], "rms_norm_eps": params["norm_eps"],
        "num_attention_heads": params["n_heads"], "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "intermediate_size": shards[0][gate].shape[0] * n_files,
        "vocab_size": shards[0][EMBEDDINGS[1]].shape[0] * n_files,  # params.json says -1, or what a mirror wrote
        "rope_theta": float(params.get("rope_theta") or 10000.0),
        "max_position_embeddings": params.get("max_seq_len") or 2048,
    }  # fmt: skip
    shapes, tensors = shapes_of(config), {}
    cut = {k: tuple(n // n_files if i == axis_of(k) else n for i, n in enumerate(s)) for k, s in shapes.items()}
    for name, shard in zip(names, shards):
        found = {key: item.shape for key, item in shard.items()}
        account(f"LLaMA model of {n_files} files in {folder / name}", found, cut, allow_unknown=allow_unknown)
    for name, shape in shapes.items():
        parts, axis = [shard[name] for shard in shards], axis_of(name)
        norms = [part.whole() for part in parts] if axis is None else []
        if len({part.dtype for part in parts}) > 1 or not all(torch.equal(norm, norms[0]) for norm in norms):
            raise WeightFileError(f"{folder}: {name} differs between the files: they are shards of different models.")
        is_rotated = re.search(r"self_attn\.[qk]_proj", name)
        head = params["dim"] // params["n_heads"] if is_rotated else 1
        rows = partial(_meta_rows, parts, axis, head)
        tensors[name] = Tensor(parts[0].dtype, shape, tuple(folder / name for name in names), rows, head)
    return Model(folder, tensors, config)


def name_of(key: str) -> str:
    """Hugging Face's name of one of Meta's keys; unknown keys stay as they are."""
    if layer := re.fullmatch(rf"(layers\.\d+)\.({'|'.join(_LAYER)})\.weight", key):
        return f"model.{layer[1]}.{_LAYER[layer[2]]}.weight"
    outer = key.removesuffix(".weight")
    return f"{_OUTER[outer]}.weight" if outer in _OUTER else key


def axis_of(name: str) -> int | None:
    """Axis along which Meta cuts a tensor, by either name, into files; norms are repeated in each."""
    if "norm" in name:
        return None
    return 1 if re.search(r"embed|attention\.wo|w2|o_proj|down_proj", name) else 0


def _meta_rows(parts: Sequence[Tensor], axis: int | None, head: int, start: int, stop: int) -> torch.Tensor:
    """Rows of the joined tensor in Hugging Face's order."""
    if axis is None:
        return parts[0].rows(start, stop)
    if axis == 1:
        return torch.cat([part.rows(start, stop) for part in parts], dim=1)
    n = parts[0].shape[0]
    spans = [(part, max(start - i * n, 0), min(stop - i * n, n)) for i, part in enumerate(parts)]
    return halves_first(torch.cat([part.rows(low, high) for part, low, high in spans if low < high]), head)


def halves_first(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Whole heads from Meta's order to Hugging Face's: rotary pairs (2i, 2i + 1) become rows (i, i + head / 2)."""
    if head == 1:
        return rows
    # (heads * head, hidden) -> (heads, head / 2, 2, hidden) -> halves first
    return rows.reshape(-1, head // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def open_folder(folder: Path, *, allow_unknown: bool = False) -> Model:
    """A Hugging Face folder of safetensors or ``.bin`` files; reads tables of contents only."""
    names = _weight_files(folder)
    raw = _read_settings(folder / "config.json", _CONFIG)
    stored = {key: item for name in names for key, item in _read(folder / name).items()}
    config = {key: raw[key] for key in _CONFIG} | {
        "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "vocab_size": stored[EMBEDDINGS[0]].shape[0] if EMBEDDINGS[0] in stored else raw.get("vocab_size", 0),
        "rope_theta": float((raw.get("rope_parameters") or raw).get("rope_theta") or 10000.0),
        "max_position_embeddings": raw.get("max_position_embeddings") or 2048,
    }
    shapes = shapes_of(config)
    found = {key: item.shape for key, item in stored.items()}
    account(f"LLaMA model in {folder}", found, shapes, allow_unknown=allow_unknown)
    return Model(folder, {key: item for key, item in stored.items() if key in shapes}, config)


def _read(path: Path) -> dict[str, Tensor]:
    return {key: item for key, item in read_index(path).items() if not _IGNORED.search(key)}


def _read_settings(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """``params.json`` or ``config.json``, with every number that has no safe default."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Fetch it: it is published beside the weights, and small.")
    content = files.read_json(path)
    if lacking := [key for key in wanted if not isinstance(content.get(key), int | float)]:
        raise WeightFileError(f"{path} lacks {', '.join(lacking)}. Fetch the published file.")
    return content


def _weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files in order, from its index where there is one."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.exists():
            names = sorted(set(files.read_json(index).get("weight_map", {}).values()))
            if not names:
                raise WeightFileError(f"{index} lists no tensors: an earlier tool failed. Fetch it again.")
            if absent := [name for name in names if not (folder / name).exists()]:
                there = sorted(path.name for path in folder.glob(f"*{Path(stem).suffix}"))
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(absent)} (it holds {', '.join(there) or 'none'}). Fetch or rename them."
                )
            return names
        if (folder / stem).exists():
            return [stem]
    raise FileNotFoundError(f"{folder} holds no model.safetensors or pytorch_model.bin, whole or with an index.")


def _check_pair(base: Model, delta: Model, version: str | None) -> str:
    """``"v0"`` or ``"v1.1"``, from the shapes alone."""
    if base.size != delta.size:
        raise WeightFileError(f"{base.folder} is {base.size}, {delta.folder} is for {delta.size}. Use the same size.")
    rows = [model.config["vocab_size"] for model in (base, delta)]
    kind = {0: "v1.1", 1: "v0"}.get(rows[1] - rows[0])
    ready = base.folder / folders.READY
    is_merged = (ready.exists() and files.read_json(ready)["component"] == "vicuna") or rows[0] == 32001
    if kind is None or is_merged or version not in (None, kind):
        raise WeightFileError(
            f"{base.folder} has {rows[0]} token rows{' and is merged already' if is_merged else ''}, {delta.folder} "
            f"has {rows[1]} (wanted: {version or 'any version'}). Allowed are LLaMA with 32000 rows and Vicuna's delta "
            f"v0 with 32001 or v1.1 with 32000. Check which delta was downloaded."
        )
    _refuse_llama_2(base)
    return kind


def _refuse_llama_2(model: Model) -> None:
    """LLaMA 2 has the shapes of LLaMA 1; only the epsilon of its norms differs."""
    if model.size in _SIZES.values() and math.isclose(model.config["rms_norm_eps"], 1e-5, rel_tol=1e-3):
        raise WeightFileError(f"{model.folder} is LLaMA 2 (norm epsilon 1e-05): it would talk nonsense. Use LLaMA 1.")


def _compare(base: Model, delta: Model) -> tuple[float, list[str]]:
    """Size of the delta in units of the base, from a few rows, and remarks on both."""
    name = "model.layers.0.mlp.down_proj.weight"
    left, right = (model.tensors[name].rows(0, 16).half() for model in (base, delta))
    ratio = float(right.float().norm() / left.float().norm().clamp_min(1e-12))
    if ratio > 0.9:
        raise WeightFileError(
            f"{delta.folder} is not a delta but a whole model (size {ratio:.2f} of the base): use BASE = 'merged'."
        )
    notes = [
        f"{model.folder.name} is stored as {str(model.tensors[name].dtype)[6:]}; rounded to float16 before adding."
        for model in (base, delta)
        if model.tensors[name].dtype != torch.float16
    ]
    if float(((left.view(torch.int16) & 7) == 0).float().mean()) > 0.9:  # 1/8 of true float16 numbers end like that
        notes.append("the base was rounded to bfloat16: the merge misses the exact Vicuna by about 3 % of the delta.")
    return ratio, notes


def _sum(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta in float16. Rows beyond the base count as zero, and zero is really added: 0 + (-0) is +0."""

    def rows(start: int, stop: int) -> torch.Tensor:
        right = delta.rows(start, stop).half()
        left = base.rows(start, min(stop, base.shape[0])).half() if start < base.shape[0] else right[:0]
        if len(left) < len(right):
            left = torch.cat([left, left.new_zeros(len(right) - len(left), *right.shape[1:])])
        return left + right

    return Tensor(torch.float16, delta.shape, tuple(dict.fromkeys(base.files + delta.files)), rows, base.multiple)


def _write_small(target: Path, *, config: Mapping[str, Any], dtype: str, tokenizer: Path) -> None:
    """``config.json`` and the tokenizer's files; type and rotary base under both names, for transformers 4 and 5."""
    text = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 1,
        "eos_token_id": 2, "use_cache": True, "rope_scaling": None, "torch_dtype": dtype, "dtype": dtype,
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
    }  # fmt: skip
    files.write_json(target / "config.json", text | dict(config))
    is_sentencepiece = (tokenizer / "tokenizer.model").exists()
    for name in ("tokenizer.model",) if is_sentencepiece else _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            with files.atomic_path(target / name) as temporary:
                shutil.copyfile(tokenizer / name, temporary)
    if is_sentencepiece:
        # Old folders carry empty or wrong special tokens (decapoda, early v0 deltas): ours are written instead.
        files.write_json(target / "tokenizer_config.json", _SENTENCEPIECE)
