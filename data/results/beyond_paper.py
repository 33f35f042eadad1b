"""Analyses of a pair of checkpoints that are not in the paper: is what Eq. 1 says true, and is it all?

    python data/results/beyond_paper.py --before data/tiny --after runs/ssiuu-tiny

Writes beyond.json into --out or --after:

- levels: D+ and D- of whole heads and whole modules. Did influence vanish, or only move to other neurons?
- attributions: D+ and D- by integrated gradients and by ablation, which do not assume a linear model.
- causal: FS with the neurons of largest D- silenced. If they hide the facts, the facts come back.
- membership: can one tell from the log-probabilities which text the model was trained on?

Dimensions: B sequences, K tokens, S items (x, y), T tokens of y, n neurons, N sampled neurons, V vocabulary.
"""
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import Batch, Example, check_fits, collate, encoded, load_faithun, load_tofu  # noqa: E402
from evaluate import (MODULES, Data, Name, accuracy, check_folder, correlation, distractors,  # noqa: E402
                      hiding, hooked, influence, influence_variation, margin, neuron_attribution, read_flags,
                      run, splits_of, wilson)
from model import LM, Count, Tokenizer, answer_logprob, load, refuse, vocabulary_logprob  # noqa: E402
from model import write_json  # noqa: E402

# ------------------------------------------------------------------------------- does it move elsewhere?

def extremes(a: Tensor) -> Tensor:  # (K, n) -> (3, n)
    """max_k, min_k (Eq. 2) and sum_k. The last token of y predicts nothing: its 0 would bound the maxima."""
    return torch.stack((a[:-1].amax(0), a[:-1].amin(0), a[:-1].sum(0)))

def influence_of_wholes(model: LM, rows: list) -> dict[str, Tensor]:
    """{"head": (2, S, heads), "module": (2, S, modules)}: max_k and min_k of heads of q, k, v and of modules.

    A whole's attribution is the sum of its neurons', Eq. 1 of it as one vector: opposite changes cancel.
    """
    heads, modules = [], []
    for row in rows:
        A = neuron_attribution(model, collate([row], model.device))
        per_head = [a[0].unflatten(1, (-1, model.config.head_dim)).sum(2) for name, a in A.items()
                    if name.endswith(("q_proj", "k_proj", "v_proj"))]                      # (K, heads) each
        per_module = [a[0].sum(1, keepdim=True) for a in A.values()]                       # (K, 1) each
        heads.append(extremes(torch.cat(per_head, 1))[:2].cpu())
        modules.append(extremes(torch.cat(per_module, 1))[:2].cpu())
    return {"head": torch.stack(heads, 1), "module": torch.stack(modules, 1)}

# --------------------------------------------------------------- attributions that assume no linear model

def integrated_gradients(model: LM, batch: Batch, module: str, steps: int = 64) -> Tensor:  # -> (B, K, n)
    """h times the mean of dP/d(a h) for a from 0 to 1, h a module's whole output (Sundararajan et al. 2017).

    Summed over tokens and neurons it is P with the output less P without it, which Eq. 1 is only near 0.
    P rises so late and steeply that on the tiny model 8 steps miss 36 to 63 % of that sum, and 64 steps 1 %.
    """
    layer, outputs = model.get_submodule(module), []
    with torch.no_grad(), hooked([layer], lambda _, __, out: outputs.append(out)):
        answer_logprob(model, batch)
    h = outputs[0].view(*batch.ids.shape, -1)                                              # (B, K, n)
    grad, scales = torch.zeros_like(h), (torch.arange(steps, device=h.device) + 0.5) / steps
    for a in scales.split(8):  # all at once would need the memory of so many sequences
        scaled = (h[:, None] * a[:, None, None]).requires_grad_()                          # (B, 8, K, n)
        copies = Batch(batch.ids.repeat_interleave(len(a), 0), batch.answer.repeat_interleave(len(a), 0))
        with hooked([layer], lambda _, __, out: scaled.view(out.shape)):
            P = answer_logprob(model, copies).exp().sum()
        grad += torch.autograd.grad(P, scaled)[0].sum(1)
    return h * grad / steps

def silenced(model: LM, silent: dict[str, Tensor]):
    """Inside this context the neurons of {module: (n,) bool} put out 0."""
    masks = {model.get_submodule(name): mask for name, mask in silent.items()}
    return hooked(masks, lambda layer, _, out: out.masked_fill(masks[layer], 0))

