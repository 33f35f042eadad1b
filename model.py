"""The language model: a hand-written Llama / Qwen2 / Qwen3 decoder that reads Hugging Face checkpoints.

Parameters carry Hugging Face's own names in Hugging Face's order, and RoPE rotates split halves as
theirs does, so loading renames and permutes nothing, and phi here is phi in any other codebase.

Dimensions: B sequences, K tokens (as in Eq. 1), V vocabulary, D hidden size,
            H query heads, G key/value heads, d head size.
"""
import json
import math
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import jinja2
import jinja2.sandbox
import tokenizers
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------- the decoder


@dataclass
class Config:
    """The fields of a checkpoint's config.json that change the forward pass."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: dict              # rope_type, rope_theta and the scaling's own numbers
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool           # Qwen3: RMSNorm of each head's q and k
    raw: dict               # config.json as it was read, for save()


def rope_frequencies(config: Config) -> Tensor:  # -> (d/2,)
    """Radians per position of each rotated pair, after `linear` or `llama3` scaling."""
    rope, d = config.rope, config.head_dim
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    if rope["rope_type"] == "linear":
        return freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Long waves are slowed by `factor`, short ones kept, those in between blended.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / rope["factor"]
    return freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, K, H, d), (B, K, 1, d/2) twice -> (B, K, H, d)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # promote_types, not .float(): a float64 model must stay float64, or finite differences are 2 % off.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        # y * y, not y.square(): half the time in a double backward, and two (B, K, D) fewer kept for it.
        y = y * torch.rsqrt((y * y).sum(-1, keepdim=True) / y.shape[-1] + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.H, self.G, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.H * self.d, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(self.d, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.d, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, cache: tuple | None) -> Tensor:  # (B, K, D) -> (B, K, D)
        B, K, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, K, self.H, self.d)), *rope)
        k = rotate(self.k_norm(self.k_proj(x).view(B, K, self.G, self.d)), *rope)
        v = self.v_proj(x).view(B, K, self.G, self.d)
        if cache is not None:
            rows, positions, keys, values = cache
            keys[rows, positions], values[rows, positions] = k.to(keys.dtype), v.to(values.dtype)
            k, v = keys, values
        # The H/G query heads that share a key head are stacked along the token axis: nothing is repeated.
        q = q.view(B, K, self.G, -1, self.d).permute(0, 2, 3, 1, 4).reshape(B, self.G, -1, self.d)
        scores = q @ k.permute(0, 2, 3, 1) * self.d ** -0.5                    # (B, G, H/G*K, K')
        scores = scores.view(B, self.G, -1, K, k.shape[1]) + mask
        # Written out: F.scaled_dot_product_attention has no second derivative, and Eq. 14 needs one.
        weights = scores.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        y = weights.view(B, self.G, -1, k.shape[1]) @ v.transpose(1, 2)        # (B, G, H/G*K, d)
        return self.o_proj(y.view(B, self.H, K, self.d).transpose(1, 2).reshape(B, K, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, K, D) -> (B, K, D)
        shape, x = x.shape, x.flatten(0, -2)
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)).view(shape)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, cache: tuple | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class LM(nn.Module):
    """A causal language model: `LM(config)(ids)`, (B, K) long -> (B, K, V) logits. Rows are padded on the right."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def hidden(self, ids: Tensor, positions: Tensor | None = None, cache: list | None = None,
               blocks: int | None = None) -> Tensor:
        """(B, K) -> (B, K, D), after the last norm, or after the first `blocks` blocks without it. `cache`: one
        (keys, values) pair of (B, K', G, d) a layer, written at `positions` (B, K). Causal masking alone hides
        right padding: a pad never precedes a token."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.model.embed_tokens(ids)
        angle = positions[..., None] * rope_frequencies(self.config).to(ids.device)
        rope = tuple(f(angle)[:, :, None].to(x.dtype) for f in (torch.cos, torch.sin))  # (B, K, 1, d/2)
        keys = torch.arange(cache[0][0].shape[1] if cache else ids.shape[1], device=ids.device)
        future = keys > positions[:, :, None]                                           # (B, K, K')
        mask = torch.zeros(future.shape, dtype=x.dtype, device=x.device).masked_fill_(future, -math.inf)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        for i, block in enumerate(self.model.layers[:blocks]):
            x = block(x, rope, mask[:, None, None], (rows, positions, *cache[i]) if cache else None)
        return self.model.norm(x) if blocks is None else x

    def forward(self, ids: Tensor) -> Tensor:  # (B, K) -> (B, K, V)
        return self.lm_head(self.hidden(ids))


def vocabulary_logprob(model: LM, batch, h: Tensor | None = None) -> Tensor:  # -> (N, V)
    """log P of every token at each of the N answer positions, row by row, from the last hidden states or those given.

    The one place that shifts labels: position t-1 predicts token t. Logits are formed at answer positions only,
    because (B, K, V) would be the largest tensor in memory.
    """
    h = model.hidden(batch.ids) if h is None else h                                     # (B, K, D)
    logits = model.lm_head(h[:, :batch.ids.shape[1] - 1][batch.answer[:, 1:]])
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def answer_logprob(model: LM, batch, h: Tensor | None = None) -> Tensor:  # -> (B,)
    """log P(y|x) = sum_t log P(y_t | x, y_<t) in nats (Section 2), over `batch.answer`, the end token included."""
    target = batch.answer[:, 1:]
    logp = vocabulary_logprob(model, batch, h).gather(1, batch.ids[:, 1:][target][:, None])[:, 0]
    row = target.nonzero()[:, 0]
    return torch.zeros(len(batch.ids), dtype=logp.dtype, device=logp.device).index_add(0, row, logp)


def prefill(model: LM, prompts: list[list[int]], room: int) -> tuple[Tensor, Tensor, list]:
    """(B, D) of each prompt's last token, (B,) lengths, and a cache with `room` places past the longest prompt."""
    device, c = model.device, model.config
    length = torch.tensor([len(p) for p in prompts], device=device)
    width = int(length.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    shape = (len(prompts), width + room, c.num_key_value_heads, c.head_dim)
    dtype = model.lm_head.weight.dtype
    cache = [(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
             for _ in range(c.num_hidden_layers)]
    positions = torch.arange(width, device=device).expand(len(prompts), -1)
    return model.hidden(ids, positions, cache)[torch.arange(len(prompts)), length - 1], length, cache


@torch.no_grad()
def generate(model: LM, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int]) -> list[list[int]]:
    """Greedy continuations, each cut before its first stop token. A batch gives what one at a time gives."""
    last, length, cache = prefill(model, prompts, max_new_tokens)
    device = last.device
    stop, steps = torch.tensor(stop_ids, device=device), []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        steps.append(model.lm_head(last).argmax(-1))                                    # (B,)
        done |= torch.isin(steps[-1], stop)
        if done.all() or t + 1 == max_new_tokens:
            break
        # Row by row the next token takes the first pad's slot, so the cache never holds a pad that is read.
        last = model.hidden(steps[-1][:, None], (length + t)[:, None], cache)[:, 0]
    rows = torch.stack(steps, 1).tolist() if steps else [[] for _ in prompts]
    return [row[:next((i for i, token in enumerate(row) if token in stop_ids), len(row))] for row in rows]


# -------------------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """tokenizer.json, the chat template and the end tokens of a checkpoint directory.

    `stop_ids` end a generation; `end_id` is the one that training appends to an answer.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.tokens = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as e:  # the library raises bare Exception for a missing and for a broken file
            raise ValueError(f"{path / 'tokenizer.json'}: not a readable tokenizer ({e})") from None
        self.tokens.no_padding()
        self.tokens.no_truncation()
        names = read_json(path / "tokenizer_config.json", default={})
        self.special = {key: value["content"] if isinstance(value, dict) else value for key, value in names.items()
                        if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value}
        template = names.get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        if (path / "chat_template.jinja").is_file():
            template = (path / "chat_template.jinja").read_text()
        self.template = template
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=["jinja2.ext.loopcontrols"])
        env.globals["raise_exception"] = refuse_template
        try:
            self.compiled = env.from_string(template or "")
        except jinja2.TemplateError as e:
            raise ValueError(f"{path}: the chat template cannot be read ({e})") from None
        stop = read_json(path / "generation_config.json", default={}).get("eos_token_id")
        stop = read_json(path / "config.json").get("eos_token_id") if stop is None else stop
        end = self.tokens.token_to_id(self.special.get("eos_token", ""))
        self.stop_ids = [i for i in (stop if isinstance(stop, list) else [stop]) if i is not None]
        self.stop_ids += [end] if end is not None and end not in self.stop_ids else []
        if not self.stop_ids:
            raise ValueError(f"{path}: no end token: expected eos_token_id in generation_config.json or config.json, "
                             "or eos_token in tokenizer_config.json")
        self.end_id = self.stop_ids[0] if end is None else end

    def encode(self, text: str) -> list[int]:
        return self.tokens.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokens.decode(ids, skip_special_tokens=True)

    def prompt(self, question: str) -> list[int]:
        """x: the question as one user turn of the chat template, or in the plain form where there is none."""
        if self.template is None:
            return self.tokens.encode(f"Question: {question}\nAnswer:").ids  # with the tokenizer's own start token
        try:  # strftime_now stays undefined: templates then use their own fixed date, and runs repeat
            text = self.compiled.render(
                messages=[{"role": "user", "content": question}], add_generation_prompt=True,
                enable_thinking=False, **self.special)
        except Exception as e:  # a template is someone's program: it can raise anything
            raise ValueError(f"{self.path}: the chat template cannot be rendered ({e})") from None
        return self.encode(text)

    def answer(self, text: str) -> list[int]:
        """y: the answer's tokens and the end token, tokenised apart from the prompt so the boundary stays put."""
        return self.encode(text if self.template else " " + text) + [self.end_id]


