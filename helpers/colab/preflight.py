"""Before anything starts: what this machine lacks and how to mend it, and what each notebook costs.

Measured now: memory, disk, versions, access. Estimated, and said so: minutes and compute units of ``full``.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import files as storage
from helpers import profiles
from helpers.anomalygpt.plan import RATES
from helpers.colab import session as colab
from helpers.weights import catalog as weight_plan
from helpers.weights import fetch as downloads

if TYPE_CHECKING:
    import pandas as pd

GB = 1e9
HUB = "https://huggingface.co"
_CHANGE_GPU = "Runtime > Change runtime type > L4 GPU"


@dataclass(frozen=True)
class Need:
    """What a profile needs of a machine, in GB: free GPU memory, free memory, free disk from the very start."""

    gpu_gb: float
    ram_gb: float
    disk_gb: float


NEEDS = {"mini": Need(0, 3, 2), "full": Need(profiles.MIN_FULL_GPU_GB, 12, 65)}


@dataclass(frozen=True)
class Stage:
    """What one notebook costs.

    Attributes:
        mini_seconds: in ``mini`` on 2 CPU cores, measured.
        l4_minutes: in ``full`` on an L4; an estimate, nobody has measured it.
        disk_gb: most that it adds on disk in ``full``; an estimate from file sizes.
        proof: what lies below ``$ART_HOME/<profile>`` when it is done (a pattern); empty: nothing.
    """

    mini_seconds: int
    l4_minutes: int
    disk_gb: float
    proof: str


STAGES = {
    "01_prepare_weights": Stage(17, 45, 49.5, "weights/pandagpt/READY.json"),
    "02_synthesize_anomalies": Stage(11, 2, 1.0, "data/*/manifest.json"),
    "03_clip": Stage(76, 5, 3.0, "results/clip_patch_knn/manifest.json"),
    "04_anomalyclip": Stage(34, 25, 6.0, "results/anomalyclip/manifest.json"),
    "06_anomalygpt_train": Stage(45, 120, 4.5, "checkpoints/anomalygpt/*/training.json"),
    "07_anomalygpt_test": Stage(31, 20, 0.5, "results/anomalygpt/manifest.json"),
    "08_anomalygpt_chat": Stage(42, 5, 0.1, ""),
    "09_compare": Stage(17, 2, 0.1, "report/index.html"),
}


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was looked at.
        is_ok: whether work can start.
        found: what was found, in words.
        fix: what to do when it is not ok.
    """

    name: str
    is_ok: bool
    found: str
    fix: str = ""


def run(profile: profiles.Profile, *, lasting: Path | None = None) -> list[Check]:
    """Look at everything that has stopped somebody before; a second in ``mini``, a few with downloads ahead.

    Args:
        profile: the active one.
        lasting: where finished work is kept, see :func:`helpers.colab.session.lasting_folder`.
    """
    need = NEEDS[profile.name]
    repositories = _hub_repositories(profile) if profile.llama_size != "mini" else []
    return [
        _gpu(profile.device, need.gpu_gb),
        _bf16(profile.device),
        _memory(need.ram_gb),
        _disk(profile.home, need.disk_gb),
        _lasting(lasting),
        *_hub(repositories),
        _versions(profiles.REPOSITORY / "requirements.txt"),
    ]


def as_text(checks: Iterable[Check]) -> str:
    """The table, one line a check and one more for what to do.

    >>> print(as_text([Check("memory", True, "9 GB"), Check("disk", False, "1 GB", "Free some.")]))
      ✓ memory      9 GB
      ✗ disk        1 GB
                    -> Free some.
    """
    lines = []
    for check in checks:
        lines.append(f"  {'✓' if check.is_ok else '✗'} {check.name:11s} {check.found}")
        if not check.is_ok:
            lines.append(f"{'':16s}-> {check.fix}")
    return "\n".join(lines)


def is_done(home: Path, notebook: str) -> bool:
    """Whether what a notebook makes lies in a workspace; in doubt the notebook itself knows better."""
    proof = STAGES[notebook].proof
    return bool(proof) and any(home.glob(proof))