@torch.no_grad()
def ablation(model: LM, batch: Batch, module: str, chosen: Tensor) -> Tensor:  # (N,) -> (3, N)
    """P(y|x) less P with one neuron silent, for each: what it truly does, alone. That has no tokens: maximum
    and minimum are those of the one number and 0."""
    P, effects = answer_logprob(model, batch).exp(), []
    for i in chosen:
        mask = torch.zeros(len(model.get_submodule(module).weight), dtype=torch.bool, device=model.device)
        mask[i] = True
        with silenced(model, {module: mask}):
            effects.append(P - answer_logprob(model, batch).exp())
    effect = torch.cat(effects)
    return torch.stack((effect.clamp(min=0), effect.clamp(max=0), effect))

def three_attributions(model: LM, rows: list, picks: dict[str, Tensor], steps: int = 64) -> dict[str, Tensor]:
    """{kind: (3, S, N)}: `extremes` of neurons picks = {module: indices} by three kinds of attribution."""
    found = {"Eq. 1": [], "integrated": [], "ablation": []}
    for row in rows:
        batch = collate([row], model.device)
        A = neuron_attribution(model, batch, tuple(picks))
        linear, integrated, ablated = [], [], []
        for name, chosen in picks.items():
            linear.append(extremes(A[name][0, :, chosen]))
            integrated.append(extremes(integrated_gradients(model, batch, name, steps)[0, :, chosen]))
            ablated.append(ablation(model, batch, name, chosen))
        for kind, parts in zip(found, (linear, integrated, ablated)):
            found[kind].append(torch.cat(parts, 1).cpu())
    return {kind: torch.stack(items, 1) for kind, items in found.items()}

def sample_neurons(model: LM, blocks: int, neurons: int, seed: int) -> dict[str, Tensor]:
    """{module: indices}: so many random neurons in each module of so many evenly spaced blocks."""
    last, generator, picks = len(model.model.layers) - 1, torch.Generator().manual_seed(seed), {}
    chosen = {round(i * last / max(1, blocks - 1)) for i in range(blocks)}
    for name, layer in model.named_modules():
        if name.endswith(MODULES) and int(name.split(".")[2]) in chosen:
            picks[name] = torch.randperm(len(layer.weight), generator=generator)[:neurons].to(model.device)
    return picks

def ranks(a: Tensor) -> Tensor:  # (n,)
    """0 to n-1; `correlation` of ranks is Spearman's. Equal values share their mean rank."""
    _, place, count = a.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count + 1) / 2)[place]

def agreement(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict:
    """Is D- above D+ under each kind of `three_attributions`, over all neurons sampled? And Spearman's rank
    correlation of the kinds, each neuron's sum over tokens averaged over items."""
    kinds = list(before)
    _, items, neurons = before[kinds[0]].shape
    result = {"items": items, "neurons": neurons, "D": {}, "spearman": {}}
    for kind in kinds:
        D = hiding(before[kind][:2], after[kind][:2], neurons)
        result["D"][kind] = {key: D[key] for key in ("D_pos", "D_neg", "share")}
    for name, attributions in (("before", before), ("after", after)):
        order = {kind: ranks(x[2].mean(0)) for kind, x in attributions.items()}
        for i, kind in enumerate(kinds):
            for other in kinds[:i]:
                result["spearman"][f"{name}: {other}, {kind}"] = correlation(order[other], order[kind])
    return result

# ---------------------------------------------------------------------- do these neurons hide the facts?

def largest(D_neg: dict[str, Tensor], m: int) -> dict[str, Tensor]:
    """{module: (n,) bool}: the m neurons of largest D_neg = {module: (n,)}; no modules without any."""
    D = torch.cat(list(D_neg.values()))
    hit = torch.zeros_like(D, dtype=torch.bool).index_fill_(0, D.topk(m).indices, True)
    masks = dict(zip(D_neg, hit.split([len(x) for x in D_neg.values()])))
    return {name: mask for name, mask in masks.items() if mask.any()}

def causal_test(model: LM, tokenizer: Tokenizer, examples: list[Example], D_neg: dict[str, Tensor], m: int,
                draws: int = 3, size: int = 64) -> dict:
    """FS and margin with the m neurons of largest D_neg silent; and with as many random ones in each module.

    If those neurons hide the facts, FS comes back without them, and not without the random ones.
    """
    def score(silent: dict[str, Tensor]) -> tuple[dict, float]:
        with silenced(model, {name: mask.to(model.device) for name, mask in silent.items()}):
            return accuracy(model, tokenizer, examples, size), margin(model, tokenizer, examples, size)[1]

    hit = largest(D_neg, m)
    FS, lead = score(hit)
    random_FS, random_leads = [], []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw + 1)
        other = score({name: x[torch.randperm(len(x), generator=generator)] for name, x in hit.items()})
        random_FS.append(other[0]["percent"])
        random_leads.append(other[1])
    # the draws share the items, so n does not add up
    by_chance = wilson(statistics.fmean(random_FS), FS["n"])
    return {"m": m, "FS": FS, "margin": lead, "random_FS": by_chance,
            "random_sd": statistics.pstdev(random_FS), "random_margin": statistics.fmean(random_leads)}

