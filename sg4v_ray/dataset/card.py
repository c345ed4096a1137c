# SPDX-License-Identifier: Apache-2.0
"""The card of a dataset: what it is made of and what was left out, for people."""

from collections.abc import Mapping


def card(name: str, inputs: Mapping[str, str], counts: Mapping[str, int]) -> str:
    """Return a Markdown page.

    Args:
        inputs: fingerprints of the artifacts it is made from.
        counts: `samples`, `turns`, `samples_<source>`, `left_out_<reason>`.
    """
    lines = [f"# {name}", "", f"{counts['samples']} conversations, {counts['turns']} turns.", ""]
    lines += ["| made from | fingerprint |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in inputs.items()]
    for title, prefix in (("source", "samples_"), ("left out because", "left_out_")):
        rows = [
            (key.removeprefix(prefix), n) for key, n in counts.items() if key.startswith(prefix)
        ]
        if rows:
            lines += ["", f"| {title} | rows |", "|---|---|"]
            lines += [f"| {key} | {number} |" for key, number in sorted(rows)]
    return "\n".join(lines) + "\n"
