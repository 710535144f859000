"""Tiny random models of transformers on disk, and ours with their weights beside them."""

import inspect
import sys
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.core_model_loading import revert_weight_conversion

from models.hub.registry import ADAPTERS, adapter_of
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.engines.materialize import materialize, named
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from tests.support.parity import packed
from trainer import export_huggingface
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.export import SavedModel
from trainer.init_from.fit import compare, slots_of
from trainer.init_from.huggingface import read_config
from trainer.init_from.sources import open_weights
from trainer.optim.adamw import AdamW

WORDS = 61
EXACT = "_exact"  # ends the names of modules in float64
WIDER = {
    "torch.float32": "torch.float64",
    ".float()": ".double()",
    "dtype=torch.float)": "dtype=torch.float64)",
    "dtype=torch.float,": "dtype=torch.float64,",
}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
}
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": WORDS}
SMALL_MAMBA2: dict[str, Any] = {
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": WORDS,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SMALL_MIXTRAL = {**SMALL, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9}
SMALL_OSS = {
    **SMALL_MIXTRAL,
    "head_dim": 16,
    "rope_parameters": {**YARN, "truncate": False},
    "swiglu_alpha": 1.5,
    "swiglu_limit": 0.3,  # of what the random weights give, about half is clamped
}
SMALL_DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_mtp_layers": 0,
    "attention_bias": True,
    "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
}
SMALL_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
}
LENGTHS = [[13, 1, 24, 9], [3, 40, 1, 1]]  # documents of the two rows; the rest is padding


def make(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    *,
    kind: str | None = None,
    **save: Any,
) -> nn.Module:
    """Saves a random model of transformers and returns it, in float64.

    Args:
        name: of the config's class.
        kind: of the model's class; None: the one that the adapter names. fla puts models of its own
            behind transformers' AutoModel as soon as anybody imports it.
    """
    config = getattr(transformers, name)(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    home = _exact_qwen3_next() if name == "Qwen3NextConfig" else transformers
    chosen = getattr(home, kind or ADAPTERS[config.model_type].model_class)
    model = chosen(config)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in _name_of(model, tensor):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder, **save)
    # What it computes with is set up by its own loader, as a user would.
    loaded = chosen.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",  # their grouped product knows no float64
    )
    return loaded.eval()


def exact(theirs: nn.Module) -> nn.Module:
    """Returns a model of transformers in its own code with float64 in the place of float32.

    Norms, rotary angles, routers and scans of transformers compute in float32 also where a model is
    in float64. The weights are copied.
    """
    twin = getattr(_exact_code(sys.modules[type(theirs).__module__]), type(theirs).__name__)
    model = twin(theirs.config).double()
    model.load_state_dict(theirs.state_dict())
    return model.train(theirs.training)


@cache
def _exact_code(home: ModuleType) -> ModuleType:
    """Returns a module of transformers with float64 in the place of float32."""
    if home.__name__.endswith(EXACT):
        return home
    module = ModuleType(f"{home.__name__}{EXACT}")
    module.__package__ = home.__package__
    module.__file__ = home.__file__
    sys.modules[module.__name__] = module
    source = Path(str(home.__file__)).read_text()
    for short, wide in WIDER.items():
        source = source.replace(short, wide)
    exec(compile(source, str(home.__file__), "exec"), vars(module))
    return module


@cache
def _exact_qwen3_next() -> ModuleType:
    """Returns the exact code of Qwen3-Next, whose float32 moves gradients by 2e-4.

    Its plain forms stand in the place of fla's kernels, which need a GPU.
    """
    module = _exact_code(transformers.models.qwen3_next.modeling_qwen3_next)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        setattr(module, name, inspect.unwrap(getattr(module, name)))
    return module


def _name_of(model: nn.Module, tensor: Tensor) -> str:
    for name, buffer in model.named_buffers():
        if buffer is tensor:
            return name
    return ""


def config_of(folder: Path | str, *words: str) -> Config:
    """The config of a run that takes its model from a folder."""
    asked = compose(["model=hub", f"model.path={folder}", "context_length=64", *words])
    assert not asked.faults, asked.faults
    assert asked.config is not None
    return asked.config


def export_again(folder: Path, output: Path, patch: Any, **settings: Any) -> None:
    """Exports the model of a folder as if a run had taken it in and saved it at once.

    Args:
        patch: pytest's monkeypatch.
        settings: of export_huggingface.
    """
    model = blank(folder)
    source = open_weights(f"hf:{folder}")
    slots = slots_of(model)
    found = {}
    for name, where in compare(source, slots).fitting.items():
        found[name] = source.read(where)
    for alias, first in slots.aliases.items():
        found[alias] = found[first]
    saved = SavedModel(config_of(folder), WORDS, 0, model, found)
    patch.setattr(export_huggingface, "read_model", lambda place, trust: saved)
    export_huggingface.export_huggingface(folder, output, **settings)


def blank(folder: Path | str, *words: str) -> nn.Module:
    """Our model of a folder, without memory."""
    with torch.device("meta"):
        return build_model(config_of(folder, *words), WORDS)


