"""Fine-tunes a model on facts that it does not know, before they can be unlearned (C.1: 5 epochs at 1e-5).

    python data/teach.py --model SMOLLM2 --out runs/taught --teach-lr 2e-4     # data/faithun.json
    python data/teach.py --model SMOLLM2 --out runs/taught --rows full.json    # TOFU's, or your own

All of FaithUn's facts are taught, in splits or not, as other folds forget others: as plain questions and in
Table 3's form, options in an order scoring does not use. `--without K` makes the model never taught C_f.
"""
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attack import retrain  # noqa: E402
from data import Example, check_fits, encode, load_faithun, load_tofu, mcqa_prompt, same  # noqa: E402
from evaluate import Data, Name, Rate, check_folder, making, read_flags, run, splits_of  # noqa: E402
from model import Count, Natural, load, refuse, save  # noqa: E402

@dataclass
class Settings(Data):
    rows: Name | None = None              # JSON lines of question and answer; the facts of --forget
    without: Natural | None = None        # leave out what this fold forgets
    out: Name = "runs/taught"             # a new folder for the model
    teach_lr: Rate = 1e-5                 # learning rate (C.1, TOFU)
    teach_epochs: Count = 5               # passes over the rows (C.1, TOFU)
    teach_batch: Count = 8                # rows a step; unpublished
    bf16: bool = False                    # autocast: faster where the processor has bfloat16

def examples_of(s: Settings) -> list[Example]:
    if s.rows:
        examples = load_tofu(s.rows)
    else:
        examples = sum(splits_of(s)[:2], []) if s.retain else load_faithun(s.forget)
    if s.without is None:
        return examples
    left_out = {same(e) for e in splits_of(replace(s, fold=s.without))[0]}
    rest = [e for e in examples if same(e) not in left_out]
    if len(examples) - len(rest) < len(left_out):
        refuse(f"--without: found {len(examples) - len(rest)} of the {len(left_out)} facts of fold "
               f"{s.without}, expected all of them among the rows")
    return rest

def main() -> None:
    s = read_flags(Settings, __doc__)
    if os.path.lexists(s.out):
        refuse(f"--out: found {s.out!r}, expected a new folder")
    check_folder("--out", s.out)
    examples = examples_of(s)
    model, tokenizer = load(s.model, device=s.device)
    check_fits(model, tokenizer, examples)
    rows, draw, start = [], random.Random(f"teach {s.seed}"), time.time()
    for e in examples:
        rows.append(encode(tokenizer, e.question, e.answers[0]))
        if e.false_options:
            rows.append(encode(tokenizer, mcqa_prompt(e, draw), e.answers[0]))
    generator = torch.Generator().manual_seed(s.seed)
    losses = retrain(model, rows, s.teach_lr, s.teach_epochs, s.teach_batch, generator)
    # no cache: it would hold the first step's weights as long as the context lasts
    with torch.autocast(model.device.type, torch.bfloat16, enabled=s.bf16, cache_enabled=False):
        for i, loss in enumerate(losses, 1):
            seconds = time.time() - start
            print(f"teach {i}/{s.teach_epochs}  {len(rows)} rows  loss {loss:.4f}  {seconds:.0f}s  "
                  f"eta {seconds / i * (s.teach_epochs - i):.0f}s", flush=True)
    with making(s.out):
        save(model, tokenizer, s.out)

if __name__ == "__main__":
    run(main)
