"""python -m scripts.bench attention [tokens=8192] [heads=8] [ranks=2] ...: what sharing costs; JSON lines and a table.

Forward and backward, beside one device with as many threads; medians of alternated runs. Further words: kv_heads, width,
threads (of a rank), repeats, seed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

from parallel.bench import measure, parse
from parallel.launch import initialise, start, within_torchrun

COLUMNS = "name", "layout", "tokens", "ms", "against one", "by cpu", "sent MB", "formula", "balance", "peak MB"


def table(rows: list[dict]) -> str:
    """Rows as text.

    `against one` is time in units of the first row of the section. `by cpu` is the same by processor time, the busiest rank
    against the one device's share for each thread: what the ratio would be on a machine that does nothing else.
    """
    lines, first = [], {}
    for row in rows:
        if row["section"] not in first:
            first[row["section"]] = row["seconds"], row["processor_seconds"] / row["ranks"]
            lines += ["", row["section"], "  ".join(f"{c:>11}" if i else f"{c:24}" for i, c in enumerate(COLUMNS))]
        one, share = first[row["section"]]
        own = row["processor_seconds"] / (row["ranks"] if row["alone"] else 1)
        sent, formula = row.get("sent_bytes"), row.get("formula_bytes")
        cells = [
            row["name"], row.get("layout", ""), row["tokens"], f"{1e3 * row['seconds']:.0f}",
            f"{row['seconds'] / one:.3f}", f"{own / share:.3f}",
            f"{max(sent) / 1e6:.2f}" if sent else "", "" if sent is None else "equal" if sent == formula else "DIFFERS",
            f"{row['balance']:.3f}" if "balance" in row else "", f"{(row['peak_bytes'] or 0) / 1e6:.0f}",
        ]  # fmt: skip
        lines.append("  ".join(f"{c:>11}" if i else f"{c:24}" for i, c in enumerate(cells)))
    return "\n".join(lines)


def main(words: list[str]) -> int:
    if words[:1] != ["attention"]:
        print("what is measured is the first word: python -m scripts.bench attention", file=sys.stderr)
        return 2
    try:
        sizes = parse(words[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not within_torchrun():
        with tempfile.TemporaryDirectory() as folder:
            outcome = start(["-u", "-m", "scripts.bench", *words], ranks=sizes.ranks, scratch=Path(folder) / "ranks")
        print(outcome.message, file=sys.stderr)
        return outcome.code
    ranks, rows = initialise(), []
    load = os.getloadavg()[0]
    for row in measure(sizes, dist.group.WORLD):
        rows.append(row)
        if ranks.rank == 0:
            print(json.dumps(row), flush=True)
    if ranks.rank == 0:
        print(table(rows), f"\nload of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after (1 = one busy core)")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
