"""Files to examples, examples to batches: FaithUn, TOFU, Alpaca and the utility tasks in upstream's formats.

Dimensions: B sequences, K tokens of the longest sequence in the batch.
"""
import csv
import io
import math
import random
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from model import LM, NAMES, Tokenizer, check, parse, read_text, wanted

@dataclass
class Example:
    """One (x, y) of C, with FaithUn's false options where the file has them."""
    question: str
    answers: list[str]                                      # the first is y; each is accepted when scoring
    false_options: list[str] = field(default_factory=list)  # two in FaithUn, none in TOFU, Alpaca and GSM8K
    where: str = field(default="", compare=False)           # its file and row, for messages
    relation: str = field(default="", compare=False)        # our FaithUn's "country", "country > capital"

@dataclass
class Batch:
    """Sequences padded on the right; `answer` marks the tokens of y, its end token included."""
    ids: Tensor     # (B, K) long
    answer: Tensor  # (B, K) bool

    def real(self) -> Tensor:
        """(B, K) bool: all but the padding, since every sequence ends in its answer."""
        return self.answer.flip(1).cumsum(1).flip(1) > 0

# ------------------------------------------------------------------------------------------------ files

Text = Annotated[str | int | float, ("text or a number", lambda x: str(x).strip())]
ROW_KEYS = {"question", "instruction", "ctx", "sentence"}  # each row of the files below has one of these

def text(row: dict, key: str, where: str) -> str:
    """row[key], a number as its digits. ValueError for other types, blanks and lone surrogates."""
    return str(check(row.get(key), Text, f"{where}: found {key}"))

def texts(row: dict, key: str, where: str) -> list[str]:
    """row[key], one text or a list of them, stripped."""
    values = row.get(key)
    values = values if isinstance(values, list) and values else [values]
    return [text({key: value}, key, where).strip() for value in values]

def read_values(path: str | Path):
    """The JSON value in `path`, or those of its lines as a list, where the first line is an object."""
    content = read_text(path)
    lines = [line for line in content.split("\n") if line.strip()]
    if len(lines) > 1 and re.fullmatch(r"\s*{.*}\s*", lines[0]):
        return [parse(line, f"{path}: row {i}") for i, line in enumerate(lines, 1)]
    return parse(content, path) if lines else []

def load_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(file and row, row) for each object in a JSON list or in JSON lines, or each row of MMLU's bare CSV."""
    if Path(path).suffix == ".csv":
        try:  # restkey: a row that is too long gets a list for its last value, which is no text
            lines = io.StringIO(read_text(path))
            rows = list(csv.DictReader(lines, ("question", *"ABCD", "answer"), restkey="answer", strict=True))
        except csv.Error as e:
            raise ValueError(f"{path}: not CSV ({e})") from None
    else:
        rows = read_values(path)
        rows = [rows] if isinstance(rows, dict) and ROW_KEYS.intersection(rows) else rows
    if not isinstance(rows, list):
        raise ValueError(f"{path}: found {NAMES[type(rows)]}, {str(rows)[:60]}, expected rows with any of "
                         f"{', '.join(sorted(ROW_KEYS))}; FaithUn's object is read without --retain")
    if not rows:
        raise ValueError(f"{path}: found no rows, expected at least one")
    return [(f"{path}: row {i}", check(row, dict, f"{path}: row {i} is")) for i, row in enumerate(rows, 1)]

def plain(where: str, row: dict) -> Example:
    return Example(text(row, "question", where), [text(row, "answer", where)], where=where)

def load_tofu(path: str | Path) -> list[Example]:
    """TOFU's JSON lines: question, answer."""
    return [plain(*row) for row in load_rows(path)]

def load_alpaca(path: str | Path) -> list[Example]:
    """Alpaca's JSON list: instruction, input (joined to it by a blank line; empty or null: none), output."""
    examples = []
    for where, row in load_rows(path):
        question, given = text(row, "instruction", where).strip(), row.get("input")
        if given is not None and str(given).strip():
            question += "\n\n" + text(row, "input", where).strip()
        examples.append(Example(question, [text(row, "output", where)], where=where))
    return examples

