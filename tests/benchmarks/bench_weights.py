"""Delta merge against load-all-and-add and against ``cp``: seconds, CPU seconds, peak memory, bytes written.

    python tests/benchmarks/bench_weights.py [--rounds 3] [--folder /tmp/bench]

Synthetic LLaMA shapes, about 1 GB a side in three ``.bin`` shards, base 32000 rows and delta 32001. Every run is its
own process with a cold page cache for its own files; ratios are taken within one round, and the medians are printed.
CPU seconds are the stable number on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STREAM = """
import sys; sys.path.insert(0, {root!r})
from helpers import weights
weights.merge_delta({base!r}, {delta!r}, {out!r}, log=lambda text: None)
"""
FUSED = STREAM.replace("{base!r}", "{meta!r}")
LOAD_ALL = """
import torch
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({base!r}, torch_dtype=torch.float16)
delta = AutoModelForCausalLM.from_pretrained({delta!r}, torch_dtype=torch.float16)
base.resize_token_embeddings(32001)
for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
    layer.weight.data[-1:] = 0
state = base.state_dict()
for name, value in delta.state_dict().items():
    state[name] += value
base.save_pretrained({out!r}, max_shard_size="2GB")
"""
COPY = "import subprocess; subprocess.run(['cp', '-r', {base!r}, {out!r}], check=True); subprocess.run(['sync'])"


def make_inputs(folder: Path, n_layers: int) -> None:
    """Random base and delta in the published formats."""
    import torch

    sys.path.insert(0, str(REPOSITORY / "tests"))
    sys.path.insert(0, str(REPOSITORY))
    import test_weights as tools

    dims = {"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "n_layers": n_layers, "inner": 4096, "vocab": 32000}
    model = tools.meta_model(dims)
    converted = tools.hugging_face(model, dims)
    tools.write_meta(folder / "meta", model, dims, 2)
    tools.write_hf(folder / "base", converted, dims, n_files=3)
    delta = tools.make_delta(converted, 1)
    tools.write_hf(folder / "delta", delta, dims, n_files=3)
    for name, rows in (("base", 32000), ("delta", 32001)):
        config = json.loads((folder / name / "config.json").read_text())
        config |= {"vocab_size": rows, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
        (folder / name / "config.json").write_text(json.dumps(config))
    torch.save({}, folder / "done")


def measure(code: str, folder: Path) -> dict[str, float]:
    """Run code in a fresh process: wall and CPU seconds, peak resident memory, bytes written to disk."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = code.format(
        root=str(REPOSITORY), meta=str(folder / "meta"), base=str(folder / "base"), delta=str(folder / "delta"),
        out=str(out),
    )  # fmt: skip
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"a run ended with status {status}:\n{errors}")
    return {
        "wall_s": time.perf_counter() - begin,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_gb": usage.ru_maxrss * 1024 / 1e9,
        "written_gb": usage.ru_oublock * 512 / 1e9,
    }


def check_bits(folder: Path) -> None:
    """Compare every tensor of the streamed merge with load-all-and-add, and say so."""
    import torch
    from safetensors.torch import load_file

    def read(path: Path) -> dict:
        return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}

    a, b = read(folder / "out"), read(folder / "reference")
    same = a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int16), b[k].view(torch.int16)) for k in a)
    print(f"{len(a)} tensors, bits equal to load-all-and-add: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=14, help="14 layers are about 1 GB a side")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench_weights_"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "done").exists():
        # In a process of its own: a child's peak memory is never below its parent's.
        maker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(folder, options.layers))
        maker.start()
        maker.join()
    n_output = sum(path.stat().st_size for path in (folder / "delta").glob("*.bin")) / 1e9
    runs: dict[str, list[dict[str, float]]] = {"cp": [], "load-all-and-add": [], "stream": [], "fused": []}
    for number in range(options.rounds):
        runs["cp"].append(measure(COPY, folder))
        runs["load-all-and-add"].append(measure(LOAD_ALL, folder))
        if number == 0:
            shutil.rmtree(folder / "reference", ignore_errors=True)
            (folder / "out").rename(folder / "reference")
        runs["stream"].append(measure(STREAM, folder))
        if number == 0:
            checker = multiprocessing.get_context("spawn").Process(target=check_bits, args=(folder,))
            checker.start()
            checker.join()
            shutil.rmtree(folder / "reference")
        runs["fused"].append(measure(FUSED, folder))
    print(f"\noutput {n_output:.2f} GB, {options.rounds} rounds, medians (range)")
    for name, results in runs.items():
        cells = []
        for key in results[0]:
            values = sorted(result[key] for result in results)
            cells.append(f"{key} {statistics.median(values):6.2f} ({values[0]:.2f}-{values[-1]:.2f})")
        print(f"{name:17s}", "  ".join(cells))

    def ratio(name: str, other: str, key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(runs[name], runs[other]))

    gates = {
        "peak memory in GB <= 0.9": (statistics.median(r["peak_rss_gb"] for r in runs["stream"]), 0.9),
        "bytes written / output <= 1.05": (statistics.median(r["written_gb"] for r in runs["stream"]) / n_output, 1.05),
        "CPU seconds / load-all-and-add <= 0.5": (ratio("stream", "load-all-and-add", "cpu_s"), 0.5),
        "wall / cp <= 10": (ratio("stream", "cp", "wall_s"), 10.0),
    }
    for name, (value, limit) in gates.items():
        print(f"{'ok  ' if value <= limit else 'MISS'} {name}: {value:.2f}")
    print(f"     wall / load-all-and-add: {ratio('stream', 'load-all-and-add', 'wall_s'):.2f}")
    print(f"     peak memory / load-all-and-add: {ratio('stream', 'load-all-and-add', 'peak_rss_gb'):.2f}")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
