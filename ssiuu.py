"""SSIUU: suppress spurious unlearning neurons, so that knowledge is erased, not hidden (Section 5, Alg. 1).

    python ssiuu.py --forget data/faithun.json           # unlearn, score, attack, print the paper's row

code         paper                        shape      where
phi          phi_t, the parameters        list       Eq. 12; one tensor a parameter, as in model.parameters()
P            P_phi(y|x)                   scalar     Section 2; summed over the batch b in Alg. 1 l.5
g            dP/dphi                      like phi   Eq. 12
A            A_phi, attribution           like phi   Eq. 12; Alg. 1 l.5
A_prev       A at the previous step       like phi   Eq. 3; Alg. 1 l.12; a constant
I_neg        I^-, where A < 0             like phi   Alg. 1 l.10; bool
delta, w     Delta = A - A_prev; 2 lam Delta, 0 off I^-   like phi   Eq. 7, 10; constants
lam, eta     lambda; the learning rate    float      Eq. 3; Alg. 1; eta is --lr
C_f C_r C_t  forget, retain, test set     list       Section 2
b, b_r       batches b of C_f, b' of C_r  list       Alg. 1 l.2, l.3; lists of micro-batches
tau          threshold on FS              float      Section 6.1
FS RS        forgetting, retention score  percent    Section 6.2.1

Dimensions: B sequences, K tokens, D hidden size, N items, n neurons.
"""
import hashlib
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from safetensors.torch import load_file
from torch import nn

import attack
from data import Batch, Example, Row, batches, check_fits, collate, encode, encoded, load_alpaca
from data import load_utility
from evaluate import FFN, ROOT, Amount, Data, Name, Rate, Scored, Share, cell, influence, item_scores
from evaluate import markdown, mismatched_tau, read_flags, run, scored_sets, scores_of, settings_for
from evaluate import splits_of
from model import LM, Count, Positive, Tokenizer, answer_logprob, check, from_all, here, load, one_process
from model import parse, read_json, read_text, refuse, refusing, save, wanted, write, write_json
from model import write_tensors

# ==================================================================== the method: torch only, paste from here
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Tensors = list[Tensor]

def attribution(P: Tensor, phi: Tensors, hessian: bool = True) -> Tensors:
    """A = phi dP/dphi, each scalar parameter's attribution to P (Eq. 12; Alg. 1 l.5), with its graph.

    P, a scalar: the sum of P(y|x) over b, twice differentiable: attention written out, since fused kernels
    have no second derivative. `hessian=False` takes g as a constant: Eq. 13 without its second term."""
    g = torch.autograd.grad(P, phi, create_graph=hessian, retain_graph=True)
    return [p * g_p for p, g_p in zip(phi, g)]                                                   # Eq. 12

def negative(A: Tensors) -> Tensors:
    """I^-, the parameters with negative attribution, as bool masks (Alg. 1 l.10)."""
    return [a < 0 for a in A]

def delta(a: Tensor, a_prev: Tensor, i: Tensor) -> Tensor:
    """Delta of one tensor of parameters: its attribution's change (Eq. 7) on I^-, the sum's range, else 0."""
    return (a - a_prev) * i

def ssiuu_loss(A: Tensors, A_prev: Tensors, I_neg: Tensors) -> Tensor:  # -> ()
    """L_SSIUU, squared change of negative attribution (Alg. 1 l.11; Eq. 6 where A is of one (x, y), Eq. 3
    without its root). A_prev, I_neg: constants."""
    return sum(delta(*x).square().sum() for x in zip(A, A_prev, I_neg))

def penalty_weights(A: Tensors, A_prev: Tensors, I_neg: Tensors, lam: float) -> Tensors:
    """w = lam dL_SSIUU/dA = 2 lam Delta, for constant A (Eq. 10)."""
    return [2 * lam * delta(*x) for x in zip(A, A_prev, I_neg)]

def surrogate(L: Tensor, A: Tensors, w: Tensors | None) -> Tensor:  # -> ()
    """L + sum_i w_i A_i, which has the gradient of J = L + lam L_SSIUU (Eq. 8, 9, 11; Alg. 1 l.13, l.14).

    By the product rule grad A holds g and phi H (Eq. 13), so .backward() gives all of Eq. 14: 2 lam Delta g
    and, by double backward, H v with v = w phi. It is linear in L and A: parts of a batch, each with the same
    w, add up exactly. No w, as at t = 1, is no penalty (l.8)."""
    return L if w is None else L + sum((w_p * a).sum() for w_p, a in zip(w, A))

def ga_loss(logp_f: Tensor) -> Tensor:  # (B,) -> ()
    """Gradient ascent on the negative log-likelihood of the forget set (C.2 (1); Jang et al. 2022)."""
    return logp_f.mean()

def retain_loss(logp_r: Tensor) -> Tensor:  # (B,) -> ()
    """The auxiliary loss: negative log-likelihood of the retain set, nats a sequence (C.2 (2); ours for (3),
    which is "to maintain logits", and (4))."""
    return -logp_r.mean()

