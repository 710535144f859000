"""Which version of flash-attn serves what, and what becomes of one that cannot be called."""

import sys

import pytest
import torch

from models.kernels import sdpa_cuda
from models.kernels.flash_attention import releases
from models.kernels.flash_attention.capped import capped_kernel
from models.kernels.flash_attention.releases import FLASH_2, FLASH_3, FLASH_4, RELEASES
from models.positions.alibi import AlibiScore
from models.scores import Score, SoftcapScore
from tests.support.cuda_kernels import tensors
from tests.support.flash_packages import MAKERS, StandIn, installed

ALL = tuple(RELEASES)
SOME = (FLASH_2,)
AMPERE, HOPPER, BLACKWELL, CONSUMER = (8, 0), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    "generation, packages, sides, widths, kernel",
    [
        (AMPERE, ALL, (256, 256), (64, 64), FLASH_2),
        (HOPPER, ALL, (256, 256), (64, 64), FLASH_3),
        (HOPPER, (FLASH_4, FLASH_2), (256, 256), (64, 64), FLASH_4),
        (HOPPER, SOME, (256, 256), (64, 64), "cudnn"),
        (HOPPER, SOME, (256, 100), (64, 64), FLASH_2),
        (BLACKWELL, ALL, (256, 256), (128, 64), FLASH_4),
        (BLACKWELL, ALL, (256, 256), (136, 136), "cudnn"),
        (BLACKWELL, ALL, (256, 100), (136, 136), FLASH_2),
        (BLACKWELL, ALL, (256, 100), (192, 128), FLASH_4),
        (BLACKWELL, ALL, (256, 100), (256, 256), FLASH_4),
        (CONSUMER, ALL, (256, 256), (64, 64), FLASH_2),
        (HOPPER, (), (256, 100), (64, 64), "flash"),
        (HOPPER, ALL, (256, 256), (264, 264), "efficient"),
        ((7, 5), ALL, (256, 256), (64, 64), "efficient"),
    ],
)
def test_the_best_version_that_is_there_serves(generation, packages, sides, widths, kernel):
    half = [torch.bfloat16] * 3
    assert sdpa_cuda.choose_kernel(half, *widths, generation, sides, packages).kernel == kernel
    for dtypes in ([torch.float32] * 3, [*half, torch.bfloat16]):
        found = sdpa_cuda.choose_kernel(dtypes, *widths, generation, sides, packages)
        assert found.kernel == "efficient"


@pytest.mark.parametrize(
    "generation, width, takes",
    [(HOPPER, 256, True), (BLACKWELL, 128, True), (BLACKWELL, 256, False)],
)
def test_a_cap_is_not_asked_of_what_has_none_in_backward(monkeypatch, generation, width, takes):
    """Version 4 on Blackwell, at heads of 256: Gemma 2's."""
    monkeypatch.setattr(sdpa_cuda, "capability", lambda device: generation)
    some = tensors(20, 20, 2, 2, width, width)
    with installed(FLASH_4):
        kernel = capped_kernel(SoftcapScore(Score(), 50.0))
        assert kernel is not None and kernel.takes_packed(*some) is takes
        assert sdpa_cuda.packed_choice(*some).kernel == FLASH_4
        assert capped_kernel(Score()) is None
        assert capped_kernel(SoftcapScore(AlibiScore(2), 50.0)) is None
    with installed():
        assert capped_kernel(SoftcapScore(Score(), 50.0)) is None


def test_a_fixed_order_of_sums_is_not_asked_of_wide_heads_of_flash_attn_3():
    assert releases.widths(FLASH_3, HOPPER, 256, 256) == (256, 256)
    torch.use_deterministic_algorithms(True)
    try:
        assert releases.widths(FLASH_3, HOPPER, 256, 256) is None
        assert releases.widths(FLASH_3, HOPPER, 192, 128) == (192, 192)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_not_installed_is_silent(recwarn):
    with installed():
        assert releases.available() == ()
    with installed(*ALL):
        assert releases.available() == ALL
    assert not recwarn.list


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_with_other_arguments_is_warned_of_once_and_not_used(name):
    functions = MAKERS[name](StandIn(name, []))
    changed = {key: lambda q, k, v, window: None for key in functions}
    with installed(name, functions=changed):
        with pytest.warns(UserWarning, match=f"no {name} .*takes no .*softmax_scale"):
            assert releases.available() == ()
        assert releases.available() == ()


def test_a_package_that_does_not_import_is_warned_of(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so')")
    with installed():
        del sys.modules["flash_attn_interface"]
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.warns(UserWarning, match="no flash-attn 3 .*libcudart"):
            assert releases.available() == ()


def test_files_of_version_4_that_another_package_brings_are_not_it(monkeypatch, tmp_path, recwarn):
    """flash-attn 2 does; without what they need they are not there."""
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py"):
        file.write_text("")
    (folder / "interface.py").write_text("import cutlass.cute")
    with installed():
        del sys.modules["flash_attn"]
        monkeypatch.setitem(sys.modules, "cutlass", None)
        monkeypatch.syspath_prepend(tmp_path)
        assert releases.available() == ()
    assert not recwarn.list


def test_tensors_without_numbers_stay_with_pytorch():
    with installed(*ALL) as called:
        some = tensors(40, 40, dtype=torch.bfloat16, device="meta")
        assert sdpa_cuda._way(*some, None).kernel == "flash"
        sdpa_cuda.forward(*some, 1.0, True, None)
    assert not called
