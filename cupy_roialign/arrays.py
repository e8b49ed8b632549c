"""What every backend asks of an array: its dtype's name and its memory order. Nothing here touches its elements."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
SIGNED = ("int8", "int16", "int32", "int64")
INTEGERS = (*SIGNED, "uint8", "uint16", "uint32", "uint64")
REALS = (*FLOATS, *INTEGERS, "bool")

# Dtypes build their names anew each time. Two tables, since torch.compile takes no dict with NumPy's dtypes as keys.
_NAMES = {np.dtype(name): name for name in ("float16", "float32", "float64", *INTEGERS)}
TORCH_NAMES: dict[Any, str] = {}
"""Those of torch's dtypes, which torch/tensors.py enters."""


class ArraySpec(NamedTuple):
    """An array without its elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in any unit
    dtype: str

    @classmethod
    def of(cls, array: Any) -> ArraySpec:
        return cls(tuple(array.shape), tuple(strides(array)), dtype_name(array))


def dtype_name(array: Any) -> str:
    """`float32` for NumPy's, CuPy's, torch's and ml_dtypes' alike, in any byte order."""
    return name_of(array.dtype)


def name_of(dtype: Any) -> str:
    """`dtype_name` of a dtype."""
    names = _NAMES if isinstance(dtype, np.dtype) else TORCH_NAMES
    return names.get(dtype) or getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


def strides(array: Any) -> tuple[int, ...]:
    """In bytes or, for a tensor, in elements."""
    return array.stride() if hasattr(array, "stride") else array.strides


def output_name(name: str) -> str:
    """The dtype of crops of features of dtype `name`: floats stay, integers and booleans give float32."""
    return name if name in FLOATS else "float32"


def compute_name(name: str) -> str:
    """The dtype in which features of dtype `name` are interpolated and summed."""
    return "float64" if name == "float64" else "float32"


def is_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the channels of (N, C, H, W) features are closest in memory. `strides` in any unit."""
    channel = abs(strides[1])
    spatial = [abs(stride) for size, stride in zip(shape[2:], strides[2:], strict=True) if size > 1]
    return shape[1] > 1 and len(spatial) > 0 and 0 < channel < min(spatial)
