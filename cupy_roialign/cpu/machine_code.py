"""The loops as machine code: compiled by Numba when they are first asked for, and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from cupy_roialign import geometry
from cupy_roialign import rule as rules
from cupy_roialign.cpu import compiled_rows, loops
from cupy_roialign.rule import Rule

LOOPS: dict[str, Any] = {
    loop.__name__: loop for loop in (compiled_rows.rows, loops.crops, loops.spread, loops.slopes, loops.forward)
}
"""What is compiled, each for several types."""

_config: Any = numba.config


class Spec(NamedTuple):
    """As much of a rule as geometry.py asks for, of types that Numba knows."""

    frame: int
    taps: int
    border: int
    spatial_scale: float
    sampling_ratio: int
    aligned: bool

    @classmethod
    def of(cls, rule: Rule) -> Spec:
        frame, taps, border = int(rule.frame), int(rule.taps), int(rule.border)
        return cls(frame, taps, border, rule.spatial_scale, rule.sampling_ratio, rule.aligned)


class Key(NamedTuple):
    """Of a loop."""

    name: str
    dtype: str  # of the features, f or d
    real: str  # of positions, for rows and forward
    few: bool  # for few channels, that is less than loops.LANES


def _signature(key: Key) -> tuple[Any, ...]:
    """The types of a loop's arguments."""
    (f, real), i, array = map(numba.from_dtype, map(np.dtype, key[1:3])), numba.int64, numba.types.Array
    pair, four, eight = (numba.types.UniTuple(i, n) for n in (2, 4, 8))
    integers, read, table = (array(t, n, "C", readonly=True) for t, n in ((i, 1), (f, 1), (f, 2)))
    written, sums = array(f, 1, "C"), array(numba.float64, 2, "C")
    of = integers, array(i, 3, "C", readonly=True), integers, read, read, pair
    scratch = array(numba.uint32, 2, "C"), array(numba.uint64, 2, "C"), array(f, 2, "C")
    common = eight, integers, integers, *of, *scratch, numba.boolean if key.few else numba.none
    boxes = numba.typeof(Spec(0, 0, 0, 1.0, 1, True)), array(real, 2, "A", readonly=True), four, pair, pair
    rows = array(i, 1, "C"), array(i, 3, "C"), array(i, 1, "C"), array(f, 2, "C"), sums
    return {
        "rows": (*boxes, *rows),
        "crops": (read, *common, numba.boolean, written),
        "spread": (written, *common, read),
        "slopes": (read, *common, table, table, read, sums, sums),
        "forward": (*boxes, integers, *rows, read, eight, integers, *scratch, common[-1], written),
    }[key.name]


_made: dict[tuple[str, str, str, bool], Any] = {}

_lock = threading.RLock()


def loop(*key: Any) -> Any:
    """A loop as machine code."""
    return _made.get(key) or make(Key(*key))


def make(key: Key) -> Any:
    """Compiles a loop, or loads it from the cache on disk; once, whichever thread asks first."""
    function, signature = LOOPS[key.name], _signature(key)
    if key.name == "forward":  # It calls two loops as they are compiled; Numba would compile them again.
        rows, crops = Key("rows", key.dtype, key.real, False), Key("crops", key.dtype, key.dtype, key.few)
        parts = {"rows": make(rows), "crops": make(crops)}
        function = types.FunctionType(function.__code__, function.__globals__ | parts)
    with _lock, _cache_folder(key) as kept_in:
        if key not in _made:
            try:  # Numba would take another folder, that knows of changes to loops.py alone
                os.makedirs(kept_in, exist_ok=True)
                tempfile.TemporaryFile(dir=kept_in).close()
                _made[key] = numba.njit(signature, cache=True, **compiled_rows.OPTIONS)(function)
            except (OSError, RuntimeError):  # one that cannot be written to
                _made[key] = numba.njit(signature, **compiled_rows.OPTIONS)(function)
        return _made[key]


def folder() -> str:
    """Where machine code is kept."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _config.CACHE_DIR or os.path.join(caches, "cupy_roialign")


@contextlib.contextmanager
def _cache_folder(key: Key) -> Iterator[str]:
    """Numba's cache, in a folder of these very sources.

    By itself Numba looks whether the file of a function has changed, but not those of functions that it calls. And two
    processes that compile one function for other types at the same time would spoil each other's entries.
    """
    digest = hashlib.sha256()
    for module in (geometry, rules, compiled_rows, loops):
        digest.update(Path(str(module.__file__)).read_bytes())
    before = _config.CACHE_DIR
    _config.CACHE_DIR = os.path.join(folder(), digest.hexdigest()[:16], f"{key.dtype}{key.real}{key.few:d}")
    try:
        yield _config.CACHE_DIR
    finally:
        _config.CACHE_DIR = before


def compile_all() -> None:
    """All loops for float32 and float64."""
    for name, dtype, few in itertools.product(LOOPS, "fd", (False, True)):
        make(Key(name, dtype, dtype, few and name != "rows"))
