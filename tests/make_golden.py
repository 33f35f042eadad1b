"""Rebuild tests/golden: tiny random checkpoints and the logits transformers computes for them.

    pip install torch transformers==5.23.0
    python tests/make_golden.py

Each config.json is written out by hand, as in published checkpoints; the model is built from keyword
arguments in transformers' current form.  Reading the directory back must give the very same logits.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

# rms_norm_eps is far larger than usual, and theta far smaller, so that a wrong one shows.
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, hidden_act="silu", rms_norm_eps=0.02,
            bos_token_id=1, eos_token_id=2)
# name -> the keys of config.json besides TINY's; "dtype" and "rope_parameters" are the newer spelling
CASES = {
    "llama": dict(model_type="llama", torch_dtype="float32", tie_word_embeddings=False, rope_theta=300.0,
                  rope_scaling=None),
    "llama3": dict(model_type="llama", torch_dtype="float32", tie_word_embeddings=True, rope_theta=100.0, head_dim=8,
                   # length 32 puts the four wavelengths (6, 20, 63, 199) in all three bands
                   rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=32)),
    "llama_linear": dict(model_type="llama", dtype="float32", tie_word_embeddings=False, attention_bias=True,
                         mlp_bias=False, rope_parameters=dict(rope_theta=200.0, rope_type="linear", factor=4.0)),
    "qwen2": dict(model_type="qwen2", dtype="float32", tie_word_embeddings=False, use_sliding_window=False,
                  sliding_window=8, max_window_layers=1, layer_types=["full_attention", "full_attention"],
                  rope_parameters=dict(rope_theta=400.0, rope_type="default")),
    "qwen2_tied": dict(model_type="qwen2", torch_dtype="float32", tie_word_embeddings=True, rope_theta=150.0,
                       use_sliding_window=False, sliding_window=8, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", torch_dtype="float32", tie_word_embeddings=True, rope_theta=250.0,
                  rope_scaling=None, head_dim=16, attention_bias=False, use_sliding_window=False),
}


def current_form(config):
    """The same values as keyword arguments, with rope_theta and rope_scaling joined in rope_parameters."""
    config = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "dtype")}
    if "rope_theta" in config:
        rope = config.pop("rope_scaling", None) or dict(rope_type="default")
        config["rope_parameters"] = dict(rope, rope_theta=config.pop("rope_theta"))
    return config


def randomise(name, p):
    """Logits of size 3 to 10 and attention scores of size 2 or 3 come out of these scales."""
    if "norm" in name:
        p.data.uniform_(0.7, 1.3).mul_(1.6 if "q_norm" in name or "k_norm" in name else 1.0)
    else:
        gain = {"q_proj": 1.7, "k_proj": 1.7, "embed_tokens": 3.0, "lm_head": 3.0}.get(name.split(".")[-2], 1.0)
        p.data.normal_(std=0.5 if name.endswith("bias") else gain * p.shape[1] ** -0.5)


@torch.no_grad()
def make(name, config, folder):
    torch.manual_seed(sum(map(ord, name)))
    kind = AutoConfig.for_model(config["model_type"], **current_form(config))
    model = AutoModelForCausalLM.from_config(kind, attn_implementation="eager", dtype=torch.float32).eval()
    for p in model.named_parameters():
        randomise(*p)
    ids = torch.randint(config["vocab_size"], (3, 48))
    logits = model(ids).logits
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    names = [n for n, _ in model.named_parameters()]  # lists no tied lm_head.weight
    shards = {"model.safetensors": names}
    if name == "llama":  # two files and an index
        shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        index = dict(metadata={}, weight_map={n: file for file, part in shards.items() for n in part})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    for file, part in shards.items():
        save_file({n: model.get_parameter(n).data for n in part}, folder / file, metadata=dict(format="pt"))

    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, logits), f"{name}: config.json is read back as another model"
    save_file(dict(ids=ids, logits=logits), folder / "golden.safetensors", metadata=dict(names=json.dumps(names)))
    print(f"{name}: logits of size {logits.std():.2f}, at most {logits.abs().max():.1f}")


if __name__ == "__main__":
    for case in CASES:
        make(case, {**TINY, **CASES[case]}, Path(__file__).parent / "golden" / case)
