"""Scores against counts by hand, numpy-free formulas and one-at-a-time runs."""
import dataclasses
import json
import math
import random
from pathlib import Path
from unittest import mock

import pytest
import torch

import attack
import evaluate
import ssiuu
from data import Example, load_faithun, mcqa_prompt, split
from evaluate import accuracy, answered, is_correct, margin, other_questions, score, wilson
from model import generate, load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load(ROOT / "data/tiny")
    return model, tokenizer, split(load_faithun(ROOT / "data/faithun.json"), ROOT / "data/faithun_splits")


def test_wilson_solves_its_own_quadratic():
    """The bounds are the p for which |observed - p| is 1.96 standard errors at p."""
    for k, n in ((0, 14), (3, 19), (10, 33), (33, 33)):
        for p in (wilson(100 * k / n, n)[bound] / 100 for bound in ("low", "high")):
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=2e-3)


def test_score_counts():
    assert score([True, False, False, False]) == {"percent": 25.0, "n": 4, "low": 4.56, "high": 69.94}
    assert score([0.5, 0.25, 0.25, 0]) == score([True, False, False, False])
    assert score([1.0] * 9)["low"] < 71 and score([0.5])["n"] == 1  # equal values are no certainty


@pytest.mark.parametrize("shares", [(0.5, 0, 0.5), (0.2, 0.6, 0.2), (0.1, 0.3, 0.6)])
def test_the_interval_holds_the_true_mean_in_95_of_100_outcomes(shares):
    """All outcomes of 40 items that score 0, 1/2 or 1 with these shares. A tenth narrower, it holds 92 % of
    the first."""
    mean, held = 100 * (shares[1] / 2 + shares[2]), 0.0
    for zeros in range(41):
        for halves in range(41 - zeros):
            ones = 40 - zeros - halves
            out = score([0.0] * zeros + [0.5] * halves + [1.0] * ones)
            ways = math.comb(40, zeros) * math.comb(40 - zeros, halves)
            chance = ways * shares[0] ** zeros * shares[1] ** halves * shares[2] ** ones
            held += chance * (out["low"] <= mean <= out["high"])
    assert held >= 0.95 and (held < 0.97 or shares[1])


@pytest.mark.parametrize("text, right", [
    ("France", True), (" france.\n", True), ("**France**", True), ("France\nSpain", True),
    ("\u201cFrance\u201d", True), ("France, of course", False), ("It is France", False),
    ("", False), ("...", False), ("Spain", False)])
def test_the_matching_rule(text, right):
    assert is_correct(text, Example("Where?", ["France"], ["Spain", "Italy"])) is right


def test_options_that_differ_in_signs_stay_apart():
    e = Example("Which language?", ["C"], ["C++", "C#"])
    assert is_correct("C", e) and is_correct("c.", e) and not is_correct("C++", e) and not is_correct("C#", e)
    assert is_correct("C++", Example("Which?", ["C++"], ["C", "D"]))
    assert not is_correct("C", Example("?", ["C++"], ["C", "D"]))
    assert is_correct("Zu\u0308rich", Example("?", ["Z\u00fcrich"], ["Bern", "Basel"]))  # NFD and NFC
    assert is_correct("\u5229\u9a6c\u3002", Example("?", ["\u5229\u9a6c"], ["a", "b"]))


@pytest.mark.parametrize("said, answer", [
    ("O\u2019Neil", "O'Neil"), ("New\u00a0York", "New York"), ("New  York", "New York"),
    ("A\u2013B", "A-B"), ("C\u00f4te d\u2018Ivoire", "C\u00f4te d'Ivoire"), ("Lon\u00addon", "London")])
def test_how_an_answer_is_typeset_does_not_count(said, answer):
    assert is_correct(said, Example("?", [answer], ["x", "y"]))
    assert not is_correct("AB", Example("?", ["AB-"], ["x", "y"]))  # a blood type


