"""NVRTC compiles every kernel that a backend can ask for; no driver is needed.

Every instantiation is compiled for the newest architecture, those with float32 boxes and 32-bit offsets for the oldest,
and the two largest kernels for those between. That is much work, which starts with the session and goes on beside all
other tests: these come last (conftest.py).
"""

import concurrent.futures
import io
import itertools
import multiprocessing
import os
import re

import pytest

from cupy_roialign.gpu import kernels

FILES = {file: name for name, file in kernels.KERNELS.items()}.values()  # a kernel of each file
ARCHITECTURES = [f"sm_{number}" for number in (50, 60, 70, 75, 80, 86, 89, 90, 100, 120)]
COMMON = [
    kernels.Types("float32", "float32", "float32", "float32", False, channels_last) for channels_last in (False, True)
]
"""The types of most calls, for which the registers and the memory of a thread are checked."""

LARGEST = [(name, COMMON[0]) for name in ("feature_gradient", "box_gradient")]
"""The kernels that need most registers."""

TOLD = re.compile(r"^ptxas (info| +\.).*$\n?", re.MULTILINE)
USED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")
OLD = re.compile(r"nvrtc: warning: Architectures prior to .* are deprecated.*")  # CUDA 12's

MOST_STACK = 96
"""Bytes per thread of the stack. Arrays there are set up before the loops over channels; sums are in registers."""

MOST_SPILLS = 48
"""Bytes per thread of registers that are kept in memory outside of the innermost loops."""


def known(architecture):
    """Whether this NVRTC compiles for it: CUDA 13's begins at 7.5."""
    from cuda.bindings import nvrtc

    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return architecture in [f"sm_{number}" for number in numbers]


def is_plain(types):
    return not types.large and types.boxes == types.positions == "float32"


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
        if not quickly:
            used = [tuple(map(int, numbers)) for numbers in USED.findall(said)]
            if not used or any(stack > MOST_STACK or spills > MOST_SPILLS for stack, spills in used):
                problems.append((name, types, f"bytes of stacks and of spills: {used}"))
            said = TOLD.sub("", said).strip()
        if said:
            problems.append((name, types, said))
        missing = [other for other, file in kernels.KERNELS.items() if file == kernels.KERNELS[name]]
        missing = [other for other in missing if b".text." + other.encode() + b"\0" not in code]
        if missing:
            problems.append((name, types, f"no kernel {missing}"))
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
        self.architectures = list(filter(known, ARCHITECTURES))
        ends = self.architectures[0], self.architectures[-1]
        self._running = {}
        for architecture in ends:
            some = [one for one in kernels.instantiations() if architecture == ends[1] or is_plain(one[1])]
            shares = [some[i :: 4 * os.cpu_count()] for i in range(4 * os.cpu_count())]
            self._running[architecture, True] = [
                self._pools[True].submit(compile_all, architecture, share, True) for share in shares
            ]
        for architecture in self.architectures:
            optimised = list(itertools.product(FILES, COMMON)) if architecture in ends else LARGEST
            self._running[architecture, False] = [
                self._pools[False].submit(compile_all, architecture, optimised, False)
            ]

    def problems(self, architecture, quickly):
        return [problem for share in self._running[architecture, quickly] for problem in share.result()]

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


@pytest.mark.parametrize("end", [0, -1], ids=["oldest", "newest"])
def test_every_instantiation(end, compiling):
    assert compiling.problems(compiling.architectures[end], quickly=True) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_full_optimisation(architecture, compiling):
    if architecture not in compiling.architectures:
        pytest.skip(f"this NVRTC does not compile for {architecture}")
    assert compiling.problems(architecture, quickly=False) == []


def test_a_fault_is_found(compiling, monkeypatch):
    types = kernels.every_types()[0]
    original = kernels.read
    memory = "volatile int many[99]; for (int i = 0; i < 99; ++i) many[i] = n; to[0] = many[n];"
    for fault, word in (
        ("int unused_variable = missing;", "missing"),
        ("static int never() { int x; return x; }", "warning"),
        ("#define forward other", "no kernel ['forward']"),
        (f'extern "C" __global__ void far(int* to, int n) {{ {memory} }}', "stacks"),
    ):
        monkeypatch.setattr(
            kernels, "read", lambda name, fault=fault: (fault + "\n" if name == "forward.cu" else "") + original(name)
        )
        ((_, _, message),) = compile_all("sm_90", [("forward", types)], False)
        assert word in message
