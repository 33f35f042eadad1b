"""Draws the paper's Figures 2 to 7 from runs, methods side by side, and recovery against retention.

    python data/results/figures.py runs/gd-tiny runs/ssiuu-tiny --out runs/figures
    python data/results/figures.py --table data/results/tiny/table.json --out runs/figures

A run's folder holds result.json and log.jsonl (ssiuu.py), for Figures 3 to 6 analysis.json (evaluate.py
--before --after), and for the causal test beyond.json (beyond_paper.py). A picture for which no run has the
numbers is skipped.
"""
import argparse
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import Bbox
except ImportError:
    Figure = None  # optional: main() says so in one line

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]

from attack import summary  # noqa: E402
from evaluate import run as run_command  # noqa: E402
from model import Count, check, read_json, refuse, refusing, wanted  # noqa: E402
from ssiuu import Percent, read_log  # noqa: E402
from tables import read_table  # noqa: E402

# Okabe and Ito's colours, and grey; their black stands for the model before unlearning.
COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")  # 8 and 9 have no common divisor: 72 pairs
RETENTION, RECOVERY = "RS", "Harmful p = 0.3"            # columns of --table
UNITS = "in units of P"                                   # of attributions and of their variation


def holding(words: str, kinds: dict):
    """The type of an object that holds these kinds under these keys."""
    def fits(x: dict) -> bool:
        return not any(wanted(x.get(key), kind) for key, kind in kinds.items())
    return Annotated[dict, (words, fits)]

def each(words: str, kind, keys: tuple[str, ...] = ()):
    """The type of an object all of whose values are of a kind, and keys, if these are given, of `keys`."""
    return Annotated[dict, (words, lambda x: not any(wanted(y, kind) for y in x.values())
                            and x.keys() <= {*(keys or x)})]

def even(words: str, kind):
    """The type of an object of a kind, whose values are lists of one length."""
    return Annotated[dict, (words, lambda x: not wanted(x, kind) and len({*map(len, x.values())}) == 1)]

NUMBERS = tuple[float, ...]
TRIPLE = Annotated[list, ("[value, low, high]", lambda x: len(x) == 3 and not wanted(x, NUMBERS))]
SCORES = tuple[Percent, ...]
MODULES = even("a number a block for each module", each("lists of numbers", NUMBERS))
MODELS = ("before", "after", "attacked")
RANKS = even("lists of one length", holding("an object", {"rank": NUMBERS, "max": NUMBERS, "min": NUMBERS}))
PAIRS = each("max and min of each pair", holding("an object", {"max": TRIPLE, "min": TRIPLE}))
RESULT = {"settings.method": str, "settings.lam": float | None, "after.RS": Percent}
ANALYSIS = {"n": Count, "variation.m": Count, "variation.neurons": Count, "variation.D_pos": TRIPLE,
            "variation.D_neg": TRIPLE, "by_module.D_pos": MODULES, "by_module.D_neg": MODULES,
            "variation.curves": even("lists of one length", holding("an object", {
                "m": NUMBERS, "D_pos": NUMBERS, "D_neg": NUMBERS})),
            "attribution": each("rank, max and min of before, after, attacked", RANKS, MODELS),
            "attribution.before": RANKS, "attribution.after": RANKS, "correlation": PAIRS,
            "checkpoints.before.lens": SCORES, "checkpoints.after.lens": SCORES}
CAUSAL = holding("m, FS and random_FS", {"m": Count, "FS": Percent, "random_FS": Percent})
BEYOND = {"n": Count, "causal": tuple[CAUSAL, ...]}

# ------------------------------------------------------------------------------------------- the runs

@dataclass
class Run:
    """What a folder holds; analysis and beyond are {} where they were not made."""
    name: str
    colour: str
    marker: str
    settings: dict
    after: dict
    attacks: dict
    cells: list[dict]
    analysis: dict
    beyond: dict

def check_layout(value, layout: dict, where: Path | str, made_by: str) -> None:
    """ValueError where `value` lacks a path of keys, "variation.curves.m", or holds another type there."""
    for keys, kind in layout.items():
        found = value
        for key in keys.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if expected := wanted(found, kind):
            raise ValueError(f"{where}: {keys} is {found!r:.60}, expected {expected}, as {made_by} writes it")

