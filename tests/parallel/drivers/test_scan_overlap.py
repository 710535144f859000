"""While summaries and states of a scan travel, what tokens read within their chunk is computed."""

import pytest
import torch

from models.kernels import scan_recompute
from models.primitives.scan import Scan
from parallel.collectives import Communicator
from parallel.drivers.scan import StatePassing
from parallel.layout import zigzag
from parallel.sharding import shard_span
from tests.support.parity import packed
from tests.support.pool import ranks
from tests.support.scan_inputs import inputs

TOKENS = 48


def events(env, kind: str) -> list[str]:
    """What this rank sends and computes, forward and backward, in order."""
    found = []

    class Recorder(Communicator):
        def start_all_to_all(self, parts, sizes, name="exchange"):
            found.append(name)
            pending = super().start_all_to_all(parts, sizes, name)
            arrived = pending.wait

            def wait():
                found.append("wait")
                return arrived()

            pending.wait = wait
            return pending

    def noted(name, compute):
        def call(*args, **kwargs):
            found.append(name)
            return compute(*args, **kwargs)

        return call

    names = {"affine_chunks": "all", "chunk_summary": "summary", "chunk_reads": "reads"}
    plain = {name: getattr(scan_recompute, name) for name in names}
    for name, what in names.items():
        setattr(scan_recompute, name, noted(what, plain[name]))
    try:
        here = shard_span(packed([[20, 28]], TOKENS), [zigzag(TOKENS, env.size)], env.rank)
        query, payload = inputs(kind, here)
        leaves = [tensor.requires_grad_() for tensor in (*query, *payload)]
        driver = StatePassing(Scan(chunk=4), Recorder(env.group))
        driver(leaves[:1], leaves[1:], span=here).sum().backward()
    finally:
        for name, compute in plain.items():
            setattr(scan_recompute, name, compute)
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
    return found


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_reads_are_computed_between_a_start_and_its_wait(kind):
    forward = ["summary", "summaries", "reads", "wait", "states", "reads", "wait"]
    backward = [
        "states backward",
        "reads",
        "wait",
        "summaries backward",
        "reads",
        "wait",
        "summary",
    ]
    for found in ranks(3, events, kind):
        assert found == [*forward, *backward]
