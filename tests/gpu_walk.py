"""Every heavy step of the full profile on random weights in the published layouts: does it work, how fast, what memory.

    python tests/gpu_walk.py --size tiny                                      (a minute on any machine)
    python tests/gpu_walk.py --size true --skip-files                         (one GPU of 22 GB or more)
    python tests/gpu_walk.py --size true --device cpu --llm-layers 2          (files and towers at true size)

Prints one table: step, seconds, pictures, tokens or GB per second, peak memory of the GPU beside what the suite's own
memory check foretold (said where it is over 15 % off), and on which card. ``--skip-files`` builds the language model in
memory and writes only the small checkpoints; ``--skip`` leaves steps out of a short lease.
"""

import argparse
import dataclasses
import math
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program

import cv2
import numpy as np
import pandas as pd
import tiny_clip
import tiny_weights as layouts
import torch

from helpers import data, files, profiles, weights
from helpers.anomalyclip import detector
from helpers.anomalyclip import model as anomalyclip
from helpers.anomalygpt import imagebind, language, pairs, training
from helpers.anomalygpt import model as anomalygpt
from helpers.clip import backbones, features
from helpers.data import images
from helpers.records import Sample
from helpers.weights import catalog, llama, mini, steps

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "llama": (64, 96, 2, 4, 2000), "clip": "art-vit-mini", "sides": (224, 224), "shard_bytes": 400_000,
        "precision": "fp32", "rank": 4, "pictures": (24, 4), "training_steps": 1,
        "imagebind": {"width": 32, "layers": 4, "text": 16, "text_layers": 2, "joint": 20},
        "prompts": {"channels": (2, 4, 4, 8, 8)},  # the published ones take seconds a step on a CPU
    },
    "true": {
        "llama": (4096, 11008, 32, 32, 32000), "clip": "ViT-L-14-336-quickgelu", "sides": (336, 518),
        "shard_bytes": 2_000_000_000, "precision": "bf16", "rank": 32, "pictures": (100, 32), "training_steps": 10,
        "imagebind": {}, "prompts": {},
    },
}  # fmt: skip
LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
QUESTIONS = ("Is there any anomaly in the image?", "Where is it?", "Describe the picture.")
NORMAL = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def random(name: str, shape: tuple[int, ...], std: float = 0.02, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Random numbers of any shape at the speed of a copy; the weight of a norm is 1."""
    n = math.prod(shape)
    if name.endswith("weight") and len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return (NORMAL.roll(n % 7919) * std).to(dtype).repeat(-(-n // len(NORMAL)))[:n].reshape(shape)


class Walk:
    """Sizes, places and results of one walk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size, self.device = options, SIZES[options.size], options.device
        self.config = dict(zip(LLAMA, self.size["llama"])) | {"rms_norm_eps": 1e-6}
        self.config["num_hidden_layers"] = options.llm_layers or self.config["num_hidden_layers"]
        self.config["num_key_value_heads"] = self.config["num_attention_heads"]
        self.grown = self.config | {"vocab_size": self.config["vocab_size"] + 1}
        self.n_bytes = 2 * sum(math.prod(shape) for shape in llama.shapes_of(self.grown).values())
        self.folder = Path(options.folder or tempfile.mkdtemp(prefix="gpu_walk_"))
        settings = profiles.WeightsSettings(shard_bytes=self.size["shard_bytes"], fuse_merge=False)
        dim, _, _, n_heads, _ = self.size["llama"]
        params = {"dim": dim, "n_heads": n_heads, "n_layers": self.config["num_hidden_layers"], "norm_eps": 1e-6}
        files.write_json(self.folder / "llama" / "params.json", params | {"vocab_size": -1})
        self.route = catalog.route(self.folder / "weights", settings, llama_folder=self.folder / "llama")
        self.precision = "fp32" if self.device == "cpu" else self.size["precision"]
        self.rows: list[tuple] = []

    def step(self, name: str, do: Callable[[], Any], amount: float = 0, unit: str = "", planned_gb: float = 0) -> Any:
        """Do one step, and note what it took; a skipped one gives None."""
        if name in self.options.skip:
            return None
        is_gpu, began = self.device.startswith("cuda"), time.perf_counter()
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = do()
        if is_gpu:
            torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9 if is_gpu else 0.0
        amount = result if unit == "tokens" else amount
        speed = f"{amount / seconds:,.2f} {unit}/s" if amount else ""
        off = abs(peak - planned_gb) / planned_gb if planned_gb else 0.0
        told = f"{planned_gb:.1f}" + f" (off by {off:.0%})" * (off > 0.15) if planned_gb else ""
        self.rows.append((name, round(seconds, 1), speed, f"{peak:.1f}" if is_gpu else "", told))
        print(f"{name}: {seconds:.1f} s {speed}", flush=True)
        return result

    def write_small(self) -> None:
        """ImageBind, PandaGPT, AnomalyGPT: every key and shape as published."""
        eyes = layouts.imagebind_shapes(**self.size["imagebind"])
        width, joint = eyes["modality_heads.vision.2.weight"][::-1]
        shapes = {
            "imagebind": eyes,
            "pandagpt": layouts.pandagpt_shapes(self.config, rank=self.size["rank"], n_image=joint),
            "anomalygpt": layouts.anomalygpt_shapes(
                self.config["hidden_size"], joint=joint, width=width, **self.size["prompts"]
            ),
        }
        for file in self.route.files:
            family = file.component.split("/")[0]
            dtype = torch.float32 if family == "imagebind" else torch.float16
            state = {name: random(name, shape, dtype=dtype) for name, shape in shapes.get(family, {}).items()}
            if state:
                file.path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state, file.path)

    def write_language(self) -> None:
        """Meta's shard with its params, the delta, and a tokenizer that fits the vocabulary."""
        self.write_tokenizer(self.route.llama_dir)
        shutil.copytree(self.route.llama_dir, self.route.delta_dir)
        (self.route.delta_dir / "params.json").unlink()
        shapes = llama.shapes_of(self.config)
        layer = [f"layers.{i}.{name}" for i in range(self.config["num_hidden_layers"]) for name in llama._LAYER]
        theirs = {llama.name_of(f"{n}.weight"): f"{n}.weight" for n in ("tok_embeddings", "norm", "output", *layer)}
        base = {theirs[name]: random(name, shape) for name, shape in shapes.items()}
        torch.save(base, self.route.llama_dir / "consolidated.00.pth")
        change = {name: random("", shape, 0.002) for name, shape in llama.shapes_of(self.grown).items()}
        torch.save(change, self.route.delta_dir / "pytorch_model.bin")
        files.write_json(self.route.delta_dir / "config.json", self.grown)
        (delta,) = [file for file in self.route.files if file.path == self.route.delta_dir]
        there = {path.name: {"bytes": path.stat().st_size} for path in self.route.delta_dir.iterdir()}
        files.write_json(delta.list_path, there)  # as if the hub had been asked

    def write_tokenizer(self, folder: Path) -> None:
        """The beginning of SmolLM2's tokenizer, as long as the vocabulary."""
        import gguf

        fields = {name: field.contents() for name, field in gguf.GGUFReader(mini.find_smollm2()).fields.items()}
        tokens = fields["tokenizer.ggml.tokens"][: self.config["vocab_size"]]
        known = set(tokens)
        merges = [m for m in fields["tokenizer.ggml.merges"] if {m.replace(" ", ""), *m.split(" ")} <= known]
        folder.mkdir(parents=True, exist_ok=True)
        mini.write_tokenizer(folder, fields | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges})

    def prepare(self) -> None:
        """Notebook 01: everything written, accounted for, converted and merged."""
        self.step("write the small checkpoints", self.write_small)
        if not self.options.skip_files:
            self.step("write LLaMA and the delta", self.write_language)
            n_gb = self.n_bytes / 1e9
            for file in self.route.files:
                if file.component == "vicuna" or file.path.exists():
                    steps._inspect(self.route, file, is_fetched=False)
            base = self.step("convert Meta's files", lambda: steps.convert_base(self.route), n_gb, "GB")
            self.step("merge the delta", lambda: steps.merge(self.route, base), n_gb, "GB")
        self.step("convert the small checkpoints", self.convert_small)

    def convert_small(self) -> None:
        vicuna = self.route.weights_dir / "vicuna"
        if not (vicuna / "config.json").exists():  # a hole of the right size: only its length is ever looked at
            files.write_json(vicuna / "config.json", self.grown)
            with open(vicuna / "model.safetensors", "wb") as file:
                file.truncate(self.n_bytes)
            files.write_json(vicuna / "READY.json", {"files": {}})
        for file in self.route.files:
            if file.path.exists() and file.component != "vicuna":
                steps._convert(self.route, file)

    def clip(self, pictures: list[np.ndarray]) -> None:
        """Notebooks 03 and 04: CLIP's features of 32 pictures, AnomalyCLIP's maps of 8."""
        small, large = self.size["sides"]
        clip = backbones.load_clip(self.size["clip"], pretrained=None, image_size=small, device=self.device)
        cnn, n = tiny_clip.cnn(), len(pictures)
        cnn.model.to(self.device)
        models = features.Models(clip, cnn, self.folder / "features", 16)
        embed = lambda: features.embed([str(i) for i in range(n)], lambda i: pictures[i], models)  # noqa: E731
        self.step("CLIP features", embed, n, "pictures")
        larger = dataclasses.replace(clip, preprocess=backbones.square_preprocess(large))
        prompts = anomalyclip.PromptLearner(clip.model, clip.tokenizer, seed=1)
        ready = detector.build_detector(larger, prompts)
        scored = self.step("AnomalyCLIP maps", lambda: ready.score(pictures[:8]), min(n, 8), "pictures")
        assert scored is None or all(np.isfinite(one.anomaly_map).all() for one in scored)

    def anomalygpt(self, dataset: data.Dataset, pictures: list[np.ndarray]) -> None:
        """Notebooks 06 to 08: ten training steps at batch 8, 32 pictures with answers, a chat of three turns."""
        model = self.step("load AnomalyGPT", self.load, planned_gb=self.planned(1))
        n = self.options.training_steps
        n = self.size["training_steps"] if n is None else n
        settings = pairs.HeadTraining(
            batch_size=8, micro_batch=4, max_pairs=8 * n, n_tuning=0, patience=None, n_epochs=1
        )
        train = lambda: training.train_head(model, dataset, folder=self.folder / "head", settings=settings)  # noqa: E731
        if n:
            self.step(f"{n} training steps at batch 8", train, 16 * n, "pictures", self.planned(8, training=True))

        def ask(shown: list[np.ndarray], **more: Any) -> list[str]:
            return model.ask(model.look(shown), more.pop("question", QUESTIONS[0]), max_new_tokens=16, **more)

        def count(answers: list[str]) -> int:
            return sum(len(model.language.tokens.encode(text)) for text in answers)

        def chat() -> int:
            history: list[tuple[str, str]] = []
            for question in QUESTIONS:
                history.append((question, *ask(pictures[:1], question=question, history=history)))
            return count([answer for _, answer in history])

        batches = [pictures[start : start + 16] for start in range(0, len(pictures), 16)]
        answer = lambda: sum(count(ask(batch)) for batch in batches)  # noqa: E731
        self.step(f"answers about {len(pictures)} pictures", answer, unit="tokens", planned_gb=self.planned(16))
        self.step("a chat of three turns", chat, unit="tokens")

    def load(self) -> Any:
        where = self.route.weights_dir
        if not self.options.skip_files:
            return anomalygpt.load(where, device=self.device, precision=self.precision)
        from transformers import LlamaConfig, LlamaForCausalLM

        eyes, lora = weights.require(where, "imagebind"), weights.require(where, "pandagpt")
        self.write_tokenizer(self.folder / "tokenizer")
        torch.set_default_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision])
        with torch.device(self.device):
            speaker = LlamaForCausalLM(LlamaConfig(**self.grown))
        torch.set_default_dtype(torch.float32)
        speaker = language.with_lora(speaker, lora).merge_and_unload().eval().requires_grad_(False)
        head, name = anomalygpt.load_head(where, "train_supervised")
        tower, text = imagebind.load_imagebind(eyes, device=self.device)
        return anomalygpt.AnomalyGPT(
            tower, head.eval().to(self.device), language.load_projection(lora).to(self.device),
            language.Language(speaker, language.load_tokens(self.folder / "tokenizer")), text, name,
        )  # fmt: skip

    def planned(self, n_pictures: int, *, training: bool = False) -> float:
        """GB that the suite's own check foretells; 0 where it cannot be asked."""
        if not self.device.startswith("cuda"):
            return 0.0
        load = {"precision": self.precision, "batch_size": n_pictures, "training": training}
        told = anomalygpt.check_memory(self.route.weights_dir, device=self.device, **load)
        return float(re.search(r"about ([\d.]+) GB", told)[1])

    def table(self) -> str:
        card = torch.cuda.get_device_name() if self.device.startswith("cuda") else f"CPU, {platform.machine()}"
        layers, columns = self.config["num_hidden_layers"], ["step", "seconds", "speed", "peak GPU GB", "planned GB"]
        head = f"random weights, {self.options.size} size, language model of {layers} layers, {card}"
        return f"{head}\n{pd.DataFrame(self.rows, columns=columns).to_string(index=False)}"


