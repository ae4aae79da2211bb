"""Any folder -> samples: every picture is decoded once, so that bad files and copies are known before anything runs."""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from helpers import files
from helpers.data import images, layouts, tables
from helpers.data.manifest import COLUMNS, MANIFEST_CSV, MANIFEST_JSON, shared_groups, write_manifest
from helpers.data.names import DatasetError, plain
from helpers.records import SPLITS, Sample

HASH_SIDE = 16
NEAR_DUPLICATE_LIMIT = 0.02
"""Share of differing bits up to which two pictures show one scan. Measured on the 139 real paintings: JPEG at quality
30, other sizes, brightness x 1.3 and noise give 0, a box over 2.5 % of the picture 0.02, a crop of 1 % per side 0.04,
tiles of different roads at least 0.37; other scans of the same painting spread from 0.01 upwards. A crop of 2 %, a
border or a tilt of 1 degree is not noticed."""
_SHOWN = 12


@dataclass(frozen=True)
class FolderReading:
    """What :func:`read_folder` understood of a folder."""

    source: Path
    layout: str
    samples: tuple[Sample, ...]
    """Readable pictures by category, split and kind; ``group`` joins copies of one picture."""
    bad_files: tuple[tuple[Path, str], ...]
    """Files left out, and why."""
    exact_duplicates: tuple[tuple[Path, Path], ...]
    """Pairs of byte-identical pictures that may stay (same split, or different categories)."""
    near_duplicates: tuple[tuple[Path, Path], ...]
    """Pairs of an artwork in different splits, or with different labels, that show one scan."""
    notes: tuple[str, ...]

    def describe(self) -> str:
        """The tree in words, then notes, copies and files left out."""
        counts = Counter((s.category, s.split, s.is_anomalous, s.kind) for s in self.samples)
        categories = sorted({category for category, *_ in counts})
        n_words = f"{_count(len(self.samples), 'picture')} of {_count(len(categories), 'artwork')}"
        lines = [f"{self.source}: {self.layout}, {n_words}"]
        for category in categories:
            lines.append(f"  {category}")
            for split in SPLITS:
                kinds = [f"{key[3]} {counts[key]}" for key in sorted(counts) if key[:2] == (category, split)]
                lines += [f"    {split:<12}{', '.join(kinds)}"] if kinds else []
            masks = [s.mask_path is not None for s in self.samples if s.category == category and s.is_anomalous]
            lines += [f"    {'masks':<12}{sum(masks)} of {_count(len(masks), 'anomalous picture')}"] if masks else []
        about = self.as_json()
        lines += [f"Note: {note}" for note in self.notes]
        lines += _shown("Same file more than once", map(" = ".join, about["exact_duplicates"]))
        near = "Near duplicates (one scan in two splits or under two labels)"
        lines += _shown(near, map(" ~ ".join, about["near_duplicates"]))
        lines += _shown("Files left out", (f"{file['path']}: {file['reason']}" for file in about["bad_files"]))
        return "\n".join(lines)

    def as_json(self) -> dict:
        """Layout, source, notes, copies and files left out, as ``manifest.json`` keeps them."""
        root = self.source if self.source.is_dir() else self.source.parent
        return {
            "layout": self.layout,
            "source": str(self.source),
            "notes": list(self.notes),
            "bad_files": [{"path": _short(path, root), "reason": reason} for path, reason in self.bad_files],
            "exact_duplicates": [[_short(a, root), _short(b, root)] for a, b in self.exact_duplicates],
            "near_duplicates": [[_short(a, root), _short(b, root)] for a, b in self.near_duplicates],
        }


