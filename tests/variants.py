"""The table of what is compared: one row a mixer, at sizes small enough to print. A new variant
adds its row here."""

from collections.abc import Callable

from torch import nn

from models.attention.bidirectional import Bidirectional
from models.attention.bigbird import BigBird
from models.attention.chunked import Chunked
from models.attention.compressed import Compressed
from models.attention.differential import Differential
from models.attention.full import Attention, MultiHead, MultiQuery
from models.attention.gated import Gated
from models.attention.latent import LatentAttention
from models.attention.longformer import Longformer
from models.attention.lsh import LSHAttention
from models.attention.prefix import PrefixAttention
from models.attention.qk_norm import QKNorm
from models.attention.sink_logit import SinkLogit
from models.attention.sinks import Sinks
from models.attention.sliding import Sliding
from models.attention.softcap import Softcap
from models.convolution.hyena import Hyena
from models.convolution.short_conv import ShortConv
from models.init import normal
from models.positions.alibi import Alibi
from models.positions.base import Position
from models.positions.interpolated import Interpolated
from models.positions.learned import Learned
from models.positions.none import NoPosition
from models.positions.ntk import Ntk
from models.positions.relative import Relative
from models.positions.rope import Rope
from models.positions.sinusoidal import Sinusoidal
from models.positions.t5 import T5
from models.positions.yarn import Yarn
from models.recurrent.delta import DeltaNet, GatedDeltaNet
from models.recurrent.gated_linear import GatedLinear
from models.recurrent.linear import LinearAttention
from models.recurrent.mamba2 import Mamba2
from models.recurrent.performer import Performer
from models.recurrent.retention import Retention
from models.recurrent.rwkv6 import Rwkv6
from models.recurrent.rwkv7 import Rwkv7
from models.recurrent.rwkv_layers import ChannelMix, GatedChannelMix

WIDTH, HEADS = 24, 6


class Placed(nn.Module):
    """Full attention whose positions are added to what comes in."""

    def __init__(self, position: Position):
        super().__init__()
        self.position, self.inner = position.embedding(WIDTH), Attention(WIDTH, HEADS, 3, position)

    def forward(self, x, span):
        return self.inner(x + self.position(span), span)


class Contrast(Differential):
    """Weights large enough that a pair's two maps differ; else lambda's gradient is a difference of
    nearly equal sums."""

    def init_rules(self):
        return {**super().init_rules(), "q.weight": normal(0.1), "k.weight": normal(0.1)}


class Taught(nn.Module):
    """Compressed attention with its indexer's loss added to what comes out, so that its gradients
    are compared too."""

    def __init__(self, step: int):
        super().__init__()
        settings = {
            "block": 3,
            "top": 2,
            "window": 4,
            "index_heads": 3,
            "index_channels": 6,
            "groups": 2,
            "rope_dim": 2,
        }
        self.inner = Compressed(WIDTH, HEADS, Rope(), **settings, dense_steps=1)
        self.inner.on_step_begin(step)

    def forward(self, x, span):
        return self.inner(x, span) + self.inner.auxiliary["indexer"][..., None]


class Awake(Rwkv7):
    """RWKV-7 whose low-rank maps do not begin at 0, so that all their gradients count."""

    def init_rules(self):
        return {
            name: normal(0.3) if "down" in name else rule
            for name, rule in super().init_rules().items()
        }


