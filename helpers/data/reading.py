"""Any folder -> samples: every picture is decoded once, so that bad files and copies are known before anything runs."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from helpers import files
from helpers.data import images, layouts, tables
from helpers.data.manifest import COLUMNS, MANIFEST_CSV, MANIFEST_JSON, counts, shared_groups, write_manifest
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
        tree, about = counts(self.samples), self.as_json()
        n_words = f"{_count(len(self.samples), 'picture')} of {_count(len(tree), 'artwork')}"
        lines = [f"{self.source}: {self.layout}, {n_words}"]
        for category, splits in tree.items():
            lines.append(f"  {category}")
            for split, kinds in splits.items():
                lines.append(f"    {split:<12}{', '.join(f'{kind} {n}' for kind, n in kinds.items())}")
            masks = [s.mask_path is not None for s in self.samples if s.category == category and s.is_anomalous]
            lines += [f"    {'masks':<12}{sum(masks)} of {_count(len(masks), 'anomalous picture')}"] if masks else []
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

    layout = _layout_of(Path(os.path.abspath(Path(folder).expanduser())))
    # Decoders release the interpreter lock; four at a time keep the memory of four largest pictures below 1 GB.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        work = pool.map(_check, layout.found)
        checks = list(tqdm(work, total=len(layout.found), desc="reading pictures", unit="file", delay=3))
    bad = [*layout.problems, *(problem for check in checks for problem in check.problems)]
    checks = [check for check in checks if check.sample is not None]
    samples = [check.sample for check in checks]
    root = layout.source if layout.source.is_dir() else layout.source.parent
    if all(sample.is_anomalous for sample in samples):
        what = f"all {len(samples)} readable pictures are anomalous" if samples else "no picture can be used"
        lines = [f"{layout.source} ({layout.name}): {what}; detectors learn from normal ones. Add some as train/good."]
        lines += _shown("Files left out", [f"{_short(path, root)}: {why}" for path, why in bad])
        raise DatasetError("\n".join([*lines, layouts.EXPECTED]))
    pairs = near_duplicates([check.perceptual_hash for check in checks])
    exact = [(i, j) for i, j in pairs if samples[i].sha256 == samples[j].sha256]
    near = [(i, j) for i, j in pairs if samples[i].sha256 != samples[j].sha256 and _contradict(samples, i, j)]
    wrong = [[samples[index] for index in pair] for pair in exact if _contradict(samples, *pair)]
    if wrong:
        lines = [" = ".join(f"{_short(s.image_path, root)} ({s.split}, {s.kind})" for s in pair) for pair in wrong]
        why = "Equal pictures stand in two splits or have two labels; a test would be on what was learnt."
        raise DatasetError("\n".join([why, *_shown("Equal files", lines), "Delete one of each pair."]))
    noted: dict[str, list[str]] = defaultdict(list)
    for name, note in (said for check in checks for said in check.notes):
        noted[note].append(name)
    notes = [*layout.notes, *_gaps(samples)]
    notes += [f"{n[0]}{f' and {len(n) - 1} more' * (len(n) > 1)}: {note}." for note, n in noted.items()]
    samples = _grouped(samples, pairs, root, notes)
    copies = [tuple((samples[i].image_path, samples[j].image_path) for i, j in found) for found in (exact, near)]
    return FolderReading(layout.source, layout.name, tuple(samples), tuple(bad), *copies, tuple(notes))


def build_manifest(folder: Path | str, *, output: Path | str | None = None) -> Path:
    """Make ``manifest.csv`` (and ``manifest.json``) for a folder in any supported layout; print what was understood.

    A folder that this suite froze itself (notebook 02) is not read again: its manifest is returned.

    Args:
        folder: folder of pictures, or a CSV file; see :data:`helpers.data.layouts.EXPECTED`.
        output: manifest file (``*.csv``) or its folder; the folder itself by default.
    Raises:
        FileNotFoundError, DatasetError: as :func:`read_folder`, or a foreign ``manifest.csv`` would be overwritten.
    """
    source = Path(os.path.abspath(Path(folder).expanduser()))
    place = source if source.is_dir() else source.parent
    target = Path(os.path.abspath(place if output is None else output))
    target = target if target.suffix.lower() == ".csv" else target / MANIFEST_CSV
    if output is None and target.exists():
        about = files.read_json(place / MANIFEST_JSON) if (place / MANIFEST_JSON).exists() else {}
        if source in (place, target) and "dataset_hash" in about and "layout" not in about:
            print(f"{target} is a frozen dataset and was left as it is.")
            return target
        if not target.read_bytes().startswith(",".join(COLUMNS).encode()):
            raise DatasetError(f"{target} exists and is not a manifest of this suite. Rename it, or give output=... .")
    reading = read_folder(source)
    limits = {
        category: f"{_count(len(groups), 'picture')} in two splits show one scan (near duplicates): optimistic numbers."
        for category, groups in shared_groups(reading.samples).items()
    }
    print(f"{reading.describe()}\nManifest: {target}")
    return write_manifest(target, reading.samples, info={**reading.as_json(), "limits": limits})


def perceptual_hash(image: np.ndarray) -> np.ndarray | None:
    """256 signs that survive other sizes, JPEG and brightness: those of low frequencies of the grey picture.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
    Returns:
        int8 ``(256,)``: -1, 1, or 0 for a frequency too weak to have a sign (in a smooth picture many are); None for
        an almost uniform picture, whose signs would be noise.
    Source: the "pHash" idea of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010.
    """
    side = 4 * HASH_SIDE
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (side, side), interpolation=cv2.INTER_AREA)
    if grey.std() < 2:
        return None
    low = cv2.dct(grey.astype(np.float32))[:HASH_SIDE, :HASH_SIDE].ravel()
    low[0] = 0  # the mean brightness has no say
    return np.where(np.abs(low) > 0.003 * np.abs(low).max(), np.sign(low), 0).astype(np.int8)


def near_duplicates(hashes: Sequence[np.ndarray | None]) -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, ``i < j``, of pictures that show one scan, by the :func:`perceptual_hash` of each picture."""
    known = [index for index, value in enumerate(hashes) if value is not None]
    signs = np.array([hashes[index] for index in known], float)  # (n, 256)
    strong = np.abs(signs)
    pairs = []
    for row in range(len(known) - 1):
        n_both = strong[row + 1 :] @ strong[row]
        n_different = (n_both - signs[row + 1 :] @ signs[row]) / 2
        comparable = n_both >= 0.7 * np.maximum(strong[row].sum(), strong[row + 1 :].sum(axis=1))
        alike = comparable & (n_different <= NEAR_DUPLICATE_LIMIT * n_both)
        pairs += [(known[row], known[row + 1 + k]) for k in np.flatnonzero(alike)]
    return pairs


