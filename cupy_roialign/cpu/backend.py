"""The CPU: an operator and its two gradients on NumPy arrays.

Boxes are worked on by one of two ways: all of them as one sparse matrix, where SciPy is installed and that is faster
(numpy_sparse.py), or one by one by small dense matrices (numpy_dense.py).

Shapes and dtypes have been checked (validation.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from cupy_roialign import arrays, geometry, numpy_dense, numpy_sparse, validation
from cupy_roialign.numpy_job import Job

Function = TypeVar("Function", bound=Callable[..., Any])


def _quietly(function: Function) -> Function:
    """No warning of what broken boxes and values do.

    numpy.errstate is a decorator too, but before NumPy 2 one that mixes up the states of threads.
    """

    @functools.wraps(function)
    def quiet(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args)

    return cast(Function, quiet)


def join(boxes: list[np.ndarray], like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists of (L_i, 4) boxes, one for each image, as (K, 4) boxes and (K,) batch indices, beside `like`."""
    indices = np.repeat(np.arange(len(boxes)), [len(part) for part in boxes])
    return np.concatenate(boxes) if boxes else np.zeros((0, 4), np.float32), indices


@_quietly
def forward(
    features: np.ndarray,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: geometry.Rule,
    directions: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """(K, C, bins_y, bins_x) crops, in the memory order of `features`; NaN for a box that is not finite.

    With `directions`, up to two changes of the boxes and like them in shape: the derivative of the crops along them.
    """
    job = _job(features, boxes, batch_indices, rule, directions)
    output = _allocate(np.empty, features, (len(boxes), features.shape[1], *rule.bins), _output_dtype(features))
    if output.size:
        for way, numbers in [(numpy_dense, np.arange(len(boxes)))] if directions else _ways(job):
            way.forward(job, numbers, features, output)
        if job.finite is not None:
            output[~job.finite] = np.nan
    return output


@_quietly
def feature_gradient(
    grad_output: np.ndarray,
    features: np.ndarray | arrays.Like,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: geometry.Rule,
    directions: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The gradient to the features, in their memory order; float32 where they are integers.

    With `directions` that of the derivative of the crops along them. Boxes are added one after another: the result is
    the same, to the bit, each time.
    """
    job = _job(features, boxes, batch_indices, rule, directions)
    total = _allocate(np.zeros, features, features.shape, job.dtype)
    if grad_output.size and total.size:
        begun: set[int] = set()
        for way, numbers in _ways(job):
            way.feature_gradient(job, numbers, grad_output, total, begun)
    return total.astype(_output_dtype(features), copy=False)


@_quietly
def box_gradient(
    grad_output: np.ndarray,
    features: np.ndarray,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: geometry.Rule,
    directions: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The gradient to the boxes, in their shape; NaN for a box that is not finite, 0 in a batch index column.

    With `directions` that of the derivative of the crops along them.
    """
    job = _job(features, boxes, batch_indices, rule, directions)
    gradient = np.zeros(boxes.shape, np.float64)
    if grad_output.size and not rule.nearest:
        # Slopes are differences of pixels that may be large, so each box needs a level of its own to count from.
        numpy_dense.box_gradient(job, np.arange(len(boxes)), grad_output, features, gradient)
    if job.finite is not None:
        gradient[np.ix_(~job.finite, np.array(rule.columns))] = np.nan
    return gradient.astype(boxes.dtype.newbyteorder("="), copy=False)


SPARSE: bool | None = None
"""Whether boxes are worked on as a sparse matrix, where they can be. None: where that is faster."""


def _ways(job: Job) -> Iterator[tuple[Any, np.ndarray]]:
    """How to work on which boxes."""
    numbers = np.arange(len(job.boxes))
    some = None if SPARSE is False else numpy_sparse.suited(job, SPARSE is True)
    if some is None or not numpy_sparse.is_installed():
        yield numpy_dense, numbers
        return
    yield numpy_sparse, numbers[some]
    if not some.all():
        yield numpy_dense, numbers[~some]


def _job(
    features: np.ndarray | arrays.Like,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: geometry.Rule,
    directions: Sequence[np.ndarray],
) -> Job:
    dtype = np.dtype(arrays.compute_name(arrays.dtype_name(features)))
    precision = geometry.precision(rule, arrays.dtype_name(features), arrays.dtype_name(boxes))
    indices = validation.whole_indices(batch_indices, features.shape[0])
    return Job(tuple(features.shape), dtype, boxes.astype(precision, copy=False), indices, rule, directions)


def _output_dtype(features: np.ndarray | arrays.Like) -> np.dtype:
    name = arrays.output_name(arrays.dtype_name(features))
    # bfloat16 is known to NumPy only as the dtype that the features bring along
    return np.dtype(features.dtype if name == "bfloat16" else name)


def _allocate(
    new: Callable[..., np.ndarray], like: np.ndarray | arrays.Like, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """An array of (N or K, C, height, width), channels-last in memory where `like` is."""
    if arrays.is_channels_last(like.shape, like.strides):
        count, channels, height, width = shape
        return new((count, height, width, channels), dtype).transpose(0, 3, 1, 2)
    return new(shape, dtype)
