"""Opens the folder of a Hugging Face model where a run or an export is expected."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer import run_dir
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import BAD_RUN, UserError
from trainer.files.limited_reader import Unreadable, json_object
from trainer.init_from.fit import compare, slots_of
from trainer.init_from.huggingface import HuggingFaceWeights, read_config
from trainer.init_from.weights import CONFIG, WEIGHTS
from trainer.objectives.stream import vocabulary_of

TOKENIZER = "tokenizer.json"
LONGEST = ("max_position_embeddings", "n_positions")  # keys of config.json


def is_hub_folder(folder: Path) -> bool:
    """Tells whether a folder holds a Hugging Face model; an export of ours has a config as well."""
    try:
        content = json_object(folder / CONFIG)
    except (Unreadable, OSError, ValueError):
        return False
    return "model_type" in content and "config" not in content


def longest_context(folder: Path) -> int:
    """Returns the tokens of a document that a model was made for; 2,048 where it does not say."""
    content = read_config(folder)
    for key in LONGEST:
        if type(content.get(key)) is int and content[key] > 0:
            return content[key]
    return 2048


def write_as_export(folder: Path, output: Path, words: Sequence[str] = ()) -> None:
    """Writes a Hugging Face model as scripts.export would, for whatever reads exports.

    Args:
        folder: see trainer.init_from.huggingface.
        output: a folder, made where there is none.
        words: KEY=VALUE settings of the data and of the context. Without any of data, the
            tokenizer of the folder is taken; without context_length, that of config.json.

    Raises:
        UserError: no adapter reads the folder, a file of it is damaged, or a setting is wrong.
    """
    config = _config(folder, words)
    vocabulary = config.model.vocabulary
    assert vocabulary is not None
    needed = vocabulary_of(config)
    if needed > vocabulary:
        raise UserError(
            f"{folder}: the tokenizer has {needed} tokens, the model {vocabulary}; name the"
            " tokenizer of the model as data.tokenizer"
        )
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    source = HuggingFaceWeights(folder)
    slots = slots_of(model)
    fit = compare(source, slots)
    if fit.text():
        raise UserError(f"{folder}: {fit.text()}; get the folder again", BAD_RUN)
    tensors: dict[str, Tensor] = {}
    for name, where in fit.fitting.items():
        tensors[name] = source.read(where).clone(memory_format=torch.contiguous_format)
    for alias, first in slots.aliases.items():
        tensors[alias] = tensors[first].clone()
    about = {"step": 0, "vocabulary": vocabulary, "config": run_dir.plain_config(config)}
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _config(folder: Path, words: Sequence[str]) -> Config:
    given = list(words)
    values = {key: value for key, _, value in (word.partition("=") for word in given)}
    names_data = any(key.partition(".")[0] == "data" for key in values)
    if not names_data and (folder / TOKENIZER).is_file():
        # The path is a placeholder: nothing is read from it before one is given.
        given += ["data=files", f"data.path={folder}/*.txt", f"data.tokenizer={folder}"]
    length = values.get("context_length")
    if length is None:
        length = str(longest_context(folder))
        given.append(f"context_length={length}")
    if "batch_tokens" not in values:
        given.append(f"batch_tokens={length}")
    composed = compose(["model=hub", f"model.path={folder}", *given])
    if composed.faults or composed.config is None:
        raise UserError("\n".join(composed.faults))
    return composed.config
