"""The code of the notebooks on a GPU that is not there (see :mod:`fake_cuda`), with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest
import tiny_anomalygpt as tiny
import torch
from fake_cuda import GpuTensor, fake_cuda

from helpers import profiles
from helpers.colab import session

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda x: x + torch.ones(3), "same device"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.pin_memory(), "only dense CPU tensors can be pinned"),
        (lambda x: torch.arange(9.0)[x.long()], "indices should be"),
        (lambda x: torch.nn.Linear(3, 2)(x), "same device"),
    ],
)
def test_it_refuses_what_cuda_refuses(act, words):
    with fake_cuda(), pytest.raises((RuntimeError, TypeError), match=words):
        act(torch.ones(3, device="cuda"))


def test_a_step_on_it_is_the_step_of_the_cpu():
    def step(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 4).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        x = torch.arange(6.0).view(2, 3).to(device)
        x[1, [0, 2]] = 5.0
        layer(x).square().mean().backward()
        optimizer.step()
        assert layer.weight.device.type == layer.weight.grad.device.type == device
        return layer.weight.detach().cpu()

    on_cpu = step("cpu")
    with fake_cuda():
        on_gpu = step("cuda")
    assert not isinstance(on_gpu, GpuTensor)
    torch.testing.assert_close(on_gpu, on_cpu, atol=0, rtol=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.write_weights(home / "weights", HERE / "golden" / "anomalygpt_seed0.safetensors")
    (home / "data" / "embedded").mkdir(parents=True)
    tiny.write_dataset(home / "data" / "embedded")
    return home


def run_notebook(name: str, profile: profiles.Profile) -> dict:
    """Every code cell of a notebook as it stands, but for the set-up cell, which chooses the profile."""
    matplotlib.use("Agg")
    cells = json.loads((HERE.parent / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "session.start()" in sources[0]
    namespace = {"profile": profile, "session": session, "display": lambda *shown: None}
    for number, source in enumerate(sources[1:], start=2):
        exec(compile(source, f"{name}, code cell {number}", "exec"), namespace)
    return namespace


def test_notebooks_06_and_07(home):
    settings = profiles.AnomalyGptSettings(
        training={
            "n_epochs": 2, "batch_size": 4, "micro_batch": 2, "n_tuning": 2, "wording": "short", "checkpoint_every": 1,
        },
        testing={
            "shots": (0, 2), "row_shots": 2, "answered_shots": (0, 2), "n_draws": 1, "wording": "short",
            "n_sentences": 3, "n_controls": 2, "max_new_tokens": 4,
        },
    )  # fmt: skip
    profile = profiles.Profile("mini", "fake GPU", home, None, "cuda", anomalygpt=settings)
    with fake_cuda():
        trained = run_notebook("06_anomalygpt_train", profile)
        tested = run_notebook("07_anomalygpt_test", profile)
    for notebook in (trained, tested):
        parts = notebook["model"]
        for tensor in (parts.language.model.lm_head.weight, parts.image_tower.visual.proj, parts.projection.weight):
            assert isinstance(tensor, GpuTensor)
    assert (profile.results_dir("anomalygpt") / "manifest.json").exists()
