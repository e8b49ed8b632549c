"""`python -m cupy_roialign warmup`: compiles kernels before a program asks for them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator

from cupy_roialign import arrays, doctor, geometry, kernels, problems
from cupy_roialign.geometry import Dialect, Rule

Instantiation = tuple[str, kernels.Types]

DIALECTS = {
    "crop_and_resize": (Dialect.CROP_AND_RESIZE,),
    "roi_crop": (Dialect.ROI_CROP_CENTERS, Dialect.ROI_CROP_CORNERS),
    "roi_align": (Dialect.ROI_ALIGN,),
}
ORDERS = {"contiguous": (False,), "channels-last": (True,), "both": (False, True)}

DESCRIPTION = """\
Compiles kernels for the current GPU and leaves them in CuPy's kernel cache, where later programs find them. Without
options these are the kernels that most programs ask for: all operators and their gradients, on float32 and float16, in
both orders of memory, with float32 boxes.

CuPy finds a kernel again for the same compute capability and the same versions of CuPy, CUDA's compiler and this
package. Set CUPY_CACHE_DIR to choose the folder, as to ship it in a container; CUDA_VISIBLE_DEVICES chooses the GPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(option: str, known: Iterable[str], default: list[str], about: str) -> None:
        names = list(known)
        about = f"{about} (of {', '.join(names)})"
        parser.add_argument(option, nargs="+", metavar="NAME", choices=names, default=default, help=about)

    add("--operator", DIALECTS, [*DIALECTS], "all by default")
    add("--dtype", kernels.CTYPES, ["float32", "float16"], "of features; float32 and float16 by default")
    add("--box-dtype", ("float32", "float64"), ["float32"], "float32 by default")
    parser.add_argument("--order", choices=ORDERS, default="both", help="of features in memory; both by default")
    parser.add_argument("--inference", action="store_true", help="no gradients")
    parser.add_argument("--large", action="store_true", help="also for arrays of 2**31 elements and more")
    parser.add_argument("--all", action="store_true", help="every kernel there is, whatever the other options say")


def chosen(options: argparse.Namespace) -> list[Instantiation]:
    """Which of `kernels.instantiations` the options mean."""
    if options.all:
        return kernels.instantiations()
    rules = [Rule(dialect, (1, 1), (0, 1, 2, 3)) for operator in options.operator for dialect in DIALECTS[operator]]

    def wanted(name: str, types: kernels.Types) -> bool:
        # The gradient to features is made in the dtype that gradients have: float32 for images of integers.
        features = [arrays.output_name(f) for f in options.dtype] if name == "feature_gradient" else options.dtype
        return (
            types.features in features
            and types.crops == arrays.output_name(types.features)
            and types.boxes in options.box_dtype
            and any(types.positions == geometry.precision(rule, types.features, types.boxes) for rule in rules)
            and types.channels_last in ORDERS[options.order]
            and (options.large or not types.large)
            and (name == "forward" or not options.inference)
        )

    return [(name, types) for name, types in kernels.instantiations() if wanted(name, types)]


def run(options: argparse.Namespace) -> int:
    """Compiles; returns the exit status."""
    problem = missing()
    if problem:
        print(f"Nothing can be compiled here: {problem}", file=sys.stderr)
        return 1
    before, start = doctor.kernel_cache(), time.perf_counter()
    if before["in_memory"]:
        print("CUPY_CACHE_IN_MEMORY is 1, so that CuPy keeps no kernel on disk; unset it", file=sys.stderr)
        return 1
    todo = chosen(options)
    for name, types in _with_progress(todo):
        try:
            kernels.kernel(name, types)
        except Exception as error:
            print(f"{name} for {types} cannot be compiled: {error}", file=sys.stderr)
            return 1
    after, seconds = doctor.kernel_cache(), time.perf_counter() - start
    print(
        f"Kernels: {len(todo)}, new: {after['files'] - before['files']}, in {seconds:.1f} s\n"
        f"CuPy's kernel cache: {after['folder']}, {after['files']} files, {after['bytes'] / 2**20:.1f} MiB"
    )
    return 0


def missing() -> problems.Problem | None:
    """What keeps CuPy from compiling for a GPU, as far as that can be told before."""
    on = problems.machine()
    try:
        import cupy
    except Exception as error:
        if on.cuda is None:  # first things first
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
