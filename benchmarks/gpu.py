"""Times the workloads on a GPU, and torchvision for comparison if torch finds the GPU.

    python -m benchmarks.gpu [W1 crowd ...] [--out FOLDER]

Kernels are timed by CUDA events around one call, the median of the runs; before each, a buffer larger than the L2
cache is written, so that nothing is there from the run before. A floor is the bytes that must move (features and
crops, once each) over the bandwidth of a copy measured in the same run. Calls are timed from Python, by the clock.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cupy
import numpy as np

import cupy_roialign as cr
from benchmarks import picture, workloads
from benchmarks.measure import difference, spread
from cupy_roialign import rule as rules
from cupy_roialign.gpu import cupy_arrays, kernels
from cupy_roialign.rule import BATCH_X1_Y1_X2_Y2

FLUSH = 512 * 2**20  # bytes, several times any L2
DTYPES = ("float32", "float16")
NAMES = ["W1", "W2", "W3", "W4", "W5", "W6", "crowd", "many"]
SIDES = ("torchvision", "through torch", "NCHW", "channels-last")

try:
    import torch

    HAS_TORCH = torch.cuda.is_available()
    import torchvision
except (ImportError, RuntimeError):
    HAS_TORCH = False


class Timer:
    """Times what runs on the GPU."""

    def __init__(self, runs, flush_bytes):
        self.runs = runs
        self.buffer = cupy.empty(flush_bytes, np.uint8)

    def ms(self, function):
        """(median, least, most) milliseconds of a call that finds none of its data in the L2 cache."""
        for _ in range(3):
            function()
        times = []
        for _ in range(self.runs):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            for _ in range(4):  # takes long enough for the call below to be queued before it ends
                self.buffer[...] = 0
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop))
        return spread(times)

    def bandwidth(self):
        """Bytes per second of a copy, read and written."""
        half = self.buffer.nbytes // 2
        source, target = self.buffer[:half], self.buffer[half:]

        def copy():
            target[...] = source

        return 2 * half / (self.ms(copy)[0] / 1e3)


def call_us(function, runs):
    """Microseconds per call from Python, over many calls in a row."""
    for _ in range(20):
        function()
    cupy.cuda.Device().synchronize()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(runs):
            function()
        times.append((time.perf_counter() - start) / runs * 1e6)
        cupy.cuda.Device().synchronize()
    return spread(times)


def ours(p, dtype, channels_last):
    def place(array):
        array = array.astype(dtype)
        if channels_last:
            return cupy.asarray(np.ascontiguousarray(array.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
        return cupy.asarray(array)

    features, cotangent, rois = place(p["input"]), place(p["cotangent"]), cupy.asarray(p["rois"])
    rule = rules.roi_align(p["out"], p["scale"], max(p["sr"], 0), p["aligned"], BATCH_X1_Y1_X2_Y2)
    return {
        "forward": lambda: cr.roi_align(features, rois, p["out"], p["scale"], p["sr"], p["aligned"]),
        "feature gradient": lambda: cupy_arrays.feature_gradient(cotangent, features, rois, rois[:, 0], rule),
        "box gradient": lambda: cupy_arrays.box_gradient(cotangent, features, rois, rois[:, 0], rule),
    }


def through_torch(p, dtype, operator):
    """Forward, and the gradient of the features through autograd."""
    features = torch.from_numpy(p["input"]).cuda().to(getattr(torch, dtype)).requires_grad_()
    rois = torch.from_numpy(p["rois"]).cuda().to(features.dtype if operator is not cr.roi_align else torch.float32)
    cotangent = torch.from_numpy(p["cotangent"]).cuda().to(features.dtype)

    def forward():
        return operator(features, rois, p["out"], p["scale"], p["sr"], p["aligned"])

    output = forward()
    return {
        "forward": forward,
        "feature gradient": lambda: torch.autograd.grad(output, features, cotangent, retain_graph=True)[0],
    }


def sides_of(p, dtype):
    sides = {"NCHW": ours(p, dtype, False), "channels-last": ours(p, dtype, True)}
    if HAS_TORCH:
        sides["torchvision"] = through_torch(p, dtype, torchvision.ops.roi_align)
        sides["through torch"] = through_torch(p, dtype, cr.roi_align)
    return sides


def off(actual, expected):
    return difference(*(np.asarray(a.get() if hasattr(a, "get") else a.detach().cpu()) for a in (actual, expected)))


def peak_bytes(function):
    """Peak bytes of torch's memory beyond those before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compile_seconds():
    """The first calls of a process, with an empty kernel cache and then with a full one."""
    program = (
        "import time, cupy, numpy, cupy_roialign as cr\n"
        "features, boxes = cupy.ones((1, 3, 8, 8), cupy.float32), cupy.asarray([[0, 0, 0, 4, 4.0]], cupy.float32)\n"
        "cupy.cuda.Device().synchronize()\n"
        "start = time.perf_counter()\n"
        "output, pullback = cr.vjp(cr.roi_align, features, boxes, 2)\n"
        "output.get(); middle = time.perf_counter()\n"
        "[g.get() for g in pullback(output)]\n"
        "print(middle - start, time.perf_counter() - middle)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUPY_CACHE_DIR": folder}
        seconds = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            seconds.append([float(word) for word in done.stdout.split()])
    return dict(zip(("cold: forward, both gradients", "warm: forward, both gradients"), seconds, strict=True))


