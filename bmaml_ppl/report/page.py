"""A self-contained HTML page: text is escaped unless it is already HTML, and nothing is fetched from anywhere."""

import base64
import html
from collections.abc import Iterable, Sequence
from string import Template
from typing import Any

__all__ = ["Html", "bullets", "code", "figure", "join", "number", "page", "paragraph", "section", "table"]


class Html(str):
    """Text that is HTML already; every other text is escaped where it enters a page."""


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<main>
<h1>$title</h1>
$lead
<nav aria-label="Contents">
<h2>Contents</h2>
<ol>
$contents
</ol>
</nav>
$body
</main>
</body>
</html>
""")

_STYLE = """:root { --text: #1a1a1a; --page: #ffffff; --soft: #f2f4f6; --line: #c9ced4; --link: #00568a; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #16181b; --soft: #23272c; --line: #4a5058; --link: #7cc4f5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin-top: 1.6rem; overflow-wrap: anywhere; }
nav h2 { font-size: 1rem; border: 0; margin: 0; }
nav { background: var(--soft); border-radius: .4rem; padding: .8rem 1rem; }
nav ol { columns: 16rem; margin: .4rem 0 0; }
a { color: var(--link); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; }
.text { min-width: 7rem; }
.number { text-align: right; white-space: nowrap; }
pre { background: var(--soft); border-radius: .4rem; padding: .8rem; overflow-x: auto; font-size: .85rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre code { overflow-wrap: normal; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: .5rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; max-width: 44rem; background: #ffffff; border-radius: .3rem; display: block; }
figcaption { font-size: .9rem; max-width: 44rem; overflow-wrap: anywhere; }
@media print {
  :root { --text: #000000; --page: #ffffff; --soft: #f4f4f4; --line: #999999; --link: #000000; }
  nav { display: none; }
  main { max-width: none; padding: 0; }
  pre { white-space: pre-wrap; }
  .scroll { overflow: visible; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
}"""


def page(title: str, lead: Html, sections: Iterable[tuple[str, str, Html]]) -> str:
    """The page.

    Args:
        title: Its heading.
        lead: What stands before the contents.
        sections: Identifier, heading and content of each section.
    """
    chosen = list(sections)
    return _PAGE.substitute(
        title=_escape(title),
        style=_STYLE,
        lead=lead,
        contents="\n".join(f'<li><a href="#{key}">{_escape(heading)}</a></li>' for key, heading, _ in chosen),
        body="\n".join(
            f'<section id="{key}">\n<h2>{_escape(heading)}</h2>\n{body}\n</section>' for key, heading, body in chosen
        ),
    )


def join(*parts: str, between: str = "\n") -> Html:
    """Parts one after another, those escaped that are not HTML."""
    return Html(between.join(_escape(part) for part in parts))


def section(heading: str, *parts: Html) -> Html:
    """A part of a section, under a heading of its own."""
    return Html(f"<h3>{_escape(heading)}</h3>\n{join(*parts)}")


def paragraph(*parts: str) -> Html:
    """A paragraph of text."""
    return Html(f"<p>{join(*parts, between=' ')}</p>")


def bullets(items: Iterable[str]) -> Html:
    """A list of texts."""
    return Html("<ul>\n" + "\n".join(f"<li>{_escape(item)}</li>" for item in items) + "\n</ul>")


def code(text: str, *, block: bool = False) -> Html:
    """Program text, within a line or as a block of lines that scrolls."""
    if not block:
        return Html(f"<code>{html.escape(text)}</code>")
    return Html(f'<pre tabindex="0"><code>{html.escape(text)}</code></pre>')


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table whose rows are headed by their first cell; numbers are shortened and stand on the right.

    Args:
        caption: What it shows.
        headers: Of the columns.
        rows: Cells, texts or numbers; None is not known.
    """
    filled = [list(row) for row in rows]
    numeric = [all(isinstance(row[i], int | float | None) for row in filled) for i in range(len(headers))]
    kinds = [f' class="{"number" if is_number else "text"}"' for is_number in numeric]
    head = "".join(f'<th scope="col"{kind}>{_escape(name)}</th>' for name, kind in zip(headers, kinds, strict=True))
    body = "\n".join(_row(row, kinds) for row in filled)
    # Narrow screens scroll the table, by keyboard too.
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(caption)}">\n<table>\n'
        f"<caption>{_escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        "</table>\n</div>"
    )


def _row(cells: Sequence[Any], kinds: Sequence[str]) -> str:
    first = f'<th scope="row"{kinds[0]}>{_cell(cells[0])}</th>'
    rest = "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(cells[1:], kinds[1:], strict=True))
    return f"<tr>{first}{rest}</tr>"


def _cell(value: Any) -> str:
    return _escape(number(value) if isinstance(value, float) else "–" if value is None else value)


def number(value: float) -> str:
    """A number with three significant digits, and all digits before the point."""
    if value != value:
        return "not defined"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def figure(png: bytes, alt: str, caption: str) -> Html:
    """A picture within the page.

    Args:
        png: Content of a PNG file.
        alt: What the picture shows, for those who cannot see it.
        caption: What stands below.
    """
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Html(
        f'<figure><img src="{source}" width="{width}" height="{height}" alt="{html.escape(alt)}">'
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _escape(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))
