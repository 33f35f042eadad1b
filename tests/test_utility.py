"""ROUGE-L against rouge_score's own numbers; utility files, option scores and US against plain loops."""
import importlib.util
import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import evaluate
import ssiuu
from data import Example, load_utility
from evaluate import (likeliest, mismatched_tau, option_scores, recalls, rouge_l_recall, score, solved,
                      utility, wilson)
from model import answer_logprob, generate, load

ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT.parent / "shared" / "data"
needs_rouge = pytest.mark.skipif(not importlib.util.find_spec("rouge_score"),
                                 reason="rouge_score is not installed")
needs_upstream = pytest.mark.skipif(not UPSTREAM.is_dir(), reason="upstream files are not at hand")


@pytest.fixture(scope="module")
def tiny():
    return load(ROOT / "data/tiny")


@needs_rouge
def test_recall_is_rouge_scores_with_stems():
    # the, sky; he, is, related between
    assert rouge_l_recall("he was relating the skies", "The sky is related") == 0.5
    assert rouge_l_recall("", "word") == rouge_l_recall("word", "") == 0


def test_without_rouge_score_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        rouge_l_recall("a", "a")


@needs_rouge
def test_recalls_in_batches_and_one_by_one(tiny):
    model, tokenizer = tiny
    examples = [Example("Which country is Isaac Newton from?", ["England"]),
                Example("Hi", ["No such words at all"]),
                Example("Which country is Isaac Newton really from, my friend?", ["He is from England"])]
    values = recalls(model, tokenizer, examples, size=2, max_new_tokens=5)
    for e, value in zip(examples, values):
        ids = generate(model, [tokenizer.prompt(e.question)], 5, tokenizer.stop_ids)[0]
        assert value == rouge_l_recall(tokenizer.decode(ids), e.answers[0])
    assert values[0] == 1 and values[1] == 0
    assert recalls(model, tokenizer, examples[:1], max_new_tokens=0) == [0]


@needs_rouge
def test_mismatched_tau_never_takes_the_own_answer():
    examples = [Example(str(i), [f"x{i} common"]) for i in range(6)]
    assert mismatched_tau(examples) == 0.5  # a single own answer would lift it
    three = [Example("a", ["one two"]), Example("b", ["one two"]), Example("c", ["two"])]
    assert {mismatched_tau(three, seed) for seed in range(9)} == {(0.5 + 0.5 + 1) / 3}  # not b's answer for a


def test_the_interval_of_us_is_wide_enough_where_samples_differ(monkeypatch):
    """Tasks at 50 %, of 8 and of 40 items: the 95 % interval holds 50 in at least 95 % of all outcomes."""
    tasks, held = {name: [Example("Q", ["a"], ["b"])] * n for name, n in (("arc", 8), ("mmlu", 40))}, 0.0
    for right in itertools.product(range(9), range(41)):
        hits = iter([[i < k for i in range(n)] for k, n in zip(right, (8, 40))])
        monkeypatch.setattr(evaluate, "likeliest", lambda *args: next(hits))
        out = utility(None, None, tasks)
        held += (out["low"] <= 50 <= out["high"]) * math.comb(8, right[0]) * math.comb(40, right[1]) / 2 ** 48
    assert 0.95 <= held < 0.999


# ------------------------------------------------------------------------------------------------ files

CSV = '"Which, of\nthese?",a,"b, c",d,e,C\nSecond?,1,2,3,4,A\n'
ROWS = {
    "gsm8k_test.jsonl": {"question": "How many?", "answer": "5*2=<<5*2=10>>10\n#### 1,210"},
    "hellaswag_val.jsonl": {"ctx": "A man", "endings": ["sits.", "flies.", "eats.", "sings."], "label": 2},
    "ARC-Challenge-Test.jsonl": {"question": {"stem": "Why?", "choices": [
        {"text": t, "label": label} for t, label in zip(("so", "no", "oh"), "123")]}, "answerKey": "2"},
    "winogrande_dev.jsonl": {"sentence": "Ann met Bo, so _ was glad.", "option1": "Ann", "option2": "Bo",
                             "answer": "2"},
    "real_authors.json": {"question": "Who?", "answer": "Me", "option1": "Me"},
    "world_facts.json": {"question": "Where?", "answer": "Here"},
}


def folder_of(path):
    (path / "mmlu").mkdir()
    (path / "mmlu/a_test.csv").write_text(CSV)
    for name, row in ROWS.items():
        (path / name).write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    return path


