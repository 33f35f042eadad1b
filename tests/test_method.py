"""The method block against oracles that share no code with it, in float64.

- explicit Hessian: torch.autograd.functional.hessian of a functional P, no double backward of ours;
- central differences of the penalty itself, with I^- and A_prev held;
- literal autograd of Alg. 1 l.11, the double backward through (A_prev - A)^2;
- a closed form: a sigmoid's gradient and Hessian, written by hand.
"""
import math
import re
from pathlib import Path

import pytest
import torch

from ssiuu import (attribution, dpo_loss, ga_loss, gd_loss, klue_mask, negative, npo_loss, surrogate,
                   retain_loss, rmu_loss, ssiuu_loss, penalty_weights)

ROOT = Path(__file__).parent.parent
LAM = 0.37


@pytest.fixture
def net():
    """P = sum over 4 inputs of the probability of a class under a two-layer net; 35 parameters."""
    draw = torch.Generator().manual_seed(0)
    phi = [torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()
           for shape in [(3, 5), (5, 4)]]
    x, y = torch.randn(4, 3, dtype=torch.float64, generator=draw), torch.tensor([0, 3, 1, 1])

    def P(*parameters, inputs=slice(None)):
        w1, w2 = parameters or phi
        return ((x @ w1).tanh() @ w2).softmax(-1)[torch.arange(4), y][inputs].sum()

    A_prev = [0.1 * torch.randn(p.shape, dtype=p.dtype, generator=draw) for p in phi]
    return P, phi, A_prev


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).detach()


def gradient(L, P, phi, A_prev, hessian=True):
    """As Algorithm 1 does it: what `surrogate` leaves in .grad."""
    A = attribution(P, phi, hessian)
    constant = [a.detach() for a in A]
    surrogate(L, A, penalty_weights(constant, A_prev, negative(constant), LAM)).backward()
    found = flat([p.grad for p in phi])
    for p in phi:
        p.grad = None
    return found


def explicit(P, phi, A_prev, hessian=True):
    """Eq. 14's second term with H written out as a matrix."""
    constants = tuple(p.detach() for p in phi)
    H = torch.autograd.functional.hessian(P, constants)
    n = [p.numel() for p in phi]
    H = torch.cat([torch.cat([H[i][j].reshape(n[i], n[j]) for j in range(len(n))], 1) for i in range(len(n))])
    g = flat(torch.autograd.functional.jacobian(P, constants))
    w, prev = flat(phi), flat(A_prev)
    delta = torch.where(w * g < 0, w * g - prev, 0)
    return 2 * LAM * (delta * g + hessian * (H @ (delta * w)))


def moved(p, k, step):
    with torch.no_grad():
        p.view(-1)[k] += step


def test_eq12_is_parameter_times_gradient_by_differences(net):
    P, phi, _ = net
    for p, a in zip(phi, attribution(P(), phi)):
        for k in range(p.numel()):
            moved(p, k, 1e-6)
            up = P().item()
            moved(p, k, -2e-6)
            down = P().item()
            moved(p, k, 1e-6)
            expected = p.reshape(-1)[k].item() * (up - down) / 2e-6
            assert a.reshape(-1)[k].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("hessian", [True, False])
def test_eq14_equals_the_explicit_hessian_on_top_of_the_backbone(net, hessian):
    P, phi, A_prev = net
    assert 0 < flat(negative(attribution(P(), phi))).sum() < 35
    value = P()
    dL = flat(torch.autograd.grad(value ** 2, phi, retain_graph=True))
    found = gradient(value ** 2, value, phi, A_prev, hessian)
    torch.testing.assert_close(found, dL + explicit(P, phi, A_prev, hessian), rtol=1e-9, atol=1e-12)


def test_eq14_equals_double_backward_of_algorithm_1(net):
    P, phi, A_prev = net
    A = attribution(P(), phi)
    literal = torch.autograd.grad(LAM * ssiuu_loss(A, A_prev, negative(A)), phi)
    torch.testing.assert_close(gradient(0 * P(), P(), phi, A_prev), flat(literal), rtol=1e-10, atol=1e-13)


