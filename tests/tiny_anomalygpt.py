"""AnomalyGPT at the tiny sizes of the reference numbers, for the tests of its modules.

The published layout of ImageBind is renamed here, independently of notebook 01's converter.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt import model as anomalygpt

DESCRIPTION = (
    "This is a photo of a bottle for anomaly detection, which should be round, without any damage, flaw, defect, "
    "scratch, hole or broken part."
)
QUESTION = f"{DESCRIPTION} Is there any anomaly in the image?"
HISTORY = [("Is there any anomaly in the image?", "No.")]
SECOND_QUESTION = "What is it?"

# LLaMA's ids of the strings of the protocol, as the specification lists them.
_LLAMA_IDS = {
    "### Human: <Img>": [835, 12968, 29901, 529, 25518, 29958],
    "</Img> ": [1533, 25518, 29958, 29871],
    "Is there any anomaly in the image?\n### Assistant: No.\n### Human: What is it?\n### Assistant:": [
        *(1317, 727, 738, 29342, 14997, 297, 278, 1967, 29973, 13, 2277, 29937, 4007, 22137, 29901),
        *(1939, 29889, 13, 2277, 29937, 12968, 29901, 1724, 338, 372, 29973, 13, 2277, 29937, 4007, 22137, 29901),
    ],
}
CLIP_CONFIG = {
    "embed_dim": 32,
    "quick_gelu": False,
    "vision_cfg": {
        "layers": 8, "width": 48, "head_width": 12, "patch_size": 14, "image_size": 224, "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 54, "width": 32, "heads": 4, "layers": 3, "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip
LORA_CONFIG = {
    "r": 4, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "none", "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip


def part(fixture: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in fixture.items() if key.startswith(prefix)}


def imagebind_to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ImageBind's published names and shapes -> ``open_clip.CLIP``'s."""
    renamed = {}
    for key, tensor in state.items():
        if key == "modality_preprocessors.vision.rgbt_stem.proj.1.weight":
            renamed["visual.conv1.weight"] = tensor.sum(dim=2)
        elif key == "modality_preprocessors.vision.cls_token":
            renamed["visual.class_embedding"] = tensor.reshape(-1)
        elif key == "modality_preprocessors.vision.pos_embedding_helper.pos_embed":
            renamed["visual.positional_embedding"] = tensor[0]
        elif key == "modality_heads.vision.2.weight":
            renamed["visual.proj"] = tensor.T.contiguous()
        elif key == "modality_preprocessors.text.pos_embed":
            renamed["positional_embedding"] = tensor[0]
        elif key == "modality_heads.text.proj.1.weight":
            renamed["text_projection"] = tensor.T.contiguous()
        else:
            for pattern, new in (
                (r"^modality_trunks\.vision\.pre_transformer_layer\.0\.", "visual.ln_pre."),
                (r"^modality_trunks\.vision\.blocks\.", "visual.transformer.resblocks."),
                (r"^modality_heads\.vision\.0\.", "visual.ln_post."),
                (r"^modality_preprocessors\.text\.token_embedding\.", "token_embedding."),
                (r"^modality_trunks\.text\.blocks\.", "transformer.resblocks."),
                (r"^modality_heads\.text\.proj\.0\.", "ln_final."),
                (r"^modality_postprocessors\.text\.1\.log_logit_scale$", "logit_scale"),
                (r"\.norm_([12])\.", r".ln_\1."),
                (r"\.mlp\.fc1\.", ".mlp.c_fc."),
                (r"\.mlp\.fc2\.", ".mlp.c_proj."),
            ):
                key = re.sub(pattern, new, key)
            renamed[key] = tensor
    return renamed


def image(fixture: dict[str, torch.Tensor], name: str):
    """A picture of the fixture: uint8 ``(224, 224, 3)``, each stored pixel repeated 2 x 2."""
    return fixture[f"in.{name}_u8"].numpy().repeat(2, axis=0).repeat(2, axis=1)


