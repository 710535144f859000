"""A data source of one's own:

python -m trainer data._target_=examples.own.data.Notes data.folder=docs
"""

from pathlib import Path

from trainer.data.sources.base import Local
from trainer.data.sources.files import file_at
from trainer.data.sources.readers import File, whole


class Notes(Local):
    """Every *.md file of a folder and those below it; a file is a document.

    Args:
        folder: that is searched.
        tokenizer, held_out, on_error, cache: as in Local.
    """

    readers = {".md": whole}
    # It says where the data lies, and may be spelt otherwise when a run goes on.
    content_decides = (*Local.content_decides, "folder")

    def __init__(
        self,
        *,
        folder: str,
        tokenizer: str = "bytes",
        held_out: float = 0.1,
        on_error: str = "raise",
        cache: str | None = None,
    ):
        super().__init__(tokenizer=tokenizer, held_out=held_out, on_error=on_error, cache=cache)
        self.folder = folder

    def files(self) -> list[File]:
        """Returns the files in an order that does not depend on where the folder lies."""
        root = Path(self.folder)
        paths = sorted(root.rglob("*.md"))
        if not paths:
            raise ValueError(f"data.folder={root}: it holds no *.md files; name another folder")
        return [file_at(str(path), path.relative_to(root).as_posix()) for path in paths]
