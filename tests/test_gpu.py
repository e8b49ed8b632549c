"""What only a GPU can show: graphs, streams, arrays of more than 2**31 elements, the kernel cache.

The bodies of tests that every backend runs are in the other files, marked `gpu` where they run on one.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from tests import tolerance
from tests.test_kernels import problem, run

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]


def test_the_same_bits_in_a_hundred_runs(gpu):
    """Boxes that crowd one place, where atomics would show."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 64, 50, 60), dtype=np.float32)
    boxes = (rng.uniform(10, 20, (2000, 4)) + np.array([0, 0, 15, 15])).astype(np.float32)
    arguments = (features, boxes, np.zeros(2000, int), rng.standard_normal((2000, 64, 5, 9), dtype=np.float32))
    first = run(gpu, *arguments)
    for _ in range(100):
        for a, b in zip(first, run(gpu, *arguments), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 46400, 46400), (3, 2, 20000, 20000)])
def test_features_of_more_than_2_to_the_31_elements(shape, gpu):
    assert np.prod(shape) > 2**31
    features = gpu.zeros(shape, np.uint8)
    corner = gpu.asarray(np.random.default_rng(0).integers(0, 255, (1, shape[1], 40, 50), dtype=np.uint8))
    features[-1:, :, -40:, -50:] = corner
    box = np.array([[5, 6, 45, 38.0]])
    there = (box + [shape[3] - 50, shape[2] - 40] * 2).astype(np.float64)
    options = {"output_size": 7, "sampling_ratio": 2, "aligned": True}
    last, first = gpu.asarray(np.array([shape[0] - 1])), gpu.asarray(np.array([0]))
    expected, pullback_of_corner = cr.vjp(cr.roi_align, corner, gpu.asarray(box), **options, batch_indices=first)
    output, pullback = cr.vjp(cr.roi_align, features, gpu.asarray(there), **options, batch_indices=last)
    tolerance.assert_close(output.get(), expected.get(), 1e-5)
    to_features, to_box = pullback(gpu.ones_like(output))
    small, box_gradient = pullback_of_corner(gpu.ones_like(output))
    tolerance.assert_close(to_features[-1:, :, -40:, -50:].get(), small.get(), 1e-5)
    tolerance.assert_close(to_box.get(), box_gradient.get(), 1e-5)
    assert float(abs(to_features).sum()) == pytest.approx(float(abs(small).sum()), rel=1e-4)


def test_crops_of_more_than_2_to_the_31_elements(gpu):
    features = gpu.asarray(np.random.default_rng(0).standard_normal((1, 1, 8, 8), dtype=np.float32).astype(np.float16))
    count = 2**31 // 1024**2 + 2
    boxes = gpu.asarray(np.tile(np.array([[1, 1, 6, 6]], np.float32), (count, 1)))
    output = cr.roi_crop(features, boxes, gpu.zeros(count, np.int64), (1024, 1024))
    assert output.size > 2**31
    assert bool((output[-1] == output[0]).all())
    expected = cr.roi_crop(features.get(), boxes.get()[:1], np.zeros(1, int), (1024, 1024))
    tolerance.assert_close(output[-1:].get(), expected, 2e-3)


def test_a_captured_graph(gpu):
    features, boxes, indices, cotangent = map(gpu.asarray, problem())

    def call():
        output, pullback = cr.vjp(cr.roi_align, features, boxes, (5, 9), 1.0, 2, batch_indices=indices)
        return [output, *pullback(cotangent)]

    call()
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        results = call()
        graph = stream.end_capture()
        features *= 2
        boxes += 0.25
        graph.launch()
    stream.synchronize()
    for a, b in zip(results, call(), strict=True):
        np.testing.assert_array_equal(a.get(), b.get())


