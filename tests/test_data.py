"""data.py against strings written out by hand, hypothesis, and the upstream files where they are at hand."""
import json
import random
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from data import (Example, batches, belongs, check_fits, collate, encode, load_alpaca, load_faithun,
                  load_tofu, load_utility, mcqa_prompt, normalise, split, tofu_split)
from model import load

ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT.parent / "shared" / "data"
ROW = {"question": "Q?", "answers": ["a"], "false_answer_options": ["b", "c"]}


def test_the_shipped_facts():
    file = ROOT / "data/faithun.json"
    base, other = load_faithun(file), load_faithun(file, "hop1_test")
    assert len(base) == 664 and len(other) == 2 * 664 and len({e.question for e in base}) == 664
    assert all(len({o.casefold() for o in (e.answers[0], *e.false_options)}) == 3 for e in base)
    assert [len(part) for part in split(base, ROOT / "data/faithun_splits")] == [33, 66, 464]


def test_table_3_byte_for_byte():
    example = Example("Which country is Donald Trump from?", ["United States"], ["Canada", "Mexico"])
    text = mcqa_prompt(example, random.Random(1))
    head, options = text.split("Options: ")
    assert head == (
        "Answer the following question by simply selecting a proper answer among the given options. "
        "You must generate only the exact word without an explanation.\n"
        "Question: Which country is Donald Trump from?\n")
    assert options.endswith("\nYour Answer:")
    assert sorted(options.removesuffix("\nYour Answer:").split(", ")) == ["Canada", "Mexico", "United States"]
    assert len({mcqa_prompt(example, random.Random(i)) for i in range(50)}) == 6  # every order occurs


def test_faithun_as_lists_or_keyed_by_question(tmp_path):
    keyed = {"answers": "a", "false_answer_options": ["b", "c", "d"]}
    content = {"Q76": {"hop1_unlearn": [ROW]}, "Q1": {"hop1_unlearn": {"R?": keyed}}}
    (tmp_path / "f.json").write_text(json.dumps(content))
    assert load_faithun(tmp_path / "f.json") == [
        Example("Q?", ["a"], ["b", "c"]), Example("R?", ["a"], ["b", "c"])]


def faithun(file, **changes):
    file.write_text(json.dumps({"Q1": {"hop1_unlearn": [ROW, {**ROW, **changes}]}}))
    return file


