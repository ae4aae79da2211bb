"""One training loop for every method that learns: exact resume, early stopping, 1 or N processes.

The loop runs under Hugging Face ``accelerate``: the same call trains on a CPU, a GPU, or in each of N processes that
``accelerate launch`` started. A checkpoint is what ``accelerate`` saves of the trained module, its optimiser, its
scheduler and the random states, beside a card that says where the run is. A killed run goes on from its last
checkpoint and ends with the parameters that the uninterrupted run would have had, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

_CARD, _MODEL = "checkpoint.json", "model.safetensors"


class TrainingStopped(RuntimeError):
    """Training cannot go on (the loss or a parameter is nan or infinite); the last good checkpoint is kept."""


@dataclass
class TrainingResult:
    """Where a run is, as every checkpoint says; at the end the module holds the best parameters (or the last).

    ``history`` has rows ``{"epoch", "step", "loss", <parts>, "learning_rate", "seconds"}`` per optimiser step and rows
    ``{"epoch", "step", "score"}`` per tuning score; only ``seconds`` differ between two equal runs.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float | None = None  # None without tuning
    best_epoch: int = 0  # 1-based, of the parameters that the module holds
    n_steps: int = 0  # over all resumed runs, as are the seconds
    reason: str = ""  # why it ended: "all epochs" or "early stopping"
    checkpoint: Path | None = None  # folder of the parameters that the module holds
    epoch: int = 0  # finished epochs
    n_seen: int = 0  # samples of the running epoch that are done
    n_stale: int = 0  # tuning scores since the best one
    best_step: int = 0
    seconds: float = 0.0


