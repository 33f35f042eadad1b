"""Scores a checkpoint: FS and RS of Section 6.2.1 and US with n and an interval, and the margin that measures recovery.

    python evaluate.py --model data/tiny
    python evaluate.py --model data/tiny --utility FOLDER
    python evaluate.py --before data/tiny --after runs/ssiuu-tiny           # erased or hidden?
    python evaluate.py --runs runs/a runs/b                                 # side by side, and Figure 7

Dimensions: B sequences, K tokens.
"""
import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import math
import random
import re
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from data import Batch, Example, collate, encode, load_faithun, load_tofu, load_utility, mcqa_prompt, split
from model import LM, Tokenizer, answer_logprob, generate, load, prefill, read_json, vocabulary_logprob, write_json

# ------------------------------------------------------------------------------------------------ scores


def wilson(percent: float, n: int) -> dict:
    """{percent, n, low, high}: a rate over n items with its 95 % Wilson interval, all in percent."""
    p, z = percent / 100, 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (round(100 * max(0.0, min(1.0, (centre + s * half) / (1 + z * z / n))), 2) for s in (-1, 1))
    return {"percent": round(percent, 2), "n": n, "low": low, "high": high}


def score(hits: list[bool]) -> dict:
    """`wilson` of a list of outcomes."""
    return wilson(100 * sum(hits) / len(hits), len(hits))


def standard_error(values: list[float]) -> float:
    """Of the mean of values in [0, 1]; equal ones, or one alone, say nothing and get the largest deviation, 0.5."""
    return (len(values) > 1 and statistics.stdev(values) or 0.5) / math.sqrt(len(values))


def normal(mean: float, error: float, n: int) -> dict:
    """Like `score`, of a mean in [0, 1] and its standard error: the 95 % interval is the normal one, clipped."""
    low, high = (round(100 * max(0.0, min(1.0, mean + side * 1.96 * error)), 2) for side in (-1, 1))
    return {"percent": round(100 * mean, 2), "n": n, "low": low, "high": high}


def mean_score(values: list[float]) -> dict:
    """Like `score`, of values in [0, 1], with `normal`'s interval."""
    return normal(statistics.fmean(values), standard_error(values), len(values))


def normalise(text: str) -> str:
    """The matching rule: the first line, without case and without space or punctuation at its ends."""
    return text.strip().split("\n")[0].casefold().strip(string.whitespace + string.punctuation)


