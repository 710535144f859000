"""What is read of runs in every state: finished, failed, going on, not begun, damaged; and what is
made of their seeds."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from tests.support.run_folders import TOKENS, lines, sweep, trained
from trainer.errors import UserError
from trainer.reports.runs import RunRecord, collect
from trainer.reports.variants import frontier, spread, variants


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    return collect(sweep(tmp_path_factory.mktemp("here") / "all"))


def test_every_job_is_told_in_order_whatever_became_of_it(runs: list[RunRecord]) -> None:
    assert [run.name for run in runs] == [str(number) for number in range(12)]
    assert [run.label for run in runs[:4]] == [
        "model=full seed=1",
        "model=full seed=2",
        "model=full seed=3",
        "model=sliding seed=1",
    ]
    assert [run.finished for run in runs] == [number not in (4, 10, 11) for number in range(12)]
    assert (
        runs[4].state == "failed with exit status 3: the disk <is> full"
        and runs[4].tokens == 12 * TOKENS
    )
    assert runs[10].state == "unfinished, step 25 of 40" and runs[10].label == "model=hyena seed=2"
    assert runs[11].state == "not started" and math.isnan(runs[11].loss)
    assert (
        runs[10].command == "python -m trainer steps=40 model=hyena seed=2"
    )  # without what the sweep added
    assert runs[0].command == "python -m trainer steps=40 model=full seed=1"


def test_figures_are_those_of_the_files(runs: list[RunRecord]) -> None:
    run = runs[1]
    assert run.loss == pytest.approx(2.0 + 3.5 * math.exp(-5))
    assert run.held_out == pytest.approx(run.loss + 0.1)
    assert (run.parameters, run.flops_per_token, run.sent_bytes, run.ranks) == (
        123_456,
        4e6,
        7_340_032,
        2,
    )
    assert (run.tokens, run.tokens_per_second, run.seconds, run.peak_bytes) == (
        40 * TOKENS,
        TOKENS / 0.5,
        20.0,
        2**30,
    )
    assert run.graded == {"recall": 0.25}
    assert [tokens for tokens, _ in run.checks] == [20 * TOKENS, 40 * TOKENS]
    assert run.by_position[0, 1] == 2.6 and run.by_position[2, 4] == 2.5


def test_seeds_are_taken_together_and_only_what_finished_counts(runs: list[RunRecord]) -> None:
    found = variants(runs)
    assert [each.name for each in found] == [
        "model=full",
        "model=sliding",
        "model=retnet",
        "model=hyena",
        "11",
    ]
    full, sliding, _, hyena, last = found
    assert full.spread(lambda run: run.loss).deviation == pytest.approx(0.05 * (1 - math.exp(-5)))
    assert sliding.spread(lambda run: run.by_position[0, 1]).mean == pytest.approx(2.8)
    assert sliding.state == "2 of 3 runs; 4: failed with exit status 3: the disk <is> full"
    assert math.isnan(hyena.spread(lambda run: run.held_out).deviation) and len(hyena.counted) == 1
    assert (full.state, last.state) == ("3 runs", "0 of 1 runs; 11: not started")


def test_a_run_that_goes_on_counts_where_no_other_finished(tmp_path: Path) -> None:
    trained(tmp_path / "one", 2.0, until=20)
    [variant] = variants(collect(tmp_path / "one"))
    assert variant.name == "sweep" and variant.spread(lambda run: run.held_out).mean > 2
    assert variant.state == "0 of 1 runs; one: unfinished, step 20 of 40"


def test_steps_between_two_rows_count_in_the_seconds(tmp_path: Path) -> None:
    row = {"loss": 1.0, "tokens": 1, "tokens_per_second": 1.0, "peak_memory_bytes": 1}
    lines(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "step_seconds": 3.0, **row}, {"step": 11, "step_seconds": 0.5, **row}],
    )
    assert collect(tmp_path)[0].seconds == 8.0


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", "{]\n{}\n", "line 1 of .*metrics.jsonl is no JSON object with a step"),
        ("summary.json", "[1]", "summary.json holds no JSON object"),
        ("summary.json", "{", "summary.json is not JSON"),
        ("evaluation.jsonl", '{"step": 1, "value": 2}\n', "line 1 of .*evaluation.jsonl"),
        ("outcome.json", "nonsense", "Expecting value"),
        ("config.yaml", "a: [", "config.yaml line 2 is not YAML"),
        ("environment.json", "null", "NoneType"),
    ],
)
def test_a_damaged_file_is_said_and_the_rest_is_told(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    trained(tmp_path / "0", 2.0)
    trained(tmp_path / "1", 2.0)
    (tmp_path / "0" / name).write_text(text)
    runs = collect(tmp_path)
    assert re.search(said, runs[0].state), runs[0].state
    assert runs[1].finished
    assert math.isnan(runs[0].loss) == (name == "metrics.jsonl")


def test_null_and_missing_figures_are_not_known(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": None, "tokens": 0}, {"step": 2, "loss": None, "tokens": 0}]
    lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "summary.json").write_text(json.dumps({"sent_bytes_per_step": None}))
    [run] = collect(tmp_path)
    assert (
        all(map(math.isnan, (run.loss, run.sent_bytes, run.seconds, run.peak_bytes)))
        and run.curve == []
    )


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run and no sweep"):
        collect(tmp_path)
    with pytest.raises(UserError, match="there is no such directory"):
        collect(tmp_path / "none")


def test_folders_of_runs_are_found_at_any_depth_and_not_looked_into(tmp_path: Path) -> None:
    for name in ("b/10", "b/9", "a"):
        trained(tmp_path / name, 2.0)
    (tmp_path / "a" / "wandb" / "files").mkdir(parents=True)
    (tmp_path / "a" / "wandb" / "files" / "config.yaml").touch()
    (tmp_path / "report").mkdir()
    assert [run.name for run in collect(tmp_path)] == ["a", "b/9", "b/10"]


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    assert frontier([(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.0), (4.0, 4.0), (2.0, 2.0)]) == [
        1,
        2,
        5,
        0,
    ]


def test_a_spread_leaves_out_what_is_not_known() -> None:
    assert spread([1.0, math.nan, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert all(map(math.isnan, spread([math.nan])))


@pytest.mark.parametrize(("until", "state"), [(40, "done"), (25, "unfinished, step 25 of 40")])
def test_a_run_in_stages_has_the_steps_of_all(tmp_path: Path, until: int, state: str) -> None:
    trained(tmp_path / "run", 2.0, until=until)
    config = {"name": "staged", "steps": 15, "stages": [{"steps": 25}, {"steps": None}]}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert [run.state for run in collect(tmp_path / "run")] == [state]
