"""The language model's weights: Meta's LLaMA -> Hugging Face folder, and base + delta -> merged Vicuna.

Both are one pass over the files in pieces of 4 MB: memory does not grow with the model, numbers are copied or added
exactly as FastChat adds them, and an interrupted run goes on where it stopped (see :mod:`helpers.weights.folders`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files as storage
from helpers.weights import folders as shard_job
from helpers.weights import llama_layout
from helpers.weights import tensors as tensor_files
from helpers.weights.folders import Job, OutTensor
from helpers.weights.tensors import StoredTensor, WeightFileError

if TYPE_CHECKING:
    import pandas as pd
    import torch

COMPONENTS = ("vicuna", "imagebind", "pandagpt", "anomalygpt", "anomalyclip")
BF16_WARNING_SHARE = 0.9
"""Share of float16 numbers with three empty last bits from which a base was rounded to bfloat16 (exact: 1/8)."""

_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_SENTENCEPIECE_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 2048,
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor that may lie in several files: its rows on demand."""

    dtype: str
    shape: tuple[int, ...]
    files: tuple[Path, ...]
    read_rows: Callable[[int, int], torch.Tensor]
    row_multiple: int = 1


@dataclass(frozen=True)
class _Model:
    """A LLaMA on disk in either form: tensors by Hugging Face key, and configuration values."""

    folder: Path
    tensors: dict[str, _Tensor]
    config: dict[str, Any]


