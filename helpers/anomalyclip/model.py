"""AnomalyCLIP on open_clip's own modules: zero-shot anomaly scores and maps, and training of the prompts.

Two learned prompts, "object" and "damaged object", are compared with an image. The score comes from CLIP's class
token, the map from patch tokens of a second stream beside the standard one, in which values attend to values (V-V
attention). Published behaviour is kept to the letter, slips included, because the published prompts were trained with
it: deep prompts are rounded to float16, the class feature skips ``ln_post``, the temperature is 0.07.
Source: Zhou et al., AnomalyCLIP, ICLR 2024 (arXiv:2310.18961); github.com/zqhang/AnomalyCLIP at 45ed4dd.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from helpers import files as storage

if TYPE_CHECKING:
    from helpers.clip.backbones import Clip
    from helpers.data.manifest import Dataset
    from helpers.records import Sample
    from helpers.results import MethodResult

TEMPERATURE = 0.07
"""Divides the cosine similarities; a constant of the method, CLIP's own logit scale is not used."""

TEMPLATES = ("{}", "damaged {}")
"""Normal and abnormal text around the class name ``"object"``, in the order of the two text features."""

CALIBRATION = "calibration.json"
"""File beside the predictions with the calibration scores of each artwork."""

_SIDES = ("pos", "neg")  # the published files call normal "pos" and abnormal "neg"
_LAMBDA = 4.0
_LABEL_SMOOTHING = 1e-5


@dataclass(frozen=True)
class DetectorSettings:
    """What turns a picture into a map, beside the weights; the defaults are the published test settings.

    Args:
        image_size: side of the square input in pixels, a multiple of the patch size. Published: 518.
        first_dual_block: zero-based block from which V-V attention runs beside the standard path; None takes 5/24 of
            the depth, which is block 5 of ViT-L/14.
        taps: one-based blocks whose V-V stream gives a map; their maps are added. Empty: the last block alone, as the
            published numbers were made. The option of the paper's text is ``(6, 12, 18, 24)``.
        sigma: of the Gaussian that smooths the map, in pixels; 0 for none.
    Raises:
        ValueError: a value outside what is allowed.
    """

    image_size: int = 518
    first_dual_block: int | None = None
    taps: tuple[int, ...] = ()
    sigma: float = 4.0

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.sigma < 0:
            raise ValueError(f"image_size {self.image_size} and sigma {self.sigma} must be positive.")
        if len(set(self.taps)) != len(self.taps) or any(tap < 1 for tap in self.taps):
            raise ValueError(f"taps are {self.taps}; different block numbers from 1 on are allowed.")


# --- prompts ---------------------------------------------------------------------------------------------------------


class PromptLearner(nn.Module):
    """The learned part: context vectors of the two prompts and deep prompts; names as in the published files.

    Args:
        model: CLIP, for the embeddings of the fixed words.
        tokenizer: of this CLIP.
        n_context: learned vectors in front of the class name.
        n_deep: text blocks whose input gets deep prompts; None takes 2/3 of the depth (8 of 12).
        deep_length: deep prompt vectors per block.
        seed: of the random start, N(0, 0.02); the global random state stays as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable,
        *,
        n_context: int = 12,
        n_deep: int | None = None,
        deep_length: int = 4,
        seed: int = 111,
    ) -> None:
        super().__init__()
        check_clip(model)
        n_blocks = len(model.transformer.resblocks)
        n_deep = round(n_blocks * 2 / 3) if n_deep is None else n_deep
        if not 0 <= n_deep < n_blocks:
            raise ValueError(f"n_deep is {n_deep}; this text tower of {n_blocks} blocks allows 0 to {n_blocks - 1}.")
        if deep_length > n_context:
            raise ValueError(f"deep_length is {deep_length}; deep prompts overwrite at most the {n_context} contexts.")
        width = model.token_embedding.embedding_dim
        texts = [" ".join(["X"] * n_context) + " " + template.format("object") + "." for template in TEMPLATES]
        tokens = tokenizer(texts)  # (2, 77)
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
        rows = [
            torch.cat([getattr(self, f"{part}_{side}") for part in ("token_prefix", "ctx", "token_suffix")], dim=2)
            for side in _SIDES
        ]
        ids = torch.cat([getattr(self, f"tokenized_prompts_{side}") for side in _SIDES], dim=1)
        return torch.cat(rows, dim=1)[0], ids[0]


def encode_text(model: nn.Module, learner: PromptLearner) -> torch.Tensor:
    """Text features of the two prompts.

    Tokens after the end mark cannot reach it through the causal mask, so they are cut off before the first block: a
    quarter of the work, the same numbers.

    Returns:
        float ``(2, embed_dim)``, normal first, not normalised.
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