def read_optional(path: Path, layout: dict, made_by: str) -> dict:
    if not path.is_file():
        return {}
    value = read_json(path)
    check_layout(value, layout, path, made_by)
    return value

def read_run(folder: Path, colour: str, marker: str) -> Run:
    path = folder / "result.json"
    if path.is_file() or not (folder / "analysis.json").is_file():
        result = read_json(path)
        check_layout(result, RESULT, path, "ssiuu.py")
    else:  # a checkpoint that another tool unlearned
        result = {"settings": {"method": folder.resolve().name}, "after": {}}
    attacks = result.get("attacks", {})
    check_layout({"attacks": attacks}, {"attacks": dict}, path, "ssiuu.py")
    possible = {label: score for label, score in attacks.items()
                if not (isinstance(score, dict) and "why" in score)}
    for label, score in possible.items():
        check(score, Percent, f"{path}: {label} is")
    return Run("", colour, marker, result["settings"], result["after"], possible,
               [r for r in read_log(folder / "log.jsonl") if r["kind"] in ("harmful", "benign")],
               read_optional(folder / "analysis.json", ANALYSIS, "evaluate.py --before --after"),
               read_optional(folder / "beyond.json", BEYOND, "beyond_paper.py"))

def read_runs(folders: list[str]) -> list[Run]:
    runs = []
    for i, folder in enumerate(folders):
        runs.append(read_run(Path(folder), COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]))
    for run, name in zip(runs, names(runs, folders)):
        run.name = name
    return runs

def names(runs: list[Run], folders: list[str]) -> list[str]:
    """The method; with lambda where that tells runs of a method apart; else the folder, or its path."""
    methods = [run.settings["method"].upper() for run in runs]
    with_lam = [f"{method} λ={run.settings.get('lam') or 0:g}" for method, run in zip(methods, runs)]
    found = []
    for method, longer, folder in zip(methods, with_lam, folders):
        if Counter(methods)[method] == 1:
            found.append(method)
        elif Counter(with_lam)[longer] == 1:
            found.append(longer)
        else:
            same = Counter(Path(other).name for other in folders)[Path(folder).name] > 1
            found.append(folder if same else Path(folder).name)
    return [plain(name) for name in found]

def plain(name: str) -> str:
    """The name as matplotlib writes it letter for letter: no formula, no hidden label."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")

# ------------------------------------------------------------------------------------ what figures share

def whiskers(value: float, low: float, high: float) -> list[list[float]]:
    """An interval as matplotlib wants it: lengths below and above."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]

def interval(x: dict) -> list[list[float]]:
    return whiskers(x["percent"], x["low"], x["high"])

def two_bars(ax, column: int, colour: str, hatched: list[float], filled: list[float]) -> None:
    """Two [value, low, high] side by side, told apart by more than colour."""
    ax.bar(column - 0.2, hatched[0], 0.4, color="w", hatch="///", edgecolor=colour, capsize=3,
           yerr=whiskers(*hatched))
    ax.bar(column + 0.2, filled[0], 0.4, color=colour, edgecolor="k", capsize=3, yerr=whiskers(*filled))

def curve(ax, x, scores: list[dict], line: str, colour: str, label: str) -> None:
    """Percentages over x with a band for their intervals."""
    middle, low, high = ([score[key] for score in scores] for key in ("percent", "low", "high"))
    ax.plot(x, middle, line, color=colour, label=label, marker="o", markersize=4, markeredgecolor="k")
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)

def name_columns(ax, names: list[str]) -> None:
    """Names below the bars, slanted where they would touch."""
    slanted = len(names) > 4 or max(map(len, names)) > 8
    ax.set_xticks(range(len(names)), names, rotation=35 if slanted else 0,
                  ha="right" if slanted else "center", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(names) - 0.4)

def grid(n: int, widest: int = 4) -> tuple[int, int]:
    """Rows and columns for n panels, as even as they can be."""
    rows = math.ceil(n / widest)
    return rows, math.ceil(n / rows)

def panels(figure, n: int, widest: int = 4, **shared) -> list:
    """n axes; what is left of the last row stays empty."""
    axes = list(figure.subplots(*grid(n, widest), squeeze=False, **shared).flat)
    for ax in axes[n:]:
        ax.set_axis_off()
    return axes[:n]

