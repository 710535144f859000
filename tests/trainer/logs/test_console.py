"""The console: plain lines where there is no terminal, a bar where there is one, nothing on other
ranks."""

import io

from trainer.logs.console import Console, count, duration
from trainer.logs.jsonl import MetricsRow


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int) -> MetricsRow:
    return MetricsRow(step, 2.5, 64 * step, 12345.0, 0.5, 1.0, 1e-3, 10**6, 0.5)


def test_plain_lines_come_first_last_and_every_few_seconds():
    clock, file = Clock(), io.StringIO()
    console = Console(100, file=file, clock=clock)
    for step in range(1, 101):
        clock.now += 0.5
        console.step(row(step))
    lines = file.getvalue().splitlines()
    assert lines[0] == "step   1/100  loss 2.5000  12.3k tokens/s  0:50 left"
    assert lines[-1].startswith("step 100/100") and lines[-1].endswith("0:00 left")
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [*range(1, 100, 10), 100]


def test_a_resumed_run_begins_at_its_step():
    clock, file = Clock(), io.StringIO()
    console = Console(60, file=file, clock=clock)
    clock.now = 1000.0
    console.go_on_from(50)
    clock.now += 2
    console.step(row(51))
    assert file.getvalue() == "step 51/60  loss 2.5000  12.3k tokens/s  0:18 left\n"


def test_other_ranks_are_silent(tmp_path):
    file = io.StringIO()
    console = Console(1, speaks=False, file=file)
    console.say("x")
    console.step(row(1))
    console.finish(tmp_path)
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar_and_lines_above_it():
    file = Screen()
    console = Console(2, file=file)
    console.step(row(1))
    console.say("a [note] kept as it is")
    console.step(row(2))
    console.close()
    text = file.getvalue()
    assert "loss 2.5000" in text and "tokens/s" in text and "2/2" in text
    assert "a [note] kept as it is\n" in text


def test_the_last_screen_lists_what_is_there_and_nothing_else(tmp_path):
    file = io.StringIO()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "evaluation.jsonl").write_text("")
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    Console(1, file=file).finish(
        tmp_path, wandb=str(tmp_path), more=["python -m scripts.generate x"]
    )
    text = file.getvalue()
    assert str(tmp_path / "metrics.jsonl") in text and "step_00000002" in text
    assert "step_00000001" not in text and "evaluation.jsonl" not in text and "plots" not in text
    assert f"wandb sync {tmp_path}" in text and "python -m scripts.generate x" in text
    file.truncate(0)
    Console(1, file=file).finish(tmp_path, stopped="SIGTERM")
    assert "stopped: SIGTERM" in file.getvalue() and f"run_dir={tmp_path}" in file.getvalue()


def test_numbers_are_short():
    assert [count(number) for number in (0.5, 950, 12345, 4.56e6, 7e9)] == [
        "0.5",
        "950",
        "12.3k",
        "4.56M",
        "7G",
    ]
    assert [duration(seconds) for seconds in (4.6, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
