"""One table of many runs: `ssiuu.py` makes what is missing, one run a row and forget set; writes table.json.

    python data/results/tables.py tiny --folds 1 2 3                  # survives kills: run it again
    python data/results/tables.py tiny --print                        # only show what is committed

A finished run leaves data/results/TABLE/runs/ROW fold=K.json; from these anybody can make the table again. A
column is the mean over folds with its 95 % t-interval, and the same of its paired difference to the row "gd".
"""
import argparse
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluate import markdown, refuse, run  # noqa: E402
from model import read_json, write_json  # noqa: E402

# row -> the flags of ssiuu.py; rates, beta and alpha are those chosen on the published forget set, fold 0
TINY = {
    "ga": "--method ga --lr 2e-5", "gd": "--method gd", "gd slowed": "--method gd --lr 1.2e-5",
    "dpo": "--method dpo --lr 5e-4 --beta 0.1", "npo": "--method npo --beta 0.3",
    "rmu": "--method rmu --lr 2e-4 --rmu-alpha 20", "klue": "--method klue --lr 2e-4",
    "random": "--method random --lr 5e-4",
    "ssiuu previous 0.1": "--lam 0.1", "ssiuu previous 0.3": "--lam 0.3",
    "ssiuu initial 0.01": "--anchor initial --lam 0.01", "ssiuu initial 0.03": "--anchor initial --lam 0.03",
    "ssiuu per example 0.1": "--per-example --lam 0.1",
    "ssiuu initial 0.03 over npo": "--anchor initial --lam 0.03 --backbone npo --beta 0.3",
}
TABLES = {"tiny": TINY}
# t such that 95 % lie within +-t, for 1, 2, ... degrees of freedom
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093]


def interval(values: list[float]) -> dict:
    """{mean, low, high, folds}: the 95 % t-interval of the mean; one fold alone has none."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return {"mean": round(mean, 3), "low": None, "high": None, "folds": 1}
    half = T[min(n - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3), "folds": n}


def columns(result: dict) -> dict[str, float]:
    """The numbers of one run's result.json."""
    after = result["after"]
    names = ("FS", "RS", "retain", "paraphrased", "multi_hop", "same_answer", "US")
    found = {name: after[name]["percent"] for name in names if name in after}
    found |= {"steps": after["steps"], "reached": 100.0 * after["reached"]}
    for label, x in result["attacks"].items():
        if "percent" in x:
            found |= {label: x["percent"], f"margin after {label}": x["margin_max"]}
    return found


def table(runs: dict[str, dict[int, dict]]) -> dict:
    """{"rows": {row: {column: interval, "minus gd": {column: interval of paired differences}}}}."""
    rows, gd = {}, runs.get("gd", {})
    for row, folds in runs.items():
        rows[row] = {}
        for name in dict.fromkeys(name for found in folds.values() for name in found):
            rows[row][name] = interval([found[name] for found in folds.values() if name in found])
        both = [(found, gd[k]) for k, found in folds.items() if k in gd and row != "gd"]
        differences = {}
        for name in rows[row]:
            values = [a[name] - b[name] for a, b in both if name in a and name in b]
            if values:
                differences[name] = interval(values)
        rows[row]["minus gd"] = differences
    return {"rows": rows}


def shown(x: dict | None) -> str:
    if not x:
        return "-"
    interval = f" [{x['low']:.1f}, {x['high']:.1f}]" if x["folds"] > 1 else ""
    return f"{x['mean']:.1f}{interval} n={x['folds']}"


def as_markdown(result: dict) -> str:
    names = list(dict.fromkeys(name for row in result["rows"].values() for name in row if name != "minus gd"))
    lines = [["forget sets n", *names]]
    for row, found in result["rows"].items():
        lines.append([row, *(shown(found.get(name)) for name in names)])
        if found["minus gd"]:
            lines.append([f"{row}, minus gd", *(shown(found["minus gd"].get(name)) for name in names)])
    return markdown(lines)


def make(flags: list[str], name: str, file: Path) -> None:
    """Runs or resumes one run, keeps its result.json as `file`, and frees the disk of its weights."""
    folder = ROOT / "runs" / name
    begun = ["--resume", str(folder)] if (folder / "settings.json").is_file() else [*flags, "--name", name]
    if not (folder / "result.json").is_file():
        subprocess.run([sys.executable, "ssiuu.py", *begun], cwd=ROOT, check=True)
    write_json(file, read_json(folder / "result.json"))
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("table", choices=TABLES, help="which table")
    parser.add_argument("--folds", nargs="+", type=int, default=[*range(1, 11)], help="forget sets (1 to 10)")
    parser.add_argument("--rows", nargs="+", choices=TINY, default=list(TINY), help="rows to make (all)")
    parser.add_argument("--steps", type=int, default=300, help="at most so many steps a run (300)")
    parser.add_argument("--print", action="store_true", help="only print the committed table")
    s = parser.parse_args()
    folder = ROOT / "data/results" / s.table
    if s.print:
        return print(as_markdown(read_json(folder / "table.json")))
    for k in s.folds:
        for row in s.rows:
            file = folder / "runs" / f"{row} fold={k}.json"
            if not file.is_file():
                flags = [*TABLES[s.table][row].split(), "--fold", str(k), "--steps", str(s.steps)]
                make(flags, f"{s.table} {row} fold={k}", file)
    runs = {}
    for row in TABLES[s.table]:
        files = sorted((folder / "runs").glob(f"{row} fold=*.json"))
        if files:
            runs[row] = {int(f.stem.partition("fold=")[2]): columns(read_json(f)) for f in files}
    write_json(folder / "table.json", table(runs))
    print(as_markdown(table(runs)))


if __name__ == "__main__":
    run(main)
