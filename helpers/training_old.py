"""One training loop for every method that learns: exact resume, early stopping, 1 or N processes.

The loop runs under Hugging Face ``accelerate``: the same call trains on a CPU, a GPU, or in each of N processes that
``accelerate launch`` started. A killed run goes on from its last checkpoint and ends with the parameters that the
uninterrupted run would have had, bit for bit on a CPU.

What is trained is a module whose ``forward(batch)`` returns a dict of scalar losses with the key ``"loss"``: that is
what gradients are synchronised on. Only parameters with ``requires_grad`` are trained and saved, so a frozen
seven-billion-parameter model in the same module costs nothing on disk.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files as storage

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

PRECISIONS = ("fp32", "bf16", "fp16")
_MODEL = "model.safetensors"
_STATE = "state.pt"
_CARD = "checkpoint.json"
_EXTENDABLE = ("n_epochs", "patience", "checkpoint_every", "keep_last", "n_workers", "log_every")


class TrainingStopped(RuntimeError):
    """Training cannot go on (the loss or a parameter is nan or infinite); the last good checkpoint is kept."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; every field is part of the checkpoint.

    Args:
        n_epochs: passes over the training samples, at least 1.
        batch_size: samples per forward pass in each process.
        n_accumulation: forward passes per optimiser step; one step sees
            ``batch_size * n_accumulation * n_processes`` samples, the last of an epoch what is left.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"`` (the latter on a GPU, with loss scaling).
        max_grad_norm: gradients are scaled down to this norm, None for no limit.
        seed: of the order of the samples and of python, numpy and torch at the start.
        evaluate_every: epochs between two tuning scores.
        patience: tuning scores without improvement until training stops early, None for never.
        min_improvement: smallest rise of the tuning score that counts.
        checkpoint_every: optimiser steps between two checkpoints beside the one at each epoch's end, 0 for none.
        keep_last: newest checkpoints kept, the best one comes on top.
        n_workers: loading processes. With workers, random augmentation must be a function of index and epoch
            (see ``set_epoch`` in :func:`train`) for a resumed run to equal the uninterrupted one.
        log_every: optimiser steps between two rows of the history.
    Raises:
        ValueError: a value outside what is allowed.
    """

    n_epochs: int
    batch_size: int
    n_accumulation: int = 1
    precision: str = "fp32"
    max_grad_norm: float | None = None
    seed: int = 111
    evaluate_every: int = 1
    patience: int | None = None
    min_improvement: float = 0.0
    checkpoint_every: int = 0
    keep_last: int = 2
    n_workers: int = 0
    log_every: int = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; allowed are {', '.join(PRECISIONS)}.")
        lowest = {
            "n_epochs": 1,
            "batch_size": 1,
            "n_accumulation": 1,
            "evaluate_every": 1,
            "checkpoint_every": 0,
            "keep_last": 1,
            "n_workers": 0,
            "log_every": 1,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1, or None to never stop early.")


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training leaves behind; the module holds the best parameters (the last without tuning).

    Attributes:
        history: rows ``{"epoch", "step", "loss", <parts>, "learning_rate", "seconds"}`` per logged optimiser step,
            rows ``{"epoch", "step", "score"}`` per tuning score; ``seconds`` counts the time since this or the
            resumed run started and is the only value that differs between two equal runs.
        best_score: highest tuning score, None without tuning.
        best_epoch: epoch (1-based) of the parameters that the module holds.
        n_steps: optimiser steps made, over all resumed runs.
        reason: ``"all epochs"`` or ``"early stopping"``.
        checkpoint: folder of the checkpoint whose parameters the module holds.
    """

    history: Sequence[Mapping[str, Any]]
    best_score: float | None
    best_epoch: int
    n_steps: int
    reason: str
    checkpoint: Path


@dataclass
class _Progress:
    """Where a run is: everything of a checkpoint that is not a tensor."""

    epoch: int = 0  # finished epochs
    n_seen: int = 0  # samples of the running epoch that are done
    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    best_epoch: int | None = None
    n_without_improvement: int = 0
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


