"""Every heavy step of the full profile on random weights in the published layouts: does it work, how fast, what memory.

    python tests/gpu_walk.py --size tiny                                      (a minute on any machine)
    python tests/gpu_walk.py --size true --skip-files                         (one GPU of 22 GB or more)
    python tests/gpu_walk.py --size true --device cpu --llm-layers 2          (files and towers at true size)

Prints one table: step, seconds, pictures, tokens or GB per second, peak memory of the GPU beside what the suite's own
memory check foretold (said where it is over 15 % off), and on which card. ``--skip-files`` builds the language model in
memory and writes only the small checkpoints; ``--skip`` leaves steps out of a short lease.
"""

from __future__ import annotations

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

import numpy as np
import pandas as pd
import tiny_weights as layouts
import torch
from PIL import Image

from helpers import data, files, profiles, weights
from helpers.data import images
from helpers.records import Sample
from helpers.weights import catalog, llama, mini, published, steps

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 2000, "clip": "art-vit-mini", "sides": (224, 224), "shard_bytes": 400_000, "precision": "fp32",
        "rank": 4, "pictures": (24, 4), "training_steps": 1,
        "imagebind": {"width": 32, "layers": 4, "text": 16, "text_layers": 2, "joint": 20},
        "prompts": {"channels": (2, 4, 4, 8, 8)},  # the published ones take seconds a step on a CPU
    },
    "true": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "clip": "ViT-L-14-336-quickgelu", "sides": (336, 518), "shard_bytes": 2_000_000_000,
        "precision": "bf16", "rank": 32, "pictures": (100, 32), "training_steps": 10, "imagebind": {}, "prompts": {},
    },
}  # fmt: skip
QUESTION = "Is there any anomaly in the image?"