def chat_tokens(fixture: dict[str, torch.Tensor]) -> language.ChatTokens:
    """The fixture's compacted vocabulary; any string but the protocol's is a KeyError."""
    compact = {real: c for c, real in enumerate(fixture["llama.ids_used"].tolist())}
    known = {text: [compact[i] for i in ids] for text, ids in _LLAMA_IDS.items()}
    masked = (fixture["train.target_ids"][0] == -100) & (fixture["train.input_ids"][0] != compact[2])
    known[f"{QUESTION}\n### Assistant:"] = fixture["train.input_ids"][0][masked].tolist()
    answers = ["No, there is no anomaly in the image.\n###"]
    answers.append("Yes, there is an anomaly in the image, at the bottom right of the image.\n###")
    for row, answer in enumerate(answers):
        targets = fixture["train.target_ids"][row]
        known[answer] = targets[targets != -100].tolist()
    return language.ChatTokens(
        known.__getitem__, lambda ids: " ".join(map(str, ids)), compact[1], compact[2], compact[2],
        frozenset([compact[2277]]), compact[3869], compact[1939],
    )  # fmt: skip


def llama_config(**changes):
    """The sizes of the fixture's language model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=69, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, **changes,
    )  # fmt: skip


def write_adapter(folder: Path, published: dict[str, torch.Tensor], config: dict) -> Path:
    """PandaGPT's LoRA under peft's names, as notebook 01 writes it."""
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    lora = {
        key.removeprefix("llama_model.").replace(".default.", "."): tensor.contiguous()
        for key, tensor in published.items()
        if "lora_" in key
    }
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    return folder


def llama(fixture: dict[str, torch.Tensor]):
    """The fixture's language model with its LoRA merged by the real loader's function."""
    import tempfile

    from transformers import LlamaForCausalLM

    state = part(fixture, "sd.llama_model.base_model.model.")
    model = LlamaForCausalLM(llama_config())
    model.load_state_dict({key: tensor for key, tensor in state.items() if "lora_" not in key})
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder), part(fixture, "sd."), LORA_CONFIG)
        return language.with_lora(model, adapter).merge_and_unload()


def build(path: Path) -> tuple[anomalygpt.AnomalyGPT, torch.nn.Module, dict[str, torch.Tensor]]:
    """The whole chain of a fixture file (it speaks of an "object"), CLIP's text tower, and the fixture."""
    fixture = load_file(path)
    towers = imagebind_to_open_clip(part(fixture, "sd.imagebind."))
    visual = {key: tensor for key, tensor in towers.items() if key.startswith("visual.")}
    rest = {key: tensor for key, tensor in towers.items() if not key.startswith("visual.")}
    weight, bias = fixture["sd.llama_proj.weight"], fixture["sd.llama_proj.bias"]
    projection = torch.nn.Linear(weight.shape[1], weight.shape[0])
    projection.load_state_dict({"weight": weight, "bias": bias})
    published = {k: v for k, v in part(fixture, "sd.").items() if k.startswith(("image_decoder", "prompt_learner"))}
    model = anomalygpt.AnomalyGPT(
        imagebind.image_tower(imagebind.build_clip(CLIP_CONFIG, visual, part="visual")),
        anomalygpt.AnomalyHead.from_state(published),
        projection.requires_grad_(False),
        language.Language(llama(fixture).eval().requires_grad_(False), chat_tokens(fixture)),
        fixture["text.feats_object"][0],
    )
    return model, imagebind.build_clip(CLIP_CONFIG, rest, part="text"), fixture


def about(model: anomalygpt.AnomalyGPT, fixture: dict[str, torch.Tensor], name: str) -> anomalygpt.AnomalyGPT:
    """The same chain with the text features of another name."""
    import dataclasses

    return dataclasses.replace(model, text=fixture[f"text.feats_{name}"][0])


def training_batch(model: anomalygpt.AnomalyGPT, fixture: dict[str, torch.Tensor], *, few_shot: bool):
    """The batch of the reference's training step: a normal picture and one with a marked rectangle."""
    features = model.image_tower.embed_images([image(fixture, "normal1"), image(fixture, "query")])
    masks = torch.zeros(2, 224, 224)
    masks[1, 120:168, 140:192] = 0.9
    masks[1, 20:60, 30:90] = 0.2
    masks[1, 30:40, 40:60] = 0.31
    batch = {
        "embedding": features.embedding,
        "taps": features.taps,
        "masks": masks,
        "ids": fixture["train.input_ids"].long(),
        "targets": fixture["train.target_ids"].long(),
    }
    if few_shot:
        pixels = model.image_tower.preprocess(image(fixture, "normal0"))[None]
        bank = anomalygpt.build_bank(model.image_tower.features(anomalygpt.rotations(pixels)).taps)
        similarity = anomalygpt.bank_similarity(features.taps, bank).mean(dim=0)
        batch["few_shot"] = 1 - similarity.unflatten(1, model.image_tower.grid)
    return batch