def test_work_follows_the_current_stream(gpu):
    """A result is used on the stream on which it was asked for, while the default stream is busy."""
    features, boxes, indices, _ = map(gpu.asarray, problem(64))
    expected = cr.roi_align(features * 3, boxes, (5, 9), batch_indices=indices).get()
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        busy = gpu.ones((4096, 4096), np.float32)
        for _ in range(20):
            busy = busy @ busy * 1e-4
        late = features * (busy[0, 0] * 0 + 3)
        output = cr.roi_align(late, boxes, (5, 9), batch_indices=indices)
    stream.synchronize()
    np.testing.assert_array_equal(output.get(), expected)


def test_a_second_process_does_not_compile(gpu, tmp_path):
    program = (
        "import cupy, cupy_roialign as cr\n"
        "boxes = cupy.asarray([[0, 0, 0, 4, 4.0]], cupy.float32)\n"
        "print(cr.roi_align(cupy.ones((1, 3, 8, 8), cupy.float32), boxes, 2).sum())\n"
    )
    seen = []
    for _ in range(2):
        environment = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=120, check=True)
        seen.append({path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()})
    assert seen[0]
    assert seen[0] == seen[1]


# ---- torch ----


def tensors(torch):
    return [torch.from_numpy(array).cuda() for array in problem()]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu(cuda_torch):
    features, boxes, indices, cotangent = tensors(cuda_torch)
    features.requires_grad_()
    boxes.requires_grad_()
    rows = [boxes[indices == i].detach().requires_grad_() for i in range(2)]  # backward through a mask would wait
    cr.roi_align(features, boxes, (5, 9), batch_indices=indices).backward(cotangent)
    cuda_torch.cuda.set_sync_debug_mode("error")
    try:
        cr.roi_align(features, boxes, (5, 9), batch_indices=indices).backward(cotangent)
        cr.roi_align(features, rows, (5, 9)).backward(cotangent)
    finally:
        cuda_torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_torch(cuda_torch):
    torch = cuda_torch
    features, boxes, indices, cotangent = tensors(torch)
    features.requires_grad_()
    boxes.requires_grad_()

    def call():
        output = cr.roi_align(features, boxes, (5, 9), 1.0, 2, batch_indices=indices)
        return [output, *torch.autograd.grad(output, (features, boxes), cotangent)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    with torch.no_grad():
        features *= 2
        boxes += 0.25
    graph.replay()
    for a, b in zip(results, call(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_make_graphed_callables(cuda_torch):
    torch = cuda_torch
    from cupy_roialign.torch import RoIAlign

    features, boxes, indices, cotangent = tensors(torch)
    module = RoIAlign(5, 9)
    wanted = features.clone().requires_grad_()
    expected = module(wanted, boxes, indices)
    expected.backward(cotangent)
    sample = features.clone().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(lambda f: module(f, boxes, indices), (sample,))
    actual = features.clone().requires_grad_()
    output = graphed(actual)
    output.backward(cotangent)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    torch.testing.assert_close(actual.grad, wanted.grad, rtol=0, atol=0)


def test_memory_is_torchs(cuda_torch):
    """And no more of it than the results."""
    torch = cuda_torch
    gc.collect()  # tensors of earlier tests, which could be freed while this one counts
    features, boxes, indices, _ = tensors(torch)
    cr.roi_crop(features, boxes, indices, (200, 300))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a block that is kept may be given whole, and count so
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = cr.roi_crop(features, boxes, indices, (200, 300))
    assert torch.cuda.max_memory_allocated() - before <= output.nbytes + 4096
    assert torch.cuda.memory_allocated() - before >= output.nbytes


def test_a_side_stream_of_torch(cuda_torch):
    from cupy_roialign.torch import private

    torch = cuda_torch
    features, boxes, indices, cotangent = tensors(torch)
    wanted = (features * 3).requires_grad_()
    expected = cr.roi_align(wanted, boxes, (5, 9), batch_indices=indices)
    expected.backward(cotangent)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert private.current_stream(features.device) == side.cuda_stream
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-4
        late = (features * (busy[0, 0] * 0 + 3)).detach().requires_grad_()
        output = cr.roi_align(late, boxes, (5, 9), batch_indices=indices)
        output.backward(cotangent)
    torch.cuda.synchronize()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    torch.testing.assert_close(late.grad, wanted.grad, rtol=0, atol=0)
