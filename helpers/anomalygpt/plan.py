"""What AnomalyGPT needs before anything is loaded: memory per configuration, time and compute units.

All numbers here are estimates from sizes, not measurements. Importing needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers import files as storage

GB = 1e9
PREFIX_POSITIONS = 30
"""Positions before the question in LLaMA's tokens: bos, two strings, the image token, 18 prompts."""

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.01, "4bit": 0.5625}
"""In the blocks; quantised kinds include their scales. Embeddings and output layer stay in 16 bit there."""

RATES = {
    "T4": (1.19, "users' measurements of 2026-03-10"),
    "L4": (1.71, "users' measurements of 2026-03-10"),
    "A100": (5.40, "users' measurements of 2026-03-10"),
    "A100 80GB": (7.52, "users' measurements of 2026-03-10"),
    "RTX PRO 6000": (8.71, "users' measurements of 2026-03-10"),
}
"""Colab compute units per hour and where the number is from. Google changes them: edit this table."""


@dataclass(frozen=True)
class ChainSize:
    """Numbers of a language model, image tower and head that memory depends on.

    Attributes:
        name: in words.
        hidden, n_layers, n_heads, n_kv_heads, mlp, n_rows: of the language model.
        n_eyes: parameters of the image tower.
        n_head: parameters of the trained head.
        tap_values: numbers that the taps of one picture hold.
    """

    name: str
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: int
    n_rows: int
    n_eyes: int = 632_076_800
    n_head: int = 112_663_480
    tap_values: int = 4 * 256 * 1280

    @property
    def n_blocks(self) -> int:
        """Parameters of the language model's blocks."""
        kv_width = self.hidden * self.n_kv_heads // self.n_heads
        per_layer = 2 * self.hidden * (self.hidden + kv_width) + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.n_layers * per_layer + self.hidden

    @property
    def n_vocabulary(self) -> int:
        """Parameters of embeddings and output layer."""
        return 2 * self.n_rows * self.hidden


VICUNA_7B = ChainSize("Vicuna-7B", 4096, 32, 32, 32, 11008, 32001)
VICUNA_13B = ChainSize("Vicuna-13B", 5120, 40, 40, 40, 13824, 32001, n_head=138_888_120)


