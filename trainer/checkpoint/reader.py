"""Reads checkpoints on any number of ranks, whatever wrote them: the newest whole one, or one by
name."""

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
from trainer.files.safe_files import LINKED

NAME = re.compile(r"step_(\d{8,})")


class LoadedCheckpoint(NamedTuple):
    """Result of `CheckpointReader.load`.

    Attributes:
        step: of the run when it was saved.
        state: the caller's state with its tensors filled in.
        extra: the dict that was saved with the tensors.
    """

    step: int
    state: dict[str, Any]
    extra: dict[str, Any]


class CheckpointReader:
    """Reads the checkpoints of a directory without ever changing it.

    Args:
        directory: `<run_dir>/checkpoints`; it need not exist.
        group: all ranks of the run. None means the same, or this process alone without
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
        if group is None:
            self.members = [0]
            self.rank = 0
        else:
            self.members = dist.get_process_group_ranks(group)
            self.rank = dist.get_rank(group)
        self.alone = group is None
        # torch warns that torch.distributed is off, which is the normal case for one process. The
        # saving thread warns too, so a context manager around our calls would not reach it.
        if self.alone:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # A gloo group of our own: plans are small Python objects on the CPU, and must not
        # interleave with the training's collectives.
        self.control = self._new_group()
        self.checked: Path | None = None

    def _new_group(self) -> dist.ProcessGroup | None:
        if self.alone:
            return None
        group = dist.new_group(self.members, backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    def _broadcast(self, value: Any) -> Any:
        """Returns rank 0's object on every rank."""
        box = [value]
        if not self.alone:
            dist.broadcast_object_list(box, src=self.members[0], group=self.control)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        """Returns the list of all ranks' objects on every rank."""
        values = [value] * len(self.members)
        if not self.alone:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def _first_of_all(self, error: str | None) -> str | None:
        """Returns the error of the lowest rank that has one, the same on every rank."""
        for message in self._gather(error):
            if message:
                return message
        return None

    def _on_first_rank(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 alone, and returns its result or raises its error on every rank.

        Raises:
            UserError: the directory could not be used.
        """
        result = None
        message = None
        if self.rank == 0:
            try:
                result = action()
            except OSError as error:
                message = (
                    f"cannot use the checkpoints in {self.directory}: {error}; mend that or choose"
                    " a run_dir"
                )
        # Raising on rank 0 alone would leave the others in the next collective for ever.
        result, message = self._broadcast((result, message))
        if message is not None:
            raise UserError(message, BAD_RUN)
        return result

    def _say_once(self, text: str) -> None:
        if self.rank == 0:
            self.say(text)

    def _list(self) -> list[Path]:
        """Lists every step_N of the directory, the newest first, as this process sees them."""
        if self.directory.is_symlink():
            raise OSError(errno.ELOOP, LINKED, str(self.directory))
        checkpoints: dict[int, Path] = {}
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                match = NAME.fullmatch(path.name)
                if match:
                    checkpoints[int(match[1])] = path
        # By number and not by name: from step 10**8 on names have nine digits.
        return [checkpoints[step] for step in sorted(checkpoints, reverse=True)]

    def _list_together(self) -> list[Path]:
        """Lists every step_N, the newest first, as rank 0 sees them."""
        return self._on_first_rank(self._list)

    def damage(self, checkpoint: Path) -> str | None:
        """Describes why a checkpoint is not whole, or returns None; the same on every rank."""
        damage = None
        try:
            files = read_manifest(checkpoint)["files"]
            # Hashing is the slow part, so each rank hashes its share of the files.
            own_files = sorted(files)[self.rank :: len(self.members)]
            for name in own_files:
                damage = broken(checkpoint, name, files[name]["sha256"])
                if damage:
                    break
        except (ValueError, OSError) as error:
            damage = str(error)
        return self._first_of_all(damage)

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint, or None where the directory holds none at all.

        Reports every damaged one that is passed over.

        Raises:
            UserError: there are checkpoints and none of them is whole.
        """
        checkpoints = self._list_together()
        for checkpoint in checkpoints:
            damage = self.damage(checkpoint)
            if damage is None:
                self.checked = checkpoint
                return checkpoint
            self._say_once(
                f"checkpoint {checkpoint.name} is damaged ({damage}); trying the one before"
            )
            self._set_aside(checkpoint)
        # To begin again here would in time delete what an expert may still repair.
        if checkpoints:
            raise UserError(
                f"no checkpoint in {self.directory} is whole; to begin again, choose another"
                " run_dir or move it away",
                BAD_RUN,
            )
        return None

    def _set_aside(self, checkpoint: Path) -> None:
        """Does nothing: a reader leaves every file as it is."""

    def load(self, place: Path | str, state: dict[str, Any]) -> LoadedCheckpoint:
        """Fills the tensors of `state` from a checkpoint, whatever ranks and shards wrote it.

        Args:
            place: a directory step_N.
            state: nested dicts whose leaves are tensors or DTensors of the shapes wanted; they are
                written in place. Its top-level keys select what is read: {"model": ...} alone
                leaves the optimizer on the disk.

        Returns:
            The state; its plain values come from the checkpoint, bit for bit.

        Raises:
            UserError: the checkpoint is damaged, or its tensors differ from those of `state`.
        """
        place = Path(place)
        manifest = self.admit(place, state)
        tensors, _ = unravel(state)
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

    def admit(self, place: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the manifest of a whole checkpoint that has the tensors of `state`.

        Args:
            place: a directory step_N.
            state: as for `load`; the tensors may be without values (on the meta device).

        Raises:
            UserError: see `load`.
        """
        if place != self.checked:
            damage = self.damage(place)
            if damage is not None:
                raise UserError(
                    f"cannot resume from {place}: {damage}; name another checkpoint, or"
                    " resume=auto",
                    BAD_RUN,
                )
        self.checked = place
        manifest = read_manifest(place)
        tensors, _ = unravel(state)
        # Compared before the load, because torch would name shapes and not what to do about them.
        misfit = self._first_of_all(_misfit(manifest, tensors, state))
        if misfit is not None:
            raise UserError(f"cannot resume from {place}: {misfit}")
        return manifest

    def extra(self, place: Path | str) -> dict[str, Any]:
        """Returns the dict that was saved with the tensors.

        Raises:
            UserError: the checkpoint has no whole manifest.
        """
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
        """Returns empty tensors with the names and shapes of a part of the checkpoint.

        Args:
            place: a directory step_N.
            part: a top-level key of the state that was saved.

        Returns:
            Nested dicts for `load` to fill; {} where the checkpoint lacks that part.

        Raises:
            UserError: the checkpoint has no manifest, or a damaged one.
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
            return {key: empty(subtree) for key, subtree in tree.items()}

        return empty(manifest["state"].get(part, {}))

    def close(self) -> None:
        """Destroys the process group; the object cannot be used afterwards."""
        if self.control is not None:
            dist.destroy_process_group(self.control)


def _misfit(
    manifest: dict[str, Any], tensors: dict[str, Tensor], state: dict[str, Any]
) -> str | None:
    """Describes how the checkpoint's tensors differ from the caller's, or returns None."""
    missing = [key for key in state if key not in manifest["state"]]
    if missing:
        return f"it holds {', '.join(manifest['state'])} and no {', '.join(missing)}"
    stored: dict[str, dict[str, Any]] = {}
    for path, entry in manifest["tensors"].items():
        # Only the parts that the caller asks for; the others may be of any shape.
        if path.split("/", 1)[0] in state:
            stored[path] = entry
    for path in sorted(tensors.keys() | stored.keys()):
        if path not in stored:
            return f"it has no {path}, which this model has; was it written by another model?"
        if path not in tensors:
            return f"it has {path}, which this model has not; was it written by another model?"
        size = list(tensors[path].shape)
        stored_size = stored[path]["size"]
        if size != stored_size:
            return (
                f"{path} is {stored_size} there and {size} here; was it written by another model?"
            )
        label = LABELS[tensors[path].dtype]
        stored_label = stored[path]["dtype"]
        if label != stored_label:
            return (
                f"{path} is {stored_label} there and {label} here; resume with the same precision"
            )
    return None
