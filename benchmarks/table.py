"""Print a run's figures as a Markdown table: python benchmarks/table.py runs/NAME/result.json."""

from __future__ import annotations

import json
import sys

from raydmd.evaluation.table import ARROWS, column

FORMS = {
    "evaluations": "{:d}",
    "frechet": "{:.1f}",
    "joint": "{:.3f}",
    "flow": "{:.2f}",
    "dynamic_degree": "{:.3f}",
    "diversity": "{:.3f}",
    "coverage_entropy": "{:.3f}",
}


def main() -> None:
    """Read the file named on the command line and print its table."""
    with open(sys.argv[1], encoding="utf-8") as file:
        result = json.load(file)
    found = [column(key) for key in FORMS]
    print("| sampler | " + " | ".join(c.label + ARROWS.get(c.better or "", "") for c in found if c) + " |")
    print("|---|" + "---|" * len(FORMS))
    for row in result["rows"]:
        cells = ["" if row[k] is None else form.format(row[k]) for k, form in FORMS.items()]
        print(f"| {row['title']} | " + " | ".join(cells) + " |")
    print(f"\nGap closed: {json.dumps(result['gap_closed'])}")


if __name__ == "__main__":
    main()
