"""What a step costs: GD and SSIUU in turn through `unlearn` itself, on random tokens.

    python data/results/bench.py --model SMOLLM2

Scoring FS is no part of a step and is left out. On the CPU memory is the peak of resident memory (Linux).
"""
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ssiuu  # noqa: E402
from data import Example  # noqa: E402
from evaluate import Data, read_flags, run  # noqa: E402
from model import LM, Count, load, write_json  # noqa: E402

ANSWER = 6  # tokens of y


@dataclass
class Settings(Data):
    batch_size: Count = 8                 # B, of b and of b'
    tokens: Count = 64                    # K, six of them the answer
    rounds: Count = 5                     # counted steps of each, after two that warm up
    micro_batch: Count | None = None      # sequences in one graph; all
    out: str = "runs/bench.json"          # where the numbers go


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
    settings = ssiuu.Settings(method=method, lr=1e-6, tau=0.0, steps=2 ** 31 - 1, micro_batch=s.micro_batch,
                              target="logprob")  # P of random tokens would be 0, and so would the penalty
    state = ssiuu.begin(model, tokenizer, C_f, settings)
    shared.append(state.optimizer)
    state.optimizer = shared[0]
    yield from ssiuu.unlearn(model, tokenizer, C_f, C_r, settings, state)


def main() -> None:
    s = read_flags(Settings, __doc__)
    if s.tokens <= ANSWER + 1:
        raise ValueError(f"--tokens: found {s.tokens}, expected at least {ANSWER + 2}, {ANSWER} for y")
    model, _ = load(s.model, device=s.device)
    ssiuu.item_scores = lambda model, tokenizer, C, size: [1.0] * len(C)
    seconds, memory, n = {"gd": [], "ssiuu": []}, {"gd": [], "ssiuu": []}, 2 * s.batch_size * s.tokens
    running, shared = {}, []
    for method in ["gd", "gd", "ssiuu", "ssiuu"] + ["gd", "ssiuu"] * s.rounds:
        start, peak = time.time(), peak_memory(s.device)
        if method not in running:
            running[method] = steps(model, s, method, shared)
        next(running[method])
        if s.device.startswith("cuda"):
            torch.cuda.synchronize(s.device)
        seconds[method].append(time.time() - start)
        memory[method].append(peak())
        print(f"{method:6} {seconds[method][-1]:6.2f} s  {n / seconds[method][-1]:6.0f} tokens/s  "
              f"{memory[method][-1]:5.2f} GB", flush=True)
    ratios = [b / a for a, b in zip(seconds["gd"][2:], seconds["ssiuu"][2:])]
    # GD's memory is that before SSIUU's first step: a heap that has grown does not shrink again.
    more = max(memory["ssiuu"]) / max(memory["gd"][:2])
    result = {"model": s.model, "B": s.batch_size, "K": s.tokens, "micro_batch": s.micro_batch,
              "seconds": seconds, "GB": memory, "time_ratios": ratios, "memory_ratio": more,
              **ssiuu.provenance()}
    write_json(Path(s.out), result)
    print(f"SSIUU / GD, B={s.batch_size}, K={s.tokens}: time {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}, n={len(ratios)})  memory {more:.2f}")


if __name__ == "__main__":
    run(main)
