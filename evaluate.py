"""Scores a checkpoint: FS and RS of Section 6.2.1 and US with n and an interval, and the margin that measures recovery.

    python evaluate.py --model data/tiny
    python evaluate.py --model data/tiny --utility FOLDER

Dimensions: B sequences, K tokens.
"""
import argparse
import dataclasses
import functools
import inspect
import json
import math
import random
import re
import statistics
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from data import Batch, Example, collate, encode, load_faithun, load_tofu, load_utility, mcqa_prompt, split
from model import LM, Tokenizer, answer_logprob, generate, load, prefill, read_json

# ------------------------------------------------------------------------------------------------ scores


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate observed over n items, both in percent."""
    p = rate / 100
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return tuple(round(100 * max(0.0, min(1.0, (centre + s * half) / (1 + z * z / n))), 2) for s in (-1, 1))


def score(hits: list[bool]) -> dict:
    """{percent, n, low, high} of a list of outcomes; nan percent where there are none."""
    n = len(hits)
    percent = 100 * sum(hits) / n if n else math.nan
    low, high = wilson(percent, n) if n else (0.0, 100.0)
    return {"percent": round(percent, 2), "n": n, "low": low, "high": high}


def standard_error(values: list[float]) -> float:
    """Of the mean of values in [0, 1]; one value alone says nothing and gets the largest deviation there is, 0.5."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.5


def normal(mean: float, error: float, n: int) -> dict:
    """Like `score`, of a mean in [0, 1] and its standard error: the 95 % interval is the normal one, clipped."""
    low, high = (round(100 * max(0.0, min(1.0, mean + side * 1.96 * error)), 2) for side in (-1, 1))
    return {"percent": round(100 * mean, 2), "n": n, "low": low, "high": high}


def mean_score(values: list[float]) -> dict:
    """Like `score`, of values in [0, 1], with `normal`'s interval."""
    return normal(statistics.fmean(values), standard_error(values), len(values)) if values else score([])


def normalise(text: str) -> str:
    """The matching rule: the first line, without case and without space or punctuation at its ends."""
    return text.strip().split("\n")[0].casefold().strip(string.whitespace + string.punctuation)


def answered(model: LM, tokenizer: Tokenizer, examples: list[Example], seed: int = 0, size: int = 64) -> list[bool]:
    """Per example: is the greedy answer to Table 3's question, after `normalise`, one of the accepted answers?

    The order of an item's options depends on the seed and the item alone, so every model, subset and step sees
    the same prompt. Generation stops four tokens past the longest option: nothing longer could match.
    """
    prompts = [tokenizer.prompt(mcqa_prompt(e, random.Random(f"{seed} {e.question}"))) for e in examples]
    budget = 4 + max((len(tokenizer.answer(o)) for e in examples for o in (*e.answers, *e.false_options)), default=0)
    outputs = greedy(model, tokenizer, prompts, budget, size)
    return [normalise(text) in {normalise(a) for a in e.answers} for text, e in zip(outputs, examples)]


def greedy(model: LM, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, size: int) -> list[str]:
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    for part in (order[i:i + size] for i in range(0, len(order), size)):
        for i, ids in zip(part, generate(model, [prompts[i] for i in part], max_new_tokens, tokenizer.stop_ids)):
            texts[i] = tokenizer.decode(ids)
    return texts


