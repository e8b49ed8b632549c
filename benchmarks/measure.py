"""Times the sides of a workload, which take turns in one process: a machine that slows down slows them all.

The environment is left as the user has it, with another process busy beside this one, unless told otherwise.
"""

import contextlib
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TURN = 2e-3  # seconds that a turn takes at least: a quick function is called several times in it
# So far may the results of two sides be apart, in units of the largest value. At a pixel's centre interpolation has a
# kink, and a sample that is rounded to the one side or the other adds another slope to the gradient of its box.
SAME = {"forward": 1e-3, "feature gradient": 1e-3, "box gradient": 0.1}


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory():
    """Bytes that the machine has, as far as it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows, for one
        return math.inf


def environment():
    """What is set that changes how many threads somebody has, or which way this package takes."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.endswith(_SETTINGS) or name in _OF_OURS}


_SETTINGS = ("NUM_THREADS", "MAXIMUM_THREADS", "_PARALLELISM_THREADS", "THREAD_LIMIT", "WAIT_POLICY", "BLOCKTIME")
_OF_OURS = ("CUPY_ROIALIGN_COMPILED",)

_SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


@contextlib.contextmanager
def busy_neighbour():
    """Another process that computes all the while, on one CPU."""
    process = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def spread(times):
    return [statistics.median(times), min(times), max(times)]


def difference(actual, expected):
    """The largest one, in units of the largest value."""
    rows = range(0, expected.shape[-2], 256)  # a part at a time: they may be gigabytes
    parts = [np.s_[..., start : start + 256, :] for start in rows]
    largest = np.max([np.abs(expected[part]).max() for part in parts])
    return float(np.max([np.abs(actual[part] - expected[part]).max() for part in parts]) / (largest or 1))


def _seconds(side, step, calls):
    side.prepare()
    function = side.steps[step]
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def take_turns(sides, step, runs, tick=lambda: None):
    """{name: milliseconds, [median, least, most]}, after a round that is not counted.

    In another order each round: who comes after a side that used much memory finds caches and pages as that left them.
    """
    calls = {side.name: max(1, math.ceil(TURN / _seconds(side, step, 1))) for side in sides}
    tick()
    times = {side.name: [] for side in sides}
    order = random.Random(0)
    for _ in range(runs):
        for side in order.sample(sides, len(sides)):
            times[side.name].append(1e3 * _seconds(side, step, calls[side.name]))
        tick()
    return {name: spread(t) for name, t in times.items()}


def check(sides, step):
    """{name: how far its result is from that of the first side}; they must be the same but for rounding."""
    first, *others = [side for side in sides if side.compared]
    first.prepare()
    expected = first.array(first.steps[step]())
    found = {}
    for side in others:
        side.prepare()
        found[side.name] = far = difference(side.array(side.steps[step]()), expected)
        if not far <= SAME[step]:
            raise RuntimeError(f"{step}: the results of {side.name} and {first.name} are {far:.2g} apart")
    return found


def run(specs, threads, runs, idle=False):
    """The report on these workloads, with so many threads. Once in a process: TensorFlow's are chosen once."""
    from tqdm import tqdm

    from benchmarks import report, sides, workloads

    peers, absent = sides.installed(threads)
    done = {"processor": processor(), "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"}
    done["versions"] = sides.versions() | {name: found for peer in peers for name, found in peer.versions.items()}
    done |= {"runs": runs, "threads": threads, "another process is busy": not idle, "environment": environment()}
    done |= {"absent": absent, "skipped": {}, "workloads": specs, "differences": {}, report.TIMES: {}}
    print(report.conditions(done), flush=True)
    for name, why in absent.items():
        print(f"{name} does not take part: {why}")
    print(flush=True)

    def measure(name, spec, bar):
        p = workloads.draw(spec)
        present = sides.ours(p, threads) + [side for peer in peers if (side := peer.side(p))]
        for step in sides.STEPS:
            able = [side for side in present if step in side.steps]
            bar.set_description(f"{name} {step}")
            done["differences"].setdefault(name, {})[step] = check(able, step)
            done[report.TIMES].setdefault(name, {})[step] = times = take_turns(able, step, runs, bar.update)
            bar.write(report.lines(f"{name} {spec['title']}, {step}", times))

    total = len(specs) * len(sides.STEPS) * (runs + 1)
    neighbour = contextlib.nullcontext() if idle else busy_neighbour()
    with neighbour, tqdm(total=total, unit="round", disable=None) as bar:
        for name, spec in specs.items():
            needed = 5 * 4 * math.prod(spec["shape"])  # in two memory orders, their gradients, and a peer's
            if needed > memory():
                done["skipped"][name] = f"takes {needed / 2**30:.0f} GiB of memory; there are {memory() / 2**30:.0f}"
                bar.write(f"{name} {spec['title']}: skipped, it {done['skipped'][name]}")
                continue
            measure(name, spec, bar)
    return done
