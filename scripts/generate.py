"""python -m scripts.generate RUN_OR_EXPORT [key=value ...]: continues texts with a trained model.

RUN_OR_EXPORT is a run directory (its newest whole checkpoint), a checkpoint in it, a folder that
scripts.export wrote, or that of a Hugging Face model. Keys, with their defaults:

    prompt=""               the text to continue; empty: a new document
    prompts=FILE            one prompt a line, or {"prompt": ...} a line, instead of prompt=
    output=FILE             results as JSON lines, in place of the screen
    tokens=200              new tokens of a text, at most
    samples=1               texts for each prompt
    temperature=1.0         0: always the likeliest token
    top_k=0 top_p=1.0 min_p=0.0 repetition_penalty=1.0
    stop=TEXT               ends a text; several as stop=["a","b"]
    seed=0                  a text is a function of it and of the numbers of prompt and sample
    rows=8                  texts that run at once
    overflow=stop           at the end of the context: raise, stop, truncate_start, truncate_middle,
                            shift or recompute (docs/caches.md)
    context=N               tokens of the context; those of a row in training, if overflow= is set
    n_keep=4                first tokens that stay, where a policy keeps some
    beams=1                 of a model that reads a source, which the prompt then is: hypotheses
    length_penalty=0.0      above 0 longer targets lose less
    cache=NAME              a file of conf/cache, by default that of the run; cache.KEY=VALUE too
    preempt=recompute       what is done with a text for which cache.pages have no room: recompute
                            or swap
    device=cpu              cuda: the first GPU
    trust=false             true: build classes of other packages that the config names

Text goes to the screen as it comes; tokens/s and the bytes of the cache go to standard error. Exit
status 2 for a wish that cannot be honoured, 3 where the model is damaged.
"""

import sys

from trainer.decoding.command import run
from trainer.entry import run_command
from trainer.errors import UserError


def main(words: list[str]) -> int:
    try:
        return run(words)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code


if __name__ == "__main__":
    run_command(main, __doc__)
