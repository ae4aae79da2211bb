"""Embedded paintings, and the network code against a real HTTP server on this machine that misbehaves as asked."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import threading
import types
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import data
from helpers.anomalyclip import training
from helpers.data import images, sources
from helpers.data.sources import REINTERPRETATION, REPLICA, Work


def test_embedded_artworks_are_a_complete_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "N_GENUINE", 6)
    folder = tmp_path / "embedded"
    samples = sources.embedded_artworks(folder, max_side=96, seed=5)
    assert list(data.open_dataset(folder, verify_files=True).samples) == samples
    kinds = Counter((s.category, s.split, s.kind) for s in samples)
    for category in ("portrait_in_orange", "still_life_with_coffee"):
        assert kinds[category, "train", "good"] == 6
        assert kinds[category, "test", REPLICA] == kinds[category, "test", REINTERPRETATION] == 4
    assert len({s.group for s in samples}) == len({s.sha256 for s in samples}) == 28
    for sample in samples:
        height, width = images.load_image(sample.image_path).shape[:2]
        assert 0.75 * 96 <= max(height, width) <= 96 and height != width
    stamp = samples[0].image_path.stat().st_mtime_ns
    assert sources.embedded_artworks(folder, max_side=96, seed=5) == samples  # not made twice
    assert samples[0].image_path.stat().st_mtime_ns == stamp
    canvases = list(sources.PAINTINGS.rglob("*.webp"))
    assert len(canvases) == 18 and sum(path.stat().st_size for path in canvases) < 3e6


def jpeg(seed: int, size: tuple[int, int] = (64, 48), mark: bool = False) -> bytes:
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC)
    if mark:
        picture[:20, :20] = 0
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass
class Commons:
    """A small Commons: ``files`` by name, ``trouble`` by name (list of behaviours, used up one per request)."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)  # of the one category
    renamed: dict[str, str] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    mimes: dict[str, str] = field(default_factory=dict)
    without_rendering: set[str] = field(default_factory=set)
    trouble: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)

    def entry(self, name: str) -> dict:
        quoted = urllib.parse.quote(name)
        url, thumb = f"{self.address}/original/{quoted}", f"{self.address}/thumb/1280px-{quoted}"
        licence = {"LicenseShortName": {"value": self.licences.get(name, "Public domain")}}
        author = {"Artist": {"value": '<a href="//x">Leonardo  da Vinci</a>'}}
        rendering = {"thumberror": "too large"} if name in self.without_rendering else {"thumburl": thumb}
        sha1, page = hashlib.sha1(self.files[name]).hexdigest(), f"{self.address}/wiki/File:{quoted}"
        more = {"sha1": sha1, "mime": self.mimes.get(name, "image/jpeg"), "descriptionurl": page}
        return {"url": url, "extmetadata": {**licence, **author}, **rendering, **more}

    def answer(self, query: dict[str, str]) -> dict:
        assert query["iiurlwidth"] == "1280" and "sha1" in query["iiprop"] and query["redirects"] == "1"
        if "generator" in query:
            assert query["gcmtitle"] == "Category:Mona Lisa" and query["gcmtype"] == "file"
            first = int(query.get("gcmcontinue", 0))
            pages = [
                {"title": f"File:{name}", "imageinfo": [self.entry(name)]} for name in self.members[first : first + 2]
            ]
            more = {"continue": {"gcmcontinue": str(first + 2)}} if first + 2 < len(self.members) else {}
            return {"query": {"pages": pages}, **more}
        canonical = query["titles"].replace("_", " ")
        canonical = self.renamed.get(canonical, canonical)
        name = next((n for n in self.files if n.replace("_", " ") == canonical.removeprefix("File:")), None)
        known = {"missing": True} if name is None else {"imageinfo": [self.entry(name)]}
        return {"query": {"pages": [{"title": canonical, **known}]}}


