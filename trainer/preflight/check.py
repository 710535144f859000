"""Whether a config can be honoured, before any rank starts: every fault at once, each with the fact
and a way out.

Cheap questions come first, but all are asked. What is not built yet is refused by name here, in one
table a setting.
"""

from collections.abc import Collection, Iterator

from parallel.context_parallel import METHODS
from parallel.layout import POLICIES
from parallel.mesh import shape_errors
from trainer import run_dir
from trainer.config import size_limits
from trainer.config.schema import Config, MemoryConfig
from trainer.errors import UserError
from trainer.logs.labels import judge as judge_labels
from trainer.objectives.contradictions import misused
from trainer.optim.lengthening import unfit
from trainer.preflight.check_data import check_data
from trainer.preflight.check_engine import check_engine_settings
from trainer.preflight.check_launch import check_machine, check_outer_launcher, check_writable
from trainer.preflight.check_parts import check_built_model, check_nodes, too_long

NO_MEMORY = MemoryConfig.model_fields["target"].default
MATCHES = ("none", "parameters", "flops")
LAUNCHES = ("local", "multinode", "slurm")


def check_config(
    config: Config,
    given: Collection[str] = (),
    mended: Collection[str] = (),
    known: Collection[str] = (),
    started: int | None = None,
    starter: str = "torchrun",
) -> list[str]:
    """Every fault of a config, as messages.

    Args:
        config: what to judge.
        given: keys and groups that the user set by hand; only those can be wishes that nobody
            takes.
        mended: keys whose value was a fault already and was put back; nothing more is said of them.
        known: messages found before; they come first.
        started: ranks that somebody else has started already; None when this machine starts them.
            starter: who that was.
    """
    faults = [*known, *check_writable(config)]
    if len(faults) > len(known):
        return faults
    carried = (
        check_machine(config) if started is None else check_outer_launcher(config, started, starter)
    )
    asked = (
        check_sizes,
        size_limits.tokens,
        check_scope,
        check_parallel,
        check_engine_settings,
        run_dir.check_run_dir,
        unfit,
        judge_labels,
        check_nodes,
        check_data,
        misused,
    )
    answers = (each(config) for each in asked)
    for answer in (carried, *answers):
        faults += [each for each in answer if not any(key in each for key in mended)]
    if len(faults) == len(known):
        faults += check_built_model(config, given)
    return list(dict.fromkeys(faults))


def require_valid(config: Config) -> None:
    """Raise one Fault with everything that `check` finds."""
    if faults := check_config(config):
        raise UserError("\n".join(faults))


def check_sizes(config: Config) -> Iterator[str]:
    """Sizes that have to fit one another."""
    model = config.model
    rows = config.batch_tokens / config.context_length
    if rows != int(rows):
        low = max(1, int(rows)) * config.context_length
        yield (
            f"batch_tokens={config.batch_tokens} is no multiple of"
            f" context_length={config.context_length}; use batch_tokens={low}, or another"
            " context_length"
        )
    if model.width % model.heads:
        near = -(-model.width // model.heads) * model.heads
        yield (
            f"model.width={model.width} does not divide among model.heads={model.heads}; "
            f"use model.width={near}, or a divisor of the width as heads"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        fit = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        yield (
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; "
            f"use model.kv_heads={min(fit, key=lambda n: abs(n - (model.kv_heads or 1)))}"
        )
    if model.max_length and config.context_length > model.max_length:
        yield too_long(config, model.max_length, f"model.max_length={model.max_length}")
    if rows == int(rows) and isinstance(config.parallel.micro_batch, int):
        each = -(-int(rows) // config.parallel.data)
        if config.parallel.micro_batch > each:
            yield (
                f"parallel.micro_batch={config.parallel.micro_batch}, but a step has {each} rows"
                " for each data rank (batch_tokens / context_length / parallel.data); use"
                f" parallel.micro_batch={each}"
            )


def check_scope(config: Config) -> Iterator[str]:
    """What has a name already but is not built yet."""
    parallel = config.parallel
    tables: list[tuple[str, str, Collection[str], str]] = [
        ("parallel.method", parallel.method, ("auto", *METHODS), "ring"),
        ("parallel.layout", parallel.layout, tuple(POLICIES), "zigzag"),
        ("match", config.match, MATCHES, "none"),
        ("launch", config.launch.name, LAUNCHES, "local"),
    ]
    for key, wish, there, instead in tables:
        if wish not in there:
            yield (
                f"{key}={wish} is not built yet; use {key}={instead} (there is: {', '.join(there)})"
            )
    for key, wish in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if wish != 1:
            yield (
                f"parallel.{key}={wish}: {key} parallelism is out of Longspan's scope; use"
                f" parallel.{key}=1, share the sequence with parallel.context={wish}, and the"
                " parameters with engine=fsdp"
            )


def check_parallel(config: Config) -> Iterator[str]:
    """Whether a sequence can be shared as asked, and whether the ranks make the groups that experts
    and replicas need."""
    parallel = config.parallel
    yield from shape_errors(parallel.ranks, parallel.experts, config.engine.replicate or 1)
    heads = config.model.heads
    context = parallel.context
    if parallel.method == "ulysses" and context > heads:
        yield (
            f"parallel.method=ulysses over {context} ranks needs {context} query heads, but"
            f" model.heads={heads}; use parallel.method=ring, or parallel.context={heads}"
        )
    if parallel.method == "usp" and (parallel.ulysses or 1) > heads:
        yield (
            f"parallel.ulysses={parallel.ulysses} divides query heads among {parallel.ulysses}"
            f" ranks, but model.heads={heads}; use parallel.ulysses={heads} or fewer, and more in"
            " parallel.ring"
        )
    grid = {
        key: size
        for key, size in (("ulysses", parallel.ulysses), ("ring", parallel.ring))
        if size is not None
    }
    if parallel.method != "usp":
        for key, size in grid.items():
            yield (
                f"parallel.{key}={size} means something under parallel.method=usp only, "
                f"but parallel.method={parallel.method}; use parallel.{key}=null"
            )
    elif len(grid) < 2:
        yield (
            "parallel.method=usp needs parallel.ulysses and parallel.ring; their product must be"
            f" parallel.context={context}"
        )
    elif parallel.ulysses and parallel.ring and parallel.ulysses * parallel.ring != context:
        yield (
            f"parallel.ulysses={parallel.ulysses} x parallel.ring={parallel.ring} is"
            f" {parallel.ulysses * parallel.ring}, but parallel.context={context}; use"
            f" parallel.context={parallel.ulysses * parallel.ring}"
        )
