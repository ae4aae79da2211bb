"""Pictures to start from: two embedded paintings (offline), Wikimedia Commons and Kaggle (network).

Each source writes or lists pictures in the MVTec layout and returns samples: genuine pictures as ``train/good``, other
works after the same motif as ``test/replica`` and ``test/reinterpretation``. What the network gave is kept, checked
and listed with its licence.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from helpers import files, synthesis
from helpers.data import images, manifest, reading
from helpers.data.names import clean, repaired
from helpers.records import NORMAL_KIND, Sample

REPLICA, REINTERPRETATION = "replica", "reinterpretation"
PAINTINGS = Path(__file__).resolve().parent.parent / "assets" / "paintings"


class SourceError(RuntimeError):
    """Pictures cannot be had; the message says why and what to do instead."""


def embedded_artworks(target: Path | str, *, max_side: int, seed: int, n_genuine: int = 30) -> list[Sample]:
    """Two paintings that ship with the suite, with replicas and reinterpretations: real work without any download.

    Each canvas was painted by a program from a photograph (see the card in ``helpers/assets``). The original is
    photographed ``n_genuine`` times with other crops, stands, light and cameras; each photograph is a source of its own
    (``group``). A replica is the motif painted again by another hand, a reinterpretation another work after it. All
    are photographed alike, so that the camera betrays nothing.

    Args:
        target: folder to write; a complete one of the same settings is returned as it is.
        max_side: longer side of the pictures in pixels; each session's own is up to 15 % smaller.
        seed: of the photographs.
        n_genuine: photographs of each original.
    Returns:
        samples: genuine ones in ``train``, the others in ``test`` without masks.
    """
    target = Path(os.path.abspath(target))
    settings = {"max_side": max_side, "seed": seed, "n_genuine": n_genuine}
    kept = _kept(target, "embedded", settings)
    if kept:
        return kept
    samples = []
    for canvas in sorted(PAINTINGS.glob("*/*/*.webp")):
        category, kind = canvas.parts[-3:-1]
        painting = images.load_image(canvas)
        for number in range(n_genuine if kind == NORMAL_KIND else 1):
            stem = f"photograph_{number:03d}" if kind == NORMAL_KIND else canvas.stem
            rng = synthesis.rng_for(seed, f"{category}/{kind}/{stem}")
            view = images.resize(painting, round(max_side * rng.uniform(0.85, 1)))
            view, _ = synthesis.rephotograph(view, rng, changes=synthesis.NORMAL_VARIATIONS)
            is_genuine = kind == NORMAL_KIND
            path = target / category / ("train" if is_genuine else "test") / kind / f"{stem}.png"
            images.save_png(path, view)
            split, group = path.parts[-3], f"{category}/{stem}"
            samples.append(Sample(path, category, not is_genuine, split=split, kind=kind, group=group))
    return _keep(target, "embedded", settings, samples)


def _kept(target: Path, name: str, settings: Mapping[str, Any]) -> list[Sample]:
    """The pictures of an earlier run with the same settings; [] when there are none."""
    mark = target / manifest.MANIFEST_JSON
    if not mark.exists() or files.read_json(mark).get(name) != settings:
        return []
    found = manifest.load_manifest(target)
    return found if all(sample.image_path.exists() for sample in found) else []


def _keep(target: Path, name: str, settings: Mapping[str, Any], samples: Sequence[Sample]) -> list[Sample]:
    return manifest.load_manifest(manifest.write_manifest(target, samples, info={"made_by": name, name: settings}))


# --- Wikimedia Commons -----------------------------------------------------------------------------------------------

COMMONS_API = "https://commons.wikimedia.org/w/api.php"
USER_AGENT = "art-anomaly-notebooks/1.0 (https://github.com/art-anomaly/art-anomaly-notebooks) python-requests"
"""Commons answers 403 without a name and a contact."""
WIDTH = 1280
"""Pixels; Commons serves renderings of few widths only."""
MAX_DOWNLOAD_BYTES = 64 << 20
LICENCES = "licences.csv"
_FREE_LICENCE = re.compile(
    r"(?!.*\bn[cd]\b)(public domain|pd|pd-[\w-]+|cc0( [\d.]+)?|cc[ -]by([ -]sa)?[ -][\d.]+( [a-z]{2,4})?)", re.I
)
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
"""Files seen in public use in 2026; the first genuine one of a painting is its main scan. Names change on Commons: one
that is gone is skipped with a line in the log."""
MEMBERS = {
    "mona_lisa": ("Category:Mona Lisa", "Category:Reproductions of Mona Lisa"),
    "girl_with_a_pearl_earring": ("Category:Girl with a Pearl Earring",),
}
"""Categories on Commons whose members may be further genuine pictures of a painting."""


def wikimedia(
    target: Path | str,
    *,
    works: Sequence[Work] = WORKS,
    members: Mapping[str, Sequence[str]] = MEMBERS,
    is_genuine: Callable[[np.ndarray, np.ndarray], bool] | None = None,
    n_genuine: int = 20,
    api: str = COMMONS_API,
    pause: float = 1.0,
    log: Callable[[str], None] = print,
) -> list[Sample]:
    """Public-domain reproductions, replicas and reinterpretations from Wikimedia Commons.

    The MediaWiki API is asked for renderings (originals can have hundreds of megapixels; addresses made by hand fail
    since August 2026). A file is used only if its licence is a free one; ``licences.csv`` lists it. Downloads go one
    by one and are kept: a stopped call goes on, and a complete folder is returned without asking again.

    Args:
        target: folder to write.
        works: what to fetch.
        members: Commons categories by painting; their members are further genuine pictures where ``is_genuine``
            says so and they are no copies of another one. All others are left out with a line.
        is_genuine: (main scan, picture), both uint8 RGB -> whether the picture shows the painting without a
            difference. Without it no members are asked for.
        n_genuine: genuine pictures of a painting after which no more members are fetched.
        api: address of the API.
        pause: seconds between requests.
        log: receives a line per file.
    Raises:
        SourceError: no network, the server refuses us, or no genuine picture could be had.
    """
    import pandas as pd

    target = Path(os.path.abspath(target))
    settings = {"works": [work.file for work in works], "members": is_genuine is not None and dict(members)}
    kept = _kept(target, "wikimedia", settings)
    if kept:
        return kept
    commons = _Commons(target, api, pause, log)
    entries = commons.entries([work.file for work in works])
    for work in works:
        commons.take(work, entries.get(work.file), lambda image: "")
    for category, names in (members if is_genuine else {}).items():
        known = {work.file.replace("_", " ") for work in works}
        for file, entry in commons.members(names):
            mine = [s for s in commons.samples if s.category == category and not s.is_anomalous]
            if not 0 < len(mine) < n_genuine:
                break
            if file.replace("_", " ") not in known:
                commons.take(Work(file, category), entry, partial(_reason_against, mine=mine, is_genuine=is_genuine))
            known.add(file.replace("_", " "))
    if all(sample.is_anomalous for sample in commons.samples):
        raise SourceError(f"No genuine picture could be had from {api}; see the lines above. {_OFFLINE}")
    files.write_text(target / LICENCES, pd.DataFrame(commons.rows).to_csv(index=False, lineterminator="\n"))
    return _keep(target, "wikimedia", settings, commons.samples)


def _reason_against(
    image: np.ndarray, mine: Sequence[Sample], is_genuine: Callable[[np.ndarray, np.ndarray], bool]
) -> str:
    """Why a picture is no further genuine one beside those of a painting, the main scan first; "" when it is."""
    others = [images.load_image(sample.image_path, max_side=WIDTH) for sample in mine]
    pairs = reading.near_duplicates([reading.perceptual_hash(other) for other in (*others, image)])
    twin = next((mine[i] for i, j in pairs if j == len(mine)), None)
    if twin is not None:
        return f"it is the scan of {twin.image_path.name} once more"
    return "" if is_genuine(others[0], image) else "it is another picture, or differs from the main scan"


class _Skip(Exception):
    """Why one file is left out; the others go on."""


class _Commons:
    """Polite requests (one at a time, introduced, patient when asked to wait), and what they brought."""

    def __init__(self, target: Path, api: str, pause: float, log: Callable[[str], None]) -> None:
        import requests
        from urllib3.util import Retry

        class Patient(Retry):
            def get_retry_after(self, response: Any) -> float | None:
                asked = super().get_retry_after(response)
                return asked and min(asked, 120)

        self._target, self._api, self._pause, self._log = target, api, pause, log
        self._session = requests.Session()
        self._session.headers["User-Agent"] = USER_AGENT
        retry = Patient(total=4, backoff_factor=pause, status_forcelist=(429, 500, 502, 503, 504))
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        self.samples: list[Sample] = []
        self.rows: list[dict[str, Any]] = []

    def entries(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """``imageinfo`` by file name as asked for; names that are gone are absent."""
        found = self._ask({"titles": "|".join(f"File:{name}" for name in names)}).get("query", {})
        pages = {page["title"]: page["imageinfo"][0] for page in found.get("pages", ()) if page.get("imageinfo")}
        led = {step["from"]: step["to"] for step in (*found.get("normalized", ()), *found.get("redirects", ()))}
        titles = {name: led.get(f"File:{name}", f"File:{name}") for name in names}
        return {name: pages[led.get(title, title)] for name, title in titles.items() if led.get(title, title) in pages}

    def members(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Files of Commons categories with their ``imageinfo``, page by page."""
        for name in names:
            query = {"generator": "categorymembers", "gcmtitle": name, "gcmtype": "file", "gcmlimit": "50"}
            while query:
                reply = self._ask(query)
                for page in reply.get("query", {}).get("pages", ()):
                    if page.get("imageinfo"):
                        yield page["title"].removeprefix("File:"), page["imageinfo"][0]
                query = {**query, **reply["continue"]} if "continue" in reply else {}

    def take(self, work: Work, entry: Mapping[str, Any] | None, check: Callable[[np.ndarray], str]) -> None:
        """Fetch a picture unless it is there already, and note it as a sample if nothing speaks against it."""
        try:
            path = self._fetched(work, entry)
            image = images.load_image(path, max_side=WIDTH)
            problem = check(image)
        except (_Skip, images.ImageError) as error:
            problem = str(error)
        if problem:
            return self._log(f"skipped {work.file}: {problem}")
        licence = _meta(entry, "LicenseShortName")
        self._log(f"{work.category} {work.kind}: {work.file} ({image.shape[1]} x {image.shape[0]} px, {licence})")
        page = {"page": entry.get("descriptionurl", ""), "url": entry["thumburl"], "original_sha1": entry["sha1"]}
        author = _meta(entry, "Artist")
        self.rows.append(
            {"path": path.relative_to(self._target).as_posix(), "licence": licence, "author": author, **page}
        )
        split, group = "train" if work.kind == NORMAL_KIND else "test", f"{work.category}/{path.stem}"
        self.samples.append(
            Sample(path, work.category, work.kind != NORMAL_KIND, split=split, kind=work.kind, group=group)
        )

    def _fetched(self, work: Work, entry: Mapping[str, Any] | None) -> Path:
        if entry is None:
            raise _Skip("no file of this name on Commons any more")
        licence = _meta(entry, "LicenseShortName")
        if not _FREE_LICENCE.fullmatch(licence):
            raise _Skip(f"its licence is {licence or 'not stated'!r}, which is not known to be free")
        if not str(entry.get("mime", "")).startswith("image/"):
            raise _Skip(f"it is {entry.get('mime')!r}, not a picture")
        if "thumburl" not in entry:
            raise _Skip(f"Commons has no rendering of it ({entry.get('thumberror', 'no reason given')})")
        url = entry["thumburl"]
        suffix = Path(urllib.parse.urlsplit(url).path).suffix.lower()  # a rendering of a TIFF is a JPEG
        # The original's hash in the name: a new version on Commons is another file.
        name = f"{clean(Path(work.file).stem)}_{entry['sha1'][:8]}{suffix}"
        path = self._target / work.category / work.kind / name
        if not path.exists():
            body = self._get(url)
            if url == entry["url"] and hashlib.sha1(body).hexdigest() != entry["sha1"]:
                raise _Skip("the file received is not the one that Commons describes (SHA-1 differs); try again later")
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(body)
                images.load_image(temporary, max_side=64)
        return path

    def _ask(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The API's answer about the pictures that ``query`` names."""
        iiprop = {"iiprop": "url|size|sha1|mime|extmetadata", "iiurlwidth": str(WIDTH), "redirects": "1"}
        fixed = {"action": "query", "format": "json", "formatversion": "2", "prop": "imageinfo"}
        try:
            reply = json.loads(self._get(self._api, {**fixed, **iiprop, **query}))
        except (_Skip, ValueError) as error:
            raise SourceError(f"{self._api} gave no usable answer ({error}). Try again later. {_OFFLINE}") from error
        if "error" in reply:
            raise SourceError(f"{self._api} refused the question: {reply['error'].get('info', reply['error'])}.")
        return reply

    def _get(self, url: str, query: Mapping[str, str] | None = None) -> bytes:
        import requests

        trouble = ""
        for _ in range(3):  # a body that breaks off is not asked for again by urllib3
            time.sleep(self._pause)
            try:
                with self._session.get(url, params=query, timeout=60, stream=True) as reply:
                    if reply.status_code == 403:
                        raise SourceError(
                            f"{url} answered 403: Commons refuses clients without a descriptive User-Agent with a "
                            f"contact. Ours is {USER_AGENT!r}."
                        )
                    if reply.status_code != 200:
                        raise _Skip(f"the server answered {reply.status_code} {reply.reason}")
                    body = b"".join(itertools.islice(reply.iter_content(1 << 20), MAX_DOWNLOAD_BYTES >> 20))
                    if len(body) >= MAX_DOWNLOAD_BYTES:
                        raise _Skip(f"it is larger than {MAX_DOWNLOAD_BYTES >> 20} MB")
                    return body
            except requests.exceptions.RequestException as error:
                trouble = f"{urllib.parse.urlsplit(url).netloc or url} cannot be reached or breaks off ({error})"
        raise _Skip(trouble)


def _meta(entry: Mapping[str, Any], name: str) -> str:
    """A field of ``extmetadata``, without its HTML."""
    value = str(entry.get("extmetadata", {}).get(name, {}).get("value", ""))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", value)).strip()


# --- Kaggle ----------------------------------------------------------------------------------------------------------

KAGGLE_SET = "ikarus777/best-artworks-of-all-time"
KAGGLE_PAGE = f"https://www.kaggle.com/datasets/{KAGGLE_SET}"


def best_artworks(*, limit: int | None = None, folder: Path | str | None = None) -> list[Sample]:
    """*Best Artworks of All Time*: some 8,000 pictures by 50 painters, where ``kagglehub`` keeps them.

    Folder names with broken encoding are repaired; pictures that lie there twice under two spellings are taken once.

    Args:
        limit: pictures per artist.
        folder: a copy already downloaded; default: download through ``kagglehub`` (about 2 GB).
    Returns:
        samples, all normal and ``train``; the category is the artist.
    Raises:
        SourceError: ``kagglehub`` is missing, the download fails, or the folder is another set.
    """
    by_hand = f"Download {KAGGLE_PAGE} by hand, unpack it and pass folder=... ."
    if folder is None:
        try:
            import kagglehub

            print(f"Best Artworks of All Time: about 2 GB; the licence stands on {KAGGLE_PAGE}")
            folder = kagglehub.dataset_download(KAGGLE_SET)
        except Exception as error:  # kagglehub lets its own, requests' and the system's errors through
            raise SourceError(f"Kaggle gave no dataset ({type(error).__name__}: {error}). {by_hand}") from error
    samples, seen, taken = [], set(), {}
    for path in sorted(Path(folder).glob("images/images/*/*")):
        artist, sha256 = repaired(path.parent.name), files.sha256_file(path)
        if path.suffix.lower() in images.IMAGE_SUFFIXES and sha256 not in seen and taken.get(artist, 0) != limit:
            seen.add(sha256)
            taken[artist] = taken.get(artist, 0) + 1
            group = f"{artist}/{path.stem}"
            samples.append(Sample(path, artist, False, split="train", group=group, sha256=sha256))
    if not samples:
        raise SourceError(f"{folder} does not hold {KAGGLE_SET} (images/images/<Artist>/*.jpg). {by_hand}")
    return samples
