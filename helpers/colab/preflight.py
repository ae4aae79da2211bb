"""Before anything starts: what this machine lacks and how to mend it, and what each notebook costs.

Measured now: memory, disk, what is there. Estimated, and said so: minutes and compute units of ``full``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil

from helpers import files, profiles

GB = 1e9
_CHANGE_GPU = "Runtime > Change runtime type > L4 GPU"

# GB of free GPU memory, of free memory, and of free disk from the very start.
NEEDS = {"mini": (0, 3, 2), "full": (profiles.MIN_FULL_GPU_GB, 12, 65)}

RATES = {"A100 80GB": 7.52, "A100": 5.40, "T4": 1.19, "L4": 1.71, "RTX PRO 6000": 8.71}
"""Colab compute units per hour, users' measurements of 2026-03-10. Google changes them: edit this table."""


class Stage(NamedTuple):
    """What one notebook costs, and what below ``$ART_HOME/<profile>`` proves that it is done (empty: nothing)."""

    mini_seconds: int  # on 2 CPU cores, measured
    l4_minutes: int  # in full on an L4; an estimate, nobody has measured it
    disk_gb: float  # most that it adds on disk in full; an estimate from file sizes
    proof: str


STAGES = {
    "01_prepare_weights": Stage(17, 45, 49.5, "weights/vicuna/READY.json"),
    "02_synthesize_anomalies": Stage(14, 2, 1.0, "data/*/manifest.json"),
    "03_clip": Stage(74, 5, 3.0, "results/clip_patch_knn/manifest.json"),
    "04_anomalyclip": Stage(33, 25, 6.0, "results/anomalyclip/manifest.json"),
    "05_reference": Stage(93, 5, 0.5, "results/aligned/manifest.json"),
    "06_anomalygpt_train": Stage(55, 20, 4.5, "checkpoints/anomalygpt/*/training.json"),
    "07_anomalygpt_test": Stage(79, 6, 0.5, "results/anomalygpt/manifest.json"),
    "08_anomalygpt_chat": Stage(42, 5, 0.1, ""),
    "09_compare": Stage(41, 5, 0.1, "report/index.html"),
}


class Check(NamedTuple):
    """One line of the table: what was looked at, whether work can start, what was found, what to do if not."""

    name: str
    is_ok: bool
    found: str
    fix: str = ""


def run(profile: profiles.Profile, *, lasting: Path | None = None) -> list[Check]:
    """Look at everything that has stopped somebody before, the folder that outlasts the session included; offline."""
    gpu_gb, ram_gb, disk_gb = NEEDS[profile.name]
    checks = [_gpu(profile.device, gpu_gb), _memory(ram_gb), _disk(profile.home, disk_gb)]
    return [*checks, _lasting(lasting), _weights(profile)]


def as_text(checks: Iterable[Check]) -> str:
    """The table, one line a check and one more for what to do.

    >>> print(as_text([Check("disk", False, "1 GB", "Free some.")]))
      ✗ disk        1 GB
                    -> Free some.
    """
    lines = []
    for check in checks:
        lines.append(f"  {'✓' if check.is_ok else '✗'} {check.name:11s} {check.found}")
        lines += [] if check.is_ok else [f"{'':16s}-> {check.fix}"]
    return "\n".join(lines)


def states(home: Path) -> dict[str, str]:
    """Notebook -> "done", "to do" or "any time", by what lies in a workspace; in doubt the notebook knows better."""
    proofs = {name: stage.proof for name, stage in STAGES.items()}
    done = {name for name, proof in proofs.items() if proof and any(home.glob(proof))}
    return {name: "done" if name in done else "to do" if proof else "any time" for name, proof in proofs.items()}


def where_am_i(home: Path) -> str:
    """Which notebooks are done in this workspace and which are not, in a sentence."""
    found = states(home)
    done, left = (", ".join(n[:2] for n, state in found.items() if state == one) for one in ("done", "to do"))
    rest = f"to do: {left}" if left else "everything is there, look into 08 and 09"
    return f"done here: {done or 'nothing yet'}; {rest}"