def convert_llama(
    source: Path,
    target: Path,
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = shard_job.SHARD_BYTES,
    reserve_bytes: int | None = None,
    delete_inputs: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Convert Meta's ``consolidated.*.pth`` into a Hugging Face folder; numbers are moved, never rounded.

    Args:
        source: folder with ``consolidated.00.pth`` ... and ``params.json``.
        target: folder to write; resumed when it is unfinished.
        tokenizer: folder with ``tokenizer.model`` (or the files of a fast tokenizer); None looks in ``source``
            and its parent, where Meta puts it.
        shard_bytes: largest file written.
        reserve_bytes: disk to leave free, see :meth:`helpers.weights.folders.Job.run`.
        delete_inputs: delete the ``.pth`` files when their content is safely written.
        log: receives one sentence at a time.
    Returns:
        ``target``, complete with ``READY.json``.
    Raises:
        FileNotFoundError: files are missing; names all of them.
        ValueError: files are damaged, of another model, or the target belongs to another job.
        OSError: the disk is too small.
    """
    source, target = Path(source), Path(target)
    with shard_job.open_job(target, log=log) as job:
        model = _open_meta(source, job, role="meta")
        tokens = _tokenizer_folder([tokenizer] if tokenizer else [source, source.parent])
        tensors = [
            OutTensor(name, tensor.dtype, tensor.shape, partial(_copied, tensor), tensor.files)
            for name, tensor in model.tensors.items()
        ]
        job.run(
            tensors,
            component="llama",
            settings={"config": model.config},
            write_sidecars=partial(_write_sidecars, config=model.config, dtype=tensors[0].dtype, tokenizer=tokens),
            source={"meta": str(source)},
            shard_bytes=shard_bytes,
            reserve_bytes=reserve_bytes,
            delete_inputs=delete_inputs,
        )
    return target


def merge_delta(
    base: Path,
    delta: Path,
    target: Path,
    *,
    version: str | None = None,
    shard_bytes: int = shard_job.SHARD_BYTES,
    reserve_bytes: int | None = None,
    delete_inputs: bool = False,
    force: bool = False,
    add_model_prefix: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Add delta weights to a base model; bit for bit what FastChat 0.1.10 (v0) and 0.2 (v1.1) write.

    Both are cast to float16, then added. Where the delta has one row more than the base (v0's ``[PAD]``), the base
    counts as zero there. Sources: lm-sys/FastChat @f34f28ce and @074f0b18, ``fastchat/model/apply_delta.py``.

    Args:
        base: Hugging Face folder (safetensors or ``.bin``), or Meta's folder: then the two steps are fused and
            the converted base is never written.
        delta: Hugging Face folder of the delta; its tokenizer is taken, as FastChat does.
        target: folder to write; resumed when it is unfinished.
        version: ``"v0"`` or ``"v1.1"`` to insist on one; None accepts either, told apart by their rows.
        shard_bytes, reserve_bytes, log: as in :func:`convert_llama`.
        delete_inputs: delete each input file when everything read from it is safely written.
        force: merge although the base looks like LLaMA 2 or the delta like a whole model.
        add_model_prefix: accept keys without their ``model.`` in front, as some re-uploads have them.
    Returns:
        ``target``, complete with ``READY.json``, which records what was found out about the inputs.
    Raises:
        FileNotFoundError: files are missing; names all of them.
        ValueError: damaged files, shapes that do not fit, a wrong version, or a target of another job.
        OSError: the disk is too small.
    """
    base, delta, target = Path(base), Path(delta), Path(target)
    if version not in (None, "v0", "v1.1"):
        raise ValueError(f"version is {version!r}; allowed are 'v0', 'v1.1' and None (told by the shapes).")
    if base.resolve() == delta.resolve():
        raise ValueError(f"base and delta are the same folder, {base}. Give LLaMA as base and the delta as delta.")
    with shard_job.open_job(target, log=log) as job:
        if job.ready is not None and not _has_inputs(base, delta):
            shard_job.check_files(target, job.ready)
            log(f"vicuna: already complete in {target}")
            return target
        is_meta = (base / "params.json").exists()
        left = _open_meta(base, job, role="base") if is_meta else _open_folder(base, job, "base", add_model_prefix)
        right = _open_folder(delta, job, "delta", add_model_prefix)
        kind = _check_pair(left, right, version)
        resumed = (target / shard_job.JOURNAL).exists() or job.ready is not None
        if not resumed:
            _inspect(left, right, job, force=force)
        n_tokens = right.tensors[llama_layout.EMBEDDINGS[0]].shape[0]
        config = left.config | {"vocab_size": n_tokens}
        job.run(
            [_merged(name, left.tensors[name], tensor) for name, tensor in right.tensors.items()],
            component="vicuna",
            settings={"config": config, "delta": kind},
            write_sidecars=partial(
                _write_sidecars, config=config, dtype="float16", tokenizer=_tokenizer_folder([delta, base, base.parent])
            ),
            source={"base": str(base), "delta": str(delta), "version": kind},
            shard_bytes=shard_bytes,
            reserve_bytes=reserve_bytes,
            delete_inputs=delete_inputs,
        )
    return target


def adopt_merged(source: Path, target: Path, *, log: Callable[[str], None] = print) -> Path:
    """Take an already merged Vicuna folder: check every key and shape, copy it as safetensors, record what it is.

    Args:
        source: Hugging Face folder with 32001 rows (v0) or 32000 (v1.1 and later: marked as degraded).
        target: folder to write.
    Raises:
        ValueError: damaged, or of a model family that PandaGPT's weights were not made for (LLaMA 2).
    """
    source, target = Path(source), Path(target)
    with shard_job.open_job(target, log=log) as job:
        model = _open_folder(source, job, "merged", False)
        _refuse_llama_2(model, force=False)
        if model.config["vocab_size"] == 32000:
            job.note(
                "degraded: this Vicuna has 32000 rows, so it is not v0. PandaGPT and AnomalyGPT were trained with v0's "
                "'### Human:' prompts; answers may be worse. Use LLaMA + vicuna delta v0 for the published behaviour."
            )
        job.run(
            [OutTensor(n, "float16", t.shape, partial(_halved, t), t.files) for n, t in model.tensors.items()],
            component="vicuna",
            settings={"config": model.config, "delta": "merged elsewhere"},
            write_sidecars=partial(
                _write_sidecars, config=model.config, dtype="float16", tokenizer=_tokenizer_folder([source])
            ),
            source={"merged": str(source)},
        )
    return target


def require(weights_dir: Path, component: str, *, verify: bool = False) -> Path:
    """Folder of a prepared component.

    Args:
        weights_dir: ``profile.weights_dir``.
        component: ``"vicuna"``, ``"imagebind"``, ``"pandagpt"``, ``"anomalygpt/<name>"`` or ``"anomalyclip/<name>"``.
        verify: hash every file again (sizes are always checked).
    Raises:
        FileNotFoundError: not prepared yet; names the notebook that does it.
        WeightFileError: prepared, but damaged since.
    """
    folder = Path(weights_dir) / component
    if component.split("/")[0] not in COMPONENTS:
        raise ValueError(f"{component!r} is no component; known are {', '.join(COMPONENTS)}.")
    if not (folder / shard_job.READY).exists():
        present = sorted(str(p.parent.relative_to(weights_dir)) for p in Path(weights_dir).glob("**/READY.json"))
        raise FileNotFoundError(
            f"{component} is not prepared in {weights_dir} (ready: {', '.join(present) or 'nothing'}). "
            f"Run notebook 01_prepare_weights first."
        )
    shard_job.check_files(folder, read_ready(folder), verify=verify)
    return folder


def read_ready(folder: Path) -> dict[str, Any]:
    """Content of a component's ``READY.json``: ``component, files, tensors, source, settings, notes, inputs``."""
    return storage.read_json(Path(folder) / shard_job.READY)


def merge_statistics(folder: Path) -> pd.DataFrame:
    """What the merge measured on samples of each matrix, the input embedding first.

    Args:
        folder: a merged ``vicuna`` folder.
    Returns:
        one row a kind of matrix: root mean squares of base, delta and sum (medians over the layers), their ratio, and
        the cosine between the delta's extra row and the mean row of the base (v0's input embedding only).
    """
    import pandas as pd

    rows = []
    entries = read_ready(folder)["tensors"]
    for name in sorted(entries, key=lambda name: name != llama_layout.EMBEDDINGS[0]):
        entry = entries[name]
        if "rms_base" in entry and not name.endswith("norm.weight"):
            kind = name.split(".", 3)[-1] if name.startswith("model.layers.") else name
            rows.append({"matrix": kind.removesuffix(".weight"), **entry})
    wanted = ["rms_base", "rms_delta", "rms_merged", "pad_row_cosine"]
    table = pd.DataFrame(rows, columns=["matrix", *wanted]).groupby("matrix", sort=False)[wanted].median()
    table.insert(3, "delta / base", table["rms_delta"] / table["rms_base"])
    return table.round(4).reset_index()


def _open_meta(source: Path, job: Job, *, role: str) -> _Model:
    if not (source / "params.json").exists():
        raise FileNotFoundError(f"{source / 'params.json'} is missing. It lies beside Meta's consolidated.*.pth files.")
    params = storage.read_json(source / "params.json")
    names = sorted({p.name for p in source.glob("consolidated.*.pth")} | set(job.known_inputs(role)))
    n_shards = 1 + max((int(name.split(".")[1]) for name in names), default=0)
    wanted = [f"consolidated.{number:02d}.pth" for number in range(n_shards)]
    absent = [name for name in wanted if name not in names]
    if absent:
        raise FileNotFoundError(f"{source} lacks {', '.join(absent)}. Put the missing files there, they are one model.")
    shards = [job.index(role, source / name) for name in wanted]
    try:
        rules, config = llama_layout.meta_tensors(
            [{name: item.shape for name, item in shard.items()} for shard in shards], params
        )
    except ValueError as error:
        raise WeightFileError(f"{source}: {error}") from error
    tensors = {}
    for rule in rules:
        parts = [shard[rule.meta_name] for shard in shards]
        if len({part.dtype for part in parts}) > 1:
            raise WeightFileError(f"{source}: {rule.meta_name} has types {sorted({p.dtype for p in parts})}.")
        if rule.axis is None:
            _check_equal(parts)
        tensors[rule.name] = _Tensor(
            parts[0].dtype,
            rule.shape,
            tuple(part.path for part in parts),
            partial(_meta_rows, rule, parts),
            rule.head_dim or 1,
        )
    return _Model(source, tensors, config)


def _meta_rows(rule: llama_layout.MetaTensor, parts: Sequence[StoredTensor], start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the joined tensor, in Hugging Face order."""
    import torch

    if rule.axis is None:
        return parts[0].read_rows(start, stop)
    if rule.axis == 1:
        return torch.cat([part.read_rows(start, stop) for part in parts], dim=1)
    pieces, first = [], 0
    for part in parts:
        low, high = max(start, first), min(stop, first + part.n_rows)
        if low < high:
            pieces.append(part.read_rows(low - first, high - first))
        first += part.n_rows
    rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if not rule.head_dim:
        return rows
    # Rows come in whole heads: (heads * head_dim, hidden) -> reorder inside each head.
    order = torch.tensor(llama_layout.pair_order(rule.head_dim))
    return rows.reshape(-1, rule.head_dim, rows.shape[1])[:, order].reshape(rows.shape)


def _check_equal(parts: Sequence[StoredTensor]) -> None:
    """Each shard carries its own copy of the norms; a shard of another model does not."""
    if not all(part.path.exists() for part in parts):
        return  # used up and deleted by an earlier, interrupted run, which has compared them
    first = parts[0].read()
    for part in parts[1:]:
        if not bool((part.read() == first).all()):
            raise WeightFileError(
                f"{parts[0].path.name} and {part.path.name} in {part.path.parent} differ in {part.name}, which every "
                f"shard repeats: they are shards of different models. Fetch them from one source."
            )


def _open_folder(folder: Path, job: Job, role: str, add_model_prefix: bool) -> _Model:
    """Tensors and configuration of a Hugging Face folder; every stop of spec section 2.3 in words."""
    names, weight_map = _weight_files(folder, job.known_inputs(role))
    stored: dict[str, StoredTensor] = {}
    for name in names:
        for key, tensor in job.index(role, folder / name).items():
            if key in stored:
                raise WeightFileError(f"{key} is both in {stored[key].path} and {tensor.path}. Delete the stale file.")
            stored[key] = tensor
    absent = [f"{key} (expected in {name})" for key, name in weight_map.items() if key not in stored]
    absent = [text for text in absent if not llama_layout.is_ignored(text.split(" ")[0])]
    if absent:
        raise WeightFileError(
            f"{folder}: {len(absent)} tensors are missing from the files that should hold them: "
            f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}. Fetch these files again; nothing was written."
        )
    unlisted = [key for key in stored if weight_map and key not in weight_map]
    if unlisted:
        job.note(f"{folder.name}: the index does not list {', '.join(unlisted[:3])}; taken from the files themselves.")
    dropped = [key for key in stored if llama_layout.is_ignored(key)]
    if dropped:
        job.note(f"{folder.name}: {len(dropped)} rotary tables (inv_freq) dropped; every model recomputes them.")
    kept = {key: tensor for key, tensor in stored.items() if key not in dropped}
    if add_model_prefix and not any(key.startswith("model.") for key in kept):
        kept = {key if key.startswith("lm_head.") else f"model.{key}": tensor for key, tensor in kept.items()}
    config = _read_config(folder, kept)
    _check_keys(folder, kept, config)
    order = [key for key in llama_layout.llama_shapes(config) if key in kept]
    # Written in the order of the files, so that each input is used up as early as possible.
    order.sort(key=lambda key: names.index(kept[key].path.name))
    tensors = {key: _Tensor(kept[key].dtype, kept[key].shape, (kept[key].path,), kept[key].read_rows) for key in order}
    return _Model(folder, tensors, config)


def _weight_files(folder: Path, known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of a folder's weight files in order, and its index (empty without one)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing. Run 01_prepare_weights from its top, or put the folder there.")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.exists():
            weight_map = storage.read_json(index).get("weight_map", {})
            if not weight_map:
                raise WeightFileError(f"{index} lists no tensors: an earlier tool failed silently. Fetch it again.")
            names = sorted(set(weight_map.values()))
            absent = [name for name in names if not (folder / name).exists() and name not in known]
            if absent:
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(absent)}, named in {index.name}. Fetch these files."
                )
            return names, weight_map
        if (folder / stem).exists() or stem in known:
            return [stem], {}
    names = sorted({p.name for p in folder.glob("model-*.safetensors")} | {p.name for p in folder.glob("*model-*.bin")})
    if not names:
        raise FileNotFoundError(f"{folder} holds no model.safetensors, pytorch_model.bin or shards of them.")
    return names, {}


def _read_config(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing: number of heads and layers cannot be guessed.")
    raw = storage.read_json(folder / "config.json")
    rope = raw.get("rope_parameters") or {}
    embedding = tensors.get(llama_layout.EMBEDDINGS[0])
    return {
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        # Some configurations still say 32000 beside 32001 rows: the rows decide.
        "vocab_size": embedding.shape[0] if embedding else raw["vocab_size"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope_theta": float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        "max_position_embeddings": raw.get("max_position_embeddings") or 2048,
    }


def _check_keys(folder: Path, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
    expected = llama_layout.llama_shapes(config)
    problems = [f"lacks {key}" for key in expected if key not in tensors]
    problems += [f"has the unknown {key}" for key in tensors if key not in expected]
    problems += [
        f"{key} is {tensors[key].shape}, config.json asks for {shape}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        hint = "" if any(key.startswith("model.") for key in tensors) else " Try add_model_prefix=True."
        raise WeightFileError(f"{folder} is not one whole LLaMA: {shown}. Nothing was written.{hint}")


def _check_pair(base: _Model, delta: _Model, version: str | None) -> str:
    """``"v0"`` or ``"v1.1"``, from the shapes alone."""
    embedding = llama_layout.EMBEDDINGS[0]
    rows = base.tensors[embedding].shape[0], delta.tensors[embedding].shape[0]
    sizes = llama_layout.model_size(base.config), llama_layout.model_size(delta.config)
    if sizes[0] != sizes[1]:
        raise WeightFileError(
            f"{base.folder} is {sizes[0]}, {delta.folder} is for {sizes[1]}. Use base and delta of the same size."
        )
    if rows[1] - rows[0] not in (0, 1) or _is_merged(base.folder):
        already = "The base is merged already. " if rows[0] >= rows[1] else ""
        raise WeightFileError(
            f"{base.folder} has {rows[0]} token rows, {delta.folder} has {rows[1]}. {already}Allowed are LLaMA with "
            f"32000 rows and vicuna delta v0 (32001 rows) or v1.1 (32000 rows). Check which delta was downloaded."
        )
    kind = "v0" if rows[1] > rows[0] else "v1.1"
    if rows == (32001, 32001):
        raise WeightFileError(
            f"{base.folder} has 32001 token rows already: it was merged or resized before. Give LLaMA with 32000 rows."
        )
    if version not in (None, kind):
        raise WeightFileError(
            f"{delta.folder} with {rows[1]} rows on a base with {rows[0]} is delta {kind}, but {version} was asked "
            f"for. Fetch lmsys/vicuna-{sizes[0].lower()}-delta-{version}, or ask for {kind}."
        )
    problems = [
        f"{name}: base {base.tensors[name].shape}, delta {tensor.shape}"
        for name, tensor in delta.tensors.items()
        if name not in llama_layout.EMBEDDINGS and base.tensors[name].shape != tensor.shape
    ]
    if problems:
        raise WeightFileError(f"{base.folder} and {delta.folder} do not fit: {'; '.join(problems[:5])}.")
    return kind


def _is_merged(folder: Path) -> bool:
    return (folder / shard_job.READY).exists() and read_ready(folder)["component"] == "vicuna"


def _refuse_llama_2(model: _Model, *, force: bool) -> None:
    if llama_layout.looks_like_llama_2(model.config) and not force:
        raise WeightFileError(
            f"{model.folder} is LLaMA 2 (norm epsilon {model.config['rms_norm_eps']}; LLaMA 1 has 1e-06). The shapes "
            f"fit, the model would talk nonsense: deltas, PandaGPT and AnomalyGPT belong to LLaMA 1. Use LLaMA 1."
        )


def _inspect(base: _Model, delta: _Model, job: Job, *, force: bool) -> None:
    """Samples of the numbers, before anything is written: rounded base? whole model given as delta?"""
    _refuse_llama_2(base, force=force)
    names = [name for name, tensor in delta.tensors.items() if len(tensor.shape) == 2]
    names = [names[len(names) * i // 4] for i in range(4)]
    share, ratios = [], []
    for name in names:
        left, right = _sample(base.tensors[name]), _sample(delta.tensors[name])
        share.append(_empty_bits(left))
        ratios.append(_rms(right) / max(_rms(left), 1e-12))
    dtypes = {t.dtype for t in base.tensors.values()}, {t.dtype for t in delta.tensors.values()}
    for what, kinds in zip(("base", "delta"), dtypes):
        if kinds != {"float16"}:
            job.note(f"{what} is stored as {', '.join(sorted(kinds))}; rounded to float16 before adding (as FastChat).")
    if min(share) > BF16_WARNING_SHARE:
        job.note(
            f"the base was rounded to bfloat16 ({100 * min(share):.0f} % of its numbers have empty last bits; 12 % is "
            f"normal). The merge works, but is not the exact Vicuna: expect an error of about 3 % of the delta."
        )
    if min(ratios) > 0.9 and not force:
        raise WeightFileError(
            f"{delta.folder} is not a delta: its numbers are as large as the base's (ratio {min(ratios):.2f}; a delta "
            f"is well below 1). A whole model was given. Use it through adopt_merged, or give the right delta."
        )


def _merged(name: str, base: _Tensor, delta: _Tensor) -> OutTensor:
    measured: dict[str, Any] = {}
    return OutTensor(
        name,
        "float16",
        delta.shape,
        partial(_sums, name, base, delta, measured),
        tuple(dict.fromkeys(base.files + delta.files)),
        measured,
    )


def _sums(name: str, base: _Tensor, delta: _Tensor, measured: dict[str, Any]) -> Iterator[torch.Tensor]:
    """base + delta in float16, the base extended by zero rows; keeps a few statistics of samples."""
    import torch

    samples: dict[str, list[float]] = {"base": [], "delta": [], "merged": []}
    n_rows = delta.shape[0]
    is_input = name == llama_layout.EMBEDDINGS[0] and n_rows > base.shape[0]
    mean = torch.zeros(delta.shape[-1], dtype=torch.float32)
    row_bytes = math.prod(delta.shape[1:]) * tensor_files.item_bytes(delta.dtype)
    for start, stop in tensor_files.row_ranges(n_rows, row_bytes, multiple=base.row_multiple):
        right = delta.read_rows(start, stop).to(torch.float16)
        left = base.read_rows(start, min(stop, base.shape[0])).to(torch.float16) if start < base.shape[0] else right[:0]
        if is_input:
            mean += left.sum(0, dtype=torch.float32)
        if len(left) < len(right):
            # Zeros are really added: 0 + (-0) is +0, as in FastChat.
            left = torch.cat([left, torch.zeros(len(right) - len(left), *right.shape[1:], dtype=torch.float16)])
        total = left + right
        for key, tensor in (("base", left), ("delta", right), ("merged", total)):
            samples[key].append(_rms(tensor))
        yield total
    for key, values in samples.items():
        measured[f"rms_{key}"] = math.sqrt(sum(value * value for value in values) / len(values))
    if is_input:
        cosine = torch.nn.functional.cosine_similarity(mean, right[-1].float(), dim=0)
        measured["pad_row_cosine"] = float(cosine)


def _copied(tensor: _Tensor) -> Iterator[torch.Tensor]:
    row_bytes = math.prod(tensor.shape[1:]) * tensor_files.item_bytes(tensor.dtype)
    for start, stop in tensor_files.row_ranges(tensor.shape[0], row_bytes, multiple=tensor.row_multiple):
        yield tensor.read_rows(start, stop)


def _halved(tensor: _Tensor) -> Iterator[torch.Tensor]:
    for chunk in _copied(tensor):
        yield chunk.half()


def _sample(tensor: _Tensor) -> torch.Tensor:
    """About 64,000 numbers of a tensor's beginning, as float16."""
    n_rows = max(1, min(tensor.shape[0], 65536 // max(1, math.prod(tensor.shape[1:]))))
    multiple = tensor.row_multiple
    return tensor.read_rows(0, max(multiple, n_rows // multiple * multiple)).reshape(-1).half()


def _rms(values: torch.Tensor) -> float:
    """Root mean square of at most about 8,000 numbers spread over a tensor; in numpy, which starts no threads."""
    flat = values.reshape(-1).numpy()
    sample = flat[:: 1 + len(flat) // 8192].astype(np.float32)
    return float(np.sqrt(np.mean(np.square(sample)))) if len(sample) else 0.0


def _empty_bits(values: torch.Tensor) -> float:
    """Share of float16 numbers whose last three bits are zero."""
    import torch

    return float(((values.view(torch.int16) & 7) == 0).float().mean())


def _has_inputs(base: Path, delta: Path) -> bool:
    patterns = ("*.safetensors", "*.bin", "*.pth")
    return all(any(any(folder.glob(p)) for p in patterns) for folder in (base, delta))


def _tokenizer_folder(candidates: Sequence[Path]) -> Path:
    for folder in candidates:
        if any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
            return folder
    raise FileNotFoundError(
        f"no tokenizer.model or tokenizer.json in {', '.join(str(folder) for folder in candidates)}. "
        f"Copy LLaMA's tokenizer.model (0.5 MB) into {candidates[0]}."
    )


def _write_sidecars(target: Path, *, config: Mapping[str, Any], dtype: str, tokenizer: Path) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files; old transformers read them too."""
    text = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "rope_scaling": None,
        # Both names of the type and of the rotary base: transformers 4 reads the old, 5 the new.
        "torch_dtype": dtype,
        "dtype": dtype,
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        **config,
    }
    storage.write_json(target / "config.json", text)
    storage.write_json(target / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists() and (tokenizer / name).resolve() != (target / name).resolve():
            with storage.atomic_path(target / name) as temporary:
                shutil.copyfile(tokenizer / name, temporary)
    if (tokenizer / "tokenizer.model").exists():
        # Old folders carry empty or wrong special tokens (decapoda, early v0 deltas): ours are written instead,
        # and a tokenizer.json made from theirs is not taken over.
        for name in ("tokenizer.json", "added_tokens.json"):
            (target / name).unlink(missing_ok=True)
        storage.write_json(target / "tokenizer_config.json", _SENTENCEPIECE_CONFIG)
        special = {key: _SENTENCEPIECE_CONFIG[key] for key in ("bos_token", "eos_token", "unk_token")}
        storage.write_text(target / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