def read_folder(folder: Path | str) -> FolderReading:
    """Understand a folder in any supported layout, decode every picture once and look for copies; write nothing.

    Raises:
        FileNotFoundError: the folder does not exist.
        DatasetError: the layout is not understood, no normal picture can be read, or one picture stands in two splits
            of an artwork or under two labels.
    """
    from tqdm.auto import tqdm

    layout = _layout_of(_found(folder))
    # Decoders release the interpreter lock; four at a time keep the memory of four largest pictures below 1 GB.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        work = pool.map(_check, layout.found)
        checks = list(tqdm(work, total=len(layout.found), desc="reading pictures", unit="file", delay=3))
    readable = [check for check in checks if check.sample is not None]
    samples = [check.sample for check in readable]
    bad = [*layout.problems, *(problem for check in checks for problem in check.problems)]
    root = layout.source if layout.source.is_dir() else layout.source.parent
    if all(sample.is_anomalous for sample in samples):
        what = f"all {len(samples)} readable pictures are anomalous" if samples else "no picture can be used"
        lines = [f"{layout.source} ({layout.name}): {what}; detectors learn from normal ones. Add some as train/good."]
        lines += _shown("Files left out", [f"{_short(path, root)}: {why}" for path, why in bad])
        raise DatasetError("\n".join([*lines, layouts.EXPECTED]))
    exact = _exact_duplicates(samples, root)
    near = near_duplicates([check.perceptual_hash for check in readable])
    notes = [*layout.notes, *_file_notes(readable)]
    samples = _grouped(samples, [*exact, *near], root, notes)
    _note_gaps(samples, notes)
    paths = [sample.image_path for sample in samples]
    crossing = [(i, j) for i, j in sorted({*near} - {*exact}) if _contradict(samples[i], samples[j])]
    copies = [tuple((paths[i], paths[j]) for i, j in pairs) for pairs in (exact, crossing)]
    return FolderReading(layout.source, layout.name, tuple(samples), tuple(bad), *copies, tuple(notes))


def build_manifest(folder: Path | str, *, output: Path | str | None = None) -> Path:
    """Make ``manifest.csv`` (and ``manifest.json``) for a folder in any supported layout; print what was understood.

    A folder that this suite froze itself (notebook 02) is not read again: its manifest is returned.

    Args:
        folder: folder of pictures, or a CSV file; see :data:`helpers.data.layouts.EXPECTED`.
        output: manifest file (``*.csv``) or its folder; the folder itself by default, a temporary one if read-only.
    Raises:
        FileNotFoundError, DatasetError: as :func:`read_folder`, or a foreign ``manifest.csv`` would be overwritten.
    """
    source = _found(folder)
    place = source if source.is_dir() else source.parent
    mark = files.read_json(place / MANIFEST_JSON) if (place / MANIFEST_JSON).exists() else {}
    if output is None and source in (place, place / MANIFEST_CSV) and "dataset_hash" in mark and "layout" not in mark:
        print(f"{place / MANIFEST_CSV} is a frozen dataset and was left as it is.")
        return place / MANIFEST_CSV
    reading = read_folder(source)
    target = Path(os.path.abspath(place if output is None else output))
    if output is None and not (os.access(place, os.W_OK) and place.stat().st_mode & 0o222):  # root may write anywhere
        target = Path(tempfile.gettempdir()) / f"art_anomaly_{files.sha256_json(str(source))[:8]}"
        print(f"{place} is read-only; the manifest goes to {target} (choose another place with output=...).")
    target = target if target.suffix.lower() == ".csv" else target / MANIFEST_CSV
    if output is None and target.exists() and not target.read_bytes().startswith(",".join(COLUMNS).encode()):
        raise DatasetError(f"{target} exists and is not a manifest of this suite. Rename it, or give output=... .")
    limits = {
        category: f"{_count(len(groups), 'picture')} in two splits show one scan (near duplicates): optimistic numbers."
        for category, groups in shared_groups(reading.samples).items()
    }
    print(f"{reading.describe()}\nManifest: {target}")
    return write_manifest(target, reading.samples, info={**reading.as_json(), "limits": limits})


def _found(source: Path | str) -> Path:
    """The folder or table that a user means, with quotes, ``~`` and variables as people paste them."""
    path = Path(source)
    if not path.exists():
        path = Path(os.path.expanduser(os.path.expandvars(str(source).strip(" '\"").removeprefix("file://"))))
    if not path.exists():
        web = " A web address cannot be read: download it, or mount Drive." if "http" in str(source) else ""
        raise FileNotFoundError(f"{path} does not exist. Give the folder (or CSV file) of your pictures.{web}")
    return Path(os.path.abspath(path))