def load_prompts(path: Path, clip: Clip) -> PromptLearner:
    """Prompts from a file in the published layout, checked against the CLIP they are used with.

    Args:
        path: safetensors file, or a published ``.pth`` (read with ``weights_only=True``).
        clip: the CLIP whose text tower the prompts were trained through.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: other keys, another width, or prompts of another CLIP (the embeddings of the fixed words, stored
            in the file, differ from this CLIP's).
    """
    path = Path(path)
    state = {name: t for name, t in _read_state(path).items() if not name.startswith("compound_prompt_projections.")}
    deep = [name for name in state if re.fullmatch(r"compound_prompts_text\.\d+", name)]
    fixed = [f"{part}_{side}" for part in ("token_prefix", "token_suffix", "tokenized_prompts") for side in _SIDES]
    wanted = {f"ctx_{side}" for side in _SIDES} | set(fixed) | {f"compound_prompts_text.{i}" for i in range(len(deep))}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unexpected or not deep:
        raise ValueError(
            f"{path} is no AnomalyCLIP prompt file: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"{len(deep)} deep prompts. Run 01_prepare_weights to fetch the published one."
        )
    width, text_width = state["ctx_pos"].shape[-1], clip.model.token_embedding.embedding_dim
    if width != text_width:
        raise ValueError(
            f"{path} holds prompts of width {width}, the text tower of {clip.model_id} has {text_width}. "
            "The published prompts belong to ViT-L-14-336-quickgelu (768)."
        )
    learner = PromptLearner(
        clip.model,
        clip.tokenizer,
        n_context=state["ctx_pos"].shape[-2],
        n_deep=len(deep),
        deep_length=state["compound_prompts_text.0"].shape[0],
    )
    own = learner.state_dict()
    reshaped = [name for name in own if own[name].shape != state[name].shape]
    if reshaped:
        shapes = ", ".join(f"{n} {tuple(state[n].shape)}, not {tuple(own[n].shape)}" for n in sorted(reshaped)[:3])
        raise ValueError(f"{path} does not fit {clip.model_id}: {shapes}.")
    for name in fixed:
        error = (own[name].double() - state[name].to(own[name].device).double()).abs().max().item()
        if error > 1e-3:  # float16 rounding of the embeddings at most
            raise ValueError(
                f"{path} was made with another CLIP: its {name} differs from that of {clip.model_id} by {error:.2g}. "
                "Use the CLIP weights that the prompts were trained with."
            )
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values that are not finite in {broken[0]}. Fetch or train it again.")
    learner.load_state_dict(state)
    return learner.requires_grad_(False)


