"""Argument checks and their messages; nothing else.

Each check looks at an array's shape and dtype, never at its elements, so it serves arrays of any library on any
device. What depends on the elements is checked by a backend: see `whole_indices`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cupy_roialign import arrays
from cupy_roialign.rule import Border, Channels, Frame, Reduce, Rule, Taps

MAX_SAMPLING_RATIO = 4096

MOST_BINS = 2**24

INDEX_NOISE = 1 / 64

MOST_SCALE = 1e38

METHODS = ("bilinear", "nearest")


def features(name: str, value: Any) -> None:
    """(N, C, H, W), of a real dtype."""
    shape = value.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 axes, (N, C, H, W); got shape {_shape(value)}{_axes_hint(name, shape)}")
    if min(shape[2:]) < 1:
        raise ValueError(f"{name} must have at least one pixel, H >= 1 and W >= 1; got shape {_shape(value)}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.REALS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32, float64, integer or bool; got dtype {dtype}; "
            f"convert it first, for example to float32"
        )


def _axes_hint(name: str, shape: Any) -> str:
    """How to make (N, C, H, W) of some other number of axes."""
    one, photo = f"{name}[None]", f"np.transpose({name}, (2, 0, 1))[None]"
    if len(shape) == 2:
        return f"; for a single image of one channel pass {name}[None, None]"
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        if shape[0] in (1, 3, 4):
            return f"; for a single image pass {one} if it is (C, H, W), and {photo} if it is (H, W, C)"
        return f"; for a photo of (H, W, C) pass {photo}"
    if len(shape) == 3:
        return f"; for a single image of (C, H, W) pass {one}, for a single channel of N images {name}[:, None]"
    if len(shape) == 5:
        return (
            f"; 3-D features are not supported; for boxes that cut through all of (N, C, D, H, W) pass "
            f"{name}.reshape(N, C * D, H, W)"
        )
    return ""


def boxes(name: str, value: Any, columns: tuple[int, ...] = (4,)) -> None:
    """(K, columns), of a floating dtype."""
    shape = value.shape
    if len(shape) != 2 or shape[1] not in columns:
        raise ValueError(f"{_rows(name, columns)}; got {_shape(value)}{_columns_hint(name, shape, columns)}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.FLOATS:
        raise TypeError(
            f"{name} must be float32 or float64 (or a 16-bit float); got dtype {dtype}; convert it to float32"
        )


def _rows(name: str, columns: tuple[int, ...]) -> str:
    return f"{name} must have shape {' or '.join(f'(K, {n})' for n in columns)}"


def _columns_hint(name: str, shape: Any, columns: tuple[int, ...]) -> str:
    """How to make (K, 4) of another shape."""
    if tuple(shape) == (0,):
        return "; where there are no boxes pass zeros((0, 4))"
    if len(shape) == 1:
        return f"; for a single box pass {name}[None]"
    if len(shape) == 2 and (shape[1] == 6 or (shape[1] == 5 and columns == (4,))):
        column = f"pass a column of batch indices by itself, and {name}[:, 1:]; " if shape[1] == 5 else ""
        return f"; {column}rotated boxes, with an angle, are not supported"
    return ""


def rows(name: str, value: Sequence[Any], columns: tuple[int, ...]) -> tuple[list[float], tuple[int, int]]:
    """The numbers in a list of boxes, and the shape that they have together; `[]` is no boxes."""
    numbers: list[float] = []
    width = len(value[0]) if value and isinstance(value[0], (list, tuple)) else columns[0]
    for i, row in enumerate(value):
        if not isinstance(row, (list, tuple)):
            hint = f"; for a single box pass [{name}]" if is_real(row) else ""
            raise TypeError(f"{name} must be an array or a list of rows of numbers; its entry {i} is {_got(row)}{hint}")
        if len(row) not in columns or len(row) != width:
            hint = _columns_hint(name, (len(value), len(row)), columns)
            raise ValueError(f"{_rows(name, columns)}, as an array or a list; got {len(row)} entries in row {i}{hint}")
        for entry in row:
            if not is_real(entry):
                raise TypeError(f"{name} must be an array or rows of numbers; got {_got(entry)} in row {i}")
            numbers.append(number(name, entry))
    return numbers, (len(value), width)


def is_real(value: Any) -> bool:
    """Whether it is a number of Python or NumPy; an array of one element may belong to a graph of gradients."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def batch_indices(name: str, value: Any, boxes_name: str, count: int) -> None:
    """(K,) integers."""
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape (K,) with K = {count} like {boxes_name}; got {_shape(value)}")
    dtype = arrays.dtype_name(value)
    if dtype not in arrays.INTEGERS:
        raise TypeError(f"{name} must be an array of integers; got dtype {dtype}; convert it to int64")


def listed_index(name: str, value: Any, images: int) -> int:
    """A batch index that the caller wrote as a number: in the host's memory it is checked at no cost."""
    index = integer(name, value, "an array of integers, a list of ints, or an int for all boxes")
    if not 0 <= index < images:
        raise IndexError(f"{name} is {_got(index)}; {_in_range(images)}")
    return index


def listed_indices(name: str, values: Sequence[Any], boxes_name: str, count: int, images: int) -> list[int]:
    """A list of them, one for each box."""
    if len(values) != count:
        raise ValueError(f"{name} must have one entry for each of the {count} {boxes_name}; got {len(values)}")
    return [listed_index(f"{name}[{i}]", value, images) for i, value in enumerate(values)]


