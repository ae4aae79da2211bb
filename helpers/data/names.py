"""What a name says about split, label, kind and masks, by the vocabulary in ``words.txt``: for folders, tables, inbox.
A name is understood when all its words are: a part of it decides nothing. What may mean two things is refused."""

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.records import NORMAL_KIND, SPLITS

ANOMALY_KIND = "anomaly"  # of anomalous pictures whose folder says no more than that
_MEANINGS = (*SPLITS, "mask", "good", "anomaly", "forgery", "not", "filler")
_HIDDEN = r"\.|__macosx$|@eadir$|[#$]recycle|_?thumb(nail)?s?$|thumbs\.db$|desktop\.ini$|synofile"
is_hidden = re.compile(_HIDDEN, re.IGNORECASE).match  # true for names of what systems leave in a folder


class DatasetError(ValueError):
    """A folder that cannot be used; the message says what was seen, what is expected and what to do."""


class Meaning(NamedTuple):
    """What a name says."""

    split: str | None = None
    kind: str | None = None  # good, anomaly, or the kind of forgery that it states
    is_mask: bool = False
    told: str = ""  # of artwork or kind: a kind, or a name that is none of the vocabulary


@functools.cache
def vocabulary() -> dict[str, list[str]]:
    """The words of every meaning in ``words.txt``."""
    lines = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
    return {meaning: words.split() for meaning, found, words in (line.partition(": ") for line in lines) if found}


def meaning_of(name: str) -> Meaning:
    """What a folder name or a word in a table says.

    >>> [meaning_of(name).kind for name in ("Non-Anomaly", "defect-free", "ok_pictures", "bad", "my forgeries", "box")]
    ['good', 'good', 'good', 'anomaly', 'forgeries', None]
    >>> meaning_of("test_fakes"), meaning_of("Mona Lisa").told
    (Meaning(split='test', kind='fakes', is_mask=False, told='fakes'), 'Mona Lisa')
    """
    words = re.sub("ground_truth", "mask", re.sub("^(.+)_free$", r"not_\1", plain(name))).split("_")
    said = {word: next((meaning for meaning in _MEANINGS if _is(meaning, word)), "title") for word in words}
    split = next((what for what in said.values() if what in SPLITS), None)
    core = [word for word, what in said.items() if what not in (split, "filler")]  # the other words
    is_not = bool(core) and said[core[0]] == "not"
    label = {said[word] for word in core[is_not:]}
    if "mask" in label and label <= {"mask", "good", "anomaly", "forgery"}:
        return Meaning(split, is_mask=True)
    if label == {"good"} or (label and label <= {"anomaly", "forgery"}):
        kind = NORMAL_KIND if (label == {"good"}) != is_not else ANOMALY_KIND
        kind = clean("_".join(core)) if "forgery" in label and not is_not else kind
        return Meaning(split, kind, told=kind if kind != ANOMALY_KIND else "")
    if split and not core:
        return Meaning(split)
    return Meaning(told="" if all(_is("nothing", word) for word in words) else name)


def kind_of(name: str) -> str:
    """The kind that a name states: ``"good"``, ``"anomaly"``, or the name itself, safe in paths. ``DatasetError``: part
    of the name says normal; it would be guessed wrong either way."""
    kind, words = meaning_of(name).kind, plain(name).split("_")
    if kind is None and any(_is("good", word.rstrip("0123456789")) or _is("not", word) for word in words):
        raise DatasetError(f"{name!r} may mean normal pictures or a kind of anomaly: call it good, or by another name")
    return kind or clean(name)


def plain(name: str) -> str:
    """A name for comparison: ``"Non-Anomaly "`` -> ``"non_anomaly"``."""
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", name).strip().casefold()).strip("_")


def repaired(name: str) -> str:
    """A name in composed Unicode (macOS stores it decomposed), mended where UTF-8 was unpacked as code page 437.

    >>> repaired("Albrecht_DuΓòá├¬rer") == repaired("Albrecht_Du╠êrer") == "Albrecht_Dürer"
    True
    """
    try:
        mended = name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return unicodedata.normalize("NFC", name)
    return repaired(mended) if mended != name else name


def clean(name: str) -> str:
    """A name for categories and kinds that is safe in every path: letters, digits, dot, dash, underscore.

    >>> clean(" Mona Lisa "), clean("../../evil"), clean("?")
    ('Mona_Lisa', 'evil', 'unnamed')
    """
    return re.sub(r"[^\w.-]+", "_", repaired(name)).strip("._-")[:80] or "unnamed"


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number when it is taken; remembered in ``taken`` (file systems may ignore letter case)."""
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    free = next(candidate for candidate in candidates if candidate.casefold() not in taken)
    taken.add(free.casefold())
    return free


def says_forged(name: str) -> bool:
    """True for a name with a word like *fake* in it, which nothing genuine should have."""
    said = [word for word in re.findall(r"[^\W\d_]+", plain(name)) if not _is("harmless", word)]
    return any(_is("forgery", word) or _is("anomaly", word) for word in said)


def spoken_of(texts: Sequence[str], artworks: Sequence[str]) -> str | None:
    """The artwork that the first telling text speaks of, by its whole name or a word that no other artwork has."""
    filler = {*vocabulary()["filler"]}
    n_artworks = Counter(word for artwork in artworks for word in {*plain(artwork).split("_")} - filler)
    for text in texts:
        said = plain(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text))
        telling = {word for word in re.findall(r"[^\W\d_]{3,}", said) if n_artworks[word] == 1}
        hits = [a for a in artworks if plain(a).replace("_", "") in said.replace("_", "")]
        hits = [a for a in hits if not any(a != other and plain(a) in plain(other) for other in hits)]
        hits = hits or [a for a in artworks if telling & {*plain(a).split("_")}]
        if len(hits) == 1:
            return hits[0]
    return artworks[0] if len(artworks) == 1 else None


def _is(meaning: str, word: str) -> bool:
    return word in vocabulary()[meaning] or word.removesuffix("s") in vocabulary()[meaning]
