"""The language model of AnomalyGPT: Vicuna with PandaGPT's LoRA, the prompt layout, decoding.

The layout of the input, with the strings and the token boundaries that the weights were trained with:
``[bos] [### Human: <Img>] [image token] [</Img> ] [18 soft prompts] [question + "\\n### Assistant:"]``. Each piece is
tokenised on its own. An answer ends at ``\\n###``.

Source: Gu et al., AnomalyGPT, AAAI 2024; Su et al., PandaGPT, 2023; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import string
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from torch import nn

BEFORE_IMAGE = "### Human: <Img>"
AFTER_IMAGE = "</Img> "
"""The trailing space is a token of its own in LLaMA's vocabulary."""
ANSWER_CUE = "\n### Assistant:"
ANSWER_END = "\n###"
BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.1, "4bit": 0.65}
"""The precisions; of quantised ones with their scales and the layers that stay in 16 bit."""


class PromptTooLong(ValueError):
    """Prompt and answer do not fit the language model; the message says what to shorten."""


@dataclass(frozen=True)
class ChatTokens:
    """Text <-> token ids (without special tokens), and the ids with a meaning in the prompt."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]  # an answer ends at the first: the ## of \n### as this tokenizer writes it
    yes_id: int  # first token of an answer "Yes..."
    no_id: int
    answer_prefix: str = ""  # before trained answers: a space for byte-pair tokenizers; LLaMA's adds it by itself


def load_tokens(folder: Path) -> ChatTokens:
    """The tokenizer of a model folder. LLaMA's ``tokenizer.model`` is read with sentencepiece, as the original did:
    newer tokenizers differ for texts that begin with a space. Its bos and eos are 1 and 2, whatever the folder says
    (some Vicuna uploads set all to ``</s>``); padding is the end token."""
    if is_llama := (folder / "tokenizer.model").exists():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        encode, words = model.encode, range(3, model.get_piece_size())  # neither control tokens nor Vicuna's padding
        decode = lambda ids: model.decode([i for i in ids if i in words])  # noqa: E731
    else:
        from transformers import AutoTokenizer

        model = AutoTokenizer.from_pretrained(folder)
        encode = functools.partial(model.encode, add_special_tokens=False)
        decode = lambda ids: model.decode(list(ids), skip_special_tokens=True)  # noqa: E731
        is_llama = model.convert_ids_to_tokens(encode("Yes"))[0].startswith("\u2581")
    bos_id, eos_id, prefix = (1, 2, "") if is_llama else (model.bos_token_id, model.eos_token_id, " ")
    stop = next(i for i in encode(f"{prefix}Yes.{ANSWER_END}") if "#" in decode([i]))
    yes_id, no_id = (encode(f"{prefix}{word}")[0] for word in ("Yes", "No"))
    return ChatTokens(encode, decode, bos_id, eos_id, eos_id, frozenset([stop]), yes_id, no_id, prefix)


@dataclass(frozen=True)
class Language:
    """A frozen ``LlamaForCausalLM`` with its tokens; LoRA merged, or beside the weights when these are quantised."""

    model: nn.Module
    tokens: ChatTokens
    hidden = property(lambda self: self.model.config.hidden_size)  # width of its embeddings

    @property
    def decoder(self) -> nn.Module:
        """The blocks without the output layer, wherever peft put them."""
        return (self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model).model

    @property
    def surroundings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings ``(n, hidden)`` of what stands before and after the image token."""
        tokens = self.tokens
        return self.embed([tokens.bos_id, *tokens.encode(BEFORE_IMAGE)]), self.embed(tokens.encode(AFTER_IMAGE))

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Embeddings ``(n, hidden)`` of token ids."""
        table = self.model.get_input_embeddings()
        return table(torch.tensor(list(ids), dtype=torch.long, device=table.weight.device))


def load_language(folder: Path, *, lora: Path, precision: str = "fp32", device: str = "cpu") -> Language:
    """Load a LLaMA model with PandaGPT's LoRA, straight onto the device, and freeze it.

    The LoRA is merged; quantised weights keep it beside them. Measured on mini's model against fp32: kept in bf16 other
    words win at 2.3 % of the positions, in fp16 at 0.8 %; so fp16 is for answers, and bf16 for training, where fp16
    gradients would overflow. ValueError: a precision not in :data:`BYTES_PER_WEIGHT`, or not possible here.
    """
    import transformers

    if precision not in BYTES_PER_WEIGHT:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(BYTES_PER_WEIGHT)}.")
    # transformers 5 calls the argument dtype, 4.53 torch_dtype
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options: dict[str, Any] = {name: {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)}
    if quantised := precision in ("8bit", "4bit"):
        if not device.startswith("cuda") or importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"precision {precision!r} needs a GPU and bitsandbytes (pip install bitsandbytes). Without them use "
                "'fp16', on a CPU 'fp32' or 'bf16'."
            )
        kind = {"load_in_8bit": True} if precision == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.float16)
    with memory_errors("precision '8bit' or '4bit'"):
        model = transformers.LlamaForCausalLM.from_pretrained(folder, device_map={"": device}, **options)
        model = with_lora(model, lora)
        model = model if quantised else model.merge_and_unload()
    return Language(model.eval().requires_grad_(False), load_tokens(folder))


def with_lora(model: nn.Module, folder: Path) -> nn.Module:
    """A ``LlamaForCausalLM`` with PandaGPT's LoRA (peft's files, counted by notebook 01) beside its weights."""
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    config.lora_dropout = 0.0  # it is not trained here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls things of transformers by their older names
        return peft.PeftModel.from_pretrained(model, folder, config=config)


def load_projection(lora: Path) -> nn.Linear:
    """PandaGPT's projection of the image embedding to the language model's width, float32, frozen."""
    from safetensors.torch import load_file

    state = {key.removeprefix("llama_proj."): t.float() for key, t in load_file(lora / "model.safetensors").items()}
    layer = nn.Linear(*reversed(state["weight"].shape), device="meta")
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)


@contextlib.contextmanager
def memory_errors(knob: str) -> Iterator[None]:
    """Turn "CUDA out of memory" into one sentence that names the knob to turn, and let go of what filled the memory:
    a notebook keeps its last error with the frames of the failed call, and these every tensor."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        release_memory()
        full = RuntimeError(f"The GPU's memory is full. Use {knob}, then run this cell again.")
    else:
        return
    raise full


