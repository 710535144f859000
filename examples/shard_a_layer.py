"""One attention layer on a row that ranks share, without the trainer:

    torchrun --nproc-per-node=3 examples/shard_a_layer.py

Every rank prints how far its outputs and the layer's gradients are from those of one device.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun starts a script, not a module

from models.attention.full import Attention
from models.positions.rope import Rope
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span

TOKENS = 50  # three ranks do not divide it: the last part is filled up with padding


def compare(rank: int, ranks: int) -> tuple[float, float]:
    """Returns the largest differences of this rank's outputs and of the summed gradients."""
    torch.manual_seed(0)
    alone = Attention(width=48, heads=6, kv_heads=2, position=Rope()).double()
    shared = Attention(width=48, heads=6, kv_heads=2, position=Rope()).double()
    shared.load_state_dict(alone.state_dict())
    hidden = torch.randn(2, TOKENS, 48, dtype=torch.float64)
    span = Span.line(rows=2, tokens=TOKENS)

    expected = alone(hidden, span)
    expected.square().sum().backward()

    # Primitives are replaced by drivers; parameters and their names stay.
    apply_context_parallel(shared, dist.group.WORLD, "ring")
    part = shard_span(span, layouts("zigzag", span, ranks), rank)
    outputs = shared(part.sharding.shard(hidden, 0), part)
    valid = part.valid()[..., None]
    (outputs * valid).square().sum().backward()

    difference = (outputs - part.sharding.shard(expected, 0)) * valid
    worst = 0.0
    for ours, reference in zip(shared.parameters(), alone.parameters()):
        dist.all_reduce(ours.grad)
        worst = max(worst, (ours.grad - reference.grad).abs().max().item())
    return difference.abs().max().item(), worst


if __name__ == "__main__":
    dist.init_process_group("gloo")
    output, gradient = compare(dist.get_rank(), dist.get_world_size())
    print(f"rank {dist.get_rank()}: outputs differ by {output:.0e}, gradients by {gradient:.0e}")
    dist.destroy_process_group()
