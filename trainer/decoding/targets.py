"""`python -m scripts.generate` of a model that reads a source: each prompt is one."""

import json
from typing import Any, TextIO

from parallel.mesh import Mesh
from trainer.data.batch_sharding import BatchSharder
from trainer.decoding.open_model import OpenModel
from trainer.decoding.two_streams import BeamSearch, translate
from trainer.errors import UserError

SETTINGS = {"prompt", "prompts", "output", "tokens", "beams", "length_penalty", "device", "trust"}
ONLY_HERE = ("beams", "length_penalty")


def check_settings(settings: dict[str, Any], reads_source: bool) -> None:
    """Raises UserError for settings that the kind of model has no use for."""
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
    """Writes the best target of each prompt: to a file as JSON, or to the screen."""
    tokenizer = opened.tokenizer
    end = tokenizer.end_of_text
    sources = [[*tokenizer.encode(prompt).tolist(), end] for prompt in prompts]
    mesh = Mesh.alone(settings.get("device", "cpu"))
    share = BatchSharder(mesh, rows=1, context_length=1, micro_batch=1, policy="contiguous")
    search = BeamSearch(
        start=end,
        end=end,
        most=settings.get("tokens", 200),
        beams=settings.get("beams", 1),
        length_penalty=settings.get("length_penalty", 0.0),
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
