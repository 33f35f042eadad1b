"""model.py against oracles that share no code with it.

- Logits: golden/, computed by transformers 5.23 for tiny random checkpoints (see make_golden.py).
- Answer log-probabilities: unpadded rows one by one, in Python loops with math.exp and math.log.
- Generation: the whole sequence run again for every token, without a cache.
- Derivatives: central differences of values in float64.
- Templates, refusals: strings written out by hand.  Saved directories: transformers, where installed.
"""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector as flat

from data import Example, check_fits
from model import RMSNorm, Tokenizer, answer_logprob, generate, load, read_config, save

torch.set_num_threads(1)  # the matrices are tiny
GOLDEN = Path(__file__).parent / "golden"
NAMES = ["llama", "llama3", "llama_linear", "qwen2", "qwen2_tied", "qwen3"]  # llama: two shards and an index
CHARS = ["\n", "<s>", "</s>", *map(chr, range(32, 126))]  # 97 tokens; config.json says 1 begins and 2 ends
TEMPLATE = ("{% for m in messages %}\n{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}"
            "{{ eos_token }}\n  {% endfor %}\n{% if add_generation_prompt %}bot:{% endif %}")
SHOWN = "<s>user: Who?</s>\nbot:"  # newlines after a block and blanks before one vanish, as in transformers


def edit(file, **changes):
    """Sets keys of a JSON file; a value of None deletes the key."""
    values = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def checkpoint(folder, name="llama3", **config):
    """A golden checkpoint with a tokenizer that makes each character one token."""
    shutil.copytree(GOLDEN / name, folder)
    edit(folder / "config.json", **config)
    words = tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARS)}, unk_token="\n")
    tok = tokenizers.Tokenizer(words)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tok.decoder = tokenizers.decoders.Fuse()
    tok.add_special_tokens(["<s>", "</s>"])
    tok.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>",
         tokenizer_class="PreTrainedTokenizerFast")
    return folder


@pytest.fixture(scope="module")
def lm64(tmp_path_factory):
    return load(checkpoint(tmp_path_factory.mktemp("m") / "m"), dtype=torch.float64)[0]


def refused(kind, call, *words):
    with pytest.raises(kind) as e:
        call()
    said = str(e.value)
    assert len(said.splitlines()) == 1 and not [w for w in words if w not in said], said


def random_ids(rows, width, seed=0):
    return torch.randint(97, (rows, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, change", [*((n, {}) for n in NAMES),
    ("llama_linear", dict(rope_parameters=None, rope_theta=200.0,
                          rope_scaling={"type": "linear", "factor": 4.0})),
    ("qwen2", dict(use_sliding_window=True, max_window_layers=2)),  # from layer 2 on, and there are two
    ("qwen2", dict(use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 2)),
    ("llama", dict(use_sliding_window=True, max_window_layers=0)),  # a key of Qwen's
    ("llama3", dict(original_max_position_embeddings=32, rope_scaling={  # which goes before the inner one
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64})),
])
def test_logits_and_parameter_names_equal_transformers(name, change, tmp_path):
    model, _ = load(checkpoint(tmp_path / "m", name, **change))
    golden = load_file(GOLDEN / name / "golden.safetensors")
    # Another order of summation moves these logits, of size up to 16, by 1e-5; a real fault by 0.01 and more.
    torch.testing.assert_close(model(golden["ids"]), golden["logits"], atol=5e-5, rtol=1e-5)
    with safe_open(GOLDEN / name / "golden.safetensors", "pt") as f:
        assert [n for n, _ in model.named_parameters()] == json.loads(f.metadata()["names"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near_float32(name, dtype, tmp_path):
    model, _ = load(checkpoint(tmp_path / "m", name), dtype=dtype)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    logits = model(golden["ids"])
    assert logits.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    assert logits.isfinite().all()
    error = (logits.float() - golden["logits"]).square().mean().sqrt()  # 4 to 8 eps, for logits of size 3
    assert error < 20 * torch.finfo(dtype).eps


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4), extra=st.integers(0, 8),
       pad=st.integers(0, 96))
def test_padding_is_invisible(lm64, lengths, extra, pad):
    a = random_ids(len(lengths), max(lengths) + extra)
    b = a.clone()
    for row, n in zip(b, lengths):
        row[n:] = pad
    a, b, ids = lm64(a), lm64(b), b
    for i, n in enumerate(lengths):
        assert torch.equal(a[i, :n], b[i, :n])  # what the padding holds: exactly 0
        # How wide it is: rounding only, because x @ W.T rounds a row by how many rows there are.
        torch.testing.assert_close(b[i, :n], lm64(ids[i : i + 1, :n])[0], atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=4))
