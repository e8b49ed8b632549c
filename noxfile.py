"""The tests on each Python that is installed, the checks, and the pages: `nox`, or `nox -s tests-3.12`.

TORCH names the build of torch to install, as for make; where it is empty, tests that need torch are skipped.
"""

import os

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

TORCH = os.environ.get("TORCH", "torch")


def install(session: nox.Session, *extras: str) -> None:
    if TORCH:
        session.install(TORCH)  # first: a package that wants any torch then leaves this one in place
    session.install("-e", f".[{','.join(extras)}]")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    install(session, "test", "examples", *(["docs"] if TORCH else []))
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """What the CPU computes, with the oldest NumPy that setup.cfg allows, and without Numba."""
    session.install("numpy==1.23.0", "pytest", "hypothesis", "ml_dtypes", "pillow")
    session.install("--no-deps", "-e", ".")
    names = ("geometry", "golden", "oracle", "gradients", "directions", "ways", "cost", "threads", "errors")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or [f"tests/test_{name}.py" for name in names]))


@nox.session
@nox.parametrize("version", ["2.4.1", "2.6.0", "2.8.0", "2.11.0"])
def torch(session: nox.Session, version: str) -> None:
    """What is called with tensors, with older PyTorch."""
    session.install(f"torch=={version}", "numpy", "numba", "pytest", "hypothesis", "ml_dtypes", "pillow")
    session.install("--no-deps", "-e", ".")
    names = ("torch", "autograd", "directions", "onnx", "torchvision", "torch_compile", "torch_programs")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or [f"tests/test_{name}.py" for name in names]))


@nox.session
def cuda12(session: nox.Session) -> None:
    """Every kernel by the compiler of CUDA 12, which knows older GPUs than that of CUDA 13."""
    session.install("cuda-core[cu12]>=0.4", "numpy", "pytest", "hypothesis", "ml_dtypes")
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["tests/test_compile.py"]))


CUDA_12 = ("nvidia-cuda-nvrtc-cu12==12.*", "nvidia-cuda-runtime-cu12==12.*")


@nox.session
@nox.parametrize(
    "packages",
    [
        nox.param(("cupy-cuda12x==13.*", *CUDA_12), id="13"),
        nox.param(("cupy-cuda12x[ctk]==14.*",), id="14-cuda12"),
        nox.param(("cupy-cuda13x[ctk]==14.*",), id="14-cuda13"),
    ],
)
def cupy(session: nox.Session, packages: tuple[str, ...]) -> None:
    """What is called with CuPy's arrays, with CuPy itself, on a stand-in for the driver: see tests/emulate."""
    session.install(*packages, "pytest", "hypothesis", "matplotlib", "ml_dtypes", "tqdm")
    session.install("--no-deps", "-e", ".")
    names = ("kernels", "arrays", "errors", "warmup", "doctor", "gradients", "directions", "golden", "oracle")
    files = session.posargs or [f"tests/test_{name}.py" for name in names]
    on_stand_in = ("python", "-m", "tests.emulate.real_cupy", "-m")
    session.run(*on_stand_in, "pytest", "-q", "-m", "gpu", "-k", "not cuda-torch", *files)
    if not session.posargs:
        session.run(*on_stand_in, "tests.sanitize")
        session.run(*on_stand_in, "benchmarks.gpu", "--rehearse", "--out", session.create_tmp())


@nox.session
def check(session: nox.Session) -> None:
    install(session, "test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    install(session, "docs")
    session.run("python", "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "docs", "out/site")
