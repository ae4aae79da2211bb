"""One training loop for every method that learns: exact resume, early stopping, 1 or N processes.

The same call trains on a CPU, a GPU, or in each of N processes that ``accelerate launch`` started. A checkpoint is what
``accelerate`` saves of the trained module, its optimiser, its scheduler and the random states, beside a card that says
where the run is. A killed run ends with the parameters of the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, set_seed
from safetensors.torch import load_file
from tqdm.auto import tqdm

from helpers import files

_CARD = "checkpoint.json"
_ADVICE = "The last checkpoint is good. Lower the learning rate or set max_grad_norm=1.0, then train again."


class TrainingStopped(RuntimeError):
    """The loss or a parameter is nan or infinite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run went; the module holds the best parameters, or the last where no score was taken."""

    history: list[dict[str, Any]]  # epoch, step and loss, its parts, learning_rate, seconds, or score
    best_score: float | None  # None without tuning
    best_epoch: int  # 1-based, of the parameters that the module holds
    n_steps: int  # over all resumed runs, as are the seconds
    reason: str  # why it ended: "all epochs" or "early stopping"
    checkpoint: Path  # folder of the parameters that the module holds


def train(
    module: torch.nn.Module, loss_of: Callable[[torch.nn.Module, Any], Mapping[str, torch.Tensor]], dataset: Any,
    optimizer: torch.optim.Optimizer, *, folder: Path, n_epochs: int, batch_size: int, n_accumulation: int = 1,
    scheduler: Any = None, collate: Callable[[list[Any]], Any] | None = None,
    evaluate: Callable[[torch.nn.Module], float] | None = None, patience: int | None = None,
    max_grad_norm: float | None = None, checkpoint_every: int = 0, seed: int = 111, device: str = "cpu",
    identity: Mapping[str, Any] | None = None, on_checkpoint: Callable[[Path], None] | None = None,
    title: str = "training",
) -> TrainingResult:  # fmt: skip
    """Train a module; go on where an earlier call stopped if ``folder`` (of this run alone) holds a checkpoint.

    Args:
        module: what is trained and saved, alone; frozen models belong into ``loss_of``.
        loss_of: (module, batch) -> ``{"loss": scalar, <part>: scalar, ...}``, means over the batch.
        dataset: ``len`` and ``[index]``; a method ``set_epoch(epoch)`` is told the epoch (0-based) before each one.
        optimizer, scheduler: over ``module``; both are stepped once per optimiser step.
        n_epochs, patience: passes over the samples, epochs without a better score until it stops. Both may grow.
        batch_size, n_accumulation: samples per forward pass in each process, passes per optimiser step; both may
            change between calls as long as their product does not (after running out of memory).
        evaluate: module in eval mode -> tuning score, higher is better, after each epoch. Never test pictures.
        checkpoint_every: optimiser steps between two checkpoints beside the one at each epoch's end, 0 for none.
        device: ``"cpu"`` forces the CPU; else accelerate's own choice for this process.
        identity: JSON values that determine the run; a checkpoint with other values is not resumed.
        on_checkpoint: called in the main process with the folder of each complete checkpoint.
    Raises:
        TrainingStopped: the loss or a parameter became nan or infinite.
        ValueError: no sample; a checkpoint of another run; a tuning score that is nan.
    """
    if len(dataset) == 0:
        raise ValueError("There is no training sample. Check the category and the split that the samples come from.")
    run = _Run(**locals())
    run.resume()
    run.loop()
    return run.result()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step_*/{_CARD}"))


def curves(history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Held-out scores and mean losses of each epoch for :func:`helpers.judge.figures.lines`."""
    rows = pd.DataFrame(history).rename(columns={"epoch": "x", "score": "tuning score"})
    tidy = rows.drop(columns=["step", "learning_rate", "seconds"]).melt("x", var_name="series").dropna()
    tidy = tidy.groupby(["x", "series"], as_index=False, sort=False)["value"].mean()
    panels = tidy["series"].map({"tuning score": "held-out score (higher is better)"}).fillna("training losses")
    return tidy.assign(panel=panels, series=tidy["series"].str.replace("_", " ")).sort_values("panel", kind="stable")


