"""SSIUU: suppress spurious unlearning neurons, so that knowledge is erased and not hidden (Section 5, Algorithm 1).

    python ssiuu.py --forget data/faithun.json                  # unlearn, score, attack, print the paper's row

code      paper                        shape      where
phi       phi_t, the parameters        list       Eq. 12; one tensor a parameter, as in model.parameters()
P         P_phi(y|x)                   scalar     Section 2; summed over the batch b in Alg. 1 l.5
g         dP/dphi                      like phi   Eq. 12
A         A_phi, parameter attribution like phi   Eq. 12; Alg. 1 l.5
A_prev    A at the previous step       like phi   Eq. 3; Alg. 1 l.12; a constant
I_neg     I^-, where A < 0             like phi   Alg. 1 l.10; bool
delta     Delta = A - A_prev           like phi   Eq. 7
v, Hv     2 lam Delta phi; H v         like phi   Appendix B; H is the Hessian of P
lam, eta  lambda; the learning rate    float      Eq. 3; Alg. 1
C_f C_r C_t   forget, retain, test set list       Section 2; b, b_r are batches of C_f, C_r (b, b' in Alg. 1)
tau       threshold on FS              float      Section 6.1
FS RS     forgetting, retention score  percent    Section 6.2.1

Dimensions: B sequences, K tokens.
"""
import json
import math
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from attack import harmful_attack, retrain, summary
from data import Example, batches, collate, encode, mcqa_prompt
from evaluate import accuracy, check_device, expect, margin, read_flags, run, splits_of
from model import LM, Tokenizer, answer_logprob, load, save, write, write_tensors

Tensors = list[Tensor]
Row = tuple[list[int], list[bool]]  # one encoded (x, y) of data.encode

# ==================================================================== the method: torch only, paste from here


def attribution(P: Callable[[], Tensor], phi: Tensors) -> tuple[Tensors, Tensors]:
    """(g, A): the gradient of P and each scalar parameter's attribution to it (Eq. 12; Alg. 1 l.5).

    P() is the scalar sum of P(y|x) over b, in a graph that can be differentiated twice: attention must be
    written out, fused kernels have no second derivative. g and A carry their graphs; detach A to keep it.
    """
    g = list(torch.autograd.grad(P(), phi, create_graph=True))
    return g, [p * g_p for p, g_p in zip(phi, g)]


def negative(A: Tensors) -> Tensors:
    """I^-, the parameters with negative attribution, as bool masks (Alg. 1 l.10)."""
    return [a < 0 for a in A]


def ssiuu_loss(A: Tensors, A_prev: Tensors, I_neg: Tensors) -> Tensor:  # -> ()
    """L_SSIUU, the squared change of negative attribution (Eq. 6; Alg. 1 l.11). A_prev and I_neg are constants."""
    return sum((i * (a_prev.detach() - a)).square().sum() for a, a_prev, i in zip(A, A_prev, I_neg))


def penalty_vector(A: Tensors, A_prev: Tensors, I_neg: Tensors, phi: Tensors, lam: float) -> Tensors:
    """v = 2 lam Delta phi on I^-, 0 elsewhere, as constants (Eq. 7, 10; App. B)."""
    with torch.no_grad():
        return [(a - a_prev).mul_(i).mul_(p).mul_(2 * lam) for a, a_prev, i, p in zip(A, A_prev, I_neg, phi)]


def hvp(g: Tensors, phi: Tensors, v: Tensors) -> Tensors:
    """H v = grad <grad P, v>, without forming H (App. B, after Eq. 14). v is a constant; g comes from attribution()."""
    return list(torch.autograd.grad(g, phi, grad_outputs=v, retain_graph=True))


def ssiuu_grad(g: Tensors, A: Tensors, A_prev: Tensors, phi: Tensors, lam: float) -> Tensors:
    """The penalty's part of the gradient of J, Eq. 14: 2 lam (Delta g + H (Delta phi)), Delta taken on I^-.

    Add it to the gradient of any unlearning loss. `ssiuu_backward` does both in fewer passes.
    """
    I_neg = negative(A)
    delta = [i * (a - a_prev).detach() for a, a_prev, i in zip(A, A_prev, I_neg)]              # Eq. 7
    Hv = hvp(g, phi, penalty_vector(A, A_prev, I_neg, phi, lam))
    return [2 * lam * d * g_p.detach() + h for d, g_p, h in zip(delta, g, Hv)]                 # Eq. 13, 14


