"""What mgq's HTML pages have in common: their frame and style, tables, drawings in the text itself, and escaping.

A page needs nothing else: no network, no script, no other file. Its policy forbids both to the browser, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mgq.errors import InputError, printable
from mgq.io.atomic import ensure_writable_folder

# Okabe and Ito's colours, told apart by the colour-blind, too; in the dark their lighter sisters.
BLUE, ORANGE, GREEN, GREY, RULE = "var(--blue)", "var(--orange)", "var(--green)", "var(--grey)", "var(--rule)"

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --dim: #59616a; --rule: #d5dae0; --soft: #f3f5f7;
  --blue: #0072B2; --orange: #D55E00; --green: #009E73; --grey: #59616a; --link: #00609a; --remark: #9a2a10; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e8ea; --dim: #a6aeb7;
  --rule: #39414a; --soft: #1e2329; --blue: #56B4E9; --orange: #F28E3C; --green: #35C29A; --grey: #a6aeb7;
  --link: #7cc4f0; --remark: #ff9d80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } p { margin: .3rem 0 .8rem; max-width: 50rem; }
.dim, figcaption, caption { color: var(--dim); } .remark { color: var(--remark); } a { color: var(--link); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-size: 13px; padding-bottom: .3rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); }
thead th { white-space: nowrap; border-bottom-color: var(--grey); vertical-align: bottom; }
td { white-space: nowrap; } th { font-weight: 600; } tbody th { font-weight: 400; min-width: 5rem; }
.name { text-align: left; } td.name { white-space: normal; min-width: 6rem; }
.scroll { overflow-x: auto; } .scroll svg { max-width: none; }
figure { margin: 0; } figcaption { font-size: 13px; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } svg { max-width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
code, pre { font: 13px/1.5 ui-monospace, monospace; } pre { background: var(--soft); padding: .6rem .8rem;
  overflow-x: auto; border-radius: 6px; margin: .3rem 0 .8rem; } summary { cursor: pointer; }
@media print { body { max-width: none; margin: 0; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; } pre { white-space: pre-wrap; } }
""".strip()


class Html(str):
    """HTML that is ready: it is not escaped again, as every other text is."""

    __slots__ = ()


def text(thing: object) -> str:
    """As it can stand in HTML, in text and in quoted attributes."""
    return thing if isinstance(thing, Html) else escape(printable(thing))


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """HTML 5, in itself complete, with ``style`` besides what all pages have."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{STYLE}\n{style}</style>"
    )
    inside = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{inside}\n</main></body></html>\n'


def check_page_path(path: Path, option: str = "--html") -> Path:
    """``path``, given by ``option``, if a page can be written there: found out before the work, which takes minutes.

    Raises InputError.
    """
    ensure_writable_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{option} {printable(path)} is a folder: give the name of a file")
    return path


# ---- tables ----


def table(caption: str, heads: Sequence[object], rows: Iterable[Sequence[object]], names: int = 1) -> str:
    """A table that scrolls where it is too wide. The first cell of a row is its head; ``names`` columns are words."""
    kinds = [' class="name"' if i < names else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{text(cell)}</th>' for cell, kind in zip(heads, kinds, strict=True))
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row"{kinds[0]}>{text(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    told = f"<caption>{text(caption)}</caption>"
    return make_scrollable(f"<table>{told}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>", caption)


def make_scrollable(inside: str, label: str) -> str:
    """``inside`` in a box that scrolls sideways, with the keyboard, too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{inside}</div>'


# ---- drawings ----


def svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    body = "".join(parts)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="img" aria-label="{text(label)}">{body}</svg>'


def draw_text(x: float, y: float, words: object, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = RULE) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def curve(points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    broken = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"{broken}/>'


def dot(x: float, y: float, colour: str, hint: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{text(hint)}</title></circle>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` at most, in steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) < most)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(most) if (first + i) * step <= high + 1e-9 * span]
