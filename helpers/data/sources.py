"""Pictures to start from: two embedded paintings (offline), Wikimedia Commons and Kaggle (network).

Each source writes or lists pictures in the MVTec layout and returns samples: genuine pictures as ``train/good``, other
works after the same motif as ``test/replica`` and ``test/reinterpretation``. What the network gave is cached, checked
and listed with its licence.
"""

from __future__ import annotations

import csv
import email.utils
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files as storage
from helpers.data import images, painting
from helpers.data import manifest as data
from helpers.records import NORMAL_KIND, Sample

REPLICA, REINTERPRETATION = "replica", "reinterpretation"


class SourceError(RuntimeError):
    """Pictures cannot be had; the message says why and what to do instead."""


# --- embedded paintings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Motif:
    """A photograph inside scikit-image that is painted from.

    Attributes:
        category: name of the painting.
        file: file in ``skimage/data``.
        crop: left, top, right, bottom as shares of the photograph.
        part: file in ``skimage/data`` that replaces a part in some reinterpretations, and its crop.
        part_center, part_semi_axes: the ellipse replaced, as shares of the cropped photograph.
    """

    category: str
    file: str
    crop: tuple[float, float, float, float]
    part: tuple[str, tuple[float, float, float, float]]
    part_center: tuple[float, float]
    part_semi_axes: tuple[float, float]


MOTIFS = (
    Motif(
        "portrait_in_orange",
        "astronaut.png",  # Eileen Collins, photographed by NASA: public domain
        (0.06, 0.0, 0.86, 1.0),
        ("chelsea.png", (0.10, 0.02, 0.84, 0.98)),  # Stefan van der Walt: CC0
        (0.475, 0.205),
        (0.185, 0.195),
    ),
    Motif(
        "still_life_with_coffee",
        "coffee.png",  # Rachel Michetti: CC0
        (0.0, 0.0, 1.0, 1.0),
        ("hubble_deep_field.jpg", (0.30, 0.25, 0.55, 0.50)),  # NASA: public domain
        (0.485, 0.345),
        (0.155, 0.135),
    ),
)
_PAINTER = painting.Hand(brush=0.85)
_EMBEDDED_VERSION = 2
"""Raised when the same settings make other pictures, so that old folders are made anew."""


