"""One table of many runs: every row a method, every cell a mean over forget sets.

    python data/results/tables.py tiny-fold0      # what the settings were chosen on: the published forget set
    python data/results/tables.py tiny            # run what is missing, then write and print the table
    python data/results/tables.py tiny --print    # print the committed table, run nothing

A row and fold is one model: ssiuu.py (or what makes one never taught) makes it, evaluate.py looks into it,
attack.py attacks it. What they found is kept in TABLE/<row> fold=<k>.json; the weights are not. After a kill
the same command goes on. TABLE/table.json holds, per row and column, the mean over folds with its 95 %
t-interval, a fold being one observation, and the paired difference to "gd" and others.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from beyond_paper import ranks  # noqa: E402
from evaluate import markdown, run  # noqa: E402
from model import check, read_json, refuse, refusing, write_json  # noqa: E402
from ssiuu import provenance  # noqa: E402

INITIAL = "--anchor initial --lam 0.03"
L2 = "--anchor initial --target weights --penalise all"  # on the weights' change, in place of attribution's
TINY = {
    "never taught": None,
    "gd": "--method gd",
    "ssiuu initial 0.03": INITIAL,
    "ssiuu previous 0.3": "--lam 0.3",
    "npo": "--method npo --beta 0.3",
    "gd slowed": "--method gd --lr 1.2e-5",
    "ssiuu initial 0.03 positive": f"{INITIAL} --penalise positive",
    "ssiuu initial 0.03 over npo": f"{INITIAL} --backbone npo --beta 0.3",
    "ssiuu initial 0.03 positive over npo": f"{INITIAL} --penalise positive --backbone npo --beta 0.3",
    "l2 initial 3": f"{L2} --lam 3",
    "l2 initial 10": f"{L2} --lam 10",
    "ssiuu previous 0.1": "--lam 0.1",
    "ssiuu initial 0.03 all": f"{INITIAL} --penalise all",
    "ssiuu initial 0.03 random": f"{INITIAL} --penalise random",
    "klue": "--method klue --lr 2e-4",
    "ssiuu initial 0.01": "--anchor initial --lam 0.01",
    "ssiuu previous 1": "--lam 1",
    "rmu": "--method rmu --lr 2e-4 --rmu-alpha 20",
    "dpo": "--method dpo --lr 5e-4 --beta 0.1",
    "ga": "--method ga --lr 2e-5",
    "random mask": "--method random --lr 5e-4",
    "ssiuu per example 0.1": "--lam 0.1 --per-example",
    "ssiuu logprob 0.1": "--lam 0.1 --target logprob",
    "ssiuu logprob 0.3": "--lam 0.3 --target logprob",
    "ssiuu logprob 0.3 positive": "--lam 0.3 --target logprob --penalise positive",
    "ssiuu logprob 0.3 all": "--lam 0.3 --target logprob --penalise all",
    # at NPO's own lowest rate that converges, where the rows above share one
    "npo 2e-5": "--method npo --lr 2e-5 --beta 0.5",
    "ssiuu logprob 0.3 2e-5": "--lr 2e-5 --lam 0.3 --target logprob",
}
FOLD0 = {f"{method} {more}".strip(): f"--method {method} {more}" for method, grid in {
    "ga": ["--lr 1e-5", "--lr 2e-5", "--lr 5e-5"],
    "gd": ["--lr 1.2e-5", "--lr 2e-5", "--lr 5e-5", "--lr 1e-4"],
    "npo": [f"--lr {lr} --beta {beta}" for lr in ("2e-5", "5e-5") for beta in (0.1, 0.3, 0.5)],
    "dpo": ["--lr 1e-4 --beta 0.1", *(f"--lr 5e-4 --beta {beta}" for beta in (0.1, 0.3, 0.5))],
    "rmu": ["--lr 1e-4 --rmu-alpha 20", *(f"--lr 2e-4 --rmu-alpha {alpha}" for alpha in (20, 100, 300))],
    "klue": ["--lr 1e-4", "--lr 2e-4"], "random": ["--lr 2e-4", "--lr 5e-4"],
    "ssiuu": [*(f"--lam {lam}" for lam in (0.03, 0.1, 0.3, 1)),
              *(f"--anchor initial --lam {lam}" for lam in (0.003, 0.01, 0.03, 0.1)),
              *(f"--target logprob --lam {lam}" for lam in (0.03, 0.1, 0.3, 1)),
              *(f"{L2} --lam {lam}" for lam in (0.1, 0.3, 1, 3, 10)),
              "--lr 2e-5 --lam 0.3", "--lr 2e-5 --anchor initial --lam 0.03"],
}.items() for more in grid}
BEYOND = ("never taught", "gd", "npo", "ssiuu previous 0.3", "ssiuu initial 0.03",
          "ssiuu initial 0.03 over npo", "ssiuu logprob 0.3")
STRONG = ("gd", "npo 2e-5", "ssiuu initial 0.03 over npo", "ssiuu logprob 0.3 2e-5")
# one rate for all rows, for the cost: half of it takes twice the steps
SMOL = "--lr 1e-4"
SMOLLM2 = {
    "gd": f"--method gd {SMOL}",
    "ssiuu logprob 1e-3": f"--target logprob --lam 1e-3 {SMOL}",
    "npo": f"--method npo --beta 0.1 {SMOL}",
    "never taught": None,
}
# two graphs of 17 and 16 sequences in place of one of 33: 8 GB in place of 12
SMOLLM2_FOLD0 = {
    "gd": f"--method gd {SMOL}", "npo --beta 0.1": f"--method npo --beta 0.1 {SMOL}",
    **{f"ssiuu {more}": f"{more} {SMOL} --micro-batch 17" for more in (
        "--target logprob --lam 1e-3", "--target logprob --lam 1e-4", "--lam 1e-3", "--lam 1e-4",
        "--anchor initial --lam 1e-4", "--anchor initial --lam 1e-5")},
}
# other facts, in free text: of 440 rows of TOFU 20 are forgotten, one author of 22; one rate, for the cost
TOFU_FACTS = "--forget runs/tofu/one.json --retain runs/tofu/rest.json"
TOFU_FOLD0 = {more: f"{more} --lr 1e-4" for more in (
    "--method gd", "--method npo", "--target logprob --lam 1e-3", "--target logprob --lam 1e-2")}
TOFU = {
    "gd": "--method gd --lr 1e-4",
    "npo": "--method npo --lr 1e-4",
    "ssiuu logprob 1e-2": "--target logprob --lam 1e-2 --lr 1e-4",
    "never taught": None,
}
SCORES = ("FS", "RS", "retain", "paraphrased", "multi_hop", "same_answer", "US")

@dataclass
class Table:
    model: str
    rows: dict[str, str | None]  # name -> flags of ssiuu.py; None: `never`
    steps: int = 300             # at most
    attack: str | None = None    # flags of attack.py; none: no attack
    folds: range = range(1, 11)
    score: str = ""              # flags of ssiuu.py and evaluate.py, of every row
    facts: str = ""              # flags of all commands: whose facts are forgotten
    beyond: bool = False         # beyond_paper.py too: membership, and FS with the neurons of D- silent
    never: str = "data/make_tiny.py OUT --without FOLD"  # makes the model never taught

TABLES = {
    "tiny-fold0": Table("data/tiny", FOLD0, steps=100, folds=range(1)),
    "tiny": Table("data/tiny", TINY, attack="--attack-draws 1 --attack-lrs 1e-3 5e-4 1e-4 "
                  "--benign-lrs 1e-3 1e-4 1e-5 --benign-rows 200"),
    "tiny-beyond": Table("data/tiny", {row: TINY[row] for row in BEYOND}, beyond=True),
    # above the highest rate of "tiny", which was most often the best one
    "tiny-strong": Table("data/tiny", {row: TINY[row] for row in STRONG}, attack="--attack-draws 1 --p 0.3 "
                         "--attack-lrs 2e-3 --benign-lrs 2e-3 --benign-rows 200"),
    "smollm2-fold0": Table("runs/taught", SMOLLM2_FOLD0, steps=40, folds=range(1), score="--test-limit 100"),
    "smollm2": Table("runs/taught", SMOLLM2, steps=40, folds=range(1, 6), score="--test-limit 100",
                     attack="--attack-draws 1 --p 0.3 --attack-lrs 1e-3 2e-4 --attack-epochs 8 "
                     "--benign-lrs 5e-4 1e-4 --benign-rows 200 --benign-points 3",
                     never="data/teach.py --model runs/smollm2 --teach-lr 2e-4 --teach-epochs 4 --bf16 "
                           "--out OUT --without FOLD"),
    "tofu-fold0": Table("runs/taught-tofu", TOFU_FOLD0, steps=100, folds=range(1), score="--test-limit 100",
                        facts=TOFU_FACTS),
    "tofu": Table("runs/taught-tofu", TOFU, steps=100, score="--test-limit 100", facts=TOFU_FACTS,
                  attack="--attack-draws 1 --p 0.3 --attack-lrs 5e-4 2e-4 --benign-lrs 1e-4 "
                         "--benign-rows 200 --benign-points 3",
                  never=f"data/teach.py --model data/tiny {TOFU_FACTS} --teach-lr 1e-3 --teach-epochs 20 "
                        "--out OUT --without FOLD"),
}
# each row is paired with these
COMPARED = ("gd", "gd slowed", "npo", "klue", "ssiuu previous 0.3", "ssiuu initial 0.03",
            "ssiuu initial 0.03 over npo", "ssiuu logprob 0.3", "npo 2e-5", "ssiuu logprob 1e-3",
            "never taught")

# ------------------------------------------------------------------------------------------------ runs

def command(*words: str) -> str:
    """Runs a command of this repository on one core; its standard output. RuntimeError where it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        *_, last = "", *done.stderr.splitlines()
        raise RuntimeError(last if last.startswith("error: ") else f"{words[0]}: status {done.returncode}")
    return done.stdout