def panels_size(n: int) -> tuple[float, float]:
    """Inches for n panels with a legend above."""
    rows, columns = grid(n)
    return 1 + 2.6 * max(2, columns), 1.1 + 2.4 * rows

def legend_above(fig, **settings) -> None:
    """One legend for all panels, from the one with most curves."""
    legends = [ax.get_legend_handles_labels() for ax in fig.axes]
    handles, labels = max(legends, key=lambda pair: len(pair[1]))
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False,
               **settings)

def span(values: list[int]) -> str:
    """n of all, or from the least to the most."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

def analysed(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.analysis]

# ---------------------------------------------------------------------------------------- the figures

def figure_2(runs: list[Run]):
    """Recovery: the maximal FS after each retraining attack, a panel an attack and a bar a method."""
    labels = {label for run in runs for label in run.attacks if label.startswith(("Harmful", "Benign"))}
    if not labels:
        return None
    fig = Figure(figsize=(1 + len(labels) * max(2.2, 0.5 * len(runs)), 3.4), layout="constrained")
    harmful_first = sorted(labels, key=lambda label: (label.startswith("Benign"), label))
    for ax, label in zip(panels(fig, len(labels), sharey=True), harmful_first):
        for i, run in enumerate(runs):
            if label in run.attacks:
                x = run.attacks[label]
                ax.bar(i, x["percent"], color=run.colour, edgecolor="k", capsize=3, yerr=interval(x))
        name_columns(ax, [run.name for run in runs])
        n = span([run.attacks[label]["n"] for run in runs if label in run.attacks])
        ax.set(title=f"{label}, n = {n}", ylim=(0, 101))
    fig.axes[0].set_ylabel("largest FS after the attack, %")
    return fig

def figure_3(runs: list[Run]):
    """Influence variation: (b) accumulated over neurons, (c) of the m neurons where it is largest."""
    runs = analysed(runs)
    if not runs:
        return None
    fig = Figure(figsize=(6.5 + 0.5 * len(runs), 4.5), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1, 0.5 + 0.12 * len(runs)))
    for i, run in enumerate(runs):
        x = run.analysis["variation"]
        look = {"color": run.colour, "marker": run.marker, "markeredgecolor": "k", "markersize": 4}
        left.plot(x["curves"]["m"], x["curves"]["D_neg"], "-", label=run.name, **look)
        left.plot(x["curves"]["m"], x["curves"]["D_pos"], ":", **look)
        two_bars(right, i, run.colour, x["D_pos"], x["D_neg"])
    neurons, m = (span([run.analysis["variation"][key] for run in runs]) for key in ("neurons", "m"))
    left.set(xscale="log", yscale="log", xlabel=f"neurons, largest first (of {neurons})",
             ylabel=f"accumulated variation, {UNITS}", title="(b) D⁻ hidden, solid; D⁺ erased, dotted")
    left.legend(fontsize=8)
    name_columns(right, [run.name for run in runs])
    right.set(title=f"(c) {m} neurons, n = {span([run.analysis['n'] for run in runs])}",
              ylabel=f"D⁺ hatched, D⁻ filled, {UNITS}")
    return fig

def figure_4(runs: list[Run]):
    """Logit lens: how often the answer is above a distractor after each block, a panel a method."""
    runs = analysed(runs)
    if not runs:
        return None
    fig = Figure(figsize=panels_size(len(runs)), layout="constrained")
    for ax, run in zip(panels(fig, len(runs), sharex=True, sharey=True), runs):
        for name, line, colour in (("before", "--", "k"), ("after", "-", run.colour)):
            lens = run.analysis["checkpoints"][name]["lens"]
            curve(ax, range(1, len(lens) + 1), lens, line, colour, name)
        ax.axhline(50, color="k", linestyle=":", linewidth=1, label="chance")
        ax.set(title=f"{run.name}, n = {run.analysis['n']}", ylim=(-3, 103))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.supxlabel("block", fontsize="medium")
    fig.supylabel("answer above a distractor, %", fontsize="medium")
    legend_above(fig)
    return fig

def figure_5(runs: list[Run]):
    """D+ and D- per module and block, a column a method, one colour scale for all."""
    runs = analysed(runs)
    if not runs:
        return None
    parts = [part for run in runs for part in run.analysis["by_module"].values()]
    most = max(value for part in parts for row in part.values() for value in row)
    fig = Figure(figsize=(1.8 + 1.9 * len(runs), 4.4), layout="constrained")
    axes = fig.subplots(2, len(runs), squeeze=False, sharex=True, sharey=True)
    for column, run in zip(axes.T, runs):
        for ax, key, symbol in zip(column, ("D_pos", "D_neg"), ("D⁺", "D⁻")):
            part = run.analysis["by_module"][key]
            blocks, largest = len(next(iter(part.values()))), max(map(max, part.values()))
            image = ax.imshow(list(part.values()), cmap="cividis", aspect="auto", vmin=0, vmax=most or 1,
                              extent=(0.5, blocks + 0.5, len(part) - 0.5, -0.5))
            ax.set_title(f"{run.name}, {symbol} ≤ {largest:.1g}", fontsize="medium")
            ax.set_yticks(range(len(part)), [name.removesuffix("_proj") for name in part])
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.supxlabel(f"block (n = {span([run.analysis['n'] for run in runs])})", fontsize="medium")
    fig.colorbar(image, ax=axes, pad=0.01, label=f"mean variation of a module's\ntop 100 neurons, {UNITS}")
    return fig

def figure_6(runs: list[Run]):
    """Attributions: (a) in order, a panel a method, (b) their correlation before and after the attack."""
    runs = analysed(runs)
    if not runs:
        return None
    attacked = [run for run in runs if "after attacked" in run.analysis["correlation"]]
    width, height = panels_size(len(runs))
    if not attacked:
        print("figure6 (b): skipped, no run was analysed with --attacked")
        fig = Figure(figsize=(width, height), layout="constrained")
        figure_6a(fig, runs)
        return fig
    fig = Figure(figsize=(width, height + 2.9), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(height, 2.9))
    figure_6a(top, runs)
    figure_6b(bottom.subplots(), attacked)
    return fig

def figure_6a(fig, runs: list[Run]) -> None:
    most = max(x["max"][0] for run in runs for x in run.analysis["attribution"].values())
    for ax, run in zip(panels(fig, len(runs), sharex=True, sharey=True), runs):
        looks = {"before": ("k", "--"), "after": (run.colour, "-"), "attacked": (run.colour, ":")}
        for name, x in run.analysis["attribution"].items():
            colour, line = looks[name]
            ax.plot(x["rank"], x["max"], line, color=colour, label=name)
            ax.plot(x["rank"], x["min"], line, color=colour)
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(xscale="log", title=f"{run.name}, n = {run.analysis['n']}")
        ax.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(most / 100)) if most > 0 else 1)
    legend_above(fig, title="(a) maxima (above 0) and minima (below 0) over tokens")
    fig.supxlabel("neurons, in order", fontsize="medium")
    fig.supylabel(f"attribution, {UNITS}", fontsize="medium")

def figure_6b(ax, runs: list[Run]) -> None:
    for i, run in enumerate(runs):
        rho = run.analysis["correlation"]["after attacked"]
        two_bars(ax, i, run.colour, rho["max"], rho["min"])
    ax.axhline(0, color="k", linewidth=0.8)
    name_columns(ax, [run.name for run in runs])
    n = span([run.analysis["n"] for run in runs])
    ax.set(title="(b) attributions before and after the attack",
           ylabel=f"Pearson's ρ, n = {n}\nmaxima hatched, minima filled")

def figure_7(runs: list[Run]):
    """(a) lambda against retention and recovery; (b, c) recovery by the attack's learning rate."""
    swept = [run for run in runs if run.settings["method"] == "ssiuu" and run.settings.get("lam")]
    if len({run.settings["lam"] for run in swept}) < 2:
        swept = []
    rates = {}
    for run in runs:
        for cell in run.cells:
            rates.setdefault(attack_of(cell), set()).add(cell["lr"])
    attacks = sorted(label for label in rates if len(rates[label]) > 1)
    n = len(attacks) + (1 if swept else 0)
    if n == 0:
        return None
    rows, columns = grid(n, 2)
    fig = Figure(figsize=(5.4 * columns, 3.4 * rows), layout="constrained")
    axes = panels(fig, n, 2)
    if swept:
        figure_7a(axes.pop(0), swept)
    else:
        print("figure7 (a): skipped, no ssiuu runs of different lambda")
    for ax, label in zip(axes, attacks):
        figure_7bc(ax, label, [run for run in runs if any(attack_of(cell) == label for cell in run.cells)])
    return fig

