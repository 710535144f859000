"""A Hugging Face folder as a model in Python, and the hidden states of texts in it.

model = open_folder("models/minilm")
states = hidden_states(model, [tokenizer.encode(text).ids for text in texts])
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.span import Span
from parallel.engines.materialize import materialize
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.errors import UserError
from trainer.init_from.fit import compare, slots_of
from trainer.init_from.sources import HUGGINGFACE, open_weights


def open_folder(folder: Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the model of a Hugging Face folder on the CPU, in evaluation mode, without a run.

    Args:
        folder: with config.json and safetensors.
        dtype: of its weights.

    Raises:
        UserError: it cannot be read, or no adapter knows it.
    """
    words = ["model=hub", f"model.path={folder}", "data=copy", "context_length=1"]
    asked = compose(words)
    if asked.config is None or asked.faults:
        raise UserError("\n".join(asked.faults))
    vocabulary = asked.config.model.vocabulary
    assert vocabulary is not None, "every adapter gives one"
    source = open_weights(f"{HUGGINGFACE}{folder}")
    with torch.device("meta"):
        model = build_model(asked.config, vocabulary).to(dtype)
    fit = compare(source, slots_of(model))
    if differences := fit.text():
        raise UserError(f"{folder}: the weights are not those of its config.json: {differences}")
    materialize(model, torch.device("cpu"), 0)
    slots = model.state_dict()
    with torch.no_grad():
        for name, where in fit.fitting.items():
            slots[name].copy_(source.read(where))
    return model.eval()


@torch.no_grad()
def hidden_states(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns what the last layer gives for every token of every text, each [tokens, width].

    The texts lie in one row, and none sees another. They are read as they come: what the tokenizer
    puts around a text ([CLS] and [SEP] for BERT) has to be in it.

    Args:
        model: a decoder or an encoder, from `open_folder`, `trainer.export.reopen` or a run.
        texts: token numbers.
    """
    lengths = [len(text) for text in texts]
    device = next(model.parameters()).device
    tokens = torch.tensor([number for text in texts for number in text], device=device)
    numbers = torch.arange(len(texts), device=device)
    doc = numbers.repeat_interleave(torch.tensor(lengths, device=device))
    pos = torch.cat([torch.arange(length, device=device) for length in lengths])
    states = model.hidden(tokens[None], Span.of(pos[None], doc[None]))  # pyright: ignore
    return list(states[0].split(lengths))