def gd_loss(logp_f: Tensor, logp_r: Tensor) -> Tensor:  # (B,), (B',) -> ()
    """Gradient difference: forget by ascent, retain by descent (Alg. 1 l.4; C.2 (2); Maini et al. 2024)."""
    return ga_loss(logp_f) + retain_loss(logp_r)

def dpo_loss(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """-2/beta log sigmoid(beta (log pi_w/ref_w - log pi_l/ref_l)) (C.2 (3); Rafailov et al. 2023).

    Four (B,) -> (). w is the refusal, l the true answer, ref the log-probabilities before unlearning. 2/beta
    is the scale of Zhang et al. 2024, beside which the retention loss has weight 1."""
    return -2 / beta * logsigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l))).mean()

def npo_loss(logp_f: Tensor, ref_f: Tensor, beta: float) -> Tensor:  # (B,), (B,) -> ()
    """DPO without the winner: -2/beta log sigmoid(-beta log pi/ref), (C.2 (4); Zhang et al. 2024)."""
    return -2 / beta * logsigmoid(-beta * (logp_f - ref_f)).mean()

def rmu_loss(h_f: Tensor, h_r: Tensor, h_r0: Tensor, u: Tensor, c: float, alpha: float) -> Tensor:
    """Steers forget states to c u, keeps retain states (C.2 (5); Li et al. 2024).

    h_f (N, D), h_r and h_r0 (before unlearning) (N', D), u (D,). Rows are real tokens, prompt and answer; the
    published code counts padding too."""
    return (h_f - c * u).square().mean() + alpha * (h_r - h_r0).square().mean()

def klue_mask(A: Tensor, A_wrong: Tensor, alpha: float, share: float) -> Tensor:  # (n,), (N, n) -> (n,) bool
    """The `share` of neurons that hold the facts (C.2 (6); Yang et al. 2025; no code was published).

    A: each neuron's attribution (Eq. 1, max over tokens, at least 0, mean over C_f). A_wrong: the same for N
    questions that do not belong to the answer: positive there is superficial, and counts alpha times."""
    score = A - alpha * A_wrong.clamp(min=0).mean(0)
    chosen = score.topk(max(1, round(share * len(score)))).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, chosen, True)

# ================================================================================================ to here

REFUSAL = "I can't answer the question."  # C.2 (3)
METHODS = ("ssiuu", "ga", "gd", "dpo", "npo", "rmu", "klue", "random")
RMU_C, KLUE_ALPHA, KLUE_N = 20.0, 10.0, 5  # C.2 (5), (6)

@dataclass
class Settings(Scored):
    method: Literal[METHODS] = "ssiuu"    # of Table 1; random: a mask of KLUE's size, its control
    backbone: Literal["gd", "ga", "dpo", "npo"] = "gd"  # the loss under SSIUU's penalty (C.2 (7))
    lam: Amount | None = None             # weight of the penalty; 1e-3, with --retain 1e-4 (C.2 (7))
    lr: Rate = 1e-5                       # eta; unpublished: the lowest that still converges (6.1)
    steps: Count = 100                    # T, at most; unpublished
    tau: Amount | None = None             # stop at FS <= tau (6.1); 0.33, TOFU: computed (C.1: 0.1971)
    batch_size: Count | None = None       # b and b'; unpublished; all of C_f: Alg. 1 l.12 and Eq. 3 agree
    micro_batch: Count | None = None      # sequences in one graph: less memory, the same result; not for RMU
    per_example: bool = False             # square A per (x, y) as Eq. 6, not summed over b: a graph an item
    anchor: Literal["previous", "initial"] = "previous"  # A_prev: last step (Eq. 3) or first (Section 1)
    target: Literal["prob", "logprob", "weights"] = "prob"  # P (Eq. 12); log P does not vanish; weights: L2
    scope: Literal["all", "linear"] = "all"  # penalised: every parameter (Eq. 12), or q k v o gate up down
    penalise: Literal["negative", "positive", "all", "random"] = "negative"  # I^-, or a control of the sign
    first_order: bool = False             # leave the Hessian out of Eq. 13 and 14
    beta: Positive = 0.1                  # of DPO and NPO (C.2 (4): searched in 0.1 to 0.5)
    rmu_alpha: Positive = 100.0           # weight of RMU's retain term (C.2 (5): 20 to 300)
    rmu_skip_first: bool = False          # leave out of RMU's loss each sequence's first token (often huge)
    klue_share: Share = 0.1               # share of FFN neurons that KLUE updates (C.2 (6))
    no_attack: bool = False               # leave out the attacks; attack.py has their flags
    offload: bool = False                 # Adam's moments and A_prev wait in host memory: less on the GPU
    save_every: Count = 10                # steps between resumable states
    name: Name | None = None              # results go to runs/<name>; <method>-<model>
    resume: Name | None = None            # continue the run in this folder

@dataclass
class State:
    """What Algorithm 1 carries from step to step beside the weights, and what it took from the first ones."""
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, list[int]], Tensor]  # (log P(y|x) of items, their indices in C_f) -> forget term
    masks: Tensors | None = None                 # KLUE: which rows of a weight may move
    steer: tuple[Tensor, Tensors] | None = None  # RMU: u, and the original weights of what it trains
    t: int = 0
    A_prev: dict[int, Tensors] = field(default_factory=dict)  # {0: A of b}, or {index in C_f: A of (x, y)}

