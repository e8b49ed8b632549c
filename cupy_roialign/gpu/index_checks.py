"""Whether the GPU's backend waits for the GPU to check what only the elements of arrays can tell."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

_checked = contextvars.ContextVar("cupy_roialign_checked", default=False)


def wanted() -> bool:
    return _checked.get() or os.environ.get("CUPY_ROIALIGN_CHECK", "0") not in ("", "0")


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Within it a batch index out of range raises IndexError on a GPU too, as it always does on the CPU.

    Without it such a box has an output of NaN and adds to no gradient, because to look for it is to wait for the
    GPU. ``CUPY_ROIALIGN_CHECK=1`` in the environment does the same for a whole program.

    >>> import cupy_roialign as cr
    >>> with cr.checked():
    ...     pass  # calls on CuPy arrays
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)
