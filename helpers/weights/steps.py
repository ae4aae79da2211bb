"""The steps of notebook 01: fetch, convert, merge, check. Each may be killed at any moment and called again."""

from __future__ import annotations

import shutil
from pathlib import Path

import sentencepiece

from helpers import files
from helpers.weights import fetch, folders, llama, mini, published
from helpers.weights.catalog import Route, WeightFile
from helpers.weights.tensors import WeightFileError, check_records, file_hash, read_index


def obtain_free(route: Route) -> None:
    """AnomalyCLIP's prompts (MIT), fetched, checked and converted: all that notebook 04 needs, without any consent."""
    for file in route.files:
        if file.component.startswith("anomalyclip/") and not route.is_ready(file.component):
            _get(route, file)
            _convert(route, file)


def obtain(route: Route, *, accept_licences: bool) -> None:
    """Fetch everything the route still lacks, and check what was put there by hand.

    Raises:
        FileNotFoundError: files must be placed by hand; lists all of them with place and size.
        PermissionError: the non-commercial licences in the route's table are not accepted.
        DownloadError, WeightFileError: a file is wrong; says which, and what to do.
    """
    missing = route.missing()
    if by_hand := [file for file in missing if file.is_by_hand]:
        places = "\n".join(f"  {file.path}  (about {file.n_bytes / 1e6:.0f} MB)" for file in by_hand)
        raise FileNotFoundError(
            f"These files cannot be fetched for you. Put them exactly here, or give their folder as LLAMA_FOLDER, or "
            f"set BASE = 'huggingface', and run this cell again:\n{places}"
        )
    restricted = [file for file in missing if "NC" in file.licence or "LLaMA" in file.licence]
    if restricted and not accept_licences:
        terms = sorted({f"{file.component} ({file.licence})" for file in restricted})
        raise PermissionError(
            f"Not for commercial use: {', '.join(terms)}. Read the licences at their sources in the table above, "
            f"then set ACCEPT_LICENCES = True and run this cell again."
        )
    for file in missing:
        _get(route, file)
    for file in route.files:
        if not route.is_ready(file.component) and file.source != "mini":
            _inspect(route, file, is_fetched=file in missing)
    print("nothing left to fetch: every file is here, or what it was needed for is ready")


def convert_base(route: Route) -> Path:
    """LLaMA as the merge needs it: converted, or as it is when the route needs no conversion. Returns its folder."""
    if route.is_ready("vicuna") or route.base != "meta" or route.settings.fuse_merge:
        print("nothing to write here: the next step reads LLaMA as it is, or the merged model is ready")
        return route.llama_dir
    return llama.convert_llama(route.llama_dir, route.weights_dir / "llama", **_options(route))


def merge(route: Route, base: Path) -> Path:
    """Vicuna in ``weights_dir/vicuna``: base + delta, or the model that was merged elsewhere. Returns its folder."""
    target = route.weights_dir / "vicuna"
    if route.is_ready("vicuna"):
        folders.require(route.weights_dir, "vicuna")
        print("vicuna: already complete")
    elif route.base == "merged":
        llama.adopt_merged(route.llama_dir, target, **_options(route))
    else:
        llama.merge_delta(base, route.delta_dir, target, version=route.version, **_options(route))
    if route.delete_raw:
        for file in route.files:
            if file.component == "vicuna":
                _delete(route, file)
        shutil.rmtree(route.weights_dir / "llama", ignore_errors=True)
    return target


def _options(route: Route) -> dict:
    return {"shard_bytes": route.settings.shard_bytes, "allow_unknown": route.allow_unknown}


def convert_rest(route: Route) -> None:
    """ImageBind, PandaGPT, AnomalyGPT and AnomalyCLIP: each that is not converted yet."""
    for file in route.files:
        if file.component != "vicuna":
            _convert(route, file)


