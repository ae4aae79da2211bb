"""The ``full`` profile as far as a machine without GPU and without the published files can prove it.

Every value of the profile is handed to what it is for; the towers run once at their true size with random numbers in
place of weights, and a training step of AnomalyGPT at its true widths; the deep language model and AnomalyCLIP's two
streams run on torch's meta device, which computes shapes and types without memory; memory and disk are planned and
compared with an L4. What stays unproven is in the README: arithmetic on a GPU, quantisation, downloads.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import profiles
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalygpt import (
    evaluation as anomalygpt_testing,
)
from helpers.anomalygpt import (
    imagebind,
    language,
)
from helpers.anomalygpt import (
    model as anomalygpt,
)
from helpers.anomalygpt import (
    plan as anomalygpt_plan,
)
from helpers.anomalygpt import (
    training as anomalygpt_training,
)
from helpers.clip import backbones, features, one_class
from helpers.colab import preflight
from helpers.weights import catalog, mini, steps

L4_GB, A100_GB = 22.5, 40.0
"""Usable memory of the two GPUs that the profile is made for, in GB."""


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> profiles.Profile:
    monkeypatch.setenv("ART_PROFILE", "full")
    monkeypatch.setenv("ART_HOME", str(tmp_path))
    monkeypatch.delenv("ART_DATA", raising=False)
    return profiles.active()


# --- every value is accepted by what it is for ----------------------------------------------------------------------


def test_the_profiles_differ_in_values_and_never_in_kind(
    full: profiles.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ART_PROFILE", "mini")
    mini = profiles.active()
    for field in dataclasses.fields(profiles.Profile):
        ours, theirs = getattr(full, field.name), getattr(mini, field.name)
        assert ours is None or theirs is None or type(ours) is type(theirs), field.name


def test_models_of_the_profile_exist_with_trained_weights(full: profiles.Profile) -> None:
    import open_clip
    import timm

    assert (full.clip_model, full.clip_pretrained) in open_clip.list_pretrained()
    assert timm.is_model_pretrained(full.cnn_model)
    patch = open_clip.get_model_config(full.clip_model)["vision_cfg"]["patch_size"]
    assert full.clip_image_size % patch == 0 and full.anomalyclip_image_size % patch == 0


def test_settings_of_the_profile_are_accepted(full: profiles.Profile) -> None:
    anomalyclip.DetectorSettings(image_size=full.anomalyclip_image_size, sigma=full.anomalyclip_sigma)
    training = anomalygpt_training.from_preset(full.anomalygpt_preset, **full.anomalygpt_training)
    assert training.batch_size % training.micro_batch == 0 and training.n_epochs == 15
    anomalygpt_testing.TestSettings(alpha=full.alpha, seed=full.seed, **full.anomalygpt_testing)
    one_class.HeadSettings(max_epochs=full.max_epochs)
    one_class.PatchKnnSettings(max_bank_rows=full.max_bank_rows)
    assert (
        full.anomalygpt_precision in language.PRECISIONS
        and full.anomalygpt_precision in anomalygpt_plan.BYTES_PER_WEIGHT
    )
    assert full.anomalyclip_row in ("published", "own", "best")


def test_notebook_01_prepares_what_the_other_notebooks_load(full: profiles.Profile) -> None:
    made = {file.component for file in catalog.route(full.weights_dir, full.weights).files}
    assert {"vicuna", "imagebind", "pandagpt"} <= made
    assert f"anomalyclip/{full.anomalyclip.prompts}" in made
    assert f"anomalygpt/{full.anomalygpt.checkpoint}" in made


def test_anomalyclip_needs_nobodys_consent(full: profiles.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route without LLaMA: notebook 01 prepares the prompts of 04 before it stops for a licence."""
    route, fetched = catalog.route(full.weights_dir, full.weights), []

    def fetch(url: str, target: Path, *, sha256: str | None, log: object) -> None:
        assert sha256 and "AnomalyCLIP/45ed4dd3" in url
        fetched.append(target)
        mini.write("anomalyclip/trained_on_visa", target)

    monkeypatch.setattr(steps.fetch, "fetch", fetch)
    for _ in range(2):  # what is ready is not fetched again
        steps.obtain_free(route, log=lambda line: None)
        assert len(fetched) == 2
    with pytest.raises(PermissionError, match="ACCEPT_LICENCES"):
        steps.obtain(route, accept_licences=False)


# --- memory, disk, cost ---------------------------------------------------------------------------------------------


