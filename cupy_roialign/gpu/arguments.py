"""The arguments of a launch: arrays as kernels see them, packed into the structure that all kernels take."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cupy_roialign.gpu.kernels import ITEMSIZES, Types
from cupy_roialign.gpu.tiling import Tiling, Zones
from cupy_roialign.rule import Rule

INDEX_KINDS = {"float32": 0, "float64": 0}
INDEX_KINDS |= {f"{sign}int{8 * size}": size if not sign else -size for sign in ("", "u") for size in (1, 2, 4, 8)}
"""How a kernel reads batch indices: the bytes of a signed integer, or their negative; 0 for a column of the boxes."""


ALIGNMENT = 16
"""Bytes of the widest access."""


class View(NamedTuple):
    """An array as a kernel sees it, but for where it is."""

    pointer: int  # modulo ALIGNMENT
    strides: tuple[int, ...]  # in elements
    shape: tuple[int, ...]
    dtype: str

    @property
    def last_offset(self) -> int:
        """The largest offset of an element, in elements."""
        if 0 in self.shape:
            return 0
        return sum((n - 1) * abs(step) for n, step in zip(self.shape, self.strides, strict=True))

    def is_packed(self, lanes: int) -> bool:
        """Whether so many channels, from a multiple of that number on, are adjacent, and aligned for wide accesses."""
        alignment = math.gcd(ALIGNMENT, lanes * ITEMSIZES[self.dtype])
        if self.strides[1] != 1 or self.pointer % alignment:
            return False
        steps = [self.strides[axis] for axis in (0, 2, 3) if self.shape[axis] > 1]
        return not any(step * ITEMSIZES[self.dtype] % alignment for step in steps)


RULE = np.dtype(
    [
        ("spatial_scale", "f8"),
        ("extrapolation_value", "f8"),
        ("frame", "i4"),
        ("taps", "i4"),
        ("border", "i4"),
        ("bins", "i4", 2),
        ("columns", "i4", 4),
        ("sampling_ratio", "i4"),
        ("aligned", "i4"),
    ],
    align=True,
)
"""`Rule` of geometry.cuh."""

ARGUMENTS = np.dtype(
    [
        ("features", "u8"),
        ("grad_output", "u8"),
        ("boxes", "u8"),
        ("batch_indices", "u8"),
        ("result", "u8"),
        ("workspace", "u8"),
        ("directions", "u8", 2),
        ("feature_strides", "i8", 4),
        ("output_strides", "i8", 4),
        ("box_strides", "i8", 2),
        ("index_stride", "i8"),
        ("direction_strides", "i8", 4),
        ("images", "i8"),
        ("count", "i8"),
        ("first_block", "i8"),
        ("channels", "i4"),
        ("size", "i4", 2),
        ("index_kind", "i4"),
        ("box_columns", "i4"),
        ("direction_count", "i4"),
        ("tile", "i4", 2),
        ("channels_at_once", "i4"),
        ("blocks_per_item", "i4"),
        ("zones", "i4", 3),
        ("zone_pixels", "i4", 2),
        ("packed_features", "i4"),
        ("packed_crops", "i4"),
        ("rule", RULE),
    ],
    align=True,
)
"""`Arguments` of arguments.cuh; passed by value, as one structure."""


def _packer(dtype: np.dtype) -> struct.Struct:
    """Packs a structure's plain fields, in their order: several times faster than NumPy fills it."""
    codes = {"u8": "Q", "i8": "q", "i4": "i", "f8": "d"}
    bases = [dtype[name].subdtype or (dtype[name], ()) for name in dtype.names or ()]
    plain = [codes[base.str[1:]] * math.prod(shape) for base, shape in bases if base.names is None]
    return struct.Struct("@" + "".join(plain))


_ARGUMENTS, _RULE = _packer(ARGUMENTS), _packer(RULE)

POINTERS = 8
"""How many pointers ARGUMENTS begins with."""

_POINTERS, _NUMBER = struct.Struct(f"@{POINTERS}Q"), struct.Struct("@q")
_BYTES = np.dtype((np.void, ARGUMENTS.itemsize))
_FIRST_BLOCK: int = ARGUMENTS.fields["first_block"][1]  # type: ignore[index]


def rule_bytes(rule: Rule) -> bytes:
    """RULE of a rule."""
    packed = _RULE.pack(
        rule.spatial_scale,
        rule.extrapolation_value,
        rule.frame,
        rule.taps,
        rule.border,
        *rule.bins,
        *rule.columns,
        rule.sampling_ratio,
        rule.aligned,
    )
    return packed.ljust(RULE.itemsize, b"\0")


def template(views: Sequence[View], directions: Sequence[View], types: Types, tiling: Tiling, zones: Zones) -> bytes:
    """ARGUMENTS of a call's launches, but for what `fill` adds.

    `views`: features or their gradient, crops or their gradient, boxes, batch indices.
    """
    planes, crops, boxes, indices = views
    packed = _ARGUMENTS.pack(
        *[0] * POINTERS,
        *planes.strides,
        *crops.strides,
        *boxes.strides,
        *indices.strides,
        *(stride for view in directions for stride in view.strides),
        *[0] * 2 * (2 - len(directions)),
        planes.shape[0],
        boxes.shape[0],
        0,
        *planes.shape[1:],
        INDEX_KINDS[indices.dtype],
        boxes.shape[1],
        len(directions),
        *tiling.tile,
        tiling.channels,
        tiling.blocks,
        *zones.counts,
        *zones.pixels,
        planes.is_packed(types.lanes),
        crops.is_packed(types.lanes),
    )
    return packed.ljust(ARGUMENTS.itemsize, b"\0")


def fill(given: bytes, pointers: Sequence[int], rule: Rule, first_block: int) -> np.ndarray:
    """ARGUMENTS of a launch, as bytes. `pointers`: those of the template's views, the result, workspace and directions.

    As bytes, because CuPy asks an array for the description of its dtype: 30 us for a structure with these fields.
    """
    whole = bytearray(given)  # writable, as NumPy and CuPy want it
    _POINTERS.pack_into(whole, 0, *pointers, *[0] * (POINTERS - len(pointers)))
    _NUMBER.pack_into(whole, _FIRST_BLOCK, first_block)
    whole[-RULE.itemsize :] = rule_bytes(rule)
    return np.frombuffer(whole, _BYTES).reshape(())
