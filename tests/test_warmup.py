"""`python -m cupy_roialign warmup`: what it compiles, and what it says."""

import argparse
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import __main__
from cupy_roialign.cpu import backend as cpu_backend
from cupy_roialign.diagnose import driver, warmup
from cupy_roialign.gpu import kernels

ROOT = Path(__file__).parents[1]
BOXES = np.array([[0.0, 0.0, 3.0, 3.0]])


def chosen(*arguments):
    parser = argparse.ArgumentParser()
    warmup.add_arguments(parser)
    found = warmup.chosen(parser.parse_args(arguments))
    assert len(found) == len(set(found))
    assert set(found) <= {item for channels in range(1, 9) for item in kernels.instantiations(channels)}
    return {(kernels.KERNELS[name], types) for name, types in found}


@pytest.fixture
def asked(emulated, monkeypatch):
    """Which kernels calls ask for; they are not run."""
    found = set()

    def kernel(name, types):
        found.add((kernels.KERNELS[name], types))
        return lambda grid, block, args: None

    monkeypatch.setattr(kernels, "kernel", kernel)
    return found


def call(cupy, operator, dtype, box_dtype, channels_last, gradients, channels=20, bins=(2, 3)):
    features = cupy.zeros((1, channels, 4, 5), dtype)
    if channels_last:
        features = cupy.zeros((1, 4, 5, channels), dtype).transpose(0, 3, 1, 2)
    boxes, indices = cupy.asarray(BOXES.astype(box_dtype)), cupy.zeros(1, np.int64)
    place = {"batch_indices": indices} if operator == "roi_align" else {"box_indices": indices}
    size = {"output_size" if operator == "roi_align" else "crop_size": bins}
    output, pullback = cr.vjp(getattr(cr, operator), features, boxes, **place, **size)
    if gradients:
        pullback(output)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("order", ["contiguous", "channels-last"])
@pytest.mark.parametrize("box_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
@pytest.mark.parametrize("operator", warmup.RULES)
def test_it_is_what_calls_ask_for(operator, dtype, box_dtype, order, gradients, asked, emulated):
    call(emulated, operator, dtype, box_dtype, order == "channels-last", gradients)
    options = ["--operator", operator, "--dtype", dtype, "--box-dtype", box_dtype, "--order", order]
    options += ["--channels", "20"]
    assert chosen(*options, *([] if gradients else ["--inference"])) == asked


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8"])
def test_features_of_few_channels(dtype, channels, asked, emulated):
    for channels_last, bins in itertools.product((False, channels > 1), ((2, 3), (2, 30))):
        call(emulated, "roi_crop", dtype, "float32", channels_last, True, channels, bins)
    options = ["--operator", "roi_crop", "--dtype", dtype]
    assert chosen(*options, "--channels", str(channels)) == asked
    call(emulated, "roi_crop", dtype, "float32", False, gradients=True)
    assert chosen(*options, "--channels", str(channels), "64") >= asked


def test_channels_must_be_a_number_from_1_on(capsys):
    for wrong in ("0", "-3", "many"):
        with pytest.raises(SystemExit):
            chosen("--channels", wrong)
        assert "--channels" in capsys.readouterr().err


def test_by_default_it_is_what_most_ask_for(asked, emulated):
    for operator, dtype, channels in itertools.product(warmup.RULES, ("float32", "float16"), (3, 256)):
        for channels_last, bins in itertools.product((False, True), ((2, 3), (30, 2))):
            call(emulated, operator, dtype, "float32", channels_last, True, channels, bins)
    assert chosen() == asked
    assert len(chosen("--large")) == 2 * len(asked)
    assert {file for file, _ in chosen("--double-backward") - chosen()} == {"forward_along.cu"}
    assert len(chosen("--all")) == len({item for channels in range(1, 9) for item in kernels.instantiations(channels)})


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """A function to which one says whether the loops for the CPU are compiled; at first they are not."""

    def compiled(why_not, seconds=1.25):
        monkeypatch.setattr(cpu_backend, "not_compiled", lambda: why_not)
        monkeypatch.setattr(cpu_backend, "compile_ahead", lambda: seconds)
        monkeypatch.setattr(cpu_backend, "machine_code_folder", lambda: "/cache/loops")

    compiled("Numba is not installed")
    return compiled


NO_LOOPS = "CPU loops: not compiled, because Numba is not installed\n"


def run(capsys, *arguments):
    status = __main__.main(["warmup", *arguments])
    return status, *capsys.readouterr()


SMALL = ("--dtype", "float32", "--order", "contiguous", "--channels", "256", "--inference")


@pytest.mark.parametrize("bar", [True, False])
def test_it_compiles(bar, cupy, capsys, monkeypatch, tmp_path):
    if bar:
        pytest.importorskip("tqdm")
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    (tmp_path / "one.cubin").write_bytes(bytes(2**20))
    if not bar:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    compiled = []
    kernel = kernels.kernel
    monkeypatch.setattr(kernels, "kernel", lambda *asked: compiled.append(asked) or kernel(*asked))
    status, output, progress = run(capsys, *SMALL)
    assert status == 0
    assert compiled == [("forward", kernels.Types(*["float32"] * 4, False, False, lanes=8))]
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]  # a GPU's kernel is kept, where it was not before
    assert re.match(rf"GPU kernels: 1, new: {len(sizes) - 1}, in .* s\n", output)
    assert f"CuPy's kernel cache: {tmp_path}, {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB\n" in output
    assert progress.startswith(NO_LOOPS)
    assert ("1/1 [" in progress) if bar else (progress == NO_LOOPS + "1/1 forward\n")


