"""`make test-gpu`: its stages, with commands that need no GPU in place of theirs."""

import json
import sys

import pytest

from tests import gpu_stages

HELLO = [sys.executable, "-c", "print('hello')"]
FAILS = [sys.executable, "-c", "raise SystemExit(3)"]
WAIT = "import time\nprint('begun')\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('told')"
SLOW = [sys.executable, "-uc", WAIT]
DEAF = [sys.executable, "-c", "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"]


def outcome(of, tmp_path, monkeypatch, limit=60):
    """The exit status of stages with these commands, what became of each, and what each printed."""
    monkeypatch.setattr(gpu_stages, "commands", lambda stage, out: of[stage])
    monkeypatch.setattr(gpu_stages, "LIMITS", dict.fromkeys(of, limit))
    monkeypatch.setattr(sys, "argv", ["gpu_stages", *of, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as status:
        gpu_stages.main()
    stages = json.loads((tmp_path / "stages.json").read_text())
    return status.value.code, stages, {stage: (tmp_path / f"{stage}.log").read_text() for stage in of}


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    status, stages, logs = outcome({"first": [HELLO, FAILS], "second": [HELLO]}, tmp_path, monkeypatch)
    assert status
    assert stages["first"]["problem"].endswith(": 3")
    assert stages["second"]["problem"] == ""
    assert logs == {"first": "hello\n", "second": "hello\n"}
    assert not outcome({"second": [HELLO]}, tmp_path, monkeypatch)[0]


def test_a_stage_ends_at_its_limit_and_keeps_what_it_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages, "LAST_WORDS", 2)
    status, stages, logs = outcome({"slow": [SLOW, DEAF]}, tmp_path, monkeypatch, limit=1)
    assert status
    assert stages["slow"]["problem"].count("stopped after 1 s") == 2
    assert stages["slow"]["seconds"] < 30
    assert logs["slow"] == "begun\ntold\n"


def test_each_stage_has_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("SANITIZER", sys.executable)
    assert set(gpu_stages.LIMITS) == {"smoke", "benchmark", "tests", "sanitizer"}
    assert sum(gpu_stages.LIMITS.values()) <= 9 * 60
    for stage in gpu_stages.LIMITS:
        assert gpu_stages.commands(stage, tmp_path)
    monkeypatch.setenv("SANITIZER", "no such program")
    with pytest.raises(FileNotFoundError, match="no such program is not on the PATH; set SANITIZER"):
        gpu_stages.commands("sanitizer", tmp_path)