def test_utility_files_in_upstreams_formats(tmp_path):
    tasks = load_utility(folder_of(tmp_path))
    assert list(tasks) == ["mmlu", "gsm8k", "hellaswag", "arc", "winogrande", "real_authors", "world_facts"]
    assert all(len(examples) == 2 for examples in tasks.values())
    assert [tasks[name][0] for name in tasks] == [
        Example("Which, of\nthese?\nA. a\nB. b, c\nC. d\nD. e\nAnswer:", [" C"], [" A", " B", " D"]),
        Example("How many?", ["1210"], []),
        Example("A man", [" eats."], [" sits.", " flies.", " sings."]),
        Example("Question: Why?\nAnswer:", [" no"], [" so", " oh"]),
        Example("Ann met Bo, so", [" Bo was glad."], [" Ann was glad."]),
        Example("Who?", ["Me"], []), Example("Where?", ["Here"], [])]
    (tmp_path / "gsm8k_test.jsonl").unlink()
    assert "gsm8k" not in load_utility(tmp_path)
    (tmp_path / "gsm8k_test.jsonl").symlink_to("nowhere")  # there, but dead
    with pytest.raises(OSError, match="gsm8k_test.jsonl"):
        load_utility(tmp_path)


HELLA, ARC, WINO = (
    ROWS[f] for f in ("hellaswag_val.jsonl", "ARC-Challenge-Test.jsonl", "winogrande_dev.jsonl"))
BROKEN = [
    ("mmlu/a_test.csv", "Q,1,2,3,4\n", "row 1"),
    ("mmlu/a_test.csv", "Q,1,2,3,4,E\n", "'A' or 'B' or 'C' or 'D'"),
    ("mmlu/a_test.csv", "Q,1,A,B,C,D,A\n", "row 1"), ("mmlu/a_test.csv", 'Q,"1,2,3\n', "not CSV"),
    ("mmlu/a_test.csv", "", "found []"), ("mmlu/a_test.csv", b"\xff\xfe", "not UTF-8"),
    ("mmlu/a_test.csv", "Q,1,2,3,4,AB\n", "'AB'"), ("gsm8k_test.jsonl", "{", "not JSON"),
    ("gsm8k_test.jsonl", {"question": "Q", "answer": "ten"}, "#### number"),
    ("gsm8k_test.jsonl", {"question": "Q", "answer": "#### 1.2.3"}, "'#### 1.2.3'"),
    ("hellaswag_val.jsonl", {**HELLA, "label": 4}, "label '4'"),
    ("hellaswag_val.jsonl", {**HELLA, "label": -1}, "'-1'"),
    ("hellaswag_val.jsonl", {**HELLA, "label": ""}, "label '', expected '0' or '1' or '2' or '3'"),
    ("hellaswag_val.jsonl", {"ctx": "A"}, "endings"),
    ("hellaswag_val.jsonl", {**HELLA, "endings": "abcd"}, "endings"),
    ("hellaswag_val.jsonl", {"x": 1}, "endings"),
    ("hellaswag_val.jsonl", {**HELLA, "endings": ["a", "b", "c", " "]}, "endings"),
    ("hellaswag_val.jsonl", {**HELLA, "endings": ["a"], "label": 0}, "endings"),
    ("hellaswag_val.jsonl", {**HELLA, "endings": ["a", "b"], "label": 3}, "endings"),
    ("hellaswag_val.jsonl", {**HELLA, "endings": [["a"], "b", "c", "d"]}, "endings"),
    ("ARC-Challenge-Test.jsonl", {**ARC, "answerKey": "A"}, "answerKey 'A'"),
    ("ARC-Challenge-Test.jsonl", {**ARC, "question": "Why?"}, "question 'Why?', expected an object"),
    ("winogrande_dev.jsonl", {**WINO, "answer": ""}, "answer ''"),
    ("winogrande_dev.jsonl", {**WINO, "answer": "12"}, "12"),
    ("winogrande_dev.jsonl", {**WINO, "sentence": "no blank"}, "one _"),
    ("winogrande_dev.jsonl", {**WINO, "sentence": "_ or _"}, "one _"),
    ("winogrande_dev.jsonl", {**WINO, "option2": None}, "option2"),
    ("winogrande_dev.jsonl", {**WINO, "option2": "Cy"}, "option2 'Cy', expected words of the sentence"),
    ("world_facts.json", {"question": "Q"}, "answer"),
    ("real_authors.json", {"question": "Q", "answer": " "}, "answer ' '"),
]