class Part(NamedTuple):
    """A micro-batch. `key`: 0, where A is summed over b (Alg. 1), or with --per-example its item's index."""
    items: list[int]
    batch: Batch
    share: float  # of the batch
    key: int

def parts_of(rows: list[Row], items: list[int], size: int | None, device, each: bool = False) -> list[Part]:
    size = 1 if each else size or len(items)
    parts = [items[i:i + size] for i in range(0, len(items), size)]
    return [Part(part, collate([rows[i] for i in part], device), share=len(part) / len(items),
                 key=part[0] if each else 0) for part in parts]

# ---------------------------------------------------------------------------------------- the baselines

def backbone_of(s: Settings) -> str:
    """The unlearning loss: a baseline's own, or the one under SSIUU's penalty."""
    return s.backbone if s.method == "ssiuu" else s.method

def trained(model: LM, method: str) -> list[nn.Parameter]:
    """What a method updates: RMU down_proj of blocks l-2 to l (found by name: the index in its published code
    is another layer in Qwen2), KLUE the weights of gate, up and down, the others every parameter."""
    last = rmu_layer(model)
    if method == "rmu":
        return [block.mlp.down_proj.weight for block in model.model.layers[max(0, last - 2):last + 1]]
    if method in ("klue", "random"):
        return [p for name, p in model.named_parameters() if ".mlp." in name and name.endswith("weight")]
    return list(model.parameters())

def rmu_layer(model: LM) -> int:
    """l, counted from 0: 7 (C.2 (5)), or the middle of a model that has fewer than 8 blocks."""
    return 7 if len(model.model.layers) > 7 else len(model.model.layers) // 2

def begin(model: LM, tokenizer: Tokenizer, C_f: list[Example], s: Settings) -> State:
    """The state before step 1, from the original weights; a resumed run makes it too, then loads the rest."""
    parameters = trained(model, s.method)
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=0.0, fused=True)
    if s.offload:
        offload_moments(optimizer)
    state = State(optimizer, forget_term(model, tokenizer, C_f, s))
    draw = torch.Generator().manual_seed(s.seed)
    if s.method == "rmu":
        u = torch.rand(model.config.hidden_size, generator=draw).to(model.device)  # not Gaussian
        state.steer = u / u.norm(), [p.detach().clone() for p in parameters]
    if s.method in ("klue", "random"):
        sizes = [len(p) for p in parameters]
        if s.method == "klue":
            mask = localise(model, tokenizer, C_f, s)
        else:
            mask = torch.rand(sum(sizes), generator=draw).argsort() < max(1, round(s.klue_share * sum(sizes)))
        state.masks = [rows[:, None] for rows in mask.to(model.device).split(sizes)]
    return state

def forget_term(model: LM, tokenizer: Tokenizer, C_f: list[Example], s: Settings) -> Callable:
    """The backbone's loss on forget items; DPO and NPO keep reference numbers, not a second model."""
    kind = backbone_of(s)
    if kind not in ("dpo", "npo"):
        return lambda logp, items: ga_loss(logp)

    @torch.no_grad()
    def reference(rows: list[Row]) -> Tensor:  # -> (N,)
        return torch.cat([answer_logprob(model, collate([row], model.device)) for row in rows])

    ref = reference(encoded(tokenizer, C_f))
    if kind == "npo":
        return lambda logp, items: npo_loss(logp, ref[items], s.beta)
    refusals = [encode(tokenizer, e.question, REFUSAL) for e in C_f]
    ref_w = reference(refusals)

    def dpo(logp: Tensor, items: list[int]) -> Tensor:
        logp_w = answer_logprob(model, collate([refusals[i] for i in items], model.device))
        return dpo_loss(logp_w, logp, ref_w[items], ref[items], s.beta)
    return dpo

def localise(model: LM, tokenizer: Tokenizer, C_f: list[Example], s: Settings) -> Tensor:  # -> (n,) bool
    """KLUE's neurons in the order of `trained`: outputs of gate, up and down, ranked over all blocks."""
    def attribution_of(rows: list[Row]) -> Tensor:  # Eq. 1, max over tokens, at least 0: ours
        A = influence(model, rows, FFN)
        return torch.cat([a[0].clamp(min=0).mean(0) for a in A.values()])

    draw, wrong = random.Random(f"klue {s.seed}"), []
    for _ in range(KLUE_N):
        questions = [draw.choice([x.question for x in C_f if x.answers[0] != e.answers[0]]) for e in C_f]
        wrong.append(attribution_of([encode(tokenizer, q, e.answers[0]) for q, e in zip(questions, C_f)]))
    A = attribution_of(encoded(tokenizer, C_f))
    return klue_mask(A, torch.stack(wrong), KLUE_ALPHA, s.klue_share)

