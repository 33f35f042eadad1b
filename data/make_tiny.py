"""Train the tiny model of data/tiny: a 1.9M-parameter Llama that knows the 664 facts of faithun.json.

    python data/make_tiny.py [OUT=data/tiny] [--without K]

With --without K the model is never taught the facts that fold K forgets: what exact unlearning would leave.
The tokenizer stays the same, made of the texts of all facts.

Unlearning needs a model that knows what it is to forget, and the paper's models do not fit a laptop or a
test. This one is trained from nothing, tokenizer included, on the answers alone: each fact's base question,
its two paraphrases, and Table 3's multiple-choice prompt with freshly shuffled options. It takes about
2 minutes on two free CPU cores. The seed fixes everything: two runs on one machine write the same weights.
OUT is replaced only by a model that knows at least 97 % of each split it was taught: see OUT/made.json.
"""
import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import Example, collate, encode, load_faithun, mcqa_prompt, split  # noqa: E402
from evaluate import answered, check_folder, run, score  # noqa: E402
from model import LM, Tokenizer, answer_logprob, generate, read_config, refuse, save  # noqa: E402

SEED, REQUIRED = 0, 97.0
# 16 epochs end at a P(answer) of about 0.93; 40 reach 0.99 and gain nothing in accuracy.
EPOCHS, BATCH, LR, WEIGHT_DECAY, WARMUP, CLIP = 16, 64, 1e-3, 0.1, 100, 1.0
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]  # <|end|> first: its id is then 0, collate's padding
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1536,
          "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
          "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512,
          "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
          "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
          "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}

def write_tokenizer(facts: list[list[Example]], out: Path) -> None:
    """config.json and a byte-level BPE tokenizer made of all questions, answers, options and the template."""
    texts = [text for wordings in facts for e in wordings
             for text in (e.question, mcqa_prompt(e, random.Random(SEED)), *e.answers, *e.false_options)]
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    found = tokens.get_vocab_size()
    assert found == CONFIG["vocab_size"], f"only {found} tokens were found"
    tokens.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in [
            ("config.json", CONFIG), ("generation_config.json", {"eos_token_id": 0, "pad_token_id": 0}),
            ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0],
                                       "pad_token": SPECIAL[0], "model_max_length": 512})]:
        (out / name).write_text(json.dumps(content, indent=2) + "\n")

