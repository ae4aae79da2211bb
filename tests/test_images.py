"""Every hostile file has a defined outcome: read as stated, or refused in words."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from helpers.data import images

HEIGHT, WIDTH = 24, 37
RAMP = np.dstack(
    [
        np.tile(np.linspace(0, 255, WIDTH), (HEIGHT, 1)),
        np.tile(np.linspace(0, 255, HEIGHT)[:, None], (1, WIDTH)),
        np.full((HEIGHT, WIDTH), 60.0),
    ]
).astype(np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RAMP).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size whose only data is one row of zeros: tiny on disk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * (1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    picture().save(path, **({"lossless": True} if suffix == ".webp" else {}))
    loaded = images.load_image(path)
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, RAMP)


@pytest.mark.parametrize("mode, suffix", [("L", ".png"), ("P", ".png"), ("CMYK", ".jpg"), ("1", ".png"), ("L", ".jpg")])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    source = picture(mode)
    source.save(path, **({"quality": 95} if suffix == ".jpg" else {}))
    loaded = images.load_image(path)
    assert loaded.shape == (HEIGHT, WIDTH, 3)
    difference = np.abs(loaded.astype(int) - np.asarray(source.convert("RGB")).astype(int))
    assert difference.mean() < 6  # CMYK passes through JPEG; the others are exact


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    for suffix in (".png", ".tif"):
        Image.fromarray(values).save(tmp_path / f"deep{suffix}")
        loaded = images.load_image(tmp_path / f"deep{suffix}")
        np.testing.assert_array_equal(loaded[..., 0], np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("factor, allowed", [(1.0, True), (255.0, True), (1000.0, False), (np.nan, False)])
def test_float_tiffs_are_read_in_two_ranges_only(tmp_path: Path, factor: float, allowed: bool) -> None:
    values = (np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * factor).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    if allowed:
        loaded = images.load_image(tmp_path / "float.tif")
        np.testing.assert_array_equal(loaded[..., 1], np.rint(values / factor * 255).astype(np.uint8))
    else:
        with pytest.raises(images.ImageError, match="8-bit PNG"):
            images.load_image(tmp_path / "float.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    source = picture(mode)
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, 10:] = 255
    source.putalpha(Image.fromarray(alpha))
    source.save(tmp_path / "glass.png")
    loaded = images.load_image(tmp_path / "glass.png")
    assert (loaded[:, :10] == 255).all()
    np.testing.assert_array_equal(loaded[:, 10:], np.asarray(picture(mode).convert("RGB"))[:, 10:])


def test_palette_transparency_becomes_white(tmp_path: Path) -> None:
    source = Image.new("P", (WIDTH, HEIGHT), 0)
    source.putpalette([10, 20, 30, 200, 100, 50])
    source.paste(1, (0, 0, 5, HEIGHT))
    source.save(tmp_path / "palette.png", transparency=0)
    loaded = images.load_image(tmp_path / "palette.png")
    assert (loaded[:, 5:] == 255).all() and (loaded[:, :5] == (200, 100, 50)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [None, 12])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, max_side: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    ours = images.load_image(tmp_path / "turned.jpg", max_side=max_side).astype(int)
    # What each orientation means, by numpy (EXIF 2.3, table 6): the stored array to the upright one.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](RAMP)
    if max_side is None:
        assert ours.shape == upright.shape
        assert np.abs(ours - upright).mean() < 2
    else:
        assert max(ours.shape) == max_side
        assert (ours.shape[0] > ours.shape[1]) == (upright.shape[0] > upright.shape[1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\0\x2a\xff\xff\xff\xff", b"no TIFF header at all", b"II"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_broken_exif_does_not_lose_the_picture(tmp_path: Path, exif: bytes, suffix: str) -> None:
    picture().save(tmp_path / f"odd{suffix}", exif=b"Exif\0\0" + exif)
    assert images.load_image(tmp_path / f"odd{suffix}").shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"film{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (images.load_image(tmp_path / f"film{suffix}") == (200, 0, 0)).all()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("zero.png", b"", "0 bytes"),
        ("text.jpg", b"this is a shopping list, not a picture\n" * 40, "no picture"),
        ("page.png", b"<!DOCTYPE html><html>404</html>", "no picture"),
        ("noise.jpg", b"\xff\xd8\xff\xe0" + bytes(range(256)), "no picture|damaged"),
        ("half.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "no picture"),
        ("script.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(images.ImageError, match=words) as caught:
        images.load_image(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".gif", ".bmp"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.8])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole{suffix}")
    content = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(images.ImageError):
        images.load_image(tmp_path / f"cut{suffix}")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_bit_flips_are_read_or_refused_but_never_crash(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    outcomes = set()
    for suffix in (".jpg", ".png", ".webp", ".tif", ".gif"):
        picture().save(tmp_path / f"good{suffix}")
        content = bytearray((tmp_path / f"good{suffix}").read_bytes())
        for _ in range(60):
            broken = bytearray(content)
            for place in rng.integers(0, len(broken), 6):
                broken[place] ^= 1 << rng.integers(8)
            (tmp_path / "flipped.bin").write_bytes(broken)
            try:
                loaded = images.load_image(tmp_path / "flipped.bin", max_side=100)
                assert loaded.ndim == 3 and loaded.dtype == np.uint8
                outcomes.add("read")
            except images.ImageError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("name", ["with space.png", "Jungfrau Königin ß.png", "聖母 🎨.png", "x" * 180 + ".png"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    images.save_png(tmp_path / "Ordner mit Leerzeichen é" / name, RAMP)
    np.testing.assert_array_equal(images.load_image(tmp_path / "Ordner mit Leerzeichen é" / name), RAMP)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    picture().save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "claims.jpg")
    np.testing.assert_array_equal(images.load_image(tmp_path / "claims.jpg"), RAMP)


def test_links_are_followed_and_broken_ones_refused(tmp_path: Path) -> None:
    images.save_png(tmp_path / "real.png", RAMP)
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "broken.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    np.testing.assert_array_equal(images.load_image(tmp_path / "link.png"), RAMP)
    with pytest.raises(images.ImageError, match=r"link to gone\.png"):
        images.load_image(tmp_path / "broken.png")
    with pytest.raises(images.ImageError, match="link"):
        images.load_image(tmp_path / "loop.png")


def test_folders_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (("pipe.png", "ordinary"), (".", "folder"), ("nothing.png", "does not exist")):
        with pytest.raises(images.ImageError, match=words):
            images.load_image(tmp_path / name)


def test_one_pixel(tmp_path: Path) -> None:
    images.save_png(tmp_path / "dot.png", np.array([[[1, 2, 3]]], np.uint8))
    assert images.load_image(tmp_path / "dot.png", max_side=5).tolist() == [[[1, 2, 3]]]


def test_huge_png_is_refused_from_its_header(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 20_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for max_side in (None, 288):
        with pytest.raises(images.ImageError, match=r"400000000|20000 x 20000"):
            images.load_image(tmp_path / "huge.png", max_side=max_side)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_just_too_large_png_names_the_limit(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_header(10_000, 8_001))
    with pytest.raises(images.ImageError, match=r"10000 x 8001 pixels; at most 80,000,000"):
        images.load_image(tmp_path / "large.png")


@pytest.fixture(scope="module")
def huge_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("huge") / "huge.jpg"
    Image.new("L", (20_000, 20_000), 90).save(path, quality=20)
    return path


@pytest.mark.parametrize("max_side", [None, 288])
def test_huge_jpeg_is_decoded_at_reduced_size(huge_jpeg: Path, max_side: int | None) -> None:
    code = (
        "import resource, sys; from helpers.data import images\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"image = images.load_image(sys.argv[1], max_side={max_side})\n"
        "print(*image.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, huge_jpeg], capture_output=True, text=True, check=True)
    height, width, _, megabytes = map(int, done.stdout.split())
    assert (height, width) == ((288, 288) if max_side else (5000, 5000))
    assert megabytes < 400  # decoded whole it would be 1,200


def test_huge_progressive_jpeg_is_refused(huge_jpeg: Path, tmp_path: Path) -> None:
    content = huge_jpeg.read_bytes()
    start = content.index(b"\xff\xc0")  # baseline frame header; 0xC2 announces a progressive one
    (tmp_path / "progressive.jpg").write_bytes(content[: start + 1] + b"\xc2" + content[start + 2 :])
    with pytest.raises(images.ImageError, match="20000 x 20000"):
        images.load_image(tmp_path / "progressive.jpg", max_side=64)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_save_then_load_is_identity(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("round") / "trip.png"
    images.save_png(path, array)
    first = path.read_bytes()
    np.testing.assert_array_equal(images.load_image(path), array)
    images.save_png(path, array)
    assert path.read_bytes() == first


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
def test_resize_never_enlarges_and_meets_the_longer_side(height: int, width: int, max_side: int) -> None:
    small = images.resize(np.zeros((height, width, 3), np.uint8), max_side)
    assert max(small.shape[:2]) == min(max(height, width), max_side)
    assert min(small.shape[:2]) >= 1
    assert images.resize(np.ones((height, width), bool), max_side).all()


def test_resize_and_save_refuse_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_side is 0"):
        images.resize(RAMP, 0)
    for wrong in (RAMP.astype(np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="Cannot save"):
            images.save_png(tmp_path / "wrong.png", wrong)
    assert not list(tmp_path.iterdir())


def test_masks_of_all_conventions(tmp_path: Path) -> None:
    truth = np.zeros((HEIGHT, WIDTH), bool)
    truth[5:9, 20:30] = True
    soft = np.where(truth, 255, 40).astype(np.uint8)  # soft edge or JPEG noise below half stays False
    written = {
        "binary.png": Image.fromarray(truth.astype(np.uint8) * 255),
        "visa.png": Image.fromarray(truth.astype(np.uint8) * 3),
        "soft.png": Image.fromarray(soft),
        "colour.png": Image.fromarray(np.dstack([truth * 255, truth * 0, truth * 0]).astype(np.uint8)),
        "one_bit.png": Image.fromarray(truth),
        "deep.png": Image.fromarray(truth.astype(np.uint16) * 65535),
    }
    for name, mask in written.items():
        mask.save(tmp_path / name)
        loaded = images.load_mask(tmp_path / name)
        assert loaded.dtype == bool, name
        np.testing.assert_array_equal(loaded, truth, err_msg=name)


def test_mask_is_brought_to_the_size_of_its_picture(tmp_path: Path) -> None:
    truth = np.zeros((40, 60), bool)
    truth[10:20, 30:60] = True
    images.save_png(tmp_path / "mask.png", truth)
    np.testing.assert_array_equal(images.load_mask(tmp_path / "mask.png", (20, 30)), truth[::2, ::2])
    np.testing.assert_array_equal(
        images.load_mask(tmp_path / "mask.png", (80, 120)), truth.repeat(2, axis=0).repeat(2, axis=1)
    )
    with pytest.raises(images.ImageError, match="proportions"):
        images.load_mask(tmp_path / "mask.png", (30, 30))


def test_a_folder_of_masks_is_joined(tmp_path: Path) -> None:
    first, second = np.zeros((2, HEIGHT, WIDTH), bool)
    first[0, 0] = second[-1, -1] = True
    (tmp_path / "empty").mkdir()
    images.save_png(tmp_path / "000" / "000.png", first)
    images.save_png(tmp_path / "000" / "001.png", second.astype(np.uint8) * 250)
    np.testing.assert_array_equal(images.load_mask(tmp_path / "000"), first | second)
    with pytest.raises(images.ImageError, match="without masks"):
        images.load_mask(tmp_path / "empty")
    images.save_png(tmp_path / "000" / "002.png", first[:, :5])
    with pytest.raises(images.ImageError, match="differ in size"):
        images.load_mask(tmp_path / "000")
