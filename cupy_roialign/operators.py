"""The public functions: docstring, check, rule, backend."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from cupy_roialign import arrays, dispatch, rule, validation
from cupy_roialign.adapters import Adapter

Array = TypeVar("Array")
Numbers = Sequence[Any]
"""Nested lists or tuples of Python numbers."""


def crop_and_resize(
    image: Array,
    boxes: Array | Numbers,
    box_indices: Array | Sequence[int] | int,
    crop_size: int | Sequence[int],
    method: str = "bilinear",
    extrapolation_value: float = 0.0,
) -> Array:
    """Cut boxes out of images and resize them to one size, corner to corner.

    Equivalent to ``tf.image.crop_and_resize`` and to RoIAlign.pytorch's ``CropAndResize``. Images are (N, C, H, W)
    by the order of their axes, whatever their order in memory: of a (N, H, W, C) array x pass
    ``x.transpose(0, 3, 1, 2)``, of a tensor ``x.permute(0, 3, 1, 2)``. That is a view; it is not copied, and the crops
    are channels-last in memory as well.

    Box coordinates are normalized by the image's side less one pixel: 0 is the center of the first pixel and 1 the
    center of the last. With H = 11 and a crop of height 3, the box y1 = 0.1, y2 = 0.5 samples rows 1, 3 and 5. A crop
    of height 1 samples the middle of its box. A flipped box (y1 > y2) gives a flipped crop.

    Args:
        image: (N, C, H, W); float16, bfloat16, float32, float64, integer or bool.
        boxes: (K, 4) of ``y1, x1, y2, x2``, float32 or float64; positions of 16-bit boxes are computed in float32. A
            list of K rows of numbers is taken as well; it becomes an array of the image's library on the image's
            device, float64 if the image is and otherwise float32.
        box_indices: (K,) integers in [0, N), as an array or a list: the image of each box. An int puts all boxes on
            that image.
        crop_size: (height, width) of the crops, or an int for both.
        method: ``"bilinear"``, or ``"nearest"``: the pixel nearest to a sample, the one below or right of a tie.
        extrapolation_value: the value of samples outside of the image.

    Returns:
        (K, C, height, width) crops in the image's dtype (float32 for integers and bool), channels-last in memory if the
        image is. The crop of a box with a non-finite coordinate is NaN.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, dtype, shape or value.
        IndexError: a box index is outside of [0, N); the message names the first such box.

    Gradients (``vjp``, autograd) are those of the crops as computed. With respect to the boxes of ``"nearest"`` the
    gradient is 0, the true derivative; TensorFlow returns that of bilinear interpolation. Bilinear interpolation has a
    kink where a sample sits on a pixel center: such a sample adds 0 along that axis, as in TensorFlow. The jump as a
    sample leaves the image is not reflected in the gradient.

    >>> import numpy as np, cupy_roialign as cr
    >>> image = np.arange(121, dtype=np.float32).reshape(1, 1, 11, 11)
    >>> boxes = np.array([[0.1, 0.0, 0.5, 1.0]], np.float32)
    >>> cr.crop_and_resize(image, boxes, np.array([0]), 3)[0, 0]
    array([[11., 16., 21.],
           [33., 38., 43.],
           [55., 60., 65.]], dtype=float32)
    """
    adapter, request, _ = _crop_and_resize(image, boxes, box_indices, crop_size, method, extrapolation_value)
    return adapter.forward(request)


def _crop_and_resize(
    image: Any,
    boxes: Any,
    box_indices: Any,
    crop_size: Any,
    method: Any,
    extrapolation_value: Any,
    names: Names = ("image", "boxes", "box_indices"),
    kept: bool = False,
) -> Call:
    adapter, image, boxes, box_indices = _arguments(image, boxes, box_indices, names, kept)
    bins = validation.size("crop_size", crop_size)
    nearest = validation.method("method", method) == "nearest"
    value = validation.number("extrapolation_value", extrapolation_value)
    what = rule.crop_and_resize(bins, nearest, value)
    return Call(adapter, rule.Request(image, boxes, box_indices, what))


def roi_crop(
    features: Array,
    boxes: Array | Numbers,
    box_indices: Array | Sequence[int] | int,
    crop_size: int | Sequence[int],
    extrapolation_value: float = 0.0,
    transform_fpcoor: bool = True,
) -> Array:
    """Crop boxes given in pixels, one bilinear sample for each output pixel.

    Equivalent to RoIAlign.pytorch's ``RoIAlign``. With ``transform_fpcoor`` a box covers pixels from edge to edge,
    pixel 0 reaching from 0 to 1, and each of its bins is sampled at its center: for x1 = 2, x2 = 8 and a crop of
    width 3 these are 3, 5 and 7, which are columns 2.5, 4.5 and 6.5 counted between pixel centers. Without it a box
    reaches from pixel center to pixel center, and is sampled corner to corner: columns 2, 5 and 8.

    Args:
        features: (N, C, H, W); float16, bfloat16, float32, float64, integer or bool.
        boxes: (K, 4) of ``x1, y1, x2, y2`` in pixels of the features, float32 or float64; positions of 16-bit boxes
            are computed in float32. A list of K rows of numbers is taken as well; it becomes an array of the features'
            library on the features' device, float64 if the features are and otherwise float32.
        box_indices: (K,) integers in [0, N), as an array or a list: the image of each box. An int puts all boxes on
            that image.
        crop_size: (height, width) of the crops, or an int for both.
        extrapolation_value: the value of samples outside of the image, that is beyond its outermost pixel centers.
        transform_fpcoor: sample the centers of bins rather than corner to corner.

    Returns:
        (K, C, height, width) crops in the features' dtype (float32 for integers and bool), channels-last in memory if
        they are. The crop of a box with a non-finite coordinate is NaN.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, dtype, shape or value.
        IndexError: a box index is outside of [0, N); the message names the first such box.

    Gradients (``vjp``, autograd) are those of the crops as computed. Where a sample sits on a pixel center, a kink of
    the interpolation, the slope toward larger coordinates is taken, and at the last pixel the slope toward smaller
    ones. The jump as a sample leaves the image is not reflected in the gradient.

    >>> import numpy as np, cupy_roialign as cr
    >>> columns = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))
    >>> boxes = np.array([[2, 2, 8, 8]], np.float32)
    >>> cr.roi_crop(columns, boxes, np.array([0]), 3)[0, 0, 0]
    array([2.5, 4.5, 6.5], dtype=float32)
    >>> cr.roi_crop(columns, boxes, np.array([0]), 3, transform_fpcoor=False)[0, 0, 0]
    array([2., 5., 8.], dtype=float32)
    """
    adapter, request, _ = _roi_crop(features, boxes, box_indices, crop_size, extrapolation_value, transform_fpcoor)
    return adapter.forward(request)


def _roi_crop(
    features: Any,
    boxes: Any,
    box_indices: Any,
    crop_size: Any,
    extrapolation_value: Any,
    transform_fpcoor: Any,
    names: Names = ("features", "boxes", "box_indices"),
    kept: bool = False,
) -> Call:
    adapter, features, boxes, box_indices = _arguments(features, boxes, box_indices, names, kept)
    bins = validation.size("crop_size", crop_size)
    centers = validation.flag("transform_fpcoor", transform_fpcoor)
    value = validation.number("extrapolation_value", extrapolation_value)
    return Call(adapter, rule.Request(features, boxes, box_indices, rule.roi_crop(bins, centers, value)))


def roi_align(
    features: Array,
    boxes: Array | Sequence[Array] | Numbers,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    batch_indices: Array | Sequence[int] | int | None = None,
) -> Array:
    """Average bilinear samples in each bin of a box (Mask R-CNN, https://arxiv.org/abs/1703.06870).

    Equivalent to ``torchvision.ops.roi_align``, detectron2's ``ROIAlign``, and ONNX ``RoiAlign`` with mode ``avg``
    (``half_pixel`` is aligned=True, ``output_half_pixel`` aligned=False).

    A box is scaled by ``spatial_scale`` and divided into bins; each bin takes ``sampling_ratio`` samples along
    each axis, evenly spaced. With ``aligned`` pixel 0 reaches from 0 to 1 and has its center at 0.5: for
    x1 = 2, x2 = 8, scale 1 and three bins of one sample, the samples lie at 3, 5 and 7, which are columns 2.5, 4.5
    and 6.5 counted between pixel centers. Without it (the original, half a pixel off) these are columns 3, 5 and
    7, and a box is at least one pixel wide and high.

    Args:
        features: (N, C, H, W); float16, bfloat16, float32, float64, integer or bool.
        boxes: ``x1, y1, x2, y2`` in pixels of the image, before scaling; float32 or float64 (positions of 16-bit
            boxes are computed in float32). One of
            (K, 5), with the batch index in the first column;
            a list of N arrays (L_i, 4), the boxes of each image;
            (K, 4), with ``batch_indices``.
            In place of an array a list of rows of numbers is taken; it becomes an array of the features' library on
            the features' device, float64 if the features are and otherwise float32. So a list of rows is one array,
            and a list of arrays, of lists of rows, or of empty lists has one entry for each image. ``[]`` is no
            images or, with ``batch_indices``, no boxes.
        output_size: (height, width) in bins, or an int for both.
        spatial_scale: size of the features over that of the image, 1/16 for a stride of 16.
        sampling_ratio: samples per bin along each axis, at most 4096; 0 or negative: as many as a bin has pixels,
            rounded up (at most 2**23; 2**52 where boxes or features are float64).
        aligned: whether pixel coordinates are shifted by half a pixel, as they should be.
        batch_indices: (K,) integers in [0, N), as an array or a list: the image of each of (K, 4) boxes. An int puts
            all boxes on that image.

    Returns:
        (K, C, height, width) averages in the features' dtype (float32 for integers and bool), channels-last in memory
        if they are. A sample more than one pixel outside of the outermost pixel centers counts as 0; nearer ones take
        the value at the border. The averages of a box with a non-finite coordinate are NaN.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, dtype, shape or value.
        IndexError: a batch index is not a whole number in [0, N), or in a column of boxes is off one by more than
            1/64; the message names the first such box.

    Gradients (``vjp``, autograd) are those of the averages as computed, with the number of samples held fixed. Where a
    sample sits on a pixel center the slope toward larger coordinates is taken; in the band around the image, and
    where a box is widened to one pixel, the slope is 0. The gradient with respect to (K, 5) boxes has zeros in its
    first column; that of a list with an entry for each image is such a list.

    >>> import numpy as np, cupy_roialign as cr
    >>> columns = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))
    >>> boxes = np.array([[0, 2, 2, 8, 8]], np.float32)
    >>> cr.roi_align(columns, boxes, 3, sampling_ratio=1, aligned=True)[0, 0, 0]
    array([2.5, 4.5, 6.5], dtype=float32)
    >>> cr.roi_align(columns, boxes, 3, sampling_ratio=1)[0, 0, 0]
    array([3., 5., 7.], dtype=float32)
    """
    adapter, request, _ = _roi_align(
        features, boxes, output_size, spatial_scale, sampling_ratio, aligned, batch_indices
    )
    return adapter.forward(request)


def _roi_align(
    features: Any,
    boxes: Any,
    output_size: Any,
    spatial_scale: Any,
    sampling_ratio: Any,
    aligned: Any,
    batch_indices: Any,
    names: Names = ("features", "boxes", "batch_indices"),
    kept: bool = False,
) -> Call:
    of_features, of_boxes, of_indices = names
    listed = isinstance(boxes, (list, tuple)) and _is_by_image(boxes, batch_indices)
    named = {f"{of_boxes}[{i}]": part for i, part in enumerate(boxes)} if listed else {of_boxes: boxes}
    indexed = {} if batch_indices is None else {of_indices: batch_indices}
    adapter, (features, *parts) = dispatch.adapter(kept, (of_features, features), **named, **indexed)
    batch_indices = parts.pop() if indexed else None
    validation.features(of_features, features)
    images = features.shape[0]
    widths = (4,) if listed else (4, 5)
    parts = [_boxes(adapter, name, part, features, widths) for name, part in zip(named, parts, strict=True)]
    columns, counts = rule.X1_Y1_X2_Y2, None
    if listed:
        if indexed:
            raise ValueError(f"{of_indices} must not be given with a list of {of_boxes}, whose order tells the images")
        if len(parts) != images:
            raise ValueError(
                f"{of_boxes} must be a list of N = {images} arrays, one for each image of {of_features}; "
                f"got {len(parts)}"
            )
        counts = [part.shape[0] for part in parts]
        boxes, batch_indices = adapter.join(parts or [_boxes(adapter, of_boxes, [], features, (4,))], features)
    elif (boxes := parts[0]).shape[1] == 5:
        if indexed:
            raise ValueError(f"{of_indices} must not be given with (K, 5) {of_boxes}, whose first column holds them")
        columns, batch_indices = rule.BATCH_X1_Y1_X2_Y2, adapter.column(of_boxes, boxes, images)
    elif batch_indices is None:
        raise ValueError(
            f"{of_boxes} of shape {tuple(boxes.shape)} need {of_indices}, a (K,) integer array with the image of each "
            f"box, or an int for all; or pass (K, 5) boxes with the batch index first, or a list with one (L_i, 4) "
            f"array for each image"
        )
    else:
        batch_indices = _indices(adapter, of_indices, batch_indices, of_boxes, boxes.shape[0], features)
    what = rule.roi_align(
        validation.size("output_size", output_size),
        validation.spatial_scale("spatial_scale", spatial_scale),
        validation.sampling_ratio("sampling_ratio", sampling_ratio),
        validation.flag("aligned", aligned),
        columns,
    )
    return Call(adapter, rule.Request(features, boxes, batch_indices, what), counts)


def vjp(operator: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """The output of an operator, and the pullback from the output's gradient to feature and box gradients.

    Args:
        operator: ``crop_and_resize``, ``roi_crop`` or ``roi_align``.
        *args: its arguments by position.
        **kwargs: its arguments by name.

    Returns:
        ``output, pullback``. ``pullback(grad_output)``, with the gradient of a loss with respect to the output in the
        output's shape, returns ``(grad_features, grad_boxes)``: the first like the features (float32 for integers and
        bool), the second like the boxes; a list, of the boxes' common dtype, if they came as one entry for each image.
        A box with a non-finite coordinate adds nothing to the first and has NaN in the second. The pullback can be
        called any number of times; it reads the arrays that the operator was called with. It is no part of an autograd
        graph.

    >>> import numpy as np, cupy_roialign as cr
    >>> features = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))
    >>> boxes = np.array([[0, 2, 2, 8, 8]], np.float32)
    >>> output, pullback = cr.vjp(cr.roi_align, features, boxes, 3, sampling_ratio=1, aligned=True)
    >>> grad_features, grad_boxes = pullback(np.ones_like(output))
    >>> grad_boxes  # the columns hold their own number: moving x1 or x2 moves the nine values by half as much
    array([[0. , 4.5, 0. , 4.5, 0. ]], dtype=float32)
    """
    if not any(operator is known for known in _CALLS):
        names = ", ".join(known.__name__ for known in _CALLS)
        got = getattr(operator, "__qualname__", type(operator).__name__)
        got = f"{getattr(operator, '__module__', '')}.{got}"
        raise TypeError(
            f"operator must be one of {names} of this package; got {got}; pass the operator itself, and its arguments "
            f"behind it: vjp(roi_align, features, boxes, ...)"
        )
    bound = inspect.signature(operator).bind(*args, **kwargs)
    bound.apply_defaults()
    adapter, request, counts = _CALLS[operator](*bound.arguments.values(), kept=True)
    name, features = next(iter(bound.arguments.items()))
    output, pull = adapter.vjp(request)

    def pullback(grad_output: Any) -> tuple[Any, Any]:
        dispatch.together({name: features, "grad_output": grad_output})
        validation.grad_output("grad_output", grad_output, tuple(output.shape))
        grad_features, grad_boxes = pull(grad_output)
        if counts is None:
            return grad_features, grad_boxes
        ends = itertools.accumulate(counts, initial=0)
        return grad_features, [grad_boxes[a:b, :] for a, b in itertools.pairwise(ends)]

    return output, pullback


# ---- what the operators have in common ----

Names = tuple[str, str, str]
"""What a caller knows features, boxes and batch indices as, for errors."""


class Call(NamedTuple):
    """A checked call, and who computes it."""

    adapter: Adapter
    request: rule.Request
    counts: list[int] | None = None  # of the boxes of each image, if they came as a list of these


def named(operator: Callable[..., Any], names: Names, *args: Any) -> Any:
    """An operator on all of its arguments, of which the arrays have other names in errors."""
    adapter, request, _ = _CALLS[operator](*args, names=names)
    return adapter.forward(request)


_CALLS: dict[Callable[..., Any], Callable[..., Call]] = {
    crop_and_resize: _crop_and_resize,
    roi_crop: _roi_crop,
    roi_align: _roi_align,
}


def _arguments(features: Any, boxes: Any, indices: Any, names: Names, kept: bool) -> tuple[Adapter, Any, Any, Any]:
    """The adapter; features, (K, 4) boxes and (K,) batch indices, checked."""
    first, second, third = names
    adapter, (features, boxes, indices) = dispatch.adapter(kept, (first, features), **{second: boxes, third: indices})
    validation.features(first, features)
    boxes = _boxes(adapter, second, boxes, features, (4,))
    return adapter, features, boxes, _indices(adapter, third, indices, second, boxes.shape[0], features)


def _is_by_image(boxes: Sequence[Any], batch_indices: Any) -> bool:
    """Whether a list has an entry for each image, rather than for each box: a row of numbers."""
    if not boxes:
        return batch_indices is None
    return not all(
        validation.is_real(part)
        or (isinstance(part, (list, tuple)) and part and not isinstance(part[0], (list, tuple)))
        for part in boxes
    )


def _boxes(adapter: Adapter, name: str, boxes: Any, features: Any, columns: tuple[int, ...]) -> Any:
    """(K, columns) boxes, from an array or a list of rows."""
    if not isinstance(boxes, dispatch.NUMBERS):
        validation.boxes(name, boxes, columns)
        return boxes
    if not isinstance(boxes, (list, tuple)):
        raise dispatch.not_an_array(name, boxes)
    real = "float64" if arrays.dtype_name(features) == "float64" else "float32"
    return adapter.array(*validation.rows(name, boxes, columns), real, features)


def _indices(adapter: Adapter, name: str, indices: Any, boxes_name: str, count: int, features: Any) -> Any:
    """(K,) batch indices, from an array, a list of ints, or an int for all boxes."""
    if not isinstance(indices, dispatch.NUMBERS):
        validation.batch_indices(name, indices, boxes_name, count)
        return indices
    images = features.shape[0]
    if isinstance(indices, (list, tuple)):
        numbers = validation.listed_indices(name, indices, boxes_name, count, images)
        return adapter.array(numbers, (count,), "int64", features)
    return adapter.full(count, validation.listed_index(name, indices, images), features)