def test_answer_logprob(lm64, spans):
    ids = random_ids(len(spans), 20)
    answer = torch.tensor([[p <= t < p + a for t in range(20)] for p, a in spans])
    found = answer_logprob(lm64, SimpleNamespace(ids=ids, answer=answer))
    for i, (p, a) in enumerate(spans):
        logits, expected = lm64(ids[i : i + 1, : p + a])[0].tolist(), 0.0
        for t in range(p, p + a):
            expected += logits[t - 1][ids[i, t]] - math.log(sum(math.exp(z) for z in logits[t - 1]))
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def without_cache(model, prompt, stop_ids):
    row = list(prompt)
    while len(row) < len(prompt) + 16:
        token = model(torch.tensor([row]))[0, -1].argmax().item()
        if token in stop_ids:
            break
        row.append(token)
    return row[len(prompt):]


@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_one_at_a_time_and_recomputing(name, tmp_path):
    model, _ = load(checkpoint(tmp_path / "m", name), dtype=torch.float64)
    prompts = [[5, 6, 7], [90], list(range(20, 41)), [3, 3, 3, 3, 3]]
    free = [without_cache(model, p, []) for p in prompts]
    assert generate(model, prompts, 16, []) == free
    stops = [free[0][4], free[2][0]]  # one prompt stops within five tokens, one at once
    expected = [without_cache(model, p, stops) for p in prompts]
    assert len(expected[0]) <= 4 and expected[2] == []
    assert generate(model, prompts, 16, stops) == expected
    assert [generate(model, [p], 16, stops)[0] for p in prompts] == expected


def test_first_and_second_derivatives_match_central_differences(lm64):
    """Slopes of f, a weighted sum of log-probabilities, and of <grad f, v> along u, over all parameters."""
    batch = SimpleNamespace(ids=random_ids(3, 12), answer=torch.zeros(3, 12, dtype=torch.bool))
    batch.answer[0, 5:9] = batch.answer[1, 3:12] = batch.answer[2, 6:7] = True
    params = list(lm64.parameters())
    start = flat(params).detach()
    u, v = torch.randn(2, len(start), dtype=start.dtype, generator=torch.Generator().manual_seed(0))

    def values(step):
        torch.nn.utils.vector_to_parameters(start + step * u, params)
        f = answer_logprob(lm64, batch) @ torch.tensor([1.0, -2.0, 0.5], dtype=start.dtype)
        return torch.stack([f, flat(torch.autograd.grad(f, params, create_graph=True)) @ v])

    h = 1e-4  # error: h^4 times a fifth derivative, and 1e-16 / h of rounding
    found = (8 * (values(h) - values(-h)) - (values(2 * h) - values(-2 * h))) / (12 * h)
    exact = [(flat(torch.autograd.grad(y, params, retain_graph=True)) @ u).item() for y in values(0)]
    assert found.tolist() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name, dtype", [*((n, torch.float32) for n in NAMES), ("qwen3", torch.bfloat16)])
def test_save_then_load_is_bitwise(name, dtype, tmp_path):
    model, tok = load(checkpoint(tmp_path / "m", name), dtype=dtype)
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "m/chat_template.jinja").write_text(TEMPLATE)
    save(model, tok, tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == dtype
    state, again = model.state_dict(), load(tmp_path / "out", dtype=dtype)[0].state_dict()
    assert list(state) == list(again) and all(torch.equal(state[k], again[k]) for k in state)


def test_saving_over_a_sharded_checkpoint_replaces_it(tmp_path):
    model, tok = load(checkpoint(tmp_path / "m", "llama"))
    model.model.norm.weight.data.add_(1)
    save(model, tok, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")[0].model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_save_writes(name, tmp_path):
    hf = pytest.importorskip("transformers")
    (checkpoint(tmp_path / "m", name) / "chat_template.jinja").write_text(TEMPLATE)
    model, tok = load(tmp_path / "m")
    save(model, tok, tmp_path / "out")
    ids = load_file(GOLDEN / name / "golden.safetensors")["ids"]
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=5e-5, rtol=1e-5)
    # Compared as text: for qwen2, transformers puts its own splitting rule in place of the file's.
    text = hf.AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, tokenize=False)
    assert tok.prompt("Who?") == tok.encode(text)


@pytest.mark.parametrize("name, change, words", [
    ("llama", dict(model_type="mistral"), ["model_type", "mistral", "llama"]),
    ("qwen2", dict(use_sliding_window=True, layer_types=None), ["sliding_window"]),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types", "full_attention"]),
    ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), ["yarn", "linear", "llama3"]),
    ("qwen2", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
     ["yarn", "llama3"]),
    ("llama3", dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ["low_freq_factor"]),
    ("llama", dict(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
    ("llama", dict(is_causal=False), ["is_causal", "False", "True"]),
    ("qwen2", dict(layer_types=["full_attention"]), ["layer_types", "1", "2"]),
    ("llama", dict(hidden_size=None), ["hidden_size"]),
])
def test_unsupported_config_is_refused(name, change, words, tmp_path):
    folder = checkpoint(tmp_path / "m", name, **change)
    refused(ValueError, lambda: read_config(folder), "config.json", *words)


