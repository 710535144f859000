"""Text of `python -m trainer --help`: usage, groups, every key with its default and meaning."""

from pydantic import BaseModel

from trainer.config.compose import compose
from trainer.config.groups import choices, groups
from trainer.config.schema import ComponentConfig

USAGE = """Train a sequence model on contexts longer than one device holds.

    python -m trainer [GROUP=NAME] [KEY=VALUE] ...

Examples
    python -m trainer experiment=quickstart
    python -m trainer experiment=quickstart parallel.context=4      # 4 ranks share each sequence
    python -m trainer mixer=sliding mixer.window=512 context_length=4096 batch_tokens=16384
    python -m trainer experiment=quickstart run_dir=runs/mine       # resumes when given again
    python -m trainer parallel.context=2 launch.dry_run=true        # check, start nothing
    python -m trainer -m model=full,sliding seed=1,2,3 match=parameters       # a sweep
    torchrun --nnodes 2 --nproc-per-node 8 -m trainer parallel.context=16 run_dir=/shared/run

Exit status
    0 done   1 failed   2 the settings cannot be honoured   3 data, disk or network failed
    143, 130, 129, 131 stopped by SIGTERM, SIGINT, SIGHUP, SIGQUIT after saving
    3 also: an evaluation is owed, which the same command does
"""
WIDTH = 34


def text() -> str:
    """Returns the whole help text."""
    config = compose([]).config
    assert config is not None, "conf/train.yaml does not compose"
    chosen = [f"    {group + '=':16}{', '.join(choices(group))}" for group in groups()]
    return "\n".join(
        [
            USAGE,
            "Groups: GROUP=NAME",
            *chosen,
            "",
            "Keys: KEY=VALUE (default)  meaning",
            *_keys(config, ""),
        ]
    )


def _keys(part: BaseModel, prefix: str) -> list[str]:
    lines = []
    for name, info in type(part).model_fields.items():
        value = getattr(part, name)
        if name in ("target", "mixers", "feedforwards"):
            continue
        if isinstance(value, BaseModel):
            lines += _keys(value, f"{prefix}{name}.")
        else:
            lines.append(_line(f"{prefix}{name}", value, info.description or ""))
    extra = part.model_extra or {}
    if not isinstance(part, ComponentConfig):
        for name, node in extra.items():
            lines += _keys(node, f"{prefix}{name}.")
    if isinstance(part, ComponentConfig):
        lines += [_line(f"{prefix}{key}", value, "") for key, value in extra.items()]
    return lines


def _line(key: str, value: object, meaning: str) -> str:
    shown = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return f"    {f'{key} ({shown})':{WIDTH}}  {meaning}".rstrip()
