"""Joins the --json files of several benchmarks: OUT.json with all rows, OUT.md with one table and the commands.

python benchmarks/collect.py benchmarks/results/cpu_2026-01-31 nms.json roi_align.json ...
"""

import json
import sys
from pathlib import Path

COLUMNS = ("op", "shape", "dtype", "ours_ms", "rival", "rival_ms", "speedup", "floor_ms", "max_error")


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    out, parts = Path(sys.argv[1]), [json.loads(Path(p).read_text()) for p in sys.argv[2:]]
    machine = parts[0]["machine"]
    rows = [row for part in parts for row in part["rows"]]
    out.with_suffix(".json").write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    commands = ", ".join(
        f"`python benchmarks/{Path(p).stem}_bench.py --device {rows[0]['device']}`" for p in sys.argv[2:]
    )
    lines = [f"# {', '.join(f'{k} {v}' for k, v in machine.items())}", "", f"Commands: {commands}.", ""]
    lines += [
        "Times are medians of alternating calls in one run; floor: bytes moved once, or FLOP, at measured rates.",
        "",
    ]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(str(row[c]) for c in COLUMNS)} |" for row in rows]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