def save_prompts(learner: PromptLearner, path: Path) -> None:
    """Write prompts as safetensors in the published layout, atomically; :func:`load_prompts` reads them."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.state_dict().items()}
    with storage.atomic_path(path) as temporary:
        save_file(state, temporary)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"No prompt file {path}. Run 01_prepare_weights, or train prompts in 04_anomalyclip.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return dict(state["prompt_learner"]) if set(state) == {"prompt_learner"} else dict(state)


# --- the vision pass -------------------------------------------------------------------------------------------------


def default_first_dual_block(n_blocks: int) -> int:
    """Zero-based block from which V-V attention runs: 5 of 24, and the same share of other depths.

    >>> default_first_dual_block(24), default_first_dual_block(12), default_first_dual_block(6)
    (5, 2, 1)
    """
    return round(n_blocks * 5 / 24)


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

    Args:
        visual: open_clip ``VisionTransformer``.
        images: float ``(B, 3, S, S)``, preprocessed; S a multiple of the patch size.
        first_dual_block: zero-based.
        taps: one-based blocks.
    Returns:
        class feature ``(B, embed_dim)`` without ``ln_post``, and per tap the tokens ``(B, 1 + P, embed_dim)`` after
        ``ln_post`` and projection, class row first, patches row by row.
    Raises:
        ValueError: S is not a multiple of the patch size, or a tap that the tower does not have.
    """
    blocks = visual.transformer.resblocks
    _check_taps(taps, len(blocks))
    x = embed_patches(visual, images)
    y, tapped = None, {}
    last_vv = max(taps)
    for number, block in enumerate(blocks, start=1):
        is_last = number == len(blocks)
        if number <= first_dual_block:
            # Only the class row is read after the last block; a tap of the plain part reads all rows.
            x = block(x)
            if number in taps:
                tapped[number] = x
            continue
        if y is None:
            y = x
        x, side = dual_block(block, x, class_only=is_last, with_vv=number <= last_vv)
        if side is not None:
            y = y + side
        if number in taps:
            tapped[number] = y
    tokens = [visual.ln_post(tapped[tap]) @ visual.proj for tap in taps]
    return x[:, 0] @ visual.proj, tokens


