"""Derivatives of the operators on tensors.

Three functions are enough for derivatives of every kind and order, since they are each other's:

    crops(X; b, d..)           the crops of features X with boxes b or, with directions d, their derivative along these
    to_features(g; b, d..)     its transpose in X: the gradient to the features from one, g, to the crops
    to_boxes(g, X; b, d..)     the gradient of <g, crops(X; b, d..)> to the boxes

crops is linear in X and in each direction. A direction v adds itself to the others when the boxes are differentiated:
<v, to_boxes(g, X; b, d..)> = <g, crops(X; b, d.., v)>.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._functorch import unwrap_if_dead
from torch._functorch.autograd_function import VmapInfo, custom_function_call

from cupy_roialign import arrays, tensors
from cupy_roialign.geometry import Rule

Tensors = Sequence[torch.Tensor]


class Family(NamedTuple):
    """The three functions in one of their forms, which differentiates to calls of the same form."""

    crops: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rule, Tensors], torch.Tensor]
    to_features: Callable[[torch.Tensor, arrays.Like, torch.Tensor, torch.Tensor, Rule, Tensors], torch.Tensor]
    to_boxes: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Rule, Tensors], torch.Tensor]

    def crops_backward(
        self,
        needs: Sequence[bool],
        grad: torch.Tensor,
        features: torch.Tensor | None,
        like: arrays.Like,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        directions: Tensors,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients to features, boxes and each direction, where they are needed."""
        needs_features, needs_boxes, *needs_directions = needs
        at = (boxes, batch_indices, rule)
        to_features = self.to_features(grad, like, *at, directions) if needs_features else None
        if features is None:  # was not kept, for nothing below needs it
            return (to_features, *[None] * (len(needs) - 1))
        to_boxes = self.to_boxes(grad, features, *at, directions) if needs_boxes else None
        to_directions = self._to_directions(needs_directions, grad, features, *at, directions)
        return to_features, to_boxes, *to_directions

    def to_features_backward(
        self,
        needs: Sequence[bool],
        cotangent: torch.Tensor,
        grad: torch.Tensor,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        directions: Tensors,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients to grad, boxes and each direction."""
        needs_grad, needs_boxes, *needs_directions = needs
        at = (boxes, batch_indices, _without_constant(rule))
        to_grad = self.crops(cotangent, *at, directions) if needs_grad else None
        to_boxes = self.to_boxes(grad, cotangent, *at, directions) if needs_boxes else None
        return to_grad, to_boxes, *self._to_directions(needs_directions, grad, cotangent, *at, directions)

    def to_boxes_backward(
        self,
        needs: Sequence[bool],
        cotangent: torch.Tensor,
        grad: torch.Tensor,
        features: torch.Tensor,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        directions: Tensors,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients to grad, features, boxes and each direction."""
        needs_grad, needs_features, needs_boxes, *needs_directions = needs
        at, along = (boxes, batch_indices, rule), [*directions, cotangent]
        to_grad = self.crops(features, *at, along) if needs_grad else None
        to_features = self.to_features(grad, like_of(features), *at, along) if needs_features else None
        to_boxes = self.to_boxes(grad, features, *at, along) if needs_boxes else None
        return to_grad, to_features, to_boxes, *self._to_directions(needs_directions, grad, features, *at, along)

    def _to_directions(
        self,
        needs: Sequence[bool],
        grad: torch.Tensor,
        features: torch.Tensor,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        directions: Tensors,
    ) -> list[torch.Tensor | None]:
        """Gradients of <grad, crops(features; boxes, directions)> to the first directions."""
        return [
            self.to_boxes(grad, features, boxes, batch_indices, rule, _without(directions, i)) if needed else None
            for i, needed in enumerate(needs)
        ]


def like_of(features: torch.Tensor) -> arrays.Like:
    return arrays.Like(tuple(features.shape), features.stride(), arrays.dtype_name(features))


def _without(directions: Tensors, i: int) -> list[torch.Tensor]:
    return [*directions[:i], *directions[i + 1 :]]


def _with(directions: Tensors, i: int, other: torch.Tensor) -> list[torch.Tensor]:
    return [*directions[:i], other, *directions[i + 1 :]]


def _without_constant(rule: Rule) -> Rule:
    """The value outside of the image is no part of what is linear in the features."""
    return dataclasses.replace(rule, extrapolation_value=0.0) if rule.extrapolation_value else rule


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return sum(parts[1:], parts[0])


# ---- the form of eager mode and of torch.func ----


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> torch.Tensor:
        """As torch's, but for two things that take as long as a small crop.

        It looks for no defaults, of which there are none, and records no call that is not differentiated.
        """
        output: torch.Tensor
        if torch._C._are_functorch_transforms_active():
            output = custom_function_call(cls, *args)
            return output
        if torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE):
            levels = [_level(arg) for arg in args]
            if any(levels):
                return _apply_batched(cls, args, levels)
        differentiated = torch.autograd.forward_ad._current_level >= 0
        plain = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                arg = unwrap_if_dead(arg)  # of a transform of torch.func that is over
                differentiated |= arg.requires_grad and torch.is_grad_enabled()
            plain.append(arg)
        if not differentiated:
            output = cls.forward(*plain)
            return output
        output = super(torch.autograd.Function, cls).apply(*plain)  # type: ignore[misc]
        return output