def message(call, file):
    """The one line that refuses a file."""
    with pytest.raises(ValueError) as e:
        call(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("content, words", [
    ("{", "not JSON"), ("[]", "found [], expected an object, as in FaithUn's file"),
    ("{}", "found no questions"), ('{"Q1": {"hop1_unlearn": []}}', "found no questions"),
    (json.dumps({"Q1": {"hop1_unlearn": [ROW]}, "Q2": None}), "'Q2' is None, expected an object"),
    ('{"Q1": {"hop9": [], "same": []}}', "'Q1' has hop9, same, expected hop1_unlearn"),
    ('{"Q1": 3}', "'Q1' is 3, expected an object"), (json.dumps(ROW), "need --retain"),
    ('{"Q1": {"hop1_unlearn": ["text"]}}', "hop1_unlearn[0] of 'Q1'")])
def test_a_file_that_is_not_faithun_is_refused_in_one_line(tmp_path, content, words):
    (tmp_path / "f.json").write_text(content)
    assert words in message(load_faithun, tmp_path / "f.json")


TOFU = json.dumps({"question": "Q", "answer": "A"})


@pytest.mark.parametrize("content", [TOFU, f"{TOFU}\n{TOFU}\n", f"[{TOFU}]"])
def test_rows_where_faithuns_object_is_expected_and_the_other_way_round(tmp_path, content):
    (tmp_path / "f.json").write_text(content)
    assert load_tofu(tmp_path / "f.json")[0].answers == ["A"]
    assert "--retain" in (text := message(load_faithun, tmp_path / "f.json")) and "not JSON" not in text
    text = message(load_tofu, faithun(tmp_path / "f.json"))
    assert "found {'Q1'" in text and "--retain" in text and "not JSON" not in text


@pytest.mark.parametrize("loader, content, words", [
    (load_tofu, '{"question": "Q"}', "row 1: found answer None"), (load_tofu, "", "found [], expected"),
    (load_tofu, "{]", "not JSON"), (load_tofu, f"{TOFU}\n\n{{]", "row 2: not JSON"),
    (load_tofu, "3", "found 3, expected a list"), (load_tofu, "[]", "found [], expected a list"),
    (load_alpaca, '[{"instruction": "I"}]', "row 1: found output None"), (load_alpaca, "[3]", "row 1 is 3")])
def test_rows_without_their_keys_are_refused(tmp_path, loader, content, words):
    (tmp_path / "f.json").write_text(content)
    assert words in message(loader, tmp_path / "f.json")


def test_numbers_are_text_and_nothing_is_dropped(tmp_path):
    file = faithun(tmp_path / "f.json", question=17, answers=[1969, "four", 4.5],
                   false_answer_options=[0, -1, "x"])
    e = load_faithun(file)[1]
    assert (e.question, e.answers, e.false_options) == ("17", ["1969", "four", "4.5"], ["0", "-1"])
    assert e.where == f"{file}: hop1_unlearn[1] of 'Q1'"
    rows = [{"instruction": 1, "input": given, "output": 2} for given in (0, "", None, " ", "a", 17)] + [
        {"instruction": "i", "output": "o"}]
    file.write_text(json.dumps(rows))
    questions = [e.question for e in load_alpaca(file)]
    assert questions == ["1\n\n0", "1", "1", "1", "1\n\na", "1\n\n17", "i"]
    assert load_alpaca(file)[3].where == f"{file}: row 4"
    row = {"ctx": 1, "endings": [1, 2, "c", 4.5], "label": 2}
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(row))
    assert load_utility(tmp_path) == {"hellaswag": [Example("1", [" c"], [" 1", " 2", " 4.5"])]}


@pytest.mark.parametrize("key", ["question", "answers", "false_answer_options"])
@pytest.mark.parametrize("value", [
    None, True, {}, [], "", " ", [True, "x", "y"], ["x", None, "y"], [["x"], "y", "z"], ["x", "", "y"],
    "\ud800", ["x", "a\udfff", "y"]])
def test_what_is_no_text_is_refused_with_its_row(tmp_path, key, value):
    text = message(load_faithun, faithun(tmp_path / "f.json", **{key: value}))
    assert f"hop1_unlearn[1] of 'Q1': found {key} " in text
    if not isinstance(value, list):
        blank = value in ("", " ")  # such an output is left out
        for key in ("instruction", *["output"] * (not blank), *["input"] * (value is not None and not blank)):
            (tmp_path / "f.json").write_text(json.dumps([{"instruction": "i", "output": "o", key: value}]))
            assert f"row 1: found {key} " in message(load_alpaca, tmp_path / "f.json")


def test_alpacas_empty_outputs_are_left_out(tmp_path):
    rows = [{"instruction": "i", "output": output} for output in ("a", "", " ", "b")]
    (tmp_path / "f.json").write_text(json.dumps(rows))
    assert [e.answers for e in load_alpaca(tmp_path / "f.json")] == [["a"], ["b"]]
    (tmp_path / "f.json").write_text(json.dumps(rows[1:3]))
    assert "only empty outputs" in message(load_alpaca, tmp_path / "f.json")


@pytest.mark.parametrize("answers, options", [
    ("Lima", ["lima", "Quito"]), ("Lima", ["Quito", "Quito."]), (["Peru", "Lima"], ["“Lima”", "Quito"]),
    ("a", ["b"]), ("caf\u00e9", ["cafe\u0301", "bar"])])
def test_options_that_collide_are_refused_with_their_row(tmp_path, answers, options):
    text = message(load_faithun, faithun(tmp_path / "f.json", answers=answers, false_answer_options=options))
    assert "hop1_unlearn[1] of 'Q1'" in text and "two false ones" in text
    assert load_faithun(faithun(tmp_path / "f.json", answers="C", false_answer_options=["C++", "C#"]))


