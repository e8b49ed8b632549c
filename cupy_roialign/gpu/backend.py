"""The GPU: an operator and its two gradients, for arrays of any library that lie in a GPU's memory.

What differs from library to library (CuPy, PyTorch) is in the methods that a subclass gives; all else is here. Work
goes to the device of the arrays and to the library's current stream there. Nothing waits for the GPU, but where
`checked` asks for it. Shapes and dtypes have been checked (validation.py).
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays, checks, geometry, kernels, validation

MOST_BLOCKS = 2**31 - 1  # of a launch


class _Work(NamedTuple):
    """What the kernels of one call have in common."""

    types: kernels.Types
    rule: geometry.Rule
    views: Sequence[kernels.View]  # features or their gradient, crops or their gradient, boxes, batch indices
    directions: Sequence[kernels.View]
    owners: Any  # of their memory: what was converted must live until the kernels are launched


class GpuBackend(abc.ABC):
    """The names and signatures of numpy_backend.py."""

    # ---- a library's arrays ----

    @abc.abstractmethod
    def on(self, array: Any) -> contextlib.AbstractContextManager[object]:
        """Within it, launches go to the array's device and the library's current stream there."""

    @abc.abstractmethod
    def place(self, array: Any) -> tuple[int, tuple[int, ...]]:
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

    def forward(
        self, features: Any, boxes: Any, batch_indices: Any, rule: geometry.Rule, directions: Sequence[Any] = ()
    ) -> Any:
        """(K, C, bins_y, bins_x) crops, in the memory order of `features`; NaN for a broken box.

        With `directions`, up to two changes of the boxes and like them in shape: the derivative of the crops along
        them.
        """
        with self.on(features):
            features = self._known(features)
            dtype = arrays.output_name(arrays.dtype_name(features))
            output = self._allocate((len(boxes), features.shape[1], *rule.bins), dtype, features, features)
            work = self._work(features, output, boxes, batch_indices, directions, rule)
            tiling = kernels.Tiling.of(rule.bins, features.shape[1], work.types, len(boxes))
            self._launch("forward", len(boxes) * tiling.blocks, work, tiling, output)
            return output

    def feature_gradient(
        self,
        grad_output: Any,
        features: Any,
        boxes: Any,
        batch_indices: Any,
        rule: geometry.Rule,
        directions: Sequence[Any] = (),
    ) -> Any:
        """The gradient to the features, in their memory order; float32 where they are integers.

        With `directions` that of the derivative of the crops along them. A block owns a part of it, and adds the boxes
        that touch that part in their order: the same bits each time.
        """
        with self.on(grad_output):
            dtype = arrays.output_name(arrays.dtype_name(features))
            gradient = self._allocate(tuple(features.shape), dtype, features, grad_output)
            grad = self._readable(grad_output, dtype)
            work = self._work(gradient, grad, boxes, batch_indices, directions, rule)
            tiling = kernels.Tiling.of(tuple(features.shape[2:]), features.shape[1], work.types)
            resolved = self.empty((len(boxes), work.types.resolved), "int64", grad_output)
            self._launch("resolve_boxes", -(-len(boxes) // kernels.THREADS), work, tiling, gradient, resolved)
            self._launch("feature_gradient", features.shape[0] * tiling.blocks, work, tiling, gradient, resolved)
            return gradient

    def box_gradient(
        self,
        grad_output: Any,
        features: Any,
        boxes: Any,
        batch_indices: Any,
        rule: geometry.Rule,
        directions: Sequence[Any] = (),
    ) -> Any:
        """The gradient to the boxes, in their shape; NaN for a broken box, 0 in a batch index column.

        With `directions` that of the derivative of the crops along them.
        """
        with self.on(features):
            features = self._known(features)
            grad = self._readable(grad_output, arrays.dtype_name(features))
            gradient = self.empty(tuple(boxes.shape), kernels.box_name(arrays.dtype_name(boxes)), features)
            work = self._work(features, grad, boxes, batch_indices, directions, rule)
            tiling = kernels.Tiling.of(rule.bins, features.shape[1], work.types, len(boxes))
            shares = self.empty((len(boxes), tiling.blocks, kernels.SUMS), work.types.compute, features)
            self._launch("box_gradient", len(boxes) * tiling.blocks, work, tiling, gradient, shares)
            self._launch("box_gradient_sum", -(-len(boxes) // kernels.BOXES_A_BLOCK), work, tiling, gradient, shares)
            return self.cast(gradient, arrays.dtype_name(boxes))

    def _work(
        self,
        planes: Any,
        crops: Any,
        boxes: Any,
        batch_indices: Any,
        directions: Sequence[Any],
        rule: geometry.Rule,
    ) -> _Work:
        """In the dtypes that kernels read."""
        if checks.wanted():
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
        self, name: str, blocks: int, work: _Work, tiling: kernels.Tiling, result: Any, workspace: Any = None
    ) -> None:
        if blocks == 0:
            return
        views = [*work.views, self.view(result)]
        pointer = 0 if workspace is None else self.place(workspace)[0]
        kernel = kernels.kernel(name, work.types)
        for first in range(0, blocks, MOST_BLOCKS):
            arguments = kernels.arguments(views, work.directions, work.rule, work.types, tiling, pointer, first)
            kernel((min(MOST_BLOCKS, blocks - first),), (kernels.THREADS,), (arguments,))

    def view(self, array: Any) -> kernels.View:
        """What a kernel reads an array as."""
        name = arrays.dtype_name(array)
        return kernels.View(*self.place(array), tuple(array.shape), "uint8" if name == "bool" else name)

    def _known(self, features: Any) -> Any:
        """Features in a dtype that there are kernels for, and that computes the same."""
        name = arrays.dtype_name(features)
        return features if name in (*kernels.CTYPES, "bool") else self.cast(features, "float32")

    def _readable(self, grad_output: Any, features: str) -> Any:
        """The gradient in a dtype that there are kernels for: that of the output, or that which is computed in."""
        if arrays.dtype_name(grad_output) == arrays.output_name(features):
            return grad_output
        return self.cast(grad_output, arrays.compute_name(features))

    def _allocate(self, shape: tuple[int, ...], dtype: str, like: Any, beside: Any) -> Any:
        """An array of (N or K, C, height, width), channels-last in memory where `like` is."""
        if not arrays.is_channels_last(like.shape, arrays.strides(like)):
            return self.empty(shape, dtype, beside)
        count, channels, height, width = shape
        return self.moved(self.empty((count, height, width, channels), dtype, beside), (0, 3, 1, 2))


def types_of(planes: kernels.View, crops: kernels.View, boxes: kernels.View, rule: geometry.Rule) -> kernels.Types:
    """The instantiation for some arrays; one of `kernels.every_types`."""
    large = max(planes.reach, crops.reach) >= kernels.LARGE
    channels_last = arrays.is_channels_last(planes.shape, planes.strides)
    precision = geometry.precision(rule, planes.dtype, boxes.dtype)
    return kernels.Types(planes.dtype, crops.dtype, boxes.dtype, precision, large, channels_last)
