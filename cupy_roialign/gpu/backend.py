"""The GPU: an operator and its two gradients, for arrays of any library that lie in a GPU's memory.

A subclass provides what differs between libraries (CuPy, PyTorch). Work is launched on the device of the arrays and on
the library's current stream there. Nothing synchronizes with the GPU unless `checked` asks for it. Shapes and dtypes
have been checked (validation.py).
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays, geometry, validation
from cupy_roialign.gpu import arguments, index_checks, kernels
from cupy_roialign.gpu.tiling import Tiling, Zones
from cupy_roialign.rule import Rule

MOST_BLOCKS = 2**31 - 1
"""Blocks per launch at most."""

LARGE = 2**31
"""Elements from which on offsets take 64 bits."""


class _Work(NamedTuple):
    """What the launches of one call have in common."""

    types: kernels.Types
    rule: Rule
    views: Sequence[arguments.View]  # features or their gradient, crops or their gradient, boxes, batch indices
    directions: Sequence[arguments.View]
    owners: Any  # the arrays of the views: converted ones must live until the kernels are launched


class GpuBackend(abc.ABC):
    """The functions of cpu/backend.py, with the same signatures."""

    # ---- a library's arrays ----

    @abc.abstractmethod
    def on(self, array: Any) -> contextlib.AbstractContextManager[object]:
        """Within it, launches go to the array's device and the library's current stream there."""

    @abc.abstractmethod
    def layout(self, array: Any) -> tuple[int, tuple[int, ...]]:
        """The address of the first element, and the strides in elements."""

    @abc.abstractmethod
    def cast(self, array: Any, dtype: str) -> Any:
        """The array in a dtype; itself if it has that."""

    @abc.abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str, beside: Any) -> Any:
        """A new array on the device of `beside`."""

    @abc.abstractmethod
    def moved(self, array: Any, axes: tuple[int, ...]) -> Any:
        """A view with other axes."""

    @abc.abstractmethod
    def host(self, array: Any) -> np.ndarray:
        """A copy in the CPU's memory."""

    # ---- the operators ----

    def forward(self, features: Any, boxes: Any, batch_indices: Any, rule: Rule, directions: Sequence[Any] = ()) -> Any:
        """(K, C, bins_y, bins_x) crops, in the memory order of `features`; NaN for a broken box.

        With `directions`, up to two changes of the boxes and like them in shape: the derivative of the crops along
        them.
        """
        with self.on(features):
            features = self._known(features)
            dtype = arrays.output_name(arrays.dtype_name(features))
            output = self._allocate((len(boxes), features.shape[1], *rule.bins), dtype, features, features)
            work = self._work(features, output, boxes, batch_indices, directions, rule)
            tiling = Tiling.of(rule.bins, features.shape[1], work.types, len(boxes))
            name = "forward_along" if directions else "forward"
            self._launch(name, len(boxes) * tiling.blocks, work, tiling, output)
            return output

    def feature_gradient(
        self,
        grad_output: Any,
        features: Any,
        boxes: Any,
        batch_indices: Any,
        rule: Rule,
        directions: Sequence[Any] = (),
    ) -> Any:
        """The gradient with respect to the features, in their memory order; float32 where they are integers.

        With `directions` that of the derivative of the crops along them. Each block owns a tile of it and adds the
        boxes that touch the tile in their order, so results are bitwise reproducible.
        """
        with self.on(grad_output):
            dtype = arrays.output_name(arrays.dtype_name(features))
            gradient = self._allocate(tuple(features.shape), dtype, features, grad_output)
            grad = self._readable(grad_output, dtype)
            work = self._work(gradient, grad, boxes, batch_indices, directions, rule)
            images, size = features.shape[0], tuple(features.shape[2:])
            tiling = Tiling.of(size, features.shape[1], work.types)
            zones = Zones.of(images, size, tiling.tile)
            nbytes = len(boxes) * work.types.box_bytes + zones.bytes(len(boxes))
            resolved = self.empty((-(-nbytes // 8),), "int64", grad_output)  # aligned for 8 bytes
            self._launch("resolve_boxes", -(-len(boxes) // kernels.THREADS), work, tiling, gradient, resolved, zones)
            self._launch("feature_gradient", images * tiling.blocks, work, tiling, gradient, resolved, zones)
            return gradient

    def box_gradient(
        self,
        grad_output: Any,
        features: Any,
        boxes: Any,
        batch_indices: Any,
        rule: Rule,
        directions: Sequence[Any] = (),
    ) -> Any:
        """The gradient with respect to the boxes, in their shape; NaN for a broken box, 0 in a batch index column.

        With `directions` that of the derivative of the crops along them.
        """
        with self.on(features):
            features = self._known(features)
            grad = self._readable(grad_output, arrays.dtype_name(features))
            gradient = self.empty(tuple(boxes.shape), kernels.box_name(arrays.dtype_name(boxes)), features)
            work = self._work(features, grad, boxes, batch_indices, directions, rule)
            tiling = Tiling.of(rule.bins, features.shape[1], work.types, len(boxes))
            sums = self.empty((len(boxes), tiling.blocks, kernels.SUMS), work.types.compute, features)
            self._launch("box_gradient", len(boxes) * tiling.blocks, work, tiling, gradient, sums)
            self._launch("box_gradient_sum", -(-len(boxes) // kernels.BOXES_PER_BLOCK), work, tiling, gradient, sums)
            return self.cast(gradient, arrays.dtype_name(boxes))

    def _work(
        self,
        planes: Any,
        crops: Any,
        boxes: Any,
        batch_indices: Any,
        directions: Sequence[Any],
        rule: Rule,
    ) -> _Work:
        """The arrays in dtypes that kernels read."""
        if index_checks.wanted():
            validation.whole_indices(self.host(batch_indices), planes.shape[0])
        box_dtype = kernels.box_name(arrays.dtype_name(boxes))
        if arrays.dtype_name(batch_indices) in arrays.FLOATS:
            batch_indices = self.cast(batch_indices, box_dtype)
        boxes, *directions = (self.cast(rows, box_dtype) for rows in (boxes, *directions))
        inputs = (planes, crops, boxes, batch_indices)
        views = [self.view(array) for array in inputs]
        changes = [self.view(array) for array in directions]
        return _Work(types_of(views[0], views[1], views[2], rule), rule, views, changes, (inputs, directions))

    def _launch(
        self,
        name: str,
        blocks: int,
        work: _Work,
        tiling: Tiling,
        result: Any,
        workspace: Any = None,
        zones: Zones = Zones(),  # noqa: B008 (immutable)
    ) -> None:
        if blocks == 0:
            return
        views = [*work.views, self.view(result)]
        pointer = 0 if workspace is None else self.layout(workspace)[0]
        kernel = kernels.kernel(name, work.types)
        for first in range(0, blocks, MOST_BLOCKS):
            packed = arguments.pack(
                views, work.directions, work.rule, work.types, tiling, zones, workspace=pointer, first_block=first
            )
            kernel((min(MOST_BLOCKS, blocks - first),), (kernels.THREADS,), (packed,))

    def view(self, array: Any) -> arguments.View:
        """An array as a kernel sees it."""
        name = arrays.dtype_name(array)
        return arguments.View(*self.layout(array), tuple(array.shape), "uint8" if name == "bool" else name)

    def _known(self, features: Any) -> Any:
        """Features in a dtype that kernels read and that gives the same results."""
        name = arrays.dtype_name(features)
        return features if name in (*kernels.CTYPES, "bool") else self.cast(features, "float32")

    def _readable(self, grad_output: Any, features: str) -> Any:
        """The gradient in a dtype that kernels read: that of the output, or that of the computation."""
        if arrays.dtype_name(grad_output) == arrays.output_name(features):
            return grad_output
        return self.cast(grad_output, arrays.compute_name(features))

    def _allocate(self, shape: tuple[int, ...], dtype: str, like: Any, beside: Any) -> Any:
        """An array of (N or K, C, height, width), channels-last in memory where `like` is."""
        if not arrays.is_channels_last(like.shape, arrays.strides(like)):
            return self.empty(shape, dtype, beside)
        count, channels, height, width = shape
        return self.moved(self.empty((count, height, width, channels), dtype, beside), (0, 3, 1, 2))


def types_of(planes: arguments.View, crops: arguments.View, boxes: arguments.View, rule: Rule) -> kernels.Types:
    """The types for some arrays; one of `kernels.every_types`."""
    large = max(planes.last_offset, crops.last_offset) >= LARGE
    channels_last = arrays.is_channels_last(planes.shape, planes.strides)
    precision = geometry.precision(rule, planes.dtype, boxes.dtype)
    return kernels.Types(planes.dtype, crops.dtype, boxes.dtype, precision, large, channels_last)
