"""The method block against oracles that share no code with it, in float64.

- explicit Hessian: J^T rows from torch.autograd.functional.hessian of a functional P, no double backward of ours;
- central differences of the penalty itself, with I^- and A_prev held;
- literal autograd of Alg. 1 l.11 (the double backward through (A_prev - A)^2);
- a closed form: softmax regression's gradient and Hessian, written by hand.
"""
import math

import pytest
import torch

import ssiuu
from ssiuu import attribution, ga_loss, gd_loss, hvp, negative, penalty_vector, ssiuu_backward, ssiuu_grad, ssiuu_loss

LAM = 0.37


@pytest.fixture
def net():
    """P = sum over 4 inputs of the probability of a class under a two-layer net; 35 parameters."""
    torch.manual_seed(0)
    phi = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 5), (5, 4)]]
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 1])

    def P(*weights):
        w1, w2 = weights or phi
        return ((x @ w1).tanh() @ w2).softmax(-1)[torch.arange(4), y].sum()

    A_prev = [0.1 * torch.randn_like(p) for p in phi]
    return P, phi, A_prev


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).detach()


def test_eq12_is_parameter_times_gradient_by_differences(net):
    P, phi, _ = net
    g, A = attribution(P, phi)
    for p, a in zip(phi, A):
        for k in range(p.numel()):
            with torch.no_grad():
                old, h = p.view(-1)[k].item(), 1e-6
                p.view(-1)[k] = old + h; up = P().item()
                p.view(-1)[k] = old - h; down = P().item()
                p.view(-1)[k] = old
            assert a.reshape(-1)[k].item() == pytest.approx(old * (up - down) / (2 * h), rel=1e-6, abs=1e-9)


def explicit(P, phi, A_prev, lam):
    """Eq. 14 with H written out as a matrix."""
    H = torch.autograd.functional.hessian(P, tuple(p.detach() for p in phi))
    n = [p.numel() for p in phi]
    H = torch.cat([torch.cat([H[i][j].reshape(n[i], n[j]) for j in range(len(n))], 1) for i in range(len(n))])
    g = flat(torch.autograd.functional.jacobian(P, tuple(p.detach() for p in phi)))
    w, prev = flat(phi), flat(A_prev)
    delta = torch.where(w * g < 0, w * g - prev, 0)
    return 2 * lam * (delta * g + H @ (delta * w))


def test_eq14_equals_the_explicit_hessian(net):
    P, phi, A_prev = net
    g, A = attribution(P, phi)
    assert 0 < flat(negative(A)).sum() < flat(A).numel()
    torch.testing.assert_close(flat(ssiuu_grad(g, A, A_prev, phi, LAM)), explicit(P, phi, A_prev, LAM), rtol=1e-9, atol=1e-12)


def test_eq14_equals_double_backward_of_algorithm_1(net):
    P, phi, A_prev = net
    g, A = attribution(P, phi)
    literal = torch.autograd.grad(LAM * ssiuu_loss(A, A_prev, negative(A)), phi, retain_graph=True)
    torch.testing.assert_close(flat(ssiuu_grad(g, A, A_prev, phi, LAM)), flat(literal), rtol=1e-10, atol=1e-13)


def test_eq14_equals_central_differences_of_eq6(net):
    P, phi, A_prev = net
    g, A = attribution(P, phi)
    ours, I = flat(ssiuu_grad(g, A, A_prev, phi, LAM)), negative(A)

    def penalty():  # written out again, with a fresh gradient at the moved parameters
        grads = torch.autograd.grad(P(), phi)
        return LAM * sum((((p * d - a) ** 2) * i).sum().item() for p, d, a, i in zip(phi, grads, A_prev, I))

    k = 0
    for p in phi:
        for j in range(p.numel()):
            old, h = p.view(-1)[j].item(), 1e-5
            with torch.no_grad(): p.view(-1)[j] = old + h
            up = penalty()
            with torch.no_grad(): p.view(-1)[j] = old - h
            down = penalty()
            with torch.no_grad(): p.view(-1)[j] = old
            assert ours[k].item() == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-8)
            k += 1


