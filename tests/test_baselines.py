"""The baselines of C.2: losses against formulas written out, masks and trained weights by what moves, Eq. 1 by nudging."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import collate, encode, load_faithun
from evaluate import FFN, MODULES, neuron_attribution
from model import answer_logprob, load
from ssiuu import (REFUSAL, Settings, backbone_loss, begin, dpo_loss, forget_step, klue_mask, load_state, npo_loss,
                   rmu_layer, rmu_loss, rmu_step, save_state, trained, unlearn)

ROOT = Path(__file__).parent.parent
EXAMPLES = load_faithun(ROOT / "data/faithun.json")
C_f, C_r = EXAMPLES[:6], EXAMPLES[6:20]


def tiny(dtype=torch.float64):
    return load(ROOT / "data/tiny", dtype=dtype)


def settings(method, **change):
    return Settings(method=method, backbone=method, lr=1e-4, steps=3, tau=-1.0, **change)


def test_npo_is_its_formula_starts_as_gradient_ascent_and_tends_to_it():
    logp, ref = torch.tensor([-3.0, -9.0, -0.2], dtype=torch.float64, requires_grad=True), torch.tensor([-2.0, -1.0, -0.1])
    for beta in (0.1, 0.5):
        ratio = [(math.exp(a) / math.exp(b)) ** beta for a, b in zip(logp.tolist(), ref.double().tolist())]
        assert npo_loss(logp, ref, beta).item() == pytest.approx(2 / beta * sum(math.log(1 + r) for r in ratio) / 3, rel=1e-6)
    at_start = torch.autograd.grad(npo_loss(logp, logp.detach(), 0.3), logp)[0]
    torch.testing.assert_close(at_start, torch.full_like(logp, 1 / 3))            # GA's gradient of the mean
    torch.testing.assert_close(torch.autograd.grad(npo_loss(logp, ref, 1e-6), logp)[0], at_start, rtol=1e-4, atol=0)


def test_dpo_is_its_formula_and_npo_when_the_winner_stands_still():
    w, l, rw, rl = (torch.tensor(x, dtype=torch.float64) for x in ([-5., -7.], [-3., -1.], [-6., -6.], [-1., -2.]))
    odds = [(math.exp(a) / math.exp(c)) ** 0.2 / ((math.exp(b) / math.exp(d)) ** 0.2) for a, b, c, d in zip(w, l, rw, rl)]
    assert dpo_loss(w, l, rw, rl, 0.2).item() == pytest.approx(-2 / 0.2 * sum(math.log(o / (1 + o)) for o in odds) / 2)
    assert dpo_loss(rw, l, rw, rl, 0.2).item() == pytest.approx(npo_loss(l, rl, 0.2).item())
    assert dpo_loss(w + 1, l, rw, rl, 0.2) < dpo_loss(w, l, rw, rl, 0.2) < dpo_loss(w, l + 1, rw, rl, 0.2)


def test_rmu_loss_is_two_means():
    torch.manual_seed(0)
    h_f, h_r, h_r0, u = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(3)
    pull = sum((h_f[i, j] - 20 * u[j]) ** 2 for i in range(5) for j in range(3)) / 15
    keep = sum((h_r[i, j] - h_r0[i, j]) ** 2 for i in range(4) for j in range(3)) / 12
    torch.testing.assert_close(rmu_loss(h_f, h_r, h_r0, u, 20.0, 7.0), pull + 7 * keep)


def test_rmu_step_counts_real_tokens_only_and_moves_three_down_proj():
    model, tokenizer = tiny()
    s, l = settings("rmu"), rmu_layer(model)
    state = begin(model, tokenizer, C_f, s)
    assert l == 2 and list(trained(model, "rmu")) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    W = list(trained(model, "rmu").values())
    with torch.no_grad():
        for w in W:  # as after some steps: the frozen model is no longer this one
            w.add_(0.05 * torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1)))
    rows = [encode(tokenizer, e.question, e.answers[0]) for e in EXAMPLES[:9]]
    assert len({len(ids) for ids, _ in rows}) > 2                                   # ragged
    rmu_step(model, W, dict(enumerate(rows[:4])), rows[4:], state.fixed, s)
    frozen = tiny()[0]

    def h(m, row):  # one at a time: no padding anywhere
        x = []
        hook = m.model.layers[l].register_forward_hook(lambda _, i, out: x.append(out[0]))
        m(torch.tensor([row[0]]))
        hook.remove()
        return x[0]

    pull = torch.cat([h(model, r) for r in rows[:4]]) - 20 * state.fixed["u"]
    keep = torch.cat([h(model, r) - h(frozen, r).detach() for r in rows[4:]])
    oracle = torch.autograd.grad(pull.square().mean() + 100 * keep.square().mean(), W)
    for w, o in zip(W, oracle):
        torch.testing.assert_close(w.grad, o, rtol=1e-8, atol=1e-12)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == list(trained(model, "rmu"))
    assert state.fixed["u"].min() >= 0 and state.fixed["u"].norm().item() == pytest.approx(1)


def test_klue_mask_prefers_what_only_the_right_question_shows():
    A, wrong = torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([[2.0, 0.0, 0.0, -9.0], [0.0, 0.0, 0.0, -9.0]])
    assert klue_mask(A, wrong, 10.0, 0.5).tolist() == [False, True, True, False]  # 3 - 10 < 0; -9 does not count
    assert klue_mask(A, wrong, 0.0, 0.25).tolist() == [True, False, False, False]


@pytest.mark.parametrize("method", ["klue", "random"])
def test_masked_methods_move_a_tenth_of_the_ffn_rows_and_nothing_else(method):
    model, tokenizer = tiny(torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    s = settings(method)
    state = begin(model, tokenizer, C_f, s)
    list(unlearn(model, tokenizer, C_f, C_r, s, state))
    moved = {n: (p.detach() != before[n]).flatten(1).any(1) if p.dim() > 1 else p.detach() != before[n]
             for n, p in model.named_parameters()}
    masks = dict(zip(trained(model, method), state.fixed["mask"]))
    assert len(masks) == 3 * 4
    for name, rows in moved.items():
        assert not (rows & ~masks[name][:, 0]).any() if name in masks else not rows.any(), name
    assert sum(m.sum() for m in masks.values()) == round(0.1 * sum(len(m) for m in masks.values()))
    assert sum(rows.sum() for rows in moved.values()) > 0.8 * sum(m.sum() for m in masks.values())


def test_the_random_mask_is_not_klues():
    model, tokenizer = tiny(torch.float32)
    a, b = (torch.cat(begin(model, tokenizer, C_f, settings(m)).fixed["mask"]) for m in ("klue", "random"))
    assert a.sum() == b.sum() and (a & b).sum() < 0.5 * a.sum()


@pytest.mark.parametrize("backbone", ["npo", "dpo"])
def test_a_backbone_takes_its_reference_before_step_one_and_its_micro_batches_add_up(backbone):
    model, tokenizer = tiny()
    s = settings(backbone, beta=0.2)
    state = begin(model, tokenizer, C_f, s)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    rows = {i: encode(tokenizer, e.question, e.answers[0]) for i, e in enumerate(C_f)}
    logp = answer_logprob(model, collate(list(rows.values())))
    ref = torch.stack([answer_logprob(tiny()[0], collate([row]))[0] for row in rows.values()]).detach()
    if backbone == "npo":
        expected = 2 / 0.2 * torch.log1p(torch.exp(0.2 * (logp - ref))).mean()
    else:
        no = [encode(tokenizer, e.question, REFUSAL) for e in C_f]
        lead = answer_logprob(model, collate(no)) - torch.cat([answer_logprob(tiny()[0], collate([r])) for r in no]).detach()
        expected = 2 / 0.2 * torch.log1p(torch.exp(-0.2 * (lead - (logp - ref)))).mean()
    torch.testing.assert_close(backbone_loss(model, logp, list(rows), state.fixed, s), expected)
    oracle = torch.autograd.grad(expected, list(model.parameters()))
    for micro in (0, 4):
        model.zero_grad()
        stats = forget_step(model, list(model.parameters()), rows, state, replace(s, micro_batch=micro))
        assert stats["L"] == pytest.approx(expected.item())
        for p, o in zip(model.parameters(), oracle):
            torch.testing.assert_close(p.grad, o, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("backbone", ["ga", "npo", "dpo"])
def test_the_penalty_goes_on_any_backbone(backbone):
    rows, grads = None, {}
    for method, lam in (("ssiuu", 0.0), ("ssiuu", 0.5), (backbone, 0.0)):
        model, tokenizer = tiny()
        rows = rows or {i: encode(tokenizer, e.question, e.answers[0]) for i, e in enumerate(C_f)}
        s = replace(settings(method, lam=lam), backbone=backbone)
        state = begin(model, tokenizer, C_f, s)
        if method == "ssiuu":
            torch.manual_seed(3)
            state.A_prev = {0: [1e-3 * torch.randn_like(p) for p in model.parameters()]}
        forget_step(model, list(model.parameters()), rows, state, s)
        grads[method, lam] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(grads["ssiuu", 0.0], grads[backbone, 0.0], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(grads["ssiuu", 0.5], grads[backbone, 0.0], rtol=1e-3)


@pytest.mark.parametrize("method", ["npo", "rmu", "klue"])
def test_four_steps_are_two_resumed_and_two_for_methods_that_look_back(tmp_path, method):
    ends = []
    for cuts in ([4], [2, 4]):
        for steps in cuts:
            model, tokenizer = tiny(torch.float32)
            s = replace(settings(method), steps=steps)
            state = begin(model, tokenizer, C_f, s)
            if steps != cuts[0]:
                load_state(tmp_path / "state.safetensors", model, state)
            list(unlearn(model, tokenizer, C_f, C_r, s, state))
            save_state(tmp_path / "state.safetensors", model, state)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_neuron_attribution_is_what_nudging_a_neuron_does_and_a_batch_is_one_at_a_time():
    model, tokenizer = tiny()
    rows = [encode(tokenizer, e.question, e.answers[0]) for e in (C_f[0], C_f[3], C_f[5])]
    batch = collate(rows)
    A = neuron_attribution(model, batch)
    assert len(A) == 7 * 4 and all(name.split(".")[-1] in MODULES for name in A)
    assert list(neuron_attribution(model, batch, FFN)) == [n for n in A if n.split(".")[-1] in FFN]
    for name, a in A.items():
        assert not a[~batch.real()].any()
        for i, row in enumerate(rows):
            torch.testing.assert_close(a[i, :len(row[0])], neuron_attribution(model, collate([row]))[name][0])
    modules = dict(model.named_modules())
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.3.mlp.up_proj", "model.layers.2.mlp.down_proj"):
        k, n = divmod(A[name][0].abs().argmax().item(), A[name].shape[2])
        def P(step):
            def nudge(_, x, out):
                kept.append(out.view(3, batch.ids.shape[1], -1)[0, k, n].item())
                out = out.clone()
                out.view(3, batch.ids.shape[1], -1)[0, k, n] += step
                return out
            kept, hook = [], modules[name].register_forward_hook(nudge)
            p = answer_logprob(model, batch).exp().sum().item()
            hook.remove()
            return p, kept[0]
        (up, h), (down, _) = P(1e-4), P(-1e-4)
        assert A[name][0, k, n].item() == pytest.approx(h * (up - down) / 2e-4, rel=1e-5)
