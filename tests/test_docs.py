"""The README and the docs are true: commands compose, links lead somewhere, names are today's."""

import ast
import importlib.util
import re
import shlex
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from models.layer import HOOKS
from tests.support.uncomposed_commands import NOT_COMPOSED
from trainer.config.compose import compose, sweep_words
from trainer.config.groups import choices
from trainer.config.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
CATALOGUE = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
# Groups whose settings are all fields of the schema; the others also take those of a class.
CLOSED = ("parallel", "engine", "launch", "log", "wandb", "checkpoint")
NOT_SETTINGS = ("jsonl", "_target_")
# Commands whose words are settings of a run, in addition to `python -m trainer`.
OF_SETTINGS = ("trainer", "scripts.doctor", "scripts.wandb_sweep")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(torchrun|mpirun|python -m|make|longspan) ")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def lines_of_code(text: str) -> list[str]:
    """Every line of the fences without a language, and every inline code, on one line each."""
    lines = []
    for _, language, body in FENCE.findall(text):
        if not language:
            lines += body.replace("\\\n", " ").splitlines()
    lines += SPAN.findall(without_fences(text))
    return [" ".join(line.split()) for line in lines]


@cache
def commands() -> tuple[tuple[str, str], ...]:
    """(page, command) for every command, without comments and redirections."""
    found = {}
    for page in PAGES:
        for line in lines_of_code(page.read_text(encoding="utf-8")):
            if COMMAND.match(line):
                command = re.split(r" +(?:#|>) ?", line)[0].strip()
                found[name_of(page), command] = None
    for script in EXAMPLES:
        text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        for line in text.splitlines():
            if COMMAND.match(line.strip()):
                found[name_of(script), line.strip()] = None
    return tuple(found)


def module_and_words(command: str) -> tuple[str, list[str]]:
    """The module that a command starts, and the words that it takes."""
    words = shlex.split(command.replace("longspan", "python -m trainer"))
    if "-m" not in words:  # a script
        path = next(word for word in words if word.endswith(".py"))
        return path.removesuffix(".py").replace("/", "."), []
    # torchrun and mpirun have options of their own before `-m MODULE`.
    place = words.index("-m")
    return words[place + 1], words[place + 2 :]


def alternatives(words: list[str]) -> list[tuple[str, ...]]:
    """Settings of a sweep that together take every value: as many as the longest list."""
    pairs = [word.partition("=") for word in words]
    values = [(key, text.split(",")) for key, _, text in pairs]
    longest = max(len(texts) for _, texts in values)
    return [
        tuple(f"{key}={texts[min(number, len(texts) - 1)]}" for key, texts in values)
        for number in range(longest)
    ]


@cache
def faults(settings: tuple[str, ...]) -> tuple[str, ...]:
    """The faults of settings; several commands have the same ones."""
    return tuple(compose(settings).faults)


def faults_of(command: str) -> list[str]:
    """Composes the settings of a command; returns every fault."""
    module, words = module_and_words(command)
    if "-m" not in words and module != "scripts.wandb_sweep":
        return list(faults(tuple(words)))
    words = [word for word in words if word != "-m"]
    messages: list[str] = []
    sweep_words(words, messages)
    words = [word for word in words if not word.startswith("hydra.")]
    for settings in alternatives(words):
        messages += faults(settings)
    return messages


