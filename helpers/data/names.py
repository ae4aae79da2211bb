"""The vocabulary of folders, tables and the inbox: what a name says about split, label, kind and masks.

Names are compared whole, after lower-casing and without words like ``images``: ``non_anomaly`` contains ``anomaly``, so
parts of a name decide nothing. What may mean two things is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from helpers.records import NORMAL_KIND

ANOMALY_KIND = "anomaly"
"""Kind of anomalous pictures whose folder says no more than that."""
SPLIT_WORDS = {
    "train": frozenset("train training trainset".split()),
    "calibration": frozenset("calibration validation val valid".split()),
    "test": frozenset("test testing testset".split()),
}
NORMAL_WORDS = frozenset(
    "good normal nonanomaly ok okay genuine original authentic real clean healthy intact pristine perfect undamaged "
    "unaltered untouched reference gut echt unbeschädigt authentique vrai autentico auténtico 正常 真品 良品".split()
)
ANOMALY_WORDS = frozenset("anomaly anomalies anomalous abnormal bad defect defective ng nok ko 异常 異常".split())
"""Anomalous, and no more than that: the kind is :data:`ANOMALY_KIND`."""
FORGERY_WORDS = frozenset(
    "fake faked forged forgery forgeries counterfeit falsified copy copies copied replica imitation reproduction "
    "manipulated tampered altered alteration modified edited damage damaged broken vandalized vandalised fälschung "
    "fälschungen gefälscht kopie beschädigt beschädigung faux copie falso copia 赝品 偽物 损坏".split()
)
"""Anomalous, and the name is the kind."""
MASK_WORDS = frozenset("mask ground_truth groundtruth gt annotation segmentation seg label map".split())
_NOTHING = frozenset("data dataset set dir folder image img imgs picture pic photo photograph file sample".split())
_ADDED = _NOTHING | frozenset("scan view shot version example painting artwork work item known all the of my".split())
_NOT = ("no", "non", "not", "without")
_TELLTALE = (FORGERY_WORDS | ANOMALY_WORDS) - frozenset("ng ko modified edited reproduction".split())
_HIDDEN = re.compile(
    r"\.|__macosx$|@eadir$|[#$]recycle|_?thumb(nail)?s?$|thumbs\.db$|desktop\.ini$|synofile_thumb", re.IGNORECASE
)


class DatasetError(ValueError):
    """A folder that cannot be used; the message says what was seen, what is expected and what to do."""


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


def label_of(name: str) -> str | None:
    """``"good"`` for a name that says normal, ``"anomaly"`` for one that says anomalous, else None.

    >>> label_of("non_anomaly"), label_of("Fakes"), label_of("not damaged"), label_of("ok_pictures"), label_of("box")
    ('good', 'anomaly', 'good', 'good', None)
    """
    return _label(_words(name))


def kind_of(name: str) -> str:
    """The kind that a name states: ``"good"``, ``"anomaly"``, or the name itself, safe in paths.

    Raises:
        DatasetError: part of the name says normal; it would be guessed wrong either way.

    >>> kind_of("Non-Anomaly"), kind_of("face swap"), kind_of("bad"), kind_of("test_fakes")
    ('good', 'face_swap', 'anomaly', 'fakes')
    """
    words = _words(name)
    splits = frozenset().union(*SPLIT_WORDS.values())
    label = _label(words) or _label([word for word in words if word not in splits])
    if label is None:
        if (words[:1] and words[0] in _NOT) or any(_is_in(word.rstrip("0123456789"), NORMAL_WORDS) for word in words):
            raise DatasetError(
                f"The name {name!r} may mean normal pictures or a kind of anomaly. Call it good (or non_anomaly) if "
                "its pictures are normal; else give it a name without such words."
            )
        return clean(name)
    told = [word for word in words if word not in splits]
    is_kind = label == ANOMALY_KIND and any(_is_in(word, FORGERY_WORDS) for word in told)
    return clean("_".join(told)) if is_kind else label


def roles_of(name: str) -> list[str | None]:
    """What a folder's name says: nothing, a split, a label, ``"mask"``, two of them, or None: any other name.

    >>> roles_of("images"), roles_of("Normal_test"), roles_of("mask_dir"), roles_of("Mona Lisa")
    ([], ['test', 'good'], ['mask'], [None])
    """
    words = _words(name)
    for split, names in SPLIT_WORDS.items() if words else ():
        for rest in [words[1:]] * (words[0] in names) + [words[:-1]] * (words[-1] in names):
            if not rest or _role(rest):
                return [split, *([_role(rest)] if rest else [])]
    return [_role(words)] if words else []


def says_forged(name: str) -> bool:
    """True for a name with a word like *fake* in it, which nothing genuine should have."""
    return any(_is_in(word, _TELLTALE) for word in re.findall(r"[^\W\d_]+", plain(name)))


def is_hidden(name: str) -> bool:
    """True for what systems leave in a folder: ``._x``, ``@eaDir``, thumbnails, ``desktop.ini``."""
    return bool(_HIDDEN.match(name))


def spoken_of(stem: str, artworks: Sequence[str]) -> str | None:
    """Which artwork a file name speaks of, by its whole name or a word that no other has; None for none or two.

    >>> names = ["girl_with_a_pearl_earring", "mona_lisa"]
    >>> spoken_of("MonaLisa-07", names), spoken_of("fake pearl 3", names)
    ('mona_lisa', 'girl_with_a_pearl_earring')
    """
    spoken = plain(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", stem))
    whole = [a for a in artworks if plain(a).replace("_", "") in spoken.replace("_", "")]
    hits = [a for a in whole if not any(a != other and plain(a) in plain(other) for other in whole)]
    if not whole:
        words = {a: set(re.findall(r"[^\W\d_]{3,}", plain(a))) - {"and", "from", "the", "with"} for a in artworks}
        said = set(re.findall(r"[^\W\d_]+", spoken))
        hits = [a for a in artworks if said & words[a] - set().union(*(words[o] for o in artworks if o != a))]
    return artworks[0] if len(artworks) == 1 else hits[0] if len(hits) == 1 else None


def _words(name: str) -> list[str]:
    """The words of a name, without those that say nothing at either end."""
    words = plain(name).split("_")
    while words and _is_in(words[-1], _ADDED if words[1:] else _NOTHING):
        words.pop()
    while words and _is_in(words[0], _ADDED if words[1:] else _NOTHING):
        words.pop(0)
    return words


def _is_in(word: str, words: frozenset[str]) -> bool:
    return word in words or word.removesuffix("s") in words


def _label(words: Sequence[str]) -> str | None:
    text = "_".join(words)
    if _is_in(text, NORMAL_WORDS):
        return NORMAL_KIND
    if _is_in(text, ANOMALY_WORDS) or _is_in(text, FORGERY_WORDS):
        return ANOMALY_KIND
    inner = words[1:] if words[:1] and words[0] in _NOT else words[:-1] if words[-1:] == ["free"] else []
    return {NORMAL_KIND: ANOMALY_KIND, ANOMALY_KIND: NORMAL_KIND}.get(_label(inner)) if inner else None


def _role(words: Sequence[str]) -> str | None:
    is_mask = any(_is_in("_".join(words[k:]), MASK_WORDS) and (not k or _label(words[:k])) for k in range(len(words)))
    return "mask" if is_mask else _label(words)
