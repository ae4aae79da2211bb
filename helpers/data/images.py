"""Pictures and masks, from any file a user may have to arrays: uint8 sRGB ``(H, W, 3)`` and bool ``(H, W)``.

Every hostile file has a defined outcome: it is read (turned, flattened, scaled as its header asks, with a note where a
choice was made) or refused with :class:`ImageError`. PIL's (W, H) and OpenCV's BGR end here.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin

from helpers import files

_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .avif .ppm .pgm .heic .heif .jp2"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
"""Suffixes of files that are taken for pictures when a folder is read (what they hold decides, not the suffix)."""
MAX_PIXELS = 80_000_000
"""Largest picture decoded whole: 240 MB as RGB. Bigger baseline JPEGs are decoded at 1/2, 1/4 or 1/8 instead."""
MIN_COVERED = 0.2
"""Share of a pixel that a mask must cover to keep it when it shrinks."""

# Formats whose decoders run inside the process. EPS, for one, would start Ghostscript on a stranger's file.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "HEIF")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_MAX_PAGES, _MAX_COLOURS = 32, 32
_SRGB = ImageCms.createProfile("sRGB")
# Turns what was drawn before an EXIF rotation that changes the proportions (EXIF 2.3, table 6).
_UPRIGHT = {5: lambda a: a.T, 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].T, 8: np.rot90}


class ImageError(ValueError):
    """A file that cannot be used as a picture or mask; the message names the file, the reason and a way out."""


def load_image(path: Path | str, *, max_side: int | None = None, notes: list[str] | None = None) -> np.ndarray:
    """Read a picture, upright, opaque on white and in sRGB.

    EXIF rotation and colour profile are applied, values of more than 8 bits are scaled. Of several pages the largest
    is read, of an animation the first frame.

    Args:
        path: the file; its content decides about the format, not its suffix.
        max_side: longer side in pixels of the result; smaller pictures stay as they are.
        notes: gets a sentence for every choice that was made, without the file's name.
    Returns:
        uint8 RGB ``(H, W, 3)``, contiguous.
    Raises:
        ImageError: no such file, empty, truncated, no picture, or too large (but for baseline JPEGs, which shrink).
    """
    path, notes = Path(path), [] if notes is None else notes
    with _refused_in_words(path):
        stored = _decoded(path, max_side, notes)
        image = _eight_bits(stored, path, notes)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[1] == 0:
                notes.append("all of it is transparent; its colours are used as if it were not")
            else:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        array = np.array(_in_srgb(image, stored.info.get("icc_profile"), notes))
    return array if max_side is None else resize(array, max_side)


def load_mask(
    path: Path | str,
    shape: tuple[int, int] | None = None,
    *,
    picture: Path | str | None = None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Read a mask, bool ``(H, W)``: True where the picture is anomalous.

    Whatever is not background is anomalous, in label images of any depth: 0 is background, or the value along most of
    the border where nothing is 0. Only grey-scale masks (JPEG noise, soft edges) count from half of their range on.

    Args:
        path: the mask file, or a folder of masks of one picture (MVTec LOCO), which are joined.
        shape: ``(H, W)`` of the result, to match a resized picture. Masks shrink by area, so that hairlines stay.
        picture: the file of the picture. A mask that was drawn before the picture's EXIF rotation is turned with it.
        notes: gets a sentence for every choice that was made, without the file's name.
    Raises:
        ImageError: the file cannot be read, the folder holds no mask, or masks and picture differ in proportions.
    """
    path, notes = Path(path), [] if notes is None else notes
    masks = [_mask_of_file(file, notes) for file in mask_files(path)]
    if len({mask.shape for mask in masks}) != 1:
        what = f"masks that differ in size: {sorted({mask.shape for mask in masks})}" if masks else "no mask"
        raise ImageError(f"{path} is a folder with {what}. Put PNG masks of one size there or remove the folder.")
    mask = np.logical_or.reduce(masks)
    if mask.mean() > 0.5:
        notes.append("more than half of the picture is marked; look whether it is inverted")
    if shape is None:
        return mask
    turn = 1 if picture is None else _orientation(Path(picture))
    fits_as_stored = _fits(mask.shape[::-1] if turn in _UPRIGHT else mask.shape, shape)
    if fits_as_stored and not _fits(mask.shape, shape):
        mask = _UPRIGHT[turn](mask)
        notes.append("drawn before its picture's EXIF rotation, so it was turned like the picture")
    elif turn > 1 and fits_as_stored:
        notes.append("its picture is turned by EXIF and the mask is not; look whether it lies right")
    if not _fits(mask.shape, shape):
        sizes = f"{mask.shape}, its picture is {tuple(shape)} (rows, columns)"
        raise ImageError(f"Mask {path} is {sizes}: the proportions differ. Save the mask in its picture's size.")
    return _resized_mask(np.ascontiguousarray(mask), shape)


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
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or array.size == 0:
        allowed = "a picture is uint8 (H, W, 3) or (H, W), a mask bool (H, W)"
        raise ValueError(f"Cannot save {array.dtype} {array.shape} as {Path(path).name}: {allowed}.")
    # Level 1 and one filter: 12 ms instead of 30 for a 512 x 512 photograph of a painting, and 2 % larger.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV 4.12 and later
        filters = {2: cv2.IMWRITE_PNG_FILTER_NONE, 3: cv2.IMWRITE_PNG_FILTER_AVG}
        options += [cv2.IMWRITE_PNG_FILTER, filters[array.ndim]]
    bgr = array if array.ndim == 2 else np.ascontiguousarray(array[:, :, ::-1])
    files.write_bytes(Path(path), cv2.imencode(".png", bgr, options)[1].tobytes())


