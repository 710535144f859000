"""python -m scripts.kernels KEY=VALUE ... [device=h200] [gpus=4]: the kernel that serves each part.

Takes the overrides of a run, passes a short row through its model without numbers, and prints for
every attention, scan, convolution and other primitive the kernel that would compute it, and why:
for one document, for packed documents, and for the blocks of a ring of parallel.context ranks
(gpus=; 4 where the run has one). device= is one of a100, h100, h200, b200 and cpu; json=true prints
lines of JSON. Scans name the
kernels of fla where it is installed here. compile=true alone compiles our own Triton kernels for
sm_80, sm_90 and sm_100, which takes minutes and no card, and prints what each takes: registers and
bytes spilled of a thread, and shared memory. Exit status 2 for what is refused.
"""

import json
from collections.abc import Sequence

from models.kernels.backends import load_compiler
from trainer.entry import run_command
from trainer.planning.kernel_table import KernelRow, kernel_rows, read_kernel_words


def main(words: Sequence[str]) -> int:
    if list(words) == ["compile=true"]:
        show_compiled()
        return 0
    asked = read_kernel_words(words)
    rows = kernel_rows(asked)
    for row in rows:
        if asked.as_json:
            print(json.dumps(row._asdict()))
        else:
            show(row)
    return 0


def show_compiled() -> None:
    """Prints what each of our Triton kernels takes, as a table in markdown."""
    print("| kernel | of | widths | dtype | sm | block | warps | registers | spilled | shared |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in load_compiler().compiled_kernels():
        cells = (
            each.kernel,
            each.case,
            "{}/{}".format(*each.widths),
            str(each.dtype).removeprefix("torch."),
            each.architecture,
            "{} x {}".format(*each.sides),
            each.warps,
            each.registers,
            each.spilled,
            each.shared,
        )
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def show(row: KernelRow) -> None:
    """Prints a call, where it is made, and a line for each situation."""
    print(f"{row.places}: {row.subject}")
    for situation, kernel, reason in row.choices:
        print(f"  {situation}: {kernel}")
        print(f"      because: {reason}")


if __name__ == "__main__":
    run_command(main, __doc__)