class _Run(SimpleNamespace):
    """One call of :func:`train`: its arguments, and the history, which says where it is."""

    def resume(self) -> None:
        """Prepare and seed everything, or load the newest checkpoint of the same run."""
        self.folder, self.history = Path(self.folder), []
        self.accelerator = accelerator = Accelerator(cpu=self.device == "cpu", mixed_precision="no")
        # Not wrapped for distributed training: loss_of may call any method of it, _step sums the gradients.
        self.module = accelerator.prepare_model(self.module, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(self.optimizer)
        if self.scheduler is not None:
            accelerator.register_for_checkpointing(self.scheduler)
        self.per_step = self.batch_size * self.n_accumulation * accelerator.num_processes
        self.steps_per_epoch = math.ceil(len(self.dataset) / self.per_step)
        facts = {"samples_per_step": self.per_step, "n_samples": len(self.dataset), "seed": self.seed}
        facts |= {"max_grad_norm": self.max_grad_norm, **(self.identity or {})}
        self.identity = now = json.loads(json.dumps(facts))
        set_seed(self.seed, device_specific=True)
        for newest in checkpoints(self.folder)[-1:]:
            saved = files.read_json(newest / _CARD)
            old, self.history = saved["identity"], saved["history"]
            changed = [name for name in sorted(old | now) if old.get(name) != now.get(name)]
            if changed:
                changes = "; ".join(f"{name} {old.get(name)!r} -> {now.get(name)!r}" for name in changed)
                raise ValueError(f"{newest} was trained with other settings ({changes}). Delete {self.folder}.")
            accelerator.load_state(str(newest))

    def loop(self) -> None:
        """Train until the last epoch, or until the tuning score has stopped rising."""
        shown = {"desc": self.title, "unit": "step", "disable": not self.accelerator.is_main_process}
        started = time.monotonic() - max((row.get("seconds", 0.0) for row in self.history), default=0.0)
        with tqdm(total=self.n_epochs * self.steps_per_epoch, initial=self.n_steps, **shown) as bar:
            while (epoch := self.n_steps // self.steps_per_epoch) < self.n_epochs and not self._is_stale():
                if hasattr(self.dataset, "set_epoch"):
                    self.dataset.set_epoch(epoch)
                self.module.train()
                for batches in self._steps(epoch):
                    row = {"epoch": epoch + 1, "step": self.n_steps + 1, **self._step(batches)}
                    row["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
                    self.history.append({**row, "seconds": round(time.monotonic() - started, 3)})
                    bar.update()
                    bar.set_postfix(epoch=epoch + 1, loss=f"{row['loss']:.4f}", refresh=False)
                    is_due = self.checkpoint_every and self.n_steps % self.checkpoint_every == 0
                    if is_due and self.n_steps % self.steps_per_epoch:
                        self._save()
                if self.evaluate is not None:
                    self.history.append({"epoch": epoch + 1, "step": self.n_steps, "score": self._score()})
                self._save()

    def result(self) -> TrainingResult:
        """Load the best parameters and say how it went."""
        best = self._best() or self.history[-1]
        checkpoint = self._place(best["step"])
        self.module.load_state_dict(load_file(checkpoint / "model.safetensors"))
        reason = "early stopping" if self._is_stale() else "all epochs"
        return TrainingResult(self.history, best.get("score"), best["epoch"], self.n_steps, reason, checkpoint)

    n_steps = property(lambda self: self.history[-1]["step"] if self.history else 0)

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _best(self) -> dict[str, Any] | None:
        """The first row with the highest tuning score."""
        return max((row for row in self.history if "score" in row), key=lambda row: row["score"], default=None)

    def _is_stale(self) -> bool:
        """Whether ``patience`` epochs ended since the best score."""
        best, n_epochs = self._best(), self.n_steps // self.steps_per_epoch
        return None not in (best, self.patience) and n_epochs - best["epoch"] >= self.patience

    def _steps(self, epoch: int) -> Iterator[list[tuple[float, Any]]]:
        """For each step left in the epoch this process's batches, with the share of the step's samples in each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order, size = torch.randperm(len(self.dataset), generator=generator).tolist(), self.batch_size
        collate = self.collate or torch.utils.data.default_collate
        for start in range(self.n_steps % self.steps_per_epoch * self.per_step, len(order), self.per_step):
            step = order[start : start + self.per_step]
            parts = [step[i : i + size] for i in range(0, len(step), size)]
            mine = parts[self.accelerator.process_index :: self.accelerator.num_processes]
            yield [(len(part) / len(step), collate([self.dataset[index] for index in part])) for part in mine]

    def _step(self, batches: list[tuple[float, Any]]) -> dict[str, float]:
        """One optimiser step; the mean losses over its samples in all processes."""
        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for share, batch in batches:
            losses = self.loss_of(self.module, send_to_device(batch, self.accelerator.device))
            (losses["loss"] * share).backward()
            sums = {name: sums.get(name, 0.0) + value.detach().double() * share for name, value in losses.items()}
        everywhere = gather_object([{name: float(value) for name, value in sums.items()}])
        means = {name: sum(one.get(name, 0.0) for one in everywhere) for one in everywhere for name in one}
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingStopped(f"The loss is not finite: {means}. {_ADVICE}")
        if self.accelerator.num_processes > 1:  # each has weighted its samples by their share
            for parameter in (one for one in self.module.parameters() if one.requires_grad):
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, reduction="sum")
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return means

    def _score(self) -> float:
        """The tuning score of the main process, the same in all."""
        self.module.eval()
        with torch.no_grad():
            box = [float(self.evaluate(self.module)) if self.accelerator.is_main_process else None]
        (score,) = broadcast_object_list(box)
        if math.isnan(score):
            raise ValueError("The tuning score is nan. The tuning split needs normal and anomalous pictures.")
        return score

    def _save(self) -> None:
        """Write a checkpoint folder under a temporary name, rename it, drop all but the last two and the best."""
        for name, value in self.module.state_dict().items():
            if not value.isfinite().all():
                raise TrainingStopped(f"{name} is not finite: nothing was saved. {_ADVICE}")
        target, temporary = self._place(self.n_steps), self.folder / ".partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        files.write_json(temporary / _CARD, {"identity": self.identity, "history": self.history})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        best = self._best()
        for old in checkpoints(self.folder)[:-2]:
            if best is None or old != self._place(best["step"]):
                shutil.rmtree(old)
        if self.on_checkpoint is not None:
            self.on_checkpoint(target)
