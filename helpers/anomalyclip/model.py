"""AnomalyCLIP on open_clip's own modules: the learned prompts, both passes through CLIP, and the probabilities.

Two prompts, "object" and "damaged object", are compared with an image. The score comes from CLIP's class token, the
map from patch tokens of a second stream beside the standard one, in which values attend to values (V-V attention).
Published behaviour is kept to the letter, slips included, because the published prompts were trained with it: deep
prompts are rounded to float16, the class feature skips ``ln_post``, the temperature is 0.07.
Source: Zhou et al., AnomalyCLIP, ICLR 2024 (arXiv:2310.18961); github.com/zqhang/AnomalyCLIP at 45ed4dd.

A CLIP comes in as the object of notebook 04: ``model`` (``open_clip.CLIP``), ``tokenizer``, ``preprocess`` (uint8 RGB
``(H, W, 3)`` -> float32 ``(3, S, S)``) and ``model_id``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import nn

TEMPERATURE = 0.07
"""Divides the cosine similarities; a constant of the method, CLIP's own logit scale is not used."""

_SIDES = {"pos": "object", "neg": "damaged object"}
"""The two texts, normal first; the published files call normal "pos" and abnormal "neg"."""


class PromptLearner(nn.Module):
    """The learned part, with the names of the published files: ``n_context`` vectors in front of each class name, and
    ``deep_length`` deep prompt vectors for the input of ``n_deep`` text blocks (by default 2/3 of them, 8 of 12).

    ``model`` and ``tokenizer`` are CLIP's, for the embeddings of the fixed words. The random start N(0, 0.02) leaves
    the global random state as it was.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Callable, *, n_context: int = 12, n_deep: int | None = None,
        deep_length: int = 4, seed: int = 111,
    ) -> None:  # fmt: skip
        super().__init__()
        check_clip(model)
        n_blocks = len(model.transformer.resblocks)
        n_deep = round(n_blocks * 2 / 3) if n_deep is None else n_deep
        if not 0 <= n_deep < n_blocks or deep_length > n_context:
            raise ValueError(
                f"{n_deep} deep prompts of length {deep_length} do not fit a text tower of {n_blocks} blocks and "
                f"{n_context} context vectors."
            )
        width = model.token_embedding.embedding_dim
        tokens = tokenizer([f"{'X ' * n_context}{words}." for words in _SIDES.values()])  # (2, 77)
        device = model.token_embedding.weight.device
        with torch.no_grad():
            embedded = model.token_embedding(tokens.to(device)).float().cpu()  # (2, 77, width)
        generator = torch.Generator().manual_seed(seed)
        for row, side in enumerate(_SIDES):
            start = torch.randn(1, 1, n_context, width, generator=generator) * 0.02
            self.register_parameter(f"ctx_{side}", nn.Parameter(start))
            self.register_buffer(f"token_prefix_{side}", embedded[row, :1].reshape(1, 1, 1, width).clone())
            self.register_buffer(f"token_suffix_{side}", embedded[row, 1 + n_context :][None, None].clone())
            self.register_buffer(f"tokenized_prompts_{side}", tokens[row].to(torch.int32)[None, None].clone())
        deep = [torch.randn(deep_length, width, generator=generator) * 0.02 for _ in range(n_deep)]
        self.compound_prompts_text = nn.ParameterList([nn.Parameter(start) for start in deep])
        self.to(device)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings ``(2, 77, width)`` before the positional embedding, normal first, and ids ``(2, 77)``."""
        normal = torch.cat([self.token_prefix_pos, self.ctx_pos, self.token_suffix_pos], dim=2)
        abnormal = torch.cat([self.token_prefix_neg, self.ctx_neg, self.token_suffix_neg], dim=2)
        ids = torch.cat([self.tokenized_prompts_pos, self.tokenized_prompts_neg], dim=1)
        return torch.cat([normal, abnormal], dim=1)[0], ids[0]


