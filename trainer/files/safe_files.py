"""Opens files of a run directory without following symbolic links inside it.

The directory itself may be reached through links, for its path is the user's own; what lies below
it is opened component by component from a handle of the directory. New content is written beside,
under a name that nobody can foresee, and renamed.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LINKED = "it is a symbolic link, which is not followed; remove it"
FREE = ("wandb", ".launch")  # W&B links to its newest run; what a launch needs is made anew by it


@contextmanager
def _folder(root: Path, names: list[str], make: bool) -> Iterator[int]:
    """Returns a handle of the folder root/names..., none of which may be a link."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    here = root
    try:
        for name in names:
            here = here / name
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=handle)
            below = _open(name, os.O_RDONLY | os.O_DIRECTORY, 0, handle, here)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _open(name: str, flags: int, mode: int, folder: int, path: Path) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
    except OSError as error:
        if _is_link(name, folder):
            raise OSError(errno.ELOOP, LINKED, str(path)) from error
        error.filename = str(path)
        raise


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:  # the error that opening it gave says why
        return False


def open_inside(root: Path, name: str, flags: int, mode: int = 0o644) -> int:
    """Returns a handle of the ordinary file root/name; `name` may lie in folders below.

    Raises:
        OSError: it is a link or lies behind one, it is no ordinary file, or whatever the system has
            against it.
    """
    *names, last = Path(name).parts
    with _folder(root, names, make=bool(flags & os.O_CREAT)) as folder:
        handle = _open(last, flags | os.O_NONBLOCK, mode, folder, root / name)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no ordinary file; remove it", str(root / name))
    return handle


def make_inside(root: Path, name: str) -> Path:
    """Makes the folder root/name with its parents. Raises OSError where one is a link."""
    with _folder(root, list(Path(name).parts), make=True):
        return root / name


def replace_inside(root: Path, name: str, content: str | bytes, mode: int = 0o644) -> Path:
    """Writes the file root/name by one rename, so that a kill leaves the old or the new."""
    *names, last = Path(name).parts
    beside = f".{last}.{secrets.token_hex(8)}"
    raw = content.encode("utf-8") if isinstance(content, str) else content
    with _folder(root, names, make=True) as folder:
        try:
            with open(
                _open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, folder, root / name), "wb"
            ) as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.rename(beside, last, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside, dir_fd=folder)
            raise
    return root / name


def read_inside(root: Path, name: str) -> bytes:
    """Returns the bytes of the ordinary file root/name; raises OSError as `open_inside` does."""
    with open(open_inside(root, name, os.O_RDONLY), "rb") as file:
        return file.read()


def links_inside(root: Path) -> list[Path]:
    """Returns every symbolic link below a directory, except those of W&B and of a launch."""
    links: list[Path] = []
    waiting = [root]
    while waiting:
        place = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_symlink():
                    links.append(Path(entry.path))
                elif entry.is_dir() and not (place == root and entry.name.startswith(FREE)):
                    waiting.append(Path(entry.path))
    return sorted(links)
