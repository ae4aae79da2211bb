"""The language model of AnomalyGPT: Vicuna with PandaGPT's LoRA, the prompt layout, decoding.

The layout of the input, with the strings and the token boundaries that the weights were trained with:
``[bos] [### Human: <Img>] [image token] [</Img> ] [18 soft prompts] [question + "\\n### Assistant:"]``. Each piece is
tokenised on its own. An answer ends at ``\\n###``.

Source: Gu et al., AnomalyGPT, AAAI 2024; Su et al., PandaGPT, 2023; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

BEFORE_IMAGE = "### Human: <Img>"
AFTER_IMAGE = "</Img> "
"""The trailing space is a token of its own in LLaMA's vocabulary."""
ANSWER_CUE = "\n### Assistant:"
ANSWER_END = "\n###"
BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.1, "4bit": 0.65}
"""The precisions; of quantised ones with their scales and the layers that stay in 16 bit."""
VICUNA_ROWS = 32001
_ADAPTER = "adapter_model.safetensors"


class PromptTooLong(ValueError):
    """Prompt and answer do not fit the language model; the message says what to shorten."""


@dataclass(frozen=True)
class ChatTokens:
    """Text <-> token ids, and the ids with a meaning in the prompt.

    Attributes:
        encode: text -> ids, without special tokens.
        decode: ids -> text, special tokens dropped.
        bos_id, eos_id, pad_id: beginning, end, padding.
        stop_ids: an answer ends at the first of these: the ``##`` of ``\\n###`` as this tokenizer writes it.
        yes_id, no_id: first token of an answer ``Yes...`` / ``No...``.
        answer_prefix: put before a trained answer so that its first token is the one that follows ``Assistant:`` in
            running text: a space for byte-pair tokenizers, nothing for LLaMA's (which adds it by itself).
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]
    yes_id: int
    no_id: int
    answer_prefix: str = ""

    @staticmethod
    def of(
        encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str], bos_id: int, eos_id: int,
        answer_prefix: str,
    ) -> ChatTokens:  # fmt: skip
        """Derive the stop and yes/no ids from a tokenizer instead of trusting LLaMA's numbers; padding is eos."""
        stop = next((i for i in encode(f"{answer_prefix}Yes.{ANSWER_END}") if "#" in decode([i])), None)
        if stop is None:
            raise ValueError("This tokenizer writes '###' without any token that holds '#'. Use the model's own one.")
        yes_id, no_id = (encode(f"{answer_prefix}{word}")[0] for word in ("Yes", "No"))
        return ChatTokens(encode, decode, bos_id, eos_id, eos_id, frozenset([stop]), yes_id, no_id, answer_prefix)


def load_tokens(folder: Path) -> ChatTokens:
    """The tokenizer of a model folder.

    LLaMA's ``tokenizer.model`` is read with sentencepiece directly, as the original's slow tokenizer did; newer
    tokenizers differ for texts that begin with a space. Its bos and eos are 1 and 2, whatever the folder's
    ``special_tokens_map.json`` says (some Vicuna uploads set all of them to ``</s>``).

    Raises:
        FileNotFoundError: the folder has no tokenizer.
    """
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        n_pieces = model.get_piece_size()

        def decode(ids: Sequence[int]) -> str:
            return model.decode([i for i in ids if i < n_pieces and not model.is_control(i)])

        return ChatTokens.of(model.encode, decode, 1, 2, "")
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"No tokenizer in {folder}. Run notebook 01_prepare_weights.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    marks_words = tokenizer.convert_ids_to_tokens(encode("Yes"))[0].startswith("\u2581")
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if marks_words and bos_id == eos_id:  # the first Vicuna upload calls </s> the beginning, too
        bos_id, eos_id = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return ChatTokens.of(encode, lambda ids: decode(list(ids)), bos_id, eos_id, "" if marks_words else " ")


@dataclass(frozen=True)
class Language:
    """A language model with its tokens.

    Attributes:
        model: ``LlamaForCausalLM``, frozen; with LoRA merged, or beside the weights when these are quantised.
        tokens: see :class:`ChatTokens`.
    """

    model: nn.Module
    tokens: ChatTokens

    @property
    def hidden(self) -> int:
        """Width of its embeddings."""
        return self.model.config.hidden_size

    @property
    def decoder(self) -> nn.Module:
        """The blocks without the output layer, wherever peft put them."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return inner.model

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Embeddings ``(n, hidden)`` of token ids."""
        table = self.model.get_input_embeddings()
        return table(torch.tensor(list(ids), dtype=torch.long, device=table.weight.device))


# --- loading ---------------------------------------------------------------------------------------------------------