def resize(image: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink by area so that the longer side is ``max_side`` pixels; smaller pictures are returned as they are.

    Args:
        image: uint8 or float32 ``(H, W, 3)`` or ``(H, W)``, or a bool mask ``(H, W)``, in which hairlines stay.
        max_side: pixels, at least 1.
    Raises:
        ValueError: ``max_side`` is below 1.
    """
    if max_side < 1:
        raise ValueError(f"max_side is {max_side}, the longer side of a picture must be at least 1 pixel.")
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    if image.dtype == bool:
        return _resized_mask(image, shape)
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)


def pixel_hash(image: np.ndarray) -> str:
    """SHA-256 of a picture's shape and pixels (lower-case hexadecimal): equal for one picture in two file formats."""
    header = f"{image.dtype.str} {image.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(image).tobytes()).hexdigest()


@contextmanager
def _refused_in_words(path: Path) -> Iterator[None]:
    """Any error of a decoder as an ImageError: they raise a dozen types on broken data."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{path} is damaged or cut off ({_first_line(error)}). Copy or download it again.") from error


def _opened(path: Path) -> Image.Image:
    """The file's header, read; pixels are not decoded yet."""
    if not path.is_file():  # also keeps away from pipes, which would block
        link = f"is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        what = "is a folder" if path.is_dir() else link or "does not exist or is not an ordinary file"
        raise ImageError(f"{path} {what}.")
    with open(path, "rb") as file:
        head = file.read(12)
    if not head:
        raise ImageError(f"{path} is empty (0 bytes). Copy or download it again.")
    is_heic = head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS
    with suppress(ImportError):  # not required: it reads what iPhones save
        if is_heic:
            importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    try:
        if head.startswith(b"\xff\xd8"):  # opened directly: Image.open refuses huge pictures before they can be shrunk
            return JpegImagePlugin.JpegImageFile(path)
        return Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
    except Exception as error:  # decoders raise a dozen types on broken headers
        why = "a TIFF of camera raw or of colours as floats" if head[:2] in (b"II", b"MM") else _first_line(error)
        why = "HEIC, as iPhones save it; or pip install pillow-heif" if is_heic else why
        way = "Save it as JPEG, PNG, TIFF or WebP of 8 bits a channel, or remove it"
        raise ImageError(f"{path} is no picture that can be read ({why}). {way}.") from error


def _decoded(path: Path, max_side: int | None, notes: list[str]) -> Image.Image:
    """The picture as stored, in its own mode, upright."""
    with _opened(path) as image:
        _choose_page(image, notes)
        _limit_size(image, path, max_side)
        image.load()
        with suppress(Exception):  # a broken EXIF block does not lose the picture
            return ImageOps.exif_transpose(image)
        return image.copy()


def _choose_page(image: Image.Image, notes: list[str]) -> None:
    """Turn to the largest page of a TIFF, which may begin with its thumbnail; to the first frame of an animation."""
    n_pages, sizes = getattr(image, "n_frames", 1), [0]
    if n_pages > 1:
        for page in range(min(n_pages, _MAX_PAGES) if image.format == "TIFF" else 0):
            image.seek(page)
            sizes[page:] = [image.width * image.height]
        image.seek(int(np.argmax(sizes)))
        notes.append(f"it has {n_pages} pages or frames; number {image.tell() + 1} was read")


def _limit_size(image: Image.Image, path: Path, max_side: int | None) -> None:
    """Ask a JPEG for a smaller decoding where that suffices; refuse what would not fit into memory."""
    width, height = image.size
    scale = 1.0 if max_side is None else max_side / max(width, height)
    if width * height > MAX_PIXELS:
        if image.format != "JPEG" or image.info.get("progressive"):  # which keeps all coefficients in memory
            way = "Save a smaller copy, or a baseline JPEG, which is read at reduced size"
            raise ImageError(f"{path} has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded. {way}.")
        scale = min(scale, (MAX_PIXELS / (width * height)) ** 0.5 / 2)  # a draft may be twice what is asked for
    if scale <= 0.5:
        image.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))


