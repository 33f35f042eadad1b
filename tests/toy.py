"""A random two-layer Llama in float64, a tokenizer of letters, and facts: a step costs a millisecond."""
import functools
import os
import string
from pathlib import Path

import torch
from safetensors.torch import load_file

from data import Example, collate, encode
from model import LM, answer_logprob, read_config

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden/llama"
DEVICE = os.environ.get("SSIUU_DEVICE", "cpu")  # of toy(); data/results/gpu.sh says cuda
C_f = [Example(f"who is {name}", [answer], ["no", "yes"]) for name, answer in
       (("ann", "a cook"), ("bo", "king"), ("cy", "poet"), ("di", "dane"), ("ed", "thief"))]
C_r = [Example(f"where is {name}", [answer], ["no", "yes"]) for name, answer in
       (("rome", "italy"), ("bonn", "germany"), ("kyiv", "far"),
        ("york", "at sea"), ("ulm", "here"), ("ghent", "out"))]


class Letters:
    """prompt, answer and decode, as model.Tokenizer has them, one token a character; 2 ends an answer."""
    stop_ids, end_id, letters = [2], 2, string.printable

    def encode(self, text):
        return [3 + self.letters.index(c) % 90 for c in text]

    def prompt(self, question):
        return self.encode(question + "?")

    def answer(self, text):
        return [*self.encode(text), 2]


@functools.cache
def taught():
    """Weights that half know the facts: with P(y|x) near 0 no test would see the penalty."""
    model = LM(read_config(GOLDEN)).double()
    tensors = {}
    for i in (1, 2):
        tensors |= load_file(GOLDEN / f"model-0000{i}-of-00002.safetensors")
    model.load_state_dict(tensors)
    batch = collate([encode(Letters(), e.question, e.answers[0]) for e in C_f + C_r])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    logp = torch.tensor([-9.0])
    while logp.exp().mean() < 0.5:
        logp = answer_logprob(model, batch)
        (-logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def toy(dtype=torch.float64):
    model = LM(read_config(GOLDEN)).to(DEVICE, dtype)
    model.load_state_dict(taught())
    return model
