"""How well a trained model predicts a text, byte by byte:

python -m scripts.export runs/example exported
python -m examples.score_text exported 'the cat sat on the mat'
"""

import sys
from pathlib import Path

import torch

from trainer.export import reopen


@torch.no_grad()
def surprise(folder: Path, text: str) -> list[float]:
    """Returns the surprise of each byte of `text` but the first, in bits.

    Args:
        folder: as scripts.export wrote it, of a model that reads bytes.
        text: one document.
    """
    model = reopen(folder).eval()
    tokens = torch.tensor([list(text.encode())])
    # Bare tokens are one document a row; a MicroBatch says otherwise.
    logits = model(tokens)[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return (nats / torch.log(torch.tensor(2.0))).tolist()


if __name__ == "__main__":
    bits = surprise(Path(sys.argv[1]), sys.argv[2])
    print(f"{sum(bits) / len(bits):.2f} bits per byte over {len(bits)} bytes")