@pytest.mark.parametrize("same", [
    ["Lima", "lima.", " “Lima” ", "‘LIMA’!", "\n Lima\nand more", "«Lima»", "**Lima**",
     "`Lima`", "(Lima)", "Lima…", "\u200bLima"],
    ["利马", "利马。", "「利马」", "《利马》！"], ["café", "cafe\u0301", "CAFÉ؟"],
    ["दिल्ली", "दिल्ली।"], ["C++"], ["C#", "c#."], ["C", "c,"],
    ["50%"], ["50"], ["-5"], ["5"], ["$5"], ["R&B"], ["&"], ["?"], ["!"], ["«»"], [""],
    ["Straße", "STRASSE"], ["D.C.", "d.c"]])
def test_normalise_joins_spellings_and_parts_answers(same):
    assert len({normalise(text) for text in same}) == 1
    others = ("Lima Peru", "利", "caf", "दिल्", "C+", "C#/", "50‰", "--5", "£5", "B", "…", "(")
    assert normalise(same[0]) not in [normalise(text) for text in others]


@given(st.text(max_size=8))
def test_normalise_is_settled_and_composed(text):
    found = normalise(text)
    assert (found != "") == bool(text.strip()) and "\n" not in found
    assert unicodedata.is_normalized("NFC", found)


WORDS = st.sampled_from(["question", "answers", "stem", "choices", "text", "a"])
VALUE = st.recursive(st.sampled_from([None, True, 0, 1.5, "", "a", "b", "\ud800"]),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS, x), max_leaves=6)
KEYS = {"hellaswag_val.jsonl": ["ctx", "endings", "label"],
        "winogrande_dev.jsonl": ["sentence", "option1", "answer"],
        "ARC-Challenge-Test.jsonl": ["question", "answerKey"], "gsm8k_test.jsonl": ["question", "answer"],
        "f.json": ["question", "answer", "instruction", "output", "input", "Q1"]}


