"""data.py against strings written out by hand, hypothesis, and the upstream files where they are at hand."""
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from data import Example, batches, collate, encode, load_alpaca, load_faithun, load_tofu, mcqa_prompt, split

ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT.parent / "shared" / "data"
ROW = {"question": "Q?", "answers": ["a"], "false_answer_options": ["b", "c"]}


def test_the_shipped_facts():
    base, other = load_faithun(ROOT / "data/faithun.json"), load_faithun(ROOT / "data/faithun.json", "hop1_test")
    assert len(base) == 664 and len(other) == 2 * 664 and len({e.question for e in base}) == 664
    assert all(len({o.casefold() for o in (e.answers[0], *e.false_options)}) == 3 for e in base)
    assert [len(part) for part in split(base, ROOT / "data/faithun_splits")] == [33, 66, 464]


def test_table_3_byte_for_byte():
    example = Example("Which country is Donald Trump from?", ["United States"], ["Canada", "Mexico"])
    text = mcqa_prompt(example, random.Random(1))
    head, options = text.split("Options: ")
    assert head == ("Answer the following question by simply selecting a proper answer among the given options. You must "
                    "generate only the exact word without an explanation.\nQuestion: Which country is Donald Trump "
                    "from?\n")
    assert options.endswith("\nYour Answer:")
    assert sorted(options.removesuffix("\nYour Answer:").split(", ")) == ["Canada", "Mexico", "United States"]
    assert len({mcqa_prompt(example, random.Random(i)) for i in range(50)}) == 6  # every order occurs


def test_faithun_as_lists_or_keyed_by_question(tmp_path):
    keyed = {"answers": "a", "false_answer_options": ["b", "c", "d"]}
    (tmp_path / "f.json").write_text(json.dumps({"Q76": {"hop1_unlearn": [ROW]}, "Q1": {"hop1_unlearn": {"R?": keyed}}}))
    assert load_faithun(tmp_path / "f.json") == [Example("Q?", ["a"], ["b", "c"]), Example("R?", ["a"], ["b", "c"])]


@pytest.mark.parametrize("content, words", [
    ("{", "not JSON"), ("[]", "list"), ('{"Q1": {"hop9": []}}', "hop9"), ('{"Q1": 3}', "int"),
    (json.dumps({"Q1": {"hop1_unlearn": [{**ROW, "answers": []}]}}), "expected question"),
    (json.dumps({"Q1": {"hop1_unlearn": [{**ROW, "false_answer_options": ["b"]}]}}), "two false_answer_options"),
    (json.dumps({"Q1": {"hop1_unlearn": ["text"]}}), "nothing")])
def test_a_file_that_is_not_faithun_is_refused_in_one_line(tmp_path, content, words):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError) as e:
        load_faithun(tmp_path / "f.json")
    assert "f.json" in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("loader, content", [(load_tofu, '{"question": "Q"}'), (load_tofu, ""), (load_tofu, "{]"),
                                             (load_alpaca, '[{"instruction": "I"}]'), (load_alpaca, "[3]")])
def test_rows_without_their_keys_are_refused(tmp_path, loader, content):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match="f.json"):
        loader(tmp_path / "f.json")


@pytest.mark.parametrize("forget, words", [("0\n9", "found 9"), ("x", "found x"), ("", "no index"), ("1", "repeats"),
                                           ("0\n0", "repeats")])
def test_an_impossible_split_is_refused(tmp_path, forget, words):
    for name, text in (("forget", forget), ("retaining", "1"), ("test", "2 3")):
        (tmp_path / f"{name}_set_split.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        split([Example("q", ["a"])] * 4, tmp_path)


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_tofu_and_alpaca_return_what_was_written(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("f")
    (folder / "t.json").write_bytes("\n".join(json.dumps({"question": q, "answer": a}) for q, a in pairs).encode())
    (folder / "a.json").write_bytes(json.dumps([{"instruction": q, "input": "", "output": a} for q, a in pairs]).encode())
    assert [(e.question, e.answers) for e in load_tofu(folder / "t.json")] == [(q, [a]) for q, a in pairs]
    assert [(e.question, e.answers) for e in load_alpaca(folder / "a.json")] == [(q.strip(), [a]) for q, a in pairs]


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 6)), min_size=1, max_size=5))
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
    from model import load
    _, tokenizer = load(ROOT / "data/tiny")
    ids, mask = encode(tokenizer, "Which country is Isaac Newton from?", "England")
    marked = [i for i, m in zip(ids, mask) if m]
    assert marked[-1] == tokenizer.end_id and tokenizer.decode(marked[:-1]) == "England"
    assert ids[:len(ids) - len(marked)] == tokenizer.prompt("Which country is Isaac Newton from?")


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="upstream files are not at hand")
def test_upstream_files_load_unchanged():
    assert len(load_tofu(UPSTREAM / "tofu/full.json")) == 4000 and len(load_tofu(UPSTREAM / "tofu/forget01.json")) == 40
    assert len(load_alpaca(UPSTREAM / "alpaca/alpaca_2000.json")) == 2000
