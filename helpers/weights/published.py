"""The smaller checkpoints: ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP, from their published files to safetensors.

The original programs load these with ``strict=False``: a wrong file loads "fine" and changes nothing. Here every key
and every shape of a file is accounted for before anything is written. Files are pickles; they are only ever read as
tables of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import files as storage
from helpers.weights import folders as shard_job
from helpers.weights import tensors as tensor_files
from helpers.weights.folders import OutTensor
from helpers.weights.tensors import StoredTensor, WeightFileError

if TYPE_CHECKING:
    import torch

FILE = "model.safetensors"
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
ANOMALYCLIP_FOLDERS = {"trained_on_visa": "9_12_4_multiscale", "trained_on_mvtec": "9_12_4_multiscale_visa"}
"""Our folder name -> the published one. The published names are inverted: ``..._visa`` was trained on MVTec AD."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """How one tensor of the result is made of one of the source.

    Attributes:
        name: key in the result.
        source: key in the published file.
        shape: shape in the result.
        change: what happens to the numbers: ``"copy"``, ``"sum_time"``, ``"reshape"`` or ``"transpose"``.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    change: str = "copy"


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a prepared component, on the CPU, in the stored type.

    Raises:
        FileNotFoundError: the folder is not prepared; names the notebook.
    """
    from safetensors.torch import load_file

    if not (Path(folder) / shard_job.READY).exists():
        raise FileNotFoundError(f"{folder} is not prepared. Run notebook 01_prepare_weights first.")
    return load_file(Path(folder) / FILE)


def convert_imagebind(
    source: Path,
    target: Path,
    *,
    vision_heads: int = 16,
    text_heads: int = 16,
    delete_inputs: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """ImageBind's vision and text towers as an open_clip model in float16; the other four senses are left out.

    ``config.json`` holds the keyword arguments of ``open_clip.CLIP``. Mapping: spec/anomalygpt.md section 2.5; the
    patch kernel is **summed** over its two frames, because a picture is shown as two equal frames.

    Args:
        source: ``imagebind_huge.pth``.
        target: folder to write.
        vision_heads, text_heads: attention heads; shapes do not tell them (16 and 16 as published).
        delete_inputs: delete the source when the result is safely written.
        log: receives one sentence at a time.
    Raises:
        WeightFileError: damaged, or not ImageBind's keys and shapes.
    """
    with shard_job.open_job(Path(target), log=log) as job:
        index = _index(job, Path(source))
        rules, config = imagebind_rules(
            {name: item.shape for name, item in index.items()}, vision_heads=vision_heads, text_heads=text_heads
        )
        # The logit scale is one number; it stays exact. float32 first keeps every tensor aligned.
        outputs = [_out(rule, index, "float32" if rule.name == "logit_scale" else "float16") for rule in rules]
        _run(job, outputs, "imagebind", source, config, delete_inputs)
    return Path(target)


def convert_pandagpt(
    source: Path,
    target: Path,
    *,
    language_model: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """PandaGPT's LoRA matrices and its projection of the image vector, under their published names.

    ``config.json`` holds the keyword arguments of ``peft.LoraConfig``.

    Args:
        source: ``pytorch_model.pt``.
        target: folder to write.
        language_model: ``config.json`` of the model that it must fit; None skips that check.
        alpha: LoRA's alpha; None takes the rank (published: rank 32, alpha 32).
    Raises:
        WeightFileError: keys or shapes are not PandaGPT's, or belong to a language model of another size.
    """
    with shard_job.open_job(Path(target), log=log) as job:
        index = _index(job, Path(source))
        rules, rank = pandagpt_rules({name: item.shape for name, item in index.items()}, language_model)
        config = {
            "r": rank,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": 0.1,
            "target_modules": list(LORA_MODULES),
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        outputs = [_out(rule, index, index[rule.source].dtype) for rule in rules]
        _run(job, outputs, "pandagpt", source, config, False)
    return Path(target)


def convert_anomalygpt(
    source: Path,
    target: Path,
    *,
    language_model: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """AnomalyGPT's image decoder and prompt learner: exactly 21 tensors, under their published names.

    Raises:
        WeightFileError: other keys or shapes, or a language model of another width: the published files are 7B only.
    """
    with shard_job.open_job(Path(target), log=log) as job:
        index = _index(job, Path(source))
        rules = anomalygpt_rules({name: item.shape for name, item in index.items()}, language_model)
        outputs = [_out(rule, index, index[rule.source].dtype) for rule in rules]
        _run(job, outputs, f"anomalygpt/{Path(target).name}", source, None, False)
    return Path(target)


def convert_anomalyclip(source: Path, target: Path, *, log: Callable[[str], None] = print) -> Path:
    """AnomalyCLIP's learned prompts, float32, without the 97 % of the file that its own program never uses.

    Raises:
        WeightFileError: keys or shapes are not AnomalyCLIP's.
    """
    with shard_job.open_job(Path(target), log=log) as job:
        index = _index(job, Path(source))
        rules = anomalyclip_rules({name: item.shape for name, item in index.items()})
        outputs = [_out(rule, index, index[rule.source].dtype) for rule in rules]
        _run(job, outputs, f"anomalyclip/{Path(target).name}", source, None, False)
    return Path(target)


def imagebind_rules(shapes: Shapes, *, vision_heads: int, text_heads: int) -> tuple[list[Rule], dict[str, Any]]:
    """Plan of :func:`convert_imagebind` from shapes alone, and the arguments of ``open_clip.CLIP``.

    Raises:
        WeightFileError: lists what is missing, unknown or of another shape.
    """
    others = re.compile(r"modality_\w+\.(audio|depth|thermal|imu)\.")
    shapes = {name: shape for name, shape in shapes.items() if not others.match(name)}
    kernel = _shape(shapes, "modality_preprocessors.vision.rgbt_stem.proj.1.weight", 5)
    n_tokens, text_width = _shape(shapes, "modality_preprocessors.text.token_embedding.weight", 2)
    grid = round((_shape(shapes, "modality_preprocessors.vision.pos_embedding_helper.pos_embed", 3)[1] - 1) ** 0.5)
    context = _shape(shapes, "modality_preprocessors.text.pos_embed", 3)[1]
    joint = _shape(shapes, "modality_heads.vision.2.weight", 2)[0]
    width, patch = kernel[0], kernel[4]
    config = {
        "embed_dim": joint,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": grid * patch,
            "patch_size": patch,
            "width": width,
            "head_width": width // vision_heads,
            "layers": _count(shapes, r"modality_trunks\.vision\.blocks\.(\d+)\."),
            # open_clip's default is 1e-5; ImageBind was trained with 1e-6
            "norm_kwargs": {"eps": 1e-6},
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": n_tokens,
            "width": text_width,
            "heads": text_heads,
            "layers": _count(shapes, r"modality_trunks\.text\.blocks\.(\d+)\."),
            "norm_kwargs": {"eps": 1e-6},
        },
    }
    rules = rules_of_clip(config)
    vision, text = "modality_preprocessors.vision", "modality_preprocessors.text"
    expected = {rule.source: _source_shape(rule) for rule in rules}
    expected[f"{vision}.cls_token"] = (1, 1, width)
    expected[f"{vision}.rgbt_stem.proj.1.weight"] = (width, 3, 2, patch, patch)
    expected[f"{text}.mask"] = (context, context)  # the causal mask, which open_clip makes itself
    _account(shapes, expected, "ImageBind", optional=(f"{text}.mask",))
    return rules, config


def rules_of_clip(config: Mapping[str, Any]) -> list[Rule]:
    """Where each tensor of ``open_clip.CLIP(**config)`` stands in ImageBind's published file."""
    tower, words, joint = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, patch, text_width = tower["width"], tower["patch_size"], words["width"]
    grid = tower["image_size"] // patch
    vision, text = "modality_preprocessors.vision", "modality_preprocessors.text"
    return [
        Rule("logit_scale", "modality_postprocessors.text.1.log_logit_scale", ()),
        Rule("visual.class_embedding", f"{vision}.cls_token", (width,), "reshape"),
        Rule(
            "visual.positional_embedding",
            f"{vision}.pos_embedding_helper.pos_embed",
            (grid**2 + 1, width),
            "reshape",
        ),
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


def pandagpt_rules(shapes: Shapes, language_model: Mapping[str, Any] | None = None) -> tuple[list[Rule], int]:
    """Plan of :func:`convert_pandagpt` from shapes alone, and LoRA's rank. Old key spellings are brought up to date."""
    stem = "llama_model.base_model.model.model.layers"
    names = {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name): name for name in shapes}
    renamed = {name: shapes[old] for name, old in names.items()}
    rank, hidden = _shape(renamed, f"{stem}.0.self_attn.q_proj.lora_A.default.weight", 2)
    n_value = _shape(renamed, f"{stem}.0.self_attn.v_proj.lora_B.default.weight", 2)[0]
    n_image = _shape(renamed, "llama_proj.weight", 2)[1]
    n_layers = _count(renamed, re.escape(stem) + r"\.(\d+)\.")
    if language_model is not None:
        fits = (language_model["hidden_size"], language_model["num_hidden_layers"])
        if fits != (hidden, n_layers):
            raise WeightFileError(
                f"PandaGPT's file is for a language model {hidden} wide with {n_layers} layers; the prepared one is "
                f"{fits[0]} wide with {fits[1]}. Use the PandaGPT file of the same size (7B or 13B)."
            )
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(n_layers):
        for module in LORA_MODULES:
            n_out = n_value if module in ("k_proj", "v_proj") else hidden
            key = f"{stem}.{layer}.self_attn.{module}"
            expected[f"{key}.lora_A.default.weight"] = (rank, hidden)
            expected[f"{key}.lora_B.default.weight"] = (n_out, rank)
    expected |= {"llama_proj.weight": (hidden, n_image), "llama_proj.bias": (hidden,)}
    _account(renamed, expected, "PandaGPT")
    return [Rule(name, names[name], shape) for name, shape in expected.items()], rank


