"""Times the workloads on the CPU with one thread, beside torchvision where it is installed.

    python -m benchmarks [W1 W2 ...] [--json FILE]

Ours and the peer's take turns in one process, so that a machine that slows down slows both. float32; the median of
the runs, and the fastest and slowest.
"""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when NumPy is first imported
    os.environ[variable] = "1"

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

import cupy_roialign as cr
from benchmarks import workloads


def ours(p, channels_last):
    """Forward and backward to the features, as functions of nothing."""
    order = (
        (lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)) if channels_last else np.asarray
    )
    features, rois, cotangent = order(p["input"]), p["rois"], order(p["cotangent"])
    from cupy_roialign import numpy_backend
    from cupy_roialign.geometry import Dialect, Rule

    rule = Rule(
        Dialect.ROI_ALIGN, p["out"], (2, 1, 4, 3), p["scale"], sampling_ratio=max(p["sr"], 0), aligned=p["aligned"]
    )
    return (
        lambda: cr.roi_align(features, rois, p["out"], p["scale"], p["sr"], p["aligned"]),
        lambda: numpy_backend.feature_gradient(cotangent, features, rois, rois[:, 0], rule),
        lambda: numpy_backend.box_gradient(cotangent, features, rois, rois[:, 0], rule),
    )


def torchvision_of(p):
    import torch
    import torchvision

    torch.set_num_threads(1)
    features = torch.from_numpy(p["input"]).requires_grad_()
    rois, cotangent = torch.from_numpy(p["rois"]), torch.from_numpy(p["cotangent"])

    def forward():
        return torchvision.ops.roi_align(features, rois, p["out"], p["scale"], p["sr"], p["aligned"])

    output = forward()
    return forward, lambda: torch.autograd.grad(output, features, cotangent, retain_graph=True), None


def median_ms(functions, runs):
    """{name: (median, least, most)} of functions that take turns, after one round that is not counted."""
    times = {name: [] for name in functions}
    for round_ in range(runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def markdown(report):
    """The table of README.md."""
    sides = ("torchvision", "NCHW", "NHWC")
    lines = [
        "| | | torchvision | NCHW | times faster | channels-last | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, steps in report["ms: median, least, most"].items():
        for step, times in steps.items():
            ms = {side: times[side][0] for side in sides if side in times}
            cells = [f"{ms[side]:.1f}" if side in ms else "" for side in sides]
            faster = [f"{ms['torchvision'] / ms[side]:.1f}" if "torchvision" in ms else "" for side in sides[1:]]
            title = f"{name} {workloads.SPECS[name]['title']}" if step == "forward" else ""
            lines.append(f"| {title} | {step} | {cells[0]} | {cells[1]} | {faster[0]} | {cells[2]} | {faster[1]} |")
    return "\n".join(lines)


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["W1", "W2", "W3", "W4", "W5"], help="workloads")
    parser.add_argument("--runs", type=int, default=7, help="runs of each")
    parser.add_argument("--json", type=Path, help="write the times here as well")
    options = parser.parse_args()

    versions = {"cupy_roialign": cr.__version__, "numpy": np.__version__, "python": platform.python_version()}
    try:
        import torch
        import torchvision

        versions |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
        peer = True
    except (ImportError, RuntimeError):
        peer = False
    print(f"{processor()}; one thread; {', '.join(f'{k} {v}' for k, v in versions.items())}")
    if not peer:
        print("torchvision is not installed, or not with this torch: its column stays empty")
    steps = ("forward", "feature gradient", "box gradient")
    print(f"{'':4} {'':18} {'NCHW':>10} {'NHWC':>10} {'torchvision':>12}   ms, median")
    results = {}
    for name in options.names:
        p = workloads.make(name)
        sides = {"NCHW": ours(p, False), "NHWC": ours(p, True)} | ({"torchvision": torchvision_of(p)} if peer else {})
        results[name] = {}
        for number, step in enumerate(steps):
            times = median_ms({side: f[number] for side, f in sides.items() if f[number] is not None}, options.runs)
            results[name][step] = times
            cells = [f"{times[side][0]:.1f}" if side in times else "" for side in ("NCHW", "NHWC", "torchvision")]
            print(f"{name:4} {step:18} {cells[0]:>10} {cells[1]:>10} {cells[2]:>12}", flush=True)
    if options.json:
        report = {"processor": processor(), "threads": 1, "versions": versions, "ms: median, least, most": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(markdown(report))


if __name__ == "__main__":
    main()