def where_am_i(home: Path) -> str:
    """Which notebooks are done in this workspace and which comes next, in a sentence."""
    made = [name for name, stage in STAGES.items() if stage.proof]
    done = [name for name in made if is_done(home, name)]
    left = [name for name in made if name not in done]
    return (
        f"done here: {', '.join(name[:2] for name in done) or 'nothing yet'}; "
        f"next: {left[0] if left else 'everything is there, look into 08 and 09'}"
    )


def costs(profile: profiles.Profile, gpu: str = "") -> pd.DataFrame:
    """A row a notebook: whether it is done, minutes, compute units and disk; estimates in ``full``.

    Args:
        profile: the active one.
        gpu: its name as CUDA gives it; minutes are those of an L4 whatever it is, units use its rate.
    """
    import pandas as pd

    rate = RATES.get(rate_name(gpu), (None, ""))[0]
    rows = []
    for name, stage in STAGES.items():
        minutes = stage.mini_seconds / 60 if profile.name == "mini" else float(stage.l4_minutes)
        units = None if rate is None or profile.name == "mini" else rate * minutes / 60
        rows.append(
            {
                "notebook": name,
                "state": "done" if is_done(profile.home, name) else "to do" if stage.proof else "any time",
                "minutes": round(minutes, 1),
                "compute units": "none" if profile.name == "mini" else "unknown" if units is None else f"{units:.1f}",
                "GB of disk": "below 1" if profile.name == "mini" else f"{stage.disk_gb:g}",
            }
        )
    return pd.DataFrame(rows)


def cost_note(profile: profiles.Profile, gpu: str = "") -> str:
    """Where the numbers of :func:`costs` come from."""
    if profile.name == "mini":
        return (
            "Minutes were measured on 2 CPU cores. Nothing is charged without a GPU but Colab's rate of a CPU machine."
        )
    rate, source = RATES.get(rate_name(gpu), (None, ""))
    priced = f"{rate:g} units an hour ({source})" if rate else f"no rate is known for {gpu or 'this machine'}"
    return (
        f"Estimates. Minutes: an L4, from sizes, not measured. Compute units: {priced}. Colab shows the rate in force "
        "under Resources; the table of rates is RATES in helpers/anomalygpt_plan.py."
    )


def rate_name(gpu: str) -> str:
    """Name of a GPU in the table of rates, empty when it is not there.

    >>> rate_name("NVIDIA A100-SXM4-80GB"), rate_name("NVIDIA L4"), rate_name("NVIDIA L40S")
    ('A100 80GB', 'L4', '')
    """
    longest_first = sorted(RATES, key=len, reverse=True)
    matches = (key for key in longest_first if all(re.search(rf"\b{word}\b", gpu) for word in key.split()))
    return next(matches, "")


def gpu_name(device: str) -> str:
    """Name of the GPU that a torch device stands for, empty for a CPU."""
    if not device.startswith("cuda"):
        return ""
    import torch

    return torch.cuda.get_device_name(0)


# --- the checks -----------------------------------------------------------------------------------------------------


def _gpu(device: str, need_gb: float) -> Check:
    if not device.startswith("cuda"):
        if not need_gb:
            return Check("GPU", True, "none, and none is needed")
        return Check("GPU", False, f"none; full needs {need_gb:g} GB", f"{_CHANGE_GPU}, or ART_PROFILE=mini.")
    import torch

    free, total = (n_bytes / GB for n_bytes in torch.cuda.mem_get_info())
    found = f"{gpu_name(device)}, {free:.1f} of {total:.1f} GB free"
    if free >= need_gb:
        return Check("GPU", True, found)
    if total >= need_gb:
        fix = (
            "Another program holds its memory: Runtime > Manage sessions, end the others; or Runtime > Restart session."
        )
    else:
        fix = f"full needs {need_gb:g} GB: {_CHANGE_GPU}, or ART_PROFILE=mini."
    return Check("GPU", False, found, fix)


def _bf16(device: str) -> Check:
    if not device.startswith("cuda"):
        return Check("bfloat16", True, "not needed on a CPU")
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    found = f"compute capability {major}.{minor}"
    return Check(
        "bfloat16", major >= 8, found, 'This GPU lacks it: set precision = "fp16" in 06 and 07, or take an L4.'
    )


