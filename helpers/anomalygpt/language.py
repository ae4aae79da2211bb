"""The language model of AnomalyGPT: Vicuna with PandaGPT's LoRA, the prompt layout, decoding.

The layout of the input, with the strings and the token boundaries that the weights were trained with:
``[bos] [### Human: <Img>] [image token] [</Img> ] [18 soft prompts] [question + "\\n### Assistant:"]``. Each piece is
tokenised on its own. An answer ends at ``\\n###``.

Source: Gu et al., AnomalyGPT, AAAI 2024; Su et al., PandaGPT, 2023; code CASIA-IVA-Lab/AnomalyGPT at f21c51b.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

BEFORE_IMAGE = "### Human: <Img>"
AFTER_IMAGE = "</Img> "
"""The trailing space is a token of its own in LLaMA's vocabulary."""
ANSWER_CUE = "\n### Assistant:"
ANSWER_END = "\n###"
PRECISIONS = ("fp32", "bf16", "fp16", "8bit", "4bit")
VICUNA_ROWS = 32001
GREEDY_TOP_P = 0.01


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
    def from_functions(
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        *,
        bos_id: int,
        eos_id: int,
        pad_id: int,
        answer_prefix: str,
    ) -> ChatTokens:
        """Derive the stop and yes/no ids from a tokenizer instead of trusting LLaMA's numbers."""
        sentence = encode(f"{answer_prefix}Yes.{ANSWER_END}")
        stop = next((i for i in sentence if "#" in decode([i])), None)
        if stop is None:
            raise ValueError("This tokenizer writes '###' without any token that holds '#'. Use the model's own one.")
        first = [encode(f"{answer_prefix}{word}")[0] for word in ("Yes", "No")]
        return ChatTokens(encode, decode, bos_id, eos_id, pad_id, frozenset([stop]), *first, answer_prefix)


def load_tokens(folder: Path) -> ChatTokens:
    """The tokenizer of a model folder.

    LLaMA's ``tokenizer.model`` is read with sentencepiece directly, as the original's slow tokenizer did; newer
    tokenizers differ for texts that begin with a space. Its bos and eos are 1 and 2, whatever the folder's
    ``special_tokens_map.json`` says (some Vicuna uploads set all of them to ``</s>``).

    Raises:
        FileNotFoundError: the folder has no tokenizer.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        n_pieces = model.get_piece_size()

        def decode(ids: Sequence[int]) -> str:
            return model.decode([i for i in ids if i < n_pieces and not model.is_control(i)])

        return ChatTokens.from_functions(model.encode, decode, bos_id=1, eos_id=2, pad_id=2, answer_prefix="")
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"No tokenizer in {folder}. Run notebook 01_prepare_weights.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode_fast(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    marks_words = tokenizer.convert_ids_to_tokens(encode("Yes"))[0].startswith("\u2581")
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if marks_words and bos_id == eos_id:  # the first Vicuna upload calls </s> the beginning, too
        bos_id, eos_id = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    return ChatTokens.from_functions(
        encode, decode_fast, bos_id=bos_id, eos_id=eos_id, pad_id=eos_id, answer_prefix="" if marks_words else " "
    )


@dataclass(frozen=True)
class Language:
    """A language model with its tokens.

    Attributes:
        model: ``LlamaForCausalLM``, frozen, LoRA merged.
        tokens: see :class:`ChatTokens`.
    """

    model: nn.Module
    tokens: ChatTokens

    @property
    def hidden(self) -> int:
        """Width of its embeddings."""
        return self.model.config.hidden_size

    @property
    def context(self) -> int:
        """Longest input plus output in positions."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Embeddings ``(n, hidden)`` of token ids."""
        return self.model.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long, device=self.device))


# --- loading ---------------------------------------------------------------------------------------------------------


