"""Whether batch indices are checked on a GPU too, which synchronizes with it."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

_checked = contextvars.ContextVar("cupy_roialign_checked", default=False)


def wanted() -> bool:
    """Whether indices are to be checked."""
    return _checked.get() or os.environ.get("CUPY_ROIALIGN_CHECK", "0") not in ("", "0")


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """A context in which an out-of-range batch index raises IndexError on a GPU too, as it always does on the CPU.

    Otherwise the crop of such a box is NaN and the box contributes to no gradient, because checking would force a
    synchronization with the GPU. ``CUPY_ROIALIGN_CHECK=1`` in the environment does the same for a whole program.

    >>> import cupy_roialign as cr
    >>> with cr.checked():
    ...     pass  # calls on CuPy arrays or CUDA tensors
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)
