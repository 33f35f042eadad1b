"""The attacks beyond the paper: LoRA's factors change what they should, and rounding is to the nearest."""
import json
import sys

import numpy as np
import pytest
import torch

from data import collate
from model import answer_logprob
from test_attack import ROOT, copies, encoded, hidden, loaded, put_back, tiny, wants  # noqa: F401, fixtures

sys.path.insert(0, str(ROOT / "data/results"))

import attack  # noqa: E402
import other_attacks  # noqa: E402
from attack import harmful_attack, summary  # noqa: E402
from other_attacks import projections, quantisation_attack, quantise, retrain_lora  # noqa: E402


@pytest.mark.parametrize("steps", [1, 2])
def test_lora_adds_a_matrix_of_its_rank_to_block_weights_alone(tiny, steps):
    """Also where the caller stops early; through the hooks the model is what it is when merged."""
    model, tokenizer, C_f = tiny
    data, before = encoded(tokenizer, hidden(C_f[:6])), copies(model)
    model.model.norm.weight.requires_grad_(False)  # a weight that was frozen before stays frozen
    run = retrain_lora(model, data, 1e-2, 2, 4, torch.Generator().manual_seed(0), 3)
    for _ in range(steps):
        next(run)
    with torch.no_grad():
        hooked = model(torch.tensor([data[0][0]]))
        run.close()
        merged, after = model(torch.tensor([data[0][0]])), copies(model)
    frozen = [name for name, w in model.named_parameters() if not w.requires_grad]
    model.requires_grad_(True)
    put_back(model, before)
    assert torch.allclose(hooked, merged, atol=1e-3) and frozen == ["model.norm.weight"]
    for name in before:
        change = (after[name] - before[name]).double()
        if "_proj" in name:
            values = torch.linalg.svdvals(change)
            assert values[2] > 0 and values[3] < 1e-4 * values[0], name
        else:
            assert not change.any(), name


def test_lora_starts_where_the_model_is_and_learns(tiny):
    model, tokenizer, C_f = tiny
    data, before = encoded(tokenizer, hidden(C_f[:4])), copies(model)
    with torch.no_grad():
        start = -answer_logprob(model, collate(data)).mean().item()
    losses = list(retrain_lora(model, data, 1e-2, 8, 4, torch.Generator().manual_seed(0), 8))
    put_back(model, before)
    assert losses[0] == pytest.approx(start, rel=1e-5) and losses[-1] < 0.5 * start


def test_quantise_by_numpy(tiny):
    model, before, error = tiny[0], copies(tiny[0]), {}
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0  # a row of zeros must not become NaN
    start = copies(model)
    for bits in (8, 4):
        quantise(model, bits)
        found = copies(model)
        put_back(model, start)
        for name, w in start.items():
            if "_proj" not in name:
                assert torch.equal(found[name], w), name
                continue
            W, top = w.numpy().astype(np.float64), 2 ** (bits - 1) - 1
            step = np.abs(W).max(1, keepdims=True) / top
            levels = np.divide(found[name].numpy(), step, out=np.zeros_like(W), where=step > 0)
            assert np.abs(levels - levels.round()).max() < 1e-4 and np.abs(levels).max() <= top + 1e-4, name
            assert (np.abs(found[name].numpy() - W) <= step / 2 * (1 + 1e-4)).all(), name  # the nearest level
            error[bits] = error.get(bits, 0) + np.square(found[name].numpy() - W).sum()
    put_back(model, before)
    assert 0 < 100 * error[8] < error[4]


def test_quantisation_attack_has_a_cell_for_each_number_of_bits(tiny):
    model, tokenizer, C_f = tiny
    wide, narrow = (quantisation_attack(model, tokenizer, C_f[:6], bits) for bits in (8, 2))
    assert (wide["kind"], wide["bits"], wide["n"], narrow["bits"]) == ("quantise", 8, 6, 2)
    assert wide["FS"][0] == narrow["FS"][0] == 100 and wide["logp"][0] == narrow["logp"][0]
    assert abs(wide["logp"][1] - wide["logp"][0]) < 0.2 < abs(narrow["logp"][1] - narrow["logp"][0])
    assert summary([narrow])["n"] == 6 and summary([narrow])["draws"] == 1


def test_the_command(tiny, monkeypatch, capsys):
    monkeypatch.setattr(other_attacks, "falsely_answered", lambda *args: hidden(tiny[2][:4]))
    paths = ["--model", str(ROOT / "data/tiny"), "--forget", str(ROOT / "data/faithun.json")]
    flags = ["--p", "0.5", "--attack-lrs", "1e-3", "--attack-epochs", "1", "--attack-draws", "1"]
    monkeypatch.setattr("sys.argv", ["other_attacks.py", *paths, *flags, "--rank", "2", "--bits", "8", "4"])
    other_attacks.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["harmful", *["summary", "quantise"] * 2, "summary"]
    assert [line["n"] for line in lines if line["kind"] == "summary"] == [2, 4, 4]
    monkeypatch.setattr("sys.argv", ["other_attacks.py", *paths])
    with pytest.raises(ValueError, match="--rank, --bits"):
        other_attacks.main()


def test_lora_leaves_no_hook_and_no_frozen_weight_after_an_error(tiny):
    """The fixture compares the weights and requires_grad."""
    model, tokenizer, C_f = tiny
    s = wants(attack_lrs=(1e30,), attack_epochs=3)

    def how(*args):
        return retrain_lora(*args, 2)

    failed, = harmful_attack(model, tokenizer, hidden(C_f[:6]), 0.5, s, how=how)
    assert "failed" in failed and not any(layer._forward_hooks for layer in projections(model))
