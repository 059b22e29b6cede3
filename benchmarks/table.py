"""Print a run's figures as a Markdown table: python benchmarks/table.py runs/NAME/result.json."""

from __future__ import annotations

import json
import sys

COLUMNS = {
    "evaluations": ("evaluations", "{:d}"),
    "frechet": ("Fréchet", "{:.1f}"),
    "joint": ("joint accuracy", "{:.3f}"),
    "flow": ("flow, px/frame", "{:.2f}"),
    "dynamic_degree": ("dynamic degree", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "coverage_entropy": ("coverage entropy", "{:.3f}"),
}


def main() -> None:
    """Read the file named on the command line and print its table."""
    with open(sys.argv[1], encoding="utf-8") as file:
        result = json.load(file)
    print("| sampler | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for row in result["rows"]:
        cells = ["" if row[k] is None else form.format(row[k]) for k, (_, form) in COLUMNS.items()]
        print(f"| {row['title']} | " + " | ".join(cells) + " |")
    print(f"\nGap closed: {json.dumps(result['gap_closed'])}")


if __name__ == "__main__":
    main()
