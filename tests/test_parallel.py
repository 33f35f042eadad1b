"""Two processes against one: both run `work`, and all that it returns has to agree, in float64 to 1e-12.

The processes are real (gloo). What is compared is whole: gradients and weights are put together again, by
the function that saves a model, and a saved model is compared byte for byte with what one process writes.
"""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import attack
import model as models
import ssiuu
from data import collate, encode
from evaluate import neuron_attribution
from model import LM, Copy, Reduce, answer_logprob, generate, here, joined, load, own, read_config, save
from model import write_tensors
from ssiuu import Settings, begin, load_state, surrogate, state_tensors, unlearn
from test_cli import DATA, ROOT, inside, prepare, records
from test_model import checkpoint, edit, refused
from toy import C_f, C_r

CASES = {"llama": ("llama3", dict(tie_word_embeddings=True)),
         "llama with biases": ("llama_linear", dict(attention_bias=True, mlp_bias=True, num_hidden_layers=1)),
         "qwen2": ("qwen2_tied", dict(num_hidden_layers=1)),
         "qwen3": ("qwen3", dict(tie_word_embeddings=False))}
S = Settings(lam=0.5, lr=1e-3, steps=3, tau=0.0)
RUNS = {"default": {}, "parts": dict(micro_batch=3, anchor="initial", backbone="npo", scope="linear"),
        "each": dict(per_example=True), "rmu": dict(method="rmu", rmu_alpha=7.0)}


def rows_of(tokenizer, C):
    return [encode(tokenizer, e.question, e.answers[0]) for e in C]


def taught(folder, name, change):
    """A checkpoint in float64 that half knows the facts, its norms and biases random too."""
    torch.manual_seed(0)
    path = checkpoint(folder / "untaught", name, **change)
    model, tokenizer = LM(read_config(path)).double(), models.Tokenizer(path)
    for p in model.parameters():
        p.data = torch.rand_like(p) + 0.5 if p.dim() == 1 else torch.randn_like(p) / p.shape[-1] ** 0.5
    optimizer, batch = torch.optim.Adam(model.parameters(), lr=1e-2), collate(rows_of(tokenizer, C_f + C_r))
    logp = torch.tensor([-9.0])
    while logp.exp().mean() < 0.3:
        logp = answer_logprob(model, batch)
        (-logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, tokenizer, folder / "model")
    return folder / "model"


def whole(model, tensors):
    names = [name for name, _ in model.named_parameters()]
    return {name: joined(name, t.detach()).clone() for name, t in zip(names, tensors, strict=True)}


def derivatives(path):
    """g, Hv by double backward, and what l.13 leaves in .grad; the direction v does not depend on ranks."""
    model, tokenizer = load(path, dtype=torch.float64)
    draw, phi = torch.Generator().manual_seed(1), list(model.parameters())
    v = [joined(name, p.detach()) for name, p in model.named_parameters()]
    v = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in from_first(v)]
    v = [own(name, x) for (name, _), x in zip(model.named_parameters(), v)]
    logp = answer_logprob(model, collate(rows_of(tokenizer, C_f)))
    g = torch.autograd.grad(logp.exp().sum(), phi, create_graph=True)
    Hv = torch.autograd.grad(g, phi, v, retain_graph=True)
    surrogate(logp.mean(), ssiuu.attribution(logp.exp().sum(), phi), v).backward()
    return {"g": whole(model, g), "Hv": whole(model, Hv), "l.13": whole(model, [p.grad for p in phi])}


def from_first(tensors):
    """Rank 0 alone gets a whole tensor from `joined`; the others need its shape."""
    return models.from_all([torch.empty(t.shape, dtype=t.dtype) for t in tensors])[0]


def steps(path, change, *stops):
    """Weights and records after three steps; at each of `stops` a state is saved, and read by a new model."""
    s, log = replace(S, **change), []
    for last in (*stops, 3):
        model, tokenizer = load(path, dtype=torch.float64)
        state, file = begin(model, tokenizer, C_f, s), path / f"state {here()}.safetensors"
        if log:
            load_state(file, model, state, len(C_f), s)
        log += unlearn(model, tokenizer, C_f, C_r, replace(s, steps=last), state)
        write_tensors(file, state_tensors(model, state), each=True)
    return whole(model, model.parameters()), [r for r in log if r.pop("seconds")]


def work(folder):
    """All that is compared, of every model in `folder`."""
    found = {}
    with mock.patch.object(ssiuu, "item_scores", lambda *args: [1.0] * len(C_f)):
        for case in CASES:
            path = folder / case / "model"
            model, tokenizer = load(path, dtype=torch.float64)
            prompts = [tokenizer.prompt(e.question) for e in C_f + C_r]
            save(model, tokenizer, folder / case / f"saved by {here()[1]}")
            found[case] = {**derivatives(path), "texts": generate(model, prompts, 4, tokenizer.stop_ids),
                           "size": sum(p.numel() for p in model.parameters())}
            for name in RUNS if case == "qwen3" else ["default"]:
                found[case][name] = steps(path, RUNS[name])
            if case == "qwen3":
                found[case]["resumed"] = steps(path, {}, 2)
                s = attack.Settings(attack_draws=1, attack_lrs=(1e-2,), attack_epochs=1)
                found[case]["attack"] = list(attack.harmful_attack(model, tokenizer, C_f, 0.6, s))
    return found


