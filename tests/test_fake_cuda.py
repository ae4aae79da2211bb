"""The code of the notebooks on a GPU that is not there (see :mod:`fake_cuda`), with tiny models; the tiny walk."""

import json
from dataclasses import replace
from pathlib import Path

import gpu_walk
import matplotlib.pyplot as plt
import open_clip
import pytest
import timm
import tiny_anomalygpt as tiny
import torch
import transformers
from fake_cuda import GpuTensor, fake_cuda

from helpers import data, files, profiles
from helpers.anomalyclip import model as anomalyclip
from helpers.clip import backbones
from helpers.colab import session
from helpers.judge import figures

HERE, SHORT = Path(__file__).parent, {"wording": "short"}
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


def run_notebook(name: str, profile: profiles.Profile) -> dict:
    """Every code cell of a notebook as it stands, but for the set-up cell, which chooses the profile."""
    cells = json.loads((HERE.parent / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "session.start()" in sources[0]
    namespace = {"profile": profile, "session": session, "display": lambda *shown: None}
    for number, source in enumerate(sources[1:], start=2):
        exec(compile(source, f"{name}, code cell {number}", "exec"), namespace)
    return namespace


def mini(home: Path) -> profiles.Profile:
    """A profile of tiny sizes on the fake GPU."""
    training = {"n_epochs": 2, "batch_size": 4, "micro_batch": 2, "n_tuning": 2, "checkpoint_every": 1}
    testing = {"shots": (0, 2), "row_shots": 2, "n_draws": 1, "n_sentences": 3, "n_controls": 2, "max_new_tokens": 4}
    settings = profiles.AnomalyGptSettings(training=training | SHORT, testing=testing | SHORT)
    clip = profiles.ClipSettings(
        model="ViT-B-32-quickgelu", pretrained=None, image_size=32, cnn_model="test_resnet", batch_size=8, n_trials=1,
        max_epochs=2, n_synthetic=12, max_bank_rows=500,
    )  # fmt: skip
    prompts = profiles.AnomalyClipSettings(image_size=40, auxiliary="packages", n_epochs=1, row="own")
    dino = profiles.ReferenceSettings(model="any name", image_size=42, side=96, n_references=3, n_bank=2)
    more = {"clip": clip, "anomalyclip": prompts, "anomalygpt": settings, "reference": dino}
    return profiles.Profile("mini", "fake GPU", home, None, "cuda", **more)


def make_clip(_name: str, **_options) -> torch.nn.Module:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    torch.manual_seed(0)
    return open_clip.CLIP(24, vision, text, quick_gelu=True)


def make_dino(_name: str, **_options) -> tuple:
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=42)
    return transformers.Dinov2Model(config), {"missing_keys": [], "unexpected_keys": []}


def write_prompts(profile: profiles.Profile) -> None:
    """AnomalyCLIP's "published" prompts, as notebook 01 leaves them."""
    size, component = profile.clip, f"anomalyclip/{profile.anomalyclip.prompts}"
    clip = backbones.load_clip(size.model, pretrained=None, image_size=size.image_size, device="cpu")
    path = profile.weights_dir / component / "model.safetensors"
    files.write_bytes(path, anomalyclip.as_bytes(anomalyclip.PromptLearner(clip.model, clip.tokenizer, seed=1)))
    there = {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}}
    ready = {"component": component, "files": there, "source": {}, "notes": [], "details": {}, "format": 1}
    files.write_json(path.with_name("READY.json"), ready)


def test_the_notebooks(tmp_path, monkeypatch):
    """06 and 07 first, whose head and results 08 reads; CLIP, the CNN and DINOv2 get random weights for any name."""
    tiny.write_weights(tmp_path / "weights", HERE / "golden" / "anomalygpt_seed0.safetensors")
    (tmp_path / "data" / "embedded").mkdir(parents=True)
    dataset, profile = tiny.write_dataset(tmp_path / "data" / "embedded"), mini(tmp_path)
    samples = [replace(s, visibility=1.0 if s.mask_path else None) for s in dataset.samples]  # notebook 04 shows one
    data.write_manifest(dataset.folder / "manifest.csv", samples)
    make_cnn = timm.create_model
    monkeypatch.setattr(figures, "save_figure", lambda *figure: plt.close("all"))
    with fake_cuda():
        trained, tested = (run_notebook(name, profile) for name in ("06_anomalygpt_train", "07_anomalygpt_test"))
    monkeypatch.setattr(open_clip, "create_model", make_clip)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make_cnn(name, pretrained=False))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", make_dino)
    write_prompts(profile)
    with fake_cuda():
        names = ("03_clip", "04_anomalyclip", "05_reference", "08_anomalygpt_chat")
        fitted, prompted, laid, asked = (run_notebook(name, profile) for name in names)
    on_gpu = [one["clip"].model.visual.proj for one in (fitted, prompted, asked)]
    on_gpu += [one["model"].language.model.lm_head.weight for one in (trained, tested, asked)]
    on_gpu += [tested["model"].image_tower.visual.proj, tested["model"].projection.weight]
    on_gpu += [next(fitted["cnn"].model.parameters()), next(laid["network"].model.parameters())]
    on_gpu += [prompted["own"].ctx_pos, prompted["ready"].text]
    assert all(isinstance(one, GpuTensor) for one in on_gpu)
    judged = [one.method for one in asked["talk"].verdicts if one.is_anomalous is not None]
    assert set(judged) >= {*fitted["found"], *laid["done"], "anomalyclip", "anomalygpt"} and len(laid["done"]) == 3


def test_the_walk_of_the_full_profile_ends(tmp_path):
    options = "--size tiny --device cpu --pictures 2 --folder".split()
    steps = list(gpu_walk.main([*options, str(tmp_path)])[0])
    assert steps[:2] == ["write the small checkpoints", "write LLaMA and the delta"] and len(steps) == 11
