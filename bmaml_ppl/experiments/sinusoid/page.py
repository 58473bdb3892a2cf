"""Puts the study's tables into pages: `python -m bmaml_ppl.experiments.sinusoid.page RESULTS PAGE ...`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmaml_ppl.experiments.sinusoid.tables import TABLES, format_headline

__all__ = ["fill_page"]


_TABLES = {**{name: (name, make) for name, make in TABLES.items()}, "headline": ("methods", format_headline)}
"""By mark: the part of the results, and what makes a table of its cells."""


def fill_page(page: str, results: Mapping[str, Any]) -> str:
    """The page with the tables of the results between its marks `<!-- NAME -->` and `<!-- end of NAME -->`.

    Args:
        page: Markdown.
        results: What `run_sinusoid` returns; a table whose part was not run, or that has no marks, stays as it is.
    """
    for name, (part, make) in _TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if part in results and begin in page:
            before, _, rest = page.partition(begin)
            _, _, after = rest.partition(end)
            page = f"{before}{begin}\n{make(results[part])}\n{end}{after}"
    return page


def _main(arguments: Sequence[str]) -> None:
    results = json.loads(Path(arguments[0]).read_text())
    for page in map(Path, arguments[1:]):
        page.write_text(fill_page(page.read_text(), results))


if __name__ == "__main__":
    _main(sys.argv[1:])
