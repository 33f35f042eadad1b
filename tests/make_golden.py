"""Rebuild tests/golden: tiny random checkpoints with the logits transformers computes for them, and small
tokenizers of the kinds that Llama and Qwen checkpoints have, with the ids transformers gives.

    pip install torch transformers==5.23.0
    python tests/make_golden.py

Each config.json is written out by hand, as in published checkpoints; the model is built from keyword
arguments in transformers' current form.  Reading the directory back must give the very same logits.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# rms_norm_eps is far larger than usual, and theta far smaller, so that a wrong one shows.
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, hidden_act="silu", rms_norm_eps=0.02,
            bos_token_id=1, eos_token_id=2)
# name -> the keys of config.json besides TINY's; "dtype" and "rope_parameters" are the newer spelling
CASES = {
    "llama": dict(model_type="llama", torch_dtype="float32", tie_word_embeddings=False, rope_theta=300.0,
                  rope_scaling=None),
    "llama3": dict(model_type="llama", torch_dtype="float32", tie_word_embeddings=True,
                   rope_theta=100.0, head_dim=8,
                   # length 32 puts the four wavelengths (6, 20, 63, 199) in all three bands
                   rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                     high_freq_factor=4.0, original_max_position_embeddings=32)),
    "llama_linear": dict(model_type="llama", dtype="float32", tie_word_embeddings=False,
                         attention_bias=True, mlp_bias=False,
                         rope_parameters=dict(rope_theta=200.0, rope_type="linear", factor=4.0)),
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
        gains = {"q_proj": 1.7, "k_proj": 1.7, "embed_tokens": 3.0, "lm_head": 3.0}
        gain = gains.get(name.split(".")[-2], 1.0)
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

    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert torch.equal(again.eval()(ids).logits, logits), f"{name}: config.json is read back as another model"
    save_file(dict(ids=ids, logits=logits), folder / "golden.safetensors",
              metadata=dict(names=json.dumps(names)))
    print(f"{name}: logits of size {logits.std():.2f}, at most {logits.abs().max():.1f}")


TEXTS = ["Question: Where was Ana Ruiz born?\nAnswer: Lima",
         "Who wrote Dune? Frank Herbert wrote Dune in 1965.", "system user assistant [INST] [/INST]",
         "You are a helpful assistant.", "Lima Lima, the capital of Peru\n\n\n",
         "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
# kind -> special tokens, tokenizer_config.json; the published templates without tools and system turns
TOKENIZERS = {
    "llama2": (["<unk>", "<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>", chat_template=(
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"))),
    "tinyllama": (["<unk>", "<s>", "</s>"], dict(
        bos_token="<s>", eos_token={"content": "</s>", "__type": "AddedToken"}, chat_template=(
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + m['content'] + eos_token }}\n{% else %}\n"
        "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"))),
    "llama3": (["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], dict(
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=[dict(name="default", template=(
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n"
        "        {%- set date_string = strftime_now(\"%d %b %Y\") %}\n    {%- endif %}\n{%- endif %}\n"
        "{%- if tools is not none %}{{- raise_exception('tools') }}{%- endif %}\n"
        "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: \" + "
        "date_string + \"\\n\\n<|eot_id|>\" }}\n{%- for m in messages %}\n"
        "    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "    {%- generation %}\n    {{- m['content'] | trim + '<|eot_id|>' }}\n    {%- endgeneration %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n")),
        dict(name="tool_use", template="no")])),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], dict(
        bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", chat_template=(
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML +
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"))),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], dict(
        bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=(
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- endif %}\n{%- for m in messages %}\n" +
        CHATML.replace("{{ ", "{{- ") + "\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"))),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], dict(
        bos_token=None, eos_token="<|im_end|>", chat_template=(
        "{%- set ns = namespace(last=messages|length - 1) %}\n{%- for m in messages %}\n"
        "    {%- if m.role == 'user' %}\n        " + CHATML.replace("{{ ", "{{- ") + "\n    {%- else %}\n"
        "        {{- '<|im_start|>' + m.role + '\n<think>\n\n</think>\n\n' + "
        "m.content.lstrip('\n') + '<|im_end|>\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\n\n</think>\n\n' }}\n    {%- endif %}\n{%- endif %}"))),
}


def bytes_and_spaces(kind, special):
    """Llama-2's kind: a dummy space by the normalizer, TinyLlama's by Metaspace; bytes for the unknown."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    draft.train_from_iterator([t.replace("\n", " ") for t in TEXTS], trainer)
    model = json.loads(draft.to_str())["model"]
    vocab = {t: i for i, t in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]])}
    tok = Tokenizer(models.BPE(vocab, [tuple(m) for m in model["merges"]], unk_token="<unk>", fuse_unk=True,
                               byte_fallback=True))
    if kind == "llama2":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def byte_level(kind, special):
    tok = Tokenizer(models.BPE())
    if kind == "smollm2":
        parts = [pre_tokenizers.Digits(individual_digits=True),
                 pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        rule = LLAMA3 if kind == "llama3" else LLAMA3.replace("{1,3}", "")
        parts = [pre_tokenizers.Split(Regex(rule), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tok.normalizer = normalizers.NFC() if kind.startswith("qwen") else None
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if kind == "llama3":
        tok.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                                           special_tokens=[("<|begin_of_text|>", 0)])
    return tok


def make_tokenizer(kind, special, names, folder):
    """golden.json: the ids of a question, of question and answer, and of both without the template."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = (bytes_and_spaces if kind in ("llama2", "tinyllama") else byte_level)(kind, special)
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    files = {"config.json": {**TINY, "model_type": "llama", "vocab_size": tok.get_vocab_size(),
                             "eos_token_id": None},
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names}}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")
    theirs, golden = AutoTokenizer.from_pretrained(folder), []
    for question, answer in [("Where was Ana Ruiz born?", "Lima"), (" What is 1965 + 17?\nDigits!", "1982"),
                             ("ならば José, Ünal & 利马?", "Éire")]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = [theirs.apply_chat_template(turns[:n], add_generation_prompt=n == 1, date_string="26 Jul 2024",
                                          enable_thinking=False)["input_ids"] for n in (1, 2)]
        plain = theirs(f"Question: {question}\nAnswer: {answer}")["input_ids"]
        golden.append([question, answer, *ids, plain])
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(f"{kind}: {[len(row[2]) for row in golden]} ids in the prompts")


if __name__ == "__main__":
    GOLDEN = Path(__file__).parent / "golden"
    for case in CASES:
        make(case, {**TINY, **CASES[case]}, GOLDEN / case)
    for case in TOKENIZERS:
        make_tokenizer(case, *TOKENIZERS[case], GOLDEN / "tokenizers" / case)