def answered(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> list[bool]:
    """Per example: is the greedy answer to Table 3's question, after `normalise`, one of the accepted answers?

    The order of an item's options depends on the item alone, so every model, subset and step sees the same
    prompt. Generation stops four tokens past the longest option: nothing longer could match.
    """
    prompts = [tokenizer.prompt(mcqa_prompt(e, random.Random(f"0 {e.question}"))) for e in examples]
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


def margin(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int = 64) -> tuple[float, float]:
    """Recovery without steps, in nats per token, on the plain question: the mean over examples of log P(answer),
    and of its lead over the best false option."""
    options = [[tokenizer.answer(o) for o in (e.answers[0], *e.false_options)] for e in examples]
    truth, lead = [], []
    scores = option_scores(model, [tokenizer.prompt(e.question) for e in examples], options, size)
    for row, logp in zip(options, scores):
        first, *false = (value / len(o) for value, o in zip(logp, row))
        truth.append(first)
        lead.append(first - max(false, default=0.0))
    return statistics.fmean(truth), statistics.fmean(lead)


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
def option_scores(model: LM, prompts: list[list[int]], options: list[list[list[int]]], size: int = 64
                  ) -> list[list[float]]:
    """log P(option | prompt) in nats for the tokens of every prompt's options; each prompt is computed once."""
    if len(prompts) > size:
        return sum((option_scores(model, prompts[i:i + size], options[i:i + size], size)
                    for i in range(0, len(prompts), size)), [])
    # In front of an option stands its prompt's last token, whose state predicts the first; its id is never read.
    rows = [([0] + option, [False] + [True] * len(option)) for part in options for option in part]
    batch = collate(rows, model.device)                                                               # (R, T + 1)
    T = batch.ids.shape[1] - 1
    last, length, cache = prefill(model, prompts, T - 1)
    owner = torch.tensor([i for i, part in enumerate(options) for _ in part], device=model.device)    # (R,)
    h = last[owner][:, None]                                                                          # (R, 1, D)
    if T > 1:
        # An option's tokens take the slots of the prompt's pads; its own pads lie behind them, where nothing looks.
        positions = length[owner][:, None] + torch.arange(T - 1, device=model.device)
        cache = [(keys[owner], values[owner]) for keys, values in cache]
        h = torch.cat((h, model.hidden(batch.ids[:, 1:-1], positions, cache)), 1)                     # (R, T, D)
    return [part.tolist() for part in answer_logprob(model, batch, h).split([len(part) for part in options])]


def chosen(model: LM, tokenizer: Tokenizer, examples: list[Example], size: int) -> list[bool]:
    """Per example: has the right option the highest log-probability per UTF-8 byte? A tie is no success."""
    options, hits = [(e.answers[0], *e.false_options) for e in examples], []
    # tokens.encode: with the tokenizer's own start token, since no template brings it
    scores = option_scores(model, [tokenizer.tokens.encode(e.question).ids for e in examples],
                           [[tokenizer.encode(o) for o in row] for row in options], size)
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


# ------------------------------------------------------- erased or hidden? Section 4, Figures 3 to 6

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FFN = MODULES[4:]


@contextmanager
def hooked(layers: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """Inside, hook(layer, inputs, output) sees each layer's output, and replaces it where it returns a tensor."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def neuron_attribution(model: LM, batch: Batch, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    """A = h dP(y|x)/dh at the outputs h of the linear modules, (B, K, n) each (Eq. 1); a batch equals one at a time.

    Padding (where not batch.real()) has h but no influence: its A is 0.
    """
    layers, h = {layer: name for name, layer in model.named_modules() if name.endswith(modules)}, {}
    with hooked(layers, lambda layer, _, out: h.update({layers[layer]: out})):
        P = answer_logprob(model, batch).exp()
    grads = torch.autograd.grad(P.sum(), list(h.values()))  # examples do not touch: the sum's gradient is each one's
    return {name: (x * g).detach().view(*batch.ids.shape, -1) for (name, x), g in zip(h.items(), grads)}


def influence(model: LM, rows: list, modules: tuple[str, ...] = MODULES, levels: tuple[str, ...] = ("neuron",)
              ) -> dict[str, dict[str, Tensor]]:
    """max_k and min_k of A over tokens for every (x, y): {level: {module: (2, S, n)}} (Eq. 2, 4, 5).

    Levels: neuron, head (of q, k, v; the sum of its neurons' A, which is Eq. 1 of the head as a vector) and module.
    One (x, y) at a time. The last token of y predicts nothing and is left out: its A = 0 would bound every maximum.
    """
    found = {level: {} for level in levels}
    for row in rows:
        for name, A in neuron_attribution(model, collate([row], model.device), modules).items():
            widths = {"neuron": 1, "module": A.shape[2]}
            widths |= {"head": model.config.head_dim} if name.endswith(MODULES[:3]) else {}
            for level in set(levels) & set(widths):
                x = A[0, :-1].unflatten(1, (-1, widths[level])).sum(2)                      # (K-1, n)
                found[level].setdefault(name, []).append(torch.stack((x.amax(0), x.amin(0))).cpu())
    return {level: {name: torch.stack(x, 1) for name, x in part.items()} for level, part in found.items()}


def influence_variation(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:  # (2, S, n) twice -> (n,) twice
    """(D_pos, D_neg): knowledge erased and knowledge hidden, per neuron (Eq. 4, 5 with Appendix A's clamps).

    Over-unlearning, a maximum below 0 afterwards, does not count as erased; a change towards the answer, not at all.
    """
    D_pos = (before[0] - after[0].clamp(min=0)).mean(0)                                     # Eq. 4
    D_neg = (before[1] - after[1]).mean(0)                                                  # Eq. 5
    return D_pos.clamp(min=0), D_neg.clamp(min=0)


def top(D: Tensor, m: int) -> float:
    """The accumulated variation of the m neurons with the largest (Figure 3b; 3c at m = 100), in units of P."""
    return D.topk(min(m, len(D))).values.sum().item()


def intervals(measure: Callable[[Tensor], list[float]], n: int) -> list[list[float]]:
    """[value, low, high] of each number measured on items 0 to n-1: the jackknife's normal 95 % interval over items.

    Not a bootstrap: an item drawn twice adds noise to each neuron's mean, which lifts a top-m sum and lowers a rho.
    """
    value, items = torch.tensor(measure(torch.arange(n))), torch.arange(n)
    left_out = torch.tensor([measure(items[items != i]) for i in range(n)])
    half = 1.96 * ((n - 1) * left_out.var(0, correction=0)).sqrt()
    return torch.stack((value, value - half, value + half), 1).tolist()


def hiding(before: Tensor, after: Tensor, m: int = 100) -> dict:  # (2, S, n) twice
    """Section 4 in numbers: D+ and D- accumulated over the top m neurons with intervals, the share D- has of both
    (above 0.5 more was hidden than erased), and the curves of Figure 3b."""
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


def ranks(a: Tensor) -> Tensor:
    """0 to n-1; `correlation` of ranks is Spearman's. Equal values share their mean rank."""
    values, place = a.unique(return_inverse=True)
    count = torch.bincount(place, minlength=len(values)).double()
    return (count.cumsum(0) - (count + 1) / 2)[place]


@torch.no_grad()
def logit_lens(model: LM, rows: list, wrong: list) -> Tensor:  # -> (L, S)
    """Lead of y over a distractor after each of L blocks, nats per token: the last norm and the head applied to the
    states there, each answer read with its own tokens (Section 6.3, Figure 4). The paper counts how often it is > 0.
    """
    def read(row: tuple) -> Tensor:  # -> (L,)
        batch, states = collate([row], model.device), []
        with hooked(model.model.layers, lambda layer, _, out: states.append(out)):
            model.hidden(batch.ids)
        return torch.cat([answer_logprob(model, batch, model.model.norm(h)) for h in states]) / batch.answer.sum()
    return torch.stack([read(row) - read(other) for row, other in zip(rows, wrong)], 1)


# ---------------------------------------------------------- beyond the paper: is what Eq. 1 says true?


def integrated_gradients(model: LM, batch: Batch, module: str, steps: int = 8) -> Tensor:  # -> (B, K, n)
    """h times the mean of dP/d(a h) for a from 0 to 1: a module's whole output is scaled (Sundararajan et al. 2017).

    Summed over tokens and neurons it is P with the module's output less P without it, which Eq. 1 is only near 0.
    The steps run as one batch.
    """
    (B, K), h = batch.ids.shape, []
    a = (torch.arange(steps, device=batch.ids.device) + 0.5) / steps

    def scale(_, __, out: Tensor) -> Tensor:
        x = out.detach().view(B, steps, K, -1)
        h[:] = x[:, 0], (x * a[:, None, None]).requires_grad_()
        return h[1].view(out.shape)

    with hooked([model.get_submodule(module)], scale):
        copies = Batch(batch.ids.repeat_interleave(steps, 0), batch.answer.repeat_interleave(steps, 0))
        P = answer_logprob(model, copies).exp().sum()
    return h[0] * torch.autograd.grad(P, h[1])[0].mean(1)


def without(model: LM, keep: dict[str, Tensor]):
    """Inside this context the outputs of {module: (n,)} are multiplied by it: 0 silences a neuron."""
    masks = {model.get_submodule(name): mask for name, mask in keep.items()}
    return hooked(masks, lambda layer, _, out: out * masks[layer])


def three_attributions(model: LM, rows: list, picks: dict[str, Tensor]) -> dict[str, Tensor]:
    """{kind: (3, S, N)}: max_k, min_k and sum_k over tokens of the neurons picks = {module: indices}.

    Kinds: Eq. 1, integrated gradients, and ablation: P less P with the neuron silent, which has no tokens: its
    maximum and minimum are those of the one number and 0.
    """
    found, device = {"Eq. 1": [], "integrated": [], "ablation": []}, model.device
    for batch in (collate([row], device) for row in rows):
        A, P, parts = neuron_attribution(model, batch, tuple(picks)), answer_logprob(model, batch).exp(), {}
        for name, chosen in picks.items():
            for kind, a in (("Eq. 1", A[name]), ("integrated", integrated_gradients(model, batch, name))):
                a = a[0, :-1, chosen]                                                       # (K-1, N)
                parts.setdefault(kind, []).append(torch.stack((a.amax(0), a.amin(0), a.sum(0))))
            for i in chosen:
                keep = torch.ones(A[name].shape[2], device=device).index_fill_(0, i, 0)
                with torch.no_grad(), without(model, {name: keep}):
                    e = P - answer_logprob(model, batch).exp()                              # (1,)
                parts.setdefault("ablation", []).append(torch.stack((e.clamp(min=0), e.clamp(max=0), e)).detach())
        for kind, x in parts.items():
            found[kind].append(torch.cat(x, 1).cpu())
    return {kind: torch.stack(x, 1) for kind, x in found.items()}


def causal_test(model: LM, tokenizer: Tokenizer, examples: list[Example], D_neg: dict[str, Tensor], m: int,
                draws: int = 3, size: int = 64) -> dict:
    """FS and margin with the m neurons of largest D_neg silent; and with as many random ones in each module.

    If those neurons hide the facts, FS comes back without them, and not without the random ones.
    """
    D = torch.cat(list(D_neg.values()))
    hit = torch.zeros_like(D, dtype=torch.bool).index_fill_(0, D.topk(m).indices, True)
    hit = dict(zip(D_neg, hit.split([len(x) for x in D_neg.values()])))
    results = []
    for draw in range(draws + 1):
        generator = torch.Generator().manual_seed(draw)
        silent = {name: x if draw == 0 else x[torch.randperm(len(x), generator=generator)]
                  for name, x in hit.items() if x.any()}
        with without(model, {name: (~x).float().to(model.device) for name, x in silent.items()}):
            results.append((accuracy(model, tokenizer, examples, size), margin(model, tokenizer, examples)[1]))
    random_FS = [FS["percent"] for FS, _ in results[1:]]
    return {"m": m, "FS": results[0][0], "margin": results[0][1], "random_FS": statistics.fmean(random_FS),
            "random_sd": statistics.pstdev(random_FS), "random_margin": statistics.fmean(x for _, x in results[1:])}


@torch.no_grad()
def membership(model: LM, rows: list, k: float = 0.4) -> dict[str, list[float]]:
    """Scores that are higher for text a model was trained on, over the tokens of y: the loss (Yeom et al. 2018),
    min-k, the mean of the share k of lowest log P (Shi et al. 2024), and min-k++, the same after log P is standardised
    under the model's own distribution at that position (Zhang et al. 2025)."""
    found = {"loss": [], "min-k": [], "min-k++": []}
    for batch in (collate([row], model.device) for row in rows):
        logp = vocabulary_logprob(model, batch)                                             # (T, V)
        token = logp.gather(1, batch.ids[batch.answer][:, None])[:, 0]
        mean = (logp.exp() * logp).sum(1)
        sd = ((logp.exp() * logp.square()).sum(1) - mean.square()).clamp(min=1e-12).sqrt()
        least = max(1, round(k * len(token)))
        for kind, x in (("loss", token), ("min-k", token.sort().values[:least]),
                        ("min-k++", ((token - mean) / sd).sort().values[:least])):
            found[kind].append(x.mean().item())
    return found


def auc(members: list[float], others: list[float]) -> dict:
    """Chance, in percent, that a member scores above a non-member. Its variance is at most that of a rate over the
    smaller group (Birnbaum and Klose, 1957), hence Wilson's interval at that n: too wide rather than too narrow."""
    a, b, n = torch.tensor(members)[:, None], torch.tensor(others), min(len(members), len(others))
    return wilson(100 * ((a > b).double() + 0.5 * (a == b)).mean().item(), n)


# ---------------------------------------------------------------------------------------- the analysis


def distractors(examples: list[Example], seed: int = 0) -> list[Example]:
    """Each question with a wrong answer: a false option, or in TOFU another item's answer."""
    draw, answers = random.Random(f"distractor {seed}"), sorted({e.answers[0] for e in examples})
    return [Example(e.question, [draw.choice(e.false_options or [a for a in answers if a not in e.answers])])
            for e in examples]


def observe(model: LM, tokenizer: Tokenizer, C_f: list[Example], unseen: list[Example], s: "Settings",
            other_items: int) -> dict:
    """All that the analysis takes from one checkpoint; with `three_attributions` of the first so many items, or not."""
    rows, wrong, strangers = ([encode(tokenizer, e.question, e.answers[0]) for e in part]
                              for part in (C_f, distractors(C_f, s.seed), unseen or distractors(C_f, s.seed)))
    draw, sizes = torch.Generator().manual_seed(s.seed), {n: len(w) for n, w in model.named_parameters()}
    blocks = {round(i * (len(model.model.layers) - 1) / max(1, s.other_blocks - 1)) for i in range(s.other_blocks)}
    picks = {name: torch.randperm(sizes[f"{name}.weight"], generator=draw)[:s.other_neurons].to(s.device)
             for name, _ in model.named_modules() if name.endswith(MODULES) and int(name.split(".")[2]) in blocks}
    members, others = membership(model, rows), membership(model, strangers)
    with torch.no_grad():
        P = [answer_logprob(model, collate([row], s.device)).exp().item() for row in rows]
    return {"FS": accuracy(model, tokenizer, C_f), "margin": margin(model, tokenizer, C_f)[1], "P": statistics.fmean(P),
            "lens": [score(block) for block in (logit_lens(model, rows, wrong) > 0).tolist()],
            "membership": {kind: auc(members[kind], others[kind]) for kind in members},
            "influence": influence(model, rows, levels=("neuron", "head", "module")),
            "three": three_attributions(model, rows[:other_items], picks) if other_items else {}}


def by_module(before: dict[str, Tensor], after: dict[str, Tensor], m: int = 100) -> dict:
    """Figure 5: {D_pos, D_neg: {module: [mean over its top m neurons, a number a block]}}."""
    result = {"D_pos": {}, "D_neg": {}}
    for name in before:
        for key, D in zip(result, influence_variation(before[name], after[name])):
            result[key].setdefault(name.rpartition(".")[2], []).append(top(D, m) / min(m, len(D)))
    return result


def by_rank(x: Tensor) -> dict:  # (2, n)
    """Figure 6a: the attributions of n neurons in order, largest maximum and least minimum first."""
    k = decades(x.shape[1])
    order = x[0].sort(descending=True).values, x[1].sort().values
    return {"rank": k, **{key: values[torch.tensor(k) - 1].tolist() for key, values in zip(("max", "min"), order)}}


def stability(a: Tensor, b: Tensor) -> dict:  # (2, S, n) twice
    """Figure 6b: rho over neurons of two checkpoints' attributions, means over items, with intervals."""
    rho = intervals(lambda i: [correlation(x[i].mean(0), y[i].mean(0)) for x, y in zip(a, b)], a.shape[1])
    return dict(zip(("max", "min"), rho))


def check_same_model(paths: list[str], ms: tuple) -> None:
    """ValueError, before hours of work, for a checkpoint that cannot be read or is of another shape than the first."""
    shapes = {path: {n: p.shape for n, p in load(path)[0].named_parameters()} for path in paths}
    for path in paths:
        if shapes[path] != shapes[paths[0]]:
            raise ValueError(f"{path}: found other weights than in {paths[0]}, expected the same model at a later time")
    neurons = sum(shape[0] for name, shape in shapes[paths[0]].items() if name.endswith("_proj.weight"))
    expect(ms=(ms, 2 * max(ms) <= neurons, f"numbers up to half the model's {neurons} neurons"))


def analyse(s: "Settings") -> dict:
    """Sections 4 and 6.3 to 6.5, and what is beyond them, for two or three checkpoints, as analysis.json has it."""
    C_f, start, seen, causal = splits_of(s.forget, s.splits, 0, s.retain)[0], time.time(), {}, []
    unseen = (load_tofu if s.retain else load_faithun)(s.unseen) if s.unseen else []
    for path, examples in ((s.forget, C_f), (s.unseen, unseen)):
        if path and len({e.answers[0] for e in examples}) < 2:
            raise ValueError(f"{path}: found {len(examples)} items, expected at least two different answers")
    paths = {name: getattr(s, name) for name in ("before", "after", "attacked") if getattr(s, name)}
    check_same_model(list(paths.values()), s.ms)
    for name, path in paths.items():
        model, tokenizer = load(path, device=s.device)
        seen[name] = observe(model, tokenizer, C_f, unseen, s, s.other_items * (name != "attacked"))
        print(f"{name} {path}: FS {seen[name]['FS']['percent']:.1f}  {time.time() - start:.0f}s", flush=True)
        if name == "after":
            a, b = (seen[key]["influence"]["neuron"] for key in ("before", "after"))
            D_neg = {module: influence_variation(a[module], b[module])[1] for module in a}
            for m in s.ms:
                causal.append(causal_test(model, tokenizer, C_f, D_neg, m))
                print(f"without {m} neurons of largest D-: FS {causal[-1]['FS']['percent']:.1f}  random "
                      f"{causal[-1]['random_FS']:.1f}  {time.time() - start:.0f}s", flush=True)
    flat = {name: {level: torch.cat(list(x.values()), 2) for level, x in o.pop("influence").items()}
            for name, o in seen.items()}
    three = [o.pop("three") for o in seen.values()]
    return {"n": len(C_f), "forget": s.forget, "unseen": s.unseen or "the questions, wrong answers", "paths": paths,
            "variation": {level: hiding(x, flat["after"][level]) for level, x in flat["before"].items()},
            "by_module": by_module(a, b),
            "attribution": {name: by_rank(x["neuron"].mean(1)) for name, x in flat.items()},
            "correlation": {f"{p} {q}": stability(flat[p]["neuron"], flat[q]["neuron"])
                            for p, q in (("before", "after"), ("after", "attacked")) if q in flat},
            "causal": causal, "attributions": agreement(*three[:2]), "checkpoints": seen}


def agreement(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict:
    """Is D- above D+ under each kind of attribution, over all neurons sampled? And Spearman's rank correlation of the
    kinds, each neuron's sum over tokens averaged over items."""
    result = {"items": 0, "neurons": 0, "D": {}, "spearman": {}}
    for kind, x in before.items():
        y, everything = after[kind], x.shape[2]
        result |= {"items": x.shape[1], "neurons": everything}
        found = hiding(x[:2], y[:2], everything)
        result["D"][kind] = {key: found[key] for key in ("D_pos", "D_neg", "share")}
        for name, z in (("before", before), ("after", after)):
            for other in list(z)[:list(z).index(kind)]:
                a, b = (ranks(z[k][2].mean(0)) for k in (other, kind))
                result["spearman"][f"{name}: {other}, {kind}"] = correlation(a, b)
    return result


def summary(r: dict) -> str:
    """What an analysis says, for a person."""
    x, last = r["variation"]["neuron"], r["checkpoints"]["after"]
    pos, neg, share = ("{:.3g} [{:.2g}, {:.2g}]".format(*x[key]) for key in ("D_pos", "D_neg", "share"))
    lines = [f"erased D+ {pos}, hidden D- {neg}: share of D- {share} (top {x['m']} of {x['neurons']}, n={r['n']})"]
    lines += [f"the same share by {kind}: {'{:.3g} [{:.2g}, {:.2g}]'.format(*d['share'])}"
              for kind, d in r["attributions"]["D"].items()]
    end = last["lens"][-1]
    lines += [f"logit lens: {end['percent']} % [{end['low']}, {end['high']}] prefer the answer after the last block"]
    lines += [f"membership by {k}: AUC {v['percent']} [{v['low']}, {v['high']}]" for k, v in last["membership"].items()]
    lines += [f"attribution {pair}: rho {', '.join(f'{k} {v[0]:.3f} [{v[1]:.2f}, {v[2]:.2f}]' for k, v in rho.items())}"
              for pair, rho in r["correlation"].items()]
    return "\n".join(lines)


def runs_table(folders: list[str]) -> dict:
    """One row a run from its result.json, log.jsonl and, where it was made, analysis.json; Spearman's correlation over
    runs of D- and of its share with what each attack brought back; FS after the attacks by learning rate (Figure 7)."""
    rows = {}
    for folder in map(Path, folders):
        result, analysis = read_json(folder / "result.json"), read_json(folder / "analysis.json", default={})
        if not isinstance(result, dict) or not {"settings", "after"} <= set(result) or "retain" not in result["after"]:
            raise ValueError(f"{folder}/result.json: found no scores after unlearning, expected one finished run")
        s, after = result["settings"], result["after"]
        row = rows[str(folder)] = {key: s.get(key) for key in ("method", "lr")}
        row |= {key: s.get(key) if s["method"] == "ssiuu" else None for key in ("backbone", "lam", "first_order")}
        row |= {"n": after["FS"]["n"], "steps": after["steps"], "seconds": round(after["seconds_to_threshold"], 1)}
        row |= {key: after[key]["percent"] for key in ("FS", "RS", "retain")} | {"margin": after["forget_margin"]}
        row |= {label: x["percent"] for label, x in result.get("attacks", {}).items()}
        if analysis:
            x = analysis["variation"]["neuron"]
            row |= {"D_pos": x["D_pos"][0], "D_neg": x["D_neg"][0], "share": x["share"][0]}
        log = (folder / "log.jsonl").read_text().split("\n")[:-1] if (folder / "log.jsonl").is_file() else []
        log = [json.loads(line) for line in log]
        if cosines := [c["first_order_cos"] for c in log if "first_order_cos" in c]:  # of --measure
            row["first_order_cos"] = statistics.median(cosines)
        for c in (c for c in log if c["kind"] in ("harmful", "benign") and not c.get("control")):
            label = f"{c['kind']} p={c['p']:g}" if "p" in c else c["kind"]
            row.setdefault("by_rate", {}).setdefault(label, {}).setdefault(f"{c['lr']:g}", []).append(max(c["FS"][1:]))
    found = {}
    for key in ("D_neg", "share"):
        for label in dict.fromkeys(k for row in rows.values() for k in row if k.startswith(("Harmful", "Benign"))):
            pairs = [(r[key], r[label]) for r in rows.values() if key in r and r.get(label) is not None]
            if len(pairs) > 2:
                found[f"{key}, {label}"] = {"rho": correlation(*(ranks(torch.tensor(x)) for x in zip(*pairs))),
                                            "n": len(pairs)}
    return {"rows": rows, "spearman": found}


def markdown(rows: dict[str, dict], first: str = "run") -> str:
    keys = [key for key in dict.fromkeys(key for row in rows.values() for key in row) if key != "by_rate"]
    lines = [[first, *keys], ["---"] * (len(keys) + 1)]
    lines += [[name, *(f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x)
                       for x in map(row.get, keys))] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path: Path, title: str, *panels: tuple[dict, dict]) -> None:
    """One picture of (axis settings, {label: (x, y, line style, and perhaps the lower and upper edge of a band)})."""
    fig, axes = pyplot().subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), layout="constrained", squeeze=False)
    fig.suptitle(title)
    for ax, (settings, curves), (_, following) in zip(axes[0], panels, (*panels[1:], ({}, {}))):
        for label, (x, y, style, *band) in curves.items():
            ax.plot(x, y, style, label=label)
            if band:
                ax.fill_between(x, *band, color="k", alpha=0.12)
        ax.set(**settings)
        if list(curves) != list(following):  # one legend for neighbours with the same curves
            ax.legend(fontsize=7, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(curves) > 3 else {}))
        if settings["xlabel"] == "block":
            ax.xaxis.get_major_locator().set_params(integer=True)
    fig.savefig(path, dpi=80)


def figures(r: dict, folder: Path) -> None:
    """Figures 3 to 6 of an analysis and the causal test, readable in grey."""
    x, n, checkpoints, log = r["variation"]["neuron"], r["n"], r["checkpoints"], {"xscale": "log", "yscale": "log"}
    styles = dict(zip(checkpoints, ("k-", "k--", "k:")))
    labels = {k: f"{name}; {x['m']} neurons: {x[k][0]:.2g} [{x[k][1]:.2g}, {x[k][2]:.2g}]"
              for k, name in (("D_neg", "D-, hidden"), ("D_pos", "D+, erased"))}
    plot(folder / "figure3.png", f"Figure 3: influence variation, n = {n}", (
        {**log, "xlabel": "neurons, sorted", "ylabel": "accumulated variation of P"},
        {labels[k]: (x["curves"]["m"], x["curves"][k], style) for k, style in (("D_neg", "k-"), ("D_pos", "k:"))}))
    plot(folder / "figure4.png", f"Figure 4: logit lens, n = {n}", (
        {"xlabel": "block", "ylabel": "answer above distractor, %", "ylim": (0, 101)},
        {name: (range(len(o["lens"])), [b["percent"] for b in o["lens"]], styles[name],
                *([b[edge] for b in o["lens"]] for edge in ("low", "high"))) for name, o in checkpoints.items()}))
    rho = [f"{pair} {key} {x[key][0]:.2f}" for pair, x in r["correlation"].items() for key in x]
    plot(folder / "figure6.png", f"Figure 6: attribution in units of P, n = {n}. rho: {', '.join(rho)}", *(
        ({**log, "xlabel": "neurons, sorted", "ylabel": label},
         {name: (x["rank"], [sign * v for v in x[key]], styles[name]) for name, x in r["attribution"].items()})
        for key, sign, label in (("max", 1, "max over tokens"), ("min", -1, "- min over tokens"))))
    ms, found, by_chance = zip(*((c["m"], c["FS"]["percent"], c["random_FS"]) for c in r["causal"]))
    plot(folder / "causal.png", f"Spurious neurons silenced, n = {n}", (
        {"xscale": "log", "xlabel": "neurons", "ylabel": "FS, %", "ylim": (0, 101)},
        {"largest D-": (ms, found, "k-"), "random, as many in each module": (ms, by_chance, "k:")}))

    fig, axes = pyplot().subplots(2, 1, figsize=(6, 5), layout="constrained")
    fig.suptitle(f"Figure 5: mean variation of P, top 100 neurons of each module, n = {n}")
    most = max(v for part in r["by_module"].values() for row in part.values() for v in row)
    for ax, (key, part) in zip(axes, r["by_module"].items()):
        image = ax.imshow(list(part.values()), cmap="Greys", aspect="auto", vmin=0, vmax=most)
        ax.set(yticks=range(len(part)), yticklabels=part, xlabel="block", title={"D_pos": "D+", "D_neg": "D-"}[key])
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=axes, label="variation of P")
    fig.savefig(folder / "figure5.png", dpi=80)