def encode_text(model: nn.Module, learner: PromptLearner) -> torch.Tensor:
    """Text features of the two prompts, float ``(2, embed_dim)``, normal first, not normalised.

    Tokens after the end mark cannot reach it through the causal mask, so they are cut off: a quarter of the work.
    """
    embedded, ids = learner()
    ends = ids.argmax(dim=-1)
    length = int(ends.max()) + 1
    hidden = embedded[:, :length] + model.positional_embedding[:length]
    mask = model.attn_mask[:length, :length]
    for number, block in enumerate(model.transformer.resblocks):
        if 1 <= number <= len(learner.compound_prompts_text):
            prompt = learner.compound_prompts_text[number - 1]
            # Expanded first, rounded second: each prompt's gradient is rounded before the two are added.
            deep = prompt.expand(2, -1, -1).half().to(hidden.dtype)
            hidden = torch.cat([hidden[:, :1], deep, hidden[:, 1 + deep.shape[1] :]], dim=1)
        hidden = block(hidden, attn_mask=mask)
    hidden = model.ln_final(hidden)
    return hidden[torch.arange(2, device=hidden.device), ends] @ model.text_projection


def load_prompts(path: Path, clip: Any) -> PromptLearner:
    """Prompts from a file in the published layout (safetensors, or the published ``.pth``), for a CLIP.

    ValueError: other keys or shapes, values that are not finite, or prompts of another CLIP (the embeddings of fixed
    words, stored in the file, differ from this CLIP's).
    """
    state = _read_state(Path(path))
    missing = sorted({"ctx_pos", "compound_prompts_text.0"} - state.keys())
    if missing:
        raise ValueError(f"{path} is no AnomalyCLIP prompt file: {missing[0]} is missing. Run 01_prepare_weights.")
    n_deep, deep_length = (
        sum(n.startswith("compound_prompts_text.") for n in state),
        len(state["compound_prompts_text.0"]),
    )
    sizes = {"n_context": state["ctx_pos"].shape[-2], "n_deep": n_deep, "deep_length": deep_length}
    learner = PromptLearner(clip.model, clip.tokenizer, **sizes)
    fixed = {name: tensor.clone() for name, tensor in learner.named_buffers()}
    try:
        learner.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit {clip.model_id}: {error} The published prompts belong to ViT-L-14-336-quickgelu."
        ) from error
    for name, expected in fixed.items():
        difference = (learner.get_buffer(name).double() - expected.double()).abs().max().item()
        if difference > 1e-3:  # float16 rounding of the embeddings at most
            raise ValueError(
                f"{path} was made with another CLIP: its {name} differs from that of {clip.model_id} by "
                f"{difference:.2g}. Use the CLIP weights that the prompts were trained with."
            )
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values that are not finite in {broken[0]}. Fetch or train it again.")
    return learner.requires_grad_(False)


def as_bytes(learner: PromptLearner) -> bytes:
    """Prompts as a safetensors file in the published layout; :func:`load_prompts` reads it."""
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in learner.state_dict().items()})


def prompts_hash(learner: PromptLearner) -> str:
    """SHA-256 of prompts, independent of the file that holds them."""
    return hashlib.sha256(as_bytes(learner)).hexdigest()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"No prompt file {path}. Run 01_prepare_weights, or train prompts in 04_anomalyclip.")
    if path.suffix == ".safetensors":
        state = safetensors.torch.load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state["prompt_learner"] if set(state) == {"prompt_learner"} else state
    # The published files carry projections that the published code never uses.
    return {name: tensor for name, tensor in state.items() if not name.startswith("compound_prompt_projections.")}


