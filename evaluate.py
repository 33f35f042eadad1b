"""Scores a checkpoint, and asks of a pair whether unlearning erased or hid what it forgot.

    python evaluate.py --model data/tiny                              # FS, RS, FaithUn's other questions
    python evaluate.py --before data/tiny --after runs/ssiuu-tiny     # Eq. 1, 2, 4, 5, the lens: Figures 3-6

Dimensions: B sequences, K tokens, L blocks, S samples (x, y), n neurons.
"""
import argparse
import inspect
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn

from data import Batch, Example, belongs, check_fits, collate, encoded, load_faithun, load_tofu
from data import load_utility, mcqa_prompt, normalise, row_of, same, split, tofu_split
from model import LM, Count, Natural, Tokenizer, answer_logprob, check, fill, generate, here, load
from model import located, one_process, read_json, refuse, refusing, wanted, write_json

Share = Annotated[float, ("a number above 0, at most 1", lambda x: 0 < x <= 1)]
Rate = Annotated[float, ("a number above 0 and below 1", lambda x: 0 < x < 1)]
Amount = Annotated[float, ("a number, 0 or more", lambda x: x >= 0)]
Name = Annotated[str, ("a name", bool)]

# ------------------------------------------------------------------------------------------------ scores

def wilson(percent: float, n: int) -> dict:
    """{percent, n, low, high}: a rate over n items with its 95 % Wilson interval, all in percent."""
    p, z = percent / 100, 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (round(100 * max(0.0, min(1.0, (centre + s * half) / (1 + z * z / n))), 2) for s in (-1, 1))
    return {"percent": round(percent, 2), "n": n, "low": low, "high": high}

def score(values: list[float]) -> dict:
    """`wilson` at the mean of values in [0, 1], bool or float. Values of mean m vary by m (1 - m) at most, as
    right and wrong do: the interval is never narrower than what their own variance gives."""
    return wilson(100 * statistics.fmean(values), len(values))

def is_correct(text: str, example: Example) -> bool:
    """The matching rule, unpublished and ours: is the first line of `text` one of the accepted answers?
    What equals an option letter for letter decides at once; else case, Unicode form and what `normalise`
    takes from both ends do not count. Nothing, or what a false option comes to, is wrong."""
    options = [*example.answers, *example.false_options]
    line = text.strip().split("\n")[0].strip()
    if line in options:
        return line in example.answers
    found = normalise(line)
    matches = [option for option in options if normalise(option) == found]
    return bool(found and matches) and all(option in example.answers for option in matches)

