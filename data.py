"""Files to examples, examples to batches: FaithUn, TOFU, Alpaca and the utility tasks in upstream's formats.

Dimensions: B sequences, K tokens of the longest sequence in the batch.
"""
import csv
import io
import math
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from model import LM, Count, Tokenizer, check, parse, read_text, refusing

@dataclass
class Example:
    """One (x, y) of C, with FaithUn's false options where the file has them."""
    question: str
    answers: list[str]                                      # the first is y; each is accepted when scoring
    false_options: list[str] = field(default_factory=list)  # two in FaithUn, none in TOFU, Alpaca and GSM8K
    where: str = field(default="", compare=False)           # its file and row, for messages
    entity: str = field(default="", compare=False)          # FaithUn's: its Wikidata id
    relation: str = field(default="", compare=False)        # our FaithUn's "country", "country > capital"
    raw: bool = field(default=False, compare=False, repr=False)  # the question is the prompt: no template

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

def text(row: dict, key: str, where: str) -> str:
    """row[key], a number as Python writes it. ValueError for other types, blanks and lone surrogates."""
    return str(check(row.get(key), Text, f"{where}: found {key}"))

def texts(row: dict, key: str, where: str) -> list[str]:
    """row[key], one text or a list of them, stripped."""
    found = check(row.get(key), Text | tuple[Text, ...], f"{where}: found {key}")
    return [str(each).strip() for each in (found if isinstance(found, list) else [found])]

def read_values(path: str | Path):
    """The JSON value in `path`; a list of JSON lines where the first is an object, or of MMLU's CSV rows."""
    content = read_text(path)
    if Path(path).suffix == ".csv":
        names = ("question", *"ABCD", "answer")
        with refusing(f"{path}: not CSV"):  # restkey: a row that is too long gets a list, which is no text
            return list(csv.DictReader(io.StringIO(content), names, restkey="answer", strict=True))
    lines = [line for line in content.split("\n") if line.strip()]
    if len(lines) > 1 and re.fullmatch(r"\s*{.*}\s*", lines[0]):
        return [parse(line, f"{path}: row {i}") for i, line in enumerate(lines, 1)]
    return parse(content, path) if lines else []

def load_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(file and row, row) for each object of a list or of lines."""
    Rows = Annotated[list, ("a list or lines of objects; FaithUn's object is read without --retain", bool)]
    rows = read_values(path)
    if isinstance(rows, dict) and any(not isinstance(value, dict) for value in rows.values()):
        rows = [rows]  # a single line, since FaithUn's object holds objects
    rows = enumerate(check(rows, Rows, f"{path}: found"), 1)
    return [(f"{path}: row {i}", check(row, dict, f"{path}: row {i} is")) for i, row in rows]

def plain(where: str, row: dict) -> Example:
    """A question and its answer, scored by ROUGE-L, whose words are of a to z and digits."""
    Answer = Annotated[str, ("letters a to z or digits", lambda x: re.search("[a-z0-9]", x.lower()))]
    question, answer = text(row, "question", where), text(row, "answer", where)
    return Example(question, [check(answer, Answer, f"{where}: found answer")], where=where)

def load_tofu(path: str | Path) -> list[Example]:
    """TOFU's JSON lines: question, answer."""
    return [plain(*row) for row in load_rows(path)]

def load_alpaca(path: str | Path) -> list[Example]:
    """Alpaca's JSON list: instruction, input (joined to it by a blank line; empty or null: none), output.
    Rows whose output is empty, of which the published file has some, are left out."""
    examples = []
    for where, row in load_rows(path):
        if not str(row.get("output")).strip():
            continue
        question, given = text(row, "instruction", where).strip(), row.get("input")
        if given is not None and str(given).strip():
            question += "\n\n" + text(row, "input", where).strip()
        examples.append(Example(question, [text(row, "output", where)], where=where))
    if not examples:
        raise ValueError(f"{path}: found only empty outputs, expected at least one with text")
    return examples

