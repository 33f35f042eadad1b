"""Attacks a checkpoint as in Section 6.2.2: does a little retraining, or rounding, bring the unlearned facts back?

    python attack.py --model runs/ssiuu-tiny --control data/tiny

Dimensions: B sequences, K tokens.
"""
import json
import random
import statistics
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import Example, batches, collate, encode, load_alpaca
from evaluate import accuracy, answered, check, hooked, margin, read_flags, run, splits_of, wilson
from model import LM, Tokenizer, answer_logprob, load, save


def projections(model: LM) -> list[nn.Linear]:
    """Every linear layer of the blocks: q, k, v, o, gate, up, down."""
    return [layer for name, layer in model.named_modules() if name.endswith("_proj")]


@contextmanager
def lora(model: LM, rank: int, generator: torch.Generator) -> Iterator[list[nn.Parameter]]:
    """Inside, a block weight W (out, in) acts as W + alpha/r B A, and only the yielded B and A learn (Hu et al. 2022).

    B (out, r) starts at zero, A (r, in) Gaussian / sqrt(in), alpha = 2 r. At the end B A is added to W for good.
    """
    learning, factors = [w for w in model.parameters() if w.requires_grad], {}
    for layer in projections(model):
        W = layer.weight
        A = torch.randn(rank, W.shape[1], generator=generator) / W.shape[1] ** 0.5
        factors[layer] = nn.Parameter(W.new_zeros(len(W), rank)), nn.Parameter(A.to(W))
    try:
        model.requires_grad_(False)
        with hooked(factors, lambda layer, x, y: y + 2 * (x[0] @ factors[layer][1].T @ factors[layer][0].T)):
            yield [w for pair in factors.values() for w in pair]
    finally:
        for layer, (B, A) in factors.items():
            layer.weight.data.add_((B @ A).data, alpha=2)
        for w in learning:
            w.requires_grad_(True)