def embedded_artworks(
    target: Path | str,
    *,
    max_side: int = 288,
    seed: int = 2024,
    n_genuine: int = 30,
    n_replicas: int = 4,
    n_reinterpretations: int = 4,
) -> list[Sample]:
    """Two paintings, made here, with replicas and reinterpretations: real work for a detector without any download.

    Each painting is painted once and then photographed ``n_genuine`` times with other crops, stands, light and
    cameras; each photograph is a source of its own (``group``). A replica is the motif painted again by another hand:
    forms and palette stray. A reinterpretation is another work after it: a part replaced, a screen print, a mosaic,
    mirrored in other colours. Both are photographed like the original, so that the camera betrays nothing.

    Args:
        target: folder to write; a complete folder of the same settings is returned as it is.
        max_side: longer side in pixels of the pictures, at most :data:`helpers.data.painting.CANVAS_SIDE`.
        seed: the same seed gives the same bytes.
        n_genuine, n_replicas, n_reinterpretations: pictures per painting.
    Returns:
        samples: genuine ones in ``train``, the others in ``test`` without masks.
    Raises:
        ValueError: a setting is out of range.
        SourceError: scikit-image lacks its pictures, or ``target`` holds something else.
    """
    target = Path(os.path.abspath(target))
    if not 32 <= max_side <= painting.CANVAS_SIDE:
        raise ValueError(f"max_side is {max_side}; the paintings are photographed at 32 to {painting.CANVAS_SIDE} px.")
    if n_genuine < 1 or n_replicas < 0 or n_reinterpretations < 0:
        raise ValueError(
            f"Counts are {n_genuine}, {n_replicas}, {n_reinterpretations}: at least 1, 0 and 0 are needed."
        )
    settings = {
        "version": _EMBEDDED_VERSION,
        "max_side": max_side,
        "seed": seed,
        "counts": [n_genuine, n_replicas, n_reinterpretations],
    }
    mark = target / data.MANIFEST_JSON
    if mark.exists() and storage.read_json(mark).get("embedded") == settings:
        return data.load_manifest(target)
    if target.exists() and any(target.iterdir()) and not (mark.exists() and "embedded" in storage.read_json(mark)):
        raise SourceError(f"{target} holds other files. Give an empty folder for the embedded artworks.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        folder = Path(name) / target.name
        samples = []
        for motif in MOTIFS:
            samples += _paintings_of(motif, folder, max_side, seed, n_genuine, n_replicas, n_reinterpretations)
        data.write_manifest(folder, samples, info={"made_by": "embedded_artworks", "embedded": settings})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    return data.load_manifest(target)


def _paintings_of(
    motif: Motif, folder: Path, max_side: int, seed: int, n_genuine: int, n_replicas: int, n_reinterpretations: int
) -> list[Sample]:
    """Paint and photograph one motif; write the pictures."""
    photo = _shipped(motif.file, motif.crop)
    name = zlib.crc32(motif.category.encode())

    def rng(purpose: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng([seed, name, purpose, index])

    samples: list[Sample] = []

    def add(work: np.ndarray, split: str, kind: str, stem: str) -> None:
        # All kinds are photographed alike: the camera says nothing about the label.
        image = painting.photograph(work, max_side=max_side, rng=rng(2, len(samples)))
        path = folder / motif.category / split / kind / f"{stem}.png"
        images.save_png(path, image)
        group = f"{motif.category}/{stem}"
        samples.append(Sample(path, motif.category, kind != NORMAL_KIND, None, split, kind, group))

    original = painting.paint(photo, rng=rng(0), hand=_PAINTER)
    for index in range(n_genuine):
        add(original, "train", NORMAL_KIND, f"photograph_{index:03d}")
    for index in range(n_replicas):
        add(_replica(photo, rng(1, index)), "test", REPLICA, f"replica_{index:03d}")
    for index in range(n_reinterpretations):
        style, work = _reinterpretation(photo, original, motif, index, rng(3, index))
        add(work, "test", REINTERPRETATION, f"{style}_{index:03d}")
    return samples


def _replica(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The motif by another hand: broader or other strokes, forms a little off, another palette and varnish."""
    hand = painting.Hand(
        brush=rng.uniform(1.15, 1.6),
        hue=rng.choice([-1, 1]) * rng.uniform(5, 14),
        saturation=rng.uniform(0.72, 1.2),
        lightness=rng.uniform(0.86, 1.12),
        colour_jitter=rng.uniform(7, 12),
        drift=rng.uniform(0.010, 0.021),
        detail=rng.uniform(0.35, 0.8),
        glaze=rng.uniform(0.1, 0.25),
        varnish=(1.0, rng.uniform(0.93, 0.99), rng.uniform(0.76, 0.96)),
    )
    return painting.paint(photo, rng=rng, hand=hand)


def _reinterpretation(
    photo: np.ndarray, original: np.ndarray, motif: Motif, index: int, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """Style and picture of the ``index``-th reinterpretation; after four the styles come again in other variants."""
    file, crop = motif.part
    style = ("part_replaced", "screen_print", "mosaic", "mirrored_colours")[index % 4]
    if style == "part_replaced":
        changed = painting.with_part(photo, _shipped(file, crop), motif.part_center, motif.part_semi_axes)
        return style, painting.paint(changed, rng=rng, hand=_PAINTER)
    if style == "screen_print":
        return style, painting.poster(original, rng)
    if style == "mosaic":
        return style, painting.mosaic(original, rng, n_tiles=int(rng.integers(1100, 1900)))
    return style, painting.recoloured(original[:, ::-1], float(rng.uniform(120, 240)))


def _shipped(file: str, crop: tuple[float, float, float, float]) -> np.ndarray:
    """A cropped picture from the scikit-image package."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / file
    try:
        picture = images.load_image(path)
    except images.ImageError as error:
        raise SourceError(f"{error} scikit-image ships it: reinstall scikit-image, or set ART_DATA.") from error
    height, width = picture.shape[:2]
    left, top, right, bottom = crop
    return picture[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]


# --- Wikimedia Commons -----------------------------------------------------------------------------------------------

COMMONS_API = "https://commons.wikimedia.org/w/api.php"
USER_AGENT = "art-anomaly-notebooks/1.0 (https://github.com/art-anomaly/art-anomaly-notebooks) python-urllib"
"""Commons answers 403 without a name and a contact."""
MAX_DOWNLOAD_BYTES = 60_000_000
LICENCES = "licences.csv"
_FREE_LICENCE = re.compile(r"^(public domain|pd\b|pd-|cc0|cc[ -]by([ -]sa)?\b(?![ -]n))", re.IGNORECASE)
_OFFLINE = (
    "Without network, use the embedded artworks (ART_PROFILE=mini), or put pictures into a folder and set "
    "ART_DATA=/path/to/folder."
)


@dataclass(frozen=True)
class Work:
    """A file on Commons and what it is: ``kind`` is ``"good"``, ``"replica"`` or ``"reinterpretation"``."""

    file: str
    category: str
    kind: str = NORMAL_KIND


WORKS = (
    Work("Mona_Lisa,_by_Leonardo_da_Vinci,_from_C2RMF_retouched.jpg", "mona_lisa"),
    Work("Mona_Lisa.jpg", "mona_lisa"),
    Work("Gioconda_(copia_del_Museo_del_Prado_restaurada).jpg", "mona_lisa", REPLICA),
    Work("The_Isleworth_Mona_Lisa.jpg", "mona_lisa", REPLICA),
    Work("Copy of the Mona Lisa - Walters 371158.jpg", "mona_lisa", REPLICA),
    Work("Marcel_Duchamp,_1919,_L.H.O.O.Q.jpg", "mona_lisa", REINTERPRETATION),
    Work("1665_Girl_with_a_Pearl_Earring.jpg", "girl_with_a_pearl_earring"),
)
"""Files seen in public use in 2026. Names change on Commons: one that is gone is skipped with a line in the log."""


def wikimedia(
    target: Path | str,
    *,
    works: Sequence[Work] = WORKS,
    width: int = 1280,
    api: str = COMMONS_API,
    user_agent: str = USER_AGENT,
    pause: float = 1.0,
    tries: int = 4,
    log: Callable[[str], None] = print,
) -> list[Sample]:
    """Public-domain reproductions, replicas and reinterpretations from Wikimedia Commons.

    The MediaWiki API is asked for renderings of ``width`` pixels (originals can have hundreds of megapixels; addresses
    made by hand fail since August 2026). A file is used only if its licence field names a free licence. Downloads are
    atomic, one at a time, and kept: a second call fetches only what is missing or changed. ``licences.csv`` lists
    address, author, licence, size and hash of each.

    Args:
        target: folder to write, MVTec layout.
        works: what to fetch.
        width: rendering width; Commons serves 250, 330, 500, 960, 1280, 1920 and 3840.
        api, user_agent: address of the API, and how to introduce ourselves (a contact is required).
        pause: seconds between requests.
        tries: attempts per file when the server is busy (its ``Retry-After`` is obeyed, up to two minutes).
        log: receives a line per file.
    Raises:
        SourceError: no network, the server refuses us, or no genuine picture could be had.
    """
    target = Path(os.path.abspath(target))
    client = _Client(user_agent, pause, tries, log)
    entries = _commons_entries(client, api, works, width)
    known = {row["file"]: row for row in _read_licences(target / LICENCES)}
    rows, samples = [], []
    for work in works:
        entry = entries.get(work.file)
        reason = _unusable(entry)
        if reason:
            log(f"skipped {work.file}: {reason}")
            continue
        split = "train" if work.kind == NORMAL_KIND else "test"
        path = target / work.category / split / work.kind / _file_name(work.file, entry)
        log(
            f"{work.category} {work.kind}: {work.file} ({entry['thumbwidth']} x {entry['thumbheight']} px, "
            f"{_licence(entry)})"
        )
        try:
            sha256 = _fetch(client, entry, path, known.get(work.file))
        except _Skip as error:
            log(f"skipped {work.file}: {error}")
            continue
        rows.append(_licence_row(work, entry, path.relative_to(target).as_posix(), sha256))
        group = f"{work.category}/{path.stem}"
        samples.append(Sample(path, work.category, work.kind != NORMAL_KIND, None, split, work.kind, group, sha256))
    if not any(not sample.is_anomalous for sample in samples):
        raise SourceError(f"None of the {len(works)} files could be had from {api}; see the lines above. {_OFFLINE}")
    _write_licences(target / LICENCES, rows)
    data.write_manifest(target, samples, info={"made_by": "wikimedia", "width": width, "api": api})
    return samples


class _Skip(Exception):
    """Why one file is left out; the others go on."""


class _Client:
    """Polite requests: one at a time, introduced, patient when asked to wait."""

    def __init__(self, user_agent: str, pause: float, tries: int, log: Callable[[str], None]) -> None:
        self._headers = {"User-Agent": user_agent}
        self._pause = pause
        self._tries = tries
        self._log = log
        self._last = 0.0

    def get(self, url: str) -> bytes:
        """The body of an address.

        Raises:
            _Skip: this address is refused or stays broken.
            SourceError: nothing can be fetched from this server.
        """
        if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
            raise _Skip(f"its address is no web address ({url[:60]})")
        trouble = ""
        for attempt in range(self._tries):
            time.sleep(max(0.0, self._last + self._pause - time.monotonic()))
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=self._headers), timeout=60) as reply:
                    body = reply.read(MAX_DOWNLOAD_BYTES + 1)
                    if len(body) > MAX_DOWNLOAD_BYTES:
                        raise _Skip(f"it is larger than {MAX_DOWNLOAD_BYTES / 1e6:g} MB")
                    if reply.length:  # bytes promised but not sent; read(n) does not complain by itself
                        raise http.client.IncompleteRead(body, reply.length)
                return body
            except urllib.error.HTTPError as error:
                trouble = f"the server answered {error.code} {error.reason}"
                if error.code == 403:
                    raise SourceError(
                        f"{url} answered 403: Commons refuses clients without a descriptive User-Agent with a contact. "
                        f"Ours is {self._headers['User-Agent']!r}; pass user_agent='name/1.0 (your address)'."
                    ) from error
                if error.code == 400:
                    raise _Skip("the server answered 400: this width is not served (use 960, 1280 or 1920)") from error
                if error.code not in (429, 500, 502, 503, 504):
                    raise _Skip(trouble) from error
                wait = _retry_after(error.headers.get("Retry-After"), 2.0**attempt)
            except (http.client.HTTPException, TimeoutError, ConnectionResetError) as error:
                trouble, wait = f"the connection broke ({type(error).__name__})", self._pause
            except urllib.error.URLError as error:
                raise SourceError(
                    f"{urllib.parse.urlsplit(url).netloc} cannot be reached ({error.reason}). {_OFFLINE}"
                ) from error
            finally:
                self._last = time.monotonic()
            if attempt + 1 < self._tries:
                self._log(f"{trouble}; waiting {wait:.0f} s")
                time.sleep(wait)
        raise _Skip(f"{trouble}, {self._tries} times")


def _retry_after(value: str | None, default: float) -> float:
    """Seconds to wait, from a header that holds seconds or a date; at most two minutes."""
    if value is None:
        return min(default, 120.0)
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            seconds = default
    return min(max(seconds, 0.0), 120.0)


def _commons_entries(client: _Client, api: str, works: Sequence[Work], width: int) -> dict[str, dict[str, Any]]:
    """``imageinfo`` by file name as asked for; names that are gone are absent."""
    entries: dict[str, dict[str, Any]] = {}
    for start in range(0, len(works), 50):  # the API's limit of titles per request
        titles = {f"File:{work.file}": work.file for work in works[start : start + 50]}
        query = {
            "action": "query",
            "format": "json",
            "formatversion": "2",
            "prop": "imageinfo",
            "iiprop": "url|size|sha1|mime|extmetadata",
            "iiurlwidth": str(width),
            "titles": "|".join(titles),
        }
        try:
            reply = json.loads(client.get(f"{api}?{urllib.parse.urlencode(query)}"))
        except (_Skip, ValueError) as error:
            raise SourceError(f"{api} gave no usable answer ({error}). Try again later. {_OFFLINE}") from error
        if "error" in reply:
            raise SourceError(f"{api} refused the question: {reply['error'].get('info', reply['error'])}.")
        found = reply.get("query", {})
        final = {item["from"]: item["to"] for item in (*found.get("normalized", ()), *found.get("redirects", ()))}
        pages = {page["title"]: page for page in found.get("pages", ())}
        for title, file in titles.items():
            page = pages.get(final.get(final.get(title, title), final.get(title, title)), {})
            if page.get("imageinfo"):
                entries[file] = page["imageinfo"][0]
    return entries


def _unusable(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "no file of this name on Commons any more"
    if not _FREE_LICENCE.match(_licence(entry)):
        return f"its licence is {_licence(entry) or 'not stated'!r}, which is not known to be free"
    if not str(entry.get("mime", "")).startswith("image/"):
        return f"it is {entry.get('mime')!r}, not a picture"
    return ""


def _licence(entry: Mapping[str, Any]) -> str:
    return _meta(entry, "LicenseShortName") or _meta(entry, "License")


def _meta(entry: Mapping[str, Any], name: str) -> str:
    """A field of ``extmetadata``, without its HTML."""
    value = str(entry.get("extmetadata", {}).get(name, {}).get("value", ""))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", value)).strip()


def _file_name(file: str, entry: Mapping[str, Any]) -> str:
    """A plain file name; the suffix of what is downloaded (a rendering of a TIFF is a JPEG)."""
    suffix = Path(urllib.parse.urlsplit(entry["thumburl"]).path).suffix.lower()
    stem = re.sub(r"[^\w.-]+", "_", Path(file).stem).strip("._")
    return f"{stem}{suffix if suffix in images.IMAGE_SUFFIXES else '.jpg'}"


def _fetch(client: _Client, entry: Mapping[str, Any], path: Path, known: Mapping[str, str] | None) -> str:
    """SHA-256 of the picture at ``path``, downloaded unless the same is there already."""
    is_current = known is not None and known["original_sha1"] == entry["sha1"] and known["url"] == entry["thumburl"]
    if is_current and path.exists() and storage.sha256_file(path) == known["sha256"]:
        return known["sha256"]
    body = client.get(entry["thumburl"])
    is_original = entry["thumburl"] == entry["url"]  # the original is not wider than asked for
    if is_original and hashlib.sha1(body).hexdigest() != entry["sha1"]:
        raise _Skip("the file received is not the one that Commons describes (SHA-1 differs); try again later")
    with storage.atomic_path(path) as temporary:
        temporary.write_bytes(body)
        try:
            images.load_image(temporary, max_side=256)
        except images.ImageError as error:
            raise _Skip(f"what was received cannot be read: {str(error).replace(str(temporary), 'it')}") from error
    return hashlib.sha256(body).hexdigest()


_LICENCE_COLUMNS = ("file", "path", "licence", "author", "page", "url", "original_sha1", "sha256", "width", "height")


def _licence_row(work: Work, entry: Mapping[str, Any], path: str, sha256: str) -> dict[str, Any]:
    return {
        "file": work.file,
        "path": path,
        "licence": _licence(entry),
        "author": _meta(entry, "Artist"),
        "page": entry.get("descriptionurl", ""),
        "url": entry["thumburl"],
        "original_sha1": entry["sha1"],
        "sha256": sha256,
        "width": entry["thumbwidth"],
        "height": entry["thumbheight"],
    }


def _read_licences(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_licences(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _LICENCE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_text(path, text.getvalue())


# --- Kaggle ----------------------------------------------------------------------------------------------------------

KAGGLE_SET = "ikarus777/best-artworks-of-all-time"
KAGGLE_PAGE = f"https://www.kaggle.com/datasets/{KAGGLE_SET}"


def best_artworks(
    target: Path | str,
    *,
    artists: Sequence[str] | None = None,
    limit: int | None = None,
    max_side: int | None = None,
    folder: Path | str | None = None,
    log: Callable[[str], None] = print,
) -> list[Sample]:
    """*Best Artworks of All Time*: some 8,000 pictures by 50 painters, for which each artwork is unique.

    Pictures stay where ``kagglehub`` keeps them, unless ``max_side`` asks for smaller copies. Folder names with broken
    encoding are repaired, and pictures that lie there twice under two spellings are taken once.

    Args:
        target: folder for the manifest and the copies.
        artists: folder names (``"Vincent_van_Gogh"``); default all.
        limit: pictures per artist.
        max_side: longer side of PNG copies in ``target``; default: no copies.
        folder: a copy already downloaded; default: download through ``kagglehub`` (about 2 GB).
        log: receives lines for the user.
    Returns:
        samples, all normal and ``train``; the category is the artist.
    Raises:
        SourceError: ``kagglehub`` is missing, the download fails, or the folder is another set.
        ValueError: an artist is not in the set.
    """
    root = Path(os.path.abspath(folder)) if folder is not None else _kaggle_folder(log)
    base = next(
        (p for p in (root / "images" / "images", root / "images", root) if p.is_dir() and _has_folders(p)), None
    )
    if base is None:
        raise SourceError(f"{root} does not look like {KAGGLE_SET}: images/images/<Artist>/*.jpg is expected.")
    by_artist: dict[str, list[Path]] = {}
    for child in sorted(path for path in base.iterdir() if path.is_dir()):
        pictures = sorted(path for path in child.iterdir() if path.suffix.lower() in images.IMAGE_SUFFIXES)
        by_artist.setdefault(_repaired(child.name), []).extend(pictures)
    unknown = sorted(set(map(_repaired, artists or ())) - set(by_artist))
    if unknown:
        raise ValueError(f"No artist {', '.join(unknown)}; there are {', '.join(sorted(by_artist))}.")
    samples, seen, n_twice = [], set(), 0
    for artist in map(_repaired, artists) if artists else sorted(by_artist):
        taken = 0
        for path in by_artist[artist]:
            if limit is not None and taken == limit:
                break
            sha256 = storage.sha256_file(path)
            n_twice += sha256 in seen
            if sha256 in seen:
                continue
            try:
                picture = images.load_image(path, max_side=max_side or 128)
            except images.ImageError as error:
                log(f"left out: {error}")
                continue
            seen.add(sha256)
            taken += 1
            group = f"{artist}/{path.stem}"
            if max_side is not None:
                path = Path(target) / artist / "train" / NORMAL_KIND / f"{path.stem}.png"
                images.save_png(path, picture)
            samples.append(Sample(path, artist, False, split="train", group=group, sha256=storage.sha256_file(path)))
    if not samples:
        raise SourceError(f"{base} holds no readable picture. Delete the folder and download it again.")
    log(f"{len(samples)} pictures by {len({s.category for s in samples})} artists; {n_twice} lay there twice.")
    return data.load_manifest(
        data.write_manifest(target, samples, info={"made_by": "best_artworks", "source": KAGGLE_PAGE})
    )


def _kaggle_folder(log: Callable[[str], None]) -> Path:
    try:
        import kagglehub
    except ImportError as error:
        raise SourceError(
            "The package kagglehub is missing (Colab has it). Install it with `pip install kagglehub`, or download "
            f"{KAGGLE_PAGE} by hand, unpack it and pass folder=... ."
        ) from error
    log(f"Best Artworks of All Time: about 2 GB; the licence stands on {KAGGLE_PAGE}")
    try:
        return Path(kagglehub.dataset_download(KAGGLE_SET))
    except Exception as error:  # kagglehub lets its own, requests' and the system's errors through
        raise SourceError(
            f"Kaggle gave no dataset ({type(error).__name__}: {error}). Check the network, or download {KAGGLE_PAGE} "
            f"by hand, unpack it and pass folder=... . {_OFFLINE}"
        ) from error


def _has_folders(path: Path) -> bool:
    return any(child.is_dir() and child.name not in ("images", "resized") for child in path.iterdir())


def _repaired(name: str) -> str:
    """A folder name whose UTF-8 was unpacked as code page 437, in composed Unicode.

    >>> _repaired("Albrecht_Du╠êrer") == _repaired("Albrecht_Dürer") == "Albrecht_Dürer"
    True
    """
    try:
        name = name.encode("cp437").decode("utf-8")
    except UnicodeError:
        pass  # it was not: the name is right as it is
    return unicodedata.normalize("NFC", name)
