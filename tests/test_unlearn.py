"""Algorithm 1 as it runs, on the shipped tiny model: against literal double backward, and against itself resumed."""
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import collate, encode, load_faithun
from model import answer_logprob, load
import ssiuu
from ssiuu import (Settings, State, forget_step, load_state, penalised_backward, retain_step, save_state, scope_of,
                   unlearn)

ROOT = Path(__file__).parent.parent
S = Settings(lam=0.5, lr=1e-4, steps=3, tau=0.0)


def model_and_rows(n=5):
    model, tokenizer = load(ROOT / "data/tiny", dtype=torch.float64)
    examples = load_faithun(ROOT / "data/faithun.json")[:n]
    return model, tokenizer, examples, {i: encode(tokenizer, e.question, e.answers[0]) for i, e in enumerate(examples)}


def state_for(model, A_prev=None):
    return State(torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), A_prev=A_prev or {})


def previous(model, keys=(0,)):
    torch.manual_seed(3)
    return {key: [1e-3 * torch.randn_like(p) for p in model.parameters()] for key in keys}


def literal(model, rows, A_prev, per_example=False):
    """Eq. 8 by autograd, nothing of ssiuu.py: one graph for all, no fusing, no vector, no in-place step."""
    phi, logp = list(model.parameters()), answer_logprob(model, collate(list(rows.values())))
    sums = [x.exp() for x in logp] if per_example else [logp.exp().sum()]
    A = [[p * g for p, g in zip(phi, torch.autograd.grad(P, phi, create_graph=True))] for P in sums]
    I_neg = [sum(same) < 0 for same in zip(*A)]
    J = logp.mean()
    for a_list, prev in zip(A, A_prev.values()):
        J = J + S.lam * sum(((a - q)[i] ** 2).sum() for a, q, i in zip(a_list, prev, I_neg))
    return torch.autograd.grad(J, phi)


def gradient(s, per_example=False):
    model, _, _, rows = model_and_rows()
    keys = list(rows) if per_example else [0]
    state = state_for(model, previous(model, keys))
    stats = forget_step(model, list(model.parameters()), rows, state, s)
    return [p.grad for p in model.parameters()], literal(model, rows, previous(model, keys), per_example), stats, state


@pytest.mark.parametrize("micro", [0, 1, 2])
def test_a_step_is_the_literal_gradient_whatever_the_micro_batch(micro):
    ours, oracle, stats, _ = gradient(replace(S, micro_batch=micro))
    for a, b in zip(ours, oracle):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    assert stats["L_SSIUU"] > 0 and 0 < stats["I_neg"] < 1


@pytest.mark.parametrize("per_example", [False, True])
def test_of_several_micro_batches_one_graph_lives_at_a_time(per_example):
    model, _, _, rows = model_and_rows(3)
    phi, parts, alive = list(model.parameters()), [], []

    def graph(part):
        assert not any(g() is not None for g in alive)
        parts.append(part)
        logp = answer_logprob(model, collate([rows[i] for i in part]))
        g = torch.autograd.grad(logp.exp().sum(), phi, create_graph=True)
        alive[:] = map(weakref.ref, g)
        return logp.mean(), list(g)

    A_prev = previous(model, range(3) if per_example else (0,))
    penalised_backward(graph, [[0], [1], [2]], phi, A_prev, replace(S, per_example=per_example))
    assert parts == [[0], [1], [2]] * 2


def test_the_run_stops_by_the_score_it_logs(monkeypatch):
    """1/3 is logged as 33.33: with tau = 0.3333 a run that went by the unrounded score would not stop."""
    model, tokenizer, examples, _ = model_and_rows(3)
    monkeypatch.setattr(ssiuu, "item_scores", lambda *args: [True, False, False])
    s = replace(S, method="gd", tau=0.3333)
    log = list(unlearn(model, tokenizer, examples, examples, s, state_for(model)))
    assert [r["FS"] for r in log] == [33.33]


def test_per_example_is_the_literal_gradient_of_eq6():
    ours, oracle, _, state = gradient(replace(S, per_example=True), per_example=True)
    for a, b in zip(ours, oracle):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    assert set(state.A_prev) == set(range(5))
    batch = gradient(S)[0]
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, batch))  # the two readings differ


@pytest.mark.parametrize("change", [dict(target="logprob"), dict(first_order=True), dict(lam=0.0)])
def test_options_change_the_gradient(change):
    ours, oracle, _, _ = gradient(replace(S, **change))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, oracle))


def test_anchor_initial_keeps_the_first_attribution():
    model, _, _, rows = model_and_rows()
    for anchor, kept in (("initial", True), ("previous", False)):
        state, before = state_for(model, previous(model)), previous(model)
        forget_step(model, list(model.parameters()), rows, state, replace(S, anchor=anchor))
        assert all(torch.equal(a, b) for a, b in zip(state.A_prev[0], before[0])) is kept