def test_training_and_answering_fit_an_l4(full: profiles.Profile) -> None:
    """The loads of notebooks 06 and 07, cell for cell."""
    training = anomalygpt_training.from_preset(full.anomalygpt_preset, **full.anomalygpt_training)
    testing = anomalygpt_testing.TestSettings(alpha=full.alpha, seed=full.seed, **full.anomalygpt_testing)
    precision, pictures = full.anomalygpt_precision, 2 * training.micro_batch
    train = anomalygpt_plan.Load(precision, True, pictures, 96, True, training.gradient_checkpointing)
    answer = anomalygpt_plan.Load(precision, True, testing.batch_size, 96)
    for load in (train, answer):
        plan = anomalygpt_plan.require_fit(anomalygpt_plan.memory_plan(anomalygpt_plan.VICUNA_7B, load), L4_GB)
        assert 13.5 < plan.total_gb < L4_GB and plan.host_gb < preflight.NEEDS["full"][1]
    with pytest.raises(anomalygpt_plan.DoesNotFit, match="4bit"):
        anomalygpt_plan.require_fit(anomalygpt_plan.memory_plan(anomalygpt_plan.VICUNA_13B, train), L4_GB)


def test_disk_of_the_route_is_what_card_and_preflight_say(full: profiles.Profile) -> None:
    peak = catalog.route(full.weights_dir, full.weights).disk_bytes / 1e9
    assert peak <= preflight.STAGES["01_prepare_weights"].disk_gb < peak + 1.5
    others = sum(stage.disk_gb for name, stage in preflight.STAGES.items() if not name.startswith("01"))
    assert peak + others <= preflight.NEEDS["full"][2] < peak + others + 3


# --- the towers at their true size, random numbers as weights -------------------------------------------------------


