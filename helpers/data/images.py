"""Pictures and masks, from any file a user may have to arrays: uint8 RGB ``(H, W, 3)`` and bool ``(H, W)``.

Every hostile file has a defined outcome: it is read (rotated, flattened, scaled as its header asks) or refused with
:class:`ImageError`, whose message says what is wrong and what to do. PIL's (W, H) and OpenCV's BGR end here.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin

from helpers import files as storage

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .avif .ppm .pgm .heic .heif .jp2".split()
)
"""Suffixes of files that are taken for pictures when a folder is read (what they hold decides, not the suffix)."""

MAX_PIXELS = 80_000_000
"""Largest picture decoded whole: 240 MB as RGB. Bigger baseline JPEGs are decoded at 1/2, 1/4 or 1/8 instead."""

# Formats whose decoders run inside the process. EPS, for one, would start Ghostscript on a stranger's file.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


class ImageError(ValueError):
    """A file that cannot be used as a picture or mask; the message names the file, the reason and a way out."""


def load_image(path: Path | str, *, max_side: int | None = None) -> np.ndarray:
    """Read a picture, upright and opaque.

    The content decides about the format, not the suffix. EXIF rotation is applied; transparent parts become white;
    grey, palette and CMYK become RGB (colour profiles are not applied); 16-bit values are scaled to 8 bits; of an
    animation the first frame is taken; links are followed.

    Args:
        path: the file.
        max_side: longer side in pixels of the result; smaller pictures stay as they are.
    Returns:
        uint8 RGB ``(H, W, 3)``, contiguous.
    Raises:
        ImageError: there is no such file, it is empty, truncated, no picture, or larger than :data:`MAX_PIXELS`
            (except baseline JPEGs, which can be decoded at reduced size).
    """
    path = Path(path)
    with _opened(path) as image:
        _limit_size(image, path, max_side)
        array = _decoded(image, path)
    return array if max_side is None else resize(array, max_side)


def load_mask(path: Path | str, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read a mask: True where the picture is anomalous.

    A mask whose largest value is at most 127 holds region numbers (VisA writes 1, 2, ...) and counts as True wherever
    it is not zero; any other mask counts from half of the range on, so that soft edges and JPEG noise do not grow it.

    Args:
        path: the mask file, or a folder of masks of one picture (MVTec LOCO), which are joined.
        shape: ``(H, W)`` of the result, to match a resized picture (nearest neighbour).
    Returns:
        bool ``(H, W)``.
    Raises:
        ImageError: the file cannot be read, the folder holds no mask, or a mask has another aspect ratio than
            ``shape`` (or than the other masks in its folder).
    """
    path = Path(path)
    if path.is_dir():
        files = mask_files(path)
        if not files:
            raise ImageError(f"{path} is a folder without masks. Put PNG masks there or remove the folder.")
        masks = [load_mask(file, shape) for file in files]
        if len({mask.shape for mask in masks}) > 1:
            raise ImageError(f"The masks in {path} differ in size: {sorted({mask.shape for mask in masks})}.")
        return np.logical_or.reduce(masks)
    with _opened(path) as image:
        _limit_size(image, path, None)
        values = _decoded(image, path, background=0).max(axis=2)
    mask = values > (0 if values.max() <= 127 else 127)
    if shape is None or mask.shape == tuple(shape):
        return mask
    height, width = shape
    if abs(mask.shape[0] * width - mask.shape[1] * height) > max(mask.shape) + max(shape):  # one pixel of rounding
        raise ImageError(
            f"Mask {path} is {mask.shape}, its picture is {tuple(shape)} (rows, columns): the proportions differ. "
            "Save the mask in the size of its picture."
        )
    return cv2.resize(mask.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)


def mask_files(path: Path) -> list[Path]:
    """The mask files behind a ``mask_path``: the file itself, or the sorted files of a folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != ".")


def save_png(path: Path | str, array: np.ndarray) -> None:
    """Write a picture or mask as PNG, whole or not at all; the same array gives the same bytes.

    Args:
        path: where to; missing folders are made.
        array: uint8 RGB ``(H, W, 3)``, uint8 grey ``(H, W)`` or bool ``(H, W)`` (written as 0 and 255).
    Raises:
        ValueError: the array is none of these.
    """
    array = np.asarray(array)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_picture or array.size == 0:
        raise ValueError(
            f"Cannot save {array.dtype} {array.shape} as {Path(path).name}: a picture is uint8 (H, W, 3) or (H, W), "
            "a mask bool (H, W)."
        )
    bgr = array if array.ndim == 2 else array[:, :, ::-1]
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(bgr), _png_options(is_mask=array.ndim == 2))
    storage.write_bytes(Path(path), encoded.tobytes())


def _png_options(*, is_mask: bool) -> list[int]:
    """Fast and nearly as small: a 512 x 512 photograph of a painting takes 12 ms instead of 30 and grows by 2 %."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV 4.12 and later
        options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE if is_mask else cv2.IMWRITE_PNG_FILTER_AVG]
    return options


