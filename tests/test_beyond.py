"""What is beyond the paper, against edited weights, plain loops and tables by hand.

- A silent neuron: the same model with that row of the weight matrix set to zero.
- Integrated gradients: the axiom of completeness, which Eq. 1 fails.  Heads and modules: sums in Python.
- Membership: softmax in Python loops.  AUC: counted pairs.
"""
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data/results"))

import beyond_paper  # noqa: E402
from beyond_paper import (ablation, agreement, auc, causal_test, extremes, influence_of_wholes,  # noqa: E402
                          integrated_gradients, largest, membership, ranks, sample_neurons, silenced,
                          three_attributions)
from data import collate, encode, load_faithun, split  # noqa: E402
from evaluate import MODULES, answered, margin, neuron_attribution  # noqa: E402
from model import answer_logprob, load, save  # noqa: E402

torch.set_num_threads(1)
C_f = split(load_faithun(ROOT / "data/faithun.json"), ROOT / "data/faithun_splits")[0]
GATE = "model.layers.2.mlp.gate_proj"


@pytest.fixture(scope="module")
def tiny():
    """float64, and moved off the facts so that no P is 1 and every gradient counts."""
    model, tokenizer = load(ROOT / "data/tiny", dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * p.data.std().nan_to_num(0) * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model, tokenizer, [encode(tokenizer, e.question, e.answers[0]) for e in C_f]


@pytest.fixture(scope="module")
def plain():
    return load(ROOT / "data/tiny")


def test_heads_and_modules_are_sums_of_their_neurons(tiny):
    model, _, rows = tiny
    found = influence_of_wholes(model, rows[:2])
    assert found["head"].shape == (2, 2, 40) and found["module"].shape == (2, 2, 28)
    for i, row in enumerate(rows[:2]):
        A = {name: a[0].tolist() for name, a in neuron_attribution(model, collate([row])).items()}
        whole, heads = [], []
        for name, tokens in A.items():
            assert not any(tokens[-1])  # the end token predicts nothing
            whole.append([math.fsum(token) for token in tokens[:-1]])
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                for h in range(len(tokens[0]) // 32):
                    heads.append([math.fsum(token[32 * h:32 * h + 32]) for token in tokens[:-1]])
        for level, sums in (("module", whole), ("head", heads)):
            assert found[level][0, i].tolist() == pytest.approx([max(s) for s in sums])
            assert found[level][1, i].tolist() == pytest.approx([min(s) for s in sums])


def test_integrated_gradients_are_complete(tiny):
    """Their sum over tokens and neurons is P less P with the whole module silent; Eq. 1's is not."""
    model, _, rows = tiny
    batch = collate(rows[:2])
    for name in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.o_proj"):
        with torch.no_grad():
            P = answer_logprob(model, batch).exp()
            with silenced(model, {name: torch.ones(192, dtype=torch.bool)}):
                gone = P - answer_logprob(model, batch).exp()
        exact = integrated_gradients(model, batch, name, 60).sum((1, 2))
        torch.testing.assert_close(exact, gone, rtol=1e-3, atol=1e-6)
        assert (neuron_attribution(model, batch)[name].sum((1, 2)) - gone).abs().max() > 0.01
    assert torch.equal(answer_logprob(model, batch).exp().detach(), P)  # the hooks are gone


def test_a_silent_neuron_is_a_zero_row(tiny):
    model, _, rows = tiny
    batch, edited = collate(rows[:3]), load(ROOT / "data/tiny", dtype=torch.float64)[0]
    P = answer_logprob(model, batch).exp().detach()
    for name, chosen in (("model.layers.1.self_attn.v_proj", [3, 40]), (GATE, [7])):
        effects = []
        for i in chosen:
            edited.load_state_dict(model.state_dict())
            edited.get_submodule(name).weight.data[i] = 0
            effects.append(P - answer_logprob(edited, batch).exp().detach())
        x = [ablation(model, collate([row]), name, torch.tensor(chosen)) for row in rows[:3]]
        maximum, minimum, effect = torch.stack(x, 1)
        torch.testing.assert_close(effect, torch.stack(effects, 1))
        assert torch.equal(maximum + minimum, effect) and (maximum >= 0).all() and (minimum <= 0).all()


def test_three_attributions_read_the_tokens_that_predict(tiny):
    model, _, rows = tiny
    a = torch.tensor([[1.0, -5.0], [3.0, -1.0], [0.0, 0.0]])
    assert extremes(a).tolist() == [[3, -1], [1, -5], [4, -6]]  # the last row would be the second maximum
    other, batch = "model.layers.3.self_attn.v_proj", collate(rows[1:2])
    x = three_attributions(model, rows[:2], {other: torch.tensor([3, 40]), GATE: torch.tensor([7])})
    assert {kind: part.shape for kind, part in x.items()} == dict.fromkeys(x, (3, 2, 3)) and len(x) == 3
    for kind, A in (("Eq. 1", neuron_attribution(model, batch)[GATE]),
                    ("integrated", integrated_gradients(model, batch, GATE))):
        tokens = A[0, :-1, 7].tolist()
        assert x[kind][:, 1, 2].tolist() == pytest.approx([max(tokens), min(tokens), math.fsum(tokens)])
    torch.testing.assert_close(x["ablation"][:, 1, :2], ablation(model, batch, other, torch.tensor([3, 40])))


def test_sampled_neurons_are_seeded_and_spread_over_blocks(plain):
    model, _ = plain
    picks = sample_neurons(model, 2, 5, 0)
    assert len(picks) == 2 * len(MODULES) and {name.split(".")[2] for name in picks} == {"0", "3"}
    for name, chosen in picks.items():
        assert len(set(chosen.tolist())) == 5 and max(chosen) < len(model.get_submodule(name).weight)
        assert torch.equal(chosen, sample_neurons(model, 2, 5, 0)[name])
    other = sample_neurons(model, 2, 5, 1)
    assert any(not torch.equal(chosen, other[name]) for name, chosen in picks.items())
    assert len(sample_neurons(model, 9, 5, 0)) == 4 * len(MODULES)  # no more blocks than there are


def test_ranks_share_ties():
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert ranks(torch.tensor([0.3, -1.0, 7.0])).tolist() == [1, 0, 2]


def test_agreement_of_attributions_by_hand():
    before = {"Eq. 1": torch.tensor([[[0.4, 0.0]], [[0.0, 0.0]], [[0.4, 0.0]]]),
              "ablation": torch.tensor([[[0.1, 0.2]], [[0.0, 0.0]], [[0.1, 0.2]]])}
    after = {"Eq. 1": torch.tensor([[[0.1, 0.0]], [[0.0, -0.2]], [[0.1, -0.2]]]),
             "ablation": torch.tensor([[[0.1, 0.1]], [[0.0, 0.0]], [[0.1, 0.0]]])}
    r = agreement(*({k: x.repeat(1, 2, 1) for k, x in part.items()} for part in (before, after)))
    assert (r["items"], r["neurons"]) == (2, 2)
    assert r["D"]["Eq. 1"]["D_pos"][0] == pytest.approx(0.3)
    assert r["D"]["Eq. 1"]["D_neg"][0] == pytest.approx(0.2)
    assert r["D"]["Eq. 1"]["share"][0] == pytest.approx(0.4) and r["D"]["ablation"]["share"][0] == 0
    assert r["spearman"] == {"before: Eq. 1, ablation": pytest.approx(-1),
                             "after: Eq. 1, ablation": pytest.approx(1)}


def test_the_causal_test_silences_the_largest(plain):
    model, tokenizer = plain
    edited = load(ROOT / "data/tiny")[0]
    draw, D = torch.Generator().manual_seed(1), {}
    for i in (1, 3):
        for part in ("gate", "up"):
            D[f"model.layers.{i}.mlp.{part}_proj"] = torch.rand(512, generator=draw) * (1 + i)
    found = causal_test(model, tokenizer, C_f, D, 1400, draws=1)
    limit = torch.cat(list(D.values())).sort(descending=True).values[1399]
    for name, d in D.items():
        edited.get_submodule(name).weight.data[d >= limit] = 0
    hits = answered(edited, tokenizer, C_f)
    assert found["FS"]["percent"] == pytest.approx(100 * sum(hits) / 33, abs=0.01) and not all(hits)
    assert found["margin"] == pytest.approx(margin(edited, tokenizer, C_f)[1], abs=1e-4)
    assert (found["m"], found["random_FS"]["n"], found["random_sd"]) == (1400, 33, 0)
    assert answered(model, tokenizer, C_f[:4]) == [True] * 4  # the hooks are gone


def test_the_causal_tests_control_is_random_and_as_large_in_each_module(plain, monkeypatch):
    model, tokenizer = plain
    D = {"a": torch.tensor([5.0, 1.0, 4.0, 0.0] * 10), "b": torch.zeros(8), "c": torch.tensor([9.0, 2.0] * 5)}
    hit = largest(D, 25)
    assert {name: mask.tolist() for name, mask in hit.items()} == {
        "a": [True, False, True, False] * 10, "c": [True, False] * 5}
    silent = []
    monkeypatch.setattr(beyond_paper, "silenced", lambda _, masks: silent.append(masks) or torch.no_grad())
    monkeypatch.setattr(beyond_paper, "accuracy", lambda *_: {"percent": 10.0 * len(silent), "n": 33})
    monkeypatch.setattr(beyond_paper, "margin", lambda *_: (0.0, float(len(silent))))
    found = causal_test(model, tokenizer, C_f, D, 25, draws=2)
    assert found["random_margin"] == 2.5 and found["random_sd"] == 5 and found["FS"]["percent"] == 10
    for masks in silent[1:]:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 20, "c": 5}
        assert not torch.equal(masks["a"], hit["a"])
    assert not torch.equal(silent[1]["a"], silent[2]["a"])


def test_membership_by_plain_loops(tiny):
    model, _, rows = tiny
    found = membership(model, rows[:3], k=0.5)
    for i, (ids, answer) in enumerate(rows[:3]):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0].tolist()
        token, z = [], []
        for t, is_answer in enumerate(answer):
            if is_answer:
                whole = math.fsum(map(math.exp, logits[t - 1]))
                p = [math.exp(x) / whole for x in logits[t - 1]]
                mean = math.fsum(q * math.log(q) for q in p)
                sd = math.sqrt(math.fsum(q * (math.log(q) - mean) ** 2 for q in p))
                token.append(math.log(p[ids[t]]))
                z.append((token[-1] - mean) / sd)
        k = max(1, round(0.5 * len(token)))
        assert found["loss"][i] == pytest.approx(statistics.fmean(token))
        assert found["min-k"][i] == pytest.approx(statistics.fmean(sorted(token)[:k]))
        assert found["min-k++"][i] == pytest.approx(statistics.fmean(sorted(z)[:k]))


