"""Files to examples, examples to batches: FaithUn, TOFU, Alpaca and the utility tasks as upstream has them; Table 3.

Dimensions: B sequences, K tokens of the longest sequence in the batch.
"""
import csv
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Example:
    """One (x, y) of C, with FaithUn's false options where the file has them."""
    question: str
    answers: list[str]                                      # the first is y; each is accepted when scoring
    false_options: list[str] = field(default_factory=list)  # two in FaithUn, none in TOFU, Alpaca and GSM8K


@dataclass
class Batch:
    """Sequences padded on the right; `answer` marks the tokens of y, its end token included."""
    ids: Tensor     # (B, K) long
    answer: Tensor  # (B, K) bool

    def real(self) -> Tensor:
        """(B, K) bool: all but the padding, since every sequence ends in its answer."""
        return self.answer.flip(1).cumsum(1).flip(1) > 0


# ------------------------------------------------------------------------------------------------ files


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None


def parse(text: str, where: str | Path):
    try:
        return json.loads(text)
    except ValueError as e:
        raise ValueError(f"{where}: not JSON ({e})") from None


def strings(value) -> list[str]:
    """A string or a list of strings, as the list of its non-empty strings; anything else gives none."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [v.strip() for v in values if isinstance(v, str) and v.strip()]


def load_faithun(path: str | Path, part: str = "hop1_unlearn") -> list[Example]:
    """FaithUn's file: {Wikidata id: {part: questions}}, the entities' questions concatenated in file order.

    `part`: hop1_unlearn (the clusters that the split files number), hop1_test (paraphrased), hop2_test (multi-hop)
    or same_object (same answer). `questions` is a list of objects with a `question`, or an object keyed by the
    question; upstream does not document which. Each has `answers` and `false_answer_options`.
    """
    entities = parse(read(path), path)
    if not isinstance(entities, dict):
        raise ValueError(f"{path}: found a {type(entities).__name__}, expected an object keyed by entity (FaithUn)")
    examples = []
    for name, entity in entities.items():
        rows = entity.get(part) if isinstance(entity, dict) else None
        if isinstance(rows, dict):
            rows = [{"question": q, **(row if isinstance(row, dict) else {})} for q, row in rows.items()]
        if not isinstance(rows, list):
            found = ", ".join(entity) if isinstance(entity, dict) else type(entity).__name__
            raise ValueError(f"{path}: entity {name!r} has {found or 'nothing'}, expected a list under {part!r}")
        for i, row in enumerate(rows):
            row = row if isinstance(row, dict) else {}
            example = Example(" ".join(strings(row.get("question"))), strings(row.get("answers")),
                              strings(row.get("false_answer_options"))[:2])
            if not example.question or not example.answers or len(example.false_options) < 2:
                raise ValueError(f"{path}: {part}[{i}] of {name!r} has {', '.join(row) or 'nothing'}; expected "
                                 "question, answers and two false_answer_options, none empty")
            examples.append(example)
    return examples


def load_rows(path: str | Path, keys: tuple[str, ...]) -> list[dict]:
    """A JSON list, or JSON lines, of objects that hold `keys` as strings; or CSV with these columns and no header."""
    text = read(path)
    if Path(path).suffix == ".csv":
        try:  # restkey: a row that is too long gets a list for its last value and fails the check below
            rows = list(enumerate(csv.DictReader(io.StringIO(text), keys, restkey=keys[-1], strict=True), 1))
        except csv.Error as e:
            raise ValueError(f"{path}: not CSV ({e})") from None
    elif text.lstrip().startswith("["):
        rows = list(enumerate(parse(text, path)))
    else:
        rows = [(i, parse(line, f"{path} line {i}")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, row in rows:
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}: row {i} has {found or 'nothing'}, expected strings under {', '.join(keys)}")
    if not rows:
        raise ValueError(f"{path}: no rows, expected at least one with {', '.join(keys)}")
    return [row for _, row in rows]


def load_tofu(path: str | Path) -> list[Example]:
    """TOFU's JSON lines: question, answer."""
    return [Example(row["question"], [row["answer"]]) for row in load_rows(path, ("question", "answer"))]


def load_alpaca(path: str | Path) -> list[Example]:
    """Alpaca's JSON list: instruction, input (often empty; joined to the instruction by a blank line), output."""
    rows = load_rows(path, ("instruction", "output"))
    return [Example("\n\n".join(strings([row["instruction"], row.get("input", "")])), [row["output"]]) for row in rows]