def anomalygpt_rules(shapes: Shapes, language_model: Mapping[str, Any] | None = None) -> list[Rule]:
    """Plan of :func:`convert_anomalygpt` from shapes alone: 21 tensors."""
    joint, width = _shape(shapes, "image_decoder.fc.0.weight", 2)
    n_prompts, hidden = _shape(shapes, "prompt_learner.base_prompts", 2)
    if language_model is not None and language_model["hidden_size"] != hidden:
        raise WeightFileError(
            f"this AnomalyGPT checkpoint is for a language model {hidden} wide, the prepared one is "
            f"{language_model['hidden_size']} wide. The published checkpoints exist for 7B (4096) only; for 13B train "
            f"your own in 06_anomalygpt_train."
        )
    expected: dict[str, tuple[int, ...]] = {}
    for tap in range(4):
        expected |= {f"image_decoder.fc.{tap}.weight": (joint, width), f"image_decoder.fc.{tap}.bias": (joint,)}
    expected["prompt_learner.base_prompts"] = (n_prompts, hidden)
    n_in = 1
    for place in (0, 3, 6, 9, 12, 15):  # the gaps are the ReLU and the pooling
        key = f"prompt_learner.meta_net.{place}"
        n_out, side = (hidden, 5) if place == 15 else (_shape(shapes, f"{key}.weight", 4)[0], 3)
        expected |= {f"{key}.weight": (n_out, n_in, side, side), f"{key}.bias": (n_out,)}
        n_in = n_out
    _account(shapes, expected, "AnomalyGPT")
    return [Rule(name, name, shape) for name, shape in expected.items()]


