"""Local files of text, JSON lines, Parquet or Arrow, named by a glob or by a saved data set."""

import copy
import glob
import os
import stat

from trainer.data.sources.arrow import is_saved, read_arrow, saved_files
from trainer.data.sources.base import Local
from trainer.data.sources.parquet import read_table
from trainer.data.sources.readers import MOST, File, lines, reason, suffix_of, whole


class Files(Local):
    """The files that a glob matches, sorted by path, or a folder that `datasets` saved.

    A .txt file is one document; a line of a .jsonl (also .jsonl.gz and .jsonl.zst) or a row of a
    .parquet or .arrow is one, its text in `text_field`.

    Args:
        path: a glob, such as texts/*.jsonl or books/**/*.txt, or a folder of save_to_disk.
        held_out_path: the same for held-out documents; replaces `held_out`.
        text_field: the field or column that holds the text.
    """

    content_decides = (*Local.content_decides, "path", "held_out_path", "text_field")
    readers = {
        ".txt": whole,
        ".jsonl": lines,
        ".jsonl.gz": lines,
        ".jsonl.zst": lines,
        ".parquet": read_table,
        ".arrow": read_arrow,
    }
    kind = "files"  # as in data=KIND
    path_key = "data.path"

    def __init__(
        self,
        *,
        path: str | None = None,
        held_out_path: str | None = None,
        text_field: str = "text",
        tokenizer: str = "bytes",
        pad_vocabulary_to: int = 1,
        held_out: float = 0.01,
        on_error: str = "raise",
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
        if not isinstance(path, str) or not path:
            raise ValueError(
                f"data={self.kind} needs data.path: a glob, such as data.path='texts/*.jsonl'"
            )
        if held_out_path is not None and not (isinstance(held_out_path, str) and held_out_path):
            raise ValueError(
                f"data.held_out_path={held_out_path!r} names no files; give a glob, or null to hold"
                " out a fraction"
            )
        if not isinstance(text_field, str) or not text_field:
            raise ValueError(
                f"data.text_field={text_field!r} names no field; give the name of the text's column"
            )
        self.path = path
        self.held_out_path = held_out_path
        self.text_field = text_field

    def apart(self) -> "Files | None":
        """See Local.apart."""
        if self.held_out_path is None:
            return None
        held_out = copy.copy(self)
        held_out.path = self.held_out_path
        held_out.held_out_path = None
        held_out.path_key = "data.held_out_path"
        return held_out

    def files(self) -> list[File]:
        """See Local.files."""
        pattern = os.path.expanduser(self.path)
        if os.path.isdir(pattern):
            listed = self._saved(pattern)
        else:
            matches = _matches(pattern)
            root = _common(matches) or _root(pattern)
            listed = [file_at(path, os.path.relpath(path, root or ".")) for path in matches]
            listed += [_closed(path, why, root) for path, why in unlisted(pattern).items()]
        if all(file.folder for file in listed):
            raise ValueError(f"{self.path_key}={self.path} {_no_match(pattern, listed)}")
        if self.on_error == "raise":
            self._refuse(listed)
        apart = self.apart()
        if apart is not None:
            self._refuse_shared(listed, apart.files())
        return listed

    def _saved(self, folder: str) -> list[File]:
        """Returns the files of a folder that `datasets` saved; any other folder is refused."""
        if not is_saved(folder):
            raise ValueError(
                f"{self.path_key}={self.path} is a folder; give a glob, such as"
                f" '{folder.rstrip('/')}/*.jsonl'"
            )
        paths = saved_files(folder, self.path_key)
        return [file_at(path, os.path.basename(path)) for path in paths]

    def _refuse_shared(self, listed: list[File], held_out: list[File]) -> None:
        """Raises ValueError where a file is both trained on and held out."""
        places = {os.path.realpath(file.path) for file in held_out if not file.folder}
        shared = [file for file in listed if os.path.realpath(file.path) in places]
        if shared:
            raise ValueError(
                f"data.held_out_path={self.held_out_path} matches {shared[0].path}"
                f"{_and_more(shared)}, which data.path={self.path} matches too; narrow one of them"
            )

    def _refuse(self, listed: list[File]) -> None:
        """Raise ValueError where a file is of another kind, or cannot be read, and none may be left
        out."""
        unreadable = [file for file in listed if file.unreadable]
        if unreadable:
            raise ValueError(
                f"{self.path_key}={self.path} matches {unreadable[0].path}{_and_more(unreadable)},"
                f" which cannot be read ({unreadable[0].unreadable}); mend or remove it, or leave"
                " such data out with data.on_error=skip"
            )
        odd = [
            file for file in listed if not file.folder and suffix_of(file.path) not in self.readers
        ]
        if odd:
            raise ValueError(
                f"{self.path_key}={self.path} matches {odd[0].path}{_and_more(odd)};"
                f" data={self.kind} reads {', '.join(self.readers)}: narrow the glob"
            )


def _and_more(files: list[File]) -> str:
    return f" and {len(files) - 1} more" if len(files) > 1 else ""


def _no_match(pattern: str, folders: list[File]) -> str:
    """The rest of the sentence for a path or glob that has no file."""
    if folders:
        return (
            f"matches {len(folders)} folders and no file ({folders[0].path}); give a glob of the"
            " files within"
        )
    try:
        os.stat(pattern)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        if not glob.has_magic(pattern):
            return f"cannot be read ({reason(error)})"
    return f"matches no file (seen from {_here()}); check the path or glob"


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return "a folder that is gone"


def _matches(pattern: str) -> list[str]:
    """Returns the matching paths, sorted. A file name with brackets is also taken literally."""
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(set(glob.glob(pattern, recursive=True)))


def unlisted(pattern: str) -> dict[str, str]:
    """The folders that a glob would look into and may not, with the reason: the library takes them
    for empty."""
    closed: dict[str, str] = {}
    parts = pattern.split("/")
    for span in range(1, len(parts)):
        if not glob.has_magic(parts[span]):
            continue
        above = "/".join(parts[:span]) or "/"
        for folder in glob.glob(f"{above}/", recursive=True):
            try:
                os.scandir(folder).close()
            except OSError as error:
                closed[folder.rstrip("/") or "/"] = reason(error)
    return closed


def _closed(folder: str, why: str, root: str) -> File:
    return File(
        os.path.abspath(folder), os.path.relpath(folder, root or "."), 0, 0, f"a folder: {why}"
    )


def _common(matches: list[str]) -> str:
    """The folder that all matching files lie in; '' where there are none.

    Names are kept relative to it, so that the data may move, and whatever glob matches these files
    names them alike.
    """
    folders = [
        os.path.dirname(os.path.abspath(path)) for path in matches if not os.path.isdir(path)
    ]
    return os.path.commonpath(folders) if folders else ""


def _root(pattern: str) -> str:
    """The folder above the glob's first wildcard."""
    if os.path.isfile(pattern):
        return os.path.dirname(pattern)
    parts = pattern.split("/")
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:wild]) or ("/" if pattern.startswith("/") else "")


def file_at(path: str, name: str) -> File:
    """Describes the file at a path, readable or not."""
    place = os.path.abspath(path)
    try:
        facts = os.stat(path)
    except OSError as error:
        broken = (
            "a link to nothing"
            if os.path.islink(path) and not os.path.exists(path)
            else reason(error)
        )
        return File(place, name, 0, 0, broken)
    if stat.S_ISDIR(facts.st_mode):
        return File(place, name, 0, 0, folder=True)
    if not stat.S_ISREG(facts.st_mode):
        return File(place, name, 0, 0, "it is a pipe, a socket or a device")
    if not os.access(path, os.R_OK):
        return File(place, name, 0, 0, "Permission denied")
    return File(place, name, facts.st_size, facts.st_mtime_ns)
