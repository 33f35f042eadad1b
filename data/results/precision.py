"""How wrong are a step's gradients in lower precision, on the weights of a float32 run of Algorithm 1?

    python data/results/precision.py --model data/tiny --lr 5e-5
    python data/results/precision.py --model SMOLLM2-TAUGHT --lr 1e-5 --items 8

At each step the gradients of L and of the penalty are taken in float32, under bfloat16 autocast, and on CUDA
in TF32. Prints and writes |wrong - right| / |right| of both.
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import Batch, check_fits, collate, encoded  # noqa: E402
from evaluate import Data, Name, Rate, check_folder, read_flags, run, splits_of  # noqa: E402
from model import LM, Count, Positive, answer_logprob, load, write_json  # noqa: E402
from ssiuu import attribution, gd_loss, negative, surrogate, penalty_weights, provenance  # noqa: E402

@dataclass
class Settings(Data):
    lr: Rate = 1e-5                      # of the run
    steps: Count = 12                    # of the run
    items: Count = 33                    # sequences of C_f and of C_r
    lam: Positive = 0.1                  # weight of the penalty
    out: Name = "runs/precision.json"    # where the numbers go

@contextmanager
def precision(kind: str, device: torch.device):
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    with torch.autocast(device.type, torch.bfloat16, kind == "bfloat16", cache_enabled=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = False

def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])

def gradients(model: LM, b: Batch, b_r: Batch, A_prev: list | None, lam: float, kind: str) -> tuple:
    """(L's gradient, the penalty's gradient or None at t = 1, A), the first two flat."""
    phi, penalty = list(model.parameters()), None
    with precision(kind, model.device):
        logp = answer_logprob(model, b)
        L = gd_loss(logp, answer_logprob(model, b_r))
        A = attribution(logp.exp().sum(), phi)
        constant = [a.detach() for a in A]
        if A_prev:
            w = penalty_weights(constant, A_prev, negative(constant), lam)
            penalty = flat(torch.autograd.grad(surrogate(0 * L, A, w), phi, retain_graph=True))
        return flat(torch.autograd.grad(L, phi)), penalty, constant

def main() -> None:
    s = read_flags(Settings, __doc__)
    check_folder("--out", Path(s.out).parent)
    C_f, C_r = (C[:s.items] for C in splits_of(s)[:2])
    model, tokenizer = load(s.model, device=s.device)
    check_fits(model, tokenizer, C_f + C_r)
    b, b_r = (collate(encoded(tokenizer, C), s.device) for C in (C_f, C_r))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0, fused=True)
    kinds, A_prev, found = ["bfloat16"] + ["tf32"] * s.device.startswith("cuda"), dict(), []
    for t in range(1, s.steps + 1):
        *right, A = gradients(model, b, b_r, A_prev.get("float32"), s.lam, "float32")
        A_now, found = {"float32": A}, [*found, {"t": t}]
        for kind in kinds:  # each with its own A_prev, as a run in that precision has
            *wrong, A_now[kind] = gradients(model, b, b_r, A_prev.get(kind), s.lam, kind)
            for name, x, y in zip(("L", "penalty"), wrong, right):
                if y is not None and y.any():
                    found[-1][f"{kind} {name}"] = ((x - y).norm() / y.norm()).item()
        print("  ".join(f"{key} {x:.3g}" for key, x in found[-1].items()), flush=True)
        A_prev, start, J = A_now, 0, sum(x for x in right if x is not None)
        for p in model.parameters():
            p.grad = J[start:start + p.numel()].view_as(p)
            start += p.numel()
        optimizer.step()
    write_json(Path(s.out), {"model": s.model, "lr": s.lr, "lam": s.lam, "errors": found, **provenance()})

if __name__ == "__main__":
    run(main)
