"""What needs a GPU, in stages: each has a time limit, and one that fails does not stop the next.

    python -m tests.gpu_stages [smoke benchmark tests sanitizer] [--out FOLDER]

smoke: the outputs and gradients of the peers. benchmark: benchmarks.gpu. tests: all tests that need a GPU. sanitizer:
every kernel under each tool of compute-sanitizer. What a stage prints goes to FOLDER as it comes, and is printed at its
end.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMITS = {"smoke": 60, "benchmark": 180, "tests": 180, "sanitizer": 90}
"""Seconds of each stage: all of them within nine minutes on a machine that has never compiled a kernel."""

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

LAST_WORDS = 10
"""Seconds that a stage has after its limit, for a summary of what it did until then."""


def commands(stage, out):
    """Those of a stage, which run together."""
    python = [sys.executable, "-m"]
    if stage in ("smoke", "tests"):
        # Warnings that other versions of other packages give are no failures here.
        tests = [*python, "pytest", "-q", "-m", "gpu", "-W", "default", "--tb=short", "-p", "no:cacheprovider"]
        tests += ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
        return [[*tests, "tests/test_golden.py"] if stage == "smoke" else [*tests, "tests"]]
    if stage == "benchmark":
        return [[*python, "benchmarks.gpu", "--out", str(out)]]
    sanitizer = os.environ.get("SANITIZER", "compute-sanitizer")
    if shutil.which(sanitizer) is None:
        raise FileNotFoundError(f"{sanitizer} is not on the PATH; set SANITIZER to where it is")
    return [[sanitizer, "--tool", tool, "--error-exitcode", "1", *python, "tests.sanitize"] for tool in TOOLS]


def run(todo, limit, log):
    """Runs commands together; returns what went wrong, or nothing."""
    environment = {**os.environ, "CUPY_ROIALIGN_REQUIRE_GPU": "1", "PYTHONUNBUFFERED": "1"}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background; the commands would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = time.monotonic() + limit
    running = [
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        for command in todo
    ]
    problems = []
    for command, process in zip(todo, running, strict=True):
        try:
            status = process.wait(max(0, stop - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
            process.send_signal(signal.SIGINT)
            try:
                process.wait(LAST_WORDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            problems.append(f"{' '.join(command)}: {status}")
    return "; ".join(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(LIMITS), help=f"of {', '.join(LIMITS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for what comes of it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for stage in options.stages:
        start, path = time.monotonic(), options.out / f"{stage}.log"
        with open(path, "wb") as log:
            try:
                problem = run(commands(stage, options.out), LIMITS[stage], log)
            except OSError as error:
                problem = str(error)
        print(path.read_text(errors="replace")[-20_000:], flush=True)
        outcomes[stage] = {"seconds": round(time.monotonic() - start, 1), "problem": problem}
        (options.out / "stages.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    for stage, outcome in outcomes.items():
        print(f"{stage}: {outcome['problem'] or 'passed'} ({outcome['seconds']} s)")
    sys.exit(any(outcome["problem"] for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
