"""Base class of the primitives: the only modules through which one token learns of another.

A layer owns parameters and calls primitives; a primitive has no parameters. Everything else in a
model treats each token by itself, so a row is sharded over ranks by replacing primitives, and
nothing else, by their drivers (parallel/context_parallel.py).
"""

from typing import ClassVar

from torch import nn


class Primitive(nn.Module):
    """Marks a module that reads several tokens, so that no table can forget it in silence.

    A new primitive inherits the strict defaults: without a driver it is refused where rows are
    sharded, without an entry in models/cost/flops.py it is refused where FLOPs are counted, and
    where a model decodes it is refused until it says that it reads `Span.past`.

    Attributes:
        needs_driver: whether a sharded row changes the result. False where tokens do not read one
            another, although they are exchanged (experts).
        counts_flops: whether the FLOP count has to watch its calls. False where the convention of
            models/cost/flops.py leaves its arithmetic out or counts it from weights.
        continues_rows: whether it reads, through `Span.past`, what came before the tokens at hand
            in their rows. A model decodes where all of its primitives do.
        place: its name in the model, which `models.carried_state.name_stateful_modules` fills in.
    """

    needs_driver: ClassVar[bool] = True
    counts_flops: ClassVar[bool] = True
    continues_rows: ClassVar[bool] = False
    place: str = ""
