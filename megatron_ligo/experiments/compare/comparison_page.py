"""Renders the page of a comparison: cautions, tables and curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from string import Template

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ligo.report.curves import COLOURS, STYLES

# Of arms that share a colour: single points show no line style.
MARKERS = ("o", "s", "^", "D")
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Growth compared</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .6rem 1rem .6rem 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
img { width: 100%; min-width: 52rem; height: auto; }
</style>
</head>
<body>
<h1>Growth compared</h1>
<p>$description</p>
<ul class="warning">$cautions</ul>
<h2>Loss at the end of each run, and FLOPs saved to the scratch run's final loss</h2>
$arms
<h2>Differences of loss (paired by seed, 95% interval)</h2>
$differences
$trends
$fits
<h2>Curves</h2>
<div class="wide"><img alt="Loss against FLOPs" src="data:image/png;base64,$picture"></div>
<div class="wide"><img alt="Training loss over whole runs" src="data:image/png;base64,$whole"></div>
<h2>How to read it</h2>
<ul>
<li>Each point is a run with a learning rate decayed to its end (with the wsd schedule, runs of one seed share what
comes before their decay); lines join the means over seeds, bars span
the seeds.</li>
<li>The last picture has the training losses of each arm's longest runs, smoothed, one line per seed; on the right,
their second half alone.</li>
<li>Saved: 1 - FLOPs / scratch's FLOPs, at scratch's final loss on the same seed, interpolated between two runs (loss
linear in log FLOPs). "At least": the smallest budget is already below that loss. Nothing is extrapolated.</li>
<li>Interval: the wider of Student's over the seeds and of a bootstrap of seeds and held-out samples together. Tie: it
contains 0.</li>
<li>A trend with the sign opposite to the difference: the gap fades as the budget grows.</li>
</ul>
</body>
</html>
""")


def render_page(results: dict, picture: bytes, whole: bytes) -> str:
    """Returns self-contained HTML. picture, whole: the PNGs of `draw_curves` and `draw_whole_runs`."""
    return PAGE.substitute(
        description=escape(describe_comparison(results)),
        cautions="".join(f"<li>{escape(line)}</li>" for line in results["cautions"]),
        arms=_table(arm_rows(results)),
        differences=_table(difference_rows(results)),
        trends=f"<h2>Trends with the budget</h2>{_table(trend_rows(results))}" if results["trends"] else "",
        fits=f"<h2>What each fit is worth</h2>{_table(fit_rows(results))}" if results["fits"] else "",
        picture=base64.b64encode(picture).decode("ascii"),
        whole=base64.b64encode(whole).decode("ascii"),
    )


def describe_comparison(results: dict) -> str:
    compare, small, held_out = results["settings"]["compare"], results["small"], results["held_out"]
    size = results["parameters"]["large"] / 1e6
    cost = "an unknown number of FLOPs"
    if small and small["flops"] is not None:
        cost = f"{small['flops']:.3g} FLOPs ({small['flops'] / results['unit_flops']:.2f} of the scratch run's)"
    more = [source for source in results["sources"][1:] if source["flops"] is not None]
    also = "".join(
        f"; {each['steps']} steps, seed {each['seed']}: {each['flops'] / results['unit_flops']:.2f}" for each in more
    )
    return (
        f"A model of {size:.3g}M parameters; scratch: {compare['scratch_steps']} steps, {results['unit_flops']:.3g} "
        f"FLOPs. Seeds {', '.join(map(str, compare['seeds']))}. The small model cost {cost}{also}. Losses are "
        f"measured on {held_out['samples']} held-out samples ({held_out['tokens']:,} tokens)."
    )


def arm_rows(results: dict) -> list[list[str]]:
    budgets = sorted({run["budget"] for arm in results["arms"].values() for run in arm["runs"]})
    head = ["arm", "peak rate", *(f"{budget:g} of scratch's FLOPs" for budget in budgets)]
    own_text = any(run["source_loss"] is not None for arm in results["arms"].values() for run in arm["runs"])
    head += ["saved, source free", "saved, source counted", "tokens of the longest run"]
    rows = [[*head, *["loss on the source's own text, longest run"] * own_text]]
    seeds = len(results["settings"]["compare"]["seeds"])
    for name, arm in results["arms"].items():
        cells = [_losses([run for run in arm["runs"] if run["budget"] == budget], seeds) for budget in budgets]
        rate = "-" if arm["lr"] is None else f"{arm['lr']:g}"
        rate += f", fit {arm['fit_lr']:g}" if arm["fit_lr"] is not None else ""
        saved = arm["saved"] if arm["grown"] else dict.fromkeys(arm["saved"], "-")
        cells += [saved["source_free"], saved["source_counted"]]
        longest = [run for run in arm["runs"] if run["budget"] == max(run["budget"] for run in arm["runs"])]
        cells.append(f"{max((run['tokens'] for run in longest), default=0):,}")
        if own_text:
            cells.append(_losses([{"loss": run["source_loss"]} for run in longest], seeds))
        rows.append([name, rate, *cells])
    return rows


