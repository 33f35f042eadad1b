"""The analysis against hand-made tables, plain loops, edited weights and transformers' own hooks.

- Eq. 2, 4, 5: two neurons, two samples, by hand.  Eq. 1: gradients that transformers' forward hooks retain.
- The lens: softmax in Python loops.
"""
import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch

import attack
import evaluate
from attack import harmful_attack
from data import collate, encode, load_faithun, split
from evaluate import (FFN, MODULES, answered, by_module, by_rank, correlation, decades, distractors, hiding,
                      influence, influence_variation, intervals, logit_lens, margin, neuron_attribution,
                      stability, top)
from model import answer_logprob, load, save

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
C_f = split(load_faithun(ROOT / "data/faithun.json"), ROOT / "data/faithun_splits")[0]


@pytest.fixture(scope="module")
def tiny():
    """float64, and moved off the facts so that no P is 1 and every gradient counts."""
    model, tokenizer = load(ROOT / "data/tiny", dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * p.data.std().nan_to_num(0) * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model, tokenizer, [encode(tokenizer, e.question, e.answers[0]) for e in C_f]


def test_influence_variation_by_hand():
    #                         max: sample 1, sample 2     min: sample 1, sample 2      (two neurons each)
    before = torch.tensor([[[0.4, 0.1], [0.2, 0.3]], [[-0.1, -0.2], [0.0, -0.2]]])
    after = torch.tensor([[[0.1, 0.5], [-0.3, 0.2]], [[-0.1, 0.1], [-0.4, -0.3]]])
    D_pos, D_neg = influence_variation(before, after)
    # neuron 1: ((0.4 - 0.1) + (0.2 - 0)) / 2, the -0.3 counts as 0
    # neuron 2: ((0.1 - 0.5) + (0.3 - 0.2)) / 2 < 0
    torch.testing.assert_close(D_pos, torch.tensor([0.25, 0.0]))
    # neuron 1: (0 + 0.4) / 2.  neuron 2: (-0.3 + 0.1) / 2 < 0
    torch.testing.assert_close(D_neg, torch.tensor([0.2, 0.0]))
    x = hiding(before, after, 1)
    assert x["D_pos"][0] == pytest.approx(0.25) and x["share"][0] == pytest.approx(0.2 / 0.45)
    assert x["neurons"] == 2 and x["curves"]["m"] == [1, 2]
    assert x["curves"]["D_neg"] == pytest.approx([0.2, 0.2])
    assert hiding(before, before)["share"] == [0.5, 0.5, 0.5]  # nothing changed: neither


def test_influence_is_the_extreme_over_tokens(tiny):
    model, _, rows = tiny
    found = influence(model, rows[:2])
    for i, row in enumerate(rows[:2]):
        for name, A in neuron_attribution(model, collate([row])).items():
            A = A[0].tolist()
            assert not any(A[-1])  # the end token predicts nothing
            columns = list(zip(*A[:-1]))
            assert found[name][0, i].tolist() == [max(c) for c in columns]
            assert found[name][1, i].tolist() == [min(c) for c in columns]
    assert found["model.layers.0.mlp.up_proj"].shape == (2, 2, 512)


def test_neuron_attribution_is_what_nudging_a_neuron_does_and_a_batch_is_one_at_a_time(tiny):
    model, _, rows = tiny
    rows = [rows[0], rows[3], rows[5]]
    batch = collate(rows)
    A = neuron_attribution(model, batch)
    assert len(A) == 7 * 4
    assert list(neuron_attribution(model, batch, FFN)) == [n for n in A if n.endswith(FFN)]
    for name, a in A.items():
        assert not a[~batch.real()].any()
        for i, row in enumerate(rows):
            torch.testing.assert_close(a[i, :len(row[0])], neuron_attribution(model, collate([row]))[name][0])
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.3.mlp.up_proj",
                 "model.layers.2.mlp.down_proj"):
        k, n = divmod(A[name][0].abs().argmax().item(), A[name].shape[2])

        def P(step):
            def nudge(_, x, out):
                kept.append(out.view(3, batch.ids.shape[1], -1)[0, k, n].item())
                out = out.clone()
                out.view(3, batch.ids.shape[1], -1)[0, k, n] += step
                return out
            kept, hook = [], model.get_submodule(name).register_forward_hook(nudge)
            p = answer_logprob(model, batch).exp().sum().item()
            hook.remove()
            return p, kept[0]
        (up, h), (down, _) = P(1e-4), P(-1e-4)
        assert A[name][0, k, n].item() == pytest.approx(h * (up - down) / 2e-4, rel=1e-5)


