"""Pictures to start from: two embedded paintings (offline), Wikimedia Commons and Kaggle (network)."""

from __future__ import annotations

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
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

Difference = Callable[[np.ndarray, np.ndarray], str]
"""Main scan and picture, uint8 RGB -> why the picture is no faithful photograph of what the scan shows; "" if it is."""
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


class SourceError(RuntimeError):
    """Pictures cannot be had; the message says why and what to do instead."""


def embedded_artworks(target: Path, *, max_side: int, seed: int) -> list[Sample]:
    """Two paintings that ship with the suite (see the card in ``helpers/assets``), without any download.

    The original is photographed with other crops, stands, light and cameras; each photograph is a source of its own. A
    replica is the motif painted again by another hand, a reinterpretation another work after it; they are photographed
    alike. The longer side has up to 15 % less than ``max_side`` pixels. A complete ``target`` is returned as it is.
    """
    settings, samples = {"max_side": max_side, "seed": seed, "n_genuine": N_GENUINE}, []
    if kept := _kept(target, "embedded", settings):
        return kept
    for canvas in sorted(PAINTINGS.glob("*/*/*.webp")):
        category, kind = canvas.parts[-3:-1]
        painting = images.load_image(canvas)
        stems = [f"photograph_{number:03d}" for number in range(N_GENUINE)] if kind == NORMAL_KIND else [canvas.stem]
        for stem in stems:
            rng = synthesis.rng_for(seed, f"{category}/{kind}/{stem}")
            view = images.resize(painting, round(max_side * rng.uniform(0.85, 1)))
            view, _ = synthesis.rephotograph(view, rng, changes=synthesis.NORMAL_VARIATIONS)
            samples.append(_sample(target, category, kind, f"{stem}.png"))
            images.save_png(samples[-1].image_path, view)
    manifest.write_manifest(target, samples, info={"embedded": settings})
    return samples


def _sample(target: Path, category: str, kind: str, name: str) -> Sample:
    split, group = "train" if kind == NORMAL_KIND else "test", f"{category}/{Path(name).stem}"
    path = target.absolute() / category / split / kind / name
    return Sample(path, category, kind != NORMAL_KIND, split=split, kind=kind, group=group)


def _kept(target: Path, name: str, settings: Mapping[str, Any]) -> list[Sample]:
    """The pictures of an earlier run with the same settings; [] when there are none."""
    mark = target / manifest.MANIFEST_JSON
    found = manifest.load_manifest(target) if mark.exists() and files.read_json(mark).get(name) == settings else []
    return found if all(sample.image_path.exists() for sample in found) else []


def titles() -> list[list[str]]:
    """Painting, kind and title of files on Commons, seen in public use in 2026 (the first genuine one of a painting is
    its main scan; one that is gone is left out with a line), and of categories whose members may be genuine, too."""
    return pd.read_csv(Path(__file__).with_name("commons.csv")).values.tolist()


class _Skip(Exception):
    """Why one file is left out; the others go on."""