class Walk:
    """Sizes, places and results of one walk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size, self.device = options, SIZES[options.size], options.device
        layers = options.llm_layers or self.size["num_hidden_layers"]
        keys = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        self.config = {key: self.size[key] for key in keys} | {"num_hidden_layers": layers, "rms_norm_eps": 1e-6}
        self.config["num_key_value_heads"] = self.config["num_attention_heads"]
        self.grown = self.config | {"vocab_size": self.config["vocab_size"] + 1}
        self.folder = Path(options.folder or tempfile.mkdtemp(prefix="gpu_walk_"))
        settings = profiles.WeightsSettings(shard_bytes=self.size["shard_bytes"], fuse_merge=False)
        params = {"dim": self.size["hidden_size"], "n_heads": self.size["num_attention_heads"], "n_layers": layers}
        files.write_json(self.folder / "llama" / "params.json", params | {"norm_eps": 1e-6, "vocab_size": -1})
        self.route = catalog.route(self.folder / "weights", settings, llama_folder=self.folder / "llama")
        self.precision = "fp32" if self.device == "cpu" else self.size["precision"]
        self.rows: list[tuple] = []
        self.normal = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
        self.noise: dict[tuple, torch.Tensor] = {}

    def step(self, name: str, do: Callable[[], Any], amount: float = 0, unit: str = "", planned_gb: float = 0) -> Any:
        """Do one step, and note what it took; a skipped one gives None."""
        if name in self.options.skip:
            return None
        is_gpu = self.device.startswith("cuda")
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = do()
        if is_gpu:
            torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9 if is_gpu else 0.0
        amount = result if unit == "tokens" and isinstance(result, int) else amount
        speed = f"{amount / seconds:,.2f} {unit}/s" if amount else ""
        off = abs(peak - planned_gb) / planned_gb if is_gpu and planned_gb else 0.0
        told = f"{planned_gb:.1f} (off by {off:.0%})" if off > 0.15 else f"{planned_gb:.1f}" if planned_gb else ""
        self.rows.append((name, round(seconds, 1), speed, f"{peak:.1f}" if is_gpu else "", told))
        print(f"{name}: {seconds:.1f} s {speed}", flush=True)
        return result

    def random(self, shape: tuple[int, ...], std: float, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """Random numbers of any shape at the speed of a copy."""
        n = math.prod(shape)
        if (std, dtype) not in self.noise:
            self.noise[std, dtype] = (self.normal * std).to(dtype)
        noise = self.noise[std, dtype][n * 7919 % 1000 :]
        return (noise[:n] if n <= len(noise) else noise.repeat(-(-n // len(noise)))[:n]).reshape(shape).clone()

    # --- weights in the published layouts ---------------------------------------------------------------------------

    def write_small(self) -> None:
        """ImageBind, PandaGPT, AnomalyGPT: every key and shape as published."""
        eyes = layouts.imagebind_shapes(**self.size["imagebind"])
        width, joint = eyes["modality_heads.vision.2.weight"][::-1]
        hidden, rank = self.config["hidden_size"], self.size["rank"]
        shapes = {
            "imagebind": eyes,
            "pandagpt": layouts.pandagpt_shapes(self.config, rank=rank, n_image=joint),
            "anomalygpt": layouts.anomalygpt_shapes(hidden, joint=joint, width=width, **self.size["prompts"]),
        }
        for file in self.route.files:
            family = file.component.split("/")[0]
            if family in shapes:
                dtype = torch.float32 if family == "imagebind" else torch.float16
                state = {name: self._value(name, shape, dtype) for name, shape in shapes[family].items()}
                file.path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state, file.path)

    def _value(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        is_norm = name.endswith("weight") and len(shape) == 1
        return torch.ones(shape, dtype=dtype) if is_norm else self.random(shape, 0.02, dtype)

    def write_language(self) -> None:
        """Meta's shard with its params, the delta, and a tokenizer that fits the vocabulary."""
        self.write_tokenizer(self.route.llama_dir)
        shutil.copytree(self.route.llama_dir, self.route.delta_dir)
        (self.route.delta_dir / "params.json").unlink()
        shapes = llama.shapes_of(self.config)
        layer = [f"layers.{i}.{name}" for i in range(self.config["num_hidden_layers"]) for name in llama._LAYER]
        meta = [f"{name}.weight" for name in ("tok_embeddings", "norm", "output", *layer)]
        theirs = {llama.name_of(name): name for name in meta}
        base = {theirs[name]: self._value(name, shape, torch.float16) for name, shape in shapes.items()}
        torch.save(base, self.route.llama_dir / "consolidated.00.pth")
        del base
        change = {name: self.random(shape, 0.002) for name, shape in llama.shapes_of(self.grown).items()}
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
        fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
        folder.mkdir(parents=True, exist_ok=True)
        mini.write_tokenizer(folder, fields)

    def write_prompts(self, clip: Any) -> Path:
        """AnomalyCLIP's learned prompts for this CLIP, through the converter."""
        embedding = clip.model.token_embedding.weight.detach().float().cpu()
        width, state = embedding.shape[1], {}
        n_deep = round(len(clip.model.transformer.resblocks) * 2 / 3)
        for name, shape in layouts.anomalyclip_shapes(width, n_deep=n_deep).items():
            state[name.removeprefix("prompt_learner.")] = self.random(shape, 0.02, torch.float32)
        tokens = clip.tokenizer([f"{' '.join(['X'] * 12)} {name}." for name in ("object", "damaged object")])
        for row, side in enumerate(("pos", "neg")):
            state[f"token_prefix_{side}"] = embedding[tokens[row, :1]][None, None].clone()
            state[f"token_suffix_{side}"] = embedding[tokens[row, 13:]][None, None].clone()
            state[f"tokenized_prompts_{side}"] = tokens[row].to(torch.int32)[None, None].clone()
        raw = self.route.raw_dir / "anomalyclip.pth"
        raw.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"prompt_learner": state}, raw)
        folder = self.route.weights_dir / "anomalyclip" / "trained_on_mvtec"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier walk in this folder
        return published.convert("anomalyclip", raw, folder) / "model.safetensors"

    # --- the steps ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Notebook 01: everything written, accounted for, converted, merged and hashed again."""
        self.step("write the small checkpoints", self.write_small)
        if not self.options.skip_files:
            self.step("write LLaMA and the delta", self.write_language)
            n_gb = 2 * sum(math.prod(shape) for shape in llama.shapes_of(self.config).values()) / 1e9
            for file in self.route.files:
                if file.component == "vicuna" or file.path.exists():
                    steps._inspect(self.route, file, is_fetched=False)
            where = self.route.weights_dir
            base = self.step("convert Meta's files", lambda: steps.convert_base(self.route), n_gb, "GB")
            self.step("merge the delta", lambda: steps.merge(self.route, base), n_gb, "GB")
            self.step("hash Vicuna again", lambda: weights.require(where, "vicuna", verify=True), n_gb, "GB")
        self.step("convert the small checkpoints", self.convert_small)

    def convert_small(self) -> None:
        vicuna = self.route.weights_dir / "vicuna"
        if not (vicuna / "config.json").exists():  # a hole of the right size: only its length is ever looked at
            files.write_json(vicuna / "config.json", self.grown)
            with open(vicuna / "model.safetensors", "wb") as file:
                file.truncate(2 * sum(math.prod(shape) for shape in llama.shapes_of(self.grown).values()))
            files.write_json(vicuna / "READY.json", {"files": {}})
        for file in self.route.files:
            if file.path.exists() and file.component != "vicuna":
                steps._convert(self.route, file)

    def clip(self, pictures: list[np.ndarray]) -> None:
        """Notebooks 03 and 04: CLIP's features of 32 pictures, AnomalyCLIP's maps of 8."""
        from helpers.anomalyclip import detector, model
        from helpers.clip import backbones, features

        small, large = self.size["sides"]
        clip = backbones.load_clip(self.size["clip"], pretrained=None, image_size=small, device=self.device)
        models, n = features.Models(clip, None, self.folder / "features", 16), len(pictures)
        ids = [f"noise {i}" for i in range(n)]
        self.step("CLIP features", lambda: features.embed(ids, lambda i: pictures[i], models), n, "pictures")
        larger = dataclasses.replace(clip, preprocess=backbones.square_preprocess(large))
        ready = detector.build_detector(larger, model.load_prompts(self.write_prompts(clip), larger))
        scored = self.step("AnomalyCLIP maps", lambda: ready.score(pictures[:8]), min(n, 8), "pictures")
        assert scored is None or all(np.isfinite(one.anomaly_map).all() for one in scored)

    def anomalygpt(self, dataset: data.Dataset, pictures: list[np.ndarray]) -> None:
        """Notebooks 06 to 08: ten training steps at batch 8, 32 pictures with answers, a chat of three turns."""
        from helpers.anomalygpt import pairs, training

        model = self.step("load AnomalyGPT", lambda: self.load(self.precision), planned_gb=self.planned(1))
        n = self.options.training_steps
        n = self.size["training_steps"] if n is None else n
        settings = pairs.HeadTraining(
            batch_size=8, micro_batch=4, max_pairs=8 * n, n_tuning=0, patience=None, n_epochs=1
        )
        train = lambda: training.train_head(model, dataset, folder=self.folder / "head", settings=settings)  # noqa: E731
        if n:
            self.step(f"{n} training steps at batch 8", train, 16 * n, "pictures", self.planned(8, training=True))
        answer = lambda: self.answer(model, pictures)  # noqa: E731
        self.step(f"answers about {len(pictures)} pictures", answer, unit="tokens", planned_gb=self.planned(16))
        self.step("a chat of three turns", lambda: self.chat(model, pictures[0]), unit="tokens")

    def load(self, precision: str) -> Any:
        from helpers.anomalygpt import imagebind, language
        from helpers.anomalygpt import model as anomalygpt

        where = self.route.weights_dir
        if not self.options.skip_files:
            return anomalygpt.load(where, device=self.device, precision=precision)
        from transformers import LlamaConfig, LlamaForCausalLM

        eyes, lora = weights.require(where, "imagebind"), weights.require(where, "pandagpt")
        self.write_tokenizer(self.folder / "tokenizer")
        config = LlamaConfig(**self.grown)
        torch.set_default_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        with torch.device(self.device):
            speaker = LlamaForCausalLM(config)
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
        from helpers.anomalygpt import model as anomalygpt

        if not self.device.startswith("cuda"):
            return 0.0
        load = {"precision": self.precision, "batch_size": n_pictures, "training": training}
        told = anomalygpt.check_memory(self.route.weights_dir, device=self.device, **load)
        return float(re.search(r"about ([\d.]+) GB", told)[1])

    def answer(self, model: Any, pictures: list[np.ndarray]) -> int:
        """Number of tokens written."""
        written = 0
        for start in range(0, len(pictures), 16):
            answers = model.ask(model.look(pictures[start : start + 16]), QUESTION, max_new_tokens=16)
            written += sum(len(model.language.tokens.encode(text)) for text in answers)
        return written

    def chat(self, model: Any, picture: np.ndarray) -> int:
        history: list[tuple[str, str]] = []
        look = model.look([picture])
        for question in (QUESTION, "Where is it?", "Describe the picture."):
            history.append((question, model.ask(look, question, history=history, max_new_tokens=16)[0]))
        return sum(len(model.language.tokens.encode(text)) for _, text in history)

    def table(self) -> str:
        card = torch.cuda.get_device_name() if self.device.startswith("cuda") else f"CPU, {platform.machine()}"
        layers = self.config["num_hidden_layers"]
        columns = ["step", "seconds", "speed", "peak GPU GB", "planned GB"]
        head = f"random weights, {self.options.size} size, language model of {layers} layers, {card}"
        return f"{head}\n{pd.DataFrame(self.rows, columns=columns).to_string(index=False)}"


def paintings(folder: Path, n: int) -> tuple[data.Dataset, list[np.ndarray]]:
    """Smooth noise as pictures of one artwork, and the dataset of them."""
    samples, rng = [], np.random.default_rng(0)
    for i in range(n):
        small = rng.integers(40, 216, (6, 5, 3), np.uint8)
        large = np.asarray(Image.fromarray(small).resize((240, 288), Image.Resampling.BICUBIC))
        images.save_png(folder / f"{i:03d}.png", large)
        split = "train" if i < n * 5 // 6 else "calibration"
        samples.append(Sample(folder / f"{i:03d}.png", "noise", False, split=split, group=str(i)))
    data.write_manifest(folder, samples)
    return data.open_dataset(folder), [images.load_image(sample.image_path) for sample in samples[:64]]


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
