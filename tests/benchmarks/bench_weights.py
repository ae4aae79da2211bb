"""Delta merge against load-all-and-add and against ``cp``: seconds, CPU seconds, peak memory, bytes written.

    python tests/benchmarks/bench_weights.py [--layers 14]

Synthetic LLaMA shapes, about 1 GB a side in three ``.bin`` files, base 32000 rows and delta 32001. Every run is its own
process with a cold page cache for its own files. CPU seconds are the stable number on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

REPOSITORY = Path(__file__).resolve().parents[2]
MAKE = """
import tiny_weights as tiny
dims = {{"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "n_layers": {layers}, "inner": 4096, "vocab": 32000}}
model = tiny.meta_model(dims)
tiny.write_meta(folder / "meta", model, dims, 2)
base = tiny.hugging_face(model, dims)
tiny.write_hf(folder / "base", base, dims, n_files=3)
tiny.write_hf(folder / "delta", tiny.make_delta(base), dims | {{"vocab": 32001}}, n_files=3)
"""
LOAD_ALL = """
import torch
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(folder / "base", torch_dtype=torch.float16)
delta = AutoModelForCausalLM.from_pretrained(folder / "delta", torch_dtype=torch.float16)
base.resize_token_embeddings(32001)
for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
    layer.weight.data[-1:] = 0
state = base.state_dict()
for name, value in delta.state_dict().items():
    state[name] += value
base.save_pretrained(folder / "out", max_shard_size="2GB")
"""
STREAM = "from helpers import weights; weights.merge_delta(folder / {base!r}, folder / 'delta', folder / 'out')"
CHECK = "from tiny_weights import *; assert_same_bits(read_all(folder / 'out'), read_all(folder / 'all'))"


def run(code: str, folder: Path) -> dict[str, float]:
    """Run code in a fresh process: wall and CPU seconds, peak resident memory, bytes written to disk."""
    os.sync()
    for path in folder.rglob("*.*"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    paths = f"import pathlib, sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests')!r}]\n"
    code = f"{paths}folder = pathlib.Path({str(folder)!r})\n{code}"
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"a run ended with status {status}"
    seconds = time.perf_counter() - begin
    cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9
    return {"seconds": seconds, "CPU s": cpu, "peak GB": memory, "written GB": usage.ru_oublock * 512 / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=14, help="14 layers are about 1 GB a side")
    layers = parser.parse_args().layers
    folder = Path(tempfile.mkdtemp(prefix="bench_weights_"))
    run(MAKE.format(layers=layers), folder)
    rows = {"cp": run("import subprocess; subprocess.run(['cp', '-r', folder / 'delta', folder / 'copy'])", folder)}
    rows["load all and add"] = run(LOAD_ALL, folder)
    (folder / "out").rename(folder / "all")
    for name, base in (("stream", "base"), ("stream from Meta's files", "meta")):
        rows[name] = run(STREAM.format(base=base), folder)
        run(CHECK, folder)
        shutil.rmtree(folder / "out")
    table = pd.DataFrame(rows).T
    print(f"bits equal to load all and add; {json.dumps(os.getloadavg())} load\n{table.round(2).to_string()}")
    n_output = sum(path.stat().st_size for path in (folder / "delta").glob("*.bin")) / 1e9
    stream = table.loc["stream"]
    assert stream["peak GB"] <= 0.9 and stream["written GB"] <= 1.05 * n_output
    assert stream["CPU s"] <= 0.5 * table.loc["load all and add", "CPU s"]
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
