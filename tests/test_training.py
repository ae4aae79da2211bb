"""The training loop: killed and resumed runs, early stopping, nan, another run's checkpoint, two processes."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from torch import nn

from helpers import files
from helpers.training import TrainingStopped, checkpoints, curves, train

# Copies of a process without threads: of this one, whose libraries have started theirs, a copy could hang.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["accelerate", "helpers.training", "torch._dynamo"])


def linear(n_out: int, seed: int) -> nn.Linear:
    layer = nn.Linear(6, n_out)
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.randn(n_out, 6, generator=torch.Generator().manual_seed(seed)))
        layer.bias.zero_()
    return layer


FROZEN = linear(6, seed=3).requires_grad_(False)
SETTINGS = {"n_epochs": 3, "batch_size": 4, "n_accumulation": 2, "checkpoint_every": 1, "max_grad_norm": 5.0}


class Points(torch.utils.data.Dataset):
    """A small regression with noise from the global random states of python, numpy and torch, as augmentation uses."""

    def __init__(self, n: int = 22, noise: float = 0.1) -> None:
        self.x = torch.randn(n, 6, generator=torch.Generator().manual_seed(5))
        self.y = self.x @ torch.arange(6.0) + 1.0
        self.noise, self.epochs, self.seen = noise, [], []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen.append(index)
        jitter = torch.randn(6) + random.gauss(0, 1) + float(np.random.standard_normal())
        return {"x": self.x[index] + self.noise * jitter, "y": self.y[index]}


class Head(nn.Module):
    """What is trained behind a frozen layer: batch norm (buffers), dropout (random state), and no ``forward``."""

    def __init__(self, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.trained, self.dropout = linear(1, seed=4), nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()


def loss_of(module: Head, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    error = module.trained(module.dropout(module.norm(FROZEN(batch["x"]))))[:, 0] - batch["y"]
    return {"loss": (error**2).mean(), "bias": error.mean()}


def run(folder: Path, loss=loss_of, module=None, dataset=None, **changes):
    module, dataset = module or Head(), Points() if dataset is None else dataset
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
    return module, train(module, loss, dataset, optimizer, folder=folder, scheduler=scheduler, **SETTINGS | changes)


def assert_same_run(ours: tuple, theirs: tuple) -> None:
    (a, rest), (b, whole) = ours, theirs
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)
    assert [row | {"seconds": 0} for row in rest.history] == [row | {"seconds": 0} for row in whole.history]
    assert (rest.best_score, rest.best_epoch) == (whole.best_score, whole.best_epoch)


def run_until(step: int, folder: Path, **options) -> None:
    def interrupt(path: Path) -> None:
        if path.name == f"step_{step:08d}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, on_checkpoint=interrupt, **options)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    options = {"evaluate": lambda module: float(module.trained.weight.std())}
    whole = run(tmp_path / "whole", **options)
    run_until(stop_after, tmp_path / "cut", **options)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = run(tmp_path / "cut", **options)
    assert_same_run(resumed, whole)
    seconds = [row["seconds"] for row in resumed[1].history if "seconds" in row]
    assert seconds == sorted(seconds), "the time before the interruption counts, too"


def pause(checkpoint: Path) -> None:
    time.sleep(0.2)


def test_killed_process_resumes_to_the_same_parameters(tmp_path: Path) -> None:
    """A real SIGKILL in the middle of a run; the run after it ends with the bits of the uninterrupted one."""
    folder = tmp_path / "killed"
    process = FRESH.Process(target=run, args=(folder,), kwargs={"on_checkpoint": pause})
    process.start()
    while len(checkpoints(folder)) < 2 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    assert files.read_json(checkpoints(folder)[-1] / "checkpoint.json")["history"][-1]["step"] < 9
    assert_same_run(run(folder), run(tmp_path / "whole"))
    assert not (folder / ".partial").exists()


def test_best_parameters_are_restored_and_training_stops_early(tmp_path: Path) -> None:
    scores, seen = iter([0.5, 0.9, 0.9, 0.8, 1.0]), []

    def evaluate(module: Head) -> float:
        assert not module.training and not torch.is_grad_enabled()
        seen.append(module.trained.weight.clone())
        return next(scores)

    module, result = run(tmp_path, n_epochs=9, patience=2, checkpoint_every=0, evaluate=evaluate)
    assert (result.reason, result.best_score, result.best_epoch, len(seen)) == ("early stopping", 0.9, 2, 4)
    assert torch.equal(module.trained.weight, seen[1])
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000006", "step_00000009", "step_00000012"]


def test_finished_run_returns_at_once_more_epochs_go_on_and_so_does_a_smaller_batch(tmp_path: Path) -> None:
    first, dataset = run(tmp_path), Points()
    again = run(tmp_path, dataset=dataset)
    assert_same_run(again, first)
    assert dataset.epochs == [] and again[1].reason == "all epochs"
    extended = run(tmp_path, dataset=dataset, n_epochs=4)
    assert dataset.epochs == [3]
    assert_same_run(extended, run(tmp_path / "direct", n_epochs=4))
    run_until(2, tmp_path / "cut")
    assert run(tmp_path / "cut", batch_size=2, n_accumulation=4)[1].n_steps == 9, "memory had run out"


def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    factors = itertools.chain([1] * 4, itertools.repeat(math.nan))

    def explode(module: Head, batch: dict) -> dict:
        return {"loss": loss_of(module, batch)["loss"] * next(factors)}

    with pytest.raises(TrainingStopped, match=r"not finite.*Lower the learning rate"):
        run(tmp_path, explode)
    assert checkpoints(tmp_path)[-1].name == "step_00000002"
    module = Head()
    module.trained.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingStopped, match="nothing was saved"):
        run(tmp_path / "broken", module=module, max_grad_norm=None)
    assert checkpoints(tmp_path / "broken") == []


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path, identity={"data": 1}, n_epochs=1)
    for named, changes in {
        "samples_per_step 8 -> 16": {"batch_size": 8},
        "data 1 -> 2": {"identity": {"data": 2}},
        "n_samples 22 -> 20": {"dataset": Points(20)},
        "no training sample": {"dataset": Points(0)},
        "tuning score is nan": {"n_epochs": 2, "evaluate": lambda module: math.nan},
    }.items():
        with pytest.raises(ValueError, match=named):
            run(tmp_path, **{"identity": {"data": 1}} | changes)


def test_accumulation_equals_a_larger_batch_and_epochs_see_all_samples(tmp_path: Path) -> None:
    """22 samples in steps of 8: the last step of 6 is split into 4 and 2, weighted by count."""

    def trained(batch_size: int, n_accumulation: int) -> tuple:
        dataset, counts = Points(noise=0.0), {"batch_size": batch_size, "n_accumulation": n_accumulation}
        found = run(tmp_path / str(batch_size), module=Head(0, False), dataset=dataset, n_epochs=2, **counts)
        first, second = dataset.seen[:22], dataset.seen[22:]
        assert sorted(first) == sorted(second) == list(range(22)) and first != second
        return found

    (big, a), (parts, b) = trained(8, 1), trained(4, 2)
    torch.testing.assert_close(big.trained.weight, parts.trained.weight, atol=1e-6, rtol=0)
    np.testing.assert_allclose([r["loss"] for r in a.history], [r["loss"] for r in b.history], rtol=1e-5)


def test_the_curves_of_a_history_counted_by_hand() -> None:
    step = {"learning_rate": 0.1, "seconds": 1.0}
    history = [{"epoch": 1, "step": n, "loss": loss, "map_loss": 1.0} | step for n, loss in ((1, 4.0), (2, 2.0))]
    found = curves([*history, {"epoch": 1, "step": 2, "score": 0.5}])
    rows = found[["panel", "series", "x", "value"]].values.tolist()
    assert rows[0] == ["held-out score (higher is better)", "tuning score", 1, 0.5]
    assert rows[1:] == [["training losses", "loss", 1, 3.0], ["training losses", "map loss", 1, 1.0]]


def shared_run(folder: Path, n_processes: int) -> None:
    """17 samples without noise, 8 a step over all processes: 1 is left for the last step."""
    options = {"batch_size": 8 // n_processes, "n_accumulation": 1, "n_epochs": 2, "checkpoint_every": 2}
    options |= {"evaluate": lambda module: float(module.trained.weight.sum())}
    module, result = run(folder, module=Head(0, False), dataset=Points(17, noise=0.0), **options)
    if int(os.environ.get("RANK", 0)) == 0:
        found = {"history": result.history, "weight": module.trained.weight.flatten().tolist()}
        files.write_json(folder / "result.json", found)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    launcher = FRESH.Process(target=accelerate.debug_launcher, args=(shared_run, (tmp_path / "two", 2)))
    launcher.start()
    shared_run(tmp_path / "one", 1)
    launcher.join()
    assert launcher.exitcode == 0
    one, two = (files.read_json(tmp_path / name / "result.json") for name in ("one", "two"))
    assert len(one["history"]) == len(two["history"]) == 8
    losses = [[row.get("loss", row.get("score")) for row in found["history"]] for found in (one, two)]
    np.testing.assert_allclose(*losses, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(two["weight"], one["weight"], atol=1e-5)
