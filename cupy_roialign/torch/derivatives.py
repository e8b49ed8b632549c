"""The algebra of derivatives, in eager mode and in graphs alike.

Three functions are enough for derivatives of every kind and order, since they are each other's derivatives:

    crops(X; b, d..)           the crops of features X with boxes b or, with directions d, their derivative along these
    to_features(g; b, d..)     its transpose in X: the features' gradient, from the gradient g of the crops
    to_boxes(g, X; b, d..)     the gradient of <g, crops(X; b, d..)> with respect to the boxes

crops is linear in X and in each direction. A direction v adds itself to the others when the boxes are differentiated:
<v, to_boxes(g, X; b, d..)> = <g, crops(X; b, d.., v)>.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cupy_roialign.arrays import ArraySpec
from cupy_roialign.rule import Rule

Tensors = Sequence[torch.Tensor]


class Family(NamedTuple):
    """The three functions in one of their forms, which differentiates to calls of the same form."""

    crops: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rule, Tensors], torch.Tensor]
    to_features: Callable[[torch.Tensor, ArraySpec, torch.Tensor, torch.Tensor, Rule, Tensors], torch.Tensor]
    to_boxes: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Rule, Tensors], torch.Tensor]

    def crops_backward(
        self,
        needs: Sequence[bool],
        grad: torch.Tensor,
        features: torch.Tensor | None,
        spec: ArraySpec,
        boxes: torch.Tensor,
        batch_indices: torch.Tensor,
        rule: Rule,
        directions: Tensors,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients with respect to features, boxes and each direction, where they are needed."""
        needs_features, needs_boxes, *needs_directions = needs
        at = (boxes, batch_indices, rule)
        to_features = self.to_features(grad, spec, *at, directions) if needs_features else None
        if features is None:  # not kept, since nothing below needs it
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
        """Gradients with respect to grad, boxes and each direction."""
        needs_grad, needs_boxes, *needs_directions = needs
        at = (boxes, batch_indices, without_constant(rule))
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
        """Gradients with respect to grad, features, boxes and each direction."""
        needs_grad, needs_features, needs_boxes, *needs_directions = needs
        at, along = (boxes, batch_indices, rule), [*directions, cotangent]
        to_grad = self.crops(features, *at, along) if needs_grad else None
        to_features = self.to_features(grad, ArraySpec.of(features), *at, along) if needs_features else None
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
        """Gradients of <grad, crops(features; boxes, directions)> with respect to the first directions."""
        return [
            self.to_boxes(grad, features, boxes, batch_indices, rule, _without(directions, i)) if needed else None
            for i, needed in enumerate(needs)
        ]


def _without(directions: Tensors, i: int) -> list[torch.Tensor]:
    return [*directions[:i], *directions[i + 1 :]]


def without_constant(rule: Rule) -> Rule:
    """The value outside of the image is no part of what is linear in the features."""
    return rule._replace(extrapolation_value=0.0) if rule.extrapolation_value else rule
