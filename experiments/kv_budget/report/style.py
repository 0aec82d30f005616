"""The style sheet of the HTML report; the pictures take the variables named in `drawing.py`."""

from collections.abc import Sequence

from experiments.harness import palette
from experiments.kv_budget.report import text_map


def _series(colors: Sequence[str]) -> str:
    return " ".join(f"--series{i}: {color};" for i, color in enumerate(colors))


_COLORS = f"""
:root {{
  color-scheme: light dark;
  --paper: #ffffff; --soft: #f3f5f8; --mark: #c2410c;
  --ink: {palette.INK}; --muted: {palette.MUTED}; --grid: {palette.GRID};
  {_series(palette.SERIES)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #12171e; --soft: #1b222c; --mark: #ff9d5c;
    --ink: {palette.DARK_INK}; --muted: {palette.DARK_MUTED}; --grid: {palette.DARK_GRID};
    {_series(palette.DARK_SERIES)}
  }}
}}
"""

CSS = (
    _COLORS
    + """\
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 53rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
.verdict { border-left: .25rem solid var(--series0); background: var(--soft); padding: .6rem .9rem; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; max-width: 38rem; height: auto; margin: 0 auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit !important; }
figcaption, .caption { color: var(--muted); font-size: .92rem; margin: .5rem 0; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; overflow-wrap: normal; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: nowrap; }
tbody th { font-weight: 600; min-width: 8.5rem; }
tbody th, .answers td { overflow-wrap: anywhere; }
th, td { text-align: left; }
.figures th:first-child { position: sticky; left: 0; background: var(--paper); }
.figures td, .figures thead th + th { text-align: right; }
.figures td { white-space: nowrap; font-variant-numeric: tabular-nums; }
blockquote, pre {
  margin: 1rem 0; padding: .7rem .9rem; background: var(--soft); border-radius: .3rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto;
}
pre { font-size: .85rem; }
"""
    + text_map.CSS
)