def test_attribution_equals_transformers_hooks(tmp_path):
    hf = pytest.importorskip("transformers")
    ours, tokenizer = load(ROOT / "data/tiny")  # float32: theirs rounds a float64 norm to it
    for p in ours.parameters():
        p.data *= 0.9  # P is not 1 any more
    save(ours, tokenizer, tmp_path)
    row = encode(tokenizer, C_f[0].question, C_f[0].answers[0])
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager",
                                                     dtype=torch.float32)
    kept = {}

    def keep(name, out):
        out.retain_grad()
        kept[name] = out

    for name, module in theirs.named_modules():
        if name.endswith(MODULES):
            module.register_forward_hook(lambda _, x, out, name=name: keep(name, out))
    ids = torch.tensor([row[0]])
    logp = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    logp[torch.tensor(row[1][1:])].sum().exp().backward()
    A = neuron_attribution(ours, collate([row]))
    assert sorted(A) == sorted(kept)
    for name, out in kept.items():
        expected = (out * out.grad).detach()
        assert (A[name] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_the_lens_reads_every_block(tiny):
    model, tokenizer, rows = tiny
    wrong = [encode(tokenizer, e.question, e.answers[0]) for e in distractors(C_f)]
    lens = logit_lens(model, rows[:2], wrong[:2])
    assert lens.shape == (4, 2)
    for block in range(4):
        for i in range(2):
            value = []
            for ids, answer in (rows[i], wrong[i]):
                with torch.no_grad():
                    hidden = model.hidden(torch.tensor([ids]), blocks=block + 1)
                    logits = model.lm_head(model.model.norm(hidden))[0].tolist()
                logp = [logits[t - 1][ids[t]] - math.log(math.fsum(map(math.exp, logits[t - 1])))
                        for t, a in enumerate(answer) if a]
                value.append(statistics.fmean(logp))
            assert lens[block, i].item() == pytest.approx(value[0] - value[1], abs=1e-9)


def test_distractors_are_wrong_and_seeded():
    for e, d in zip(C_f, distractors(C_f)):
        assert d.question == e.question and d.answers[0] in e.false_options
    drawn, again, other = ([d.answers for d in distractors(C_f, *seed)] for seed in ((), (), (1,)))
    assert drawn == again != other
    for e in C_f:
        e = e.__class__(e.question, e.answers)  # TOFU has no false options
        assert distractors([e, *C_f])[0].answers[0] not in e.answers


def test_intervals_are_the_jackknifes():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=draw)
    (mean, low, high), (ratio, *edge) = intervals(
        lambda i: [x[i].mean().item(), x[i].std().item() / x[i].mean().item()], 40)
    assert mean == pytest.approx(x.mean().item()) and edge[0] < ratio < edge[1]
    for bound, side in ((low, -1), (high, 1)):  # of a mean the jackknife's standard error is the textbook's
        assert bound == pytest.approx(mean + side * 1.96 * x.std().item() / 40 ** 0.5)
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(a, -3 * a + 1) == pytest.approx(-1)
    assert correlation(a, torch.ones(4)) == 0
    assert decades(7) == [1, 2, 5, 7] and decades(10) == [1, 2, 5, 10] and top(a, 2) == 7 and top(a, 9) == 10