@dataclass(frozen=True)
class Load:
    """What is to be done at once.

    Attributes:
        precision: of the language model.
        on_gpu: False computes everything in float32 or bfloat16 on the CPU.
        n_images: pictures per pass (a training pair is two).
        n_tokens: tokens of question and answer.
        train: with gradients of the head.
        gradient_checkpointing: recompute instead of keep.
    """

    precision: str = "bf16"
    on_gpu: bool = True
    n_images: int = 1
    n_tokens: int = 128
    train: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated memory, part by part, in GB (1e9 bytes).

    Attributes:
        size, load: what was asked.
        parts: name -> GB on the device.
        host_gb: peak in the host's memory while loading.
    """

    size: ChainSize
    load: Load
    parts: Mapping[str, float]
    host_gb: float

    @property
    def total_gb(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        doing = "training" if self.load.train else "answering"
        head = (
            f"{self.size.name} in {self.load.precision}, {doing}, {self.load.n_images} pictures at a time, "
            f"{self.load.n_tokens} tokens (estimate)"
        )
        rows = [f"  {name:<46}{gb:7.2f} GB" for name, gb in self.parts.items()]
        return "\n".join([head, *rows, f"  {'together':<46}{self.total_gb:7.2f} GB"])


class DoesNotFit(ValueError):
    """The chosen configuration needs more memory than there is; the message names what fits."""


def memory_plan(size: ChainSize, load: Load) -> MemoryPlan:
    """Estimate the memory of a configuration.

    Activations of training follow Korthikanti et al. 2022 (34 s b h + 5 a s^2 b bytes per layer at 16 bit); the
    language model is frozen, so only the head has gradients and optimiser state.

    Raises:
        ValueError: unknown precision.
    """
    if load.precision not in BYTES_PER_WEIGHT:
        raise ValueError(f"precision is {load.precision!r}; allowed are {', '.join(BYTES_PER_WEIGHT)}.")
    item = 4.0 if load.precision == "fp32" else 2.0
    eyes_item = 2.0 if load.on_gpu else 4.0
    positions = PREFIX_POSITIONS + load.n_tokens
    quantised = load.precision in ("8bit", "4bit")
    language = size.n_blocks * BYTES_PER_WEIGHT[load.precision] + size.n_vocabulary * item
    parts = {
        "language model (LoRA merged)": language,
        "image tower (text features are cached)": size.n_eyes * eyes_item,
        "decoder and prompt learner": size.n_head * 4.0,
    }
    tokens = load.n_images * positions
    per_layer = tokens * size.hidden * (34 + 5 * size.n_heads * positions / size.hidden) * item / 2
    if load.train:
        parts["gradients and AdamW of decoder, prompt learner"] = size.n_head * 12.0
        kept = tokens * size.hidden * item * size.n_layers + per_layer
        parts["activations"] = kept if load.gradient_checkpointing else per_layer * size.n_layers
        parts["maps and features of the batch"] = load.n_images * (size.tap_values * 4.0 * 3 + 224 * 224 * 4.0 * 64)
    else:
        kv_width = size.hidden * size.n_kv_heads // size.n_heads
        parts["keys and values"] = 2 * size.n_layers * kv_width * item * tokens
        parts["activations"] = per_layer + load.n_images * size.tap_values * 8.0
    parts["CUDA context and reserve" if load.on_gpu else "Python and libraries"] = (1.0 if load.on_gpu else 0.6) * GB
    host = 2.0 * (size.n_blocks + size.n_vocabulary) if quantised else (3 * GB if load.on_gpu else sum(parts.values()))
    return MemoryPlan(size, load, {name: n_bytes / GB for name, n_bytes in parts.items()}, host / GB)


def require_fit(plan: MemoryPlan, available_gb: float) -> MemoryPlan:
    """The plan, or a refusal that names the configurations that fit.

    Args:
        plan: see :func:`memory_plan`.
        available_gb: free memory of the device in GB.
    Raises:
        DoesNotFit: the plan needs more than is there.
    """
    if plan.total_gb <= available_gb:
        return plan
    fitting = [other for other in alternatives(plan) if other.total_gb <= available_gb]
    named = "; ".join(f"{_differences(plan.load, other.load)} ({other.total_gb:.1f} GB)" for other in fitting[:4])
    advice = f"These fit: {named}." if fitting else "No configuration of this model fits: use a larger machine."
    raise DoesNotFit(
        f"{plan.size.name} in {plan.load.precision} needs about {plan.total_gb:.1f} GB, {available_gb:.1f} GB are "
        f"free. {advice}"
    )


def alternatives(plan: MemoryPlan) -> list[MemoryPlan]:
    """Configurations that need less, the mildest change first."""
    load = plan.load
    precisions = ("bf16", "8bit", "4bit") if load.on_gpu else ("bf16",)
    smaller = [p for p in precisions if BYTES_PER_WEIGHT[p] < BYTES_PER_WEIGHT[load.precision]]
    changes: list[dict[str, object]] = []
    checkpointing = {"gradient_checkpointing": True} if load.train and not load.gradient_checkpointing else {}
    fewest = {"n_images": 2 if load.train else 1} if load.n_images > (2 if load.train else 1) else {}
    if checkpointing:
        changes.append(checkpointing)
    if fewest:
        changes.append(fewest)
    if checkpointing and fewest:
        changes.append(checkpointing | fewest)
    changes += [{"precision": p} for p in smaller]
    changes += [{"precision": p} | checkpointing | fewest for p in smaller if checkpointing or fewest]
    return [memory_plan(plan.size, dataclasses.replace(load, **change)) for change in changes]


def size_of(weights_dir: Path) -> ChainSize:
    """Sizes of the prepared weights, from their headers; nothing is loaded.

    Raises:
        FileNotFoundError: weights are missing; names notebook 01.
    """
    from safetensors import safe_open

    from helpers import weights

    config = storage.read_json(weights.require(weights_dir, "vicuna") / "config.json")
    eyes = weights.require(weights_dir, "imagebind") / "model.safetensors"
    with safe_open(eyes, framework="numpy") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if key.startswith("visual.")}
    n_eyes = sum(_product(shape) for shape in shapes.values())
    n_tokens, width = shapes["visual.positional_embedding"]
    joint = shapes["visual.proj"][1]
    hidden = config["hidden_size"]
    n_head = 4 * (width + 1) * joint + 9 * hidden + 2_517_944 + (1024 * 25 + 1) * hidden
    return ChainSize(
        Path(config.get("_name_or_path") or "language model").name, hidden, config["num_hidden_layers"],
        config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"],
        config["intermediate_size"], config["vocab_size"], n_eyes, n_head, 4 * (n_tokens - 1) * width,
    )  # fmt: skip


def available_gb(device: str) -> float:
    """Free memory in GB: of the GPU for ``"cuda"``, else of the machine."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[0] / GB
    import psutil

    return psutil.virtual_memory().available / GB


def estimate_compute_units(seconds: float, gpu: str, rates: Mapping[str, tuple[float, str]] = RATES) -> str:
    """Colab compute units of a run in words, labelled as the estimate it is.

    >>> estimate_compute_units(7200, "L4")
    "estimate: 3.4 compute units (2.0 h at 1.71 per hour; users' measurements of 2026-03-10)"
    """
    if gpu not in rates:
        return f"estimate: no rate is known for {gpu}; known are {', '.join(rates)} (edit the table of rates)"
    rate, source = rates[gpu]
    hours = seconds / 3600
    return f"estimate: {rate * hours:.1f} compute units ({hours:.1f} h at {rate:g} per hour; {source})"


def _differences(before: Load, after: Load) -> str:
    old, new = json.loads(json.dumps(dataclasses.asdict(before))), dataclasses.asdict(after)
    return ", ".join(f"{key}={value!r}" for key, value in new.items() if old[key] != value)


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