def ssiuu_backward(L: Tensor, g: Tensors, v: Tensors, phi: Tensors, first_order: bool = False) -> None:
    """Adds the gradient of J (Eq. 8) to each .grad: dL + 2 lam (Delta g + H (Delta phi)), all of Eq. 14.

    L is the backbone's loss, v comes from `penalty_vector`. L and P share one forward pass, so one backward pass
    from (L, g) weighted by (1, v) gives dL + H v (Eq. 9, 11). The direct term 2 lam Delta g is v g / phi: where v is
    not 0, A = phi g < 0 and phi cannot be 0. Nothing the size of phi is held beside g, v and .grad.
    `first_order` takes g as a constant: no H.
    """
    roots, weights = ([L], [None]) if first_order else ([L, *g], [torch.ones_like(L), *v])
    torch.autograd.backward(roots, weights)
    with torch.no_grad():
        for p, g_p, v_p in zip(phi, g, v):
            p.grad += (v_p * g_p).div_(p).nan_to_num_(0)  # 0 / 0 where phi is 0; masked_fill_ takes ten times as long


def ga_loss(logp_f: Tensor) -> Tensor:  # (B,) -> ()
    """Gradient ascent on the negative log-likelihood of the forget set (C.2 (1); Jang et al. 2022)."""
    return logp_f.mean()


def retain_loss(logp_r: Tensor) -> Tensor:  # (B,) -> ()
    """The auxiliary retention loss: negative log-likelihood of the retain set, nats per sequence (C.2 (2))."""
    return -logp_r.mean()


def gd_loss(logp_f: Tensor, logp_r: Tensor) -> Tensor:  # (B,), (B,) -> ()
    """Gradient difference: forget by ascent, retain by descent (C.2 (2); Maini et al. 2024)."""
    return ga_loss(logp_f) + retain_loss(logp_r)


# ================================================================================================ to here


@dataclass
class Settings:
    forget: str = "data/faithun.json"     # FaithUn file: questions, answers, false options (C.1)
    splits: str = ""                      # folder of its split files (C.1: 5, 10, 70 %); empty: faithun_splits beside it
    model: str = "data/tiny"              # checkpoint directory or hub id
    method: str = "ssiuu"                 # ssiuu, or the backbone alone: gd, ga
    backbone: str = "gd"                  # loss under SSIUU's penalty: gd (C.2 (7)), ga
    lam: float = 1e-3                     # weight of the penalty (C.2 (7): 1e-3 FaithUn, 1e-4 TOFU)
    lr: float = 1e-5                      # eta; unpublished: the paper takes the lowest that still converges (6.1)
    steps: int = 100                      # T, at most; unpublished
    tau: float = 0.33                     # stop when FS <= tau (6.1)
    batch_size: int = 0                   # b and b_r; unpublished; 0: all of C_f, where Alg. 1 l.12 and Eq. 3 agree
    micro_batch: int = 0                  # sequences in one graph, less memory for more time; 0: the whole batch
    per_example: bool = False             # square A per (x, y) as Eq. 6, not its sum over b as Alg. 1 l.11
    anchor: str = "previous"              # A_prev: previous step (Eq. 3), or initial (Section 1: original levels)
    target: str = "prob"                  # P: prob (Eq. 12), or logprob, which does not vanish with P
    scope: str = "all"                    # parameters under the penalty: all (Eq. 12), or linear: q k v o gate up down
    first_order: bool = False             # drop the Hessian of Eq. 14
    p: tuple = (0.1, 0.3)                 # fractions of the forget set that the harmful attack retrains on (6.2.2)
    attack_lrs: tuple = (1e-5, 5e-6, 1e-6)  # learning rates of the harmful attack (6.2.2)
    attack_epochs: int = 10               # unpublished
    attack_batch: int = 4                 # unpublished
    attack_seeds: int = 3                 # draws of the retrained fraction (6.2.2: three runs)
    teach: bool = False                   # first fine-tune on the facts, for a model that does not know them (C.1)
    teach_lr: float = 1e-5                # C.1 (TOFU)
    teach_epochs: int = 5                 # C.1 (TOFU)
    test_limit: int = 0                   # teach and score the first so many items of C_t only; 0: all
    seed: int = 0                         # of batches, options' order and attack draws
    device: str = "cpu"                   # cpu, cuda, cuda:1, ...
    dtype: str = "float32"                # of the arithmetic: float32, or bfloat16 (autocast); weights stay float32
    eval_batch: int = 64                  # sequences at a time when scoring
    save_every: int = 10                  # steps between resumable states
    name: str = ""                        # results go to runs/<name>; empty: <method>-<model>
    resume: str = ""                      # continue this run's folder
    bench: bool = False                   # only time one GD and one SSIUU step of batch_size x bench_tokens in turn
    bench_tokens: int = 64                # K of --bench


