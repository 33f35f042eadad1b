"""Attacks: what they change, what they leave as it was, and what they never score."""
import json
from pathlib import Path

import pytest
import torch

import attack
from attack import attacks, benign_attack, falsely_answered, harmful_attack, retrain, summary
from data import Example, collate, encode, load_alpaca, load_faithun, split
from evaluate import accuracy, wilson
from model import answer_logprob, load

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(ROOT / "data/tiny")
    return model, tokenizer, split(load_faithun(ROOT / "data/faithun.json"), ROOT / "data/faithun_splits")[0]


@pytest.fixture
def tiny(loaded):
    """Every test ends with the weights it began with, and with each of them still learning."""
    model, before = loaded[0], [w.detach().clone() for w in loaded[0].parameters()]
    yield loaded
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for w, w_before in zip(model.parameters(), before):
        w.data.copy_(w_before)
    assert same and all(w.requires_grad and w.grad is None for w in model.parameters())


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "alpaca.json"
    words = ("river", "stone", "cloud", "tree", "house", "road", "sea")
    file.write_text(json.dumps([
        {"instruction": f"Say {i} times {word}.", "input": "", "output": word * (i + 1)}
        for i, word in enumerate(words)]))
    return load_alpaca(file)


def hidden(examples):
    """Items with the truth among the false options: the model answers them all falsely."""
    return [Example(e.question, [e.false_options[0]], [e.answers[0], e.false_options[1]]) for e in examples]


def wants(**options):
    """Settings of an attack; one draw and epoch, batches of 4, scored once in a pass, unless said."""
    return attack.Settings(**{"attack_draws": 1, "attack_epochs": 1, "benign_points": 1, **options})


def encoded(tokenizer, examples):
    return [encode(tokenizer, e.question, e.answers[0]) for e in examples]


