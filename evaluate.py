"""Scores a checkpoint: FS and RS of Section 6.2.1 with n and an interval, and the margin that measures recovery.

    python evaluate.py --model data/tiny

Dimensions: B sequences, K tokens.
"""
import argparse
import dataclasses
import inspect
import json
import math
import random
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import Example, collate, encode, load_faithun, mcqa_prompt, split
from model import LM, Tokenizer, answer_logprob, generate, load, read_json

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
    hits = [False] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    for part in (order[i:i + size] for i in range(0, len(order), size)):
        outputs = generate(model, [prompts[i] for i in part], budget, tokenizer.stop_ids)
        for i, ids in zip(part, outputs):
            hits[i] = normalise(tokenizer.decode(ids)) in {normalise(a) for a in examples[i].answers}
    return hits


def accuracy(model: LM, tokenizer: Tokenizer, examples: list[Example], seed: int = 0, size: int = 64) -> dict:
    """FS on C_f, RS on C_t (Section 6.2.1): MCQA accuracy in percent, with n and its 95 % Wilson interval."""
    return score(answered(model, tokenizer, examples, seed, size))


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
        lead.append(first - max(false, default=math.nan))
    return sum(truth) / len(truth), sum(lead) / len(lead)


def splits_of(path: str, folder: str, limit: int = 0) -> tuple[list[Example], list[Example], list[Example]]:
    """C_f, C_r, C_t of a FaithUn file; `folder` defaults to faithun_splits beside it, `limit` cuts C_t."""
    C_f, C_r, C_t = split(load_faithun(path), folder or Path(path).parent / "faithun_splits")
    return C_f, C_r, C_t[:limit or None]


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
    forget: str = "data/faithun.json"    # FaithUn file
    splits: str = ""                     # folder of FaithUn's split files; empty: faithun_splits beside --forget
    test_limit: int = 0                  # score RS on the first so many test items only; 0: all
    seed: int = 0                        # of the options' order
    device: str = "cpu"                  # cpu, cuda, cuda:1, ...


def main() -> None:
    s = read_flags(Settings, __doc__)
    check_device(s.device)
    C_f, C_r, C_t = splits_of(s.forget, s.splits, s.test_limit)
    model, tokenizer = load(s.model, device=s.device)
    result = {name: accuracy(model, tokenizer, examples, s.seed)
              for name, examples in (("FS", C_f), ("retain", C_r), ("RS", C_t))}
    logp, lead = margin(model, tokenizer, C_f)
    print(json.dumps({"model": s.model, **result, "forget_logp": logp, "forget_margin": lead}, indent=1))


def check_device(device: str) -> None:
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    expect(device=(device, device.split(":")[0] in kinds, " or ".join(kinds) + " on this machine"))


if __name__ == "__main__":
    run(main)
