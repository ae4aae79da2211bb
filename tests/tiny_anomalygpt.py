"""AnomalyGPT at the tiny sizes of the reference numbers, for the tests of its modules."""

import re
import tempfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import tiny_dataset
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import files
from helpers.anomalygpt import imagebind, language
from helpers.anomalygpt import model as anomalygpt
from helpers.weights import published

FIXTURE = Path(__file__).parent / "golden" / "anomalygpt_seed0.safetensors"
DESCRIPTION = (
    "This is a photo of a bottle for anomaly detection, which should be round, without any damage, flaw, defect, "
    "scratch, hole or broken part."
)
QUESTION = f"{DESCRIPTION} Is there any anomaly in the image?"
HISTORY = [("Is there any anomaly in the image?", "No.")]
SECOND_QUESTION = "What is it?"
_PLAN = {"train": ["good"] * 4, "calibration": ["good"] * 4, "test": ["good"] * 3 + ["box"] * 3 + ["bare"]}
write_dataset = partial(tiny_dataset.write_dataset, plan=_PLAN)

# LLaMA's ids of the strings of the protocol, as the specification lists them.
_LLAMA_IDS = {
    "### Human: <Img>": [835, 12968, 29901, 529, 25518, 29958],
    "</Img> ": [1533, 25518, 29958, 29871],
    "Is there any anomaly in the image?\n### Assistant: No.\n### Human: What is it?\n### Assistant:": [
        *(1317, 727, 738, 29342, 14997, 297, 278, 1967, 29973, 13, 2277, 29937, 4007, 22137, 29901),
        *(1939, 29889, 13, 2277, 29937, 12968, 29901, 1724, 338, 372, 29973, 13, 2277, 29937, 4007, 22137, 29901),
    ],
}
_NORM = {"norm_kwargs": {"eps": 1e-6}}
CLIP_CONFIG = {
    "embed_dim": 32, "quick_gelu": False,
    "vision_cfg": {"layers": 8, "width": 48, "head_width": 12, "patch_size": 14, "image_size": 224} | _NORM,
    "text_cfg": {"context_length": 77, "vocab_size": 54, "width": 32, "heads": 4, "layers": 3} | _NORM,
}  # fmt: skip
LORA_CONFIG = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "none", "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip
LLAMA_CONFIG = {
    "vocab_size": 69, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_CHANGED = {  # from ImageBind's form
    "visual.conv1.weight": lambda tensor: tensor.sum(dim=2), "visual.class_embedding": torch.flatten,
    "visual.positional_embedding": lambda tensor: tensor[0], "positional_embedding": lambda tensor: tensor[0],
    "visual.proj": lambda tensor: tensor.T.contiguous(), "text_projection": lambda tensor: tensor.T.contiguous(),
}  # fmt: skip


def part(fixture: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without it; under several, with theirs."""
    cut = prefixes[0] if len(prefixes) == 1 else ""
    return {key.removeprefix(cut): tensor for key, tensor in fixture.items() if key.startswith(prefixes)}


def imagebind_to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ImageBind's published names and shapes -> ``open_clip.CLIP``'s."""
    with torch.device("meta"):
        ours = open_clip.CLIP(**CLIP_CONFIG).state_dict()
    names = dict(zip(published.as_imagebind(ours), ours))  # the keys of the file come from the original code
    return {names[key]: _CHANGED.get(names[key], lambda same: same)(tensor) for key, tensor in state.items()}


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


def write_adapter(folder: Path, fixture: dict[str, torch.Tensor]) -> Path:
    """PandaGPT's LoRA under peft's names, and its projection, as notebook 01 writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lora = {k.replace(".default.", "."): t for k, t in part(fixture, "sd.llama_model.").items() if "lora_" in k}
    save_file(lora, folder / "adapter_model.safetensors")
    save_file(part(part(fixture, "sd."), "llama_proj.weight", "llama_proj.bias"), folder / "model.safetensors")
    files.write_json(folder / "adapter_config.json", LORA_CONFIG)
    return folder


def bare_llama(fixture: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The fixture's language model without its LoRA."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_CONFIG))
    state = part(fixture, "sd.llama_model.base_model.model.")
    model.load_state_dict({key: tensor for key, tensor in state.items() if "lora_" not in key})
    return model


def build(path: Path) -> tuple[anomalygpt.AnomalyGPT, torch.nn.Module, dict[str, torch.Tensor]]:
    """The whole chain of a fixture file (it speaks of an "object"), CLIP with both towers, and the fixture."""
    fixture = load_file(path)
    clip = imagebind.build_clip(CLIP_CONFIG, imagebind_to_open_clip(part(fixture, "sd.imagebind.")))
    with tempfile.TemporaryDirectory() as folder:
        llama = language.with_lora(bare_llama(fixture), write_adapter(Path(folder), fixture)).merge_and_unload()
        projection = language.load_projection(Path(folder))
    model = anomalygpt.AnomalyGPT(
        imagebind.image_tower(clip),
        anomalygpt.AnomalyHead.from_state(part(part(fixture, "sd."), "image_decoder", "prompt_learner")),
        projection,
        language.Language(llama.eval().requires_grad_(False), chat_tokens(fixture)),
        fixture["text.feats_object"][0],
    )
    return model, clip, fixture


def about(model: anomalygpt.AnomalyGPT, fixture: dict[str, torch.Tensor], name: str) -> anomalygpt.AnomalyGPT:
    """The same chain with the text features of another name."""
    return replace(model, text=fixture[f"text.feats_{name}"][0])


def training_batch(model: anomalygpt.AnomalyGPT, fixture: dict[str, torch.Tensor], *, few_shot: bool):
    """The batch of the reference's training step: a normal picture and one with a marked rectangle."""
    features = model.image_tower.embed_images([image(fixture, "normal1"), image(fixture, "query")])
    masks = torch.zeros(2, 224, 224)
    masks[1, 120:168, 140:192] = 0.9
    masks[1, 20:60, 30:90] = 0.2
    masks[1, 30:40, 40:60] = 0.31
    batch = {
        "embedding": features.embedding, "taps": features.taps, "masks": masks,
        "ids": fixture["train.input_ids"].long(), "targets": fixture["train.target_ids"].long(),
    }  # fmt: skip
    if few_shot:
        pixels = model.image_tower.preprocess(image(fixture, "normal0"))[None]
        bank = anomalygpt.build_bank(model.image_tower.features(anomalygpt.rotations(pixels)).taps)
        similarity = anomalygpt.bank_similarity(features.taps, bank).mean(dim=0)
        batch["few_shot"] = 1 - similarity.unflatten(1, model.image_tower.grid)
    return batch


def talkative(model: anomalygpt.AnomalyGPT) -> anomalygpt.AnomalyGPT:
    """The same chain with a vocabulary of hashed words, so that any text can be asked; it never ends an answer."""

    def encode(text: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % 60 for word in re.findall(r"\w+|[^\w ]+", text)]

    tokens = language.ChatTokens(
        encode, lambda ids: " ".join(f"w{i}" for i in ids), 1, -1, 2, frozenset(), encode("Yes")[0], encode("No")[0]
    )
    return replace(model, language=language.Language(model.language.model, tokens))


def talker() -> anomalygpt.AnomalyGPT:
    """A new chain that can be asked anything."""
    return talkative(build(FIXTURE)[0])


class GivenMaps:
    """Maps of another method: everywhere the darkest green or blue of the picture, times ``factor``."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.identity, self.asked = factor, f"times {factor}", []

    def unit_map(self, picture: np.ndarray, category: str) -> np.ndarray:
        self.asked.append((picture.shape, category))
        return np.full((224, 224), self.factor * picture[..., 1:].min() / 255, dtype=np.float32)


def write_weights(folder: Path, path: Path) -> Path:
    """The tiny chain of a fixture in the folders of notebook 01, with a whole CLIP vocabulary and a word tokenizer."""
    fixture = load_file(path)
    bare_llama(fixture).save_pretrained(folder / "vicuna")
    words = ["<unk>", "<s>", "</s>", "Yes", "No", "#", "###", "."] + [f"w{i}" for i in range(61)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "vicuna")
    towers = imagebind_to_open_clip(part(fixture, "sd.imagebind."))
    towers["token_embedding.weight"] = torch.randn(49408, 32, generator=torch.Generator().manual_seed(0))
    head = part(part(fixture, "sd."), "image_decoder", "prompt_learner")
    for name, state in {"imagebind": towers, "anomalygpt/train_supervised": head}.items():
        (folder / name).mkdir(parents=True)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / name / "model.safetensors")
    text = CLIP_CONFIG["text_cfg"] | {"vocab_size": 49408}
    files.write_json(folder / "imagebind" / "config.json", CLIP_CONFIG | {"text_cfg": text})
    write_adapter(folder / "pandagpt", fixture)
    for name in ("vicuna", "pandagpt", "imagebind", "anomalygpt/train_supervised"):
        written = {path.name: {"bytes": path.stat().st_size} for path in (folder / name).iterdir() if path.is_file()}
        files.write_json(folder / name / "READY.json", {"files": written})
    return folder
