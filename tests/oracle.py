"""The operators once more, as plain loops over single samples. Shares no code with the package.

Positions are computed in the given precision, by scalars, in the order of operations of the dialect's peer;
everything else is in Python floats (float64). Each sample is worked out with its four taps, whether its axes are
separable or not.
"""

import math

import numpy as np


def positions(op, low, high, size, bins, real, sampling_ratio=1, spatial_scale=1.0, aligned=False):
    """One axis of one box: [bin][sample] -> (position, d position/d low, d position/d high)."""
    low, high, one, half = real(low), real(high), real(1), real(0.5)
    table = []
    if op == "roi_align":
        scale = real(spatial_scale)
        offset = half if aligned else real(0)
        start = low * scale - offset
        extent = (high * scale - offset) - start
        widened = not aligned and extent < one
        if widened:
            extent = one
        step = extent / real(bins)
        count = sampling_ratio if sampling_ratio > 0 else max(math.ceil(step), 0)
        slope = 0.0 if widened else float(scale)
        for p in range(bins):
            row = []
            for i in range(count):
                position = (start + real(p) * step) + ((real(i) + half) * step) / real(count)
                share = (p + (i + 0.5) / count) / bins
                row.append((position, float(scale) - slope * share, slope * share))
            table.append(row)
        return table
    last = real(size - 1)
    if op == "crop_and_resize":
        first, end, scale = low, high, last
        unit = float(last)
    else:
        scale = last if size > 1 else one
        unit = 1.0
        if op == "roi_crop_centers":
            spacing = (high - low) / real(bins)
            first = (low + spacing / real(2) - half) / scale
            end = first + spacing * real(bins - 1) / scale
        else:
            first, end = low / scale, high / scale
    for p in range(bins):
        if bins > 1:
            position = first * scale + real(p) * (((end - first) * scale) / real(bins - 1))
            share = p / (bins - 1)
        else:
            position = half * (first + end) * scale
            share = 0.5
        if op == "roi_crop_centers":
            share = (p + 0.5) / bins
        table.append([(position, unit * (1 - share), unit * share)])
    return table


def taps(op, position, size, nearest):
    """(pixel, weight, d weight/d position) of each tap of a sample on one axis; none outside of the image."""
    v = float(position)
    if op == "roi_align":
        if not -1 <= v <= size:
            return []
        if v < 0:
            return [(0, 1.0, 0.0)]
        low = math.floor(v)
        if low >= size - 1:
            return [(size - 1, 1.0, 0.0)]
        return [(low, low + 1 - v, -1.0), (low + 1, v - low, 1.0)]
    if not 0 <= v <= size - 1:
        return []
    low = math.floor(v)
    if nearest:
        return [(low + 1 if v - low >= 0.5 else low, 1.0, 0.0)]
    if op == "crop_and_resize":
        if v == low:
            return [(low, 1.0, 0.0)]
    elif low == size - 1:
        if size == 1:
            return [(0, 1.0, 0.0)]
        low -= 1
    return [(low, low + 1 - v, -1.0), (low + 1, v - low, 1.0)]


def run(op, features, boxes, batch_indices, bins, cotangent=None, real=np.float32, **options):
    """The output and, for a cotangent, the gradients to the features and to the boxes; all float64.

    `op` is crop_and_resize, roi_crop_centers, roi_crop_corners or roi_align; a box is y1, x1, y2, x2 here for all.
    """
    nearest = options.pop("nearest", False)
    extrapolation_value = options.pop("extrapolation_value", 0.0)
    features = np.asarray(features, np.float64)
    _, channels, height, width = features.shape
    output = np.zeros((len(boxes), channels, *bins))
    grad_features, grad_boxes = np.zeros(features.shape), np.zeros((len(boxes), 4))
    with np.errstate(all="ignore"):
        for k, (y1, x1, y2, x2) in enumerate(boxes):
            if not all(math.isfinite(c) for c in (y1, x1, y2, x2)):
                output[k], grad_boxes[k] = np.nan, np.nan
                continue
            along_y = positions(op, y1, y2, height, bins[0], real, **options)
            along_x = positions(op, x1, x2, width, bins[1], real, **options)
            image, grad_image = features[batch_indices[k]], grad_features[batch_indices[k]]
            for p in range(bins[0]):
                for q in range(bins[1]):
                    count = max(len(along_y[p]) * len(along_x[q]), 1)
                    for y, dy1, dy2 in along_y[p]:
                        for x, dx1, dx2 in along_x[q]:
                            taps_y, taps_x = taps(op, y, height, nearest), taps(op, x, width, nearest)
                            if not taps_y or not taps_x:
                                output[k, :, p, q] += extrapolation_value / count
                                continue
                            for row, wy, sy in taps_y:
                                for column, wx, sx in taps_x:
                                    pixel = image[:, row, column]
                                    output[k, :, p, q] += wy * wx * pixel / count
                                    if cotangent is not None:
                                        g = cotangent[k, :, p, q].astype(np.float64)
                                        grad_image[:, row, column] += wy * wx * g / count
                                        along = float(g @ pixel) / count
                                        grad_boxes[k] += along * np.array(
                                            [sy * wx * dy1, wy * sx * dx1, sy * wx * dy2, wy * sx * dx2]
                                        )
    return output, grad_features, grad_boxes