@pytest.mark.parametrize("name, content, words", BROKEN)
def test_a_broken_utility_file_is_refused_in_one_line(tmp_path, name, content, words):
    content = json.dumps(content) if isinstance(content, dict) else content
    (folder_of(tmp_path) / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as e:
        load_utility(tmp_path)
    assert name in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_a_folder_without_a_task_says_what_it_wants(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="gsm8k_test.jsonl"):
            load_utility(folder)


@needs_upstream
def test_upstream_utility_files_load_unchanged():
    tasks = load_utility(UPSTREAM / "utility") | load_utility(UPSTREAM / "tofu")
    assert {name: len(examples) for name, examples in tasks.items()} == {
        "mmlu": 14042, "gsm8k": 1319, "hellaswag": 1000, "arc": 1150, "winogrande": 1267, "real_authors": 100,
        "world_facts": 117}
    assert {len(e.false_options) for e in tasks["arc"]} == {2, 3, 4}
    counts = [sum(e.answers[0] == f" {c}" for e in tasks["mmlu"]) for c in "ABCD"]
    assert counts == [3222, 3462, 3582, 3776]  # counted with another CSV reader
    assert tasks["winogrande"][0].answers == [" Maria always got the easier cases."]


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_option_scores_are_those_of_whole_sequences(dtype, tolerance):
    from data import collate
    model, _ = load(ROOT / "data/tiny", dtype=dtype)
    rng = random.Random(0)
    draw = lambda n: [rng.randrange(3, model.config.vocab_size) for _ in range(n)]
    for shape in ([(9, (1, 5, 3)), (1, (2, 2)), (4, (7, 1, 1, 6)), (30, (4,))],
                  [(5, (1, 1)), (2, (1, 1, 1))]):
        prompts, options = [draw(n) for n, _ in shape], [[draw(n) for n in lengths] for _, lengths in shape]
        found = option_scores(model, prompts, options)
        for prompt, part, scores in zip(prompts, options, found, strict=True):
            for option, value in zip(part, scores, strict=True):
                batch = collate([(prompt + option, [False] * len(prompt) + [True] * len(option))])
                assert value == pytest.approx(answer_logprob(model, batch).item(), abs=tolerance)


def plain_choice(model, tokenizer, e):
    """Log-probability per byte of the raw text, one sequence at a time, the whole (K, V) table."""
    values = []
    for option in (e.answers[0], *e.false_options):
        x, y = tokenizer.encode(e.question), tokenizer.encode(option)
        logp = model(torch.tensor([x + y]))[0].detach().log_softmax(-1)
        logps = [logp[len(x) + i - 1, t].item() for i, t in enumerate(y)]
        values.append(sum(logps) / len(option.strip().encode()))
    return values[0] > max(values[1:])


def test_the_choice_is_per_byte_and_a_tie_is_no_success(tiny):
    model, tokenizer = tiny
    rng = random.Random(0)
    names = "England France Italy Isaac the_long_one_of_these a Müller-Lüdenscheidt".split()
    examples = [Example(f"Question {rng.random()}", [f" {a}"], [f" {b}", f" {c}"])
                for a, b, c in (rng.sample(names, 3) for _ in range(40))]
    hits = likeliest(model, tokenizer, examples, 7)
    assert hits == [plain_choice(model, tokenizer, e) for e in examples] and 0 < sum(hits) < 40
    assert likeliest(model, tokenizer, [Example("Q", [" a"], [" a"])], 1) == [False]


def test_the_choice_reads_raw_text_after_the_start_token(monkeypatch):
    model, tokenizer = load(ROOT / "data/tiny")
    start = ("<|end|>", tokenizer.end_id)
    tokenizer.tokens.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[start])
    seen = []
    # Per byte the right one leads, -1 to -1.5; per character it would be behind, -2 to -1.5.
    monkeypatch.setattr(evaluate, "option_scores", lambda *args: (seen.append(args[1:3]), [[-4.0, -4.5]])[1])
    assert likeliest(model, tokenizer, [Example("A man", [" üü"], [" abc"])], 1) == [True]
    assert seen == [([[tokenizer.end_id, *tokenizer.encode("A man")]],
                     [[tokenizer.encode(" üü"), tokenizer.encode(" abc")]])]


