"""Checks a config before any rank starts and reports every fault at once.

Each check is a function `check_*` that yields a `Finding` for every setting that cannot be
honoured. The cheap checks all run; the model is built only where none of them found a fault.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from parallel.mesh import shape_errors
from trainer import run_dir
from trainer.checkpoint.keep_rules import check_keep_rules
from trainer.config.finding import Finding, as_finding, render
from trainer.config.schema import Config
from trainer.config.size_limits import check_step_memory
from trainer.config.stages import Stage, plan_of
from trainer.errors import UserError
from trainer.init_from.fit import check_one_beginning
from trainer.logs.event_command import check_on_event
from trainer.logs.labels import check_labels
from trainer.logs.profile import check_profile
from trainer.objectives.contradictions import check_objective
from trainer.optim.lengthening import check_lengthening
from trainer.preflight.check_data import check_data
from trainer.preflight.check_engine import check_engine_settings
from trainer.preflight.check_lag import check_lag
from trainer.preflight.check_launch import check_machine, check_outer_launcher, check_paths
from trainer.preflight.check_loggers import check_loggers
from trainer.preflight.check_parts import check_built_model, check_nodes, context_too_long
from trainer.preflight.check_stages import check_handover, check_stages, in_stage


def check_config(
    config: Config,
    given: Collection[str] = (),
    mended: Collection[str] = (),
    known: Collection[str] = (),
    started: int | None = None,
    starter: str = "torchrun",
) -> list[str]:
    """Returns a message for every fault of a config; an empty list where it can be run.

    Args:
        config: the config to check.
        given: keys and groups that the user set by hand; only those are refused where no part of
            the model takes them.
        mended: keys whose value was at fault already and was put back to its default; findings
            that depend on them are hidden.
        known: messages of faults that were found while composing; they come first.
        started: number of ranks that another launcher has started; None when this command starts
            them.
        starter: name of that launcher.
    """
    # A path that the system cannot open would raise in every later check that looks at files.
    path_messages = [render(finding) for finding in check_paths(config)]
    if path_messages:
        return [*known, *path_messages]

    plan = plan_of(config)
    messages = [
        render(finding) for finding in _check_settings(config, plan, mended, started, starter)
    ]
    if not messages:
        # Building a model from settings that are known to be wrong would only repeat the fault.
        messages = [render(finding) for finding in _check_models(config, plan, given)]
    return list(dict.fromkeys([*known, *messages]))


def _check_models(
    config: Config, plan: Sequence[Stage], given: Collection[str]
) -> Iterator[Finding]:
    """Yields the findings about the model of each stage."""
    clean = True
    for stage in plan:
        for fault in check_built_model(stage.config, given):
            clean = False
            yield in_stage(as_finding(fault), config.stages, stage.number)
    if clean and len(plan) > 1:
        yield from check_handover(plan)


def require_valid(config: Config) -> None:
    """Raises one UserError that lists every fault of a config."""
    messages = check_config(config)
    if messages:
        raise UserError("\n".join(messages))


def _check_settings(
    config: Config,
    plan: Sequence[Stage],
    mended: Collection[str],
    started: int | None,
    starter: str,
) -> Iterator[Finding]:
    """Yields the findings of all checks that need no model, except those about mended keys."""
    together = list(check_stages(config, plan, started, starter))
    for stage in plan:
        if together and started is not None:
            break  # other ranks than were started are said once, for all stages
        for fault in _check_stage_settings(stage.config, started, starter):
            finding = as_finding(fault)
            if not finding.depends_on(mended):
                yield in_stage(finding, config.stages, stage.number)
    answers: list[Iterable[Finding | str]] = [
        together,
        run_dir.check_run_dir(config),
        check_one_beginning(config),
        check_lengthening(config),
        check_labels(config),
        check_loggers(config),
        check_keep_rules(config),
        check_on_event(config),
        check_profile(config),
    ]
    for answer in answers:
        for fault in answer:
            finding = as_finding(fault)
            if not finding.depends_on(mended):
                yield finding


def _check_stage_settings(
    config: Config, started: int | None, starter: str
) -> Iterator[Finding | str]:
    """Yields the findings about the effective settings of one stage."""
    if started is None:
        yield from check_machine(config)
    else:
        yield from check_outer_launcher(config, started, starter)
    yield from check_sizes(config)
    yield from check_step_memory(config)
    yield from check_scope(config)
    yield from check_parallel(config)
    yield from check_engine_settings(config)
    yield from check_lag(config)
    yield from check_nodes(config)
    yield from check_data(config)
    yield from check_objective(config)


def check_sizes(config: Config) -> Iterator[Finding]:
    """Checks that the sizes of rows, batches and heads divide one another."""
    model = config.model
    rows, remainder = divmod(config.batch_tokens, config.context_length)
    if remainder:
        nearest = max(1, rows) * config.context_length
        yield Finding(
            "batch_tokens",
            config.batch_tokens,
            f"must be a multiple of context_length={config.context_length}",
            f"use batch_tokens={nearest}, or another context_length",
            causes=("context_length",),
        )
    if model.width % model.heads:
        nearest = -(-model.width // model.heads) * model.heads
        yield Finding(
            "model.width",
            model.width,
            f"must divide among model.heads={model.heads}",
            f"use model.width={nearest}, or a divisor of the width as heads",
            causes=("model.heads",),
        )
    if model.kv_heads and model.heads % model.kv_heads:
        yield Finding(
            "model.kv_heads",
            model.kv_heads,
            f"must divide model.heads={model.heads}",
            f"use model.kv_heads={_nearest_divisor(model.heads, model.kv_heads)}",
            causes=("model.heads",),
        )
    if model.max_length and config.context_length > model.max_length:
        limit = f"model.max_length={model.max_length}"
        yield context_too_long(config, model.max_length, limit, causes=("model.max_length",))
    if not remainder:
        yield from _check_micro_batch(config, rows)


def _nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of a number that is nearest to another; of two the smaller."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))


def _check_micro_batch(config: Config, rows: int) -> Iterator[Finding]:
    micro_batch = config.parallel.micro_batch
    rows_per_rank = -(-rows // config.parallel.data)
    if isinstance(micro_batch, int) and micro_batch > rows_per_rank:
        yield Finding(
            "parallel.micro_batch",
            micro_batch,
            f"a step has {rows_per_rank} rows for each data rank (batch_tokens / context_length /"
            " parallel.data)",
            f"use parallel.micro_batch={rows_per_rank}",
            causes=("batch_tokens", "context_length", "parallel.data"),
        )


def check_scope(config: Config) -> Iterator[Finding]:
    """Refuses the kinds of parallelism that are out of scope, with the kinds that replace them."""
    parallel = config.parallel
    for kind, ranks in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if ranks != 1:
            yield Finding(
                f"parallel.{kind}",
                ranks,
                f"{kind} parallelism is out of Longspan's scope",
                f"use parallel.{kind}=1, share the sequence with parallel.context={ranks}, and the"
                " parameters with engine=fsdp",
            )


def check_parallel(config: Config) -> Iterator[Finding]:
    """Checks that the ranks form the groups that were asked for and that heads suffice for them."""
    parallel = config.parallel
    replicas = config.engine.replicate or 1
    for sentence in shape_errors(parallel.ranks, parallel.experts, replicas):
        yield as_finding(sentence)
    heads = config.model.heads
    context = parallel.context
    if parallel.method == "ulysses" and context > heads:
        yield Finding(
            "parallel.method",
            parallel.method,
            f"over {context} ranks it needs {context} query heads, but model.heads={heads}",
            f"use parallel.method=ring, or parallel.context={heads}",
            causes=("parallel.context", "model.heads"),
        )
    if parallel.method == "usp" and (parallel.ulysses or 1) > heads:
        yield Finding(
            "parallel.ulysses",
            parallel.ulysses,
            f"query heads are divided among {parallel.ulysses} ranks, but model.heads={heads}",
            f"use parallel.ulysses={heads} or fewer, and more in parallel.ring",
            causes=("parallel.method", "model.heads"),
        )
    yield from _check_grid(config)


def _check_grid(config: Config) -> Iterator[Finding]:
    """Checks parallel.ulysses and parallel.ring, the two sides of the grid of method=usp."""
    parallel = config.parallel
    ulysses = parallel.ulysses
    ring = parallel.ring
    if parallel.method != "usp":
        for key, size in (("parallel.ulysses", ulysses), ("parallel.ring", ring)):
            if size is not None:
                yield Finding(
                    key,
                    size,
                    "means something under parallel.method=usp only, but"
                    f" parallel.method={parallel.method}",
                    f"use {key}=null",
                    causes=("parallel.method",),
                )
    elif ulysses is None or ring is None:
        yield Finding(
            "parallel.method",
            "usp",
            "needs parallel.ulysses and parallel.ring",
            f"set both; their product must be parallel.context={parallel.context}",
            causes=("parallel.ulysses", "parallel.ring"),
        )
    elif ulysses * ring != parallel.context:
        yield Finding(
            "parallel.ulysses",
            ulysses,
            f"times parallel.ring={ring} it is {ulysses * ring}, but"
            f" parallel.context={parallel.context}",
            f"use parallel.context={ulysses * ring}",
            causes=("parallel.ring", "parallel.context"),
        )
