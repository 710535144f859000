"""Proves on a tiny twin that layers which are not ours mix tokens through primitives alone.

parallel/ shares the primitives of models/primitives/. A layer that mixes tokens in any other way
would see its own part of the row only, on every rank, and would train on without a message. The
proof needs no ranks: the twin runs once while the outputs of its primitives are recorded, and again
with some tokens changed while its primitives return the recorded outputs. Only the changed tokens
may move then. In the same way, with primitives at work, no token before a changed one and none of
another document may move.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.micro_batch import MicroBatch
from models.primitive import Primitive
from models.span import Span
from trainer.config.finding import NO_VALUE_SHOWN, Finding
from trainer.config.node_checks import as_node, find_class
from trainer.config.schema import Config, MemoryConfig
from trainer.config.values import is_node
from trainer.errors import UserError
from trainer.objectives.contradictions import learns_next
from trainer.run_dir import plain_config as as_tree
from trainer.verify.diagnosis import example_source, packed_rows
from trainer.verify.doctor import VOCABULARY, build_noisy_model, small_twin

OURS = ("models", "parallel", "trainer")
PAGE = "read docs/own_layers.md"
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4}  # of the largest logit
PLACE = 20  # of the changed token in its document


def targets(node: Any) -> Iterator[str]:
    """Yields the classes that a node, a list or a group of nodes names."""
    if is_node(node):
        yield str(node["_target_"])
    inner = (
        list(node.values())
        if isinstance(node, Mapping)
        else node
        if isinstance(node, list | tuple)
        else []
    )
    for value in inner:
        yield from targets(value)


def strangers(config: Config) -> list[str]:
    """Returns the names of the classes of a config's layers that are not ours."""
    named = [
        *targets(as_tree(config)["model"]),
        *targets(as_node(config.position)),
        *targets(as_node(config.memory)),
    ]
    if config.mixer is not None:
        named += targets(as_node(config.mixer))
    foreign = [name for name in dict.fromkeys(named) if _outside(name)]
    return [name.rpartition(".")[2] for name in foreign]


def _outside(target: str) -> bool:
    try:
        kind = find_class(target, "")
    except UserError:  # said elsewhere
        return False
    return kind.__module__.partition(".")[0] not in OURS


def check_foreign_layers(config: Config) -> Iterator[Finding]:
    """Checks that layers which are not ours can be shared, and train without a leak."""
    class_names = strangers(config)
    shared = _is_cut(config)
    if not class_names or (config.model.allow_leaks and not shared):
        return
    layers = " and ".join(class_names)
    try:
        moved, bound = _tried(config)
    # A layer of the user's own may raise anything.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        yield Finding(
            "model",
            NO_VALUE_SHOWN,
            f"{layers} could not be tried on a tiny twin ({type(error).__name__}: {first_line}),"
            " so leaks cannot be ruled out",
            f"let it work at any width, length and precision{_way_out(config)}",
        )
        return
    if shared and moved.frozen > bound:
        key = "parallel.context"
        pieces = config.parallel.context
        part = "each rank"
        if pieces == 1:
            key = "parallel.time"
            pieces = config.parallel.time
            part = "each piece"
        yield Finding(
            key,
            pieces,
            f"{layers} mixes tokens by itself, so {part} would see its own part of the row only",
            f"put that into a primitive ({PAGE}), or use {key}=1",
        )
    if moved.documents > bound:
        yield Finding(
            "model",
            NO_VALUE_SHOWN,
            f"{layers} lets tokens of one document learn of another in the same row",
            f"use the span that it is given, best through a primitive ({PAGE}){_way_out(config)}",
        )
    if moved.earlier > bound and learns_next(config):
        yield Finding(
            "model",
            NO_VALUE_SHOWN,
            f"{layers} lets tokens see those that come after them, which next-token loss rewards",
            f"make it causal, best through a primitive ({PAGE}), or use"
            f" objective=masked{_way_out(config)}",
        )


def _way_out(config: Config) -> str:
    return "" if _is_cut(config) else ", or train so knowingly with model.allow_leaks=true"


def _is_cut(config: Config) -> bool:
    """True if rows are cut, over ranks or in time."""
    return config.parallel.context > 1 or config.parallel.time > 1


@dataclass(frozen=True)
class Moved:
    """Largest change of logits that must not change, in units of the largest logit.

    Attributes:
        frozen: with primitives that return the same as before.
        documents: in other documents and padding.
        earlier: earlier in the changed token's own document.
    """

    frozen: float
    documents: float
    earlier: float


def _tried(config: Config) -> tuple[Moved, float]:
    """Probes the twin in float64, or in float32 where a layer knows nothing else."""
    tree = as_tree(small_twin(config))
    if not _outside(config.memory.target):
        tree["memory"] = as_tree(
            config.model_copy(update={"memory": MemoryConfig.model_validate({})})
        )["memory"]
    tiny = Config.model_validate(tree)
    try:
        return _probed(tiny, torch.float64), BOUNDS[torch.float64]
    except (RuntimeError, TypeError):
        return _probed(tiny, torch.float32), BOUNDS[torch.float32]


def _probed(tiny: Config, dtype: torch.dtype) -> Moved:
    span = packed_rows()
    tokens = torch.randint(VOCABULARY, span.shape, generator=torch.Generator().manual_seed(3))
    victim = torch.zeros_like(tokens, dtype=torch.bool)
    victim[0] = (span.doc[0] == 2) & (span.pos[0] == PLACE)
    own = torch.zeros_like(victim)
    own[0] = span.doc[0] == 2
    one, whole = (torch.where(these, (tokens + 7) % VOCABULARY, tokens) for these in (victim, own))
    frozen = _difference(tiny, dtype, span, (tokens, one), _Tape())
    plainly = _difference(tiny, dtype, span, (tokens, one), None)
    entire = _difference(
        tiny, dtype, span, (tokens, whole), None
    )  # short-sighted layers leak at a document's ends alone
    earlier = own & (span.pos < PLACE)
    documents = max(_largest(plainly, ~own), _largest(entire, ~own))
    return Moved(_largest(frozen, ~victim), documents, _largest(plainly, earlier))


class _Tape:
    """Records the outputs of primitives in the first run and replays them in the second."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.again = False

    def hook(self, module: nn.Module, given: Any, out: Any) -> Any:
        if self.again:
            return self.said.pop(0)
        self.said.append(out)
        return out


@torch.no_grad()
def _difference(
    tiny: Config, dtype: torch.dtype, span: Span, both: tuple[Tensor, Tensor], tape: _Tape | None
) -> Tensor:
    """Returns the distance of the logits of two token rows, [B, T]; infinite if not finite."""
    model = build_noisy_model(tiny).to(dtype)
    if tape is not None:
        for module in model.modules():
            if isinstance(module, Primitive):
                module.register_forward_hook(tape.hook)
    seen = []
    for tokens in both:
        with _same_chance():
            source = example_source(model, VOCABULARY, span.map(torch.clone))
            seen.append(model(MicroBatch(tokens, span.map(torch.clone), None, source)))
        if tape is not None:
            tape.again = True
    scale = seen[0].abs().max().clamp_min(1e-12)
    return ((seen[1] - seen[0]).abs().amax(-1) / scale).nan_to_num(nan=torch.inf)


@contextmanager
def _same_chance() -> Iterator[None]:
    """Gives both runs the same random numbers and restores the generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _largest(moved: Tensor, where: Tensor) -> float:
    return moved[where].max().item()
