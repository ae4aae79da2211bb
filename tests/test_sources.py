"""Embedded paintings, and the network code against a real HTTP server on this machine that misbehaves as asked."""

import hashlib
import io
import json
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
import pytest
from PIL import Image

from helpers import synthesis
from helpers.anomalyclip import training
from helpers.data import images, sources
from helpers.reference import aligned


def test_embedded_artworks_are_a_complete_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "N_GENUINE", 6)
    samples = sources.embedded_artworks(tmp_path, max_side=96, seed=5).samples
    stamps = [s.image_path.stat().st_mtime_ns for s in samples]
    assert sources.embedded_artworks(tmp_path, max_side=96, seed=5).samples == samples
    assert [s.image_path.stat().st_mtime_ns for s in samples] == stamps  # not made twice
    parts = {("train", "good"): 6, ("test", "replica"): 4, ("test", "reinterpretation"): 4}
    artworks = ("portrait_in_orange", "still_life_with_coffee")
    expected = {(artwork, *part): n for artwork in artworks for part, n in parts.items()}
    assert Counter((s.category, s.split, s.kind) for s in samples) == expected
    assert len({s.group for s in samples}) == len({s.image_path.read_bytes() for s in samples}) == 28
    assert all(72 <= max(images.load_image(sample.image_path).shape) <= 96 for sample in samples)


