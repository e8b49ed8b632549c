"""The CUDA sources in cuda/, made into kernels by CuPy at first use.

An instantiation is a kernel's name and the types that it is compiled for. CuPy compiles it for the device at hand,
keeps the result on disk, and loads it once on each device.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays, geometry

KERNELS = {
    "forward": "forward.cu",
    "resolve_boxes": "feature_gradient.cu",
    "feature_gradient": "feature_gradient.cu",
    "box_gradient": "box_gradient.cu",
    "box_gradient_sum": "box_gradient.cu",
}
"""All kernels, and the file that each is in."""

INCLUDES = {"forward.cu": ("taps.cuh",), "box_gradient.cu": ("taps.cuh",)}
"""What comes before it, beyond what comes before all."""

CTYPES = {
    "float16": "Half",
    "bfloat16": "Bfloat16",
    "float32": "float",
    "float64": "double",
    "uint8": "unsigned char",
}
"""The dtypes that kernels read. Other integers are rare, and are converted to float32 first."""

ITEMSIZES = {name: 2 if name == "bfloat16" else np.dtype(name).itemsize for name in CTYPES}

INDEX_KINDS = {"float32": 0, "float64": 0}
INDEX_KINDS |= {f"{sign}int{8 * size}": size if not sign else -size for sign in ("", "u") for size in (1, 2, 4, 8)}
"""How a kernel reads batch indices: bytes of a signed integer, or their negative; 0 for a column of the boxes."""

OPTIONS = ("-std=c++17",)

THREADS = 256
"""Of a block."""

MOST_TILE = 16
"""The longest side of what a block works on: of bins, or of pixels in the gradient to features."""

BOXES_A_BLOCK = 8
"""Whose shares of the gradient to boxes a block adds up."""

SUMS = 4
"""Of each: derivatives to start and bin, along y and along x."""

FEW_BINS = 8
"""That side where there are channels enough to make up for it."""

MANY_BLOCKS = 2048
"""Some times as many as any GPU runs at a time."""

LARGE = 2**31
"""Elements from which on offsets take 64 bits."""


class View(NamedTuple):
    """An array as a kernel sees it."""

    pointer: int
    strides: tuple[int, ...]  # in elements
    shape: tuple[int, ...]
    dtype: str

    @property
    def reach(self) -> int:
        """The largest offset of an element, in elements."""
        if 0 in self.shape:
            return 0
        return sum((n - 1) * abs(step) for n, step in zip(self.shape, self.strides, strict=True))

    def is_packed(self, lanes: int) -> bool:
        """Whether so many channels, from a multiple of that number on, lie together for accesses of up to 16 bytes."""
        if self.strides[1] != 1 or self.pointer % min(16, lanes * ITEMSIZES[self.dtype]):
            return False
        return not any(self.strides[axis] % lanes for axis in (0, 2, 3) if self.shape[axis] > 1)


class Types(NamedTuple):
    """What a kernel is compiled for; dtypes by their names."""

    features: str
    crops: str  # the dtype of the output, or of the gradient to it
    boxes: str  # float32 or float64
    positions: str  # float32 or float64
    large: bool  # offsets of 64 bits
    channels_last: bool  # neighbouring threads take neighbouring channels

    @property
    def compute(self) -> str:
        """The dtype of sums."""
        return arrays.compute_name(self.features)

    @property
    def resolved(self) -> int:
        """Integers of 64 bits that `resolve_boxes` leaves for each box: `Reach` and two `Axis`."""
        return 3 + 2 * (1 + ITEMSIZES[self.positions] // 4)

    @property
    def outputs(self) -> int:
        """How many sums a thread holds in registers."""
        return 32 // ITEMSIZES[self.compute]

    @property
    def lanes(self) -> int:
        """How many channels of a place a thread works on together: channels-last, what an access of 16 bytes reads."""
        if not self.channels_last:
            return self.outputs
        return min(self.outputs, 16 // ITEMSIZES[self.features])

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor shall hold: as many as leave their threads registers enough."""
        return 2 if self.compute == "float64" else 4

    @property
    def spots(self) -> int:
        """How many places a thread works on."""
        return self.outputs // self.lanes