def figure_7(r: dict, folder: Path) -> None:
    """(a) lambda against retention and recovery; (b, c) the learning rates, where an attack has several."""
    rows = sorted(r["rows"].items(), key=lambda item: item[1]["lam"] or 0)
    swept = [row for _, row in rows if row["lam"] and not row["first_order"]]
    styles = [f"k{marker}{line}" for marker, line in zip("osv^Dx*+" * 3, ("-", "--", ":") * 8)]  # 24, all different
    style = dict(zip(r["rows"], itertools.cycle(styles)))
    keys = ["retain", "RS", *dict.fromkeys(k for row in swept for k in row if k.startswith("Harmful"))]
    rates = {label: {Path(name).name: ([float(lr) for lr in x], [statistics.fmean(v) for v in x.values()], style[name])
                     for name, row in rows for x in [row.get("by_rate", {}).get(label, {})] if len(x) > 1}
             for label in dict.fromkeys(label for _, row in rows for label in row.get("by_rate", {}))}
    plot(folder / "figure7.png", f"Figure 7: n = {rows[0][1]['n']}, maxima over points, means over draws", (
        {"xscale": "log", "xlabel": "lambda", "ylabel": "%", "ylim": (0, 101)},
        {key: ([row["lam"] for row in swept], [row.get(key) for row in swept], look)
         for key, look in zip(keys, itertools.cycle(styles))}),
        *(({"xscale": "log", "xlabel": f"learning rate, {label}", "ylabel": "max FS, %"}, curves)
          for label, curves in rates.items() if curves))