def jpeg(picture: int | np.ndarray) -> bytes:
    if isinstance(picture, int):
        rough = np.random.default_rng(picture).integers(0, 256, (6, 8, 3), np.uint8)
        picture = cv2.resize(rough, (64, 48), interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


SCAN, COPY, JOKE = "Mona_Lisa,_scan.jpg", "Prado copy (é).jpg", "L.H.O.O.Q.jpg"
TITLES = [["mona_lisa", "train/good", SCAN], ["mona_lisa", "test/replica", COPY]]
TITLES += [["mona_lisa", "test/reinterpretation", JOKE], ["mona_lisa", "train/good", "Category:Mona Lisa"]]


def unasked(scan: np.ndarray, picture: np.ndarray) -> str:
    raise AssertionError("no member is compared here")


@dataclass
class Commons:
    """A small Commons: ``files`` by name, ``trouble`` by name (list of behaviours, used up one per request)."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)  # of the one category
    renamed: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict] = field(default_factory=dict)  # by name, what differs from the usual entry
    trouble: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)

    def entry(self, name: str) -> dict:
        quoted = urllib.parse.quote(name)
        more = {"thumburl": f"{self.address}/thumb/1280px-{quoted}", "licence": "Public domain", "mime": "image/jpeg"}
        more |= self.about.get(name, {})
        author = {"Artist": {"value": '<a href="//x">Leonardo  da Vinci</a>'}}
        meta = {"LicenseShortName": {"value": more.pop("licence")}, **author}
        return {"sha1": hashlib.sha1(self.files[name]).hexdigest(), "extmetadata": meta, **more}

    def answer(self, query: dict[str, str]) -> dict:
        assert query["iiurlwidth"] == "1280" and "sha1" in query["iiprop"] and query["redirects"] == "1"
        if "generator" in query:
            assert query["gcmtitle"] == "Category:Mona Lisa" and query["gcmtype"] == "file"
            first = int(query.get("gcmcontinue", 0))
            names = self.members[first : first + 2]
            pages = [{"title": f"File:{name}", "imageinfo": [self.entry(name)]} for name in names]
            more = {"continue": {"gcmcontinue": str(first + 2)}} if first + 2 < len(self.members) else {}
            return {"query": {"pages": pages}, **more}
        title = query["titles"].replace("_", " ")
        title = self.renamed.get(title, title)
        found = [{"imageinfo": [self.entry(n)]} for n in self.files if f"File:{n}".replace("_", " ") == title]
        return {"query": {"pages": [{"title": title, **(found or [{"missing": True}])[0]}]}}

    def reply(self, path: str) -> tuple[int, bytes, str]:
        parts = urllib.parse.urlsplit(path)
        is_api = parts.path == "/w/api.php"
        name = "api" if is_api else urllib.parse.unquote(parts.path.rpartition("/")[2]).removeprefix("1280px-")
        self.asked.append(name)
        behaviour = (self.trouble.get(name) or ["fine"]).pop(0)
        if behaviour.startswith("status"):
            return int(behaviour.split()[1]), b"", behaviour
        query = dict(urllib.parse.parse_qsl(parts.query))
        body = json.dumps(self.answer(query)).encode() if is_api else self.files[name]
        odd = {"html": b"<html>busy</html>", "error": b'{"error": {"info": "bad question"}}'}
        return 200, odd.get(behaviour, body), behaviour


@pytest.fixture
def commons(monkeypatch: pytest.MonkeyPatch) -> Iterator[Commons]:
    monkeypatch.setenv("no_proxy", "*")
    state = Commons(files={title: jpeg(seed) for seed, (*_, title) in enumerate(TITLES[:3])})
    monkeypatch.setattr(sources, "titles", lambda: TITLES)
    monkeypatch.setattr(sources, "PAUSE", 0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.agents.add(self.headers["User-Agent"])
            status, body, behaviour = state.reply(self.path)
            if behaviour == "disconnect":
                return
            self.send_response(status)
            self.send_header("Retry-After", "0")
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


def test_wikimedia_writes_a_dataset_with_licences(commons: Commons, tmp_path: Path) -> None:
    commons.renamed = {f"File:{JOKE}": "File:Marcel Duchamp.jpg"}
    commons.files["Marcel Duchamp.jpg"] = commons.files.pop(JOKE)
    source = sources.wikimedia(tmp_path, unasked)
    paths = {s.kind: s.image_path for s in source.samples}
    assert {s.kind: s.split for s in source.samples} == {"good": "train", "replica": "test", "reinterpretation": "test"}
    assert not source.left_out and paths["good"].read_bytes() == commons.files[SCAN]
    assert paths["replica"].name.startswith("Prado_copy_é_")
    rows = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())["files"]
    about = ("Leonardo da Vinci", "Public domain", "")
    assert [(row["author"], row["licence"], row["left_out"]) for row in rows] == [about] * 3
    assert commons.agents == {sources.USER_AGENT} and "https://" in sources.USER_AGENT
    commons.asked.clear()
    assert sources.wikimedia(tmp_path, unasked).samples == source.samples and not commons.asked


def test_members_of_the_category_are_sorted(commons: Commons, tmp_path: Path, monkeypatch, capsys) -> None:
    """Genuine ones join; copies of a scan, replicas, changed pictures, details, unfree ones are left out with why."""
    canvas = {path.stem: images.load_image(path) for path in sources.PAINTINGS.glob("portrait_in_orange/*/*.webp")}
    scan, looks = canvas["original"], ("perspective", "lighting", "colour_jitter", "saturation", "jpeg")
    shots = [synthesis.rephotograph(scan, np.random.default_rng(n), changes=looks)[0] for n in range(3)]
    changed = shots[2].copy()
    changed[100:250, 80:200] = changed[300:450, 150:270]
    commons.files[SCAN] = jpeg(scan)
    pictures = {"photo 0": shots[0], "replica": canvas["replica_0"], "mirror": shots[0][:, ::-1], "changed": changed}
    pictures |= {"copy": cv2.resize(scan, None, fx=0.8, fy=0.8), "unfree": shots[2], "detail": scan[100:300, 100:300]}
    pictures |= {"photo 1": shots[1], "photo 2": shots[2]}
    commons.files |= {f"{name}.jpg": jpeg(np.ascontiguousarray(image)) for name, image in pictures.items()}
    commons.members = [SCAN, *(f"{name}.jpg" for name in pictures)]
    commons.about = {"unfree.jpg": {"licence": "CC BY-SA-NC 3.0"}}
    monkeypatch.setattr(sources, "MOST_GENUINE", 3)
    source = sources.wikimedia(tmp_path, aligned.why_not_genuine)
    left_out = source.left_out
    good = [s.image_path.stem.rpartition("_")[0] for s in source.samples if not s.is_anomalous]
    assert good == ["Mona_Lisa__scan", "photo_0", "photo_1"]  # enough then: photo 2 is not fetched
    reasons = {"replica": "main scan", "mirror": "does not lie", "changed": "differs", "copy": "once more"}
    reasons |= {"unfree": "not known to be free", "detail": "of which it shows"}
    assert all(reasons[path.stem] in why for path, why in left_out) and len(left_out) == len(reasons)
    assert max(n for name, n in Counter(commons.asked).items() if name != "api") == 1
    commons.asked.clear()
    again = sources.wikimedia(tmp_path, aligned.why_not_genuine)
    assert len(again.samples) == len(source.samples) and again.left_out == left_out and not commons.asked
    assert "mirror.jpg: it does not lie on the main scan" in again.describe()


@pytest.mark.parametrize(("behaviour", "words"), [("status 403", "User-Agent"), ("truncated", "kept")])
def test_a_busy_server_is_asked_again_and_a_stopped_call_goes_on(commons, tmp_path, behaviour, words) -> None:
    commons.trouble = {SCAN: ["status 429", "status 503", "disconnect"], JOKE: [behaviour]}
    with pytest.raises(ConnectionError, match=words):
        sources.wikimedia(tmp_path, unasked)
    assert Counter(commons.asked)[SCAN] == 4
    commons.asked.clear()
    assert len(sources.wikimedia(tmp_path, unasked).samples) == 3
    assert [name for name in commons.asked if name != "api"] == [JOKE]


def test_what_cannot_or_may_not_be_used_is_left_out(commons: Commons, tmp_path: Path, monkeypatch) -> None:
    commons.about = {COPY: {"licence": "Fair use"}, JOKE: {"mime": "application/pdf"}, "huge.tif": {"thumburl": None}}
    words = {COPY: "'Fair use'", JOKE: "application/pdf", "huge.tif": "no rendering", "Gone.jpg": "no file of this"}
    commons.trouble = {"bad.jpg": ["status 400"], "lost.jpg": ["status 404"], "busy.jpg": ["html"]}
    words |= {"bad.jpg": "answered 400", "lost.jpg": "answered 404", "busy.jpg": "cannot be read"}
    commons.files |= {name: jpeg(9 + i) for i, name in enumerate(("huge.tif", *commons.trouble))}
    more = [["mona_lisa", "train/good", name] for name in list(words)[2:]]
    monkeypatch.setattr(sources, "titles", lambda: TITLES + more)
    source = sources.wikimedia(tmp_path, unasked)
    left_out = source.left_out
    assert len(source.samples) == 1 and [path.name for path, _ in left_out] == list(words)
    assert all(words[path.name] in reason for path, reason in left_out)
    fetched = Counter(name for name in commons.asked if name != "api")
    assert fetched == dict.fromkeys((SCAN, *commons.trouble), 1)  # nothing of the others, and nothing twice


def test_free_licences() -> None:
    for licence in ("Public domain", "PD-old-100", "pd", "CC0", "CC BY 4.0", "CC BY-SA 3.0", "CC-BY-SA-4.0"):
        for addition in ("", "-NC", " NC 3.0", "-nd", "-SA-NC 3.0"):
            assert bool(sources._FREE_LICENCE.fullmatch(licence + addition)) == (not addition)
    assert not any(map(sources._FREE_LICENCE.fullmatch, ("Fair use", "pdf licence", "CC BY-NC-SA 4.0", "")))


REFUSALS = [("api", "status 403", "User-Agent"), ("api", "status 404", "no usable"), ("api", "html", "no usable")]
REFUSALS += [("api", "error", "bad question"), (SCAN, "status 404", "No genuine picture")]


@pytest.mark.parametrize(("name", "behaviour", "words"), [*REFUSALS, ("down", "", r"be reached(.|\n)*ART_DATA")])
def test_refusals_of_the_server_are_explained(commons, tmp_path, monkeypatch, name, behaviour, words) -> None:
    commons.trouble[name] = [behaviour]
    if name == "down":
        monkeypatch.setattr(sources, "COMMONS_API", "http://127.0.0.1:9/w/api.php")
    with pytest.raises(ConnectionError, match=words):
        sources.wikimedia(tmp_path, unasked)
    assert not list(tmp_path.rglob("manifest.json"))


def test_best_artworks_takes_twice_spelt_artists_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artists = {"Albrecht_Dürer": "abc", "Albrecht_Du╠êrer": "abcd", "Albrecht_DuΓòá├¬rer": "abc", "Van_Gogh": "ef"}
    for artist, works in artists.items():
        (tmp_path / "kaggle/images/images" / artist).mkdir(parents=True)
        for work in works:
            (tmp_path / "kaggle/images/images" / artist / f"{artist}_{work}.jpg").write_bytes(jpeg(ord(work)))
    module = types.ModuleType("kagglehub")
    module.dataset_download = lambda name: str(tmp_path / "kaggle")
    monkeypatch.setitem(sys.modules, "kagglehub", module)
    samples = training.best_artworks(limit=9)
    assert Counter(s.category for s in samples) == {"Albrecht_Dürer": 4, "Van_Gogh": 2}
    assert all(not s.is_anomalous and s.split == "train" for s in samples)
    assert len(training.best_artworks(limit=1)) == 2
    options = {"n_views": 2, "max_side": 48, "seed": 1, "limit": 2, "kinds": ["box"]}
    views = training.auxiliary_samples("best_artworks", tmp_path / "views", **options)
    assert len(views) == 8 and sum(view.is_anomalous for view in views) == 4
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # import raises ImportError
    with pytest.raises(ConnectionError, match="Kaggle gave no dataset"):
        training.best_artworks(limit=1)