def attack_of(cell: dict) -> str:
    return f"(b) Harmful, p = {cell['p']:g}" if "p" in cell else "(c) Benign"

def figure_7a(ax, runs: list[Run]) -> None:
    """A point a run with its interval, and a line through the means of runs with the same lambda."""
    scores = {"retain set": [run.after.get("retain") for run in runs],
              "test set": [run.after["RS"] for run in runs]}
    for label in sorted({label for run in runs for label in run.attacks if label.startswith("Harmful")}):
        scores[label] = [run.attacks.get(label) for run in runs]
    for i, (label, column) in enumerate(scores.items()):
        found = [(run.settings["lam"], x) for run, x in zip(runs, column) if x]
        beside = 1.06 ** i  # so that intervals do not cover each other
        look = {"color": COLOURS[i], "marker": MARKERS[i], "markeredgecolor": "k"}
        for lam, x in found:
            ax.errorbar(lam * beside, x["percent"], interval(x), capsize=2, **look)
        lams = sorted({lam for lam, _ in found})
        means = [statistics.fmean(x["percent"] for lam, x in found if lam == one) for one in lams]
        ax.plot([lam * beside for lam in lams], means, linestyle=("-", "--", "-.", ":")[i % 4],
                label=f"{label}, n = {span([x['n'] for _, x in found])}", **look)
    ax.set(xscale="log", xlabel="λ", ylabel="accuracy, %", ylim=(-3, 103), title="(a) weight of the penalty")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))

