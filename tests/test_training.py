"""The training loop: killed and resumed runs, early stopping, nan, settings, two processes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import files as storage
from helpers.anomalyclip import training as anomalyclip_training
from helpers.training import (
    TrainingSettings,
    TrainingStopped,
    checkpoints,
    choose_precision,
    load_parameters,
    train,
    trained_state,
)

REPOSITORY = Path(__file__).resolve().parent.parent


class Points(torch.utils.data.Dataset):
    """A small regression with noise from the global random states of python, numpy and torch, as augmentation uses."""

    def __init__(self, n: int = 22, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = self.x @ torch.arange(6.0) + 1.0
        self.noise = noise
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        jitter = torch.randn(6) + random.gauss(0, 1) + float(np.random.standard_normal())
        return {"x": self.x[index] + self.noise * jitter, "y": self.y[index]}


class Regression(nn.Module):
    """A frozen layer, a trained one, batch norm (buffers) and dropout (random state)."""

    def __init__(self, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.trained = nn.Linear(6, 1)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in [*self.frozen.parameters(), *self.trained.parameters()]:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        error = self.trained(self.dropout(self.norm(self.frozen(batch["x"]))))[:, 0] - batch["y"]
        return {"loss": (error**2).mean(), "bias": error.mean()}


SETTINGS = TrainingSettings(n_epochs=3, batch_size=4, n_accumulation=2, checkpoint_every=1, max_grad_norm=5.0)


def run(folder: Path, settings: TrainingSettings = SETTINGS, **options):
    module = options.pop("module") if "module" in options else Regression()
    dataset = options.pop("dataset") if "dataset" in options else Points()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.pop("learning_rate", 0.05))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
    result = train(module, dataset, optimizer, folder=folder, settings=settings, scheduler=scheduler, **options)
    return module, result


def without_seconds(history) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(trained_state(ours).items(), trained_state(theirs).values()):
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"


class Interrupt(Exception):
    pass


def weight_spread(module: nn.Module) -> float:
    return float(module.trained.weight.std())


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    uninterrupted, whole = run(tmp_path / "whole", evaluate=weight_spread)

    def interrupt(path: Path) -> None:
        if path.name == f"step_{stop_after:08d}":
            raise Interrupt

    with pytest.raises(Interrupt):
        run(tmp_path / "cut", evaluate=weight_spread, on_checkpoint=interrupt)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed, rest = run(tmp_path / "cut", evaluate=weight_spread)
    assert_same_state(resumed, uninterrupted)
    assert without_seconds(rest.history) == without_seconds(whole.history)
    assert (rest.best_score, rest.best_epoch) == (whole.best_score, whole.best_epoch)


def test_killed_process_resumes_to_the_same_parameters(tmp_path: Path) -> None:
    """A real SIGKILL in the middle of a run; the run after it ends with the bits of the uninterrupted one."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from tests.test_training import run\n"
        "run(Path(sys.argv[1]), on_history=lambda history: time.sleep(0.15))\n"
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(checkpoints(folder)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert storage.read_json(checkpoints(folder)[-1] / "checkpoint.json")["progress"]["step"] < 9
    resumed, rest = run(folder)
    uninterrupted, whole = run(tmp_path / "whole")
    assert_same_state(resumed, uninterrupted)
    assert without_seconds(rest.history) == without_seconds(whole.history)
    assert not list(folder.glob(".partial-*"))


def test_frozen_parameters_are_neither_changed_nor_saved(tmp_path: Path) -> None:
    module, result = run(tmp_path)
    assert torch.equal(module.frozen.weight, Regression().frozen.weight)
    assert not torch.equal(module.trained.weight, Regression().trained.weight)
    assert set(trained_state(module)) == {
        "trained.weight", "trained.bias", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    copy = Regression()
    load_parameters(result.checkpoint, copy)
    assert_same_state(copy, module)


def test_checkpoints_load_with_weights_only_and_old_ones_go(tmp_path: Path) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0, 4.0])
    settings = TrainingSettings(n_epochs=5, batch_size=8, keep_last=2)
    _, result = run(tmp_path, settings, evaluate=lambda module: next(scores))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000006", "step_00000012", "step_00000015"]
    assert result.checkpoint.name == "step_00000006" and result.best_epoch == 2
    state = torch.load(result.checkpoint / "state.pt", weights_only=True)
    assert set(state) == {"optimizer", "scheduler", "scaler", "random"}


def test_best_parameters_are_restored_and_training_stops_early(tmp_path: Path) -> None:
    scores, seen = iter([0.5, 0.9, 0.9, 0.8, 1.0]), []

    def evaluate(module: nn.Module) -> float:
        assert not module.training and not torch.is_grad_enabled()
        seen.append(module.trained.weight.clone())
        return next(scores)

    settings = TrainingSettings(n_epochs=9, batch_size=8, patience=2)
    module, result = run(tmp_path, settings, evaluate=evaluate)
    assert result.reason == "early stopping" and len(seen) == 4
    assert result.best_score == 0.9 and result.best_epoch == 2
    assert torch.equal(module.trained.weight, seen[1])


