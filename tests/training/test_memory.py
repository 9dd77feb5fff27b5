"""The arithmetic of memory against what autograd keeps, and against a process that trains."""

import copy
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

from companion import W4, fit, prepare_qat
from companion.training.memory import PeakMemory, TrainingMemory, training_memory

WIDTH, DEPTH = 1024, 16


def kept_for_backward(model: nn.Module) -> int:
    """Bytes of distinct tensors that a forward pass keeps, but for the parameters themselves."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    x = torch.ones(1, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.parametrize("method", ["absmax", "mse", "lsq"])
def test_what_rounding_keeps(method):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    kept = kept_for_backward(prepare_qat(model, W4, method)) - kept_for_backward(model)
    assert training_memory(WIDTH**2, WIDTH**2).rounding == 0
    assert 0 < kept <= 3 * 4 * WIDTH**2 / 32  # scales, and what a learned one is a product of


@pytest.fixture(scope="module")
def process():
    """One of its own: what others free meanwhile would count against what is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # glibc gives back what is freed
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda *call: pool.submit(*call).result()


def train(rounded: bool) -> int:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    if rounded:
        layer = prepare_qat(layer, W4, "lsq")
    model = nn.Sequential(*(copy.deepcopy(layer[0]) for _ in range(DEPTH)))
    batch = (torch.randn(4, WIDTH), torch.tensor([0, 1, 2, 3]))
    fit(nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))], steps=1, progress=False)
    with PeakMemory() as peak:
        fit(model, [batch], steps=3, lr=1e-5, progress=False)
    return peak.bytes + sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("rounded", [False, True])
def test_a_run_takes_what_was_added_up(rounded, process):
    """Measured a few percent above: what a layer is rounded in, activations, the sampler's pages."""
    count = DEPTH * WIDTH**2
    steps = count / 32 * rounded  # learned ones train as well, and each knows its first value
    expected = training_memory(count + steps, count * rounded).peak + 4 * steps
    assert process(train, rounded) == pytest.approx(expected, rel=0.1)


def test_adapters_come_on_top_of_a_frozen_model():
    memory = training_memory(1000, 1000, trained=10, weight_bytes=2)
    assert memory == TrainingMemory(2040, 40, 80, 2000)
    assert memory.peak == 2040 + 80 + 2000
    assert memory.at_peak == {
        "weights": 2040, "moments": 80, "gradients": 0, "rounded copies": 2000
    }  # fmt: skip


def test_processes_share_everything_but_sums_with_adapters():
    one, eight = training_memory(1000, 800), training_memory(1000, 800, processes=8)
    assert (eight.weights, eight.gradients, eight.optimizer) == (500, 500, 1000)
    assert eight.rounding == one.rounding == 0
    assert (one.peak, eight.peak) == (16000, 2000)
    adapted = {"trained": 80, "processes": 8}
    assert training_memory(1000, 800, **adapted).rounding == 3200
    assert training_memory(1000, 800, segments=10, **adapted).peak == 540 + 80 + 36 + 320


def take_and_give_back() -> int:
    with PeakMemory() as peak:
        x = torch.ones(25_000_000)
        time.sleep(0.05)
        del x
    return peak.bytes


def test_the_sampler_sees_what_is_gone_at_the_end(process):
    assert 80e6 < process(take_and_give_back) < 200e6


def test_memory_of_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="cannot be measured"):
        PeakMemory("meta")