class Tiling(NamedTuple):
    """How the work on an item (a box, or an image) is cut into those of blocks."""

    tile: tuple[int, int]  # of bins or pixels, along y and x
    channels: int  # at once; a multiple of `Types.lanes`, even where there are fewer
    blocks: int  # of an item

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, size: tuple[int, ...], channels: int, types: Types, items: int | None = None) -> Tiling:
        """For items of a size, in bins or pixels.

        A block's places are those that its threads hold sums for. With a number of `items` it does several times as
        many, in rounds, where that leaves enough blocks.
        """
        groups, room = -(-channels // types.lanes), THREADS * types.spots
        limit = FEW_BINS if groups * FEW_BINS**2 >= room else MOST_TILE
        cuts = [max(1, -(-n // limit)) for n in size]
        tile = tuple(-(-n // cut) for n, cut in zip(size, cuts, strict=True))
        at_once = max(1, min(groups, room // max(1, math.prod(tile))))
        if items is not None:
            rounds = max(1, -(-groups // at_once))
            at_once *= -(-rounds // max(1, -(-MANY_BLOCKS // max(1, items * math.prod(cuts)))))
        return cls((tile[0], tile[1]), at_once * types.lanes, math.prod(cuts) * -(-groups // at_once))


RULE = np.dtype(
    [
        ("spatial_scale", "f8"),
        ("extrapolation_value", "f8"),
        ("dialect", "i4"),
        ("bins", "i4", 2),
        ("columns", "i4", 4),
        ("sampling_ratio", "i4"),
        ("aligned", "i4"),
        ("nearest", "i4"),
    ],
    align=True,
)

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


@functools.lru_cache(maxsize=256)
def rule_bytes(rule: geometry.Rule) -> bytes:
    """RULE of a rule."""
    return _RULE.pack(
        rule.spatial_scale,
        rule.extrapolation_value,
        rule.dialect,
        *rule.bins,
        *rule.columns,
        rule.sampling_ratio,
        rule.aligned,
        rule.nearest,
    )


def arguments(
    at_work: Sequence[View],
    directions: Sequence[View],
    rule: geometry.Rule,
    types: Types,
    tiling: Tiling,
    workspace: int = 0,
    first: int = 0,
) -> np.ndarray:
    """ARGUMENTS of a launch whose first block has that number.

    `at_work`: features or their gradient, crops or their gradient, boxes, batch indices, result.
    """
    planes, crops, boxes, indices, _ = at_work
    absent = 2 - len(directions)
    packed = _ARGUMENTS.pack(
        *(view.pointer for view in at_work),
        workspace,
        *(view.pointer for view in directions),
        *[0] * absent,
        *planes.strides,
        *crops.strides,
        *boxes.strides,
        *indices.strides,
        *(stride for view in directions for stride in view.strides),
        *[0] * 2 * absent,
        planes.shape[0],
        boxes.shape[0],
        first,
        *planes.shape[1:],
        INDEX_KINDS[indices.dtype],
        boxes.shape[1],
        len(directions),
        *tiling.tile,
        tiling.channels,
        tiling.blocks,
        planes.is_packed(types.lanes),
        crops.is_packed(types.lanes),
    )
    end = rule_bytes(rule)
    return np.frombuffer(bytearray(packed.ljust(ARGUMENTS.itemsize - len(end), b"\0") + end), ARGUMENTS).reshape(())


def box_name(name: str) -> str:
    """The dtype in which boxes of dtype `name` reach a kernel."""
    return "float64" if name == "float64" else "float32"


def every_types() -> list[Types]:
    """All that the backend asks for: see `cupy_backend`."""
    return [
        Types(features, crops, boxes, positions, large, channels_last)
        for features in CTYPES
        for crops in dict.fromkeys((arrays.output_name(features), arrays.compute_name(features)))
        for boxes, positions in (("float32", "float32"), ("float32", "float64"), ("float64", "float64"))
        for large in (False, True)
        for channels_last in (False, True)
        if not (positions != boxes and features != "float64")
    ]


def instantiations() -> list[tuple[str, Types]]:
    """All that the backend asks for: a kernel of each file, whose others are compiled along, and its types."""
    one_a_file = {file: name for name, file in KERNELS.items()}.values()
    return [(name, types) for types in every_types() for name in one_a_file if _is_asked_for(name, types)]


def _is_asked_for(name: str, types: Types) -> bool:
    if name == "forward":  # which makes the crops
        return types.crops == arrays.output_name(types.features)
    if KERNELS[name] == KERNELS["feature_gradient"]:  # which makes the gradient to the features
        return types.features in arrays.FLOATS
    return True


@functools.cache
def read(name: str) -> str:
    """A source file. It lies in the package where that is installed, and beside it in the source tree."""
    package = Path(__file__).parent
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / name).is_file():
            return (folder / name).read_text()
    raise FileNotFoundError(f"{name} of cupy_roialign's CUDA sources is missing; install the package again")


def source(name: str, types: Types) -> str:
    """One text: CuPy's cache on disk knows a kernel by its text, and not by what that includes."""
    features, result = CTYPES[types.features], CTYPES[arrays.output_name(types.features)]
    definitions = (
        f"typedef {CTYPES[types.positions]} Real;\n"
        f"typedef {CTYPES[types.boxes]} Box;\n"
        f"typedef {CTYPES[types.compute]} Compute;\n"
        f"typedef {'long long' if types.large else 'int'} Offset;\n"
        f"#define FEATURE {features}\n"
        f"#define RESULT {result}\n"
        f"#define GRAD {CTYPES[types.crops]}\n"
        f"#define CHANNELS_LAST {int(types.channels_last)}\n"
        f"#define LANES {types.lanes}\n"
        f"#define SPOTS {types.spots}\n"
        f"#define THREADS {THREADS}\n"
        f"#define BLOCKS {types.blocks}\n"
        f"#define MOST_TILE {MOST_TILE}\n"
        f"#define BOXES_A_BLOCK {BOXES_A_BLOCK}\n"
        f"#define SUMS {SUMS}\n"
    )
    files = ["geometry.cuh", "arguments.cuh", *INCLUDES.get(KERNELS[name], ()), KERNELS[name]]
    return "\n".join([read("device.cuh"), definitions, *map(read, files)])


@functools.cache
def kernel(name: str, types: Types) -> Any:
    """A kernel, compiled for the current device; for another one CuPy compiles it when it is launched there."""
    import cupy

    made = cupy.RawKernel(source(name, types), name, options=OPTIONS)
    try:
        made.compile()
    except Exception as error:
        from cupy_roialign import problems

        if not problems.lacks_toolkit(error):
            raise
        raise RuntimeError(str(problems.no_toolkit(problems.brief(error), problems.machine()))) from error
    return made
