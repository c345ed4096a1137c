# SPDX-License-Identifier: Apache-2.0
"""List the jobs with a line each: `python -m jobs`."""

import ast
from pathlib import Path

from sg4v_ray.recipes.catalogue import RECIPES


def listing() -> str:
    """Return the text that `python -m jobs` prints; no job is imported for it."""
    lines = ["Jobs (python -m jobs.VERB --help; most take the name of a recipe first):"]
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        lines.append(f"  {file.stem:18} {doc.splitlines()[0].removeprefix('Ray job: ')}")
    lines.append("Recipes:")
    for name, make in RECIPES.items():
        lines.append(f"  {name:26} {(make.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
