"""Every kernel on small inputs, for compute-sanitizer: compute-sanitizer --tool memcheck python -m tests.sanitize"""

import itertools

import cupy
import numpy as np

import cupy_roialign as cr
from cupy_roialign import rule as rules
from cupy_roialign.gpu import cupy_arrays
from tests.test_kernels import problem


def main():
    if hasattr(cupy.cuda, "set_allocator"):  # here, because pytest imports this file, to look for examples
        cupy.cuda.set_allocator(None)  # one allocation an array: a pool would hide an access past its end
    calls = 0
    cases = itertools.product(
        (np.float32, np.float16, np.float64, np.uint8),
        (False, True),
        (
            (cr.roi_align, {"output_size": (5, 9), "sampling_ratio": 2, "aligned": True}),
            (cr.roi_align, {"output_size": (5, 9), "sampling_ratio": -1}),
            (cr.roi_crop, {"crop_size": (20, 33), "extrapolation_value": 1.5}),  # several tiles of bins
        ),
    )
    # by turns, so that each dtype and memory order has the kernels for few channels and those for many
    for (dtype, last, (operator, options)), channels in zip(cases, itertools.cycle((3, 13))):
        features, boxes, indices, _ = problem(channels)
        boxes[3], boxes[5, 2] = [-1e30, -1e30, 1e30, 1e30], np.nan
        indices[6] = 99
        values = (features * 50).astype(dtype)
        if last:
            values = np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        on_gpu = cupy.asarray(values)
        name = "batch_indices" if operator is cr.roi_align else "box_indices"
        output, pullback = cr.vjp(operator, on_gpu, cupy.asarray(boxes), **options, **{name: cupy.asarray(indices)})
        cotangent = np.random.default_rng(calls).uniform(-1, 1, output.shape).astype(np.float32)
        to_features, to_boxes = pullback(cupy.asarray(cotangent))
        sound = [k for k in range(len(boxes)) if k not in (5, 6)]
        assert np.isfinite(output.get()[sound]).all()
        assert np.isfinite(to_features.get()).all()
        assert np.isfinite(to_boxes.get()[sound]).all()
        along = cupy_arrays.forward(
            on_gpu, *map(cupy.asarray, (boxes, indices)), rules.roi_align((5, 9)), [cupy.asarray(boxes * 0 + 1)]
        )
        assert np.isfinite(along.get()[sound]).all()
        calls += 4
    print(f"{calls} calls ran")


if __name__ == "__main__":
    main()