@pytest.mark.parametrize("text, gold, right", [
    ("so it is 12.", "12", True), ("#### 1,210", "1210", True), ("12 apples, 13", "12", False),
    ("none", "0", False), ("18.00 dollars", "18", True), ("5-3", "3", True),
    ("it is -3", "-3", True), ("", "1", False)])
def test_the_last_number_counts(tiny, monkeypatch, text, gold, right):
    monkeypatch.setattr(evaluate, "greedy", lambda *args: [text])
    assert solved(*tiny, [Example("Q", [gold])], 1) == [right]


@needs_rouge
def test_utility_is_the_mean_of_its_tasks(tiny):
    model, tokenizer = tiny
    rng, numbers = random.Random(1), ("one", "two", "three", "four")
    tasks = {"arc": [Example(f"Q{i} {rng.random()}", [f" {a}"], [f" {b}"]) for i in range(30)
                     for a, b in [rng.sample(numbers, 2)]],
             "world_facts": [Example("Which country is Isaac Newton from?", ["England"]),
                             Example("Which country is Isaac Newton from?", ["Not England, no"])],
             "gsm8k": [Example("Which country is Isaac Newton from?", ["1"])]}
    out = utility(model, tokenizer, tasks, n=20, size=3)
    sample = random.Random("0 arc").sample(tasks["arc"], 20)
    assert out["tasks"]["arc"] == score([plain_choice(model, tokenizer, e) for e in sample])
    assert out["tasks"]["world_facts"] == score([1, 1 / 3]) and out["tasks"]["gsm8k"]["percent"] == 0
    assert list(out["tasks"]) == list(tasks) and [x["n"] for x in out["tasks"].values()] == [20, 2, 1]
    mean = (out["tasks"]["arc"]["percent"] + 66.67 + 0) / 3
    assert out == {**wilson(mean, 3), "tasks": out["tasks"]}  # of three tasks, the smallest sample is 1
    assert utility(model, tokenizer, tasks, n=20, size=16) == out
    assert utility(model, tokenizer, tasks, n=20, seed=1)["percent"] != out["percent"]


def test_utility_draws_each_tasks_sample_from_the_seed_and_its_name(tiny, monkeypatch):
    examples, seen = [Example(f"Q{i:02}", ["1"], ["2"]) for i in range(30)], []

    def noted(model, tokenizer, part, size):
        seen.append(part)
        return [True] * 9

    monkeypatch.setattr(evaluate, "likeliest", noted)
    monkeypatch.setattr(evaluate, "solved", lambda model, tokenizer, part, size: [True])
    out = utility(*tiny, {"arc": examples, "mmlu": examples, "gsm8k": [Example("Q", ["1"])]}, n=9, seed=5)
    key = lambda e: e.question
    expected = [random.Random(f"5 {name}").sample(examples, 9) for name in ("arc", "mmlu")]
    assert [sorted(part, key=key) for part in seen] == [sorted(part, key=key) for part in expected]
    assert out["percent"] == out["tasks"]["gsm8k"]["percent"] == 100


def test_the_command_line_reports_us(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")  # of the tasks on authors and the world
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(ROOT / "data/tiny"), "--forget",
                                     str(ROOT / "data/faithun.json"), "--test-limit", "1", "--utility",
                                     str(folder_of(tmp_path)), "--utility-n", "1"])
    monkeypatch.setattr(evaluate, "accuracy", lambda *args: {})
    evaluate.main()
    US = json.loads(capsys.readouterr().out)["US"]
    assert US["n"] == 7 and len(US["tasks"]) == 7
    path = tmp_path / "hellaswag_val.jsonl"
    assert all(e.raw == bool(e.false_options) for C in load_utility(tmp_path).values() for e in C)
    for module, script in ((evaluate, "evaluate.py"), (ssiuu, "ssiuu.py")):  # before the work
        path.write_text(json.dumps({**HELLA, "ctx": "long " * 600}))
        monkeypatch.setattr("sys.argv", [script, *evaluate.sys.argv[1:]])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="hellaswag_val.jsonl: row 1: found [0-9]+ tokens"):
            module.main()
    monkeypatch.setattr("sys.argv", ["evaluate.py", *evaluate.sys.argv[1:-1], "0"])
    with pytest.raises(ValueError, match="utility-n"):
        evaluate.main()