def faithun_example(where: str, row: dict, entity: str) -> Example:
    question = text(check(row, dict, f"{where} is"), "question", where).strip()
    answers, unlike = texts(row, "answers", where), {}
    for option in texts(row, "false_answer_options", where):
        unlike.setdefault(normalise(option), option)
    options = list(unlike.values())[:2]
    if len(options) < 2 or not {*map(normalise, options)}.isdisjoint(map(normalise, answers)):
        raise ValueError(f"{where}: found answers {answers} and false_answer_options {options}, "
                         "expected two false ones, unlike each other and every answer")
    relation = row["relation"] if isinstance(row.get("relation"), str) else ""  # upstream's: undocumented
    return Example(question, answers, options, where, entity, relation)

def load_faithun(path: str | Path, part: str = "hop1_unlearn") -> list[Example]:
    """Every entity's questions of `part`: hop1_unlearn (the facts that the split files number), hop1_test
    (paraphrased), hop2_test (multi-hop) or same_object (same answer). The file: {Wikidata id: {part: rows}},
    or {question: row} for rows, since upstream does not document which."""
    Object = Annotated[dict, ("an object, as in FaithUn's file; rows such as TOFU's need --retain",
                              lambda x: True)]
    examples = []
    for name, entity in check(read_values(path), Object, f"{path}: found").items():
        rows = check(entity, Object, f"{path}: {name!r} is").get(part, None if part == "hop1_unlearn" else [])
        if isinstance(rows, dict):
            rows = [row | {"question": q} if isinstance(row, dict) else row for q, row in rows.items()]
        if not isinstance(rows, list):
            raise ValueError(f"{path}: {name!r} has {', '.join(entity) or 'nothing'}, expected {part}")
        for i, row in enumerate(rows):
            examples.append(faithun_example(f"{path}: {part}[{i}] of {name!r}", row, name))
    if not examples and part == "hop1_unlearn":
        raise ValueError(f"{path}: found no questions, expected {part} of at least one entity")
    return examples

def belongs(e: Example, part: str, fact: Example) -> bool:
    """Is this question, of `part`, about this fact of hop1_unlearn? It is about the fact's entity, and in
    hop2_test it starts from the fact's relation, if both have one; elsewhere it has the fact's answer."""
    if e.entity != fact.entity:
        return False
    if part == "hop2_test":
        return not (e.relation and fact.relation) or e.relation.startswith(f"{fact.relation} >")
    return not {normalise(a) for a in e.answers}.isdisjoint(map(normalise, fact.answers))

# ---------------------------------------------------------------------------------------- utility tasks

def choice(question: str, options: dict[str, str], row: dict, key: str, where: str) -> Example:
    """Zero-shot: {label: option}, and the right label is row[key]. An option begins with the space that
    divides it from the prompt."""
    label = check(str(row.get(key)), Literal[tuple(options)], f"{where}: found {key}")
    right = f" {options[label].strip()}"
    wrong = [f" {option.strip()}" for other, option in options.items() if other != label]
    if not wrong or right in wrong or not question.strip():
        raise ValueError(f"{where}: found {question!r:.40}, {right!r} and {wrong}, expected text, a right "
                         "option once")
    return Example(question.rstrip(), [right], wrong, where, raw=True)

def mmlu(where: str, row: dict) -> Example:
    choices = [f"{c}. {text(row, c, where)}" for c in "ABCD"]
    question = "\n".join([text(row, "question", where), *choices, "Answer:"])
    return choice(question, {c: c for c in "ABCD"}, row, "answer", where)

def gsm8k(where: str, row: dict) -> Example:
    number = re.search(r"#### *(-?\d[\d,]*(?:\.\d+)?)\s*$", text(row, "answer", where))
    if not number:
        raise ValueError(f"{where}: found answer {row['answer']!r:.80}, expected '#### number' at its end")
    return Example(text(row, "question", where), [number[1].replace(",", "")], where=where)

def hellaswag(where: str, row: dict) -> Example:
    endings = {str(i): ending for i, ending in enumerate(texts(row, "endings", where))}
    check(len(endings), Literal[4], f"{where}: the number of endings is")
    return choice(text(row, "ctx", where), endings, row, "label", where)