def _memory(need_gb: float) -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB free, {need_gb:g} needed"
    fix = "Close other notebooks (Runtime > Manage sessions), or choose a machine with more memory."
    return Check("memory", memory.available >= need_gb * GB, found, fix)


def _disk(home: Path, need_gb: float) -> Check:
    used = sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) if home.exists() else 0
    free, need = storage.free_bytes(home), max(need_gb * GB - used, GB)
    found = f"{free / GB:.1f} GB free for {home}, {need / GB:.1f} needed"
    return Check(
        "disk", free >= need, found, "Set DELETE_RAW = True in 01 (8 GB less), or point ART_HOME to another disk."
    )


def _lasting(folder: Path | None) -> Check:
    if folder is None:
        return Check("kept files", True, "nowhere but here (ART_DRIVE=<folder> keeps finished work elsewhere, too)")
    if not colab.is_reachable(folder):
        return Check(
            "kept files", False, f"{folder} cannot be listed", "Run this cell again and allow access to Drive."
        )
    free = storage.free_bytes(folder) / GB
    fix = "Free some space there, or work is lost with this machine (15 GB is a Drive without a plan)."
    return Check("kept files", free >= 1, f"{folder}, {free:.1f} GB free", fix)


def _hub(repositories: list[str]) -> Iterator[Check]:
    """Network, token and consent, asked before the download and not after it."""
    if not repositories:
        yield Check("network", True, "nothing is left to download")
        return
    problem = _unreachable(HUB)
    if problem:
        fix = "Check the connection, or place the files by hand where notebook 01 says."
        yield Check("network", False, f"{HUB}: {problem}", fix)
        return
    yield Check("network", True, f"{HUB} answers")
    token = downloads.find_token()
    yield Check("HF_TOKEN", True, "found" if token else "none; only repositories that ask for consent need one")
    for repository in repositories:
        yield _consent(repository, token)


def _consent(repository: str, token: str | None) -> Check:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().auth_check(repository, token=token or False)
    except GatedRepoError:
        fix = (
            f"Open {HUB}/{repository}, accept the licence, make a read token at {HUB}/settings/tokens, add it as the "
            "secret HF_TOKEN (key symbol on the left), switch on notebook access, run this cell again."
        )
        return Check("consent", False, f"{repository} asks for it", fix)
    except RepositoryNotFoundError:
        return Check("consent", False, f"{repository} is not there or private", "Check its name, or set HF_TOKEN.")
    except Exception as error:  # the hub's own errors changed between versions; a check must not stop the work
        return Check("consent", False, f"{repository}: {type(error).__name__}", "Run this cell again in a minute.")
    return Check("consent", True, f"{repository} may be read")


def _versions(requirements: Path) -> Check:
    wrong = [] if (3, 11) <= sys.version_info[:2] <= (3, 13) else [f"Python {sys.version.split()[0]}"]
    wrong += unsatisfied(requirements.read_text(encoding="utf-8"))
    found = f"Python {sys.version.split()[0]}, all packages as required" if not wrong else "; ".join(wrong)
    return Check("versions", not wrong, found, "Runtime > Disconnect and delete runtime, then run this cell again.")


def unsatisfied(requirements: str) -> list[str]:
    """Lines of a requirements file that what is installed does not meet, each with what is installed.

    >>> unsatisfied("# a comment\\nno-such-package>=2")
    ['no-such-package is missing']
    """
    from packaging.requirements import Requirement

    found = []
    for line in requirements.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        version = _installed(requirement.name)
        if version is None:
            found.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement} is needed, {version} is installed")
    return found


def _installed(name: str) -> str | None:
    """Version of a package; OpenCV has two builds of the same module."""
    for candidate in (name, "opencv-python-headless") if name == "opencv-python" else (name,):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def _hub_repositories(profile: profiles.Profile) -> list[str]:
    """Repositories that notebook 01 still has to fetch from."""
    plan = weight_plan.make_plan(profile.weights_dir, size=profile.llama_size)
    places = [file.source.removeprefix("hub:") for file in plan.missing() if file.source.startswith("hub:")]
    return sorted({"/".join(place.split("/")[:2]) for place in places})


def _unreachable(address: str) -> str:
    """Why an address does not answer; empty when it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers, if with a refusal of this request
    except OSError as error:
        return str(error)
