"""The console: plain lines where there is no terminal, a bar where there is one, nothing on other
ranks."""

import io
import json
import re

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


def run_of(console: Console, directory) -> None:
    console.say("data: 7 documents")
    console.step(row(1))
    console.warn("step 2 skipped: the loss is nan")
    console.step(row(2))
    console.finish(directory, stopped="SIGTERM", owed=["held_out of step 2"], more=["do this"])


def shown(tmp_path, style: str, level: str = "info", terminal: bool = False) -> str:
    file = Screen() if terminal else io.StringIO()
    run_of(Console(2, file=file, style=style, level=level), tmp_path)
    return file.getvalue()


FACTS = (
    "data: 7 documents",
    "step 2 skipped: the loss is nan",
    "2.5000",
    "12.3k tokens/s",
    "stopped: SIGTERM",
    "metrics.jsonl",
    "held_out of step 2",
    "do this",
)


def test_a_terminal_plain_lines_and_json_show_the_same_facts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    escapes = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
    texts = [
        shown(tmp_path, "plain"),
        shown(tmp_path, "plain", terminal=True),
        escapes.sub("", shown(tmp_path, "rich")),
        escapes.sub("", shown(tmp_path, "rich", terminal=True)),
    ]
    for fact in FACTS:
        assert all(fact in text for text in texts), fact
    assert "\x1b" not in texts[1]
    objects = [json.loads(line) for line in shown(tmp_path, "json").splitlines()]
    assert [each["event"] for each in objects] == ["line", "step", "line", "step", "end"]
    assert objects[0]["text"] == FACTS[0]
    assert objects[2] == {"event": "line", "level": "warning", "text": FACTS[1]}
    step = objects[3]
    assert (step["step"], step["steps"], step["loss"]) == (2, 2, 2.5)
    assert step["tokens_per_second"] == 12345.0
    end = objects[4]
    assert end["outcome"] == "stopped: SIGTERM" and end["owed"] == ["held_out of step 2"]
    assert end["found"] == [["metrics", str(tmp_path / "metrics.jsonl")]]
    assert "do this" in end["next"]


def test_a_quiet_console_shows_warnings_and_the_last_screen(tmp_path):
    for style in ("plain", "rich"):
        text = shown(tmp_path, style, "warning", terminal=True)
        assert "skipped" in text and "stopped: SIGTERM" in text and "do this" in text
        assert "documents" not in text and "tokens/s" not in text
    events = [json.loads(line)["event"] for line in shown(tmp_path, "json", "warning").splitlines()]
    assert events == ["line", "end"]
    assert shown(tmp_path, "plain", "error") == shown(tmp_path, "json", "error") == ""


def test_json_is_one_line_whatever_a_text_holds(tmp_path):
    file = io.StringIO()
    Console(1, file=file, style="json").say("two\nlines \x1b[0m \u4e2d")
    [line] = file.getvalue().splitlines()
    assert json.loads(line)["text"] == "two\nlines \x1b[0m \u4e2d" and line.isascii()