def anomalyclip_rules(shapes: Shapes) -> list[Rule]:
    """Plan of :func:`convert_anomalyclip` from shapes alone: 16 of the 32 published tensors."""
    prefix = "prompt_learner."
    n_context, width = _shape(shapes, f"{prefix}ctx_pos", 4)[2:]
    n_text = _shape(shapes, f"{prefix}tokenized_prompts_pos", 3)[2]
    n_deep = _count(shapes, re.escape(prefix) + r"compound_prompts_text\.(\d+)$")
    n_replaced = _shape(shapes, f"{prefix}compound_prompts_text.0", 2)[0]
    kept: dict[str, tuple[int, ...]] = {}
    for side in ("pos", "neg"):
        kept[f"ctx_{side}"] = (1, 1, n_context, width)
        kept[f"token_prefix_{side}"] = (1, 1, 1, width)
        kept[f"token_suffix_{side}"] = (1, 1, n_text - 1 - n_context, width)
        kept[f"tokenized_prompts_{side}"] = (1, 1, n_text)
    kept |= {f"compound_prompts_text.{i}": (n_replaced, width) for i in range(n_deep)}
    dead: dict[str, tuple[int, ...]] = {}
    for i in range(n_deep):
        key = f"{prefix}compound_prompt_projections.{i}"
        n_out = _shape(shapes, f"{key}.weight", 2)[0]
        dead |= {f"{key}.weight": (n_out, width), f"{key}.bias": (n_out,)}
    _account(shapes, {prefix + name: shape for name, shape in kept.items()} | dead, "AnomalyCLIP")
    return [Rule(name, prefix + name, shape) for name, shape in kept.items()]


def _index(job: shard_job.Job, source: Path) -> dict[str, StoredTensor]:
    if not source.exists() and source.name not in job.known_inputs("source"):
        raise FileNotFoundError(f"{source} is missing. Run 01_prepare_weights from its top, or put the file there.")
    return job.index("source", source)


