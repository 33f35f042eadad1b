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
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from attack import attacks, falsely_answered, retrain
from data import Example, batches, collate, encode, load_alpaca, load_tofu, load_utility, mcqa_prompt
from evaluate import (FFN, accuracy, check, expect, influence, item_scores, margin, markdown, mismatched_tau, read_flags,
                      run, splits_of, utility)
from model import LM, Tokenizer, answer_logprob, load, read_json, save, write, write_json, write_tensors

Tensors = list[Tensor]
REFUSAL = "I can't answer the question."  # C.2 (3)
METHODS = ("ga", "gd", "dpo", "npo", "rmu", "klue", "random", "ssiuu")  # random: a mask of KLUE's size, the control
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
    """The auxiliary retention loss: negative log-likelihood of the retain set, nats per sequence (C.2 (2)-(4))."""
    return -logp_r.mean()


def gd_loss(logp_f: Tensor, logp_r: Tensor) -> Tensor:  # (B,), (B,) -> ()
    """Gradient difference: forget by ascent, retain by descent (C.2 (2); Maini et al. 2024)."""
    return ga_loss(logp_f) + retain_loss(logp_r)


def dpo_loss(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:  # four (B,) -> ()
    """-2/beta log sigmoid(beta (log pi_w/ref_w - log pi_l/ref_l)) (C.2 (3); Rafailov et al. 2023, Eq. 7).

    w is the refusal, l the true answer, ref the log-probabilities before unlearning. 2/beta is the scale of Zhang et
    al. 2024, beside which the retention loss has weight 1.
    """
    return -2 / beta * logsigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l))).mean()


def npo_loss(logp_f: Tensor, ref_f: Tensor, beta: float) -> Tensor:  # (B,), (B,) -> ()
    """DPO without the winner: -2/beta log sigmoid(-beta log pi/ref), summed log P(y|x) (C.2 (4); Zhang et al. 2024)."""
    return -2 / beta * logsigmoid(-beta * (logp_f - ref_f)).mean()


def rmu_loss(h_f: Tensor, h_r: Tensor, h_r0: Tensor, u: Tensor, c: float, alpha: float) -> Tensor:
    """Steers forget states to c u, keeps retain states (C.2 (5); Li et al. 2024). (N, D), (N', D) twice, (D,) -> ().

    Rows are real tokens, prompt and answer; the published code counts padding too. h_r0: before unlearning.
    """
    return (h_f - c * u).square().mean() + alpha * (h_r - h_r0).square().mean()


def klue_mask(A: Tensor, A_wrong: Tensor, alpha: float, share: float) -> Tensor:  # (n,), (N, n) -> (n,) bool
    """The `share` of neurons that hold the facts (C.2 (6); Yang et al. 2025, reconstructed: no code was published).

    A: attribution of each neuron (Eq. 1, max over tokens, mean over C_f). A_wrong: the same for N questions that do
    not belong to the answer: what is positive there is superficial knowledge and counts alpha times against it.
    """
    score = A - alpha * A_wrong.clamp(min=0).mean(0)
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, score.topk(round(share * len(score))).indices, True)


# ================================================================================================ to here


