"""Every kernel that the backend can ask for is compiled by NVRTC, for every generation of GPUs; no driver is needed.

It is much work, which begins with the session and goes on beside all other tests: these come last (conftest.py).
"""

import concurrent.futures
import io
import multiprocessing
import os
import re

import pytest

from cupy_roialign.gpu import kernels

FILES = {file: name for name, file in kernels.KERNELS.items()}.values()  # a kernel of each file
TOLD = re.compile(r"^ptxas (info| +\.).*$\n?", re.MULTILINE)
STACK = re.compile(r"(\d+) bytes stack frame")
MOST_STACK = 160  # bytes of a thread, for what is done before loops over channels; sums belong in registers
ARCHITECTURES = [f"sm_{number}" for number in (50, 60, 70, 75, 80, 86, 89, 90, 100, 120)]
OLD = re.compile(r"nvrtc: warning: Architectures prior to .* are deprecated.*")  # of CUDA 12, whose successor has none


def known(architecture):
    """Whether this NVRTC compiles for it: CUDA 13's begins at 7.5."""
    from cuda.bindings import nvrtc

    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return architecture in [f"sm_{number}" for number in numbers]


def compile_all(architecture, instantiations, quickly):
    """Compiles some instantiations; returns what went wrong. -ftz=true is what CuPy adds."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture,
        std=kernels.OPTIONS[0].removeprefix("-std="),
        ftz=True,
        ofast_compile="max" if quickly else None,  # the same checks, less optimisation
        ptxas_options=[] if quickly else ["-v"],
    )
    problems = []
    for name, types in instantiations:
        log = io.StringIO()
        try:
            code = Program(kernels.source(name, types), "c++", options=options).compile("cubin", logs=log).code
        except Exception as error:
            problems.append((name, types, str(error)))
            continue
        said = OLD.sub("", log.getvalue()).strip("\0 \n")
        if not quickly:  # what the kernels take is told
            stacks = [int(number) for number in STACK.findall(said)]
            if not stacks or max(stacks) > MOST_STACK:
                problems.append((name, types, f"stacks of {stacks} bytes"))
            said = TOLD.sub("", said).strip()
        if said:
            problems.append((name, types, said))
        if len(code) < 1000:
            problems.append((name, types, f"{len(code)} bytes"))
    return problems


def _behind():
    if hasattr(os, "nice"):
        os.nice(10)  # the tests that run meanwhile go first


class Compiling:
    """Compiles for all architectures; to ask for the problems of one is to wait for them."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        # In processes of their own: NVRTC optimises less for good once it was told to.
        self._pools = {
            quickly: concurrent.futures.ProcessPoolExecutor(count, context, initializer=_behind)
            for quickly, count in ((True, os.cpu_count()), (False, 1))
        }
        all_of_them, count = kernels.instantiations(), 4 * os.cpu_count()
        parts = [all_of_them[i::count] for i in range(count)]
        # as CuPy compiles them; the types of most calls
        types = kernels.Types("float32", "float32", "float32", "float32", False, False)
        optimised = [[(name, types)] for name in FILES]
        self._running = {
            (architecture, quickly): [
                self._pools[quickly].submit(compile_all, architecture, part, quickly) for part in some
            ]
            for architecture in filter(known, ARCHITECTURES)
            for quickly, some in ((True, parts), (False, optimised))
        }

    def problems(self, architecture, quickly):
        if not known(architecture):
            pytest.skip(f"this NVRTC does not compile for {architecture}")
        return [problem for part in self._running[architecture, quickly] for problem in part.result()]

    def end(self):
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)


@pytest.fixture
def compiling(begun):
    if begun is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no cuda-core, which compiles the kernels")
    return begun


def test_there_are_many_instantiations():
    instantiations = kernels.instantiations()
    assert len(instantiations) == len(set(instantiations)) >= 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instantiation(architecture, compiling):
    assert compiling.problems(architecture, quickly=True) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_full_optimisation(architecture, compiling):
    assert compiling.problems(architecture, quickly=False) == []


def test_a_fault_is_found(compiling, monkeypatch):
    types = kernels.every_types()[0]
    original = kernels.read
    memory = "volatile int many[99]; for (int i = 0; i < 99; ++i) many[i] = n; to[0] = many[n];"
    for fault, word in (
        ("int unused_variable = missing;", "missing"),
        ("static int never() { int x; return x; }", "warning"),
        (f'extern "C" __global__ void far(int* to, int n) {{ {memory} }}', "stacks of"),
    ):
        monkeypatch.setattr(
            kernels, "read", lambda name, fault=fault: original(name) + (fault if name == "forward.cu" else "")
        )
        ((_, _, message),) = compile_all("sm_90", [("forward", types)], False)
        assert word in message
