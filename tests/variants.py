"""The table of what is compared: one row a mixer, at sizes small enough to print. A new variant adds its row here."""

from collections.abc import Callable

from torch import nn

from models.attention.full import Attention, MultiHead, MultiQuery
from models.attention.latent import Latent
from models.attention.sliding import Sliding
from models.positions.none import NoPosition
from models.positions.rope import Rope

WIDTH, HEADS = 24, 6

VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: Attention(WIDTH, HEADS, 3, Rope()),
    "multi_head": lambda: MultiHead(WIDTH, HEADS, Rope()),
    "multi_query": lambda: MultiQuery(WIDTH, HEADS, Rope()),
    "sliding": lambda: Sliding(WIDTH, HEADS, 2, Rope(), reach=7),
    "no_position": lambda: Attention(WIDTH, HEADS, 2, NoPosition()),
    "latent": lambda: Latent(WIDTH, HEADS, Rope(), latent=10, query_latent=9, content=4, turned=2, value=3),
}