def load_language(folder: Path, *, lora: Path | None = None, precision: str = "fp32", device: str = "cpu") -> Language:
    """Load a LLaMA model, merge a LoRA into it, freeze it.

    Merging changes logits by rounding only (1.5e-5 in float32) and saves two small products per layer and matrix at
    every token. It comes before quantisation, because adapters cannot be merged into 4-bit weights.

    Args:
        folder: Hugging Face folder of notebook 01.
        lora: PandaGPT's prepared folder, None for the bare model.
        precision: one of :data:`PRECISIONS`; ``"8bit"`` and ``"4bit"`` need a GPU and bitsandbytes.
        device: torch device name.
    Raises:
        FileNotFoundError: no such model or tokenizer.
        ValueError: unknown precision; a LLaMA-2 or other foreign base; LoRA weights that do not fit.
        RuntimeError: GPU memory ran out; names what to change.
    """
    import transformers

    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}.")
    if precision in ("8bit", "4bit") and not device.startswith("cuda"):
        raise ValueError(f"precision {precision!r} needs a GPU (bitsandbytes). On a CPU use 'fp32' or 'bf16'.")
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"No language model in {folder}. Run notebook 01_prepare_weights.")
    check_base(json.loads((folder / "config.json").read_text()), folder)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, torch.float16)
    quantised = precision in ("8bit", "4bit")
    place = "cpu" if quantised else device
    # transformers 5 calls the argument dtype, 4.53 torch_dtype.
    newer = int(transformers.__version__.split(".")[0]) >= 5
    with memory_errors("a smaller precision ('8bit' or '4bit')"):
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, **{"dtype" if newer else "torch_dtype": dtype}, device_map={"": place}
        )
        if lora is not None:
            model = merge_lora(model, _stored(lora), json.loads((Path(lora) / "config.json").read_text()))
        if quantised:
            model = _quantise(model, precision, device)
    return Language(model.eval().requires_grad_(False), load_tokens(folder))


def check_base(config: dict[str, Any], folder: Path | str = "the model") -> None:
    """Refuse language models that PandaGPT's and AnomalyGPT's weights were not made for.

    Vicuna v0 is LLaMA-1 with 2048 positions and 32001 rows; 32000 rows (the bare LLaMA-1, Vicuna v1.1) talk but were
    not trained with. LLaMA-2, CodeLlama and Vicuna 1.5 share the sizes but not the weights: answers become nonsense.

    Raises:
        ValueError: not a LLaMA architecture, or LLaMA-2's family.
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


def merge_lora(model: nn.Module, state: dict[str, torch.Tensor], config: dict[str, Any]) -> nn.Module:
    """Merge LoRA weights in the published layout into a model, every key accounted for.

    Args:
        model: ``LlamaForCausalLM``; its weights are changed in place.
        state: ``llama_model.base_model.model.*.lora_{A,B}.default.weight`` (the spelling of later peft versions,
            ``lora_A.weight``, is understood); other keys are ignored.
        config: keyword arguments of ``peft.LoraConfig``.
    Raises:
        ValueError: a key is missing or unknown, or a shape differs.
    """
    import peft

    with warnings.catch_warnings():
        # peft asks for it by its former name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    wanted = {k: p for k, p in wrapped.named_parameters() if "lora_" in k}
    found = {
        key.removeprefix("llama_model.")
        .replace("lora_A.weight", "lora_A.default.weight")
        .replace("lora_B.weight", "lora_B.default.weight"): tensor
        for key, tensor in state.items()
        if "lora_" in key
    }
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = [k for k in wanted.keys() & found.keys() if wanted[k].shape != found[k].shape]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"PandaGPT's LoRA has {len(found)} matrices, this language model needs {len(wanted)}: missing "
            f"{missing[:2]}, unexpected {unexpected[:2]}, other shape {sorted(reshaped)[:2]}. It belongs to a language "
            "model of another size; prepare the matching PandaGPT file in notebook 01."
        )
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(found[key])
    return wrapped.merge_and_unload()


def load_projection(lora: Path, *, device: str = "cpu") -> nn.Linear:
    """PandaGPT's projection of the image embedding to the language model's width, float32, frozen."""
    state = _stored(lora)
    return projection_from_state(state).to(device)


def projection_from_state(state: dict[str, torch.Tensor]) -> nn.Linear:
    """``llama_proj`` of a PandaGPT state dict.

    Raises:
        ValueError: the tensors are not there.
    """
    try:
        weight, bias = state["llama_proj.weight"].float(), state["llama_proj.bias"].float()
    except KeyError as error:
        raise ValueError(f"The PandaGPT weights lack {error}. Prepare them again with notebook 01.") from error
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return layer.requires_grad_(False)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = Path(folder) / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"No prepared PandaGPT weights in {folder}. Run notebook 01_prepare_weights.")
    return load_file(path)


def _quantise(model: nn.Module, precision: str, device: str) -> nn.Module:
    """Replace the linear layers of the blocks by bitsandbytes' ones; each is quantised on its way to the GPU."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"precision {precision!r} needs the package bitsandbytes: pip install bitsandbytes, or use 'fp16'."
        ) from error
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if not isinstance(layer, nn.Linear):
                    continue
                if precision == "4bit":
                    new = bitsandbytes.nn.Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float16,
                        quant_type="nf4", device="meta",
                    )  # fmt: skip
                    new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                else:
                    new = bitsandbytes.nn.Linear8bitLt(
                        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, device="meta"
                    )
                    new.weight = bitsandbytes.nn.Int8Params(
                        layer.weight.data, requires_grad=False, has_fp16_weights=False
                    )
                setattr(parent, name, new.to(device))
    return model.to(device)