def test_eq14_closed_form_of_a_sigmoid():
    """P = s(w.x): g = s' x and H = s'' x x^T, s' = s(1-s), s'' = s'(1-2s)."""
    w = torch.tensor([0.5, -1.5, 0.8], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.0, 2.0, -0.7], dtype=torch.float64)
    prev = torch.tensor([0.01, -0.02, 0.03], dtype=torch.float64)
    g, A = attribution(lambda: (w @ x).sigmoid(), [w])
    z = sum(a * b for a, b in zip(w.tolist(), x.tolist()))
    s = 1 / (1 + math.exp(-z))
    d1, d2 = s * (1 - s), s * (1 - s) * (1 - 2 * s)
    delta = [0.0 if a * d1 * b >= 0 else a * d1 * b - q for a, b, q in zip(w.tolist(), x.tolist(), prev.tolist())]
    dot = sum(d * a * b for d, a, b in zip(delta, w.tolist(), x.tolist()))
    expected = [2 * LAM * (d * d1 * b + d2 * b * dot) for d, b in zip(delta, x.tolist())]
    assert ssiuu_grad(g, A, [prev], [w], LAM)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_hvp_equals_hessian_times_v(net):
    P, phi, _ = net
    g, _ = attribution(P, phi)
    v = [torch.randn_like(p) for p in phi]
    H = torch.autograd.functional.hessian(P, tuple(p.detach() for p in phi))
    expected = [sum((H[i][j] * v[j]).flatten(phi[i].ndim).sum(-1) for j in range(len(phi))) for i in range(len(phi))]
    torch.testing.assert_close(flat(hvp(g, phi, v)), flat(expected), rtol=1e-9, atol=1e-12)


def test_the_fused_backward_is_the_sum_of_its_terms(net):
    P, phi, A_prev = net
    L = P() ** 2
    dL = torch.autograd.grad(L, phi, retain_graph=True)
    g, A = attribution(P, phi)
    expected = flat(dL) + explicit(P, phi, A_prev, LAM)
    ssiuu_backward(L, g, penalty_vector(A, A_prev, negative(A), phi, LAM), phi)
    torch.testing.assert_close(flat([p.grad for p in phi]), expected, rtol=1e-9, atol=1e-12)


def test_first_order_drops_the_hessian_and_nothing_else(net):
    P, phi, A_prev = net
    L = P() * 3
    g, A = attribution(P, phi)
    dL, w = flat(torch.autograd.grad(L, phi, retain_graph=True)), flat(phi)
    delta = torch.where(flat(A) < 0, flat(A) - flat(A_prev), 0)
    ssiuu_backward(L, g, penalty_vector(A, A_prev, negative(A), phi, LAM), phi, first_order=True)
    torch.testing.assert_close(flat([p.grad for p in phi]), dL + 2 * LAM * delta * flat(g), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("break_it", ["sign", "direct", "logprob"])
def test_negative_controls_are_told_apart(net, break_it):
    """What a wrong implementation would return differs from the oracle by far more than the tolerance."""
    P, phi, A_prev = net
    g, A = attribution(P if break_it != "logprob" else lambda: P().log(), phi)
    if break_it == "sign":
        wrong = ssiuu_grad(g, [-a for a in A], [-a for a in A_prev], phi, LAM)
    elif break_it == "direct":
        wrong = hvp(g, phi, penalty_vector(A, A_prev, negative(A), phi, LAM))
    else:
        wrong = ssiuu_grad(g, A, A_prev, phi, LAM)
    right = explicit(P, phi, A_prev, LAM)
    assert (flat(wrong) - right).norm() > 0.05 * right.norm()


def test_zero_parameters_bring_no_nan(net):
    P, phi, A_prev = net
    with torch.no_grad():
        phi[0][0, 0] = 0
    L = P()
    g, A = attribution(lambda: L, phi)
    ssiuu_backward(L, g, penalty_vector(A, A_prev, negative(A), phi, LAM), phi)
    assert all(p.grad.isfinite().all() for p in phi)


def test_backbone_losses_by_hand():
    logp_f, logp_r = torch.tensor([-1.0, -3.0]), torch.tensor([-0.5, -1.5, -4.0])
    assert ga_loss(logp_f).item() == -2.0
    assert gd_loss(logp_f, logp_r).item() == pytest.approx(-2.0 + 2.0)


def test_every_equation_and_line_is_cited():
    """Eq. 2, 4 and 5 belong to the analysis, Eq. 1 to neurons; they join this list with their code."""
    import re
    from pathlib import Path
    source = Path(ssiuu.__file__).read_text()
    numbers = {int(n) for group in re.findall(r"Eq\. ([\d, ]+)", source) for n in re.findall(r"\d+", group)}
    assert {3, 6, 7, 9, 10, 11, 12, 13, 14} <= numbers
    lines = {int(n) for n in re.findall(r"\bl\.(\d+)", source)}
    lines |= {k for a, b in re.findall(r"\bl\.(\d+)-(\d+)", source) for k in range(int(a), int(b) + 1)}
    assert set(range(1, 15)) - {6, 9} <= lines
