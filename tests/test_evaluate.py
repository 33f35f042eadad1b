"""Scores against counts by hand, numpy-free formulas and one-at-a-time runs."""
import math
import random
from pathlib import Path

import pytest
import torch

import evaluate
from data import Example, load_faithun, mcqa_prompt, split
from evaluate import accuracy, answered, margin, normalise, score, wilson
from model import generate, load
from ssiuu import Settings

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


@pytest.mark.parametrize("text, ok", [("France", True), (" france.\n", True), ("**France**", True), ("France\nSpain", True),
                                      ("France, of course", False), ("It is France", False), ("", False)])
def test_the_matching_rule(text, ok):
    assert (normalise(text) == normalise("France")) is ok


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


def test_flags_take_the_models_own_values_unless_given(tmp_path):
    (tmp_path / "unlearn.json").write_text('{"lr": 0.5, "attack_lrs": [0.25], "made": "ignored"}')
    s = evaluate.read_flags(Settings, "doc", ["--model", str(tmp_path)])
    assert s.lr == 0.5 and s.attack_lrs == (0.25,) and s.lam == 1e-3
    assert evaluate.read_flags(Settings, "doc", ["--model", str(tmp_path), "--lr", "2"]).lr == 2