def faithun_example(row: dict, where: str) -> Example:
    relation = check(row, dict, f"{where} is").get("relation")
    e = Example(text(row, "question", where).strip(), texts(row, "answers", where),
                texts(row, "false_answer_options", where)[:2], where)
    e.relation = relation if isinstance(relation, str) else ""  # upstream's file may hold anything there
    options = {normalise(option) for option in e.false_options}
    if len(options) < 2 or not options.isdisjoint(map(normalise, e.answers)):
        raise ValueError(f"{where}: found answers {e.answers} and false_answer_options {e.false_options}, "
                         "expected two false ones, unlike each other and every answer")
    return e

def load_entities(path: str | Path, parts: tuple[str, ...]) -> list[dict[str, list[Example]]]:
    """FaithUn's file, {Wikidata id: {part: questions}}, as {part: examples} of each entity in file order.

    `questions` is a list of objects with a `question`, or an object keyed by the question: upstream does not
    document which. Each has `answers` and `false_answer_options`; `relation` is ours.
    """
    values, entities = read_values(path), []
    for name, entity in values.items() if isinstance(values, dict) else [("the file", values)]:
        if not isinstance(entity, dict):
            raise ValueError(f"{path}: {name!r} is {NAMES[type(entity)]}, expected an object of FaithUn's "
                             "entities; rows such as TOFU's need --retain")
        entities.append({})
        for part in parts:
            rows = entity.get(part)
            if isinstance(rows, dict):
                rows = [row | {"question": q} if isinstance(row, dict) else row for q, row in rows.items()]
            if not isinstance(rows, list):
                raise ValueError(f"{path}: {name!r} has {', '.join(entity) or 'nothing'}, expected {part}")
            entities[-1][part] = [faithun_example(row, f"{path}: {part}[{i}] of {name!r}")
                                  for i, row in enumerate(rows)]
    return entities

def load_faithun(path: str | Path, part: str = "hop1_unlearn") -> list[Example]:
    """Every entity's questions of `part`: hop1_unlearn (the facts that the split files number), hop1_test
    (paraphrased), hop2_test (multi-hop) or same_object (same answer)."""
    return [e for entity in load_entities(path, (part,)) for e in entity[part]]

def related(path: str | Path, part: str, without: Collection[str] = ()) -> list[list[Example]]:
    """For each fact of hop1_unlearn its entity's questions of `part` that belong to it, none of `without`:
    of hop2_test those that start from its relation, all where there is none; else those with its answer."""
    def belongs(e: Example, fact: Example) -> bool:
        if part == "hop2_test":
            return not (e.relation and fact.relation) or e.relation.startswith(f"{fact.relation} >")
        return not {normalise(a) for a in e.answers}.isdisjoint(map(normalise, fact.answers))

    return [[e for e in entity[part] if e.question not in without and belongs(e, fact)]
            for entity in load_entities(path, ("hop1_unlearn", part)) for fact in entity["hop1_unlearn"]]

# ---------------------------------------------------------------------------------------- utility tasks

def choice(question: str, options: list[str], right: int, where: str) -> Example:
    """Zero-shot: an option begins with the space that divides it from the prompt."""
    options = [f" {option.strip()}" for option in options]
    if len({*options}) < max(2, len(options)) or not question.strip():
        raise ValueError(f"{where}: found {question!r:.40} and {options}, expected text and unlike options")
    return Example(question.rstrip(), [options[right]], options[:right] + options[right + 1:], where)

def pick(row: dict, key: str, labels: list[str], expected: str, where: str) -> int:
    if (label := str(row.get(key))) not in labels:
        raise ValueError(f"{where}: found {key} {label!r}, expected {expected}")
    return labels.index(label)

def mmlu(where: str, row: dict) -> Example:
    choices = [f"{c}. {text(row, c, where)}" for c in "ABCD"]
    question = "\n".join([text(row, "question", where), *choices, "Answer:"])
    return choice(question, [*"ABCD"], pick(row, "answer", [*"ABCD"], "one of A, B, C, D", where), where)

def gsm8k(where: str, row: dict) -> Example:
    number = re.search(r"#### *(-?\d[\d,]*(?:\.\d+)?)\s*$", text(row, "answer", where))
    if not number:
        raise ValueError(f"{where}: found answer {row['answer']!r:.80}, expected '#### number' at its end")
    return Example(text(row, "question", where), [number[1].replace(",", "")], where=where)