def initialise(model: LM, generator: torch.Generator) -> LM:
    """Normal weights, std 0.02; those that write to the residual stream shrink with its 2 x layers terms."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / (math.sqrt(2 * CONFIG["num_hidden_layers"]) if deep else 1),
                                  generator=generator)
    return model

def epoch_batches(plain: list, facts: list[list[Example]], tokenizer: Tokenizer, epoch: int,
                  generator: torch.Generator) -> list:
    """One epoch: every plain row, and each fact's multiple-choice row in one of its wordings, as such a row
    costs four plain ones; the next epoch has the next. Rows of like length share a batch: less padding."""
    rng = random.Random(f"{SEED} {epoch}")
    rows = plain + [encode(tokenizer, mcqa_prompt(e[(i + epoch) % len(e)], rng), e[0].answers[0])
                    for i, e in enumerate(facts)]
    order = torch.randperm(len(rows), generator=generator).tolist()
    order.sort(key=lambda i: len(rows[i][0]))  # stable: rows of one length stay shuffled
    parts = [order[i:i + BATCH] for i in range(0, len(order), BATCH)]
    return [collate([rows[i] for i in parts[p]]) for p in torch.randperm(len(parts), generator=generator)]

def train(model: LM, tokenizer: Tokenizer, facts: list[list[Example]], generator: torch.Generator) -> float:
    """AdamW with warmup and cosine decay on the answers' mean negative log-probability per token."""
    plain = [encode(tokenizer, e.question, e.answers[0]) for wordings in facts for e in wordings]
    steps = EPOCHS * math.ceil((len(plain) + len(facts)) / BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    start = time.monotonic()
    for epoch in range(EPOCHS):
        losses = []
        for batch in epoch_batches(plain, facts, tokenizer, epoch, generator):
            loss = -(answer_logprob(model, batch) / batch.answer.sum(1)).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        loss, seconds = sum(losses) / len(losses), time.monotonic() - start
        print(f"epoch {epoch + 1}/{EPOCHS}  loss {loss:.4f}  {seconds:.0f} s  "
              f"ETA {seconds / (epoch + 1) * (EPOCHS - epoch - 1):.0f} s", flush=True)
    return loss

@torch.no_grad()
def check(model: LM, tokenizer: Tokenizer, facts: list[list[Example]], fold: int) -> dict:
    """Per split: multiple-choice accuracy, exact greedy answers to plain wordings, and the mean P(answer)."""
    def exact(examples: list[Example]) -> dict:
        outputs = generate(model, [tokenizer.prompt(e.question) for e in examples], 24, tokenizer.stop_ids)
        return score([tokenizer.decode(ids) == e.answers[0] for ids, e in zip(outputs, examples)])

    scores = {}
    for name, part in zip(("forget", "retain", "test"), split(facts, HERE / "faithun_splits", fold)):
        base = [wordings[0] for wordings in part]
        rows = collate([encode(tokenizer, e.question, e.answers[0]) for e in base])
        scores[name] = {"multiple_choice": score(answered(model, tokenizer, base)), "base": exact(base),
                        "paraphrases": exact([e for wordings in part for e in wordings[1:]]),
                        "mean_P_base": round(answer_logprob(model, rows).exp().mean().item(), 4)}
    return scores

def make(out: Path, without: int | None) -> None:
    if out.exists() and not (out / "made.json").is_file():
        refuse(f"{out}: found something that this script did not make, expected a new folder")
    check_folder("OUT", out)
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch.set_num_threads(int(threads) if threads.isdecimal() and int(threads) else 2)
    start, generator = time.monotonic(), torch.Generator().manual_seed(SEED)
    base, more = (load_faithun(HERE / "faithun.json", part) for part in ("hop1_unlearn", "hop1_test"))
    # hop1_test keeps the facts' order, two each
    facts = [[e, *more[2 * i:2 * i + 2]] for i, e in enumerate(base)]
    assert all(e.answers == wordings[0].answers for wordings in facts for e in wordings)
    left_out = [] if without is None else split(facts, HERE / "faithun_splits", without)[0]
    # beside OUT, renamed when whole: a killed run leaves OUT as it was
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    draft.chmod(0o755)
    write_tokenizer(facts, draft)
    tokenizer, model = Tokenizer(draft), initialise(LM(read_config(draft)), generator)
    loss = train(model, tokenizer, [e for e in facts if e not in left_out], generator)
    scores = check(model, tokenizer, facts, without or 0)
    save(model, tokenizer, draft)
    made = {"seed": SEED, "epochs": EPOCHS, "batch": BATCH, "lr": LR, "weight_decay": WEIGHT_DECAY,
            "warmup": WARMUP, "clip": CLIP, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "seconds": round(time.monotonic() - start), "without": without,
            "parameters": sum(p.numel() for p in model.parameters()), "final_loss": round(loss, 5),
            "scores": scores}
    (draft / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made, indent=2))
    low = [f"{name} {form} {s['percent']} %" for name, forms in scores.items() for form, s in forms.items()
           if isinstance(s, dict) and s["percent"] < REQUIRED and not (left_out and name == "forget")]
    if low:
        refuse(f"{draft}: found {', '.join(low)}, expected at least {REQUIRED} %: it was not renamed")
    if out.exists():
        shutil.rmtree(out)
    draft.rename(out)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "tiny",
                        help="folder of the model (data/tiny)")
    parser.add_argument("--without", type=int, metavar="K", help="leave out the forget set of fold K (none)")
    args = parser.parse_args()
    make(args.out.absolute(), args.without)

if __name__ == "__main__":
    run(main)
