"""A stand-in for CuPy on a machine without a GPU: arrays in host memory, kernels compiled by g++ and run by fibers.

`installed()` puts it in CuPy's place, so that cupy_backend.py, launch code and all, and the kernels in cuda/ run as
they are. It is strict where a GPU is not; see `device` and host.h.

    python -m tests.emulate SCRIPT [ARGS]     runs a script that imports cupy with it
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def installed() -> Iterator[object]:
    """Within it `import cupy` gives the stand-in."""
    from tests.emulate import device

    mine = ("cupy", "cupy.cuda", "cupy_roialign.cupy_backend")
    before = {name: sys.modules.pop(name) for name in mine if name in sys.modules}
    sys.modules["cupy"] = device  # type: ignore[assignment]
    sys.modules["cupy.cuda"] = device.cuda  # type: ignore[assignment]
    import cupy_roialign
    from cupy_roialign import kernels

    kernels.kernel.cache_clear()
    try:
        yield device
    finally:
        kernels.kernel.cache_clear()
        for name in mine:
            sys.modules.pop(name, None)
        vars(cupy_roialign).pop("cupy_backend", None)
        sys.modules.update(before)