@dataclass
class Settings:
    forget: str = "data/faithun.json"     # FaithUn file: questions, answers, false options (C.1), or TOFU's forget01
    retain: str = ""                      # TOFU's retain99, where --forget is TOFU's
    splits: str = ""                      # folder of FaithUn's split files (C.1: 5, 10, 70 %); empty: beside --forget
    model: str = "data/tiny"              # checkpoint directory or hub id
    method: str = "ssiuu"                 # ssiuu ga gd dpo npo rmu klue random, several with commas, or all (Table 1)
    backbone: str = "gd"                  # loss under SSIUU's penalty: gd (C.2 (7)), ga, dpo, npo
    lam: float = 1e-3                     # weight of the penalty (C.2 (7): 1e-3 FaithUn, 1e-4 TOFU)
    lr: float = 1e-5                      # eta; unpublished: the paper takes the lowest that still converges (6.1)
    steps: int = 100                      # T, at most; unpublished
    tau: float = 0.0                      # stop at FS <= tau, a fraction (6.1); 0: 0.33, TOFU: computed (C.1: 0.1971)
    batch_size: int = 0                   # b and b_r; unpublished; 0: all of C_f, where Alg. 1 l.12 and Eq. 3 agree
    micro_batch: int = 0                  # sequences in one graph, less memory for more time (not RMU); 0: all
    per_example: bool = False             # square A per (x, y) as Eq. 6, not its sum over b as Alg. 1 l.11
    anchor: str = "previous"              # A_prev: previous step (Eq. 3), or initial (Section 1: original levels)
    target: str = "prob"                  # P: prob (Eq. 12), or logprob, which does not vanish with P
    scope: str = "all"                    # parameters under the penalty: all (Eq. 12), or linear: q k v o gate up down
    first_order: bool = False             # drop the Hessian of Eq. 14
    measure: bool = False                 # log the penalty's gradient: its norm over L's, cosine with first order
    beta: float = 0.1                     # of DPO and NPO (C.2 (4): searched in 0.1 to 0.5)
    rmu_alpha: float = 100.0              # weight of RMU's retain term (C.2 (5): 20 to 300)
    rmu_c: float = 20.0                   # length of RMU's control vector (C.2 (5))
    klue_share: float = 0.1               # share of FFN neurons that KLUE updates (C.2 (6))
    klue_alpha: float = 10.0              # weight of its superficial knowledge (C.2 (6))
    klue_n: int = 5                       # mismatched questions per answer (C.2 (6))
    p: tuple = (0.1, 0.3)                 # fractions of its pool that the harmful attack retrains on (6.2.2)
    attack_lrs: tuple = (1e-5, 5e-6, 1e-6)  # learning rates of the harmful attack (6.2.2)
    attack_epochs: int = 10               # of the harmful attack; unpublished
    attack_batch: int = 4                 # of both attacks; unpublished
    attack_seeds: int = 3                 # draws of the retrained rows (6.2.2: three runs); 0: no attack
    attack_rank: int = 0                  # attack through LoRA of this rank, not in the paper; 0: every weight
    benign: str = "data/instructions.json"  # Alpaca file of the benign attack (6.2.2); empty: none
    benign_lrs: tuple = (1e-5, 1e-6, 1e-7)  # learning rates of the benign attack (6.2.2)
    benign_rows: int = 1000               # rows in its one pass (6.2.2)
    benign_points: int = 5                # scores along it; unpublished
    bits: tuple = (8, 4)                  # attack by rounding the weights to so many bits, not in the paper
    control: str = ""                     # attack these on the same items, with commas: the original, one never taught
    utility: str = ""                     # folder of MMLU, GSM8K, HellaSwag, ARC, Winogrande or TOFU's; empty: no US
    utility_n: int = 500                  # items of each utility task (6.2.1)
    teach: str = ""                       # first fine-tune on this file, for a model that does not know it (C.1)
    teach_lr: float = 1e-5                # learning rate of --teach (C.1, TOFU)
    teach_epochs: int = 5                 # epochs of --teach (C.1, TOFU)
    test_limit: int = 0                   # teach and score the first so many items of C_t only; 0: all, 300 of TOFU
    lrs: tuple = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5)  # several methods: each gets the lowest that converges (6.1)
    betas: tuple = (0.1, 0.3, 0.5)        # several methods: grid of DPO and NPO (C.2 (4))
    rmu_alphas: tuple = (20.0, 50.0, 100.0, 150.0, 200.0, 300.0)  # several methods: grid of RMU (C.2 (5))
    seeds: int = 3                        # several methods: runs of each, every one with its own attack draw
    seed: int = 0                         # of every random stream: batches, draws, masks, option orders in teaching
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
    fixed: dict = field(default_factory=dict)                 # what a method takes from the weights before step 1


def trained(model: LM, method: str) -> dict[str, nn.Parameter]:
    """The parameters a method updates, selected by name: an index would mean o_proj in Qwen2, whose biases shift it."""
    l = rmu_layer(model)
    layers = {"rmu": rf"model\.layers\.({l - 2}|{l - 1}|{l})\.mlp\.down_proj\.weight", "klue": r".*\.mlp\.\w+\.weight"}
    pattern = layers.get("klue" if method == "random" else method, ".*")
    return {name: p for name, p in model.named_parameters() if re.fullmatch(pattern, name)}


