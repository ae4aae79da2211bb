"""The smaller checkpoints: ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP, from their published files to safetensors.

The original programs load these with ``strict=False``: a wrong file loads "fine" and changes nothing. Here every key
and every shape is accounted for before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from helpers import files
from helpers.weights.folders import Shapes, account, write_folder
from helpers.weights.tensors import Tensor, WeightFileError, read_index

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
_IMAGEBIND_NAMES = {  # what a name begins with in open_clip, and in ImageBind
    "logit_scale": "modality_postprocessors.text.1.log_logit_scale",
    "visual.class_embedding": "modality_preprocessors.vision.cls_token",
    "visual.positional_embedding": "modality_preprocessors.vision.pos_embedding_helper.pos_embed",
    "visual.conv1.weight": "modality_preprocessors.vision.rgbt_stem.proj.1.weight",
    "visual.ln_pre": "modality_trunks.vision.pre_transformer_layer.0",
    "visual.transformer.resblocks": "modality_trunks.vision.blocks",
    "visual.ln_post": "modality_heads.vision.0",
    "visual.proj": "modality_heads.vision.2.weight",
    "token_embedding.weight": "modality_preprocessors.text.token_embedding.weight",
    "positional_embedding": "modality_preprocessors.text.pos_embed",
    "transformer.resblocks": "modality_trunks.text.blocks",
    "ln_final": "modality_heads.text.proj.0",
    "text_projection": "modality_heads.text.proj.1.weight",
}
_BLOCK_NAMES = {".ln_1.": ".norm_1.", ".ln_2.": ".norm_2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
_FORMS: dict[str, tuple[Callable, Callable]] = {  # from ImageBind's form to open_clip's, and back; the rest is copied
    # a picture is shown as two equal frames: their kernels are summed, (n, 3, 2, p, p) -> (n, 3, p, p)
    "visual.conv1.weight": (lambda theirs: theirs.sum(2), lambda ours: torch.stack([ours, ours], dim=2) / 2),
    "visual.class_embedding": (itemgetter((0, 0)), itemgetter((None, None))),
    "visual.positional_embedding": (itemgetter(0), itemgetter(None)),
    "positional_embedding": (itemgetter(0), itemgetter(None)),
    "visual.proj": (torch.t, torch.t),
    "text_projection": (torch.t, torch.t),
}

Layout = tuple[dict[str, str], Shapes, dict[str, Any], Shapes]
"""Key in the file of each tensor to keep, shapes of these in the file, settings, and what else the file may hold."""


def convert(family: str, source: Path, target: Path, *, allow_unknown: bool = False) -> Path:
    """Write a published checkpoint as a folder with ``model.safetensors`` and, where it has settings, their files.

    Args:
        family: ``"imagebind"`` (vision and text towers in float16, beside the arguments of ``open_clip.CLIP``),
            ``"pandagpt"`` (the projection of the image vector, and LoRA as an adapter under peft's own names),
            ``"anomalygpt"`` (image decoder, prompt learner) or ``"anomalyclip"`` (the learned prompts).
        source, target: the published file, only read, and the folder to write.
        allow_unknown: leave out keys that the checkpoint should not have instead of stopping.
    Raises:
        FileNotFoundError: no such file.
        WeightFileError: damaged or another checkpoint; names every key and shape that is not as published.
    """
    index, target = read_index(Path(source)), Path(target)
    shapes = {name: item.shape for name, item in index.items()}
    names, config = inspect(family, shapes, allow_unknown=allow_unknown)
    lora = {name: index[key] for name, key in names.items() if ".lora_" in name}
    tensors = {name: _in_our_form(name, index[key]) for name, key in names.items() if name not in lora}
    if family == "imagebind":
        tensors |= {name: replace(t, dtype=torch.float16) for name, t in tensors.items() if name != "logit_scale"}

    def write_small(folder: Path) -> None:
        if lora:  # as peft.PeftModel.from_pretrained reads it
            short = {name.removeprefix("llama_model.").replace(".default.", "."): t.whole() for name, t in lora.items()}
            with files.atomic_path(folder / "adapter_model.safetensors") as temporary:
                save_file(short, temporary, metadata={"format": "pt"})
            extra = {"peft_type": "LORA", "inference_mode": True, "base_model_name_or_path": None}
            files.write_json(folder / "adapter_config.json", config | extra)
        elif config:
            files.write_json(folder / "config.json", config)

    return write_folder(
        target, tensors, component=family if family in ("imagebind", "pandagpt") else f"{family}/{target.name}",
        settings={"config": config}, source={"file": str(source)}, write_small=write_small, shard_bytes=1 << 62,
    )  # fmt: skip


def inspect(family: str, shapes: Shapes, *, allow_unknown: bool = False) -> tuple[dict[str, str], dict[str, Any]]:
    """From the keys and shapes of a file: key of each tensor to keep, and settings; errors as in :func:`convert`."""
    names, expected, config, optional = _LAYOUTS[family](shapes)
    account(f"{family} checkpoint", shapes, expected, optional=optional, allow_unknown=allow_unknown)
    return names, config


def _imagebind(shapes: Shapes) -> Layout:
    """ImageBind's towers, with the arguments of ``open_clip.CLIP``; the other four senses are left out.

    Shapes do not tell the heads: they have 64 numbers each, but there are at most 16, as in ImageBind-huge.
    """
    vision, text = "modality_preprocessors.vision", "modality_preprocessors.text"
    width, _, _, patch, _ = _shape(shapes, f"{vision}.rgbt_stem.proj.1.weight", 5)
    n_tokens, text_width = _shape(shapes, f"{text}.token_embedding.weight", 2)
    grid = round((_shape(shapes, f"{vision}.pos_embedding_helper.pos_embed", 3)[1] - 1) ** 0.5)
    context = _shape(shapes, f"{text}.pos_embed", 3)[1]
    heads, text_heads = (max(1, min(16, n // 64)) for n in (width, text_width))
    eps = {"norm_kwargs": {"eps": 1e-6}}  # open_clip's default is 1e-5
    config = {
        "embed_dim": _shape(shapes, "modality_heads.vision.2.weight", 2)[0],
        "quick_gelu": False,
        "vision_cfg": eps | {
            "image_size": grid * patch, "patch_size": patch, "width": width, "head_width": width // heads,
            "layers": _count(shapes, r"modality_trunks\.vision\.blocks\.(\d+)\."),
        },
        "text_cfg": eps | {
            "context_length": context, "vocab_size": n_tokens, "width": text_width, "heads": text_heads,
            "layers": _count(shapes, r"modality_trunks\.text\.blocks\.(\d+)\."),
        },
    }  # fmt: skip
    others = re.compile(r"modality_\w+\.(audio|depth|thermal|imu)\.")
    optional = {name: shape for name, shape in shapes.items() if others.match(name)}
    optional[f"{text}.mask"] = (context, context)  # the causal mask, which open_clip makes itself
    import open_clip  # seconds, and needed for ImageBind only

    with torch.device("meta"):
        ours = open_clip.CLIP(**config).state_dict()
    theirs = as_imagebind(ours)
    return dict(zip(ours, theirs)), {name: tuple(item.shape) for name, item in theirs.items()}, config, optional


def as_imagebind(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State of an ``open_clip.CLIP`` under ImageBind's names and in its forms, in the same order."""
    result = {}
    for name, tensor in state.items():
        begin = next(begin for begin in _IMAGEBIND_NAMES if name.startswith(begin))
        theirs = _IMAGEBIND_NAMES[begin] + name.removeprefix(begin)
        for part, renamed in _BLOCK_NAMES.items():
            theirs = theirs.replace(part, renamed)
        result[theirs] = _FORMS[name][1](tensor) if name in _FORMS else tensor
    return result


def _pandagpt(shapes: Shapes) -> Layout:
    """PandaGPT, with the arguments of ``peft.LoraConfig``. Both spellings of LoRA's keys are read."""
    stem = "llama_model.base_model.model.model.layers"
    names = {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name): name for name in shapes}
    renamed = {name: shapes[old] for name, old in names.items()}
    rank, hidden = _shape(renamed, f"{stem}.0.self_attn.q_proj.lora_A.default.weight", 2)
    n_value = _shape(renamed, f"{stem}.0.self_attn.v_proj.lora_B.default.weight", 2)[0]
    kept = {"llama_proj.weight": (hidden, _shape(renamed, "llama_proj.weight", 2)[1]), "llama_proj.bias": (hidden,)}
    for layer in range(_count(renamed, re.escape(stem) + r"\.(\d+)\.")):
        for module in LORA_MODULES:
            key = f"{stem}.{layer}.self_attn.{module}"
            n_out = n_value if module in ("k_proj", "v_proj") else hidden
            kept |= {f"{key}.lora_A.default.weight": (rank, hidden), f"{key}.lora_B.default.weight": (n_out, rank)}
    config = {
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.1, "target_modules": list(LORA_MODULES), "bias": "none",
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    keys = {name: names.get(name, name) for name in kept}
    return keys, {keys[name]: shape for name, shape in kept.items()}, config, {}


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
    return {name: name for name in kept}, kept, {}, {}


def _anomalyclip(shapes: Shapes) -> Layout:
    """AnomalyCLIP: 16 of the 32 published tensors; the others its own program never uses."""
    prefix = "prompt_learner."
    n_context, width = _shape(shapes, f"{prefix}ctx_pos", 4)[2:]
    n_text = _shape(shapes, f"{prefix}tokenized_prompts_pos", 3)[2]
    n_replaced = _shape(shapes, f"{prefix}compound_prompts_text.0", 2)[0]
    sides = {
        "ctx": (1, 1, n_context, width), "token_prefix": (1, 1, 1, width),
        "token_suffix": (1, 1, n_text - 1 - n_context, width), "tokenized_prompts": (1, 1, n_text),
    }  # fmt: skip
    kept = {f"{name}_{side}": shape for side in ("pos", "neg") for name, shape in sides.items()}
    n_deep = _count(shapes, re.escape(prefix) + r"compound_prompts_text\.(\d+)$")
    kept |= {f"compound_prompts_text.{i}": (n_replaced, width) for i in range(n_deep)}
    unused = {name: shape for name, shape in shapes.items() if name.startswith(f"{prefix}compound_prompt_projections")}
    return {name: prefix + name for name in kept}, {prefix + name: shape for name, shape in kept.items()}, {}, unused


_LAYOUTS: dict[str, Callable[[Shapes], Layout]] = {
    "imagebind": _imagebind, "pandagpt": _pandagpt, "anomalygpt": _anomalygpt, "anomalyclip": _anomalyclip,
}  # fmt: skip


def _in_our_form(name: str, stored: Tensor) -> Tensor:
    """Copied, or one of the six tensors that differ in form; these have at most 10 MB and are read whole."""
    if name not in _FORMS:
        return stored
    form = _FORMS[name][0]
    shape = tuple(form(torch.empty(stored.shape, device="meta")).shape)
    return replace(stored, shape=shape, rows=lambda start, stop: form(stored.whole())[start:stop])


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
