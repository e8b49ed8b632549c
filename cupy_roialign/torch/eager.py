"""The family of derivatives.py in eager mode and under torch.func: as autograd Functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cupy_roialign.arrays import ArraySpec
from cupy_roialign.rule import Rule
from cupy_roialign.torch import batching, graph, private, tensors
from cupy_roialign.torch.batching import Batch
from cupy_roialign.torch.derivatives import Family, Tensors, without_constant


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's, without two steps that each take as long as a small crop.

        It binds no default arguments, since there are none, and records no call that is not differentiated.
        """
        transformed = private.transforms_active()
        if not transformed and private.in_old_vmap():
            levels = [batching.level(arg) for arg in args]
            if any(levels):
                return batching.apply(cls, args, levels)
        if transformed or not private.has_shortcut:
            return super().apply(*args)  # type: ignore[no-untyped-call]
        differentiated = private.in_dual_level()
        plain = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                arg = private.unwrap_if_dead(arg)  # of a transform of torch.func that is over
                differentiated |= arg.requires_grad and torch.is_grad_enabled()
            plain.append(arg)
        if not differentiated:
            return cls.forward(*plain)
        return private.bare_apply(cls, *plain)


class _Crops(_Function):
    @staticmethod
    def forward(
        features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule, *directions: torch.Tensor
    ) -> torch.Tensor:
        return tensors.forward(features, boxes, batch_indices, rule, directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        features, boxes, batch_indices, ctx.rule, *directions = inputs
        ctx.spec = ArraySpec.of(features)
        # The features take part in the gradients to boxes and directions only.
        kept = features if any(ctx.needs_input_grad[1:]) else None
        ctx.save_for_backward(kept, boxes, batch_indices, *directions)
        ctx.save_for_forward(features, boxes, batch_indices, *directions)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, boxes, batch_indices, *directions = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:])
        to_features, to_boxes, *to_directions = _family().crops_backward(
            needs, grad, features, ctx.spec, boxes, batch_indices, ctx.rule, directions
        )
        return to_features, to_boxes, None, None, *to_directions

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        features, boxes, batch_indices, *directions = ctx.saved_for_forward
        of_features, of_boxes, _, _, *of_directions = tangents
        at = (boxes, batch_indices, without_constant(ctx.rule))
        parts = [EAGER.crops(features, *at, changed) for changed in _changes(directions, of_boxes, of_directions)]
        if of_features is not None:
            parts.append(EAGER.crops(of_features, *at, directions))
        return _sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        features, boxes, batch_indices, rule, *directions = args
        if in_dims[1:] == (None,) * (len(in_dims) - 1):
            planes = features.movedim(in_dims[0], 1)
            crops = EAGER.crops(planes.flatten(1, 2), boxes, batch_indices, rule, directions)
            return crops.reshape(crops.shape[0], *planes.shape[1:3], *rule.bins), 1
        batch = Batch(info.batch_size, in_dims, args)
        indices = batch.indices(2, 0 if in_dims[0] is None else batch.length(0))
        crops = EAGER.crops(batch.images(0), batch.rows(1), indices, rule, batch.all_rows(4))
        return batch.apart(crops, batch.length(1)), 0