def costs(profile: profiles.Profile, gpu: str = "") -> pd.DataFrame:
    """A row a notebook: whether it is done, minutes, compute units and disk; estimates in ``full``.

    ``gpu`` is its name as CUDA gives it: minutes are those of an L4 whatever it is, units use its rate.
    """
    table, is_mini = pd.DataFrame(STAGES.values(), index=list(STAGES)), profile.name == "mini"
    minutes = table.mini_seconds / 60 if is_mini else table.l4_minutes.astype(float)
    found = pd.DataFrame({"state": states(profile.home), "minutes": minutes.round(1)}).rename_axis("notebook")
    rate = rate_of(gpu)
    units = "unknown" if rate is None else (rate * minutes / 60).map("{:.1f}".format)
    found["compute units"] = "none" if is_mini else units
    found["GB of disk"] = "below 1" if is_mini else table.disk_gb
    return found.reset_index()


def cost_note(profile: profiles.Profile, gpu: str = "") -> str:
    """Where the numbers of :func:`costs` come from."""
    if profile.name == "mini":
        return "Minutes were measured on 2 CPU cores."
    rate = rate_of(gpu)
    priced = f"{rate:g} units an hour (users, 2026-03-10)" if rate else f"no rate is known for {gpu or 'this machine'}"
    return (
        f"Estimates. Minutes: an L4, from sizes, not measured. Compute units: {priced}. Colab shows the rate in force "
        "under Resources; the table of rates is RATES in helpers/colab/preflight.py."
    )


def rate_of(gpu: str) -> float | None:
    """The rate of a GPU by its name, None when it is not in the table.

    >>> rate_of("NVIDIA A100-SXM4-80GB"), rate_of("NVIDIA L4"), rate_of("NVIDIA L40S")
    (7.52, 1.71, None)
    """
    words = set(re.split(r"\W", gpu))
    return next((rate for name, rate in RATES.items() if words >= set(name.split())), None)


def gpu_name(device: str) -> str:
    """Name of the GPU that a torch device stands for, empty for a CPU."""
    import torch

    return torch.cuda.get_device_name(0) if device.startswith("cuda") else ""


def is_reachable(folder: Path) -> bool:
    """Whether a folder can be listed now; a lost mount exists and cannot (error 107)."""
    try:
        os.listdir(folder)
    except OSError:
        return False
    return True


def _gpu(device: str, need_gb: float) -> Check:
    if not device.startswith("cuda"):
        found = f"none; full needs {need_gb:g} GB" if need_gb else "none, and none is needed"
        return Check("GPU", not need_gb, found, f"{_CHANGE_GPU}, or ART_PROFILE=mini.")
    import torch

    free, total = (n_bytes / GB for n_bytes in torch.cuda.mem_get_info())
    has_bf16 = torch.cuda.get_device_capability(0)[0] >= 8
    fix = f"full needs {need_gb:g} GB: {_CHANGE_GPU}, or ART_PROFILE=mini."
    if total >= need_gb:
        fix = "Another program holds its memory: Runtime > Manage sessions, end the others; or restart this one."
    if not has_bf16:
        fix += ' It lacks bfloat16: set precision = "fp16" in 06 and 07, or take an L4.'
    return Check("GPU", free >= need_gb and has_bf16, f"{gpu_name(device)}, {free:.1f} of {total:.1f} GB free", fix)


def _memory(need_gb: float) -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB free, {need_gb:g} needed"
    fix = "Close other notebooks (Runtime > Manage sessions), or choose a machine with more memory."
    return Check("memory", memory.available >= need_gb * GB, found, fix)


def _disk(home: Path, need_gb: float) -> Check:
    used = sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) if home.exists() else 0
    free, need = files.free_bytes(home), max(need_gb * GB - used, GB)
    found = f"{free / GB:.1f} GB free for {home}, {need / GB:.1f} needed"
    return Check("disk", free >= need, found, "Free some, or point ART_HOME to another disk.")


def _lasting(folder: Path | None) -> Check:
    if folder is None:
        return Check("kept files", True, "nowhere but here (ART_DRIVE=<folder> keeps finished work elsewhere, too)")
    if not is_reachable(folder):
        fix = "Run this cell again and allow access to Drive."
        return Check("kept files", False, f"{folder} cannot be listed", fix)
    free = files.free_bytes(folder) / GB
    fix = "Free some space there, or work is lost with this machine (15 GB is a Drive without a plan)."
    return Check("kept files", free >= 1, f"{folder}, {free:.1f} GB free", fix)


def _weights(profile: profiles.Profile) -> Check:
    found = "not ready; only 06 to 08 need them all. 01 downloads about 32 GB and first asks you to accept the licences"
    if states(profile.home)["01_prepare_weights"] == "done":
        found = "ready"
    elif profile.weights.size == "mini":
        found = "01 makes them of installed packages, nothing is downloaded"
    return Check("weights", True, found)
