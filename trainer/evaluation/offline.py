"""Evaluates finished models side by side: runs, checkpoints and exported folders, on any ranks."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch.multiprocessing.spawn import spawn

from models.causality import plain_sight
from parallel.context_parallel import apply_context_parallel, refusals
from parallel.mesh import Mesh, build_mesh
from trainer import run_dir
from trainer.config import build_model
from trainer.config.compose import compose
from trainer.config.finding import as_finding, render
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.errors import BAD_CONFIG, UserError
from trainer.evaluation.base import EvaluationContext, build_evaluations, figure_name
from trainer.export import CONFIG, WEIGHTS, export, reopen
from trainer.files.limited_reader import json_object
from trainer.init_from.hub_folder import is_hub_folder, longest_context, write_as_export
from trainer.objectives.stream import open_rows
from trainer.preflight.check_evaluation import check_evaluation_nodes, check_evaluations
from trainer.preflight.check_parts import check_time

# Beginnings of the settings that an evaluation of a finished model may change.
SETTINGS = ("evaluation", "parallel.", "data.", "context_length=", "batch_tokens=")
HUB_SETTINGS = ("data=", "data.", "context_length=", "batch_tokens=")
MEETING = "meeting"


class Subject(NamedTuple):
    """A model to evaluate.

    Attributes:
        name: as it was given.
        folder: of its exported weights.
        config: of its run, with the settings of this evaluation.
        step: of its run.
        trust: whether classes of other packages may be built.
    """

    name: str
    folder: Path
    config: Config
    step: int
    trust: bool


class Row(NamedTuple):
    """One figure of one model."""

    model: str
    step: int
    name: str
    value: float
    chance: float | None
    cells: Sequence[dict[str, Any]]


def evaluate_models(sources: Sequence[str], words: Sequence[str], trust: bool) -> list[Row]:
    """Evaluates some models with the same evaluations, and returns their figures in order.

    Args:
        sources: run directories, checkpoints of one, folders of exported models, or those of
            Hugging Face models, for which words may choose the data as well.
        words: KEY=VALUE settings; `evaluation=` chooses, `parallel.` says on how many ranks.
        trust: build classes of other packages too, which a folder names.

    Raises:
        UserError: a source or a setting that cannot be honoured; before any model is computed.
    """
    allowed = SETTINGS
    if all(is_hub_folder(Path(source)) for source in sources):
        allowed = (*SETTINGS, "data=")  # they have none of their own
    for word in words:
        if not word.lstrip("+~").startswith(allowed):
            raise UserError(
                f"{word}: a finished model keeps its own settings; those of evaluation, parallel,"
                " data, context_length and batch_tokens may be given"
            )
    with tempfile.TemporaryDirectory(prefix="longspan-") as scratch:
        subjects = []
        for number, source in enumerate(sources):
            subjects.append(_subject(source, words, Path(scratch) / str(number), trust))
        faults = []
        for subject in subjects:
            faults += [f"{subject.name}: {fault}" for fault in _faults(subject)]
        if faults:
            raise UserError("\n".join(faults))
        ranks = subjects[0].config.parallel.ranks
        if ranks == 1:
            return _evaluate_all(subjects, 0, 1)
        return _on_ranks(subjects, ranks, Path(scratch))


def _subject(source: str, words: Sequence[str], scratch: Path, trust: bool) -> Subject:
    """Reads what a source holds; the weights of a run are exported to `scratch`."""
    folder = Path(source)
    if not os.path.isdir(folder):
        raise UserError(f"{source}: there is no such directory; name a run, a checkpoint or export")
    if is_hub_folder(folder):
        own = [word for word in words if word.lstrip("+").startswith(HUB_SETTINGS)]
        if not any(word.startswith("context_length=") for word in own):
            own.append(f"context_length={min(2048, longest_context(folder))}")
        write_as_export(folder, scratch, own)
        words = [word for word in words if not word.startswith("data=")]
        folder = scratch
    elif not ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        # Raises where it is no run either.
        export(folder, scratch, trust)
        folder = scratch
    try:
        about = json_object(folder / CONFIG)
        tree, step = about["config"], int(about["step"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{source} holds no exported model ({error}); export it again") from error
    return Subject(source, folder, _config(tree, words), step, trust)


def _config(tree: dict[str, Any], words: Sequence[str]) -> Config:
    """Returns the config of a run with the settings of this evaluation.

    The groups are composed on their own; of the run's evaluation nothing is left.
    """
    composed = compose([word for word in words if word.lstrip("+~").startswith("evaluation")])
    if composed.faults or composed.config is None:
        raise UserError("\n".join(composed.faults))
    evaluation = run_dir.plain_config(composed.config)["evaluation"]
    # Offline everything is evaluated once, whatever the interval.
    evaluation |= {"every": 1, "attention_maps": 0, "sample_tokens": 0}
    one_rank = {"context": 1, "data": 1, "experts": 1, "ulysses": None, "ring": None}
    changed = tree | {
        "evaluation": evaluation,
        "parallel": tree["parallel"] | one_rank | {"method": "auto"},
    }
    own = [word for word in words if not word.lstrip("+~").startswith("evaluation")]
    try:
        merged = OmegaConf.merge(OmegaConf.create(changed), OmegaConf.from_dotlist(own))
        return Config.model_validate(OmegaConf.to_container(merged))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{key}={first['input']}: {first['msg']}") from error


def _faults(subject: Subject) -> Iterator[str]:
    """Yields why a model cannot be evaluated as it is asked."""
    config = subject.config
    faults = [render(as_finding(fault)) for fault in check_evaluation_nodes(config)]
    if not faults:
        vocabulary = _vocabulary(subject)
        with torch.device("meta"):
            model = build_model.build_model(config, vocabulary)
        offers = build_model.offered_sizes(config, vocabulary)
        position = instantiate(config.position, offers, "position")
        findings = check_evaluations(config, model, position, vocabulary)
        faults += [render(finding) for finding in findings]
        faults += [render(as_finding(fault)) for fault in check_time(config, model)]
        if config.parallel.context > 1:
            faults += [str(fault) for fault in refusals(model, config.parallel.method)]
    yield from dict.fromkeys(faults)


def _vocabulary(subject: Subject) -> int:
    return int(json_object(subject.folder / CONFIG)["vocabulary"])


def _on_ranks(subjects: list[Subject], ranks: int, scratch: Path) -> list[Row]:
    """Evaluates on several processes of this machine; rank 0 has the figures."""
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_rank, (subjects, ranks, str(scratch / MEETING), results), nprocs=ranks)
    outcome = results.get()
    if isinstance(outcome, str):
        raise UserError(outcome, BAD_CONFIG)
    return outcome


def _rank(rank: int, subjects: list[Subject], ranks: int, meeting: str, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    if cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    try:
        outcome: list[Row] | str = _evaluate_all(subjects, rank, ranks)
    except UserError as error:
        # Common to all ranks: it is about settings and data that every rank reads.
        outcome = str(error)
    if rank == 0:
        results.put(outcome)
    dist.destroy_process_group()


def _evaluate_all(subjects: Sequence[Subject], rank: int, ranks: int) -> list[Row]:
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    rows = []
    for subject in subjects:
        rows += _evaluate(subject, device)
    return rows


@torch.no_grad()
def _evaluate(subject: Subject, device: torch.device) -> list[Row]:
    """Builds one model on the ranks and runs every evaluation."""
    config = subject.config
    parallel = config.parallel
    mesh = Mesh.alone(device)
    if parallel.ranks > 1:
        mesh = build_mesh(
            parallel.context,
            parallel.data,
            ulysses=parallel.ulysses,
            ring=parallel.ring,
            device=device,
        )
    model = reopen(subject.folder, subject.trust).to(device).eval()
    prefix = plain_sight(model)
    if parallel.context > 1:
        apply_context_parallel(model, mesh.context.group, parallel.method, grid=mesh.grid)
    stream = open_rows(config, "held_out")
    share = BatchSharder(
        mesh,
        rows=config.rows,
        context_length=config.context_length,
        micro_batch=parallel.micro_batch,
        policy=parallel.layout,
        prefix=prefix,
        time=parallel.time,
    )
    context = EvaluationContext(
        config=config,
        model=model,
        share=share,
        stream=stream,
        lanes=lambda share: Lanes(mesh, share, config.rows) if config.memory.carries else None,
        step=subject.step,
        stopped=lambda *_: False,
    )
    rows = []
    for name, evaluation in build_evaluations(config).items():
        for figure in evaluation.run(context):
            full_name = figure_name(name, figure.name)
            values = (full_name, figure.value, figure.chance, figure.cells)
            rows.append(Row(subject.name, subject.step, *values))
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns a table of the figures, a column for each model; the first row is the head."""
    models = list(dict.fromkeys(row.model for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    head = ["figure", "chance", *models]
    lines = [head]
    for name in names:
        own = {row.model: row for row in rows if row.name == name}
        chance = next((row.chance for row in own.values() if row.chance is not None), None)
        cells = [name, "-" if chance is None else f"{chance:.4f}"]
        for model in models:
            cells.append(f"{own[model].value:.4f}" if model in own else "-")
        lines.append(cells)
    return lines