@dataclass
class State:
    """What a resumed run needs beside the weights. A_prev is optimizer state: without it a step loses its penalty."""
    optimizer: torch.optim.Optimizer
    t: int = 0
    A_prev: dict[int, Tensors] = field(default_factory=dict)  # {0: A of the batch}, or {index in C_f: A of (x, y)}


def total(lists: Iterable[Tensors]) -> Tensors:
    return [sum(same[1:], same[0]) for same in zip(*lists)]


def forget_step(model: LM, phi: Tensors, b: dict[int, Row], state: State, s: Settings) -> dict:
    """Alg. 1 l.4-12 for the forget batch b, {index in C_f: row}: adds its gradient to .grad, renews state.A_prev."""
    logps: dict[int, Tensor] = {}

    def graph(part: list[int]) -> tuple[Tensor, Tensors]:
        logp = answer_logprob(model, collate([b[i] for i in part]).to(phi[0].device))
        logps.update(zip(part, logp.detach()))
        L = ga_loss(logp) * len(part) / len(b)                                                     # l.4
        P = logp.sum() if s.target == "logprob" else logp.exp().sum()
        return L, list(torch.autograd.grad(P, phi, create_graph=True)) if s.method == "ssiuu" else []  # g of Eq. 12

    size = 1 if s.per_example else s.micro_batch or len(b)
    parts = [list(b)[i:i + size] for i in range(0, len(b), size)]
    if s.method == "ssiuu":
        stats = penalised_backward(graph, parts, phi, state.A_prev, s)
    else:
        stats = {}
        for part in parts:
            graph(part)[0].backward()
    return {"logp": list(logps.values()), **stats}


def penalised_backward(graph: Callable, parts: list[list[int]], phi: Tensors, A_prev: dict, s: Settings) -> dict:
    """Alg. 1 l.5-13 over micro-batches, graph(part) -> (its share of L, g); renews A_prev.

    Micro-batches do not change the result: A is summed over them first, v is then frozen, and dL + H v is a sum
    over them (Eq. 14). With --per-example each (x, y) is a part with its own A and Delta (Eq. 6).
    """
    groups, A = {part[0]: [part] for part in parts} if s.per_example else {0: parts}, {}
    held = graph(parts[0]) if len(parts) == 1 else None               # the only graph serves both passes
    for key, group in groups.items() if not held else ():
        for part in group:
            A_part = phi_g(phi, graph(part)[1])                                                    # l.5
            A[key] = total([A[key], A_part]) if key in A else list(A_part)
    I_neg, L_ssiuu = negative(total(A.values()) if A else phi_g(phi, held[1])), 0.0                # l.10
    for key, group in groups.items():
        v = None                                                                                   # l.7, l.8
        if key in A_prev:
            v, L_key = penalty(A.get(key) or phi_g(phi, held[1]), A_prev[key], I_neg, phi, s)      # l.11
            L_ssiuu += L_key
        for part in group:
            L, g = held or graph(part)
            L.backward() if v is None else ssiuu_backward(L, g, v, phi, s.first_order)             # l.13
        if s.anchor == "previous" or key not in A_prev:                                            # l.12
            A_prev[key] = A.get(key) or [a if v is None else v[k].copy_(a) for k, a in enumerate(phi_g(phi, g))]
    return {"L_SSIUU": L_ssiuu, "I_neg": sum(i.sum().item() for i in I_neg) / sum(p.numel() for p in phi)}


def phi_g(phi: Tensors, g: Tensors) -> Iterator[Tensor]:
    """A of Eq. 12 without its graph, one parameter at a time: a list of them would be one more buffer like phi."""
    return (p.detach() * g_p.detach() for p, g_p in zip(phi, g))


