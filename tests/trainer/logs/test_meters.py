"""Meters count training alone, against a clock that the test turns."""

import pytest
import torch

from trainer.logs import meters
from trainer.logs.meters import Meter, Peak, peak, peak_memory_bytes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_of_evaluation_and_checkpoints_are_not_counted():
    clock = Clock()
    meter = Meter(Peak(1e6, "a test"), devices=2, clock=clock)
    for _ in range(2):
        clock.now += 1.5
        meter.add(300, 6e5)
    with meter.pause():
        clock.now += 50
    read = meter.read()
    assert read.tokens_per_second == 600 / 3
    assert read.step_seconds == 1.5
    assert read.mfu == pytest.approx(1.2e6 / (3 * 1e6 * 2))
    clock.now += 4
    meter.add(8, 0)
    assert meter.read() == (2.0, 4.0, 0.0)


def test_a_device_without_a_known_peak_has_no_mfu():
    meter = Meter(Peak(None, "no peak known for X"), 1, clock=Clock())
    meter.add(1, 1e9)
    assert meter.read().mfu is None
    assert "no peak known for X" in meter.convention()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA GB200", 2500),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_gpus_are_known_by_a_word_of_their_name(monkeypatch, name, tflops):
    monkeypatch.setattr(meters.torch.cuda, "get_device_name", lambda device: name)
    found = peak(torch.device("cuda", 0), torch.bfloat16)
    assert found.flops_per_second == (tflops and pytest.approx(tflops * 1e12))
    assert name in found.source


def test_a_cpu_is_measured_and_the_convention_says_so():
    found = peak(torch.device("cpu"), torch.float32)
    assert found.flops_per_second is not None and 1e8 < found.flops_per_second < 1e14
    assert "measured now" in Meter(found, 2).convention()


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(before // 8 + 32 * 2**20)  # float32: half of what was held, and more
    assert peak_memory_bytes(torch.device("cpu")) >= before
    assert before > 50 * 2**20
    del block
