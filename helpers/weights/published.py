"""The smaller checkpoints: ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP, from their published files to safetensors.

The original programs load these with ``strict=False``: a wrong file loads "fine" and changes nothing. Here every key
and every shape is accounted for before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from helpers import files
from helpers.weights.folders import Log, Shapes, Tensor, account, write_folder
from helpers.weights.tensors import Stored, WeightFileError, read_index

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Rule(NamedTuple):
    """How one tensor of the result is made: key, key in the published file, shape, and what happens to the numbers.

    ``"sum_time"``: ImageBind shows a picture as two equal frames, so the patch kernel is summed over them.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    change: str = "copy"


class Layout(NamedTuple):
    """What a published file holds: tensors to keep, settings, tensors to leave out, and the language model it fits."""

    rules: list[Rule]
    config: dict[str, Any]
    unused: Shapes = MappingProxyType({})
    optional: Shapes = MappingProxyType({})
    fits: Mapping[str, int] = MappingProxyType({})


def convert(
    family: str, source: Path, target: Path, *, language_model: Mapping[str, Any] | None = None,
    heads: tuple[int, int] = (16, 16), allow_unknown: bool = False, log: Log = print,
) -> Path:  # fmt: skip
    """Write a published checkpoint as a folder with ``model.safetensors`` and, where it has settings, their files.

    Args:
        family: ``"imagebind"`` (vision and text towers in float16, beside the arguments of ``open_clip.CLIP``),
            ``"pandagpt"`` (the projection of the image vector, and LoRA as an adapter under peft's own names),
            ``"anomalygpt"`` (image decoder, prompt learner) or ``"anomalyclip"`` (the learned prompts).
        source, target: the published file, only read, and the folder to write.
        language_model, heads, allow_unknown: see :func:`inspect`.
        log: receives one sentence at a time.
    Raises:
        FileNotFoundError: no such file.
        WeightFileError: damaged, another checkpoint, or for a language model of another size; nothing is written.
    """
    index = read_index(Path(source))
    shapes = {name: item.shape for name, item in index.items()}
    rules, config = inspect(family, shapes, language_model=language_model, heads=heads, allow_unknown=allow_unknown)
    name = family if family in ("imagebind", "pandagpt") else f"{family}/{Path(target).name}"
    lora = {rule.name: index[rule.source] for rule in rules if ".lora_" in rule.name}

    def write_small(folder: Path) -> None:
        if lora:
            _write_adapter(folder, lora, config)
        elif config:
            files.write_json(folder / "config.json", config)

    tensors = {rule.name: _tensor(rule, index[rule.source], family) for rule in rules if rule.name not in lora}
    return write_folder(
        Path(target), tensors, component=name, settings={"config": config}, source={"file": str(source)},
        write_small=write_small, shard_bytes=1 << 62, log=log,
    )  # fmt: skip


def inspect(
    family: str, shapes: Shapes, *, language_model: Mapping[str, Any] | None = None,
    heads: tuple[int, int] = (16, 16), allow_unknown: bool = False,
) -> tuple[list[Rule], dict[str, Any]]:  # fmt: skip
    """Rules of :func:`convert` from keys and shapes alone, and the settings to write beside the result.

    Args:
        family, shapes: see :func:`convert`; shape of each tensor of the file, by key.
        language_model: ``config.json`` of the model that PandaGPT or AnomalyGPT must fit; None skips that check.
        heads: attention heads of ImageBind's vision and text towers; shapes do not tell them.
        allow_unknown: leave out keys that the checkpoint should not have instead of stopping.
    Raises:
        WeightFileError: names every key and shape that is not as published.
    """
    layouts = {
        "imagebind": lambda shapes: _imagebind(shapes, heads), "pandagpt": _pandagpt, "anomalygpt": _anomalygpt,
        "anomalyclip": _anomalyclip,
    }  # fmt: skip
    if family not in layouts:
        raise ValueError(f"{family!r} is unknown; allowed are {', '.join(layouts)}.")
    layout: Layout = layouts[family](shapes)
    fits = dict(layout.fits)
    there = {key: language_model[key] for key in fits} if language_model else fits
    if there != fits:
        raise WeightFileError(
            f"this {family} file is for a language model of {fits}, the prepared one has {there}. Use "
            f"files of the same size; AnomalyGPT's exist for 7B only."
        )
    expected = {rule.source: source_shape(rule) for rule in layout.rules} | dict(layout.unused)
    account(f"{family} checkpoint", shapes, expected, optional=layout.optional, allow_unknown=allow_unknown)
    return layout.rules, layout.config