def kept_run(file: Path) -> dict:
    """A kept run. ValueError where it has not what a table reads of it."""
    result = read_json(file)
    with refusing(f"{file}: not a run as this script keeps it"):
        int(file.stem.rpartition("fold=")[2])
        check(result.get("flags"), dict, "flags is")
        check(result.get("after"), dict, "after is")
        for side in [side for side in ("before", "after") if side in result]:
            for name, value in columns_of(result, side).items():
                check(value, float, f"{name} {side} unlearning is")
    return result

def make_model(t: Table, row: str, at: list[str], name: str) -> dict:
    """Makes or resumes runs/<name>, the model of this row: its scores and what made them."""
    folder = ROOT / "runs" / name
    if t.rows[row] is None:
        if not (folder / "model.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            words = {"OUT": f"runs/{name}", "FOLD": at[1]}
            command(*(words.get(word, word) for word in t.never.split()))
        scores = command("evaluate.py", "--model", f"runs/{name}", *at, *t.score.split())
        return {"after": json.loads(scores)} | provenance()
    if folder.exists() and not (folder / "settings.json").is_file():
        shutil.rmtree(folder)  # killed before there was anything to resume
    if not (folder / "result.json").is_file():
        start = ["--resume", f"runs/{name}"] if folder.exists() else ["--name", name]
        command("ssiuu.py", "--model", t.model, *at, "--steps", str(t.steps), "--no-attack",
                *t.rows[row].split(), *t.score.split(), *start)
    result = read_json(folder / "result.json")
    made = ("before", "after", "seconds", "commit", "torch", "python", "machine", "threads")
    return {key: result[key] for key in made}

def make(table: str, row: str, fold: int) -> dict:
    """What is known of this row on this fold: kept from before, or found now."""
    t, name, kept = TABLES[table], f"{table} {row} fold={fold}", HERE / table / f"{row} fold={fold}.json"
    flags = {"model": t.model, "steps": t.steps, "ssiuu.py": t.rows[row], "attack.py": t.attack}
    flags |= {key: value for key, value in (("score", t.score), ("facts", t.facts)) if value}
    if kept.is_file():
        result = kept_run(kept)
        if result["flags"] != flags:
            refuse(f"{kept}: found {result.get('flags')}, expected {flags}: remove it to run it again")
        return result
    at, model = ["--fold", str(fold), *t.facts.split()], f"runs/{name}"
    result = {"flags": flags} | make_model(t, row, at, name)
    if t.attack:
        command("evaluate.py", "--before", t.model, "--after", model, *at)
        analysis = read_json(ROOT / "runs" / name / "analysis.json")
        seen = {key: x for key, x in analysis["variation"].items() if key != "curves"}
        result["analysis"] = seen | analysis["checkpoints"]["after"]
        lines = command("attack.py", "--model", model, *at, *shlex.split(t.attack)).splitlines()
        result["attacks"] = {x["attack"]: x for x in map(json.loads, lines) if x["kind"] == "summary"}
    if t.beyond:
        command("data/results/beyond_paper.py", "--before", t.model, "--after", model, *at)
        beyond = read_json(ROOT / "runs" / name / "beyond.json")
        result["beyond"] = {key: beyond[key] for key in ("membership", "causal")}
    write_json(kept, result)
    shutil.rmtree(ROOT / "runs" / name)
    return result

def make_all(table: str, rows: list[str], folds: list[int], jobs: int) -> list[str]:
    """Makes every run, `jobs` at a time, a line as each ends. Returns the failed; they stop no other."""
    start, failed = time.time(), []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(make, table, row, k): f"{row} fold={k}" for k in folds for row in rows}
        try:
            for i, future in enumerate(as_completed(waiting), 1):
                try:
                    after = future.result()["after"]
                    text = f"FS {after['FS']['percent']:.1f}  RS {after['RS']['percent']:.1f}"
                except (RuntimeError, ValueError, OSError) as e:
                    failed.append(waiting[future])
                    text = str(e)
                text += f"  eta {(time.time() - start) / i * (len(waiting) - i):.0f}s"
                print(f"{i}/{len(waiting)}  {waiting[future]}  {text}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed

# --------------------------------------------------------------------------------------------- the table

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little wide
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
     2.120, 2.110, 2.101, 2.093)