@pytest.fixture(scope="module")
def clip_large() -> backbones.Clip:
    """CLIP ViT-L/14@336 as the profile loads it, but for the download: 428 million random numbers, 1.7 GB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return backbones.load_clip("ViT-L-14-336-quickgelu", pretrained=None, image_size=336, device="cpu")


def test_clip_large_embeds_a_picture(clip_large: backbones.Clip, full: profiles.Profile) -> None:
    assert clip_large.model_id == f"{full.clip_model}/random/{full.clip_image_size}"
    assert sum(p.numel() for p in clip_large.model.parameters()) == 427_944_193
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    found = features.embed_images([picture], clip=clip_large, cnn=None, patches=True)
    assert (found.clip.shape, found.clip.dtype) == ((1, 768), np.float32)
    assert (found.patches.shape, found.patches.dtype) == ((1, 24, 24, 2048), np.float16)
    norms = np.linalg.norm(found.patches.astype(np.float32).reshape(-1, 2, 1024), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_prompts_of_clip_large_train(clip_large: backbones.Clip, full: profiles.Profile) -> None:
    """A step of notebook 04's training on features of the true shapes: 37 x 37 patches at 518 px."""
    learner = anomalyclip.PromptLearner(clip_large.model, clip_large.tokenizer)
    module = anomalyclip.PromptTraining(clip_large.model, learner)
    side, n_patches = full.anomalyclip_image_size, (full.anomalyclip_image_size // 14) ** 2
    assert n_patches == 1369
    batch = {
        "feature": torch.randn(2, 768),
        "tokens": F.normalize(torch.randn(2, 1, n_patches, 768), dim=-1),
        "mask": torch.zeros(2, side, side),
        "label": torch.tensor([0, 1]),
        "has_mask": torch.tensor([True, True]),
    }
    batch["mask"][1, 100:200, 100:200] = 1
    losses = module(batch)
    losses["loss"].backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2 * 12 * 768 + 8 * 4 * 768
    # The last deep prompt vectors replace contexts of later blocks; all of them see a gradient.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert not any(p.grad is not None for p in clip_large.model.parameters())


def test_both_streams_of_anomalyclip_at_518_px(full: profiles.Profile) -> None:
    import open_clip

    with torch.device("meta"):
        visual = open_clip.CLIP(**_config_of(full.clip_model)).visual.eval()
        images = torch.empty(full.anomalyclip_batch_size, 3, *[full.anomalyclip_image_size] * 2)
    settings = anomalyclip.filled_settings(visual, anomalyclip.DetectorSettings(image_size=518))
    assert (settings.first_dual_block, settings.taps) == (5, (24,))
    with torch.no_grad():
        feature, tokens = anomalyclip.dual_path(visual, images, first_dual_block=5, taps=(6, 12, 18, 24))
    assert feature.shape == (8, 768) and [tuple(t.shape) for t in tokens] == [(8, 1370, 768)] * 4


def _config_of(name: str) -> dict:
    import open_clip

    return {key: value for key, value in open_clip.get_model_config(name).items() if not key.startswith("_")}


IMAGEBIND_HUGE = {
    "embed_dim": 1024,
    "vision_cfg": {
        "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14, "image_size": 224,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24,
        "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip


def test_imagebind_huge_looks_at_a_picture(tmp_path: Path) -> None:
    """ViT-H, 632 million random numbers, through the loader's own way of filling a tower."""
    import open_clip

    with torch.device("meta"):
        shapes = open_clip.CLIP(**IMAGEBIND_HUGE).state_dict()
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    state = {
        key: torch.ones(tensor.shape) if "ln_" in key and key.endswith("weight") else _tiled(noise, tensor.shape)
        for key, tensor in shapes.items()
        if key.startswith("visual.")
    }
    assert sum(tensor.numel() for tensor in state.values()) == anomalygpt_plan.VICUNA_7B.n_eyes
    eyes = imagebind.image_tower(imagebind.build_clip(IMAGEBIND_HUGE, state, part="visual"))
    found = eyes.embed_images([np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)])
    assert found.embedding.shape == (1, 1024) and found.taps.shape == (4, 1, 256, 1280)
    assert found.taps.numel() == anomalygpt_plan.VICUNA_7B.tap_values
    torch.testing.assert_close(found.embedding.norm(dim=-1), torch.ones(1))
    assert found.taps.isfinite().all()


def _tiled(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Random numbers of any shape at the speed of a copy."""
    n = shape.numel()
    return noise.repeat(-(-n // len(noise)))[:n].reshape(shape)


# --- the language model and the head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(anomalygpt_plan.VICUNA_7B, torch.bfloat16), (anomalygpt_plan.VICUNA_13B, torch.float16)],
    ids=["7B", "13B"],
)
def test_the_whole_language_model_on_the_meta_device(size: anomalygpt_plan.ChainSize, dtype: torch.dtype) -> None:
    """32 or 40 blocks, forward and backward to the prompts: shapes and types fit, and it has the planned size."""
    with torch.device("meta"):
        model = _llama(size, size.n_layers, dtype).requires_grad_(False)
        embeds = torch.empty(8, 126, size.hidden, dtype=dtype, requires_grad=True)
        mask = torch.empty(8, 1, 126, 126, dtype=dtype)  # four axes: taken as it is, without a look at its values
        states = model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(states)
        logits.float().sum().backward()
    assert sum(p.numel() for p in model.parameters()) == size.n_blocks + size.n_vocabulary
    assert logits.shape == (8, 126, size.n_rows) and logits.dtype == dtype
    assert embeds.grad.shape == embeds.shape


def test_a_training_step_of_the_head_at_true_width(full: profiles.Profile) -> None:
    """Notebook 06's loss on a pair, with a language model of true width and one block: only the head gets gradients."""
    size, side = anomalygpt_plan.VICUNA_7B, anomalygpt.MAP_SIZE
    dtype = {"bf16": torch.bfloat16}[full.anomalygpt_precision]
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.device("meta"):
        model = _llama(size, 1, dtype)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)  # angles are no weights
    state = {name: _tiled(noise, tensor.shape) for name, tensor in _published_head(size.hidden).items()}
    head = anomalygpt.AnomalyHead.from_state(state)
    for parameter in model.parameters():
        parameter.data.copy_(_tiled(noise, parameter.shape) if parameter.ndim == 2 else torch.ones(parameter.shape))
    assert sum(p.numel() for p in head.parameters()) == size.n_head
    tokens = SimpleNamespace(bos_id=1, pad_id=0, encode=lambda text: [5, 6, 7])
    module = anomalygpt_training.HeadLoss(
        head, language.Language(model, tokens), torch.nn.Linear(1024, size.hidden), (16, 16)
    )
    texts = torch.tensor([[8, 9, 10, 11], [8, 9, 10, 0]])
    batch = {
        "embedding": F.normalize(torch.randn(2, 1024), dim=-1),
        "taps": torch.randn(4, 2, 256, 1280),
        "text": F.normalize(torch.randn(2, 2, 1024), dim=-1),
        "masks": torch.zeros(2, side, side),
        "ids": texts,
        "targets": torch.where(texts > 9, texts, anomalygpt_training.IGNORED),
        "few_shot": torch.rand(2, 16, 16),
    }
    losses = module(batch)
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32 and losses["loss"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert not any(p.grad is not None for p in model.parameters())


def _llama(size: anomalygpt_plan.ChainSize, n_layers: int, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.n_rows, hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=n_layers,
        num_attention_heads=size.n_heads,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def _published_head(hidden: int) -> dict[str, torch.Tensor]:
    """Names and shapes of the published checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {"prompt_learner.base_prompts": (9, hidden)}
    for tap in range(4):
        shapes |= {f"image_decoder.fc.{tap}.weight": (1024, 1280), f"image_decoder.fc.{tap}.bias": (1024,)}
    for number, (n_in, n_out) in enumerate(itertools.pairwise((1, 4, 16, 64, 256, 1024))):
        key = f"prompt_learner.meta_net.{3 * number}"
        shapes |= {f"{key}.weight": (n_out, n_in, 3, 3), f"{key}.bias": (n_out,)}
    shapes |= {"prompt_learner.meta_net.15.weight": (hidden, 1024, 5, 5), "prompt_learner.meta_net.15.bias": (hidden,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
