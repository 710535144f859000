"""A name longer than a file system takes is a name that is not there, wherever it is typed."""

import importlib

import pytest

from trainer.errors import UserError
from trainer.files.import_by_name import searched_folders
from trainer.preflight.check import check_config
from trainer.preflight.prepare import load_config

LONG = "x" * 300
SETTINGS = [
    *(f"{group}={LONG}" for group in ("schedule", "model", "mixer", "data", "cache", "evaluation")),
    f"evaluation=[heldout,{LONG}]",
    f"experiment={LONG}",
    f"schedule=../{LONG}",
    f"{LONG}=1",
    f"+{LONG}=1",
    f"mixer._target_={LONG}.{LONG}",
    f"model=hub model.path={LONG}",
    f"run_dir=a/{LONG}/b",
    f"resume={LONG}",
    f"init_from={LONG}",
    f"init_from=hf:{LONG}",
    f"lora.adapter={LONG}",
    f"data=files data.path={LONG}",
    f"data=hub data.name={LONG}",
    f"data.tokenizer={LONG}",
    f"data.cache={LONG}",
]


@pytest.mark.parametrize("words", SETTINGS, ids=lambda words: words.replace(LONG, "LONG"))
def test_a_setting_of_such_a_name_is_refused(words):
    with pytest.raises(UserError) as caught:
        check_config(load_config(words.split()))
    # How long the folders' own names are is the machine's matter.
    said = str(caught.value).replace(", ".join(searched_folders()), "")
    assert len(said) < 1100


@pytest.mark.parametrize(
    "command", ["generate LONG prompt=a", "evaluate LONG", "report LONG", "export LONG OUT"]
)
def test_a_run_of_such_a_name_is_not_there(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *words = command.replace("LONG", LONG).split()
    main = importlib.import_module(f"scripts.{name}").main
    said = ""
    try:
        code = main(words)
    except (UserError, ValueError, SystemExit) as refusal:
        said = str(refusal)
        code = 2
    said += capsys.readouterr().err
    assert code and LONG[:40] in said and "Errno" not in said