def arc(where: str, row: dict) -> Example:
    question = check(row.get("question"), dict, f"{where}: found question")
    choices = check(question.get("choices"), tuple[dict, ...], f"{where}: found choices")
    options = {text(c, "label", where): text(c, "text", where) for c in choices}
    check(len(options), Literal[len(choices)], f"{where}: the number of unlike labels is")
    return choice(f"Question: {text(question, 'stem', where)}\nAnswer:", options, row, "answerKey", where)

def winogrande(where: str, row: dict) -> Example:
    Sentence = Annotated[str, ("one with one _", lambda x: x.count("_") == 1)]
    sentence = check(row.get("sentence"), Sentence, f"{where}: found sentence")
    before, after = sentence.split("_")
    Words = Annotated[str, ("words of the sentence", lambda x: x.casefold() in sentence.casefold())]
    options = {i: check(text(row, f"option{i}", where), Words, f"{where}: found option{i}") for i in "12"}
    return choice(before, {i: words + after for i, words in options.items()}, row, "answer", where)

TASKS = {"mmlu": ("mmlu/*.csv", mmlu), "gsm8k": ("gsm8k_test.jsonl", gsm8k),
         "hellaswag": ("hellaswag_val.jsonl", hellaswag), "arc": ("ARC-Challenge-Test.jsonl", arc),
         "winogrande": ("winogrande_dev.jsonl", winogrande),
         "real_authors": ("real_authors.json", plain), "world_facts": ("world_facts.json", plain)}

def load_utility(folder: str | Path) -> dict[str, list[Example]]:
    """{task: examples} for those of TASKS that `folder` has, in upstream's formats. ValueError for none."""
    tasks = {}
    for name, (pattern, reader) in TASKS.items():
        there = Path(folder, pattern).parent.glob("*")  # not glob(pattern), which passes over a dead link
        for path in sorted(path for path in there if path.match(pattern)):
            tasks.setdefault(name, []).extend(reader(*row) for row in load_rows(path))
    if not tasks:
        files = ", ".join(pattern for pattern, _ in TASKS.values())
        raise ValueError(f"{folder}: no utility task, expected any of {files}")
    return tasks

# ---------------------------------------------------------------------------------------------- splits

def same(e: Example) -> tuple[str, str]:
    """What rows of one fact have in common: question and first answer, but for white space, Unicode form."""
    return tuple(" ".join(unicodedata.normalize("NFC", x).split()) for x in (e.question, e.answers[0]))

SEED = 20260923  # of every fold: a result is a result on these sets, so it never changes

def split(examples: list, folder: str | Path, fold: int = 0) -> tuple[list, list, list]:
    """C_f, C_r, C_t by FaithUn's published files of 0-based indices (C.1: 5, 10 and 70 %).
    Fold k >= 1 is ours: as many facts to forget, which no other fold forgets, the published one included;
    retain and test sets of the published sizes out of all the others."""
    n, left, parts = len(examples), {str(i): i for i in range(len(examples))}, []
    for name in ("forget_set_split.txt", "retaining_set_split.txt", "test_set_split.txt"):
        parts.append([])
        for word in read_text(Path(folder) / name).replace(",", " ").split() or ["no index"]:
            if word not in left:
                raise ValueError(f"{Path(folder) / name}: found {word}, expected 0 to {n - 1}; none repeats")
            parts[-1].append(left.pop(word))
    forget, retain, test = parts
    free = [i for i in range(n) if i not in forget]
    if not 0 <= fold <= len(free) // len(forget):
        raise ValueError(f"fold is {fold}, expected 0 to {len(free) // len(forget)}")
    if fold:
        random.Random(SEED).shuffle(free)
        forget = free[(fold - 1) * len(forget):fold * len(forget)]
        rest = [i for i in range(n) if i not in forget]
        rest = random.Random(f"{SEED} {fold}").sample(rest, len(retain) + len(test))
        retain, test = rest[:len(retain)], rest[len(retain):]
    return tuple([examples[i] for i in part] for part in (forget, retain, test))