def train(
    module: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, Any], Mapping[str, torch.Tensor]],
    dataset: Any,
    optimizer: torch.optim.Optimizer,
    *,
    folder: Path,
    n_epochs: int,
    batch_size: int,
    n_accumulation: int = 1,
    scheduler: Any = None,
    collate: Callable[[list[Any]], Any] | None = None,
    evaluate: Callable[[torch.nn.Module], float] | None = None,
    patience: int | None = None,
    max_grad_norm: float | None = None,
    checkpoint_every: int = 0,
    seed: int = 111,
    device: str = "cpu",
    identity: Mapping[str, Any] | None = None,
    on_history: Callable[[list[dict[str, Any]]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    title: str = "training",
) -> TrainingResult:
    """Train a module; go on where an earlier call stopped if ``folder`` holds a checkpoint.

    Args:
        module: what is trained and saved, alone; frozen models belong into ``loss_of``.
        loss_of: (module, batch) -> ``{"loss": scalar, <part>: scalar, ...}``, means over the batch.
        dataset: ``len`` and ``[index]``; a method ``set_epoch(epoch)`` is told the epoch (0-based) before each one.
        optimizer, scheduler: over ``module``; the scheduler is stepped once per optimiser step.
        folder: checkpoints go here; one run, one folder.
        n_epochs, patience: passes over the samples, tuning scores without improvement until it stops. Both may grow.
        batch_size, n_accumulation: samples per forward pass in each process, passes per optimiser step; both may
            change between calls as long as their product does not (after running out of memory).
        evaluate: module in eval mode -> tuning score, higher is better, after each epoch. Never test pictures.
        checkpoint_every: optimiser steps between two checkpoints beside the one at each epoch's end, 0 for none.
        device: ``"cpu"`` forces the CPU; else accelerate's own choice for this process.
        identity: JSON values that determine the run; a checkpoint with other values is not resumed.
        on_history, on_checkpoint: called in the main process with all rows so far, or a complete checkpoint's folder.
    Raises:
        TrainingStopped: the loss or a parameter became nan or infinite; the last good checkpoint is kept.
        ValueError: no sample; a checkpoint of another run; a tuning score that is nan.
    """
    if len(dataset) == 0:
        raise ValueError("There is no training sample. Check the category and the split that the samples come from.")
    run = _Run(**locals())
    run.resume()
    run.loop()
    return run.result()


def load_parameters(checkpoint: Path, module: torch.nn.Module) -> None:
    """Load the parameters of a checkpoint folder into a module; RuntimeError when names or shapes differ."""
    path = Path(checkpoint) / _MODEL
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint in {checkpoint}. Run the training that makes it.")
    module.load_state_dict(load_file(path))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step_*/{_CARD}"))


def by_epoch(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """History in one row per epoch: mean losses and the tuning score.

    >>> by_epoch([{"epoch": 1, "step": 1, "loss": 4.0}, {"epoch": 1, "step": 2, "loss": 2.0},
    ...           {"epoch": 1, "step": 2, "score": 0.5}])
    [{'epoch': 1, 'loss': 3.0, 'tuning_score': 0.5}]
    """
    rows = pd.DataFrame(history).rename(columns={"score": "tuning_score"})
    means = rows.drop(columns=["step", "learning_rate", "seconds"], errors="ignore").groupby("epoch").mean()
    return [{"epoch": int(epoch)} | row.dropna().to_dict() for epoch, row in means.iterrows()]


def curves(history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The course of a training for :func:`helpers.judge.figures.lines`: ``panel, series, x, value``.

    The held-out score comes first, because it counts; then the mean losses of each epoch.
    """
    tidy = pd.DataFrame(by_epoch(history)).melt("epoch", var_name="series").dropna()
    is_score = tidy["series"] == "tuning_score"
    tidy = tidy.assign(panel=is_score.map({True: "held-out score (higher is better)", False: "training losses"}))
    tidy["series"] = tidy["series"].str.replace("_", " ")
    return pd.concat([tidy[is_score], tidy[~is_score]]).rename(columns={"epoch": "x"})


class _Run(SimpleNamespace):
    """One call of :func:`train`: its arguments, where it is, and what it does."""

    def resume(self) -> None:
        """Prepare and seed everything, or load the newest checkpoint of the same run."""
        self.folder, self.progress = Path(self.folder), TrainingResult()
        self.accelerator = accelerator = Accelerator(cpu=self.device == "cpu", mixed_precision="no")
        # Not wrapped for distributed training: loss_of may call any method of it, _step sums the gradients.
        self.module = accelerator.prepare_model(self.module, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(self.optimizer)
        if self.scheduler is not None:
            accelerator.register_for_checkpointing(self.scheduler)
        self.per_step = self.batch_size * self.n_accumulation * accelerator.num_processes
        facts = {"samples_per_step": self.per_step, "max_grad_norm": self.max_grad_norm, "seed": self.seed}
        facts |= {"n_samples": len(self.dataset), **(self.identity or {})}
        self.identity = json.loads(json.dumps(facts))
        set_seed(self.seed, device_specific=True)
        found = checkpoints(self.folder)
        if not found:
            return
        saved = files.read_json(found[-1] / _CARD)
        before, now = saved.get("identity", {}), self.identity
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if names:
            changes = "; ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in names)
            raise ValueError(
                f"{found[-1]} was trained with other settings ({changes}). Give this run its own folder, or delete "
                f"{self.folder} to train anew."
            )
        accelerator.load_state(str(found[-1]))
        self.progress = TrainingResult(**saved["progress"])

    def loop(self) -> None:
        """Train until the last epoch, or until the tuning score has stopped rising."""
        progress, total = self.progress, self.n_epochs * math.ceil(len(self.dataset) / self.per_step)
        is_hidden = not self.accelerator.is_main_process
        with tqdm(total=total, initial=progress.n_steps, desc=self.title, unit="step", disable=is_hidden) as bar:
            while progress.epoch < self.n_epochs and not self._is_stale():
                if hasattr(self.dataset, "set_epoch"):
                    self.dataset.set_epoch(progress.epoch)
                self.module.train()
                started = time.monotonic() - progress.seconds
                for n_samples, batches in self._steps():
                    losses = self._step(batches)
                    progress.n_steps, progress.n_seen = progress.n_steps + 1, progress.n_seen + n_samples
                    progress.seconds = round(time.monotonic() - started, 3)
                    rate = float(self.optimizer.param_groups[0]["lr"])
                    self._log(progress.epoch + 1, losses | {"learning_rate": rate, "seconds": progress.seconds})
                    bar.update()
                    bar.set_postfix(epoch=progress.epoch + 1, loss=f"{losses['loss']:.4f}", refresh=False)
                    is_due = self.checkpoint_every and progress.n_steps % self.checkpoint_every == 0
                    if is_due and progress.n_seen < len(self.dataset):
                        self.save()
                progress.epoch, progress.n_seen = progress.epoch + 1, 0
                if self.evaluate is not None:
                    self._take_score()
                self.save()

    def result(self) -> TrainingResult:
        """Load the best parameters and say how it went."""
        progress = self.progress
        if self.evaluate is None:
            progress.best_step, progress.best_epoch = progress.n_steps, progress.epoch
        progress.checkpoint = self.folder / _name(progress.best_step)
        load_parameters(progress.checkpoint, self.module)
        progress.reason = "early stopping" if self._is_stale() else "all epochs"
        return progress

    def save(self) -> None:
        """Write a checkpoint folder under a temporary name, rename it, drop all but the last two and the best."""
        broken = [name for name, value in self.module.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise TrainingStopped(
                f"{broken[0]} is not finite: nothing was saved, the last checkpoint is good. Lower the learning rate "
                "or set max_grad_norm=1.0, then train again."
            )
        target, temporary = self.folder / _name(self.progress.n_steps), self.folder / ".partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        files.write_json(temporary / _CARD, {"identity": self.identity, "progress": asdict(self.progress)})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in checkpoints(self.folder)[:-2]:
            if old.name != _name(self.progress.best_step):
                shutil.rmtree(old)
        if self.on_checkpoint is not None:
            try:
                self.on_checkpoint(target)
            except OSError as error:
                warnings.warn(f"{target.name} is saved here but was not copied: {error}", stacklevel=2)

    def _steps(self) -> Iterator[tuple[int, list[tuple[float, Any]]]]:
        """The steps left in the epoch: (samples over all processes, this process's (share of the samples, batch)).

        The order is a function of seed and epoch; batches are dealt out to the processes in turn.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.progress.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()[self.progress.n_seen :]
        steps, size = [order[i : i + self.per_step] for i in range(0, len(order), self.per_step)], self.batch_size
        mine, n_processes = self.accelerator.process_index, self.accelerator.num_processes
        plan = [[step[i : i + size] for i in range(0, len(step), size)][mine::n_processes] for step in steps]
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[batch for batches in plan for batch in batches],
            collate_fn=self.collate,
            generator=generator,  # keeps the loader off the global random state
        )
        loaded = iter(loader)
        for step, batches in zip(steps, plan):
            yield len(step), [(len(batch) / len(step), next(loaded)) for batch in batches]

    def _step(self, batches: list[tuple[float, Any]]) -> dict[str, float]:
        """One optimiser step; the mean losses over its samples in all processes."""
        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for share, batch in batches:
            losses = self.loss_of(self.module, send_to_device(batch, self.accelerator.device))
            (losses["loss"] * share).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * share
        everywhere = gather_object([{name: float(value) for name, value in sums.items()}])
        means = {name: sum(one.get(name, 0.0) for one in everywhere) for one in everywhere for name in one}
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingStopped(
                f"The loss is not finite: {', '.join(f'{k} {v:.3g}' for k, v in means.items())}. Training stopped "
                "before this step; the last checkpoint is good. Lower the learning rate or set max_grad_norm=1.0, "
                "then train again."
            )
        if self.accelerator.num_processes > 1:  # each has weighted its samples by their share
            for parameter in [parameter for parameter in self.module.parameters() if parameter.requires_grad]:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, reduction="sum")
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return means

    def _take_score(self) -> None:
        """Take the tuning score of the main process, the same in all, and note whether it is the best so far."""
        box: list[Any] = [None]
        if self.accelerator.is_main_process:
            self.module.eval()
            with torch.no_grad():
                box = [float(self.evaluate(self.module))]
        broadcast_object_list(box)
        if math.isnan(box[0]):
            raise ValueError("The tuning score is nan. The tuning split needs normal and anomalous pictures.")
        progress = self.progress
        if progress.best_score is None or box[0] > progress.best_score:
            progress.best_score, progress.best_step, progress.best_epoch = box[0], progress.n_steps, progress.epoch
            progress.n_stale = 0
        else:
            progress.n_stale += 1
        self._log(progress.epoch, {"score": box[0]})

    def _log(self, epoch: int, values: Mapping[str, Any]) -> None:
        self.progress.history.append({"epoch": epoch, "step": self.progress.n_steps, **values})
        if self.on_history is not None and self.accelerator.is_main_process:
            self.on_history(self.progress.history)

    def _is_stale(self) -> bool:
        return self.patience is not None and self.progress.n_stale >= self.patience


def _name(step: int) -> str:
    return f"step_{step:08d}"
