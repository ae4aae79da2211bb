"""Pictures and masks, from any file a user may have to arrays: uint8 sRGB ``(H, W, 3)`` and bool ``(H, W)``.
A hostile file is read, with a note where a choice was made, or refused. PIL's (W, H) and OpenCV's BGR end here."""

import hashlib
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence

from helpers import files

# Suffixes of files that are taken for pictures when a folder is read (what they hold decides, not the suffix).
IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .avif .ppm .pgm .heic .heif .jp2".split())
MAX_PIXELS = 80_000_000  # decoded whole, 240 MB as RGB; bigger baseline JPEGs are decoded at 1/2, 1/4 or 1/8
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would refuse JPEGs that can be shrunk
with suppress(ImportError):  # not required: it reads what iPhones save
    importlib.import_module("pillow_heif").register_heif_opener()
Image.init()
# Formats whose decoders run inside the process. EPS, for one, would start Ghostscript on a stranger's file.
_FORMATS = [*({"JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "HEIF"} & {*Image.OPEN})]
_SRGB = ImageCms.createProfile("sRGB")


class ImageError(ValueError):
    """A file that cannot be used as a picture or mask; the message names the file, the reason and a way out."""


def load_image(path: Path | str, *, max_side: int | None = None, notes: list[str] | None = None) -> np.ndarray:
    """Read a picture as uint8 RGB ``(H, W, 3)``: upright, opaque on white, in sRGB, the largest page or first frame.
    A longer side above ``max_side`` pixels is shrunk to it; ``notes`` gets a sentence for every choice that was made.
    ``ImageError``: no such file, empty, truncated, no picture, or too large."""
    path, notes = Path(path), [] if notes is None else notes
    with _refused_in_words(path):
        image = _decoded(path, max_side, notes)
        profile, deep = image.info.get("icc_profile"), _deep_values(image, path)
        if deep is not None:
            low, high = float(deep.min()), float(deep.max())
            if deep.dtype.kind == "f" or low < 0 or high > 65535:
                raise ValueError(f"{deep.dtype} values from {low:g} to {high:g}")
            bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 2**bits)
            if bits < 16:
                notes.append(f"its values fill {bits} of 16 bits; they were scaled to the full range")
            image = Image.fromarray(np.rint(deep * (255 / (2**bits - 1))).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[1] == 0:
                notes.append("all of it is transparent; its colours are used as if it were not")
            else:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else _SRGB
            if profile and "srgb" not in ImageCms.getProfileDescription(source).lower():
                image = image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")
                image = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("its colour profile cannot be applied; colours may be off")
        array = np.array(image.convert("RGB"))
    return resize(array, max_side or max(array.shape))


def load_mask(
    path: Path, shape: tuple[int, int] | None = None, *, picture: Path | None = None, notes: list[str] | None = None
) -> np.ndarray:
    """Read a mask, bool ``(H, W)``: True where the picture is anomalous.
    Whatever is not background is anomalous, in label images of any depth; only grey-scale masks (JPEG noise, soft
    edges) count from half of their range on. ``shape`` is the size wanted: masks shrink by area, so that hairlines
    stay. A mask that was drawn before the EXIF rotation of the file ``picture`` is turned with it. ``notes`` as above.
    ``ImageError``: the file cannot be read, or mask and picture differ in proportions."""
    path, notes = Path(path), [] if notes is None else notes
    with _refused_in_words(path):
        is_jpeg = path.read_bytes()[:2] == b"\xff\xd8"
        mask = _marked(_labels(_decoded(path, None, notes), path), is_jpeg, notes)
    if mask.mean() > 0.5:
        notes.append("more than half of the picture is marked; look whether it is inverted")
    if shape is None:
        return mask

    def fits(size: tuple[int, int]) -> bool:  # of equal proportions, up to a pixel of rounding on either side
        return abs(size[0] * shape[1] - size[1] * shape[0]) <= max(size) + max(shape)

    turned = Image.fromarray(mask)
    with suppress(OSError, KeyError, SyntaxError, ValueError), Image.open(picture or "", formats=_FORMATS) as image:
        turned.getexif()[0x112] = image.getexif()[0x112]
    turned = np.array(ImageOps.exif_transpose(turned))
    if not np.array_equal(turned, mask) and fits(turned.shape):
        is_upright = fits(mask.shape)
        notes.append(f"{'perhaps ' * is_upright}drawn before its picture's EXIF rotation; look whether it lies right")
        mask = mask if is_upright else turned
    if not fits(mask.shape):
        sizes = f"{mask.shape}, its picture is {tuple(shape)} (rows, columns)"
        raise ImageError(f"Mask {path} is {sizes}: the proportions differ. Save the mask in its picture's size.")
    if mask.shape[0] < shape[0] or mask.shape[1] < shape[1]:
        return cv2.resize(mask.view(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
    covered = cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
    # Where all is thin, what is covered most stays: no hairline breaks, no speck goes.
    return covered > np.minimum(0.2, cv2.dilate(covered, np.ones((3, 3), np.uint8)) / 3)


def save_png(path: Path | str, array: np.ndarray) -> None:
    """Write a uint8 picture ``(H, W, 3)`` or ``(H, W)`` or a bool mask as PNG, whole or not at all."""
    array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,)) or array.size == 0:
        raise ValueError(f"Cannot save {array.dtype} {array.shape} as {Path(path).name}: no picture or mask.")
    # Level 1 and one filter: 12 ms instead of 30 for a 512 x 512 photograph of a painting, and 2 % larger.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # OpenCV 4.12 and later
        one = cv2.IMWRITE_PNG_FILTER_NONE if array.ndim == 2 else cv2.IMWRITE_PNG_FILTER_AVG
        options += [cv2.IMWRITE_PNG_FILTER, one]
    bgr = np.ascontiguousarray(array[:, :, ::-1]) if array.ndim == 3 else array
    files.write_bytes(Path(path), cv2.imencode(".png", bgr, options)[1].tobytes())


def resize(image: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink a picture (uint8 or float32) by area until the longer side is ``max_side`` pixels; never enlarge."""
    scale = max_side / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def pixel_hash(image: np.ndarray) -> str:
    """SHA-256 of a picture's shape and pixels (lower-case hexadecimal): equal for one picture in two file formats."""
    return hashlib.sha256(f"{image.dtype.str} {image.shape} ".encode() + image.tobytes()).hexdigest()


@contextmanager
def _refused_in_words(path: Path) -> Iterator[None]:
    """Any error of a decoder as an ImageError: they raise a dozen types on broken data."""
    if not path.is_file():  # also keeps away from pipes, which would block
        raise ImageError(f"{path} does not exist or is no ordinary file (a folder, or a link to nothing).")
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0].replace(f" {str(path)!r}", "") or type(error).__name__
        head = b"" if isinstance(error, PermissionError) else path.read_bytes()[:12]
        if head[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf"):
            why = "HEIC, as iPhones save it; or pip install pillow-heif"
        way = "Copy it again, or save it as JPEG, PNG, TIFF or WebP of 8 bits a channel"
        raise ImageError(f"{path} cannot be read as a picture ({path.stat().st_size} bytes; {why}). {way}.") from error


def _decoded(path: Path, max_side: int | None, notes: list[str]) -> Image.Image:
    """The picture as stored, in its own mode, upright; a JPEG at reduced size where that suffices."""
    with Image.open(path, formats=_FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1:  # a TIFF may begin with its thumbnail
            pages = ImageSequence.Iterator(image) if image.format == "TIFF" else [image]
            image.seek(int(np.argmax([page.width * page.height for page in pages])))
            notes.append(f"it has {image.n_frames} pages or frames; number {image.tell() + 1} was read")
        (width, height), excess = image.size, image.width * image.height / MAX_PIXELS
        if excess <= 1 or not image.info.get("progressive"):  # which keeps all coefficients in memory
            scale = min((max_side or max(image.size)) / max(image.size), 0.5 / excess**0.5)  # a draft may be twice this
            image.draft(None, (max(1, round(width * scale)), max(1, round(height * scale))))
        if image.width * image.height > MAX_PIXELS:
            way = "Save a smaller copy, or a baseline JPEG, which is read at reduced size"
            raise ImageError(f"{path} has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded. {way}.")
        image.load()
        with suppress(Exception):  # a broken EXIF block does not lose the picture
            return ImageOps.exif_transpose(image)
        return image.copy()


def _deep_values(image: Image.Image, path: Path) -> np.ndarray | None:
    """Values of more than 8 bits ``(H, W)`` or ``(H, W, 3)``; None when 8 bits hold all."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode in ("RGB", "RGBA") and max(high for _, high in image.getextrema()) <= 63:
        # Of 16 bits a colour Pillow keeps the upper 8, which leaves next to nothing when only 12 are in use.
        deep = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is not None and deep.dtype == np.uint16 and deep.shape[:2] == (image.height, image.width):
            return np.ascontiguousarray(deep[:, :, 2::-1])
    return None


def _labels(image: Image.Image, path: Path) -> np.ndarray:
    """What a mask file holds ``(H, W)``, 0 = background: label numbers, numbers of its few colours, or grey values."""
    deep = _deep_values(image, path)
    if deep is not None:
        values = np.maximum(np.nan_to_num(deep if deep.ndim == 2 else deep.max(axis=2)), 0)
        return np.rint(values * 255) if image.mode == "F" and values.max(initial=0) <= 1 else values
    *colours, alpha = np.moveaxis(np.asarray(image.convert("RGBA"), np.int32), 2, 0)
    if np.ptp(alpha) > 0:
        return alpha  # painted on a transparent layer, in any colour: the mask is where the paint is
    values, codes = np.maximum.reduce(colours), np.tensordot((1 << 16, 1 << 8, 1), colours, 1)
    # Red on white, say: the largest of three colours is 255 everywhere.
    is_coloured = image.mode not in ("1", "L") and values.min() > 0 and len(np.unique(codes)) <= 32
    return codes if is_coloured else values


def _marked(values: np.ndarray, is_lossy: bool, notes: list[str]) -> np.ndarray:
    """Which values of a mask, bool ``(H, W)``, are not background: 0, or what lies along most of the border."""
    levels = np.unique(values)
    is_between = (values > 0) & (values < levels[-1])
    here, diagonal = (part[is_between[1:, 1:]].astype(float) for part in (values[1:, 1:], values[:-1, :-1]))
    steps = np.abs(here - diagonal)  # soft edges and noise differ from pixel to pixel, labels come in even patches
    is_grey = is_lossy or (len(levels) > 2 and levels[-1] > 127 and (steps > 0).mean() > 0.75)
    if is_grey or (len(levels) > 16 and levels[-1] > 127 and np.median(steps[steps > 0]) <= 2):  # a wide brush
        notes.append("a mask of grey values, counted from half of the range on; look whether it is a photograph")
        return values > (127 if 127 < levels[-1] <= 255 else levels[-1] / 2)
    if 0 in levels or len(levels) == 1:
        return values != 0
    notes.append("a mask without zeros; the value along most of its border counts as background")
    border, n_pixels = np.unique([*values[[0, -1]].ravel(), *values[:, [0, -1]].ravel()], return_counts=True)
    return values != border[n_pixels.argmax()]