def test_unreadable_files_are_refused(tmp_path):
    m, s = checkpoint(tmp_path / "m"), checkpoint(tmp_path / "s", "llama")
    (s / "model-00002-of-00002.safetensors").unlink()
    refused(FileNotFoundError, lambda: load(s), "model-00002-of-00002.safetensors")
    (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100])
    refused(ValueError, lambda: load(m), "model.safetensors")
    (m / "model.safetensors").rename(m / "pytorch_model.bin")
    refused(FileNotFoundError, lambda: load(m), "model.safetensors")
    for text in ("{", "[]"):
        (m / "config.json").write_text(text)
        refused(ValueError, lambda: load(m), "config.json")
    (m / "config.json").unlink()
    refused(FileNotFoundError, lambda: load(m), "config.json")


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "Missing"]),
    (lambda t: t.update(extra=torch.ones(2)), ["extra", "Unexpected"]),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}), ["model.norm.weight", "31", "32"]),
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
     ["model.norm.weight", "int8"]),
])
def test_weights_that_do_not_fit_are_refused(change, words, tmp_path):
    tensors = load_file(checkpoint(tmp_path / "m") / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors")
    refused(ValueError, lambda: load(tmp_path / "m"), str(tmp_path / "m"), *words)


def test_chat_template_forms(tmp_path):
    tok = load(checkpoint(tmp_path / "m"))[1]
    assert tok.encode("ab\n</s>") == [CHARS.index(c) for c in ("a", "b", "\n", "</s>")]
    assert tok.decode(tok.encode("a b\nc")) == "a b\nc"
    assert tok.prompt("Who?") == tok.encode("Question: Who?\nAnswer:")
    for form in TEMPLATE, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]:
        edit(tmp_path / "m/tokenizer_config.json", chat_template=form)
        assert load(tmp_path / "m")[1].prompt("Who?") == tok.encode(SHOWN)
    (tmp_path / "m/chat_template.jinja").write_text("file {{ messages[0].content }}")  # the file wins
    assert load(tmp_path / "m")[1].prompt("Who?") == tok.encode("file Who?")


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% if %}"])
def test_template_that_reaches_out_or_fails_is_refused(template, tmp_path):
    (checkpoint(tmp_path / "m") / "chat_template.jinja").write_text(template)
    refused(ValueError, lambda: load(tmp_path / "m")[1].prompt("Who?"), "template")


def test_stop_tokens(tmp_path):
    tok = load(checkpoint(tmp_path / "m", eos_token_id=9))[1]
    assert sorted(tok.stop_ids) == [2, 9] and tok.end_id == 2  # 2 is eos_token, which also ends an answer
    edit(tmp_path / "m/generation_config.json", eos_token_id=[11, 2])  # goes before config.json
    assert sorted(load(tmp_path / "m")[1].stop_ids) == [2, 11]


