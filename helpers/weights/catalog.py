"""What a route to the weights needs: every file with its size, licence and place, and whether the disk suffices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import files
from helpers.weights.folders import READY, SHARD_BYTES

BASES = ("huggingface", "meta", "merged")
VERSIONS = ("v0", "v1.1")
COMMUNITY_LLAMA = "huggyllama/llama-7b"
"""LLaMA 7B as the community converted it; Meta's own form for LLaMA 1 has not been answered since 2023."""

MODEL_BYTES = {"7B": 13_476_847_616, "mini": 326_000_000}
_LLAMA, _NC = "LLaMA 1, non-commercial", "CC BY-NC-SA 4.0"
_META = {  # sizes and MD5 sums of Meta's checklist
    "consolidated.00.pth": (13_476_939_516, "6efc8dab194ab59e49cd24be5574d85e"),
    "params.json": (101, None),  # mirrors word it differently; its numbers are checked against the shapes
    "tokenizer.model": (499_723, "eeec4125e9c7560836b4873b6f8e3025"),
}
_CLIP = "https://raw.githubusercontent.com/zqhang/AnomalyCLIP/45ed4dd35c05797d854294b5e8d585c545920089/checkpoints"
_SMALL = {  # component: source, bytes as published and in mini, licence, SHA-256
    "imagebind": (
        "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth", 4_803_600_000, 60_000_000, _NC, None,
    ),
    "pandagpt": (
        "hub:openllmplayground/pandagpt_7b_max_len_1024/pytorch_model.pt", 75_505_664, 2_300_000, "CC BY-NC 4.0", None,
    ),
} | {
    f"anomalygpt/{name}": (f"hub:FantasticGNU/AnomalyGPT/{name}/pytorch_model.pt", 225_326_960, 4_300_000, _NC, None)
    for name in ("train_mvtec", "train_visa", "train_supervised")
} | {  # published folders have inverted names: ..._visa was trained on MVTec AD
    f"anomalyclip/trained_on_{name}": (f"{_CLIP}/{folder}/epoch_15.pth", 22_700_000, 2_300_000, "MIT", sha256)
    for name, folder, sha256 in (
        ("visa", "9_12_4_multiscale", "94ce202da3e6486a864b904fdfed5057de75846c5834e446fd1d2fe7f97acb44"),
        ("mvtec", "9_12_4_multiscale_visa", "415c5dcb52668b8c33fb9c1a351c686d632b919df5b384d63fa9ce7a2338ced4"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class WeightFile:
    """One file, or one folder of files, that a route needs.

    Attributes:
        component, path, licence: what it becomes, for example ``"vicuna"``, where it must lie, and its terms.
        source: ``hub:<repository>[/<file>]``, ``https://...``, ``manual``, ``LLAMA_FOLDER`` or ``mini``.
        n_bytes: about how large, computed from shapes.
        is_folder, checks: a whole repository; published hash as (kind, value).
    """

    component: str
    path: Path
    source: str
    n_bytes: int
    licence: str
    is_folder: bool = False
    checks: tuple[str, str] | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether the licence forbids commercial use."""
        return "NC" in self.licence or "LLaMA" in self.licence

    @property
    def is_by_hand(self) -> bool:
        return self.source in ("manual", "LLAMA_FOLDER")

    @property
    def list_path(self) -> Path:
        """Where :func:`helpers.weights.fetch.fetch_hub` notes which files a folder should hold, before the first."""
        return self.path.with_name(f"{self.path.name}.files.json")

    @property
    def is_present(self) -> bool:
        """Whether nothing is to be fetched or placed: a folder is there when every file of its list is."""
        if not self.is_folder:
            return self.path.is_file()
        if self.source.startswith("hub:"):
            listed = files.read_json(self.list_path) if self.list_path.exists() else None
            return bool(listed) and all(
                (self.path / name).is_file() and (self.path / name).stat().st_size == entry["bytes"]
                for name, entry in listed.items()
            )
        return any((self.path / name).exists() for name in ("params.json", "config.json"))


@dataclass(frozen=True)
class Route:
    """A way to the weights: see :func:`route`; ``llama_dir`` is LLaMA's folder as published, ``files`` all it needs."""

    weights_dir: Path
    size: str
    base: str
    version: str
    llama_dir: Path
    files: tuple[WeightFile, ...]
    shard_bytes: int
    is_fused: bool
    delete_raw: bool
    allow_unknown: bool

    @property
    def raw_dir(self) -> Path:
        return self.weights_dir / "raw"

    @property
    def delta_dir(self) -> Path:
        return self.raw_dir / f"vicuna-{self.size}-delta-{self.version}"

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads of ImageBind's towers; the embedded backbone has heads of 64."""
        return (4, 3) if self.size == "mini" else (16, 16)

    def is_ready(self, component: str) -> bool:
        """Whether a component is complete in ``weights_dir``."""
        return (self.weights_dir / component / READY).exists()

    def missing(self) -> list[WeightFile]:
        """Files that must still be fetched or placed; those of finished components are not needed any more."""
        return [file for file in self.files if not file.is_present and not self.is_ready(file.component)]

    @property
    def disk_bytes(self) -> int:
        """Disk still to be filled: missing files and unfinished parts (raw files go only after their part is ready)."""
        n_bytes = sum(file.n_bytes for file in self.missing() if not file.is_by_hand)
        for file in {file.component: file for file in self.files if not self.is_ready(file.component)}.values():
            made = {"vicuna": MODEL_BYTES[self.size], "imagebind": file.n_bytes // 2}
            n_bytes += made.get(file.component, file.n_bytes)
        has_base = self.base == "meta" and not self.is_fused and not self.is_ready("vicuna")
        return n_bytes + (MODEL_BYTES[self.size] if has_base and not self.is_ready("llama") else 0)

    def table(self) -> pd.DataFrame:
        """One row a file: what it is for, size, licence, where it comes from and whether it is there."""
        rows = []
        for file in self.files:
            state = "put it there" if file.is_by_hand else "will be fetched"
            state = "part is ready" if self.is_ready(file.component) else "present" if file.is_present else state
            name = str(file.path).removeprefix(f"{self.weights_dir}/")
            rows.append((file.component, name, round(file.n_bytes / 1e6, 1), file.licence, file.source, state))
        return pd.DataFrame(rows, columns=["for", "file", "about MB", "licence", "from", "state"])


def route(
    weights_dir: Path, settings: Any, *, base: str = "huggingface", version: str = "v0",
    llama_folder: str | Path | None = None, delete_raw: bool | None = None, allow_unknown: bool = False,
) -> Route:  # fmt: skip
    """Work out which files are needed and where they are; moves nothing.

    Args:
        weights_dir, settings: ``profile.weights_dir`` and ``profile.weights``.
        base: where LLaMA comes from: ``"huggingface"`` (the community's conversion :data:`COMMUNITY_LLAMA`),
            ``"meta"`` (Meta's own files) or ``"merged"`` (a finished Vicuna). ``mini`` writes its own in Meta's form.
        version: of the Vicuna delta; PandaGPT and AnomalyGPT were trained with ``"v0"``.
        llama_folder: your folder with LLaMA, or the merged Vicuna, only read; None: fetched, or expected in ``raw``.
        delete_raw: delete fetched files when the part made of them is ready; None takes the settings' value.
        allow_unknown: leave out keys that a checkpoint should not have instead of stopping.
    Raises:
        ValueError, FileNotFoundError: an unknown choice, or no such folder; says what is allowed.
    """
    for value, allowed, what in ((base, BASES, "BASE"), (version, VERSIONS, "VERSION")):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed are {', '.join(allowed)}.")
    if settings.size not in MODEL_BYTES:
        raise ValueError(f"size is {settings.size!r}; the published AnomalyGPT weights exist for 7B only.")
    if llama_folder and not Path(llama_folder).expanduser().is_dir():
        raise FileNotFoundError(f"LLAMA_FOLDER is {str(llama_folder)!r}, which is no folder here. Is Drive mounted?")
    weights_dir = Path(weights_dir)
    base = "meta" if settings.size == "mini" else base
    llama_dir = weights_dir / "raw" / f"llama-{settings.size}-{base}"
    if llama_folder and settings.size != "mini":
        llama_dir = Path(llama_folder).expanduser()
        if base != "merged":
            base = "meta" if (llama_dir / "params.json").exists() else "huggingface"
    delete_raw = settings.delete_raw if delete_raw is None else delete_raw
    options = (settings.shard_bytes, settings.fuse_merge, delete_raw, allow_unknown)
    empty = Route(weights_dir, settings.size, base, version, llama_dir, (), *options)
    return replace(empty, files=tuple(_needed(empty, bool(llama_folder))))


def check_disk(route: Route) -> str:
    """What the route needs and what this machine has, in words; OSError where the disk is too small."""
    n_free, n_needed = files.free_bytes(route.weights_dir), route.disk_bytes
    n_reserve = min(SHARD_BYTES, n_needed)
    needs = f"needs {n_needed / 1e9:.1f} GB of disk, {n_free / 1e9:.1f} GB are free; memory: a little over 1 GB"
    if n_needed + n_reserve > n_free:
        missing = (n_needed + n_reserve - n_free) / 1e9
        raise OSError(28, f"{needs}. Free {missing:.1f} GB, or set ART_HOME to a larger disk; nothing was fetched")
    if route.size != "mini" and (route.base == "merged" or route.version != "v0"):
        needs += "\nPandaGPT and AnomalyGPT were trained with Vicuna v0: with another version answers may be worse"
    return needs


def _needed(route: Route, is_own: bool) -> list[WeightFile]:
    """Every file of a route; ``mini`` writes the same parts, in the same formats, into the same places."""
    is_mini, model = route.size == "mini", MODEL_BYTES[route.size]
    licence = "Apache-2.0" if is_mini else _LLAMA
    if route.base == "meta" and not (is_mini or is_own):
        found = [
            WeightFile("vicuna", route.llama_dir / name, "manual", n, licence, checks=("md5", md5) if md5 else None)
            for name, (n, md5) in _META.items()
        ]
    else:
        source = f"hub:{COMMUNITY_LLAMA}" if route.base == "huggingface" else "manual"
        source = "mini" if is_mini else "LLAMA_FOLDER" if is_own else source
        found = [WeightFile("vicuna", route.llama_dir, source, model, licence, True)]
    if route.base != "merged":
        source = "mini" if is_mini else f"hub:lmsys/vicuna-7b-delta-{route.version}"
        terms = licence if is_mini else f"Apache-2.0 + {licence}"
        found.append(WeightFile("vicuna", route.delta_dir, source, model, terms, True))
    for name, (source, n_bytes, n_mini, terms, sha256) in _SMALL.items():
        path = route.raw_dir / f"{name.replace('/', '_')}.pt"
        if is_mini:
            found.append(WeightFile(name, path, "mini", n_mini, "MIT (ours)"))
        else:
            found.append(WeightFile(name, path, source, n_bytes, terms, checks=("sha256", sha256) if sha256 else None))
    return found
