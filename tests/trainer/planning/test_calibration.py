"""The table that a machine is measured into is one that a plan reads."""

import pytest

from trainer.errors import DONE, UserError
from trainer.planning import calibration
from trainer.planning.calibration import calibrate_command
from trainer.planning.devices import read_device


def test_a_machine_is_measured_and_a_plan_reads_what_was_written(tmp_path, monkeypatch, capsys):
    for sizes, small in (("SIDE", 64), ("TOKENS", 64), ("MOVED", 1 << 16)):
        monkeypatch.setitem(getattr(calibration, sizes), "cpu", small)
    # Two ranks would each import torch; what they answer is said here.
    monkeypatch.setattr(calibration, "link_bandwidth", lambda seconds: 1e9)
    out = tmp_path / "mine.yaml"
    assert calibrate_command([f"out={out}", "seconds=0.01"]) == DONE
    assert f"device={out}" in capsys.readouterr().out
    device = read_device(str(out))
    assert device.within == 1e9 and device.across == 1e8
    assert device.rate("matmul", "float32") > 0
    assert device.operation_s < 0.01


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("out=mine.txt", "out=mine.txt: is no yaml file; use out=machine.yaml"),
        ("seconds=soon", "seconds=soon: must be a number of seconds"),
        ("device=cpu", "device=cpu: is no word of this command"),
    ],
)
def test_words_that_say_nothing_are_refused(word, said):
    with pytest.raises(UserError, match=said):
        calibrate_command([word])


@pytest.mark.full
def test_two_ranks_of_this_machine_send_to_one_another():
    assert calibration.link_bandwidth(0.1) > 1e6