def rmu_step(model: LM, phi: Tensors, batch: Batch, batch_r: Batch, steer: tuple[Tensor, Tensors],
             s: Settings) -> tuple[float, Tensors]:
    """Adds the gradient of RMU's loss to .grad: (L, [log P(y|x) of b]). The frozen model is this one with its
    old down_proj put back."""
    def states(of: Batch) -> Tensor:  # -> (real tokens, D)
        first = int(s.rmu_skip_first)
        h = model.hidden(of.ids, blocks=rmu_layer(model) + 1)
        return h[:, first:][of.real()[:, first:]]

    u, frozen = steer
    now = [p.data for p in phi]
    with torch.no_grad():
        for p, old in zip(phi, frozen):
            p.data = old
        h_r0 = states(batch_r)
        for p, new in zip(phi, now):
            p.data = new
        logp = answer_logprob(model, batch)
    L = rmu_loss(states(batch), states(batch_r), h_r0, u, RMU_C, s.rmu_alpha)
    L.backward()
    return L.item(), [logp]

# --------------------------------------------------------------------------------------- Algorithm 1

def scope_of(model: LM, scope: str) -> Tensors:
    """phi: every scalar parameter (Eq. 12), or the weights of q, k, v, o, gate, up, down."""
    return [p for name, p in model.named_parameters() if scope == "all" or name.endswith("_proj.weight")]

def P_of(logp: Tensor, target: str, phi: Tensors, share: float) -> Tensor:  # (B,) -> ()
    """P of a part of b, or what stands for it. `weights`: their sum, whose A is phi itself, so that the
    penalty is lam times the squared change of the weights, plain L2."""
    if target == "weights":
        return share * sum(p.sum() for p in phi)
    return logp.sum() if target == "logprob" else logp.exp().sum()

def control(A: Tensors, which: str, seed: int) -> Tensors:
    """What stands for I^- in a control: I^+, a random half that is the same at every step, or all."""
    if which == "positive":
        return negative([-a for a in A])
    if which == "all":
        return [torch.ones_like(a, dtype=torch.bool) for a in A]
    draw = torch.Generator().manual_seed(seed)
    return [(torch.rand(a.shape, generator=draw) < 0.5).to(a.device) for a in A]

class Graph(NamedTuple):
    """Of a part of b, by one forward pass: its share of L and its A with their graph, log P without."""
    L: Tensor
    A: Tensors
    logp: Tensor

def forget_graph(model: LM, part: Part, phi: Tensors, state: State, s: Settings) -> Graph:
    logp = answer_logprob(model, part.batch)                                                     # (B,)
    L = part.share * state.loss(logp, part.items)                                                # Alg. 1 l.4
    P = P_of(logp, s.target, phi, part.share)
    A = attribution(P, phi, not s.first_order) if phi else []                                    # l.5
    return Graph(L, A, logp.detach())

def batch_attribution(model: LM, b: list[Part], whole: Graph | None, phi: Tensors,
                      s: Settings) -> dict[int, Tensors]:
    """{key: A summed over its parts, as constants} (Alg. 1 l.5). `whole`: the graph of b, if that is one."""
    if whole:
        return {b[0].key: [a.detach() for a in whole.A]}
    A = {}
    for part in b:
        P = P_of(answer_logprob(model, part.batch), s.target, phi, part.share)
        constant = [a.detach() for a in attribution(P, phi, hessian=False)]
        A[part.key] = [x.add_(a) for x, a in zip(A[part.key], constant)] if part.key in A else constant
    return A

def on_host(x: Tensor) -> Tensor:
    """A copy of x in host memory, page-locked where x is on CUDA; torch uses such memory again."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)

def remember(state: State, A: dict[int, Tensors], s: Settings) -> None:
    """A_prev <- A (Alg. 1 l.12), on the host with --offload; a first A stays with `--anchor initial`."""
    for key in A if s.anchor == "previous" else A.keys() - state.A_prev.keys():
        state.A_prev.pop(key, None)  # first: its place on the host is taken again
        state.A_prev[key] = [on_host(a) for a in A[key]] if s.offload else A[key]

def offload_moments(optimizer: torch.optim.Optimizer) -> None:
    """From now on Adam's moments lie on the host but for the update itself, when no graph is there."""
    def fetch(*_) -> None:
        for p, moments in optimizer.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = moments[key].to(p.device)

    def put_away(*_) -> None:
        for moments in optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = on_host(moments[key])

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_away)

