"""Settings as a library takes them: one text, as on a command line, or a list of them."""

import shlex
from collections.abc import Sequence

from trainer.errors import UserError


def settings_of(words: str | Sequence[str]) -> list[str]:
    """Returns KEY=VALUE settings one by one.

    Args:
        words: "model=rwkv7 model.width=128" with a shell's quotes, or a list of settings.

    Raises:
        UserError: quotes that do not close.
    """
    if not isinstance(words, str):
        return [str(word) for word in words]
    try:
        return shlex.split(words)
    except ValueError as error:
        raise UserError(f"{words}: {error}; give a list of settings instead") from error