@torch.no_grad()
def penalty(A: Iterable[Tensor], A_prev: Tensors, I_neg: Tensors, phi: Tensors, s: Settings) -> tuple[Tensors, float]:
    """(v, L_SSIUU): `penalty_vector` and `ssiuu_loss` written over A_prev, where that is about to be replaced."""
    v, L_ssiuu = [], 0.0
    for a, a_prev, i, p in zip(A, A_prev, I_neg, phi):
        delta = torch.sub(a, a_prev, out=a_prev if s.anchor == "previous" else None).mul_(i)              # Eq. 7
        L_ssiuu += delta.norm().item() ** 2                                                        # Eq. 6
        v.append(delta.mul_(p).mul_(2 * s.lam))                                                    # App. B
    return v, L_ssiuu


def retain_step(model: LM, b_r: list[Row], s: Settings) -> float:
    """Adds the gradient of GD's retention loss on the retain batch b' to .grad (Alg. 1 l.4); returns the loss."""
    loss, size = 0.0, s.micro_batch or len(b_r)
    for part in (b_r[i:i + size] for i in range(0, len(b_r), size)):
        L = retain_loss(answer_logprob(model, collate(part).to(model.lm_head.weight.device))) * len(part) / len(b_r)
        L.backward()
        loss += L.item()
    return loss


def scope_of(model: LM, scope: str) -> Tensors:
    """The parameters under the penalty: every scalar one (Eq. 12), or the weights of q, k, v, o, gate, up, down."""
    return [p for name, p in model.named_parameters() if scope == "all" or name.endswith("_proj.weight")]


def unlearn(model: LM, tokenizer: Tokenizer, C_f: list[Example], C_r: list[Example], s: Settings,
            state: State) -> Iterator[dict]:
    """Algorithm 1; yields the numbers of each step, the last one where FS <= tau. FloatingPointError on NaN."""
    phi, sets = scope_of(model, s.scope), [[encode(tokenizer, e.question, e.answers[0]) for e in C] for C in (C_f, C_r)]
    forget, retain = (batches(len(rows), s.batch_size or len(C_f), torch.Generator().manual_seed(s.seed + k))
                      for k, rows in enumerate(sets))
    for _ in range(state.t):                            # a resumed run draws on where it stopped
        next(forget), next(retain)
    for state.t in range(state.t + 1, s.steps + 1):                                                # Alg. 1 l.1
        start = time.time()
        b = {i: sets[0][i] for i in next(forget)}                                                  # l.2
        b_r = [sets[1][i] for i in next(retain)]                                                   # l.3
        stats = forget_step(model, phi, b, state, s)                                               # l.4-13
        L_r = retain_step(model, b_r, s) if s.backbone != "ga" else 0.0
        logp = torch.stack(stats.pop("logp"))
        stats |= {"L": ga_loss(logp).item() + L_r, "L_r": L_r, "P": logp.exp().mean().item()}
        # A model of NaN answers nothing and would pass for unlearned, so the gradient is checked, not the loss alone.
        if not all(math.isfinite(x) for x in stats.values()) or not all(p.grad.isfinite().all() for p in phi):
            raise FloatingPointError(f"step {state.t}: loss or gradient is not finite (L {stats['L']:.3g}), expected "
                                     f"numbers: lower --lr {s.lr:g} or --lam {s.lam:g}")
        state.optimizer.step()                                                                     # l.14
        state.optimizer.zero_grad()
        FS = accuracy(model, tokenizer, C_f, s.seed, s.eval_batch)["percent"]
        yield {"kind": "step", "t": state.t, **stats, "FS": FS, "seconds": time.time() - start}
        if FS <= 100 * s.tau:                                                                      # Section 6.1
            return


# ------------------------------------------------------------------------------------------- the experiment


