"""The benchmark tool: who takes part and takes turns, what it writes, and how it compares."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from benchmarks import __main__ as program
from benchmarks import compare, measure, report, sides, workloads
from cupy_roialign.cpu import backend

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
OWN = shlex.split("--features 2,3,12,10 --boxes 3 --output 2,3 --scale 0.5 --sampling-ratio 2 --aligned --box-side 4,9")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the program, of a workload of one's own: what it printed, its report, and where that is."""
    path = tmp_path_factory.mktemp("bench") / "own"
    command = [sys.executable, "-m", "benchmarks", *OWN, "--threads", "2", "--runs", "2", "--save", path]
    settings = {name: value for name, value in os.environ.items() if name not in measure.environment()}
    settings["OMP_NUM_THREADS"] = "2"
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.with_suffix(".json").read_text()), path


def test_report(run):
    found = run[1]
    assert found["workloads"]["own"]["shape"] == [2, 3, 12, 10]
    assert found["workloads"]["own"]["image"] == [24, 20]
    assert found["versions"]["numpy"] == np.__version__
    assert found["processor"]
    assert (found["runs"], found["threads"], found["another process is busy"]) == (2, 2, True)
    steps = found[report.TIMES]["own"]
    assert list(steps) == list(sides.STEPS)
    ours = {name for name in sides.OURS if "plain" in name or not backend.not_compiled()}
    peers = {name for name in sides.PEERS if name not in found["absent"]} - {"TensorFlow"}
    assert set(found["absent"]) <= {*sides.PEERS, "the compiled way"}
    assert set(steps["forward"]) == ours | peers
    assert set(steps["box gradient"]) == ours
    for times in steps.values():
        for median, least, most in times.values():
            assert 0 < least <= median <= most < 60e3
    far = found["differences"]["own"]["forward"]
    assert set(far) == set(steps["forward"]) - {next(iter(steps["forward"])), "OpenCV"}
    assert max(far.values()) < 1e-5


def test_onnxruntime_takes_part(run):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert "onnxruntime" in run[1][report.TIMES]["own"]["forward"]


def test_screen(run):
    printed, found, path = run
    assert report.conditions(found) in printed
    for step, times in found[report.TIMES]["own"].items():
        assert f"own 3 boxes, 2x3x12x10, {step}\n" in printed
        assert all(f" {side} " in printed for side in times)
    assert f"wrote {path}.json and {path}.png" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# ---- the manner ----