def hellaswag(where: str, row: dict) -> Example:
    context, endings = text(row, "ctx", where), texts(row, "endings", where)
    if len(endings) != 4:
        raise ValueError(f"{where}: found {len(endings)} endings, expected 4")
    return choice(context, endings, pick(row, "label", [*"0123"], "a label from 0 to 3", where), where)

def arc(where: str, row: dict) -> Example:
    question = row.get("question")
    if wanted(question, dict) or wanted(question.get("choices"), tuple[dict, ...]):
        raise ValueError(f"{where}: found question {question!r:.40}, expected an object of stem and choices")
    labels, options = [[text(c, key, where) for c in question["choices"]] for key in ("label", "text")]
    right = pick(row, "answerKey", labels, f"one of {', '.join(labels)}", where)
    return choice(f"Question: {text(question, 'stem', where)}\nAnswer:", options, right, where)

def winogrande(where: str, row: dict) -> Example:
    sentence, options = text(row, "sentence", where), []
    before, *after = sentence.split("_")
    if len(after) != 1:
        raise ValueError(f"{where}: found sentence {sentence!r:.80}, expected one with one _")
    for key in ("option1", "option2"):
        options.append(text(row, key, where) + after[0])
        if text(row, key, where).casefold() not in sentence.casefold():
            raise ValueError(f"{where}: found {key} {row[key]!r:.80}, expected words of the sentence")
    return choice(before, options, pick(row, "answer", ["1", "2"], "1 or 2", where), where)

def load_utility(folder: str | Path) -> dict[str, list[Example]]:
    """{task: examples} for those of the seven tasks that `folder` has, in upstream's formats. ValueError for
    none and for a row that is not upstream's."""
    def task(pattern, reader):
        return [reader(*row) for path in sorted(Path(folder).glob(pattern)) for row in load_rows(path)]

    tasks = {"mmlu": task("mmlu/*.csv", mmlu), "gsm8k": task("gsm8k_test.jsonl", gsm8k),
             "hellaswag": task("hellaswag_val.jsonl", hellaswag),
             "arc": task("ARC-Challenge-Test.jsonl", arc),
             "winogrande": task("winogrande_dev.jsonl", winogrande),
             "real_authors": task("real_authors.json", plain), "world_facts": task("world_facts.json", plain)}
    if not any(tasks.values()):
        raise ValueError(f"{folder}: no utility task, expected any of mmlu/*.csv, gsm8k_test.jsonl, "
                         "hellaswag_val.jsonl, ARC-Challenge-Test.jsonl, winogrande_dev.jsonl, "
                         "real_authors.json, world_facts.json")
    return {name: examples for name, examples in tasks.items() if examples}

# ---------------------------------------------------------------------------------------------- splits

SEED = 20260923  # of every fold: a result is a result on these sets, so it never changes

def split(examples: list, folder: str | Path, fold: int = 0) -> tuple[list, list, list]:
    """C_f, C_r, C_t by FaithUn's published files of 0-based indices (C.1: 5, 10 and 70 %).

    Fold k >= 1 is ours: as many facts to forget, which no other fold forgets, the published one included; and
    retain and test sets of the published sizes out of all the others.
    """
    index, parts, seen = {str(i): i for i in range(len(examples))}, [], set()
    for name in ("forget_set_split.txt", "retaining_set_split.txt", "test_set_split.txt"):
        words = read_text(Path(folder) / name).replace(",", " ").split()
        for word in words or ["no index"]:
            if word not in index or word in seen:
                raise ValueError(f"{Path(folder) / name}: found {word}, expected indices from 0 to "
                                 f"{len(index) - 1}, none of which repeats in the three files")
            seen.add(word)
        parts.append([index[word] for word in words])
    forget, retain, test = parts
    free = [i for i in index.values() if i not in forget]
    if not 0 <= fold <= len(free) // len(forget):
        raise ValueError(f"fold is {fold}, expected 0 to {len(free) // len(forget)}")
    if fold:
        random.Random(SEED).shuffle(free)
        forget = free[(fold - 1) * len(forget):fold * len(forget)]
        rest = [i for i in index.values() if i not in forget]
        rest = random.Random(f"{SEED} {fold}").sample(rest, len(retain) + len(test))
        retain, test = rest[:len(retain)], rest[len(retain):]
    return tuple([examples[i] for i in part] for part in (forget, retain, test))

