"""`HtmlResults`: all that a page is made of, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...checks import check_choice
from ..report import ClassPredictions, RegressionPredictions

__all__ = ["UNLABELLED", "HtmlResults"]

UNLABELLED = -100
"""A class number that says that there is none; of a regression NaN says so."""
_TOLERANCE = 1e-3
Words = Sequence[tuple[str, float]]


@dataclass(frozen=True, eq=False)
class HtmlResults:
    """Predictions of methods on the same N inputs, and what is known of these.

    Everything but the methods may be missing: the page then leaves out what cannot be said.

    Attributes:
        methods: by name `ClassPredictions`, or of every method `RegressionPredictions`, in the order of the tables; the
            first is the one that the others are compared with.
        labels: (N,) class numbers, -100 of an input without one; of a regression numbers, NaN of an input without one.
        texts: the inputs in words, (N,).
        class_names: of the C classes.
        groups: the group of each input, (N,).
        apart: groups that are no part of the test set, such as shifted inputs: they stand in the tables of groups and
            among the most unfamiliar inputs alone.
        unfamiliarity: a score per input that is higher for the less familiar, (N,), such as `score_ood`'s; without it
            the epistemic part, and of point estimates the entropy, ranks them.
        words: by row, the words of an input and how much each adds to the epistemic part, as `ood.word_attributions`
            finds them.
        policy: what an abstention policy promises, in words.
        caveats: by method, why its two parts should not be believed, in words.
        shown: the method that is taken apart; by default the last one with an epistemic part, else the last.
        title: of the page.
        about: a sentence or two on what the inputs and methods are.

    Raises:
        TypeError: a method is of another kind than the others, or none of the two kinds.
        ValueError: lengths that differ, probabilities that are none, labels that are no class, or unknown names.
    """

    methods: Mapping[str, ClassPredictions | RegressionPredictions]
    labels: ArrayLike | None = None
    texts: Sequence[str] | None = None
    class_names: Sequence[str] = ()
    groups: Sequence[str] | None = None
    apart: Sequence[str] = ()
    unfamiliarity: ArrayLike | None = None
    words: Mapping[int, Words] = field(default_factory=dict)
    policy: str = ""
    caveats: Mapping[str, str] = field(default_factory=dict)
    shown: str | None = None
    title: str = "How sure is it, and is it right to be?"
    about: str = ""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("`methods` must hold the predictions of at least one method, got none.")
        kinds = {type(of) for of in self.methods.values()}
        if len(kinds) > 1 or not kinds <= {ClassPredictions, RegressionPredictions}:
            got = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"`methods` must all be ClassPredictions, or all RegressionPredictions, got {got}.")
        for name, of in self.methods.items():
            _check_arrays(name, of)
        self._check_lengths()
        for name, of in self.methods.items():
            if isinstance(of, ClassPredictions):
                _check_classes(name, of, self.num_classes)
            else:
                _check_numbers(name, of)
        self._check_labels()
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"`class_names` must name {self.num_classes} classes, got {len(self.class_names)} names.")
        if self.shown is not None:
            check_choice("shown", self.shown, tuple(self.methods))
        if unknown := sorted(set(self.apart) - set(self.groups or ())):
            raise ValueError(f"`apart` must name groups, got {unknown}; groups are {sorted(set(self.groups or ()))}.")
        if strangers := sorted(set(self.caveats) - set(self.methods)):
            raise ValueError(f"`caveats` must be of methods, got {strangers}; methods are {list(self.methods)}.")
        if outside := [row for row in self.words if not 0 <= row < self.size]:
            raise ValueError(f"`words` must be of rows 0 to {self.size - 1}, got {outside[:5]}.")

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """N."""
        return len(_central(next(iter(self.methods.values()))))

    @property
    def is_regression(self) -> bool:
        """Whether numbers are predicted."""
        return isinstance(next(iter(self.methods.values())), RegressionPredictions)

    @property
    def num_classes(self) -> int:
        """C; 0 of a regression."""
        first = next(iter(self.methods.values()))
        return first.probs.shape[-1] if isinstance(first, ClassPredictions) else 0

    @property
    def names(self) -> list[str]:
        """Of the classes; their numbers where they have none."""
        return [str(name) for name in self.class_names] or [str(index) for index in range(self.num_classes)]

    @property
    def focus(self) -> str:
        """The method that is taken apart."""
        if self.shown is not None:
            return self.shown
        posteriors = [name for name, of in self.methods.items() if of.epistemic is not None]
        return (posteriors or list(self.methods))[-1]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which inputs have a label, (N,)."""
        if self.labels is None:
            return np.zeros(self.size, dtype=bool)
        values = np.asarray(self.labels)
        known: NDArray[np.bool_] = np.isfinite(values) if self.is_regression else values != UNLABELLED
        return known

    @property
    def is_test(self) -> NDArray[np.bool_]:
        """Which inputs are of the test set: those of no group that stands apart, (N,)."""
        groups = np.asarray(self.groups if self.groups is not None else [""] * self.size)
        return ~np.isin(groups, list(self.apart))

    @property
    def strangeness(self) -> tuple[str, NDArray[Any]]:
        """What ranks inputs by how unfamiliar they are, in words, and the score, (N,)."""
        if self.unfamiliarity is not None:
            return "the unfamiliarity score", np.asarray(self.unfamiliarity, dtype=np.float64)
        shown = self.methods[self.focus]
        if shown.epistemic is not None:
            return "the epistemic part", np.asarray(shown.epistemic, dtype=np.float64)
        return "the variance" if self.is_regression else "the entropy", np.asarray(shown.total, dtype=np.float64)

    @property
    def top(self) -> float:
        """What a word of full colour adds to the epistemic part; of twenty words that add to it one adds more."""
        values = [value for words in self.words.values() for _, value in words if value > 0]
        return float(np.quantile(values, 0.95)) if values else 1.0

    def select(self, mask: NDArray[np.bool_]) -> HtmlResults:
        """The results on some of the inputs, without those words that are of others."""
        rows, kept = np.flatnonzero(mask), np.flatnonzero(mask).tolist()
        words = {new: self.words[old] for new, old in enumerate(kept) if old in self.words}
        groups = None if self.groups is None else [self.groups[row] for row in kept]
        return replace(
            self,
            methods={name: of[rows] for name, of in self.methods.items()},
            labels=None if self.labels is None else np.asarray(self.labels)[rows],
            texts=None if self.texts is None else [self.texts[row] for row in kept],
            groups=groups,
            apart=[name for name in self.apart if groups is not None and name in groups],
            unfamiliarity=None if self.unfamiliarity is None else np.asarray(self.unfamiliarity)[rows],
            words=words,
            shown=self.focus,
        )

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_lengths(self) -> None:
        size = self.size
        if size == 0:
            raise ValueError("`methods` must be about at least one input, got predictions of none.")
        for name, of in self.methods.items():
            if len(_central(of)) != size:
                raise ValueError(
                    f"`methods`: {name!r} must be about {size} inputs as the first, got {len(_central(of))}."
                )
            if of.epistemic is not None and np.shape(of.epistemic) != (size,):
                raise ValueError(
                    f"`methods`: the epistemic part of {name!r} must be ({size},), got {np.shape(of.epistemic)}."
                )
        for key in ("labels", "texts", "groups", "unfamiliarity"):
            values = getattr(self, key)
            if values is not None and (isinstance(values, str) or np.shape(values) != (size,)):
                got = "a text" if isinstance(values, str) else np.shape(values)
                raise ValueError(f"`{key}` must have one entry for each of the {size} inputs, got {got}.")
        if self.unfamiliarity is not None and not np.isfinite(np.asarray(self.unfamiliarity, dtype=float)).all():
            raise ValueError("`unfamiliarity` must be finite numbers, got NaN or infinity among them.")

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        values = np.asarray(self.labels)
        if values.dtype.kind not in ("iuf" if self.is_regression else "iu"):
            kind = "numbers" if self.is_regression else "class numbers (integers)"
            raise ValueError(f"`labels` must be {kind}, got the dtype {values.dtype}.")
        if self.is_regression:
            return
        known = values[values != UNLABELLED]
        if known.size and (known.min() < 0 or known.max() >= self.num_classes):
            raise ValueError(
                f"`labels` must be classes 0 to {self.num_classes - 1}, or {UNLABELLED} where there is none, got "
                f"{known.min()} to {known.max()}."
            )