def report(result: dict, path: Path, said: str, pictures: Callable[[dict, Path], None]) -> None:
    write_json(path, result)
    print(f"{said}\n{path}", flush=True)
    if pyplot():
        pictures(result, path.parent)


def pyplot():
    """matplotlib.pyplot, which is optional; None where it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("matplotlib is not installed: no figures")
    pyplot.switch_backend("agg")
    return pyplot


# ----------------------------------------------------------------------------------- the command line


def read_flags(kind: type, doc: str, argv: list[str] | None = None):
    """Fills the dataclass `kind` from the command line: a field is a flag, its comment the flag's help.

    A flag that is not given takes its value from <resume>/settings.json, else <model>/unlearn.json, else the field.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.M))
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0], allow_abbrev=False,
                                     epilog="What stands in MODEL/unlearn.json comes before these defaults.",
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


def check(s, **more: tuple) -> None:
    """`expect` of the flags that commands share, where the settings `s` have them, then of `more`; and the device."""
    def each(names: str, ok: Callable, wanted: str) -> dict:
        return {f: (x, all(map(ok, x if isinstance(x, tuple) else (x,))), wanted)
                for f, x in ((f, getattr(s, f)) for f in names.split() if hasattr(s, f))}
    expect(**each("lr teach_lr lrs attack_lrs benign_lrs p", lambda x: 0 < x < 1, "between 0 and 1"),
           **each("steps attack_epochs attack_batch benign_rows benign_points utility_n seeds klue_n eval_batch ms "
                  "save_every other_blocks other_neurons", lambda x: x > 0, "at least 1"),
           **each("batch_size micro_batch attack_rank test_limit teach_epochs", lambda x: x >= 0,
                  "0 or more"),
           **each("other_items", lambda x: x == 0 or x > 1, "0, or at least 2 for an interval"),
           **each("bits", lambda x: 2 <= x <= 16, "numbers from 2 to 16"),
           **each("benign", lambda x: not x or Path(x).is_file(), "an Alpaca file, or '' for no benign attack"),
           **each("utility", lambda x: not x or Path(x).is_dir(), "a folder"),
           **each("control", lambda x: all(Path(c, "config.json").is_file() for c in x.split(",") if c),
                  "checkpoint directories, divided by commas"), **more)
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    kind, _, index = s.device.partition(":")
    expect(device=(s.device, kind in kinds and index in ("", *map(str, range(max(1, torch.cuda.device_count())))),
                   " or ".join(kinds) + " on this machine"))


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
    test_limit: int = 0                  # score RS on the first so many items of C_t only; 0: all, 300 of TOFU
    seed: int = 0                        # of utility samples, distractors and sampled neurons
    utility: str = ""                    # folder of the utility tasks' files, for US; empty: no US
    utility_n: int = 500                 # sample so many items of each utility task
    before: str = ""                     # analyse a pair: the model before unlearning, ...
    after: str = ""                      # ... after it, ...
    attacked: str = ""                   # ... and after an attack (attack.py --save)
    unseen: str = ""                     # facts no model saw, for membership; empty: the questions, wrong answers
    ms: tuple = (10, 30, 100, 300, 1000)  # silence so many of the neurons with the largest D-
    other_items: int = 8                 # compare Eq. 1, integrated gradients and ablation on so many items; 0: no
    other_blocks: int = 6                # ... in so many blocks, evenly spaced
    other_neurons: int = 8               # ... on so many neurons of each of their modules, at random
    runs: tuple = ("",)                  # instead: one table and Figure 7 of these runs' folders
    out: str = ""                        # folder for analysis.json and figures; empty: --after, or runs for --runs
    device: str = "cpu"                  # cpu, cuda, cuda:1, ...