def talkative(model: anomalygpt.AnomalyGPT) -> anomalygpt.AnomalyGPT:
    """The same chain with a vocabulary of hashed words, so that any text can be asked; it never ends an answer."""
    import dataclasses
    import zlib

    def encode(text: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % 60 for word in re.findall(r"\w+|[^\w ]+", text)]

    tokens = language.ChatTokens(
        encode, lambda ids: " ".join(f"w{i}" for i in ids), 1, -1, 2, frozenset(), encode("Yes")[0], encode("No")[0]
    )
    return dataclasses.replace(model, language=language.Language(model.language.model, tokens))


def write_weights(folder: Path, path: Path) -> Path:
    """The tiny chain of a fixture in the folders of notebook 01, with a whole CLIP vocabulary and a word tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from helpers import files

    fixture = load_file(path)
    base = LlamaForCausalLM(llama_config())
    plain = part(fixture, "sd.llama_model.base_model.model.")
    base.load_state_dict({key: tensor for key, tensor in plain.items() if "lora_" not in key})
    base.save_pretrained(folder / "vicuna")
    words = ["<unk>", "<s>", "</s>", "Yes", "No", "#", "###", "."] + [f"w{i}" for i in range(61)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "vicuna")
    published = part(fixture, "sd.")
    towers = imagebind_to_open_clip(part(fixture, "sd.imagebind."))
    towers["token_embedding.weight"] = torch.randn(49408, 32, generator=torch.Generator().manual_seed(0))
    states = {
        "imagebind": towers,
        "pandagpt": {k: v for k, v in published.items() if k.startswith("llama_proj")},
        "anomalygpt/train_supervised": {
            k: v for k, v in published.items() if k.startswith(("image_decoder", "prompt_learner"))
        },
    }
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / name / "model.safetensors")
    text = CLIP_CONFIG["text_cfg"] | {"vocab_size": 49408}
    files.write_json(folder / "imagebind" / "config.json", CLIP_CONFIG | {"text_cfg": text})
    write_adapter(folder / "pandagpt", published, LORA_CONFIG)
    for name in ("vicuna", *states):
        there = {
            p.name: {"bytes": p.stat().st_size, "sha256": files.sha256_file(p)}
            for p in (folder / name).iterdir()
            if p.is_file()
        }
        ready = {"component": name, "files": there, "source": {}, "notes": [], "details": {}, "format": 1}
        files.write_json(folder / name / "READY.json", ready)
    return folder


def write_dataset(folder: Path):
    """Two artworks: 4 train and 4 calibration normals, 3 normal and 4 anomalous test pictures (one without mask)."""
    import numpy as np

    from helpers.data import images, manifest
    from helpers.records import Sample

    random = np.random.default_rng(1)
    samples = []
    for category in ("one", "two"):
        base = random.integers(60, 200, (8, 10, 3), dtype=np.uint8).repeat(12, axis=0).repeat(12, axis=1)
        for split, n in (("train", 4), ("calibration", 4), ("test", 7)):
            for i in range(n):
                picture = np.clip(base.astype(int) + random.integers(-9, 9, base.shape), 0, 255).astype(np.uint8)
                is_anomalous = split == "test" and i >= 3
                mask_path = None
                if is_anomalous:
                    top, left = 10 + 15 * (i - 3), 20 + 20 * (i - 3)
                    picture[top : top + 25, left : left + 25] = (250, 10, 10)
                    if i < 6:
                        mask = np.zeros(picture.shape[:2], dtype=bool)
                        mask[top : top + 25, left : left + 25] = True
                        mask_path = folder / f"{category}_{i}_mask.png"
                        images.save_png(mask_path, mask)
                path = folder / f"{category}_{split}_{i}.png"
                images.save_png(path, picture)
                kind = "box" if is_anomalous else "good"
                samples.append(Sample(path, category, is_anomalous, mask_path, split, kind, f"{category}{split}{i}"))
    manifest.write_manifest(folder / "manifest.csv", samples)
    return manifest.open_dataset(folder)
