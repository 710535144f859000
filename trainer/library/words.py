"""Settings as a library takes them: one text, as on a command line, or a list of them."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trainer.config.own.folders import searching
from trainer.errors import UserError


@contextmanager
def settings_of(words: str | Sequence[str]) -> Iterator[list[str]]:
    """Yields KEY=VALUE settings one by one; folders that --config-dir names are searched meanwhile.

    Args:
        words: "model=rwkv7 model.width=128" with a shell's quotes, or a list of settings.

    Raises:
        UserError: quotes that do not close, or a folder that is not there.
    """
    if isinstance(words, str):
        try:
            words = shlex.split(words)
        except ValueError as error:
            raise UserError(f"{words}: {error}; give a list of settings instead") from error
    with searching([str(word) for word in words]) as settings:
        yield settings