def rmu_layer(model: LM) -> int:
    """l, counted from 0: 7 (C.2 (5)), or the middle of a model that has fewer than 8 blocks."""
    return 7 if len(model.model.layers) > 7 else max(2, len(model.model.layers) // 2)


def begin(model: LM, tokenizer: Tokenizer, C_f: list[Example], s: Settings) -> State:
    """The state before step 1. A resumed run begins again from the original weights, so `fixed` is never saved."""
    phi = trained(model, s.method)
    model.requires_grad_(False)
    for p in phi.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(phi.values(), lr=s.lr, weight_decay=0.0, fused=True)
    rows, device, fixed = [encode(tokenizer, e.question, e.answers[0]) for e in C_f], model.device, {}
    draw = torch.Generator().manual_seed(s.seed)

    @torch.no_grad()
    def reference(rows: list[Row]) -> Tensor:  # numbers, not a second model in memory
        return torch.cat([answer_logprob(model, collate([row], device)) for row in rows])

    if s.backbone in ("dpo", "npo"):
        fixed["ref"] = reference(rows)
    if s.backbone == "dpo":
        fixed["win"] = [encode(tokenizer, e.question, REFUSAL) for e in C_f]
        fixed["ref_win"] = reference(fixed["win"])
    if s.method == "rmu":
        u = torch.rand(model.config.hidden_size, generator=draw).to(device)  # from 0 to 1, as published: not Gaussian
        fixed |= {"u": u / u.norm(), "frozen": [p.detach().clone() for p in phi.values()]}
    if s.method in ("klue", "random"):
        sizes = [len(p) for p in phi.values()]
        mask = localise(model, tokenizer, C_f, s) if s.method == "klue" else (
            torch.rand(sum(sizes), generator=draw).argsort() < round(s.klue_share * sum(sizes))).to(device)
        fixed["mask"] = [m[:, None] for m in mask.split(sizes)]
    return State(optimizer, fixed=fixed)


def localise(model: LM, tokenizer: Tokenizer, C_f: list[Example], s: Settings) -> Tensor:  # -> (neurons,) bool
    """KLUE's neurons, in the order of `trained`: outputs of gate, up and down, ranked over all blocks at once."""
    def attribution_of(pairs: list[tuple[str, str]]) -> Tensor:  # Eq. 1, max over tokens, App. A's clamp
        A = influence(model, [encode(tokenizer, *pair) for pair in pairs], FFN)["neuron"]
        return torch.cat([a[0].clamp(min=0).mean(0) for a in A.values()]).to(model.device)

    draw = random.Random(f"klue {s.seed}")
    others = [[x.question for x in C_f if x.answers[0] != e.answers[0]] for e in C_f]
    A = attribution_of([(e.question, e.answers[0]) for e in C_f])
    wrong = [attribution_of([(draw.choice(qs), e.answers[0]) for qs, e in zip(others, C_f)]) for _ in range(s.klue_n)]
    return klue_mask(A, torch.stack(wrong), s.klue_alpha, s.klue_share)


def backbone_loss(model: LM, logp: Tensor, part: list[int], fixed: dict, s: Settings) -> Tensor:
    """The forget term of `--backbone` for the items `part` of C_f, whose log P(y|x) is logp."""
    if s.backbone == "npo":
        return npo_loss(logp, fixed["ref"][part], s.beta)
    if s.backbone == "dpo":
        win = answer_logprob(model, collate([fixed["win"][i] for i in part], logp.device))
        return dpo_loss(win, logp, fixed["ref_win"][part], fixed["ref"][part], s.beta)
    return ga_loss(logp)


def forget_step(model: LM, phi: Tensors, b: dict[int, Row], state: State, s: Settings) -> dict:
    """Alg. 1 l.4-12 for the forget batch b, {index in C_f: row}: adds its gradient to .grad, renews state.A_prev."""
    logps, losses = {}, {}  # by item, and by first item of a part: with several parts SSIUU computes each twice

    def graph(part: list[int]) -> tuple[Tensor, Tensors]:
        logp = answer_logprob(model, collate([b[i] for i in part], phi[0].device))
        L = backbone_loss(model, logp, part, state.fixed, s) * len(part) / len(b)                  # l.4
        P = logp.sum() if s.target == "logprob" else logp.exp().sum()
        losses[part[0]] = L.item()
        logps.update(zip(part, logp.detach()))
        return L, list(torch.autograd.grad(P, phi, create_graph=True)) if s.method == "ssiuu" else []  # g of Eq. 12

    size = 1 if s.per_example else s.micro_batch or len(b)
    parts = [list(b)[i:i + size] for i in range(0, len(b), size)]
    if s.method == "ssiuu":
        stats = penalised_backward(graph, parts, phi, state.A_prev, s)
    else:
        stats = {}
        for part in parts:
            graph(part)[0].backward()
    return {"L": sum(losses.values()), "P": torch.stack(list(logps.values())).exp().mean().item(), **stats}


def rmu_step(model: LM, phi: Tensors, b: dict[int, Row], b_r: list[Row], fixed: dict, s: Settings) -> dict:
    """Adds the gradient of RMU's loss to .grad. The frozen model is this one with its old down_proj put back."""
    def states(rows: Iterable[Row]) -> Tensor:  # -> (real tokens, D)
        batch = collate(list(rows), phi[0].device)
        return model.hidden(batch.ids, blocks=rmu_layer(model) + 1)[batch.real()]

    with torch.no_grad():
        P = answer_logprob(model, collate(list(b.values()), phi[0].device)).exp().mean().item()
        new = [p.data for p in phi]
        for p, old in zip(phi, fixed["frozen"]):
            p.data = old
        h_r0 = states(b_r)
        for p, w in zip(phi, new):
            p.data = w
    L = rmu_loss(states(b.values()), states(b_r), h_r0, fixed["u"], s.rmu_c, s.rmu_alpha)
    L.backward()
    return {"L": L.item(), "P": P}


def penalised_backward(graph: Callable, parts: list[list[int]], phi: Tensors, A_prev: dict, s: Settings) -> dict:
    """Alg. 1 l.5-13 over micro-batches, graph(part) -> (its share of L, g); renews A_prev.

    Micro-batches do not change the result: A is summed over them first, v is then frozen, and dL + H v is a sum
    over them (Eq. 14). With --per-example each (x, y) is a part with its own A and Delta (Eq. 6).
    """
    groups, A = {part[0]: [part] for part in parts} if s.per_example else {0: parts}, {}
    held = graph(parts[0]) if len(parts) == 1 else None               # the only graph serves both passes
    for key, group in groups.items() if not held else ():
        A[key] = [torch.zeros_like(p) for p in phi]
        for part in group:  # phi_g stands first: zip then runs it out, and the part's graph goes with it
            for a, a_sum in zip(phi_g(phi, graph(part)[1]), A[key]):                               # l.5
                a_sum.add_(a)
    extra = measured(*held, A_prev[0], phi, s.lam or 1.0) if s.measure and 0 in A_prev else {}
    I_neg, L_ssiuu = negative(map(sum, zip(*A.values())) if A else phi_g(phi, held[1])), 0.0       # l.10
    for key, group in groups.items():
        v = None                                                                                   # l.7, l.8
        if key in A_prev:
            v, L_key = penalty(A.get(key) or phi_g(phi, held[1]), A_prev[key], I_neg, phi, s)      # l.11
            L_ssiuu += L_key
        for part in group:
            g = None  # the part before lets go of a buffer like phi
            L, g = held or graph(part)
            L.backward() if v is None else ssiuu_backward(L, g, v, phi, s.first_order)             # l.13
        if s.anchor == "previous" or key not in A_prev:                                            # l.12
            A_prev[key] = A.get(key) or [a if v is None else v[k].copy_(a) for k, a in enumerate(phi_g(phi, g))]
    return {"L_SSIUU": L_ssiuu, "I_neg": sum(i.sum().item() for i in I_neg) / sum(p.numel() for p in phi), **extra}


def measured(L: Tensor, g: Tensors, A_prev: Tensors, phi: Tensors, lam: float) -> dict:
    """The norm of the penalty's gradient (Eq. 14) over that of the backbone's forget term, and the cosine between the
    penalty's whole gradient and its first-order form, without H v."""
    norm = torch.nn.utils.get_total_norm
    n_L, A = norm(torch.autograd.grad(L, phi, retain_graph=True)).item(), list(phi_g(phi, g))
    full, dot, squares = ssiuu_grad(g, A, A_prev, phi, lam), 0.0, 0.0
    for a, a_prev, g_p, whole in zip(A, A_prev, g, full):
        first = 2 * lam * (a < 0) * (a - a_prev) * g_p.detach()
        dot, squares = dot + (first * whole).sum().item(), squares + first.square().sum().item()
    return {"penalty_ratio": norm(full).item() / max(n_L, 1e-30),
            "first_order_cos": dot / max(norm(full).item() * squares ** 0.5, 1e-30)}


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
        L = retain_loss(answer_logprob(model, collate(part, model.device))) * len(part) / len(b_r)
        L.backward()
        loss += L.item()
    return loss


def scope_of(model: LM, scope: str) -> Tensors:
    """The parameters under the penalty: every scalar one (Eq. 12), or the weights of q, k, v, o, gate, up, down."""
    return [p for name, p in model.named_parameters() if scope == "all" or name.endswith("_proj.weight")]


def unlearn(model: LM, tokenizer: Tokenizer, C_f: list[Example], C_r: list[Example], s: Settings,
            state: State) -> Iterator[dict]:
    """Algorithm 1; yields the numbers of each step, the last one where FS <= tau. FloatingPointError on NaN."""
    phi = scope_of(model, s.scope) if s.method == "ssiuu" else list(trained(model, s.method).values())
    sets = [[encode(tokenizer, e.question, e.answers[0]) for e in C] for C in (C_f, C_r)]
    forget, retain = (batches(len(rows), s.batch_size or len(C_f), torch.Generator().manual_seed(s.seed + k))
                      for k, rows in enumerate(sets))
    for _ in range(state.t):                            # a resumed run draws on where it stopped
        next(forget), next(retain)
    known = [x > s.tau for x in item_scores(model, tokenizer, C_f, s.eval_batch)] if "mask" in state.fixed else []
    for state.t in range(state.t + 1, s.steps + 1):                                                # Alg. 1 l.1
        start = time.time()
        b = {i: sets[0][i] for i in next(forget)}                                                  # l.2
        b_r = [sets[1][i] for i in next(retain)]                                                   # l.3
        if s.method == "rmu":
            stats = rmu_step(model, phi, b, b_r, state.fixed, s)
        else:
            # KLUE leaves alone what is already forgotten; a batch without anything known is taken whole.
            b = {i: row for i, row in b.items() if not known or known[i]} or b
            stats = forget_step(model, phi, b, state, s)                                           # l.4-13
            stats["L_r"] = retain_step(model, b_r, s) if s.backbone != "ga" else 0.0
            stats["L"] += stats["L_r"]
        for p, mask in zip(phi, state.fixed.get("mask", ())):
            p.grad *= mask
        # A model of NaN answers nothing and would pass for unlearned, so the gradient is checked, not the loss alone.
        stats["grad"] = torch.nn.utils.get_total_norm([p.grad for p in phi]).item()
        if not all(math.isfinite(x) for x in stats.values()):
            raise FloatingPointError(f"step {state.t}: loss or gradient is not finite (L {stats['L']:.3g}), expected "
                                     f"numbers: lower --lr {s.lr:g} or --lam {s.lam:g}")
        state.optimizer.step()                                                                     # l.14
        state.optimizer.zero_grad()
        scores = item_scores(model, tokenizer, C_f, s.eval_batch)
        known = [x > s.tau for x in scores] if known else known
        FS = round(100 * sum(scores) / len(scores), 2)  # as logged: a resumed run must stop where this one does
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
    device, weights, adam = model.device, dict(model.named_parameters()), {}
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
    *lines, cut = path.read_text().split("\n") if path.is_file() else [""]
    if cut:
        write(path, "".join(line + "\n" for line in lines).encode())
    return [json.loads(line) for line in lines]


def new_folder(s: Settings) -> Path:
    """runs/<name>; the default name counts up where it is taken, a chosen one must be free."""
    name = s.name or f"{s.method.replace(',', '-')}-{Path(s.model).name}"
    expect(name=(s.name, not (s.name and Path("runs", s.name).exists()), "a new name, or --resume for that folder"))
    return next(p for p in (Path("runs", name + k) for k in ("", *(f"-{i}" for i in range(2, 9999)))) if not p.exists())


def source(s: Settings, folder: Path) -> str:
    """The checkpoint to unlearn: --model, or with --teach that model after it was taught, made once.

    FaithUn's facts are taught as plain questions and in Table 3's form, options in an order scoring does not use.
    """
    path = folder / "taught"
    if not s.teach or (path / "model.safetensors").is_file():
        return str(path) if s.teach else s.model
    model, tokenizer = load(s.model, device=s.device)
    write_json(folder / "settings.json", asdict(s))  # from here on there is something to --resume
    examples, rng, start = (load_tofu(s.teach) if s.retain else sum(splits_of(s.teach, s.splits, s.test_limit), [])
                            ), random.Random(f"teach {s.seed}"), time.time()
    rows = [encode(tokenizer, q, e.answers[0]) for e in examples
            for q in (e.question, *([mcqa_prompt(e, rng)] if e.false_options else []))]
    losses = retrain(model, rows, s.teach_lr, s.teach_epochs, 8, torch.Generator().manual_seed(s.seed))
    for i, loss in enumerate(losses, 1):
        print(f"teach {i}/{s.teach_epochs}  {len(rows)} rows  loss {loss:.4f}  {time.time() - start:.0f}s  "
              f"eta {(time.time() - start) / i * (s.teach_epochs - i):.0f}s", flush=True)
    save(model, tokenizer, path)
    return str(path)


def scores(model: LM, tokenizer: Tokenizer, sets: tuple, s: Settings) -> dict:
    logp, lead = margin(model, tokenizer, sets[0], s.eval_batch)
    FS, RS = (accuracy(model, tokenizer, C, s.eval_batch) for C in (sets[0], sets[2]))
    retain = RS if s.retain else accuracy(model, tokenizer, sets[1], s.eval_batch)  # TOFU's C_t is part of its C_r
    return {"FS": FS, "RS": RS, "retain": retain, "forget_logp": logp, "forget_margin": lead}


def cell(x: dict | None) -> str:
    if not x or x["percent"] is None:
        return "-"
    spread = f"±{x['sd']:.1f}" if "sd" in x else ""
    return f"{x['percent']:.1f}{spread} [{x['low']:.0f}, {x['high']:.0f}] n={x['n']}"


def table(rows: dict[str, dict]) -> str:
    """Table 1 in Markdown: percent, ± spread over draws or seeds, [95 % interval], n; a dash where nothing was run."""
    attacks = dict.fromkeys(label for row in rows.values() for label in row.get("attacks", ()))
    return markdown({name: {**{f"{key} {arrow}": cell(row.get(key)) for key, arrow in zip(("FS", "RS", "US"), "↓↑↑")},
                            **{f"{label} ↓": cell(row.get("attacks", {}).get(label)) for label in attacks}}
                     for name, row in rows.items()}, "Method")


def train(model: LM, tokenizer: Tokenizer, sets: tuple, s: Settings, folder: Path, log: list[dict], every: int) -> None:
    """Runs or resumes Algorithm 1 with a progress line, a log record and, every `save_every` steps, a saved state."""
    state, start = begin(model, tokenizer, sets[0], s), time.time()
    if (folder / "state.safetensors").is_file():
        load_state(folder / "state.safetensors", model, state)
    # Steps after the last saved state are run again, and what followed them is scored again.
    log[:] = ([r for r in log if r["kind"] == "before"][-1:] +
              [r for r in log if r["kind"] == "step" and r["t"] <= state.t])
    write(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log).encode())
    first = state.t
    reached = any(r["kind"] == "step" and r["FS"] <= 100 * s.tau for r in log)  # killed between last step and save
    for r in () if reached else unlearn(model, tokenizer, *sets[:2], s, state):
        note(folder, log, r)
        last = r["FS"] <= 100 * s.tau or state.t == s.steps
        eta = (time.time() - start) / (state.t - first) * (s.steps - state.t)
        if last or state.t % every == 0:
            print(f"step {r['t']}/{s.steps}  L {r['L']:.3f}  L_SSIUU {r.get('L_SSIUU', 0):.2e}  |I-| "
                  f"{100 * r.get('I_neg', 0):.1f}%  P {r['P']:.4f}  FS {r['FS']:.1f}  {r['seconds']:.1f}s  "
                  f"eta <{eta:.0f}s", flush=True)
        if last or state.t % s.save_every == 0:
            save_state(folder / "state.safetensors", model, state)
    model.requires_grad_(True)
    save(model, tokenizer, folder)