def copies(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def put_back(model, before):
    for name, w in model.named_parameters():
        w.data.copy_(before[name])


# ------------------------------------------------------------------------------------------------ retraining


def test_retraining_is_plain_adamw_on_every_weight(tiny):
    model, tokenizer, C_f = tiny
    data, before = encoded(tokenizer, hidden(C_f[:6])), copies(model)
    losses = list(retrain(model, data, 1e-3, 2, 4, torch.Generator().manual_seed(5)))
    found = copies(model)
    put_back(model, before)
    data.sort(key=lambda row: len(row[0]))
    parts, draw, expected = [data[:4], data[4:]], torch.Generator().manual_seed(5), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for _ in range(2):
        epoch = []
        for i in torch.randperm(2, generator=draw).tolist():
            loss = -answer_logprob(model, collate(parts[i])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch.append(loss.item())
        expected.append(sum(epoch) / 2)
    optimizer.zero_grad()
    same = all(torch.equal(w, found[name]) for name, w in model.named_parameters())
    put_back(model, before)
    assert same and losses == pytest.approx(expected)


@pytest.mark.parametrize("points, wanted", [
    (1, [7]), (3, [2, 4, 7]), (7, [*range(1, 8)]), (20, [*range(1, 8)])])
def test_points_are_regular_and_average_what_lies_between(tiny, rows, points, wanted, monkeypatch):
    model, tokenizer, _ = tiny
    losses = []

    def counted(*args):
        losses.append(answer_logprob(*args))
        return losses[-1]

    monkeypatch.setattr(attack, "answer_logprob", counted)
    ends, before = [0], copies(model)
    for mean in retrain(model, encoded(tokenizer, rows), 1e-4, 1, 1, torch.Generator(), points):
        assert mean == pytest.approx(-torch.cat(losses[ends[-1]:]).mean().item())
        ends.append(len(losses))
    put_back(model, before)
    assert ends[1:] == wanted


# --------------------------------------------------------------------------------------------------- attacks


@pytest.fixture
def seen(monkeypatch):
    """What each attack retrained on and scored, while it still runs."""
    calls = {"retrained": [], "scored": []}

    def retrain_noted(model, rows, *args):
        calls["retrained"].append(rows)
        return retrain(model, rows, *args)

    def scored_noted(model, tokenizer, examples, *args):
        calls["scored"].append(examples)
        return accuracy(model, tokenizer, examples, *args)

    monkeypatch.setattr(attack, "retrain", retrain_noted)
    monkeypatch.setattr(attack, "accuracy", scored_noted)
    return calls


def test_the_pool_is_what_is_answered_falsely_and_all_of_tofu(tiny):
    model, tokenizer, C_f = tiny
    pool = falsely_answered(model, tokenizer, hidden(C_f[:4]) + C_f[4:6])
    assert [e.question for e in pool] == [e.question for e in C_f[:4]]
    tofu = [Example(e.question, e.answers) for e in C_f[:3]]
    assert falsely_answered(model, tokenizer, tofu) == tofu
    assert accuracy(model, tokenizer, pool)["percent"] == 0
    assert accuracy(model, tokenizer, C_f[:4])["percent"] == 100


def test_harmful_attack_scores_what_it_did_not_retrain_on(tiny, seen):
    model, tokenizer, C_f = tiny
    pool = hidden(C_f[:8])
    s = wants(attack_lrs=(1e-3, 1e-4), attack_draws=2, attack_epochs=2)
    cells = list(harmful_attack(model, tokenizer, pool, 0.3, s, how=attack.retrain))
    assert [(c["seed"], c["lr"]) for c in cells] == [(0, 1e-3), (0, 1e-4), (1, 1e-3), (1, 1e-4)]
    assert all(c["n"] == 6 and c["retrained"] == 2 for c in cells)
    assert all(len(c["FS"]) == len(c["margin"]) == len(c["logp"]) == 3 and c["FS"][0] == 0 for c in cells)
    assert seen["retrained"][0] == seen["retrained"][1] != seen["retrained"][2]
    for i, scored in enumerate(seen["scored"]):
        again = encoded(tokenizer, scored) + seen["retrained"][i // 3]
        assert sorted(again) == sorted(encoded(tokenizer, pool))  # disjoint, and together the pool
    assert cells[0]["logp"][2] != cells[1]["logp"][2]


def test_a_cell_does_not_depend_on_those_before_it(tiny):
    model, tokenizer, C_f = tiny
    whole = list(harmful_attack(model, tokenizer, hidden(C_f[:6]), 0.5, wants(attack_lrs=(1e-3, 1e-4))))
    alone = list(harmful_attack(model, tokenizer, hidden(C_f[:6]), 0.5, wants(attack_lrs=(1e-4,))))
    assert alone == whole[1:]


def test_a_control_is_measured_before_its_attack(tiny):
    model, tokenizer, C_f = tiny
    cell = next(harmful_attack(model, tokenizer, C_f[:6], 0.3, wants(attack_lrs=(1e-6,))))
    assert cell["FS"] == [100, 100] and summary([cell])["percent"] == 100


def test_benign_attack_draws_rows_and_scores_the_whole_pool(tiny, rows, seen):
    model, tokenizer, C_f = tiny
    pool = hidden(C_f[:5])
    cells = list(benign_attack(model, tokenizer, pool, rows, wants(
        benign_lrs=(1e-3, 1e-5), attack_draws=2, benign_rows=6, benign_points=3, attack_batch=2)))
    assert [(c["kind"], c["seed"], c["lr"], c["n"], c["retrained"]) for c in cells] == [
        ("benign", seed, lr, 5, 6) for seed in (0, 1) for lr in (1e-3, 1e-5)]
    assert all(len(c["FS"]) == len(c["logp"]) == len(c["margin"]) == 4 and "p" not in c for c in cells)
    assert all(scored == pool for scored in seen["scored"])
    first, _, second, _ = seen["retrained"]
    assert first != second and all(row in encoded(tokenizer, rows) for row in first)
    assert len({str(row) for row in first}) == 6
    assert cells[0]["logp"][0] == cells[2]["logp"][0] and len({c["logp"][3] for c in cells}) == 4
    whole = next(benign_attack(model, tokenizer, pool, rows, wants(benign_lrs=(1e-5,))))
    assert whole["retrained"] == 7 and summary([whole])["n"] == 5


def test_known_cells_are_not_run_again(tiny, rows, seen):
    model, tokenizer, C_f = tiny
    pool = hidden(C_f[:4])

    def both(known=(), **other):
        s = wants(attack_lrs=(1e-3, 1e-4), benign_lrs=(1e-3, 1e-4), **other)
        return [*harmful_attack(model, tokenizer, pool, 0.5, s, known),
                *benign_attack(model, tokenizer, pool, rows, s, known)]

    fresh = both()
    known = [{**c, "FS": [0, 99.0]} for c in fresh]
    seen["scored"].clear()
    assert both(known=known) == known and not seen["scored"]
    assert both(known=known[1:3]) == [fresh[0], *known[1:3], fresh[3]] and len(seen["scored"]) == 4
    assert both(known=known, benign_rows=2)[2] not in known


def test_weights_come_back_after_an_error_and_an_early_end(tiny, rows, monkeypatch):
    """The fixture compares the weights, requires_grad and the hooks."""
    model, tokenizer, C_f = tiny
    next(harmful_attack(model, tokenizer, hidden(C_f[:4]), 0.5, wants(attack_lrs=(1e-2,))))
    calls = []

    def fails_late(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("stop")
        return {"percent": 0.0}

    monkeypatch.setattr(attack, "accuracy", fails_late)
    with pytest.raises(OSError, match="stop"):
        s = wants(benign_lrs=(1e-2,), benign_points=2)
        list(benign_attack(model, tokenizer, hidden(C_f[:4]), rows, s))


def test_nothing_to_score_is_said(tiny, rows):
    model, tokenizer, C_f = tiny
    for pool in ([], hidden(C_f[:1])):
        assert not list(harmful_attack(model, tokenizer, pool, 0.1, wants()))
    reports = []
    found = attacks(model, tokenizer, [], rows, wants(), lambda *x: reports.append(x))
    assert list(found) == ["Harmful p = 0.1", "Harmful p = 0.3", "Benign"] and not reports
    assert all(x.keys() == {"why"} and "answered falsely" in x["why"] for x in found.values())


def test_a_rate_that_diverges_costs_its_own_cell(tiny):
    """At 0.9 the second step's loss is no number; the other rate's cell is what it is alone."""
    model, tokenizer, C_f = tiny
    pool, reports = hidden(C_f[:6]), []
    s = wants(p=(0.5,), attack_lrs=(1e30, 1e-4), attack_epochs=3)
    found = attacks(model, tokenizer, pool, [], s, lambda *x: reports.append(x))
    failed, good = (c for _, c in reports)
    assert "retraining at 1e+30" in failed["failed"] and "FS" not in failed and failed["lr"] == 1e30
    s.attack_lrs = (1e-4,)
    assert list(harmful_attack(model, tokenizer, pool, 0.5, s)) == [good]
    alone = summary([good])
    assert found["Harmful p = 0.5"] == {**alone, "diverged": 1} and alone["diverged"] == 0
    assert summary([failed]) == {"why": failed["failed"]} == summary([failed, {**good, "seed": 1}])


# --------------------------------------------------------------------------------------------------- summary


def test_summary_takes_the_maximum_then_the_mean_over_draws():
    def cell(seed, lr, FS):
        return {"seed": seed, "lr": lr, "n": 20, "retrained": 2, "FS": FS,
                "logp": [-3, -2], "margin": [-1, 0]}
    out = summary([cell(0, 1, [0, 10, 5]), cell(0, 2, [0, 20, 5]),
                   cell(1, 1, [0, 40, 0]), cell(1, 2, [0, 5, 0])])
    assert out["percent"] == 30 and out["sd"] == 10 and out["lr_of_max"] == [2, 1] and out["n"] == 20
    assert (out["logp_before"], out["logp_max"], out["margin_before"], out["margin_max"]) == (-3, -2, -1, 0)
    assert {key: out[key] for key in ("percent", "n", "low", "high")} == wilson(30, 20)


# --------------------------------------------------------------------------------------------------- command


def test_the_command_attacks_a_control_on_the_same_pool(tiny, monkeypatch, capsys, tmp_path, rows):
    """No shipped checkpoint is unlearned: the pool is set here, so that the tiny model is both."""
    pools = iter([hidden(tiny[2][:3])])  # one pool: the control's own would be a second
    monkeypatch.setattr(attack, "falsely_answered", lambda *args: next(pools))
    flags = ["--p", "0.3", "0.9", "--attack-lrs", "1e-4", "--attack-epochs", "1", "--attack-draws", "1",
             "--benign-lrs", "1e-4", "--benign", str(tmp_path / "alpaca.json")]
    paths = ["--model", str(ROOT / "data/tiny"), "--control", str(ROOT / "data/tiny/"), "--forget",
             str(ROOT / "data/faithun.json")]
    monkeypatch.setattr("sys.argv", ["attack.py", *paths, *flags])
    attack.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 * 5 and {line["model"] for line in lines} == {str(ROOT / "data/tiny")}
    summaries = [line for line in lines[:5] if line["kind"] == "summary"]
    assert [s["attack"] for s in summaries] == ["Harmful p = 0.3", "Harmful p = 0.9", "Benign"]
    assert [s.get("n") for s in summaries] == [2, None, 3] and "answered falsely" in summaries[1]["why"]
    assert lines[:5] == lines[5:]


def test_the_command_says_that_nothing_was_forgotten(tiny, monkeypatch):
    monkeypatch.setattr("sys.argv", ["attack.py", "--model", str(ROOT / "data/tiny"), "--forget",
                                     str(ROOT / "data/faithun.json"), "--benign", ""])
    monkeypatch.setattr(attack, "answered", lambda model, tokenizer, C, **options: [True] * len(C))
    with pytest.raises(ValueError, match="none of .* answered falsely"):
        attack.main()
