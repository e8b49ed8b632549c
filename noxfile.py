"""The tests on each Python, and the checks: `nox`. Pythons that are not installed are left out.

Sessions install as `make` does; TORCH names the build of torch, which must have a wheel for that Python.
"""

import os

import nox

nox.needs_version = ">=2024.4.15"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def install(session: nox.Session, extras: str) -> None:
    session.install(os.environ.get("TORCH", "torch"))  # first, so that the build of torch stays
    session.install("-e", f".[{extras}]")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    install(session, "test,examples,docs")
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session
def check(session: nox.Session) -> None:
    install(session, "test,examples,docs")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    install(session, "docs")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "out/site")
