"""A page of HTML that needs nothing else: no script, no font, no image from anywhere.

Text goes through `text`, which escapes it; only this module writes tags.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from wds_convnext.errors import printable

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5b5b66; --paper: #ffffff;
  --card: #f6f6f9; --line: #d9d9e2; --accent: #2f6fde; --second: #d9622b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e9ef; --soft: #a5a5b3; --paper: #131318;
  --card: #1d1d25; --line: #3a3a47; --accent: #6d9df5; --second: #f08c5b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; max-width: 46rem; } .soft { color: var(--soft); }
nav a { color: var(--accent); margin-right: .9rem; text-decoration: none; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .8rem; display: block; line-height: 1.35; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: .75rem; align-items: start; }
.chart svg { display: block; width: 100%; height: auto; } .chart { min-width: 0; }
.wide { overflow-x: auto; } .wide svg { display: block; height: auto; margin: 0; }
svg text { font-family: system-ui, sans-serif !important; text-rendering: geometricPrecision; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
td { overflow-wrap: normal; min-width: 3rem; }
th, td { text-align: left; padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; white-space: nowrap; }
.scroll { overflow: auto; } .long { max-height: 27rem; } .scroll th { position: sticky; top: 0;
  background: var(--paper); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .7rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .78rem; line-height: 1.3; }
img { display: block; width: 100%; aspect-ratio: 1; border-radius: .3rem; background: var(--card); }
img.small { image-rendering: pixelated; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(29rem, 100%), 1fr));
  gap: 0 2rem; }
.pair { display: grid; grid-template-columns: 9.5rem 1fr; gap: .2rem .9rem; padding: .55rem 0;
  border-bottom: 1px solid var(--line); }
.pair .grid { grid-template-columns: repeat(6, minmax(0, 3.9rem)); gap: .35rem; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } body { padding-inline: .9rem; } }
.right { color: var(--accent); } .wrong { color: var(--second); }
"""
_MAX_ROWS = 40  # of a table that stands in the page at its full height


class Picture(NamedTuple):
    """An image with what stands under it; the label in one color, the guess in another."""

    url: str
    label: str
    guess: str
    note: str
    title: str  # shown where the pointer rests


def text(value: object, *, limit: int = 200) -> str:
    """Any text as HTML that shows it: escaped, in one line, of limited length."""
    return html.escape(printable(str(value), limit=limit))


def page(title: str, subtitle: str, sections: Mapping[str, str], *, head: str = "") -> str:
    """A whole page.

    Args:
        sections: HTML by heading.
        head: HTML above the first heading.
    """
    names = [(f"s{number}", heading) for number, heading in enumerate(sections)]
    links = " ".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading in names)
    body = "\n".join(
        f'<section id="{name}"><h2>{text(heading)}</h2>\n{sections[heading]}</section>'
        for name, heading in names
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title><style>{_STYLE}</style></head><body>
<h1>{text(title)}</h1><p class="soft">{text(subtitle, limit=400)}</p><nav>{links}</nav>
{head}
{body}
</body></html>
"""


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Large numbers: by name the number, and what goes with it."""
    cells = (
        f'<div class="tile"><span>{text(name)}</span><b>{text(value)}</b>'
        f"<span>{text(note)}</span></div>"
        for name, (value, note) in values.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def charts(svgs: Iterable[str]) -> str:
    """SVGs next to each other where there is room."""
    return f'<div class="charts">{"".join(f"<div class=chart>{svg}</div>" for svg in svgs)}</div>'


def wide(svg: str, *, width: int) -> str:
    """An SVG that keeps its width in pixels, and is scrolled where there is no room for it."""
    sized = svg.replace("<svg", f'<svg style="width:{width}px"', 1)
    return f'<div class="wide">{sized}</div>'


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()
) -> str:
    """A table that scrolls where it is wide or long; `numbers` are columns aligned at the right."""
    kinds = [' class="n"' if i in numbers else "" for i in range(len(headings))]
    head = "".join(f"<th{kind}>{text(name)}</th>" for kind, name in zip(kinds, headings))
    body = [
        f"<tr>{''.join(f'<td{kind}>{text(cell)}</td>' for kind, cell in zip(kinds, row))}</tr>\n"
        for row in rows
    ]
    long = " long" if len(body) > _MAX_ROWS else ""
    return f'<div class="scroll{long}"><table><tr>{head}</tr>\n{"".join(body)}</table></div>'


def paragraph(words: str) -> str:
    return f'<p class="soft">{text(words, limit=2000)}</p>'


def pictures(shown: Iterable[Picture], *, is_small: bool) -> str:
    """A grid of pictures with their captions."""
    kind = ' class="small"' if is_small else ""
    cells = (
        f'<figure title="{text(p.title)}"><img{kind} src="{text_url(p.url)}" alt="{text(p.label)}">'
        f'<figcaption><span class="right">{text(p.label)}</span><br>'
        f'<span class="wrong">{text(p.guess)}</span> <span class="soft">{text(p.note)}</span>'
        "</figcaption></figure>"
        for p in shown
    )
    return f'<div class="grid">{"".join(cells)}</div>'


def pairs(rows: Iterable[str]) -> str:
    """Pairs of classes, in columns where there is room."""
    return f'<div class="pairs">{"".join(rows)}</div>'


def pair(words: str, note: str, urls: Iterable[str], *, is_small: bool) -> str:
    """Two classes that are confused, with some of the images."""
    kind = ' class="small"' if is_small else ""
    cells = "".join(f'<img{kind} src="{text_url(url)}" alt="">' for url in urls)
    return (
        f'<div class="pair"><div>{text(words)}<br><span class="soft">{text(note)}</span></div>'
        f'<div class="grid">{cells}</div></div>'
    )


def text_url(url: str) -> str:
    """A `data:` URL of this package's own making."""
    assert url.startswith("data:image/") and '"' not in url
    return url
