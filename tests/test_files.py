"""What comes in from files: text, JSON, values, tokenizers, templates; a refusal is one line, no traceback.

Tokenizer oracles: golden/tokenizers, the ids transformers 5.24 gives with small tokenizers of six kinds (see
make_golden.py), compared with transformers itself where installed; strings written out by hand; hypothesis.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import load_file, save_file

import model as models
from evaluate import making
from model import (Count, Natural, Positive, Tokenizer, fill, load, parse, read_config, read_json, read_text,
                   save, wanted)
from test_model import GOLDEN, checkpoint, edit, refused

KINDS = ["llama2", "tinyllama", "llama3", "smollm2", "qwen2", "qwen3"]


# ------------------------------------------------------------------------------------- text, JSON, types


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf\xc3\xa9\r\nx")
    assert read_text(tmp_path / "t") == "é\nx"
    for content, byte in ((b"caf\xe9", "byte 3"), ("{}".encode("utf-16"), "byte 0")):
        (tmp_path / "t").write_bytes(content)
        refused(ValueError, lambda: read_text(tmp_path / "t"), str(tmp_path / "t"), "UTF-8", byte)


@pytest.mark.parametrize("text", [
    "", "{", "[NaN]", '{"a": 1, "a": 2}', '{"a": -Infinity}', "[" * 99999, '{"a":' * 99999, "1" * 9999])
def test_what_is_not_json_is_refused(text):
    refused(ValueError, lambda: parse(text, "a.json"), "a.json", "JSON")


def test_json_of_another_kind_is_refused(tmp_path):
    (tmp_path / "f").write_text("[1]")
    assert read_json(tmp_path / "g", default={}) == {}
    refused(ValueError, lambda: read_json(tmp_path / "f"), str(tmp_path / "f"),
            "found [1], expected an object")
    refused(OSError, lambda: read_json(tmp_path / "g"), str(tmp_path / "g"))


@dataclass
class Form:
    lr: Positive
    steps: Count = 1
    seed: Natural | None = None
    base: Literal["gd", "npo"] = "gd"
    rates: tuple[float, ...] = (1.0,)
    on: bool = False
    share: Annotated[float, ("from 0 to 1", lambda x: 0 <= x <= 1)] = 0.5
    name: str = ""


def test_values_are_taken_as_their_fields_types():
    form = fill(Form, {"lr": 1, "rates": [0.5, 2.5], "seed": None, "share": 1}, "f.json")
    assert form == Form(1.0, rates=(0.5, 2.5), share=1.0)
    assert [type(x) for x in (form.lr, form.share, form.steps)] == [float, float, int]
    assert fill(Form, {"lr": 0.1, "other": []}, "f.json", ignore=True) == Form(0.1)
    refused(ValueError, lambda: fill(Form, {"lr": 1, "other": 2}, "f.json"), "f.json", "'other'", "steps")
    refused(ValueError, lambda: fill(Form, {}, "f.json"), "f.json", "no lr", "above 0")


@pytest.mark.parametrize("key, values", [
    ("lr", [None, "1", True, [1], {}, 0, -1, float("nan"), float("inf"), 10 ** 400]),
    ("steps", [0, 2.0, True, 2 ** 31]), ("seed", [-1, False, "", 10 ** 400]),
    ("base", ["", "GD", 1, None, ["gd"]]), ("rates", [[], [True], 1.0, ["1"], [[1]]]),
    ("on", [0, 1, "true", None]), ("share", [1.1, -1e-9]), ("name", [0, None, "\ud800"])])
def test_wrong_values_are_refused_with_their_key(key, values):
    for value in values:
        refused(ValueError, lambda: fill(Form, {"lr": 1.0, key: value}, "f.json"),
                f"f.json: {key} is ", "expected ")
    assert wanted("x", int | None) == "a whole number or null"
    assert wanted(5, Literal[""]) == "''" and wanted("", Literal[""]) == ""


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "save_file", lambda tensors, path, **more: Path(path).touch() or 1 / 0)
    refused(OSError, lambda: models.write_tensors(tmp_path / "w", {}), f"{tmp_path / 'w'}: cannot be written")
    refused(ValueError, lambda: models.write_json(tmp_path / "w", {"x": float("nan")}), "JSON")
    (tmp_path / "f").mkdir()
    refused(OSError, lambda: models.write_json(tmp_path / "f", {}), f"{tmp_path / 'f'}: cannot be written")
    assert [x.name for x in tmp_path.iterdir()] == ["f"]


def test_a_new_folder_is_taken_once_and_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with making(tmp_path / "a/b"):
            (tmp_path / "a/b/half").touch()
            1 / 0
    with making(tmp_path / "a/b"):
        refused(OSError, lambda: making(tmp_path / "a/b").__enter__(), str(tmp_path / "a/b"))
    assert (tmp_path / "a/b").is_dir()


# ----------------------------------------------------------------------------------- checkpoint settings

@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("kept") / "m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(width=16) | st.text(max_size=3) | st.just("\ud800"),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2), max_leaves=4)
PLACES = [(file, key) for file, keys in {
    "config.json": ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "head_dim", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_scaling",
                    "rope_parameters", "rope_theta", "eos_token_id", "tie_word_embeddings", "attention_bias",
                    "hidden_act", "layer_types", "max_position_embeddings", "quantization_config",
                    "use_sliding_window", None],
    "generation_config.json": ["eos_token_id", None],
    "tokenizer_config.json": ["eos_token", "bos_token", "chat_template", None],
    "tokenizer.json": ["model", "added_tokens", "pre_tokenizer", None],
    "model.safetensors.index.json": ["weight_map", None]}.items() for key in keys]


@given(st.sampled_from(PLACES), JSON)
@example(("config.json", "num_attention_heads"), 0)
@example(("config.json", "num_hidden_layers"), 2 ** 31 - 1)
@example(("config.json", "rope_parameters"), {"rope_type": []})
@example(("tokenizer_config.json", "chat_template"), [{"name": []}])
@example(("model.safetensors.index.json", "weight_map"), {"a": "../../x"})
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_file_loads_or_ends_in_one_line(kept, place, value):
    """Nothing is said of which values load, only that each other one names its file in one line."""
    file, key = place
    before = (kept / file).read_bytes() if (kept / file).exists() else None
    if file == "model.safetensors.index.json":
        (kept / "model.safetensors").rename(kept / "hidden")
    content = value if key is None else {**json.loads(before or b"{}"), key: value}
    (kept / file).write_text(json.dumps(content))
    try:
        load(kept)[1].prompt("Who?")
    except (ValueError, OSError) as e:
        assert str(kept) in str(e) and len(str(e).splitlines()) == 1
    finally:
        (kept / file).unlink() if before is None else (kept / file).write_bytes(before)
        if file == "model.safetensors.index.json":
            (kept / "hidden").rename(kept / "model.safetensors")


@pytest.mark.parametrize("file, change, words", [
    ("config.json", dict(num_attention_heads=3), ["num_attention_heads % num_key_value_heads is 1"]),
    ("config.json", dict(head_dim=7), ["head_dim % 2"]),
    ("config.json", dict(vocab_size=True), ["vocab_size is True"]),
    ("config.json", dict(rope_parameters=[1]), ["rope_parameters is [1], expected a flat object"]),
    ("config.json", dict(rope_parameters={"full_attention": {"rope_theta": 5.0}}), ["rope_parameters"]),
    ("config.json", dict(rope_theta="1e4"), ["rope_theta is '1e4'"]),
    ("config.json", dict(rms_norm_eps=0), ["above 0"]),
    ("config.json", dict(eos_token_id=99999), ["eos_token_id is 99999", "below vocab_size 97"]),
    ("generation_config.json", dict(eos_token_id=[2, 97]),
     ["eos_token_id is [2, 97]", "below vocab_size 97"]),
    ("tokenizer_config.json", dict(eos_token={"special": True}),
     ["eos_token is {'special': True}, expected a string"]),
    ("config.json", dict(eos_token_id=[]), ["eos_token_id is []"]),
    ("tokenizer_config.json", dict(eos_token="</none>"), ["tokenizer.json", "</none>"]),
    ("tokenizer_config.json", dict(chat_template=[{"name": "rag", "template": "x"}]),
     ["chat_template is [{'name'"])])
def test_impossible_settings_are_refused(file, change, words, tmp_path):
    m = checkpoint(tmp_path / "m", rope_scaling=None)
    edit(m / file, **change)
    refused(ValueError, lambda: load(m), str(m), *words)


def test_settings_may_begin_with_a_byte_order_mark(tmp_path):
    m = checkpoint(tmp_path / "m")
    (m / "chat_template.jinja").write_text("é{{ messages[0].content }}", encoding="utf-8")
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (m / file).write_bytes(b"\xef\xbb\xbf" + (m / file).read_bytes())
    tok = load(m)[1]
    assert tok.render("Who?") == "éWho?"


def test_positions_are_read(tmp_path):
    assert read_config(checkpoint(tmp_path / "m")).max_position_embeddings == 256
    edit(tmp_path / "m/config.json", max_position_embeddings=None)
    assert read_config(tmp_path / "m").max_position_embeddings is None


# ------------------------------------------------------------------------------------------- tied weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("tied, change, same", [
    (True, lambda t: {HEAD: t.pop(EMBED), **t}, True), (True, lambda t: {**t, HEAD: t[EMBED].clone()}, True),
    (True, lambda t: {**t, HEAD: t[EMBED] + 1}, False), (False, lambda t: {**t, HEAD: t[EMBED] + 1}, False)])
def test_tied_weights_are_those_transformers_loads(tied, change, same, tmp_path):
    m = checkpoint(tmp_path / "m", tie_word_embeddings=tied)
    save_file(change(load_file(m / "model.safetensors")), m / "model.safetensors", metadata={"format": "pt"})
    tensors, (model, tok) = load_file(m / "model.safetensors"), load(m)
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert (embed is head) is same
    assert embed.equal(tensors.get(EMBED, tensors[HEAD])) and head.equal(tensors[HEAD])
    save(model, tok, tmp_path / "again")  # a file that says what its tensors are
    again = load(tmp_path / "again")[0]
    assert again.config.tie_word_embeddings is same and again.lm_head.weight.equal(head)
    hf = pytest.importorskip("transformers")
    for folder in (m, tmp_path / "again"):
        theirs = hf.AutoModelForCausalLM.from_pretrained(folder)
        assert theirs.get_input_embeddings().weight.equal(embed) and theirs.lm_head.weight.equal(head)


@pytest.mark.parametrize("tied, name", [(False, HEAD), (True, EMBED)])
def test_a_matrix_that_is_in_no_file_is_refused(tied, name, tmp_path):
    """transformers draws it at random."""
    m = checkpoint(tmp_path / "m", tie_word_embeddings=tied)
    tensors = load_file(m / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors, m / "model.safetensors")
    refused(ValueError, lambda: load(m), str(m), name)


# --------------------------------------------------------------------------------- tokenizers, templates

@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind, tmp_path):
    folder = GOLDEN / "tokenizers" / kind
    tok = Tokenizer(folder)
    for question, answer, prompt, both, plain in json.loads((folder / "golden.json").read_text()):
        assert tok.prompt(question) == prompt
        x, y = tok.prompt(question), tok.answer(answer)
        assert (x + y[:-1]) == both[:len(x + y) - 1] and y[-1] == tok.end_id and tok.decode(y) == answer
    shutil.copytree(folder, tmp_path / "m")
    edit(tmp_path / "m/tokenizer_config.json", chat_template=None)
    tok = Tokenizer(tmp_path / "m")
    for question, answer, _, _, plain in json.loads((folder / "golden.json").read_text()):
        assert tok.prompt(question) + tok.answer(answer) == plain + [tok.end_id]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_ids_are_still_those_of_transformers(kind):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / kind)
    for question, _, prompt, _, _ in json.loads((GOLDEN / "tokenizers" / kind / "golden.json").read_text()):
        turns = [{"role": "user", "content": question}]
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, date_string="26 Jul 2024",
                                         enable_thinking=False)["input_ids"]
        assert ids == prompt


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_an_answer_has_the_tokens_of_the_whole_text(scheme):
    """By hand: `Answer: Lima` ends in ▁L im a, and Lima right behind a line break in L im a."""
    tok = Tokenizer(GOLDEN / "tokenizers/llama2")
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *"LimaAnswer:", "▁L", "im"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    bpe = tokenizers.models.BPE(vocab, [("▁", "L"), ("i", "m")], unk_token="<unk>")
    tok.tokens = tokenizers.Tokenizer(bpe)
    tok.tokens.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spell = lambda ids: [tok.tokens.id_to_token(i) for i in ids]
    assert spell(tok.encode(" Lima")) == ["▁L", "im", "a"] and spell(tok.encode("Lima")) == ["L", "im", "a"]
    assert spell(tok.encode("\nLima")) == ["\n", "L", "im", "a"] and tok.encode("") == []
    # a line break leaves no token
    fewer = {piece: i for piece, i in vocab.items() if piece not in ("\n", "<unk>")}
    tok.tokens.model = tokenizers.models.BPE(fewer, [("▁", "L")])
    assert spell(tok.encode(" Lima"))[0] == "▁L" and spell(tok.encode("Lima"))[0] == "L"


ENVIRONMENT = (
    "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n  {%- generation -%}\n "
    "{% set x = 1 %}{{ m.content }}\n {%- endgeneration %}\n{% endfor %}"
    "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ [1] | tojson(indent=1) }}{{ x is defined }}"
    "{{ tools is none }}{{ documents is none }}{{ pad_token }}{{ add_generation_prompt }}"
    "{{ date_string is defined }}{{ bos_token }}\n\n")


def test_templates_see_what_transformers_shows_them(tmp_path):
    m = checkpoint(tmp_path / "m")
    (m / "chat_template.jinja").write_text(ENVIRONMENT, encoding="utf-8")
    shown = load(m)[1].render("Who?")
    assert shown == 'Who?{"b": "<é>", "a": [1]}[\n 1\n]FalseTrueTrueTrueFalse<s>\n'
    hf = pytest.importorskip("transformers")
    assert shown == hf.AutoTokenizer.from_pretrained(m).apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, tokenize=False)


def test_a_template_may_want_the_users_turn_last(tmp_path):
    (checkpoint(tmp_path / "m") / "chat_template.jinja").write_text(
        "{{ messages[0].content }}"
        "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}: ")
    tok = load(tmp_path / "m")[1]
    assert tok.render("Who?") == "Who?: " and tok.answer("Me") == tok.encode("Me") + [tok.end_id]


@pytest.mark.parametrize("template", [
    "", "Hello", "{{ messages | length }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('a\\nb') }}",
    "{% if %}", "{{ messages[0].content + bos_token + none }}", "((" * 9999 + "{{" + "(" * 9999,
    "{% for i in range(10**9) %}{% endfor %}"])
def test_a_template_that_cannot_be_used_is_refused(template, tmp_path):
    (checkpoint(tmp_path / "m") / "chat_template.jinja").write_text(template)
    refused(ValueError, lambda: load(tmp_path / "m"), str(tmp_path / "m"), "template")
