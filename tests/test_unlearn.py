"""Algorithm 1 as it runs: each gradient against literal autograd in float64, a run against itself resumed."""
import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ssiuu
from data import collate, encode
from evaluate import influence
from model import LM, answer_logprob, read_config
from ssiuu import METHODS, REFUSAL, Settings, begin, load_state, state_tensors, unlearn, write_tensors
from toy import DEVICE, GOLDEN, Letters, C_f, C_r, toy

S = Settings(lam=0.5, lr=1e-3, steps=3, tau=0.0)


@pytest.fixture(autouse=True)
def no_scoring(monkeypatch):
    monkeypatch.setattr(ssiuu, "item_scores", lambda model, tokenizer, C, size: [1.0] * len(C))


def rows_of(C):
    return [encode(Letters(), e.question, e.answers[0]) for e in C]


class Literal:
    """Alg. 1 l.13 by plain autograd on one graph for the batch, nothing of ssiuu.py, its own A_prev."""
    def __init__(self, s):
        self.s, self.A_prev, original = s, None, toy()
        self.rows, self.rows_r = rows_of(C_f), rows_of(C_r)[:]
        self.refusals = [encode(Letters(), e.question, REFUSAL) for e in C_f]
        with torch.no_grad():
            self.ref, self.ref_w = (answer_logprob(original, collate(rows, DEVICE))
                                    for rows in (self.rows, self.refusals))

    def backbone(self, model, logp):
        kind = self.s.backbone if self.s.method == "ssiuu" else self.s.method
        ratio = logp - self.ref
        if kind == "npo":
            return 2 / self.s.beta * torch.log1p(torch.exp(self.s.beta * ratio)).mean()
        if kind == "dpo":
            lead = answer_logprob(model, collate(self.refusals, DEVICE)) - self.ref_w - ratio
            return 2 / self.s.beta * torch.log1p(torch.exp(-self.s.beta * lead)).mean()
        return logp.mean()

    def penalised(self, A):
        return {"negative": A < 0, "positive": A > 0, "all": torch.ones_like(A).bool()}[self.s.penalise]

    def gradient(self, model, b_r):
        s, everything = self.s, list(model.parameters())
        names = [n for n, _ in model.named_parameters()]
        chosen = [i for i, n in enumerate(names) if s.scope == "all" or n.endswith("_proj.weight")]
        phi, logp = [everything[i] for i in chosen], answer_logprob(model, collate(self.rows, DEVICE))
        value = logp if s.target == "logprob" else logp.exp()
        sums = list(value) if s.per_example else [value.sum()]
        gs = [torch.autograd.grad(P, phi, create_graph=True) for P in sums]
        A = [[p * (g.detach() if s.first_order else g) for p, g in zip(phi, each)] for each in gs]
        A = [phi] if s.target == "weights" else A
        J = self.backbone(model, logp)
        if "ga" not in (s.backbone, s.method):
            J = J - answer_logprob(model, collate([self.rows_r[i] for i in b_r], DEVICE)).mean()
        if self.A_prev and s.method == "ssiuu":
            I_neg = [self.penalised(sum(same)) for same in zip(*A)]
            for now, before in zip(A, self.A_prev):
                J = J + s.lam * sum(((a - q)[i] ** 2).sum() for a, q, i in zip(now, before, I_neg))
        if s.anchor == "previous" or self.A_prev is None:
            self.A_prev = [[a.detach().clone() for a in each] for each in A]
        return torch.autograd.grad(J, everything, allow_unused=True)


