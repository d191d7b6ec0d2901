"""Tables for people, as one HTML page that needs nothing beside it: bars and histograms are drawn by the page itself."""

from __future__ import annotations

import html
import json
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

BINS = 40
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 150, 46, 22  # of a histogram, in pixels, and the room for its axes


@dataclass
class Section:
    """A table, which the terminal and the page show alike; `plot` is drawn on the page alone.

    plot: a Counter has its counts as bars in its rows (the first column are its keys); numbers are drawn as a histogram.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    plot: Counter[Any] | array[int] | None = None


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --bar: #3b7dd8; --soft: #8882; }}
body {{ font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em; margin-bottom: 0; }}
h2 {{ font-size: 1.05em; margin: 0 0 .5em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(30em, 1fr)); gap: 1.2em; margin-top: 1.2em; }}
section {{ border: 1px solid var(--line); border-radius: 8px; padding: .9em 1.1em; overflow-x: auto; }}
section.wide {{ grid-column: 1 / -1; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ padding: .15em .8em .15em 0; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.bar {{ width: 45%; padding-right: 0; }}
td.bar div {{ background: var(--bar); height: .8em; min-width: 1px; border-radius: 2px; }}
svg {{ max-width: 100%; height: auto; margin-top: .6em; }}
svg rect {{ fill: var(--bar); }}
svg text {{ font: 11px system-ui, sans-serif; fill: currentColor; }}
svg line {{ stroke: currentColor; stroke-opacity: .4; }}
article {{ border-top: 1px solid var(--line); padding: .6em 0; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0; padding: .5em .7em; background: var(--soft);
  border-radius: 6px; font: inherit; max-height: 18em; overflow-y: auto; }}
small {{ opacity: .7; }}
</style>
<h1>{title}</h1>
<main>
{sections}
</main>
</html>
"""


def page(title: str, sections: list[Section], sample: list[dict[str, Any]], kind: str) -> str:
    """The page; `sample` are canonical records, shown as texts."""
    shown = [_section(section) for section in sections]
    records = "\n".join(f"<article>{_record(record, kind)}</article>" for record in sample)
    shown.append(f'<section class="wide"><h2>sample</h2>\n{records}</section>')
    return PAGE.format(title=html.escape(title), sections="\n".join(shown))


def _section(section: Section) -> str:
    bars = isinstance(section.plot, Counter) and section.plot
    numeric = [
        bool(section.rows) and all(_is_number(row[n]) for row in section.rows) for n in range(len(section.columns))
    ]
    head = "".join(f"<th{_kind(number)}>{html.escape(name)}</th>" for name, number in zip(section.columns, numeric))
    most = max(section.plot.values(), default=1) if isinstance(section.plot, Counter) else 1
    rows = []
    for row in section.rows:
        cells = "".join(f"<td{_kind(number)}>{html.escape(_cell(value))}</td>" for value, number in zip(row, numeric))
        if isinstance(section.plot, Counter):
            share = 100 * section.plot[row[0]] / most
            cells += f'<td class="bar"><div style="width:{share:.1f}%"></div></td>'
        rows.append(f"<tr>{cells}</tr>")
    table = (
        f"<table><tr>{head}{'<th></th>' if bars else ''}</tr>\n" + "\n".join(rows) + "</table>"
        if rows
        else "<p>none</p>"
    )
    drawn = histogram(section.plot) if isinstance(section.plot, array) else ""
    return f"<section><h2>{html.escape(section.title)}</h2>\n{table}\n{drawn}</section>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and value.endswith(" %")) or value == ""


def _kind(number: bool) -> str:
    return ' class="number"' if number else ""


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def histogram(numbers: array[int]) -> str:
    """An SVG picture. The last bin takes all above the 99th percentile, so that one long text does not flatten the rest."""
    ordered = sorted(numbers)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    width = max(1, -(-(high - low + 1) // BINS))
    bins = [0] * min(BINS, (high - low) // width + 1)
    for number in ordered:
        bins[min((number - low) // width, len(bins) - 1)] += 1
    most, step = max(bins), (WIDTH - LEFT) / len(bins)
    floor = HEIGHT - BOTTOM
    bars = "".join(
        f'<rect x="{LEFT + n * step:.1f}" y="{floor - height:.1f}" width="{max(step - 1, 0.5):.1f}" height="{height:.1f}">'
        f"<title>{_range(low + n * width, width, n == len(bins) - 1 and ordered[-1])}: {count:,}</title></rect>"
        for n, count in enumerate(bins)
        for height in [(floor - 12) * count / most]
    )
    marks = sorted({0, len(bins) // 4, len(bins) // 2, 3 * len(bins) // 4, len(bins) - 1})
    anchors = {len(bins) - 1: "end", 0: "start"}  # so that no label hangs over the edge
    labels = "".join(
        f'<text x="{LEFT + (n + (n == len(bins) - 1)) * step:.1f}" y="{HEIGHT - 6}" text-anchor="{anchors.get(n, "middle")}">'
        f"{low + n * width:,}{'+' if n == len(bins) - 1 and ordered[-1] > low + (n + 1) * width - 1 else ''}</text>"
        for n in marks
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="histogram">{bars}{labels}'
        f'<line x1="{LEFT}" y1="{floor}" x2="{WIDTH}" y2="{floor}"/>'
        f'<text x="{LEFT - 6}" y="20" text-anchor="end">{most:,}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">0</text></svg>'
    )


def _range(start: int, width: int, last: int | bool) -> str:
    end = max(start + width - 1, last) if last else start + width - 1
    return f"{start:,}" if end == start else f"{start:,} to {end:,}"


def _record(record: dict[str, Any], kind: str) -> str:
    """Prompt and answers as texts, rankings from the best; other fields, and what the kind does not name, on one line."""
    parts = []
    prompt = record.get("prompt", record.get("text"))
    turns = [("", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt or []]
    parts += [f"{_small(role or ('prompt' if 'prompt' in record else 'text'))}{_pre(text)}" for role, text in turns]
    if kind == "demonstrations":
        parts.append(f"{_small('completion')}{_pre(record['completion'])}")
    if kind == "comparisons":
        for rank, text in sorted(zip(record["ranks"], record["completions"]), key=lambda both: both[0]):
            parts.append(f"{_small(f'rank {rank}')}{_pre(text)}")
    shown = {"prompt", "text"}
    shown |= {"demonstrations": {"completion"}, "comparisons": {"completions", "ranks"}}.get(kind, set())
    rest = {name: value for name, value in record.items() if name not in shown}
    if rest:
        parts.append(_small(json.dumps(rest, ensure_ascii=False, default=str)))
    return "\n".join(parts)


def _small(text: str) -> str:
    return f"<small>{html.escape(text)}</small>"


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text.strip())}</pre>"