def resize(image: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink so that the longer side is ``max_side`` pixels; smaller pictures are returned as they are.

    Args:
        image: uint8 or float32 ``(H, W, 3)`` or ``(H, W)`` (area average), or a bool mask ``(H, W)`` (nearest).
        max_side: pixels, at least 1.
    Raises:
        ValueError: ``max_side`` is below 1.
    """
    if max_side < 1:
        raise ValueError(f"max_side is {max_side}, the longer side of a picture must be at least 1 pixel.")
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer <= max_side:
        return image
    size = (max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer)))
    if image.dtype == bool:
        return cv2.resize(image.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def pixel_hash(image: np.ndarray) -> str:
    """SHA-256 of a picture's shape and pixels (lower-case hexadecimal): equal for one picture in two file formats."""
    header = f"{image.dtype.str} {image.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(image).tobytes()).hexdigest()


def _opened(path: Path) -> Image.Image:
    """The file's header, read; pixels are not decoded yet."""
    if not path.is_file():  # also keeps away from pipes, which would block
        if path.is_symlink():
            raise ImageError(f"{path} is a link to {os.readlink(path)}, which is not there. Repair or remove the link.")
        what = "is a folder" if path.is_dir() else "is not an ordinary file" if path.exists() else "does not exist"
        raise ImageError(f"{path} {what}.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes). Copy or download it again.")
    Image.init()
    try:
        with open(path, "rb") as file:
            is_jpeg = file.read(2) == b"\xff\xd8"
        if is_jpeg:  # opened directly: Image.open refuses huge pictures before they can be asked for at reduced size
            return JpegImagePlugin.JpegImageFile(path)
        return Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{path} is too large to decode: {error} Save it at most {MAX_PIXELS:,} pixels big."
        ) from error
    except Exception as error:  # decoders raise a dozen types on broken headers
        raise ImageError(
            f"{path} is no picture that can be read ({_first_line(error)}). Readable are JPEG, PNG, WebP, TIFF, BMP "
            "and GIF; save it again as one of them or remove it."
        ) from error


def _limit_size(image: Image.Image, path: Path, max_side: int | None) -> None:
    """Ask a JPEG for a smaller decoding where that suffices; refuse what would not fit into memory."""
    width, height = image.size
    is_baseline = image.format == "JPEG" and not image.info.get("progressive")
    if max_side is not None and image.format == "JPEG":
        scale = max_side / max(width, height)
        if scale <= 0.5:
            image.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))
    if is_baseline and image.size[0] * image.size[1] > MAX_PIXELS:
        scale = (MAX_PIXELS / (width * height)) ** 0.5 / 2  # draft keeps at least what is asked for, up to twice that
        image.draft(None, (int(width * scale), int(height * scale)))
    # A progressive JPEG keeps all coefficients in memory, whatever size is asked for.
    decoded = image.size if is_baseline else (width, height)
    if decoded[0] * decoded[1] > MAX_PIXELS:
        raise ImageError(
            f"{path} has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded. Save a smaller copy "
            "(a baseline JPEG of any size is read at reduced scale)."
        )


def _decoded(image: Image.Image, path: Path, *, background: int = 255) -> np.ndarray:
    """uint8 RGB ``(H, W, 3)``: upright, on a uniform background where transparent."""
    try:
        image.load()
        orientation = _orientation(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_eight_bits(np.asarray(image), path))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.new("RGB", image.size, (background,) * 3)
            image.paste(rgba, mask=rgba.getchannel("A"))
        image = image.convert("RGB")
        if orientation in _ROTATIONS:
            image = image.transpose(_ROTATIONS[orientation])
        return np.array(image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise a dozen types on broken data
        raise ImageError(f"{path} is damaged or cut off ({_first_line(error)}). Copy or download it again.") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; 1 (upright) when the EXIF block itself is broken, since the pixels are good."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
    """Grey values of 16 bits, or floats in [0, 1] or [0, 255], as uint8."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 255:  # False for nan
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    raise ImageError(
        f"{path} holds {values.dtype} values from {low:g} to {high:g}; allowed are 8 or 16 bits, or floats in [0, 1] "
        "or [0, 255]. Save it as an 8-bit PNG."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