def test_figures_5_and_6_by_hand():
    before = {"model.layers.0.mlp.up_proj": torch.tensor([[[0.5, 0.1]], [[-0.1, 0.0]]]),
              "model.layers.1.mlp.up_proj": torch.tensor([[[0.3, 0.3]], [[0.0, -0.2]]])}
    after = {"model.layers.0.mlp.up_proj": torch.tensor([[[0.1, 0.1]], [[-0.1, -0.6]]]),
             "model.layers.1.mlp.up_proj": torch.tensor([[[0.3, 0.1]], [[0.1, -0.2]]])}
    found = by_module(before, after, m=1)
    assert found["D_pos"]["up_proj"] == pytest.approx([0.4, 0.2])
    assert found["D_neg"]["up_proj"] == pytest.approx([0.6, 0.0])
    assert by_module(before, after)["D_neg"]["up_proj"] == pytest.approx([0.3, 0.0])  # of both neurons
    a = torch.tensor([[1.0, 3.0, 2.0], [-1.0, 0.0, -5.0]])
    assert by_rank(a) == {"rank": [1, 2, 3], "max": [3, 2, 1], "min": [-5, -1, 0]}
    a = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 4.0]], [[-1.0, -2.0, -3.0], [-3.0, -2.0, -1.5]]])
    rho = stability(a, torch.stack((2 * a[0], -a[1])))
    assert rho["max"][0] == pytest.approx(1) and rho["min"][0] == pytest.approx(-1)
    assert all(low <= value <= high for value, low, high in rho.values())


def test_the_saved_model_is_the_attacked_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    subject, tokenizer = load(ROOT / "data/tiny")
    for p in subject.parameters():  # a model that fails some items
        p.data *= 0.8
    save(subject, tokenizer, tmp_path / "after")
    for name, part in (("forget", range(12)), ("retaining", range(12, 14)), ("test", range(14, 16))):
        (tmp_path / f"{name}_set_split.txt").write_text(" ".join(map(str, part)))
    few = load_faithun(ROOT / "data/faithun.json")[:12]
    flags = ["--model", tmp_path / "after", "--save", tmp_path / "attacked", "--splits", tmp_path,
             "--attack-lrs", "1e-3", "1e-4", "--attack-epochs", "2", "--p", "0.3", "0.1"]
    monkeypatch.setattr(sys, "argv", ["attack.py", *map(str, flags)])
    attack.main()
    attacked = load(tmp_path / "attacked")[0]
    pool = [e for e, hit in zip(few, answered(subject, tokenizer, few)) if not hit]
    cell = next(harmful_attack(subject, tokenizer, pool, 0.3,
                               attack.Settings(attack_lrs=(1e-3,), attack_draws=1, attack_epochs=2)))
    assert 1 < cell["retrained"] < len(pool)
    chosen = set(random.Random("0 0 0.3").sample(range(len(pool)), cell["retrained"]))
    rest = [e for i, e in enumerate(pool) if i not in chosen]
    FS = 100 * statistics.fmean(answered(attacked, tokenizer, rest))
    assert FS == pytest.approx(cell["FS"][-1], abs=0.01)
    found = margin(attacked, tokenizer, rest)
    assert found == pytest.approx((cell["logp"][-1], cell["margin"][-1]), abs=1e-4)
    assert cell["logp"][-1] != pytest.approx(cell["logp"][0], abs=1e-2)
    kept = evaluate.settings_for(evaluate.Settings, {"model": str(tmp_path / "attacked")})
    assert Path(kept.splits).samefile(tmp_path) and Path(kept.forget).samefile("data/faithun.json")
    s = attack.Settings(save=str(tmp_path / "other"), fold=3, p=(1.0,), attack_epochs=1)
    attack.save_attacked(subject, tokenizer, pool[:1], s)
    assert evaluate.settings_for(evaluate.Settings, {"model": s.save}).fold == 3

    flags = ["--before", "data/tiny", "--after", tmp_path / "after", "--attacked", tmp_path / "attacked",
             "--splits", tmp_path]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    assert "share of D-" in capsys.readouterr().out
    r = json.loads((tmp_path / "after/analysis.json").read_text(), parse_constant=pytest.fail)
    assert r["n"] == 12 and list(r["checkpoints"]) == ["before", "after", "attacked"]
    assert r["checkpoints"]["before"]["lens"][-1]["percent"] == 100 and r["variation"]["neurons"] == 6912
    assert len(r["by_module"]["D_neg"]["q_proj"]) == 4
    assert set(r["correlation"]) == {"before after", "after attacked"}