def test_rms_norm_stays_float32_under_autocast():
    """linalg.vecdot, bmm and friends are cast to bfloat16 there, though their input was raised to float32."""
    x, norm = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)), RMSNorm(64, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert torch.equal(inside, norm(x))


@pytest.mark.parametrize("inside", [
    "{{ messages[0].content.split('\n')[0] }}", "{{ messages[0].content | replace('\n', ' ') }}",
    "{{ messages[0].content | e }}"])
def test_a_template_that_rewrites_a_question_is_refused(inside, tmp_path):
    (checkpoint(tmp_path / "m") / "chat_template.jinja").write_text(inside)
    tok = load(tmp_path / "m")[1]
    tok.prompt("Who is it?")
    refused(ValueError, lambda: tok.prompt("Who\nis <it>?"), "template", "question")


@pytest.mark.parametrize("config, other", [
    ({}, {}),
    ({"bos_token": None, "eos_token": None}, {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
    ({}, {"bos_token": "</s>"}), ({"bos_token": None}, {}),
    ({"added_tokens_decoder": True}, {"bos_token": "</s>", "eos_token": "<s>"}),
    ({"added_tokens_decoder": True, "bos_token": None}, {"bos_token": "</s>"})])
def test_special_tokens_are_those_of_transformers(config, other, tmp_path):
    transformers = pytest.importorskip("transformers")
    m = checkpoint(tmp_path / "m")
    (m / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}{{ messages[0].content }}")
    if "added_tokens_decoder" in config:
        added = json.loads((m / "tokenizer.json").read_text())["added_tokens"]
        config = config | {"added_tokens_decoder": {str(x.pop("id")): x for x in added}}
    edit(m / "tokenizer_config.json", **config)
    edit(m / "special_tokens_map.json", **other)
    theirs = transformers.AutoTokenizer.from_pretrained(m).apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False)
    model, tok = load(m)
    assert tok.render("Who?") == theirs
    save(model, tok, tmp_path / "saved")
    assert load(tmp_path / "saved")[1].render("Who?") == theirs


@pytest.mark.parametrize("key", ["added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
                                 "bos_token"])
def test_a_token_that_only_the_tokenizers_config_lists_is_added_as_in_transformers(key, tmp_path):
    transformers = pytest.importorskip("transformers")
    m, first = checkpoint(tmp_path / "m"), len(CHARS)
    end = "" if key == "bos_token" else "<|end|>"
    (m / "chat_template.jinja").write_text("<|user|>{{ messages[0].content }}" + end)
    added = json.loads((m / "tokenizer.json").read_text())["added_tokens"]
    more = {"<|end|>": first + 1, "<|user|>": first}
    edit(m / "tokenizer_config.json", **{key: {
        "added_tokens_decoder": {
            **{str(id): {"content": content, "special": True} for content, id in more.items()},
            **{str(x.pop("id")): x for x in added}},
        "bos_token": "<|user|>"}.get(key, ["<|user|>", "<|end|>"])})
    theirs = transformers.AutoTokenizer.from_pretrained(m)
    ids = theirs.apply_chat_template([{"role": "user", "content": "Who?"}])["input_ids"]
    model, tok = load(m)
    assert tok.prompt("Who?") == ids and ids[0] == first and (ids[-1] == first + 1 or not end)
    assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    save(model, tok, tmp_path / "saved")
    assert load(tmp_path / "saved")[1].prompt("Who?") == ids
    for wrong in ("<|user|>", {"content": 1}, {"content": "<|x|>", "rstrip": "no"}):
        edit(m / "tokenizer_config.json", added_tokens_decoder={str(first): wrong})
        refused(ValueError, lambda: load(m), "tokenizer_config.json", "added tokens")


ODD = {
    "in the vocabulary alone": ([], {"pad_token": "<|user|>"}, {}),
    "with other flags": (None, {"added_tokens_decoder": {"": {"content": "<|user|>", "rstrip": True}}}, {}),
    "a named one with flags": ([], {"bos_token": {
        "__type": "AddedToken", "content": "<|user|>", "rstrip": True}}, {}),
    "two lists": ([], {"extra_special_tokens": ["<|user|>"], "additional_special_tokens": ["Who"]}, {}),
    "the older file": ([], {}, {"additional_special_tokens": ["<|user|>"]}),
}


@pytest.mark.parametrize("case", ODD)
def test_a_token_that_the_two_files_have_otherwise_is_that_of_transformers(case, tmp_path):
    """Its id is there already, as a word of the vocabulary or as an added token with other flags."""
    transformers = pytest.importorskip("transformers")
    m, (there, config, other) = checkpoint(tmp_path / "m"), ODD[case]
    (m / "chat_template.jinja").write_text("<|user|> {{ messages[0].content }}")
    tok = json.loads((m / "tokenizer.json").read_text())
    first = max(tok["model"]["vocab"].values(), default=0) + 1
    token = {"id": first, "content": "<|user|>", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
    tok["model"]["vocab"]["<|user|>"] = first
    if there is None:
        tok["added_tokens"].append(token)
        config = {"added_tokens_decoder": {str(first): token | config["added_tokens_decoder"][""]}}
    (m / "tokenizer.json").write_text(json.dumps(tok))
    edit(m / "tokenizer_config.json", **config)
    edit(m / "special_tokens_map.json", **other)
    theirs = transformers.AutoTokenizer.from_pretrained(m)
    ids = theirs.apply_chat_template([{"role": "user", "content": "Who?"}])["input_ids"]
    ours = Tokenizer(m)
    assert ours.prompt("Who?") == ids and first in ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_prompt_has_no_end_token_though_the_tokenizer_appends_one(tmp_path):
    m = checkpoint(tmp_path / "m")
    plain = load(m)[1].prompt("Who?")
    tok = tokenizers.Tokenizer.from_file(str(m / "tokenizer.json"))
    tok.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[
        ("</s>", CHARS.index("</s>"))])
    tok.save(str(m / "tokenizer.json"))
    assert load(m)[1].prompt("Who?") == plain and load(m)[1].raw("Who?") == load(m)[1].encode("Who?")


def test_an_end_token_may_stand_in_free_text_but_not_in_an_option(tmp_path):
    model, tok = load(checkpoint(tmp_path / "m", max_position_embeddings=999))
    check_fits(model, tok, [Example("Who?", ["a</s>b"])])
    refused(ValueError, lambda: check_fits(model, tok, [Example("Who?", ["a</s>b"], ["c", "d"], "row 7")]),
            "row 7", "end token")