def _layout_of(source: Path) -> layouts.Layout:
    """What every picture of a folder or table is, before any is decoded."""
    visa = sorted(source.glob("split_csv/*.csv"), key=lambda path: path.name != "1cls.csv")
    found = [source] if source.is_file() else [] if layouts.has_roles(source) else tables.tables_in(source)
    if source.is_file() and source.suffix.lower() not in (".csv", ".tsv"):
        raise DatasetError(f"{source} is neither a folder nor a CSV (an archive: unpack it first).\n{layouts.EXPECTED}")
    if len(found) > 1 and not visa:
        names = ", ".join(table.name for table in found)
        raise DatasetError(f"{source} holds several tables of pictures: {names}. Give the path of the one to use.")
    if visa:
        layout = tables.read_table(visa[0], source, layouts.VISA)
    else:
        layout = tables.read_table(found[0], found[0].parent) if found else layouts.read_tree(source)
    spelling: dict[str, str] = {}  # kinds that differ in case or separators only become one
    layout.found = [replace(s, kind=spelling.setdefault(plain(s.kind), s.kind)) for s in layout.found]
    layout.found.sort(key=lambda s: (s.category, SPLITS.index(s.split), s.is_anomalous, s.kind))
    return layout


# --- one picture -----------------------------------------------------------------------------------------------------


@dataclass
class _Check:
    """What decoding one picture and its mask showed; ``sample`` is None when the picture cannot be used."""

    sample: Sample | None = None
    problems: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mask_notes: list[str] = field(default_factory=list)
    perceptual_hash: np.ndarray | None = None


def _check(sample: Sample) -> _Check:
    path, mask_path, check = sample.image_path, sample.mask_path, _Check()
    if _printable(str(path)) != str(path):
        return _Check(problems=[(path, "the file name is not valid UTF-8: rename the file")])
    try:
        image = images.load_image(path, max_side=8 * HASH_SIDE, notes=check.notes)
        check.sample = replace(sample, sha256=files.sha256_file(path))
    except (images.ImageError, OSError) as error:
        return _Check(problems=[(path, _reason(error, path))])
    check.perceptual_hash = perceptual_hash(image)
    if mask_path is not None:
        try:
            mask = images.load_mask(mask_path, image.shape[:2], picture=path, notes=check.mask_notes)
            problem = "" if mask.any() else "the mask is empty although the picture is anomalous"
        except (images.ImageError, OSError) as error:
            problem = _reason(error, mask_path)
        if problem:
            check.problems.append((mask_path, f"{problem} (mask not used)"))
            check.sample = replace(check.sample, mask_path=None)
    return check


def _file_notes(checks: Sequence[_Check]) -> list[str]:
    """What decoding noted, each sentence once, with the first of the files and their number."""
    names: dict[str, list[str]] = defaultdict(list)
    for check in checks:
        name = check.sample.image_path.name
        for who, notes in ((name, check.notes), (f"mask of {name}", check.mask_notes)):
            for note in notes:
                names[note].append(who)
    return [f"{who[0]}{f' and {len(who) - 1} more' * (len(who) > 1)}: {note}." for note, who in names.items()]


# --- copies ----------------------------------------------------------------------------------------------------------


def perceptual_hash(image: np.ndarray) -> np.ndarray | None:
    """256 bits that survive other sizes, JPEG and brightness: the signs of low frequencies of the grey picture.

    A second set of bits marks the frequencies that are strong enough to have a sign; in a smooth picture many are not.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
    Returns:
        uint64 ``(2, 4)``: signs and marks; None for an almost uniform picture, whose signs would be noise.
    Source: the "pHash" idea of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010.
    """
    side = 4 * HASH_SIDE
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (side, side), interpolation=cv2.INTER_AREA)
    if grey.std() < 2:
        return None
    low = cv2.dct(grey.astype(np.float32))[:HASH_SIDE, :HASH_SIDE].ravel()
    low[0] = 0  # the mean brightness has no say
    strong = np.abs(low) > 0.003 * np.abs(low).max()
    return np.stack([np.packbits(low > 0).view(np.uint64), np.packbits(strong).view(np.uint64)])


