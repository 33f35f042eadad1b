"""What a step costs: GD and SSIUU in turn through `unlearn` itself, on random tokens.

    python data/results/bench.py --model SMOLLM2                          # seconds and memory, measured
    python data/results/bench.py --config llama-3.2-3b --device cuda      # the same of random weights
    python data/results/bench.py --config llama-3.2-3b --batch-size 33    # memory by name, no weights, no GPU

Scoring FS is no part of a step and is left out. On the CPU memory is the peak of resident memory (Linux).
With --config on the CPU the same steps run on tensors without data, and every byte that is alive at the peak
is counted under the function of this project that made it. --literal measures Algorithm 1 by autograd on
transformers' model instead.
"""
import math
import random
import re
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import attack  # noqa: E402
import ssiuu  # noqa: E402
from data import Example  # noqa: E402
from evaluate import Data, Name, check_folder, markdown, read_flags, run  # noqa: E402
from model import LM, Config, Count, load, located, prefill, read_config, write_json  # noqa: E402

ANSWER = 6  # tokens of y
CONFIGS = {
    "llama-3.2-3b": Config("llama", 128256, 3072, 8192, 28, 24, 8, 128, tie_word_embeddings=True),
    "qwen2.5-3b": Config("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True)}

@dataclass
class Settings(Data):
    batch_size: Count = 8                 # B, of b and of b'
    tokens: Count = 64                    # K, six of them the answer
    rounds: Count = 5                     # counted steps of each, after two that warm up
    micro_batch: Count | None = None      # sequences in one graph; all
    offload: bool = False                 # Adam's moments and A_prev on the host
    literal: bool = False                 # measure Algorithm 1 on transformers' model instead
    config: Literal["llama-3.2-3b", "qwen2.5-3b", None] = None  # a model of this size instead
    out: Name = "runs/bench.json"         # where the numbers go

class RandomTokens:
    """In place of a tokenizer: a question is a seed, and gives K - 6 random tokens; an answer six."""
    def __init__(self, vocabulary: int, K: int):
        self.vocabulary, self.K = vocabulary, K

    def draw(self, seed: str, n: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(self.vocabulary) for _ in range(n)]

    def prompt(self, question: str) -> list[int]:
        return self.draw(question, self.K - ANSWER)

    def answer(self, text: str) -> list[int]:
        return self.draw(text, ANSWER)

def peak_memory(device: str) -> Callable[[], float]:
    """Starts a count; the function it returns gives the peak since then in GB."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if not status.is_file():
        return lambda: math.nan
    Path("/proc/self/clear_refs").write_text("5")
    return lambda: int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e9

def steps(model: LM, s: Settings, method: str, shared: list) -> Iterator[dict]:
    """Endless steps of a method, by Algorithm 1 as the command runs it. Both methods share one optimizer,
    as each would hold moments like the weights."""
    tokenizer = RandomTokens(model.config.vocab_size, s.tokens)
    C_f = [Example(f"forget {i}", [f"y {i}"]) for i in range(s.batch_size)]
    C_r = [Example(f"retain {i}", [f"y {i}"]) for i in range(s.batch_size)]
    # log P for P, which is 0 of random tokens: there would be no penalty
    settings = ssiuu.Settings(method=method, lr=1e-6, lam=1e-3, tau=0.0, steps=2 ** 31 - 1,
                              micro_batch=s.micro_batch, offload=s.offload, target="logprob")
    state = ssiuu.begin(model, tokenizer, C_f, settings)
    shared.append(state.optimizer)
    state.optimizer = shared[0]
    yield from ssiuu.unlearn(model, tokenizer, C_f, C_r, settings, state)

def literal_steps(c: Config, s: Settings) -> Iterator[None]:
    """Endless steps of Algorithm 1 line by line on transformers' model of the same config, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(c.model_type, vocab_size=c.vocab_size, hidden_size=c.hidden_size,
                                  intermediate_size=c.intermediate_size, head_dim=c.head_dim,
                                  num_hidden_layers=c.num_hidden_layers, tie_word_embeddings=True,
                                  num_attention_heads=c.num_attention_heads,
                                  num_key_value_heads=c.num_key_value_heads)
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(s.device)
    phi, size = list(other.parameters()), (2, s.batch_size, s.tokens)
    ids = torch.randint(c.vocab_size, size, device=s.device)
    optimizer, A_prev = torch.optim.AdamW(phi, lr=1e-6, weight_decay=0.0, fused=True), None

    def logprob(b: torch.Tensor) -> torch.Tensor:
        logits = other(b).logits[:, :-1].log_softmax(-1)
        return logits.gather(2, b[:, 1:, None])[:, -ANSWER:, 0].sum(1)

    while True:
        logp_f, logp_r = map(logprob, ids)                                     # l.2 to l.4
        g = torch.autograd.grad(logp_f.sum(), phi, create_graph=True)
        A, L = [p * x for p, x in zip(phi, g)], logp_f.mean() - logp_r.mean()  # l.5
        if A_prev:
            L = L + 1e-3 * sum(((q - a)[a < 0] ** 2).sum() for a, q in zip(A, A_prev))
        A_prev = [a.detach() for a in A]                                       # l.12
        L.backward()                                                           # l.13
        optimizer.step()                                                       # l.14
        optimizer.zero_grad()
        yield

# ------------------------------------------------------- --config: what is alive at the peak, by name

class Unread(TorchFunctionMode):
    """Tensors have no data here. What the code reads out of one is made up: numbers are 1, y has its known
    number of tokens, an order is 0, 1, 2, ..."""
    def __init__(self, alive: "Alive"):
        super().__init__()
        self.alive = alive

    def __torch_function__(self, function, types, args=(), kwargs=None):
        x, T = args[0] if args else None, torch.Tensor
        if function in (T.item, T.__bool__, T.__int__):
            return 1.0 if function is T.item else True
        if function is T.nonzero:
            return torch.zeros(len(x) * ANSWER, x.ndim, dtype=torch.long)
        if function is T.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            at = torch.zeros(len(x) * ANSWER, dtype=torch.long)
            return x[(at,) * args[1].ndim]
        if function is T.to and self.alive.names.get(x.untyped_storage()._cdata) in HOST:
            return x.clone()  # back from the host: a copy, but not where both are one device
        return function(*args, **(kwargs or {}))

class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive: now, and at the peak of those on the device."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.names = Counter(), Counter(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.names:
                self.add(x.untyped_storage())
        if on_device(self.now) > on_device(self.peak):
            self.peak = +self.now
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size, name = storage._cdata, storage.nbytes(), maker()
        self.names[key] = name
        self.now[name] += size

        def gone() -> None:
            self.now[self.names.pop(key)] -= size
        weakref.finalize(storage, gone)

HOST = {"on_host"}  # what this function makes lies in host memory
NAMES = {"penalty_weights": "w", "attribution": "g and A",
         "unlearn": ".grad, Adam's moments, the backward pass",
         "retrain": ".grad, Adam's moments, the backward pass"}

def on_device(bytes: Counter) -> int:
    return sum(size for name, size in bytes.items() if name not in HOST)

def maker() -> str:
    """The innermost function of the five modules on the stack; in model.py only two things are made."""
    frame = sys._getframe(3)
    while frame:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.parent == ROOT and name not in ("<listcomp>", "delta"):
            return NAMES.get(name, name) if path.name != "model.py" else "activations"
        frame = frame.f_back
    return "phi"

def alive_at_peak(config: Config, work: Callable[[LM], None]) -> dict[str, float]:
    """{name: GB on the device at the peak} of work(model), and what lay on the host at that time."""
    alive, FakeTensor.tolist = Alive(), lambda x: list(range(len(x)))
    with FakeTensorMode(allow_non_fake_inputs=True), Unread(alive), alive:
        model = LM(config)
        alive.names.update(dict.fromkeys(alive.names, "phi"))
        alive.now, alive.peak = Counter({"phi": alive.now.total()}), Counter()
        work(model)
    device = on_device(alive.peak)
    found = {"device": device, "host": alive.peak.total() - device, **alive.peak}
    return {name: round(size / 1e9, 1) for name, size in found.items() if size > 5e7 and name not in HOST}

def count(s: Settings) -> None:
    """The memory of each kind of work on s.config, printed as a table and written to s.out."""
    def stepped(method: str, micro_batch: int | None, offload: bool) -> Callable[[LM], None]:
        def work(model: LM) -> None:
            run = steps(model, replace(s, micro_batch=micro_batch, offload=offload), method, [])
            next(run), next(run)  # the penalty begins at t = 2
        return work

    def retrained(model: LM) -> None:  # attack.py keeps the weights that it restores on the host
        row = [0] * s.tokens, [False] * (s.tokens - ANSWER) + [True] * ANSWER
        list(attack.retrain(model, [row] * 4, lr=1e-5, epochs=2, size=4, generator=torch.Generator()))

    @torch.no_grad()
    def scored(model: LM) -> None:
        last, _, _ = prefill(model, [[0] * 128] * 64, 16)
        model.lm_head(last)

    micro = s.micro_batch or 4
    ways = {"gd": stepped("gd", None, False), "ssiuu": stepped("ssiuu", None, False),
            f"gd --micro-batch {micro}": stepped("gd", micro, False),
            f"ssiuu --micro-batch {micro}": stepped("ssiuu", micro, False),
            f"ssiuu --micro-batch {micro} --offload": stepped("ssiuu", micro, True),
            "retraining on 4 rows (attack.py)": retrained, "scoring 64 prompts of 128 tokens": scored}
    found = {}
    for name, work in ways.items():
        found[name] = alive_at_peak(CONFIGS[s.config], work)
        print(f"{name}: {found[name]}", flush=True)
    write_json(Path(s.out), {"config": s.config, "B": s.batch_size, "K": s.tokens, "GB": found,
                             **ssiuu.provenance()})
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    print(markdown([[s.config, *names], *([name, *(str(row.get(x, "-")) for x in names)]
                                          for name, row in found.items())]))

def main() -> None:
    s = read_flags(Settings, __doc__)
    check_folder("--out", Path(s.out).parent)
    config = CONFIGS[s.config] if s.config else read_config(located(s.model))
    most = config.max_position_embeddings or 2 ** 31
    if not ANSWER + 1 < s.tokens <= most:
        raise ValueError(f"--tokens: found {s.tokens}, expected {ANSWER + 2} to {most}, {ANSWER} for y")
    ssiuu.item_scores = lambda model, tokenizer, C, size: [1.0] * len(C)
    if s.config and s.device == "cpu":
        return count(s)
    seconds, memory, n = {}, {}, 2 * s.batch_size * s.tokens
    running, shared = {}, []
    if s.literal:
        running, order = {"literal": literal_steps(config, s)}, ["literal"] * (2 + s.rounds)
    else:
        model = LM(config).to(s.device) if s.config else load(s.model, device=s.device)[0]
        order = ["gd", "gd", "ssiuu", "ssiuu"] + ["gd", "ssiuu"] * s.rounds
    for method in order:
        start, peak = time.time(), peak_memory(s.device)
        if method not in running:
            running[method] = steps(model, s, method, shared)
        next(running[method])
        if s.device.startswith("cuda"):
            torch.cuda.synchronize(s.device)
        seconds.setdefault(method, []).append(time.time() - start)
        memory.setdefault(method, []).append(peak())
        print(f"{method:7} {seconds[method][-1]:6.2f} s  {n / seconds[method][-1]:6.0f} tokens/s  "
              f"{memory[method][-1]:5.2f} GB", flush=True)
    result = {"model": s.config or s.model, "B": s.batch_size, "K": s.tokens, "micro_batch": s.micro_batch,
              "offload": s.offload, "seconds": seconds, "GB": memory, **ssiuu.provenance()}
    if s.literal:
        return write_json(Path(s.out), result)
    ratios = [b / a for a, b in zip(seconds["gd"][2:], seconds["ssiuu"][2:])]
    # GD's memory is that before SSIUU's first step: a heap that has grown does not shrink again.
    more = max(memory["ssiuu"]) / max(memory["gd"][:2])
    write_json(Path(s.out), result | {"time_ratios": ratios, "memory_ratio": more})
    print(f"SSIUU / GD, B={s.batch_size}, K={s.tokens}: time {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}, n={len(ratios)})  memory {more:.2f}")

if __name__ == "__main__":
    run(main)
