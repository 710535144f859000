"""Opens a model that lies on the disk, whatever wrote it."""

from pathlib import Path

from trainer.config.compose import compose
from trainer.data.tokenizers import Tokenizer
from trainer.data.tokenizers import load as load_tokenizer
from trainer.decoding.open_model import named_cache, open_model
from trainer.errors import UserError
from trainer.export import CONFIG, WEIGHTS
from trainer.files.limited_reader import Unreadable, json_object
from trainer.init_from.hub_folder import longest_context
from trainer.init_from.sources import HUGGINGFACE
from trainer.library.build import initial_model
from trainer.library.loaded_model import LoadedModel
from trainer.run_dir import holds_run

TOKENIZER = "tokenizer.json"


def load(source: str | Path, *, trust: bool = False) -> LoadedModel:
    """Opens a model on the CPU.

    Args:
        source: a run directory (its newest whole checkpoint), RUN/checkpoints/step_N, a folder of
            scripts.export, or the folder of a Hugging Face model, with hf: in front or without.
        trust: build classes that are not Longspan's too, which a run or an export names. That runs
            the code of whoever wrote them.

    Raises:
        UserError: there is nothing of a known kind, it is damaged, or it names a class that is not
            Longspan's, without trust.
    """
    text = str(source)
    folder = Path(text.removeprefix(HUGGINGFACE)).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{text}: there is no such folder; name a run directory, RUN/checkpoints/step_N, a"
            " folder of scripts.export, or the folder of a Hugging Face model"
        )
    if text.startswith(HUGGINGFACE) or _is_huggingface(folder):
        return _huggingface(folder)
    if not any((_holds_export(folder), holds_run(folder), holds_run(folder.parent.parent))):
        raise UserError(
            f"{text}: it holds no run, no checkpoint, no export and no Hugging Face model; name"
            " another folder"
        )
    opened = open_model(folder, trust)
    return LoadedModel(
        opened.model, opened.tokenizer, opened.config, named_cache(opened.config, None, {})
    )


def _holds_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _is_huggingface(folder: Path) -> bool:
    """Tells a Hugging Face folder from an export of ours: both have a config.json."""
    try:
        content = json_object(folder / CONFIG)
    except (Unreadable, OSError, ValueError):
        return False
    return "config" not in content and ("model_type" in content or "architectures" in content)


def _huggingface(folder: Path) -> LoadedModel:
    """Builds the architecture of a Hugging Face folder and reads its weights."""
    # Learned positions are refused in rows that are longer than their table.
    length = min(2048, longest_context(folder))
    words = ["model=hub", f"model.path={folder}", f"init_from={HUGGINGFACE}{folder}"]
    words += [f"context_length={length}", f"batch_tokens={length}"]
    composed = compose(words)
    if composed.config is None or composed.faults:
        raise UserError("\n".join(composed.faults))
    config = composed.config
    cache = named_cache(config, None, {})
    return LoadedModel(initial_model(config), _tokenizer(folder), config, cache)


def _tokenizer(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer beside a model; None where there is no file of one."""
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        return load_tokenizer(str(folder))
    except ValueError as error:
        raise UserError(str(error)) from error