def load_language(folder: Path, *, lora: Path, precision: str = "fp32", device: str = "cpu") -> Language:
    """Load a LLaMA model with a LoRA, straight onto the device, and freeze it.

    In ``"fp32"``, ``"bf16"`` and ``"fp16"`` the LoRA is merged: logits change by rounding only, and two small products
    per layer and matrix are saved at every token. Quantised weights keep it beside them. Measured on mini's model
    against fp32: kept in bf16 other words win at 2.3 % of the positions, in fp16 at 0.8 %; so fp16 is for answers, and
    bf16 for training, where fp16 gradients would overflow.

    Args:
        folder: Hugging Face folder of notebook 01.
        lora: PandaGPT's prepared folder.
        precision: a key of :data:`BYTES_PER_WEIGHT`; ``"8bit"`` and ``"4bit"`` need a GPU and bitsandbytes.
        device: torch device name.
    Raises:
        FileNotFoundError: no such model or tokenizer.
        ValueError: unknown precision; a LLaMA-2 or other foreign base; LoRA weights that do not fit.
        RuntimeError: GPU memory ran out; names what to change.
    """
    import transformers

    if precision not in BYTES_PER_WEIGHT:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(BYTES_PER_WEIGHT)}.")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"No language model in {folder}. Run notebook 01_prepare_weights.")
    check_base(json.loads((folder / "config.json").read_text()), folder)
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
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a LoRA kept beside quantised weights brings its own; it is not trained here
    return Language(model.eval().requires_grad_(False), load_tokens(folder))


def check_base(config: dict[str, Any], folder: Path | str = "the model") -> None:
    """Refuse language models that PandaGPT's and AnomalyGPT's weights were not made for, with a ``ValueError``.

    Vicuna v0 is LLaMA-1 with 2048 positions and 32001 rows; 32000 rows (the bare LLaMA-1, Vicuna v1.1) talk but were
    not trained with. LLaMA-2, CodeLlama and Vicuna 1.5 share the sizes but not the weights: answers become nonsense.
    """
    if config.get("model_type") != "llama":
        raise ValueError(f"{folder} is a {config.get('model_type')!r} model; only the LLaMA architecture fits.")
    rows, positions = config.get("vocab_size", 0), config.get("max_position_embeddings", 0)
    if not 32000 <= rows <= 32016:
        return  # another vocabulary, as in mini
    if positions > 2048:
        raise ValueError(
            f"{folder} has {positions} positions: it is LLaMA-2, CodeLlama or Vicuna 1.5. PandaGPT and AnomalyGPT were "
            "made for Vicuna v0, which is LLaMA-1. Merge LLaMA-1 with the v0 delta in notebook 01."
        )
    if rows != VICUNA_ROWS:
        warnings.warn(
            f"{folder} has {rows} token rows, Vicuna v0 has {VICUNA_ROWS}: this is bare LLaMA-1 or a later Vicuna. It "
            "loads, but the published answers came from v0. Merge the v0 delta in notebook 01.",
            stacklevel=2,
        )


def with_lora(model: nn.Module, folder: Path) -> nn.Module:
    """A model with PandaGPT's LoRA beside its weights, as ``peft.PeftModel``.

    Args:
        model: ``LlamaForCausalLM``.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors`` under peft's names.
    Raises:
        FileNotFoundError: the folder holds no LoRA.
        ValueError: matrices are missing, left over, or of another shape.
    """
    import peft
    from safetensors import safe_open

    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"No prepared LoRA of PandaGPT in {folder}. Run notebook 01_prepare_weights.")
    problems, wrapped = [], model
    with warnings.catch_warnings(record=True) as heard, safe_open(folder / _ADAPTER, framework="numpy") as file:
        warnings.simplefilter("always")
        try:
            wrapped = peft.PeftModel.from_pretrained(model, folder)
        except RuntimeError as error:  # another shape
            problems.append(str(error))
        # peft warns of what is missing and is silent about what is left over
        problems += [str(w.message) for w in heard if "missing" in str(w.message)]
        n_stored, n_wanted = len(file.keys()), sum("lora_" in name for name, _ in wrapped.named_parameters())
    if problems or n_stored != n_wanted:
        told = " ".join(" ".join(problems).split())[:300]
        raise ValueError(
            f"PandaGPT's LoRA does not fit this language model: {n_stored} matrices for {n_wanted}. {told} It belongs "
            "to a model of another size, or its file is incomplete; prepare the matching file in notebook 01."
        )
    return wrapped


def load_projection(lora: Path) -> nn.Linear:
    """PandaGPT's projection of the image embedding to the language model's width, float32, frozen.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: its tensors are not in it.
    """
    from safetensors.torch import load_file

    path = lora / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"No prepared PandaGPT weights in {lora}. Run notebook 01_prepare_weights.")
    state = load_file(path)
    try:
        weight, bias = state["llama_proj.weight"].float(), state["llama_proj.bias"].float()
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}. Prepare PandaGPT again with notebook 01.") from error
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)