def test_it_says_which_kernel_failed(emulated, capsys, monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)

    def kernel(name, types):
        raise RuntimeError("no headers; install them")

    monkeypatch.setattr(kernels, "kernel", kernel)
    status, output, error = run(capsys, *SMALL)
    assert (status, output) == (1, "")
    assert "forward for Types(features='float32'" in error
    assert "no headers; install them" in error


def test_without_a_cache(emulated, capsys, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    status, output, error = run(capsys)
    assert (status, output) == (1, "")
    assert "CUPY_CACHE_IN_MEMORY is 1" in error


def test_without_cupy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    status, output, error = run(capsys)
    assert (status, output) == (1, "")
    assert "NVIDIA driver" in error
    monkeypatch.setattr(driver, "cuda_version", lambda: (13, 0))
    status, output, error = run(capsys)
    assert (status, output) == (1, "")
    assert re.search(r"CuPy, which is not installed; .*pip install 'cupy_roialign\[cuda1\d\]'", error)


def test_without_a_gpu(emulated, capsys, monkeypatch):
    monkeypatch.setattr(emulated.cuda, "is_available", lambda: False)
    status, output, error = run(capsys)
    assert (status, output) == (1, "")
    assert "CuPy finds no GPU" in error


def test_loops_alone(capsys, monkeypatch, loops):
    """Without a GPU the status is 0 if they are compiled."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    loops("")
    status, output, error = run(capsys)
    assert (status, output) == (0, "CPU loops: ready in 1.2 s, kept in /cache/loops\n")
    assert error.startswith("GPU kernels: not compiled, because there is no NVIDIA driver; ")


def test_loops_are_compiled(capsys, monkeypatch):
    """By the program as a user runs it."""
    pytest.importorskip("numba")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUPY_ROIALIGN_COMPILED": "1"}
    environment["NUMBA_CACHE_DIR"] = folder = cpu_backend.machine_code_folder()
    command = [sys.executable, "-m", "cupy_roialign", "warmup", "--inference"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"CPU loops: ready in \d+\.\d s, kept in {re.escape(folder)}\n", done.stdout)


def test_wrong_options(capsys):
    for options in (["--dtype", "int32"], ["--operator", "roi_pool"], ["--order", "NHWC"]):
        with pytest.raises(SystemExit):
            run(capsys, *options)
        assert "invalid choice" in capsys.readouterr().err