def tofu_split(C_f: list, C_r: list, fold: int = 0) -> tuple[list, list]:
    """Fold k >= 1 forgets other rows, for forget01 two authors: C_r + C_f is TOFU's order, 20 rows each."""
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
SYMBOLS = "#%&@/\\§‰＃％＆＠／＼"  # punctuation to Unicode, but C# is not C
ALIKE = str.maketrans("‘’ʼ“”‐‑–—", "'''\"\"----", "\u00ad")  # as on a keyboard

def normalise(text: str) -> str:
    """What is compared when an answer is scored: its first line with text, without case, composed,
    quotes, dashes and spaces of one kind each, less the quotes, brackets and punctuation of any script around
    it, if that leaves something."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = unicodedata.normalize("NFC", unicodedata.normalize("NFD", line).casefold()).translate(ALIKE)
    line = " ".join(line.split())
    outer = {c for c in line if unicodedata.category(c) in OUTER and c not in SYMBOLS}
    return line.strip("`" + "".join(outer)) or line

Row = tuple[list[int], list[bool]]  # one encoded (x, y): its ids, and where those of y are

def row_of(x: list[int], y: list[int]) -> Row:
    return x + y, [False] * len(x) + [True] * len(y)

def encode(tokenizer, question: str, answer: str) -> Row:
    """Prompt, answer and end token."""
    return row_of(tokenizer.prompt(question), tokenizer.answer(answer))

def encoded(tokenizer, examples: list[Example]) -> list[Row]:
    """`encode` of each example's question and first answer."""
    return [encode(tokenizer, e.question, e.answers[0]) for e in examples]

def check_fits(model: LM, tokenizer: Tokenizer, examples: list[Example]) -> None:
    """ValueError with its row for an example whose longest sequence, Table 3, the plain question or a raw
    prompt with any answer or option, cannot be tokenised, answered, or is more than the model takes."""
    places, size = model.config.max_position_embeddings or math.inf, model.config.vocab_size
    for e in examples:
        questions = [e.question, mcqa_prompt(e, random.Random(0))] if e.false_options else [e.question]
        with refusing(f"{e.where}: cannot be tokenised"):  # a lone surrogate; a template that refuses
            prompts = [tokenizer.raw(e.question)] if e.raw else [tokenizer.prompt(q) for q in questions]
            answers = [tokenizer.answer(option) for option in (*e.answers, *e.false_options)]
        check(min(map(len, prompts)), Count, f"{e.where}: the length of its prompt is")
        for answer, y in zip((*e.answers, *e.false_options), answers):
            # one that is generated must end at its end; free text, as Alpaca's, may name an end token
            if len(y) < 2 or e.false_options and not set(y[:-1]).isdisjoint(tokenizer.stop_ids):
                raise ValueError(f"{e.where}: found {answer!r:.60}, which is no token or holds an end token")
        length, last = max(map(len, prompts)) + max(map(len, answers)), max(map(max, prompts + answers))
        if length > places or last >= size:
            raise ValueError(f"{e.where}: found {length} tokens with ids up to {last}, expected no more than "
                             f"max_position_embeddings {places} and ids below vocab_size {size}")

def collate(rows: list[Row], device: torch.device | str = "cpu") -> Batch:
    """Pads on the right with id 0, which nothing reads: causal masking hides it, `answer` leaves it out."""
    width = max(len(ids) for ids, _ in rows)
    return Batch(torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device),
                 torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], device=device))

def batches(n: int, size: int, generator: torch.Generator, skip: int = 0) -> Iterator[list[int]]:
    """Endless index batches over n rows: a new seeded order each epoch, the last, smaller batch kept. Without
    the first `skip`: a resumed run draws on where it stopped."""
    def every() -> Iterator[list[int]]:
        while True:
            yield from (part.tolist() for part in torch.randperm(n, generator=generator).split(min(size, n)))
    return islice(every(), skip, None)