def paintings(folder: Path, n: int) -> tuple[data.Dataset, list[np.ndarray]]:
    """Smooth noise as pictures of one artwork, and the dataset of them."""
    samples, pictures, rng = [], [], np.random.default_rng(0)
    for i in range(n):
        small = rng.integers(40, 216, (6, 5, 3), np.uint8)
        pictures.append(cv2.resize(small, (240, 288), interpolation=cv2.INTER_LINEAR))
        images.save_png(folder / f"{i:03d}.png", pictures[-1])
        split = "train" if i < n * 5 // 6 else "calibration"
        samples.append(Sample(folder / f"{i:03d}.png", "noise", False, split=split, group=str(i)))
    data.write_manifest(folder, samples)
    return data.open_dataset(folder), pictures


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--llm-layers", type=int, default=0, help="fewer blocks of the language model")
    parser.add_argument("--skip-files", action="store_true", help="build the language model in memory")
    parser.add_argument("--skip", action="append", default=[], help="name of a step, or: clip, anomalygpt")
    parser.add_argument("--pictures", type=int, default=0, help="for features and answers")
    parser.add_argument("--training-steps", type=int)
    parser.add_argument("--folder", help="where everything is written (default: a temporary folder)")
    walk = Walk(parser.parse_args(arguments))
    n_pictures, n_shown = walk.size["pictures"]
    dataset, pictures = paintings(walk.folder / "noise", n_pictures)
    pictures = pictures[: walk.options.pictures or n_shown]
    try:
        walk.prepare()
        if "clip" not in walk.options.skip:
            walk.clip(pictures)
        if "anomalygpt" not in walk.options.skip:
            walk.anomalygpt(dataset, pictures)
    finally:
        print(walk.table(), flush=True)
    return pd.DataFrame(walk.rows)


if __name__ == "__main__":
    main()
