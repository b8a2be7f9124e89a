"""Prints the tables of all complete runs below a folder, seeds as mean and standard deviation.

python tables.py [runs]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import cli
from cli import cell, explain, files_below, markdown, read_json


def merge_seeds(rows: Sequence[dict]) -> dict:
    """Rows as one: numbers that vary as mean ± sample standard deviation, blank what one lacks."""
    merged = dict(rows[0])
    if len(rows) > 1:
        merged["run"] = ", ".join(row["run"] for row in rows) + " (mean ± sd)"
    for column in merged.keys() - {"run"}:
        values = [row.get(column) for row in rows]
        if None in values:
            merged[column] = None
        elif len(set(map(str, values))) > 1:
            merged[column] = f"{cell(float(np.mean(values)))} ± {np.std(values, ddof=1):.2g}"
    return merged


def main() -> None:
    """Rows share a line if but for the seed their settings, marks, place and words are equal."""
    parser = argparse.ArgumentParser(description="Prints the tables of all runs below a folder.")
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"))
    folder, tables = parser.parse_args().runs, {}  # {(stage, title): {what is equal: rows}}
    for path in files_below(folder, "result.json"):
        result, settings = read_json(path), read_json(path.with_name("settings.json"))
        run = {"run": path.parent.relative_to(folder).as_posix()}
        with explain(f"{path} is no stage's result"):
            run["marks"] = ", ".join(result["marks"])
            for title, rows in result["tables"].items():
                table = tables.setdefault((str(result["stage"]), title), {})
                for place, row in enumerate(rows):
                    words = [value for value in row.values() if isinstance(value, str)]
                    same = [{**settings, "seed": None}, run["marks"], place, words]
                    equal = table.setdefault(json.dumps(same, sort_keys=True), [])
                    equal.append({**run, **row})
    if not tables:
        raise cli.UserError(f"no run below {folder} is complete")
    for (stage, title), table in sorted(tables.items(), key=lambda x: x[0][0]):
        print(markdown(f"{stage}.py: {title}", [*map(merge_seeds, table.values())]))


if __name__ == "__main__":
    cli.run(main)
