"""Threads of the CPU backend: how many, the same bits with any number, and what may go wrong around them."""

import concurrent.futures
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import rule
from cupy_roialign.cpu import backend, threads
from tests.test_oracle import lay_out


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cr.set_num_threads(None)


def test_default_follows_the_cpus_of_the_process(monkeypatch):
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    assert 1 <= cr.get_num_threads() <= (os.cpu_count() or 1)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
        monkeypatch.setattr(threads, "_quota", lambda: 2**16)
        assert cr.get_num_threads() == 3
        monkeypatch.setattr(threads, "_quota", lambda: 2)
        assert cr.get_num_threads() == 2


def test_no_more_than_torch_uses(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(threads, "_usable_cpus", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert cr.get_num_threads() == 5
    cr.set_num_threads(9)
    assert cr.get_num_threads() == 9


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("150000 100000\n", 2), ("max 100000\n", 2**16), ("50000 100000\n", 1), (None, 2**16), ("?", 2**16)],
)
def test_quota_of_a_container(tmp_path, text, cpus):
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert threads._quota(tmp_path) == cpus


def test_variable_and_function(monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, "3")
    assert cr.get_num_threads() == 3
    cr.set_num_threads(np.int64(5))
    assert cr.get_num_threads() == 5
    cr.set_num_threads(None)
    assert cr.get_num_threads() == 3
    for text in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv(threads.VARIABLE, text)
        with pytest.raises(ValueError, match=f"{threads.VARIABLE} must be a whole number.*{text}"):
            cr.get_num_threads()
        with pytest.raises(ValueError, match=threads.VARIABLE):  # however small the work
            threads.run(print, [], 0)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-2, ValueError), (1.0, TypeError), (True, TypeError)])
def test_wrong_number(count, error):
    with pytest.raises(error, match="count must be"):
        cr.set_num_threads(count)


RULE = rule.roi_align((5, 4), 1.0, 2, True)


def calls(channels, order, dtype=np.float32):
    rng = np.random.default_rng(2)
    features = lay_out(rng.standard_normal((2, channels, 40, 50)).astype(dtype), order)
    boxes, indices = rng.uniform(-2, 42, (60, 4)).astype(np.float32), rng.integers(0, 2, 60)
    grad = lay_out(rng.standard_normal((60, channels, 5, 4)).astype(dtype), order)
    return [
        lambda: backend.forward(features, boxes, indices, RULE),
        lambda: backend.feature_gradient(grad, features, boxes, indices, RULE),
        lambda: backend.box_gradient(grad, features, boxes, indices, RULE),
    ]


def count_starts(monkeypatch):
    started = []
    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self.name) or original(self))
    return started


def test_threads_are_started_where_they_are_worth_it(monkeypatch):
    pytest.importorskip("numba")
    cr.set_num_threads(3)
    started = count_starts(monkeypatch)
    forward, *_ = calls(200, "contiguous")
    forward()
    assert started == ["cupy_roialign-1", "cupy_roialign-2"]
    del started[:]
    cr.roi_align(np.ones((1, 64, 20, 20), np.float32), np.array([[0, 1, 1, 9, 9]], np.float32), 7)
    assert started == []


def test_work_is_done_where_no_thread_can_be_started(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    forward, *_ = calls(200, "contiguous")
    cr.set_num_threads(1)
    expected = forward()
    cr.set_num_threads(4)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    np.testing.assert_array_equal(forward(), expected)


def test_an_error_in_a_thread_reaches_the_caller():
    cr.set_num_threads(3)
    done = []

    def work(item):
        done.append(item)
        if item == 5:
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        threads.run(work, range(1000), threads.WORTH_IT)
    assert len(done) < 1000
    threads.run(done.append, ["again"], threads.WORTH_IT)
    assert done[-1] == "again"


def test_no_warning_from_a_thread(monkeypatch, recwarn):
    monkeypatch.setattr(threads, "WORTH_IT", 0)
    cr.set_num_threads(4)
    features = np.full((1, 128, 8, 8), np.inf, np.float32)
    with np.errstate(all="warn"):
        crops = cr.roi_align(features, np.array([[0, 1, 1, 6, 6]], np.float32), 3)
    assert np.isinf(crops).all()
    assert not recwarn


def test_callers_in_several_threads(monkeypatch):
    monkeypatch.setattr(threads, "WORTH_IT", 0)
    every = calls(64, "contiguous") + calls(3, "contiguous")
    cr.set_num_threads(1)
    expected = [call() for call in every]
    cr.set_num_threads(3)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for actual, wanted in zip(pool.map(lambda call: call(), every * 5), expected * 5, strict=True):
            np.testing.assert_array_equal(actual, wanted)


FORK = """
import os, sys
import numpy as np
import cupy_roialign as cr
from cupy_roialign.cpu import threads
threads.WORTH_IT = 0
cr.set_num_threads(3)
features = np.random.default_rng(0).random((1, 200, 30, 30), np.float32)
boxes = np.array([[0, 1, 1, 20, 20], [0, 3, 3, 9, 29]], np.float32)
before = cr.roi_align(features, boxes, 7)
child = os.fork()
after = cr.roi_align(features, boxes, 7)
same = bool((before == after).all())
if not child:
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) or not same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use():
    # In a process of its own, since one with other libraries' threads must not be forked.
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


AT_EXIT = """
import atexit
import numpy as np
import cupy_roialign as cr
from cupy_roialign.cpu import threads
threads.WORTH_IT = 0
cr.set_num_threads(3)
features, boxes = np.ones((1, 200, 9, 9), np.float32), np.ones((1, 4), np.float32)
atexit.register(lambda: print(cr.roi_align(features, [boxes], 2).sum()))
"""


def test_a_call_while_the_interpreter_ends():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], check=True, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("800.0\n", "")


def test_an_interrupt_leaves_no_thread_at_work():
    """Control-C that comes while the caller waits for its threads, or between two items."""
    cr.set_num_threads(2)
    done = []

    def work(item):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
            done.append(item)

    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        threads.run(work, range(2), threads.WORTH_IT)
    left = [t for t in threading.enumerate() if t.name.startswith("cupy_roialign-")]
    for thread in left:
        thread.join()
    assert not left


def test_an_error_that_was_handled_keeps_nothing_alive():
    cr.set_num_threads(2)

    class Large:
        pass

    def call():
        large = Large()

        def work(item, large=large):
            raise MemoryError

        with pytest.raises(MemoryError):
            threads.run(work, range(9), threads.WORTH_IT)
        return weakref.ref(large)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()