def refusals(folder):
    """What has to be refused in two processes, and is not in one."""
    model, tokenizer = load(folder / "llama/model")
    batch = collate(rows_of(tokenizer, C_f))
    one = "the number of processes is 2, expected 1"
    refused(ValueError, lambda: neuron_attribution(model, batch), one, "--before")
    for words in (["--method", "klue"], ["--method", "random"], ["--penalise", "random"]):
        with mock.patch.object(sys, "argv", ["ssiuu.py", *words]):
            refused(ValueError, ssiuu.main, one, *words)
    refused(ValueError, lambda: load(folder / "uneven"), "num_key_value_heads % 2 processes is 1, expected 0")


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = work(folder)
    refusals(folder)
    with mock.patch.object(Copy, "backward", lambda ctx, grad: Reduce.apply(grad.detach())):
        found["detached"] = derivatives(folder / "llama/model")
    if rank == 0:
        torch.save(found, folder / "two.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(of one process, of two)."""
    folder = tmp_path_factory.mktemp("models")
    for case, (name, change) in CASES.items():
        (folder / case).mkdir()
        taught(folder / case, name, change)
    checkpoint(folder / "uneven", "llama3", num_key_value_heads=1)
    two = torch.multiprocessing.spawn(process, (folder,), nprocs=2, join=False)
    one = work(folder)  # meanwhile
    while not two.join():
        pass
    return one, torch.load(folder / "two.pt"), folder


def close(a, b, rel):
    """JSON values that agree: numbers to `rel`, all else exactly; seconds do not count."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        [close(a[key], b[key], rel) for key in a if key != "seconds"]
    elif isinstance(a, list):
        [close(*pair, rel) for pair in zip(a, b, strict=True)]
    else:
        assert b == (pytest.approx(a, rel=rel, abs=0) if isinstance(a, float) else a)


def error(one, two):
    """The largest difference between whole tensors, relative to the largest number of each."""
    assert list(one) == list(two) and all(a.shape == two[name].shape for name, a in one.items())
    return max(((a - two[name]).abs().max() / a.abs().max().clamp(min=1e-300)).item()
               for name, a in one.items())


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(case, results):
    one, two, _ = results
    for name in ("g", "Hv", "l.13"):
        assert error(one[case][name], two[case][name]) < 1e-12, name
    assert 0.5 * one[case]["size"] <= two[case]["size"] <= 0.51 * one[case]["size"]


def test_a_reduction_that_autograd_does_not_see_would_be_noticed_by_Hv_alone(results):
    one, two, _ = results
    one, two = one["llama"], two["detached"]
    assert error(one["g"], two["g"]) < 1e-12 and error(one["Hv"], two["Hv"]) > 0.1


@pytest.mark.parametrize("case, name", [*((case, "default") for case in CASES),
                                        *(("qwen3", name) for name in RUNS)])
def test_three_steps_of_algorithm_1(case, name, results):
    (weights, log), (weights_of_two, log_of_two) = results[0][case][name], results[1][case][name]
    assert error(weights, weights_of_two) < 1e-12 and len(log) == 3
    close(log, log_of_two, 1e-12)
    assert name == "rmu" or 0 < log[2]["L_SSIUU"] and 0 < log[2]["I_neg"] < 1


def test_a_resumed_run_of_two_is_the_same_run_bit_for_bit(results):
    once, resumed = (results[1]["qwen3"][name] for name in ("default", "resumed"))
    assert error(once[0], resumed[0]) == 0 and once[1] == resumed[1]


@pytest.mark.parametrize("case", CASES)
def test_generation_and_saved_files(case, results):
    one, two, folder = results
    assert one[case]["texts"] == two[case]["texts"] and any(one[case]["texts"])
    files = sorted(file.name for file in (folder / case / "saved by 1").iterdir())
    assert files == sorted(file.name for file in (folder / case / "saved by 2").iterdir())
    for name in files:
        one, two = (folder / case / f"saved by {n}" / name for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()


def test_an_attack(results):
    one, two = (result["qwen3"]["attack"] for result in results[:2])
    close(one, two, 1e-12)
    assert len(one) == 1 and len(set(one[0]["margin"])) == 2


def test_the_command_says_and_writes_what_one_process_does(tmp_path, monkeypatch):
    prepare(tmp_path)
    flags = [*DATA, "--steps", "2", "--tau", "0", "--no-attack"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               ROOT / "ssiuu.py"]
    with subprocess.Popen([*command, *flags, "--name", "two"], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as torchrun:
        assert inside(monkeypatch, tmp_path, "ssiuu.py", *flags, "--name", "one") == 0  # meanwhile
        said, errors = torchrun.communicate()
    assert torchrun.returncode == 0, errors
    assert said.count("step 2/2") == said.count("| Default |") == 1 and errors.count("sets lr") == 1
    one, two = (json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("one", "two"))
    for name in ("before", "after"):
        assert (one[name]["FS"], one[name]["RS"]) == (two[name]["FS"], two[name]["RS"])
    logs = [records(tmp_path / "runs" / name) for name in ("one", "two")]
    assert [len(log[-1].pop("weights").split()) for log in logs] == [1, 2]  # a hash of each process's slices
    close(*logs, 1e-4)
