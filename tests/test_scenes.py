"""Rendered scenes: reproducible, damaged where the mask says, and never of an artwork under test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers import painting, scenes, sources, synthesis


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Few pictures of the installed packages: noise stands for the textiles, which are not installed in tests."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for number in range(20):
        scenes.images.save_png(folder / f"textile_{number:02d}.png", rng.integers(0, 255, (90, 90, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_textile_paths", lambda part: sorted(folder.glob("textile_*.png")))
        patch.setattr(scenes, "_N_PAINTED", {"train": 1, "held_out": 1})
        patch.setattr(painting, "CANVAS_SIDE", 128)
        yield folder


@pytest.fixture(scope="module")
def maker(folder: Path) -> scenes.SceneMaker:
    return scenes.SceneMaker(folder, size=96)


@pytest.fixture(scope="module")
def many(maker: scenes.SceneMaker) -> list[scenes.Scene]:
    return [maker(1, index) for index in range(60)]


def test_a_scene_is_a_function_of_its_seed(maker: scenes.SceneMaker) -> None:
    first, again, other = maker(7, 0, 3), maker(7, 0, 3), maker(7, 1, 3)
    for name in ("reference", "image", "mask"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.kind == again.kind and not np.array_equal(first.image, other.image)


def test_labels_and_masks_agree(many: list[scenes.Scene]) -> None:
    damaged = [scene for scene in many if scene.is_damaged]
    assert 24 <= len(damaged) <= 48  # three fifths of 60, within three standard deviations
    for scene in many:
        assert scene.image.shape == scene.reference.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.mask.any() == scene.is_damaged
        assert (scene.kind >= 0) == (scene.colour >= 0) == (scene.place >= 0) == scene.is_damaged
    centred = sum(synthesis.place_of(scene.mask) == synthesis.PLACES[scene.place] for scene in damaged)
    assert centred >= 0.9 * len(damaged)  # rounding moves a few over the border of a cell


def test_only_trained_kinds_are_drawn(many: list[scenes.Scene]) -> None:
    kinds = {scene.kind for scene in many} - {-1}
    assert len(kinds) >= 7 and kinds <= set(range(len(scenes.TRAINED_KINDS)))
    assert not set(scenes.TRAINED_KINDS) & set(scenes.HELD_OUT_KINDS)
    assert set(scenes.TRAINED_KINDS) | set(scenes.HELD_OUT_KINDS) == set(synthesis.LOCAL_KINDS)


def test_more_photographs_show_the_same_thing(maker: scenes.SceneMaker) -> None:
    """Small and blurred, two photographs of one thing are closer than photographs of two things."""

    def small(picture: np.ndarray) -> np.ndarray:
        tiny = scenes.cv2.resize(picture, (6, 6), interpolation=scenes.cv2.INTER_AREA).astype(float)
        return (tiny - tiny.mean()).ravel()

    closer = 0
    for index in range(6):
        reference = small(maker(3, index).reference)
        same = np.linalg.norm(reference - small(maker.photographs(2, 3, index)[1]))
        other = np.linalg.norm(reference - small(maker.photographs(2, 3, index + 1)[1]))
        closer += same < other
    assert closer >= 5


def test_held_out_pictures_are_others(maker: scenes.SceneMaker, folder: Path) -> None:
    held_out = scenes.SceneMaker(folder, part="held_out", size=96)
    looks = [{picture.tobytes() for picture in one._photographs} for one in (maker, held_out)]
    assert looks[0] and looks[1] and not looks[0] & looks[1]


def test_motifs_of_the_artworks_are_not_among_the_photographs() -> None:
    used = " ".join(names for _, names in scenes._PHOTOGRAPHS.values())
    for motif in sources.MOTIFS:
        assert motif.file not in used and motif.part[0] not in used
    assert "camera" not in used


def test_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part is 'test'; allowed are train, held_out"):
        scenes.SceneMaker(tmp_path, part="test")


def test_missing_package_names_the_command() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
        scenes._package_folder("no_such_package")