def answered(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> list[bool]:
    """Per example: is the greedy answer to Table 3's question right (`is_correct`)?
    The order of an item's options depends on the item alone: every model, subset and step sees one prompt.
    Generation stops four tokens past the longest option, room for quotes around it."""
    questions = [mcqa_prompt(e, random.Random(f"0 {e.question}")) for e in examples]
    options = [o for e in examples for o in (*e.answers, *e.false_options)]
    longest = max((len(tokenizer.answer(o)) for o in options), default=0)
    texts = greedy(model, tokenizer, questions, longest + 4, size)
    return [is_correct(text, e) for text, e in zip(texts, examples)]

def greedy(model: LM, tokenizer: Tokenizer, questions: list[str], limit: int, size: int) -> list[str]:
    def answers(prompts: list[list[int]]) -> list[str]:
        return [tokenizer.decode(ids) for ids in generate(model, prompts, limit, tokenizer.stop_ids)]
    return in_parts(answers, [tokenizer.prompt(question) for question in questions], size, len)

def in_parts(measure: Callable[[list], list], items: list, size: int, length: Callable) -> list:
    """measure(items), a value each, taken on `size` items at a time, like lengths together: less padding."""
    order, found = sorted(range(len(items)), key=lambda i: length(items[i])), {}
    for part in (order[i:i + size] for i in range(0, len(order), size)):
        found |= zip(part, measure([items[i] for i in part]))
    return [found[i] for i in range(len(items))]

def item_scores(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> list[float]:
    """Per example in [0, 1]: right or wrong, or ROUGE-L recall where there are no options (6.2.1)."""
    if all(e.false_options for e in examples):
        return answered(model, tokenizer, examples, size=size)
    return recalls(model, tokenizer, examples, size)

def accuracy(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> dict:
    """FS on C_f, RS on C_t (Section 6.2.1): the `score` of `item_scores`."""
    return score(item_scores(model, tokenizer, examples, size))

def margin(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> tuple[float, float]:
    """Recovery on a finer scale than accuracy, nats per token, on the plain question: the mean over examples
    of log P(answer), and of its lead over the best false option (log P again where there are none: TOFU)."""
    options = [[tokenizer.answer(o) for o in (e.answers[0], *e.false_options)] for e in examples]
    truth, lead = [], []
    scores = option_scores(model, [tokenizer.prompt(e.question) for e in examples], options, size)
    for row, logp in zip(options, scores):
        first, *false = (value / len(o) for value, o in zip(logp, row))
        truth.append(first)
        lead.append(first - max(false, default=0.0))
    if not math.isfinite(sum(truth) + sum(lead)):
        raise FloatingPointError("log P of an answer is no finite number: the model's logits overflow")
    return statistics.fmean(truth), statistics.fmean(lead)

def other_questions(path: str, C: list[Example], C_f: list[Example]) -> dict[str, list[Example]]:
    """FaithUn's further questions about the facts of C (Yang et al. 2025): paraphrases, questions that need
    the fact for a hop, and other facts with the same answer, which are to be retained and are none of C_f."""
    parts, found = {"paraphrased": "hop1_test", "multi_hop": "hop2_test", "same_answer": "same_object"}, {}
    for name, part in parts.items():
        questions = load_faithun(path, part)
        found[name] = {e.question: e for fact in C for e in questions if belongs(e, part, fact)}
    for e in C_f:
        found["same_answer"].pop(e.question, None)
    return {name: list(asked.values()) for name, asked in found.items() if asked}

def scored_sets(s: "Data", sets: tuple) -> dict[str, list[Example]]:
    """{score: its examples}: FS, RS, and for FaithUn the accuracy on C_r and on other questions about C_f."""
    C_f, C_r, C_t = sets
    found = {"FS": C_f, "RS": C_t}
    if s.retain:  # TOFU: C_t is a part of C_r, and there are no other questions
        return found
    return found | {"retain": C_r, **other_questions(s.forget, C_f, C_f)}

def splits_of(s: "Data") -> tuple[list[Example], list[Example], list[Example]]:
    """C_f, C_r, C_t. FaithUn: one file and its split files. TOFU: --forget and --retain are its two files,
    and C_t the first 300 of C_r, as in its own code. `--test-limit` cuts C_t."""
    if s.retain:
        if s.splits:
            refuse(f"--splits: found {s.splits!r} beside --retain, expected one of the two")
        C_f, C_r = tofu_split(load_tofu(s.forget), load_tofu(s.retain), s.fold)
        C_t = C_r[:s.test_limit or 300]
    else:
        folder = s.splits or Path(s.forget).parent / "faithun_splits"
        C_f, C_r, C_t = split(load_faithun(s.forget), folder, s.fold)
    if len({e.answers[0] for e in C_f}) < 2:
        refuse(f"{s.forget}: found {len(C_f)} items, expected at least two different answers")
    forgotten = {same(e) for e in C_f}
    for e in (*C_r, *C_t):
        if same(e) in forgotten:
            raise ValueError(f"{e.where}: found {e.question!r:.60} to be kept, which is to be forgotten too")
    return C_f, C_r, C_t[:s.test_limit]

# --------------------------------------------------------------------------------- ROUGE-L and utility

def rouge_l_recall(prediction: str, reference: str) -> float:
    """ROUGE-L recall with stems, in [0, 1] (Lin, 2004), by the library that TOFU's own code uses."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("rouge_score is not installed, TOFU needs it: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return scorer.score(reference, prediction)["rougeL"].recall

def recalls(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64,
            max_new_tokens: int = 200) -> list[float]:
    """Per example the ROUGE-L recall of the greedy answer to the plain question: TOFU's score.
    The paper gives no limit of new tokens; 200 is that of other implementations of TOFU."""
    texts = greedy(model, tokenizer, [e.question for e in examples], max_new_tokens, size)
    return [rouge_l_recall(text, e.answers[0]) for text, e in zip(texts, examples)]

def mismatched_tau(examples: list[Example], seed: int = 0) -> float:
    """C.1's threshold on TOFU (0.1971 there): the mean recall in [0, 1] when every question gets another
    item's answer, unlike its own, drawn from the seed."""
    rng, values = random.Random(seed), []
    for e in examples:
        wrong = [x.answers[0] for x in examples if x.answers[0] != e.answers[0]]
        values.append(rouge_l_recall(wrong[rng.randrange(len(wrong))], e.answers[0]))
    return statistics.fmean(values)

@torch.no_grad()
def option_scores(model: LM, prompts: list, options: list, size: int = 64) -> list[list[float]]:
    """log P(option | prompt) in nats. A prompt is a list of token ids, and has a list of options like it."""
    def scores(rows: list) -> list[float]:
        return answer_logprob(model, collate(rows, model.device)).tolist()
    rows = [row_of(x, y) for x, part in zip(prompts, options) for y in part]
    found = iter(in_parts(scores, rows, size, lambda row: len(row[0])))
    return [[next(found) for _ in part] for part in options]

def likeliest(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int) -> list[bool]:
    """Per example: has the right option the highest log-probability per UTF-8 byte? A tie is no success."""
    options, hits = [(e.answers[0], *e.false_options) for e in examples], []
    scores = option_scores(model, [tokenizer.raw(e.question) for e in examples],
                           [[tokenizer.encode(o) for o in row] for row in options], size)
    for row, logp in zip(options, scores):
        first, *rest = (value / len(o.strip().encode()) for value, o in zip(logp, row))
        hits.append(first > max(rest))
    return hits

def solved(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int) -> list[bool]:
    """GSM8K, per example: is the last number in the greedy answer, of up to 256 tokens, the right one?"""
    texts = greedy(model, tokenizer, [e.question for e in examples], 256, size)
    numbers = [re.findall(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?", text) for text in texts]  # 5-3: no sign
    last = [float(x[-1].replace(",", "")) if x else math.nan for x in numbers]
    return [x == float(e.answers[0]) for x, e in zip(last, examples)]

def utility(model: LM, tokenizer: Tokenizer, tasks: dict[str, list[Example]], n: int = 500, seed: int = 0,
            size: int = 16) -> dict:
    """US (6.2.1): {percent, n, low, high, tasks}, the mean over `load_utility`'s tasks, each on a seeded
    sample of n. Zero-shot. Tasks with false options: the raw text is the prompt, without the chat template,
    and options are tokenised apart. GSM8K (its last number) and TOFU's sets (ROUGE-L) go through it.
    Its interval, `score`'s, counts k tasks times the smallest sample: p (1 - p) is concave in a task's p."""
    results = {}
    for name, examples in tasks.items():
        sample = random.Random(f"{seed} {name}").sample(examples, min(n, len(examples)))
        kind = likeliest if sample[0].false_options else solved if name == "gsm8k" else recalls
        results[name] = score(kind(model, tokenizer, sample, size))
    mean = statistics.fmean(task["percent"] for task in results.values())
    return {**wilson(mean, len(results) * min(task["n"] for task in results.values())), "tasks": results}

# ------------------------------------------------------- erased or hidden? Section 4, Figures 3 to 6

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FFN = MODULES[4:]

@contextmanager
def hooked(layers: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """Inside, hook(layer, inputs, output) sees each layer's output; a tensor that it returns replaces it."""
    with ExitStack() as handles:
        for layer in layers:
            handles.enter_context(layer.register_forward_hook(hook))
        yield

def neuron_attribution(model: LM, batch: Batch, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    """A = h dP(y|x)/dh at the outputs h of the linear modules, (B, K, n) each (Eq. 1). A batch gives what
    one at a time gives; padding (where not batch.real()) has h but no influence: its A is 0."""
    one_process("neuron attribution (KLUE, --before)")
    layers, h = {layer: name for name, layer in model.named_modules() if name.endswith(modules)}, {}
    with hooked(layers, lambda layer, _, out: h.update({layers[layer]: out})):
        P = answer_logprob(model, batch).exp()
    grads = torch.autograd.grad(P.sum(), list(h.values()))  # of the sum: examples do not touch
    return {name: (x * g).detach().view(*batch.ids.shape, -1) for (name, x), g in zip(h.items(), grads)}

def influence(model: LM, rows: list, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    """max_k and min_k of A over tokens, for every (x, y) and neuron: {module: (2, S, n)} (Eq. 2, 4, 5).
    The last token of y predicts nothing and is left out: its A = 0 would bound every maximum."""
    found = {}
    for row in rows:
        for name, A in neuron_attribution(model, collate([row], model.device), modules).items():
            A = A[0, :-1]                                                                   # (K-1, n)
            found.setdefault(name, []).append(torch.stack((A.amax(0), A.amin(0))).cpu())
    return {name: torch.stack(extremes, 1) for name, extremes in found.items()}

def influence_variation(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:  # 2x (2, S, n) -> 2x (n,)
    """(D_pos, D_neg): knowledge erased and knowledge hidden, per neuron (Eq. 4, 5 with Appendix A's clamps).
    Over-unlearning, a maximum below 0 afterwards, is not erasure; a change towards the answer is nothing."""
    D_pos = (before[0] - after[0].clamp(min=0)).mean(0)                                     # Eq. 4
    D_neg = (before[1] - after[1]).mean(0)                                                  # Eq. 5
    return D_pos.clamp(min=0), D_neg.clamp(min=0)

def top(D: Tensor, m: int) -> float:
    """The m largest variations of neurons, added up (Figure 3b; 3c at m = 100), in units of P."""
    return D.topk(min(m, len(D))).values.sum().item()

def intervals(measure: Callable[[Tensor], list[float]], n: int) -> list[list[float]]:
    """[value, low, high] of each number measured on items 0 to n-1: the jackknife's normal 95 % interval. No
    bootstrap: items drawn twice add noise to each neuron's mean, which lifts a top-m sum, lowers a rho."""
    value, items = torch.tensor(measure(torch.arange(n))), torch.arange(n)
    left_out = torch.tensor([measure(items[items != i]) for i in range(n)])
    half = 1.96 * ((n - 1) * left_out.var(0, correction=0)).sqrt()
    return torch.stack((value, value - half, value + half), 1).tolist()

def hiding(before: Tensor, after: Tensor, m: int = 100) -> dict:  # (2, S, n) twice
    """Section 4 in numbers: D+ and D- accumulated over the top m neurons with intervals, the share D- has of
    both (above 0.5 more was hidden than erased; it says little where P was near 1 before: its gradient and
    with it D+ vanish there), and the curves of Figure 3b."""
    def measured(items: Tensor) -> list[float]:
        pos, neg = (top(D, m) for D in influence_variation(before[:, items], after[:, items]))
        return [pos, neg, neg / (pos + neg) if pos + neg else 0.5]
    pos, neg, share = ([max(0.0, x) for x in triple] for triple in intervals(measured, before.shape[1]))
    points = decades(before.shape[2])
    D_pos, D_neg = ([top(D, k) for k in points] for D in influence_variation(before, after))
    return {"neurons": before.shape[2], "m": min(m, before.shape[2]), "D_pos": pos, "D_neg": neg,
            "share": [min(1.0, x) for x in share], "curves": {"m": points, "D_pos": D_pos, "D_neg": D_neg}}

def decades(n: int) -> list[int]:
    """1, 2, 5, 10, ... below n, and n: where curves over sorted neurons are read."""
    return [x for i in range(len(str(n))) for x in (10 ** i, 2 * 10 ** i, 5 * 10 ** i) if x < n] + [n]

def correlation(a: Tensor, b: Tensor) -> float:  # (n,), (n,)
    """Pearson's rho (Figure 6b); 0 where one of them is constant."""
    return torch.corrcoef(torch.stack((a, b)).double())[0, 1].nan_to_num(0).item()

@torch.no_grad()
def logit_lens(model: LM, rows: list, wrong: list) -> Tensor:  # -> (L, S)
    """Lead of y over a distractor after each of L blocks, nats per token: last norm and head on the states
    there, each answer with its own tokens (Section 6.3). Figure 4 counts how often it is > 0."""
    def read(row: tuple) -> Tensor:  # -> (L,)
        batch, states = collate([row], model.device), []
        with hooked(model.model.layers, lambda layer, _, out: states.append(out)):
            model.hidden(batch.ids)
        logp = [answer_logprob(model, batch, model.model.norm(h)) for h in states]
        return torch.cat(logp) / batch.answer.sum()
    return torch.stack([read(row) - read(other) for row, other in zip(rows, wrong)], 1)

def distractors(examples: list[Example], seed: int = 0) -> list[Example]:
    """Each question with a wrong answer: a false option, or in TOFU another item's answer."""
    draw, answers = random.Random(f"distractor {seed}"), sorted({e.answers[0] for e in examples})
    return [Example(e.question, [draw.choice(e.false_options or [a for a in answers if a not in e.answers])])
            for e in examples]

def by_module(before: dict[str, Tensor], after: dict[str, Tensor], m: int = 100) -> dict:
    """Figure 5: {D_pos, D_neg: {module: [mean over its top m neurons, a number a block]}}."""
    result = {"D_pos": {}, "D_neg": {}}
    for name in before:
        for key, D in zip(result, influence_variation(before[name], after[name])):
            result[key].setdefault(name.rpartition(".")[2], []).append(top(D, m) / min(m, len(D)))
    return result

def by_rank(x: Tensor) -> dict:  # (2, n)
    """Figure 6a: the attributions of n neurons in order, largest maximum and least minimum first."""
    rank = torch.tensor(decades(x.shape[1]))
    most, least = x[0].sort(descending=True).values, x[1].sort().values
    return {"rank": rank.tolist(), "max": most[rank - 1].tolist(), "min": least[rank - 1].tolist()}

def stability(a: Tensor, b: Tensor) -> dict:  # (2, S, n) twice
    """Figure 6b: rho over neurons of two checkpoints' attributions, means over items, with intervals."""
    rho = intervals(lambda i: [correlation(x[i].mean(0), y[i].mean(0)) for x, y in zip(a, b)], a.shape[1])
    return dict(zip(("max", "min"), rho))

def analyse(s: "Settings", paths: dict[str, str]) -> dict:
    """analysis.json: Sections 4 and 6.3 to 6.5 for two or three checkpoints {before, after, attacked}."""
    one_process("--before")
    C_f, start, checkpoints, extremes, shapes = splits_of(s)[0], time.time(), {}, {}, {}
    for name, path in {name: located(path) for name, path in paths.items()}.items():
        model, tokenizer = load(path, device=s.device)
        check_fits(model, tokenizer, C_f)
        rows, wrong = encoded(tokenizer, C_f), encoded(tokenizer, distractors(C_f, s.seed))
        shapes[name] = [(n, p.shape) for n, p in model.named_parameters()], rows
        if shapes[name] != shapes["before"]:
            refuse(f"{path}: found other weights or tokens than in {s.before}, expected the same model later")
        with torch.no_grad():
            P = [answer_logprob(model, collate([row], model.device)).exp().item() for row in rows]
        checkpoints[name] = {"FS": accuracy(model, tokenizer, C_f, s.eval_batch),
                             "margin": margin(model, tokenizer, C_f, s.eval_batch)[1],
                             "P": statistics.fmean(P),
                             "lens": [score(x) for x in (logit_lens(model, rows, wrong) > 0).tolist()]}
        extremes[name] = influence(model, rows)
        print(f"{name} {path}: FS {cell(checkpoints[name]['FS'])}  {time.time() - start:.0f}s", flush=True)
    A = {name: torch.cat(list(modules.values()), 2) for name, modules in extremes.items()}      # (2, S, n)
    pairs = [pair for pair in (("before", "after"), ("after", "attacked")) if pair[1] in A]
    return {"n": len(C_f), "forget": s.forget, "paths": paths, "checkpoints": checkpoints,
            "variation": hiding(A["before"], A["after"]),                                       # Figure 3
            "by_module": by_module(extremes["before"], extremes["after"]),                      # Figure 5
            "attribution": {name: by_rank(x.mean(1)) for name, x in A.items()},                 # Figure 6a
            "correlation": {f"{p} {q}": stability(A[p], A[q]) for p, q in pairs}}               # Figure 6b

def summary(r: dict) -> str:
    """What an analysis says, for a person."""
    def interval(x: list[float]) -> str:
        return f"{x[0]:.3g} [{x[1]:.2g}, {x[2]:.2g}]"
    x, end = r["variation"], r["checkpoints"]["after"]["lens"][-1]
    P = r["checkpoints"]["before"]["P"]
    lines = [f"P before {P:.2f}, erased D+ {interval(x['D_pos'])}, hidden D- {interval(x['D_neg'])}: "
             f"share of D- {interval(x['share'])} (top {x['m']} of {x['neurons']}, n={r['n']})",
             f"logit lens: {cell(end)} % prefer the answer after the last block"]
    for pair, rho in r["correlation"].items():
        lines.append(f"{pair}: rho of maxima {interval(rho['max'])}, minima {interval(rho['min'])}")
    return "\n".join(lines)

def cell(x: dict | None) -> str:
    """A score as a table has it: percent [interval] n."""
    return f"{x['percent']:.1f} [{x['low']:.0f}, {x['high']:.0f}] n={x['n']}" if x and "percent" in x else "-"

def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))

# ----------------------------------------------------------------------------------- the command line

ROOT = Path(__file__).resolve().parent

@dataclass
class Data:
    """The flags that all commands share: a field is a flag, its comment the help, its type the check."""
    model: Name = "data/tiny"            # checkpoint directory or hub id
    forget: Name = "data/faithun.json"   # FaithUn's file; with --retain TOFU's forget01, or your rows like it
    retain: Name | None = None           # TOFU's retain99, or your own: JSON lines of question and answer
    splits: Name | None = None           # folder of FaithUn's split files; faithun_splits beside --forget
    fold: Natural = 0                    # 0: the published forget set; 1, 2, ...: other, disjoint ones
    test_limit: Count | None = None      # score so many items of C_t; all of FaithUn's, 300 of TOFU's
    seed: Natural = 0                    # of every random stream
    eval_batch: Count = 64               # sequences at a time when scoring
    device: str = "cpu"                  # cpu, cuda, cuda:1, mps
    traceback: bool = False              # show where an unforeseen error came from

@dataclass
class Scored(Data):
    utility: Name | None = None          # folder of the utility tasks' files (MMLU, ..., or TOFU's), for US
    utility_n: Count = 500               # items of each utility task (6.2.1)

@cache
def comments(kind: type) -> dict[str, str]:
    """{field: the comment behind it} of a dataclass."""
    source = "".join(inspect.getsource(each) for each in kind.__mro__[:-1])
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.M))

def read_flags(kind: type, doc: str, argv: list[str] | None = None):
    """The dataclass `kind`, filled from flags, else from RESUME/settings.json, else as `settings_for`."""
    types, helps = get_type_hints(kind, include_extras=True), comments(kind)
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     epilog="MODEL/unlearn.json may set numbers; what it sets is said.")
    parser.error = lambda message: refuse(message.removeprefix("argument "))
    for field in fields(kind):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shown = "" if default is None or default is False else f" ({default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **flag(types[field.name]),
                            help=helps[field.name].replace("%", "%%") + shown)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        if "name" in given:
            refuse(f"--name: found {given['name']!r} beside --resume, expected one of the two")
        file = Path(given["resume"], "settings.json")
        Run = Annotated[dict, ("a run's, a value for each flag", lambda x: x.keys() == types.keys())]
        s = fill(kind, check(read_json(file).get("settings"), Run, f"{file}: settings are") | given, file)
    else:
        s = settings_for(kind, given)
    with refusing(f"--device: found {s.device!r}, expected one that works on this machine"):
        if s.device == "cuda" and here()[1] > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=s.device).item()  # meta's cannot be read
    return s

def flag(kind) -> dict:
    """How argparse reads a `kind`, or each of a tuple of them: as a number where the text is refused."""
    if kind is bool:
        return {"action": "store_true"}
    lists = [x for x in (kind, *get_args(kind)) if get_origin(x) is tuple]
    one = get_args(lists[0])[0] if lists else kind

    def read(text: str):
        value = text
        for number in (float, int) if wanted(text, one) and re.fullmatch(r"[-+.a-zA-Z0-9]+", text) else ():
            with suppress(ValueError):
                value = number(text)
        if expected := wanted(value, one).removesuffix(" or null"):  # no flag can say null
            raise argparse.ArgumentTypeError(f"found {value!r}, expected {expected}")
        return value
    values = {"metavar": "|".join(map(str, get_args(kind)))} if get_origin(kind) is Literal else {}
    return {"type": read, "nargs": "+" if lists else None, **values}

def settings_for(kind: type, given: dict):
    """The first that has a value: `given`; MODEL/unlearn.json, under this script's name; settings.json of the
    run whose model it is, for the facts it forgot alone; the default. Paths are as seen from here.
    unlearn.json sets numbers alone: no names, paths or devices. What the two files set is said on stderr."""
    paths = {f.name: os.path.relpath(ROOT / f.default) for f in fields(kind)
             if str(f.default).startswith("data/") and (ROOT / f.default).exists()}
    model, script = (paths | given).get("model", "data/tiny"), Path(inspect.getfile(kind)).name
    file = Path(model, "unlearn.json")
    sections = read_json(file, default={})
    for key in sections:
        check(key, Literal["ssiuu.py", "attack.py", "evaluate.py"], f"{file}: found")
    own = check(sections.get(script, {}), dict, f"{file}: {script} is")
    for key, value in own.items():
        check(value, float | tuple[float, ...], f"{file}: {script} {key} is")
    fill(kind, own, f"{file}: {script}")  # so that what a flag overrides is checked too
    run_file = Path(given.get("after") or getattr(kind, "after", None) or model, "settings.json")
    facts = {} if script == "ssiuu.py" or "forget" in given else facts_of(run_file)
    for source, values in ((file, own), (run_file, facts)):
        if used := [f"{key} {value}" for key, value in values.items() if key not in given]:
            print(f"{source} sets {', '.join(used)}", file=sys.stderr)
    return fill(kind, paths | facts | own | given, f"{file}: {script}")  # the later goes before

def facts_of(file: Path) -> dict:
    """The flags of runs/<name>/settings.json that say which facts it forgot; paths as seen from here."""
    was = check(read_json(file, default={}).get("settings", {}), dict, f"{file}: settings is")
    facts = {key: was[key] for key in ("forget", "retain", "splits", "fold") if was.get(key) is not None}
    fill(Data, facts, file)
    home = Path(os.path.abspath(file)).parents[2]  # where runs/ lies, maybe as a link, and the run was made
    return {key: os.path.relpath(home / x) if isinstance(x, str) else x for key, x in facts.items()}

def check_folder(name: str, path: str | Path) -> None:
    """Refuses, before the work, a folder that could not be made or written to; makes nothing."""
    there = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        refuse(f"{name}: found {str(path)!r}, expected a folder that can be made and written to")

@contextmanager
def making(path: str | Path) -> Iterator[None]:
    """Inside, `path` is a folder, taken by making it, by process 0; after an error it is gone."""
    first = here()[0] == 0
    if first:
        Path(path).mkdir(parents=True)
    try:
        yield
    except BaseException:
        if first:
            shutil.rmtree(path)
        raise

def run(main: Callable[[], None]) -> None:
    """Runs a command: wrong input ends in one line on stderr and status 1, not in a traceback."""
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # closed by >&-
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode costs no result
    if distributed.is_available() and distributed.is_torchelastic_launched():  # by torchrun
        distributed.init_process_group()
    if here()[0]:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        main()
        if here()[1] > 1:
            distributed.barrier()  # gloo aborts where one process is gone while another still ends its work
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as e:
        if here()[0]:  # what ends all of them is said once: torchrun stops the others meanwhile
            sys.stderr = sys.__stderr__
            time.sleep(5)
        if "--traceback" in sys.argv:
            raise
        foreseen = (OSError, ValueError, FloatingPointError, SafetensorError, torch.OutOfMemoryError)
        text, place = " ".join(str(e).split()), traceback.extract_tb(e.__traceback__)[-1]
        if not isinstance(e, foreseen):
            text = f"{type(e).__name__}, {Path(place.filename).name}:{place.lineno}: {text}; see --traceback"
        sys.exit(f"error: {text:.600}")

@dataclass
class Settings(Scored):
    before: Name | None = None           # analyse a pair: the model before unlearning, ...
    after: Name | None = None            # ... after it, ...
    attacked: Name | None = None         # ... and after an attack (attack.py --save)
    out: Name | None = None              # folder for analysis.json; --after

def scores_of(model: LM, tokenizer: Tokenizer, parts: dict, tasks: dict, s: Scored) -> dict:
    """The accuracy on each of `scored_sets`, log P of C_f and its margin, and US."""
    logp, lead = margin(model, tokenizer, parts["FS"], s.eval_batch)
    found = {name: accuracy(model, tokenizer, C, s.eval_batch) for name, C in parts.items()}
    found |= {"forget_logp": logp, "forget_margin": lead}
    if tasks:
        found["US"] = utility(model, tokenizer, tasks, s.utility_n, s.seed, max(1, s.eval_batch // 4))
    return found

def main() -> None:
    s = read_flags(Settings, __doc__)
    paths = {name: getattr(s, name) for name in ("before", "after", "attacked") if getattr(s, name)}
    if paths or s.out:
        if not (s.before and s.after):
            refuse(f"--before, --after, --out: found {', '.join(paths) or s.out}, expected the first two")
        for name in [name for name in ("utility", "test_limit") if getattr(s, name)]:
            refuse(f"--{name.replace('_', '-')}: found beside --before, expected none: a pair is not scored")
        folder = Path(s.out or s.after)
        if not s.out and not folder.is_dir():
            refuse(f"--out: found nothing, expected a folder, since --after {s.after} is none")
        check_folder("--out", folder)
        result = analyse(s, paths)
        write_json(folder / "analysis.json", result)
        return print(f"{summary(result)}\n{folder / 'analysis.json'}", flush=True)
    tasks, sets = load_utility(s.utility) if s.utility else {}, splits_of(s)
    parts = scored_sets(s, sets)
    if not s.retain:
        about_test = other_questions(s.forget, sets[2], sets[0])
        parts |= {f"test_{name}": C for name, C in about_test.items()}
    model, tokenizer = load(s.model, device=s.device)
    check_fits(model, tokenizer, [e for C in (*parts.values(), *tasks.values()) for e in C])
    print(json.dumps({"model": s.model, **scores_of(model, tokenizer, parts, tasks, s)}, indent=1))

if __name__ == "__main__":
    run(main)