# ------------------------------------------------------------------------------------------ membership

@torch.no_grad()
def membership(model: LM, rows: list, k: float = 0.4) -> dict[str, list[float]]:
    """Scores per row that are higher for text a model was trained on, over the tokens of y.

    loss: the mean log P (Yeom et al. 2018). min-k: that of the share k of lowest log P (Shi et al. 2024).
    min-k++: the same with log P standardised under the model's own distribution there (Zhang et al. 2025).
    """
    found = {"loss": [], "min-k": [], "min-k++": []}
    for row in rows:
        batch = collate([row], model.device)
        logp = vocabulary_logprob(model, batch)                                            # (T, V)
        token = logp.gather(1, batch.ids[batch.answer][:, None])[:, 0]                     # (T,)
        mean = (logp.exp() * logp).sum(1)
        sd = ((logp.exp() * logp.square()).sum(1) - mean.square()).clamp(min=1e-12).sqrt()
        least = max(1, round(k * len(token)))
        found["loss"].append(token.mean().item())
        found["min-k"].append(token.sort().values[:least].mean().item())
        found["min-k++"].append(((token - mean) / sd).sort().values[:least].mean().item())
    return found

def auc(members: list[float], others: list[float]) -> dict:
    """Chance, in percent, that a member scores above a non-member. Its variance is at most that of a rate
    over the smaller group (Birnbaum and Klose, 1957), hence Wilson's interval at that n: rather too wide."""
    a, b = torch.tensor(members)[:, None], torch.tensor(others)
    above = ((a > b).double() + 0.5 * (a == b)).mean().item()
    return wilson(100 * above, min(len(members), len(others)))

# --------------------------------------------------------------------------------------------- the command

@dataclass
class Settings(Data):
    before: Name | None = None           # the model before unlearning; --model
    after: Name = "runs/ssiuu-tiny"      # ... and after it
    attacked: Name | None = None         # ... and after an attack (attack.py --save), for membership only
    unseen: Name | None = None           # facts no model saw, for membership; the questions, wrong answers
    ms: tuple[Count, ...] = (10, 30, 100, 300, 1000)  # silence so many of the neurons with the largest D-
    items: Count = 8                     # compare three attributions on so many items, at least 2
    blocks: Count = 6                    # ... in so many blocks, evenly spaced
    neurons: Count = 8                   # ... on so many neurons of each of their modules, at random
    steps: Count = 64                    # ... and with so many steps of integrated gradients
    out: Name | None = None              # folder for beyond.json; --after

def facts(s: Settings) -> tuple[list[Example], list[Example]]:
    """C_f, and what no model saw: the facts of --unseen, or C_f's questions with wrong answers."""
    C_f, unseen = splits_of(s)[0], []
    if s.unseen:
        unseen = load_tofu(s.unseen) if s.retain else load_faithun(s.unseen)
    for path, examples in ((s.forget, C_f), (s.unseen, unseen)):
        if path and len({e.answers[0] for e in examples}) < 2:
            refuse(f"{path}: found {len(examples)} items, expected at least two different answers")
    return C_f, unseen or distractors(C_f, s.seed)

