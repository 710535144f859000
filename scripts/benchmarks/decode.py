"""Measures decoding beside transformers' `generate` with the same weights and threads.

Two Llama-like models with random weights: that of the quickstart and one of about 50 M parameters.
Both sides decode greedily, in float32, behind random keys and values of as many tokens as the
context has. What is timed is the time from one token to the next: its median over steps. The sides
take turns, BLOCK tokens each, so that what else the machine does falls on both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.positions.rope import Rope
from models.recurrent.rwkv7 import Rwkv7
from scripts.benchmarks.attention import parse_into
from trainer.decoding.token_decoder import TokenDecoder

VOCABULARY = 257
BLOCK = 8  # tokens that one side makes before the other does
EPS = torch.finfo(torch.float32).eps  # of the norms, as nn.RMSNorm has it
# width, layers, heads, key heads
MODELS = {"quickstart": (192, 6, 6, 2), "50 M": (640, 10, 10, 2)}


@dataclass(frozen=True)
class DecodeSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    blocks: int = 6
    threads: int = 2
    longest: int = 8192
    most: int = 65536
    recurrent: int = 32768
    ranks: int = 1
    device: str = "cpu"


def parse(words: list[str]) -> DecodeSizes:
    """Settings of the words.

    Raises:
        ValueError: a key that is none or a value that is no number.
    """
    return parse_into(DecodeSizes(), words)


def twins(
    width: int, layers: int, heads: int, kv_heads: int, *, window: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """Returns a model of transformers and ours with the same random weights.

    Args:
        window: keys that a query sees; None: all, by a Llama.
    """
    transformers: Any = import_module("transformers")
    ffn = 8 * width // 3
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    if window is None:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        config = transformers.MistralConfig(**sizes, sliding_window=window)
        theirs = transformers.MistralForCausalLM(config)
    mixers: list[nn.Module] = []
    for _ in range(layers):
        if window is None:
            mixers.append(Attention(width, heads, kv_heads, Rope()))
        else:
            mixers.append(Sliding(width, heads, kv_heads, Rope(), window=window))
    ours = Decoder(VOCABULARY, width, mixers, [SwiGLU(width, ffn) for _ in range(layers)])
    ours.load_state_dict({name: copied(theirs, name) for name in ours.state_dict()})
    name_stateful_modules(ours)
    return theirs.eval(), ours.eval()


PARTS = {
    "mixer_norm": "input_layernorm",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
WHOLE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def copied(theirs: nn.Module, name: str) -> Tensor:
    """Returns the weight of theirs that ours of this name is."""
    path = name.removesuffix(".weight")
    if path in WHOLE:
        return theirs.get_parameter(f"{WHOLE[path]}.weight").data
    _, layer, part = path.split(".", 2)
    return theirs.get_parameter(f"model.layers.{layer}.{PARTS[part]}.weight").data


def greedy(model: nn.Module, prompts: Tensor, count: int) -> Tensor:
    """Our side: [B, count] the likeliest tokens after prompts [B, T]."""
    decoder = TokenDecoder(model)
    logits = decoder.feed(prompts.tolist())
    tokens = []
    for index in range(count):
        tokens.append(logits.argmax(-1))
        if index + 1 < count:
            logits = decoder.feed(tokens[-1][:, None].tolist())
    return torch.stack(tokens, 1)


def peers_greedy(model: Any, prompts: Tensor, count: int) -> Tensor:
    """Their side."""
    result = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return result[:, prompts.shape[1] :]


class Clock:
    """Notes when each token comes; the interface is that of transformers' streamers.

    Args:
        pause: called after every BLOCK tokens; what it takes is not counted.
    """

    def __init__(self, pause: Callable[[], None] | None = None) -> None:
        self.pause = pause
        self.steps: list[float] = []
        self._tokens = 0
        self._last: float | None = None

    def put(self, value: Tensor) -> None:
        """Is called with each new token, by their side with the prompt before."""
        now = perf_counter()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last = now
        self._tokens += 1
        if self._tokens % BLOCK == 0 and self.pause is not None:
            self.pause()
            # The caches of the processor hold the other side now: the next step does not count.
            self._last = None

    def end(self) -> None:
        """Is called after the last."""


def measure(sizes: DecodeSizes, group: Any) -> Iterator[dict]:
    """A row of figures for each model, batch and context, then for a recurrent model."""
    torch.set_num_threads(sizes.threads)
    for name, shape in MODELS.items():
        theirs, ours = twins(*shape)
        for batch in (1, 8):
            for context in (512, sizes.longest):
                if batch * context <= sizes.most:
                    yield {"model": name, **compared(ours, theirs, batch, context, sizes)}
    yield from recurrent_steps(sizes)


def compared(ours: nn.Module, theirs: Any, batch: int, context: int, sizes: DecodeSizes) -> dict:
    """Returns the tokens per second of both sides, medians of steps in alternated blocks."""
    decoder = filled(ours, batch, context)
    logits = decoder.feed([[1]] * batch)
    mine: list[float] = []

    def our_block() -> None:
        nonlocal logits
        for index in range(BLOCK):
            began = perf_counter()
            logits = decoder.feed(logits.argmax(-1)[:, None].tolist())
            if index:  # the first step finds the processor's caches full of the other side
                mine.append(perf_counter() - began)

    clock = Clock(our_block)
    their_steps(theirs, batch, context, BLOCK * sizes.blocks, clock)
    rates = {"ours": batch / median(mine), "theirs": batch / median(clock.steps)}
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "batch": batch,
        "context": context,
        **rates,
        "ratio": rates["ours"] / rates["theirs"],
    }


def filled(model: nn.Module, batch: int, context: int) -> TokenDecoder:
    """Returns a decoder that holds random keys and values of so many tokens: a step takes as long
    as after a prompt, which would take minutes to read."""
    probe = TokenDecoder(model)
    probe.feed([[1]])
    found = {}
    for name, tensor in probe.state.export_state().items():
        if name.endswith("/pos"):
            found[name] = torch.arange(context).expand(batch, context).contiguous()
        elif name.startswith("slots/"):
            found[name] = tensor.expand(batch, context).contiguous()
        else:
            found[name] = torch.randn(batch, context, *tensor.shape[2:])
    decoder = TokenDecoder(model)
    decoder.state.import_state(found)
    decoder.lengths = [context] * batch
    return decoder


def their_steps(model: Any, batch: int, context: int, count: int, clock: Clock) -> None:
    """Lets transformers generate behind random keys and values of so many tokens."""
    transformers: Any = import_module("transformers")
    config = model.config
    cache = transformers.DynamicCache(config=config)
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = batch, config.num_key_value_heads, context, width
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    prompts = torch.ones(batch, context + 1, dtype=torch.long)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock,
    )


def recurrent_steps(sizes: DecodeSizes) -> Iterator[dict]:
    """A row for each context of RWKV-7 of the quickstart's size: a step costs the same."""
    width, layers, heads, _ = MODELS["quickstart"]
    mixers = [Rwkv7(width, heads, layer, layers) for layer in range(layers)]
    feedforwards = [SwiGLU(width, 8 * width // 3) for _ in range(layers)]
    model = Decoder(VOCABULARY, width, mixers, feedforwards).eval()
    name_stateful_modules(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    contexts = (512, sizes.recurrent)
    decoders = []
    for context in contexts:
        decoder = TokenDecoder(model)
        decoder.feed(torch.randint(256, (1, context)).tolist())
        decoders.append(decoder)
    times: dict[int, list[float]] = {context: [] for context in contexts}
    for _ in range(BLOCK * sizes.blocks):
        # Alternated, so that what else the machine does falls on both.
        for context, decoder in zip(contexts, decoders, strict=True):
            began = perf_counter()
            decoder.feed([[1]])
            times[context].append(perf_counter() - began)
    for context, decoder in zip(contexts, decoders, strict=True):
        yield {
            "model": "rwkv7",
            "batch": 1,
            "context": context,
            "step_ms": 1000 * median(times[context]),
            "of_first": median(times[context]) / median(times[contexts[0]]),
            "bytes": decoder.bytes(),
        }


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = ("model", "batch", "context", "tokens/s", "transformers", "ratio")
    lines = ["".join(f"{name:>14}" for name in columns)]
    for row in rows:
        cells = [row["model"], row["batch"], row["context"]]
        if "ratio" in row:
            cells += [f"{row['ours']:.1f}", f"{row['theirs']:.1f}", f"{row['ratio']:.2f}"]
        else:
            cells += [f"{1000 / row['step_ms']:.1f}", f"{row['step_ms']:.2f} ms"]
            cells.append(f"{row['of_first']:.2f}")
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
