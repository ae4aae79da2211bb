"""AnomalyCLIP's dual-path pass against a plain transcription of its two attentions.

    python tests/benchmarks/bench_anomalyclip.py [--blocks 4] [--rounds 3]

True size: the blocks of ViT-L/14 (width 1024, 16 heads) at 518 px (1370 tokens), random weights, on the CPU. A stack of
a plain and some dual blocks stands for the tower, the last block being the tower's last, of which we compute the class
row alone. In so short a stack that trick weighs more than in 24 blocks, so the stack is also timed without it.
The transcription writes down what the method says: softmax(q k') v and softmax(v v') v as matrices, all rows of every
block, as the reference does. Tiny size: the small tower of ``mini``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.anomalyclip import model as anomalyclip


def plain_dual_path(visual: nn.Module, images: torch.Tensor, first_dual_block: int) -> torch.Tensor:
    """The two streams with attention matrices written out; patch tokens after the last block."""
    x = anomalyclip.embed_patches(visual, images)
    y = None
    for number, block in enumerate(visual.transformer.resblocks):
        attention = block.attn
        n_heads, width = attention.num_heads, x.shape[-1]
        hidden = block.ln_1(x)
        qkv = hidden @ attention.in_proj_weight.T + attention.in_proj_bias
        q, k, v = (part.unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scale = (width // n_heads) ** -0.5
        o = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v
        if number >= first_dual_block:
            c = ((v @ v.transpose(-2, -1)) * scale).softmax(dim=-1) @ v
            y = (x if y is None else y) + attention.out_proj(c.transpose(1, 2).flatten(2))
        x = x + attention.out_proj(o.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(y) @ visual.proj


def ours(visual: nn.Module, images: torch.Tensor, first_dual_block: int) -> torch.Tensor:
    n_blocks = len(visual.transformer.resblocks)
    return anomalyclip.dual_path(visual, images, first_dual_block=first_dual_block, taps=[n_blocks])[1][0]


def ours_all_rows(visual: nn.Module, images: torch.Tensor, first_dual_block: int) -> torch.Tensor:
    """Our blocks without the shortcut in the last one."""
    x, y = anomalyclip.embed_patches(visual, images), None
    for number, block in enumerate(visual.transformer.resblocks):
        if number < first_dual_block:
            x = block(x)
            continue
        before = x if y is None else y
        x, side = anomalyclip.dual_block(block, x, class_only=False, with_vv=True)
        y = before + side
    return visual.ln_post(y) @ visual.proj


def tower(*, image_size: int, patch_size: int, width: int, layers: int, head_width: int) -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": image_size, "patch_size": patch_size, "width": width, "layers": layers}
    text = {"width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(64, vision | {"head_width": head_width}, text, quick_gelu=True)
    return model.visual.eval().requires_grad_(False)


def seconds(functions: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """Median time of each function, taken in turns, so that a busy machine slows both."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(n_rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    title: str, visual: nn.Module, image_size: int, batch_size: int, first_dual_block: int, n_rounds: int
) -> None:
    images = torch.randn(batch_size, 3, image_size, image_size)
    functions = {
        "plain": lambda: plain_dual_path(visual, images, first_dual_block),
        "ours": lambda: ours(visual, images, first_dual_block),
        "all rows": lambda: ours_all_rows(visual, images, first_dual_block),
    }
    with torch.inference_mode():
        tokens = {name: function() for name, function in functions.items()}  # also warms up
        difference = (tokens["plain"] - tokens["ours"]).abs().max().item()
        times = seconds(functions, n_rounds)
    per_image = ", ".join(f"{name} {value / batch_size:.4f} s" for name, value in times.items())
    print(
        f"{title}: {per_image} per image; ratio {times['plain'] / times['ours']:.2f}, "
        f"all rows {times['plain'] / times['all rows']:.2f}; tokens differ by {difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the stack at true size, the first one plain")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    mini = tower(image_size=112, patch_size=8, width=192, layers=8, head_width=64)
    compare("tiny (8 blocks, width 192, 112 px)", mini, 112, 8, anomalyclip.default_first_dual_block(8), 30)
    true = tower(image_size=336, patch_size=14, width=1024, layers=options.blocks, head_width=64)
    title = f"true size ({options.blocks} blocks of ViT-L/14, 518 px)"
    compare(title, true, 518, 1, 1, options.rounds)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
