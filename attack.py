"""Attacks a checkpoint as in Section 6.2.2: does a little retraining bring the unlearned facts back?

    python attack.py --model runs/ssiuu-tiny --control data/tiny

Dimensions: B sequences, K tokens.
"""
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import Example, batches, check_fits, collate, encoded, load_alpaca
from evaluate import Data, Name, Rate, Share, accuracy, answered, cell, check_folder, margin, markdown
from evaluate import making, read_flags, run, splits_of, wilson
from model import LM, Count, Tokenizer, answer_logprob, load, located, refuse, save, write_json

@dataclass
class Harmful(Data):
    """The flags of an attack that retrains on some of the facts."""
    p: tuple[Share, ...] = (0.1, 0.3)     # fractions of the pool to retrain on (6.2.2)
    attack_lrs: tuple[Rate, ...] = (1e-5, 5e-6, 1e-6)  # learning rates of the harmful attack (6.2.2, D.2)
    attack_epochs: Count = 10             # of the harmful attack; unpublished
    attack_batch: Count = 4               # of both attacks; unpublished
    attack_draws: Count = 3               # draws of the retrained rows (6.2.2: three runs)

@dataclass
class Settings(Harmful):
    control: tuple[Name, ...] | None = None  # attack these on the same items: the original, one never taught
    benign: str | None = "data/instructions.json"  # Alpaca file of the benign attack (6.2.2); "": none
    benign_lrs: tuple[Rate, ...] = (1e-5, 1e-6, 1e-7)  # learning rates of the benign attack (6.2.2, D.2)
    benign_rows: Count = 1000             # rows a draw, one pass (6.2.2; the passes are unpublished)
    benign_points: Count = 5              # scores in a pass; unpublished
    save: Name | None = None              # only write the model that the first p, rate and draw end in here