def interpolated_position(visual: nn.Module, grid: tuple[int, int]) -> torch.Tensor:
    """Positional embedding ``(1 + h * w, width)`` for another patch grid.

    Plain bilinear, as the published prompts were trained with; open_clip's own resizing is bicubic and antialiased
    and moves the maps by half their range. Always from the stored grid, never from an interpolated one.
    """
    stored = visual.positional_embedding
    side = round((stored.shape[0] - 1) ** 0.5)
    if (side, side) == grid:
        return stored
    rows = stored[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, width, side, side)
    rows = F.interpolate(rows, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([stored[:1], rows.flatten(2)[0].T])


def dual_path(
    visual: nn.Module, images: torch.Tensor, *, first_dual_block: int, taps: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Both streams of the vision tower in one pass.

    ``images`` float ``(B, 3, S, S)`` are preprocessed, S a multiple of the patch size; V-V attention runs from the
    zero-based ``first_dual_block`` on; ``taps`` are one-based. Returns the class feature ``(B, embed_dim)`` without
    ``ln_post``, and per tap the tokens ``(B, 1 + P, embed_dim)`` after it and projection, class row first.
    """
    blocks = visual.transformer.resblocks
    if not taps or not set(taps) <= set(range(1, len(blocks) + 1)):
        raise ValueError(f"taps are {tuple(taps)}; this tower allows block numbers from 1 to {len(blocks)}.")
    x = embed_patches(visual, images)
    tapped = {}
    for number, block in enumerate(blocks[:first_dual_block], start=1):
        x = tapped[number] = block(x)
    y = x
    for number, block in enumerate(blocks[first_dual_block:], start=first_dual_block + 1):
        x, side = dual_block(block, x, class_only=number == len(blocks))
        y = tapped[number] = y + side
    tokens = [visual.ln_post(tapped[tap]) @ visual.proj for tap in taps]
    return x[:, 0] @ visual.proj, tokens


def dual_block(block: nn.Module, x: torch.Tensor, *, class_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of the standard stream ``x`` ``(B, N, width)``, and what it adds to the V-V stream.

    ``class_only`` computes the standard stream for the class token alone: of the last block nothing else is read.
    """
    attention = block.attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    width, hidden = x.shape[-1], block.ln_1(x)
    if class_only:
        x = x[:, :1]

    def heads(rows: torch.Tensor, part: slice) -> torch.Tensor:  # (B, n, width) -> (B, heads, n, width / heads)
        return F.linear(rows, weight[part], bias[part]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    def out(attended: torch.Tensor) -> torch.Tensor:
        return block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))

    q = heads(hidden[:, : x.shape[1]], slice(width))
    k, v = heads(hidden, slice(width, 2 * width)), heads(hidden, slice(2 * width, None))
    x = x + out(F.scaled_dot_product_attention(q, k, v))
    return x + block.ls_2(block.mlp(block.ln_2(x))), out(F.scaled_dot_product_attention(v, v, v))


def embed_patches(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Patches, class token, position and ``ln_pre``: ``(B, 1 + P, width)``."""
    patch, side = visual.patch_size[0], images.shape[-1]
    if side % patch:
        fits = f"Use {side // patch * patch} or {side // patch * patch + patch}."
        raise ValueError(f"The image side is {side} px, the patches are {patch} px: a multiple is needed. {fits}")
    patches = visual.conv1(images)  # (B, width, h, w)
    position = interpolated_position(visual, tuple(patches.shape[-2:]))
    patches = patches.flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(len(images), 1, -1).to(patches.dtype)
    return visual.ln_pre(torch.cat([start, patches], dim=1) + position.to(patches.dtype))


def check_clip(model: nn.Module) -> None:
    """Refuse towers whose arithmetic is not CLIP's: no vision transformer, or a block without quick GELU."""
    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer):
        raise ValueError(f"AnomalyCLIP needs a vision transformer, got {type(visual).__name__}: use a ViT-L-14 CLIP.")
    for block in [*visual.transformer.resblocks, *model.transformer.resblocks]:
        if not isinstance(block, ResidualAttentionBlock) or not isinstance(block.mlp.gelu, QuickGELU):
            raise ValueError(
                f"A block of this CLIP is {type(block).__name__} with {type(block.mlp[1]).__name__}; OpenAI's weights "
                "need quick GELU. Use a model name that ends in -quickgelu."
            )


def abnormal_probability(features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Probability of the abnormal prompt, ``(...)`` in (0, 1), of features ``(..., embed_dim)``, not normalised: the
    softmax over two classes as one sigmoid. ``text`` ``(2, embed_dim)`` is normalised, normal first."""
    return torch.sigmoid(F.normalize(features, dim=-1) @ (text[1] - text[0]) / TEMPERATURE)


def enlarge(coarse: torch.Tensor, size: int) -> torch.Tensor:
    """Patch values ``(B, P)``, row by row, to pixels ``(B, size, size)``: bilinear, after the softmax."""
    grid = round(coarse.shape[1] ** 0.5)
    square = coarse.unflatten(1, (1, grid, grid))
    return F.interpolate(square, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
