"""Export to ONNX, where RoiAlign can express ``roi_align``, ``roi_crop`` and ``crop_and_resize``::

    program = torch.onnx.export(
        model, args, dynamo=True, custom_translation_table=cupy_roialign.onnx.translations()
    )

The exported model runs without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cupy_roialign.rule import Frame, Rule, Taps
from cupy_roialign.torch import graph  # noqa: F401  (registers the operators)

_FLOAT, _INT64, _DOUBLE = 1, 7, 11  # of ONNX's TensorProto.DataType


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``, opset 18 or newer; needs onnxscript.

    ``roi_align`` becomes one RoiAlign (``half_pixel`` if aligned, else ``output_half_pixel``). The others become a
    RoiAlign with one sample per bin, at the same positions within rounding, and a Where that sets the value outside of
    the image, since ONNX's own border rule is another. ``crop_and_resize`` by nearest neighbor raises
    NotImplementedError, since RoiAlign has no such mode.
    """
    import onnxscript

    op: Any = onnxscript.opset18

    def along(boxes: Any, size: Any, axis: int, rule: Rule) -> tuple[Any, ...]:
        """On one axis of crops: (K, 1) the edges of RoiAlign's box, and (K, bins) whether a sample is inside."""
        bins = rule.bins[axis]
        low, high = (op.Gather(boxes, op.Constant(value_ints=[rule.columns[axis + end]]), axis=1) for end in (0, 2))
        one, half = op.CastLike(op.Constant(value_float=1.0), boxes), op.CastLike(op.Constant(value_float=0.5), boxes)
        count = op.CastLike(op.Constant(value_float=float(bins)), boxes)
        last = op.Sub(op.CastLike(size, boxes), one)
        if rule.frame == Frame.NORMALIZED:
            low, high = op.Mul(low, last), op.Mul(high, last)
        elif rule.frame == Frame.CENTERS:
            spacing = op.Div(op.Sub(high, low), count)
            low = op.Sub(op.Add(low, op.Mul(spacing, half)), half)
            high = op.Add(low, op.Mul(spacing, op.Sub(count, one)))
        if bins > 1:
            start, step = low, op.Div(op.Sub(high, low), op.Sub(count, one))
        else:
            start = op.Mul(op.Add(low, high), half)
            step = op.Sub(start, start)
        numbers = op.CastLike(op.Constant(value_floats=[float(p) for p in range(bins)]), boxes)
        positions = op.Add(start, op.Mul(step, numbers))
        zero = op.Sub(one, one)
        inside = op.And(op.GreaterOrEqual(positions, zero), op.LessOrEqual(positions, last))
        edge = op.Add(op.Sub(start, op.Mul(step, half)), half)
        return edge, op.Add(edge, op.Mul(step, count)), inside

    def in_dtype_of(crops: Any, features: Any) -> Any:
        """Floats come out as they came in, integers as float32."""
        return op.CastLike(crops, features) if features.dtype.is_floating_point() else op.Cast(crops, to=_FLOAT)

    def crops(
        features: Any,
        boxes: Any,
        batch_indices: Any,
        directions: Sequence[Any],
        *packed: Any,
    ) -> Any:
        rule = Rule(*packed)
        if rule.taps == Taps.NEAREST:
            raise NotImplementedError("ONNX's RoiAlign cannot take the nearest pixel: use method='bilinear' for export")
        if directions:
            raise NotImplementedError("derivatives of crops cannot be exported to ONNX")
        if batch_indices.dtype.is_floating_point():  # a column of the boxes
            batch_indices = op.Round(batch_indices)
        indices = op.Cast(batch_indices, to=_INT64)
        # As in eager mode: positions in float32, or float64 where boxes or features are; sums so for the features.
        is_double = [array.dtype == _DOUBLE for array in (features, boxes)]
        wide = is_double[1] or (is_double[0] and rule.frame != Frame.NORMALIZED)
        boxes = op.Cast(boxes, to=_DOUBLE if wide else _FLOAT)
        stored = features
        features = op.Cast(features, to=_DOUBLE if wide or is_double[0] else _FLOAT)
        size = op.Shape(features)
        options = {"output_height": rule.bins[0], "output_width": rule.bins[1], "mode": "avg"}
        if rule.frame == Frame.SCALED:
            order = [rule.columns[i] for i in (1, 0, 3, 2)]
            rois = op.CastLike(op.Gather(boxes, op.Constant(value_ints=order), axis=1), features)
            averages = op.RoiAlign(
                features,
                rois,
                indices,
                coordinate_transformation_mode="half_pixel" if rule.aligned else "output_half_pixel",
                sampling_ratio=rule.sampling_ratio,
                spatial_scale=rule.spatial_scale,
                **options,
            )
            return in_dtype_of(averages, stored)
        y = along(boxes, op.Gather(size, op.Constant(value_ints=[2])), 0, rule)
        x = along(boxes, op.Gather(size, op.Constant(value_ints=[3])), 1, rule)
        rois = op.CastLike(op.Concat(x[0], y[0], x[1], y[1], axis=1), features)
        made = op.RoiAlign(
            features,
            rois,
            indices,
            coordinate_transformation_mode="half_pixel",
            sampling_ratio=1,
            spatial_scale=1.0,
            **options,
        )
        rows, places = (op.Unsqueeze(a, op.Constant(value_ints=axes)) for a, axes in ((y[2], [1, 3]), (x[2], [1, 2])))
        inside = op.And(rows, places)
        value = op.CastLike(op.Constant(value_float=rule.extrapolation_value), features)
        return in_dtype_of(op.Where(inside, made, value), stored)

    return {torch.ops.cupy_roialign.crops.default: crops}
