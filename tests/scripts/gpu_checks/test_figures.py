"""The arithmetic of the figures that a check of a GPU reports."""

from pathlib import Path

import pytest
import torch

from models.attention.full import CAUSAL
from models.kernels import sdpa_cuda
from models.kernels.backends import TABLE
from models.kernels.flash_attention.releases import FLASH_2, FLASH_3
from models.masks.algebra import visible
from models.masks.basic import SlidingWindow
from scripts.gpu_checks.attention_speed import RowShape, SpeedCheck, _pairs, _rivals, lengths
from scripts.gpu_checks.longest_context import curve_of
from scripts.gpu_checks.planned_peak import PlannedFigures
from scripts.gpu_checks.profiled import Work, busy_microseconds
from scripts.gpu_checks.report import markdown
from scripts.gpu_checks.schedule import Step
from tests.support.flash_packages import installed
from tests.support.parity import packed

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("documents, window", [(1, 0), (4, 0), (1, 8), (5, 8), (3, 100)])
def test_visible_pairs_are_those_of_the_mask(documents, window):
    shape = RowShape(61, documents, window)
    span = packed([lengths(shape)], 61)
    mask = CAUSAL & SlidingWindow(window) if window else CAUSAL
    seen = visible(mask, span, span, torch.arange(1))
    assert _pairs(shape) == int(seen.sum())
    assert len(set(lengths(shape))) == documents and sum(lengths(shape)) == 61


def test_each_version_of_flash_attn_is_timed_alone_and_so_is_none(monkeypatch):
    monkeypatch.setitem(TABLE, ("cpu", torch.bfloat16), sdpa_cuda)
    shape = RowShape(64, documents=4)
    prepared = SpeedCheck(torch.device("cpu"), (shape,), 4, 2, 16)
    assert list(_rivals(prepared, shape)) == ["varlen flash"]
    with installed(FLASH_2, FLASH_3) as called:
        rivals = _rivals(prepared, shape)
        assert list(rivals) == [FLASH_2, FLASH_3, "no flash-attn", "varlen flash"]
        order = dict(sdpa_cuda.ORDER)
        for name in (FLASH_2, FLASH_3):
            rivals[name](prepared)()
            assert {each for each, _, _ in called} == {name} and len(called) == 2
            called.clear()
        monkeypatch.setattr(sdpa_cuda, "forward_packed", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rivals["no flash-attn"](prepared)()
        assert not called and order == sdpa_cuda.ORDER


def test_a_curve_goes_through_both_plans_and_is_inverted():
    def seconds(tokens):
        return 3e-4 * tokens + 2e-9 * tokens**2

    plans = {size: PlannedFigures(1000 + 7 * size, seconds(size)) for size in (16384, 32768)}
    curve = curve_of(plans)
    assert curve.peak_bytes(100_000) == pytest.approx(701_000)
    assert curve.seconds(100_000) == pytest.approx(seconds(100_000))
    assert curve.tokens_in(seconds(100_000)) == pytest.approx(100_000, abs=1)


def test_the_card_is_busy_while_any_kernel_runs():
    work = [
        Work("a", 10, 5),
        Work("b", 0, 4),
        Work("c", 12, 10),
        Work("d", 13, 2),
        Work("e", 16, 1),
    ]
    assert busy_microseconds(work) == 4 + 12


def test_a_page_has_a_table_for_each_set_of_columns_and_no_details():
    step = Step("one", "the first step", 1, 1)
    rows = [
        {"step": "one", "ready": 2.0},
        {"step": "one", "case": "a|b", "share": 0.123456, "passed": True},
        {"step": "one", "case": "hidden", "share": 1.0, "passed": True, "detail": True},
        {"step": "one", "other": 3, "passed": False},
        {"step": "one", "outcome": "failed", "seconds": 1.5},
    ]
    page = markdown(rows, [step])
    assert "| the first step | failed | 2 | 1.5 | 3 | 1 |" in page
    assert "| a\\|b | 0.1235 | yes |" in page and "| 3 | NO |" in page
    assert "hidden" not in page


def test_wheels_have_the_versions_of_the_constraints():
    def versions(path):
        lines = (ROOT / path).read_text().lower().replace("_", "-").splitlines()
        return dict(line.split("==") for line in lines if "==" in line and line[0] != "#")

    wheels = versions("scripts/gpu_checks/wheels.txt")
    known = versions("constraints.txt")
    assert wheels and wheels == {name: known[name] for name in wheels}
