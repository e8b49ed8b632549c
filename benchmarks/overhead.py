"""What a call costs before and after the arithmetic: the torch path beside the NumPy function that does the work.

    python -m benchmarks.overhead [--rounds 300] [--json FILE]

Ways take turns, so that a machine that slows down slows all; microseconds, the median of many rounds.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import cupy_roialign as cr
from benchmarks import workloads
from benchmarks.measure import processor
from cupy_roialign import operators
from cupy_roialign.arrays import ArraySpec
from cupy_roialign.cpu import backend
from cupy_roialign.torch import bridge, eager, graph, tensors


def us(functions, rounds, calls=5):
    """{name: median microseconds} of functions that take turns."""
    times = {name: [] for name in functions}
    order, names = random.Random(0), list(functions)  # who comes after whom matters
    first = min(20, rounds)  # rounds that are not counted
    for round_ in range(first + rounds):
        order.shuffle(names)
        for name in names:
            function = functions[name]
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if round_ >= first:
                times[name].append(1e6 * (time.perf_counter() - start) / calls)
    return {name: round(statistics.median(t), 1) for name, t in times.items()}


def tiny(images):
    """One box in each image."""
    features = np.random.default_rng(0).random((images, 8, 20, 20), dtype=np.float32)
    rois = np.array([[i, 2.3, 2.1, 12.4, 13.2] for i in range(images)], np.float32)
    return {"input": features, "rois": rois, "scale": 1.0, "sr": 2, "out": (7, 7)}


class Nothing(torch.autograd.Function):
    """The least that torch takes to record a function written in Python."""

    @staticmethod
    def forward(features):
        return features.new_empty(())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None


def ways(p):
    options = (p["out"], p["scale"], p["sr"], True)
    arrays = (p["input"], p["rois"])
    plain = tuple(map(torch.from_numpy, arrays))
    wanting = (plain[0].detach().requires_grad_(), plain[1])  # the same memory: another would not be in the cache
    taken = operators._roi_align(*arrays, *options, None)[1]
    recorded = operators._roi_align(*wanting, *options, None)[1]
    spec = ArraySpec.of(plain[0])
    listed = [[boxes[boxes[:, 0] == i, 1:] for i in range(len(p["input"]))] for boxes in (p["rois"], plain[1])]
    output = cr.roi_align(*wanting, *options)
    grad = torch.ones_like(output)
    crops = output.detach().numpy()
    return {
        "forward": {
            "NumPy": lambda: cr.roi_align(*arrays, *options),
            "torch": lambda: cr.roi_align(*plain, *options),
            "torch, recording for backward": lambda: cr.roi_align(*wanting, *options),
            "NumPy, a list of boxes": lambda: cr.roi_align(arrays[0], listed[0], *options),
            "torch, a list of boxes": lambda: cr.roi_align(plain[0], listed[1], *options),
        },
        "of these": {
            "checks of arrays": lambda: operators._roi_align(*arrays, *options, None),
            "checks of tensors": lambda: operators._roi_align(*plain, *options, None),
            "checks of tensors to be recorded": lambda: operators._roi_align(*wanting, *options, None),
            "from tensors to arrays and back (DLPack)": lambda: (*map(bridge.memory, plain), bridge.tensor(crops)),
            "the work, on arrays": lambda: backend.forward(*taken),
            "the work, on tensors": lambda: tensors.forward(*recorded),
            "the work, in an autograd Function": lambda: eager.EAGER.crops(*recorded, ()),
            "the work, in an operator of torch.library": lambda: graph.FAMILY.crops(*recorded, ()),
            "an autograd Function that does nothing": lambda: Nothing.apply(wanting[0]),
        },
        "backward": {
            "NumPy": lambda: backend.feature_gradient(grad.numpy(), *taken),
            "on tensors": lambda: tensors.feature_gradient(grad, spec, *recorded[1:]),
            "torch": lambda: torch.autograd.grad(output, wanting[0], grad, retain_graph=True),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="how many times ways take turns")
    parser.add_argument("--json", type=Path, help="write the times here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cr.set_num_threads(1)
    versions = {"numpy": np.__version__, "torch": torch.__version__, "python": platform.python_version()}
    report = {"processor": processor(), "versions": versions, "us, median": {}}
    print(f"{processor()}; one thread; {versions}")
    measured = {"K = 1, C = 8, 7x7": tiny(1), "the same, 4 images": tiny(4), "W5": workloads.make("W5")}
    for name, p in measured.items():
        for part, functions in ways(p).items():
            times = report["us, median"].setdefault(name, {})[part] = us(functions, options.rounds)
            for way, time_ in times.items():
                print(f"{name:18} {part:9} {way:42} {time_:8.1f} us")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
