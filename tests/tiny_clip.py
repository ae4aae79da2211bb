"""A tiny real dataset and small networks for the tests of the CLIP methods and of what builds on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import torch

from helpers import synthesis
from helpers.clip import backbones
from helpers.data import images
from helpers.data import manifest as data
from helpers.records import Sample

SHAPE = (40, 32)


def write_dataset(folder: Path, categories: tuple[str, ...] = ("harbour", "portrait")) -> data.Dataset:
    """Per painting 8 training, 4 calibration, 3 normal test pictures and a box and a replica."""
    samples = []
    for c, category in enumerate(categories):
        rng = np.random.default_rng(c)
        base = rng.integers(40, 200, (*SHAPE, 3)).astype(float)
        for i in range(17):
            picture = np.clip(base * rng.uniform(0.9, 1.1) + rng.normal(0, 4, base.shape), 0, 255).astype(np.uint8)
            split = "train" if i < 8 else "calibration" if i < 12 else "test"
            kind, mask_path = {15: "box", 16: "replica"}.get(i, "good"), None
            path = folder / category / ("test" if split == "test" else "train") / kind / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "box":
                picture, mask, _ = synthesis.synthesize(picture, "box", rng)
                mask_path = folder / category / "ground_truth" / "box" / f"{i:02d}_mask.png"
                mask_path.parent.mkdir(parents=True)
                images.save_png(mask_path, mask)
            elif kind == "replica":
                picture = 255 - picture
            images.save_png(path, picture)
            samples.append(Sample(path, category, kind != "good", mask_path, split, kind, f"{category}/{i}"))
    data.write_manifest(folder / "manifest.csv", samples)
    return data.open_dataset(folder)


def models(cache_dir: Path) -> dict:
    """A CLIP of 32 px and 4 x 4 patches and a CNN, with the options of :func:`helpers.clip.features.embed_images`."""
    vision = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, stride=4), torch.nn.ReLU(), torch.nn.Flatten())
        clip = open_clip.CLIP(16, vision, text)
    return {
        "clip": backbones.Clip(clip.eval().requires_grad_(False), None, backbones.square_preprocess(32), "tiny"),
        "cnn": backbones.Cnn(net.eval().requires_grad_(False), backbones.square_preprocess(20), "small", 16 * 16),
        "cache_dir": cache_dir,
        "batch_size": 64,
    }