def test_environment_is_the_users_and_is_told(run):
    """The program adds no setting to the one that the test made."""
    assert run[1]["environment"] == {"OMP_NUM_THREADS": "2"}
    assert "set in the environment: OMP_NUM_THREADS=2." in run[0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("OPENBLAS_NUM_THREADS", True),
        ("CUPY_ROIALIGN_COMPILED", True),
        ("CUPY_ROIALIGN_NUM_THREADS", True),
        ("X", False),
    ],
)
def test_settings_that_are_told(name, told, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert (measure.environment().get(name) == "1") == told


def test_neighbour_is_busy_until_it_is_ended():
    resource = pytest.importorskip("resource", reason="this system does not tell what a child has computed")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with measure.busy_neighbour() as process:
        time.sleep(1)
        assert process.poll() is None
    assert process.poll() is not None
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before > 0.2


def test_idle(monkeypatch, capsys):
    monkeypatch.setattr(measure, "busy_neighbour", lambda: pytest.fail("it is busy"))
    monkeypatch.setattr(sides, "installed", lambda threads: ([], {}))
    found = measure.run({}, 1, 1, idle=True)
    assert not found["another process is busy"]
    assert "no other process was started" in capsys.readouterr().out


# ---- tables and comparisons ----

REPORT = {
    "processor": "a processor",
    "system": "a system",
    "runs": 3,
    "threads": 1,
    "another process is busy": True,
    "environment": {},
    "versions": {"numpy": "2"},
    "workloads": json.loads(json.dumps({name: workloads.SPECS[name] for name in ("W1", "W6")})),
    report.TIMES: {
        "W1": {
            "forward": {
                "onnxruntime": [120.0, 110.0, 130.0],
                "torchvision": [200.0, 190.0, 210.0],
                "compiled, NCHW": [60.0, 50.0, 70.0],
                "compiled, channels-last": [0.5, 0.4, 0.7],
                "plain, NCHW": [240.0, 80.0, 399.0],
            },
            "feature gradient": {"compiled, NCHW": [2.0, 1.0, 3.0], "compiled, channels-last": [4.0, 1.0, 9.0]},
        },
        "W6": {"forward": {"OpenCV": [10.0, 9.0, 11.0], "compiled, NCHW": [20.0, 20.0, 20.0]}},
    },
}


GPU_REPORT = {
    "gpu": "a GPU",
    "versions": {"numpy": "2"},
    report.TIMES: {
        "W1 float32": {
            "forward": {"torchvision": [0.2, 0.1, 0.3], "NCHW": [0.1, 0.1, 0.1], "channels-last": [0.4, 0.3, 0.5]},
            "box gradient": {"NCHW": [0.0314, 0.1, 0.1], "channels-last": [0.2, 0.2, 0.2]},
        },
        "W1 float16": {"forward": {"NCHW": [0.1, 0.1, 0.1], "channels-last": [0.4, 0.3, 0.5]}},
    },
}


def test_table_of_the_gpu():
    versions, table = report.gpu_table(GPU_REPORT).split("\n\n")
    assert versions == "a GPU; numpy 2."
    assert table.splitlines()[2:] == [
        "| W1, box head | float32 | forward | 2.0x (100 µs) | 0.5x (400 µs) | 200 µs |",
        "|  |  | box gradient | 31 µs | 200 µs |  |",
        "|  | float16 | forward | 100 µs | 400 µs |  |",
    ]


def test_table():
    conditions, table = report.table(REPORT).split("\n\n")
    assert conditions == (
        "a processor (a system); numpy 2. One thread; medians of 3 rounds, in which another process was busy; set in "
        "the environment: nothing."
    )
    assert table.splitlines() == [
        "| workload | step | compiled, NCHW | compiled, channels-last | plain, NCHW | fastest peer |",
        "|---|---|---|---|---|---|",
        "| W1, box head | forward | 2.0x (60.0 ms) | 240x (500 µs) | 0.5x (240 ms) | onnxruntime (120 ms) |",
        "|  | feature gradient | 2.0 ms | 4.0 ms |  |  |",
        "| W6, 5,000 small crops | forward | 0.5x (20.0 ms) |  |  | OpenCV (10.0 ms), boxes rounded |",
    ]


def test_table_of_readme():
    """Rows that were not measured are left out; those that are slower are not."""
    assert report.short_table(REPORT).splitlines()[2:] == [
        "| box head of a detector (W1) | onnxruntime (120 ms) | 2.0x (60.0 ms) | 240x (500 µs) |",
        "| the same, gradient with respect to the features |  | 2.0 ms | 4.0 ms |",
        "| 5,000 small crops of 3 channels (W6) | OpenCV (10.0 ms), boxes rounded | 0.5x (20.0 ms) |  |",
    ]


def test_pages_get_their_tables(tmp_path):
    """What stands around them stays, and a second time changes nothing."""
    for page, (_, begin, _, end) in report.PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n{begin}\nold\n{end}\nbehind\n")
    report.write(REPORT, tmp_path / "benchmarks/results/cpu.json")
    report.write(GPU_REPORT, tmp_path / "benchmarks/results/gpu.json")
    for _ in range(2):
        report.main(tmp_path)
        assert (tmp_path / "README.md").read_text() == (
            f"before\n<!-- speed -->\n{report.short_table(REPORT)}\n<!-- end of speed -->\nbehind\n"
        )
        speed = (tmp_path / "docs/speed.md").read_text()
        assert speed == f"before\n{report.section(REPORT, 'docs/speed.md')}\nbehind\n"
        assert f"\n\n{report.table(REPORT)}\n\n" in speed
        assert f"\n\n{report.gpu_table(GPU_REPORT)}\n\n" in (tmp_path / "docs/gpu.md").read_text()


def test_a_list_is_a_line_of_the_file(tmp_path):
    report.write(REPORT, tmp_path / "a" / "b.json")
    text = (tmp_path / "a" / "b.json").read_text()
    assert '"onnxruntime": [ 120.0, 110.0, 130.0 ]' in text
    assert json.loads(text) == json.loads(json.dumps(REPORT))


def slowed(times, only=""):
    """REPORT, with those sides that have `only` in their name so many times slower."""
    found = copy.deepcopy(REPORT)
    for steps in found[report.TIMES].values():
        for sides_ in steps.values():
            for side in sides_:
                if only in side:
                    sides_[side] = [ms * times for ms in sides_[side]]
    return found


def test_ours_are_compared_by_the_fastest_peer():
    by_name = {change.case: change for change in compare.changes(REPORT, slowed(3))}
    forward = by_name["W1, forward: compiled, NCHW"]
    assert forward.peer == "onnxruntime"
    assert forward.slower == pytest.approx(1)
    gradient = by_name["W1, feature gradient: compiled, NCHW"]
    assert gradient.peer is None
    assert gradient.slower == pytest.approx(3)
    assert len(by_name) == 6
    now = slowed(3, "NCHW")
    del now[report.TIMES]["W1"]["forward"]["onnxruntime"]
    by_name = {change.case: change for change in compare.changes(REPORT, now)}
    assert by_name["W1, forward: compiled, NCHW"] == compare.Change(
        "W1, forward: compiled, NCHW", "torchvision", pytest.approx(3)
    )
    assert by_name["W1, forward: compiled, channels-last"].slower == pytest.approx(1)


def test_other_workloads_are_not_compared():
    other = copy.deepcopy(REPORT)
    other["workloads"]["W1"]["K"] += 1
    assert {change.case for change in compare.changes(REPORT, other)} == {"W6, forward: compiled, NCHW"}
    assert not compare.changes(REPORT, {**REPORT, "threads": 2})


@pytest.mark.parametrize(
    ("now", "tolerance", "status"),
    [
        (REPORT, "1.25", 0),
        (slowed(1.3, "NCHW"), "1.25", 1),
        (slowed(1.3, "NCHW"), "1.4", 0),
        (slowed(0.1, "NCHW"), "1.25", 0),
        (slowed(1.3, "plain"), "1.25", 1),
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


def test_stored_run_is_of_all_workloads():
    stored = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    assert stored["workloads"] == json.loads(json.dumps(workloads.SPECS))
    assert set(stored[report.TIMES]) | set(stored["skipped"]) == set(workloads.SPECS)
    assert len(report.short_table(stored).splitlines()) == 2 + len(report.ROWS)
    assert (stored["threads"], stored["another process is busy"], stored["environment"]) == (1, True, {})


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
    assert program.specs(chosen) == workloads.SPECS
    assert (chosen.save, chosen.threads, chosen.idle) == (program.LATEST, 1, False)
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
    def side(name, result, **options):
        return sides.Side(name, {"forward": lambda: np.array(result)}, **options)

    one = [[1.0, 2.0]]
    assert measure.check([side("a", one), side("b", one)], "forward") == {"b": 0}
    for other in ([[1.0, 2.1]], [[1.0, np.nan]]):
        with pytest.raises(RuntimeError, match=r"of b and a are .* apart"):
            measure.check([side("a", one), side("b", other)], "forward")
        assert measure.check([side("a", one), side("b", other, compared=False)], "forward") == {}
    assert measure.difference(np.zeros((1, 2)), np.zeros((1, 2))) == 0


# ---- the sides ----


@pytest.fixture
def as_before(monkeypatch):
    monkeypatch.setattr(backend, "_way", backend._way)
    yield
    cr.set_num_threads(None)


def test_ours_are_what_their_names_say(as_before, monkeypatch):
    p = workloads.draw({**workloads.SPECS["W5"], "K": 2})
    called = []

    def watch(way, module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: called.append(way) or function(*args))

    for way, module in sides._ways().items():
        for name in ("crops", "to_features", "to_boxes"):
            watch(way, module, name)
    found = sides.ours(p, 3)
    assert {side.name for side in found} == {name for name in sides.OURS if name.split(",")[0] in sides._ways()}
    for side in found:
        side.prepare()
        assert cr.get_num_threads() == 3
        for step in sides.STEPS:
            called.clear()
            result = side.steps[step]()
            assert called == [side.name.split(",")[0]]
            assert result.ndim == 2 or (result.strides[1] == 4) == ("channels-last" in side.name)


def test_a_way_that_there_is_not_does_not_take_part(monkeypatch):
    monkeypatch.setattr(backend, "not_compiled", lambda: "Numba is not installed")
    monkeypatch.setattr(sides, "_ways", sides._ways.__wrapped__)
    assert {side.name.split(",")[0] for side in sides.ours(workloads.make("tiny"), 1)} == {"plain"}
    assert "numba" not in sides.versions()
    assert sides.installed(1, kinds=()) == ([], {"the compiled way": "Numba is not installed"})


def test_crop_and_resize_is_on_the_same_boxes():
    p = workloads.draw({**workloads.SPECS["W4tf"], "shape": (4, 2, 64, 64), "image": (64, 64), "side": (8, 60)})
    np.testing.assert_allclose(p["boxes_norm"] * 64, p["boxes"][:, [1, 0, 3, 2]], rtol=1e-6)
    steps = sides.ours(p, 1)[0].steps
    expected, pullback = cr.vjp(cr.crop_and_resize, p["input"], p["boxes_norm"], p["batch_indices"], p["out"])
    np.testing.assert_array_equal(steps["forward"](), expected)
    for step, gradient in zip(("feature gradient", "box gradient"), pullback(p["cotangent"]), strict=True):
        np.testing.assert_array_equal(steps[step](), gradient)


def drawn_for_opencv(channels=3, **changes):
    spec = {**workloads.SPECS["W4"], "shape": (2, channels, 60, 50), "image": (60, 50), "K": 20, "side": (10, 40)}
    return workloads.draw({**spec, "out": (9, 8), **changes})


@pytest.mark.parametrize("channels", [1, 3])
def test_opencv_crops_the_same_boxes(channels):
    """Of whole pixels it takes the same samples, but for those beyond the first and the last pixel of a box."""
    pytest.importorskip("cv2")
    p = drawn_for_opencv(channels)
    p["boxes"] = np.rint(p["boxes"])
    side = sides.OpenCV(1).side(p)
    crops = side.array(side.steps["forward"]())
    expected = cr.roi_align(p["input"], p["boxes"], p["out"], 1.0, 1, True, batch_indices=p["batch_indices"])
    assert crops.shape == expected.shape
    np.testing.assert_allclose(crops[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-4)
    assert not side.compared


def test_opencv_has_pixels_of_every_box():
    """Also of those that rounding leaves without any, or at the image's end."""
    pytest.importorskip("cv2")
    p = drawn_for_opencv(side=(0.1, 0.1), K=3)
    p["boxes"][0] = [49.6, 59.6, 49.9, 59.9]
    side = sides.OpenCV(1).side(p)
    last = p["input"][p["batch_indices"][0], :, 59, 49]
    crop = side.array(side.steps["forward"]())[0]
    np.testing.assert_allclose(crop, np.broadcast_to(last[:, None, None], (3, 9, 8)), rtol=1e-6)


def test_opencv_is_for_pictures_and_masks():
    pytest.importorskip("cv2")
    opencv = sides.OpenCV(1)
    assert opencv.side(drawn_for_opencv()) is not None
    assert opencv.side(drawn_for_opencv(channels=5)) is None
    assert opencv.side(drawn_for_opencv(operator="crop_and_resize")) is None


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
