"""A folder of weights written shard by shard: locked, resumed after a kill, complete when ``READY.json`` is there."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from helpers import files
from helpers.weights.tensors import Tensor, WeightFileError, file_hash, write_safetensors

READY, JOURNAL, LOCK = "READY.json", "journal.json", ".lock"
SHARD_BYTES = RESERVE_BYTES = 2_000_000_000

Shapes = Mapping[str, tuple[int, ...]]


def write_folder(
    target: Path, tensors: Mapping[str, Tensor], write_small: Callable[[Path], None], *, component: str,
    settings: Mapping[str, Any], source: Mapping[str, Any], notes: Sequence[str] = (), shard_bytes: int = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write tensors as safetensors shards, then the small files, then ``READY.json``; inputs are only ever read.

    A second call goes on where a killed one stopped: shards that the journal names and whose hash is right are kept.

    Args:
        target, tensors, shard_bytes: folder to write, what, in this order, and the largest file.
        write_small: writes config and tokenizer files into the folder it is given.
        component, source, notes: for ``READY.json``; ``settings``: what else decides the result.
    Raises:
        WeightFileError: the folder belongs to other inputs or settings, or a number is not finite.
        BlockingIOError: another process writes the folder.
        OSError: the disk is too small; says by how much.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, shard_bytes)
    inputs = {path: path.stat() for tensor in tensors.values() for path in tensor.files}
    if target.resolve() in {path.parent.resolve() for path in inputs}:
        raise ValueError(f"{target} is an input and cannot be written to as well. Choose an empty folder.")
    known_inputs = sorted((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in inputs.items())
    layout = {name: [(key, str(t.dtype), t.shape) for key, t in group.items()] for name, group in shards.items()}
    plan = files.sha256_json([settings, known_inputs, layout])
    try:
        with FileLock(target / LOCK, timeout=0):
            known = [files.read_json(target / name) for name in (READY, JOURNAL) if (target / name).exists()]
            if any(one.get("plan") != plan for one in known):
                raise WeightFileError(f"{target} was made, or begun, from other inputs or settings. Delete it first.")
            if (target / READY).exists():
                print(f"{component}: already complete in {target}")
                return check(target)
            done = _write_shards(target, shards, plan)
            if len(shards) > 1:
                total = {"total_size": sum(tensor.n_bytes for tensor in tensors.values())}
                listed = {"metadata": total, "weight_map": {key: name for name in shards for key in shards[name]}}
                files.write_json(target / "model.safetensors.index.json", listed)
            write_small(target)
            ours = {READY, JOURNAL, LOCK, *done}
            for path in sorted(p for p in target.iterdir() if p.is_file() and p.name not in ours):
                done[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            ready = {"component": component, "plan": plan, "source": source, "settings": settings}
            files.write_json(target / READY, ready | {"notes": notes, "files": done, "n_tensors": len(tensors)})
            (target / JOURNAL).unlink(missing_ok=True)
    except Timeout:
        raise BlockingIOError(f"{target} is being written by another process. Wait until it ends, or stop it") from None
    return target


def _write_shards(target: Path, shards: Mapping[str, Mapping[str, Tensor]], plan: str) -> dict[str, Any]:
    """Write the shards that are not there yet; returns ``{file: {"bytes", "sha256"}}`` of all."""
    journal, done = target / JOURNAL, {}
    if journal.exists():
        for name, entry in files.read_json(journal)["shards"].items():
            if (target / name).is_file() and file_hash(target / name) == entry["sha256"]:
                done[name] = entry
        print(f"resuming at {len(done)}/{len(shards)} shards")
    for path in target.iterdir():  # what a killed process left half written
        if path.suffix == ".part" or (path.name.startswith(".") and path.name != LOCK):
            path.unlink()
    left = {name: group for name, group in shards.items() if name not in done}
    n_left = sum(tensor.n_bytes for group in left.values() for tensor in group.values())
    _check_room(target, n_left, min(RESERVE_BYTES, n_left))
    files.write_json(journal, {"plan": plan, "shards": done})
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # hashing and disk decide here; a second thread would only wait busily
    try:
        with tqdm(total=n_left, unit="B", unit_scale=True, desc=target.name, disable=n_left < 1e8) as bar:
            for name, group in left.items():
                done[name] = write_safetensors(target / name, group)
                bar.update(done[name]["bytes"])
                n_left -= done[name]["bytes"]
                files.write_json(journal, {"plan": plan, "shards": done})
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _check_room(target, n_left, RESERVE_BYTES)  # says how much is missing
        raise
    finally:
        torch.set_num_threads(n_threads)
    return done


def _check_room(target: Path, n_left: int, n_reserve: int) -> None:
    n_free = files.free_bytes(target)
    if n_left + n_reserve > n_free:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {target} is too small: {n_left / 1e9:.2f} GB are still to be written, "
            f"{(n_left + n_reserve - n_free) / 1e9:.2f} GB are missing. Free some and run this again: it goes on",
        )


def _split(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """Tensors in order, cut into files of at most ``shard_bytes`` (a larger tensor gets its own)."""
    groups: list[dict[str, Tensor]] = [{}]
    n_bytes = 0
    for name, tensor in tensors.items():
        if groups[-1] and n_bytes + tensor.n_bytes > shard_bytes:
            groups.append({})
            n_bytes = 0
        groups[-1][name] = tensor
        n_bytes += tensor.n_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def account(
    what: str, found: Shapes, expected: Shapes, *, optional: Shapes = MappingProxyType({}), allow_unknown: bool = False
) -> None:
    """Every key and shape of ``what`` is as expected, or one error about all that differ."""
    known = {**expected, **optional}
    problems = [f"lacks {name}" for name in expected if name not in found]
    for name, shape in known.items():
        if name in found and tuple(found[name]) != tuple(shape):
            problems.append(f"{name} is {tuple(found[name])}, expected {tuple(shape)}")
    unknown = [] if allow_unknown else [f"has the unknown {name}" for name in found if name not in known]
    if problems or unknown:
        listed = [*problems, *unknown]
        more = f"; and {len(listed) - 6} more" if len(listed) > 6 else ""
        way = "" if problems else " If these keys are harmless, ALLOW_UNKNOWN = True leaves them out."
        raise WeightFileError(f"not a whole {what}: {'; '.join(listed[:6])}{more}. Nothing was written.{way}")


def require(weights_dir: Path, component: str) -> Path:
    """Folder of a prepared component, for example ``"vicuna"`` or ``"anomalygpt/<name>"``.

    Raises:
        FileNotFoundError: not prepared yet; names the notebook that does it.
        WeightFileError: prepared, but damaged since.
    """
    weights_dir = Path(weights_dir)
    if not (weights_dir / component / READY).exists():
        ready = sorted(str(path.parent.relative_to(weights_dir)) for path in weights_dir.glob(f"**/{READY}"))
        raise FileNotFoundError(
            f"{component} is not prepared in {weights_dir} (ready: {', '.join(ready) or 'nothing'}). Run notebook "
            f"01_prepare_weights."
        )
    return check(weights_dir / component)


def read_ready(folder: Path) -> dict[str, Any]:
    """Content of ``READY.json``: ``component, files, source, settings, notes, n_tensors``."""
    return files.read_json(Path(folder) / READY)


def check(folder: Path) -> Path:
    """Compare the sizes of a complete folder's files with its ``READY.json``."""
    wrong = []
    for name, entry in read_ready(folder)["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}")
    if wrong:
        raise WeightFileError(f"{folder} is damaged: {'; '.join(wrong)}. Delete it and run 01_prepare_weights again.")
    return Path(folder)
