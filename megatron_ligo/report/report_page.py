"""Renders the report as one self-contained HTML file."""

from __future__ import annotations

import base64
from html import escape
from string import Template

from megatron_ligo.report.report_table import HEADINGS, LOSSES, ReportTable

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Grown models: report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1400px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .6rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #888; }
tbody + tbody { border-top: 2px solid #888; }
.loss { text-align: right; background: #f2f6fa; font-variant-numeric: tabular-nums; }
td.figure { white-space: nowrap; }
img { width: 100%; min-width: 52rem; height: auto; }
</style>
</head>
<body>
<h1>Grown models: report</h1>
<p class="warning">$warning</p>
<h2>Runs</h2>
<div class="wide"><table>
<thead><tr>$head</tr></thead>
$bodies
</table></div>
<h2>Curves</h2>
<div class="wide"><img alt="Loss against steps, tokens, FLOPs and hours" src="data:image/png;base64,$picture"></div>
<h2>Notes</h2>
<ul>
$notes
</ul>
</body>
</html>
""")

# Columns whose cells stay on one line.
FIGURES = ("run", "tokens", "peak rate", "seconds", "tokens per second", "peak memory per rank")


def render_page(table: ReportTable, picture: bytes) -> str:
    """Renders the table, `picture` (PNG, embedded) and the notes as HTML."""
    return PAGE.substitute(
        warning=escape(table.warning),
        head="".join(_render_cell("th", heading, heading) for heading in HEADINGS),
        bodies="\n".join(_render_bodies(table)),
        picture=base64.b64encode(picture).decode("ascii"),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in table.notes),
    )


def _render_bodies(table: ReportTable) -> list[str]:
    """Renders one table body per evaluation set."""
    rows = iter(table.rows)
    bodies = []
    for size in table.groups:
        lines = "\n".join(_render_row(next(rows)) for _ in range(size))
        bodies.append(f"<tbody>\n{lines}\n</tbody>")
    return bodies


def _render_row(row: tuple[str, ...]) -> str:
    return f"<tr>{''.join(_render_cell('td', name, text) for name, text in zip(HEADINGS, row, strict=True))}</tr>"


def _render_cell(tag: str, heading: str, text: str) -> str:
    kind = ' class="loss"' if heading in LOSSES else ' class="figure"' if heading in FIGURES else ""
    # No line breaks within "(N = 100)".
    return f"<{tag}{kind}>{escape(text).replace(' = ', '&nbsp;=&nbsp;')}</{tag}>"
