"""A drop-in for ``torchvision.ops``: its `roi_align` and `RoIAlign`, by name, signature and result::

    import cupy_roialign.torchvision as ops

    ops.patch()             # a model of torchvision, detectron2 or your own that calls its roi_align now calls ours
    with ops.patch(): ...   # or for a while

Beyond torchvision's: box gradients, derivatives of any order, float16 and bfloat16 features with float32 boxes, bitwise
reproducible results on a GPU, and safety with broken boxes. torchvision itself is needed by `patch` only.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import torch

from cupy_roialign import torch as crt

__all__ = ["RoIAlign", "patch", "roi_align"]


def roi_align(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """``torchvision.ops.roi_align``: see `cupy_roialign.torch.roi_align`. Wrong boxes raise AssertionError as there."""
    listed = isinstance(boxes, (list, tuple))
    columns = 4 if listed else 5
    for part in boxes if listed else [boxes]:
        shape = tuple(getattr(part, "shape", ()))
        if len(shape) != 2 or shape[1] != columns:
            kind = "a list of tensors (L, 4)" if listed else "a tensor (K, 5), or a list of tensors (L, 4)"
            raise AssertionError(f"boxes must be {kind}; got one of shape {shape}")
    if listed and 0 < len(boxes) < input.shape[0]:  # images without boxes at the end may be left out, as there
        boxes = [*boxes, *[boxes[0][:0]] * (input.shape[0] - len(boxes))]
    return crt.roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)


class RoIAlign(crt.NotScripted):
    """``torchvision.ops.RoIAlign``."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: torch.Tensor, rois: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """(K, C, height, width) averages of (N, C, H, W) features."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned})"
        )


class patch:
    """Puts our `roi_align` where torchvision's is, in every module that has been imported; ``undo`` takes it back.

    Modules of torchvision that call theirs (``MultiScaleRoIAlign``, ``RoIAlign``, the heads of its detection models)
    then call ours, whenever the model was made. A program that was scripted or compiled before is not reached, and
    torch.jit.script does not take ours.

    As a context manager it undoes itself at the end. Of several patches the last to be undone takes ours away.
    """

    _held: ClassVar[set[patch]] = set()
    _theirs: ClassVar[Callable[..., Any] | None] = None

    def __init__(self) -> None:
        self._put()

    def _put(self) -> None:
        import torchvision.ops

        if not patch._held:
            patch._theirs = torchvision.ops.roi_align
            _replace(patch._theirs, _patched)
        patch._held.add(self)

    def undo(self) -> None:
        if self in patch._held:
            patch._held.remove(self)
            if not patch._held:
                _replace(_patched, patch._theirs)  # in modules, too, that were imported in the meantime

    def __enter__(self) -> patch:
        self._put()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


@functools.wraps(roi_align)
def _patched(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """A function of its own, so that it is known from a `roi_align` that someone imported from here.

    Its parameters are named, because mmcv looks among the names in its code for ``aligned``.
    """
    return roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)


def _replace(old: Callable[..., Any] | None, new: Callable[..., Any] | None) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__ != __name__:
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)
