"""Reads a .wandb file back: the records of an offline run, in the log format of LevelDB (blocks of
32 KiB)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = (
    32768,
    struct.Struct("<IHB"),
)  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last


class Run(NamedTuple):
    """What an offline file says of a run."""

    identity: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    axes: dict[str, str]
    labels: dict[str, Any]
    artifacts: dict[str, list[str]]
    alerts: dict[str, str]


def _records(raw: bytes) -> Iterator[bytes]:
    """Yields the records that are whole: W&B's process may still be writing the last."""
    assert raw[:4] == b":W&B"
    span, whole = 7, b""
    while span + HEADER.size <= len(raw):
        room = BLOCK - span % BLOCK
        if room < HEADER.size:
            span += room
            continue
        _, length, kind = HEADER.unpack_from(raw, span)
        if kind == 0:
            span += room
            continue
        span += HEADER.size
        if span + length > len(raw):
            return
        whole += raw[span : span + length]
        span += length
        if kind in (1, 4):
            yield whole
            whole = b""


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def read(path: Path) -> Run:
    """Everything that was written to one .wandb file."""
    run = Run("", {}, [], {}, {}, {}, {}, {})
    for raw in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = run._replace(identity=record.run.run_id)
            told = record.run
            run.labels.update(group=told.run_group, tags=list(told.tags), name=told.display_name)
            run.labels.update(entity=told.entity, project=told.project, notes=told.notes)
            run.config.update(_values(record.run.config.update))
        elif kind == "config":
            run.config.update(_values(record.config.update))
        elif kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "summary":
            run.summary.update(_values(record.summary.update))
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = [
                entry.path for entry in record.artifact.manifest.contents
            ]
        elif kind == "alert":
            run.alerts[record.alert.title] = record.alert.text
        elif kind == "metric":
            run.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    return run