def _imagebind(shapes: Shapes, heads: tuple[int, int]) -> Layout:
    """ImageBind's towers, with the arguments of ``open_clip.CLIP``; the other four senses are left out."""
    vision, text = "modality_preprocessors.vision", "modality_preprocessors.text"
    width, _, _, patch, _ = _shape(shapes, f"{vision}.rgbt_stem.proj.1.weight", 5)
    n_tokens, text_width = _shape(shapes, f"{text}.token_embedding.weight", 2)
    grid = round((_shape(shapes, f"{vision}.pos_embedding_helper.pos_embed", 3)[1] - 1) ** 0.5)
    context = _shape(shapes, f"{text}.pos_embed", 3)[1]
    eps = {"norm_kwargs": {"eps": 1e-6}}  # open_clip's default is 1e-5
    config = {
        "embed_dim": _shape(shapes, "modality_heads.vision.2.weight", 2)[0],
        "quick_gelu": False,
        "vision_cfg": eps | {
            "image_size": grid * patch, "patch_size": patch, "width": width, "head_width": width // heads[0],
            "layers": _count(shapes, r"modality_trunks\.vision\.blocks\.(\d+)\."),
        },
        "text_cfg": eps | {
            "context_length": context, "vocab_size": n_tokens, "width": text_width, "heads": heads[1],
            "layers": _count(shapes, r"modality_trunks\.text\.blocks\.(\d+)\."),
        },
    }  # fmt: skip
    others = re.compile(r"modality_\w+\.(audio|depth|thermal|imu)\.")
    optional = {name: shape for name, shape in shapes.items() if others.match(name)}
    optional[f"{text}.mask"] = (context, context)  # the causal mask, which open_clip makes itself
    return Layout(rules_of_clip(config), config, optional=optional)