def test_A_prev_is_parameter_times_gradient_and_the_first_step_has_no_penalty():
    model, _, _, rows = model_and_rows()
    state = state_for(model)
    forget_step(model, list(model.parameters()), rows, state, S)
    first = [p.grad.clone() for p in model.parameters()]
    logp = answer_logprob(model, collate(list(rows.values())))
    plain = torch.autograd.grad(logp.mean(), list(model.parameters()), retain_graph=True)
    g = torch.autograd.grad(logp.exp().sum(), list(model.parameters()))
    for p, a, f, q, x in zip(model.parameters(), state.A_prev[0], first, plain, g):
        torch.testing.assert_close(a, p.detach() * x, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(f, q, rtol=1e-10, atol=1e-14)


def test_scope_linear_leaves_out_embeddings_and_norms():
    model, _, _, _ = model_and_rows()
    names = [n for n, p in model.named_parameters() if any(p is q for q in scope_of(model, "linear"))]
    assert len(names) == 7 * 4 and all(n.split(".")[-2] in {f"{k}_proj" for k in "q k v o gate up down".split()} for n in names)


def test_retain_step_sums_over_micro_batches():
    model, _, _, rows = model_and_rows()
    grads = []
    for micro in (0, 2):
        model.zero_grad()
        retain_step(model, list(rows.values()), replace(S, micro_batch=micro))
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def weights_after(s, tmp_path=None, cut=0):
    """Weights after s.steps steps in float32; with `cut`, through a saved state and a freshly loaded model."""
    records, state = [], None
    for steps in [cut, s.steps] if cut else [s.steps]:
        model, tokenizer = load(ROOT / "data/tiny")
        state = State(torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0, fused=True))
        if records:
            load_state(tmp_path / "state.safetensors", model, state)
        examples = load_faithun(ROOT / "data/faithun.json")
        records += unlearn(model, tokenizer, examples[:6], examples[6:20], replace(s, steps=steps), state)
        if tmp_path:
            save_state(tmp_path / "state.safetensors", model, state)
    return [p.detach().clone() for p in model.parameters()], records


@pytest.mark.parametrize("method", ["ssiuu", "gd"])
def test_four_steps_are_two_resumed_and_two_bit_for_bit(tmp_path, method):
    s = replace(S, steps=4, batch_size=4, method=method)
    once, log = weights_after(s)
    again, log_again = weights_after(s, tmp_path, cut=2)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert [r["L"] for r in log] == [r["L"] for r in log_again] and [r["t"] for r in log] == [1, 2, 3, 4]


def test_lambda_zero_is_gd_and_a_seed_repeats_bit_for_bit():
    gd, zero, again = (weights_after(replace(S, method=m, lam=0.0))[0] for m in ("gd", "ssiuu", "ssiuu"))
    penalised, _ = weights_after(replace(S, lam=1.0))
    assert all(torch.equal(a, b) for a, b in zip(gd, zero))
    assert all(torch.equal(a, b) for a, b in zip(zero, again))
    assert not all(torch.equal(a, b) for a, b in zip(zero, penalised))


def test_unlearning_stops_at_the_threshold():
    _, records = weights_after(replace(S, steps=40, tau=0.5, lr=1e-3))
    assert records[-1]["FS"] <= 50 and all(r["FS"] > 50 for r in records[:-1])


def test_measuring_against_the_literal_gradient():
    measured, whole, stats, _ = gradient(replace(S, measure=True))
    assert all(torch.equal(a, b) for a, b in zip(measured, gradient(S)[0]))  # looking changes nothing
    model, _, _, rows = model_and_rows()
    phi, logp = list(model.parameters()), answer_logprob(model, collate(list(rows.values())))
    L = torch.autograd.grad(logp.mean(), phi, retain_graph=True)
    g = torch.autograd.grad(logp.exp().sum(), phi, create_graph=True)
    first = []  # the penalty's gradient where g is a constant
    for p, gp, q in zip(phi, g, previous(model)[0]):
        w = p.detach().clone().requires_grad_()
        a = w * gp.detach()
        first.append(torch.autograd.grad(S.lam * ((a - q)[a < 0] ** 2).sum(), w)[0])
    flat = [torch.cat([x.flatten() for x in xs]).double() for xs in ([a - b for a, b in zip(whole, L)], first, L)]
    assert stats["penalty_ratio"] == pytest.approx((flat[0].norm() / flat[2].norm()).item(), rel=1e-6)
    cos = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0).item()
    assert stats["first_order_cos"] == pytest.approx(cos, abs=1e-6) and abs(cos) < 0.999