def ours(folder: Path | str, *words: str) -> nn.Module:
    """Our model of a folder in float64, on this device."""
    model = blank(folder, *words).double()
    source = open_weights(f"hf:{folder}")
    fit = compare(source, slots_of(model))
    assert not fit.text(), fit.text()
    materialize(model, torch.device("cpu"), 0)
    slots = model.state_dict()
    with torch.no_grad():
        for name, where in fit.fitting.items():
            slots[name].copy_(source.read(where))
    return model.eval()


@lru_cache(maxsize=1)
def rows() -> tuple[Tensor, Span, Tensor]:
    """(tokens, span, targets) of packed documents."""
    span = packed(LENGTHS, 51)
    # Not 0: where that is pad_token_id, transformers gives the embedding of it no gradient.
    tokens = torch.randint(1, WORDS, span.shape, generator=torch.Generator().manual_seed(3))
    same = torch.zeros_like(tokens, dtype=torch.bool)
    same[:, :-1] = (span.doc[:, 1:] == span.doc[:, :-1]) & (span.doc[:, 1:] >= 0)
    return tokens, span, torch.where(same, tokens.roll(-1, 1), IGNORE)


def documents() -> list[tuple[int, slice, Tensor]]:
    """The documents of `rows`: (row, place in it, tokens [1, T] by themselves)."""
    tokens, _, _ = rows()
    found = []
    for row, sizes in enumerate(LENGTHS):
        start = 0
        for size in sizes:
            place = slice(start, start + size)
            found.append((row, place, tokens[row : row + 1, place]))
            start += size
    return found


def their_gradients(theirs: nn.Module, folder: Path | str) -> dict[str, Tensor]:
    """Gradients of a model of transformers by our names, through the pieces of its adapter."""
    content = read_config(Path(folder))
    model_gradients = saved_form(theirs, {n: p.grad for n, p in theirs.named_parameters()})
    found = {}
    for piece in adapter_of(content).pieces(content):
        if all(name in model_gradients for name in piece.theirs):
            parts = piece.read([model_gradients[name] for name in piece.theirs])
            found.update(zip(piece.ours, parts, strict=True))
    return found


def saved_form(theirs: nn.Module, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors by the names of the parameters in memory, in the form in which they are saved."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return revert_weight_conversion(theirs, given)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, in units of its largest magnitude."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    found = [0.0]
    for name, tensor in want.items():
        scale = tensor.abs().max().clamp_min(1e-6)
        found.append(((got[name] - tensor).abs().max() / scale).item())
    return max(found)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of our parameters, tied ones under their first name."""
    firsts = {first for _, first in named(model)}
    found = {}
    for name, parameter in model.named_parameters():
        if name in firsts and parameter.grad is not None:
            found[name] = parameter.grad
    return found


def on_ranks(
    env: Any, folder: str, method: str, aims: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of the packed rows, each shared by all ranks; the mean over targets.

    Args:
        aims: targets in place of the next tokens.
    """
    tokens, span, targets = rows()
    if aims is not None:
        targets = aims
    model = blank(folder)
    engine = Single(build_mesh(env.size, 1), AdamW(1e-3), precision="float64", seed=5)
    source = open_weights(f"hf:{folder}")
    fit = compare(source, slots_of(model))
    parallelize(model, engine, method=method)
    engine.load_weights((name, source.read(where)) for name, where in fit.fitting.items())
    valid = (targets != IGNORE).sum()
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        here = shard_span(
            span.map(lambda x, r=row: x[r : r + 1]),
            [layout("zigzag", span.shape[1], env.size)],
            env.rank,
        )
        shard = here.sharding.shard
        mine = shard(tokens[row : row + 1], 0)
        part = (
            engine.model(MicroBatch(mine, here, shard(targets[row : row + 1], IGNORE))).sum()
            / valid
        )
        engine.backward(part, last=row == 1)
        loss += part.detach()
    dist.all_reduce(loss)
    return loss.item(), gradients(engine.model)


def thirty_steps(folder: Path, theirs: nn.Module) -> tuple[list[float], list[float]]:
    """Fine-tunes ours and theirs from the same folder; returns the losses of both.

    Ours by an engine and its optimiser on packed rows, theirs by torch's AdamW on single documents.
    """
    rate = 1e-3
    engine = Single(
        Mesh.alone(), AdamW(rate, weight_decay=0.0, max_grad_norm=0.0), precision="float64"
    )
    engine.wrap(ours(folder).train())
    by_hand = torch.optim.AdamW(
        theirs.parameters(), lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    tokens, span, targets = rows()
    valid = int((targets != IGNORE).sum())
    losses = []
    wanted = []
    for _ in range(30):
        loss = engine.model(MicroBatch(tokens, span, targets)).sum() / valid
        engine.backward(loss)
        engine.step(rate)
        losses.append(loss.item())
        total = torch.zeros((), dtype=torch.float64)
        for _, _, document in documents():
            if document.shape[1] > 1:
                logits = theirs(document, use_cache=False).logits[0, :-1]
                total = total + F.cross_entropy(logits, document[0, 1:], reduction="sum") / valid
        total.backward()
        by_hand.step()
        by_hand.zero_grad()
        wanted.append(total.item())
    return losses, wanted