def _central(of: ClassPredictions | RegressionPredictions) -> NDArray[Any]:
    """Probabilities (N, C), or the mean (N,)."""
    return np.atleast_1d(of.probs if isinstance(of, ClassPredictions) else of.mean)


def _check_arrays(name: str, of: ClassPredictions | RegressionPredictions) -> None:
    for key, values in vars(of).items():
        if values is not None and not isinstance(values, np.ndarray):
            kind = type(values).__name__
            raise TypeError(
                f"`methods`: `{key}` of {name!r} must be a NumPy array, got {kind}; of a tensor `.numpy()`."
            )


def _check_classes(name: str, of: ClassPredictions, num_classes: int) -> None:
    probs = np.asarray(of.probs)
    if probs.ndim != 2 or probs.shape[1] == 0:
        raise ValueError(f"`methods`: probabilities of {name!r} must be (N, C), got {probs.shape}.")
    if probs.shape[1] != num_classes:
        raise ValueError(f"`methods`: {name!r} must be about {num_classes} classes as the first, got {probs.shape[1]}.")
    sums = probs.sum(1)
    if not (np.isfinite(probs).all() and (probs >= 0).all() and np.abs(sums - 1).max() < _TOLERANCE):
        raise ValueError(
            f"`methods`: probabilities of {name!r} must be >= 0 and sum to 1 in each row, got sums from "
            f"{sums.min():.4g} to {sums.max():.4g} and a least value of {probs.min():.4g}."
        )
    _check_epistemic(name, of.epistemic)


def _check_numbers(name: str, of: RegressionPredictions) -> None:
    if not np.isfinite(of.mean).all():
        raise ValueError(f"`methods`: the mean of {name!r} must be finite, got NaN or infinity in it.")
    if not (np.isfinite(of.total).all() and (of.total > 0).all()):
        raise ValueError(f"`methods`: the variances of {name!r} must be finite and > 0, got {np.min(of.total)}.")
    _check_epistemic(name, of.epistemic)


def _check_epistemic(name: str, values: Any) -> None:
    if values is not None and not (np.isfinite(values).all() and np.min(values) >= -_TOLERANCE):
        raise ValueError(f"`methods`: the epistemic part of {name!r} must be finite and >= 0, got {np.min(values)}.")