def resources():
    """Registers and memory that each kernel takes, for the types of most calls."""
    types = kernels.Types("float32", "float32", "float32", "float32", False, False, lanes=8)
    names = {"registers": "num_regs", "bytes of local memory": "local_size_bytes", "of shared": "shared_size_bytes"}
    made = {name: kernels.kernel(name, types) for name in kernels.KERNELS}
    return {name: {what: getattr(kernel, of) for what, of in names.items()} for name, kernel in made.items()}


def versions():
    found = {"cupy_roialign": cr.__version__, "numpy": np.__version__, "python": platform.python_version()}
    if hasattr(cupy, "__version__"):
        found["cupy"] = cupy.__version__
        runtime = cupy.cuda.runtime
        found |= {"CUDA runtime": str(runtime.runtimeGetVersion()), "driver": str(runtime.driverGetVersion())}
    if HAS_TORCH:
        found |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return found


def gpu_name():
    if not hasattr(cupy.cuda, "runtime"):
        return "the emulated device"
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def measure(names, runs, flush_bytes, shrink, save):
    """What all is measured of the workloads; `save` is called with what there is after each."""
    timer = Timer(runs, flush_bytes)
    bandwidth = timer.bandwidth()
    report = {
        "gpu": gpu_name(),
        "versions": versions(),
        "L2 before each run": f"{flush_bytes >> 20} MiB written",
        "copy, bytes a second": bandwidth,
        "ms: median, least, most": {},
        "bytes that must move": {},
        "floor, ms": {},
        "share of the floor": {},
        "largest difference from torchvision": {},
        "peak bytes": {},
    }
    for name in names:
        p = shrink(workloads.draw(workloads.GPU_SPECS[name]))
        for dtype in DTYPES:
            case = f"{name} {dtype}"
            size = (p["input"].size + p["cotangent"].size) * np.dtype(dtype).itemsize
            report["bytes that must move"][case] = size
            floor = report["floor, ms"][case] = size / bandwidth * 1e3
            sides = sides_of(p, dtype)
            times = report["ms: median, least, most"][case] = {}
            for side, steps in sides.items():
                for step, function in steps.items():
                    times.setdefault(step, {})[side] = timer.ms(function)
                    # torchvision takes boxes in the dtype of the features, which rounds them in float16
                    if dtype == "float32" and step in sides.get("torchvision", {}):
                        far = off(function(), sides["torchvision"][step]())
                        report["largest difference from torchvision"][f"{case} {step} {side}"] = far
            report["share of the floor"][case] = {
                step: {side: floor / median for side, (median, _, _) in times[step].items()}
                for step in ("forward", "feature gradient")
            }
            if HAS_TORCH and dtype == "float32":
                report["peak bytes"][case] = {
                    side: {step: peak_bytes(function) for step, function in sides[side].items()}
                    for side in ("torchvision", "through torch")
                }
            print(lines(case, times, floor), flush=True)
            save(report)
    return report


def reproducible(p, runs):
    gradient = ours(p, "float32", False)["feature gradient"]
    first = gradient().get()
    return all(np.array_equal(gradient().get(), first) for _ in range(runs))


def overhead(p, runs):
    """Microseconds per call of kernels that take next to no time."""
    sides = sides_of(p, "float32")
    return {side: call_us(steps["forward"], runs) for side, steps in sides.items()}


ROW = "{:12} {:17} {:>12} {:>14} {:>10} {:>14} {:>8}"
HEADER = ROW.format("", "ms, median", *SIDES, "floor")


def lines(case, times, floor):
    rows = []
    for step, sides in times.items():
        cells = [f"{sides[side][0]:.4f}" if side in sides else "" for side in SIDES]
        rows.append(ROW.format(case if step == "forward" else "", step, *cells, f"{floor:.4f}"))
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="workloads")
    parser.add_argument("--runs", type=int, default=50, help="runs of each kernel")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for gpu.json and gpu.png")
    parser.add_argument("--rehearse", action="store_true", help="tiny inputs and few runs, to try this script itself")
    options = parser.parse_args()
    runs, flush_bytes, calls = (2, 2**16, 2) if options.rehearse else (options.runs, FLUSH, 300)

    def shrink(p):
        if not options.rehearse:
            return p
        p["input"], p["rois"], p["cotangent"] = p["input"][:, :4, :40, :40], p["rois"][:5], p["cotangent"][:5, :4, :9]
        p["out"] = p["cotangent"].shape[2:]
        return p

    options.out.mkdir(parents=True, exist_ok=True)

    def save(report):
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")

    print(f"{gpu_name()}; {', '.join(f'{k} {v}' for k, v in versions().items())}\n{HEADER}")
    report = measure(options.names, runs, flush_bytes, shrink, save)
    print(f"copy: {report['copy, bytes a second'] / 1e12:.2f} TB/s")
    report["call, us: median, least, most"] = overhead(shrink(workloads.make("W5")), calls)
    for side, times in report["call, us: median, least, most"].items():
        print(f"W5, a call of forward, {side}: {times[0]:.1f} us")
    report["the same bits in 100 runs"] = reproducible(shrink(workloads.make("W1")), 2 if options.rehearse else 100)
    print(f"the same bits in 100 runs of the feature gradient: {report['the same bits in 100 runs']}")
    report["kernels"] = resources()
    print(f"kernels: {report['kernels']}")
    if not options.rehearse:
        report["first call of a process, s"] = compile_seconds()
        print(f"first call of a process, s: {report['first call of a process, s']}")
    save(report)
    picture.draw_gpu(report, options.out / "gpu.png")
    print(f"wrote {options.out / 'gpu.json'} and {options.out / 'gpu.png'}")


if __name__ == "__main__":
    main()