def dual_block(
    block: nn.Module, x: torch.Tensor, *, class_only: bool, with_vv: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One block of the standard stream, and what it adds to the V-V stream.

    Args:
        x: standard stream ``(B, N, width)``.
        class_only: compute the standard stream for the class token alone (of the last block nothing else is read).
        with_vv: also compute the V-V addition ``(B, N, width)``.
    """
    attention = block.attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    width = x.shape[-1]
    hidden = block.ln_1(x)

    def heads(projected: torch.Tensor) -> torch.Tensor:  # (B, n, width) -> (B, heads, n, width / heads)
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    def out(attended: torch.Tensor) -> torch.Tensor:
        return block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))

    if class_only:
        q = F.linear(hidden[:, :1], weight[:width], bias[:width])
        k, v = F.linear(hidden, weight[width:], bias[width:]).chunk(2, dim=-1)
        x = x[:, :1]
    else:
        q, k, v = F.linear(hidden, weight, bias).chunk(3, dim=-1)
    q, k, v = heads(q), heads(k), heads(v)
    x = x + out(F.scaled_dot_product_attention(q, k, v))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, out(F.scaled_dot_product_attention(v, v, v)) if with_vv else None


def embed_patches(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Patches, class token, position and ``ln_pre``: ``(B, 1 + P, width)``."""
    _check_side(visual, images.shape[-2:])
    patches = visual.conv1(images)  # (B, width, h, w)
    position = interpolated_position(visual, tuple(patches.shape[-2:]))
    patches = patches.flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(len(images), 1, -1).to(patches.dtype)
    return visual.ln_pre(torch.cat([start, patches], dim=1) + position.to(patches.dtype))


def _check_side(visual: nn.Module, size: Sequence[int]) -> None:
    patch = visual.patch_size[0]
    for side in size:
        if side % patch or side == 0:
            low = max(side // patch, 1) * patch
            raise ValueError(
                f"The image side is {side} px, the patches are {patch} px: a multiple is needed. "
                f"Use {low} or {low + patch}."
            )


def _check_taps(taps: Sequence[int], n_blocks: int) -> None:
    wrong = [tap for tap in taps if not 1 <= tap <= n_blocks]
    if wrong or not taps:
        raise ValueError(f"taps are {tuple(taps)}; this tower allows block numbers from 1 to {n_blocks}.")


def check_clip(model: nn.Module) -> None:
    """Refuse towers whose arithmetic is not CLIP's."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    visual, text = getattr(model, "visual", None), getattr(model, "transformer", None)
    if not isinstance(visual, VisionTransformer) or text is None:
        raise ValueError(
            f"AnomalyCLIP needs a CLIP with a vision transformer, got {type(model).__name__} with "
            f"{type(visual).__name__}. Use ViT-L-14-336-quickgelu."
        )
    for block in [*visual.transformer.resblocks, *text.resblocks]:
        if not isinstance(block, ResidualAttentionBlock) or not isinstance(block.mlp.gelu, QuickGELU):
            raise ValueError(
                f"A block of this CLIP is {type(block).__name__} with {type(block.mlp[1]).__name__}; OpenAI's weights "
                "need quick GELU. Use a model name that ends in -quickgelu."
            )


# --- scores and maps -------------------------------------------------------------------------------------------------


def abnormal_probability(features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Probability of the abnormal prompt for each feature: the softmax over two classes as one sigmoid.

    Args:
        features: float ``(..., embed_dim)``, not normalised.
        text: float ``(2, embed_dim)``, normalised, normal first.
    Returns:
        float ``(...)`` in (0, 1), higher = more anomalous.
    """
    return torch.sigmoid(F.normalize(features, dim=-1) @ (text[1] - text[0]) / TEMPERATURE)


def _enlarge(coarse: torch.Tensor, size: int) -> torch.Tensor:
    """Patch values ``(B, P)``, row by row, to pixels ``(B, size, size)``: bilinear, after the softmax."""
    grid = round(coarse.shape[1] ** 0.5)
    square = coarse.unflatten(1, (1, grid, grid))
    return F.interpolate(square, size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def smooth(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian of SciPy's definition: cut at 4 sigma, half-sample symmetric border (d c b a | a b c d).

    On a CPU SciPy itself is faster; elsewhere two separable convolutions on the device, equal to 3e-7. torch's own
    ``reflect`` padding is the other reflection and is wrong by 0.016 at the border.
    """
    if sigma == 0:
        return maps
    if maps.device.type == "cpu":
        from scipy.ndimage import gaussian_filter

        return torch.from_numpy(np.stack([gaussian_filter(one, sigma) for one in maps.numpy()]))
    return _smooth_on_device(maps, sigma)


def _smooth_on_device(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps.dtype)
    for axis in (1, 2):
        n = maps.shape[axis]
        index = torch.arange(-radius, n + radius, device=maps.device) % (2 * n)
        index = torch.where(index < n, index, 2 * n - 1 - index)
        padded = maps.index_select(axis, index).movedim(axis, -1)
        rows = F.conv1d(padded.flatten(0, 1)[:, None], kernel[None, None])[:, 0]
        maps = rows.unflatten(0, padded.shape[:2]).movedim(-1, axis)
    return maps


@dataclass(frozen=True)
class Detector:
    """A ready detector: the vision tower and two text vectors; the text tower is not needed any more.

    Attributes:
        visual: open_clip ``VisionTransformer`` in eval mode.
        text: float ``(2, embed_dim)``, normalised, normal first.
        preprocess: uint8 RGB ``(H, W, 3)`` -> float32 ``(3, S, S)``.
        settings: with the first dual block and the taps filled in.
        model_id: which CLIP at which size.
    """

    visual: nn.Module
    text: torch.Tensor
    preprocess: Callable[[np.ndarray], torch.Tensor]
    settings: DetectorSettings
    model_id: str


def build_detector(clip: Clip, learner: PromptLearner, settings: DetectorSettings) -> Detector:
    """Join a CLIP and prompts; the text features are computed here, once.

    Raises:
        ValueError: the input side is not a multiple of the patch size, taps or blocks that the tower does not have,
            or a CLIP without quick GELU.
    """
    from helpers.clip.backbones import square_preprocess

    check_clip(clip.model)
    visual = clip.model.visual
    filled = filled_settings(visual, settings)
    with torch.inference_mode():
        text = F.normalize(encode_text(clip.model, learner), dim=-1)
    name = clip.model_id.rsplit("/", 1)[0]
    return Detector(visual, text, square_preprocess(filled.image_size), filled, f"{name}/{filled.image_size}")


def filled_settings(visual: nn.Module, settings: DetectorSettings) -> DetectorSettings:
    """Settings with the tower's own numbers in place of None and (), checked."""
    n_blocks = len(visual.transformer.resblocks)
    first = default_first_dual_block(n_blocks) if settings.first_dual_block is None else settings.first_dual_block
    if not 0 <= first <= n_blocks:
        raise ValueError(f"first_dual_block is {first}; this tower of {n_blocks} blocks allows 0 to {n_blocks}.")
    taps = settings.taps or (n_blocks,)
    _check_taps(taps, n_blocks)
    _check_side(visual, (settings.image_size,))
    return replace(settings, first_dual_block=first, taps=tuple(taps))


def detect(detector: Detector, images: torch.Tensor, *, precision: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """Anomaly scores and maps of a batch.

    Args:
        detector: see :func:`build_detector`.
        images: float ``(B, 3, S, S)`` from ``detector.preprocess``, on the detector's device.
        precision: ``"fp32"`` is the published arithmetic; ``"bf16"`` and ``"fp16"`` run the tower under autocast.
    Returns:
        scores float32 ``(B,)`` in (0, 1), the abnormal probability of each image; maps float32 ``(B, S, S)``, raw,
        smoothed, summed over the taps, so from 0 to the number of taps. Higher = more anomalous.
    """
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    settings = detector.settings
    with torch.inference_mode():
        with torch.autocast(images.device.type, dtype=kind, enabled=kind is not None):
            feature, tokens = dual_path(
                detector.visual, images, first_dual_block=settings.first_dual_block, taps=settings.taps
            )
        scores = abnormal_probability(feature.float(), detector.text)
        coarse = torch.stack([abnormal_probability(one[:, 1:].float(), detector.text) for one in tokens]).sum(dim=0)
        maps = smooth(_enlarge(coarse, settings.image_size), settings.sigma)
    return scores.cpu().numpy(), maps.cpu().numpy()


def score_samples(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    n_workers: int = 0,
    title: str = "AnomalyCLIP",
) -> Iterator[tuple[Sample, float, np.ndarray, float]]:
    """Score pictures one batch at a time; memory does not grow with their number.

    Yields:
        sample, anomaly score, anomaly map float32 ``(S, S)``, seconds (loading included).
    Raises:
        ValueError: there is no sample.
    """
    from tqdm.auto import tqdm

    if not samples:
        raise ValueError("There is no picture to score. Check the category and the split, or run 02 again.")
    device = detector.text.device
    loader = torch.utils.data.DataLoader(
        Pictures(samples, detector.preprocess),
        batch_size=batch_size,
        num_workers=n_workers,
        pin_memory=device.type == "cuda",
    )
    started = time.perf_counter()
    with tqdm(total=len(samples), desc=title, unit="picture") as bar:
        for indices, images in loader:
            scores, maps = detect(detector, images.to(device, non_blocking=True), precision=precision)
            seconds = (time.perf_counter() - started) / len(indices)
            for index, score, anomaly_map in zip(indices.tolist(), scores, maps):
                yield samples[index], float(score), anomaly_map, seconds
            bar.update(len(indices))
            started = time.perf_counter()


class Pictures(torch.utils.data.Dataset):
    """Index and preprocessed picture of each sample."""

    def __init__(self, samples: Sequence[Sample], preprocess: Callable[[np.ndarray], torch.Tensor]) -> None:
        self._samples, self._preprocess = samples, preprocess

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        from helpers.data.images import load_image

        return index, self._preprocess(load_image(self._samples[index].image_path))


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What the detector says about normal pictures of one artwork that it has not learnt from.

    Attributes:
        scores: float64 ``(n,)``, anomaly scores.
        map_maxima: float64 ``(n,)``, highest value of each map.
    """

    scores: np.ndarray
    map_maxima: np.ndarray


def calibrate(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    n_workers: int = 0,
) -> dict[str, Calibration]:
    """Score normal pictures, by artwork.

    Raises:
        ValueError: no picture, or one that is anomalous or of the test split.
    """
    wrong = [sample for sample in samples if sample.is_anomalous or sample.split == "test"]
    if wrong:
        raise ValueError(
            f"{wrong[0].image_path} is {wrong[0].kind!r} in split {wrong[0].split!r}: thresholds are set with normal "
            "pictures outside the test split only."
        )
    found: dict[str, list[tuple[float, float]]] = {}
    scored = score_samples(
        detector, samples, batch_size=batch_size, precision=precision, n_workers=n_workers, title="calibration"
    )
    for sample, score, anomaly_map, _ in scored:
        found.setdefault(sample.category, []).append((score, float(anomaly_map.max())))
    return {category: Calibration(*np.array(rows).T) for category, rows in found.items()}


def predict(
    detector: Detector,
    dataset: Dataset,
    *,
    folder: Path,
    profile: str,
    checkpoint_hash: str,
    trained_on: str,
    alpha: float = 0.05,
    calibration_splits: Sequence[str] = ("train", "calibration"),
    batch_size: int = 8,
    precision: str = "fp32",
    n_workers: int = 0,
    method: str = "anomalyclip",
) -> MethodResult:
    """Predict every test picture of a dataset and write scores, thresholds and maps as they come.

    Thresholds are conformal, per artwork, from normal pictures outside the test split. Zero-shot prompts have learnt
    from none of them, so train and calibration normals both count; few-shot prompts leave the calibration split.
    A complete run with the same settings is read instead of repeated, an interrupted one is finished.

    Args:
        detector: see :func:`build_detector`.
        dataset: its ``train`` and ``calibration`` normals set the thresholds, its ``test`` pictures are predicted.
        folder: results folder; ``calibration.json`` is written beside the predictions.
        profile: name of the profile.
        checkpoint_hash: hash of the prompt file.
        trained_on: what the prompts have seen, in words, for the manifest.
        alpha: false-alarm rate that the thresholds aim at.
        calibration_splits: of the normals that set the thresholds.
        batch_size, precision, n_workers: see :func:`score_samples`.
        method: name of the row.
    Raises:
        ValueError: an artwork without calibration normals or without test pictures.
    """
    from helpers import results
    from helpers.judge.statistics import conformal_threshold, p_values
    from helpers.records import Prediction

    folder = Path(folder)
    test = dataset.select(split="test")
    normals = [s for split in calibration_splits for s in dataset.select(split=split, is_anomalous=False)]
    for category in dataset.categories:
        for split, found in (("test", test), (" or ".join(calibration_splits), normals)):
            if not any(sample.category == category for sample in found):
                raise ValueError(f"{category} has no {split} pictures. Add some and run 02_synthesize_anomalies.")
    settings = {
        "model": detector.model_id,
        **asdict(detector.settings),
        "trained_on": trained_on,
        "alpha": alpha,
        "calibration_splits": list(calibration_splits),
        "precision": precision,
    }
    head = {"dataset_hash": dataset.hash, "settings": settings, "checkpoint_hash": checkpoint_hash}
    if not (results.is_complete(folder, **head) and (folder / CALIBRATION).exists()):
        options = {"batch_size": batch_size, "precision": precision, "n_workers": n_workers}
        calibration = calibrate(detector, normals, **options)
        thresholds = {name: conformal_threshold(one.scores, alpha) for name, one in calibration.items()}
        with results.Writer(
            folder, method=method, samples=test, dataset_dir=dataset.folder, profile=profile, **head
        ) as writer:
            rest = [sample for sample in test if sample.image_path not in writer.done]
            for sample, score, anomaly_map, seconds in score_samples(detector, rest, **options) if rest else ():
                p_value = float(p_values(calibration[sample.category].scores, [score])[0])
                threshold = thresholds[sample.category]
                writer.add(Prediction(sample, score, anomaly_map, threshold, p_value, seconds))
        lists = {
            category: {"scores": one.scores.tolist(), "map_maxima": one.map_maxima.tolist()}
            for category, one in calibration.items()
        }
        storage.write_json(folder / CALIBRATION, lists)
    return results.read(folder, dataset.samples, dataset.folder, dataset.hash)


def read_calibration(folder: Path) -> dict[str, Calibration]:
    """The calibration that :func:`predict` wrote into a results folder, by artwork."""
    lists = storage.read_json(Path(folder) / CALIBRATION)
    return {
        category: Calibration(np.array(one["scores"]), np.array(one["map_maxima"])) for category, one in lists.items()
    }


# --- losses ----------------------------------------------------------------------------------------------------------


def focal_loss(p_abnormal: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Focal loss (gamma 2) of two-class pixel probabilities, per image.

    Args:
        p_abnormal: float ``(B, H, W)`` in [0, 1].
        masks: float ``(B, H, W)``, 1 on anomalous pixels.
    Returns:
        float ``(B,)``.
    Source: AnomalyCLIP, loss.py: label smoothing 1e-5 on the probability, alpha 1.
    """
    p_true = torch.where(masks > 0.5, p_abnormal, 1 - p_abnormal)
    smoothed = (1 - _LABEL_SMOOTHING) * p_true + _LABEL_SMOOTHING * (1 - p_true) + _LABEL_SMOOTHING
    return -((1 - smoothed) ** 2 * smoothed.log()).flatten(1).mean(dim=1)


def dice_loss(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Dice loss per image: float ``(B, H, W)`` twice -> ``(B,)``; 1 is added above and below."""
    overlap = (probabilities * masks).flatten(1).sum(dim=1)
    total = probabilities.flatten(1).sum(dim=1) + masks.flatten(1).sum(dim=1)
    return 1 - (2 * overlap + 1) / (total + 1)


def prompt_losses(text: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The training loss and its parts, each a mean over the images of the batch.

    An anomalous image without a known mask counts in the image loss alone: an empty mask would teach that its defect
    is normal.

    Args:
        text: float ``(2, embed_dim)``, normalised, normal first.
        batch: ``feature`` ``(B, embed_dim)``, ``tokens`` ``(B, taps, P, embed_dim)``, ``mask`` ``(B, S, S)``,
            ``label`` int64 ``(B,)``, ``has_mask`` bool ``(B,)``.
    Returns:
        ``loss`` = ``image`` + 4 * (``focal`` + ``dice_abnormal`` + ``dice_normal``), summed over the taps.
    Source: Zhou et al., ICLR 2024, section 3; train.py, loss.py.
    """
    masks, weight = batch["mask"].to(text.dtype), batch["has_mask"].to(text.dtype)
    pixel = dict.fromkeys(("focal", "dice_abnormal", "dice_normal"), text.new_zeros(()))
    for tokens in batch["tokens"].unbind(dim=1):
        p_abnormal = _enlarge(abnormal_probability(tokens.to(text.dtype), text), masks.shape[-1])
        per_image = {
            "focal": focal_loss(p_abnormal, masks),
            "dice_abnormal": dice_loss(p_abnormal, masks),
            "dice_normal": dice_loss(1 - p_abnormal, 1 - masks),
        }
        pixel = {name: pixel[name] + (weight * value).mean() for name, value in per_image.items()}
    logits = F.normalize(batch["feature"].to(text.dtype), dim=-1) @ text.T / TEMPERATURE
    image = F.cross_entropy(logits, batch["label"])
    return {"loss": _LAMBDA * sum(pixel.values()) + image, "image": image, **pixel}


class PromptTraining(nn.Module):
    """What :func:`helpers.training.train` trains: prompts through a frozen text tower, on cached image features.

    The reference computes gradients for all weights of the text tower and throws them away; freezing it halves the
    time of a step.

    Args:
        model: CLIP; it is frozen here, only its text tower is used.
        learner: the prompts to train.
    """

    def __init__(self, model: nn.Module, learner: PromptLearner) -> None:
        super().__init__()
        check_clip(model)
        self.learner = learner.requires_grad_(True)
        self.clip = model.requires_grad_(False)

    def text_features(self) -> torch.Tensor:
        """Normalised text features ``(2, embed_dim)``."""
        return F.normalize(encode_text(self.clip, self.learner), dim=-1)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return prompt_losses(self.text_features().float(), batch)