def test_eq14_equals_central_differences_of_eq6(net):
    P, phi, A_prev = net
    ours, I_neg = gradient(0 * P(), P(), phi, A_prev), negative(attribution(P(), phi))

    def J():  # written out again, with a fresh gradient at the moved parameters
        grads = torch.autograd.grad(P(), phi)
        terms = (((p * d - a) ** 2) * i for p, d, a, i in zip(phi, grads, A_prev, I_neg))
        return LAM * sum(term.sum().item() for term in terms)

    expected = []
    for p in phi:
        for k in range(p.numel()):
            moved(p, k, 1e-5)
            up = J()
            moved(p, k, -2e-5)
            expected.append((up - J()) / 2e-5)
            moved(p, k, 1e-5)
    assert ours.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_eq14_closed_form_of_a_sigmoid():
    """P = s(w.x): g = s' x and H = s'' x x^T, s' = s(1-s), s'' = s'(1-2s)."""
    w = torch.tensor([0.5, -1.5, 0.8], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.0, 2.0, -0.7], dtype=torch.float64)
    prev = torch.tensor([0.01, -0.02, 0.03], dtype=torch.float64)
    found = gradient(0 * (w @ x), (w @ x).sigmoid(), [w], [prev])
    pairs = list(zip(w.tolist(), x.tolist()))
    s = 1 / (1 + math.exp(-sum(a * b for a, b in pairs)))
    d1, d2 = s * (1 - s), s * (1 - s) * (1 - 2 * s)
    delta = [0.0 if a * d1 * b >= 0 else a * d1 * b - q for (a, b), q in zip(pairs, prev.tolist())]
    dot = sum(d * a * b for d, (a, b) in zip(delta, pairs))
    expected = [2 * LAM * (d * d1 * b + d2 * b * dot) for d, (_, b) in zip(delta, pairs)]
    assert found.tolist() == pytest.approx(expected)


def test_parts_of_a_batch_add_up(net):
    P, phi, A_prev = net
    whole = gradient(P() ** 2, P(), phi, A_prev)
    constant = [a.detach() for a in attribution(P(), phi)]
    w = penalty_weights(constant, A_prev, negative(constant), LAM)
    surrogate(P() ** 2, [], []).backward()
    for part in ([0, 2], [1], [3]):
        value = P(inputs=part)
        surrogate(0 * value, attribution(value, phi), w).backward()
    torch.testing.assert_close(flat([p.grad for p in phi]), whole, rtol=1e-10, atol=1e-13)


def test_without_weights_only_the_backbone_moves(net):
    P, phi, _ = net
    value = P()
    dL = flat(torch.autograd.grad(value ** 2, phi, retain_graph=True))
    surrogate(value ** 2, attribution(value, phi), None).backward()  # t = 1
    assert torch.equal(flat([p.grad for p in phi]), dL)


@pytest.mark.parametrize("break_it", ["sign", "no direct term", "logprob"])
def test_negative_controls_are_told_apart(net, break_it):
    """What a wrong implementation would return differs from the oracle by far more than the tolerance."""
    P, phi, A_prev = net
    right = explicit(P, phi, A_prev)
    A = [a.detach() for a in attribution(P(), phi)]
    if break_it == "sign":
        w = penalty_weights(A, A_prev, [~i for i in negative(A)], LAM)
        wrong = flat(torch.autograd.grad(attribution(P(), phi), phi, w))
    elif break_it == "no direct term":
        v = [w_p * p.detach() for w_p, p in zip(penalty_weights(A, A_prev, negative(A), LAM), phi)]
        wrong = flat(torch.autograd.grad(torch.autograd.grad(P(), phi, create_graph=True), phi, v))
    else:
        wrong = gradient(0 * P(), P().log(), phi, A_prev)
    assert (wrong - right).norm() > 0.05 * right.norm()


