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
    "reach": "feature_gradient.cu",
    "feature_gradient": "feature_gradient.cu",
    "box_gradient": "box_gradient.cu",
}
"""All kernels, and the file that each is in."""

CTYPES = {
    "float16": "Half",
    "bfloat16": "Bfloat16",
    "float32": "float",
    "float64": "double",
    "uint8": "unsigned char",
}
"""The dtypes that kernels read. Other integers are rare, and are converted to float32 first."""

INDEX_KINDS = {"float32": 0, "float64": 0}
INDEX_KINDS |= {f"{sign}int{8 * size}": size if not sign else -size for sign in ("", "u") for size in (1, 2, 4, 8)}
"""How a kernel reads batch indices: bytes of a signed integer, or their negative; 0 for a column of the boxes."""

OPTIONS = ("-std=c++17",)

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


class Types(NamedTuple):
    """What a kernel is compiled for; dtypes by their names."""

    features: str
    crops: str  # the dtype of the output, or of the gradient to it
    boxes: str  # float32 or float64
    positions: str  # float32 or float64
    large: bool  # offsets of 64 bits
    channels_last: bool  # neighbouring threads take neighbouring channels


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
        ("channels_at_once", "i4"),
        ("box_columns", "i4"),
        ("direction_count", "i4"),
        ("rule", RULE),
    ],
    align=True,
)
"""`Arguments` of weights.cuh; passed by value, as one structure."""


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
    first: int,
    at_once: int,
    workspace: int = 0,
) -> np.ndarray:
    """ARGUMENTS of a launch whose first block has that number, for so many channels a block.

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
        at_once,
        boxes.shape[1],
        len(directions),
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
        f"typedef {CTYPES[arrays.compute_name(types.features)]} Compute;\n"
        f"typedef {'long long' if types.large else 'int'} Offset;\n"
        f"#define FEATURE {features}\n"
        f"#define RESULT {result}\n"
        f"#define GRAD {CTYPES[types.crops]}\n"
        f"#define CHANNELS_LAST {int(types.channels_last)}\n"
    )
    return "\n".join([read("device.cuh"), definitions, *map(read, ("geometry.cuh", "weights.cuh", KERNELS[name]))])


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