def near_duplicates(hashes: Sequence[np.ndarray | None]) -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, ``i < j``, of pictures that show one scan, by the :func:`perceptual_hash` of each picture."""
    known = [index for index, value in enumerate(hashes) if value is not None]
    if len(known) < 2:
        return []
    signs, strong = np.stack([hashes[index] for index in known], axis=1)  # each (n, 4)
    n_strong = np.bitwise_count(strong).sum(axis=1)
    pairs = []
    for row in range(len(known) - 1):
        both = strong[row] & strong[row + 1 :]
        n_both = np.bitwise_count(both).sum(axis=1)
        n_different = np.bitwise_count((signs[row] ^ signs[row + 1 :]) & both).sum(axis=1)
        comparable = n_both >= 0.7 * np.maximum(n_strong[row], n_strong[row + 1 :])
        alike = comparable & (n_different <= NEAR_DUPLICATE_LIMIT * n_both)
        pairs += [(known[row], known[row + 1 + k]) for k in np.flatnonzero(alike)]
    return pairs


def _contradict(a: Sample, b: Sample) -> bool:
    """Whether copies of one picture make the numbers of their artwork wrong: two splits, or two labels."""
    return a.category == b.category and (a.split, a.is_anomalous) != (b.split, b.is_anomalous)


def _exact_duplicates(samples: Sequence[Sample], root: Path) -> list[tuple[int, int]]:
    """Pairs of equal files; raises for a pair that would make the numbers wrong."""
    by_hash: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_hash[sample.sha256].append(index)
    pairs = [pair for same in by_hash.values() for pair in combinations(same, 2)]
    wrong = [(samples[i], samples[j]) for i, j in pairs if _contradict(samples[i], samples[j])]
    if wrong:
        lines = [" = ".join(f"{_short(s.image_path, root)} ({s.split}, {s.kind})" for s in pair) for pair in wrong]
        why = "Equal pictures stand in two splits or have two labels; a test would be on what was learnt."
        raise DatasetError(
            "\n".join([why, *_shown("Equal files", lines), "Delete one of each pair and run this again."])
        )
    return pairs


def _grouped(samples: Sequence[Sample], pairs: Sequence[tuple[int, int]], root: Path, notes: list[str]) -> list[Sample]:
    """Samples with their groups: as a table states, else by file name, joined over copies."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    stems = Counter((s.category, s.image_path.stem) for s in samples)
    places = Counter((s.category, s.split, s.kind, s.image_path.stem) for s in samples)
    names, first, joined = [], {}, []
    for index, s in enumerate(samples):
        stem = s.image_path.stem
        if stems[s.category, stem] > 1:  # MVTec calls a picture 000 in every folder
            is_unique = places[s.category, s.split, s.kind, stem] == 1
            stem = f"{s.split}/{s.kind}/{stem}" if is_unique else _short(s.image_path, root)
        names.append(s.group or f"{s.category}/{stem}")
        joined.append((index, first.setdefault((s.category, names[-1]), index)))
    joined += [(i, j) for i, j in pairs if samples[i].category == samples[j].category]
    graph = coo_matrix((np.ones(len(joined)), tuple(zip(*joined))), shape=(len(samples), len(samples)))
    components = connected_components(graph, directed=False)[1]
    sizes = Counter(component for component, _ in set(zip(components, names)))
    totals = Counter(s.category for s in samples)
    alike = {s.category for s, c in zip(samples, components) if sizes[c] >= 8 and sizes[c] > totals[s.category] / 2}
    for category in sorted(alike):
        why = "most pictures look the same to the duplicate test (a fixed camera, perhaps), so each counts on its own"
        notes.append(f"{category}: {why}. Give a CSV with a column `group` if some are copies.")
    leader = dict(reversed(list(zip(components, names))))
    return [replace(s, group=n if s.category in alike else leader[c]) for s, n, c in zip(samples, names, components)]


def _note_gaps(samples: Sequence[Sample], notes: list[str]) -> None:
    for category in sorted({sample.category for sample in samples}):
        mine = {(sample.split, sample.is_anomalous) for sample in samples if sample.category == category}
        if ("train", False) not in mine:
            notes.append(f"{category}: no pictures to learn from (train/good).")
        if ("test", True) in mine and ("test", False) not in mine:
            notes.append(f"{category}: test/ has no normal pictures, so false alarms cannot be counted.")


# --- words -----------------------------------------------------------------------------------------------------------


def _reason(error: Exception, path: Path) -> str:
    return _printable(str(error).replace(f"{path} ", "").replace(str(path), path.name))


def _short(path: Path, root: Path) -> str:
    return _printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix())


def _printable(text: str) -> str:
    """Text that can be written as UTF-8: file systems allow names that cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")


def _shown(title: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = [f"  ... and {len(lines) - _SHOWN} more (all in {MANIFEST_JSON})"] if len(lines) > _SHOWN else []
    return [f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:_SHOWN]), *more] if lines else []
