"""What W&B shows the jobs of a sweep under: their folder, and the settings in which they differ."""

import json
import sys
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.sweep.batch import labels
from trainer.sweep.sweep import run_sweep


def config(*words: str) -> Config:
    found = compose(list(words))
    assert found.config is not None and not found.faults, found.faults
    return found.config


def test_a_job_has_its_sweep_as_group_and_what_varies_as_name_and_tags() -> None:
    own = ["model=full", "optim.learning_rate=0.01"]
    words = labels(config(), own, "my sweep")
    wish = config(*words).wandb
    assert (wish.group, wish.name, wish.tags) == (
        "my sweep",
        "model=full optim.learning_rate=0.01",
        own,
    )


def test_what_the_user_names_wins() -> None:
    mine = ("wandb.group=g", "wandb.name=n", "wandb.tags=[t]")
    for span, word in enumerate(mine):
        left = labels(config(word), ["seed=1"], "all")
        assert [each.partition("=")[0] for each in left] == [
            m.partition("=")[0] for i, m in enumerate(mine) if i != span
        ]
    assert labels(config(*mine), ["seed=1"], "all") == []
    assert labels(config("wandb.mode=disabled"), ["seed=1"], "all") == []


@pytest.mark.parametrize(
    "own",
    [
        ["model.pattern=[full, sliding]"],
        ["data.path='it\\'s, \"here\"'"],
        ["name=${seed}"],
        ["a={b: 1}"],
        ["data.path=C:\\x\\"],
        ["x" * 200] * 3,
    ],
    ids=["list", "quotes", "interpolation", "dictionary", "backslash", "long"],
)
def test_any_setting_can_be_a_name_and_a_tag(own: list[str]) -> None:
    wish = config(*labels(config(), own, "it's")).wandb
    assert wish.group == "its" and wish.name and len(wish.tags) == len(own)
    assert wish.tags[0][:5] == own[0][:5]


def test_the_command_of_each_job_carries_its_labels(tmp_path: Path) -> None:
    stub = (
        "import json, pathlib, sys; pathlib.Path(sys.argv[1], sys.argv[3] +"
        " '.json').write_text(json.dumps(sys.argv))"
    )
    (tmp_path / "stub.py").write_text(stub.replace("sys.argv[3]", "str(abs(hash(str(sys.argv))))"))
    words = [
        "-m",
        "context_length=64",
        "batch_tokens=64",
        "seed=1,2",
        f"hydra.sweep.dir={tmp_path / 'lot'}",
    ]
    assert run_sweep(words, [sys.executable, str(tmp_path / "stub.py"), str(tmp_path)]) == 0
    told = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(told) == 2 and all("wandb.group='lot'" in words for words in told)
    assert sorted(word for words in told for word in words if word.startswith("wandb.name")) == [
        "wandb.name='seed=1'",
        "wandb.name='seed=2'",
    ]