def figure_7bc(ax, label: str, runs: list[Run]) -> None:
    """Per rate the maximum over the attack's points, mean over draws; runs stand side by side at a rate."""
    for i, run in enumerate(runs):
        cells = [cell for cell in run.cells if attack_of(cell) == label]
        places, found = [], []
        for rate in sorted({cell["lr"] for cell in cells}):
            x = summary([cell for cell in cells if cell["lr"] == rate])
            if "percent" in x:  # at a rate that is too high the attack diverges
                places.append(rate * 1.05 ** (i - (len(runs) - 1) / 2))
                found.append(x)
        look = {"color": run.colour, "marker": run.marker, "markeredgecolor": "k", "linewidth": 1}
        ax.plot(places, [x["percent"] for x in found], label=f"{run.name}, n = {cells[0]['n']}", **look)
        for place, x in zip(places, found):
            ax.errorbar(place, x["percent"], interval(x), capsize=2, **look)
    ax.set(xscale="log", xlabel="learning rate of the attack", title=label)
    ax.set(ylabel="largest FS, %", ylim=(-3, 103))
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))

def figure_causal(runs: list[Run]):
    """Not in the paper: FS with the neurons of largest D- silent, and with as many random ones."""
    runs = [run for run in runs if run.beyond]
    if not runs:
        return None
    fig = Figure(figsize=panels_size(len(runs)), layout="constrained")
    for ax, run in zip(panels(fig, len(runs), sharex=True, sharey=True), runs):
        m = [cell["m"] for cell in run.beyond["causal"]]
        curve(ax, m, [cell["FS"] for cell in run.beyond["causal"]], "-", run.colour, "those of largest D⁻")
        curve(ax, m, [cell["random_FS"] for cell in run.beyond["causal"]], ":", "k", "random ones")
        ax.set(xscale="log", ylim=(-3, 103), title=f"{run.name}, n = {run.beyond['n']}")
    fig.supxlabel("neurons silenced", fontsize="medium")
    fig.supylabel("FS, %", fontsize="medium")
    legend_above(fig)
    return fig