def prompt_text(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """The text after the soft prompts: earlier turns, the question, and the cue for the answer.

    >>> prompt_text("What is it?", [("Is it whole?", "No.")])
    'Is it whole?\\n### Assistant: No.\\n### Human: What is it?\\n### Assistant:'
    """
    turns = [f"{asked}{ANSWER_CUE} {answer}{ANSWER_END}" for asked, answer in history]
    return " Human: ".join([*turns, question]) + ANSWER_CUE


def clean_answer(text: str) -> str:
    """An answer without the separator at its end; the original always cut two tokens.

    >>> clean_answer("No, there is no anomaly.\\n##")
    'No, there is no anomaly.'
    """
    return text.strip().rstrip(f"#{string.whitespace}")


@torch.no_grad()
def next_logits(language: Language, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits float32 ``(B, vocabulary)`` of the token after each prompt ``(S_i, hidden)``; one padded pass for all."""
    inputs = _padded(language, rows, 1)
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with memory_errors("a smaller batch of pictures"):
        out = language.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
    return out.logits[:, -1].float()


@torch.no_grad()
def generate(
    language: Language, rows: Sequence[torch.Tensor], *, max_new_tokens: int,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue each prompt ``(S_i, hidden)`` with the most likely tokens until its stop token, the end token or the
    length limit: the new ids per row, without stop and end tokens. ``on_tokens`` gets those of a single row each time
    it grows. (The published chain samples from a nucleus of 0.01, which is the same.)"""
    from transformers import GenerationConfig, StoppingCriteriaList

    inputs, tokens = _padded(language, rows, max_new_tokens), language.tokens
    ends = {*tokens.stop_ids, tokens.eos_id}

    def tell(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        row = ids[0].tolist()
        if row[-1] not in ends:
            on_tokens(row)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # nothing is stopped by it

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, bos_token_id=tokens.bos_id, pad_token_id=tokens.pad_id,
        eos_token_id=sorted(ends),
    )  # fmt: skip
    told = StoppingCriteriaList([tell] if on_tokens else [])
    with memory_errors("a smaller batch of pictures or a smaller max_new_tokens"):
        made = language.model.generate(**inputs, generation_config=settings, stopping_criteria=told)
    return [list(takewhile(lambda i: i not in ends, row)) for row in made.tolist()]


def _padded(language: Language, rows: Sequence[torch.Tensor], n_new: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths as inputs of the model, padded on the left; with ``n_new`` tokens they must fit."""
    longest, context = max(map(len, rows)), language.model.config.max_position_embeddings
    if longest + n_new > context:
        raise PromptTooLong(
            f"The prompt has {longest} positions and the answer may have {n_new}; the language model holds {context}. "
            f"Shorten the question to fit {max(0, context - n_new)} positions or clear the history."
        )
    embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = [nn.functional.pad(row.new_ones(len(row), dtype=torch.long), (longest - len(row), 0)) for row in rows]
    return {"inputs_embeds": embeds, "attention_mask": torch.stack(mask)}