def batch_column(name: str, value: Any, images: int) -> None:
    """The first column of (K, 5) boxes can tell all images apart."""
    if images <= 2**8:
        return
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
    if isinstance(value, tuple) or (
        not isinstance(value, int)
        and isinstance(value, Iterable)
        and not isinstance(value, (str, bytes, set, frozenset, dict))
        and getattr(value, "shape", None) != ()
    ):
        pair = tuple(value)
        if len(pair) != 2:
            raise ValueError(
                f"{name} must be an int or a pair (height, width); got {_got(value)}, which has {len(pair)} entries"
            )
    expected = "an int or a pair of ints (height, width)"
    try:
        height, width = (integer(name, entry, expected) for entry in pair)
    except TypeError:
        raise TypeError(f"{name} must be {expected}; got {_got(value)}") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1 in height and width; got {_got(value)}")
    if max(height, width) > MOST_BINS:
        raise ValueError(f"{name} must be at most {MOST_BINS} in height and width; got {_got(value)}")
    return height, width


def sampling_ratio(name: str, value: Any) -> int:
    """Samples per bin along each axis; 0 stands for adaptive."""
    ratio = integer(name, value, "an int; 0 or -1 chooses the number of samples by the size of the box")
    if ratio > MAX_SAMPLING_RATIO:
        raise ValueError(f"{name} must be at most {MAX_SAMPLING_RATIO} samples per bin and axis; got {ratio}")
    return max(ratio, 0)


def integer(name: str, value: Any, expected: str = "an int") -> int:
    if isinstance(value, int) and not isinstance(value, bool):  # first: see `number`
        return int(value)
    try:
        if isinstance(value, (bool, np.bool_)) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}; got {_got(value)}") from None


def number(name: str, value: Any) -> float:
    """A real number; NaN and infinities are numbers here."""
    kinds = (bool, str, bytes, complex)
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)  # first: where a compiler traces this, it may be a symbol that knows no more of itself
        dtype = str(getattr(value, "dtype", ""))
        if (
            isinstance(value, kinds)
            or value is np.ma.masked
            or any(word in dtype for word in ("bool", "complex", "<U", "|S"))
        ):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold; got {_got(value)}") from None
    except Exception:  # whatever the type of the value raises
        raise TypeError(f"{name} must be a real number; got {_got(value)}") from None


def spatial_scale(name: str, value: Any) -> float:
    scale = number(name, value)
    if not (0 < scale < MOST_SCALE):
        raise ValueError(
            f"{name} must be positive and finite in float32: the size of the features over that of the image that "
            f"the boxes are in, 1/16 for a stride of 16; got {_got(value)}"
        )
    return scale


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {_got(value)}")
    return bool(value)


def method(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in METHODS:
        hint = ""
        if value in ("bicubic", "cubic", "area", "lanczos", "antialias"):
            hint = "; to filter otherwise, resize crops of a larger crop_size"
        raise ValueError(f"{name} must be one of {', '.join(map(repr, METHODS))}; got {_got(value)}{hint}")
    return value


OPERATORS = {
    (Frame.NORMALIZED, Taps.LINEAR_CEIL, Border.CUT),
    (Frame.NORMALIZED, Taps.NEAREST, Border.CUT),
    (Frame.CENTERS, Taps.LINEAR, Border.CUT),
    (Frame.CORNERS, Taps.LINEAR, Border.CUT),
    (Frame.SCALED, Taps.LINEAR, Border.CLAMP),
}
"""The combinations that there are: what the backends are written for."""


def rule(given: Rule, columns: int) -> Rule:
    """A rule from outside of the package, of boxes with so many columns, checked as the public functions check."""
    try:
        frame, taps, border = Frame(given.frame), Taps(given.taps), Border(given.border)
        reduce, channels = Reduce(given.reduce), Channels(given.channels)
    except ValueError as error:
        raise ValueError(f"unknown rule: {error}") from None
    if (frame, taps, border) not in OPERATORS:
        raise ValueError(f"no operator has frame {frame.name}, taps {taps.name} and border {border.name}")
    places = tuple(given.columns)
    if len(places) != 4 or len({*places} & {*range(columns)}) != 4:
        raise ValueError(f"columns must be 4 of the {columns} columns of boxes; got {list(places)}")
    checked = Rule(
        frame,
        taps,
        border,
        size("bins", given.bins),
        (places[0], places[1], places[2], places[3]),
        spatial_scale("spatial_scale", given.spatial_scale),
        sampling_ratio("sampling_ratio", given.sampling_ratio),
        flag("aligned", given.aligned),
        number("extrapolation_value", given.extrapolation_value),
        reduce,
        channels,
    )
    options = ("spatial_scale", "sampling_ratio", "aligned")
    for name in ("extrapolation_value",) if frame == Frame.SCALED else options:
        if getattr(checked, name) != Rule._field_defaults[name]:
            raise ValueError(f"{name} has no meaning for frame {frame.name}; got {getattr(given, name)}")
    return checked


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
    if not np.logical_and.reduce(good):
        row = int(np.argmin(good))
        raise IndexError(f"the batch index of box {row} is {values[row]}; {_in_range(images)}")
    return indices


def _in_range(images: int) -> str:
    return f"expected a whole number in [0, {images})" if images else "there are no images"


def _got(value: Any) -> str:
    """The value, if that is short: as what an error shows it."""
    try:
        text = repr(value)
    except Exception:  # an int of too many digits, or what the type of the value raises
        text = ""
    return text if 0 < len(text) <= 200 else f"{text[:100]}... of type {type(value).__name__}"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)
