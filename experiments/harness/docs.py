"""Tables and plots of the results that are kept in `docs/results`, written into `docs/results.md`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.harness import files, palette, runs
from experiments.harness.statistics import Interval, crossed_interval, paired_interval

RESULTS, PAGE = Path("docs/results"), Path("docs/results.md")
TWO_DECADES = 100
WIDE = 20  # times the least value, from which on an axis is logarithmic
HEAD = """# Results

Written by `python -m experiments.harness docs` from the files in `docs/results`; do not edit. Means
over the seeds, and differences of two arms with their paired 95 % interval by Student's t: what shares
a seed shares its first parameters and the order of its data. Where runs kept the figure of each held-out
case, the interval covers the sample of cases as well as that of seeds. A difference whose interval holds
zero is none that these runs can show (–).
"""


def write(folder: Path = RESULTS, page: Path = PAGE) -> list[Path]:
    """The page and a picture for each file of results.

    Returns:
      What was written.

    Raises:
      ValueError: no files, or one that is no file of results.
    """
    reports = runs.read_all(folder)
    if not reports:
        raise ValueError(
            f"{folder} holds no *.json with runs: run an experiment with --json there first"
        )
    contents: dict[Path, bytes] = {}
    parts, written = [HEAD], []
    for path, report in reports.items():
        picture = path.with_suffix(".png")
        if len({run["seed"] for run in report["runs"]}) > 1:  # else the table says it all
            contents[picture] = draw(report)
            written.append(picture)
        parts.append(section(report, picture.relative_to(page.parent), picture in written))
    files.write_together(contents | {page: "\n".join(parts).encode()})
    return [page, *written]


def section(report: Mapping[str, Any], picture: Path, drawn: bool) -> str:
    """Title, command, tables and picture of one experiment."""
    lines = [f"## {title_of(report)}", "", *report.get("notes", [])]
    lines += ["", f"    {report['command']}", ""]
    lines += [*means(report), ""]
    lines += differences(report)
    if drawn:
        lines += ["", f"![{title_of(report)}: every seed's figures by arm]({picture.as_posix()})"]
    lines.append("")
    for name, about in report.get("pictures", {}).items():
        lines += [f"![{about}]({(picture.parent / name).as_posix()})", ""]
    return "\n".join(lines)


def title_of(report: Mapping[str, Any]) -> str:
    """Of its section."""
    return report.get("title") or report["experiment"].replace("_", " ").capitalize()


def arms_of(report: Mapping[str, Any]) -> list[str]:
    """In the order of their first runs."""
    return list(dict.fromkeys(run["arm"] for run in report["runs"]))


def names_of(report: Mapping[str, Any]) -> list[str]:
    """Of the figures of any arm."""
    return list(dict.fromkeys(name for run in report["runs"] for name in run["figures"]))


def means(report: Mapping[str, Any]) -> list[str]:
    """A table: each arm's means, and the baselines."""
    names = names_of(report)
    lines = [_row(["arm", "seeds", *names]), _row(["---"] * (len(names) + 2))]
    for arm in arms_of(report):
        values = [runs.figures_of(report, arm, name) for name in names]
        cells = (number(float(np.mean(v))) if v else "" for v in values)
        lines.append(_row([arm, str(max(map(len, values))), *cells]))
    for name, known in report.get("baselines", {}).items():
        figures = (number(known[figure]) if figure in known else "" for figure in names)
        lines.append(_row([f"*{name}*", "", *figures]))
    return lines


def differences(report: Mapping[str, Any]) -> list[str]:
    """A table: the differences of the pairs of arms that the report names."""
    names, lines = names_of(report), []
    for ours, theirs in report.get("compare", []):
        cells = []
        for name in names:
            apart = difference(report, ours, theirs, name)
            if apart is None:
                cells.append("")
                continue
            mark = "" if apart.excludes_zero else " –"
            cells.append(f"{apart.mean:+.3g} ± {apart.half:.2g}{mark}")
        if any(cells):
            lines.append(_row([f"{ours} less {theirs}", *cells]))
    if lines:
        lines = [_row(["difference", *names]), _row(["---"] * (len(names) + 1)), *lines]
    return lines


def difference(report: Mapping[str, Any], ours: str, theirs: str, name: str) -> Interval | None:
    """Of a figure of two arms: over seeds and cases where the runs kept the cases, else over seeds."""
    of_ours, of_theirs = (runs.cases_of(report, arm, name) for arm in (ours, theirs))
    if of_ours is not None and of_theirs is not None and of_ours.shape == of_theirs.shape:
        return crossed_interval(of_ours, of_theirs)
    values, others = (runs.figures_of(report, arm, name) for arm in (ours, theirs))
    if len(values) != len(others) or len(values) < 2:
        return None
    return paired_interval(values, others)


def number(value: float) -> str:
    """Three or four digits."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(report: Mapping[str, Any]) -> bytes:
    """A PNG, a panel for each figure: a point for each seed, a bar for the mean, baselines as lines.

    Figures that are the same in all runs stay in the table; large ranges have a logarithmic axis.
    """
    arms = arms_of(report)
    every = {
        name: [x for arm in arms for x in runs.figures_of(report, arm, name)]
        for name in names_of(report)
    }
    names = [name for name, values in every.items() if min(values) < max(values)] or list(every)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    height = 0.7 + rows * (0.75 + 0.24 * len(arms))
    figure = Figure(figsize=(3.3 * columns, height), layout="constrained", dpi=120)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    drawn = dict(zip(report.get("drawn", []), ("--", ":", "-."), strict=False))
    shown: dict[str, Any] = {}
    for panel, name in zip(panels.flat, names, strict=False):
        for i, arm in enumerate(arms):
            values = runs.figures_of(report, arm, name)
            colour = palette.SERIES[i % len(palette.SERIES)]
            panel.plot(values, [i] * len(values), "o", color=colour, alpha=0.5, markersize=5)
            if values:
                panel.plot([np.mean(values)], [i], "|", color=colour, markersize=16, mew=2.5)
        for line, dashes in drawn.items():
            known = report["baselines"][line]
            if name in known:
                style: dict[str, Any] = {
                    "color": palette.MUTED,
                    "linewidth": 1,
                    "linestyle": dashes,
                }
                shown[line] = panel.axvline(known[name], **style)
        panel.set_title(name, fontsize=10)
        if min(every[name]) > 0 and max(every[name]) > WIDE * min(every[name]):
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
            if max(every[name]) < TWO_DECADES * min(every[name]):
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_yticks(range(len(arms)), arms, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", color=palette.GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(len(arms) - 0.5, -0.5)
    if shown:
        figure.legend(shown.values(), shown, loc="outside lower right", fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()
