"""How well a trained model predicts a text, token by token:

python -m examples.score_text runs/example 'import torch'
"""

import math
import sys
from pathlib import Path

import longspan


def surprise(source: Path, text: str) -> list[float]:
    """Returns the surprise of each token of `text` but the first, in bits.

    Args:
        source: a run, a checkpoint, or a folder of scripts.export.
        text: one document.
    """
    model = longspan.load(source)
    nats = model.token_losses(model.encode(text))[0]
    return (nats / math.log(2)).tolist()


if __name__ == "__main__":
    bits = surprise(Path(sys.argv[1]), sys.argv[2])
    print(f"{sum(bits) / len(bits):.2f} bits per token over {len(bits)} tokens")