def refuse_template(message: str) -> None:
    raise jinja2.TemplateError(message)


# ---------------------------------------------------------------------------------- reading and writing

Count = Annotated[int, ("a whole number from 1 to 2147483647", lambda x: 0 < x < 2 ** 31)]
Natural = Annotated[int, ("a whole number from 0 to 2147483647", lambda x: 0 <= x < 2 ** 31)]
Positive = Annotated[float, ("a number above 0", lambda x: x > 0)]
NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "an object",
         list: "a list", NoneType: "null"}


def wanted(value, kind) -> str:
    """"" where `value` is of the type `kind`, else in words what was expected. Annotated[type, (words, test)]
    carries a range; a tuple[type, ...] takes a list too; int and float take no bool, float takes a finite int."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words, test = args[1]
        return "" if not wanted(value, args[0]) and test(value) else words
    if origin is Literal:
        return "" if isinstance(value, str) and value in args else " or ".join(args)
    if origin in (Union, UnionType):
        missed = [wanted(value, each) for each in args]
        return " or ".join(missed) if all(missed) else ""
    if origin is tuple:
        ok = isinstance(value, (list, tuple)) and value and not any(wanted(x, args[0]) for x in value)
        return "" if ok else f"a list, each {wanted(object(), args[0])}"
    if kind is float:
        ok = type(value) in (int, float) and -math.inf < value < math.inf  # false for NaN, no overflow of a huge int
    else:
        ok = type(value) is kind
    return "" if ok else NAMES[kind]


def fill(kind: type, values: dict, where: str | Path, ignore: bool = False):
    """`kind(**values)` for a dataclass, each value checked against its field's type; `ignore`: skips keys it lacks.

    ValueError in one line that names `where`, the key, what was found and what was expected.
    """
    types = get_type_hints(kind, include_extras=True)
    unknown = [key for key in values if key not in types]
    if unknown and not ignore:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}, expected any of {', '.join(types)}")
    values = {key: value for key, value in values.items() if key in types}
    for key, value in values.items():
        if expected := wanted(value, types[key]):
            raise ValueError(f"{where}: {key} is {value!r:.80}, expected {expected}")
    missing = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{where}: no {missing[0]}, expected {wanted(object(), types[missing[0]])}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def read_json(path: Path, default=None):
    """The JSON value in `path`; `default` where there is no such file and a default is given."""
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None


def read_config(path: Path) -> Config:
    """Reads `path`/config.json. ValueError for anything this decoder would get wrong."""
    file, raw = path / "config.json", read_json(path / "config.json")
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: found a {type(raw).__name__}, expected an object")
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    rope = {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default",
            "rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 10000.0}
    kind, layers = raw.get("model_type"), raw.get("num_hidden_layers")
    slides = raw.get("use_sliding_window") and raw.get("max_window_layers", 28) < (layers or 0)
    for key, found, ok, expected in [
            ("model_type", kind, kind in ("llama", "qwen2", "qwen3"), "llama, qwen2 or qwen3"),
            ("hidden_act", raw.get("hidden_act", "silu"), raw.get("hidden_act", "silu") == "silu", "silu"),
            ("use_sliding_window", True, not slides, "no layer with a sliding window"),
            ("layer_types", raw.get("layer_types"), set(raw.get("layer_types") or []) <= {"full_attention"},
             "full_attention only"),
            ("rope_type", rope["rope_type"], rope["rope_type"] in ("default", "linear", "llama3"),
             "default, linear or llama3"),
            ("partial_rotary_factor", raw.get("partial_rotary_factor"),
             (raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1) == 1, "1"),
            ("quantization_config", "present", not raw.get("quantization_config"), "unquantised weights")]:
        if not ok:
            raise ValueError(f"{file}: {key} is {found!r}, expected {expected}")
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor",
                                               "original_max_position_embeddings"]}.get(rope["rope_type"], [])
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    missing = [k for k in sizes if not isinstance(raw.get(k), int)] + [f"rope {k}" for k in needed if k not in rope]
    if missing:
        raise ValueError(f"{file}: no number for {', '.join(missing)}")
    heads, bias = raw["num_attention_heads"], bool(raw.get("attention_bias", False))
    return Config(**{k: raw[k] for k in sizes}, num_key_value_heads=raw.get("num_key_value_heads") or heads,
                  head_dim=raw.get("head_dim") or (128 if kind == "qwen3" else raw["hidden_size"] // heads),
                  rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                  tie_word_embeddings=raw.get("tie_word_embeddings", False), rope=rope,
                  qkv_bias=bias or kind == "qwen2", o_bias=bias and kind != "qwen2",
                  mlp_bias=bool(raw.get("mlp_bias", False)) and kind == "llama", qk_norm=kind == "qwen3", raw=raw)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    names, tensors = ["model.safetensors"], {}
    if not (path / names[0]).is_file() and (path / "model.safetensors.index.json").is_file():
        index = read_json(path / "model.safetensors.index.json")
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{path / 'model.safetensors.index.json'}: no weight_map, expected tensor names and files")
        names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: no such file; weights are read from safetensors only")
        try:
            tensors |= load_file(path / name)
        except SafetensorError as e:
            raise ValueError(f"{path / name}: not a readable safetensors file ({e})") from None
    # A tied head may be stored twice, and old checkpoints carry RoPE's table: both follow from the rest.
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def load(path_or_id: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[LM, Tokenizer]:
    """Loads a checkpoint directory, or a Hugging Face hub id such as meta-llama/Llama-3.2-3B-Instruct.

    OSError for what is missing, ValueError for what does not fit; each is one line that names the file.
    """
    path = Path(path_or_id)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(str(path_or_id), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
        except Exception as e:  # the hub's errors span several libraries' classes
            raise OSError(f"{path_or_id}: neither a directory nor a hub model that can be fetched "
                          f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})") from None
    config = read_config(path)
    with torch.device("meta"):  # no memory and no initialisation: every parameter comes from the file
        model = LM(config)
    tensors, shapes = read_weights(path), {name: p.shape for name, p in model.named_parameters()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    bad = [f"{n} missing" for n in shapes if n not in tensors]
    bad += [f"{n} unexpected" for n in tensors if n not in shapes]
    bad += [f"{n} is {tuple(t.shape)}, expected {tuple(shapes[n])}" for n, t in tensors.items()
            if n in shapes and t.shape != shapes[n]]
    bad += [f"{n} is {t.dtype}, expected bfloat16, float16 or float32" for n, t in tensors.items()
            if t.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    bad = bad or [f"{n} has values that are not finite" for n, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: weights do not fit config.json: {'; '.join(bad)}")
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True), Tokenizer(path)


def save(model: LM, tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes a checkpoint directory that `load` and transformers read; each file appears whole or not at all."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "unlearn.json"]
    files = {name: (tokenizer.path / name).read_bytes() for name in names if (tokenizer.path / name).is_file()}
    config = {k: v for k, v in model.config.raw.items() if k != "torch_dtype"} | {"dtype": dtype}
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    for name in set(names) - set(files):  # an older checkpoint's: it would change how this one is read
        (path / name).unlink(missing_ok=True)
    for name, content in files.items():
        write(path / name, content)
    write_tensors(path / "model.safetensors", dict(model.named_parameters()))


def write(path: Path, content: bytes) -> None:
    """Replaces `path` in one move, so that a reader or a kill never meets half a file."""
    path.with_name(path.name + ".tmp").write_bytes(content)
    os.replace(path.with_name(path.name + ".tmp"), path)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Like write(), for a safetensors file; `metadata` holds strings."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, path.with_name(path.name + ".tmp"), metadata={"format": "pt", **(metadata or {})})
    os.chmod(path.with_name(path.name + ".tmp"), 0o644)  # the library leaves 0600
    os.replace(path.with_name(path.name + ".tmp"), path)
