"""Pictures to start from: two embedded paintings (offline), Wikimedia Commons and Kaggle (network).

Each source writes or lists pictures in the MVTec layout and returns samples: genuine pictures as ``train/good``, other
works after the same motif as ``test/replica`` and ``test/reinterpretation``. What the network gave is kept, checked
and listed with its licence.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
from urllib3.util import Retry

from helpers import files, synthesis
from helpers.data import images, manifest, reading
from helpers.data.names import clean, repaired
from helpers.records import NORMAL_KIND, Sample

REPLICA, REINTERPRETATION = "replica", "reinterpretation"
PAINTINGS = Path(__file__).resolve().parent.parent / "assets" / "paintings"
N_GENUINE = 30
"""Photographs of each embedded painting."""


class SourceError(RuntimeError):
    """Pictures cannot be had; the message says why and what to do instead."""


def embedded_artworks(target: Path | str, *, max_side: int, seed: int) -> list[Sample]:
    """Two paintings that ship with the suite, with replicas and reinterpretations: real work without any download.

    Each canvas was painted by a program from a photograph (see the card in ``helpers/assets``). The original is
    photographed :data:`N_GENUINE` times with other crops, stands, light and cameras; each photograph is a source of its
    own (``group``). A replica is the motif painted again by another hand, a reinterpretation another work after it. All
    are photographed alike, so that the camera betrays nothing.

    Args:
        target: folder to write; a complete one of the same settings is returned as it is.
        max_side: longer side of the pictures in pixels; each session's own is up to 15 % smaller.
        seed: of the photographs.
    Returns:
        samples: genuine ones in ``train``, the others in ``test`` without masks.
    """
    target = Path(os.path.abspath(target))
    settings = {"max_side": max_side, "seed": seed, "n_genuine": N_GENUINE}
    samples = _kept(target, "embedded", settings)
    if samples:
        return samples
    for canvas in sorted(PAINTINGS.glob("*/*/*.webp")):
        category, kind = canvas.parts[-3:-1]
        painting = images.load_image(canvas)
        stems = [f"photograph_{number:03d}" for number in range(N_GENUINE)] if kind == NORMAL_KIND else [canvas.stem]
        for stem in stems:
            rng = synthesis.rng_for(seed, f"{category}/{kind}/{stem}")
            view = images.resize(painting, round(max_side * rng.uniform(0.85, 1)))
            view, _ = synthesis.rephotograph(view, rng, changes=synthesis.NORMAL_VARIATIONS)
            path = _place(target, category, kind) / f"{stem}.png"
            images.save_png(path, view)
            samples.append(_sample(path, category, kind))
    return _keep(target, "embedded", settings, samples)


def _place(target: Path, category: str, kind: str) -> Path:
    return target / category / ("train" if kind == NORMAL_KIND else "test") / kind


def _sample(path: Path, category: str, kind: str) -> Sample:
    split, group = "train" if kind == NORMAL_KIND else "test", f"{category}/{path.stem}"
    return Sample(path, category, kind != NORMAL_KIND, split=split, kind=kind, group=group)


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
PAUSE = 1.0
"""Seconds before each request."""
MOST_GENUINE = 20
"""Genuine pictures of a painting after which no more members of its categories are fetched."""
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
    "mona_lisa": ["Category:Mona Lisa", "Category:Reproductions of Mona Lisa"],
    "girl_with_a_pearl_earring": ["Category:Girl with a Pearl Earring"],
}
"""Categories on Commons whose members may be further genuine pictures of a painting."""


def wikimedia(
    target: Path | str, *, is_genuine: Callable[[np.ndarray, np.ndarray], bool] | None = None
) -> list[Sample]:
    """Public-domain reproductions, replicas and reinterpretations from Wikimedia Commons: :data:`WORKS`, and members of
    :data:`MEMBERS` that are genuine and no copies of another one; a line is printed for each file.

    The MediaWiki API is asked for renderings (originals can have hundreds of megapixels; addresses made by hand fail
    since August 2026). A file is used only if its licence is a free one; ``licences.csv`` lists it. Downloads go one
    by one and are kept: a stopped call goes on, and a complete folder is returned without asking again.

    Args:
        target: folder to write.
        is_genuine: (main scan, picture), both uint8 RGB -> whether the picture shows the painting without a
            difference. Without it no members are asked for.
    Raises:
        SourceError: no network, the server refuses us, or no genuine picture could be had.
    """
    target = Path(os.path.abspath(target))
    settings = {"works": [work.file for work in WORKS], "members": is_genuine is not None and MEMBERS}
    kept = _kept(target, "wikimedia", settings)
    if kept:
        return kept
    commons = _Commons(target)
    for work in WORKS:
        commons.take(work, next(commons.files(titles=f"File:{work.file}"), None))
    for category, names in (MEMBERS if is_genuine else {}).items():
        for file, entry in itertools.chain.from_iterable(map(commons.members, names)):
            mine = [s for s in commons.samples if s.category == category and not s.is_anomalous]
            if not 0 < len(mine) < MOST_GENUINE:
                break
            commons.take(Work(file, category), entry, lambda image, mine=mine: _reason_against(image, mine, is_genuine))
    if all(sample.is_anomalous for sample in commons.samples):
        raise SourceError(f"No genuine picture could be had from {COMMONS_API}; see the lines above. {_OFFLINE}")
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

    def __init__(self, target: Path) -> None:
        self.samples: list[Sample] = []
        self.rows: list[dict[str, Any]] = []
        self._target, self._seen = target, set()
        self._session = requests.Session()
        self._session.headers["User-Agent"] = USER_AGENT
        retry = Retry(total=4, backoff_factor=PAUSE, status_forcelist=(429, 500, 502, 503, 504))
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))

    def files(self, **query: str) -> Iterator[dict[str, Any]]:
        """``imageinfo`` and ``title`` of the files that a query names, page by page."""
        fixed = {"action": "query", "format": "json", "formatversion": "2", "redirects": "1", "prop": "imageinfo"}
        query |= fixed | {"iiprop": "url|size|sha1|mime|extmetadata", "iiurlwidth": str(WIDTH)}
        while query:
            try:
                reply = json.loads(self._get(COMMONS_API, query))
                if "error" in reply:
                    raise ValueError(reply["error"])
            except (_Skip, ValueError) as error:
                raise SourceError(
                    f"{COMMONS_API} gave no usable answer: {error}. Try again later. {_OFFLINE}"
                ) from error
            for page in reply.get("query", {}).get("pages", ()):
                yield from ({"title": page["title"], **info} for info in page.get("imageinfo", ())[:1])
            query = query | reply["continue"] if "continue" in reply else {}

    def members(self, category: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """File names and ``imageinfo`` of a category."""
        query = {"generator": "categorymembers", "gcmtitle": category, "gcmtype": "file", "gcmlimit": "50"}
        return ((entry["title"].removeprefix("File:"), entry) for entry in self.files(**query))

    def take(
        self, work: Work, entry: Mapping[str, Any] | None, check: Callable[[np.ndarray], str] | None = None
    ) -> None:
        """Fetch a picture unless it is there already, and note it as a sample if nothing speaks against it."""
        if entry and entry["sha1"] in self._seen:
            return
        try:
            path = self._fetched(work, entry)
            self._seen.add(entry["sha1"])
            problem = check(images.load_image(path, max_side=WIDTH)) if check else ""
        except (_Skip, images.ImageError) as error:
            problem = str(error)
        if problem:
            print(f"skipped {work.file}: {problem}")
            return
        self.samples.append(_sample(path, work.category, work.kind))
        about = {name: _meta(entry, field) for name, field in (("licence", "LicenseShortName"), ("author", "Artist"))}
        about |= {"page": entry.get("descriptionurl", ""), "url": entry["thumburl"], "original_sha1": entry["sha1"]}
        self.rows.append({"path": path.relative_to(self._target).as_posix(), **about})
        print(f"{work.category} {work.kind}: {work.file} ({about['licence']})")

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
        suffix = Path(urllib.parse.urlsplit(entry["thumburl"]).path).suffix.lower()  # a rendering of a TIFF is a JPEG
        # The original's hash in the name: a new version on Commons is another file.
        path = (
            _place(self._target, work.category, work.kind)
            / f"{clean(Path(work.file).stem)}_{entry['sha1'][:8]}{suffix}"
        )
        if not path.exists():
            body = self._get(entry["thumburl"])
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(body)
                images.load_image(temporary, max_side=64)
        return path

    def _get(self, url: str, query: Mapping[str, str] | None = None) -> bytes:
        time.sleep(PAUSE)
        try:
            reply = self._session.get(url, params=query, timeout=60)
        except requests.exceptions.RequestException as error:
            server = urllib.parse.urlsplit(url).netloc
            raise SourceError(
                f"{server} cannot be reached or breaks off ({error}). Run this again: what came is kept. {_OFFLINE}"
            ) from error
        if reply.status_code == 403:
            raise SourceError(f"{url} answered 403. It wants a descriptive User-Agent; ours is {USER_AGENT!r}.")
        if reply.status_code != 200:
            raise _Skip(f"the server answered {reply.status_code} {reply.reason}")
        return reply.content


def _meta(entry: Mapping[str, Any], name: str) -> str:
    """A field of ``extmetadata``, without its HTML."""
    value = str(entry.get("extmetadata", {}).get(name, {}).get("value", ""))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", value)).strip()


# --- Kaggle ----------------------------------------------------------------------------------------------------------

KAGGLE_SET = "ikarus777/best-artworks-of-all-time"


def best_artworks(*, limit: int) -> list[Sample]:
    """*Best Artworks of All Time*: pictures by 50 painters, ``limit`` of each, where ``kagglehub`` keeps them (2 GB).

    Folder names with broken encoding are repaired; pictures that lie there twice under two spellings are taken once.

    Returns:
        samples, all normal and ``train``; the category is the artist.
    Raises:
        SourceError: ``kagglehub`` is missing, the download fails, or the folder is another set.
    """
    page = f"https://www.kaggle.com/datasets/{KAGGLE_SET}"
    try:
        import kagglehub

        print(f"Best Artworks of All Time: about 2 GB; the licence stands on {page}")
        folder = Path(kagglehub.dataset_download(KAGGLE_SET))
    except Exception as error:  # kagglehub lets its own, requests' and the system's errors through
        raise SourceError(
            f"Kaggle gave no dataset ({type(error).__name__}: {error}). Try later, or see {page}"
        ) from error
    samples, seen, taken = [], set(), Counter()
    for path in sorted(folder.glob("images/images/*/*")):
        artist, sha256 = repaired(path.parent.name), files.sha256_file(path)
        if path.suffix.lower() in images.IMAGE_SUFFIXES and sha256 not in seen and taken[artist] < limit:
            seen.add(sha256)
            taken[artist] += 1
            samples.append(Sample(path, artist, False, split="train", group=f"{artist}/{path.stem}", sha256=sha256))
    if not samples:
        raise SourceError(f"{folder} does not hold {KAGGLE_SET} (images/images/<Artist>/*.jpg). See {page}")
    return samples
