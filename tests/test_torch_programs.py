"""What programs do around an operator: mixed precision, workers, threads, several processes; and the examples."""

import concurrent.futures
import importlib.util
import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr

torch = pytest.importorskip("torch")
from torch.utils.checkpoint import checkpoint  # noqa: E402

crt = pytest.importorskip("cupy_roialign.torch")

ROOT = Path(__file__).parents[1]
BOXES = torch.tensor([[1.31, 0.72, 8.25, 6.18], [2.2, 1.6, 4.4, 5.9]])
INDICES = torch.tensor([0, 1])


def features(channels=3):
    return torch.rand(2, channels, 8, 11, generator=torch.Generator().manual_seed(0))


# ---- mixed precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_dtypes_as_they_are(dtype):
    """Features come in 16 bits from the layer before; boxes stay in float32; gradients in each one's dtype."""
    layer = torch.nn.Conv2d(3, 4, 1)
    boxes = BOXES.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        made = layer(features())
        made.retain_grad()
        crops = cr.roi_align(made, boxes, 3, batch_indices=INDICES)
        assert made.dtype == crops.dtype == dtype
        assert crt.RoIAlign(3, 3)(features(), BOXES, INDICES).dtype == torch.float32
    crops.float().sum().backward()
    assert made.grad.dtype == dtype
    assert boxes.grad.dtype == layer.weight.grad.dtype == torch.float32
    # computed in float32, and rounded once
    exact = (made.detach().float().requires_grad_(), BOXES.clone().requires_grad_())
    expected = cr.roi_align(*exact, 3, batch_indices=INDICES)
    expected.sum().backward()
    assert torch.equal(crops, expected.to(dtype))
    assert torch.equal(made.grad, exact[0].grad.to(dtype))
    torch.testing.assert_close(boxes.grad, exact[1].grad)


def test_a_batch_index_that_16_bits_do_not_hold():
    rows = torch.tensor([[2049.0, 0, 0, 2, 2]]).half()
    assert rows[0, 0] == 2048
    with pytest.raises(ValueError, match=r"boxes of dtype float16 cannot hold a batch index above 2048 exactly"):
        crt.roi_align(torch.zeros(2050, 1, 2, 2).half(), rows, 1)


def test_a_column_of_16_bits_is_checked_on_a_gpu_too(place):
    """Although NumPy, which looks at the indices, has no bfloat16."""
    rows = torch.cat([INDICES[:, None].float(), BOXES], 1)
    for dtype in (torch.bfloat16, torch.float16):
        boxes = rows.to(dtype)
        with place(), cr.checked():
            expected = crt.roi_align(features(), boxes.float(), 3)
            assert torch.equal(crt.roi_align(features(), boxes, 3), expected)
            boxes[1, 0] = 2
            with pytest.raises(IndexError, match=r"batch index of box 1 is 2\.0"):
                crt.roi_align(features(), boxes, 3)


# ---- reproducibility ----


def test_deterministic_algorithms_change_nothing(place):
    def run():
        f, b = features().requires_grad_(), BOXES.clone().requires_grad_()
        rows = torch.cat([INDICES[:, None].to(b.dtype), b], 1)
        outputs = [cr.roi_crop(f, b, INDICES, 5), crt.roi_align(f, rows, 5), crt.roi_align(f, [b[:1], b[1:]], 5)]
        several = [grad for output in outputs for grad in torch.autograd.grad(output.square().sum(), (f, b))]
        batched = torch.func.vmap(lambda f: cr.roi_crop(f, BOXES, INDICES, 5))(torch.stack([f, 2 * f]))
        return [*outputs, *several, batched]

    with place():
        before = run()
        torch.use_deterministic_algorithms(True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                after = run()
        finally:
            torch.use_deterministic_algorithms(False)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


# ---- threads, processes, files ----


def test_many_threads():
    f = features(20).requires_grad_()

    def run(seed):
        boxes = torch.rand(30, 4, generator=torch.Generator().manual_seed(seed)).mul(10).requires_grad_()
        output = cr.roi_align(f, boxes, 7, batch_indices=torch.arange(30) % 2)
        return [output.detach(), *torch.autograd.grad(output.sum(), (f, boxes))]

    alone = [run(seed) for seed in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(24)))
    for expected, actual in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


