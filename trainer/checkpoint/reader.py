"""Reading checkpoints back, on any number of ranks and whatever wrote them: the newest whole one,
or one by name."""

import errno
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from trainer.checkpoint.manifest import LABELS, broken, ravel, read_manifest, unravel
from trainer.checkpoint.storage import ShardReader
from trainer.checkpoint.wholeness import DTYPES
from trainer.errors import BAD_RUN, UserError
from trainer.safe_files import LINKED

NAME = re.compile(r"step_(\d{8,})")


class LoadedCheckpoint(NamedTuple):
    """What `load` gives back: the state with the caller's tensors filled in, and the dict that was
    saved beside it."""

    step: int
    state: dict[str, Any]
    extra: dict[str, Any]


class CheckpointReader:
    """Reads the checkpoints of a directory, without ever changing it.

    Args:
        directory: `<run_dir>/checkpoints`; it need not exist.
        group: the ranks of the run, all of them; None = the same, or this process alone without
            torch.distributed.
        say: takes a line for the user; called on the group's first rank only.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        group: dist.ProcessGroup | None = None,
        say: Callable[[str], None] = print,
    ):
        self.directory = Path(directory)
        self.say = say
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        # gloo of our own: plans are small Python objects on the CPU, and must not meet the
        # training's collectives.
        self.members = dist.get_process_group_ranks(group) if group is not None else [0]
        self.rank = dist.get_rank(group) if group is not None else 0
        self.alone = group is None
        # that there is one process is no news; the saving thread warns too, so no context would do
        if self.alone:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self.control = self._group()
        self.checked: Path | None = None

    def _group(self) -> dist.ProcessGroup | None:
        if self.alone:
            return None
        group = dist.new_group(self.members, backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    def _from_first(self, value: Any) -> Any:
        """[object of rank 0] -> the same object on every rank."""
        box = [value]
        if not self.alone:
            dist.broadcast_object_list(box, src=self.members[0], group=self.control)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        """An object of each rank -> the list of all on every rank."""
        box = [value] * len(self.members)
        if not self.alone:
            dist.all_gather_object(box, value, group=self.control)
        return box

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """Do something with the directory on rank 0 alone: its result, or a Fault, on every
        rank."""
        result = None
        mistake = None
        if self.rank == 0:
            try:
                result = action()
            except OSError as error:
                mistake = (
                    f"cannot use the checkpoints in {self.directory}: {error}; mend that or choose"
                    " a run_dir"
                )
        result, mistake = self._from_first((result, mistake))
        if mistake is not None:
            raise UserError(mistake, BAD_RUN)
        return result

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            self.say(text)

    def _list(self) -> list[Path]:
        found = {}
        if self.directory.is_symlink():
            raise OSError(errno.ELOOP, LINKED, str(self.directory))
        if self.directory.is_dir():
            found = {
                int(match[1]): path
                for path in self.directory.iterdir()
                if (match := NAME.fullmatch(path.name))
            }
        return [found[step] for step in sorted(found, reverse=True)]

    def _found(self) -> list[Path]:
        """Every step_N, the newest first, as rank 0 sees them."""
        return self._on_first(self._list)

    def _wrong(self, place: Path) -> str | None:
        """Why the checkpoint is not whole, or None. The files are shared out among the ranks for
        hashing."""
        try:
            files = read_manifest(place)["files"]
            mine = sorted(files)[self.rank :: len(self.members)]
            mistake = next(
                (text for name in mine if (text := broken(place, name, files[name]["sha256"]))),
                None,
            )
        except (ValueError, OSError) as error:
            mistake = str(error)
        return next((text for text in self._gather(mistake) if text), None)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None where there is none at all; says which ones it
        passed over.

        Raises:
            Fault: there are checkpoints and none of them is whole.
        """
        found = self._found()
        for place in found:
            mistake = self._wrong(place)
            if mistake is None:
                self.checked = place
                return place
            self._tell(f"checkpoint {place.name} is damaged ({mistake}); trying the one before")
            self._set_aside(place)
        if found:
            raise UserError(
                f"no checkpoint in {self.directory} is whole; to begin again, choose another"
                " run_dir or move it away",
                BAD_RUN,
            )
        return None

    def _set_aside(self, place: Path) -> None:
        """A reader leaves everything where it is."""

    def load(self, place: Path | str, state: dict[str, Any]) -> LoadedCheckpoint:
        """Fill the tensors of `state` from a checkpoint, whatever ranks and shards it was written
        from.

        Args:
            place: a directory step_N.
            state: nested dicts whose leaves are tensors or DTensors of the shapes wanted; they are
                written in place. Its top-level keys say what is read: {"model": ...} alone leaves
                the optimizer on the disk.

        Returns:
            Plain values of the state come from the checkpoint, bit for bit.

        Raises:
            Fault: the checkpoint is damaged, or its tensors are not those of `state`.
        """
        place = Path(place)
        if place != self.checked and (mistake := self._wrong(place)) is not None:
            raise UserError(
                f"cannot resume from {place}: {mistake}; name another checkpoint, or resume=auto",
                BAD_RUN,
            )
        self.checked = place
        manifest = read_manifest(place)
        tensors, _ = unravel(state)
        misfit = next(
            (text for text in self._gather(_misfit(manifest, tensors, state)) if text), None
        )
        if misfit is not None:
            raise UserError(f"cannot resume from {place}: {misfit}")
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with torch.no_grad():
            load(
                tensors,
                storage_reader=ShardReader(place, manifest),
                planner=planner,
                process_group=self.control,
                no_dist=self.alone,
            )
        trees = {key: manifest["state"][key] for key in state}
        return LoadedCheckpoint(manifest["step"], ravel(trees, tensors), manifest["extra"])

    def extra(self, place: Path | str) -> dict[str, Any]:
        """The dict that was saved beside the tensors. Raises Fault where the checkpoint has no
        whole manifest."""
        return self._manifest(place)["extra"]

    def _manifest(self, place: Path | str) -> dict[str, Any]:
        try:
            return read_manifest(Path(place))
        except (ValueError, OSError) as error:
            raise UserError(
                f"cannot resume from {place}: {error}; name another checkpoint, or resume=auto",
                BAD_RUN,
            ) from error

    def blank(self, place: Path | str, part: str) -> dict[str, Any]:
        """Empty tensors of the names and shapes that a part of the checkpoint has, for `load` to
        fill; {} where it has none.

        Raises:
            Fault: the checkpoint has no manifest, or a damaged one.
        """
        manifest = self._manifest(place)

        def empty(tree: Any) -> Any:
            if not isinstance(tree, dict) or "$tuple" in tree:
                raise UserError(
                    f"cannot resume from {place}: its {part} holds something else than tensors by"
                    " name",
                    BAD_RUN,
                )
            if "$tensor" in tree:
                entry = manifest["tensors"][tree["$tensor"]]
                return torch.empty(entry["size"], dtype=DTYPES[entry["dtype"]])
            return {key: empty(below) for key, below in tree.items()}

        return empty(manifest["state"].get(part, {}))

    def close(self) -> None:
        """Give the communication back; the object is of no further use."""
        if self.control is not None:
            dist.destroy_process_group(self.control)


def _misfit(
    manifest: dict[str, Any], tensors: dict[str, Tensor], state: dict[str, Any]
) -> str | None:
    """What tells the checkpoint's tensors from the caller's, or None."""
    if lacking := [key for key in state if key not in manifest["state"]]:
        return f"it holds {', '.join(manifest['state'])} and no {', '.join(lacking)}"
    stored = {
        path: entry for path, entry in manifest["tensors"].items() if path.split("/", 1)[0] in state
    }
    for path in sorted(tensors.keys() | stored.keys()):
        if path not in stored:
            return f"it has no {path}, which this model has; was it written by another model?"
        if path not in tensors:
            return f"it has {path}, which this model has not; was it written by another model?"
        here = tensors[path]
        there = stored[path]
        if list(here.shape) != there["size"]:
            return (
                f"{path} is {there['size']} there and {list(here.shape)} here; was it written by"
                " another model?"
            )
        if LABELS[here.dtype] != there["dtype"]:
            return (
                f"{path} is {there['dtype']} there and {LABELS[here.dtype]} here; resume with the"
                " same precision"
            )
    return None