def save_state(path: Path, model: LM, state: State) -> None:
    """One file, moved into place: weights, Adam's moments, A_prev and t always belong to the same step."""
    tensors = {f"model {name}": w for name, w in model.named_parameters()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam {i} {key}": x for key, x in moments.items()}
    for key, A in state.A_prev.items():
        tensors |= {f"A_prev {key} {i}": a for i, a in enumerate(A)}
    write_tensors(path, tensors, {"t": str(state.t)})


def load_state(path: Path, model: LM, state: State) -> None:
    device, weights, adam = model.lm_head.weight.device, dict(model.named_parameters()), {}
    with safe_open(path, "pt", device=str(device)) as file:
        state.t = int(file.metadata()["t"])
        for name in file.keys():
            kind, key, *last = name.split(" ")
            if kind == "model":
                weights[key].data.copy_(file.get_tensor(name))
            elif kind == "adam":
                adam.setdefault(int(key), {})[last[0]] = file.get_tensor(name)
            else:
                state.A_prev.setdefault(int(key), {})[int(last[0])] = file.get_tensor(name)
    state.A_prev = {key: [A[i] for i in sorted(A)] for key, A in state.A_prev.items()}
    state.optimizer.load_state_dict({"state": adam, "param_groups": state.optimizer.state_dict()["param_groups"]})


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl; a last line that a kill cut short is dropped."""
    lines = path.read_text().split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in lines[:-1]]


def new_folder(s: Settings) -> Path:
    """runs/<name>; the default name counts up where it is taken, a chosen one must be free."""
    name = s.name or f"{s.method}-{Path(s.model).name}"
    expect(name=(s.name, not (s.name and Path("runs", s.name).exists()), "a new name, or --resume for that folder"))
    names = [name] + [f"{name}-{k}" for k in range(2, 10000)]
    folder = next(Path("runs", n) for n in names if not Path("runs", n).exists())
    folder.mkdir(parents=True)
    return folder


def teach(model: LM, tokenizer: Tokenizer, examples: list[Example], s: Settings) -> None:
    """Fine-tunes on each fact as a plain question and in Table 3's form, options in an order scoring does not use."""
    rng, start = random.Random(f"teach {s.seed}"), time.time()
    rows = [encode(tokenizer, q, e.answers[0]) for e in examples for q in (e.question, mcqa_prompt(e, rng))]
    losses = retrain(model, rows, s.teach_lr, s.teach_epochs, 8, torch.Generator().manual_seed(s.seed))
    for i, loss in enumerate(losses, 1):
        print(f"teach {i}/{s.teach_epochs}  loss {loss:.4f}  {time.time() - start:.0f}s  "
              f"eta {(time.time() - start) / i * (s.teach_epochs - i):.0f}s", flush=True)


def scores(model: LM, tokenizer: Tokenizer, C_f: list[Example], C_t: list[Example], s: Settings) -> dict:
    logp, lead = margin(model, tokenizer, C_f)
    return {"FS": accuracy(model, tokenizer, C_f, s.seed, s.eval_batch),
            "RS": accuracy(model, tokenizer, C_t, s.seed, s.eval_batch), "forget_logp": logp, "forget_margin": lead}


def cell(x: dict | None) -> str:
    if not x or x["percent"] is None:
        return "-"
    spread = f"±{x['sd']:.1f}" if "sd" in x else ""
    return f"{x['percent']:.1f}{spread} [{x['low']:.0f}, {x['high']:.0f}] n={x['n']}"


def table(result: dict) -> str:
    """The row of Table 1 in Markdown: percent, ± spread over draws, [95 % interval], n."""
    harmful = result.get("harmful", {})
    rows = [["Method", "FS ↓", "RS ↑", *(f"Harmful p = {p} ↓" for p in harmful)],
            ["Default", cell(result["before"]["FS"]), cell(result["before"]["RS"]), *("-" for _ in harmful)],
            [result["settings"]["method"], cell(result["after"]["FS"]), cell(result["after"]["RS"]),
             *(cell(x) for x in harmful.values())]]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def train(model: LM, tokenizer: Tokenizer, C_f: list[Example], C_r: list[Example], s: Settings, folder: Path,
          log: list[dict]) -> None:
    """Runs or resumes Algorithm 1 with a progress line, a log record and, every `save_every` steps, a saved state."""
    state, start = State(torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0, fused=True)), time.time()
    if (folder / "state.safetensors").is_file():
        load_state(folder / "state.safetensors", model, state)
    # Steps after the last saved state are run again, and what followed them is scored again.
    log[:] = [r for r in log if r["kind"] in ("settings", "before") or r["kind"] == "step" and r["t"] <= state.t]
    write(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log).encode())
    first = state.t
    reached = any(r["kind"] == "step" and r["FS"] <= 100 * s.tau for r in log)  # killed between last step and save
    for r in () if reached else unlearn(model, tokenizer, C_f, C_r, s, state):
        note(folder, log, r)
        eta = (time.time() - start) / (state.t - first) * (s.steps - state.t)
        print(f"step {r['t']}/{s.steps}  L {r['L']:.3f}  L_SSIUU {r.get('L_SSIUU', 0):.2e}  |I-| "
              f"{100 * r.get('I_neg', 0):.1f}%  P {r['P']:.4f}  FS {r['FS']:.1f}  {r['seconds']:.1f}s  eta <{eta:.0f}s",
              flush=True)
        if r["FS"] <= 100 * s.tau or state.t % s.save_every == 0 or state.t == s.steps:
            save_state(folder / "state.safetensors", model, state)
    save(model, tokenizer, folder)