@contextlib.contextmanager
def memory_errors(knob: str) -> Iterator[None]:
    """Turn "CUDA out of memory" into one sentence that names the knob to turn.

    Raises:
        RuntimeError: GPU memory ran out inside the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise RuntimeError(f"The GPU's memory is full. Use {knob}, then run this cell again.") from error


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
    speaker: Language, image_tokens: torch.Tensor, prompts: torch.Tensor, text_ids: Sequence[int]
) -> torch.Tensor:
    """Input embeddings ``(S, hidden)`` of one picture: see the module's layout.

    Args:
        speaker: the language model.
        image_tokens: ``(1, hidden)``.
        prompts: ``(18, hidden)``.
        text_ids: ids of question and cue, or of a whole training conversation.
    """
    tokens = speaker.tokens
    before = speaker.embed([tokens.bos_id, *tokens.encode(BEFORE_IMAGE)])
    after = speaker.embed(tokens.encode(AFTER_IMAGE))
    dtype = before.dtype
    pieces = [before, image_tokens.to(dtype), after, prompts.to(dtype), speaker.embed(text_ids)]
    return torch.cat(pieces)


def position_keys(speaker: Language, look_number: int, n_soft: int, text_ids: Sequence[int]) -> list[Hashable]:
    """What stands at each position of :func:`input_row`: prompts with equal keys have equal cached keys and values."""
    tokens = speaker.tokens
    before, after = [tokens.bos_id, *tokens.encode(BEFORE_IMAGE)], tokens.encode(AFTER_IMAGE)
    soft = [("look", look_number, i) for i in range(n_soft)]
    return [*before, soft[0], *after, *soft[1:], *text_ids]


# --- decoding --------------------------------------------------------------------------------------------------------


@dataclass
class PrefixMemory:
    """Keys and values of a chat's prompt so far; the next turn computes only what is new.

    Attributes:
        keys: what stands at each cached position.
        cache: transformers' cache, None before the first turn.
        n_reused: positions that the last turn did not have to compute.
    """

    keys: list[Hashable] = field(default_factory=list)
    cache: Any = None
    n_reused: int = 0


@torch.no_grad()
def next_logits(speaker: Language, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits float32 ``(B, vocabulary)`` of the token after each prompt; one padded pass for all.

    Args:
        speaker: the language model.
        rows: input embeddings ``(S_i, hidden)``.
    Raises:
        PromptTooLong: a prompt is longer than the context.
    """
    _check_length(speaker, rows, 1)
    embeds, mask = _pad_left(rows)
    with memory_errors("a smaller batch of pictures"):
        return _forward(speaker, embeds, mask, None).float()


