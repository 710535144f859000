"""A layer's own loss reaches the optimiser whole: cut over ranks, with sharded parameters, with
blocks computed again."""

import pytest
import torch
from torch import Tensor, nn

from models.architectures.decoder import Decoder
from models.attention.compressed import Compressed
from models.auxiliary import auxiliary_loss
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks
from trainer.optim.adamw import AdamW

ENGINES = {"single": Single, "fsdp": Fsdp}
OPTIM = AdamW(learning_rate=1e-2)


def _model() -> Decoder:
    settings = {
        "block": 3,
        "top": 2,
        "window": 4,
        "index_heads": 3,
        "index_channels": 6,
        "rope_dim": 2,
    }
    return Decoder(
        11,
        12,
        [Compressed(12, 3, Rope(), **settings) for _ in range(2)],
        [SwiGLU(12, 16) for _ in range(2)],
    )


def _given() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 11, (2, 51), generator=torch.Generator().manual_seed(0))
    return tokens, torch.where(packed().valid(), tokens.roll(-1, 1), IGNORE)


def _loss(model: nn.Module, tokens: Tensor, span, targets: Tensor) -> Tensor:
    losses = model(MicroBatch(tokens, span, targets)).sum()
    return losses + 0.5 * auxiliary_loss(model)["indexer"]


def _placed(env, name: str, checkpointing: str) -> float:
    """Worst difference between an engine's gradients and those of one process."""
    truth = initialise(_model(), seed=3).double()
    tokens, targets = _given()
    _loss(truth, tokens, packed(), targets).backward()
    engine = ENGINES[name](
        build_mesh(env.size, 1), OPTIM, precision="float64", seed=3, checkpointing=checkpointing
    )
    with torch.device("meta"):
        model = _model()
    parallelize(model, engine, method="ring")
    span = shard_span(packed(), [layout("zigzag", 51, env.size)], env.rank)
    loss = _loss(
        engine.model, span.sharding.shard(tokens, 0), span, span.sharding.shard(targets, IGNORE)
    )
    engine.backward(loss, last=True)
    grads = {key: p.grad for key, p in engine.parameters.items()}
    grads = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in grads.items()}
    assert truth.blocks[0].mixer.indexer.q.weight.grad.abs().max() > 1e-6
    return max(relative(grads[key], p.grad) for key, p in truth.named_parameters())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", ENGINES)
def test_the_gradient_of_a_layers_own_loss_is_that_of_one_process(name, checkpointing):
    assert max(ranks(3, _placed, name, checkpointing)) < 1e-10
