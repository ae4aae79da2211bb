"""Every hostile file is read as stated, with a note where a choice was made, or refused in words."""

import os
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms
from tiny_pictures import put

from helpers.data import images

HEIGHT, WIDTH = 24, 37
ACROSS, DOWN = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
RAMP = np.dstack([ACROSS, DOWN, np.full((HEIGHT, WIDTH), 60.0)]).astype(np.uint8)
TRUTH = np.zeros((HEIGHT, WIDTH), bool)
TRUTH[5:9, 20:30] = True


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RAMP).convert(mode)


def read(path: Path, **options: object) -> tuple[np.ndarray, str]:
    notes: list[str] = []
    return images.load_image(path, notes=notes, **options), " | ".join(notes)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / f"picture{suffix}", RAMP, **({"lossless": True} if suffix == ".webp" else {}))
    loaded, notes = read((tmp_path / f"picture{suffix}").rename(tmp_path / "claims.jpg"))  # the content decides
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous and not notes and (loaded == RAMP).all()


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png"), ("LAB", "tif")])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    source = ImageCms.profileToProfile(picture(), *profiles, outputMode="LAB") if mode == "LAB" else picture(mode)
    source.save(tmp_path / f"picture.{suffix}")
    difference = read(tmp_path / f"picture.{suffix}")[0].astype(int) - np.asarray(source.convert("RGB"))
    assert np.abs(difference).mean() < 6  # CMYK passes through JPEG; the others are exact


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_colour_profiles_are_applied(tmp_path: Path, suffix: str, has_alpha: bool) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"swap"), (b"bXYZ", b"rXYZ"), (b"swap", b"bXYZ"), (b"s\0R\0G\0B", b"o\0t\0h\0e")):
        profile = profile.replace(old, new)  # sRGB with its red and blue changed over, under another name
    source = Image.fromarray(np.ascontiguousarray(RAMP[..., ::-1]))
    if has_alpha:
        source.putalpha(255)
    source.save(tmp_path / f"other{suffix}", icc_profile=profile)
    assert np.abs(images.load_image(tmp_path / f"other{suffix}").astype(int) - RAMP).max() <= 2
    picture().save(tmp_path / "odd.png", icc_profile=b"nonsense")
    loaded, notes = read(tmp_path / "odd.png")
    assert (loaded == RAMP).all() and "profile" in notes


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("n_channels", [1, 3, 4])
def test_deep_values_are_scaled_not_clipped(tmp_path: Path, suffix: str, bits: int, n_channels: int) -> None:
    top = 2**bits - 1
    deep = np.rint(RAMP / 255.0 * top).astype(np.uint16)
    bgra = np.dstack([deep[..., ::-1], np.full(deep.shape[:2], top, np.uint16)])
    cv2.imwrite(path := f"{tmp_path}/deep{suffix}", deep[..., 0] if n_channels == 1 else bgra[..., :n_channels])
    loaded, notes = read(path)
    assert np.abs(loaded.astype(int) - (RAMP[..., :1] if n_channels == 1 else RAMP)).max() <= 1
    assert (f"{bits} of 16 bits" in notes) == (bits < 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    source = picture("RGBA" if mode == "P" else mode)
    source.putalpha(Image.fromarray(np.where(np.arange(WIDTH) < 10, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, 0)))
    source = source.quantize(256) if mode == "P" else source
    source.save(tmp_path / "glass.png")
    loaded, notes = read(tmp_path / "glass.png")
    assert (loaded[:, :10] == 255).all() and not notes
    np.testing.assert_array_equal(loaded[:, 10:], np.asarray(source.convert("RGBA").convert("RGB"))[:, 10:])
    loaded, notes = read(put(tmp_path / "clear.png", np.dstack([RAMP, 0 * RAMP[..., 0]])))
    assert (loaded == RAMP).all() and "transparent" in notes


# What each orientation means, by numpy (EXIF 2.3, table 6): the stored array to the upright one.
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1]}
UPRIGHT |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1)}
UPRIGHT |= {8: np.rot90}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_turns_pictures_and_the_masks_drawn_before_it(tmp_path: Path, orientation: int) -> None:
    exif, path, upright = Image.Exif(), tmp_path / "turned.jpg", UPRIGHT[orientation]
    exif[0x0112] = orientation
    put(path, RAMP, exif=exif, quality=100, subsampling=0)
    assert np.abs(images.load_image(path).astype(int) - upright(RAMP)).mean() < 2
    shape = upright(TRUTH).shape
    assert images.load_image(path, max_side=WIDTH // 2 + 1).shape[:2] == tuple((side + 1) // 2 for side in shape)
    # Drawn on the stored pixels, or on the upright picture; 2 to 4 cannot be told apart by their proportions.
    expected = ((TRUTH, upright if orientation > 4 else UPRIGHT[1], orientation > 1),)
    expected += ((upright(TRUTH), UPRIGHT[1], orientation in (2, 3, 4)),)
    for drawn, turn, is_noted in expected:
        notes: list[str] = []
        mask = images.load_mask(put(tmp_path / "mask.png", drawn), shape, picture=path, notes=notes)
        np.testing.assert_array_equal(mask, turn(drawn))
        assert bool(notes) == is_noted


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\0\x2a\xff\xff\xff\xff", b"no TIFF header at all", b"II"])
@pytest.mark.parametrize("name", ["odd.jpg", "odd.png"])
def test_broken_exif_does_not_lose_the_picture(tmp_path: Path, exif: bytes, name: str) -> None:
    assert read(put(tmp_path / name, RAMP, exif=b"Exif\0\0" + exif))[0].shape == RAMP.shape


@pytest.mark.parametrize("suffix, number", [(".gif", 1), (".webp", 1), (".png", 1), (".tif", 2)])
def test_one_page_of_several_is_chosen_and_said(tmp_path: Path, suffix: str, number: int) -> None:
    small, whole = picture().resize((9, 6)), picture()
    pages = [small, whole, small] if suffix == ".tif" else [whole, whole.rotate(180)]
    options = {"lossless": True} if suffix == ".webp" else {}
    pages[0].save(tmp_path / f"film{suffix}", save_all=True, append_images=pages[1:], **options)
    loaded, notes = read(tmp_path / f"film{suffix}")
    assert np.abs(loaded.astype(int) - RAMP).mean() < 9 and f"number {number}" in notes  # a GIF has a palette


# What is in a file -> a word of the reason.
NO_PICTURES = {
    "zero.png": (b"", "0 bytes"),
    "text.jpg": (b"this is a shopping list, not a picture\n" * 40, "cannot be read as a picture"),
    "noise.jpg": (b"\xff\xd8\xff\xe0" + bytes(range(256)), "cannot be read"),
    "half.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "cannot be read"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC, as iPhones"),
    "raw.tif": (b"II*\0" + bytes(range(200)), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", [*NO_PICTURES, "float.tif"])
def test_what_is_no_picture_is_refused_in_words(tmp_path: Path, name: str) -> None:
    put(tmp_path / "float.tif", RAMP[..., 0] / np.float32(255))
    content, words = NO_PICTURES.get(name, (None, "float32 values from 0 to 1"))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(images.ImageError, match=f"{name} .*{words}"):
        images.load_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".gif", ".bmp"])