def test_gd_npo_dpo_rmu_and_klue_by_hand():
    logp_f, logp_r = torch.tensor([-1.0, -3.0]), torch.tensor([-0.5, -1.5, -4.0])
    assert ga_loss(logp_f).item() == -2 and retain_loss(logp_r).item() == 2
    assert gd_loss(logp_f, logp_r).item() == 0
    logp = torch.tensor([-3.0, -9.0, -0.2], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2, -1, -0.1])
    for beta in (0.1, 0.5):
        ratio = [(math.exp(a) / math.exp(b)) ** beta for a, b in zip(logp.tolist(), ref.double().tolist())]
        expected = 2 / beta * sum(math.log(1 + r) for r in ratio) / 3
        assert npo_loss(logp, ref, beta).item() == pytest.approx(expected, rel=1e-6)
    at_start = torch.autograd.grad(npo_loss(logp, logp.detach(), 0.3), logp)[0]
    torch.testing.assert_close(at_start, torch.full_like(logp, 1 / 3))  # GA's gradient of the mean
    small_beta = torch.autograd.grad(npo_loss(logp, ref, 1e-6), logp)[0]
    torch.testing.assert_close(small_beta, at_start, rtol=1e-4, atol=0)
    w, l, rw, rl = (torch.tensor(x, dtype=torch.float64)
                    for x in ([-5., -7.], [-3., -1.], [-6., -6.], [-1., -2.]))
    odds = [(math.exp(a) / math.exp(c)) ** 0.2 / ((math.exp(b) / math.exp(d)) ** 0.2)
            for a, b, c, d in zip(w, l, rw, rl)]
    expected = -2 / 0.2 * sum(math.log(o / (1 + o)) for o in odds) / 2
    assert dpo_loss(w, l, rw, rl, 0.2).item() == pytest.approx(expected)
    draw = torch.Generator().manual_seed(0)
    h_f, h_r, h_r0, u = (torch.randn(*shape, generator=draw) for shape in ((5, 3), (4, 3), (4, 3), (3,)))
    pull = sum((h_f[i, j] - 20 * u[j]) ** 2 for i in range(5) for j in range(3)) / 15
    keep = sum((h_r[i, j] - h_r0[i, j]) ** 2 for i in range(4) for j in range(3)) / 12
    torch.testing.assert_close(rmu_loss(h_f, h_r, h_r0, u, 20.0, 7.0), pull + 7 * keep)
    A = torch.tensor([3.0, 2.0, 1.0, 0.5])
    wrong = torch.tensor([[2.0, 0.0, 0.0, -9.0], [0.0, 0.0, 0.0, -9.0]])
    # 3 - 10 < 0; -9 does not count
    assert klue_mask(A, wrong, 10.0, 0.5).tolist() == [False, True, True, False]
    assert klue_mask(A, wrong, 0.0, 0.25).tolist() == [True, False, False, False]


def block():
    return re.split(r"^# ====.*\n", (ROOT / "ssiuu.py").read_text(), flags=re.M)[1]


def test_the_block_alone_drives_a_model():
    """Pasted into an empty file: its own imports, nothing else of this repository."""
    space = {}
    exec(block(), space)
    draw = torch.Generator().manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=draw)
    x, y = torch.randn(8, 6, generator=draw), torch.arange(8) % 4
    phi, A_prev, P_seen = list(net.parameters()), None, []
    for _ in range(20):
        logp = net(x).log_softmax(-1)[torch.arange(8), y]
        A = space["attribution"](logp[:4].exp().sum(), phi)
        now = [a.detach() for a in A]
        w = A_prev and space["penalty_weights"](now, A_prev, space["negative"](now), 0.1)
        A_prev = now
        space["surrogate"](space["gd_loss"](logp[:4], logp[4:]), A, w).backward()
        with torch.no_grad():
            for p in phi:
                p -= 0.05 * p.grad
                p.grad = None
        P_seen.append(logp[:4].exp().mean().item())
    assert P_seen[-1] < 0.5 * P_seen[0]


def test_every_equation_and_line_is_cited():
    """By the code that runs: Eq. 1, 2, 4 and 5 in evaluate.py, the others and Algorithm 1 in ssiuu.py."""
    def numbers(pattern, text):
        return {int(n) for group in re.findall(pattern, text) for n in re.findall(r"\d+", group)}

    source = (ROOT / "ssiuu.py").read_text()
    assert {3, 6, 7, 8, 9, 10, 11, 12, 13, 14} <= numbers(r"Eq\. ([\d, ]+)", source)
    assert {1, 2, 4, 5} <= numbers(r"Eq\. ([\d, ]+)", (ROOT / "evaluate.py").read_text())
    page = source[source.index("def unlearn("):]
    cited = [int(n) for n in re.findall(r"\bl\.(\d+)", page[:page.index("\ndef ")])]
    assert set(cited) >= {1, 2, 3, 4, 5, 7, 10, 11, 12, 13, 14}
