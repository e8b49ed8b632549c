"""A stand-in for CuPy on a machine without a GPU: arrays in host memory, kernels compiled by g++ and run by fibers.

`installed()` puts it in CuPy's place, so that gpu/ with its launch code and the kernels in cuda/ run unchanged. It is
strict where a GPU is not; see `device` and host.h.

    python -m tests.emulate SCRIPT [ARGS]     runs a script that imports cupy with it
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType

_modules: dict[str, ModuleType] = {}  # modules that have imported the stand-in as cupy, while it is not in place
_OF_CUPY = ("cupy", "cupy.cuda", "cupy_roialign.gpu.cupy_arrays")


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """Within it `import cupy` gives the stand-in; a CuPy that is there comes back afterwards."""
    from cupy_roialign.gpu import kernels
    from tests.emulate import device

    if sys.modules.get("cupy") is device:
        yield device
        return
    _modules.update({"cupy": device, "cupy.cuda": device.cuda})
    before = _swap(_modules)
    real_kernel, kernels.kernel = kernels.kernel, _kernel
    try:
        yield device
    finally:
        kernels.kernel = real_kernel
        _modules.update(_swap(before))


def _swap(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Puts these in place of those that it returns."""
    from cupy_roialign import gpu

    others = {name: sys.modules.pop(name) for name in _OF_CUPY if name in sys.modules}
    sys.modules.update(modules)
    vars(gpu).pop("cupy_arrays", None)
    if backend := modules.get("cupy_roialign.gpu.cupy_arrays"):
        vars(gpu)["cupy_arrays"] = backend
    return others


@functools.cache
def _kernel(name: str, types: tuple[object, ...]) -> object:
    from cupy_roialign.gpu import kernels
    from tests.emulate import device

    return device.RawKernel(kernels.source(name, kernels.Types(*types)), name)