def figure_recovery(points: dict[str, dict]):
    """What an attack brings back against what is kept: {name: {column: {mean, low, high, folds}}}."""
    fig = Figure(figsize=(6.5, 4.5), layout="constrained")
    ax = fig.subplots()
    for i, row in enumerate(points.values()):
        kept, back = row[RETENTION], row[RECOVERY]
        ax.errorbar(kept["mean"], back["mean"], xerr=whiskers(kept["mean"], kept["low"], kept["high"]),
                    yerr=whiskers(back["mean"], back["low"], back["high"]), color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)], markeredgecolor="k", markersize=7, capsize=2)
    folds = span([row[column]["folds"] for row in points.values() for column in (RETENTION, RECOVERY)])
    ax.set(xlabel=f"RS, kept, % (means over {folds} forget sets, 95 % intervals)",
           ylabel="FS after harmful retraining, p = 0.3, %", title="low and right is better")
    ax.margins(0.12)
    ax.set_ylim(bottom=-2)
    fig.draw_without_rendering()  # now the layout is settled and pixels are known
    name_points(ax, points)
    return fig

def name_points(ax, points: dict[str, dict]) -> None:
    """Each name beside its point, at the nearest place where it covers no interval and no other name."""
    taken = []
    for row in points.values():
        x, y = row[RETENTION], row[RECOVERY]
        across = (x["low"], y["mean"]), (x["high"], y["mean"])
        along = (x["mean"], y["low"]), (x["mean"], y["high"])
        taken += [Bbox(ax.transData.transform(line)).padded(6) for line in (across, along)]
    for name, row in points.items():
        taken.append(name_point(ax, plain(name), (row[RETENTION]["mean"], row[RECOVERY]["mean"]), taken))

def name_point(ax, name: str, point: tuple[float, float], taken: list):
    """Writes the name where it covers none of the boxes, and gives back its own."""
    text = ax.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8, va="center")
    for distance in range(8, 100, 4):
        for angle in range(0, 360, 30):
            x, y = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            text.set_position((x, y))
            text.set_horizontalalignment("center" if abs(x) < 1 else "left" if x > 0 else "right")
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max):
                return box
    return box

# ---------------------------------------------------------------------------------------- the command

def read_points(path: Path) -> dict[str, dict]:
    """The rows of a table that hold both of retention and recovery; one forget set has no interval."""
    points = {}
    for name, row in read_table(path)["rows"].items():
        if RETENTION in row and RECOVERY in row:
            both = {column: row[column] for column in (RETENTION, RECOVERY)}
            points[name] = {column: x if x["folds"] > 1 else x | {"low": x["mean"], "high": x["mean"]}
                            for column, x in both.items()}
    if not points:
        raise ValueError(f"{path}: no row holds {RETENTION} and {RECOVERY}, expected at least one")
    return points

def read_flags() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run")
    parser.add_argument("--table", help="table.json of runs over forget sets, for recovery.png")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="draw these rows of --table (all)")
    parser.add_argument("--out", default="runs/figures", help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show where an unforeseen error came from")
    parser.error = refuse
    flags = parser.parse_args()
    if not flags.runs and not flags.table:
        refuse("found nothing to draw, expected folders of runs or --table")
    return flags

def drawn(runs: list[Run], rows: dict) -> dict:
    """{name: figure, or None where no run has its numbers}."""
    figures = {"recovery": figure_recovery(rows)} if rows else {}
    if runs:
        figures |= {"figure2": figure_2(runs), "figure3": figure_3(runs), "figure4": figure_4(runs),
                    "figure5": figure_5(runs), "figure6": figure_6(runs), "figure7": figure_7(runs),
                    "causal": figure_causal(runs)}
    return figures

def main() -> None:
    flags = read_flags()
    if Figure is None:
        raise ValueError("matplotlib is not installed, expected for figures: pip install matplotlib")
    runs, rows = read_runs(flags.runs), read_points(Path(flags.table)) if flags.table else {}
    for name in flags.rows or ():
        if name not in rows:
            refuse(f"--rows: found {name!r}, expected some of {', '.join(map(repr, rows)) or '--table'}")
    with refusing(f"{', '.join(flags.runs) or flags.table}: cannot be drawn"):
        figures = drawn(runs, {name: rows[name] for name in flags.rows or rows})
        Path(flags.out).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            if figure is None:
                print(f"{name}: skipped, none of the runs holds its numbers")
            else:
                figure.savefig(Path(flags.out) / f"{name}.png", dpi=150)
                print(Path(flags.out) / f"{name}.png")

if __name__ == "__main__":
    run_command(main)
