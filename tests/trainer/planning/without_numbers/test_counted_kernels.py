"""A plan of a GPU takes our Triton kernels where the table of kernels says that they serve."""

import pytest
import torch

from models.kernels import backends
from models.kernels.triton_attention import dispatch
from models.kernels.triton_attention.block_lists import block_lists
from models.masks.basic import Causal
from models.span import Span
from tests.trainer.planning.test_step_plan import WORDS, config_of
from trainer.planning.devices import read_device
from trainer.planning.kernel_choices import TRITON
from trainer.planning.kernel_table import kernel_rows, read_kernel_words
from trainer.planning.step_plan import plan_step
from trainer.planning.without_numbers import counted_kernels
from trainer.planning.without_numbers.counted_kernels import CountedKernel, blocks_on

TOKENS = 2048
SIZES = (
    "model=full",
    "precision=bfloat16",
    "model.layers=1",
    "model.width=32",
    "model.heads=4",
    f"context_length={TOKENS}",
    f"batch_tokens={TOKENS}",
)


def plan(*words, device="h100"):
    config = config_of((*SIZES, "engine=single", *words))
    return plan_step(config, WORDS, 0, read_device(device))


def is_told(*words):
    """Whether `python -m scripts.kernels` says that Triton serves one document."""
    rows = kernel_rows(read_kernel_words([*SIZES, *words, "device=h100"]))
    return any(
        TRITON in choice.kernel
        for row in rows
        for choice in row.choices
        if choice.situation == f"one document of {TOKENS}"
    )


@pytest.mark.parametrize(
    "words",
    [("position=alibi",), ("mixer=softcap",), ("mixer=bigbird",), ("mixer=sliding",), ()],
    ids=str,
)
def test_what_is_told_is_what_is_planned(words, monkeypatch):
    launched = []
    call = CountedKernel.__getitem__

    def noted(kernel, grid):
        launched.append(kernel.name)
        return call(kernel, grid)

    monkeypatch.setattr(CountedKernel, "__getitem__", noted)
    plan(*words)
    expected = ["forward", "query gradient", "key gradient"] if is_told(*words) else []
    assert launched == expected


def test_no_matrix_of_pairs_is_held_for_a_bias(monkeypatch):
    with_triton = plan("position=alibi")
    plain = plan()
    assert with_triton.peak_bytes == pytest.approx(plain.peak_bytes, rel=0.02)
    monkeypatch.setattr(backends, "load_pairwise", lambda: None)
    monkeypatch.setattr(dispatch, "load_pairwise", lambda: None)
    without = plan("position=alibi")
    # A tile of LEAF x LEAF numbers for each head, in float32.
    assert without.peak_bytes > 1.5 * with_triton.peak_bytes


def test_what_is_put_in_place_for_a_plan_is_taken_away():
    before = set(backends.PAIRWISE)
    module = backends.load_pairwise()
    kernels = {name: getattr(module, name) for name in counted_kernels.LAUNCHED}
    plan("mixer=softcap")
    assert before == backends.PAIRWISE
    assert kernels == {name: getattr(module, name) for name in kernels}
    q = torch.zeros(1, 4, 1, 8, device="meta")
    assert not dispatch.has_numbers((q,))


def test_blocks_on_lists_are_counted_for_rows_that_share_a_plan():
    spans = Span.line(3, 256)
    lists = block_lists(Causal(), spans, spans, (64, 32))
    # Of queries in blocks of 64 and keys in blocks of 32, 2 + 4 + 6 + 8 are seen in each row.
    assert blocks_on(lists.of_queries) == 3 * 20
    assert blocks_on(lists.of_keys) == 3 * 20


def test_a_causal_row_costs_the_products_of_its_blocks():
    flops = plan("mixer=softcap").costs.flops - plan().costs.flops
    heads, width = 4, 8
    pairs = TOKENS * TOKENS / 2
    # 2 + 5 products of half of the pairs for flash; 2 + 7 for ours, and blocks on the diagonal.
    assert flops == pytest.approx(2 * heads * width * pairs * 2, rel=0.25)