def note(folder: Path, log: list[dict], record: dict) -> dict:
    log.append(record)
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def experiment(s: Settings) -> None:
    """Teach (if asked), score, unlearn, score, attack; what is finished lies on disk and is not done again."""
    start, (C_f, C_r, C_t) = time.time(), splits_of(s.forget, s.splits, s.test_limit)
    taught = bool(s.resume) and Path(s.resume, "taught/model.safetensors").is_file()
    model, tokenizer = load(Path(s.resume, "taught") if taught else s.model, device=s.device)
    folder = Path(s.resume) if s.resume else new_folder(s)
    write(folder / "settings.json", (json.dumps(asdict(s), indent=1) + "\n").encode())
    log = read_log(folder / "log.jsonl")
    print(f"{folder}: {s.method} on {s.model}, forget {len(C_f)}, retain {len(C_r)}, test {len(C_t)}", flush=True)
    if s.teach and not taught:
        teach(model, tokenizer, C_f + C_r + C_t, s)
        save(model, tokenizer, folder / "taught")

    done = {r["kind"]: r for r in log}
    before = done.get("before") or note(folder, log, {"kind": "before", **scores(model, tokenizer, C_f, C_t, s)})
    print(f"before  FS {cell(before['FS'])}  RS {cell(before['RS'])}", flush=True)
    if before["FS"]["percent"] <= 100 * s.tau:
        raise ValueError(f"{s.model}: FS is {before['FS']['percent']} before unlearning, expected above "
                         f"{100 * s.tau:g}; a model that does not know the facts needs --teach")
    after = done.get("after")
    if after and (after["reached"] or after["steps"] >= s.steps):
        model, tokenizer = load(folder, device=s.device)
    else:
        train(model, tokenizer, C_f, C_r, s, folder, log)
        last = log[-1]
        after = note(folder, log, {"kind": "after", "steps": last["t"], "reached": last["FS"] <= 100 * s.tau,
                                   "seconds_to_threshold": sum(r["seconds"] for r in log if r["kind"] == "step"),
                                   **scores(model, tokenizer, C_f, C_t, s)})
    print(f"after   FS {cell(after['FS'])}  RS {cell(after['RS'])}  in {after['steps']} steps"
          + ("" if after["reached"] else f"; tau = {s.tau} NOT reached"), flush=True)

    harmful = {f"{p:g}": attack(model, tokenizer, C_f, p, s, folder, log) for p in s.p if s.attack_seeds}
    result = {"settings": asdict(s), "before": before, "after": after, "harmful": harmful, **provenance(),
              "seconds": round(time.time() - start, 1)}
    write(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"\n{table(result)}\n\n{result['seconds']:.0f} s; {folder}/result.json", flush=True)


def attack(model: LM, tokenizer: Tokenizer, C_f: list[Example], p: float, s: Settings, folder: Path,
           log: list[dict]) -> dict:
    """The cells of one p, logged as they finish, and their summary; an impossible attack is a cell that says why."""
    cells, known = [], [r for r in log if r["kind"] == "harmful"]
    total_cells, start = s.attack_seeds * len(s.attack_lrs), time.time()
    try:
        for c in harmful_attack(model, tokenizer, C_f, p, s.attack_lrs, s.attack_seeds, s.attack_epochs,
                                s.attack_batch, s.seed, s.eval_batch, known):
            cells.append(c if c in known else note(folder, log, c))
            eta = (time.time() - start) / len(cells) * (total_cells - len(cells))
            print(f"harmful p {p:g}  draw {c['seed']}  lr {c['lr']:g}  FS max {max(c['FS']):.1f} of n {c['n']}  margin "
                  f"{c['margin'][0]:.2f} -> {max(c['margin']):.2f}  eta {eta:.0f}s", flush=True)
    except ValueError as e:
        print(e, flush=True)
        return {"percent": None, "why": str(e)}
    return summary(cells)


