"""Pictures to start from: two embedded paintings (offline) and Wikimedia Commons (network)."""

import re
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
from urllib3.util import Retry

from helpers import files, synthesis
from helpers.data import images, reading
from helpers.data.layouts import FolderReading
from helpers.data.manifest import MANIFEST_JSON
from helpers.data.names import clean
from helpers.records import NORMAL_KIND, Sample

Difference = Callable[[np.ndarray, np.ndarray], str]  # main scan, picture (uint8 RGB) -> why it does not show the same
N_GENUINE = 30  # photographs of each embedded painting
PAINTINGS = Path(__file__).resolve().parent.parent / "assets" / "paintings"
COMMONS_API = "https://commons.wikimedia.org/w/api.php"
USER_AGENT = "art-anomaly-notebooks/1.0 (https://github.com/art-anomaly/art-anomaly-notebooks) python-requests"
WIDTH = 1280  # pixels; Commons serves renderings of few widths only
PAUSE = 1.0  # seconds before each request
MOST_GENUINE = 20  # genuine pictures of a painting after which no more members of its categories are fetched
_FREE_LICENCE = re.compile(
    r"(?!.*\bn[cd]\b)(public domain|pd|pd-[\w-]+|cc0( [\d.]+)?|cc[ -]by([ -]sa)?[ -][\d.]+( [a-z]{2,4})?)", re.I
)
_OFFLINE = "Without network: ART_PROFILE=mini, or put pictures into a folder and set ART_DATA=/path/to/folder."


def embedded_artworks(target: Path, *, max_side: int, seed: int) -> FolderReading:
    """Two paintings that ship with the suite (see the card in ``helpers/assets``); what is there is kept. Photographs
    of an original, by other cameras, are sources of their own; works of other hands are photographed alike."""
    layout = "two painted pictures that ship with the suite, photographed by simulated cameras"
    source = FolderReading(target, layout, count_real=True, identity=f"embedded {max_side} {seed}")
    for canvas in sorted(PAINTINGS.glob("*/*/*.webp")):
        category, kind = canvas.parts[-3:-1]
        painting, is_anomalous = images.load_image(canvas), kind != NORMAL_KIND
        split = "test" if is_anomalous else "train"
        for stem in [canvas.stem] if is_anomalous else [f"photograph_{n:03d}" for n in range(N_GENUINE)]:
            path = target.absolute() / f"{max_side} px, seed {seed}" / category / split / kind / f"{stem}.png"
            source.samples.append(Sample(path, category, is_anomalous, None, split, kind, f"{category}/{stem}"))
            if not path.exists():
                rng = synthesis.rng_for(seed, f"{category}/{kind}/{stem}")
                view = images.resize(painting, round(max_side * rng.uniform(0.85, 1)))
                images.save_png(path, synthesis.rephotograph(view, rng, changes=synthesis.NORMAL_VARIATIONS)[0])
    return source


def titles() -> list[list[str]]:
    """Painting, place, and title of files on Commons (main scans first), or of categories with genuine ones."""
    return pd.read_csv(Path(__file__).with_name("commons.csv")).values.tolist()


def wikimedia(target: Path, difference: Difference) -> FolderReading:
    """Pictures of :func:`titles` from Wikimedia Commons, and members of categories in which ``difference`` finds none
    and which are no copies; others are left out with the reason. Licences must be free; with the authors they stand in
    ``manifest.json``: with it, nothing is asked again. A stopped call goes on. ``ConnectionError``: nothing came."""
    identity = files.sha256_json(titles())  # not what came: what Commons holds may drift
    folder = target / identity[:8]
    if not (folder / MANIFEST_JSON).exists():
        try:
            rows = list(_fetched(folder, difference))
        except requests.RequestException as error:
            way = f"What came is kept: run this again (403: it dislikes our User-Agent, {USER_AGENT!r}). {_OFFLINE}"
            raise ConnectionError(f"Commons cannot be reached or gives no usable answer: {error}. {way}") from error
        if not any(folder.glob(f"*/train/{NORMAL_KIND}/*")):
            raise ConnectionError(f"No genuine picture from {COMMONS_API}; see the lines above. {_OFFLINE}")
        files.write_json(folder / MANIFEST_JSON, {"files": rows})
    source, rows = reading.read_folder(folder), files.read_json(folder / MANIFEST_JSON)["files"]
    source.layout, source.identity = "public-domain reproductions from Wikimedia Commons", identity
    source.left_out += [(Path(row["file"]), row["left_out"]) for row in rows if row["left_out"]]
    return source