def check_settings(s: Settings, C_f: list[Example], unseen: list[Example]) -> None:
    """ValueError, before hours of work, for settings that cannot be met."""
    if not 2 <= s.items <= len(C_f):
        refuse(f"--items: found {s.items}, expected from 2 to the forget set's {len(C_f)}")
    if not s.out and not Path(s.after).is_dir():
        refuse(f"--after: found {s.after!r}, expected a folder, or --out to name one")
    shapes = {}
    for name, path in paths(s).items():
        model, tokenizer = load(path)
        check_fits(model, tokenizer, C_f + unseen)
        shapes[name] = {weight: p.shape for weight, p in model.named_parameters()}
        if shapes[name] != shapes["before"]:
            refuse(f"{path}: found other weights than before unlearning, expected the same model later")
    neurons = sum(shape[0] for weight, shape in shapes["before"].items() if weight.endswith("_proj.weight"))
    if 2 * max(s.ms) > neurons:
        refuse(f"--ms: found {max(s.ms)}, expected at most half of the model's {neurons} neurons")

def paths(s: Settings) -> dict[str, str]:
    found = {"before": s.before or s.model, "after": s.after, "attacked": s.attacked}
    return {name: path for name, path in found.items() if path}

def told_apart(model: LM, rows: list, strangers: list) -> dict[str, dict]:
    """{score: `auc`} of C_f against what no model saw."""
    members, others = membership(model, rows), membership(model, strangers)
    return {kind: auc(members[kind], others[kind]) for kind in members}

def causal_tests(model: LM, tokenizer: Tokenizer, C_f: list[Example], before: dict[str, Tensor],
                 after: dict[str, Tensor], s: Settings) -> list[dict]:
    """`causal_test` for each of --ms, from `influence` before and after unlearning."""
    D_neg, found = {name: influence_variation(before[name], after[name])[1] for name in before}, []
    for m in s.ms:
        found.append(causal_test(model, tokenizer, C_f, D_neg, m, size=s.eval_batch))
        print(causal_line(found[-1]), flush=True)
    return found

def analyse(s: Settings, C_f: list[Example], unseen: list[Example]) -> dict:
    """Everything that beyond.json holds; one checkpoint at a time is in memory."""
    start, neuron, wholes, three, apart = time.time(), {}, {}, {}, {}
    for name, path in paths(s).items():
        model, tokenizer = load(path, device=s.device)
        rows = encoded(tokenizer, C_f)
        apart[name] = told_apart(model, rows, encoded(tokenizer, unseen))
        if name != "attacked":
            neuron[name], wholes[name] = influence(model, rows), influence_of_wholes(model, rows)
            picks = sample_neurons(model, s.blocks, s.neurons, s.seed)
            three[name] = three_attributions(model, rows[:s.items], picks, s.steps)
        if name == "after":
            causal = causal_tests(model, tokenizer, C_f, neuron["before"], neuron["after"], s)
        print(f"{name} {path}: {time.time() - start:.0f}s", flush=True)
    levels = {level: hiding(x, wholes["after"][level]) for level, x in wholes["before"].items()}
    return {"n": len(C_f), "forget": s.forget, "unseen": s.unseen or "the questions, wrong answers",
            "paths": paths(s), "levels": levels, "attributions": agreement(three["before"], three["after"]),
            "causal": causal, "membership": apart}

def percent(x: dict) -> str:
    return f"{x['percent']:.0f} % [{x['low']:.0f}, {x['high']:.0f}]"

def causal_line(c: dict) -> str:
    return (f"without the {c['m']} neurons of largest D-: FS {percent(c['FS'])}, "
            f"without random ones {percent(c['random_FS'])}")

def share(x: dict) -> str:
    value, low, high = (100 * share for share in x["share"])
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"

def summary(r: dict) -> str:
    """For a person. A share of D- in D+ and D- above 50 % says that more was hidden than erased."""
    lines = [f"n = {r['n']} facts, 95 % intervals"]
    for level, x in r["levels"].items():
        lines.append(f"share of D- by whole {level}s: {share(x)}")
    sample = r["attributions"]
    for kind, x in sample["D"].items():
        lines.append(f"share of D- by {kind}: {share(x)}"
                     f" ({sample['neurons']} neurons, {sample['items']} facts)")
    for name, scores in r["membership"].items():
        found = ", ".join(f"{kind} {percent(x)}" for kind, x in scores.items())
        lines.append(f"membership {name}: AUC by {found}")
    return "\n".join(lines)

def main() -> None:
    s = read_flags(Settings, __doc__)
    C_f, unseen = facts(s)
    check_settings(s, C_f, unseen)
    folder = Path(s.out or s.after)
    check_folder("--out", folder)
    result = analyse(s, C_f, unseen)
    write_json(folder / "beyond.json", result)
    print(f"{summary(result)}\n{folder / 'beyond.json'}")

if __name__ == "__main__":
    run(main)