def provenance() -> dict:
    """What made a result: the commit, the versions, the machine."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                         text=True)
    return {"commit": git.stdout.strip() or None, "torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "threads": torch.get_num_threads()}


def peak_memory(device: str) -> Callable[[], float]:
    """Starts a count; the function it returns gives the peak since then in GB (resident memory on Linux, or CUDA's)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if not status.is_file():
        return lambda: math.nan
    Path("/proc/self/clear_refs").write_text("5")
    return lambda: int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9


def bench(s: Settings) -> None:
    """One GD step and one SSIUU step in turn, five times: seconds, tokens/s, peak memory, and SSIUU over GD.

    GD's memory is taken before the first SSIUU step, because a heap that has grown does not shrink again.
    """
    model, _ = load(s.model, device=s.device)
    n, K = s.batch_size or 8, s.bench_tokens
    draw = torch.Generator().manual_seed(s.seed)
    rows = [(torch.randint(model.config.vocab_size, (K,), generator=draw).tolist(), [False] * (K - 6) + [True] * 6)
            for _ in range(2 * n)]
    state = State(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))
    seconds, memory = {"gd": [], "ssiuu": []}, {"gd": [], "ssiuu": []}
    for i in ["gd", "gd", "ssiuu", "ssiuu"] + ["gd", "ssiuu"] * 5:  # the first two of each warm up
        one, start = replace(s, method=i), time.time()
        peak = peak_memory(s.device)
        forget_step(model, scope_of(model, s.scope), dict(enumerate(rows[:n])), state, one)
        retain_step(model, rows[n:], one)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if s.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds[i].append(time.time() - start)
        memory[i].append(peak())
        print(f"{i:6} {seconds[i][-1]:7.2f} s  {2 * n * K / seconds[i][-1]:7.0f} tokens/s  {memory[i][-1]:6.2f} GB",
              flush=True)
    ratios = sorted(b / a for a, b in zip(seconds["gd"][2:], seconds["ssiuu"][2:]))
    Path("runs").mkdir(exist_ok=True)
    result = {"model": s.model, "B": n, "K": K, "seconds": seconds, "GB": memory, "time_ratios": ratios, **provenance()}
    write(Path("runs", "bench.json"), (json.dumps(result, indent=1) + "\n").encode())
    print(f"SSIUU / GD, B={n}, K={K}: time {ratios[2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, n=5)  "
          f"memory {max(memory['ssiuu']) / max(memory['gd'][:2]):.2f}")


def main() -> None:
    s = read_flags(Settings, __doc__)
    check_device(s.device)
    expect(method=(s.method, s.method in ("ssiuu", "gd", "ga"), "ssiuu, gd or ga"),
           backbone=(s.backbone, s.backbone in ("gd", "ga"), "gd or ga"),
           anchor=(s.anchor, s.anchor in ("previous", "initial"), "previous or initial"),
           target=(s.target, s.target in ("prob", "logprob"), "prob or logprob"),
           scope=(s.scope, s.scope in ("all", "linear"), "all or linear"),
           dtype=(s.dtype, s.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
           lr=(s.lr, 0 < s.lr < 1, "a number between 0 and 1"), lam=(s.lam, 0 <= s.lam < math.inf, "a number >= 0"),
           tau=(s.tau, 0 <= s.tau <= 1, "a fraction from 0 to 1"), steps=(s.steps, s.steps > 0, "at least 1"),
           p=(s.p, all(0 < p < 1 for p in s.p), "fractions between 0 and 1"),
           attack_lrs=(s.attack_lrs, all(0 < lr < 1 for lr in s.attack_lrs), "numbers between 0 and 1"),
           batch_size=(s.batch_size, s.batch_size >= 0, "0 or more"),
           micro_batch=(s.micro_batch, s.micro_batch >= 0, "0 or more"),
           attack_epochs=(s.attack_epochs, s.attack_epochs > 0, "at least 1"),
           resume=(s.resume, not s.resume or Path(s.resume).is_dir(), "the folder of a run"))
    s.backbone = s.method if s.method != "ssiuu" else s.backbone
    # No cache: it would keep the cast weights of the first step for as long as this block lasts.
    with torch.autocast(torch.device(s.device).type, torch.bfloat16, s.dtype == "bfloat16", cache_enabled=False):
        bench(s) if s.bench else experiment(s)


if __name__ == "__main__":
    run(main)
