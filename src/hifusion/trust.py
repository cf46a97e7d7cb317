"""The trust card: how far each gene's prediction can be relied on, from training spots that were left out.

Green: the lower end of the interval of ``pcc_per_gene`` is at least :data:`GREEN`, and intervals cover what they say.
Amber: it is at least :data:`AMBER`. Red: everything else, and what was never tried: a patient that was not trained on
is red in every gene, unless the run was trained on several patients and could leave each out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hifusion import data, metrics
from hifusion.cohort import SectionView
from hifusion.expression import normalisation
from hifusion.trust_card import AMBER, GREEN, MEANINGS

COVERED = 0.9  # of measurements lie within the intervals, 5 % below and 5 % above
COVERS = (0.8, 0.97)  # coverage outside is no longer what an interval says
OFFSETS = {"known": 0.12, "new": 2.2}
"""Squared difference of a gene's mean between two sections of a patient, and between two patients, in units of its
variance within a section: what a run that has seen only one of them must expect. Measured on the counts of the her2st
patients without an image here (A, D to H; `tests/test_recommended_real.py`)."""
_DRAWS = 200
_MARKS = tuple(MEANINGS)


class LeftOut(NamedTuple):
    """What is said of training spots by fits that did not see them."""

    expression: np.ndarray
    """``(N, G)``"""
    expected: np.ndarray
    """Expected error of each, ``(N, G)``."""
    fold: np.ndarray
    """With which each was left out, ``(N,)``."""
    widened: np.ndarray
    """How much wider intervals are to be than these errors say, ``(G,)``."""

    def quantiles(self, measured: np.ndarray) -> np.ndarray:
        """Where 5 % and 95 % of errors lie, in units of the expected one and widened, ``(2, G)``."""
        return _edges(self._errors(measured)) * self.widened

    def _errors(self, measured: np.ndarray) -> np.ndarray:
        """In units of the expected one, ``(N, G)``."""
        return np.asarray((measured - self.expression) / self.expected)

    def coverage(self, measured: np.ndarray) -> np.ndarray:
        """Share of each gene's measurements within intervals made from the other folds, ``(G,)``."""
        errors, folds = self._errors(measured), np.unique(self.fold)
        inside = np.zeros(measured.shape, dtype=bool)
        if len(folds) < 2:  # nothing to make the intervals from
            return np.full(measured.shape[1], np.nan)
        for fold in folds:
            own = self.fold == fold
            low, high = _edges(errors[~own])
            inside[own] = (errors[own] >= low) & (errors[own] <= high)
        return np.asarray(inside.mean(axis=0))


def _edges(errors: np.ndarray) -> np.ndarray:
    """Where 5 % and 95 % of errors ``(N, G)`` lie, each with the share of N + 1 that a new spot needs, ``(2, G)``.

    Split conformal prediction.
    """
    edge = (1 - COVERED) / 2 * (1 - 1 / len(errors))
    return np.asarray(np.quantile(errors, [edge, 1 - edge], axis=0))


def card(
    spots: Sequence[tuple[SectionView, np.ndarray]], genes: Sequence[str], unit: str, left_out: dict[str, LeftOut]
) -> pd.DataFrame:
    """A row a gene: expected skill with its 90 % interval, part of the ceiling, coverage, and what to make of it.

    Parameters
    ----------
    spots
        The spots that were left out, sections and rows, in the order of the predictions.
    unit
        Name of the normalisation.
    left_out
        ``known``: predictions of sections or blocks that were left out; ``new``, where there are several patients: of
        patients that were left out.
    """
    measured = np.concatenate([view.expression[rows] for view, rows in spots]).astype(np.float64)
    of = normalisation(unit).of
    ceilings = [metrics.ceiling(view.counts, view.total_counts, of) for view, _ in spots if view.counts is not None]
    ceiling = np.mean(ceilings, axis=0) if ceilings else np.full(len(genes), np.nan)
    table: dict[str, Any] = {"gene": list(genes)}
    for kind, its in left_out.items():
        ending = "" if kind == "known" else "_new_patient"
        skill, low, high = _skill(spots, its.expression, measured)
        coverage = its.coverage(measured)
        table |= {
            f"pcc_per_gene{ending}": skill,
            f"pcc_low{ending}": low,
            f"pcc_high{ending}": high,
            f"of_ceiling{ending}": skill / np.where(ceiling > 0, ceiling, np.nan),
            f"coverage_90{ending}": coverage,
            f"trust{ending}": marks(low, coverage),
        }
    return pd.DataFrame(table).round(4)


def marks(low: np.ndarray, coverage: np.ndarray) -> list[str]:
    """Green, amber or red for each gene, from the lower end of its skill and the coverage of its intervals."""
    covers = (coverage >= COVERS[0]) & (coverage <= COVERS[1])
    level = np.where((low >= GREEN) & covers, 0, np.where(low >= AMBER, 1, 2))
    return [_MARKS[number] for number in level]


def _skill(
    spots: Sequence[tuple[SectionView, np.ndarray]], predicted: np.ndarray, measured: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over sections of each gene's correlation, and 90 % of it when blocks of spots are drawn anew."""
    values, draws, first = [], [], 0
    for number, (view, rows) in enumerate(spots):
        own, first = slice(first, first + len(rows)), first + len(rows)
        p, m = predicted[own] - predicted[own].mean(axis=0), measured[own] - measured[own].mean(axis=0)
        blocks = np.unique(data.blocks(view)[rows], return_inverse=True)[1]
        of_block = np.eye(blocks.max() + 1)[blocks]
        sums = [of_block.T @ part for part in (np.ones_like(p), p, m, p * m, p * p, m * m)]
        random = np.random.default_rng(number)
        drawn = random.multinomial(len(of_block.T), np.full(len(of_block.T), 1 / len(of_block.T)), _DRAWS)
        values.append(_correlation(*(part.sum(axis=0) for part in sums)))
        draws.append(_correlation(*(drawn @ part for part in sums)))
    spread = np.nanquantile(np.mean(draws, axis=0), [0.05, 0.95], axis=0)
    return np.mean(values, axis=0), spread[0], spread[1]


def _correlation(
    n: np.ndarray, p: np.ndarray, m: np.ndarray, pm: np.ndarray, pp: np.ndarray, mm: np.ndarray
) -> np.ndarray:
    """From sums; 0 where one of the two does not vary, as a constant says nothing."""
    n = np.maximum(n, 1)
    both = pm / n - p * m / n**2
    spread = np.sqrt(np.maximum(pp / n - (p / n) ** 2, 0) * np.maximum(mm / n - (m / n) ** 2, 0))
    return np.where(spread > 1e-12, both / np.maximum(spread, 1e-12), 0.0)
