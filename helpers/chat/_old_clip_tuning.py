"""Kept until the chat uses the new room clip.

One search of settings for all methods, without a test picture, and an estimate of what the search is worth.

Normal pictures are dealt into folds by source picture; settings are ranked by the AUROC of held-out normals against
anomalies made from held-out normals. The number that was maximised flatters. So the whole search is repeated with one
fold left out of it, and what it chose is measured on that fold, on a kind of anomaly that took no part in the choice
either: the nested estimate.

There is no way to hand a test picture to :func:`tune`: it takes a :class:`one_class.Training`, which refuses
them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from helpers.chat import _old_clip_one_class as one_class
from helpers.chat._old_clip_features import Features
from helpers.chat._old_clip_one_class import (
    HeadSettings,
    PatchKnnSettings,
    Settings,
    TooFewPictures,
    Training,
    auroc_of,
)

STRATEGIES = ("random", "grid", "tpe")
SEARCH_BANK_ROWS = 500
"""Patches in the memory bank while settings are searched; the detector that is kept has all of its bank."""
MIN_GROUPS_A_FOLD = 2
"""Source pictures a fold needs for a nested estimate: a search with two folds left out still needs some to learn."""

FitAndScore = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Tuned:
    """Result of :func:`tune`.

    Attributes:
        settings: the best ones.
        auroc: mean AUROC over the kinds with these settings: the value that was maximised, so it flatters.
        default_auroc: the same of the default settings, which nobody chose, so it does not flatter.
        nested_auroc: mean AUROC over the kinds of what the same search chose without the pictures and without the
            kind that it is measured on; nan when there was nothing to choose, or too few pictures.
        strategy: see :func:`tune`.
        trials: one row per setting tried, the default first: its fields, ``auroc``, and ``auroc_<kind>``.
        note: why there is no nested estimate, empty when there is one.
    """

    settings: Settings
    auroc: float = math.nan
    default_auroc: float = math.nan
    nested_auroc: float = math.nan
    strategy: str = "random"
    trials: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    note: str = ""


def tune(
    method: str,
    training: Training,
    *,
    n_trials: int,
    strategy: str = "random",
    n_folds: int = 3,
    seed: int = 0,
    default: Settings | None = None,
    space: Mapping[str, tuple] | None = None,
    fit_and_score: FitAndScore = one_class.fit_and_score,
    with_nested: bool = True,
    device: str = "cpu",
) -> Tuned:
    """Choose a method's settings on held-out training pictures.

    Calibration pictures take no part: the threshold that they set must not know the settings. The cross-entropy head,
    which trains on anomalies, is ranked only on kinds that it was not trained on. One thread works: with two, the
    small steps of a search spend their time waiting for each other (up to 15 times as long on a busy machine).

    Args:
        method: one of :data:`helpers.clip.one_class.METHODS`; another name needs ``default``, ``space`` and its own
            ``fit_and_score``.
        training: normal pictures, synthetic anomalies and views of one painting.
        n_trials: settings tried, the default ones first.
        strategy: ``"random"`` draws from the grid of ``space`` without repetition; ``"grid"`` tries all of it,
            whatever ``n_trials``; ``"tpe"`` lets Optuna's tree-structured Parzen estimator propose.
        n_folds: folds of normals.
        seed: of folds, draws and fits.
        default: values of the fields that are not searched, and the first setting tried.
        space: field -> values. ``augment`` is left out when ``training`` has no views.
        fit_and_score: (settings, Training to learn from, Features to score, seed, device, memo) -> scores, as
            :func:`helpers.clip.one_class.fit_and_score`.
        with_nested: whether to make the nested estimate, which doubles the fits.
        device: torch device of the memory bank.
    Raises:
        ValueError: unknown method or strategy, ``n_trials`` below 1, no anomaly to rank against.
        helpers.clip.one_class.TooFewPictures: fewer than two source pictures.
        ImportError: ``"tpe"`` without Optuna.
    """
    default = default if default is not None else _known(one_class.DEFAULTS, method)
    space = dict(space if space is not None else _known(one_class.SPACES, method))
    if training.views is None:
        space.pop("augment", None)
    _check(method, strategy, n_trials, training, space)
    if not space or (n_trials == 1 and strategy != "grid"):
        return Tuned(default, strategy=strategy, note="there was nothing to choose")
    held = {group for group, sample in zip(training.groups, training.samples) if sample.split == "calibration"}
    table = _Table(training.where(frozenset(training.groups) - held), fit_and_score, n_folds, seed, device)
    propose = _Proposals(default, space, strategy, n_trials, seed)
    with one_thread():
        candidates = propose(lambda settings: table.mean(settings, None))
        best = table.best(candidates, None)
        nested, note = _nested(table, propose) if with_nested else (math.nan, "the nested estimate was not asked for")
    trials = tuple(
        {f.name: getattr(settings, f.name) for f in fields(settings)}
        | {"auroc": table.mean(settings, None)}
        | {f"auroc_{kind}": value for kind, value in table.by_kind(settings, None).items()}
        for settings in candidates
    )
    return Tuned(candidates[best], trials[best]["auroc"], trials[0]["auroc"], nested, strategy, trials, note)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, BLAS and OpenMP work in one thread; small products are slower in several."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _known(table: Mapping[str, Any], method: str) -> Any:
    if method not in table:
        raise ValueError(
            f"Unknown method {method!r}; allowed are {', '.join(table)}, or any with default, space and fit_and_score."
        )
    return table[method]


def _check(method: str, strategy: str, n_trials: int, training: Training, space: Mapping[str, tuple]) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"The strategy is {strategy!r}; allowed are {', '.join(STRATEGIES)}.")
    if n_trials < 1:
        raise ValueError(f"n_trials is {n_trials}; at least 1 (the default settings) is needed.")
    if space and n_trials > 1 and (training.anomalies is None or not len(training.anomalies)):
        raise ValueError(f"{method}: the search ranks normals against synthetic anomalies, but none were given.")


# ------------------------------------------------------------------------------------------------- proposals


class _Proposals:
    """The settings to try, the default first. Random and grid know them beforehand; TPE asks the objective."""

    def __init__(self, default: Settings, space: Mapping[str, tuple], strategy: str, n_trials: int, seed: int) -> None:
        self._default, self._space, self._strategy = default, space, strategy
        self._n_trials, self._seed = n_trials, seed

    def __call__(self, objective: Callable[[Settings], float]) -> list[Settings]:
        if self._strategy == "tpe":
            return self._parzen(objective)
        grid = [dict(zip(self._space, values, strict=True)) for values in itertools.product(*self._space.values())]
        if self._strategy == "random":
            grid = [grid[i] for i in np.random.default_rng(self._seed).permutation(len(grid))]
        drawn = [replace(self._default, **values) for values in grid]
        candidates = [self._default, *(settings for settings in drawn if settings != self._default)]
        return candidates if self._strategy == "grid" else candidates[: self._n_trials]

    def _parzen(self, objective: Callable[[Settings], float]) -> list[Settings]:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(
                "Strategy 'tpe' needs Optuna, which is an optional install: pip install optuna. "
                "Or take strategy='random', which needs nothing."
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self._seed, n_startup_trials=max(1, self._n_trials // 3))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        at_default = {name: getattr(self._default, name) for name in self._space}
        if all(value in self._space[name] for name, value in at_default.items()):
            study.enqueue_trial({name: self._space[name].index(value) for name, value in at_default.items()})
        candidates = [self._default]
        for _ in range(self._n_trials):
            trial = study.ask()
            places = {name: _suggested(trial, name, values) for name, values in self._space.items()}
            settings = replace(self._default, **{name: self._space[name][place] for name, place in places.items()})
            study.tell(trial, objective(settings))
            candidates.append(settings)
        return list(dict.fromkeys(candidates))


def _suggested(trial: Any, name: str, values: tuple) -> int:
    """Place of a value that the estimator proposes; it knows that numbers have an order, names have none."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return trial.suggest_int(name, 0, len(values) - 1)
    return trial.suggest_categorical(name, range(len(values)))


