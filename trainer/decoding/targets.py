"""`python -m scripts.generate` of a model that reads a source: each prompt is one."""

import json
from collections.abc import Mapping
from typing import Any, TextIO

from torch import nn

from models.causality import source_modules
from models.layer import hook
from parallel.mesh import Mesh
from trainer.data.batch_sharding import BatchSharder
from trainer.decoding.open_model import OpenModel
from trainer.decoding.two_streams import BeamSearch, translate
from trainer.errors import UserError

SETTINGS = {"prompt", "prompts", "output", "tokens", "beams", "length_penalty", "device", "trust"}
ONLY_HERE = ("beams", "length_penalty")
TOKENS = 200  # of a target at most, where nothing was said of it


def check_settings(settings: Mapping[str, Any], reads_source: bool) -> None:
    """Raises UserError for settings that the kind of model has no use for.

    Args:
        settings: of the command line, those of the cache among them.
        reads_source: what the model says of itself.
    """
    if not reads_source:
        for key in ONLY_HERE:
            if key in settings:
                raise UserError(
                    f"{key}={settings[key]} is of models that read a source, which this one does"
                    f" not; leave {key}= out"
                )
        return
    for key, value in settings.items():
        if key not in SETTINGS:
            raise UserError(
                f"{key}={value} means nothing for a model that reads a source: targets are looked"
                f" for by beam search; leave {key}= out, or use beams= and length_penalty="
            )
    if settings.get("beams", 1) < 1:
        raise UserError(f"beams={settings['beams']}: hypotheses of a source; use 1 or more")
    if settings.get("length_penalty", 0.0) < 0:
        raise UserError(f"length_penalty={settings['length_penalty']} is below 0; use 0 or more")


def write_targets(
    opened: OpenModel,
    prompts: list[str],
    settings: dict[str, Any],
    lines: TextIO | None,
    shown: TextIO,
) -> None:
    """Writes the best target of each prompt: to a file as JSON, or to the screen.

    Raises:
        UserError: a prompt that is no source of this model, or more beams or tokens than it has.
    """
    tokenizer = opened.tokenizer
    end = tokenizer.end_of_text
    sources = sources_of(opened, prompts)
    share = alone(settings.get("device", "cpu"))
    search = BeamSearch(
        start=end,
        end=end,
        most=_most(opened.model, settings),
        beams=settings.get("beams", 1),
        length_penalty=settings.get("length_penalty", 0.0),
    )
    if search.beams > tokenizer.vocabulary:
        raise UserError(
            f"beams={search.beams}: there are {tokenizer.vocabulary} tokens to begin with; use"
            f" {tokenizer.vocabulary} or fewer"
        )
    for number, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        (target,) = translate(opened.model, share, [source], search)
        text = tokenizer.decode(target.tokens)
        if lines is None:
            shown.write(f"{text}\n")
            continue
        line = {"prompt_text": prompt, "prompt": number, "text": text, "rating": target.rating}
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        lines.flush()


def alone(device: str) -> BatchSharder:
    """Returns what takes whole rows to a device."""
    mesh = Mesh.alone(device)
    return BatchSharder(mesh, rows=1, context_length=1, micro_batch=1, policy="contiguous")


def sources_of(opened: OpenModel, prompts: list[str]) -> list[list[int]]:
    """Returns the tokens of each prompt, and the end that a source has behind them.

    Raises:
        UserError: a prompt that the tokenizer does not know, or that is longer than the positions.
    """
    longest, _ = _limits(opened.model)
    sources = []
    for prompt in prompts:
        try:
            tokens = opened.tokenizer.encode(prompt).tolist()
        except ValueError as error:
            raise UserError(f"prompt={_short(prompt)}: {error}") from error
        tokens.append(opened.tokenizer.end_of_text)
        if longest is not None and len(tokens) > longest:
            raise UserError(
                f"prompt={_short(prompt)}: {len(tokens)} tokens with its end, but the model takes"
                f" {longest} in a source; give a shorter one"
            )
        sources.append(tokens)
    return sources


def _most(model: nn.Module, settings: Mapping[str, Any]) -> int:
    """Returns the tokens of a target at most."""
    _, longest = _limits(model)
    most = settings.get("tokens", TOKENS)
    if longest is None or most <= longest:
        return most
    if "tokens" in settings:
        raise UserError(
            f"tokens={most}: the model takes {longest} in a row; use tokens={longest} or fewer"
        )
    return longest


def _limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Returns the most tokens of (a source, a row) that the positions know; None: any number."""
    of_source = source_modules(model)
    limits: dict[bool, int | None] = {True: None, False: None}
    for module in model.modules():
        reads = module in of_source
        for part in (module, getattr(module, "position", None)):
            limit = hook(part, "max_length")
            present = limits[reads]
            if limit is not None:
                limits[reads] = limit if present is None else min(limit, present)
    return limits[True], limits[False]


def _short(prompt: str) -> str:
    """Returns the beginning of a prompt, for messages."""
    return prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