class _ToFeatures(_Function):
    @staticmethod
    def forward(
        grad: torch.Tensor,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        spec: ArraySpec,
        *directions: torch.Tensor,
    ) -> torch.Tensor:
        return tensors.feature_gradient(grad, spec, boxes, batch_indices, rule, directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, boxes, batch_indices, ctx.rule, ctx.spec, *directions = inputs
        ctx.save_for_backward(grad if any(ctx.needs_input_grad[1:]) else None, boxes, batch_indices, *directions)
        ctx.save_for_forward(grad, boxes, batch_indices, *directions)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, boxes, batch_indices, *directions = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:])
        to_grad, to_boxes, *to_directions = _family().to_features_backward(
            needs, cotangent, grad, boxes, batch_indices, ctx.rule, directions
        )
        return to_grad, to_boxes, None, None, None, *to_directions

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        grad, boxes, batch_indices, *directions = ctx.saved_for_forward
        of_grad, of_boxes, _, _, _, *of_directions = tangents
        at = (ctx.spec, boxes, batch_indices, ctx.rule)
        parts = [EAGER.to_features(grad, *at, changed) for changed in _changes(directions, of_boxes, of_directions)]
        if of_grad is not None:
            parts.append(EAGER.to_features(of_grad, *at, directions))
        return _sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        grad, boxes, batch_indices, rule, spec, *directions = args
        count, channels, *size = spec.shape
        if in_dims[1:3] + in_dims[5:] == (None,) * (len(in_dims) - 3):
            stacked = grad.movedim(in_dims[0], 1).flatten(1, 2)
            wide = spec._replace(shape=(count, info.batch_size * channels, *size))
            gradient = EAGER.to_features(stacked, wide, boxes, batch_indices, rule, directions)
            return gradient.reshape(count, info.batch_size, channels, *size), 1
        batch = Batch(info.batch_size, in_dims, args)
        long = spec._replace(shape=(info.batch_size * count, channels, *size))
        indices = batch.indices(2, count)
        gradient = EAGER.to_features(batch.rows(0), long, batch.rows(1), indices, rule, batch.all_rows(5))
        return batch.apart(gradient, count), 0


class _ToBoxes(_Function):
    @staticmethod
    def forward(
        grad: torch.Tensor,
        features: torch.Tensor,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        *directions: torch.Tensor,
    ) -> torch.Tensor:
        return tensors.box_gradient(grad, features, boxes, batch_indices, rule, directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, features, boxes, batch_indices, ctx.rule, *directions = inputs
        ctx.save_for_backward(grad, features, boxes, batch_indices, *directions)
        ctx.save_for_forward(grad, features, boxes, batch_indices, *directions)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, features, boxes, batch_indices, *directions = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:])
        to_grad, to_features, to_boxes, *to_directions = _family().to_boxes_backward(
            needs, cotangent, grad, features, boxes, batch_indices, ctx.rule, directions
        )
        return to_grad, to_features, to_boxes, None, None, *to_directions

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        grad, features, boxes, batch_indices, *directions = ctx.saved_for_forward
        of_grad, of_features, of_boxes, _, _, *of_directions = tangents
        at = (boxes, batch_indices, ctx.rule)
        changes = _changes(directions, of_boxes, of_directions)
        parts = [EAGER.to_boxes(grad, features, *at, changed) for changed in changes]
        if of_grad is not None:
            parts.append(EAGER.to_boxes(of_grad, features, *at, directions))
        if of_features is not None:
            parts.append(EAGER.to_boxes(grad, of_features, *at, directions))
        return _sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        batch = Batch(info.batch_size, in_dims, args)
        images = 0 if in_dims[1] is None else batch.length(1)
        gradient = EAGER.to_boxes(
            batch.rows(0), batch.images(1), batch.rows(2), batch.indices(3, images), args[4], batch.all_rows(5)
        )
        return batch.apart(gradient, batch.length(2)), 0


EAGER = Family(
    lambda features, boxes, indices, rule, along: _Crops.apply(features, boxes, indices, rule, *along),
    lambda grad, spec, boxes, indices, rule, along: _ToFeatures.apply(grad, boxes, indices, rule, spec, *along),
    lambda grad, features, boxes, indices, rule, along: _ToBoxes.apply(grad, features, boxes, indices, rule, *along),
)


def _family() -> Family:
    """Of a backward: compiled autograd may record one whose forward was not recorded."""
    return graph.FAMILY if torch.compiler.is_compiling() else EAGER


def _changes(
    directions: Tensors, of_boxes: torch.Tensor | None, of_directions: Sequence[torch.Tensor | None]
) -> list[list[torch.Tensor]]:
    """Directions, in each of which one is a tangent."""
    changed = [
        [*directions[:i], tangent, *directions[i + 1 :]]
        for i, tangent in enumerate(of_directions)
        if tangent is not None
    ]
    return changed if of_boxes is None else [*changed, [*directions, of_boxes]]


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return sum(parts[1:], parts[0])