def test_a_batch_scores_what_one_at_a_time_scores(tiny):
    model, tokenizer, (C_f, _, _) = tiny
    wrong = [Example(e.question, [e.false_options[0]], [e.answers[0], e.false_options[1]]) for e in C_f[:4]]
    hits = answered(model, tokenizer, C_f[:8] + wrong)
    assert hits == [answered(model, tokenizer, [e])[0] for e in C_f[:8] + wrong] == [True] * 8 + [False] * 4
    for e in C_f[:3]:
        prompt = tokenizer.prompt(mcqa_prompt(e, random.Random(f"0 {e.question}")))
        assert tokenizer.decode(generate(model, [prompt], 20, tokenizer.stop_ids)[0]) == e.answers[0]


def test_the_tiny_model_knows_the_facts(tiny):
    model, tokenizer, (C_f, C_r, _) = tiny
    assert all(accuracy(model, tokenizer, C)["percent"] >= 97 for C in (C_f, C_r))


def test_margin_by_plain_loops(tiny):
    model, tokenizer, (C_f, _, _) = tiny
    truth = lead = 0.0
    for e in C_f[:3]:
        values = []
        for option in (e.answers[0], *e.false_options):
            x, y = tokenizer.prompt(e.question), tokenizer.answer(option)
            logp = model(torch.tensor([x + y]))[0].detach().log_softmax(-1)
            values.append(sum(logp[len(x) + i - 1, t].item() for i, t in enumerate(y)) / len(y))
        truth, lead = truth + values[0] / 3, lead + (values[0] - max(values[1:])) / 3
    assert margin(model, tokenizer, C_f[:3]) == pytest.approx((truth, lead), rel=1e-4)


def test_flags_take_the_models_own_values_unless_given(tmp_path, capsys):
    (tmp_path / "unlearn.json").write_text('{"ssiuu.py": {"lr": 0.5}, "attack.py": {"attack_lrs": [0.25]}}')
    s = evaluate.read_flags(ssiuu.Settings, "doc", ["--model", str(tmp_path)])
    assert s.lr == 0.5 and s.lam is None and "unlearn.json sets lr 0.5" in capsys.readouterr().err
    assert evaluate.read_flags(ssiuu.Settings, "doc", ["--model", str(tmp_path), "--lr", "0.2"]).lr == 0.2
    assert evaluate.read_flags(attack.Settings, "doc", ["--model", str(tmp_path)]).attack_lrs == (0.25,)


@pytest.mark.parametrize("kind, flag", [(attack.Settings, "--model"), (evaluate.Settings, "--model"),
                                        (evaluate.Settings, "--after")])
def test_a_runs_model_is_looked_into_on_the_facts_that_it_forgot(tmp_path, monkeypatch, capsys, kind, flag):
    made = {"settings": {"forget": "mine.json", "retain": None, "splits": "few", "fold": 3, "lr": 0.5}}
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/x/settings.json").write_text(json.dumps(made))
    monkeypatch.chdir(tmp_path)
    s = evaluate.read_flags(kind, "doc", [flag, "runs/x"])
    assert (s.forget, s.retain, s.splits, s.fold) == ("mine.json", None, "few", 3)
    assert "settings.json sets forget mine.json, splits few, fold 3" in capsys.readouterr().err
    assert evaluate.read_flags(kind, "doc", [flag, "runs/x", "--fold", "1"]).fold == 1
    s = evaluate.read_flags(kind, "doc", [flag, "runs/x", "--forget", "other.json"])
    assert (s.forget, s.splits, s.fold) == ("other.json", None, 0)
    s = evaluate.read_flags(ssiuu.Settings, "doc", ["--model", "runs/x"])
    assert s.fold == 0 and s.splits is None
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate.read_flags(kind, "doc", [flag, "../runs/x"]).forget == "../mine.json"
    (tmp_path / "runs/x/settings.json").write_text('{"settings": {"fold": "x"}}')
    with pytest.raises(ValueError, match="settings.json: fold is 'x'"):
        evaluate.read_flags(kind, "doc", [flag, "../runs/x"])