def make_targets() -> dict[str, str]:
    """The recipes of the Makefile by target."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = re.findall(r"^([\w-]+):[^=\n]*\n((?:\t.*\n)*)", text, re.MULTILINE)
    return dict(recipes)


def composed_commands() -> list[str]:
    """Commands whose settings are composed, with those in the recipes of `make TARGET`."""
    chosen = {}
    for _, command in commands():
        if command.startswith("make "):
            recipe = make_targets().get(command.removeprefix("make "), "")
            for line in recipe.splitlines():
                if "python -m trainer" in line:
                    chosen[line.strip().replace("$(BIN)/", "")] = None
        elif command not in NOT_COMPOSED:
            chosen[command] = None
    return list(chosen)


@pytest.mark.parametrize("command", composed_commands())
def test_the_settings_of_a_command_have_no_fault(command):
    module, _ = module_and_words(command)
    assert module in OF_SETTINGS, f"{command}: add it to NOT_COMPOSED with the reason"
    assert faults_of(command) == []


def test_a_wrong_command_is_seen():
    assert faults_of("python -m trainer parallel.method=heads")


def test_every_module_and_target_that_a_command_names_exists():
    missing = []
    for page, command in commands():
        if command.startswith("make "):
            exists = command.removeprefix("make ") in make_targets()
        else:
            exists = importlib.util.find_spec(module_and_words(command)[0]) is not None
        if not exists:
            missing.append(f"{page}: {command}")
    assert not missing, "\n".join(missing)


def test_no_listed_command_has_gone_from_the_pages():
    present = {command for _, command in commands()}
    gone = [command for command in NOT_COMPOSED if command not in present]
    assert not gone, "\n".join(gone)


def slug(heading: str) -> str:
    """The anchor that the site gives to a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def test_links_lead_to_files_and_headings():
    broken = []
    for page in PAGES:
        for link in LINK.findall(without_fences(page.read_text(encoding="utf-8"))):
            if re.match(r"https?://", link):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists():
                broken.append(f"{name_of(page)}: {link}")
            elif anchor:
                text = without_fences(target.read_text(encoding="utf-8"))
                if anchor not in map(slug, HEADING.findall(text)):
                    broken.append(f"{name_of(page)}: {link}")
    assert not broken, "\n".join(broken)


def test_files_that_the_pages_name_exist():
    rooms = "models|parallel|trainer|scripts|tests|conf|examples"
    path = re.compile(rf"\b((?:{rooms})/[\w/.-]*\.(?:py|yaml|sh))\b")
    made_up = {
        "NAME",
        "every_nth",
        "notes",
        "accuracy",
        "mine",
    }  # files that a how-to page tells the reader to add
    missing = [
        f"{name_of(page)}: {name}"
        for page in PAGES
        for name in path.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).is_file() and not any(word in Path(name).stem for word in made_up)
    ]
    assert not missing, "\n".join(missing)


def test_settings_of_closed_groups_are_named_as_they_are_today():
    setting = re.compile(rf"^({'|'.join(CLOSED)})\.([a-z_]+)(?=[=,:]|$)")
    unknown = []
    for page in PAGES:
        for line in lines_of_code(page.read_text(encoding="utf-8")):
            for word in line.split():
                match = setting.match(word)
                if match is None or match[2] in NOT_SETTINGS:
                    continue
                if match[2] not in Config.model_fields[match[1]].annotation.model_fields:
                    unknown.append(f"{name_of(page)}: {word}")
    assert not unknown, "\n".join(unknown)


def test_the_catalogue_has_every_choice_and_no_other():
    wrong = []
    for group in ("mixer", "position", "memory", "objective", "optim", "schedule", "data"):
        known = set(choices(group)) - {"none"}
        named = set(re.findall(rf"`{group}=(\w+)", CATALOGUE)) - {"NAME", "none"}
        wrong += [f"{group}={name} is missing" for name in sorted(known - named)]
        wrong += [f"{group}={name} is unknown" for name in sorted(named - known)]
    models = set(choices("model")) - set(choices("mixer")) - {"decoder"}
    wrong += [f"model={name} is missing" for name in models if f"`model={name}`" not in CATALOGUE]
    assert not wrong, "\n".join(wrong)


def rows_with_values() -> list[list[str]]:
    """The config lines of the catalogue that set a value; one of each group in each list."""
    by_group: dict[str, list[list[str]]] = {}
    for line in re.findall(r"^\| `([\w=./'* -]+)`", CATALOGUE, re.MULTILINE):
        if "." in line:
            by_group.setdefault(line.partition("=")[0], []).append(shlex.split(line))
    return [list(chain(*rows)) for rows in zip_longest(*by_group.values(), fillvalue=[])]


def test_the_config_lines_of_the_catalogue_have_no_fault():
    lines = rows_with_values()
    assert lines
    for words in lines:
        assert compose(words).faults == []


def test_tables_of_attributes_name_hooks():
    unknown = []
    tables = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for rows in re.findall(r"^\| attribute \|.*\n((?:\|.*\n)+)", text, re.MULTILINE):
            tables += 1
            for row in rows.splitlines():
                for name in re.findall(r"`(\w+)(?:\(\))?`", row.split("|")[1]):
                    if name not in HOOKS:
                        unknown.append(f"{name_of(page)}: {name}")
    assert tables >= 2
    assert not unknown, "\n".join(unknown)


def test_the_readme_fits_on_few_screens():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
