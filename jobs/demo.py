# SPDX-License-Identifier: Apache-2.0
"""Ray job: index, caption and show the 1,000 easy-VQA test images with the embedded captioner.

python -m jobs.demo demo [--where.root PATH_OR_URI] [flags]
"""

import json
import sys
from contextlib import nullcontext
from typing import Any

from jobs import _steps
from jobs._cli import main, parse, ray_session
from sg4v_ray.analysis.captions import write_report
from sg4v_ray.core.artifact import MANIFEST
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.where import Where
from sg4v_ray.recipes.line import Line


def demo(line: Line, where: Where) -> dict[str, Any]:
    """Run the line's indexing and captioning, write the report, and return its figures."""
    caption = line.caption
    if caption is None or len(line.questions) != 1:
        raise ConfigError("this recipe does not caption images of one set of questions; use `demo`")
    (questions,) = line.questions
    for index in line.images:
        _steps.index_images(index, where)
    _steps.index_questions(questions, where)
    done = where.storage.exists(f"{caption.out.path}/{MANIFEST}")
    with nullcontext() if done else ray_session():
        _steps.caption_images(caption, where)
    if done:
        print("All images were captioned before; nothing was captioned again.")
    return write_report(
        captions=caption.out, questions=questions.out, title="easy-VQA demo", where=where
    )


def run() -> None:
    """Run the demo with the flags of this process, and print what a person wants to know."""
    line, where = parse(__doc__, lambda line: line, sys.argv[1:])
    figures = demo(line, where)
    print(json.dumps(figures, indent=1))
    print(f"report:  {where.storage.uri('report.json')}")
    print(f"gallery: {where.storage.uri('gallery.html')}")


if __name__ == "__main__":
    main(run)
