"""The recipe `translation`: English to German from the help of LibreOffice, with and without
attention.

Protocol: about as many parameters, one learning rate and batch, and equal processor time for all;
then held-out paragraphs are translated greedily. The pairs are made by
scripts/experiments/libreoffice_pairs.py.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import sacrebleu

from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import table
from scripts.experiments.trial import ANSWERS, HELD_OUT, Trial, TrialResult
from trainer.errors import UserError

FILES = ("train.jsonl", "held_out.jsonl", "tokenizer.json")
SECONDS = 240.0  # of processor time for each model
COMMON = (
    "data=pairs",
    "data.on_error=skip",
    "context_length=48",
    "batch_tokens=1536",
    "steps=100000",  # more than there is time for
    "schedule=constant",
    "schedule.warmup_steps=50",
    "optim.learning_rate=0.003",
    "optim.weight_decay=0.0",
    "evaluation.batches=8",
)
RECURRENT = ("model=seq2seq", "model.layers=1")
KINDS: Mapping[str, tuple[str, ...]] = {  # name in the table -> settings
    "no attention": (*RECURRENT, "model.attention=none", "model.width=136"),
    "Bahdanau": (*RECURRENT, "model.attention=bahdanau", "model.width=120"),
    "Luong, general": (*RECURRENT, "model.attention=luong_general", "model.width=128"),
    "Transformer": (
        "model=encoder_decoder",
        "model.width=128",
        "model.heads=4",
        "model.layers=2",
        "model.ffn=1.0",
        "model.init_std=0.05",
    ),
}
INTRODUCTION = """\
### English to German
Held-out paragraphs of 2 to 12 words from the help of LibreOffice, translated greedily after\
 {0:.0f} s of processor time; BLEU and chrF as sacreBLEU computes them, over {1} paragraphs. GRU on\
 both sides, or two layers of a Transformer. Paragraphs of software help are alike, so the figures\
 compare these models with one another and with nothing else."""


def translation(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """Returns (what the recipe found, as markdown; every trial).

    Raises:
        UserError: there are no pairs.
    """
    data = _data(effort.pairs)
    seconds = SECONDS if effort.steps is None else None
    trials = []
    for name, settings in KINDS.items():
        trials.append(Trial(name, (*settings, *COMMON, *data), {}, seconds, bleu))
    jobs = [(trial, seed) for trial in trials for seed in effort.numbers()]
    results = run_trials(jobs, effort, say)
    columns = {
        "BLEU": _figure("bleu"),
        "chrF": _figure("chrf"),
        "loss": lambda result: result.loss,
        "steps": lambda result: float(len(result.rows)),
        "parameters": lambda result: f"{result.parameters:,}",
    }
    text = INTRODUCTION.format(SECONDS, ANSWERS)
    return "\n\n".join([text, table(results, columns, digits=2)]), results


def bleu(written: list[str], wanted: list[str]) -> dict[str, float]:
    """Returns BLEU and chrF of texts against one reference each, from 0 to 100.

    Source: Post 2018 (arXiv:1804.08771), with its default tokenization 13a.
    """
    return {
        "bleu": sacrebleu.corpus_bleu(written, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(written, [wanted]).score,
    }


def _data(folder: str | None) -> tuple[str, ...]:
    """Returns the settings of the data of a folder."""
    if folder is None:
        raise UserError(
            "pairs= is not set; make them with python -m scripts.experiments.libreoffice_pairs"
            " FOLDER, and give pairs=FOLDER"
        )
    paths = []
    for name in FILES:
        path = (Path(folder) / name).resolve()
        if not path.is_file():
            raise UserError(
                f"pairs={folder}: {name} is not there; make it with python -m"
                f" scripts.experiments.libreoffice_pairs {folder}"
            )
        paths.append(path)
    train, held_out, tokenizer = paths
    return (
        f"data.path='{train}'",
        f"data.held_out_path='{held_out}'",
        f"data.tokenizer='{tokenizer}'",
    )


def _figure(name: str) -> Callable[[TrialResult], float]:
    return lambda result: result.exams[HELD_OUT].graded[name]
