"""The table of kernels says what a run does: each line is held against the call itself."""

import pytest
import torch

from models.attention.full import CAUSAL
from models.kernels import scan_fla, sdpa_cuda
from models.kernels.backends import TABLE
from models.kernels.flash_attention.releases import FLASH_2, FLASH_3, FLASH_4
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from models.span import Span
from tests.support.cuda_kernels import stand_in
from tests.support.flash_packages import installed
from trainer.errors import UserError
from trainer.planning import kernel_choices
from trainer.planning.kernel_choices import TRITON
from trainer.planning.kernel_table import kernel_rows, read_kernel_words

SMALL = ("model.width=32", "model.layers=2", "model.heads=2", "context_length=2048")


def rows_of(*words, device="h200"):
    return kernel_rows(read_kernel_words([*SMALL, *words, f"device={device}"]))


def kernels_of(row):
    return {choice.situation: choice.kernel for choice in row.choices}


def test_one_document_is_cudnn_and_packed_ones_are_one_call():
    (row,) = rows_of("model=full", "precision=bfloat16")
    assert row.places == "blocks.*.mixer.mix x 2"
    served = kernels_of(row)
    assert served["one document of 2048"] == "1 x cudnn in bfloat16 (triangle)"
    assert served["8 documents"] == "1 x flash for packed stretches"
    # Stretches of 256 do not fill a GPU alone, those of 4,096 do.
    ring = "one document of {}, ring of 4, first rank"
    assert "flash for packed stretches" in served[ring.format(2048)]
    (row,) = rows_of("model=full", "precision=bfloat16", "context_length=32768")
    served = kernels_of(row)[ring.format(32768)]
    assert "cudnn in bfloat16 (full)" in served and "cudnn in bfloat16 (triangle)" in served


@pytest.mark.parametrize(
    "words, device, kernel",
    [
        (["precision=bfloat16"], "a100", "1 x flash in bfloat16 (triangle)"),
        (["precision=float32"], "h100", "1 x efficient in float32 (triangle)"),
        (["precision=float32"], "cpu", "1 x flash of PyTorch for CPUs (triangle)"),
        (["precision=bfloat16", "mixer=softcap"], "h200", f"1 x {TRITON}"),
        (["precision=bfloat16", "mixer=bigbird"], "a100", f"1 x {TRITON}"),
        (["precision=float32", "position=alibi"], "h100", f"1 x {TRITON}"),
        (
            ["precision=bfloat16", "position=relative"],
            "h200",
            "reference, tiles of scores in torch",
        ),
    ],
)
def test_generation_dtype_and_score_decide(words, device, kernel):
    # BigBird draws other blocks in every layer.
    for row in rows_of("model=full", *words, device=device):
        assert kernels_of(row)["one document of 2048"] == kernel


def test_layers_that_are_alike_share_a_row_and_others_do_not(monkeypatch):
    monkeypatch.setattr(scan_fla, "load_kernel", lambda kind: None)
    rows = rows_of("model=hybrid", "model.layers=4", "precision=bfloat16")
    subjects = [row.subject.partition(",")[0] for row in rows]
    assert "attention" in subjects and "scan" in subjects and "CausalConv" in subjects
    assert len({(row.subject, str(row.choices)) for row in rows}) == len(rows)


def test_a_scan_names_the_kernel_that_fla_has_for_it(monkeypatch):
    monkeypatch.setattr(scan_fla, "load_kernel", lambda kind: kind)
    (scan,) = [row for row in rows_of("model=retention", "precision=bfloat16") if "scan" in row[1]]
    module, name = scan_fla.TABLE[scan_fla.PLAIN]
    assert scan.choices[0].kernel == f"fla, {module}.{name}"
    monkeypatch.setattr(scan_fla, "load_kernel", lambda kind: None)
    (scan,) = [row for row in rows_of("model=retention", "precision=bfloat16") if "scan" in row[1]]
    assert scan.choices[0].kernel == "chunks in torch" and "not installed" in scan.choices[0].reason


@pytest.mark.parametrize(
    "mask, words, told, name",
    [
        (CAUSAL, [], "1 x cudnn in bfloat16 (triangle)", "cudnn"),
        (
            CAUSAL & SlidingWindow(256),
            ["mixer=sliding", "mixer.window=256"],
            "1 x flash for packed stretches",
            "packed",
        ),
    ],
)
def test_what_is_told_is_what_is_called(monkeypatch, mask, words, told, name):
    """By our dispatch, with stand-ins for the kernels of a GPU."""
    (row,) = rows_of("model=full", "precision=bfloat16", *words)
    assert kernels_of(row)["one document of 2048"] == told
    called = stand_in(monkeypatch)
    monkeypatch.setitem(TABLE, ("cpu", torch.bfloat16), sdpa_cuda)
    q, k, v = (torch.randn(1, 2048, 2, 16).bfloat16() for _ in range(3))
    Softmax(mask)((q,), (k, v), span=Span.line(1, 2048))
    assert called == [name]


@pytest.mark.parametrize(
    "device, kernel", [("a100", FLASH_2), ("h100", FLASH_3), ("b200", FLASH_4)]
)
def test_versions_of_flash_attn_that_are_installed_here_are_named(monkeypatch, device, kernel):
    monkeypatch.setattr(kernel_choices, "version", lambda name: "1.2")
    with installed(FLASH_2, FLASH_3, FLASH_4):
        (row,) = rows_of("model=full", "precision=bfloat16", device=device)
        served = kernels_of(row)
        assert served["one document of 2048"] == f"1 x {kernel} (1.2) in bfloat16 (triangle)"
        assert served["8 documents"] == f"1 x {kernel} (1.2) for packed stretches"
        assert "installed here" in row.choices[0].reason
        (row,) = rows_of("model=full", "precision=bfloat16", "mixer=softcap", device=device)
        assert kernels_of(row)["one document of 2048"] == f"1 x {kernel} (1.2) for packed stretches"
        wide = ("mixer=softcap", "model.width=512")
        (row,) = rows_of("model=full", "precision=bfloat16", *wide, device=device)
        assert (TRITON in kernels_of(row)["one document of 2048"]) == (device == "b200")
        (row,) = rows_of("model=full", "precision=float32", device=device)
        assert "flash-attn" not in str(row)


def test_a_version_of_flash_attn_that_is_told_is_called(monkeypatch):
    monkeypatch.setitem(TABLE, ("cpu", torch.bfloat16), sdpa_cuda)
    q, k, v = (torch.randn(1, 2048, 2, 16).bfloat16() for _ in range(3))
    with installed(FLASH_3) as called:
        Softmax(CAUSAL)((q,), (k, v), span=Span.line(1, 2048))
    assert called == [(FLASH_3, "forward", False)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["device=tpu"], "device=tpu: is no device of this table; use one of a100"),
        (["gpus=0"], "gpus=0: must be a number of ranks; use gpus=4"),
        (["json=yes"], "json=yes: must be true or false"),
        (["model=nothing"], "nothing"),
    ],
)
def test_a_mistake_gives_one_message(words, message):
    with pytest.raises(UserError, match=message):
        read_kernel_words(words)
