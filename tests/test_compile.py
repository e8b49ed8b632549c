"""Every kernel that the backend can ask for is compiled by NVRTC, for every generation of GPUs; no driver is needed."""

import concurrent.futures
import io
import multiprocessing
import os

import pytest

from cupy_roialign import kernels

FILES = {file: name for name, file in kernels.KERNELS.items()}.values()  # a kernel of each file
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def compile_all(architecture, instantiations, quickly):
    """Compiles some instantiations; returns what went wrong. -ftz=true is what CuPy adds."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture,
        std=kernels.OPTIONS[0].removeprefix("-std="),
        ftz=True,
        ofast_compile="max" if quickly else None,  # the same checks, less optimisation
    )
    problems = []
    for name, types in instantiations:
        log = io.StringIO()
        try:
            code = Program(kernels.source(name, types), "c++", options=options).compile("cubin", logs=log).code
        except Exception as error:
            problems.append((name, types, str(error)))
            continue
        if log.getvalue().strip("\0 \n"):
            problems.append((name, types, log.getvalue()))
        if len(code) < 1000:
            problems.append((name, types, f"{len(code)} bytes"))
    return problems


@pytest.fixture(scope="module")
def pool():
    if os.environ.get("CI"):
        import cuda.core  # noqa: F401
    pytest.importorskip("cuda.core", reason="no cuda-core, which compiles the kernels")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as executor:
        yield executor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instantiation(architecture, pool):
    instantiations = kernels.instantiations()
    assert len(instantiations) == len(set(instantiations)) >= 100
    parts = [instantiations[i :: 4 * os.cpu_count()] for i in range(4 * os.cpu_count())]
    running = [pool.submit(compile_all, architecture, part, True) for part in parts]
    assert [problem for part in running for problem in part.result()] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_full_optimisation(architecture, pool):
    """As CuPy compiles them; the types of most calls."""
    types = kernels.Types("float32", "float32", "float32", "float32", False, False)
    running = [pool.submit(compile_all, architecture, [(name, types)], False) for name in FILES]
    assert [problem for part in running for problem in part.result()] == []


def test_a_fault_is_found(pool, monkeypatch):
    types = kernels.every_types()[0]
    original = kernels.read
    for fault, word in (
        ("int unused_variable = missing;", "missing"),
        ("static int never() { int x; return x; }", "warning"),
    ):
        monkeypatch.setattr(
            kernels, "read", lambda name, fault=fault: original(name) + (fault if name == "forward.cu" else "")
        )
        ((_, _, message),) = compile_all("sm_90", [("forward", types)], True)
        assert word in message
