"""A tiny real dataset and small networks for the tests of the CLIP methods and of what builds on them."""

from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import tiny_dataset
import torch

from helpers.clip import one_class
from helpers.clip.backbones import Network, square_preprocess
from helpers.clip.features import Features
from helpers.clip.one_class import VIEW, Rows
from helpers.records import Sample

PLAN = {"train": ["good"] * 8, "calibration": ["good"] * 4, "test": ["good"] * 3 + ["box", "replica"]}
write_dataset = partial(tiny_dataset.write_dataset, categories=("harbour", "portrait"), plan=PLAN, shape=(40, 32))


def clip(*, seed: int = 0, quick_gelu: bool = True) -> Network:
    """A CLIP of 32 px and 4 x 4 patches."""
    torch.manual_seed(seed)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    towers = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu).eval().requires_grad_(False)
    return Network(towers, square_preprocess(32), f"tiny/{seed}/32", open_clip.get_tokenizer("ViT-B-32"))


def cnn(*, seed: int = 3) -> Network:
    """A CNN of 8 pooled features of 32 px."""
    torch.manual_seed(seed)
    pool = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), *pool)
    return Network(net.eval().requires_grad_(False), square_preprocess(32), f"small/{seed}/32")


KINDS = ("box", "line", "letter", "stain", "tear", "global")
QUICK = {
    "clip_resnet50": one_class.Cosine(),
    "clip_cross_entropy": one_class.Head(n_hidden=32, n_components=16, max_epochs=15),
    "clip_isolation_forest": one_class.Forest(n_trees=30),
    "clip_lof": one_class.Lof(),
    "clip_patch_knn": one_class.PatchKnn(),
}


def features_of(rows: np.ndarray, tag: str, seed: int = 0) -> Features:
    """Features whose three parts all carry ``rows`` ``(n, 6)`` in different directions."""
    rng, noise = np.random.default_rng(99), np.random.default_rng(seed)
    clip = 20.0 + rows @ rng.normal(size=(6, 24))
    cnn = 20.0 + rows @ rng.normal(size=(6, 40))
    patches = 3.0 + noise.normal(size=(len(rows), 4, 4, 12)) + 0.5 * (rows @ rng.normal(size=(6, 12)))[:, None, None]
    parts = clip.astype(np.float32), cnn.astype(np.float32), patches.astype(np.float16)
    return Features(tuple(f"{tag}{i}" for i in range(len(rows))), *parts, np.full((len(rows), 3), 0.01, np.float32))


def draw(n: int, shift: float, tag: str, seed: int) -> Features:
    rows = np.random.default_rng(seed).normal(size=(n, 6))
    rows[:, 0] += shift
    return features_of(rows, tag, seed)


def sample_of(i: int, *, split: str = "train", group: str = "", category: str = "art") -> Sample:
    return Sample(Path(f"{i}.png"), category, False, split=split, sha256=f"n{i}", group=group or f"g{i}")


def rows_of(n_train: int = 30, n_calibration: int = 10, *, n_sources: int | None = None, shift: float = 3.0) -> Rows:
    """Normals, a view of each training picture, and three anomalies of each, of 6 kinds in turn."""
    n = n_train + n_calibration
    groups = [f"g{i % (n_sources or n)}" for i in range(n)]
    samples = [sample_of(i, split="train" if i < n_train else "calibration", group=groups[i]) for i in range(n)]
    kinds = [KINDS[i % 6] for i in range(3 * n)]
    marks = Rows.of([samples[i // 3] for i in range(3 * n)], draw(3 * n, shift, "a", 2), kinds)
    views = Rows.of(samples[:n_train], draw(n_train, 0, "v", 21), [VIEW] * n_train)
    return Rows.join([Rows.of(samples, draw(n, 0, "n", 1)), views, marks])
