"""Thirty steps of fine-tuning here are thirty steps of transformers and torch's AdamW by hand."""

import pytest
import torch

from tests.models.hub.test_adapters import CASES
from tests.support import hub

QUICK = ("llama", "gpt2", "mixtral")
ADAPTED = [
    *QUICK,
    *(pytest.param(case, marks=pytest.mark.full) for case in CASES if case not in QUICK),
]


@pytest.mark.short("llama", "gpt2")
@pytest.mark.parametrize("case", ADAPTED)
def test_thirty_steps_equal_those_by_hand(case, tmp_path):
    theirs = hub.exact(hub.make(*CASES[case], tmp_path))
    losses, wanted = hub.thirty_steps(tmp_path, theirs)
    assert losses[-1] < losses[0] - 0.3
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