@pytest.fixture
def commons(monkeypatch: pytest.MonkeyPatch) -> Iterator[Commons]:
    monkeypatch.setenv("no_proxy", "*")
    state = Commons(files={work.file: jpeg(seed) for seed, work in enumerate(WORKS)})
    monkeypatch.setattr(sources, "WORKS", WORKS)
    monkeypatch.setattr(sources, "MEMBERS", {"mona_lisa": ["Category:Mona Lisa"]})
    monkeypatch.setattr(sources, "PAUSE", 0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.agents.add(self.headers["User-Agent"])
            parts = urllib.parse.urlsplit(self.path)
            is_api = parts.path == "/w/api.php"
            name = "api" if is_api else urllib.parse.unquote(parts.path.rpartition("/")[2]).removeprefix("1280px-")
            state.asked.append(name)
            behaviour = (state.trouble.get(name) or ["fine"]).pop(0)
            if behaviour == "disconnect":
                return
            if behaviour.startswith("status"):
                _, code, *wait = behaviour.split()
                self.send_response(int(code))
                if wait:
                    self.send_header("Retry-After", wait[0])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            query = dict(urllib.parse.parse_qsl(parts.query))
            body = json.dumps(state.answer(query)).encode() if is_api else state.files[name]
            body = {"html": b"<html>busy</html>", "error": b'{"error": {"info": "bad question"}}'}.get(behaviour, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if behaviour == "truncated" else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(sources, "COMMONS_API", f"{state.address}/w/api.php")
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


def test_wikimedia_writes_a_dataset_with_licences(commons: Commons, tmp_path: Path) -> None:
    commons.renamed = {"File:L.H.O.O.Q.jpg": "File:Marcel Duchamp.jpg"}
    commons.files["Marcel Duchamp.jpg"] = commons.files.pop("L.H.O.O.Q.jpg")
    samples = sources.wikimedia(tmp_path)
    assert [(s.split, s.kind) for s in samples] == [("train", "good"), ("test", REPLICA), ("test", REINTERPRETATION)]
    assert list(data.open_dataset(tmp_path, verify_files=True).samples) == samples
    assert samples[0].image_path.read_bytes() == commons.files[WORKS[0].file]
    assert samples[1].image_path.name.startswith("Prado_copy_é_")
    rows = pd.read_csv(tmp_path / "licences.csv")
    assert list(rows["author"]) == ["Leonardo da Vinci"] * 3 and list(rows["licence"]) == ["Public domain"] * 3
    assert commons.agents == {sources.USER_AGENT} and "https://" in sources.USER_AGENT
    commons.asked.clear()
    assert sources.wikimedia(tmp_path) == samples and commons.asked == []  # complete: nothing is asked for again


def test_members_of_the_category_are_sorted(commons: Commons, tmp_path: Path, monkeypatch, capsys) -> None:
    """Genuine ones join; copies of a scan, other pictures, changed ones and unfree ones are left out with a line."""
    scan = np.asarray(Image.open(io.BytesIO(commons.files[WORKS[0].file])))
    buffer = io.BytesIO()
    Image.fromarray(cv2.resize(scan, (60, 45))).save(buffer, "JPEG", quality=80)
    genuine = {f"photo {i}.jpg": jpeg(100 + i) for i in range(4)}
    other = {
        "poster.jpg": jpeg(50),
        "with a moustache.jpg": jpeg(101, mark=True),
        "copy of the scan.jpg": buffer.getvalue(),
    }
    commons.files |= genuine | other | {"press.jpg": jpeg(60)}
    commons.licences["press.jpg"] = "CC BY-SA-NC 3.0"
    commons.members = ["poster.jpg", "photo 0.jpg", "press.jpg", WORKS[0].file, *other, *genuine]
    looks = {images.pixel_hash(np.asarray(Image.open(io.BytesIO(body)))) for body in genuine.values()}

    def is_genuine(main: np.ndarray, picture: np.ndarray) -> bool:
        np.testing.assert_array_equal(main, scan)
        return images.pixel_hash(picture) in looks

    monkeypatch.setattr(sources, "MOST_GENUINE", 4)
    samples = sources.wikimedia(tmp_path, is_genuine=is_genuine)
    log = capsys.readouterr().out
    good = [s.image_path.stem.rpartition("_")[0] for s in samples if not s.is_anomalous]
    assert good == ["Mona_Lisa__scan", "photo_0", "photo_1", "photo_2"]
    for name, words in (("poster", "another picture"), ("copy of the scan", "once more"), ("press", "not known to be")):
        assert any(name in line and words in line for line in log.splitlines()), log
    assert "moustache.jpg: it is another picture, or differs" in log
    assert max(n for name, n in Counter(commons.asked).items() if name != "api") == 1
    commons.asked.clear()
    assert sources.wikimedia(tmp_path, is_genuine=is_genuine) == samples and commons.asked == []


@pytest.mark.parametrize("behaviour", ["status 429 0", "status 503", "disconnect"])
def test_a_busy_server_is_asked_again(commons: Commons, tmp_path: Path, behaviour: str) -> None:
    commons.trouble[WORKS[0].file] = [behaviour]
    assert len(sources.wikimedia(tmp_path)) == 3 and Counter(commons.asked)[WORKS[0].file] == 2


@pytest.mark.parametrize(
    ("behaviour", "words"), [("status 400", "answered 400"), ("status 404", "answered 404"), ("html", "no picture")]
)
def test_one_broken_file_is_skipped_with_a_line(commons, tmp_path, capsys, behaviour, words) -> None:
    commons.trouble[WORKS[1].file] = [behaviour]
    assert [s.kind for s in sources.wikimedia(tmp_path)] == ["good", REINTERPRETATION]
    log = capsys.readouterr().out
    assert f"skipped {WORKS[1].file}" in log and words in log and Counter(commons.asked)[WORKS[1].file] == 1


@pytest.mark.parametrize(("behaviour", "words"), [("status 403", "User-Agent"), ("truncated", "breaks off")])
def test_a_stopped_call_goes_on(commons: Commons, tmp_path: Path, behaviour: str, words: str) -> None:
    commons.trouble[WORKS[2].file] = [behaviour]
    with pytest.raises(sources.SourceError, match=words):
        sources.wikimedia(tmp_path)
    commons.asked.clear()
    assert len(sources.wikimedia(tmp_path)) == 3
    assert [name for name in commons.asked if name != "api"] == [WORKS[2].file]


def test_what_may_not_be_used_is_skipped(commons: Commons, tmp_path: Path, monkeypatch, capsys) -> None:
    commons.licences[WORKS[1].file] = "Fair use"
    commons.mimes[WORKS[2].file] = "application/pdf"
    commons.files["huge.tif"], commons.without_rendering = jpeg(9), {"huge.tif"}
    monkeypatch.setattr(sources, "WORKS", (*WORKS, *(Work(name, "mona_lisa") for name in ("huge.tif", "Gone.jpg"))))
    assert [s.kind for s in sources.wikimedia(tmp_path)] == ["good"]
    log = capsys.readouterr().out
    for words in (
        "'Fair use'",
        "'application/pdf', not a",
        "no rendering of it (too large)",
        "no file of this",
    ):
        assert words in log
    assert {name for name in commons.asked if name != "api"} == {WORKS[0].file}  # nothing of the others was fetched


@pytest.mark.parametrize(
    "licence", ["Public domain", "PD-old-100", "pd", "CC0", "CC BY 4.0", "CC BY-SA 3.0", "CC-BY-SA-4.0"]
)
@pytest.mark.parametrize("addition", ["", "-NC", " NC 3.0", "-nd", "-SA-NC 3.0"])
def test_free_licences(licence: str, addition: str) -> None:
    assert bool(sources._FREE_LICENCE.fullmatch(licence + addition)) == (not addition)
    assert not any(
        sources._FREE_LICENCE.fullmatch(words) for words in ("Fair use", "pdf licence", "CC BY-NC-SA 4.0", "")
    )


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [("status 403", "User-Agent"), ("status 404", "no usable"), ("html", "no usable"), ("error", "bad question")],
)
def test_refusals_of_the_server_are_explained(commons, tmp_path, behaviour, words) -> None:
    commons.trouble["api"] = [behaviour]
    with pytest.raises(sources.SourceError, match=words):
        sources.wikimedia(tmp_path)


def test_no_network_and_no_genuine_picture_are_said(commons, tmp_path, monkeypatch) -> None:
    commons.trouble[WORKS[0].file] = ["status 404"]
    with pytest.raises(sources.SourceError, match="No genuine picture"):
        sources.wikimedia(tmp_path)
    monkeypatch.setattr(sources, "COMMONS_API", "http://127.0.0.1:9/w/api.php")
    with pytest.raises(sources.SourceError, match=r"127\.0\.0\.1:9 cannot be reached(.|\n)*ART_DATA"):
        sources.wikimedia(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.network
def test_commons_still_answers(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch) -> None:
    if "network" not in request.config.getoption("markexpr"):
        pytest.skip("run with -m network")
    monkeypatch.setattr(sources, "WORKS", sources.WORKS[:1])
    samples = sources.wikimedia(tmp_path)
    assert max(images.load_image(samples[0].image_path).shape[:2]) >= 960


def test_best_artworks_takes_twice_spelt_artists_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "kaggle/images/images"
    for artist, seeds in (("Albrecht_Dürer", (0, 1, 2)), ("Vincent_van_Gogh", (10, 11))):
        for seed in seeds:
            (base / artist).mkdir(parents=True, exist_ok=True)
            (base / artist / f"{seed}.jpg").write_bytes(jpeg(seed))
    for broken in ("Albrecht_Du╠êrer", "Albrecht_DuΓòá├¬rer"):
        shutil.copytree(base / "Albrecht_Dürer", base / broken)
    (base / "Albrecht_Du╠êrer" / "more.jpg").write_bytes(jpeg(3))
    module = types.ModuleType("kagglehub")
    module.dataset_download = lambda name: str(tmp_path / "kaggle")
    monkeypatch.setitem(sys.modules, "kagglehub", module)
    samples = sources.best_artworks(limit=9)
    assert Counter(s.category for s in samples) == {"Albrecht_Dürer": 4, "Vincent_van_Gogh": 2}
    assert all(not s.is_anomalous and s.split == "train" for s in samples)
    assert Counter(s.category for s in sources.best_artworks(limit=1)).total() == 2
    views = training.auxiliary_samples(
        "best_artworks", tmp_path / "views", n_views=2, max_side=48, seed=1, limit=2, kinds=["box"]
    )
    assert len(views) == 8 and sum(view.is_anomalous for view in views) == 4
    shutil.rmtree(base)
    with pytest.raises(sources.SourceError, match="does not hold"):
        sources.best_artworks(limit=1)
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # import raises ImportError
    with pytest.raises(sources.SourceError, match="Kaggle gave no dataset"):
        sources.best_artworks(limit=1)
