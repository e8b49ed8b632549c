"""Threads of the CPU backend: how many there are, and work that is shared out among them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

VARIABLE = "CUPY_ROIALIGN_NUM_THREADS"

WORTH_IT = 2_000_000
"""Multiplications from which on a second thread is started: less would not pay for the start."""

Item = TypeVar("Item")

_chosen: int | None = None


def get_num_threads() -> int:
    """The most threads that a call on the CPU uses.

    What `set_num_threads` was given; otherwise the environment variable ``CUPY_ROIALIGN_NUM_THREADS``; otherwise the
    CPUs that this process may use, by its affinity and its control group, or fewer, where PyTorch is loaded and uses
    fewer: in the workers of its DataLoader one.
    """
    chosen = _chosen or _from_environment()
    if chosen:
        return chosen
    torch: Any = sys.modules.get("torch")
    most = torch.get_num_threads() if hasattr(torch, "get_num_threads") else _usable_cpus()
    return min(most, _usable_cpus())


def _from_environment() -> int | None:
    text = os.environ.get(VARIABLE, "").strip()
    if text and (not text.isdecimal() or int(text) < 1):
        raise ValueError(f"the environment variable {VARIABLE} must be a whole number from 1 on; got {text!r}")
    return int(text) if text else None


def set_num_threads(count: int | None) -> None:
    """Limits the threads that a call on the CPU uses, in the whole process; None brings the default back.

    Results are the same to the bit whatever the number.

    Raises:
        TypeError, ValueError: ``count`` is not an int from 1 on.
    """
    global _chosen
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise TypeError(f"count must be an int or None; got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"count must be 1 or more, or None for the default; got {count}")
    _chosen = None if count is None else int(count)


def parts(count: int, multiplications: int) -> list[slice]:
    """So many items in parts for `run`: one part where one thread does all, else some for each thread."""
    wanted = 4 * get_num_threads() if multiplications >= WORTH_IT else 1
    step = max(1, -(-count // wanted))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def run(work: Callable[[Item], None], items: Iterable[Item], multiplications: int) -> None:
    """work(item) for each of the items, which must not depend on each other, on as many threads as are worth it.

    Threads live for one call: so there are none to go wrong when the process forks, and callers in several threads do
    not wait for each other.
    """
    items = list(items)
    count = 1
    if multiplications >= WORTH_IT:
        count = min(get_num_threads(), len(items))
    elif _chosen is None:
        _from_environment()  # so that a wrong one is not found by large calls only
    if count == 1:
        for item in items:
            work(item)
        return
    rest = iter(items)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def take() -> None:
        with np.errstate(all="ignore"):  # a thread begins with its own
            while not errors:
                with lock:
                    item = next(rest, None)
                if item is None:
                    return
                try:
                    work(item)
                except BaseException as error:
                    errors.append(error)

    ended = []

    def help(end: threading.Event) -> None:
        try:
            take()
        finally:
            end.set()

    try:
        for number in range(1, count):
            end = threading.Event()
            threading.Thread(target=help, args=(end,), name=f"cupy_roialign-{number}").start()
            ended.append(end)
    except RuntimeError:  # no more threads to be had; those that there are do all
        pass
    except BaseException as error:
        errors.append(error)
    try:
        take()
    except BaseException as error:  # an interrupt between two items
        errors.append(error)
    for end in ended:
        while not end.is_set():  # not Thread.join: interrupted, it takes a thread that runs for one that has ended
            try:
                end.wait()
            except BaseException as error:
                errors.append(error)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or the error would hold its own traceback, and that all arrays


def _usable_cpus() -> int:
    # cpu_count is all that macOS and Windows tell
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, _quota()))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that a container grants, rounded up; many where nothing limits them."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):
        return 2**16