def unlearn(model: LM, tokenizer: Tokenizer, C_f: list[Example], C_r: list[Example], s: Settings,
            state: State) -> Iterator[dict]:
    """Algorithm 1; yields the numbers of each step, the last one where FS <= tau (Section 6.1).

    Two passes over b: first A of all of it, as constants, and hence w; then a graph a part, its surrogate and
    backward. Where b is one part its `whole` graph serves both. b' follows: its graph never lies beside b's.
    A, w: {Part.key: like phi}, with --per-example an entry an item. FloatingPointError on NaN, infinity."""
    learning = [p for p in model.parameters() if p.requires_grad]
    phi = scope_of(model, s.scope) if s.method == "ssiuu" else []
    rows, rows_r = encoded(tokenizer, C_f), encoded(tokenizer, C_r)
    forget, retain = (batches(len(C), s.batch_size or len(C_f), torch.Generator().manual_seed(s.seed + i),
                              state.t) for i, C in enumerate((C_f, C_r)))
    scores = item_scores(model, tokenizer, C_f, s.eval_batch) if state.masks else []
    for state.t in range(state.t + 1, s.steps + 1):                                              # Alg. 1 l.1
        start, L, L_ssiuu = time.time(), 0.0, 0.0
        logp_f, logp_r, w = [], [], {}
        items, items_r = next(forget), next(retain)                                              # l.2, l.3
        if state.masks:  # KLUE leaves alone what is forgotten already
            items = [i for i in items if scores[i] > s.tau] or items
        b = parts_of(rows, items, s.micro_batch, model.device, s.per_example)
        b_r = parts_of(rows_r, items_r, s.micro_batch, model.device)
        if s.method == "rmu":  # one loss over both, and nothing is left to do for the parts
            L, logp_f = rmu_step(model, learning, b[0].batch, b_r[0].batch, state.steer, s)
            b, b_r = [], []
        whole = forget_graph(model, b[0], phi, state, s) if len(b) == 1 else None                # l.4
        A = batch_attribution(model, b, whole, phi, s) if phi else {}                            # l.5
        total = [sum(a[1:], a[0]) for a in zip(*A.values())]  # I^- is of b, also where A is per example
        I_neg = negative(total) if s.penalise == "negative" else control(total, s.penalise, s.seed)  # l.10
        for key in [key for key in A if key in state.A_prev]:                                    # l.7: t > 1
            A_prev = [a.to(model.device) for a in state.A_prev[key]]
            L_ssiuu += ssiuu_loss(A[key], A_prev, I_neg).item()                                  # l.11
            w[key] = penalty_weights(A[key], A_prev, I_neg, s.lam)                               # Eq. 10
        record = {"L_SSIUU": sum(from_all(L_ssiuu)), "I_neg": share_of(I_neg)} if A else {}
        remember(state, A, s)                                                                    # l.12
        A = total = I_neg = A_prev = None
        for part in b:
            graph = whole or forget_graph(model, part, phi if part.key in w else [], state, s)
            loss = surrogate(graph.L, graph.A, w.get(part.key))                                  # l.13
            L, logp_f = L + graph.L.item(), [*logp_f, graph.logp]
            whole = graph = None  # what is as large as the weights goes before there is more of it
            loss.backward()                                                                      # Eq. 11, 14
        w = loss = None
        for part in b_r if backbone_of(s) != "ga" else []:
            logp = answer_logprob(model, part.batch)
            L_r = part.share * retain_loss(logp)                                                 # l.4
            L_r.backward()
            L, logp_r = L + L_r.item(), [*logp_r, logp.detach()]
        for p, mask in zip(learning, state.masks or []):
            p.grad *= mask
        record |= {"L": L, "P": torch.cat(logp_f).exp().mean().item(), "grad": gradient_norm(learning)}
        if backbone_of(s) == "gd":  # l.4 in one: the loop adds its two terms part by part
            record["L_GD"] = gd_loss(torch.cat(logp_f), torch.cat(logp_r)).item()
        check_finite(record, s)
        state.optimizer.step()                                                                   # l.14: AdamW
        state.optimizer.zero_grad()
        scores = item_scores(model, tokenizer, C_f, s.eval_batch)
        FS = round(100 * statistics.fmean(scores), 2)  # as logged: a resumed run stops where this one does
        yield {"kind": "step", "t": state.t, **record, "FS": FS, "seconds": time.time() - start}
        if reached(FS, s.tau):                                                                   # Section 6.1
            return

def share_of(masks: Tensors) -> float:
    return sum(from_all(sum(i.sum().item() for i in masks))) / sum(from_all(sum(i.numel() for i in masks)))

def gradient_norm(learning: Tensors) -> float:
    return math.hypot(*from_all(torch.nn.utils.get_total_norm([p.grad for p in learning]).item()))

def check_finite(record: dict, s: Settings) -> None:
    """A model of NaN answers nothing and would pass for unlearned: the gradient is checked, not L alone."""
    if not all(math.isfinite(x) for x in record.values()):
        raise FloatingPointError(f"L is {record['L']:.3g}, its gradient's norm {record['grad']:.3g}, "
                                 f"expected finite numbers: lower --lr {s.lr:g} or --lam {s.lam:g}")

def reached(FS: float, tau: float) -> bool:
    """FS, in percent with two decimals, is at the threshold or below."""
    return FS <= round(100 * tau, 2)

# ------------------------------------------------------------------------------------------- the experiment

def state_tensors(model: LM, state: State) -> dict[str, Tensor]:
    """What the next step needs, by name: weights, Adam's moments, A_prev (or a step loses its penalty), t."""
    tensors = {f"model {name}": w for name, w in model.named_parameters()}
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam {i} {key}": x for key, x in moments.items()}
    for key, A in state.A_prev.items():
        tensors |= {f"A_prev {key} {i}": a for i, a in enumerate(A)}
    return tensors | {"t": torch.tensor(state.t)}