def choose_precision(device: str) -> str:
    """The fastest safe precision of a device: bf16 where the GPU computes it, else fp16; fp32 on a CPU.

    A T4 only emulates bf16, slowly, hence fp16 there.
    """
    import torch

    if not device.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def train(
    module: torch.nn.Module,
    dataset: Any,
    optimizer: torch.optim.Optimizer,
    *,
    folder: Path,
    settings: TrainingSettings,
    device: str = "cpu",
    collate: Callable[[list[Any]], Any] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    evaluate: Callable[[torch.nn.Module], float] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    restart: bool = False,
    on_history: Callable[[list[dict[str, Any]]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    title: str = "training",
) -> TrainingResult:
    """Train the parameters of ``module`` that require gradients; resume if ``folder`` holds a checkpoint.

    Runs unchanged in 1 or N processes: in each of the processes of ``accelerate launch`` call it with the same
    arguments. The samples of a step are dealt out to the processes and weighted by count, so N processes with batch b
    take the steps of one process with batch N * b, as long as the loss is a mean over samples.

    Args:
        module: ``module(batch)`` returns ``{"loss": scalar, <part>: scalar, ...}``; the loss a mean over the batch.
        dataset: ``len`` and ``[index]``; with a method ``set_epoch(epoch)`` it is told the epoch (0-based) before
            each one.
        optimizer: over the trained parameters of ``module``.
        folder: checkpoints go here; one run, one folder.
        settings: see :class:`TrainingSettings`.
        device: ``"cpu"`` forces the CPU; else accelerate's own choice of device for this process.
        collate: list of items -> batch (default: torch's); tensors in the batch are moved to the device.
        scheduler: over ``optimizer``; stepped once per optimiser step.
        evaluate: module in eval mode, without gradients -> tuning score, higher is better. Never test pictures. It
            runs in the main process only.
        fingerprint: JSON values that determine the run beside ``settings`` (learning rate, data, frozen weights); a
            checkpoint with other values is not resumed.
        restart: delete the checkpoints of ``folder`` and start over.
        on_history: called in the main process with the whole history after each new row, for the live figure.
        on_checkpoint: called in the main process with the folder of each complete checkpoint, to copy it elsewhere
            (Drive); an error in it is shown as a warning, training goes on.
        title: label of the progress bar.
    Returns:
        the history and where the best parameters lie; the module holds them.
    Raises:
        TrainingStopped: the loss or a parameter became nan or infinite; the last good checkpoint is kept.
        ValueError: nothing to train or no sample; a checkpoint of other settings or of another module; fp16 on a
            CPU; a tuning score that is nan.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError("The module has no parameter with requires_grad=True: there is nothing to train.")
    if len(dataset) == 0:
        raise ValueError("There is no training sample. Check the category and the split that the samples come from.")
    accelerator = _accelerator(settings.precision, device)
    folder = Path(folder)
    card = {"settings": asdict(settings), "fingerprint": dict(fingerprint or {})}
    if restart and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()

    wrapped, optimizer = accelerator.prepare(module, optimizer)
    parts = _Parts(module, optimizer, scheduler, accelerator)
    try:
        latest = _newest_intact(folder)
        if latest is None:
            progress = _Progress()
            _seed_everything(settings.seed + accelerator.process_index)
        else:
            progress = _resume(latest, parts, card)
        if not _is_finished(progress, settings):
            progress.reason = ""
            _loop(wrapped, parts, dataset, collate, evaluate, progress, settings, folder, card, on_history,
                  on_checkpoint, title)  # fmt: skip
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes autocast off module.forward again
    kept = folder / _name(progress.step if progress.best_step is None else progress.best_step)
    load_parameters(kept, module)
    best_epoch = progress.epoch if progress.best_epoch is None else progress.best_epoch
    return TrainingResult(progress.history, progress.best_score, best_epoch, progress.step, progress.reason, kept)


def load_parameters(checkpoint: Path, module: torch.nn.Module) -> None:
    """Load the trained parameters of a checkpoint folder into a module, strictly.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: names or shapes differ from the module's trained parameters.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(checkpoint) / _MODEL
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint in {checkpoint}. Run the training that makes it.")
    wanted, found = trained_state(module), load_file(path)
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = [name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{path} is of another model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shape {sorted(reshaped)[:3]}. Train again in a new folder."
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def trained_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of what training changes: trained parameters, and buffers of the modules that own one."""
    state = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for prefix, child in module.named_modules():
        if any(parameter.requires_grad for parameter in child.parameters(recurse=False)):
            dropped = child._non_persistent_buffers_set
            buffers = {name: b for name, b in child.named_buffers(recurse=False) if name not in dropped}
            state |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in buffers.items()}
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step_*/{_CARD}"))


def by_epoch(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """History in one row per epoch for :func:`helpers.judge.figures.loss_curve`: mean losses and the tuning score.

    >>> by_epoch([{"epoch": 1, "step": 1, "loss": 4.0}, {"epoch": 1, "step": 2, "loss": 2.0},
    ...           {"epoch": 1, "step": 2, "score": 0.5}])
    [{'epoch': 1, 'loss': 3.0, 'tuning_score': 0.5}]
    """
    places = ("epoch", "step", "learning_rate", "seconds")
    epochs: dict[int, dict[str, list[float]]] = {}
    for row in history:
        values = epochs.setdefault(row["epoch"], {})
        for name, value in row.items():
            if name not in places:
                values.setdefault("tuning_score" if name == "score" else name, []).append(value)
    return [
        {"epoch": epoch} | {name: float(np.mean(values)) for name, values in found.items()}
        for epoch, found in epochs.items()
    ]


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What a checkpoint's tensors come from."""

    module: torch.nn.Module
    optimizer: Any
    scheduler: Any
    accelerator: Accelerator


def _loop(
    wrapped: torch.nn.Module,
    parts: _Parts,
    dataset: Any,
    collate: Callable | None,
    evaluate: Callable | None,
    progress: _Progress,
    settings: TrainingSettings,
    folder: Path,
    card: dict[str, Any],
    on_history: Callable | None,
    on_checkpoint: Callable | None,
    title: str,
) -> None:
    from tqdm.auto import tqdm

    accelerator = parts.accelerator
    per_step = settings.batch_size * settings.n_accumulation * accelerator.num_processes
    left = math.ceil((len(dataset) - progress.n_seen) / per_step)
    left += (settings.n_epochs - progress.epoch - 1) * math.ceil(len(dataset) / per_step)
    started = time.monotonic()

    def log(row: dict[str, Any]) -> None:
        progress.history.append(row)
        if on_history is not None and accelerator.is_main_process:
            on_history(progress.history)

    def checkpoint() -> None:
        _save(folder, parts, progress, card, settings.keep_last, on_checkpoint)

    bar = tqdm(
        total=progress.step + left, initial=progress.step, desc=title, unit="step",
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with bar:
        while not progress.reason:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(progress.epoch)
            parts.module.train()
            for n_samples, rounds in _steps(dataset, collate, progress, settings, accelerator):
                losses = _step(wrapped, parts, n_samples, rounds, settings)
                progress.step += 1
                progress.n_seen += n_samples
                bar.update()
                bar.set_postfix(epoch=progress.epoch + 1, loss=f"{losses['loss']:.4f}", refresh=False)
                if progress.step % settings.log_every == 0:
                    rate = float(parts.optimizer.param_groups[0]["lr"])
                    seconds = round(time.monotonic() - started, 3)
                    place = {"epoch": progress.epoch + 1, "step": progress.step}
                    log(place | losses | {"learning_rate": rate, "seconds": seconds})
                at_end = progress.n_seen >= len(dataset)
                if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0 and not at_end:
                    checkpoint()
            progress.epoch, progress.n_seen = progress.epoch + 1, 0
            is_last = progress.epoch >= settings.n_epochs
            if evaluate is not None and (is_last or progress.epoch % settings.evaluate_every == 0):
                score = _tuning_score(evaluate, parts)
                _note_score(progress, score, settings)
                log({"epoch": progress.epoch, "step": progress.step, "score": score})
            if is_last and not progress.reason:
                progress.reason = "all epochs"
            checkpoint()


def _steps(
    dataset: Any, collate: Callable | None, progress: _Progress, settings: TrainingSettings, accelerator: Accelerator
) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    """The steps left in the running epoch: (samples of the step over all processes, this process's rounds).

    A round is (samples that count, batch). The order is a function of seed and epoch. A process that has no batch in
    a round of an incomplete last step repeats one with count 0, because all processes must take part.
    """
    import torch

    order_of_epoch = torch.Generator().manual_seed(settings.seed * 1_000_003 + progress.epoch)
    order = torch.randperm(len(dataset), generator=order_of_epoch).tolist()[progress.n_seen :]
    n_processes = accelerator.num_processes
    per_step = settings.batch_size * settings.n_accumulation * n_processes
    plan: list[tuple[int, list[tuple[int, list[int]]]]] = []
    for start in range(0, len(order), per_step):
        indices = order[start : start + per_step]
        batches = [indices[i : i + settings.batch_size] for i in range(0, len(indices), settings.batch_size)]
        rounds = []
        for first in range(0, len(batches), n_processes):
            mine = first + accelerator.process_index
            rounds.append((len(batches[mine]), batches[mine]) if mine < len(batches) else (0, batches[first]))
        plan.append((len(indices), rounds))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[indices for _, rounds in plan for _, indices in rounds],
        collate_fn=collate,
        num_workers=settings.n_workers,
        generator=order_of_epoch,  # keeps the loader off the global random state
    )
    loaded = iter(loader)
    for n_samples, rounds in plan:
        yield n_samples, [(count, next(loaded)) for count, _ in rounds]


def _step(
    wrapped: torch.nn.Module, parts: _Parts, n_samples: int, rounds: list[tuple[int, Any]], settings: TrainingSettings
) -> dict[str, float]:
    """One optimiser step; returns the mean losses over its samples in all processes.

    Raises:
        TrainingStopped: a loss is not finite; parameters are as before the step.
    """
    import contextlib

    import torch
    from accelerate.utils import send_to_device

    accelerator = parts.accelerator
    parts.optimizer.zero_grad()
    sums: dict[str, torch.Tensor] = {}
    for number, (count, batch) in enumerate(rounds, start=1):
        last = number == len(rounds)
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            losses = wrapped(send_to_device(batch, accelerator.device))
            # Processes average their gradients; times n_processes makes that the sum, over samples a mean.
            accelerator.backward(losses["loss"] * (count * accelerator.num_processes / n_samples))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() * (count / n_samples)
    total = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
    means = dict(zip(sums, total))
    if not all(math.isfinite(value) for value in means.values()):
        parts.optimizer.zero_grad()
        raise TrainingStopped(
            f"The loss is not finite: {', '.join(f'{k} {v:.3g}' for k, v in means.items())}. Training stopped before "
            "this step; the last checkpoint is good. Lower the learning rate, set max_grad_norm=1.0 or use bf16 or "
            "fp32 instead of fp16, then train again."
        )
    if settings.max_grad_norm is not None:
        trained = [parameter for parameter in parts.module.parameters() if parameter.requires_grad]
        accelerator.clip_grad_norm_(trained, settings.max_grad_norm)
    parts.optimizer.step()
    if parts.scheduler is not None and not accelerator.optimizer_step_was_skipped:
        parts.scheduler.step()
    return means


def _tuning_score(evaluate: Callable, parts: _Parts) -> float:
    """The tuning score of the main process, the same in all processes."""
    import torch
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None]
    if parts.accelerator.is_main_process:
        parts.module.eval()
        try:
            with torch.no_grad():
                box = [float(evaluate(parts.module))]
        finally:
            parts.module.train()
    broadcast_object_list(box)
    if math.isnan(box[0]):
        raise ValueError("The tuning score is nan. The tuning split needs normal and anomalous pictures.")
    return box[0]


def _note_score(progress: _Progress, score: float, settings: TrainingSettings) -> None:
    if progress.best_score is None or score > progress.best_score + settings.min_improvement:
        progress.best_score, progress.best_step, progress.best_epoch = score, progress.step, progress.epoch
        progress.n_without_improvement = 0
    else:
        progress.n_without_improvement += 1
        if settings.patience is not None and progress.n_without_improvement >= settings.patience:
            progress.reason = "early stopping"


def _is_finished(progress: _Progress, settings: TrainingSettings) -> bool:
    """True for a run that ended and was not given more epochs or patience since."""
    if progress.reason == "early stopping":
        return settings.patience is not None and progress.n_without_improvement >= settings.patience
    return progress.epoch >= settings.n_epochs


def _accelerator(precision: str, device: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if precision == "fp16" and device == "cpu":
        raise ValueError("precision is 'fp16' on a CPU, which has no loss scaling. Use 'fp32' or 'bf16'.")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
        if "WORLD_SIZE" not in os.environ and "PMI_SIZE" not in os.environ:
            warnings.warn(
                "accelerate launch --cpu --num_processes N started one process: without MPI it needs torchrun. Use "
                "accelerate launch --cpu --num_processes N --module torch.distributed.run "
                "--nproc-per-node N script.py.",
                stacklevel=3,
            )
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run may have had another precision
    mixed = {"fp32": "no"}.get(precision, precision)
    return Accelerator(mixed_precision=mixed, cpu=device == "cpu")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _save(
    folder: Path,
    parts: _Parts,
    progress: _Progress,
    card: dict[str, Any],
    keep_last: int,
    on_checkpoint: Callable[[Path], None] | None,
) -> None:
    """Write a checkpoint folder under a temporary name, rename it, drop old ones."""
    import torch
    from accelerate.utils import gather_object
    from safetensors.torch import save_file

    accelerator = parts.accelerator
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(parts.module).items()}
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise TrainingStopped(
            f"{len(broken)} trained tensors are not finite, first {broken[0]}: nothing was saved, the last checkpoint "
            "is good. Lower the learning rate or set max_grad_norm=1.0, then train again."
        )
    random_states = gather_object([_random_state()])
    if accelerator.is_main_process:
        scaler = getattr(accelerator, "scaler", None)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".partial-*"):  # of a killed run; one run, one folder
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder / f".partial-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        save_file(state, temporary / _MODEL)
        torch.save(
            {
                "optimizer": parts.optimizer.state_dict(),
                "scheduler": None if parts.scheduler is None else parts.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": random_states,
            },
            temporary / _STATE,
        )
        hashes = {name: storage.sha256_file(temporary / name) for name in (_MODEL, _STATE)}
        for name in hashes:
            _flush(temporary / name)
        storage.write_json(temporary / _CARD, card | {"progress": asdict(progress), "sha256": hashes})
        target = folder / _name(progress.step)
        shutil.rmtree(target, ignore_errors=True)  # only there when it was found damaged
        os.replace(temporary, target)
        _flush(folder)
        _prune(folder, progress, keep_last)
        if on_checkpoint is not None:
            try:
                on_checkpoint(target)
            except OSError as error:
                warnings.warn(f"{target.name} is saved here but was not copied: {error}", stacklevel=2)
    accelerator.wait_for_everyone()


def _prune(folder: Path, progress: _Progress, keep_last: int) -> None:
    best = None if progress.best_step is None else _name(progress.best_step)
    for old in checkpoints(folder)[:-keep_last]:
        if old.name != best:
            shutil.rmtree(old)


def _newest_intact(folder: Path) -> Path | None:
    """Newest checkpoint whose files have the hashes of its card; damaged ones are named in a warning."""
    for path in reversed(checkpoints(folder)):
        hashes = storage.read_json(path / _CARD)["sha256"]
        damaged = [n for n, h in hashes.items() if not (path / n).exists() or storage.sha256_file(path / n) != h]
        if not damaged:
            return path
        warnings.warn(f"{path} is damaged ({', '.join(damaged)}); the checkpoint before it is used.", stacklevel=3)
    return None


def _resume(path: Path, parts: _Parts, card: dict[str, Any]) -> _Progress:
    import torch

    saved = storage.read_json(path / _CARD)
    _check_same_run(path, saved, card)
    load_parameters(path, parts.module)
    state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
    parts.optimizer.load_state_dict(state["optimizer"])
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(state["scheduler"])
    scaler = getattr(parts.accelerator, "scaler", None)
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    rank = parts.accelerator.process_index
    if rank < len(state["random"]):
        _set_random_state(state["random"][rank])
    else:  # more processes than before: the new ones start from their seed
        _seed_everything(card["settings"]["seed"] + rank)
    return _Progress(**saved["progress"])


def _check_same_run(path: Path, saved: Mapping[str, Any], card: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of other settings."""
    import json

    wanted = json.loads(json.dumps(dict(card)))
    before = saved["settings"] | {f"fingerprint.{k}": v for k, v in saved["fingerprint"].items()}
    now = wanted["settings"] | {f"fingerprint.{k}": v for k, v in wanted["fingerprint"].items()}
    changed = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in _EXTENDABLE and before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with other settings ({'; '.join(changed)}). "
            "Give this run its own folder, or pass restart=True to delete the old one."
        )


def _random_state() -> dict[str, Any]:
    """Random states of python, numpy and torch as tensors and numbers, which load with ``weights_only=True``."""
    import torch

    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    import torch

    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _seed_everything(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
