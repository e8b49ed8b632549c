"""`torch.ops.cupy_roialign`: the family of derivatives.py as operators that torch.compile and torch.export know.

Eager mode does not use these: a torch.library operator costs several times as much per call as an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cupy_roialign import arrays, validation
from cupy_roialign.arrays import ArraySpec
from cupy_roialign.rule import Rule
from cupy_roialign.torch import tensors
from cupy_roialign.torch.derivatives import Family

_RULE = (
    "int frame, int taps, int border, int[] bins, int[] columns, float spatial_scale, int sampling_ratio, "
    "bool aligned, float extrapolation_value, int reduce, int channels"
)  # the fields of Rule, in their order
# No directions are None: AOTInductor makes that of an empty list anyway.
_AT = "Tensor boxes, Tensor batch_indices, Tensor[]? directions"
_LIBRARY = torch.library.Library("cupy_roialign", "DEF")
_LIBRARY.define(f"crops(Tensor features, {_AT}, {_RULE}) -> Tensor")
_LIBRARY.define(
    f"to_features(Tensor grad, SymInt[] shape, bool channels_last, ScalarType dtype, {_AT}, {_RULE}) -> Tensor"
)
_LIBRARY.define(f"to_boxes(Tensor grad, Tensor features, {_AT}, {_RULE}) -> Tensor")
_OPS = torch.ops.cupy_roialign


def pack(rule: Rule) -> tuple[Any, ...]:
    """A rule as arguments of an operator."""
    frame, taps, border, bins, columns, *options, reduce, channels = rule
    return int(frame), int(taps), int(border), [*bins], [*columns], *options, int(reduce), int(channels)


def _spec(shape: Sequence[int], channels_last: bool, dtype: torch.dtype) -> ArraySpec:
    count, channels, height, width = shape
    strides = (channels * height * width, height * width, width, 1)
    if channels_last:
        strides = (channels * height * width, 1, channels * width, channels)
    return ArraySpec((count, channels, height, width), strides, str(dtype).removeprefix("torch."))


def _column(indices: torch.Tensor) -> torch.Tensor:
    """Batch indices, of the boxes that have them: see tensors.py."""
    return indices if indices.dim() == 1 else indices.detach().select(1, 0)


def _crops(
    features: torch.Tensor, boxes: torch.Tensor, indices: torch.Tensor, rule: Rule, directions: Sequence[torch.Tensor]
) -> torch.Tensor:
    return _OPS.crops(features, boxes, _column(indices), list(directions) or None, *pack(rule))


def _to_features(
    grad: torch.Tensor,
    spec: ArraySpec,
    boxes: torch.Tensor,
    indices: torch.Tensor,
    rule: Rule,
    directions: Sequence[torch.Tensor],
) -> torch.Tensor:
    last = arrays.is_channels_last(spec.shape, spec.strides)
    dtype, along = getattr(torch, spec.dtype), list(directions) or None
    return _OPS.to_features(grad, spec.shape, last, dtype, boxes, _column(indices), along, *pack(rule))


def _to_boxes(
    grad: torch.Tensor,
    features: torch.Tensor,
    boxes: torch.Tensor,
    indices: torch.Tensor,
    rule: Rule,
    directions: Sequence[torch.Tensor],
) -> torch.Tensor:
    return _OPS.to_boxes(grad, features, boxes, _column(indices), list(directions) or None, *pack(rule))


FAMILY = Family(_crops, _to_features, _to_boxes)


# ---- what they do, and the shapes of it ----


def _checked(
    shape: Sequence[int],
    boxes: torch.Tensor,
    indices: torch.Tensor,
    directions: Sequence[torch.Tensor] | None,
    packed: Sequence[Any],
    features: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
) -> Rule:
    """The rule, of arguments that fit each other as those of the public functions do: backends trust them."""
    if len(shape) != 4 or min(shape[2:]) < 1 or min(shape) < 0:
        raise ValueError(f"shape must be (N, C, H, W) with H >= 1 and W >= 1; got {tuple(shape)}")
    if features is not None:
        validation.features("features", features)
    validation.boxes("boxes", boxes, (4, 5))
    rule = validation.rule(Rule(*packed), boxes.shape[1])
    if tuple(indices.shape) != (len(boxes),) or arrays.dtype_name(indices) not in (*arrays.INTEGERS, *arrays.FLOATS):
        raise ValueError(f"batch_indices must be ({len(boxes)},) numbers; got {_described(indices)}")
    if indices.is_floating_point():
        validation.batch_column("batch_indices", indices, shape[0])
    for direction in directions or ():
        if direction.shape != boxes.shape or arrays.dtype_name(direction) not in arrays.FLOATS:
            raise ValueError(f"directions must be like boxes, {tuple(boxes.shape)}; got {_described(direction)}")
    if grad is not None:
        validation.grad_output("grad", grad, (len(boxes), shape[1], *rule.bins))
    for tensor in (boxes, indices, features, *(directions or ())):
        on = boxes if grad is None else grad
        if tensor is not None and tensor.device != on.device:
            raise ValueError(f"tensors must be on one device; got {on.device} and {tensor.device}")
    return rule


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


@torch.library.register_kernel("cupy_roialign::crops", ["cpu", "cuda"])
def _(features: torch.Tensor, boxes: torch.Tensor, indices: torch.Tensor, along: Any, *packed: Any) -> torch.Tensor:
    rule = _checked(features.shape, boxes, indices, along, packed, features)
    return tensors.forward(features, boxes, indices, rule, along or ())


@torch.library.register_fake("cupy_roialign::crops")
def _(features: torch.Tensor, boxes: torch.Tensor, indices: torch.Tensor, along: Any, *rule: Any) -> torch.Tensor:
    shape = (boxes.shape[0], features.shape[1], *rule[3])
    last = arrays.is_channels_last(features.shape, features.stride())
    return _empty(features, shape, last, features.dtype)


@torch.library.register_kernel("cupy_roialign::to_features", ["cpu", "cuda"])
def _(
    grad: torch.Tensor,
    shape: Any,
    last: bool,
    dtype: torch.dtype,
    boxes: torch.Tensor,
    indices: torch.Tensor,
    along: Any,
    *packed: Any,
) -> torch.Tensor:
    rule = _checked(shape, boxes, indices, along, packed, grad=grad)
    if arrays.TORCH_NAMES.get(dtype) not in arrays.REALS:
        raise TypeError(f"dtype must be real; got {dtype}")
    return tensors.feature_gradient(grad, _spec(shape, last, dtype), boxes, indices, rule, along or ())


@torch.library.register_fake("cupy_roialign::to_features")
def _(
    grad: torch.Tensor,
    shape: Any,
    last: bool,
    dtype: torch.dtype,
    boxes: torch.Tensor,
    indices: torch.Tensor,
    along: Any,
    *rule: Any,
) -> torch.Tensor:
    return _empty(grad, shape, last, dtype)


@torch.library.register_kernel("cupy_roialign::to_boxes", ["cpu", "cuda"])
def _(
    grad: torch.Tensor, features: torch.Tensor, boxes: torch.Tensor, indices: torch.Tensor, along: Any, *packed: Any
) -> torch.Tensor:
    rule = _checked(features.shape, boxes, indices, along, packed, features, grad)
    return tensors.box_gradient(grad, features, boxes, indices, rule, along or ())


@torch.library.register_fake("cupy_roialign::to_boxes")
def _(
    grad: torch.Tensor, features: torch.Tensor, boxes: torch.Tensor, indices: torch.Tensor, along: Any, *rule: Any
) -> torch.Tensor:
    return boxes.new_empty(boxes.shape)


def _empty(beside: torch.Tensor, shape: Sequence[int], channels_last: bool, features: torch.dtype) -> torch.Tensor:
    dtype = features if features.is_floating_point else torch.float32
    if not channels_last:
        return beside.new_empty(shape, dtype=dtype)
    count, channels, height, width = shape
    return beside.new_empty((count, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


# ---- their derivatives ----


def _needs(flags: Sequence[Any], *places: int) -> list[bool]:
    """Of some arguments, and of each direction, which come last."""
    *plain, directions = (flags[place] for place in places)
    return [*plain, *(directions if isinstance(directions, (list, tuple)) else [])]


def _keep_crops(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    features, boxes, indices, along, *rule = inputs
    ctx.rule, ctx.spec = Rule(*rule), ArraySpec.of(features)
    kept = features if any(_needs(ctx.needs_input_grad, 1, 3)) else None
    ctx.save_for_backward(kept, boxes, indices, *(along or ()))


def _crops_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    features, boxes, indices, *along = ctx.saved_tensors
    needs = _needs(ctx.needs_input_grad, 0, 1, 3)
    to_features, to_boxes, *to_along = FAMILY.crops_backward(
        needs, grad, features, ctx.spec, boxes, indices, ctx.rule, along
    )
    return to_features, to_boxes, None, to_along or None, *[None] * len(Rule._fields)


def _keep_to_features(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, _, _, _, boxes, indices, along, *rule = inputs
    ctx.rule = Rule(*rule)
    kept = grad if any(_needs(ctx.needs_input_grad, 4, 6)) else None
    ctx.save_for_backward(kept, boxes, indices, *(along or ()))


def _to_features_backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
    grad, boxes, indices, *along = ctx.saved_tensors
    needs = _needs(ctx.needs_input_grad, 0, 4, 6)
    to_grad, to_boxes, *to_along = FAMILY.to_features_backward(needs, cotangent, grad, boxes, indices, ctx.rule, along)
    return to_grad, None, None, None, to_boxes, None, to_along or None, *[None] * len(Rule._fields)


def _keep_to_boxes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, features, boxes, indices, along, *rule = inputs
    ctx.rule = Rule(*rule)
    ctx.save_for_backward(grad, features, boxes, indices, *(along or ()))


def _to_boxes_backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
    grad, features, boxes, indices, *along = ctx.saved_tensors
    needs = _needs(ctx.needs_input_grad, 0, 1, 2, 4)
    to_grad, to_features, to_boxes, *to_along = FAMILY.to_boxes_backward(
        needs, cotangent, grad, features, boxes, indices, ctx.rule, along
    )
    return to_grad, to_features, to_boxes, None, to_along or None, *[None] * len(Rule._fields)


torch.library.register_autograd("cupy_roialign::crops", _crops_backward, setup_context=_keep_crops)
torch.library.register_autograd("cupy_roialign::to_features", _to_features_backward, setup_context=_keep_to_features)
torch.library.register_autograd("cupy_roialign::to_boxes", _to_boxes_backward, setup_context=_keep_to_boxes)