# ------------------------------------------------------------------------------------------------- folds


class _Table:
    """AUROC of settings by held-out fold and kind, computed when asked for and kept.

    A fit leaves out one fold (to choose), or two (to choose without the one that the choice is then measured on), and
    is scored on each fold it left out. Where anomalies are trained on, each fold keeps some kinds to itself: they are
    left out with it, and it is ranked on them only.
    """

    def __init__(self, training: Training, fit_and_score: FitAndScore, n_folds: int, seed: int, device: str) -> None:
        self._training, self._fit_and_score = training, fit_and_score
        self._seed, self._device = seed, device
        self._folds = one_class.group_folds(training.groups, n_folds, seed)
        self._n_groups = len(set(training.groups))
        self._kinds = sorted(set(training.kinds))
        self._own_kinds: list[set[str]] | None = None
        self._values: dict[tuple[Settings, frozenset[int]], dict[int, dict[str, tuple[float, float]]]] = {}
        self._memos: dict[frozenset[int], dict] = {}

    @property
    def outer(self) -> range:
        return range(len(self._folds))

    @property
    def is_nestable(self) -> bool:
        return len(self._folds) > 2 and self._n_groups >= MIN_GROUPS_A_FOLD * len(self._folds)

    def by_kind(self, settings: Settings, outer: int | None, *, partial: bool = False) -> dict[str, float]:
        """AUROC (or its part up to 10 % false alarms) for each kind, mean over the folds that may be looked at.

        Args:
            settings: the setting.
            outer: a fold that the numbers must not know; None when all may be used.
            partial: the partial area instead.
        """
        found: dict[str, list[float]] = {}
        for fold in self.outer:
            if fold != outer:
                out = frozenset([fold]) if outer is None else frozenset([fold, outer])
                for kind, values in self._scored(settings, out)[fold].items():
                    found.setdefault(kind, []).append(values[partial])
        return {kind: float(np.mean(values)) for kind, values in sorted(found.items())}

    def mean(self, settings: Settings, outer: int | None) -> float:
        return float(np.mean(list(self._checked(self.by_kind(settings, outer)).values())))

    def best(self, candidates: Sequence[Settings], outer: int | None, *, without: str | None = None) -> int:
        """Place of the best candidate on all kinds but ``without``; among equals the best up to 10 % false alarms,
        then the first."""
        ranks = []
        for settings in candidates:
            both = [self.by_kind(settings, outer, partial=partial) for partial in (False, True)]
            ranks.append([np.mean([v for kind, v in values.items() if kind != without]) for values in both])
        full, part = np.round(np.array(ranks).T, 9)
        return int(np.lexsort((np.arange(len(full)), -part, -full))[0])

    def on_outer(self, settings: Settings, outer: int) -> dict[str, float]:
        """AUROC for each kind on a fold that the setting was chosen without."""
        return {kind: values[0] for kind, values in self._scored(settings, frozenset([outer]))[outer].items()}

    def _checked(self, values: dict[str, float]) -> dict[str, float]:
        if not values:
            raise ValueError("No fold holds normals and anomalies at once. Make more anomalies per picture.")
        return values

    def _scored(self, settings: Settings, out: frozenset[int]) -> dict[int, dict[str, tuple[float, float]]]:
        if (settings, out) not in self._values:
            self._values[settings, out] = self._measure(settings, out)
        return self._values[settings, out]

    def _measure(self, settings: Settings, out: frozenset[int]) -> dict[int, dict[str, tuple[float, float]]]:
        own = self._kinds_of_folds(settings)
        left_out = frozenset().union(*(self._folds[fold] for fold in out))
        kept_kinds = set(self._kinds).difference(*(own[fold] for fold in out)) if own else None
        learn = self._training.where(frozenset(self._training.groups) - left_out, kinds=kept_kinds)
        parts = [self._training.where(self._folds[fold], kinds=own[fold] if own else None) for fold in sorted(out)]
        queries = Features.join([features for part in parts for features in (part.normals, part.anomalies)])
        memo = self._memos.setdefault(out, {})
        scores = self._fit_and_score(
            _quicker(settings), learn, queries, seed=self._seed, device=self._device, memo=memo
        )
        found, start = {}, 0
        for fold, part in zip(sorted(out), parts, strict=True):
            normal, anomalous, rest = np.split(scores[start:], np.cumsum([len(part.normals), len(part.anomalies)]))
            start = len(scores) - len(rest)
            kinds = np.array(part.kinds)
            found[fold] = {
                kind: (
                    auroc_of(normal, anomalous[kinds == kind]),
                    auroc_of(normal, anomalous[kinds == kind], max_fpr=0.1),
                )
                for kind in sorted(set(part.kinds))
            }
        return found

    def _kinds_of_folds(self, settings: Settings) -> list[set[str]] | None:
        """For settings that train on anomalies: the kinds each fold keeps to itself, about a quarter of all."""
        if not isinstance(settings, HeadSettings):
            return None
        if self._own_kinds is None:
            kinds = np.random.default_rng(self._seed).permutation(self._kinds).tolist()
            n_own = max(1, len(kinds) // 4)
            self._own_kinds = [set(kinds[i * n_own : (i + 1) * n_own]) for i in self.outer]
        return self._own_kinds


def _nested(table: _Table, propose: _Proposals) -> tuple[float, str]:
    """The nested estimate, and why there is none."""
    if not table.is_nestable:
        return math.nan, "too few source pictures for a search within a search"
    found: dict[str, list[float]] = {}
    try:
        for outer in table.outer:
            candidates = propose(lambda settings, outer=outer: table.mean(settings, outer))
            n_kinds = len(table.by_kind(candidates[0], outer))
            for kind in table.on_outer(candidates[0], outer):
                if n_kinds > 1:
                    chosen = candidates[table.best(candidates, outer, without=kind)]
                    found.setdefault(kind, []).append(table.on_outer(chosen, outer)[kind])
    except TooFewPictures as error:
        return math.nan, str(error)
    if not found:
        return math.nan, "with one kind of anomaly none can be left out of the choice"
    return float(np.mean([np.mean(values) for values in found.values()])), ""


def _quicker(settings: Settings) -> Settings:
    """What a trial fits: a thinner memory bank ranks settings nearly as well as the whole one."""
    if isinstance(settings, PatchKnnSettings):
        return replace(settings, max_bank_rows=min(settings.max_bank_rows, SEARCH_BANK_ROWS))
    return settings