def wikimedia(target: Path, difference: Difference) -> tuple[list[Sample], list[tuple[Path, str]]]:
    """Pictures of :func:`titles` from Wikimedia Commons, and members of categories in which ``difference`` finds none
    and which are no copies; name and reason of every file left out. A line is printed for each file.

    The API is asked for renderings (originals can have hundreds of megapixels; addresses made by hand fail since August
    2026). Licences must be free, and are listed in ``licences.csv``. Downloads are kept: a stopped call goes on, and a
    complete ``target`` is returned without asking. ``SourceError``: no network, a refusal, or no genuine picture.
    """
    if kept := _kept(target, "wikimedia", titles()):
        left_out = files.read_json(target / manifest.MANIFEST_JSON)["left_out"]
        return kept, [(Path(file), reason) for file, reason in left_out]
    samples, rows, left_out, seen = [], [], [], set()
    try:
        for category, kind, file, entry in _candidates():
            genuine = [s for s in samples if s.category == category and not s.is_anomalous]
            is_member = kind == "member"
            if entry.get("sha1") in seen or (is_member and not 0 < len(genuine) < MOST_GENUINE):
                continue
            try:
                sample = _fetched(target, category, NORMAL_KIND if is_member else kind, file, entry)
                seen.add(entry["sha1"])
                if is_member:
                    _refuse_other(sample, genuine, difference)
            except (_Skip, images.ImageError) as error:
                left_out.append([file, str(error)])
                print(f"left out {file}: {error}")
                continue
            samples.append(sample)
            about = {"licence": _meta(entry, "LicenseShortName"), "author": _meta(entry, "Artist")}
            rows.append({"file": sample.image_path.name, **about, "page": entry.get("descriptionurl", "")})
            print(f"{category} {sample.kind}: {file} ({about['licence']})")
    except requests.RequestException as error:
        way = f"What came is kept: run this again later. (403: it dislikes our User-Agent, {USER_AGENT!r}.) {_OFFLINE}"
        raise SourceError(f"Commons cannot be reached or gives no usable answer: {error}. {way}") from error
    if all(sample.is_anomalous for sample in samples):
        raise SourceError(f"No genuine picture could be had from {COMMONS_API}; see the lines above. {_OFFLINE}")
    files.write_text(target / "licences.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    manifest.write_manifest(target, samples, info={"wikimedia": titles(), "left_out": left_out})
    return samples, [(Path(file), reason) for file, reason in left_out]


def _candidates() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Painting, kind, file, and what Commons says of it: nothing when it is gone."""
    for category, kind, title in titles():
        if kind == "member":
            for entry in _asked(generator="categorymembers", gcmtitle=title, gcmtype="file", gcmlimit="50"):
                yield category, kind, entry["title"].removeprefix("File:"), entry
        else:
            yield category, kind, title, next(_asked(titles=f"File:{title}"), {})


def _asked(**query: str) -> Iterator[dict[str, Any]]:
    """``imageinfo`` and ``title`` of the files that a query names, page by page."""
    query |= {"action": "query", "format": "json", "formatversion": "2", "redirects": "1", "prop": "imageinfo"}
    query |= {"iiprop": "url|size|sha1|mime|extmetadata", "iiurlwidth": str(WIDTH)}
    while query:
        reply = _get(COMMONS_API, query).json()
        if "error" in reply:
            raise requests.RequestException(reply["error"])
        for page in reply.get("query", {}).get("pages", ()):
            yield from ({"title": page["title"], **info} for info in page.get("imageinfo", ())[:1])
        query = query | reply["continue"] if "continue" in reply else {}


def _fetched(target: Path, category: str, kind: str, file: str, entry: Mapping[str, Any]) -> Sample:
    """The picture, on disk, if it may be used."""
    licence = _meta(entry, "LicenseShortName")
    if not entry:
        raise _Skip("no file of this name on Commons any more")
    if not _FREE_LICENCE.fullmatch(licence):
        raise _Skip(f"its licence is {licence or 'not stated'!r}, which is not known to be free")
    if not str(entry.get("mime")).startswith("image/") or not entry.get("thumburl"):
        raise _Skip(f"Commons has no picture of it ({entry.get('mime')}, {entry.get('thumberror', 'no rendering')})")
    suffix = Path(urllib.parse.urlsplit(entry["thumburl"]).path).suffix.lower()  # a rendering of a TIFF is a JPEG
    # The original's hash in the name: a new version on Commons is another file.
    sample = _sample(target, category, kind, f"{clean(Path(file).stem)}_{entry['sha1'][:8]}{suffix}")
    if not sample.image_path.exists():
        with files.atomic_path(sample.image_path) as temporary:
            temporary.write_bytes(_get(entry["thumburl"]).content)
            images.load_image(temporary, max_side=64)
    return sample


def _refuse_other(sample: Sample, genuine: Sequence[Sample], difference: Difference) -> None:
    """Refuse a picture that shows one of a painting's scans once more, or differs from its main scan, the first one."""
    pictures = [images.load_image(one.image_path, max_side=WIDTH) for one in (*genuine, sample)]
    pairs = reading.near_duplicates([reading.perceptual_hash(picture) for picture in pictures])
    twins = [f"it is the scan of {genuine[i].image_path.name} once more" for i, j in pairs if j == len(genuine)]
    if reason := next(iter(twins), None) or difference(pictures[0], pictures[-1]):
        raise _Skip(reason)


def _get(url: str, query: Mapping[str, str] | None = None) -> requests.Response:
    """One polite request: introduced, patient when asked to wait. A file that cannot be had is left out."""
    time.sleep(PAUSE)
    with requests.Session() as session:
        retry = Retry(total=4, backoff_factor=PAUSE, status_forcelist=(429, 500, 502, 503, 504))
        session.get_adapter(url).max_retries = retry
        reply = session.get(url, params=query, timeout=60, headers={"User-Agent": USER_AGENT})
    if not reply.ok and reply.status_code != 403 and query is None:
        raise _Skip(f"the server answered {reply.status_code} {reply.reason}")
    reply.raise_for_status()
    return reply


def _meta(entry: Mapping[str, Any], name: str) -> str:
    """A field of ``extmetadata``, without its HTML."""
    value = str(entry.get("extmetadata", {}).get(name, {}).get("value", ""))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", value)).strip()


def best_artworks(*, limit: int) -> list[Sample]:
    """*Best Artworks of All Time*: pictures by 50 painters (their categories), ``limit`` of each, all normal. Folder
    names with broken encoding are repaired; pictures that lie there twice are taken once."""
    name = "ikarus777/best-artworks-of-all-time"
    print(f"Best Artworks of All Time: about 2 GB; the licence stands on https://www.kaggle.com/datasets/{name}")
    try:
        import kagglehub

        folder = Path(kagglehub.dataset_download(name))
    except Exception as error:  # kagglehub lets its own, requests' and the system's errors through
        raise SourceError(f"Kaggle gave no dataset ({type(error).__name__}: {error}). Try again later.") from error
    paths = {files.sha256_file(path): path for path in sorted(folder.glob("images/images/*/*.jpg"), reverse=True)}
    if not paths:
        raise SourceError(f"{folder} does not hold images/images/<Artist>/*.jpg, as {name} does.")
    table = pd.DataFrame({"path": sorted(paths.values())})
    table["artist"] = [repaired(path.parent.name) for path in table["path"]]
    taken = table.groupby("artist").head(limit).itertuples(index=False)
    return [Sample(path, artist, False, split="train", group=f"{artist}/{path.stem}") for path, artist in taken]