class Stacked(nn.Module):
    """Two RWKV-7 layers, the second drawn toward the values of the first."""

    def __init__(self):
        super().__init__()
        self.lower, self.upper = (Awake(WIDTH, HEADS, layer, 2, rank=5) for layer in range(2))

    def forward(self, x, span):
        y, first = self.lower.values(x, span, None)
        return self.upper.values(x + y, span, first)[0]


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: Attention(WIDTH, HEADS, 3, Rope()),
    "multi_head": lambda: MultiHead(WIDTH, HEADS, Rope()),
    "multi_query": lambda: MultiQuery(WIDTH, HEADS, Rope()),
    "sliding": lambda: Sliding(WIDTH, HEADS, 2, Rope(), window=7),
    "no_position": lambda: Attention(WIDTH, HEADS, 2, NoPosition()),
    "latent": lambda: LatentAttention(
        WIDTH, HEADS, Rope(), kv_latent=10, q_latent=9, nope_dim=4, rope_dim=2, value_dim=3
    ),
    "longformer": lambda: Longformer(
        WIDTH, HEADS, 3, Rope(), 1, 2, window=[2, 4], dilation=[1, 1, 1, 2, 3, 2], first=1, every=8
    ),
    "longformer_symmetric": lambda: Longformer(
        WIDTH, HEADS, 6, Rope(), 0, 1, window=5, first=2, symmetric=True
    ),
    "bigbird": lambda: BigBird(WIDTH, HEADS, 3, Rope(), 1, 5, block=3, random=2),
    "bigbird_symmetric": lambda: BigBird(
        WIDTH, HEADS, 6, Rope(), 1, 5, block=3, random=1, per_head=False, symmetric=True
    ),
    "bidirectional": lambda: Bidirectional(WIDTH, HEADS, 3, Rope()),
    "prefix": lambda: PrefixAttention(WIDTH, HEADS, 3, Rope(), length=5),
    "sinks": lambda: Sinks(WIDTH, HEADS, 2, Rope(), window=6, sink_tokens=3),
    "sink_logit": lambda: SinkLogit(WIDTH, HEADS, 2, Rope(), window=9),
    "chunked": lambda: Chunked(WIDTH, HEADS, 3, Rope(), size=8),
    "softcap": lambda: Softcap(WIDTH, HEADS, 3, Rope(), cap=0.3),
    "qk_norm": lambda: QKNorm(WIDTH, HEADS, 3, Rope()),
    "gated": lambda: Gated(WIDTH, HEADS, 2, Rope()),
    "differential": lambda: Contrast(WIDTH, HEADS, 2, Rope(), layer=1),
    "yarn": lambda: Attention(WIDTH, HEADS, 3, Yarn(4.0, 16)),
    "ntk": lambda: Attention(WIDTH, HEADS, 3, Ntk(4.0)),
    "interpolated": lambda: Attention(WIDTH, HEADS, 3, Interpolated(4.0)),
    "alibi": lambda: Attention(WIDTH, HEADS, 3, Alibi()),
    "t5": lambda: Attention(WIDTH, HEADS, 3, T5(8, 20)),
    "relative": lambda: Attention(WIDTH, HEADS, 3, Relative(clamp=30)),
    "sinusoidal": lambda: Placed(Sinusoidal()),
    "learned": lambda: Placed(Learned(64)),
    "bidirectional_t5": lambda: Bidirectional(WIDTH, HEADS, 3, T5(8, 20, bidirectional=True)),
    "sink_logit_relative": lambda: SinkLogit(WIDTH, HEADS, 2, Relative()),
    "softcap_alibi": lambda: Softcap(WIDTH, HEADS, 3, Alibi(), cap=0.3),
    "differential_t5": lambda: Contrast(WIDTH, HEADS, 2, T5(8, 20), layer=1),
    "differential_alibi": lambda: Contrast(WIDTH, HEADS, 6, Alibi(), layer=8),
    "lsh": lambda: LSHAttention(WIDTH, HEADS, Rope(), 1, 3, 51, chunk_size=3, hashes=2, buckets=4),
    "compressed": lambda: Taught(step=2),
    "compressed_dense": lambda: Taught(step=1),
    "linear": lambda: LinearAttention(WIDTH, HEADS),
    "performer": lambda: Performer(WIDTH, HEADS, 1, 2, features=10),
    "retention": lambda: Retention(WIDTH, HEADS),
    "gated_linear": lambda: GatedLinear(WIDTH, HEADS, rank=5),
    "rwkv6": lambda: Rwkv6(WIDTH, HEADS, 1, 3, rank=5),
    "rwkv7": lambda: Awake(WIDTH, HEADS, 1, 3, rank=5),
    "rwkv7_stacked": Stacked,
    "channel_mix": lambda: ChannelMix(WIDTH, 30, 1, 2),
    "gated_channel_mix": lambda: GatedChannelMix(WIDTH, 30, 1, 2),
    "delta": lambda: DeltaNet(WIDTH, HEADS),
    "gated_delta": lambda: GatedDeltaNet(WIDTH, HEADS, allow_neg_eigval=True),
    "mamba2": lambda: Mamba2(WIDTH, HEADS, state=5),
    "short_conv": lambda: ShortConv(WIDTH),
    "hyena": lambda: Hyena(WIDTH, 51, order=3, filter_width=8, bands=3),
}
