"""Argument checks and their messages; nothing else.

Each check looks at what an array says of itself (shape, dtype), never at its elements, so it serves arrays of
any library on any device. What only the elements can tell, a backend checks: see `whole_indices`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from cupy_roialign import arrays

MAX_SAMPLING_RATIO = 4096

MOST_BINS = 2**24

INDEX_NOISE = 1 / 64

MOST_SCALE = 1e38

METHODS = ("bilinear", "nearest")


def features(name: str, value: Any) -> None:
    """(N, C, H, W), of a real dtype."""
    shape = value.shape
    if len(shape) != 4:
        hint = ""
        if len(shape) == 3:
            hint = f"; for a single image pass {name}[None], for a single channel of N images {name}[:, None]"
        raise ValueError(f"{name} must have 4 axes, (N, C, H, W); got shape {_shape(value)}{hint}")
    if min(shape[2:]) < 1:
        raise ValueError(f"{name} must have at least one pixel, H >= 1 and W >= 1; got shape {_shape(value)}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.REALS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32, float64, integer or bool; got dtype {dtype}; "
            f"convert it first, for example to float32"
        )


def boxes(name: str, value: Any, columns: tuple[int, ...] = (4,)) -> None:
    """(K, columns), of a floating dtype."""
    shape = value.shape
    if len(shape) != 2 or shape[1] not in columns:
        wanted = " or ".join(f"(K, {n})" for n in columns)
        hint = f"; for a single box pass {name}[None]" if len(shape) == 1 else ""
        raise ValueError(f"{name} must have shape {wanted}; got {_shape(value)}{hint}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.FLOATS:
        raise TypeError(
            f"{name} must be float32 or float64 (or a 16-bit float); got dtype {dtype}; convert it to float32"
        )


def batch_indices(name: str, value: Any, boxes_name: str, count: int) -> None:
    """(K,) integers."""
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape (K,) with K = {count} like {boxes_name}; got {_shape(value)}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.INTEGERS:
        raise TypeError(f"{name} must be an array of integers; got dtype {dtype}; convert it to int64")


def batch_column(name: str, value: Any, images: int) -> None:
    """The first column of (K, 5) boxes can tell all images apart."""
    dtype = arrays.dtype_name(value)
    exact = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24}.get(dtype, 2**53)
    if images - 1 > exact:
        raise ValueError(
            f"{name} of dtype {dtype} cannot hold a batch index above {exact} exactly, and there are {images} images; "
            f"pass (K, 4) boxes with batch_indices, or float32 boxes"
        )


def grad_output(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Floating values, one for each of the output."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have the shape of the output, {shape}; got {_shape(value)}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.FLOATS:
        raise TypeError(f"{name} must be of a floating dtype; got {dtype}; convert it to that of the output")


def size(name: str, value: Any) -> tuple[int, int]:
    """An int or a pair of ints, at least 1: (height, width)."""
    pair = (value, value)
    if (
        not isinstance(value, int)
        and isinstance(value, Iterable)
        and not isinstance(value, (str, bytes, set, frozenset, dict))
        and getattr(value, "shape", None) != ()
    ):
        pair = tuple(value)
        if len(pair) != 2:
            raise ValueError(
                f"{name} must be an int or a pair (height, width); got {value!r}, which has {len(pair)} entries"
            )
    expected = "an int or a pair of ints (height, width)"
    try:
        height, width = (integer(name, entry, expected) for entry in pair)
    except TypeError:
        raise TypeError(f"{name} must be {expected}; got {value!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1 in height and width; got {value!r}")
    if max(height, width) > MOST_BINS:
        raise ValueError(f"{name} must be at most {MOST_BINS} in height and width; got {value!r}")
    return height, width


def sampling_ratio(name: str, value: Any) -> int:
    """Samples a bin and axis; 0 stands for adaptive."""
    ratio = integer(name, value, "an int; 0 or -1 chooses the number of samples by the size of the box")
    if ratio > MAX_SAMPLING_RATIO:
        raise ValueError(f"{name} must be at most {MAX_SAMPLING_RATIO} samples a bin and axis; got {ratio}")
    return max(ratio, 0)


def integer(name: str, value: Any, expected: str = "an int") -> int:
    if isinstance(value, int) and not isinstance(value, bool):  # first: see `number`
        return int(value)
    try:
        if isinstance(value, (bool, np.bool_)) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}; got {value!r}") from None


def number(name: str, value: Any) -> float:
    """A real number; NaN and infinities are numbers here."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)  # first: where a compiler traces this, it may be a symbol that knows no more of itself
    dtype = str(getattr(value, "dtype", ""))
    kinds = (bool, str, bytes, complex)
    if (
        isinstance(value, kinds)
        or value is np.ma.masked
        or any(word in dtype for word in ("bool", "complex", "<U", "|S"))
    ):
        raise TypeError(f"{name} must be a real number; got {value!r}")
    try:
        return float(value)
    except Exception:  # whatever the type of the value raises
        raise TypeError(f"{name} must be a real number; got {value!r}") from None


def spatial_scale(name: str, value: Any) -> float:
    scale = number(name, value)
    if not (0 < scale < MOST_SCALE):
        raise ValueError(
            f"{name} must be positive and finite in float32: the size of the features over that of the image that "
            f"the boxes are in, 1/16 for a stride of 16; got {value!r}"
        )
    return scale


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def method(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in METHODS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, METHODS))}; got {value!r}")
    return value


def whole_indices(values: np.ndarray, images: int) -> np.ndarray:
    """(K,) batch indices as int64, from integers or a column of boxes. IndexError for the first bad one.

    A number in a column of boxes may be off by INDEX_NOISE, so that it does not matter where rounding, or a
    finite difference, leaves it. (To truncate, as others do, makes image 0 of 0.9999999.)
    """
    if values.dtype.kind in "iu":
        indices = values.astype(np.int64)
        good = indices.view(np.uint64) < images  # negative ones are large then
    else:
        with np.errstate(invalid="ignore"):
            values = values.astype(np.float64)  # in float16 or bfloat16 the number of images may not be exact
            nearest = np.rint(values)
            indices = nearest.astype(np.int64)
            good = indices.view(np.uint64) < images
            good &= abs(values - nearest) <= INDEX_NOISE  # which NaN and infinities are not
    if not good.all():
        row = int(np.argmin(good))
        expected = f"expected a whole number in [0, {images})" if images else "there are no images"
        raise IndexError(f"the batch index of box {row} is {values[row]}; {expected}")
    return indices


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)