class Crops(torch.utils.data.Dataset):
    """A dataset whose workers crop."""

    def __init__(self):
        self.module = crt.RoIAlign(3, 4)

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return self.module(features() + number, BOXES, INDICES)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start):
    Crops()[0]  # used before the workers are started
    loader = torch.utils.data.DataLoader(Crops(), num_workers=2, multiprocessing_context=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of fork in a process with threads
        loaded = torch.cat(list(loader))
    assert torch.equal(loaded, torch.stack([Crops()[number] for number in range(4)]))


def test_a_model_that_holds_our_modules_is_saved():
    model = torch.nn.ModuleDict({"align": crt.RoIAlign(3, 4, 1.5), "resize": crt.CropAndResize(2, 2)})
    assert model.state_dict() == {}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert repr(loaded) == repr(model)
    assert "RoIAlign(crop_height=3, crop_width=4, extrapolation_value=1.5, transform_fpcoor=True)" in repr(model)
    assert torch.equal(loaded["align"](features(), BOXES, INDICES), model["align"](features(), BOXES, INDICES))


def test_inference_mode():
    f = features().requires_grad_()
    with torch.inference_mode():
        output = cr.roi_crop(f * 1, BOXES, INDICES, 3)
        made = torch.ones(2, 3, 8, 11, requires_grad=True)
        assert not cr.roi_crop(made, BOXES, INDICES, 3).requires_grad
    assert torch.equal(output, cr.roi_crop(f.detach(), BOXES, INDICES, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch 2.4's own, in its checkpoint
def test_hooks_and_checkpointing():
    f, b = features().requires_grad_(), BOXES.clone().requires_grad_()
    function = lambda f, b: cr.roi_crop(f, b, INDICES, 3).square()  # noqa: E731
    expected = torch.autograd.grad(function(f, b).sum(), (f, b))
    again = checkpoint(function, f, b, use_reentrant=False)
    for a, e in zip(torch.autograd.grad(again.sum(), (f, b)), expected, strict=True):
        assert torch.equal(a, e)
    with torch.autograd.graph.save_on_cpu():
        output = function(f, b)
    for a, e in zip(torch.autograd.grad(output.sum(), (f, b)), expected, strict=True):
        assert torch.equal(a, e)


def test_a_compiled_program_in_any_version():
    """With one graph or, where PyTorch cannot record the call, with graphs before and after it."""
    torch._dynamo.reset()
    function = lambda f, b: cr.roi_crop(f * 2, b + 0.5, INDICES, 3).relu().sum()  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager")
    grads = []
    for way in (compiled, function):
        f, b = features().requires_grad_(), BOXES.clone().requires_grad_()
        grads += torch.autograd.grad(way(f, b), (f, b))
    torch.testing.assert_close(grads[:2], grads[2:])


# ---- the examples ----


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs an example as a program, in this process, and returns what it printed."""
    threads = torch.get_num_threads()

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        example(name).main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def test_two_processes_train_as_one_does(main, tmp_path):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "examples" / "train_distributed.py"
    command = [sys.executable, "-W", "ignore", *several, script, "--steps", "6", "--save", tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert "1 process\n" in main("train_distributed", "--steps", 6, "--save", tmp_path / "one")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_detector_head_learns():
    _, losses = example("train_distributed").train(120, 0, 1)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy's, of tensors in pictures
def test_a_box_finds_its_place(main, tmp_path):
    pytest.importorskip("skimage")
    learn = example("learn_boxes")
    first, *_, last, _ = main("learn_boxes", "--output", tmp_path / "way.png").splitlines()
    off = [float(line.partition("off by ")[2].split()[0]) for line in (first, last)]
    assert off[0] == pytest.approx(max(abs(a - b) for a, b in zip(learn.START, learn.TARGET, strict=True)), abs=0.01)
    assert off[0] > 50
    assert off[1] < 1
    assert (tmp_path / "way.png").stat().st_size > 100_000