@given(st.sampled_from([(name, key) for name in KEYS for key in KEYS[name]]), VALUE, st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_gives_examples_or_one_line(tmp_path, place, value, whole):
    for path in tmp_path.iterdir():
        path.unlink()
    name, key = place
    row = {"question": "q", "answer": "#### 1", "ctx": "c", "sentence": "a _ b", "instruction": "i",
           "output": "o", key: value}
    (tmp_path / name).write_text(json.dumps(value if whole else row))
    faithun(tmp_path / "g.json", question=value, answers=value)
    for load_file, path in ((load_utility, tmp_path), (load_tofu, tmp_path / name),
                            (load_alpaca, tmp_path / name), (load_faithun, tmp_path / name),
                            (load_faithun, tmp_path / "g.json")):
        try:
            load_file(path)
        except ValueError as e:
            assert str(path) in str(e) and len(str(e).splitlines()) == 1


# ------------------------------------------------------------------------------------------------ splits

@pytest.mark.parametrize("forget, words", [
    ("0\n9", "found 9"), ("x", "found x"), ("", "no index"), ("1", "repeats"), ("0\n0", "repeats"),
    ("0 " + "9" * 9999, "found 999"), ("-1", "found -1")])
def test_an_impossible_split_is_refused(tmp_path, forget, words):
    for name, text in (("forget", forget), ("retaining", "1"), ("test", "2 3")):
        (tmp_path / f"{name}_set_split.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        split([Example("q", ["a"])] * 4, tmp_path)


def test_a_split_file_may_begin_with_a_byte_order_mark(tmp_path):
    for name, text in (("forget", "0"), ("retaining", "1"), ("test", "2, 3\r\n")):
        (tmp_path / f"{name}_set_split.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert split(["a", "b", "c", "d"], tmp_path) == (["a"], ["b"], ["c", "d"])


# Drawn once: another draw would be another experiment under the same name.
FIRST, PAIRS = [175, 202, 541, 7, 330], [3200, 2200, 80]


def test_folds_are_disjoint_and_repeat():
    facts, folder = list(range(664)), ROOT / "data/faithun_splits"
    folds = [split(facts, folder, k) for k in range(20)]
    assert [[len(part) for part in fold] for fold in folds] == [[33, 66, 464]] * 20
    assert all(len({*forget, *retain, *test}) == 563 for forget, retain, test in folds)
    assert len({i for forget, _, _ in folds for i in forget}) == 20 * 33
    assert folds[0] == split(facts, folder) and folds[1][0][:5] == split(facts, folder, 1)[0][:5] == FIRST
    assert len({tuple(retain) for _, retain, _ in folds}) == 20
    for k in (20, -1):
        with pytest.raises(ValueError, match=f"fold is {k}, expected 0 to 19"):
            split(facts, folder, k)


def test_tofus_folds_are_pairs_of_authors():
    C_f, C_r = list(range(3960, 4000)), list(range(3960))
    folds = [tofu_split(C_f, C_r, k) for k in range(100)]
    assert folds[0] == (C_f, C_r) and sorted(min(forget) for forget, _ in folds) == list(range(0, 4000, 40))
    assert all(forget == list(range(min(forget), min(forget) + 40)) for forget, _ in folds)
    assert all(retain == [i for i in range(4000) if i not in set(forget)] for forget, retain in folds)
    assert [forget[0] for forget, _ in folds[1:4]] == PAIRS
    with pytest.raises(ValueError, match="expected 0 to 99"):
        tofu_split(C_f, C_r, 100)


def related(facts, questions, part):
    return [[e for e in questions if belongs(e, part, fact)] for fact in facts]


def test_related_questions_of_the_shipped_facts():
    file = ROOT / "data/faithun.json"
    base, raw = load_faithun(file), json.loads(file.read_text())
    relations = [row["relation"] for entity in raw.values() for row in entity["hop1_unlearn"]]
    answers = {row["question"]: row["answers"] for e in raw.values() for part in e.values() for row in part}
    for part, n in (("hop1_test", 2), ("same_object", 0)):
        groups = related(base, load_faithun(file, part), part)
        assert len(groups) == 664 and all(len(group) >= n for group in groups)
        for fact, group in zip(base, groups):
            assert all(set(answers[e.question]) & set(fact.answers) for e in group)
    for relation, group in zip(relations, related(base, load_faithun(file, "hop2_test"), "hop2_test")):
        assert all(e.relation.split(" > ")[0] == relation for e in group)


def test_related_questions_without_relations_and_of_another_entity(tmp_path):
    ask = lambda q, a, **more: {"question": q, "answers": [a], "false_answer_options": ["x", "y"], **more}
    entity = {"hop1_unlearn": [ask("Q1", "A"), ask("Q2", "B")],
              "hop1_test": [ask("P2", "b."), ask("P1", "A")],
              "hop2_test": {"M": ask("", "Z", relation=3)}}
    (tmp_path / "f.json").write_text(json.dumps({"one": entity, "two": {**entity, "hop2_test": []}}))
    facts = load_faithun(tmp_path / "f.json")
    groups = lambda part: related(facts, load_faithun(tmp_path / "f.json", part), part)
    names = lambda part: [[e.question for e in group] for group in groups(part)]
    assert names("hop1_test") == [["P1"], ["P2"]] * 2 and names("hop2_test") == [["M"], ["M"], [], []]
    assert names("same_object") == [[], [], [], []]  # facts of one's own have no other questions


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words.map("a".__add__)), min_size=1, max_size=5))  # a: ROUGE-L needs a word
@settings(max_examples=50, deadline=None)
def test_tofu_and_alpaca_return_what_was_written(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("f")
    tofu = "\n".join(json.dumps({"question": q, "answer": a}) for q, a in pairs)
    alpaca = json.dumps([{"instruction": q, "input": "", "output": a} for q, a in pairs])
    (folder / "t.json").write_bytes(tofu.encode())
    (folder / "a.json").write_bytes(alpaca.encode())
    assert [(e.question, e.answers) for e in load_tofu(folder / "t.json")] == [(q, [a]) for q, a in pairs]
    found = [(e.question, e.answers) for e in load_alpaca(folder / "a.json")]
    assert found == [(q.strip(), [a]) for q, a in pairs]


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 6)),
                min_size=1, max_size=5))
