"""What the two ways to work on boxes on the CPU have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cupy_roialign import geometry

WORKSPACE = 64 * 2**20
"""Bytes that a copy of features may take, and as many the weights of the boxes at work, and their crops."""


@dataclass(frozen=True)
class Job:
    """A call but for the arrays of features and gradients."""

    shape: tuple[int, ...]  # of the features
    dtype: np.dtype  # to compute in
    boxes: np.ndarray  # (K, 4 or 5) in the precision of positions
    batch_indices: np.ndarray  # (K,) whole and in range
    rule: geometry.Rule
    directions: Sequence[np.ndarray]  # each like the boxes

    @functools.cached_property
    def axes(self) -> geometry.Axes:
        """All boxes along y and x."""
        return geometry.resolve(self.rule, self.boxes, self.shape[2:])

    @functools.cached_property
    def slopes(self) -> geometry.EdgeSlopes:
        """How they follow their edges."""
        return geometry.edge_slopes(self.rule, self.boxes, self.shape[2:])

    @functools.cached_property
    def samples(self) -> np.ndarray:
        """(2, K) about how many samples a box has at most along y and x."""
        return geometry.most_samples(self.rule, self.axes)

    @functools.cached_property
    def finite(self) -> np.ndarray | None:
        """(K,) bool: all four coordinates of a box are; None: those of all boxes."""
        return geometry.finite(self.rule, self.boxes)

    def changes(self, direction: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(2, k) and (2, k): how `start` and `bin` of some of the boxes change with a direction."""
        low, high = geometry.edges(self.rule, self.directions[direction].astype(np.float64, copy=False))
        of_start, of_bin = self.slopes.change(low, high)
        return of_start[:, numbers], of_bin[:, numbers]


def fill_outside(
    output: np.ndarray, numbers: np.ndarray, inside_y: np.ndarray, inside_x: np.ndarray, value: float
) -> None:
    """Writes `value` where a bin of these boxes has no sample inside the image. For one sample a bin.

    `output` (K, C, bins_y, bins_x), `inside_y` (numbers, bins_y), `inside_x` (numbers, bins_x).
    """
    number = np.array(value).astype(output.dtype)
    partly = ~(inside_y.all(axis=1) & inside_x.all(axis=1))
    for place in np.flatnonzero(partly).tolist():
        np.copyto(output[numbers[place]], number, where=~(inside_y[place][:, None] & inside_x[place]))


def runs(cost: np.ndarray) -> Iterator[slice]:
    """Runs of boxes that cost 1 together, or of a single one that costs more."""
    if cost.sum() <= 1:
        if len(cost):
            yield slice(0, len(cost))
        return
    ends = np.cumsum(np.minimum(cost, 2))
    start = 0
    while start < len(cost):
        limit = 1 + (ends[start - 1] if start else 0)
        stop = max(start + 1, int(np.searchsorted(ends, limit, "right")))
        yield slice(start, stop)
        start = stop