class _Crops(_Function):
    @staticmethod
    def forward(
        features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule, *directions: torch.Tensor
    ) -> torch.Tensor:
        return tensors.forward(features, boxes, batch_indices, rule, directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        features, boxes, batch_indices, ctx.rule, *directions = inputs
        ctx.like = like_of(features)
        # The features take part in the gradients to boxes and directions only.
        kept = features if any(ctx.needs_input_grad[1:]) else None
        ctx.save_for_backward(kept, boxes, batch_indices, *directions)
        ctx.save_for_forward(features, boxes, batch_indices, *directions)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, boxes, batch_indices, *directions = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:])
        to_features, to_boxes, *to_directions = _family().crops_backward(
            needs, grad, features, ctx.like, boxes, batch_indices, ctx.rule, directions
        )
        return to_features, to_boxes, None, None, *to_directions

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        features, boxes, batch_indices, *directions = ctx.saved_for_forward
        of_features, of_boxes, _, _, *of_directions = tangents
        at = (boxes, batch_indices, _without_constant(ctx.rule))
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
        batch = _Batch(info.batch_size, in_dims, args)
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
        like: arrays.Like,
        *directions: torch.Tensor,
    ) -> torch.Tensor:
        return tensors.feature_gradient(grad, like, boxes, batch_indices, rule, directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, boxes, batch_indices, ctx.rule, ctx.like, *directions = inputs
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
        at = (ctx.like, boxes, batch_indices, ctx.rule)
        parts = [EAGER.to_features(grad, *at, changed) for changed in _changes(directions, of_boxes, of_directions)]
        if of_grad is not None:
            parts.append(EAGER.to_features(of_grad, *at, directions))
        return _sum(parts)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        grad, boxes, batch_indices, rule, like, *directions = args
        count, channels, *size = like.shape
        if in_dims[1:3] + in_dims[5:] == (None,) * (len(in_dims) - 3):
            stacked = grad.movedim(in_dims[0], 1).flatten(1, 2)
            wide = like._replace(shape=(count, info.batch_size * channels, *size))
            gradient = EAGER.to_features(stacked, wide, boxes, batch_indices, rule, directions)
            return gradient.reshape(count, info.batch_size, channels, *size), 1
        batch = _Batch(info.batch_size, in_dims, args)
        long = like._replace(shape=(info.batch_size * count, channels, *size))
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
        batch = _Batch(info.batch_size, in_dims, args)
        images = 0 if in_dims[1] is None else batch.length(1)
        gradient = EAGER.to_boxes(
            batch.rows(0), batch.images(1), batch.rows(2), batch.indices(3, images), args[4], batch.all_rows(5)
        )
        return batch.apart(gradient, batch.length(2)), 0


EAGER = Family(
    lambda features, boxes, indices, rule, along: _Crops.apply(features, boxes, indices, rule, *along),
    lambda grad, like, boxes, indices, rule, along: _ToFeatures.apply(grad, boxes, indices, rule, like, *along),
    lambda grad, features, boxes, indices, rule, along: _ToBoxes.apply(grad, features, boxes, indices, rule, *along),
)


# torch.autograd's own batching (is_grads_batched=True, vectorize=True) is older than torch.func's, and asks an autograd
# Function for no rule, but hands it batched tensors. The rules are the same.

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
_MOST_LEVELS = 64


def _level(arg: Any) -> int:
    """The innermost level at which a tensor is batched; 0: at none."""
    level = 0
    while level < _MOST_LEVELS and isinstance(arg, torch.Tensor) and torch._C._dispatch_keys(arg).has(_BATCHED):
        level += 1
        # Torch does not tell the level, least of all to the thread of a GPU. But to remove one at which a tensor is not
        # batched is to expand it, and nothing can be expanded to -1.
        with contextlib.suppress(RuntimeError):
            arg = _without_level(arg, level)
    return level


def _without_level(tensor: torch.Tensor, level: int) -> torch.Tensor:
    return torch._remove_batch_dim(tensor, level, -1, 0)


def _apply_batched(function: type[torch.autograd.Function], args: Sequence[Any], levels: Sequence[int]) -> torch.Tensor:
    innermost = max(levels)
    dims = tuple(0 if level == innermost else None for level in levels)
    whole = [arg if dim is None else _without_level(arg, innermost) for arg, dim in zip(args, dims, strict=True)]
    rule: Callable[..., tuple[torch.Tensor, int]] = function.vmap
    output, dim = rule(VmapInfo(len(whole[dims.index(0)]), "error"), dims, *whole)
    # Forward mode takes a batch only where it comes first in memory too.
    return torch._add_batch_dim(output.movedim(dim, 0).contiguous() if dim else output, 0, innermost)


def _family() -> Family:
    """Of a backward: torch.compile may record that of a forward that it has not (compiled autograd)."""
    if torch.compiler.is_compiling():
        from cupy_roialign import ops

        return ops.FAMILY
    return EAGER


def _changes(
    directions: Tensors, of_boxes: torch.Tensor | None, of_directions: Sequence[torch.Tensor | None]
) -> list[list[torch.Tensor]]:
    """Directions, in each of which one is a tangent."""
    changed = [_with(directions, i, tangent) for i, tangent in enumerate(of_directions) if tangent is not None]
    return changed if of_boxes is None else [*changed, [*directions, of_boxes]]


class _Batch:
    """A batch of calls made into one: of more images, and more boxes."""

    def __init__(self, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]):
        self.size, self._dims, self._args = size, in_dims, args

    def length(self, number: int) -> int:
        """Of argument `number`: how many images or rows each call has."""
        tensor, dim = self._args[number], self._dims[number]
        return int(tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1])

    def images(self, number: int) -> torch.Tensor:
        """Argument `number`: (N, ...) if all calls share it, or (B * N, ...)."""
        tensor, dim = self._args[number], self._dims[number]
        return tensor if dim is None else tensor.movedim(dim, 0).flatten(0, 1)

    def rows(self, number: int) -> torch.Tensor:
        """Argument `number`, one row a box: (B * K, ...)."""
        tensor, dim = self._args[number], self._dims[number]
        tensor = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    def all_rows(self, start: int) -> list[torch.Tensor]:
        return [self.rows(number) for number in range(start, len(self._args))]

    def indices(self, number: int, images: int) -> torch.Tensor:
        """Batch indices, where every call has so many images of its own; 0: all calls share them."""
        indices = self.rows(number)
        if indices.dim() == 2:
            indices = indices[:, 0]
        if images == 0:
            return indices
        indices = indices.double() if indices.is_floating_point() else indices.long()
        first = images * torch.arange(self.size, device=indices.device)
        first = first.repeat_interleave(self.length(number), output_size=indices.shape[0])
        # one out of range must not become an image of the next call
        return torch.where((indices > -0.5) & (indices < images - 0.5), indices + first, -1)

    def apart(self, tensor: torch.Tensor, length: int) -> torch.Tensor:
        """(B * length, ...) as (B, length, ...)."""
        return tensor.reshape(self.size, length, *tensor.shape[1:])