def main() -> None:
    s = read_flags(Settings, __doc__)
    pair = bool(s.before) == bool(s.after) and (s.after or not (s.attacked or s.unseen))
    check(s, after=(s.after, pair, "--before and --after too"),
          out=(s.out, not Path(s.out or ".").is_file() and (s.out or Path(s.after).is_dir()),
               f"a folder, or --after {s.after} to be one"))
    folder = Path(s.out or s.after or "runs")
    if any(s.runs):
        result = runs_table(s.runs)
        return report(result, folder / "runs.json", f"{markdown(result['rows'])}\n{result['spearman']}", figure_7)
    if s.after:
        folder.mkdir(parents=True, exist_ok=True)  # not after hours of work
        result = analyse(s)
        return report(result, folder / "analysis.json", summary(result), figures)
    tasks = load_utility(s.utility) if s.utility else {}
    C_f, C_r, C_t = splits_of(s.forget, s.splits, s.test_limit, s.retain)
    model, tokenizer = load(s.model, device=s.device)
    result = {name: accuracy(model, tokenizer, examples)
              for name, examples in (("FS", C_f), ("RS", C_t), *([] if s.retain else [("retain", C_r)]))}
    if tasks:
        result["US"] = utility(model, tokenizer, tasks, s.utility_n, s.seed)
    logp, lead = margin(model, tokenizer, C_f)
    print(json.dumps({"model": s.model, **result, "forget_logp": logp, "forget_margin": lead}, indent=1))


if __name__ == "__main__":
    run(main)