def follow(s, monkeypatch):
    """Runs `unlearn`; before each l.14 the gradient must be the oracle's. Returns the records."""
    model, oracle, drawn = toy(), Literal(s), []
    real = ssiuu.batches

    def recorded(*args):
        for items in real(*args):
            drawn.append(items)
            yield items

    def compare(optimizer, args, kwargs):
        found = [p.grad.clone() for p in model.parameters()]
        expected = oracle.gradient(model, drawn[-1])
        for (name, _), a, b in zip(model.named_parameters(), found, expected):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11, msg=lambda m: f"{name}: {m}")
        for p, g in zip(model.parameters(), found):
            p.grad = g

    monkeypatch.setattr(ssiuu, "batches", recorded)
    state = begin(model, Letters(), C_f, s)
    state.optimizer.register_step_pre_hook(compare)
    return list(unlearn(model, Letters(), C_f, C_r, s, state))


@pytest.mark.parametrize("anchor, target, scope, first_order, how", list(itertools.product(
    ["previous", "initial"], ["prob", "logprob"], ["all", "linear"], [False, True],
    ["one graph", "parts", "each"])))
def test_each_steps_gradient_is_literal_autograds(anchor, target, scope, first_order, how, monkeypatch):
    s = replace(S, anchor=anchor, target=target, scope=scope, first_order=first_order,
                per_example=how == "each", micro_batch=2 if how == "parts" else None)
    records = follow(s, monkeypatch)
    assert records[0]["L_SSIUU"] == 0 < records[2]["L_SSIUU"] and 0 < records[1]["I_neg"] < 1


@pytest.mark.parametrize("method, backbone", [
    ("ga", "gd"), ("gd", "gd"), ("npo", "gd"), ("dpo", "gd"),
    ("ssiuu", "ga"), ("ssiuu", "npo"), ("ssiuu", "dpo")])
@pytest.mark.parametrize("micro", [None, 2])
def test_every_backbone_with_and_without_the_penalty(method, backbone, micro, monkeypatch):
    records = follow(replace(S, method=method, backbone=backbone, micro_batch=micro, beta=0.2), monkeypatch)
    assert len(records) == 3 and (method != "ssiuu" or records[2]["L_SSIUU"] > 0)


@pytest.mark.parametrize("penalise, target", [("positive", "prob"), ("all", "prob"), ("all", "weights")])
@pytest.mark.parametrize("anchor, micro", [("previous", None), ("initial", 2)])
def test_the_controls_of_the_sign_and_of_damping(penalise, target, anchor, micro, monkeypatch):
    s = replace(S, penalise=penalise, target=target, anchor=anchor, micro_batch=micro)
    records = follow(s, monkeypatch)
    assert records[2]["L_SSIUU"] > 0 and (records[2]["I_neg"] == 1) == (penalise == "all")