def _out(rule: Rule, index: Mapping[str, StoredTensor], dtype: str) -> OutTensor:
    stored = index[rule.source]
    return OutTensor(rule.name, dtype, rule.shape, partial(_changed, rule, stored, dtype), (stored.path,))


def _changed(rule: Rule, stored: StoredTensor, dtype: str) -> Iterator[torch.Tensor]:
    import torch

    kind = getattr(torch, dtype)
    if rule.change == "transpose":
        yield stored.read().t().contiguous().to(kind)  # at most 10 MB as published
        return
    if rule.change == "reshape":
        yield stored.read().reshape(rule.shape).to(kind)
        return
    for start, stop in tensor_files.row_ranges(stored.n_rows, stored.row_bytes):
        rows = stored.read_rows(start, stop)
        if rule.change == "sum_time":
            rows = rows.sum(2)  # (rows, 3, 2, p, p) -> (rows, 3, p, p), in the stored precision
        yield rows.to(kind)


def _run(
    job: shard_job.Job,
    outputs: list[OutTensor],
    component: str,
    source: Path,
    config: Mapping[str, Any] | None,
    delete_inputs: bool,
) -> None:
    def write_sidecars(folder: Path) -> None:
        if config is not None:
            storage.write_json(folder / "config.json", config)

    job.run(
        outputs,
        component=component,
        settings={"config": config},
        write_sidecars=write_sidecars,
        source={"file": str(source)},
        shard_bytes=1 << 62,  # one file
        delete_inputs=delete_inputs,
    )


def _pair(name: str, source: str, width: int) -> list[Rule]:
    return [Rule(f"{name}.{part}", f"{source}.{part}", (width,)) for part in ("weight", "bias")]


def _blocks(name: str, source: str, n_blocks: int, width: int) -> list[Rule]:
    """Transformer blocks, the same in both towers but for their width; the MLP is four times as wide."""
    rules = []
    for i in range(n_blocks):
        ours, theirs = f"{name}.{i}", f"{source}.{i}"
        rules += [
            *_pair(f"{ours}.ln_1", f"{theirs}.norm_1", width),
            Rule(f"{ours}.attn.in_proj_weight", f"{theirs}.attn.in_proj_weight", (3 * width, width)),
            Rule(f"{ours}.attn.in_proj_bias", f"{theirs}.attn.in_proj_bias", (3 * width,)),
            Rule(f"{ours}.attn.out_proj.weight", f"{theirs}.attn.out_proj.weight", (width, width)),
            Rule(f"{ours}.attn.out_proj.bias", f"{theirs}.attn.out_proj.bias", (width,)),
            *_pair(f"{ours}.ln_2", f"{theirs}.norm_2", width),
            Rule(f"{ours}.mlp.c_fc.weight", f"{theirs}.mlp.fc1.weight", (4 * width, width)),
            Rule(f"{ours}.mlp.c_fc.bias", f"{theirs}.mlp.fc1.bias", (4 * width,)),
            Rule(f"{ours}.mlp.c_proj.weight", f"{theirs}.mlp.fc2.weight", (width, 4 * width)),
            Rule(f"{ours}.mlp.c_proj.bias", f"{theirs}.mlp.fc2.bias", (width,)),
        ]
    return rules


def _source_shape(rule: Rule) -> tuple[int, ...]:
    if rule.change == "transpose":
        return rule.shape[::-1]
    if rule.change == "reshape":
        return (1, *rule.shape)
    return rule.shape


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number at the group of ``pattern`` in a key."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _shape(shapes: Shapes, name: str, n_axes: int) -> tuple[int, ...]:
    if name not in shapes or len(shapes[name]) != n_axes:
        found = shapes.get(name)
        some = ", ".join(list(shapes)[:3])
        raise WeightFileError(
            f"{name} is {'missing' if found is None else found} (expected {n_axes} axes). The file holds {len(shapes)} "
            f"tensors, such as {some or 'none'}: it is another checkpoint. Check which file was put here."
        )
    return shapes[name]


def _account(shapes: Shapes, expected: Shapes, what: str, *, optional: tuple[str, ...] = ()) -> None:
    """Every key and every shape, or words about all that differ."""
    problems = [f"lacks {name}" for name in expected if name not in shapes and name not in optional]
    problems += [f"has the unknown {name}" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise WeightFileError(f"not a whole {what} checkpoint: {shown}. Nothing was written.")