def retrain(model: LM, rows: list, lr: float, epochs: int, size: int, generator: torch.Generator,
            points: int = 1, weights: Iterable[nn.Parameter] | None = None) -> Iterator[float]:
    """Fine-tunes `weights`, all if none are given, on encoded (x, y) pairs, loss -mean log P(y|x), AdamW.
    Yields the mean loss since the last time, `points` times an epoch at regular batches, at most once each.
    A batch holds rows of like length, which wastes little on padding; their order is new each epoch."""
    optimizer = torch.optim.AdamW(weights or model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    rows = sorted(rows, key=lambda row: len(row[0]))
    parts = [collate(rows[i:i + size], model.device) for i in range(0, len(rows), size)]
    order, losses = batches(len(parts), 1, generator), []
    ends = {len(parts) * (i + 1) // points for i in range(points)}
    for done in [i for _ in range(epochs) for i in range(1, len(parts) + 1)]:
        batch = parts[next(order)[0]]
        loss = -answer_logprob(model, batch).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"loss is {loss.item()} at a rate of {lr:g}, expected a number")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if done in ends:
            yield statistics.mean(losses)
            losses = []

def falsely_answered(model: LM, tokenizer: Tokenizer, C_f: list[Example], eval_size: int = 64) -> list:
    """The attack pool (6.2.2): what the unlearned model answers falsely, so no chance hits; all of TOFU."""
    if not all(e.false_options for e in C_f):
        return list(C_f)
    return [e for e, hit in zip(C_f, answered(model, tokenizer, C_f, size=eval_size)) if not hit]

def attacked(model: LM, tokenizer: Tokenizer, key: dict, changes: Iterator, scored: list[Example],
             eval_size: int, known: Iterable[dict] = ()) -> dict:
    """The cell with FS, logp and margin of `scored` as lists: before the attack, then as often as `changes`
    yields. A known cell is returned as it is. An attack that diverges costs its own cell, which says so under
    "failed". The weights, kept on the host meanwhile, are restored bit for bit, also after an error."""
    def measure() -> tuple:
        FS = accuracy(model, tokenizer, scored, eval_size)["percent"]
        return FS, *margin(model, tokenizer, scored, eval_size)

    for c in known:
        if key.items() <= c.items():
            return c
    start = [w.detach().to("cpu", copy=True) for w in model.parameters()]
    curve = [measure()]
    try:
        with closing(changes):  # before the weights go back: an attack may end by adding to them
            for _ in changes:
                curve.append(measure())
    except FloatingPointError as e:
        return key | {"failed": f"retraining at {key['lr']:g}: {e}"}
    finally:
        for w, w_start in zip(model.parameters(), start):
            w.data.copy_(w_start)
    return key | {name: list(values) for name, values in zip(("FS", "logp", "margin"), zip(*curve))}

def drawn(tokenizer: Tokenizer, pool: list[Example], p: float, draw: int, seed: int) -> tuple[list, list]:
    """A fraction p of the pool, at least one item, encoded to be retrained; and the rest, to be scored."""
    k = min(len(pool), max(1, round(p * len(pool))))
    chosen = set(random.Random(f"{seed} {draw} {p}").sample(range(len(pool)), k))
    return (encoded(tokenizer, [e for i, e in enumerate(pool) if i in chosen]),
            [e for i, e in enumerate(pool) if i not in chosen])

def harmful_attack(model: LM, tokenizer: Tokenizer, pool: list[Example], p: float, s: Harmful,
                   known: Iterable[dict] = (), how: Callable = retrain) -> Iterator[dict]:
    """Retrain on a fraction p of the pool, score FS on the disjoint rest after each epoch (6.2.2 (1)). The
    pool is the unlearned model's (`falsely_answered`), also where a control is attacked. Yields a cell per
    draw and rate, each from the same weights: {kind, p, seed (the draw), lr, n, retrained, FS, logp, margin},
    the last three lists over epochs; none where nothing is left to score. `how`: the way of retraining."""
    for draw in range(s.attack_draws):
        rows, rest = drawn(tokenizer, pool, p, draw, s.seed)
        if not rest:
            return
        for lr in s.attack_lrs:
            key = {"kind": "harmful", "p": p, "seed": draw, "lr": lr, "n": len(rest), "retrained": len(rows)}
            generator = torch.Generator().manual_seed(s.seed + draw)
            changes = how(model, rows, lr, s.attack_epochs, s.attack_batch, generator)
            yield attacked(model, tokenizer, key, changes, rest, s.eval_batch, known)

def benign_attack(model: LM, tokenizer: Tokenizer, pool: list[Example], rows: list[Example], s: Settings,
                  known: Iterable[dict] = ()) -> Iterator[dict]:
    """Retrain on instructions, which hold none of the facts, score FS on all the pool (Section 6.2.2 (2)).
    A draw has its rows and order; one pass, scored at regular points. Cells as harmful_attack's, no p."""
    for draw in range(s.attack_draws if pool else 0):
        chosen = random.Random(f"{s.seed} {draw} benign").sample(rows, min(s.benign_rows, len(rows)))
        taught = encoded(tokenizer, chosen)
        for lr in s.benign_lrs:
            key = {"kind": "benign", "seed": draw, "lr": lr, "n": len(pool), "retrained": len(chosen)}
            generator = torch.Generator().manual_seed(s.seed + draw)
            changes = retrain(model, taught, lr, 1, s.attack_batch, generator, s.benign_points)
            yield attacked(model, tokenizer, key, changes, pool, s.eval_batch, known)

def attacks(model: LM, tokenizer: Tokenizer, pool: list[Example], instructions: list[Example], s: Settings,
            report: Callable[[str, dict], None], known: Iterable[dict] = ()) -> dict[str, dict]:
    """{column of the table: `summary`} of all attacks in `s`; report(column, cell) as each cell ends."""
    columns = {f"Harmful p = {p}": harmful_attack(model, tokenizer, pool, p, s, known) for p in s.p}
    if instructions:
        columns["Benign"] = benign_attack(model, tokenizer, pool, instructions, s, known)
    found = {}
    for label, cells in columns.items():
        done = []
        for c in cells:
            done.append(c)
            report(label, c)
        found[label] = summary(done)
    return found

def summary(cells: list[dict]) -> dict:
    """A cell of the table: per draw the maximum after the attack began, over points and rates; mean and
    spread over draws. Wilson's interval at the mean with n of one draw: draws share items, n does not add up.
    Where no cell was possible, or each one of a draw diverged, there is no percent but {"why"}."""
    draws = [[c for c in cells if c["seed"] == draw] for draw in sorted({c["seed"] for c in cells})]
    valid = [[c for c in draw if "failed" not in c] for draw in draws]
    if not cells:
        return {"why": "no item answered falsely is left to score"}
    if not all(valid):
        return {"why": next(c["failed"] for c in cells if "failed" in c)}
    best = [max(draw, key=lambda c: max(c["FS"][1:])) for draw in valid]
    maxima, recovery = [max(c["FS"][1:]) for c in best], {}
    for key in ("logp", "margin"):
        recovery[f"{key}_before"] = statistics.mean(draw[0][key][0] for draw in valid)
        recovery[f"{key}_max"] = statistics.mean(max(max(c[key][1:]) for c in draw) for draw in valid)
    return {**wilson(statistics.mean(maxima), best[0]["n"]), "sd": round(statistics.pstdev(maxima), 2),
            "draws": len(maxima), "retrained": best[0]["retrained"], "lr_of_max": [c["lr"] for c in best],
            "diverged": sum("failed" in c for c in cells), **recovery}

def save_attacked(model: LM, tokenizer: Tokenizer, pool: list[Example], s: Settings) -> None:
    """Writes the model that the first p, rate and draw end in, for evaluate.py --attacked."""
    rows, _ = drawn(tokenizer, pool, s.p[0], 0, s.seed)
    generator = torch.Generator().manual_seed(s.seed)
    for loss in retrain(model, rows, s.attack_lrs[0], s.attack_epochs, s.attack_batch, generator):
        print(f"{s.model}: retrained on {len(rows)} of {len(pool)} items, loss {loss:.4f}", flush=True)
    facts = {key: str(Path(x).resolve()) for key in ("forget", "retain", "splits") if (x := getattr(s, key))}
    with making(s.save):
        save(model, tokenizer, s.save)
        write_json(Path(s.save, "settings.json"), {"settings": facts | {"fold": s.fold}})  # for evaluate.py

def main() -> None:
    s, rows = read_flags(Settings, __doc__), []
    if s.save:
        if s.control or os.path.lexists(s.save):
            refuse(f"--save: found {s.save!r}, expected a new folder, and no --control")
        check_folder("--save", s.save)
    instructions = load_alpaca(s.benign) if s.benign else []
    C_f, _, _ = splits_of(s)
    controls = [located(name) for name in s.control or ()]  # what is not there ends before the work
    model, tokenizer = load(s.model, device=s.device)
    check_fits(model, tokenizer, C_f + instructions)
    pool = falsely_answered(model, tokenizer, C_f, s.eval_batch)
    if not pool:
        refuse(f"{s.model}: none of {len(C_f)} items is answered falsely, expected an unlearned model")
    if s.save:
        return save_attacked(model, tokenizer, pool, s)
    for i, name in enumerate((s.model, *map(str, controls))):
        if i:
            model, tokenizer = load(name, device=s.device)
            check_fits(model, tokenizer, pool + instructions)
        found = attacks(model, tokenizer, pool, instructions, s,
                        lambda _, c: print(json.dumps({"model": name, **c}), flush=True))
        rows.append([name, *(cell(x) for x in found.values())])
        for label, result in found.items():
            print(json.dumps({"model": name, "kind": "summary", "attack": label, **result}), flush=True)
    print(markdown([["model", *found], *rows]), file=sys.stderr)

if __name__ == "__main__":
    run(main)