def note(folder: Path, log: list[dict], record: dict) -> dict:
    log.append(record)
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def experiment(s: Settings, folder: Path, before: dict | None = None, every: int = 1) -> dict:
    """Teach (if asked), score, unlearn, score, attack; what is finished lies on disk and is not done again."""
    start, sets = time.time(), splits_of(s.forget, s.splits, s.test_limit, s.retain)
    if len({e.answers[0] for e in sets[0]}) < 2:
        raise ValueError(f"{s.forget}: found {len(sets[0])} items, expected at least two different answers")
    s = replace(s, tau=s.tau or (mismatched_tau(sets[0]) if s.retain else 0.33))
    log, path = read_log(folder / "log.jsonl"), source(s, folder)
    print(f"{folder}: {s.method} on {path}, forget {len(sets[0])}, retain {len(sets[1])}, test {len(sets[2])}, "
          f"lr {s.lr:g}, tau {s.tau:.4g}", flush=True)
    model, tokenizer = load(path, device=s.device)
    write_json(folder / "settings.json", asdict(s))
    done = {r["kind"]: r for r in log}
    before = done.get("before") or note(folder, log, before or {"kind": "before", **scores(model, tokenizer, sets, s)})
    print(f"before  FS {cell(before['FS'])}  RS {cell(before['RS'])}", flush=True)
    if before["FS"]["percent"] <= 100 * s.tau:
        raise ValueError(f"{path}: FS is {before['FS']['percent']} before unlearning, expected above {100 * s.tau:g}; "
                         "a model that does not know the facts needs --teach")
    after = done.get("after")
    if after and (after["reached"] or after["steps"] >= s.steps):
        model, tokenizer = load(folder, device=s.device)
    else:
        train(model, tokenizer, sets, s, folder, log, every)
        last = log[-1]
        after = note(folder, log, {"kind": "after", "steps": last["t"], "reached": last["FS"] <= 100 * s.tau,
                                   "seconds_to_threshold": sum(r["seconds"] for r in log if r["kind"] == "step"),
                                   **scores(model, tokenizer, sets, s)})
    print(f"after   FS {cell(after['FS'])}  RS {cell(after['RS'])}  in {after['steps']} steps"
          + ("" if after["reached"] else f"; tau = {s.tau:.4g} NOT reached"), flush=True)

    extra = robustness(model, tokenizer, sets[0], s, folder, log)
    for row, where in ((before, path), (after, folder)) if s.utility else ():  # a table's first run passes US on
        if row.get("utility_n") != s.utility_n:
            row |= {"utility_n": s.utility_n, "US": utility(*load(where, device=s.device), load_utility(s.utility),
                                                            s.utility_n, size=max(1, s.eval_batch // 4))}
            note(folder, log, row)  # of two records of a kind a resumed run reads the last
        print(f"US of {where}: {cell(row['US'])}", flush=True)
    result = {"settings": asdict(s), "before": before, "after": after, **extra, **provenance(),
              "seconds": round(time.time() - start, 1)}
    write_json(folder / "result.json", result)
    return result


def robustness(model: LM, tokenizer: Tokenizer, C_f: list[Example], s: Settings, folder: Path, log: list[dict]) -> dict:
    """Section 6.2.2: every attack on the unlearned model, and on the controls the same ones with the same items.

    Each cell is printed and logged as it ends; one that the log has is not run again.
    """
    if not s.attack_seeds:
        return {}
    pool, start, found = falsely_answered(model, tokenizer, C_f, s.eval_batch), time.time(), {}
    for control in ("", *filter(None, s.control.split(","))):
        if control:
            model, tokenizer = load(control, device=s.device)
        known = [r for r in log if r.get("control") == control]

        def report(label: str, c: dict) -> None:
            if c not in known:
                note(folder, log, {"control": control, **c})
            print(f"{label}{' on ' * bool(control)}{control}  draw {c['seed']}  lr {c['lr']:g}  FS max "
                  f"{max(c['FS']):.1f} of n {c['n']}  margin {c['margin'][0]:.2f} -> {max(c['margin']):.2f}  "
                  f"{time.time() - start:.0f}s", flush=True)

        found[control] = attacks(model, tokenizer, pool, s, report, known)
        for why in dict.fromkeys(x["why"] for x in found[control].values() if "why" in x):
            print(why, flush=True)
    return {"attacks": found.pop(""), "controls": found}


def mean_cell(cells: list[dict | None]) -> dict | None:
    """One cell of several runs: their mean, its spread, and the mean of their intervals (they share their items)."""
    cells = [c for c in cells if c and c["percent"] is not None]
    if not cells:
        return None
    mean = {key: round(statistics.mean(c[key] for c in cells), 2) for key in ("percent", "low", "high")}
    return mean | {"sd": round(statistics.pstdev(c["percent"] for c in cells), 2),
                   "n": round(statistics.mean(c["n"] for c in cells)), "runs": len(cells)}


def compare(s: Settings, methods: list[str], folder: Path) -> dict[str, dict]:
    """Tables 1 and 2: each method at its lowest learning rate that converges, over seeds; a finished run is kept.

    The rate is found by bisection over --lrs (a higher one is taken to converge too) with the first beta or alpha;
    then, at that rate, the beta or alpha that keeps the retain set best. FaithUn's test set and the attacks choose
    nothing; TOFU's RS is on retain items, as in the paper.
    """
    start, rows, path = time.time(), {}, source(s, folder)
    write_json(folder / "settings.json", asdict(s))
    s, lrs = replace(s, model=path, teach="", resume="", name=""), sorted(s.lrs)
    betas = [{"beta": beta} for beta in s.betas]
    grids = {"dpo": betas, "npo": betas, "rmu": [{"rmu_alpha": alpha} for alpha in s.rmu_alphas]}
    for method in methods:
        extra = grids.get(method, [{}])
        low, high = 0, len(lrs) - 1
        while low < high:
            middle = (low + high) // 2
            reached = sub_run(s, folder, rows, method=method, lr=lrs[middle], **extra[0])["after"]["reached"]
            low, high = (middle + 1, high) if reached is False else (low, middle)
        candidates = [{"method": method, "lr": lrs[low], **e} for e in extra]
        tried = [(c, sub_run(s, folder, rows, **c)["after"]) for c in candidates]
        best = max(tried, key=lambda pair: (pair[1]["reached"] or 0, pair[1].get("retain", {}).get("percent", -1)))[0]
        runs = [sub_run(s, folder, rows, seed, True, **best) for seed in range(s.seed, s.seed + s.seeds)]
        for loser in folder.glob(f"{method} *"):
            if loser.name not in [r["name"] for r in runs]:
                (loser / "model.safetensors").unlink(missing_ok=True)
        labels = dict.fromkeys(label for r in runs for label in r["attacks"])
        rows[method] = {
            **best, "runs": [r["name"] for r in runs], "reached": [r["after"]["reached"] for r in runs],
            "steps": [r["after"].get("steps") for r in runs],
            **{k: mean_cell([r["after"].get(k) for r in runs]) for k in ("FS", "RS", "US", "retain")},
            "attacks": {label: mean_cell([r["attacks"].get(label) for r in runs]) for label in labels}}
        rows |= {f"{name}, items of {method}": {"attacks": x} for name, x in runs[0].get("controls", {}).items()}
        write(folder / "table.md", (table(rows) + "\n").encode())
        print(f"\n{table(rows)}\n{time.time() - start:.0f} s\n", flush=True)
    return rows


def sub_run(s: Settings, folder: Path, rows: dict, seed: int | None = None, final: bool = False, **chosen) -> dict:
    """One run of `compare`, or its result if it is finished: attacks, US and controls only where it is a final one.

    A run that diverges has reached None: its rate is too high, which the search for the lowest wants to know.
    """
    seed = s.seed if seed is None else seed
    name = " ".join([chosen["method"], *(f"{k}={v:g}" for k, v in chosen.items() if k != "method"), f"seed={seed}"])
    part = replace(s, seed=seed, attack_seeds=int(final), utility=s.utility * final,
                   control=s.control * (final and seed == s.seed), **chosen)
    part.backbone = part.backbone if part.method == "ssiuu" else part.method
    result, path = read_json(folder / name / "result.json", default={}), folder / name / "result.json"
    if not result or final and "attacks" not in result:
        try:
            result = experiment(part, folder / name, rows.get("Default") or None, every=10)
        except FloatingPointError as e:
            print(e, flush=True)
            result = {"after": {"reached": None, "why": str(e)}, "attacks": {}}
            write_json(path, result)
    (folder / name / "state.safetensors").unlink(missing_ok=True)
    rows["Default"] = {**rows.get("Default", {}), **result.get("before", {})}  # its US comes with the first final run
    return {"name": name, **result}


def provenance() -> dict:
    """What made a result: the commit, the versions, the machine."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                             text=True).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    return {"commit": git or None, "torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "threads": torch.get_num_threads()}


def peak_memory(device: str) -> Callable[[], float]:
    """Starts a count; the function it returns gives the peak since then in GB (resident memory on Linux, or CUDA's)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / 1e9
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
        one, start = replace(s, method=i, backbone="gd"), time.time()
        peak = peak_memory(s.device)
        forget_step(model, scope_of(model, s.scope), dict(enumerate(rows[:n])), state, one)
        retain_step(model, rows[n:], one)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if s.device.startswith("cuda"):
            torch.cuda.synchronize(s.device)
        seconds[i].append(time.time() - start)
        memory[i].append(peak())
        print(f"{i:6} {seconds[i][-1]:7.2f} s  {2 * n * K / seconds[i][-1]:7.0f} tokens/s  {memory[i][-1]:6.2f} GB",
              flush=True)
    ratios = sorted(b / a for a, b in zip(seconds["gd"][2:], seconds["ssiuu"][2:]))
    result = {"model": s.model, "B": n, "K": K, "seconds": seconds, "GB": memory, "time_ratios": ratios, **provenance()}
    write_json(Path("runs/bench.json"), result)
    print(f"SSIUU / GD, B={n}, K={K}: time {ratios[2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, n=5)  "
          f"memory {max(memory['ssiuu']) / max(memory['gd'][:2]):.2f}")


def main() -> None:
    s = read_flags(Settings, __doc__)
    methods = list(METHODS) if s.method == "all" else s.method.split(",")
    one_of = {"backbone": ("gd", "ga", "dpo", "npo", *methods), "anchor": ("previous", "initial"),
              "target": ("prob", "logprob"), "scope": ("all", "linear"), "dtype": ("float32", "bfloat16")}
    least = int(len(methods) > 1)  # without an attack there is no table
    check(s, method=(s.method, all(m in METHODS for m in methods), f"all, or some of {', '.join(METHODS)}"),
          **{f: (getattr(s, f), getattr(s, f) in names, " or ".join(names)) for f, names in one_of.items()},
          attack_seeds=(s.attack_seeds, s.attack_seeds >= least, f"at least {least}"),
          lam=(s.lam, 0 <= s.lam < math.inf, "a number >= 0"), tau=(s.tau, 0 <= s.tau <= 1, "a fraction from 0 to 1"),
          measure=(s.measure, not s.measure or not (s.micro_batch or s.per_example), "no --micro-batch, --per-example"),
          beta=(s.beta, s.beta > 0, "a number above 0"), betas=(s.betas, min(s.betas) > 0, "numbers above 0"),
          bench_tokens=(s.bench_tokens, s.bench_tokens > 6, "at least 7, six of them the answer"),
          klue_share=(s.klue_share, 0 < s.klue_share <= 1, "a share from 0 to 1"),
          resume=(s.resume, not s.resume or Path(s.resume, "settings.json").is_file(), "the folder of a run"))
    free = {"resume", "name", "device", "eval_batch", "micro_batch", "save_every"}  # what a resumed run may change
    free |= {"seeds"} if len(methods) > 1 else {"steps", "attack_seeds", "control", "utility", "utility_n"}
    begun = read_json(Path(s.resume, "settings.json")) if s.resume else {}
    for f, now in json.loads(json.dumps(asdict(s))).items():
        expect(**{f: (now, f in free or now == begun.get(f, now), f"{begun.get(f)!r}, as the run began")})
    for reader, file in ((load_alpaca, s.benign), (load_utility, s.utility)):
        if file:
            reader(file)  # what cannot be read ends before the work, not after it
    # No cache: it would keep the cast weights of the first step for as long as this block lasts.
    with torch.autocast(torch.device(s.device).type, torch.bfloat16, s.dtype == "bfloat16", cache_enabled=False):
        if s.bench:
            return bench(s)
        start, folder = time.time(), Path(s.resume) if s.resume else new_folder(s)
        if len(methods) > 1:
            rows = compare(s, methods, folder)
            result = {"settings": asdict(s), "rows": rows, **provenance(), "seconds": round(time.time() - start, 1)}
            write_json(folder / "result.json", result)
        else:
            s.backbone = s.method if s.method != "ssiuu" else s.backbone
            result = experiment(s, folder)
            rows = {"Default": result["before"], s.method: {**result["after"], "attacks": result.get("attacks", {})}}
            rows |= {name: {"attacks": found} for name, found in result.get("controls", {}).items()}
            print("\n" + table(rows))
        print(f"\n{result['seconds']:.0f} s; {folder}/result.json", flush=True)


if __name__ == "__main__":
    run(main)
