"""The CPU's backend: an operator and its two gradients on NumPy arrays.

There are two ways, with the same functions: `compiled`, loops that Numba compiles, and `plain`, NumPy alone. Numba in
use is the compiled way in use. Shapes and dtypes have been checked (validation.py).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from cupy_roialign import arrays, validation
from cupy_roialign import rule as rules
from cupy_roialign.cpu import plain
from cupy_roialign.cpu.weights import WORKSPACE, Job
from cupy_roialign.rule import Rule

Function = TypeVar("Function", bound=Callable[..., Any])

VARIABLE = "CUPY_ROIALIGN_COMPILED"


def _quietly(function: Function) -> Function:
    """No warning of what broken boxes and values do.

    numpy.errstate is a decorator too, but before NumPy 2 one that mixes up the states of threads.
    """

    @functools.wraps(function)
    def quiet(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args)

    return cast(Function, quiet)


@functools.cache
def _compiled() -> tuple[Any, str]:
    """The compiled way, or why there is none."""
    if os.environ.get(VARIABLE, "1") == "0":
        return None, f"the environment variable {VARIABLE} is 0"
    try:
        from cupy_roialign.cpu import compiled
    except ModuleNotFoundError as error:
        if error.name != "numba":
            return None, f"Numba cannot be imported ({error})"
        return None, "Numba is not installed"
    except Exception as error:  # of a NumPy newer than it knows, for example
        return None, f"Numba cannot be imported ({error})"
    return compiled, ""


def not_compiled() -> str:
    """Why the compiled way is not in use; an empty string where it is."""
    return _compiled()[1]


def compile_ahead() -> float:
    """Compiles all loops for float32 and float64, or loads them; returns the seconds that it took."""
    start = time.perf_counter()
    way, _ = _compiled()
    if way is not None:
        way.machine_code.compile_all()
    return time.perf_counter() - start


def machine_code_folder() -> str | None:
    """Where the compiled loops are kept; None where they are not in use."""
    way, _ = _compiled()
    return way.machine_code.folder() if way is not None else None


def _way() -> Any:
    return _compiled()[0] or plain


@_quietly
def forward(
    features: np.ndarray,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: Rule,
    directions: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """(K, C, bins_y, bins_x) crops, in the memory order of `features`; NaN for a broken box.

    With `directions`, up to two changes of the boxes and like them in shape: the derivative of the crops along them.
    """
    job = Job.of(features, boxes, _images(features, batch_indices), rule, directions)
    output = _allocate(np.empty, features, (len(boxes), features.shape[1], *rule.bins), _output_dtype(features))
    if output.size:
        if features.size <= min(output.size, WORKSPACE // job.dtype.itemsize):
            features = features.astype(job.dtype, copy=False)  # once, and not for each box that reads them
        _way().crops(job, features, output)
        if rule.extrapolation_value and not directions:
            _fill_outside(job, output)
        if job.broken is not None:
            output[job.broken] = np.nan
    return output


@_quietly
def feature_gradient(
    grad_output: np.ndarray,
    features: np.ndarray | arrays.ArraySpec,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: Rule,
    directions: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The gradient with respect to the features, in their memory order; float32 where they are integers.

    With `directions` that of the derivative of the crops along them. Boxes are added one after another: the result is
    the same, to the bit, each time.
    """
    job = Job.of(features, boxes, _images(features, batch_indices), rule, directions)
    total = _allocate(np.zeros, features, features.shape, job.dtype)
    if grad_output.size and total.size:
        _way().to_features(job, grad_output, total)
    return total.astype(_output_dtype(features), copy=False)


@_quietly
def box_gradient(
    grad_output: np.ndarray,
    features: np.ndarray,
    boxes: np.ndarray,
    batch_indices: np.ndarray,
    rule: Rule,
    directions: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The gradient with respect to the boxes, in their shape; NaN for a broken box, 0 in a batch index column.

    With `directions` that of the derivative of the crops along them.
    """
    job = Job.of(features, boxes, _images(features, batch_indices), rule, directions)
    sums = np.zeros((len(boxes), 4))
    if grad_output.size and rule.taps != rules.Taps.NEAREST:
        _way().to_boxes(job, grad_output, features, sums)
    gradient = np.zeros(boxes.shape, np.float64)
    for axis, (start_low, start_high, step_high) in enumerate(job.slopes(slice(None))):
        to_start, to_high = sums[:, 2 * axis], sums[:, 2 * axis + 1] * step_high
        gradient[:, rule.columns[axis]] = to_start * start_low - to_high
        gradient[:, rule.columns[axis + 2]] = to_start * start_high + to_high
    if job.broken is not None:
        gradient[np.ix_(job.broken, np.array(rule.columns, np.intp))] = np.nan
    return gradient.astype(boxes.dtype.newbyteorder("="), copy=False)


def _images(features: np.ndarray | arrays.ArraySpec, batch_indices: np.ndarray) -> np.ndarray:
    return validation.whole_indices(batch_indices, features.shape[0])


def _fill_outside(job: Job, output: np.ndarray) -> None:
    """Writes the value outside of the image where a bin has no sample inside. For one sample per bin."""
    value = np.array(job.rule.extrapolation_value).astype(output.dtype)
    inside = job.sampled()
    for k in np.flatnonzero(~(inside[0].all(axis=1) & inside[1].all(axis=1))).tolist():
        np.copyto(output[k], value, where=~(inside[0][k][:, None] & inside[1][k]))


def _output_dtype(features: np.ndarray | arrays.ArraySpec) -> np.dtype:
    name = arrays.output_name(arrays.dtype_name(features))
    if name != "bfloat16":
        return np.dtype(name)
    # known to NumPy only as the dtype that the features bring along, if at all
    return features.dtype if isinstance(features.dtype, np.dtype) else np.dtype(np.float32)


def _allocate(
    new: Callable[..., np.ndarray], like: np.ndarray | arrays.ArraySpec, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """An array of (N or K, C, height, width), channels-last in memory where `like` is."""
    if arrays.is_channels_last(like.shape, like.strides):
        count, channels, height, width = shape
        return new((count, height, width, channels), dtype).transpose(0, 3, 1, 2)
    return new(shape, dtype)