def _layout_of(source: Path) -> layouts.Layout:
    """What every picture of a folder or table is, before any is decoded."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist. Give the folder (or CSV file) of your pictures.")
    if source.is_file() and source.suffix.lower() not in (".csv", ".tsv"):
        raise DatasetError(f"{source} is neither a folder nor a CSV (an archive: unpack it first).\n{layouts.EXPECTED}")
    visa = sorted(source.glob("split_csv/*.csv"), key=lambda path: path.name != "1cls.csv")
    found = [source] if source.is_file() else [] if layouts.has_roles(source) else tables.tables_in(source)
    if visa:
        layout = tables.read_table(visa[0], source, layouts.VISA)
    elif len(found) > 1:
        names = ", ".join(table.name for table in found)
        raise DatasetError(f"{source} holds several tables of pictures: {names}. Give the path of the one to use.")
    else:
        layout = tables.read_table(found[0], found[0].parent) if found else layouts.read_tree(source)
    spelling: dict[str, str] = {}  # kinds that differ in case or separators only become one
    layout.found = [replace(s, kind=spelling.setdefault(plain(s.kind), s.kind)) for s in layout.found]
    layout.found.sort(key=lambda s: (s.category, SPLITS.index(s.split), s.is_anomalous, s.kind))
    return layout


@dataclass
class _Check:
    """What decoding one picture and its mask showed; ``sample`` is None when the picture cannot be used."""

    sample: Sample | None
    problems: list[tuple[Path, str]]
    notes: Sequence[tuple[str, str]] = ()  # which file, and the sentence
    perceptual_hash: np.ndarray | None = None


def _check(sample: Sample) -> _Check:
    path, mask_path, problem = sample.image_path, sample.mask_path, ""
    notes: list[str] = []
    mask_notes: list[str] = []
    if _printable(str(path)) != str(path):
        return _Check(None, [(path, "the file name is not valid UTF-8: rename the file")])
    try:
        image = images.load_image(path, max_side=8 * HASH_SIDE, notes=notes)
        sample = replace(sample, sha256=files.sha256_file(path))
    except (images.ImageError, OSError) as error:
        return _Check(None, [(path, _reason(error, path))])
    try:
        if mask_path and not images.load_mask(mask_path, image.shape[:2], picture=path, notes=mask_notes).any():
            problem = "the mask is empty although the picture is anomalous"
    except (images.ImageError, OSError) as error:
        problem = _reason(error, mask_path)
    if problem:
        sample = replace(sample, mask_path=None)
    said = [*((path.name, note) for note in notes), *((f"mask of {path.name}", note) for note in mask_notes)]
    problems = [(mask_path, f"{problem} (mask not used)")] if problem else []
    return _Check(sample, problems, said, perceptual_hash(image))


def _contradict(samples: Sequence[Sample], i: int, j: int) -> bool:
    """Whether copies of one picture make the numbers of their artwork wrong: two splits, or two labels."""
    a, b = samples[i], samples[j]
    return a.category == b.category and (a.split, a.is_anomalous) != (b.split, b.is_anomalous)


def _grouped(samples: Sequence[Sample], pairs: Sequence[tuple[int, int]], root: Path, notes: list[str]) -> list[Sample]:
    """Samples with their groups: as a table states, else by file name, joined over copies."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    # MVTec calls a picture 000 in every folder: the shortest name that no other picture has.
    spellings = []
    for s in samples:
        tails = (s.image_path.stem, f"{s.split}/{s.kind}/{s.image_path.stem}", _short(s.image_path, root))
        spellings.append([f"{s.category}/{tail}" for tail in tails])
    uses = Counter(name for found in spellings for name in found)
    names = [s.group or next((n for n in f if uses[n] == 1), f[-1]) for s, f in zip(samples, spellings)]
    first: dict[tuple[str, str], int] = {}
    joined = [(i, first.setdefault((s.category, name), i)) for i, (s, name) in enumerate(zip(samples, names))]
    joined += [(i, j) for i, j in pairs if samples[i].category == samples[j].category]
    graph = coo_matrix((np.ones(len(joined)), np.transpose(joined)), shape=(len(samples), len(samples)))
    components = connected_components(graph, directed=False)[1]
    sizes = Counter(component for component, _ in set(zip(components, names)))
    totals = Counter(s.category for s in samples)
    alike = {s.category for s, c in zip(samples, components) if sizes[c] >= 8 and sizes[c] > totals[s.category] / 2}
    for category in sorted(alike):
        why = "most pictures look the same to the duplicate test (a fixed camera, perhaps), so each counts on its own"
        notes.append(f"{category}: {why}. Give a CSV with a column `group` if some are copies.")
    leader = dict(reversed(list(zip(components, names))))
    return [replace(s, group=n if s.category in alike else leader[c]) for s, n, c in zip(samples, names, components)]


def _gaps(samples: Sequence[Sample]) -> list[str]:
    parts = {(sample.category, sample.split, sample.is_anomalous) for sample in samples}
    notes = []
    for category in sorted({category for category, *_ in parts}):
        if (category, "train", False) not in parts:
            notes.append(f"{category}: no pictures to learn from (train/good).")
        if (category, "test", True) in parts and (category, "test", False) not in parts:
            notes.append(f"{category}: test/ has no normal pictures, so false alarms cannot be counted.")
    return notes


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
