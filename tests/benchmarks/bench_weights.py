"""Delta merge, bit for bit against load-all-and-add: CPU seconds and peak memory of each in a process of its own.

    python tests/benchmarks/bench_weights.py

Synthetic LLaMA shapes, about 1 GB a side in three ``.bin`` files. CPU seconds are the stable number on a busy machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

BEGIN = """
import pathlib, sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
import tiny_weights as tiny
folder = pathlib.Path({folder!r})
"""
MAKE = """
dims = {"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "n_layers": 14, "inner": 4096, "vocab": 32000}
base = tiny.hugging_face(tiny.meta_model(dims), dims)
tiny.write_hf(folder / "base", base, dims, n_files=3)
tiny.write_hf(folder / "delta", tiny.make_delta(base), dims, n_files=3)
"""
LOAD_ALL = """
base, delta = ({k: v for file in sorted((folder / name).glob("*.bin")) for k, v in torch.load(file).items()}
               for name in ("base", "delta"))
tiny.save_file(tiny.fastchat(base, delta), folder / "all.safetensors")
"""
STREAM = "from helpers import weights; weights.merge_delta(folder / 'base', folder / 'delta', folder / 'out')"
CHECK = "tiny.assert_same_bits(tiny.read_all(folder / 'out'), tiny.read_all(folder))"


def run(name: str, code: str, folder: str) -> None:
    tests = Path(__file__).resolve().parents[1]
    code = BEGIN.format(tests=str(tests), root=str(tests.parent), folder=folder) + code
    child = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"{name} ended with status {status}"
    print(f"{name}: {usage.ru_utime + usage.ru_stime:.1f} CPU s, peak {usage.ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, code in (("make", MAKE), ("load all", LOAD_ALL), ("stream", STREAM), ("bits are equal", CHECK)):
            run(name, code, folder)
