"""Local files of text, JSON lines or Parquet, named by a glob."""

import glob
import os

from trainer.data.readers import File, lines, suffix_of, whole
from trainer.data.sources import Local
from trainer.data.tables import table


class Files(Local):
    """The files that a glob matches, sorted by path.

    A .txt file is one document; a line of a .jsonl or a row of a .parquet is one, its text in `text_field`.

    Args:
        path: a glob, such as texts/*.jsonl or books/**/*.txt.
        text_field: the field or column that holds the text.
    """

    readers = {".txt": whole, ".jsonl": lines, ".parquet": table}

    def __init__(
        self,
        *,
        path: str | None = None,
        text_field: str = "text",
        tokenizer: str = "bytes",
        held_out: float = 0.01,
        on_error: str = "raise",
        cache: str | None = None,
    ):
        super().__init__(tokenizer=tokenizer, held_out=held_out, on_error=on_error, cache=cache)
        if not isinstance(path, str) or not path:
            raise ValueError("data=files needs data.path: a glob, such as data.path='texts/*.jsonl'")
        if not isinstance(text_field, str) or not text_field:
            raise ValueError(f"data.text_field={text_field!r} names no field; give the name of the text's column")
        self.path, self.text_field = path, text_field

    def files(self) -> list[File]:
        wish = os.path.expanduser(self.path)
        if os.path.isdir(wish):
            raise ValueError(f"data.path={self.path} is a folder; give a glob, such as '{wish.rstrip('/')}/*.jsonl'")
        found = sorted(path for path in _matches(wish) if os.path.isfile(path))
        if not found:
            raise ValueError(f"data.path={self.path} matches no file (seen from {os.getcwd()}); check the path or glob")
        odd = [path for path in found if suffix_of(path) not in self.readers]
        if odd and self.on_error == "raise":
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise ValueError(
                f"data.path={self.path} matches {odd[0]}{more}; data=files reads {', '.join(self.readers)}: narrow the glob"
            )
        root = _root(wish)
        return [_file(path, root) for path in found]


def _matches(wish: str) -> list[str]:
    """A file whose name has brackets in it is meant literally."""
    return [wish] if os.path.isfile(wish) else glob.glob(wish, recursive=True)


def _root(wish: str) -> str:
    """The folder above the glob's first wildcard: names are kept relative to it, so that the data may move."""
    if os.path.isfile(wish):
        return os.path.dirname(wish)
    parts = wish.split("/")
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:wild]) or ("/" if wish.startswith("/") else "")


def _file(path: str, root: str) -> File:
    facts = os.stat(path)
    name = os.path.relpath(path, root or ".")
    return File(os.path.abspath(path), name, facts.st_size, facts.st_mtime_ns)
