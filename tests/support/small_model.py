"""A model small enough to print, with everything an engine must cope with, and the truth to compare
engines with.

Two blocks (matrix, bias, norm), an embedding tied to the head, a buffer that is computed again,
sizes that no number of ranks divides, float64 throughout unless said otherwise.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import initial_tensor
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.mesh import build_mesh
from trainer.optim.adamw import AdamW

ENGINES = {"single": Single, "fsdp": Fsdp}
OPTIM = AdamW(learning_rate=1e-2, weight_decay=0.1)
WORDS, WIDTH, TOKENS = 11, 5, 7
CLIP = 0.05


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4)
        self.down = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Small(nn.Module):
    """tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, tie: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        self.register_buffer("wave", torch.empty(WIDTH), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.wave = torch.arange(WIDTH, dtype=self.wave.dtype, device=self.wave.device).sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.wave.to(self.embedding.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Row(NamedTuple):
    tokens: Tensor  # [T]
    targets: Tensor  # [T], -100 where there is none


def rows(step: int, count: int) -> list[Row]:
    """The rows of a step: each has another number of valid targets, one has none."""
    made = []
    for row in range(count):
        draw = torch.Generator().manual_seed(1000 * step + row)
        tokens = torch.randint(0, WORDS, (TOKENS + 1,), generator=draw)
        targets = tokens[1:].clone()
        targets[row % (TOKENS + 1) :] = -100
        made.append(Row(tokens[:-1], targets))
    return made


def losses(model: nn.Module, row: Row) -> Tensor:
    """[] sum of the row's token losses, in nats."""
    logits = model(row.tokens[None])[0]
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), row.targets, reduction="sum"
    )


def valid(batch: list[Row]) -> int:
    return sum(int((row.targets >= 0).sum()) for row in batch)


def on_meta(tie: bool = True) -> Small:
    with torch.device("meta"):
        return Small(tie)


def engine_here(name: str, size: int, **settings):
    """An engine over all ranks of the pool, its model built on the meta device and wrapped."""
    engine = ENGINES[name](
        build_mesh(1, size), OPTIM, **{"precision": "float64", "seed": 3, **settings}
    )
    engine.wrap(on_meta())
    return engine


def train(engine, first: int, last: int, count: int, micro: int) -> list[float]:
    """Steps first..last - 1 over `count` rows; rank r takes every size-th row, in `micro`
    micro-batches; the norms."""
    mesh = engine.mesh
    norms = []
    for step in range(first, last):
        batch = rows(step, count)
        mine = batch[mesh.world.rank :: mesh.world.size]
        parts = [mine[i::micro] for i in range(micro)]
        for part in parts:
            total = sum(
                (losses(engine.model, row) for row in part), torch.zeros((), dtype=torch.float64)
            )
            engine.backward(total / valid(batch), last=part is parts[-1])
        norms.append(engine.clip(CLIP))
        engine.step(0.01 / (1 + step))
    return norms


def whole(engine) -> dict[str, Tensor]:
    """Every parameter, gathered; equal on all ranks."""
    tensors = {name: p.detach() for name, p in engine.parameters.items()}
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
        for name, t in tensors.items()
    }


def plain_start(seed: int = 3) -> Small:
    """The model with its initial weights, without any engine, in float64."""
    model = Small().double()
    model.reset_buffers()  # in float64 from the start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(model, name, seed))
    return model


def truth(steps: int, count: int) -> tuple[dict[str, Tensor], list[float]]:
    """What plain torch makes of the same rows in one process."""
    model = plain_start()
    embeddings_norms_biases = [
        p for p in model.parameters() if p.ndim < 2 or p is model.embedding.weight
    ]
    matrices = [
        p for p in model.parameters() if all(p is not other for other in embeddings_norms_biases)
    ]
    groups = [{"params": matrices}, {"params": embeddings_norms_biases, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(
        groups, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    norms = []
    for step in range(steps):
        batch = rows(step, count)
        (sum(losses(model, row) for row in batch) / valid(batch)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimiser.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimiser.step()
        optimiser.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, norms