def _fetched(folder: Path, difference: Difference) -> Iterator[dict[str, str]]:
    """Licence and author of every file, and why it is left out; those that are not lie in ``folder``, MVTec layout."""
    seen, scans = set(), defaultdict(list)
    for category, place, title in titles():
        mine, is_member = scans[category, place], title.startswith("Category:")
        for file, entry in _asked(title):
            known = entry.get("sha1", file)
            if known in seen or (is_member and not 0 < len(mine) < MOST_GENUINE):
                continue
            seen.add(known)
            row = {"file": file, "page": entry.get("descriptionurl", ""), "left_out": ""}
            for name, key in (("licence", "LicenseShortName"), ("author", "Artist")):
                value = str(entry.get("extmetadata", {}).get(key, {}).get("value", ""))
                row[name] = " ".join(re.sub(r"<[^>]*>", "", value).split())
            try:
                mine.append(_downloaded(folder / category / place, row, entry, mine if is_member else [], difference))
            except images.ImageError as error:
                row["left_out"] = str(error)
            print(f"{category}, {place}, {file}: {row['left_out'] or row['licence']}")
            yield row


def _asked(title: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file, or all of a category: name, and what Commons says of it and its rendering (nothing when it is gone)."""
    members = {"generator": "categorymembers", "gcmtitle": title, "gcmtype": "file", "gcmlimit": "50"}
    query = {"action": "query", "format": "json", "formatversion": "2", "redirects": "1", "prop": "imageinfo"}
    query |= {"iiprop": "url|size|sha1|mime|extmetadata", "iiurlwidth": str(WIDTH)}
    query |= members if title.startswith("Category:") else {"titles": f"File:{title}"}
    while query:
        reply = _get(COMMONS_API, query).json()
        if "error" in reply:
            raise requests.RequestException(reply["error"])
        for page in reply.get("query", {}).get("pages", ()):
            name = page["title"].removeprefix("File:") if "generator" in query else title
            yield name, page.get("imageinfo", [{}])[0]
        query = query | reply["continue"] if "continue" in reply else {}


def _downloaded(folder: Path, row: dict, entry: dict[str, Any], scans: list[Path], difference: Difference) -> Path:
    """A rendering of a file, in ``folder``. Beside ``scans`` it must be no copy of one, nor differ from the first."""
    address, mime = entry.get("thumburl"), str(entry.get("mime"))
    if not entry:
        raise images.ImageError("no file of this name on Commons any more")
    if not _FREE_LICENCE.fullmatch(row["licence"]):
        raise images.ImageError(f"its licence is {row['licence'] or 'not stated'!r}, which is not known to be free")
    if not mime.startswith("image/") or not address:
        raise images.ImageError(f"Commons has no picture of it ({mime}, {entry.get('thumberror', 'no rendering')})")
    suffix = Path(urllib.parse.urlsplit(address).path).suffix.lower()  # a rendering of a TIFF is a JPEG
    # The original's hash in the name: a new version on Commons is another file.
    path = folder / f"{clean(Path(row['file']).stem)}_{entry['sha1'][:8]}{suffix}"
    if not path.exists():
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(_get(address).content)
            *known, picture = (images.load_image(one, max_side=WIDTH) for one in (*scans, temporary))
            pairs = reading.near_duplicates([reading.perceptual_hash(one) for one in (*known, picture)])
            twins = [f"it is the scan of {scans[i].name} once more" for i, j in pairs if j == len(scans)]
            if reason := twins[0] if twins else known and difference(known[0], picture):
                raise images.ImageError(reason)
    return path


def _get(url: str, query: dict[str, str] | None = None) -> requests.Response:
    """One polite request: introduced, patient when asked to wait. A file that cannot be had is left out."""
    time.sleep(PAUSE)
    with requests.Session() as http:
        http.get_adapter(url).max_retries = Retry(4, backoff_factor=PAUSE, status_forcelist=(429, 500, 502, 503, 504))
        reply = http.get(url, params=query, timeout=60, headers={"User-Agent": USER_AGENT})
    if not reply.ok and reply.status_code != 403 and query is None:
        raise images.ImageError(f"the server answered {reply.status_code} {reply.reason}")
    reply.raise_for_status()
    return reply
