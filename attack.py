"""Attacks a checkpoint as in Section 6.2.2: does a little retraining bring the unlearned facts back?

    python attack.py --model runs/ssiuu-tiny

Dimensions: B sequences, K tokens.
"""
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data import Example, batches, collate, encode
from evaluate import answered, check_device, expect, margin, read_flags, run, score, splits_of, wilson
from model import LM, Tokenizer, answer_logprob, load


def retrain(model: LM, rows: list, lr: float, epochs: int, size: int, generator: torch.Generator) -> Iterator[float]:
    """Fine-tunes every weight on encoded (x, y) pairs, loss -mean log P(y|x), AdamW; yields each epoch's loss.

    A batch holds rows of like length, which wastes little on padding; the batches' order is new each epoch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    rows = sorted(rows, key=lambda row: len(row[0]))
    parts = [collate(rows[i:i + size]).to(model.lm_head.weight.device) for i in range(0, len(rows), size)]
    order = batches(len(parts), 1, generator)
    for _ in range(epochs):
        losses = []
        for _ in parts:
            batch = parts[next(order)[0]]
            loss = -answer_logprob(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        yield statistics.mean(losses)


def harmful_attack(model: LM, tokenizer: Tokenizer, C_f: list[Example], p: float, lrs: tuple = (1e-5, 5e-6, 1e-6),
                   seeds: int = 3, epochs: int = 10, size: int = 4, seed: int = 0, eval_size: int = 64,
                   known: tuple | list = ()) -> Iterator[dict]:
    """The harmful attack: retrain on a fraction p of the forget set, score FS on the disjoint rest (Section 6.2.2).

    The pool holds falsely answered items only, as in the paper: chance hits are in neither part. Each of `seeds`
    draws is retrained with each learning rate from the same weights, which are restored at the end. Yields a cell
    per draw and rate: {p, seed, lr, n, retrained, FS, logp, margin}, the last three a list over epochs, before
    the attack first. `known` cells are yielded as they are. ValueError where pool or rest is empty.
    """
    hits = answered(model, tokenizer, C_f, seed, eval_size)
    pool = [e for e, hit in zip(C_f, hits) if not hit]
    k = max(1, round(p * len(pool)))
    if k >= len(pool):
        raise ValueError(f"harmful attack at p = {p:g}: {len(pool)} of {len(C_f)} forget items are answered falsely; "
                         "expected enough to retrain on some and to score the rest")
    start = [w.detach().clone() for w in model.parameters()]
    for draw in range(seeds):
        chosen = set(random.Random(f"{seed} {draw} {p:g}").sample(range(len(pool)), k))
        rows = [encode(tokenizer, pool[i].question, pool[i].answers[0]) for i in sorted(chosen)]
        rest = [e for i, e in enumerate(pool) if i not in chosen]
        for lr in lrs:
            cell = {"kind": "harmful", "p": p, "seed": draw, "lr": lr, "n": len(rest), "retrained": k}
            found = [c for c in known if cell.items() <= c.items()]
            if not found:
                curve = [(0.0, *margin(model, tokenizer, rest))]  # the pool is what was answered falsely: FS is 0
                generator = torch.Generator().manual_seed(seed + draw)
                for _ in retrain(model, rows, lr, epochs, size, generator):
                    FS = score(answered(model, tokenizer, rest, seed, eval_size))["percent"]
                    curve.append((FS, *margin(model, tokenizer, rest)))
                with torch.no_grad():
                    for w, w_start in zip(model.parameters(), start):
                        w.copy_(w_start)
                found = [cell | dict(zip(("FS", "logp", "margin"), map(list, zip(*curve))))]
            yield found[0]


def summary(cells: list[dict]) -> dict:
    """One table cell: per draw the maximum over epochs and learning rates, then mean and spread over the draws.

    The interval is Wilson's at the mean with n of one draw: the draws share items, so n does not add up.
    """
    draws = [[c for c in cells if c["seed"] == draw] for draw in sorted({c["seed"] for c in cells})]
    best = [max(draw, key=lambda c: max(c["FS"])) for draw in draws]
    maxima, n = [max(c["FS"]) for c in best], best[0]["n"]
    mean = statistics.mean(maxima)
    low, high = wilson(mean, n)
    recovery = {}
    for key in ("logp", "margin"):
        recovery[f"{key}_before"] = statistics.mean(draw[0][key][0] for draw in draws)
        recovery[f"{key}_max"] = statistics.mean(max(max(c[key]) for c in draw) for draw in draws)
    return {"percent": round(mean, 2), "sd": round(statistics.pstdev(maxima), 2), "n": n, "low": low, "high": high,
            "draws": len(maxima), "retrained": best[0]["retrained"], "lr_of_max": [c["lr"] for c in best], **recovery}


@dataclass
class Settings:
    model: str = "runs/ssiuu-tiny"          # checkpoint directory or hub id
    forget: str = "data/faithun.json"       # FaithUn file
    splits: str = ""                        # folder of its split files; empty: faithun_splits beside it
    p: tuple = (0.1, 0.3)                   # fractions of the forget set to retrain on (6.2.2)
    attack_lrs: tuple = (1e-5, 5e-6, 1e-6)  # learning rates (6.2.2)
    attack_epochs: int = 10                 # unpublished
    attack_batch: int = 4                   # unpublished
    attack_seeds: int = 3                   # draws (6.2.2: three runs)
    seed: int = 0                           # of the draws, the batches and the options' order
    device: str = "cpu"                     # cpu, cuda, cuda:1, ...


def main() -> None:
    s = read_flags(Settings, __doc__)
    check_device(s.device)
    expect(p=(s.p, all(0 < p < 1 for p in s.p), "fractions between 0 and 1"),
           attack_lrs=(s.attack_lrs, all(0 < lr < 1 for lr in s.attack_lrs), "numbers between 0 and 1"),
           attack_epochs=(s.attack_epochs, s.attack_epochs > 0, "at least 1"),
           attack_seeds=(s.attack_seeds, s.attack_seeds > 0, "at least 1"))
    C_f, _, _ = splits_of(s.forget, s.splits)
    model, tokenizer = load(s.model, device=s.device)
    for p in s.p:
        cells = []
        for c in harmful_attack(model, tokenizer, C_f, p, s.attack_lrs, s.attack_seeds, s.attack_epochs,
                                s.attack_batch, s.seed):
            print(json.dumps(c), flush=True)
            cells.append(c)
        print(json.dumps({"kind": "summary", "p": p, **summary(cells)}), flush=True)


if __name__ == "__main__":
    run(main)
