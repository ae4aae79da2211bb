"""Does a language model on disk really talk? Loaded as later notebooks load it, asked what has known answers.

One token would not do: at position 0 a model with wrongly ordered queries and keys gives exactly the right numbers.
All prompts have at least 16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.weights.tensors import WeightFileError

if TYPE_CHECKING:
    import torch

MIN_TOKENS = 16
MAX_NATS_PER_TOKEN = 2.8
"""Largest surprise per token on :data:`PASSAGE`. Measured on SmolLM2-135M: right 2.2; queries and keys both in Meta's
order 3.3; only one of them 9.8; base without delta 12.1; guessing among 49152 tokens 10.8. Larger models are lower."""

PASSAGE = (
    "The Mona Lisa is a portrait painting by the Italian artist Leonardo da Vinci. It hangs in the Louvre in Paris, "
    "where millions of visitors come to see it every year."
)
PROMPTS = (
    ("The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and", "Sunday"),
    ("Leonardo da Vinci painted the Mona Lisa, and it hangs in the Louvre, a museum in the city of", "Paris"),
)
_FIXED_TEXTS = ("### Human: <Img>", "</Img> ", "Is there any anomaly in the image?\n### Assistant:", "Yes, 3 cracks.")


@dataclass(frozen=True)
class Answer:
    """One question of the self-test.

    Attributes:
        prompt: what the model was given.
        n_tokens: its length in tokens.
        answer: what the model wrote.
        expected: word that must be in it.
    """

    prompt: str
    n_tokens: int
    answer: str
    expected: str

    @property
    def is_right(self) -> bool:
        return self.expected in self.answer


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`self_test`.

    Attributes:
        answers: the fixed prompts.
        nats_per_token: mean surprise on :data:`PASSAGE`; small is good.
    """

    answers: tuple[Answer, ...]
    nats_per_token: float

    def __str__(self) -> str:
        lines = [f"surprise {self.nats_per_token:.2f} nats per token (at most {MAX_NATS_PER_TOKEN})"]
        for answer in self.answers:
            mark = "ok" if answer.is_right else "WRONG"
            lines.append(f"[{mark}] {answer.prompt} ->{answer.answer.rstrip()!r}")
        return "\n".join(lines)


def self_test(folder: Path, *, device: str, n_new_tokens: int = 6) -> Report:
    """Load a model folder strictly, compare its tokenizer, and let it continue the fixed prompts.

    Args:
        folder: a prepared ``vicuna`` folder.
        device: torch device name; float16 on a GPU, float32 on a CPU.
        n_new_tokens: length of each continuation.
    Raises:
        WeightFileError: keys are missing or left over, the tokenizer differs from SentencePiece, or the model talks
            nonsense; says which.
    """
    import torch

    model, tokenizer = _load(Path(folder), device)
    _check_tokenizer(Path(folder), tokenizer)
    answers = []
    for prompt, expected in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        if ids.shape[1] < MIN_TOKENS:
            raise WeightFileError(
                f"{prompt!r} has {ids.shape[1]} tokens, the test needs {MIN_TOKENS}: wrong tokenizer?"
            )
        with torch.no_grad():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new_tokens, do_sample=False, pad_token_id=2
            )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(Answer(prompt, ids.shape[1], text, expected))
    report = Report(tuple(answers), nats_per_token(model, tokenizer, PASSAGE))
    if not (report.nats_per_token <= MAX_NATS_PER_TOKEN and all(answer.is_right for answer in answers)):
        raise WeightFileError(
            f"{folder} loads, but does not talk sensibly: wrong base, wrong delta or damaged files.\n{report}\n"
            f"Look at the notes in its READY.json, then prepare it again from verified files."
        )
    return report


def nats_per_token(model: torch.nn.Module, tokenizer: Any, text: str) -> float:
    """Mean negative log-likelihood of ``text``, in nats; nan counts as infinitely bad."""
    import torch

    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    return loss if loss == loss else float("inf")


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    import torch
    import transformers

    # transformers 5 renamed the argument; without it version 4 would load 7B as float32
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, low_cpu_mem_usage=True, **{name: dtype}
    )
    wrong = [
        f"{kind}: {sorted(map(str, info[kind]))[:3]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]
    ]
    if wrong:
        raise WeightFileError(f"{folder} is not one whole model: {'; '.join(wrong)}. Delete it and prepare it again.")
    return model.eval().to(device), transformers.AutoTokenizer.from_pretrained(folder)


def _check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """transformers must give the very ids of SentencePiece, which the models were trained with."""
    if not (folder / "tokenizer.model").exists():
        return  # a byte-level tokenizer; nothing else to compare with
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in _FIXED_TEXTS:
        expected, found = [1, *processor.encode(text)], tokenizer(text).input_ids
        if found != expected:
            raise WeightFileError(
                f"the tokenizer of {folder} gives {found} for {text!r}, SentencePiece gives {expected}. "
                f"Install sentencepiece and protobuf, restart, and prepare the folder again."
            )
