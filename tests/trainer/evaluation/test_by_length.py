"""Losses by position of the checkpoints between stages, read in rows of the longest stage."""

import pytest

from scripts.lengths import main
from tests.support.pool import ranks
from tests.trainer.test_stages import SMALL, config_of, in_rank
from trainer.evaluation.by_length import losses_by_length, table
from trainer.logs.jsonl import read
from trainer.run_dir import make_run_dir, record

STAGES = (
    "stages=[{name:short,steps:3,context_length:40},"
    "{name:long,steps:2,context_length:1200,batch_tokens:2400,"
    "position:{_target_:models.positions.yarn.Yarn,factor:8.0,original_length:40}}]"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    (folder / "text").mkdir()
    for number in range(24):
        text = " ".join(str(number * word) for word in range(300))
        (folder / "text" / f"{number}.txt").write_text(text)
    words = [
        *SMALL,
        "data=files",
        f"data.path={folder}/text/*.txt",
        f"data.cache={folder / 'cache'}",
        "evaluation.every=100",
        "batch_tokens=80",
        STAGES,
        f"run_dir={folder / 'run'}",
    ]
    make_run_dir(folder / "run")
    record(folder / "run", config_of(words))
    assert ranks(1, in_rank, words, str(folder / "run"), None) == [0]
    return folder / "run"


def test_each_checkpoint_is_read_under_its_own_positions_and_the_longest_ones(directory):
    results = list(losses_by_length(directory, 1))
    schemes = [(entry.stage.name, entry.position, entry.trained) for entry in results]
    assert schemes == [
        ("short", "Rope", True),
        ("short", "Yarn", False),
        ("long", "Yarn", True),
    ]
    assert {entry.context_length for entry in results} == {1200}
    losses = [entry.result.loss for entry in results]
    assert len(set(losses)) == 3
    # The last one is what the run itself measured, over the same rows.
    rows = {row["step"]: row["value"] for row in read(directory / "evaluation.jsonl")}
    assert abs(losses[2] / rows[5] - 1) < 1e-9
    # Rows of 40 tokens hold no later position: the run could not have measured these.
    assert results[0].result.by_position[-1]["end"] > 512
    lines = table(results).splitlines()
    assert lines[0].startswith("| checkpoint | positions | 256 to 512 | 512 to 1024 |")
    assert lines[3].startswith("| after short, step 3 | Yarn, untrained | ")


def test_the_command_prints_the_table_and_refuses_in_one_line(directory, tmp_path, capsys):
    assert main([str(directory), "batches=1"]) == 0
    assert capsys.readouterr().out.count("\n") == 5
    assert main([str(tmp_path)]) == 3
    assert "is no run directory" in capsys.readouterr().err
    assert main([str(directory), "batches=0"]) == 2
    assert main([]) == 2
