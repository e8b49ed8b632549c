"""The GPU: an operator and its two gradients, for arrays of any library that lie in a GPU's memory.

A subclass provides what differs between libraries (CuPy, PyTorch). Work is launched on the device of the arrays and on
the library's current stream there. Nothing synchronizes with the GPU unless `checked` asks for it. Shapes and dtypes
have been checked (validation.py).
"""

from __future__ import annotations

import abc
import contextlib
import functools
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


class Plan(NamedTuple):
    """What the launches of a call have in common, but for where the arrays are."""

    types: kernels.Types
    tiling: Tiling
    zones: Zones
    template: bytes


class _Work(NamedTuple):
    """A call's plan, and the arrays: converted ones must live until the kernels are launched."""

    plan: Plan
    rule: Rule
    arrays: Sequence[Any]  # features or their gradient, crops or their gradient, boxes, batch indices, directions
    pointers: Sequence[int]  # of these


class GpuBackend(abc.ABC):
    """The functions of cpu/backend.py, with the same signatures."""

    # ---- a library's arrays ----

    strides_in_bytes: bool  # those of `layout`; otherwise in elements

    @abc.abstractmethod
    def on(self, array: Any) -> contextlib.AbstractContextManager[object]:
        """Within it, launches go to the array's device and the library's current stream there."""

    @abc.abstractmethod
    def layout(self, array: Any) -> tuple[int, tuple[int, ...]]:
        """The address of the first element, and the strides: see `strides_in_bytes`."""

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
            output = self._allocate((boxes.shape[0], features.shape[1], *rule.bins), dtype, features, features)
            work = self._work(features, output, boxes, batch_indices, directions, rule)
            tiling = work.plan.tiling
            name = "forward_along" if directions else "forward"
            self._launch(name, boxes.shape[0] * tiling.blocks, work, output, threads=tiling.threads)
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
            work = self._work(gradient, grad, boxes, batch_indices, directions, rule, by_image=True)
            types, tiling, zones, _ = work.plan
            count = boxes.shape[0]
            nbytes = count * types.box_bytes + zones.bytes(count)
            resolved = self.empty((-(-nbytes // 8),), "int64", grad_output)  # aligned for 8 bytes
            self._launch("resolve_boxes", -(-count // kernels.BOXES_PER_WORD), work, gradient, resolved)
            self._launch("feature_gradient", features.shape[0] * tiling.blocks, work, gradient, resolved)
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
            tiling, count = work.plan.tiling, boxes.shape[0]
            sums = self.empty((count, tiling.blocks, kernels.SUMS), work.plan.types.compute, features)
            self._launch("box_gradient", count * tiling.blocks, work, gradient, sums, threads=tiling.threads)
            self._launch("box_gradient_sum", -(-count // kernels.BOXES_PER_BLOCK), work, gradient, sums)
            return self.cast(gradient, arrays.dtype_name(boxes))

    def _work(
        self,
        planes: Any,
        crops: Any,
        boxes: Any,
        batch_indices: Any,
        directions: Sequence[Any],
        rule: Rule,
        by_image: bool = False,
    ) -> _Work:
        """The arrays in dtypes that kernels read, and the plan for them."""
        if index_checks.wanted():
            validation.whole_indices(self.host(batch_indices), planes.shape[0])
        box_dtype = kernels.box_name(arrays.dtype_name(boxes))
        if arrays.dtype_name(batch_indices) in arrays.FLOATS:
            batch_indices = self.cast(batch_indices, box_dtype)
        boxes, *directions = (self.cast(rows, box_dtype) for rows in (boxes, *directions))
        given, pointers, layouts = (planes, crops, boxes, batch_indices, *directions), [], []
        for array in given:
            pointer, strides = self.layout(array)
            pointers.append(pointer)
            layouts.append((pointer % arguments.ALIGNMENT, strides, array.shape, array.dtype))
        found = plan(self, tuple(layouts), rule.frame, None if by_image else rule.bins)
        return _Work(found, rule, given, pointers)

    def _launch(
        self,
        name: str,
        blocks: int,
        work: _Work,
        result: Any,
        workspace: Any = None,
        threads: int = kernels.THREADS,
    ) -> None:
        if blocks == 0:
            return
        of_workspace = 0 if workspace is None else self.layout(workspace)[0]
        pointers = (*work.pointers[:4], self.layout(result)[0], of_workspace, *work.pointers[4:])
        kernel = kernels.kernel(name, work.plan.types)
        for first in range(0, blocks, MOST_BLOCKS):
            packed = arguments.fill(work.plan.template, pointers, work.rule, first)
            kernel((min(MOST_BLOCKS, blocks - first),), (threads,), (packed,))

    def view(self, pointer: int, strides: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> arguments.View:
        """An array as a kernel sees it."""
        name = arrays.name_of(dtype)
        unit = dtype.itemsize if self.strides_in_bytes else 1
        steps = tuple([stride // unit for stride in strides])
        return arguments.View(pointer, steps, tuple(shape), "uint8" if name == "bool" else name)

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
        if not _is_channels_last(tuple(like.shape), tuple(arrays.strides(like))):
            return self.empty(shape, dtype, beside)
        count, channels, height, width = shape
        return self.moved(self.empty((count, height, width, channels), dtype, beside), (0, 3, 1, 2))


_is_channels_last = functools.lru_cache(maxsize=1024)(arrays.is_channels_last)


@functools.lru_cache(maxsize=1024)
def plan(backend: GpuBackend, layouts: tuple[tuple[Any, ...], ...], frame: int, bins: tuple[int, int] | None) -> Plan:
    """For arrays of some layouts: their pointers' alignment, strides, shape and dtype. See `_Work.arrays`.

    Blocks share the bins of boxes or, of None, the pixels of images. The rule itself is no key of the cache: 0.0 and
    -0.0 are equal.
    """
    planes, crops, boxes, indices, *directions = (backend.view(*layout) for layout in layouts)
    types = types_of(planes, crops, boxes, frame, bins or (1, 1))
    (images, channels, *size), zones = planes.shape, Zones()
    if bins:
        tiling = Tiling.of(bins, channels, types, boxes.shape[0], types.most_bins)
    else:
        tiling = Tiling.of(tuple(size), channels, types, images, kernels.MOST_PIXELS)
        zones = Zones.of(images, tuple(size), tiling.tile)
    template = arguments.template((planes, crops, boxes, indices), directions, types, tiling, zones)
    return Plan(types, tiling, zones, template)


def types_of(
    planes: arguments.View, crops: arguments.View, boxes: arguments.View, frame: int, bins: tuple[int, int]
) -> kernels.Types:
    """The types for some arrays; one of `kernels.every_types`."""
    large = max(planes.last_offset, crops.last_offset) >= LARGE
    channels_last = _is_channels_last(planes.shape, planes.strides)
    precision = geometry.precision(frame, planes.dtype, boxes.dtype)
    lanes = kernels.lanes_of(planes.dtype, planes.shape[1])
    most_bins = kernels.most_bins_of(lanes, planes.dtype, bins)
    return kernels.Types(planes.dtype, crops.dtype, boxes.dtype, precision, large, channels_last, lanes, most_bins)