def rules_of_clip(config: Mapping[str, Any]) -> list[Rule]:
    """Where each tensor of ``open_clip.CLIP(**config)`` stands in ImageBind's published file."""
    tower, words, joint = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, patch, text_width = tower["width"], tower["patch_size"], words["width"]
    places = ((tower["image_size"] // patch) ** 2 + 1, width)
    vision, text = "modality_preprocessors.vision", "modality_preprocessors.text"
    return [
        Rule("logit_scale", "modality_postprocessors.text.1.log_logit_scale", ()),
        Rule("visual.class_embedding", f"{vision}.cls_token", (width,), "reshape"),
        Rule("visual.positional_embedding", f"{vision}.pos_embedding_helper.pos_embed", places, "reshape"),
        Rule("visual.conv1.weight", f"{vision}.rgbt_stem.proj.1.weight", (width, 3, patch, patch), "sum_time"),
        *_pair("visual.ln_pre", "modality_trunks.vision.pre_transformer_layer.0", width),
        *_blocks("visual.transformer.resblocks", "modality_trunks.vision.blocks", tower["layers"], width),
        *_pair("visual.ln_post", "modality_heads.vision.0", width),
        Rule("visual.proj", "modality_heads.vision.2.weight", (width, joint), "transpose"),
        Rule("token_embedding.weight", f"{text}.token_embedding.weight", (words["vocab_size"], text_width)),
        Rule("positional_embedding", f"{text}.pos_embed", (words["context_length"], text_width), "reshape"),
        *_blocks("transformer.resblocks", "modality_trunks.text.blocks", words["layers"], text_width),
        *_pair("ln_final", "modality_heads.text.proj.0", text_width),
        Rule("text_projection", "modality_heads.text.proj.1.weight", (text_width, joint), "transpose"),
    ]


def _pandagpt(shapes: Shapes) -> Layout:
    """PandaGPT, with the arguments of ``peft.LoraConfig``. Both spellings of LoRA's keys are read."""
    stem = "llama_model.base_model.model.model.layers"
    names = {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name): name for name in shapes}
    renamed = {name: shapes[old] for name, old in names.items()}
    rank, hidden = _shape(renamed, f"{stem}.0.self_attn.q_proj.lora_A.default.weight", 2)
    n_value = _shape(renamed, f"{stem}.0.self_attn.v_proj.lora_B.default.weight", 2)[0]
    kept = {"llama_proj.weight": (hidden, _shape(renamed, "llama_proj.weight", 2)[1]), "llama_proj.bias": (hidden,)}
    n_layers = _count(renamed, re.escape(stem) + r"\.(\d+)\.")
    for layer in range(n_layers):
        for module in LORA_MODULES:
            key = f"{stem}.{layer}.self_attn.{module}"
            n_out = n_value if module in ("k_proj", "v_proj") else hidden
            kept |= {f"{key}.lora_A.default.weight": (rank, hidden), f"{key}.lora_B.default.weight": (n_out, rank)}
    config = {
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.1, "target_modules": list(LORA_MODULES), "bias": "none",
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    rules = [Rule(name, names.get(name, name), shape) for name, shape in kept.items()]
    return Layout(rules, config, fits={"hidden_size": hidden, "num_hidden_layers": n_layers})


def _anomalygpt(shapes: Shapes) -> Layout:
    """AnomalyGPT: exactly 21 tensors, under their published names."""
    joint, width = _shape(shapes, "image_decoder.fc.0.weight", 2)
    n_prompts, hidden = _shape(shapes, "prompt_learner.base_prompts", 2)
    kept: dict[str, tuple[int, ...]] = {}
    for tap in range(4):
        kept |= {f"image_decoder.fc.{tap}.weight": (joint, width), f"image_decoder.fc.{tap}.bias": (joint,)}
    kept["prompt_learner.base_prompts"] = (n_prompts, hidden)
    n_in = 1
    for place in (0, 3, 6, 9, 12, 15):  # the gaps are the ReLU and the pooling
        key = f"prompt_learner.meta_net.{place}"
        n_out, side = (hidden, 5) if place == 15 else (_shape(shapes, f"{key}.weight", 4)[0], 3)
        kept |= {f"{key}.weight": (n_out, n_in, side, side), f"{key}.bias": (n_out,)}
        n_in = n_out
    return Layout([Rule(name, name, shape) for name, shape in kept.items()], {}, fits={"hidden_size": hidden})


def _anomalyclip(shapes: Shapes) -> Layout:
    """AnomalyCLIP: 16 of the 32 published tensors; the others its own program never uses."""
    prefix = "prompt_learner."
    n_context, width = _shape(shapes, f"{prefix}ctx_pos", 4)[2:]
    n_text = _shape(shapes, f"{prefix}tokenized_prompts_pos", 3)[2]
    n_replaced = _shape(shapes, f"{prefix}compound_prompts_text.0", 2)[0]
    kept: dict[str, tuple[int, ...]] = {}
    for side in ("pos", "neg"):
        kept[f"ctx_{side}"] = (1, 1, n_context, width)
        kept[f"token_prefix_{side}"] = (1, 1, 1, width)
        kept[f"token_suffix_{side}"] = (1, 1, n_text - 1 - n_context, width)
        kept[f"tokenized_prompts_{side}"] = (1, 1, n_text)
    unused: dict[str, tuple[int, ...]] = {}
    for i in range(_count(shapes, re.escape(prefix) + r"compound_prompts_text\.(\d+)$")):
        kept[f"compound_prompts_text.{i}"] = (n_replaced, width)
        key = f"{prefix}compound_prompt_projections.{i}"
        n_out = _shape(shapes, f"{key}.weight", 2)[0]
        unused |= {f"{key}.weight": (n_out, width), f"{key}.bias": (n_out,)}
    return Layout([Rule(name, prefix + name, shape) for name, shape in kept.items()], {}, unused)


def _tensor(rule: Rule, stored: Stored, family: str) -> Tensor:
    """The tensor that a rule describes; ImageBind's become float16, but for the logit scale, one number."""
    dtype = torch.float16 if family == "imagebind" and rule.name != "logit_scale" else stored.dtype
    if rule.change == "copy":
        return Tensor(dtype, rule.shape, (stored.path,), stored.rows)

    def rows(start: int, stop: int) -> torch.Tensor:
        if rule.change == "sum_time":  # (rows, 3, 2, p, p) -> (rows, 3, p, p), in the stored precision
            return stored.rows(start, stop).sum(2)
        whole = stored.rows(0, stored.shape[0])  # at most 10 MB as published
        return (whole.t().contiguous() if rule.change == "transpose" else whole.reshape(rule.shape))[start:stop]

    return Tensor(dtype, rule.shape, (stored.path,), rows)


def _write_adapter(folder: Path, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> None:
    """PandaGPT's LoRA as ``peft.PeftModel.from_pretrained`` reads it."""
    matrices = {
        name.removeprefix("llama_model.").replace(".default.", "."): item.rows(0, item.shape[0])
        for name, item in stored.items()
    }
    with files.atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file(matrices, temporary, metadata={"format": "pt"})
    extra = {"peft_type": "LORA", "inference_mode": True, "base_model_name_or_path": None}
    files.write_json(folder / "adapter_config.json", dict(config) | extra)


def _pair(name: str, source: str, width: int) -> list[Rule]:
    return [Rule(f"{name}.{part}", f"{source}.{part}", (width,)) for part in ("weight", "bias")]


def _blocks(name: str, source: str, n_blocks: int, width: int) -> Iterator[Rule]:
    """Transformer blocks, the same in both towers but for their width; the MLP is four times as wide."""
    for i in range(n_blocks):
        ours, theirs = f"{name}.{i}", f"{source}.{i}"
        yield from _pair(f"{ours}.ln_1", f"{theirs}.norm_1", width)
        for part, n_out in (("in_proj_", 3 * width), ("out_proj.", width)):
            yield Rule(f"{ours}.attn.{part}weight", f"{theirs}.attn.{part}weight", (n_out, width))
            yield Rule(f"{ours}.attn.{part}bias", f"{theirs}.attn.{part}bias", (n_out,))
        yield from _pair(f"{ours}.ln_2", f"{theirs}.norm_2", width)
        for part, number, n_in, n_out in (("c_fc", 1, width, 4 * width), ("c_proj", 2, 4 * width, width)):
            yield Rule(f"{ours}.mlp.{part}.weight", f"{theirs}.mlp.fc{number}.weight", (n_out, n_in))
            yield Rule(f"{ours}.mlp.{part}.bias", f"{theirs}.mlp.fc{number}.bias", (n_out,))


def source_shape(rule: Rule) -> tuple[int, ...]:
    if rule.change == "transpose":
        return rule.shape[::-1]
    if rule.change == "sum_time":
        return (*rule.shape[:2], 2, *rule.shape[2:])
    if rule.name == "visual.class_embedding":
        return (1, 1, *rule.shape)
    return (1, *rule.shape) if rule.change == "reshape" else rule.shape


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number at the group of ``pattern`` in a key."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


def _shape(shapes: Shapes, name: str, n_axes: int) -> tuple[int, ...]:
    if name in shapes and len(shapes[name]) == n_axes:
        return shapes[name]
    raise WeightFileError(
        f"{name} is {shapes.get(name, 'missing')} (expected {n_axes} axes): another checkpoint, of {len(shapes)} "
        f"tensors, such as {', '.join(list(shapes)[:3]) or 'none'}. Check which file was put here."
    )
