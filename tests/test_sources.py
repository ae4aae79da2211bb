"""Embedded paintings, and the network code against a real HTTP server on this machine that misbehaves as asked."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from helpers import data
from helpers.data import images, painting, sources
from helpers.data.sources import REINTERPRETATION, REPLICA, Work
from helpers.records import Sample

# --- embedded paintings ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    folder = tmp_path_factory.mktemp("art") / "embedded"
    return folder, sources.embedded_artworks(
        folder, max_side=96, seed=5, n_genuine=10, n_replicas=1, n_reinterpretations=4
    )


def test_embedded_artworks_are_a_complete_dataset(embedded: tuple[Path, list[Sample]]) -> None:
    folder, samples = embedded
    dataset = data.open_dataset(folder, verify_files=True)
    assert list(dataset.samples) == samples
    assert dataset.categories == ("portrait_in_orange", "still_life_with_coffee")
    assert data.counts(samples) == {
        category: {"train": {"good": 10}, "test": {"replica": 1, "reinterpretation": 4}}
        for category in dataset.categories
    }
    assert len({sample.group for sample in samples}) == len({sample.sha256 for sample in samples}) == 30
    for sample in samples:
        height, width = images.load_image(sample.image_path).shape[:2]
        assert 0.85 * 96 - 1 <= max(height, width) <= 96 and height != width
        assert sample.mask_path is None
    reading = data.read_folder(folder / "portrait_in_orange")
    assert reading.layout == data.layouts.MVTEC and not reading.bad_files


def test_embedded_artworks_same_seed_same_bytes(
    embedded: tuple[Path, list[Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, samples = embedded
    monkeypatch.setattr(sources, "MOTIFS", sources.MOTIFS[1:])  # one painting is enough here
    first = {f"{s.category}/{s.image_path.name}": s.sha256 for s in samples}
    settings = {"max_side": 96, "n_genuine": 1, "n_replicas": 0, "n_reinterpretations": 0}
    again = sources.embedded_artworks(tmp_path / "again", seed=5, **settings)
    assert {first[f"{s.category}/{s.image_path.name}"] for s in again} == {s.sha256 for s in again}
    other = sources.embedded_artworks(tmp_path / "again", seed=6, **settings)  # other settings: made anew
    assert not {s.sha256 for s in other} & {s.sha256 for s in again}
    assert len(data.open_dataset(tmp_path / "again").samples) == 1


def test_embedded_artworks_are_not_made_twice(embedded: tuple[Path, list[Sample]]) -> None:
    folder, samples = embedded
    before = samples[0].image_path.stat().st_mtime_ns
    again = sources.embedded_artworks(folder, max_side=96, seed=5, n_genuine=10, n_replicas=1, n_reinterpretations=4)
    assert again == samples and samples[0].image_path.stat().st_mtime_ns == before


def test_embedded_artworks_respect_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(sources.SourceError, match="holds other files"):
        sources.embedded_artworks(tmp_path, max_side=64)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="max_side is 4000"):
        sources.embedded_artworks(tmp_path / "x", max_side=4000)
    with pytest.raises(ValueError, match="Counts are 0, 4, 4"):
        sources.embedded_artworks(tmp_path / "x", n_genuine=0)


def test_there_is_something_to_find_and_it_is_no_trick_of_the_camera(embedded: tuple[Path, list[Sample]]) -> None:
    """The nearest neighbour among small Lab thumbnails tells other works from photographs of the original."""
    _, samples = embedded

    def thumbnail(sample: Sample) -> np.ndarray:
        image = cv2.resize(images.load_image(sample.image_path), (12, 12), interpolation=cv2.INTER_AREA)
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab).reshape(-1, 3)
        return ((lab - lab.mean(axis=0)) / lab.std()).ravel()

    for category in ("portrait_in_orange", "still_life_with_coffee"):
        mine = [sample for sample in samples if sample.category == category]
        good = np.stack([thumbnail(s) for s in mine if not s.is_anomalous])
        between = np.linalg.norm(good[:, None] - good[None], axis=2)
        np.fill_diagonal(between, np.inf)
        normal = between.min(axis=1)
        for kind in (REPLICA, REINTERPRETATION):
            odd = np.stack([thumbnail(s) for s in mine if s.kind == kind])
            anomalous = np.linalg.norm(odd[:, None] - good[None], axis=2).min(axis=1)
            auroc = (anomalous[:, None] > normal[None]).mean()
            assert auroc > 0.8, (category, kind, normal, anomalous)


def test_a_replica_has_other_strokes(embedded: tuple[Path, list[Sample]]) -> None:
    """Brought over each other, two photographs of the original agree better than a photograph of a replica does."""
    _, samples = embedded

    def grey(sample: Sample) -> np.ndarray:
        return cv2.resize(cv2.cvtColor(images.load_image(sample.image_path), cv2.COLOR_RGB2GRAY), (96, 96))

    for category in ("portrait_in_orange", "still_life_with_coffee"):
        first, *others = (sample for sample in samples if sample.category == category)
        agreement: dict[str, list[float]] = {"good": [], REPLICA: []}
        for sample in others:
            if sample.kind in agreement:
                stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
                warp = np.eye(3, dtype=np.float32)
                value, _ = cv2.findTransformECC(grey(first), grey(sample), warp, cv2.MOTION_HOMOGRAPHY, stop)
                agreement[sample.kind].append(value)
        assert max(agreement[REPLICA]) < min(agreement["good"]), (category, agreement)


def test_photographs_differ_as_sessions_do() -> None:
    work = painting.mosaic(np.full((200, 300, 3), (180, 90, 40), np.uint8), np.random.default_rng(0))
    shots = [painting.photograph(work, max_side=120, rng=np.random.default_rng(i)) for i in range(6)]
    same = painting.photograph(work, max_side=120, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(shots[0], same)
    assert len({shot.shape for shot in shots}) > 3
    brightness = [float(shot.mean()) for shot in shots]
    assert max(brightness) / min(brightness) > 1.05
    assert all(shot.dtype == np.uint8 and shot.shape[1] > shot.shape[0] for shot in shots)


def test_a_replaced_part_leaves_the_rest_alone() -> None:
    rng = np.random.default_rng(3)
    motif = rng.integers(0, 256, (120, 160, 3), np.uint8)
    part = np.full((30, 30, 3), (250, 10, 10), np.uint8)
    changed = painting.with_part(motif, part, (0.5, 0.5), (0.2, 0.25))
    differs = (changed != motif).any(axis=2)
    ys, xs = np.nonzero(differs)
    assert differs.mean() > 0.08
    assert changed[56:64, 76:84].std(axis=(0, 1)).max() < 0.2 * motif.std()  # the middle shows the part alone
    assert xs.min() >= 160 * 0.28 and xs.max() <= 160 * 0.72 and ys.min() >= 120 * 0.22 and ys.max() <= 120 * 0.78
    edge = painting.with_part(motif, part, (0.02, 0.98), (0.2, 0.25))  # reaches over the border
    assert edge.shape == motif.shape and (edge != motif).any()


@pytest.mark.parametrize(
    "restyle",
    [
        lambda image, rng: painting.mosaic(image, rng, n_tiles=200),
        painting.poster,
        lambda image, rng: painting.recoloured(image, 120),
    ],
    ids=["mosaic", "poster", "recoloured"],
)
def test_restyled_pictures_are_new_pictures_of_the_same_size(restyle: Callable) -> None:
    image = cv2.resize(np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8), (90, 61))
    new = restyle(image, np.random.default_rng(2))
    assert new.shape == image.shape and new.dtype == np.uint8
    assert (new != image).any(axis=2).mean() > 0.5
    np.testing.assert_array_equal(new, restyle(image, np.random.default_rng(2)))


def test_recoloured_turns_the_hue_and_keeps_the_light() -> None:
    red = np.full((4, 5, 3), (200, 20, 20), np.uint8)
    assert painting.recoloured(red, 120)[0, 0].tolist() == [20, 200, 20]
    assert painting.recoloured(red, 240)[0, 0].tolist() == [20, 20, 200]


# --- Wikimedia Commons -----------------------------------------------------------------------------------------------


def jpeg(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass
class Commons:
    """A small Commons: ``files`` by name, ``trouble`` by name (list of behaviours, used up one per request)."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    mimes: dict[str, str] = field(default_factory=dict)
    originals: set[str] = field(default_factory=set)  # served as they are, so that SHA-1 can be checked
    wrong_sha1: set[str] = field(default_factory=set)
    trouble: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)

    def api(self) -> str:
        return f"{self.address}/w/api.php"

    def entry(self, name: str) -> dict:
        quoted = urllib.parse.quote(name)
        url = f"{self.address}/original/{quoted}"
        return {
            "url": url,
            "thumburl": url if name in self.originals else f"{self.address}/thumb/1280px-{quoted}",
            "thumbwidth": 64,
            "thumbheight": 48,
            "sha1": "0" * 40 if name in self.wrong_sha1 else hashlib.sha1(self.files[name]).hexdigest(),
            "mime": self.mimes.get(name, "image/jpeg"),
            "descriptionurl": f"{self.address}/wiki/File:{quoted}",
            "extmetadata": {
                "LicenseShortName": {"value": self.licences.get(name, "Public domain")},
                "Artist": {"value": '<a href="//x">Leonardo  da Vinci</a>'},
            },
        }

    def answer(self, query: dict[str, list[str]]) -> dict:
        assert query["iiurlwidth"] == ["1280"] and "sha1" in query["iiprop"][0]
        pages, normalized = [], []
        for title in query["titles"][0].split("|"):
            canonical = title.replace("_", " ")
            if canonical != title:
                normalized.append({"from": title, "to": canonical})
            name = next((n for n in self.files if n.replace("_", " ") == canonical.removeprefix("File:")), None)
            page = {"title": canonical}
            pages.append(page | ({"missing": True} if name is None else {"imageinfo": [self.entry(name)]}))
        return {"query": {"normalized": normalized, "pages": pages}}