def load_state(path: Path, model: LM, state: State, n: int, s: Settings) -> None:
    """Puts a saved state into `model` and `state`, with n items in C_f. ValueError unless it has just the
    tensors of this run."""
    with refusing(f"{path}: not a readable state"):
        found = load_file(path)  # on the host: it is large
        t = int(found["t"])
    check(t, Count, f"{path}: t is")
    if s.method == "ssiuu":
        drawn = islice(batches(n, s.batch_size or n, torch.Generator().manual_seed(s.seed)), t)
        for key in sorted({i for b in drawn for i in b}) if s.per_example else [0]:
            remember(state, {key: [torch.empty_like(p) for p in scope_of(model, s.scope)]}, s)
    for p in trained(model, s.method):
        p.grad = torch.zeros_like(p)
    state.optimizer.step()  # of zeros: it makes Adam's moments and moves nothing
    state.optimizer.zero_grad()
    expected = state_tensors(model, state)
    for name in sorted(expected.keys() | found.keys()):
        x, y = expected.get(name), found.get(name)
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype or not y.isfinite().all() or (
                name.endswith("exp_avg_sq") and y.min() < 0  # its root would be NaN after the last check
                or name.endswith(" step") and y != t):
            raise ValueError(f"{path}: {name} is missing, not expected, or not of this run's shape and type, "
                             "expected the state that a run wrote here")
        x.data.copy_(y)
    state.t = t

def curve(kind):
    return Annotated[list, ("two numbers or more", lambda x: len(x) > 1 and not wanted(x, tuple[kind, ...]))]

Of100 = Annotated[float, ("a number from 0 to 100", lambda x: 0 <= x <= 100)]
SCORE = {"percent": Of100, "low": Of100, "high": Of100, "n": Count}
Percent = Annotated[dict, ("a score", lambda x: not any(wanted(x.get(key), SCORE[key]) for key in SCORE))]
SCORES = {"FS": Percent, "RS": Percent, "US": Percent | None}
CELL = {"seed": int, "lr": Rate, "n": Count, "retrained": Count}
CURVES = {"FS": curve(Of100), "logp": curve(float), "margin": curve(float)}
# what is read of each kind of line in log.jsonl
RECORDS = {"before": SCORES, "step": {"t": Count, "FS": float}, "harmful": CELL | {"p": Share}, "benign": CELL,
           "after": SCORES | {"steps": Count, "reached": bool, "weights": str}}