@pytest.mark.parametrize(("min_improvement", "n_scores"), [(0.0, 4), (0.2, 3)])
def test_small_improvements_count_only_without_a_limit(tmp_path: Path, min_improvement: float, n_scores: int) -> None:
    scores = iter([0.5, 0.6, 0.55, 0.5, 0.5, 0.5])
    settings = TrainingSettings(n_epochs=6, batch_size=8, patience=2, min_improvement=min_improvement)
    _, result = run(tmp_path, settings, evaluate=lambda module: next(scores))
    assert sum("score" in row for row in result.history) == n_scores


def test_finished_run_returns_at_once_and_more_epochs_go_on(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    dataset = Points()
    again, result = run(tmp_path, dataset=dataset)
    assert_same_state(again, first)
    assert dataset.epochs == [] and result.reason == "all epochs"
    longer = TrainingSettings(n_epochs=4, batch_size=4, n_accumulation=2, checkpoint_every=1, max_grad_norm=5.0)
    extended, _ = run(tmp_path, longer, dataset=dataset)
    assert dataset.epochs == [3]
    direct, _ = run(tmp_path / "direct", longer)
    assert_same_state(extended, direct)


class Exploding(Regression):
    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses = super().forward(batch)
        self.calls = getattr(self, "calls", 0) + 1
        return losses if self.calls <= 4 else losses | {"loss": losses["loss"] * math.nan}


def test_nan_loss_stops_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"not finite.*Lower the learning rate"):
        run(tmp_path, module=Exploding())
    assert checkpoints(tmp_path)[-1].name == "step_00000002"
    module = Regression()
    load_parameters(checkpoints(tmp_path)[-1], module)
    assert all(tensor.isfinite().all() for tensor in trained_state(module).values())


def test_broken_parameters_are_not_saved(tmp_path: Path) -> None:
    module = Regression()
    module.trained.weight.register_hook(lambda gradient: gradient * math.inf)
    settings = TrainingSettings(n_epochs=1, batch_size=8, checkpoint_every=1)
    with pytest.raises(TrainingStopped, match="nothing was saved"):
        run(tmp_path, settings, module=module)
    assert checkpoints(tmp_path) == []


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    uninterrupted, _ = run(tmp_path / "whole")

    def interrupt(path: Path) -> None:
        if path.name == "step_00000005":
            raise Interrupt

    with pytest.raises(Interrupt):
        run(tmp_path / "cut", on_checkpoint=interrupt)
    newest = checkpoints(tmp_path / "cut")[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=r"step_00000005 is damaged \(model.safetensors\)"):
        resumed, _ = run(tmp_path / "cut")
    assert_same_state(resumed, uninterrupted)


@pytest.mark.parametrize(
    ("settings", "fingerprint", "named"),
    [
        (
            TrainingSettings(n_epochs=3, batch_size=8, n_accumulation=2, max_grad_norm=5.0),
            {"data": 1},
            "batch_size 4 -> 8",
        ),
        (SETTINGS, {"data": 2}, "fingerprint.data 1 -> 2"),
    ],
)
def test_other_settings_are_not_resumed(tmp_path: Path, settings, fingerprint, named: str) -> None:
    run(tmp_path, fingerprint={"data": 1})
    with pytest.raises(ValueError, match=named):
        run(tmp_path, settings, fingerprint=fingerprint)
    _, result = run(tmp_path, settings, fingerprint=fingerprint, restart=True)
    assert result.n_steps == 3 * math.ceil(22 / (settings.batch_size * 2))


def test_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    _, result = run(tmp_path)
    with pytest.raises(ValueError, match="missing .*'trained.extra'"):
        other = Regression()
        other.trained.extra = nn.Parameter(torch.zeros(1))
        load_parameters(result.checkpoint, other)
    other = Regression()
    other.trained = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="other shape"):
        load_parameters(result.checkpoint, other)
    with pytest.raises(FileNotFoundError, match="No checkpoint"):
        load_parameters(tmp_path / "nowhere", other)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    """22 samples in steps of 8: the last step of 6 is split into 4 and 2, weighted by count."""
    quiet = {"dataset": Points(noise=0.0)}
    big, a = run(tmp_path / "big", TrainingSettings(n_epochs=2, batch_size=8), module=Regression(0, False), **quiet)
    parts, b = run(
        tmp_path / "parts",
        TrainingSettings(n_epochs=2, batch_size=4, n_accumulation=2),
        module=Regression(0, False),
        **quiet,
    )
    torch.testing.assert_close(big.trained.weight, parts.trained.weight, atol=1e-6, rtol=0)
    np.testing.assert_allclose([r["loss"] for r in a.history], [r["loss"] for r in b.history], rtol=1e-5)


def test_each_epoch_sees_every_sample_once_in_another_order(tmp_path: Path) -> None:
    seen: list[int] = []

    class Recording(Points):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(index)
            return super().__getitem__(index)

    run(tmp_path, TrainingSettings(n_epochs=2, batch_size=4), dataset=Recording())
    first, second = seen[:22], seen[22:]
    assert sorted(first) == sorted(second) == list(range(22)) and first != second


