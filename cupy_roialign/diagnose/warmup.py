"""`python -m cupy_roialign warmup`: compiles the loops for the CPU and the kernels for a GPU before their first use."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from cupy_roialign import arrays, geometry, rule
from cupy_roialign.cpu import backend as cpu_backend
from cupy_roialign.diagnose import doctor, problems
from cupy_roialign.gpu import kernels

Instantiation = tuple[str, kernels.Types]

RULES: dict[str, Callable[[tuple[int, int]], rule.Rule]] = {
    "crop_and_resize": rule.crop_and_resize,
    "roi_crop": rule.roi_crop,
    "roi_align": rule.roi_align,
}
"""The rule of each operator, for a number of bins."""

ORDERS = {"contiguous": (False,), "channels-last": (True,), "both": (False, True)}
"""`Types.channels_last` of each choice of memory orders."""

DESCRIPTION = """\
Compiles what the first calls of a program would have to compile: the loops for the CPU if Numba is installed, and
kernels for the current GPU if there is one, which stay in CuPy's kernel cache. Without options these are the kernels
that most programs need: all operators and their gradients, for float32 and float16 features with 3 channels and with 8
or more, in both memory orders, and float32 boxes. The options choose other kernels.

CuPy finds a kernel again for the same compute capability and the same versions of CuPy, CUDA's compiler and this
package. CUPY_CACHE_DIR chooses the folder, for example to ship it in a container; CUDA_VISIBLE_DEVICES chooses the GPU.

Exit status: 1 if nothing could be compiled, otherwise 0.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""

    def add(option: str, known: Iterable[str], default: list[str], about: str) -> None:
        names = list(known)
        about = f"{about} (of {', '.join(names)})"
        parser.add_argument(option, nargs="+", metavar="NAME", choices=names, default=default, help=about)

    add("--operator", RULES, [*RULES], "all by default")
    add("--dtype", kernels.CTYPES, ["float32", "float16"], "dtypes of features; float32 and float16 by default")
    add("--box-dtype", ("float32", "float64"), ["float32"], "dtypes of boxes; float32 by default")
    parser.add_argument("--order", choices=ORDERS, default="both", help="memory order of features; both by default")
    parser.add_argument(
        "--channels",
        nargs="+",
        type=_number_of_channels,
        metavar="N",
        default=[3, kernels.MANY_CHANNELS],
        help=f"channels of features; all from {kernels.MANY_CHANNELS} on share their kernels; 3 and 8 by default",
    )
    parser.add_argument("--inference", action="store_true", help="no gradients")
    parser.add_argument("--double-backward", action="store_true", help="also gradients of gradients")
    parser.add_argument("--large", action="store_true", help="also for arrays of 2**31 elements and more")
    parser.add_argument("--all", action="store_true", help="every kernel, whatever the other options say")


def _number_of_channels(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {number}")
    return number


def chosen(options: argparse.Namespace) -> list[Instantiation]:
    """Which of `kernels.instantiations` the options mean."""
    channels = range(1, kernels.MANY_CHANNELS + 1) if options.all else options.channels
    known = dict.fromkeys(item for number in channels for item in kernels.instantiations(number))
    if options.all:
        return [*known]
    rules = [RULES[operator]((1, 1)) for operator in options.operator]
    skipped = set() if options.double_backward else {"forward_along"}
    if options.inference:
        skipped = set(kernels.KERNELS) - {"forward"}

    def wanted(name: str, types: kernels.Types) -> bool:
        # The gradient of integer features is computed in float32.
        features = [arrays.output_name(f) for f in options.dtype] if name == "feature_gradient" else options.dtype
        return (
            name not in skipped
            and types.features in features
            and types.crops == arrays.output_name(types.features)
            and types.boxes in options.box_dtype
            and any(types.positions == geometry.precision(r.frame, types.features, types.boxes) for r in rules)
            and types.channels_last in ORDERS[options.order]
            and (options.large or not types.large)
        )

    return [(name, types) for name, types in known if wanted(name, types)]


def run(options: argparse.Namespace) -> int:
    """Compiles; returns the exit status."""
    compiled = [compile_loops(), compile_kernels(chosen(options))]
    return int(not any(compiled))


def compile_loops() -> bool:
    """Compiles the loops for the CPU; whether that could be done."""
    why_not = cpu_backend.not_compiled().rstrip(" .")
    if why_not:
        print(f"CPU loops: not compiled, because {why_not}", file=sys.stderr)
        return False
    print(f"CPU loops: ready in {cpu_backend.compile_ahead():.1f} s, kept in {cpu_backend.machine_code_folder()}")
    return True


def compile_kernels(todo: list[Instantiation]) -> bool:
    """Compiles kernels for the current GPU; whether that could be done."""
    problem = missing()
    if problem:
        print(f"GPU kernels: not compiled, because {problem}", file=sys.stderr)
        return False
    before, start = doctor.kernel_cache(), time.perf_counter()
    if before["in_memory"]:
        print(
            "GPU kernels: not compiled, because CUPY_CACHE_IN_MEMORY is 1 and CuPy keeps no kernel on disk; unset it",
            file=sys.stderr,
        )
        return False
    for name, types in _with_progress(todo):
        try:
            kernels.kernel(name, types)
        except Exception as error:
            print(f"GPU kernels: {name} for {types} cannot be compiled: {error}", file=sys.stderr)
            return False
    after, seconds = doctor.kernel_cache(), time.perf_counter() - start
    print(
        f"GPU kernels: {len(todo)}, new: {after['files'] - before['files']}, in {seconds:.1f} s\n"
        f"CuPy's kernel cache: {after['folder']}, {after['files']} files, {after['bytes'] / 2**20:.1f} MiB"
    )
    return True


def missing() -> problems.Problem | None:
    """What keeps CuPy from compiling for a GPU, as far as that is known before it tries."""
    on = problems.machine()
    try:
        import cupy
    except Exception as error:
        if on.cuda is None:  # without a driver CuPy would not help
            return problems.no_gpu(None, None, on)._replace(what="there is no NVIDIA driver")
        return problems.cupy_import_failed(error)
    return None if problems.finds_gpu(cupy) else problems.no_gpu_here()


def _with_progress(todo: list[Instantiation]) -> Iterable[Instantiation]:
    try:
        from tqdm import tqdm
    except ImportError:
        return _with_lines(todo)
    return tqdm(todo, unit="kernel")


def _with_lines(todo: list[Instantiation]) -> Iterator[Instantiation]:
    for number, item in enumerate(todo, start=1):
        print(f"{number}/{len(todo)} {item[0]}", file=sys.stderr)
        yield item