@torch.no_grad()
def generate(
    speaker: Language,
    rows: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    top_p: float = GREEDY_TOP_P,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    on_tokens: Callable[[list[int]], None] | None = None,
    memory: PrefixMemory | None = None,
    keys: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Continue each prompt until its stop token, the end token or the length limit.

    Args:
        speaker: the language model.
        rows: input embeddings ``(S_i, hidden)``, decoded together (padded on the left).
        max_new_tokens: length limit.
        top_p, temperature, top_k: sampling; greedy with ``top_p <= 0.01``, ``temperature`` 0 or ``top_k`` 1.
        seed: of the sampling.
        on_tokens: called with the ids of the first row each time it grows.
        memory: prefix of a chat, only with one row; needs ``keys`` of its positions.
        keys: see :func:`position_keys`.
    Returns:
        new ids per row, stop and end tokens excluded.
    Raises:
        PromptTooLong: prompt and answer do not fit the context.
        ValueError: the sampling numbers make no sense.
    """
    if max_new_tokens < 1 or not 0 <= top_p <= 1 or temperature < 0 or top_k < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}, top_p {top_p}, temperature {temperature}, top_k {top_k}: allowed are at "
            "least 1, 0 to 1, at least 0, at least 1."
        )
    from transformers import DynamicCache

    _check_length(speaker, rows, max_new_tokens)
    tokens = speaker.tokens
    ends = tokens.stop_ids | {tokens.eos_id}
    embeds, mask = _pad_left(rows)
    cache = DynamicCache()
    if memory is not None:
        if len(rows) != 1 or keys is None:
            raise ValueError("A prefix memory belongs to one picture's chat: give one row and the keys of its prompt.")
        cache, n_known = _recall(memory, keys)
        embeds = embeds[:, n_known:]
    generator = torch.Generator().manual_seed(seed)
    greedy = top_p <= GREEDY_TOP_P or temperature == 0 or top_k == 1
    answers: list[list[int]] = [[] for _ in rows]
    open_rows = set(range(len(rows)))
    computed: list[int] = []
    with memory_errors("a smaller batch of pictures or a smaller max_new_tokens"):
        for number in range(max_new_tokens):
            logits = _forward(speaker, embeds, mask, cache).float()
            chosen = logits.argmax(dim=-1) if greedy else _sample(logits, top_p, temperature, top_k, generator)
            for row in sorted(open_rows):
                token = int(chosen[row])
                if token in ends:
                    open_rows.discard(row)
                    continue
                answers[row].append(token)
                if row == 0 and on_tokens is not None:
                    on_tokens(answers[0])
            if not open_rows or number == max_new_tokens - 1:
                break
            computed.append(int(chosen[0]))
            embeds = speaker.model.get_input_embeddings()(chosen)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    if memory is not None:
        memory.keys, memory.cache = [*keys, *computed], cache
    return answers


def _forward(speaker: Language, embeds: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits ``(B, vocabulary)`` of the last position; ``mask`` covers cached positions, too."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
    # The argument is past_key_values in transformers 4 and the first versions of 5, cache in later ones.
    name = "cache" if "cache" in inspect.signature(speaker.model.forward).parameters else "past_key_values"
    out = speaker.model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=cache is not None,
        logits_to_keep=1, **{name: cache},
    )  # fmt: skip
    return out.logits[:, -1]


def _recall(memory: PrefixMemory, keys: Sequence[Hashable]) -> tuple[Any, int]:
    """The cached prefix that this prompt shares, cut to length; the last position is always computed anew.

    The memory is emptied: an answer that fails half-way must not leave keys that its cache no longer has.
    """
    from transformers import DynamicCache

    n_known = 0
    for known, wanted in zip(memory.keys, list(keys)[:-1]):
        if known != wanted:
            break
        n_known += 1
    surplus, cache = len(memory.keys) - n_known, memory.cache
    memory.keys, memory.cache, memory.n_reused = [], None, n_known
    if n_known == 0:
        return DynamicCache(), 0
    if surplus:
        cache.crop(-surplus)  # newer transformers refuse the length to keep and want the number to drop
    return cache, n_known


def _sample(
    logits: torch.Tensor, top_p: float, temperature: float, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw from the top-k, then the nucleus of the distribution (top-p), on the CPU."""
    top_k = min(top_k, logits.shape[-1])
    values, ids = (logits.cpu() / temperature).topk(top_k, dim=-1)
    probability = values.softmax(dim=-1)
    # A token stays while the mass before it is below top_p, so the most likely one always stays.
    probability[probability.cumsum(dim=-1) - probability >= top_p] = 0.0
    drawn = torch.multinomial(probability, 1, generator=generator)
    return ids.gather(1, drawn)[:, 0].to(logits.device)


def _pad_left(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths -> ``(B, S, hidden)`` and mask int64 ``(B, S)``, padding on the left."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        embeds[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return embeds, mask


def _check_length(speaker: Language, rows: Sequence[torch.Tensor], n_new: int) -> None:
    longest = max(len(row) for row in rows)
    if longest + n_new > speaker.context:
        room = max(0, speaker.context - n_new)
        raise PromptTooLong(
            f"The prompt has {longest} positions and the answer may have {n_new}; the language model holds "
            f"{speaker.context}. Shorten the question to fit {room} positions or clear the history."
        )
