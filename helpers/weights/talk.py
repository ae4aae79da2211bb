"""Does a language model on disk really talk? Loaded as later notebooks load it, asked what has known answers.

At position 0 a model with wrongly ordered queries and keys gives exactly the right numbers: all prompts are longer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers

from helpers.weights.tensors import WeightFileError

MAX_NATS_PER_TOKEN = 2.8
"""Largest surprise per token on :data:`PASSAGE`. Measured on SmolLM2-135M: right 2.2; queries and keys both in Meta's
order 3.3; only one of them 9.8; base without delta 12.1; guessing among 49152 tokens 10.8. Larger models are lower."""

PASSAGE = (
    "The Mona Lisa is a portrait painting by the Italian artist Leonardo da Vinci. It hangs in the Louvre in Paris, "
    "where millions of visitors come to see it every year."
)
PROMPTS = {
    "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and": "Sunday",
    "Leonardo da Vinci painted the Mona Lisa, and it hangs in the Louvre, a museum in the city of": "Paris",
}
_FIXED_TEXTS = ("### Human: <Img>", "</Img> ", "Is there any anomaly in the image?\n### Assistant:", "Yes, 3 cracks.")


def self_test(folder: Path, *, device: str) -> float:
    """Load a model strictly, straight to its device in its own type, and let it recognise and finish fixed texts.

    Args:
        folder, device: a prepared ``vicuna`` folder, and torch's name of a device.
    Returns:
        mean surprise on :data:`PASSAGE` in nats per token; small is good.
    Raises:
        WeightFileError: says which of the three failed: keys, tokenizer, or speech.
    """
    model, tokenizer = _load(Path(folder), device)
    print("✓ it loads: every weight of the model is in the files, and no other")
    check_tokenizer(Path(folder), tokenizer)
    print("✓ its tokenizer gives the ids that it was trained with")
    surprise = nats_per_token(model, tokenizer, PASSAGE)
    answers = {prompt: _continue(model, tokenizer, prompt) for prompt in PROMPTS}
    wrong = [f"{text} ->{answers[text]!r}, not {word}" for text, word in PROMPTS.items() if word not in answers[text]]
    if surprise > MAX_NATS_PER_TOKEN or wrong:
        raise WeightFileError(
            f"{folder} loads, but does not talk sensibly: {surprise:.1f} nats per token on a text about the Mona Lisa "
            f"(at most {MAX_NATS_PER_TOKEN}; about 3 means queries and keys in the wrong order, 10 and more a base "
            f"without delta, or another delta). {'; '.join(wrong)} Prepare it again from other files."
        )
    print(f"✓ it reads English: surprise {surprise:.1f} a token (a broken conversion is above {MAX_NATS_PER_TOKEN})")
    for prompt, answer in answers.items():
        print(f"✓ {prompt} … {' '.join(answer.split())}")
    return surprise


def nats_per_token(model: torch.nn.Module, tokenizer: Any, text: str) -> float:
    """Mean negative log-likelihood of ``text``, in nats; nan counts as infinitely bad."""
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        return torch.nan_to_num(model(ids, labels=ids).loss.float(), nan=math.inf).item()


def _continue(model: torch.nn.Module, tokenizer: Any, prompt: str) -> str:
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    written = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=2)
    return tokenizer.decode(written[0, given.input_ids.shape[1] :], skip_special_tokens=True)


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    # transformers 5 renamed the argument; without it version 4 would load 7B as float32
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, device_map={"": device}, **{name: "auto"}
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := {kind: sorted(map(str, info[kind]))[:3] for kind in kinds if info.get(kind)}:
        raise WeightFileError(f"{folder} is not one whole model: {wrong}. Delete it and prepare it again.")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """WeightFileError unless transformers gives the very ids of SentencePiece, which the models were trained with."""
    if not (folder / "tokenizer.model").exists():
        return  # a byte-level tokenizer; nothing else to compare with
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in _FIXED_TEXTS:
        expected, found = [1, *processor.encode(text)], tokenizer(text).input_ids
        if found != expected:
            raise WeightFileError(
                f"the tokenizer of {folder} gives {found} for {text!r}, SentencePiece gives {expected}. Install "
                f"sentencepiece and protobuf, restart, and prepare the folder again."
            )
