"""Two attacks that are not in the paper: retraining LoRA's factors alone, and rounding the weights.

    python data/results/other_attacks.py --model runs/ssiuu-tiny --rank 8 --bits 8 4 --attack-lrs 1e-3

Prints a JSON line per cell and per column, as attack.py does.

Dimensions: r the rank of LoRA.
"""
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from attack import Harmful, attacked, falsely_answered, harmful_attack, retrain, summary  # noqa: E402
from data import Example, check_fits  # noqa: E402
from evaluate import hooked, read_flags, run, splits_of  # noqa: E402
from model import LM, Size, Tokenizer, load, one_process, refuse  # noqa: E402

Bits = Annotated[int, ("a whole number from 2 to 16", lambda x: 2 <= x <= 16)]

def projections(model: LM) -> list[nn.Linear]:
    """Every linear layer of the blocks: q, k, v, o, gate, up, down."""
    one_process("LoRA, rounding")
    return [layer for name, layer in model.named_modules() if name.endswith("_proj")]

@contextmanager
def lora(model: LM, rank: int, generator: torch.Generator) -> Iterator[list[nn.Parameter]]:
    """Inside, a block weight W (out, in) acts as W + alpha/r B A; B and A, yielded, learn alone (Hu et al.
    2022). B (out, r) starts at 0, A (r, in) Gaussian / sqrt(in), alpha = 2 r. At the end 2 B A stays in W."""
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

def retrain_lora(model: LM, rows: list, lr: float, epochs: int, size: int, generator: torch.Generator,
                 rank: int) -> Iterator[float]:
    """`retrain` of LoRA's factors; they are merged where it ends."""
    with lora(model, rank, generator) as weights:
        yield from retrain(model, rows, lr, epochs, size, generator, weights=weights)

@torch.no_grad()
def quantise(model: LM, bits: int) -> None:
    """Rounds each weight of the blocks to integers of so many bits and back, in place and in its own type: to
    nearest on a symmetric absmax grid per output row, no calibration. The row-wise half of LLM.int8()
    (Dettmers et al. 2022), and the baseline of GPTQ (Frantar et al. 2023)."""
    top = 2 ** (bits - 1) - 1
    for w in (layer.weight for layer in projections(model)):
        scale = (w.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(w.dtype).tiny)  # a row of zeros
        w.copy_((w / scale).round().clamp(-top, top) * scale)

def quantisation_attack(model: LM, tokenizer: Tokenizer, pool: list[Example], bits: int, size: int = 64
                        ) -> dict:
    """A cell, curves [before, after] `quantise`; seed, lr and retrained are 0. Zhang et al. 2025 (ICLR)."""
    key = {"kind": "quantise", "bits": bits, "seed": 0, "lr": 0.0, "n": len(pool), "retrained": 0}
    return attacked(model, tokenizer, key, (quantise(model, bits) for _ in range(1)), pool, size)

@dataclass
class Settings(Harmful):
    rank: Size | None = None              # LoRA's r; none: not attacked so
    bits: tuple[Bits, ...] | None = None  # round the weights to so many bits; none: not attacked so

def main() -> None:
    s, columns = read_flags(Settings, __doc__), {}
    if not (s.rank or s.bits):
        refuse("--rank, --bits: found neither, expected at least one")
    C_f = splits_of(s)[0]
    model, tokenizer = load(s.model, device=s.device)
    check_fits(model, tokenizer, C_f)
    pool = falsely_answered(model, tokenizer, C_f, s.eval_batch)
    if not pool:
        refuse(f"{s.model}: none of {len(C_f)} items is answered falsely, expected an unlearned model")
    for p in s.p if s.rank else ():
        how = partial(retrain_lora, rank=s.rank)
        columns[f"LoRA p = {p}"] = harmful_attack(model, tokenizer, pool, p, s, how=how)
    for bits in s.bits or ():
        columns[f"int{bits}"] = (quantisation_attack(model, tokenizer, pool, b, s.eval_batch) for b in [bits])
    for label, cells in columns.items():
        done = []
        for c in cells:
            print(json.dumps({"attack": label, **c}), flush=True)
            done.append(c)
        print(json.dumps({"kind": "summary", "attack": label, **summary(done)}), flush=True)

if __name__ == "__main__":
    run(main)