def check(route: Route) -> None:
    """Every part is there, whole, and fits the others: a line with a tick for each, or an error that names both."""
    folder = {file.component: folders.require(route.weights_dir, file.component) for file in route.files}
    for component, path in folder.items():
        ready = folders.read_ready(path)
        n_bytes = sum(entry["bytes"] for entry in ready["files"].values())
        print(f"✓ {component}: {n_bytes / 1e6:,.1f} MB, hash of all files {files.sha256_json(ready['files'])[:12]}")
        for note in ready["notes"]:
            print(f"! {component}: {note}")
    hidden = files.read_json(folder["vicuna"] / "config.json")["hidden_size"]
    eyes = files.read_json(folder["imagebind"] / "config.json")
    joint, width = eyes["embed_dim"], eyes["vision_cfg"]["width"]
    wanted = {("pandagpt", "llama_proj.weight"): (hidden, joint)}
    for component in (component for component in folder if component.startswith("anomalygpt/")):
        wanted[component, "image_decoder.fc.0.weight"] = (joint, width)
        wanted[component, "prompt_learner.meta_net.15.bias"] = (hidden,)
    for (component, name), shape in wanted.items():
        found = read_index(folder[component] / "model.safetensors")[name].shape
        if found != shape:
            raise WeightFileError(
                f"{component}: {name} is {found}; Vicuna and ImageBind need {shape}. Use one size: the published "
                f"AnomalyGPT files exist for 7B only."
            )
    print(f"✓ they fit each other: language model {hidden} wide, image vector {joint}, image tower {width}")


def _get(route: Route, file: WeightFile) -> None:
    """Fetch, or write from installed packages, one file or folder that is not complete."""
    if file.is_present:
        return
    print(f"{file.path.name}: {'made of an installed package' if file.source == 'mini' else f'from {file.source}'}")
    kind, _, place = file.source.partition(":")
    if kind == "mini" and file.component == "vicuna":
        mini.write_language_model(route.llama_dir, route.delta_dir)
    elif kind == "mini":
        mini.write(file.component, file.path)
    elif kind == "hub":
        owner, name, *rest = place.split("/", 2)
        listed = file.list_path if file.is_folder else None
        try:
            fetch.fetch_hub(f"{owner}/{name}", file.path, name=rest[0] if rest else None, list_path=listed)
        except fetch.DownloadError as error:
            if not (file.path / "config.json").exists() or file.list_path.exists():
                raise
            print(f"{file.path.name}: {error} Your files are taken as they are.")
    else:
        fetch.fetch(file.source, file.path, sha256=file.published_hash.removeprefix("sha256:") or None)


def _inspect(route: Route, file: WeightFile, *, is_fetched: bool) -> None:
    """Keys and shapes of one file or folder; of one put there by hand its hash or checksums, too."""
    family = file.component.split("/")[0]
    try:
        if family != "vicuna":
            shapes = {name: item.shape for name, item in read_index(file.path).items()}
            published.inspect(family, shapes, allow_unknown=route.allow_unknown)
        elif file.path.name == "tokenizer.model":
            sentencepiece.SentencePieceProcessor(model_file=str(file.path))
        else:
            folder = file.path if file.is_folder else file.path.parent
            llama.open_model(folder, allow_unknown=route.allow_unknown)
        if not (is_fetched or file.published_hash or file.is_folder):
            check_records(file.path)
    except (WeightFileError, FileNotFoundError, RuntimeError) as error:
        raise WeightFileError(
            f"{file.path} cannot be used: {str(error).partition(' Delete it (rm')[0]} It was left as it is: delete it "
            f"and run this cell again, or put the right one there, or give its folder as LLAMA_FOLDER."
        ) from None
    kind, _, value = file.published_hash.partition(":")
    if kind and not is_fetched and file_hash(file.path, kind) != value:
        print(f"{file.path.name}: accepted; keys and shapes are right, but its {kind} is not the published one")


def _convert(route: Route, file: WeightFile) -> None:
    if route.is_ready(file.component):
        print(f"{file.component}: already complete")
    else:
        family, target = file.component.split("/")[0], route.weights_dir / file.component
        published.convert(family, file.path, target, allow_unknown=route.allow_unknown)
        made = "a stand-in, in the published format" if file.source == "mini" else "every key and shape as published"
        print(f"{file.component}: {made}")
    if route.delete_raw:
        _delete(route, file)


def _delete(route: Route, file: WeightFile) -> None:
    """Delete a raw file whose part is ready: only what lies in ``raw`` itself, never through a link."""
    path = file.path
    if not path.exists() or file.source == "LLAMA_FOLDER":
        return
    is_linked = path.is_symlink() or not path.resolve().is_relative_to(route.raw_dir.resolve())
    if is_linked or (path.is_dir() and any(item.is_symlink() for item in path.rglob("*"))):
        print(f"{path.name}: kept, because it is, or holds, a link to files elsewhere")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