def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl, without a last line that a kill cut short."""
    log, lines = [], read_text(path).split("\n")[:-1] if path.is_file() else []
    for i, line in enumerate(lines, 1):
        record = check(parse(line, f"{path} line {i}"), dict, f"{path} line {i} is")
        kind = check(record.get("kind"), Literal[tuple(RECORDS)], f"{path} line {i}: kind is")
        more = {"failed": Name} if "failed" in record else CURVES
        for key, each in (RECORDS[kind] | (more if CELL.items() <= RECORDS[kind].items() else {})).items():
            check(record.get(key), each, f"{path} line {i}: {key} is")
        log.append(record)
    return log

def write_log(folder: Path, log: list[dict]) -> None:
    write(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log).encode())

def note(folder: Path, log: list[dict], record: dict) -> None:
    log.append(record)
    if here()[0] == 0:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

def new_folder(s: Settings) -> Path:
    """runs/<name>, taken by making it. Where it is taken a default name counts up, a chosen one ends."""
    name = s.name or f"{s.method}-{Path(s.model).name}"
    if Path(name).name != name or name == "..":
        refuse(f"--name: found {name!r}, expected the name of one folder, without a path")
    Path("runs").mkdir(exist_ok=True)
    for folder in [Path("runs", name), *(Path("runs", f"{name}-{i}") for i in range(2, 9999) if not s.name)]:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            there = {x.name for x in folder.iterdir()} if folder.is_dir() else {"a file"}
            if s.name and there <= {"lock", "settings.json.tmp"}:  # killed before anything was written
                return folder
    refuse(f"--name: found {name!r}, expected a new name, or --resume runs/{name}")

@contextmanager
def held(folder: Path, new: bool) -> Iterator[None]:
    """Inside, no other process works in this folder. The system frees the lock, however this one ends. A
    folder in which nothing was recorded is given back; an unforeseen error leaves its traceback there."""
    import fcntl  # not on Windows, where the rest can be imported
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not where it was given back between the open and the lock
            free = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
        except OSError:
            free = False
        if not free:
            refuse(f"{folder}: another process is at work in it, expected a free folder")
        try:
            yield
        except BaseException as e:
            if new and not (folder / "log.jsonl").is_file():
                shutil.rmtree(folder)
            elif not isinstance(e, (OSError, ValueError, KeyboardInterrupt)):
                (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise

def fingerprint(model: LM) -> str:
    """SHA-256 of the weights, a process each."""
    weights = hashlib.sha256()
    for name, p in model.named_parameters():
        weights.update(name.encode())
        weights.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return " ".join(from_all(weights.hexdigest()))

def identity(model: LM, tokenizer: Tokenizer, **data) -> dict[str, str]:
    """What a run is made of: a resumed one must meet the same."""
    said = tokenizer.prompt("Who is it?"), tokenizer.answer("I")
    data["tokenizer or chat template"] = tokenizer.tokens.to_str(), said
    data["config.json"] = replace(model.config, raw={}), tokenizer.stop_ids
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in data.items()}
    return {"processes": str(here()[1]), "model.safetensors": fingerprint(model), **hashes}

def provenance() -> dict:
    """What made a result: the commit, -dirty where code differs from it, the versions, the machine."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "data/tiny")
        commit = git("describe", "--always") + "-dirty" * bool(changed)
    except OSError:  # no git on this machine
        commit = ""
    return {"commit": commit or None, "torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "threads": torch.get_num_threads()}

def train(model: LM, tokenizer: Tokenizer, sets: tuple, s: Settings, folder: Path, log: list[dict]) -> dict:
    """Runs or resumes Algorithm 1: a progress line and a record a step, a state every `save_every` steps.
    Returns the last record."""
    state, start = begin(model, tokenizer, sets[0], s), time.time()
    path = folder / (f"state-{here()[0]}.safetensors" if here()[0] else "state.safetensors")
    if os.path.lexists(path):  # a dead link is an error
        load_state(path, model, state, len(sets[0]), s)
    if len(found := {*from_all(state.t)}) > 1:
        raise ValueError(f"{folder}: found states of steps {found}, expected every process's of one step")
    steps = [r for r in log if r["kind"] == "step" and r["t"] <= state.t]  # the rest is done again
    if (found := [r["t"] for r in steps]) != list(range(1, state.t + 1)):
        raise ValueError(f"{folder}/log.jsonl: found steps {found}, expected 1 to {state.t}")
    log[:] = [r for r in log if r["kind"] == "before"] + steps
    write_log(folder, log)
    first = state.t
    for r in unlearn(model, tokenizer, *sets[:2], s, state):
        note(folder, log, r)
        if not reached(r["FS"], s.tau) and (state.t % s.save_every == 0 or state.t == s.steps):
            write_tensors(path, state_tensors(model, state), each=True)
        left = (time.time() - start) / (state.t - first) * (s.steps - state.t)
        print(f"step {r['t']}/{s.steps}  L {r['L']:.3f}  L_SSIUU {r.get('L_SSIUU', 0):.2e}  |I-| "
              f"{100 * r.get('I_neg', 0):.1f}%  P {r['P']:.4f}  FS {r['FS']:.1f}  {r['seconds']:.1f}s  "
              f"eta <{left:.0f}s", flush=True)
    for old in ("result.json", "analysis.json", "beyond.json"):
        (folder / old).unlink(missing_ok=True)  # of the weights before
    model.requires_grad_(True)
    save(model, tokenizer, folder)
    return log[-1]

def robustness(model: LM, tokenizer: Tokenizer, C_f: list[Example], instructions: list[Example],
               s: attack.Settings, folder: Path, log: list[dict]) -> dict:
    """Section 6.2.2 on the unlearned model; a cell is printed and logged as it ends, a logged one not run."""
    known, start = [r for r in log if r["kind"] in ("harmful", "benign")], time.time()

    def report(label: str, c: dict) -> None:
        if c not in known:
            note(folder, log, c)
        curve = c.get("failed")
        if not curve:
            most, rise = max(c["FS"][1:]), f"{c['margin'][0]:.2f} -> {max(c['margin'][1:]):.2f}"
            curve = f"FS max {most:.1f} of n {c['n']}  margin {rise}"
        print(f"{label}  draw {c['seed']}  lr {c['lr']:g}  {curve}  {time.time() - start:.0f}s", flush=True)

    pool = attack.falsely_answered(model, tokenizer, C_f, s.eval_batch)
    return attack.attacks(model, tokenizer, pool, instructions, s, report, known)

def table(result: dict) -> str:
    """Table 1: percent, [95 % interval], n; a dash where nothing was run."""
    before, after, attacks = (result[key] for key in ("before", "after", "attacks"))
    name = result["settings"]["method"] + ("" if after["reached"] else ", tau not reached")
    rows = [["Method", "FS ↓", "RS ↑", "US ↑", *(f"{key} ↓" for key in attacks)]]
    for method, scores in (("Default", before), (name, after | attacks)):
        rows.append([method, *(cell(scores.get(key)) for key in ("FS", "RS", "US", *attacks))])
    return markdown(rows)

FREE = {"steps", "device", "eval_batch", "micro_batch", "offload", "save_every", "no_attack", "traceback",
        "name", "resume"}

def begun(folder: Path, record: dict[str, dict]) -> None:
    """Writes settings.json, or refuses what a resumed run would change in it, but for FREE."""
    file, now = folder / "settings.json", json.loads(json.dumps(record))
    was = read_json(file, default=now)
    for part in now | was:
        old, new = check(was.get(part), dict, f"{file}: {part} is"), now.get(part, {})
        for key in sorted((old | new).keys() - FREE):
            check(new.get(key), Literal[old.get(key)], f"{file}: {part} {key}: found")
    write_json(file, record)

def made_of(s: Settings, benign: str) -> tuple:
    """What a run is made of, read and checked: model, tokenizer, splits, what is scored, utility tasks,
    instructions, and the identity of them all. Sets tau and lam where they depend on the data."""
    sets, tasks = splits_of(s), load_utility(s.utility) if s.utility else {}
    scored, instructions = scored_sets(s, sets), load_alpaca(benign)
    model, tokenizer = load(s.model, device=s.device)
    refusals = [Example(e.question, [REFUSAL], where=e.where) for e in sets[0] if backbone_of(s) == "dpo"]
    used = (sets[1], *scored.values(), *tasks.values(), refusals, [] if s.no_attack else instructions)
    check_fits(model, tokenizer, [e for C in used for e in C])
    if s.tau is None:
        s.tau = mismatched_tau(sets[0]) if s.retain else 0.33
    if s.lam is None:
        s.lam = 1e-4 if s.retain else 1e-3
    kept = {key: value for key, value in asdict(s).items() if key not in FREE}
    found = identity(model, tokenizer, settings=kept, facts=(sets, scored), tasks=tasks,
                     instructions=instructions)
    return model, tokenizer, sets, scored, tasks, instructions, found

def experiment(s: Settings, folder: Path) -> dict:
    """Score, unlearn, score, attack; what is finished lies on disk and is not done again."""
    start, log = time.time(), read_log(folder / "log.jsonl")
    attacker = settings_for(attack.Settings, {f.name: getattr(s, f.name) for f in fields(Data)})
    model, tokenizer, sets, scored, tasks, instructions, identities = made_of(s, attacker.benign)
    begun(folder, {"settings": asdict(s), "attack": asdict(attacker), "made of": identities})
    print(f"{folder}: {s.method} on {s.model}, forget {len(sets[0])}, retain {len(sets[1])}, "
          f"test {len(sets[2])}, lr {s.lr:g}, lam {s.lam:g}, tau {s.tau:.4g}", flush=True)
    if log:
        write_log(folder, log)  # without what a kill cut short
    done = {r["kind"]: r for r in log}
    before = done.get("before") or {"kind": "before", **scores_of(model, tokenizer, scored, tasks, s)}
    print(f"before  FS {cell(before['FS'])}  RS {cell(before['RS'])}", flush=True)
    if reached(before["FS"]["percent"], s.tau):
        raise ValueError(f"{s.model}: FS is {before['FS']['percent']} before unlearning, expected above "
                         f"{100 * s.tau:g}; a model that does not know the facts: data/teach.py")
    if not log:
        note(folder, log, before)
    after = done.get("after")
    if after and (after["reached"] or after["steps"] >= s.steps):
        model, tokenizer = load(folder, device=s.device)
        made = identities | {"model.safetensors": after["weights"]}
        for key, now in identity(model, tokenizer).items():
            check(now, Literal[made[key]], f"{folder}: the hash of {key} is")
    else:
        last = train(model, tokenizer, sets, s, folder, log)
        after = {"kind": "after", "steps": last["t"], "reached": reached(last["FS"], s.tau),
                 "weights": fingerprint(model), **scores_of(model, tokenizer, scored, tasks, s)}
        note(folder, log, after)
    for old in folder.glob("state*.safetensors") if after["reached"] and here()[0] == 0 else ():
        old.unlink()  # as large as four models, and no step is left to do
    print(f"after   FS {cell(after['FS'])}  RS {cell(after['RS'])}  in {after['steps']} steps"
          + ("" if after["reached"] else f"; tau = {s.tau:.4g} NOT reached"), flush=True)
    found = {} if s.no_attack else robustness(model, tokenizer, sets[0], instructions, attacker, folder, log)
    result = {"settings": asdict(s), "attack settings": asdict(attacker), "before": before, "after": after,
              "attacks": found, **provenance(), "seconds": round(time.time() - start, 1)}
    write_json(folder / "result.json", result)
    return result

def main() -> None:
    s = read_flags(Settings, __doc__)
    for name in ("backbone", "per_example", "anchor", "target", "scope", "penalise", "first_order"):
        if s.method != "ssiuu" and getattr(s, name) != getattr(Settings, name):
            refuse(f"--{name.replace('_', '-')}: found with {s.method}, expected none: it is of the penalty")
    if s.method == "rmu" and s.micro_batch:
        refuse("--micro-batch: found with rmu, expected none: its loss is of whole batches")
    if s.target == "weights" and s.per_example:
        refuse("--per-example: found with --target weights, expected none: weights are of no example")
    if s.method in ("klue", "random") or s.penalise == "random":
        one_process(f"--method {s.method} --penalise {s.penalise}")
    first = here()[0] == 0
    folder = Path(s.resume) if s.resume else from_all(new_folder(s) if first else None)[0]
    with held(folder, new=not s.resume) if first else nullcontext():  # process 0 holds it for all
        result = experiment(s, folder)
    print(f"\n{table(result)}\n\n{result['seconds']:.0f} s; {folder}/result.json", flush=True)

if __name__ == "__main__":
    run(main)
