"""Puts the study's tables into its page: `python -m bmaml_ppl.experiments.sinusoid.page RESULTS PAGE`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmaml_ppl.experiments.sinusoid.tables import TABLES

__all__ = ["fill_page"]


def fill_page(page: str, results: Mapping[str, Any]) -> str:
    """The page with the tables of the results between its marks `<!-- NAME -->` and `<!-- end of NAME -->`.

    Args:
        page: Markdown.
        results: What `run_sinusoid` returns; a table whose part was not run stays as it is.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if name in results:
            before, _, rest = page.partition(begin)
            _, _, after = rest.partition(end)
            page = f"{before}{begin}\n{make(results[name])}\n{end}{after}"
    return page


def _main(arguments: Sequence[str]) -> None:
    results, page = map(Path, arguments)
    page.write_text(fill_page(page.read_text(), json.loads(results.read_text())))


if __name__ == "__main__":
    _main(sys.argv[1:])
