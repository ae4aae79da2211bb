"""What a route to the weights needs: every file with its size, licence and place, and whether the disk suffices.

``catalog.csv`` lists, for each size, the files of each way to LLaMA (``BASE``), of each delta (``VERSION``), and of the
smaller parts, which every route needs. A path that ends in a slash is a folder. ``mini`` writes the same parts, in the
same formats, into the same places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from helpers import files
from helpers.profiles import WeightsSettings
from helpers.weights.folders import READY, SHARD_BYTES

BASES = ("huggingface", "meta", "merged")
VERSIONS = ("v0", "v1.1")
# Published folders of AnomalyCLIP have inverted names: 9_12_4_multiscale_visa was trained on MVTec AD.
_CATALOG = pd.read_csv(Path(__file__).with_suffix(".csv"), keep_default_na=False)


@dataclass(frozen=True)
class WeightFile:
    """One file, or one folder of files, that a route needs."""

    component: str  # what it becomes, for example "vicuna"
    path: Path  # where it must lie
    source: str  # hub:<repository>[/<file>], https://..., manual, LLAMA_FOLDER or mini
    n_bytes: int  # about how large, computed from shapes
    licence: str
    is_folder: bool = False  # a whole repository
    published_hash: str = ""  # <kind>:<value>

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
            listed = files.read_json(self.list_path) if self.list_path.exists() else {}
            there = {path.name: path.stat().st_size for path in self.path.glob("*")}
            return bool(listed) and all(there.get(name) == entry["bytes"] for name, entry in listed.items())
        return any((self.path / name).exists() for name in ("params.json", "config.json"))


@dataclass(frozen=True)
class Route:
    """A way to the weights: see :func:`route`."""

    weights_dir: Path
    settings: WeightsSettings
    base: str
    version: str
    llama_dir: Path  # LLaMA as published
    files: tuple[WeightFile, ...]  # all it needs
    delete_raw: bool
    allow_unknown: bool

    raw_dir = property(lambda self: self.weights_dir / "raw")
    delta_dir = property(lambda self: self.raw_dir / f"vicuna-{self.settings.size}-delta-{self.version}")

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
        made = {file.component: file.n_bytes for file in self.files if not self.is_ready(file.component)}
        if "imagebind" in made:
            made["imagebind"] //= 2  # float32 becomes float16
        if "vicuna" in made and self.base == "meta" and not self.settings.fuse_merge and not self.is_ready("llama"):
            made["llama"] = made["vicuna"]
        return n_bytes + sum(made.values())

    def table(self) -> pd.DataFrame:
        """One row a file: what it is for, size, licence, where it comes from and whether it is there."""
        rows = []
        for file in self.files:
            coming = "will be made" if file.source == "mini" else "will be fetched"
            state = "put it there" if file.is_by_hand else coming
            state = "part is ready" if self.is_ready(file.component) else "present" if file.is_present else state
            name = str(file.path).removeprefix(f"{self.weights_dir}/")
            rows.append((file.component, name, round(file.n_bytes / 1e6, 1), file.licence, file.source, state))
        return pd.DataFrame(rows, columns=["for", "file", "about MB", "licence", "from", "state"])


def route(
    weights_dir: Path, settings: WeightsSettings, *, base: str = "huggingface", version: str = "v0",
    llama_folder: str | Path | None = None, delete_raw: bool = False, allow_unknown: bool = False,
) -> Route:  # fmt: skip
    """Work out which files are needed and where they are; moves nothing.

    Args:
        weights_dir, settings: ``profile.weights_dir`` and ``profile.weights``.
        base: where LLaMA comes from: ``"huggingface"`` (the community's conversion; Meta's own form for LLaMA 1 has not
            been answered since 2023), ``"meta"`` (Meta's own files) or ``"merged"`` (a finished Vicuna).
        version: of the Vicuna delta; PandaGPT and AnomalyGPT were trained with ``"v0"``.
        llama_folder: your folder with LLaMA, or the merged Vicuna, only read; None: fetched, or expected in ``raw``.
        delete_raw: delete fetched files when the part made of them is ready.
        allow_unknown: leave out keys that a checkpoint should not have instead of stopping.
    Raises:
        ValueError, FileNotFoundError: an unknown choice, or no such folder; says what is allowed.
    """
    for value, allowed, what in ((base, BASES, "BASE"), (version, VERSIONS, "VERSION")):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed are {', '.join(allowed)}.")
    if llama_folder and not Path(llama_folder).expanduser().is_dir():
        raise FileNotFoundError(f"LLAMA_FOLDER is {str(llama_folder)!r}, which is no folder here. Is Drive mounted?")
    table = _CATALOG[_CATALOG["size"] == settings.size]
    if table.empty:
        raise ValueError(f"size is {settings.size!r}; the published AnomalyGPT weights exist for 7B only.")
    if base not in set(table["choice"]):
        base, version, llama_folder = "meta", "v0", None  # mini knows one way only
    raw_dir = Path(weights_dir) / "raw"
    llama_dir, choices = raw_dir / f"llama-{settings.size}-{base}", {"", base, version}
    if base == "merged":
        choices.remove(version)
    if llama_folder:
        llama_dir, choices = Path(llama_folder).expanduser(), choices - {base} | {"merged"}
        if base != "merged":
            base = "meta" if (llama_dir / "params.json").exists() else "huggingface"
    rows = table[table["choice"].isin(choices)].drop(columns=["size", "choice"])
    rows["is_folder"] = rows["path"].str.endswith("/")
    needed = [WeightFile(**row | {"path": raw_dir / row["path"]}) for row in rows.to_dict("records")]
    if llama_folder:
        needed[0] = replace(needed[0], path=llama_dir, source="LLAMA_FOLDER")
    return Route(Path(weights_dir), settings, base, version, llama_dir, tuple(needed), delete_raw, allow_unknown)


def check_disk(route: Route) -> str:
    """What the route needs and what this machine has, in words; OSError where the disk is too small."""
    n_free, n_needed = files.free_bytes(route.weights_dir), route.disk_bytes
    missing = (n_needed + min(SHARD_BYTES, n_needed) - n_free) / 1e9
    needs = f"needs {n_needed / 1e9:.1f} GB of disk, {n_free / 1e9:.1f} GB are free; memory: a little over 1 GB"
    if missing > 0:
        raise OSError(28, f"{needs}. Free {missing:.1f} GB, or set ART_HOME to a larger disk; nothing was fetched")
    if route.base == "merged" or route.version != "v0":
        needs += "\nPandaGPT and AnomalyGPT were trained with Vicuna v0: with another version answers may be worse"
    return needs
