"""The vocabulary of folders, tables and the inbox: what a name says about split, label, kind and masks.

A name is read whole, in lower case and without words like ``images``: ``non_anomaly`` contains ``anomaly``, so parts of
a name decide nothing. What may mean two things is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from helpers.records import NORMAL_KIND

ANOMALY_KIND = "anomaly"
"""Kind of anomalous pictures whose folder says no more than that."""
_SPLITS = dict.fromkeys("train training trainset".split(), "train")
_SPLITS |= dict.fromkeys("calibration validation val valid".split(), "calibration")
_SPLITS |= dict.fromkeys("test testing testset".split(), "test")
_NORMAL = frozenset(
    "good normal nonanomaly ok okay genuine original authentic real clean healthy intact pristine perfect undamaged "
    "unaltered untouched reference gut echt unbeschädigt authentique vrai autentico auténtico 正常 真品 良品".split()
)
_ANOMALY = frozenset("anomaly anomalies anomalous abnormal bad defect defective ng nok ko 异常 異常".split())
_FORGERY = frozenset(  # anomalous, and the name is the kind
    "fake faked forged forgery forgeries counterfeit falsified copy copies copied replica imitation reproduction "
    "manipulated tampered altered alteration modified edited damage damaged broken vandalized vandalised fälschung "
    "fälschungen gefälscht kopie beschädigt beschädigung faux copie falso copia 赝品 偽物 损坏".split()
)
_TELLTALE = (_FORGERY | _ANOMALY) - frozenset("ng ko modified edited reproduction".split())
_MASK = frozenset("mask ground_truth groundtruth gt annotation segmentation seg label map".split())
_NOTHING = frozenset("data dataset set dir folder image img imgs picture pic photo photograph file sample".split())
_ADDED = _NOTHING | frozenset("scan view shot version example painting artwork work item known all the of my".split())
_NOT = ("no", "non", "not", "without")
_HIDDEN = re.compile(r"\.|__macosx$|@eadir$|[#$]recycle|_?thumb(nail)?s?$|thumbs\.db$|desktop\.ini$|synofile", re.I)


class DatasetError(ValueError):
    """A folder that cannot be used; the message says what was seen, what is expected and what to do."""


class Meaning(NamedTuple):
    """What a name says.

    ``kind`` is *good*, *anomaly* or the kind of forgery that it states, ``told`` what it tells of artwork or kind: a
    kind, or the name when it is none of the vocabulary; "" for *train* and *images*.
    """

    name: str
    split: str | None = None
    kind: str | None = None
    is_mask: bool = False
    told: str = ""


def meaning_of(name: str) -> Meaning:
    """What a folder name or a word in a table says.

    >>> [meaning_of(name).kind for name in ("Non-Anomaly", "not damaged", "ok_pictures", "bad", "my forgeries", "box")]
    ['good', 'good', 'good', 'anomaly', 'forgeries', None]
    >>> meaning_of("test_fakes")[1:], meaning_of("Mona Lisa").told, meaning_of("mask_dir").is_mask
    (('test', 'fakes', False, 'fakes'), 'Mona Lisa', True)
    """
    words = _words(name)
    parts = [(None, words), *((_SPLITS[end], rest) for end, rest in _without_an_end(words) if end in _SPLITS)]
    for split, rest in parts:
        if any(_is_in("_".join(rest[k:]), _MASK) and (not k or _label(rest[:k])) for k in range(len(rest))):
            return Meaning(name, split, is_mask=True)
        kind = _label(rest)
        if kind or (split and not rest):
            if kind == ANOMALY_KIND and any(_is_in(word, _FORGERY) for word in rest):
                kind = clean("_".join(rest))
            return Meaning(name, split, kind, told=kind if kind and kind != ANOMALY_KIND else "")
    return Meaning(name, told=name if words else "")


def kind_of(name: str) -> str:
    """The kind that a name states: ``"good"``, ``"anomaly"``, or the name itself, safe in paths.

    Raises:
        DatasetError: part of the name says normal; it would be guessed wrong either way.

    >>> kind_of("genuine"), kind_of("face swap")
    ('good', 'face_swap')
    """
    kind, words = meaning_of(name).kind, _words(name)
    is_unclear = words and (words[0] in _NOT or any(_is_in(word.rstrip("0123456789"), _NORMAL) for word in words))
    if kind is None and is_unclear:
        raise DatasetError(
            f"The name {name!r} may mean normal pictures or a kind of anomaly. Call it good (or non_anomaly) if its "
            "pictures are normal; else give it a name without such words."
        )
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
    candidates = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3)))
    free = next(candidate for candidate in candidates if candidate.casefold() not in taken)
    taken.add(free.casefold())
    return free


def says_forged(name: str) -> bool:
    """True for a name with a word like *fake* in it, which nothing genuine should have."""
    return any(_is_in(word, _TELLTALE) for word in re.findall(r"[^\W\d_]+", plain(name)))


def is_hidden(name: str) -> bool:
    """True for what systems leave in a folder: ``._x``, ``@eaDir``, thumbnails, ``desktop.ini``."""
    return bool(_HIDDEN.match(name))


def spoken_of(texts: Sequence[str], artworks: Sequence[str]) -> str | None:
    """Which artwork names of folders or files speak of, by its whole name or a word that no other has; None for none.

    >>> names = ["girl_with_a_pearl_earring", "mona_lisa"]
    >>> spoken_of(["MonaLisa-07"], names), spoken_of(["crack", "fake pearl 3"], names)
    ('mona_lisa', 'girl_with_a_pearl_earring')
    """
    own = {
        a: [w for w in plain(a).split("_") if len(w) > 2 and w not in _ADDED | {"and", "from", "with"}]
        for a in artworks
    }
    shared = {word for a in artworks for other in artworks if a != other for word in own[a] if word in own[other]}
    for text in texts:
        said = plain(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text))
        hits = [a for a in artworks if plain(a).replace("_", "") in said.replace("_", "")]
        hits = [a for a in hits if not any(a != other and plain(a) in plain(other) for other in hits)]
        hits = hits or [a for a in artworks if set(re.findall(r"[^\W\d_]+", said)) & set(own[a]) - shared]
        if len(hits) == 1:
            return hits[0]
    return artworks[0] if len(artworks) == 1 else None


def _words(name: str) -> list[str]:
    """The words of a name, without those that say nothing at either end."""
    words = plain(name).split("_")
    for end in (-1, 0):
        while words and _is_in(words[end], _ADDED if words[1:] else _NOTHING):
            words.pop(end)
    return words


def _without_an_end(words: list[str]) -> list[tuple[str, list[str]]]:
    return [(words[0], words[1:]), (words[-1], words[:-1])] if words else []


def _is_in(word: str, words: frozenset[str]) -> bool:
    return word in words or word.removesuffix("s") in words


def _label(words: list[str]) -> str | None:
    """*good* or *anomaly* when all words together say so, perhaps by a negation."""
    text = "_".join(words)
    if _is_in(text, _NORMAL):
        return NORMAL_KIND
    if _is_in(text, _ANOMALY | _FORGERY):
        return ANOMALY_KIND
    inner = words[1:] if words[:1] and words[0] in _NOT else words[:-1] if words[-1:] == ["free"] else []
    return {NORMAL_KIND: ANOMALY_KIND, ANOMALY_KIND: NORMAL_KIND}.get(_label(inner)) if inner else None