UTILITY = {  # task: files, keys that hold strings, row -> (prompt, options, the right one's index), what is expected
    "mmlu": ("mmlu/*.csv", ("question", *"ABCD", "answer"), lambda row: (
        "\n".join([row["question"], *(f"{c}. {row[c]}" for c in "ABCD"), "Answer:"]),
        [*"ABCD"], [*"ABCD"].index(row["answer"])), "question, four choices and one of A, B, C, D"),
    "gsm8k": ("gsm8k_test.jsonl", ("question", "answer"), lambda row: (
        row["question"], [re.search(r"#### *(-?\d[\d,]*(?:\.\d+)?)\s*$", row["answer"])[1].replace(",", "")], 0),
        "a question and an answer that ends in '#### number'"),
    "hellaswag": ("hellaswag_val.jsonl", ("ctx",), lambda row: (
        row["ctx"], row["endings"], [*"0123"].index(str(row["label"]))), "ctx, endings and a label from 0 to 3"),
    "arc": ("ARC-Challenge-Test.jsonl", ("answerKey",), lambda row: (
        f"Question: {row['question']['stem']}\nAnswer:", [c["text"] for c in row["question"]["choices"]],
        [c["label"] for c in row["question"]["choices"]].index(row["answerKey"])),
        "a question with stem and choices, and the answerKey that labels one of them"),
    "winogrande": ("winogrande_dev.jsonl", ("sentence", "option1", "option2", "answer"), lambda row: (
        (parts := row["sentence"].split("_"))[0], [row["option1"] + parts[-1], row["option2"] + parts[-1]],
        [*"12"].index(row["answer"] if len(parts) == 2 else "")), "a sentence with one _, two options, answer 1 or 2"),
    **{name: (f"{name}.json", ("question", "answer"), lambda row: (row["question"], [row["answer"]], 0),
              "a question and an answer") for name in ("real_authors", "world_facts")}}


def load_utility(folder: str | Path) -> dict[str, list[Example]]:
    """{task: examples} for those of UTILITY's files that `folder` has, in upstream's formats, zero-shot.

    An option begins with the space that divides it from the prompt; GSM8K's answer is the bare number. ValueError for
    a folder with none of the files and for a row that is not upstream's.
    """
    tasks = {}
    for name, (pattern, keys, reader, wanted) in UTILITY.items():
        for path in sorted(Path(folder).glob(pattern)):
            for i, row in enumerate(load_rows(path, keys), 1):
                try:
                    question, options, right = reader(row)
                    first, *false = options.pop(right), *options
                    choice = name in ("mmlu", "hellaswag", "arc", "winogrande")
                    if choice:
                        question, first, *false = question.rstrip(), *(f" {o.strip()}" for o in (first, *false))
                    ok = question.strip() and first.strip() and all(map(str.strip, false)) and bool(false) == choice
                except (KeyError, IndexError, TypeError, ValueError, AttributeError):
                    ok = False
                if not ok:
                    found = ", ".join(f"{key} {str(value)[:24]!r}" for key, value in row.items())
                    raise ValueError(f"{path}: row {i} has {found}; expected {wanted}")
                tasks.setdefault(name, []).append(Example(question, [first], false))
    if not tasks:
        raise ValueError(f"{folder}: no utility task, expected any of {', '.join(row[0] for row in UTILITY.values())}")
    return tasks


def split(examples: list[Example], folder: str | Path) -> tuple[list[Example], list[Example], list[Example]]:
    """C_f, C_r, C_t by FaithUn's published files of 0-based indices, one a line (C.1: 5, 10 and 70 %)."""
    parts, seen = [], {}
    for name in ("forget_set_split.txt", "retaining_set_split.txt", "test_set_split.txt"):
        path, words = Path(folder) / name, read(Path(folder) / name).replace(",", " ").split()
        bad = [w for w in words if not w.isdecimal() or int(w) >= len(examples)]
        if bad or not words:
            raise ValueError(f"{path}: found {bad[0] if bad else 'no index'}, expected indices "
                             f"from 0 to {len(examples) - 1}")
        twice = [i for i in map(int, words) if seen.setdefault(i, name) != name]
        if twice or len(set(words)) < len(words):
            raise ValueError(f"{path}: index {twice[0] if twice else 'list'} repeats, expected disjoint sets")
        parts.append([examples[int(w)] for w in words])
    return tuple(parts)


# --------------------------------------------------------------------------------- templates and batches

TABLE_3 = ("Answer the following question by simply selecting a proper answer among the given options. "
           "You must generate only the exact word without an explanation.\n"
           "Question: {question}\nOptions: {options}\nYour Answer:")


def mcqa_prompt(example: Example, rng: random.Random) -> str:
    """Table 3, byte for byte. Unpublished and ours: options joined by ", ", in an order drawn from `rng`."""
    options = [example.answers[0], *example.false_options]
    rng.shuffle(options)
    return TABLE_3.format(question=example.question, options=", ".join(options))


def encode(tokenizer, question: str, answer: str) -> tuple[list[int], list[bool]]:
    """(ids, answer mask) of prompt + answer + end token."""
    x, y = tokenizer.prompt(question), tokenizer.answer(answer)
    return x + y, [False] * len(x) + [True] * len(y)


def collate(rows: list[tuple[list[int], list[bool]]], device: torch.device | str = "cpu") -> Batch:
    """Pads on the right with id 0, which nothing reads: the causal mask hides it and `answer` leaves it out."""
    width = max(len(ids) for ids, _ in rows)
    return Batch(torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device),
                 torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], device=device))


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless index batches over n rows: a new seeded order each epoch, the last, smaller batch kept."""
    while True:
        yield from (part.tolist() for part in torch.randperm(n, generator=generator).split(min(size, n)))
