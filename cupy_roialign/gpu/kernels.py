"""The CUDA sources in cuda/, compiled into kernels by CuPy at first use.

An instantiation is a kernel's name and the types that it is compiled for. CuPy compiles it for the current device,
keeps the result on disk, and loads it once on each device.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays

KERNELS = {
    "forward": "forward.cu",
    "forward_along": "forward_along.cu",
    "resolve_boxes": "feature_gradient.cu",
    "feature_gradient": "feature_gradient.cu",
    "box_gradient": "box_gradient.cu",
    "box_gradient_sum": "box_gradient.cu",
}
"""The names of all kernels, and the file of each."""

INCLUDES = {
    "forward.cu": ("taps.cuh", "crops.cuh"),
    "forward_along.cu": ("taps.cuh", "crops.cuh"),
    "box_gradient.cu": ("taps.cuh",),
}
"""The files that a file needs before it, besides those that all need."""

CTYPES = {
    "float16": "Half",
    "bfloat16": "Bfloat16",
    "float32": "float",
    "float64": "double",
    "uint8": "unsigned char",
}
"""The C++ type of each dtype that kernels read. Other integers are rare, and are converted to float32 first."""

ITEMSIZES = {name: 2 if name == "bfloat16" else np.dtype(name).itemsize for name in CTYPES}
"""Bytes per element of each dtype that kernels read."""

MANY_CHANNELS = 8
"""From so many channels on (float64: from half as many) the kernels are the same; for fewer they are others each."""

OPTIONS = ("-std=c++17",)
"""Options of the compiler."""

THREADS = 256
"""Threads per block at most."""

FEWEST_THREADS = 64
"""Threads per block at least: the warps that find the taps along y and along x."""

MOST_PIXELS = 16
"""The longest side of the tile of pixels that a block works on in the gradient of the features."""

BOXES_PER_WORD = 32
"""Boxes per word of marks, and per block of `resolve_boxes`."""

BOXES_PER_BLOCK = 8
"""Boxes per block of the kernel that adds up the sums of `box_gradient`."""

SUMS = 4
"""Sums per box: derivatives with respect to start and step, along y and along x."""


class Types(NamedTuple):
    """The types that a kernel is compiled for; dtypes by their names."""

    features: str
    crops: str  # the dtype of the output, or of its gradient
    boxes: str  # float32 or float64
    positions: str  # float32 or float64
    large: bool  # 64-bit offsets
    channels_last: bool  # neighbouring threads take neighbouring channels
    lanes: int  # channels of a pixel or bin that a thread works on together: `lanes_of`
    most_bins: int = 16  # the longest side of the tile of bins that a block works on: `most_bins_of`

    @property
    def compute(self) -> str:
        """The dtype of sums."""
        return arrays.compute_name(self.features)

    @property
    def box_bytes(self) -> int:
        """Bytes per box that `resolve_boxes` writes: `Bounds` and two `Axis`. The sources assert it."""
        return 24 + 2 * (8 + 2 * ITEMSIZES[self.positions])

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that the compiler shall leave registers for."""
        return 2 if self.compute == "float64" else 4


def lanes_of(features: str, channels: int) -> int:
    """The lanes for features of a dtype with so many channels: all, as far as registers hold their sums."""
    return max(1, min(channels, MANY_CHANNELS * 4 // ITEMSIZES[arrays.compute_name(features)]))


def most_bins_of(lanes: int, features: str, bins: tuple[int, int]) -> int:
    """The longest side of a tile of bins: a power of two, since a table has room for so many taps in all.

    What a block finds about a box shall serve many spots. Many channels are as many for each bin. And few bins shall
    have room for many taps each.
    """
    return 32 if lanes < lanes_of(features, MANY_CHANNELS) and max(bins) > 16 else 16


def box_name(name: str) -> str:
    """The dtype in which boxes of dtype `name` reach a kernel."""
    return "float64" if name == "float64" else "float32"


def every_types(channels: int = MANY_CHANNELS) -> list[Types]:
    """All types that a backend asks for, for features with so many channels: see `backend.types_of`."""
    return [
        Types(features, crops, boxes, positions, large, channels_last, lanes, most_bins)
        for features in CTYPES
        for lanes in (lanes_of(features, channels),)
        for most_bins in sorted({most_bins_of(lanes, features, bins) for bins in ((1, 1), (99, 99))})
        for crops in dict.fromkeys((arrays.output_name(features), arrays.compute_name(features)))
        for boxes, positions in (("float32", "float32"), ("float32", "float64"), ("float64", "float64"))
        for large in (False, True)
        for channels_last in ((False, True) if channels > 1 else (False,))
        if not (positions != boxes and features != "float64")
    ]


def instantiations(channels: int = MANY_CHANNELS) -> list[tuple[str, Types]]:
    """All that a backend asks for: a kernel of each file, with which the file's others are compiled, and its types."""
    one_per_file = {file: name for name, file in KERNELS.items()}.values()
    return [(name, types) for types in every_types(channels) for name in one_per_file if _is_asked_for(name, types)]


def _is_asked_for(name: str, types: Types) -> bool:
    if name in ("forward", "forward_along"):  # which write the crops
        return types.crops == arrays.output_name(types.features)
    if KERNELS[name] == KERNELS["feature_gradient"]:  # which writes the gradient of the features, in tiles of pixels
        return types.features in arrays.FLOATS and types.most_bins == 16
    return True


@functools.cache
def read(name: str) -> str:
    """A source file. It lies within the package where that is installed, and beside it in the source tree."""
    package = Path(__file__).parents[1]
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{name} of cupy_roialign's CUDA sources is missing; install the package again")


def source(name: str, types: Types) -> str:
    """The text of a kernel with all that it includes: CuPy's disk cache does not see what a text would include."""
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
        f"#define THREADS {THREADS}\n"
        f"#define BLOCKS {types.blocks}\n"
        f"#define MOST_BINS {types.most_bins}\n"
        f"#define MOST_PIXELS {MOST_PIXELS}\n"
        f"#define WORD {BOXES_PER_WORD}\n"
        f"#define BOX_BYTES {types.box_bytes}\n"
        f"#define BOXES_PER_BLOCK {BOXES_PER_BLOCK}\n"
        f"#define SUMS {SUMS}\n"
    )
    files = ["geometry.cuh", "arguments.cuh", *INCLUDES.get(KERNELS[name], ()), KERNELS[name]]
    return "\n".join([read("device.cuh"), definitions, *map(read, files)])


@functools.cache
def kernel(name: str, types: Types) -> Any:
    """A kernel, compiled for the current device; for another one CuPy compiles it when it is launched there."""
    import cupy

    from cupy_roialign.diagnose import problems

    version = getattr(cupy, "__version__", "")
    if problems.is_old_cupy(version):
        raise RuntimeError(str(problems.old_cupy(version, problems.machine())))
    made = cupy.RawKernel(source(name, types), name, options=OPTIONS)
    try:
        made.compile()
    except Exception as error:
        if not problems.lacks_toolkit(error):
            raise
        raise RuntimeError(str(problems.no_toolkit(problems.brief(error), problems.machine()))) from error
    return made