def tofu_split(C_f: list, C_r: list, fold: int = 0) -> tuple[list, list]:
    """Fold k >= 1 forgets other len(C_f) rows, for forget01 another two authors: C_r + C_f is TOFU's own
    order, 20 rows an author."""
    n, rows = len(C_f), C_r + C_f
    starts = list(range(0, len(C_r) - n + 1, n))
    if not 0 <= fold <= len(starts):
        raise ValueError(f"fold is {fold}, expected 0 to {len(starts)}")
    random.Random(SEED).shuffle(starts)
    start = [len(C_r), *starts][fold]
    return rows[start:start + n], rows[:start] + rows[start + n:]

# --------------------------------------------------------------------------------- templates and batches

TABLE_3 = ("Answer the following question by simply selecting a proper answer among the given options. "
           "You must generate only the exact word without an explanation.\n"
           "Question: {question}\nOptions: {options}\nYour Answer:")

def mcqa_prompt(example: Example, rng: random.Random) -> str:
    """Table 3, byte for byte. Unpublished and ours: options joined by ", ", in an order drawn from `rng`."""
    options = [example.answers[0], *example.false_options]
    rng.shuffle(options)
    return TABLE_3.format(question=example.question, options=", ".join(options))

OUTER = ("Ps", "Pe", "Pi", "Pf", "Po", "Zs", "Cf")  # brackets, quotes, punctuation, spaces, widthless marks
SYMBOLS = "#%&@/\\§‰＃％＆＠／＼"                      # Unicode counts them as punctuation, but C# is not C

def normalise(text: str) -> str:
    """What is compared when an answer is scored: its first line with text, without case, composed,
    less the quotes, brackets and punctuation of any script around it, if that leaves something."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = unicodedata.normalize("NFC", unicodedata.normalize("NFD", line).casefold()).strip()
    outer = {c for c in line if unicodedata.category(c) in OUTER and c not in SYMBOLS}
    return line.strip("`" + "".join(outer)) or line

def encode(tokenizer, question: str, answer: str) -> tuple[list[int], list[bool]]:
    """(ids, answer mask) of prompt + answer + end token."""
    x, y = tokenizer.prompt(question), tokenizer.answer(answer)
    return x + y, [False] * len(x) + [True] * len(y)

def check_fits(model: LM, tokenizer: Tokenizer, examples: list[Example]) -> None:
    """ValueError with its row for an example whose longest sequence, Table 3 or the plain question with any
    answer or option, cannot be tokenised or is more than the model takes."""
    places, size = model.config.max_position_embeddings or math.inf, model.config.vocab_size
    for e in examples:
        questions = [e.question, mcqa_prompt(e, random.Random(0))] if e.false_options else [e.question]
        try:
            prompts = [tokenizer.prompt(question) for question in questions]
            answers = [tokenizer.answer(option) for option in (*e.answers, *e.false_options)]
        except (TypeError, ValueError) as error:  # a lone surrogate; a template that refuses
            raise ValueError(f"{e.where}: cannot be tokenised ({error})") from None
        length, last = max(map(len, prompts)) + max(map(len, answers)), max(map(max, prompts + answers))
        if length > places or last >= size:
            raise ValueError(f"{e.where}: found {length} tokens with ids up to {last}, expected no more than "
                             f"max_position_embeddings {places} and ids below vocab_size {size}")

def collate(rows: list[tuple[list[int], list[bool]]], device: torch.device | str = "cpu") -> Batch:
    """Pads on the right with id 0, which nothing reads: causal masking hides it, `answer` leaves it out."""
    width = max(len(ids) for ids, _ in rows)
    return Batch(torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device),
                 torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], device=device))

def batches(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless index batches over n rows: a new seeded order each epoch, the last, smaller batch kept."""
    while True:
        yield from (part.tolist() for part in torch.randperm(n, generator=generator).split(min(size, n)))