def test_a_random_half_is_the_same_half_at_every_step():
    A = [torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    masks, again = (ssiuu.control(x, "random", 7) for x in (A, [-a for a in A]))
    assert all(map(torch.equal, masks, again))
    assert ssiuu.share_of(masks) == pytest.approx(0.5, abs=0.03) and not torch.equal(*masks)


def weights_after(s, tmp_path=None, cut=0):
    """Weights and records of s.steps steps; with `cut`, through a saved state and a freshly loaded model."""
    records = []
    for steps in [cut, s.steps] if cut else [s.steps]:
        model = toy(torch.float32)
        state = begin(model, Letters(), C_f, s)
        if records:
            load_state(tmp_path / "state.safetensors", model, state, len(C_f), s)
        records += unlearn(model, Letters(), C_f, C_r, replace(s, steps=steps), state)
        if tmp_path:
            write_tensors(tmp_path / "state.safetensors", state_tensors(model, state))
    return [p.detach().clone() for p in model.parameters()], records


@pytest.mark.parametrize("change", [
    {}, {"method": "gd"}, {"method": "npo"}, {"method": "rmu"}, {"method": "klue"},
    {"per_example": True}, {"anchor": "initial", "batch_size": None}])
def test_four_steps_are_two_resumed_and_two_bit_for_bit(tmp_path, change):
    s = replace(S, **{"steps": 4, "batch_size": 3, **change})
    once, log = weights_after(s)
    again, log_again = weights_after(s, tmp_path, cut=2)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert [r["L"] for r in log] == [r["L"] for r in log_again]
    assert [r["t"] for r in log_again] == [1, 2, 3, 4]


@pytest.mark.parametrize("change", [
    {}, {"micro_batch": 2}, {"anchor": "initial"}, {"per_example": True, "batch_size": 3}])
def test_offloading_changes_no_bit_also_where_it_begins_at_a_resume(tmp_path, change):
    s = replace(S, steps=4, **change)
    once, log = weights_after(s)
    for path in (None, tmp_path):
        again, log_again = weights_after(replace(s, offload=True), path, cut=2 if path else 0)
        assert all(map(torch.equal, once, again))
        assert [r["L_SSIUU"] for r in log] == [r["L_SSIUU"] for r in log_again]


def test_what_is_offloaded_is_not_what_the_step_computed_with():
    model, s = toy(torch.float32), replace(S, offload=True)
    state = begin(model, Letters(), C_f, s)
    list(unlearn(model, Letters(), C_f, C_r, s, state))
    before = [a.clone() for a in state.A_prev[0]]
    list(unlearn(model, Letters(), C_f, C_r, replace(s, steps=4, anchor="initial"), state))
    assert all(map(torch.equal, before, state.A_prev[0]))


def test_a_state_that_is_not_this_runs_is_refused(tmp_path):
    weights_after(replace(S, steps=1), tmp_path)
    for change in ({"method": "gd"}, {"method": "rmu"}, {"scope": "linear"}):
        s = replace(S, **change)
        model = toy(torch.float32)
        with pytest.raises(ValueError, match="state.safetensors: .* not expected"):
            load_state(tmp_path / "state.safetensors", model, begin(model, Letters(), C_f, s), len(C_f), s)


@pytest.mark.parametrize("change", [
    lambda keys: {k: x for k, x in keys.items() if not k.startswith("A_prev 1 ")},
    lambda keys: {k: x for k, x in keys.items() if not k.startswith("A_prev ")},
    lambda keys: keys | {k.replace("A_prev 1 ", "A_prev 99 "): x.clone() for k, x in keys.items()}])
def test_each_item_that_was_drawn_has_its_attribution_in_a_state(tmp_path, change):
    path, s = tmp_path / "state.safetensors", replace(S, steps=2, per_example=True, batch_size=2)
    weights_after(s, tmp_path)
    write_tensors(path, change(load_file(path)))
    model = toy(torch.float32)
    with pytest.raises(ValueError, match="A_prev .* not expected"):
        load_state(path, model, begin(model, Letters(), C_f, s), len(C_f), s)


def test_lambda_zero_is_gd_and_a_seed_repeats_bit_for_bit():
    gd, zero, again = (weights_after(replace(S, method=m, lam=0.0))[0] for m in ("gd", "ssiuu", "ssiuu"))
    penalised, _ = weights_after(S)
    assert all(map(torch.equal, gd, zero)) and all(map(torch.equal, zero, again))
    assert not all(torch.equal(a, b) for a, b in zip(zero, penalised))


@pytest.mark.parametrize("tau, stops", [(0.3333, True), (0.3332, False), (0.333, False), (1.0, True)])
def test_the_run_stops_by_the_score_it_logs(tau, stops, monkeypatch):
    """1/3 is logged as 33.33: with tau = 0.3333 a run that went by the unrounded score would not stop."""
    monkeypatch.setattr(ssiuu, "item_scores", lambda *args: [1.0, 0.0, 0.0])
    records = weights_after(replace(S, tau=tau))[1]
    assert len(records) == (1 if stops else 3) and records[0]["FS"] == 33.33


def test_tau_is_compared_in_decimals(monkeypatch):
    monkeypatch.setattr(ssiuu, "item_scores", lambda *args: [1.0] * 29 + [0.0] * 71)
    assert len(weights_after(replace(S, tau=0.29))[1]) == 1  # 100 * 0.29 is 28.999999999999996


def test_a_run_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="lower --lr"):
        weights_after(replace(S, lam=1e39))


