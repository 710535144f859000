"""A decoder with a mixture of experts, small enough to print: what expert parallelism asks of
engines and checkpoints.

The experts' exchange is written out here in the plainest form, so that engines are tested apart
from models/moe/switch.py.
Letters: N tokens at hand, W width, E experts, F hidden width of an expert, P expert ranks.
"""

import torch
from torch import Tensor, nn

from models.attention.full import Attention
from models.init import normal
from models.loss import IGNORE, token_losses
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.span import Span
from parallel.collectives import Communicator, all_to_all_rows
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from tests.support.parity import packed
from trainer.optim.adamw import AdamW

ENGINES = {"single": Single, "fsdp": Fsdp}
OPTIM = AdamW(learning_rate=1e-2, weight_decay=0.1)
WORDS, WIDTH, EXPERTS, CLIP = 13, 24, 4, 0.05


class Experts(nn.Module):
    """Stacks of E small networks; tokens [N, W] come sorted by expert, counts [E] say how many each
    has."""

    sharded_over_experts = True

    def __init__(self, hidden: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, hidden))
        self.bias = nn.Parameter(torch.empty(EXPERTS, hidden))
        self.down = nn.Parameter(torch.empty(EXPERTS, hidden, WIDTH))

    def init_rules(self):
        return {"up": normal(0.3), "bias": normal(0.3), "down": normal(0.3)}

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        assert len(self.up) == len(counts)  # the local stacks
        parts = tokens.split(counts.tolist())
        found = [
            torch.tanh(x @ self.up[i] + self.bias[i]) @ self.down[i] for i, x in enumerate(parts)
        ]
        return torch.cat(found)


class Mixture(nn.Module):
    """Each token visits the expert that its router likes best."""

    def __init__(self, hidden: int):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts(hidden)
        self.communicator: Communicator | None = None

    def init_rules(self):
        return {"router.weight": normal(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gate, which = self.router(tokens).float().softmax(1).max(1)
        order = which.argsort(stable=True)
        found = self.visit(tokens[order], which.bincount(minlength=EXPERTS))
        return x + (
            gate.to(x.dtype)[:, None] * torch.zeros_like(found).index_copy(0, order, found)
        ).view_as(x)

    def visit(self, sent: Tensor, counts: Tensor) -> Tensor:
        """[N, W] sorted by expert -> what the experts make of them, in the same order."""
        if self.communicator is None:
            return self.experts(sent, counts)
        given = counts.view(self.communicator.size, -1)  # [P, E / P]
        taken = torch.stack(
            self.communicator.all_to_all(list(given), [given.shape[1]] * len(given), "counts")
        )
        sizes = given.sum(1).tolist(), taken.sum(1).tolist()
        here = all_to_all_rows(sent, self.communicator, sizes[0], sizes[1], "tokens")
        label = torch.arange(given.shape[1]).repeat(len(given)).repeat_interleave(taken.flatten())
        order = label.argsort(stable=True)
        found = self.experts(here[order], taken.sum(0))
        return all_to_all_rows(
            torch.zeros_like(found).index_copy(0, order, found),
            self.communicator,
            sizes[1],
            sizes[0],
            "tokens back",
        )


class Block(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.norm, self.mixer, self.mixture = (
            nn.RMSNorm(WIDTH),
            Attention(WIDTH, 6, 3, Rope()),
            Mixture(hidden),
        )

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return self.mixture(x + self.mixer(self.norm(x), span))


class Model(nn.Module):
    """As models.architectures.decoder.Decoder, with a mixture in each block."""

    def __init__(self, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, batch: MicroBatch) -> Tensor:
        tokens, span, targets, _ = batch
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, span)
        return token_losses(self.norm(x), self.head.weight, targets)


def data(step: int) -> tuple[Tensor, Tensor, Span]:
    """([4, T] tokens, targets, span): rows of several uneven documents, padding, some targets
    missing."""
    span = packed().map(lambda x: torch.cat((x, x.flip(0))))
    draw = torch.Generator().manual_seed(step)
    tokens, targets = (torch.randint(0, WORDS, span.shape, generator=draw) for _ in range(2))
    return tokens, targets.masked_fill(~span.valid() | (span.pos % 5 == 3), IGNORE), span


def engine_on(
    mesh: Mesh,
    name: str,
    *,
    hidden: int = 16,
    precision: str = "float64",
    seed: int = 5,
    offload=None,
    **settings,
):
    """An engine with the model placed on `mesh`, the exchange of experts included."""
    with torch.device("meta"):
        model = Model(hidden)
    if mesh.experts.group is not None:
        for block in model.blocks:
            block.mixture.communicator = Communicator(mesh.experts.group)
    engine = ENGINES[name](mesh, OPTIM, precision=precision, seed=seed, **settings)
    parallelize(model, engine, method="ring", offload=offload)
    return engine


def engine_here(name: str, shape: dict, **settings):
    """As `engine_on`, on the pool's ranks; `shape` is what build_mesh takes."""
    return engine_on(build_mesh(**shape), name, **settings)


def train(engine, steps: range) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """(losses, norms, whole gradients of the last step before clipping) over all rows of each
    step."""
    mesh, losses, norms, gradients = engine.mesh, [], [], {}
    for step in steps:
        tokens, targets, span = data(step)
        valid = (targets != IGNORE).sum()
        mine = range(len(tokens))[mesh.data.rank :: mesh.data.size]
        total = torch.zeros((), dtype=torch.float64)
        for row in mine:
            one = slice(row, row + 1)
            here, words, wanted = span.map(lambda x, one=one: x[one]), tokens[one], targets[one]
            if mesh.context.size > 1:
                here = shard_span(
                    here, [layout("zigzag", span.shape[1], mesh.context.size)], mesh.context.rank
                )
                words, wanted = here.sharding.shard(words, 0), here.sharding.shard(wanted, IGNORE)
            loss = engine.model(MicroBatch(words, here, wanted)).sum() / valid
            engine.backward(loss, last=row == mine[-1])
            total += loss.detach()
        if mesh.world.group is not None:
            torch.distributed.all_reduce(total, group=mesh.world.group)
        gradients = {name: whole(p.grad) for name, p in engine.parameters.items()}
        losses.append(total.item())
        norms.append(engine.clip(CLIP))
        engine.step(0.01)
    return losses, norms, gradients


def whole(tensor: Tensor) -> Tensor:
    """Gathered, and a copy."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def everything(engine) -> dict[str, dict[str, Tensor]]:
    """Every tensor of the engine's state, whole."""
    return {
        part: {name: whole(t) for name, t in tensors.items()}
        for part, tensors in engine.state().items()
    }