def test_history_is_told_live_and_a_failing_copy_does_not_stop(tmp_path: Path) -> None:
    lengths: list[int] = []

    def full_drive(path: Path) -> None:
        raise OSError("No space left on Drive")

    with pytest.warns(UserWarning, match="was not copied: No space left on Drive"):
        _, result = run(tmp_path, on_history=lambda history: lengths.append(len(history)), on_checkpoint=full_drive)
    assert lengths == list(range(1, 10)) and len(result.history) == 9
    assert set(result.history[0]) == {"epoch", "step", "loss", "bias", "learning_rate", "seconds"}


@pytest.mark.parametrize("n_workers", [0, 2])
def test_workers_give_the_same_order(tmp_path: Path, n_workers: int) -> None:
    settings = TrainingSettings(n_epochs=1, batch_size=4, n_workers=n_workers)
    _, result = run(tmp_path, settings, module=Regression(0, False), dataset=Points(noise=0.0))
    _, plain = run(tmp_path / "plain", TrainingSettings(1, 4), module=Regression(0, False), dataset=Points(noise=0.0))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in plain.history]


def test_bf16_computes_in_bf16_and_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    kinds = set()

    class Watching(Regression):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            kinds.add(self.frozen(batch["x"]).dtype)
            return super().forward(batch)

    module = Watching()
    run(tmp_path, TrainingSettings(n_epochs=1, batch_size=8, precision="bf16"), module=module)
    assert kinds == {torch.bfloat16} and module.trained.weight.dtype == torch.float32
    kinds.clear()
    module({"x": torch.zeros(2, 6), "y": torch.zeros(2)})
    assert kinds == {torch.float32}
    run(tmp_path / "fp32", TrainingSettings(n_epochs=1, batch_size=8))  # another precision in the same process


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_epochs": 0}, "n_epochs is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"precision": "int4"}, "allowed are fp32, bf16, fp16"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**({"n_epochs": 1, "batch_size": 1} | changes))


def test_one_process_where_more_were_asked_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.warns(UserWarning, match="started one process"):
        run(tmp_path)


def test_nothing_to_train_no_samples_fp16_on_cpu_and_nan_score(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        frozen = Regression().requires_grad_(False)
        train(frozen, Points(), None, folder=tmp_path, settings=SETTINGS)
    with pytest.raises(ValueError, match="no training sample"):
        run(tmp_path, dataset=Points(0))
    with pytest.raises(ValueError, match="no loss scaling"):
        run(tmp_path, TrainingSettings(n_epochs=1, batch_size=4, precision="fp16"))
    with pytest.raises(ValueError, match="tuning score is nan"):
        run(tmp_path, evaluate=lambda module: math.nan)
    assert choose_precision("cpu") == "fp32"


def two_process_run(folder: str, n_processes: int) -> None:
    """Called by the script below: 18 samples, batch 8 over all processes (2 are left for the last step), no noise."""
    settings = TrainingSettings(n_epochs=2, batch_size=8 // n_processes, checkpoint_every=2)
    module, result = run(
        Path(folder),
        settings,
        module=Regression(0, False),
        dataset=Points(18, noise=0.0),
        evaluate=lambda module: float(module.trained.weight.sum()),
    )
    from tests import test_anomalyclip  # the prompts go through the same launch, which costs ten seconds

    clip = test_anomalyclip.tiny_clip()
    features = test_anomalyclip.make_features(Path(folder) / f"rank{os.environ.get('RANK', 0)}", clip)
    _, prompts = anomalyclip_training.train_prompts(clip, *features, folder=Path(folder) / "prompts", settings=settings)
    if int(os.environ.get("RANK", 0)) == 0:
        storage.write_json(Path(folder) / "prompts.json", prompts.history)
        weight = module.trained.weight.flatten().tolist()
        storage.write_json(Path(folder) / "result.json", {"history": result.history, "weight": weight})


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    """``accelerate launch --cpu`` alone starts one process without MPI (1.15), so torchrun stands in between."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.test_training import two_process_run\n"
        "two_process_run(sys.argv[1], int(os.environ['WORLD_SIZE']))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--module", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*launch, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two_process_run(str(tmp_path / "one"), 1)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert len(one["history"]) == len(two["history"]) == 8
    for ours, theirs in zip(two["history"], one["history"]):
        key = "loss" if "loss" in ours else "score"
        assert ours[key] == pytest.approx(theirs[key], abs=1e-4, rel=1e-5)
    np.testing.assert_allclose(two["weight"], one["weight"], atol=1e-5)
    one, two = (json.loads((tmp_path / name / "prompts.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) == 2 * 2 + 2
    for ours, theirs in zip(two, one):
        for key in ("loss", "image", "focal", "score"):
            assert ours.get(key) == (None if key not in theirs else pytest.approx(theirs[key], abs=1e-4)), key