def item_scores(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> list[float]:
    """Per example in [0, 1]: FaithUn's right or wrong, or TOFU's ROUGE-L recall where there are no options (6.2.1)."""
    if all(e.false_options for e in examples):
        return answered(model, tokenizer, examples, size=size)
    return recalls(model, tokenizer, examples, size)


def accuracy(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> dict:
    """FS on C_f, RS on C_t (Section 6.2.1): the mean of `item_scores` in percent, with n and its 95 % interval."""
    scores = item_scores(model, tokenizer, examples, size)
    return score(scores) if all(e.false_options for e in examples) else mean_score(scores)


@torch.no_grad()
def margin(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 192) -> tuple[float, float]:
    """Recovery without steps, in nats per token, on the plain question: the mean over examples of log P(answer),
    and of its lead over the best false option."""
    rows = [encode(tokenizer, e.question, o) for e in examples for o in (e.answers[0], *e.false_options)]
    logp = []
    for i in range(0, len(rows), size):
        batch = collate(rows[i:i + size]).to(model.lm_head.weight.device)
        logp += (answer_logprob(model, batch) / batch.answer.sum(1)).tolist()
    truth, lead = [], []
    for e in examples:
        first, *false = [logp.pop(0) for _ in range(1 + len(e.false_options))]
        truth.append(first)
        lead.append(first - max(false, default=0.0))
    return sum(truth) / len(truth), sum(lead) / len(lead)


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FFN = MODULES[4:]


def neuron_attribution(model: LM, batch: Batch, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    """A = h dP(y|x)/dh at the outputs h of the linear modules, (B, K, n) each (Eq. 1); a batch equals one at a time.

    Padding (where not batch.real()) has h but no influence: its A is 0.
    """
    h, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(modules):
            hooks.append(module.register_forward_hook(lambda _, x, out, name=name: h.__setitem__(name, out)))
    try:
        P = answer_logprob(model, batch).exp()
    finally:
        for hook in hooks:
            hook.remove()
    grads = torch.autograd.grad(P.sum(), list(h.values()))  # examples do not touch: the sum's gradient is each one's
    return {name: (x * g).detach().view(*batch.ids.shape, -1) for (name, x), g in zip(h.items(), grads)}


def splits_of(path: str, folder: str, limit: int = 0, retain: str = "") -> tuple[list, list, list]:
    """C_f, C_r, C_t. FaithUn: one file and its split files, in `folder` or faithun_splits beside it. TOFU: `path` and
    `retain` are its two files, and C_t the first 300 of C_r (as in its own code). `limit` cuts C_t."""
    if retain:
        C_f, C_r = load_tofu(path), load_tofu(retain)
        return C_f, C_r, C_r[:limit or 300]
    C_f, C_r, C_t = split(load_faithun(path), folder or Path(path).parent / "faithun_splits")
    return C_f, C_r, C_t[:limit or None]


# --------------------------------------------------------------------------------- ROUGE-L and utility

IRREGULAR = {**{w: w for w in "sky news inning outing canning howe proceed exceed succeed".split()},
             **{f"{w}s": w for w in ("inning", "outing", "canning")},
             "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"}
STEPS = (  # Porter's 2 to 4: least measure of the rest, suffix>replacement; NLTK runs 2 again on what alli>al leaves
    (1, "alli>al"),
    (1, "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble entli>ent eli>e ousli>ous ization>ize ation>ate "
        "ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble fulli>ful (?<=l)ogi>og"),
    (1, "icate>ic ative> alize>al iciti>ic ical>ic ful> ness>"),
    (2, "al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> (?<=[st])ion> ou> ism> ate> iti> ous> ive> ize>"))


def shape(word: str) -> str:
    """c or v for each letter; a y after a consonant is a vowel. Porter's measure is the number of "vc"."""
    return functools.reduce(lambda s, x: s + ("v" if x in "aeiou" or x == "y" and s.endswith("c") else "c"), word, "")


def short(word: str) -> bool:
    """Measure 1 and Porter's *o, which keeps or takes an e: hop(e). NLTK adds vowel, consonant: us(e)."""
    return bool(re.fullmatch("c+vc", shape(word))) and word[-1] not in "wxy" or shape(word) == "vc"


def swap(word: str, least: int, rules: str) -> str:
    """The first suffix that fits decides, so of nested ones the longest stands first."""
    for suffix, _, new in (rule.partition(">") for rule in rules.split()):
        if match := re.search(f"{suffix}$", word):
            rest = word[:match.start()]
            return rest + new if shape(rest).count("vc") >= least else word
    return word


@functools.cache
def stem(word: str) -> str:
    """Porter (1980) with NLTK's extensions, as rouge_score stems; for lower-case words of three letters and more."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    word = re.sub("(?<=ss)es$|(?<=..i)es$|(?<!s)s$", "", word)  # flies, fli; ties, tie
    rest = re.sub("(ed|ing)$", "", word)
    if word.endswith("ied"):
        word = word[:-1 if len(word) == 4 else -2]
    elif word.endswith("eed"):
        word = swap(word, 1, "eed>ee")
    elif rest != word and "v" in shape(rest):
        double = rest[-1:] == rest[-2:-1] and shape(rest).endswith("c")
        word = rest[:-1] if double and rest[-1] not in "lsz" else rest
        word += "e" if rest.endswith(("at", "bl", "iz")) or not double and short(rest) else ""
    if word.endswith("y") and shape(word)[1:-1].endswith("c"):
        word = word[:-1] + "i"
    for least, rules in STEPS:
        word = swap(word, least, rules)
    word = word if short(word[:-1]) else swap(word, 1, "e>")
    return swap(word, 2, "(?<=l)l>")


def rouge_l_recall(prediction: str, reference: str) -> float:
    """The longest common subsequence of stems over the reference's length, in [0, 1]; 0 where either has no word.

    Equals rouge_score's rougeL recall with its stemmer. The subsequence by bit vectors (Hyyro, 2004).
    """
    a, b = ([stem(w) if len(w) > 3 else w for w in re.findall("[a-z0-9]+", text.lower())]
            for text in (reference, prediction))
    places = {w: sum(1 << i for i, other in enumerate(a) if other == w) for w in set(a)}
    full = free = (1 << len(a)) - 1  # a zero bit in `free` is a word of the reference that is matched
    for w in b:
        hit = free & places.get(w, 0)
        free = (free + hit | free - hit) & full
    return (len(a) - free.bit_count()) / len(a) if a else 0.0


def recalls(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64,
            max_new_tokens: int = 200) -> list[float]:
    """Per example the ROUGE-L recall of the greedy answer to the plain question: TOFU's score.

    The paper gives no limit of the generation; other implementations of TOFU stop at 200 new tokens, and so do we.
    """
    texts = greedy(model, tokenizer, [tokenizer.prompt(e.question) for e in examples], max_new_tokens, size)
    return [rouge_l_recall(text, e.answers[0]) for text, e in zip(texts, examples)]


def mismatched_tau(examples: list[Example], seed: int = 0) -> float:
    """C.1's threshold on TOFU (0.1971 there): the mean recall in [0, 1] when every question gets the answer of
    another item, drawn from the seed."""
    rng, values = random.Random(seed), []
    for i, e in enumerate(examples):
        j = rng.randrange(len(examples) - 1)
        values.append(rouge_l_recall(examples[j + (j >= i)].answers[0], e.answers[0]))
    return statistics.fmean(values)


@torch.no_grad()
def option_scores(model: LM, prompts: list[list[int]], options: list[list[list[int]]]) -> list[list[float]]:
    """log P(option | prompt) in nats for the tokens of every prompt's options; each prompt is computed once."""
    rows = [(option, [True] * len(option)) for part in options for option in part]
    batch = collate(rows).to(model.lm_head.weight.device)                                             # (R, T)
    last, length, cache = prefill(model, prompts, batch.ids.shape[1] - 1)
    owner = torch.tensor([i for i, part in enumerate(options) for _ in part], device=last.device)     # (R,)
    hidden = last[owner][:, None]                                                                     # (R, 1, D)
    if batch.ids.shape[1] > 1:
        # An option's tokens take the slots of the prompt's pads; its own pads lie behind them, where nothing looks.
        positions = length[owner][:, None] + torch.arange(batch.ids.shape[1] - 1, device=last.device)
        cache = [(keys[owner], values[owner]) for keys, values in cache]
        hidden = torch.cat((hidden, model.hidden(batch.ids[:, :-1], positions, cache)), 1)
    logits = model.lm_head(hidden[batch.answer])                                                      # (N, V)
    logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logp = logp.gather(1, batch.ids[batch.answer][:, None])[:, 0].split([len(option) for option, _ in rows])
    total = torch.stack([part.sum() for part in logp]).split([len(part) for part in options])
    return [part.tolist() for part in total]


def chosen(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int) -> list[bool]:
    """Per example: has the right option the highest log-probability per UTF-8 byte? A tie is no success."""
    hits = []
    for part in (examples[i:i + size] for i in range(0, len(examples), size)):
        options = [(e.answers[0], *e.false_options) for e in part]
        # tokens.encode: with the tokenizer's own start token, since no template brings it
        scores = option_scores(model, [tokenizer.tokens.encode(e.question).ids for e in part],
                               [[tokenizer.encode(o) for o in row] for row in options])
        for row, logp in zip(options, scores):
            first, *rest = (value / len(o.strip().encode()) for value, o in zip(logp, row))
            hits.append(first > max(rest))
    return hits


def solved(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int) -> list[bool]:
    """GSM8K, per example: is the last number in the greedy answer, of up to 256 tokens, the right one?"""
    texts = greedy(model, tokenizer, [tokenizer.prompt(e.question) for e in examples], 256, size)
    numbers = [re.findall(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?", text) for text in texts]  # the minus of 5-3 is no sign
    return [bool(x) and float(x[-1].replace(",", "")) == float(e.answers[0]) for x, e in zip(numbers, examples)]


def utility(model: LM, tokenizer: Tokenizer, tasks: dict[str, list[Example]], n: int = 500, seed: int = 0,
            size: int = 16) -> dict:
    """US (C.1): {percent, n, low, high, tasks}, the mean over `load_utility`'s tasks, each on a seeded sample of n.

    Zero-shot. Tasks with false options: the raw text is the prompt, without the chat template, and options are
    tokenised apart. The others go through the template: GSM8K by its last number, TOFU's sets by ROUGE-L recall.
    A task has the interval of `score` or `mean_score`; the mean's is normal, from the tasks' standard errors.
    """
    results, errors = {}, []
    for name, examples in tasks.items():
        sample = random.Random(f"{seed} {name}").sample(examples, min(n, len(examples)))
        sample.sort(key=lambda e: len(e.question))  # like lengths together: less padding
        kind = chosen if sample[0].false_options else solved if name == "gsm8k" else recalls
        values = kind(model, tokenizer, sample, size)
        results[name] = (mean_score if kind is recalls else score)(values)
        errors.append(standard_error(values))
    mean = statistics.fmean(r["percent"] for r in results.values()) / 100
    return {**normal(mean, math.hypot(*errors) / len(errors), sum(r["n"] for r in results.values())), "tasks": results}


# ----------------------------------------------------------------------------------- the command line


def read_flags(kind: type, doc: str, argv: list[str] | None = None):
    """Fills the dataclass `kind` from the command line: a field is a flag, its comment the flag's help.

    A flag that is not given takes its value from <resume>/settings.json, else <model>/unlearn.json, else the field.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.M))
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(kind):
        value, flag = field.default, "--" + field.name.replace("_", "-")
        form = ({"action": "store_true"} if value is False else
                {"nargs": "+", "type": type(value[0])} if isinstance(value, tuple) else {"type": type(value)})
        parser.add_argument(flag, default=value, help=comments[field.name].replace("%", "%%"), **form)
    given = parser.parse_args(argv)
    for file in (Path(given.model) / "unlearn.json", Path(getattr(given, "resume", "") or "-") / "settings.json"):
        values = read_json(file, default={})
        if not isinstance(values, dict):
            raise ValueError(f"{file}: found a {type(values).__name__}, expected an object of flags")
        parser.set_defaults(**{k: v for k, v in values.items() if k in comments})
    values = vars(parser.parse_args(argv))
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def expect(**checks: tuple) -> None:
    """expect(lr=(value, ok, "a number above 0")): ValueError in one line for the first flag that is not ok."""
    for flag, (value, ok, wanted) in checks.items():
        if not ok:
            raise ValueError(f"--{flag.replace('_', '-')}: found {value!r}, expected {wanted}")


def run(main: Callable[[], None]) -> None:
    """Runs a command: what is wrong with its input ends in one line on stderr and status 1, not in a traceback."""
    try:
        main()
    except (OSError, ValueError, FloatingPointError, SafetensorError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


@dataclass
class Settings:
    model: str = "data/tiny"             # checkpoint directory or hub id
    forget: str = "data/faithun.json"    # FaithUn file, or TOFU's forget01
    retain: str = ""                     # TOFU's retain99, where --forget is TOFU's
    splits: str = ""                     # folder of FaithUn's split files; empty: faithun_splits beside --forget
    test_limit: int = 0                  # score RS on the first so many test items only; 0: all
    seed: int = 0                        # of the utility samples
    utility: str = ""                    # folder of the utility tasks' files, for US; empty: no US
    utility_n: int = 500                 # sample so many items of each utility task
    device: str = "cpu"                  # cpu, cuda, cuda:1, ...


def main() -> None:
    s = read_flags(Settings, __doc__)
    check_device(s.device)
    expect(utility_n=(s.utility_n, s.utility_n > 0, "a number above 0"))
    tasks = load_utility(s.utility) if s.utility else {}
    C_f, C_r, C_t = splits_of(s.forget, s.splits, s.test_limit, s.retain)
    model, tokenizer = load(s.model, device=s.device)
    result = {name: accuracy(model, tokenizer, examples)
              for name, examples in (("FS", C_f), ("RS", C_t), *([] if s.retain else [("retain", C_r)]))}
    if tasks:
        result["US"] = utility(model, tokenizer, tasks, s.utility_n, s.seed)
    logp, lead = margin(model, tokenizer, C_f)
    print(json.dumps({"model": s.model, **result, "forget_logp": logp, "forget_margin": lead}, indent=1))


def check_device(device: str) -> None:
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    kind, _, index = device.partition(":")
    expect(device=(device, kind in kinds and index in ("", *map(str, range(max(1, torch.cuda.device_count())))),
                   " or ".join(kinds) + " on this machine"))


if __name__ == "__main__":
    run(main)