class memory_errors:
    """Turn "CUDA out of memory" into one sentence that names the knob to turn, and let go of what filled the memory.

    A notebook keeps its last error, the error the frames of the failed call, and these every tensor of the failed
    step: the frames are emptied, else the next try would meet the same full GPU.
    """

    def __init__(self, knob: str) -> None:
        self._knob = knob

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(trace)
            error.__traceback__ = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise RuntimeError(f"The GPU's memory is full. Use {self._knob}, then run this cell again.") from None


# --- the prompt ------------------------------------------------------------------------------------------------------


def prompt_text(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """The text after the soft prompts: earlier turns, the question, and the cue for the answer.

    >>> prompt_text("What is it?", [("Is it whole?", "No.")])
    'Is it whole?\\n### Assistant: No.\\n### Human: What is it?\\n### Assistant:'
    """
    turns = [f"{asked}{ANSWER_CUE} {answer}{ANSWER_END}" for asked, answer in history]
    return " Human: ".join([*turns, question]) + ANSWER_CUE


def clean_answer(text: str) -> str:
    """Drop the separator at the end of an answer, if it is there; the original always cut two tokens.

    >>> clean_answer("No, there is no anomaly.\\n##")
    'No, there is no anomaly.'
    """
    text = text.strip()
    while text.endswith("#"):
        text = text.rstrip("#").rstrip()
    return text


def input_row(
    language: Language, image_token: torch.Tensor, prompts: torch.Tensor, text_ids: Sequence[int]
) -> torch.Tensor:
    """Input embeddings ``(S, hidden)`` of one picture, see the module's layout: its image token ``(1, hidden)``, its
    prompts ``(18, hidden)``, and the ids of question and cue."""
    tokens = language.tokens
    before = language.embed([tokens.bos_id, *tokens.encode(BEFORE_IMAGE)])
    after = language.embed(tokens.encode(AFTER_IMAGE))
    return torch.cat([before, image_token.to(before), after, prompts.to(before), language.embed(text_ids)])


# --- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_logits(language: Language, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits float32 ``(B, vocabulary)`` of the token after each prompt ``(S_i, hidden)``; one padded pass for all."""
    _check_length(language, rows, 1)
    embeds, mask = _pad_left(rows)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with memory_errors("a smaller batch of pictures"):
        out = language.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
    return out.logits[:, -1].float()


def generate(
    language: Language,
    rows: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt with the most likely tokens until its stop token, the end token or the length limit.

    (The published chain samples from a nucleus of 0.01, which is the same.)

    Args:
        language: the language model.
        rows: input embeddings ``(S_i, hidden)``, decoded together (padded on the left).
        max_new_tokens: length limit, at least 1.
        on_tokens: called with the ids of a single row each time it grows.
    Returns:
        new ids per row, stop and end tokens excluded.
    Raises:
        PromptTooLong: prompt and answer do not fit the context.
    """
    from transformers import GenerationConfig

    _check_length(language, rows, max_new_tokens)
    tokens = language.tokens
    ends = {*tokens.stop_ids, tokens.eos_id}
    embeds, mask = _pad_left(rows)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, bos_token_id=tokens.bos_id, pad_token_id=tokens.pad_id,
        eos_token_id=sorted(ends),
    )  # fmt: skip
    streamer = None if on_tokens is None else _Streamer(lambda ids: ids[-1] not in ends and on_tokens(ids))
    with torch.no_grad(), memory_errors("a smaller batch of pictures or a smaller max_new_tokens"):
        made = language.model.generate(
            inputs_embeds=embeds, attention_mask=mask, generation_config=settings, streamer=streamer
        )
    return [list(takewhile(lambda i: i not in ends, row)) for row in made.tolist()]


class _Streamer:
    """What ``generate`` tells of each new token; the prompt comes first, as no ids at all."""

    def __init__(self, on_ids: Callable[[list[int]], Any]) -> None:
        self._on_ids, self._ids = on_ids, []

    def put(self, value: torch.Tensor) -> None:
        self._ids += value.flatten().tolist()
        if self._ids:
            self._on_ids(list(self._ids))

    def end(self) -> None:
        """Nothing is left to tell."""


def _pad_left(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths -> ``(B, S, hidden)`` and mask int64 ``(B, S)``, padding on the left."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        embeds[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return embeds, mask


def _check_length(language: Language, rows: Sequence[torch.Tensor], n_new: int) -> None:
    longest, context = max(len(row) for row in rows), language.model.config.max_position_embeddings
    if longest + n_new > context:
        raise PromptTooLong(
            f"The prompt has {longest} positions and the answer may have {n_new}; the language model holds {context}. "
            f"Shorten the question to fit {max(0, context - n_new)} positions or clear the history."
        )
