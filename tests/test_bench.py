"""The benchmark tool: who takes part and takes turns, what it writes, and how it compares."""

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from benchmarks import __main__ as program
from benchmarks import compare, measure, report, sides, workloads
from cupy_roialign import numpy_backend, numpy_dense

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
OWN = shlex.split(
    "--features 2,16,12,10 --boxes 3 --output 2,3 --scale 0.5 --sampling-ratio 2 --aligned --box-side 4,9"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the program, of a workload of one's own: what it printed, its report, and where that is."""
    path = tmp_path_factory.mktemp("bench") / "own"
    command = [sys.executable, "-m", "benchmarks", *OWN, "--threads", "2", "--runs", "2", "--save", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.with_suffix(".json").read_text()), path


def test_report(run):
    found = run[1]
    assert found["workloads"]["own"]["shape"] == [2, 16, 12, 10]
    assert found["workloads"]["own"]["image"] == [24, 20]
    assert found["versions"]["numpy"] == np.__version__
    assert found["processor"]
    assert found["runs"] == 2
    steps = found[report.TIMES]["2"]["own"]
    assert list(steps) == list(sides.STEPS)
    ours = {name for name in sides.OURS if sides.scipy or "SciPy" not in name}
    ours |= {name + sides.ONE_THREAD for name in ours}
    peers = [name for name in sides.PEERS[:2] if name not in found["absent"]]
    assert set(found["absent"]) <= set(sides.PEERS)
    assert set(steps["forward"]) == ours | set(peers)
    assert set(steps["box gradient"]) == ours
    for times in steps.values():
        for median, least, most in times.values():
            assert 0 < least <= median <= most < 60e3
    far = found[report.DIFFERENCES]["2"]["own"]["forward"]
    assert len(far) == len(steps["forward"]) - 1
    assert max(far.values()) < 1e-5


def test_onnxruntime_takes_part(run):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert "onnxruntime" in run[1][report.TIMES]["2"]["own"]["forward"]


def test_screen(run):
    printed, found, path = run
    assert report.machine(found) in printed
    for step, times in found[report.TIMES]["2"]["own"].items():
        assert f"own 3 boxes, 2x16x12x10, {step}\n" in printed
        assert all(f"\n  {side} " in printed for side in times)
    assert f"wrote {path}.json and {path}.png" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


REPORT = {
    "processor": "a processor",
    "system": "a system",
    "runs": 3,
    "versions": {"numpy": "2"},
    "workloads": json.loads(json.dumps({"W1": workloads.SPECS["W1"]})),
    report.TIMES: {
        "2": {
            "W1": {
                "forward": {
                    "onnxruntime": [120.0, 110.0, 130.0],
                    "torchvision": [200.0, 190.0, 210.0],
                    "NumPy alone, NCHW": [60.0, 50.0, 70.0],
                    "NumPy alone, channels-last": [0.5, 0.4, 0.7],
                    "NumPy alone, NCHW, one thread": [90.0, 80.0, 99.0],
                },
                "feature gradient": {
                    "NumPy alone, NCHW": [2.0, 1.0, 3.0],
                    "NumPy alone, channels-last": [4.0, 1.0, 9.0],
                },
                "box gradient": {"NumPy alone, NCHW": [2.0, 1.0, 3.0], "NumPy alone, channels-last": [4.0, 1.0, 9.0]},
            }
        }
    },
}


def test_table():
    (table,) = report.tables(REPORT).values()
    assert table.splitlines() == [
        "| | | fastest peer | NumPy alone, NCHW | NumPy alone, channels-last | NumPy alone, NCHW: over one thread |",
        "|---|---|---|---|---|---|",
        "| W1 FPN-P2 box head | forward | 120.0 ms, onnxruntime | 60.0 ms (2.0x) | 500 µs (240x) | 1.5x |",
        "| | feature gradient | | 2.0 ms | 4.0 ms | |",
        "| | box gradient | | 2.0 ms | 4.0 ms | |",
    ]


def test_a_list_is_a_line_of_the_file(tmp_path):
    report.write(REPORT, tmp_path / "a" / "b.json")
    text = (tmp_path / "a" / "b.json").read_text()
    assert '"onnxruntime": [ 120.0, 110.0, 130.0 ]' in text
    assert json.loads(text) == json.loads(json.dumps(REPORT))


def slowed(times, only=""):
    """REPORT, with those sides that have `only` in their name so many times slower."""
    found = copy.deepcopy(REPORT)
    for steps in found[report.TIMES]["2"].values():
        for sides_ in steps.values():
            for side in sides_:
                if only in side:
                    sides_[side] = [ms * times for ms in sides_[side]]
    return found


def test_ours_are_compared_by_the_fastest_peer():
    by_name = {change.case: change for change in compare.changes(REPORT, slowed(3))}
    forward = by_name["W1, forward, 2 threads: NumPy alone, NCHW"]
    assert forward.peer == "onnxruntime"
    assert forward.slower == pytest.approx(1)
    gradient = by_name["W1, feature gradient, 2 threads: NumPy alone, NCHW"]
    assert gradient.peer is None
    assert gradient.slower == pytest.approx(3)
    assert len(by_name) == 7
    now = slowed(3, "NCHW")
    del now[report.TIMES]["2"]["W1"]["forward"]["onnxruntime"]
    by_name = {change.case: change for change in compare.changes(REPORT, now)}
    assert by_name["W1, forward, 2 threads: NumPy alone, NCHW"] == compare.Change(
        "W1, forward, 2 threads: NumPy alone, NCHW", "torchvision", pytest.approx(3)
    )
    assert by_name["W1, forward, 2 threads: NumPy alone, channels-last"].slower == pytest.approx(1)


def test_other_workloads_are_not_compared():
    other = copy.deepcopy(REPORT)
    other["workloads"]["W1"]["K"] += 1
    assert not compare.changes(REPORT, other)
    other = copy.deepcopy(REPORT)
    other[report.TIMES]["1"] = other[report.TIMES].pop("2")
    assert not compare.changes(REPORT, other)


@pytest.mark.parametrize(
    ("now", "tolerance", "status"),
    [
        (REPORT, "1.25", 0),
        (slowed(1.3, "NumPy"), "1.25", 1),
        (slowed(1.3, "NumPy"), "1.4", 0),
        (slowed(0.1, "NumPy"), "1.25", 0),
        (slowed(1.3, "NumPy alone, NCHW, one thread"), "1.25", 1),
    ],
)
def test_status_of_a_comparison(now, tolerance, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "run", lambda chosen: now)
    stored = tmp_path / "stored.json"
    report.write(REPORT, stored)
    assert program.main(["W1", "--compare", str(stored), "--tolerance", tolerance]) == status
    printed = capsys.readouterr().out
    assert ("SLOWER" in printed) == bool(status)
    assert "wrote" not in printed
    assert list(tmp_path.iterdir()) == [stored]


def test_nothing_to_compare_is_an_error(run, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "run", lambda chosen: REPORT)
    assert "nothing that was measured is in" in program.main(["--compare", f"{run[2]}.json"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("W9", "workload must be some of W1 W2"),
        ("--features 1,2,3", "argument --features: must be 4 whole numbers above 0 with commas between; got '1,2,3'"),
        ("--features 1,2,3,0", "got '1,2,3,0'"),
        ("--boxes 3", "--boxes is of a workload of your own, which needs --features N,C,H,W"),
        ("--aligned", "--aligned is of a workload of your own"),
        ("W1 --features 1,2,3,4", "name no other one beside it"),
        ("--features 1,2,9,9 --box-side 9,3", "argument --box-side: must be the least and the most"),
        ("--features 1,2,9,9 --scale nan", "argument --scale: must be a number above 0; got 'nan'"),
        ("--features 1,2,9,9 --sampling-ratio -1", "--sampling-ratio and --seed must be 0 or more"),
        ("--threads 0", "argument --threads: must be a whole number above 0; got '0'"),
        ("--compare nowhere.json", "argument --compare: nowhere.json cannot be read"),
        ("--compare setup.cfg", "argument --compare: setup.cfg cannot be read"),
        ("--compare benchmarks/results/overhead.json", "overhead.json is not what --save writes"),
    ],
)
def test_arguments_that_are_wrong(given, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(program, "run", lambda chosen: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="2"):
        program.main(given.split())
    assert message in capsys.readouterr().err


def test_defaults():
    chosen = program.arguments([])[1]
    assert list(program.specs(chosen)) == program.NAMES
    assert chosen.save == program.LATEST
    assert program.arguments(["--compare", "x"])[1].save is None
    assert program.arguments(["--features", "1,2,3,4", "--output", "5"])[1].output == (5, 5)


def test_sides_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "TURN", 1e-9)
    log = []
    two = [
        sides.Side(name, {"forward": lambda name=name: log.append(name)}, prepare=lambda: log.append("-"))
        for name in "ab"
    ]
    times = measure.take_turns(two, "forward", 20)
    rounds = ["".join(log[i : i + 4]) for i in range(0, len(log), 4)]
    assert rounds[0] == "-a-b"
    assert 5 < rounds.count("-b-a") < 15
    assert set(rounds) == {"-a-b", "-b-a"}
    assert list(times) == ["a", "b"]


def test_quick_functions_are_called_often():
    calls = []
    measure.take_turns([sides.Side("a", {"forward": lambda: calls.append(1)})], "forward", 1)
    assert len(calls) > 100


def test_results_that_differ_are_an_error():
    def side(name, result):
        return sides.Side(name, {"forward": lambda: np.array(result)})

    one = [[1.0, 2.0]]
    assert measure.check([side("a", one), side("b", one)], "forward") == {"b": 0}
    for other in ([[1.0, 2.1]], [[1.0, np.nan]]):
        with pytest.raises(RuntimeError, match=r"of b and a are .* apart"):
            measure.check([side("a", one), side("b", other)], "forward")
    assert measure.difference(np.zeros((1, 2)), np.zeros((1, 2))) == 0


@pytest.fixture
def as_before(monkeypatch):
    monkeypatch.setattr(numpy_backend, "SPARSE", None)
    yield
    cr.set_num_threads(None)


def test_ours_are_what_their_names_say(as_before, monkeypatch):
    p = workloads.draw({**workloads.SPECS["W5"], "K": 100})
    dense = []
    monkeypatch.setattr(
        numpy_dense, "forward", lambda *arguments, was=numpy_dense.forward: dense.append(1) or was(*arguments)
    )
    for side in sides.ours(p, 3):
        dense.clear()
        side.prepare()
        crops = side.steps["forward"]()
        assert bool(dense) == ("NumPy alone" in side.name)
        assert (crops.strides[1] == 4) == ("channels-last" in side.name)
        assert cr.get_num_threads() == (1 if "one thread" in side.name else 3)


def test_crop_and_resize_is_on_the_same_boxes():
    p = workloads.draw({**workloads.SPECS["W4tf"], "shape": (4, 2, 64, 64), "image": (64, 64), "side": (8, 60)})
    np.testing.assert_allclose(p["boxes_norm"] * 64, p["boxes"][:, [1, 0, 3, 2]], rtol=1e-6)
    steps = sides.ours(p, 1)[0].steps
    expected, pullback = cr.vjp(cr.crop_and_resize, p["input"], p["boxes_norm"], p["batch_indices"], p["out"])
    np.testing.assert_array_equal(steps["forward"](), expected)
    for step, gradient in zip(("feature gradient", "box gradient"), pullback(p["cotangent"]), strict=True):
        np.testing.assert_array_equal(steps[step](), gradient)


# ---- python -m benchmarks.overhead ----

OVERHEAD = ROOT / "benchmarks" / "results" / "overhead.json"


def overhead(path):
    return json.loads(path.read_text())["us, median"]


def test_overhead(tmp_path):
    """It runs, and what is stored is of the same calls."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "benchmarks.overhead", "--rounds", "1", "--json", tmp_path / "found.json"]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    found = overhead(tmp_path / "found.json")
    for name, parts in overhead(OVERHEAD).items():
        for part, times in parts.items():
            assert times.keys() <= found[name][part].keys()


def test_overhead_is_what_is_said_and_promised():
    """A forward that autograd does not record takes at most 60 us more on tensors."""
    times = [parts["forward"] for parts in overhead(OVERHEAD).values()]
    found = []
    for way in ("torch", "torch, recording for backward"):
        over = [round(of[way] - of["NumPy"]) for of in times]
        found += [min(over), max(over)]
    assert found[1] <= 60
    said = r"took (\d+) to (\d+) µs more than the same on arrays, and (\d+) to (\d+) µs where autograd records"
    (numbers,) = re.findall(said, " ".join((ROOT / "docs/pytorch.md").read_text().split()))
    assert [*map(int, numbers)] == found