def interval(values: list[float]) -> dict:
    """{mean, low, high, folds}: the 95 % t-interval of a mean over folds; one fold has none."""
    mean, low, high = statistics.fmean(values), None, None
    if len(values) > 1:
        half = T[min(len(values) - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
        low, high = round(mean - half, 6), round(mean + half, 6)
    return {"mean": round(mean, 6), "low": low, "high": high, "folds": len(values)}

def columns_of(result: dict, side: str = "after") -> dict[str, float]:
    """{column: value} of one run, all in percent but steps, margins and D+, D-."""
    scores = result[side]
    values = {name: scores[name]["percent"] for name in SCORES if name in scores}
    if side == "before":
        return values
    values |= {name: scores[name] for name in ("steps",) if name in scores}
    if "reached" in scores:
        values["reached"] = 100.0 * scores["reached"]
    for label, found in result.get("attacks", {}).items():
        if "percent" in found:  # none where too little was answered falsely, or every retraining diverged
            values |= {label: found["percent"], f"{label} margin": found["margin_max"]}
    for kind, found in result.get("beyond", {}).get("membership", {}).get("after", {}).items():
        values[f"AUC {kind}"] = found["percent"]
    for found in result.get("beyond", {}).get("causal", []):
        m, silent, chance = found["m"], found["FS"]["percent"], found["random_FS"]["percent"]
        values |= {f"FS {m} silent": silent, f"FS {m} random": chance,
                   f"FS {m} silent less random": silent - chance}
    if "analysis" in result:
        a = result["analysis"]
        values |= {name: a[name][0] for name in ("D_pos", "D_neg", "share")}
        values |= {"lens": a["lens"][-1]["percent"], "P": 100 * a["P"]}
    return values

def read_runs(table: str) -> dict[str, dict[int, dict]]:
    """{row: {fold: result}} of the kept runs, in the table's order."""
    found = {}
    for row in TABLES[table].rows:
        for path in sorted((HERE / table).glob(f"{row} fold=*.json")):
            found.setdefault(row, {})[int(path.stem.rpartition("=")[2])] = kept_run(path)
    return found

def paired(a: dict[int, dict], b: dict[int, dict]) -> dict:
    """{column: interval of a - b over the folds that both have}."""
    both = [(a[k], b[k]) for k in a if k in b]
    differences = {}
    for name in dict.fromkeys(name for x, _ in both for name in x):
        values = [x[name] - y[name] for x, y in both if name in x and name in y]
        if values:
            differences[name] = interval(values)
    return differences

def summarise(runs: dict[str, dict[int, dict]]) -> dict:
    """table.json: per row its columns over folds, and `minus gd` and others, paired by fold."""
    default = {k: columns_of(x, "before") for row in runs.values() for k, x in row.items() if "before" in x}
    values, rows = {"default": default}, {}
    for row, found in runs.items():
        values[row] = {k: columns_of(x) for k, x in found.items()}
    for row, folds in values.items():
        names = dict.fromkeys(name for columns in folds.values() for name in columns)
        rows[row] = {name: interval([x[name] for x in folds.values() if name in x]) for name in names}
        for other in COMPARED:
            if row not in ("default", other) and other in values:
                rows[row][f"minus {other}"] = paired(folds, values[other])
    return {"rows": rows, "rank": ranking(values),
            "commits": sorted({str(x["commit"]) for row in runs.values() for x in row.values()})}

def ranking(values: dict[str, dict[int, dict]]) -> dict:
    """{attack: interval over folds of Spearman's rho, over unlearned models, of D- - D+ and recovery}."""
    rows, rho = [folds for row, folds in values.items() if row not in ("default", "never taught")], {}
    for k in sorted({k for folds in rows for k in folds}):
        runs = [folds[k] for folds in rows if "D_neg" in folds.get(k, {})]
        for label in ("Harmful p = 0.1", "Harmful p = 0.3", "Benign"):
            pairs = [(x["D_neg"] - x["D_pos"], x[label]) for x in runs if label in x]
            hiding, recovery = (ranks(torch.tensor(x)).tolist() for x in zip(*pairs)) if pairs else ([], [])
            if len(pairs) > 3 and len(set(hiding)) > 1 < len(set(recovery)):
                rho.setdefault(label, []).append(statistics.correlation(hiding, recovery))
    return {label: interval(found) for label, found in rho.items()}

# ---------------------------------------------------------------------------------------------- Markdown

def shown(x: dict | None, most: int) -> str:
    """mean [low, high], and its number of folds where it is not the row's."""
    if not x:
        return "-"
    digits = 1 if abs(x["mean"]) >= 1 or x["mean"] == 0 else 3
    ends = "" if x["low"] is None else f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]"
    return f"{x['mean']:.{digits}f}{ends}" + (f" n={x['folds']}" if x["folds"] != most else "")

INTERVAL = {"mean": float, "low": float | None, "high": float | None, "folds": int}

def read_table(file: Path) -> dict:
    """table.json. ValueError for what `summarise` would not write."""
    found = read_json(file)
    rows, rank = (check(found.get(key), dict, f"{file}: {key} is") for key in ("rows", "rank"))
    for name, row in {**rows, "rank": rank}.items():
        for key, x in check(row, dict, f"{file}: {name} is").items():
            cells = x if key.startswith("minus ") else {key: x}
            for key, x in check(cells, dict, f"{file}: {name} {key} is").items():
                check(x, dict, f"{file}: {name} {key} is")
                for part, kind in INTERVAL.items():
                    check(x.get(part), kind, f"{file}: {name} {key} {part} is")
                check((x["low"] is None) == (x["high"] is None), Literal[True],
                      f"{file}: {name} {key}: low and high both null or numbers is")
    return found

def show(table: dict, only: list[str] | None, minus: str | None) -> str:
    """Two Markdown tables: means, and paired differences to the row `minus`. `only`: these columns."""
    rows = table["rows"]
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    compared = [key.removeprefix("minus ") for key in keys if key.startswith("minus ")]
    if minus and minus not in compared:
        refuse(f"--minus: found {minus!r}, expected one of {', '.join(compared)}")
    every = [key for key in keys if not key.startswith("minus ")]
    for name in only or ():
        if name not in every:
            refuse(f"--columns: found {name!r}, expected some of {', '.join(every)}")
    names, key = only or every, f"minus {minus or 'gd'}"
    means, less = [["row", "folds", *names]], [[f"{key}, paired", "folds", *names]]
    for row, columns in rows.items():
        for lines, found in ((means, columns), (less, columns.get(key))):
            if found:
                folds = max((found[name]["folds"] for name in found if name in every), default=0)
                lines.append([row, str(folds), *(shown(found.get(name), folds) for name in names)])
    rank = [f"rank correlation of D- - D+ with {label}: {shown(x, 0)}" for label, x in table["rank"].items()]
    return "\n\n".join([markdown(means), *([markdown(less)] if less[1:] else []), *rank])

# -------------------------------------------------------------------------------------- the command line

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("table", choices=TABLES, help="which table, a folder beside this script")
    parser.add_argument("--folds", nargs="+", type=int, metavar="K", help="make these folds (the table's)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="make these rows (all)")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="print these columns (all)")
    parser.add_argument("--minus", metavar="ROW", help="print paired differences to this row (gd)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core (1)")
    parser.add_argument("--print", action="store_true", help="print the table that is there, run nothing")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    s = parser.parse_args()
    rows, file, failed = TABLES[s.table].rows, HERE / s.table / "table.json", []
    for row in s.rows or ():
        if row not in rows:
            refuse(f"--rows: found {row!r}, expected some of {', '.join(map(repr, rows))}")
    if s.jobs < 1 or min(s.folds or [0]) < 0:
        refuse(f"--jobs, --folds: found {s.jobs} and {s.folds}, expected 1 or more, and 0 or more")
    if not s.print:
        failed = make_all(s.table, s.rows or list(rows), s.folds or list(TABLES[s.table].folds), s.jobs)
        write_json(file, summarise(read_runs(s.table)))
    print(show(read_table(file), s.columns, s.minus))
    if failed:
        refuse(f"{len(failed)} runs failed, {', '.join(failed):.200}; the same command tries them again")

if __name__ == "__main__":
    run(main)