def _eight_bits(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    """Values of 16 bits, perhaps with only 10, 12 or 14 of them in use, as 8 bits."""
    if image.mode in ("RGB", "RGBA") and max(high for _, high in image.getextrema()) <= 63:
        # Of 16 bits a colour Pillow keeps the upper 8, which leaves next to nothing when only 12 are in use.
        deep = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None or deep.dtype != np.uint16 or deep.shape[:2] != (image.height, image.width):
            return image
        values = np.ascontiguousarray(deep[:, :, 2::-1])
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
    else:
        return image
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" or low < 0 or high > 65535:
        raise ImageError(f"{path} holds {values.dtype} values from {low:g} to {high:g}. Save it as an 8-bit PNG.")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    if bits < 16:
        notes.append(f"its values fill {bits} of 16 bits; they were scaled to the full range")
    top = 2**bits - 1
    return Image.fromarray(((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """The picture's colours as its profile means them."""
    if not profile:
        return image.convert("RGB")
    with suppress(Exception):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")
        image = image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")
        return ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    notes.append("its colour profile cannot be applied; colours may be off")
    return image.convert("RGB")


def _mask_of_file(path: Path, notes: list[str]) -> np.ndarray:
    """One mask as bool ``(H, W)``."""
    with _refused_in_words(path):
        with _opened(path) as header:
            is_lossy = header.format == "JPEG"
        values = _labels(_decoded(path, None, notes), path)
    highest = values.max(initial=0)
    if is_lossy or _is_grey_scale(values):
        if not is_lossy or ((values > 0.04 * highest) & (values < 0.96 * highest)).mean() > 0.5:
            notes.append("a mask of grey values, counted from half of the range on; look whether it is a photograph")
        return values > next((top // 2 for top in (255, 65535) if top // 2 < highest <= top), highest / 2)
    if values.size and 0 < values.min() < highest:
        border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        levels, n_pixels = np.unique(border, return_counts=True)
        notes.append("a mask without zeros; the value along most of its border counts as background")
        return values != levels[n_pixels.argmax()]
    return values > 0


def _labels(image: Image.Image, path: Path) -> np.ndarray:
    """What a mask file holds ``(H, W)``, 0 = background: label numbers, or the largest of three colours."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.maximum(np.nan_to_num(np.asarray(image)), 0)
        return np.rint(values * 255) if image.mode == "F" and values.max(initial=0) <= 1 else values
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    colours = np.asarray(_eight_bits(image, path, []).convert("RGB"))
    values = colours.max(axis=2)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        values = values * (alpha > 0)
        if values.min() == values.max() and alpha.min() < alpha.max():
            return alpha  # painted on a transparent layer, perhaps in black: the mask is where the paint is
    if values.min() > 0 and len(np.unique(codes := colours.astype(np.int32) @ (1 << 16, 1 << 8, 1))) <= _MAX_COLOURS:
        return codes  # red on white, say: the largest colour is 255 everywhere
    return values


def _is_grey_scale(values: np.ndarray) -> bool:
    """True for soft edges and noise, whose grey values differ from pixel to pixel; labels come in even patches."""
    levels = np.unique(values)
    if len(levels) <= 2 or not (127 < levels[-1] <= 255 or 32767 < levels[-1] <= 65535):
        return False
    is_between = (values > 0) & (values < levels[-1])
    here, diagonal = (part[is_between[1:, 1:]].astype(float) for part in (values[1:, 1:], values[:-1, :-1]))
    steps = np.abs(here - diagonal)
    is_wide_brush = len(levels) > 16 and np.median(steps[steps > 0]) <= 2
    return bool((steps > 0).mean() > 0.75 or is_wide_brush)


def _orientation(path: Path) -> int:
    """EXIF orientation 1 to 8 of a picture; 1 (as stored) when it has none or cannot be read."""
    with suppress(Exception), _opened(path) as image:
        return int(image.getexif().get(0x112, 1))
    return 1


def _fits(shape: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have equal proportions, up to a pixel of rounding on either side."""
    return abs(shape[0] * other[1] - shape[1] * other[0]) <= max(shape) + max(other)


def _resized_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask at another size: enlarged by repeating, shrunk by the share covered; nothing vanishes entirely."""
    size = (shape[1], shape[0])
    if mask.shape == tuple(shape):
        return mask
    if mask.shape[0] < shape[0] or mask.shape[1] < shape[1]:
        return cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
    covered = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    # Where all is thinner than that, the crest of what is covered stays, so that no hairline breaks and no speck goes.
    around = np.pad(covered, 1)
    pairs = ((around[:-2, 1:-1], around[2:, 1:-1]), (around[1:-1, :-2], around[1:-1, 2:]))
    crests = [(covered >= np.maximum(a, b)) & (covered > np.minimum(a, b)) for a, b in pairs]
    is_thin = cv2.dilate(covered, np.ones((3, 3), np.uint8)) <= 0.5
    return (covered > MIN_COVERED) | (is_thin & np.logical_or(*crests))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