@pytest.mark.parametrize("method", ["klue", "random"])
def test_masked_methods_move_a_share_of_the_ffn_rows_and_nothing_else(method):
    model = toy(torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    s = replace(S, method=method)
    state = begin(model, Letters(), C_f, s)
    list(unlearn(model, Letters(), C_f, C_r, s, state))
    masks = dict(zip([n for n in before if ".mlp." in n], state.masks))
    for name, p in model.named_parameters():
        rows = (p.detach() != before[name]).flatten(1).any(1) if p.dim() > 1 else p.detach() != before[name]
        assert not (rows & ~masks[name][:, 0]).any() if name in masks else not rows.any(), name
    assert sum(m.sum() for m in state.masks) == round(0.1 * sum(len(m) for m in state.masks))


def test_klue_ranks_by_attribution_less_what_any_question_shows():
    model, s = toy(torch.float32), replace(S, method="klue")
    mask = torch.cat(begin(model, Letters(), C_f, s).masks)[:, 0]
    A = influence(model, rows_of(C_f), ssiuu.FFN)
    A = torch.cat([a[0].clamp(min=0).mean(0) for a in A.values()])
    assert A[mask].mean() > A[~mask].mean()
    other = torch.cat(begin(model, Letters(), C_f, replace(S, method="random")).masks)[:, 0]
    assert mask.sum() == other.sum() and not torch.equal(mask, other)


def test_rmu_trains_three_blocks_up_to_the_seventh():
    with torch.device("meta"):
        model = LM(replace(read_config(GOLDEN), num_hidden_layers=10))
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in ssiuu.trained(model, "rmu")] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in (5, 6, 7)]


@pytest.mark.parametrize("skip", [0, 1])
def test_rmu_counts_real_tokens_only_and_moves_down_proj_alone(skip):
    s, model, frozen = replace(S, method="rmu", rmu_alpha=7.0, rmu_skip_first=bool(skip)), toy(), toy()
    state, rows = begin(model, Letters(), C_f, s), [*rows_of(C_f), *rows_of(C_r)]
    W = [p for p in model.parameters() if p.requires_grad]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    for w in W:  # as after some steps: the frozen model is no longer this one
        w.data += 0.05 * torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1))
    ssiuu.rmu_step(model, W, collate(rows[:5]), collate(rows[5:]), state.steer, s)

    def h(m, row):  # one at a time: no padding anywhere; block l = 1 is the last
        return m.hidden(torch.tensor([row[0]]), blocks=2)[0, skip:]

    pull = torch.cat([h(model, r) for r in rows[:5]]) - 20 * state.steer[0]
    keep = torch.cat([h(model, r) - h(frozen, r).detach() for r in rows[5:]])
    oracle = torch.autograd.grad(pull.square().mean() + 7 * keep.square().mean(), W)
    for w, o in zip(W, oracle):
        torch.testing.assert_close(w.grad, o, rtol=1e-8, atol=1e-12)
    assert state.steer[0].min() >= 0 and state.steer[0].norm().item() == pytest.approx(1)


def test_every_function_of_the_block_is_entered_by_the_command(monkeypatch):
    """A default step twice (t = 1 and 2) and a step of each baseline, through `unlearn`."""
    block = re.split(r"^# ====.*\n", Path(ssiuu.__file__).read_text(), flags=re.M)[1]
    names, entered = set(re.findall(r"^def (\w+)", block, re.M)), set()

    def trace(frame, event, arg):
        if frame.f_code.co_filename == ssiuu.__file__:
            entered.add(frame.f_code.co_name)

    sys.setprofile(trace)
    try:
        for method in METHODS:
            weights_after(replace(S, method=method, steps=2))
    finally:
        sys.setprofile(None)
    assert len(names) > 10 and names <= entered, names - entered