def difference_rows(results: dict) -> list[list[str]]:
    rows = [["FLOPs", "arm", "against", "difference", "interval", "seeds", "the arm is"]]
    seeds = len(results["settings"]["compare"]["seeds"])
    for each in results["differences"]:
        known = each["low"] is not None
        interval = f"{each['low']:+.4f} to {each['high']:+.4f}" if known else "-"
        cells = [f"{each['budget']:g}", each["arm"], each["against"], f"{each['mean']:+.4f}", interval]
        count = f"{each['seeds']}" if each["seeds"] == seeds else f"{each['seeds']} of {seeds}"
        rows.append([*cells, count, each["verdict"]])
    return rows


def trend_rows(results: dict) -> list[list[str]]:
    rows = [["arm", "against", "change of the difference with each doubling of the budget"]]
    return rows + [[each["arm"], each["against"], f"{each['per_doubling']:+.4f}"] for each in results["trends"]]


def fit_rows(results: dict) -> list[list[str]]:
    rows = [["fit", "held-out loss after it", "FLOPs", "plain training from the same start has that loss after", ""]]
    for each in results["fits"]:
        plain, pays = "not within its runs", "it pays"
        if each["plain_flops"] is not None:
            plain = f"{each['plain_flops']:.3g} FLOPs ({each['plain_flops'] / results['step_flops']:.0f} steps)"
            pays = "it pays" if each["pays"] else "it does not pay"
        rows.append([each["arm"], f"{each['loss']:.4f}", f"{each['fit_flops']:.3g}", plain, pays])
    return rows


def _losses(runs: list[dict], seeds: int) -> str:
    """Formats mean and range, and the number of seeds if some are missing."""
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    if not losses:
        return "diverged" if runs else "-"
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
    few = f", {len(losses)} of {seeds} seeds" if len(losses) < seeds else ""
    return f"{sum(losses) / len(losses):.4f}{spread}{few}"


def _table(rows: Iterable[list[str]]) -> str:
    head, *body = rows
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def draw_curves(results: dict) -> bytes:
    """Draws a PNG: loss against FLOPs without the source's cost, and with it where it is known."""
    cost = results["small"]["flops"] if results["small"] else None
    figure = Figure(figsize=(13, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 if cost is None else 2, squeeze=False)[0]
    for axes, source, title in zip(panels, (0.0, cost), ("source free", "source counted"), strict=False):
        for number, (name, arm) in enumerate(results["arms"].items()):
            points = _curve(arm["runs"], source if arm["grown"] else 0.0)
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            spread = [[m - a for m, a in zip(y, low, strict=True)], [b - m for m, b in zip(y, high, strict=True)]]
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            axes.errorbar(x, y, yerr=spread, marker=marker, markersize=4, linewidth=1.4, capsize=3, label=name, **look)
        axes.set(xscale="log", xlabel="FLOPs, fit included", ylabel="held-out loss, nats per token")
        _widen(axes)
        axes.set_title(f"Final loss, {title}")
        axes.grid(alpha=0.25)
    _draw_legend(figure, panels[0])
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def draw_whole_runs(results: dict) -> bytes:
    """Draws a PNG: the training loss of each arm's longest runs against FLOPs, whole, and its second half."""
    figure = Figure(figsize=(13, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, begin, title in zip(panels, (0.0, 0.5), ("whole runs", "their second half"), strict=True):
        for number, (name, arm) in enumerate(results["arms"].items()):
            longest = max((run["budget"] for run in arm["runs"]), default=None)
            curves = [run.get("curve") for run in arm["runs"] if run["budget"] == longest]
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
            for seed, curve in enumerate(filter(None, curves)):
                shown = [point for point in curve if point[0] >= begin * curve[-1][0]]
                axes.plot(*zip(*shown, strict=True), linewidth=1.1, label=None if seed else name, **look)
        axes.set(xlabel="FLOPs, fit included", ylabel="training loss, smoothed", title=f"Training loss, {title}")
        axes.grid(alpha=0.25)
    if panels[0].lines:
        _draw_legend(figure, panels[0])
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_legend(figure: Figure, axes: Axes) -> None:
    """Draws the legend of a panel below all of them, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, edgecolor="none")


def _widen(axes: Axes) -> None:
    """Widens the x axis, so that arms of one budget, whose steps differ by rounding, do not look far apart."""
    low, high = axes.get_xlim()
    middle = (low * high) ** 0.5
    axes.set_xlim(min(low, middle / 2), max(high, middle * 2))


def _curve(runs: list[dict], source: float) -> list[tuple[float, float, float, float]]:
    """Returns (FLOPs, mean, lowest, highest loss) per budget."""
    points = []
    for budget in sorted({run["budget"] for run in runs}):
        ended = [run for run in runs if run["budget"] == budget and run["loss"] is not None]
        if ended:
            losses = [run["loss"] for run in ended]
            flops = sum(run["flops"] for run in ended) / len(ended)
            points.append((flops + source, sum(losses) / len(losses), min(losses), max(losses)))
    return points