def test_a_flag_is_text_where_its_type_takes_text(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--control", "5", "a", "--p", "0.5", "1", "--attack-draws", "2"]
    s = evaluate.read_flags(attack.Settings, "doc", flags)
    assert s.control == ("5", "a") and s.p == (0.5, 1.0) and s.attack_draws == 2 and s.save is None
    for flags, words in ((["--p", "0.1", "x"], "--p: found 'x', expected a number above 0, at most 1"),
                         (["--benign-rows", "0"], "--benign-rows: found 0, expected a whole number from 1"),
                         (["--attack-draws", "1.5"], "--attack-draws: found 1.5, expected a whole number"),
                         (["--seed", "1e400"], "--seed: found inf"),
                         (["--p"], "--p: expected at least one")):
        with pytest.raises(ValueError, match=f"^{words}"):
            evaluate.read_flags(attack.Settings, "doc", flags)


def test_help_shows_defaults_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        evaluate.read_flags(attack.Settings, "doc", ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(6.2.2, D.2) (1e-05 5e-06 1e-06)" in out and "retrain on (6.2.2) (0.1 0.3)" in out
    assert "((" not in out


def test_at_most_36_flags_each_declared_once():
    for kind in (evaluate.Settings, attack.Settings, ssiuu.Settings):
        assert len(dataclasses.fields(kind)) <= 36
    kinds = (evaluate.Data, evaluate.Scored, evaluate.Settings, attack.Settings, ssiuu.Settings)
    own = [set(kind.__annotations__) for kind in kinds]
    assert sum(map(len, own)) == len(set.union(*own))


def test_other_questions_of_the_forget_set(tiny):
    _, _, (C_f, _, C_t) = tiny
    found = other_questions(str(ROOT / "data/faithun.json"), C_f, C_f)
    assert len(found["paraphrased"]) == 2 * 33 and len(found["multi_hop"]) > 33
    asked = {e.question for e in C_f}
    assert not asked & {e.question for part in found.values() for e in part}
    answers = {a for e in C_f for a in e.answers}
    assert all(set(e.answers) & answers for e in found["same_answer"] + found["paraphrased"])


def test_a_fact_is_not_forgotten_and_kept(tmp_path):
    row = lambda i, more="": {"question": f"What is {i}?{more}", "answers": [f"A{i}"],
                              "false_answer_options": ["B", "C"]}
    for name, part in (("forget", "0 3"), ("retaining", "1"), ("test", "2")):
        (tmp_path / f"{name}_set_split.txt").write_text(part)
    answers = ["Yes", "Yes", "Yes", "No"]
    open_end = [row(0) | {"question": f"Finish:\n{i}", "answers": [x]} for i, x in enumerate(answers)]
    (tmp_path / "f.json").write_text(json.dumps({"one": {"hop1_unlearn": open_end}}))
    assert evaluate.splits_of(evaluate.Data(forget=str(tmp_path / "f.json"), splits=str(tmp_path)))
    for rows, words in (([row(0), row(1), row(0, " "), row(3)], "hop1_unlearn.2."),
                        ([row(0), row(0), row(2), row(3)], ".1.")):
        (tmp_path / "f.json").write_text(json.dumps({"one": {"hop1_unlearn": rows}}))
        with pytest.raises(ValueError, match=f"{words}.*to be forgotten too"):
            evaluate.splits_of(evaluate.Data(forget=str(tmp_path / "f.json"), splits=str(tmp_path)))
    rows = [row(0) | {"question": str(i)} for i in range(4)]
    (tmp_path / "f.json").write_text(json.dumps({"one": {"hop1_unlearn": rows}}))
    with pytest.raises(ValueError, match="at least two different answers"):
        evaluate.splits_of(evaluate.Data(forget=str(tmp_path / "f.json"), splits=str(tmp_path)))


def test_a_margin_that_is_no_number_is_no_result(tiny):
    model, tokenizer, (C_f, _, _) = tiny
    with mock.patch.object(evaluate, "option_scores", lambda *args: [[math.nan, -1.0, -1.0]]):
        with pytest.raises(FloatingPointError, match="overflow"):
            margin(model, tokenizer, C_f[:1])
