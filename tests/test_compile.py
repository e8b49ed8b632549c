"""NVRTC compiles every kernel that a backend can ask for; no driver is needed.

Every instantiation is compiled for the newest architecture, the plain ones of float16 and float32 for the oldest, and
the two largest kernels for those between.
"""

import concurrent.futures
import io
import multiprocessing
import os
import re

import pytest

from cupy_roialign import arrays
from cupy_roialign.gpu import kernels

ARCHITECTURES = [f"sm_{number}" for number in (50, 60, 70, 75, 80, 86, 89, 90, 100, 120)]
CHANNELS = (kernels.MANY_CHANNELS, 3)
"""Numbers of channels; for each below MANY_CHANNELS there are kernels of its own, and 3 are those of photos."""

COMMON = [
    (name, types)
    for channels in CHANNELS
    for name, types in kernels.instantiations(channels)
    if types[:5] == (*["float32"] * 4, False)
]
"""Those of most calls, for which the registers and the memory of a thread are checked."""

LARGEST = [
    (name, types) for name, types in COMMON if kernels.KERNELS[name].endswith("gradient.cu") and not types.channels_last
]
"""The kernels that need most registers."""

TOLD = re.compile(r"^ptxas (info| +\.).*$\n?", re.MULTILINE)
USED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")
OLD = re.compile(r"nvrtc: warning: Architectures prior to .* are deprecated.*")  # CUDA 12's

SHARES = 4
"""Of all instantiations, each of which one test compiles: two processes have the same to do."""

MOST_STACK = 96
"""Bytes per thread of the stack. Arrays there are set up before the loops over channels; sums are in registers."""

MOST_SPILLS = 48
"""Bytes per thread of registers that are kept in memory outside of the innermost loops."""


def is_plain(types):
    return types.boxes == types.positions == "float32" and types.crops == arrays.output_name(types.features)


def compile_all(architecture, instantiations, quickly):
    """Compiles some instantiations; returns what went wrong. -ftz=true is what CuPy adds."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture,
        std=kernels.OPTIONS[0].removeprefix("-std="),
        ftz=True,
        ofast_compile="max" if quickly else None,  # the same checks, less optimisation
        minimal=quickly or None,  # without what the kernels do not use
        ptxas_options=["-O0"] if quickly else ["-v"],
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


@pytest.fixture(scope="module")
def architectures():
    """Those that this NVRTC compiles for, the oldest first: CUDA 13's begins at 7.5."""
    try:
        import cuda.core  # noqa: F401
    except ImportError:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no cuda-core, which compiles the kernels")
    from cuda.bindings import nvrtc

    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return [name for name in ARCHITECTURES if name in [f"sm_{number}" for number in numbers]]


def compile_apart(*args):
    """What `compile_all` returns, from a process of its own: NVRTC optimises less for good once it was told to."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(compile_all, *args).result()


def test_there_are_many_instantiations():
    instantiations = kernels.instantiations()
    assert len(instantiations) == len(set(instantiations)) >= 100


@pytest.mark.parametrize("share", range(SHARES))
def test_every_instantiation(share, architectures):
    """But those for 64-bit offsets, which change one type, with the plain ones of the others only."""
    some = [(name, types) for name, types in kernels.instantiations() if not types.large or is_plain(types)]
    assert compile_apart(architectures[-1], some[share::SHARES], True) == []


def test_float16_for_the_oldest(architectures):
    """An old architecture may lack instructions for float16. float32 is compiled for it below."""
    some = [
        (name, types)
        for channels in CHANNELS
        for name, types in kernels.instantiations(channels)
        if types.features == "float16" and is_plain(types) and not types.large
    ]
    assert compile_apart(architectures[0], some, True) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_full_optimisation(architecture, architectures):
    if architecture not in architectures:
        pytest.skip(f"this NVRTC does not compile for {architecture}")
    ends = architectures[0], architectures[-1]
    optimised = COMMON if architecture in ends else LARGEST
    assert compile_apart(architecture, optimised, False) == []


def test_a_fault_is_found(architectures, monkeypatch):
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