def test_damaged_files_are_refused_or_read_but_never_crash(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    whole = np.fromfile(put(tmp_path / f"good{suffix}", rng.integers(0, 256, (60, 70, 3), np.uint8)), np.uint8)
    for part in (0.02, 0.8):
        whole[: int(len(whole) * part)].tofile(tmp_path / "cut.bin")
        with pytest.raises(images.ImageError):
            images.load_image(tmp_path / "cut.bin")
    for number in range(20):
        flipped = whole.copy()
        flipped[rng.integers(0, len(whole), 6)] ^= 1 << rng.integers(0, 8, 6, np.uint8)
        flipped.tofile(tmp_path / "flipped.bin")
        with suppress(images.ImageError):
            (images.load_mask if number % 3 == 0 else images.load_image)(tmp_path / "flipped.bin")


def test_links_folders_pipes_and_missing_files(tmp_path: Path) -> None:
    images.save_png(tmp_path / "Ordner é" / "聖母 🎨.png", RAMP)
    (tmp_path / "link.png").symlink_to(tmp_path / "Ordner é" / "聖母 🎨.png")
    np.testing.assert_array_equal(images.load_image(tmp_path / "link.png"), RAMP)
    (tmp_path / "broken.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("broken.png", "loop.png", "pipe.png", ".", "x"):
        with pytest.raises(images.ImageError, match="does not exist or is no ordinary file"):
            images.load_image(tmp_path / name)


def test_huge_files_are_refused_from_their_header_or_decoded_at_reduced_size(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    content = put(tmp_path / "huge.jpg", np.full((480, 1000), 90, np.uint8)).read_bytes()
    assert images.load_image(tmp_path / "huge.jpg").shape == (120, 250, 3)
    assert images.load_image(tmp_path / "huge.jpg", max_side=50).shape == (24, 50, 3)
    start = content.index(b"\xff\xc0")  # baseline frame header; 0xC2 announces a progressive one
    (tmp_path / "progressive.jpg").write_bytes(content[: start + 1] + b"\xc2" + content[start + 2 :])
    whole = put(tmp_path / "whole.png", np.zeros((480, 1000), np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    for name in ("progressive.jpg", "cut.png"):
        with pytest.raises(images.ImageError, match="1000 x 480 pixels; at most 100,000"):
            images.load_image(tmp_path / name, max_side=64)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))), st.integers(1, 60))
def test_saved_pictures_are_the_same_and_shrink(tmp_path_factory, array: np.ndarray, side: int) -> None:
    path = tmp_path_factory.mktemp("round") / "trip.png"
    images.save_png(path, array)
    assert images.pixel_hash(images.load_image(path)) == images.pixel_hash(array)
    small = images.load_image(path, max_side=side)
    assert max(small.shape[:2]) == min(max(array.shape[:2]), side) and min(small.shape[:2]) >= 1
    with pytest.raises(ValueError, match="Cannot save"):
        images.save_png(path.with_name("wrong.png"), array.astype(np.float32))
    assert [file.name for file in path.parent.iterdir()] == ["trip.png"]


def palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def coloured(background: tuple[int, int, int], colour: tuple[int, int, int]) -> np.ndarray:
    return np.where(TRUTH[..., None], np.uint8(colour), np.uint8(background))


REGIONS = np.zeros((HEIGHT, WIDTH), np.uint8)
REGIONS[TRUTH] = np.repeat([1, 2, 130, 200, 255], 2)[None].repeat(4, 0).ravel()
LAYER = np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), TRUTH * np.uint8(255)])
WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
CONVENTIONS = {
    "binary.png": TRUTH * np.uint8(255),
    "VisA.png": TRUTH * np.uint8(3),
    "16 bits, ids.png": TRUTH.astype(np.uint16),
    "32 bits.tif": TRUTH.astype(np.int32) * 70_000,
    "float.tif": TRUTH.astype(np.float32),
    "regions.png": REGIONS,
    "regions of 16 bits.png": REGIONS.astype(np.uint16) * 200,
    "classes.png": np.where(TRUTH & (np.arange(WIDTH) < 25), 85, TRUTH * 255).astype(np.uint8),
    "dark rest.png": np.where(TRUTH, 255, 40).astype(np.uint8),
    "one and two.png": (1 + TRUTH).astype(np.uint8),
    "red on black.png": coloured(BLACK, RED),
    "red on white.png": coloured(WHITE, RED),
    "palette on white.png": palette(TRUTH, WHITE, RED),
    "palette of grey, sorted by use.png": palette(~TRUTH, WHITE, BLACK),
    "black paint on a layer.png": LAYER,
    "JPEG.jpg": TRUTH * np.uint8(255),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_masks_of_all_conventions(tmp_path: Path, name: str) -> None:
    source = CONVENTIONS[name]
    image = source if isinstance(source, Image.Image) else Image.fromarray(source)
    image.save(tmp_path / name, **({"quality": 75} if name.endswith("jpg") else {}))
    loaded = images.load_mask(tmp_path / name)
    assert loaded.dtype == bool
    np.testing.assert_array_equal(loaded, TRUTH)


SOFT = cv2.GaussianBlur(np.kron(TRUTH, np.ones((9, 9))) * 200, (0, 0), 4).astype(np.uint8)
NOISY = np.clip(np.random.default_rng(0).normal(0, 9, (HEIGHT, WIDTH)) + TRUTH * 240, 0, 255).astype(np.uint8)
BRUSH = np.linspace(0, 255, 900).astype(np.uint8)[None].repeat(40, 0)
HOLE = np.dstack([RAMP, np.where(TRUTH, 0, 255).astype(np.uint8)])
ODD = [("grey", SOFT, SOFT > 127), ("grey", NOISY, TRUTH), ("grey", BRUSH, BRUSH > 127), ("grey", RAMP, None)]


@pytest.mark.parametrize("words, mask, expected", [*ODD, ("inverted", ~TRUTH, ~TRUTH), ("inverted", HOLE, ~TRUTH)])
def test_odd_masks_are_noted(tmp_path: Path, words: str, mask: np.ndarray, expected: np.ndarray | None) -> None:
    notes: list[str] = []
    loaded = images.load_mask(put(tmp_path / "mask.png", mask), notes=notes)
    assert words in " | ".join(notes)
    if expected is not None:  # grey: half of what 8 bits can hold, not of the largest value
        np.testing.assert_array_equal(loaded, expected)


def test_mask_is_brought_to_the_size_of_its_picture(tmp_path: Path) -> None:
    truth = np.zeros((40, 60), bool)
    truth[10:20, 30:60] = True
    images.save_png(tmp_path / "mask.png", truth)
    np.testing.assert_array_equal(images.load_mask(tmp_path / "mask.png", (20, 30)), truth[::2, ::2])
    twice = np.kron(truth, np.ones((2, 2), bool))
    np.testing.assert_array_equal(images.load_mask(tmp_path / "mask.png", twice.shape), twice)
    with pytest.raises(images.ImageError, match="proportions"):
        images.load_mask(tmp_path / "mask.png", (30, 30))


@pytest.mark.parametrize("thickness", [1, 2])
@pytest.mark.parametrize("slope", [0, 700])
def test_a_hairline_stays_whole_when_its_mask_shrinks(tmp_path: Path, thickness: int, slope: int) -> None:
    line = np.zeros((2048, 2048), np.uint8)
    cv2.line(line, (100, 900), (1900, 900 + slope), 1, thickness)
    small = images.load_mask(put(tmp_path / "line.png", line), (288, 288))
    assert small[:, 20:260].any(axis=0).all()  # no gap along the line
    assert small.sum() < 3 * 1800 / 7.1  # and no broad band