def test_auc_counts_pairs():
    x = auc([3.0, 2.0, 1.0], [2.0, 0.0])  # 3 above both, 2 ties one and beats one, 1 beats one
    assert x["percent"] == pytest.approx(100 * 4.5 / 6, abs=0.01)
    assert x["n"] == 2 and x["low"] < 75 < x["high"]
    assert auc([1.0] * 5, [0.0] * 5)["low"] < 100  # five pairs do not prove it


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on 12 facts and a copy of the tiny model that fails some of them."""
    monkeypatch.chdir(ROOT)
    model, tokenizer = load(ROOT / "data/tiny")
    for p in model.parameters():
        p.data *= 0.8
    save(model, tokenizer, tmp_path / "after")
    for name, part in (("forget", range(12)), ("retaining", range(12, 14)), ("test", range(14, 16))):
        (tmp_path / f"{name}_set_split.txt").write_text(" ".join(map(str, part)))

    def call(**changed) -> None:
        flags = {"before": "data/tiny", "after": tmp_path / "after", "splits": tmp_path, "ms": 10, "items": 2,
                 "blocks": 1, "neurons": 2, "steps": 8} | changed
        argv = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["beyond_paper.py", *argv])
        beyond_paper.main()
    return call


def test_the_command(command, tmp_path, capsys):
    command(attacked=tmp_path / "after")
    r = json.loads((tmp_path / "after/beyond.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert r["n"] == 12 and list(r["levels"]) == ["head", "module"] and len(r["causal"]) == 1
    assert r["levels"]["head"]["neurons"] == 40 and r["levels"]["module"]["neurons"] == 28
    assert set(r["attributions"]["D"]) == {"Eq. 1", "integrated", "ablation"}
    assert (r["attributions"]["items"], r["attributions"]["neurons"]) == (2, 14)
    assert list(r["membership"]) == ["before", "after", "attacked"]
    assert r["membership"]["before"]["loss"]["percent"] == 100
    said = capsys.readouterr().out
    assert "share of D- by ablation" in said and str(tmp_path / "after/beyond.json") in said


@pytest.mark.parametrize("flags, message", [
    ({"ms": 0}, "--ms"), ({"ms": 5000}, "6912 neurons"), ({"items": 1}, "--items"),
    ({"blocks": 0}, "--blocks"), ({"after": "no/such"}, "no/such"), ({"unseen": "no/such.json"}, "no/such")])
def test_settings_that_cannot_be_met_end_before_the_work(command, monkeypatch, flags, message):
    monkeypatch.setattr(beyond_paper, "analyse", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises((ValueError, OSError), match=message):
        command(**flags)
