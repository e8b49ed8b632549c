"""The GPU: an operator and its two gradients on CuPy arrays; the names and signatures of numpy_backend.py.

Work goes to the device of the features and to CuPy's current stream there; nothing waits for the GPU, but where
`checked` asks for it. Shapes and dtypes have been checked (validation.py).
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from cupy_roialign import arrays, checks, geometry, kernels, validation

THREADS = 256  # of a block, as in the kernels
OUTPUTS = 8 * THREADS  # of a block
MOST_BLOCKS = 2**31 - 1  # of a launch
TILE = 8  # a side of what a block works on: of bins, or of pixels in the gradient to features


def join(boxes: list[Any], like: Any) -> tuple[Any, Any]:
    """Lists of (L_i, 4) boxes, one for each image, as (K, 4) boxes and (K,) batch indices, beside `like`."""
    with like.device:
        indices = np.repeat(np.arange(len(boxes)), [len(part) for part in boxes])
        return cupy.concatenate(boxes) if boxes else cupy.zeros((0, 4), np.float32), cupy.asarray(indices)


def forward(features: Any, boxes: Any, batch_indices: Any, rule: geometry.Rule) -> Any:
    """(K, C, bins_y, bins_x) crops, in the memory order of `features`; NaN for a broken box."""
    with features.device:
        features = _known(features)
        dtype = arrays.output_name(arrays.dtype_name(features))
        output = _allocate(features, (len(boxes), features.shape[1], *rule.bins), dtype)
        blocks, area = _tiles(rule.bins)
        _launch("forward", blocks * len(boxes), area, features, features, output, boxes, batch_indices, rule, output)
        return output


def feature_gradient(grad_output: Any, features: Any, boxes: Any, batch_indices: Any, rule: geometry.Rule) -> Any:
    """The gradient to the features, in their memory order; float32 where they are integers.

    A block owns a part of it, and adds the boxes that touch that part in their order: the same bits each time.
    """
    with features.device:
        dtype = arrays.output_name(arrays.dtype_name(features))
        gradient = _allocate(features, features.shape, dtype)
        grad = _readable(grad_output, gradient)
        blocks, area = _tiles(features.shape[2:])
        blocks *= features.shape[0]
        _launch("feature_gradient", blocks, area, gradient, gradient, grad, boxes, batch_indices, rule, gradient)
        return gradient


def box_gradient(grad_output: Any, features: Any, boxes: Any, batch_indices: Any, rule: geometry.Rule) -> Any:
    """The gradient to the boxes, in their shape; NaN for a broken box, 0 in a batch index column."""
    with features.device:
        features = _known(features)
        grad = _readable(grad_output, features)
        gradient = cupy.empty(boxes.shape, _real(boxes))
        _launch("box_gradient", len(boxes), 0, features, features, grad, boxes, batch_indices, rule, gradient)
        return gradient.astype(arrays.dtype_name(boxes), copy=False)


def types_of(features: Any, planes: Any, crops: Any, boxes: Any, rule: geometry.Rule) -> kernels.Types:
    """The instantiation for some arrays; one of `kernels.every_types`."""
    name, real = arrays.dtype_name(features), _real(boxes)
    large = max(_reach(planes), _reach(crops)) >= kernels.LARGE
    channels_last = arrays.is_channels_last(features.shape, features.strides)
    crops_name = arrays.dtype_name(crops)
    return kernels.Types(name, crops_name, real, geometry.precision(rule, name, real), large, channels_last)


def _launch(
    name: str,
    blocks: int,
    area: int,
    features: Any,
    planes: Any,
    crops: Any,
    boxes: Any,
    batch_indices: Any,
    rule: geometry.Rule,
    result: Any,
) -> None:
    """Runs a kernel over `blocks` tiles of `area` outputs for each channel; 0: a block takes all channels.

    `planes`: the features or their gradient. `crops`: the output or its gradient.
    """
    if checks.wanted():
        validation.whole_indices(cupy.asnumpy(batch_indices), features.shape[0])
    channels = features.shape[1]
    at_once = max(1, min(channels, OUTPUTS // area)) if area else channels
    blocks *= -(-channels // at_once) if area else 1
    if blocks == 0:
        return
    types = types_of(features, planes, crops, boxes, rule)
    boxes = boxes.astype(types.boxes, copy=False)
    kind = batch_indices.dtype.kind
    if kind == "f":
        batch_indices = batch_indices.astype(types.boxes, copy=False)
    arguments = np.zeros((), kernels.ARGUMENTS)
    arguments["features"] = features.data.ptr
    arguments["grad_output"] = crops.data.ptr
    arguments["boxes"] = boxes.data.ptr
    arguments["batch_indices"] = batch_indices.data.ptr
    arguments["result"] = result.data.ptr
    arguments["feature_strides"] = _steps(planes)
    arguments["output_strides"] = _steps(crops)
    arguments["box_strides"] = _steps(boxes)
    arguments["index_stride"] = _steps(batch_indices)[0]
    arguments["images"], arguments["channels"], *arguments["size"] = features.shape
    arguments["count"] = len(boxes)
    arguments["index_kind"] = {"i": 1, "u": -1, "f": 0}[kind] * batch_indices.dtype.itemsize
    arguments["channels_at_once"] = at_once
    arguments["box_columns"] = boxes.shape[1]
    arguments["rule"] = kernels.rule_fields(rule)
    kernel = kernels.kernel(name, types)
    for first in range(0, blocks, MOST_BLOCKS):
        arguments["first_block"] = first
        kernel((min(MOST_BLOCKS, blocks - first),), (THREADS,), (arguments,))


def _known(features: Any) -> Any:
    """Features in a dtype that there are kernels for, and that computes the same."""
    name = arrays.dtype_name(features)
    if name == "bool":
        return features.view(np.uint8)
    return features if name in kernels.CTYPES else features.astype(np.float32)


def _readable(grad_output: Any, features: Any) -> Any:
    """The gradient in a dtype that there are kernels for: that of the output, or that which is computed in."""
    name = arrays.dtype_name(features)
    if arrays.dtype_name(grad_output) == arrays.output_name(name):
        return grad_output
    return grad_output.astype(arrays.compute_name(name), copy=False)


def _tiles(size: tuple[int, ...]) -> tuple[int, int]:
    """How many tiles cover a size, and how many places the largest has."""
    return -(-size[0] // TILE) * -(-size[1] // TILE), min(size[0], TILE) * min(size[1], TILE)


def _real(boxes: Any) -> str:
    """The dtype in which boxes reach a kernel."""
    return "float64" if arrays.dtype_name(boxes) == "float64" else "float32"


def _steps(array: Any) -> list[int]:
    """Strides in elements."""
    return [stride // array.itemsize for stride in array.strides]


def _reach(array: Any) -> int:
    """The largest offset of an element, in elements."""
    return sum((n - 1) * abs(step) for n, step in zip(array.shape, _steps(array), strict=True)) if array.size else 0


def _allocate(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array of (N or K, C, height, width), channels-last in memory where `like` is."""
    if arrays.is_channels_last(like.shape, like.strides):
        count, channels, height, width = shape
        return cupy.empty((count, height, width, channels), dtype).transpose(0, 3, 1, 2)
    return cupy.empty(shape, dtype)
