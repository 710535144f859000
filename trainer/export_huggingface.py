"""Exports a checkpoint as a folder that transformers' AutoModelForCausalLM.from_pretrained opens.

    OUTPUT/config.json                of the architecture that the model is in transformers
    OUTPUT/generation_config.json
    OUTPUT/model.safetensors          or shards of at most max_shard_bytes, and their index
    OUTPUT/tokenizer.json, ...        where the run has a tokenizer of files

Which architecture a model is, is found out by writing a config.json and reading it again: only one
that gives the same model is used.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.hub.adapter import Adapter
from models.hub.describe import describe, differences
from models.hub.description import DECODER, ENCODER, Description
from models.hub.keys import MISSING
from models.hub.registry import KNOWN, adapter_of
from models.hub.tensors import TensorPiece
from models.lora import merged
from trainer.config.build_model import (
    feedforward_labels,
    feedforward_node,
    mixer_labels,
    mixer_node,
    model_node,
    offered_sizes,
)
from trainer.config.hub import described_config
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.export import read_model
from trainer.init_from.hub_cache import local_folder
from trainer.init_from.huggingface import CONFIG, INDEX, SINGLE, read_config

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
SHOWN = 6
# Keys that follow from the export and not from the folder that the model came from.
OUR_WORDS = ("architectures", "dtype", "torch_dtype", "max_position_embeddings")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def export_huggingface(
    source: Path,
    output: Path,
    trust: bool = False,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> int:
    """Writes a checkpoint's model in the form of transformers; returns its step.

    Adapters of low rank are merged into the weights that they stand beside.

    Args:
        source: a run directory (its newest whole checkpoint), or a checkpoint.
        output: a folder; it must hold no model yet.
        trust: see trainer.export.export.
        dtype: of the weights; None: that of training.
        max_shard_bytes: of one file; a tensor that is larger has a file of its own.

    Raises:
        UserError: transformers has no such architecture; the message names the nearest. Or the
            source cannot be read, or the folder holds a model.
    """
    taken = [name for name in (CONFIG, SINGLE, INDEX) if os.path.lexists(output / name)]
    if taken:
        raise UserError(f"{output} holds {' and '.join(taken)} already; name another folder")
    saved = read_model(source, trust)
    adapter, content = translated(saved.config, saved.vocabulary, _original(saved.config))
    pieces = list(adapter.pieces(content))
    blank = saved.model.state_dict()
    kept = dtype or blank[pieces[0].ours[0]].dtype
    sizes = {name: tensor.numel() * kept.itemsize for name, tensor in blank.items()}
    plan = _plan(pieces, sizes, max_shard_bytes)
    content["dtype"] = str(kept).removeprefix("torch.")
    output.mkdir(parents=True, exist_ok=True)
    _write_weights(merged(saved.model, saved.tensors), plan, output, kept)
    _write_json(output / CONFIG, content)
    _write_beside(saved.config, content, output)
    return saved.step


def their_settings(given: dict[str, str], usage: str) -> dict[str, Any]:
    """Returns the settings of `export_huggingface` from words of a command.

    Args:
        given: KEY=VALUE; all of them must be settings.
        usage: for messages.

    Raises:
        UserError: an unknown setting, or a value that is none of its own.
    """
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if key == "dtype":
            if value not in DTYPES:
                raise UserError(f"dtype={value}: choose one of {', '.join(DTYPES)}")
            settings[key] = DTYPES[value]
        elif key == "max_shard_bytes":
            if not value.replace("e", "", 1).isdigit() or float(value) < 1:
                raise UserError(f"{key}={value}: a number of bytes is needed, such as 5e9")
            settings[key] = int(float(value))
        else:
            raise UserError(f"{key}={value}: there is no such setting; {usage}")
    return settings


def translated(
    config: Config, vocabulary: int, original: Mapping[str, Any] | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """Returns the adapter of a run's model, and its config.json.

    Args:
        original: the config.json that the model came from, if there is one; its names of tokens
            and other keys without a part in the model are taken over.

    Raises:
        UserError: none gives just this model.
    """
    if config.model.target not in (DECODER, ENCODER) or config.memory.carries:
        kind = config.model.target.rpartition(".")[2]
        beside = f" with memory={config.memory.name}" if config.memory.carries else ""
        raise UserError(
            f"format=huggingface: transformers has no {kind}{beside}; the nearest that it has is a"
            " decoder without memory, for example model=full; or leave format out"
        )
    mine = description_of(config, vocabulary)
    nearest: tuple[list[str], str] | None = None
    for adapter in _candidates(original):
        try:
            content = adapter.write(mine)
            found = differences(mine, description_of(*described_config(config, adapter, content)))
        except (ValueError, KeyError, UserError) as error:
            found = [str(error)] * (SHOWN + 1)
            content = {}
        if not found and original is not None and adapter.model_type == original.get("model_type"):
            return adapter, _in_their_words(content, original, _comparison(config, adapter, mine))
        if not found:
            return adapter, content
        if nearest is None or len(found) < len(nearest[0]):
            nearest = (found, adapter.model_type)
    assert nearest is not None
    found, name = nearest
    shown = "; ".join(dict.fromkeys(found[:SHOWN]))
    raise UserError(
        f"format=huggingface: transformers has no such model; the nearest is {name}, from which it"
        f" differs in {shown}; leave format out, which writes any model"
    )


def _comparison(
    config: Config, adapter: Adapter, mine: Description
) -> Callable[[Mapping[str, Any]], bool]:
    """Returns what tells whether a config.json is that of the model `mine`."""

    def is_same(content: Mapping[str, Any]) -> bool:
        try:
            theirs = description_of(*described_config(config, adapter, content))
        except (ValueError, TypeError, KeyError, UserError):
            return False
        return not differences(mine, theirs)

    return is_same


def description_of(config: Config, vocabulary: int) -> Description:
    """Describes the model of a config."""
    sizes = offered_sizes(config, vocabulary)
    stack = model_node(config)
    if stack.get("norm_eps") is None:
        # The eps that models/norms.py gives it, which transformers has to be told.
        precision = torch.float64 if config.precision == "float64" else torch.float32
        layer_norm = stack.get("norm") == "layer"
        stack["norm_eps"] = 1e-5 if layer_norm else torch.finfo(precision).eps
    return describe(
        sizes,
        stack,
        [as_node(mixer_node(config, label)[1]) for label in mixer_labels(config)],
        [as_node(feedforward_node(config, label)[1]) for label in feedforward_labels(config)],
        as_node(config.position),
    )


def _original(config: Config) -> dict[str, Any] | None:
    """Returns the config.json that the model came from, if its folder is still there."""
    try:
        origin = _origin(config)
        return None if origin is None else read_config(origin)
    except UserError:
        return None


def _origin(config: Config) -> Path | None:
    """Returns the folder that the model came from, if it is still there."""
    if config.model.path is None:
        return None
    try:
        return local_folder(Path(config.model.path))
    except UserError:
        return None


def _candidates(original: Mapping[str, Any] | None) -> Iterator[Adapter]:
    """Yields the adapters, that of the original first."""
    if original is not None:
        yield adapter_of(original)
    yield from KNOWN


def _in_their_words(
    content: Mapping[str, Any],
    original: Mapping[str, Any],
    is_same: Callable[[Mapping[str, Any]], bool],
) -> dict[str, Any]:
    """Returns a config.json that says what it says as the original did, wherever that is the same.

    So keys of older files, keys with a default and keys without a part in the model come out as
    they came in.

    Args:
        is_same: tells whether a config.json is still that of the model.
    """
    result = dict(content)
    if "max_position_embeddings" in content:
        longest = original.get("max_position_embeddings", 0)
        result["max_position_embeddings"] = max(longest, content["max_position_embeddings"])
    for key, value in original.items():
        if key not in OUR_WORDS and result.get(key, MISSING) != value:
            trial = {**result, key: value}
            if is_same(trial):
                result = trial
    for key in content:
        if key not in OUR_WORDS and key not in original:
            trial = {other: value for other, value in result.items() if other != key}
            if is_same(trial):
                result = trial
    return result


def _write_weights(
    tensors: Mapping[str, Tensor], plan: list[list[TensorPiece]], output: Path, dtype: torch.dtype
) -> None:
    """Writes the tensors shard by shard, and the index of several shards.

    Args:
        tensors: by our names; of those of a shard all are in memory at once, and no others.
        plan: the pieces of every shard.
    """
    names = {}
    total = 0
    for number, shard in enumerate(plan, 1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        written: dict[str, Tensor] = {}
        for piece in shard:
            # Parts of one tensor are views of it wherever they can be: a copy would double it.
            parts = piece.write([tensors[ours] for ours in piece.ours])
            for theirs, part in zip(piece.theirs, parts, strict=True):
                written[theirs] = part.to(dtype).contiguous()
                names[theirs] = name
                total += written[theirs].nbytes
        save_file(written, output / name, metadata={"format": "pt"})
    if len(plan) > 1:
        _write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def _plan(
    pieces: list[TensorPiece], sizes: Mapping[str, int], most: int
) -> list[list[TensorPiece]]:
    """Divides the pieces into shards of at most `most` bytes.

    Args:
        sizes: bytes of our tensors, as they are written.
    """
    shards: list[list[TensorPiece]] = [[]]
    filled = 0
    for piece in pieces:
        size = sum(sizes[name] for name in piece.ours)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += size
    return shards


def _write_beside(config: Config, content: Mapping[str, Any], output: Path) -> None:
    """Writes the settings of generation, and copies the tokenizer where it consists of files."""
    origin = _origin(config)
    if origin is not None:
        # A model that writes no texts came without them.
        if (origin / GENERATION).is_file():
            shutil.copyfile(origin / GENERATION, output / GENERATION)
    elif config.model.target != ENCODER:
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        named = {key: content[key] for key in tokens if content.get(key) is not None}
        _write_json(output / GENERATION, {"_from_model_config": True, **named})
    tokenizer = config.data.settings().get("tokenizer")
    given = Path(tokenizer) if isinstance(tokenizer, str) else None
    if given is not None and given.is_file():
        shutil.copyfile(given, output / "tokenizer.json")
        return
    for folder in (given, origin):
        if folder is not None and (folder / "tokenizer.json").is_file():
            for name in TOKENIZER:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, output / name)
            return


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