def test_collate_keeps_every_row_and_pads_on_the_right(rows):
    rows = [(ids, [i >= len(ids) - n for i in range(len(ids))]) for ids, n in rows]
    batch = collate(rows)
    for (ids, mask), row, marks in zip(rows, batch.ids.tolist(), batch.answer.tolist()):
        assert row[:len(ids)] == ids and marks[:len(ids)] == mask and not any(marks[len(ids):])
    assert batch.ids.shape == (len(rows), max(len(ids) for ids, _ in rows))


@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 3))
def test_batches_visit_every_row_once_an_epoch_and_repeat_with_the_seed(n, size, seed):
    first, again = (batches(n, size, torch.Generator().manual_seed(seed)) for _ in range(2))
    for _ in range(3):
        epoch = []
        while len(epoch) < n:
            part = next(first)
            assert part == next(again) and 0 < len(part) <= size
            epoch += part
        assert sorted(epoch) == list(range(n))


def test_the_answer_mask_marks_the_answer_and_its_end():
    _, tokenizer = load(ROOT / "data/tiny")
    ids, mask = encode(tokenizer, "Which country is Isaac Newton from?", "England")
    marked = [i for i, m in zip(ids, mask) if m]
    assert marked[-1] == tokenizer.end_id and tokenizer.decode(marked[:-1]) == "England"
    assert ids[:len(ids) - len(marked)] == tokenizer.prompt("Which country is Isaac Newton from?")


def test_what_does_not_fit_the_model_is_refused_before_the_work():
    model, tokenizer = load(ROOT / "data/tiny")
    facts, begun = load_faithun(ROOT / "data/faithun.json"), time.perf_counter()
    check_fits(model, tokenizer, facts)
    assert time.perf_counter() - begun < 2  # 0.3 s on a free core
    check_fits(model, tokenizer, load_alpaca(ROOT / "data/instructions.json"))
    for example in (Example("long " * 300, ["a"], where="f: row 3"),
                    Example("Q", ["a", "long " * 300], where="f: row 3"),
                    Example("Q", ["a"], ["b", "long " * 160], where="f: row 3")):
        with pytest.raises(ValueError, match="f: row 3: found [0-9]+ tokens .* max_position_embeddings 512"):
            check_fits(model, tokenizer, [facts[0], example])
    with pytest.raises(ValueError, match="f: row 4: cannot be tokenised"):
        check_fits(model, tokenizer, [Example("\ud800", ["a"], where="f: row 4")])
    tokenizer.tokens.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="f: row 5: .* ids up to 1536, expected .* vocab_size 1536"):
        check_fits(model, tokenizer, [Example("Q", ["a <new>"], where="f: row 5")])
    raw = Example("long " * 160, ["a"], ["b", "c"], raw=True)  # fits as it is, not in Table 3
    check_fits(model, tokenizer, [raw])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        check_fits(model, tokenizer, [replace(raw, raw=False)])
    model.config.max_position_embeddings = None  # not every config.json has it
    check_fits(model, tokenizer, [Example("long " * 300, ["a"])])


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="upstream files are not at hand")
def test_upstream_files_load_unchanged():
    assert len(load_tofu(UPSTREAM / "tofu/full.json")) == 4000
    assert len(load_tofu(UPSTREAM / "tofu/forget01.json")) == 40
    assert len(load_alpaca(UPSTREAM / "alpaca/alpaca_2000.json")) == 2000


def test_the_first_two_unlike_false_options_count(tmp_path):
    row = {"question": "Who?", "answers": ["A"], "false_answer_options": ["B", "b.", "C", "D"]}
    (tmp_path / "f.json").write_text(json.dumps({"one": {"hop1_unlearn": [row]}}))
    assert load_faithun(tmp_path / "f.json")[0].false_options == ["B", "C"]