@pytest.fixture
def commons(monkeypatch: pytest.MonkeyPatch) -> Iterator[Commons]:
    monkeypatch.setenv("no_proxy", "*")
    state = Commons()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.agents.add(self.headers["User-Agent"])
            parts = urllib.parse.urlsplit(self.path)
            is_api = parts.path == "/w/api.php"
            name = "api" if is_api else urllib.parse.unquote(parts.path.rpartition("/")[2]).removeprefix("1280px-")
            state.asked.append(name)
            behaviour = (state.trouble.get(name) or ["fine"]).pop(0)
            body = (
                json.dumps(state.answer(urllib.parse.parse_qs(parts.query))).encode() if is_api else state.files[name]
            )
            if behaviour == "disconnect":
                return
            if behaviour.startswith("status"):
                _, code, *wait = behaviour.split()
                self.send_response(int(code))
                if wait:
                    self.send_header("Retry-After", wait[0])
                self.end_headers()
                return
            body = {"html": b"<html>busy</html>", "error": b'{"error": {"info": "bad question"}}'}.get(behaviour, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if behaviour == "truncated" else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


WORKS = (
    Work("Mona_Lisa,_scan.jpg", "mona_lisa"),
    Work("Prado copy (é).jpg", "mona_lisa", REPLICA),
    Work("L.H.O.O.Q.jpg", "mona_lisa", REINTERPRETATION),
)


def fetch(commons: Commons, target: Path, works: tuple[Work, ...] = WORKS) -> tuple[list[Sample], str]:
    lines: list[str] = []
    samples = sources.wikimedia(target, works=works, api=commons.api(), pause=0, tries=3, log=lines.append)
    return samples, "\n".join(lines)


@pytest.fixture
def three(commons: Commons) -> Commons:
    commons.files = {work.file: jpeg(seed) for seed, work in enumerate(WORKS)}
    return commons


def test_wikimedia_writes_a_dataset_with_licences(three: Commons, tmp_path: Path) -> None:
    samples, log = fetch(three, tmp_path)
    assert [(s.split, s.kind, s.is_anomalous) for s in samples] == [
        ("train", "good", False),
        ("test", "replica", True),
        ("test", "reinterpretation", True),
    ]
    assert list(data.open_dataset(tmp_path, verify_files=True).samples) == samples
    assert samples[0].image_path.read_bytes() == three.files[WORKS[0].file]
    assert samples[1].image_path.name == "Prado_copy_é.jpg"
    rows = sources._read_licences(tmp_path / "licences.csv")
    assert [row["author"] for row in rows] == ["Leonardo da Vinci"] * 3  # without its HTML
    assert rows[0]["licence"] == "Public domain" and rows[0]["original_sha1"] != rows[0]["sha256"]
    assert "64 x 48 px, Public domain" in log
    assert three.agents == {sources.USER_AGENT} and "https://" in sources.USER_AGENT
    assert data.read_folder(tmp_path).layout == data.layouts.MVTEC


def test_a_second_call_downloads_only_what_changed(three: Commons, tmp_path: Path) -> None:
    first, _ = fetch(three, tmp_path)
    three.asked.clear()
    assert fetch(three, tmp_path)[0] == first
    assert three.asked == ["api"]
    first[0].image_path.write_bytes(b"damaged on disk")
    three.files[WORKS[2].file] = jpeg(99)  # a new version on Commons
    three.asked.clear()
    again, _ = fetch(three, tmp_path)
    assert three.asked == ["api", WORKS[0].file, WORKS[2].file]
    assert again[0] == first[0] and again[2].sha256 != first[2].sha256


@pytest.mark.parametrize(
    "behaviours, words",
    [
        (["status 429 0"], "answered 429"),
        (["status 503", "fine"], "answered 503"),
        (["truncated"], "IncompleteRead"),
        (["disconnect"], "connection broke"),
    ],
)
def test_a_busy_server_is_asked_again(
    three: Commons, tmp_path: Path, behaviours: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    three.trouble[WORKS[0].file] = behaviours
    samples, log = fetch(three, tmp_path)
    assert len(samples) == 3 and words in log
    assert Counter(three.asked)[WORKS[0].file] == 2


@pytest.mark.parametrize(
    "behaviours, words, n_asked",
    [
        (["status 400"], "this width is not served", 1),
        (["status 404"], "answered 404", 1),
        (["status 500"] * 9, "answered 500 Internal Server Error, 3 times", 3),
        (["truncated"] * 9, "connection broke (IncompleteRead), 3 times", 3),
        (["html"], "cannot be read", 1),
    ],
)
def test_one_broken_file_is_skipped_with_a_line(
    three: Commons, tmp_path: Path, behaviours: list[str], words: str, n_asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    three.trouble[WORKS[1].file] = behaviours
    samples, log = fetch(three, tmp_path)
    assert [s.kind for s in samples] == ["good", "reinterpretation"]
    assert f"skipped {WORKS[1].file}" in log and words in log
    assert Counter(three.asked)[WORKS[1].file] == n_asked
    assert not list(tmp_path.rglob("*Prado*")) and not list(tmp_path.rglob(".*"))  # nothing half written


def test_what_may_not_be_used_is_skipped(three: Commons, tmp_path: Path) -> None:
    three.licences[WORKS[1].file] = "Fair use"
    three.mimes[WORKS[2].file] = "application/pdf"
    samples, log = fetch(three, tmp_path, (*WORKS, Work("Gone.jpg", "mona_lisa", REPLICA)))
    assert [s.kind for s in samples] == ["good"]
    for words in ("'Fair use'", "'application/pdf', not a picture", "skipped Gone.jpg: no file of this name"):
        assert words in log
    assert three.asked == ["api", WORKS[0].file]  # nothing of theirs was fetched


@pytest.mark.parametrize(
    "licence, is_free",
    [
        ("Public domain", True),
        ("PD-old-100", True),
        ("pd", True),
        ("CC0", True),
        ("CC BY 4.0", True),
        ("CC BY-SA 3.0", True),
        ("CC BY-NC 4.0", False),
        ("CC BY-NC-SA 4.0", False),
        ("CC BY-ND 2.0", False),
        ("Fair use", False),
        ("pdf licence", False),
        ("", False),
    ],
)
def test_free_licences(licence: str, is_free: bool) -> None:
    entry = {"extmetadata": {"LicenseShortName": {"value": licence}}, "mime": "image/jpeg"}
    assert (sources._unusable(entry) == "") == is_free


@pytest.mark.parametrize("is_wrong", [False, True])
def test_originals_are_checked_against_their_sha1(three: Commons, tmp_path: Path, is_wrong: bool) -> None:
    three.originals = {work.file for work in WORKS}
    three.wrong_sha1 = {WORKS[1].file} if is_wrong else set()
    samples, log = fetch(three, tmp_path)
    assert len(samples) == (2 if is_wrong else 3)
    assert ("SHA-1 differs" in log) == is_wrong


def test_too_large_a_file_is_skipped(three: Commons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three.files[WORKS[1].file] = jpeg(7, (640, 480))
    limit = (len(three.files[WORKS[0].file]) + len(three.files[WORKS[1].file])) // 2
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_BYTES", limit)
    samples, log = fetch(three, tmp_path)
    assert len(samples) == 2 and "is larger than" in log


@pytest.mark.parametrize(
    "behaviour, words",
    [
        ("status 403", "descriptive User-Agent"),
        ("status 404", "gave no usable answer"),
        ("html", "gave no usable answer"),
        ("error", "bad question"),
    ],
)
def test_refusals_of_the_server_are_explained(three: Commons, tmp_path: Path, behaviour: str, words: str) -> None:
    three.trouble["api"] = [behaviour]
    with pytest.raises(sources.SourceError, match=words):
        fetch(three, tmp_path)


def test_no_network_is_said_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(sources.SourceError, match=r"127\.0\.0\.1:9 cannot be reached.*ART_DATA"):
        sources.wikimedia(tmp_path, api="http://127.0.0.1:9/w/api.php", pause=0)
    with pytest.raises(sources.SourceError, match="no web address"):
        sources.wikimedia(tmp_path, api=f"file://{tmp_path}/api.php", pause=0)


def test_no_genuine_picture_is_an_error(three: Commons, tmp_path: Path) -> None:
    three.trouble[WORKS[0].file] = ["status 404"]
    with pytest.raises(sources.SourceError, match=r"None of the 3 files"):
        fetch(three, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_retry_after_in_all_forms() -> None:
    assert sources._retry_after("7", 1.0) == 7
    assert sources._retry_after("86400", 1.0) == 120
    assert sources._retry_after("-3", 1.0) == 0
    assert sources._retry_after("Wed, 21 Oct 2015 07:28:00 GMT", 1.0) == 0
    assert sources._retry_after("soon", 3.0) == 3
    assert sources._retry_after(None, 4.0) == 4


def test_the_shipped_list_of_works_is_sound() -> None:
    assert len({work.file for work in sources.WORKS}) == len(sources.WORKS)
    assert {work.kind for work in sources.WORKS} == {"good", REPLICA, REINTERPRETATION}
    for category in ("mona_lisa", "girl_with_a_pearl_earring"):
        assert any(work.category == category and work.kind == "good" for work in sources.WORKS)


@pytest.mark.network
def test_commons_still_answers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "network" not in request.config.getoption("markexpr"):
        pytest.skip("run with -m network")
    samples = sources.wikimedia(tmp_path, works=sources.WORKS[:1], width=330)
    assert max(images.load_image(samples[0].image_path).shape[:2]) >= 330


# --- Best Artworks of All Time ---------------------------------------------------------------------------------------


@pytest.fixture
def kaggle_copy(tmp_path: Path) -> Path:
    root = tmp_path / "kaggle"
    base = root / "images" / "images"
    for artist, seeds in (("Albrecht_Dürer", (0, 1, 2)), ("Vincent_van_Gogh", (10, 11))):
        for seed in seeds:
            path = base / artist / f"{artist}_{seed}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed))
    shutil.copytree(base / "Albrecht_Dürer", base / "Albrecht_Du╠êrer")
    (base / "Albrecht_Du╠êrer" / "more.jpg").write_bytes(jpeg(3))
    (base / "Vincent_van_Gogh" / "cut.jpg").write_bytes(jpeg(12)[:300])
    (root / "resized" / "resized").mkdir(parents=True)
    return root


def test_best_artworks_takes_twice_spelt_artists_once(kaggle_copy: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    samples = sources.best_artworks(tmp_path / "out", folder=kaggle_copy, log=lines.append)
    assert Counter(s.category for s in samples) == {"Albrecht_Dürer": 4, "Vincent_van_Gogh": 2}
    assert all(not s.is_anomalous and s.split == "train" and s.image_path.is_relative_to(kaggle_copy) for s in samples)
    assert "3 lay there twice" in lines[-1] and any("cut.jpg" in line for line in lines)
    assert list(data.open_dataset(tmp_path / "out").samples) == samples


def test_best_artworks_limits_and_copies(kaggle_copy: Path, tmp_path: Path) -> None:
    samples = sources.best_artworks(
        tmp_path / "out", artists=["Albrecht_Du╠êrer"], limit=2, max_side=32, folder=kaggle_copy, log=lambda line: None
    )
    assert len(samples) == 2 and {s.category for s in samples} == {"Albrecht_Dürer"}
    assert all(max(images.load_image(s.image_path).shape) == 32 for s in samples)
    assert all(s.image_path.is_relative_to(tmp_path / "out") for s in samples)
    data.open_dataset(tmp_path / "out", verify_files=True)
    with pytest.raises(ValueError, match="No artist Banksy; there are Albrecht_Dürer"):
        sources.best_artworks(tmp_path / "out", artists=["Banksy"], folder=kaggle_copy)
    with pytest.raises(sources.SourceError, match="does not look like"):
        sources.best_artworks(tmp_path / "out", folder=kaggle_copy / "resized")


def test_without_kagglehub_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kagglehub", None)  # import raises ImportError
    with pytest.raises(sources.SourceError, match="pip install kagglehub"):
        sources.best_artworks(tmp_path)
