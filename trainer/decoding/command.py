"""The words of `python -m scripts.generate`, and what it does."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from models.cache.overflow import policy_of
from models.layer import hook
from trainer.decoding.context_limit import ContextLimit
from trainer.decoding.open_model import OpenModel, named_cache, open_model
from trainer.decoding.sampling import Sampling
from trainer.decoding.scheduler import Scheduler
from trainer.decoding.targets import check_settings, write_targets
from trainer.decoding.texts import complete
from trainer.errors import BAD_CONFIG, BAD_RUN, UserError

KINDS: dict[str, type] = {
    "prompt": str,
    "prompts": str,
    "output": str,
    "tokens": int,
    "samples": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "stop": list,
    "seed": int,
    "rows": int,
    "device": str,
    "trust": bool,
    "cache": str,
    "overflow": str,
    "context": int,
    "n_keep": int,
    "preempt": str,
    "beams": int,
    "length_penalty": float,
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass
class Wishes:
    """The settings of the command line.

    Attributes:
        source: a run, a checkpoint or an exported folder.
        settings: values of KINDS that were set.
        cache: settings of the cache.
    """

    source: Path
    settings: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any) -> Any:
        return self.settings.get(name, default)


def parse(words: Sequence[str]) -> Wishes:
    """Reads the command line.

    Raises:
        UserError: no source, an unknown key, or a value of another kind.
    """
    sources = [word for word in words if "=" not in word]
    if len(sources) != 1:
        raise UserError(
            "one folder is wanted: python -m scripts.generate RUN_OR_EXPORT prompt='Once upon'"
        )
    wishes = Wishes(Path(sources[0]))
    for word in words:
        key, sign, text = word.partition("=")
        if not sign:
            continue
        if key.startswith("cache."):
            wishes.cache[key.removeprefix("cache.")] = _plain(key, text)
        elif key in KINDS:
            wishes.settings[key] = _value(key, text)
        else:
            raise UserError(f"unknown {key}={text}; choose one of {', '.join(KINDS)}, cache.KEY")
    if "prompt" in wishes.settings and "prompts" in wishes.settings:
        raise UserError("prompt and prompts were both given; give a text or a file of texts")
    if wishes.get("tokens", 1) < 1:
        raise UserError(f"tokens={wishes.get('tokens', 1)}: new tokens of a text; use 1 or more")
    return wishes


def _plain(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text} is no value: {error}") from error


def _value(key: str, text: str) -> Any:
    """Returns a value of its kind; texts are taken as they are."""
    kind = KINDS[key]
    if kind is str:
        return text
    if kind is list:
        value = _plain(key, text) if text.startswith("[") else text
        return [str(item) for item in value] if isinstance(value, list) else [text]
    value = _plain(key, text)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key}={text} is not of the kind {kind.__name__}; give one")
    return value


def run(words: Sequence[str], shown: TextIO | None = None) -> int:
    """Generates; returns the exit status.

    Args:
        shown: where text goes; standard output by default.
    """
    screen = shown or sys.stdout
    wishes = parse(words)
    prompts = read_prompts(wishes)
    try:
        sampling = Sampling(
            **{key: wishes.settings[key] for key in SAMPLING if key in wishes.settings}
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    opened = open_model(wishes.source, wishes.get("trust", False))
    cache = named_cache(opened.config, wishes.get("cache", None), wishes.cache)
    try:
        opened.model.to(torch.device(wishes.get("device", "cpu")))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={wishes.get('device', 'cpu')}: {error}") from error
    reads_source = hook(opened.model, "reads_source")
    of_cache = {f"cache.{key}": value for key, value in wishes.cache.items()}
    check_settings({**wishes.settings, **of_cache}, reads_source)
    if reads_source:
        with ExitStack() as stack:
            lines = _output(wishes, stack)
            write_targets(opened, prompts, wishes.settings, lines, screen)
        return 0
    try:
        limit = _limit(wishes, opened)
        with ExitStack() as stack:
            lines = _output(wishes, stack)
            _generate(opened, wishes, prompts, sampling, cache, lines, screen, limit)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _limit(wishes: Wishes, opened: OpenModel) -> ContextLimit | None:
    """Returns what texts do at the end of their context; None where nothing was said of it."""
    if not {"overflow", "context", "n_keep"} & wishes.settings.keys():
        return None
    policy = policy_of(wishes.get("overflow", "stop"), wishes.get("n_keep", None))
    return ContextLimit(policy, wishes.get("context", opened.config.context_length))


def read_prompts(wishes: Wishes) -> list[str]:
    """Returns the prompts: the one of the command line, or the lines of a file.

    A line that is a JSON object gives its "prompt", any other line is a prompt by itself.

    Raises:
        UserError: no such file, a line that gives no prompt, or a file without lines.
    """
    if "prompts" not in wishes.settings:
        return [wishes.get("prompt", "")]
    path = Path(wishes.settings["prompts"])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path}: {error}; name a text file", BAD_RUN) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.startswith("{"):
            prompts.append(line)
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'prompts={path}: line {number} has no "prompt" ({error}); write one text a line,'
                ' or {"prompt": ...}'
            ) from error
    if not prompts:
        raise UserError(f"prompts={path} has no line; write one prompt a line")
    return prompts


def _output(wishes: Wishes, stack: ExitStack) -> TextIO | None:
    """Opens the file of the results; refuses to write over another."""
    if "output" not in wishes.settings:
        return None
    path = Path(wishes.settings["output"])
    try:
        return stack.enter_context(path.open("x", encoding="utf-8"))
    except FileExistsError as error:
        raise UserError(f"output={path} is there already; name another file") from error
    except OSError as error:
        raise UserError(
            f"output={path}: {error.strerror}; name another file", BAD_CONFIG
        ) from error


def _generate(
    opened: OpenModel,
    wishes: Wishes,
    prompts: list[str],
    sampling: Sampling,
    cache: Any,
    lines: TextIO | None,
    shown: TextIO,
    limit: ContextLimit | None,
) -> None:
    """Writes texts as they come: a single one to the screen, several one after the other."""
    samples = wishes.get("samples", 1)
    alone = len(prompts) * samples == 1 and lines is None
    ended: list[Scheduler] = []

    def stream(prompt: int, sample: int, text: str) -> None:
        shown.write(text)
        shown.flush()

    if alone:
        shown.write(prompts[0])
    began = time.monotonic()
    completions = complete(
        opened.model,
        opened.tokenizer,
        prompts,
        tokens=wishes.get("tokens", 200),
        samples=samples,
        sampling=sampling,
        stops=wishes.get("stop", []),
        seed=wishes.get("seed", 0),
        cache=cache,
        rows=wishes.get("rows", 8),
        limit=limit,
        preempt=wishes.get("preempt", "recompute"),
        on_text=stream if alone else None,
        on_end=ended.append,
    )
    count = 0
    for completion in completions:
        count += completion.tokens
        line = {"prompt_text": prompts[completion.prompt], **asdict(completion)}
        if lines is not None:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()
        elif not alone:
            title = f"--- prompt {completion.prompt}, sample {completion.sample}"
            shown.write(f"{title} ({completion.finished})\n")
            shown.write(f"{prompts[completion.prompt]}{completion.text}\n")
    seconds = time.monotonic() - began
    (scheduler,) = ended
    shown.write("\n" if alone else "")
    for report in _figures(count, seconds, scheduler):
        print(report, file=sys.stderr)


def _figures(count: int, seconds: float, scheduler: Scheduler) -> Iterator[str]:
    rate = count / max(seconds, 1e-9)
    yield f"{count} tokens in {seconds:.1f} s: {rate:.1f} tokens/s, prompts read included"
    yield f"cache: {scheduler.most_bytes} bytes at most"
    for name, number in sorted(scheduler.counters.items()):
        yield f"cache: {name} {number}"