def retrain(model: LM, rows: list, lr: float, epochs: int, size: int, generator: torch.Generator, rank: int = 0,
            points: int = 1) -> Iterator[float]:
    """Fine-tunes every weight, or LoRA of a rank > 0, on encoded (x, y) pairs, loss -mean log P(y|x), AdamW.

    Yields, `points` times an epoch at regular batches (at most once a batch), the mean loss since the last time.
    A batch holds rows of like length, which wastes little on padding; the batches' order is new each epoch.
    """
    with lora(model, rank, generator) if rank else nullcontext(list(model.parameters())) as weights:
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True)
        rows = sorted(rows, key=lambda row: len(row[0]))
        parts = [collate(rows[i:i + size], model.device) for i in range(0, len(rows), size)]
        order, losses = batches(len(parts), 1, generator), []
        ends = {len(parts) * (i + 1) // points for i in range(points)}
        for done in [i for _ in range(epochs) for i in range(1, len(parts) + 1)]:
            batch = parts[next(order)[0]]
            loss = -answer_logprob(model, batch).mean()
            if not loss.isfinite():
                raise FloatingPointError(f"retraining at {lr:g}: loss is {loss.item()}, expected a number: lower it")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if done in ends:
                yield statistics.mean(losses)
                losses = []


@torch.no_grad()
def quantise(model: LM, bits: int) -> None:
    """Rounds each weight of the blocks to integers of so many bits and back, in place, in the weights' own type.

    Round to nearest on a symmetric absmax grid per output row, -(2^(bits-1) - 1) .. 2^(bits-1) - 1, no calibration:
    the row-wise half of LLM.int8() (Dettmers et al. 2022), and the baseline of GPTQ (Frantar et al. 2023).
    """
    top = 2 ** (bits - 1) - 1
    for w in (layer.weight for layer in projections(model)):
        scale = (w.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(w.dtype).tiny)  # 0 / 0 in a row of zeros
        w.copy_((w / scale).round().clamp(-top, top) * scale)


def falsely_answered(model: LM, tokenizer: Tokenizer, C_f: list[Example], eval_size: int = 64) -> list[Example]:
    """The attack pool (Section 6.2.2): what the unlearned model answers falsely, so no chance hits; all of TOFU."""
    if not all(e.false_options for e in C_f):
        return list(C_f)
    return [e for e, hit in zip(C_f, answered(model, tokenizer, C_f, size=eval_size)) if not hit]


def attacked(model: LM, tokenizer: Tokenizer, cell: dict, changes: Generator, scored: list[Example],
             eval_size: int, known: tuple | list = ()) -> dict:
    """The cell with FS, logp and margin of `scored` as lists: before the attack, then each time `changes` yields.

    A known cell is returned as it is, with nothing run. The weights are restored bit for bit, also after an error.
    ValueError where nothing is left to score.
    """
    def measure() -> tuple:
        return accuracy(model, tokenizer, scored, eval_size)["percent"], *margin(model, tokenizer, scored, eval_size)

    if not scored:
        raise ValueError(f"{cell['kind']} attack: no item answered falsely is left to score, expected at least one")
    for c in known:
        if cell.items() <= c.items():
            return c
    start = [w.detach().clone() for w in model.parameters()]
    try:
        with closing(changes):  # before the weights go back: LoRA ends by adding to them
            curve = [measure()] + [measure() for _ in changes]
    finally:
        for w, w_start in zip(model.parameters(), start):
            w.data.copy_(w_start)
    return cell | dict(zip(("FS", "logp", "margin"), map(list, zip(*curve))))


def drawn(tokenizer: Tokenizer, pool: list[Example], p: float, draw: int, seed: int) -> tuple[list, list[Example]]:
    """A fraction p of the pool, encoded to be retrained, and the rest, to be scored."""
    k = min(len(pool), max(1, round(p * len(pool))))
    chosen = set(random.Random(f"{seed} {draw} {p:g}").sample(range(len(pool)), k))
    return ([encode(tokenizer, pool[i].question, pool[i].answers[0]) for i in sorted(chosen)],
            [e for i, e in enumerate(pool) if i not in chosen])


def harmful_attack(model: LM, tokenizer: Tokenizer, pool: list[Example], p: float, lrs: tuple = (1e-5, 5e-6, 1e-6),
                   seeds: int = 3, epochs: int = 10, size: int = 4, seed: int = 0, eval_size: int = 64, rank: int = 0,
                   known: tuple | list = ()) -> Iterator[dict]:
    """Retrain on a fraction p of the pool, score FS on the disjoint rest after each epoch (Section 6.2.2 (1)).

    The pool is the unlearned model's (`falsely_answered`), also where a control model is attacked. Each of `seeds`
    draws is retrained with each learning rate from the same weights. Yields a cell per draw and rate: {kind, p, seed,
    lr, rank, n, retrained, FS, logp, margin}, the last three lists over epochs. ValueError for an empty rest.
    """
    for draw in range(seeds):
        rows, rest = drawn(tokenizer, pool, p, draw, seed)
        for lr in lrs:
            cell = {"kind": "harmful", "p": p, "seed": draw, "lr": lr, "rank": rank, "n": len(rest),
                    "retrained": len(rows)}
            changes = retrain(model, rows, lr, epochs, size, torch.Generator().manual_seed(seed + draw), rank)
            yield attacked(model, tokenizer, cell, changes, rest, eval_size, known)


def benign_attack(model: LM, tokenizer: Tokenizer, pool: list[Example], rows: list[Example],
                  lrs: tuple = (1e-5, 1e-6, 1e-7), seeds: int = 3, limit: int = 1000, points: int = 5, size: int = 4,
                  seed: int = 0, eval_size: int = 64, rank: int = 0, known: tuple | list = ()) -> Iterator[dict]:
    """Retrain on up to `limit` instructions, which hold none of the facts, score FS on all the pool (6.2.2 (2)).

    Each seed draws rows and order; one pass, scored at `points` regular points. Cells as harmful_attack's, without p.
    """
    for draw in range(seeds):
        chosen = random.Random(f"{seed} {draw} benign").sample(rows, min(limit, len(rows)))
        encoded = [encode(tokenizer, e.question, e.answers[0]) for e in chosen]
        for lr in lrs:
            cell = {"kind": "benign", "seed": draw, "lr": lr, "rank": rank, "n": len(pool), "retrained": len(chosen)}
            changes = retrain(model, encoded, lr, 1, size, torch.Generator().manual_seed(seed + draw), rank, points)
            yield attacked(model, tokenizer, cell, changes, pool, eval_size, known)


def quantisation_attack(model: LM, tokenizer: Tokenizer, pool: list[Example], bits: int, eval_size: int = 64,
                        known: tuple | list = ()) -> Iterator[dict]:
    """One cell, curves [before, after] `quantise`. Not in the paper: Zhang et al. 2025 (ICLR).

    Nothing is drawn or retrained: seed, lr and retrained are 0, and `summary` works as for the others.
    """
    cell = {"kind": "quantise", "bits": bits, "seed": 0, "lr": 0.0, "n": len(pool), "retrained": 0}
    yield attacked(model, tokenizer, cell, (quantise(model, bits) for _ in range(1)), pool, eval_size, known)


def attacks(model: LM, tokenizer: Tokenizer, pool: list[Example], s, report: Callable[[str, dict], None],
            known: tuple | list = ()) -> dict[str, dict]:
    """{column of the table: `summary`} of every attack that the settings `s` ask for; report(column, cell) as each cell
    ends. An impossible attack is a column that says why."""
    same = {"seeds": s.attack_seeds, "size": s.attack_batch, "seed": s.seed, "rank": s.attack_rank, "known": known,
            "eval_size": s.eval_batch}
    columns = {f"Harmful p = {p:g}": harmful_attack(model, tokenizer, pool, p, s.attack_lrs, epochs=s.attack_epochs,
                                                    **same) for p in s.p}
    if s.benign:
        columns["Benign"] = benign_attack(model, tokenizer, pool, load_alpaca(s.benign), s.benign_lrs,
                                          limit=s.benign_rows, points=s.benign_points, **same)
    columns |= {f"int{bits}": quantisation_attack(model, tokenizer, pool, bits, s.eval_batch, known) for bits in s.bits}
    for label, cells in columns.items():
        done = []
        try:
            for c in cells:
                done.append(c)
                report(label, c)
            columns[label] = summary(done)
        except (ValueError, FloatingPointError) as e:
            columns[label] = {"percent": None, "why": str(e)}
    return columns


def summary(cells: list[dict]) -> dict:
    """One table cell: per draw the maximum after the attack began, over points and rates; mean and spread over draws.

    The interval is Wilson's at the mean with n of one draw: the draws share items, so n does not add up.
    """
    draws = [[c for c in cells if c["seed"] == draw] for draw in sorted({c["seed"] for c in cells})]
    best = [max(draw, key=lambda c: max(c["FS"][1:])) for draw in draws]
    maxima, n = [max(c["FS"][1:]) for c in best], best[0]["n"]
    recovery = {}
    for key in ("logp", "margin"):
        recovery[f"{key}_before"] = statistics.mean(draw[0][key][0] for draw in draws)
        recovery[f"{key}_max"] = statistics.mean(max(max(c[key][1:]) for c in draw) for draw in draws)
    return {**wilson(statistics.mean(maxima), n), "sd": round(statistics.pstdev(maxima), 2), "draws": len(maxima),
            "retrained": best[0]["retrained"], "lr_of_max": [c["lr"] for c in best], **recovery}


@dataclass
class Settings:
    model: str = "runs/ssiuu-tiny"          # checkpoint directory or hub id; what it answers falsely is the pool
    control: str = ""                       # attack these on the same items, with commas: original, never taught
    forget: str = "data/faithun.json"       # FaithUn file, or TOFU's forget01
    splits: str = ""                        # folder of its split files; empty: faithun_splits beside it
    retain: str = ""                        # TOFU's retain99, where --forget is TOFU's forget01
    p: tuple = (0.1, 0.3)                   # fractions of the pool to retrain on (6.2.2)
    attack_lrs: tuple = (1e-5, 5e-6, 1e-6)  # learning rates of the harmful attack (6.2.2, D.2)
    attack_epochs: int = 10                 # of the harmful attack; unpublished
    attack_batch: int = 4                   # of both attacks; unpublished
    attack_seeds: int = 3                   # draws (6.2.2: three runs)
    attack_rank: int = 0                    # LoRA's r, not in the paper; 0: every weight is retrained
    benign: str = "data/instructions.json"  # Alpaca file of the benign attack (6.2.2); empty: no benign attack
    benign_lrs: tuple = (1e-5, 1e-6, 1e-7)  # learning rates of the benign attack (6.2.2, D.2)
    benign_rows: int = 1000                 # rows a draw, one pass (6.2.2; the passes are unpublished)
    benign_points: int = 5                  # scores in a pass; unpublished
    bits: tuple = (8, 4)                    # attack by rounding the weights to so many bits; not in the paper
    seed: int = 0                           # of the draws and the batches
    save: str = ""                          # only write the model that the first p, rate and draw end in to this folder
    eval_batch: int = 64                    # sequences at a time when scoring
    device: str = "cpu"                     # cpu, cuda, cuda:1, ...


def main() -> None:
    s = read_flags(Settings, __doc__)
    check(s, save=(s.save, not s.save or not s.control and not Path(s.save).exists(), "a new folder, and no --control"),
          attack_seeds=(s.attack_seeds, s.attack_seeds > 0, "at least 1"))
    if s.benign:
        load_alpaca(s.benign)  # before the work, not after it
    (C_f, _, _), pool = splits_of(s.forget, s.splits, retain=s.retain), []
    for name in (s.model, *filter(None, s.control.split(","))):
        model, tokenizer = load(name, device=s.device)
        pool = pool or falsely_answered(model, tokenizer, C_f, s.eval_batch)
        if not pool:
            raise ValueError(f"{name}: none of {len(C_f)} items is answered falsely, expected an unlearned model")
        if s.save:  # for evaluate.py --attacked
            Path(s.save).mkdir(parents=True)  # what cannot be written ends before the work
            rows, _ = drawn(tokenizer, pool, s.p[0], 0, s.seed)
            settings = s.attack_lrs[0], s.attack_epochs, s.attack_batch, torch.Generator().manual_seed(s.seed)
            for loss in retrain(model, rows, *settings, s.attack_rank):
                print(f"{name}: retrained on {len(rows)} of {len(pool)} items, loss {loss:.4f}", flush=True)
            return save(model, tokenizer, s.save)
        found = attacks(model, tokenizer, pool, s, lambda _, c: print(json.dumps({"model": name, **c}), flush=True))
        for label, result in found.items():
            print(json.dumps({"model": name, "kind": "summary", "attack": label, **result}), flush=True)


if __name__ == "__main__":
    run(main)
