"""A kernel that a card does not compile is given up, and the run goes on without it."""

import pytest
import torch

from models.attention.full import CAUSAL
from models.kernels import backends
from models.kernels.triton_attention import dispatch, launch
from models.positions.alibi import AlibiScore
from models.primitives.softmax import Softmax
from models.span import Span


def test_a_kernel_that_does_not_compile_is_given_up_once(monkeypatch):
    served = {("cpu", torch.float32)}
    monkeypatch.setattr(backends, "PAIRWISE", served)
    monkeypatch.setattr(dispatch, "PAIRWISE", served)
    asked = []

    def fail(*about):
        asked.append(about)
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(launch, "forward", fail)
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 8, generator=draw).unbind()
    mix = Softmax(CAUSAL, AlibiScore(2))
    wanted = mix((q.double(),), (k.double(), v.double()), span=Span.line(1, 40))
    query = q.requires_grad_()
    with pytest.warns(UserWarning, match="no Triton kernels .*shared memory"):
        got = mix((query,), (k, v), span=Span.line(1, 40))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    got.sum().backward()
    mix((query,), (k, v), span=Span.line(1, 40))
    assert len(asked) == 1 and not served
    assert query.grad is not None
