"""The standard library's own source code: real, long text on every machine."""

import os
import sysconfig

from trainer.data.sources.base import Local
from trainer.data.sources.files import file_at
from trainer.data.sources.readers import MOST, File, reason, whole

ELSEWHERE = {"site-packages", "dist-packages", "__pycache__"}  # other people's code, and none


class Stdlib(Local):
    """Every *.py file of the running Python's library, sorted by path; a file is a document.

    on_error: skip (the default) leaves out and counts the few files that are empty or not in UTF-8.
    """

    readers = {".py": whole}

    def __init__(
        self,
        *,
        tokenizer: str = "bytes",
        pad_vocabulary_to: int = 1,
        held_out: float = 0.02,
        on_error: str = "skip",
        cache: str | None = None,
        max_document_bytes: int = MOST,
    ):
        super().__init__(
            tokenizer=tokenizer,
            pad_vocabulary_to=pad_vocabulary_to,
            held_out=held_out,
            on_error=on_error,
            cache=cache,
            max_document_bytes=max_document_bytes,
        )

    def files(self) -> list[File]:
        root = sysconfig.get_path("stdlib")
        found = sorted(_walk(root, ""), key=lambda file: file.name)
        if not found:
            raise ValueError(
                f"data=stdlib: {root} holds no *.py files (a zipped or stripped Python); use"
                " data=files"
            )
        return found


def _walk(folder: str, prefix: str) -> list[File]:
    listed = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in ELSEWHERE:
                        listed += _walk(entry.path, f"{prefix}{entry.name}/")
                elif entry.name.endswith(".py"):
                    listed.append(file_at(entry.path, prefix + entry.name))
    except OSError as error:
        listed.append(File(folder, prefix, 0, 0, f"a folder: {reason(error)}"))
    return listed
