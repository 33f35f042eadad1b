"""The language model: a hand-written Llama / Qwen2 / Qwen3 decoder that reads Hugging Face checkpoints.

Parameters have Hugging Face's names, order and layout: phi here is phi in any other codebase.

Dimensions: B sequences, K tokens (as in Eq. 1), V vocabulary, D hidden size,
            H query heads, G key/value heads, d head size.
"""
import json
import math
import os
import re
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import jinja2.sandbox
import tokenizers
import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Count = Annotated[int, ("a whole number from 1 to 2147483647", lambda x: 0 < x < 2 ** 31)]
Natural = Annotated[int, ("a whole number from 0 to 2147483647", lambda x: 0 <= x < 2 ** 31)]
Positive = Annotated[float, ("a number above 0", lambda x: x > 0)]
Flat = Annotated[dict, ("a flat object", lambda x: not any(isinstance(v, dict) for v in x.values()))]
Size = Annotated[int, ("a whole number from 1 to 1048576", lambda x: 0 < x <= 2 ** 20)]

# ---------------------------------------------------------------------------------------- the decoder

@dataclass
class Config:
    """The fields of config.json that change the forward pass, with the values that this decoder computes."""
    model_type: Literal["llama", "qwen2", "qwen3"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, ("a whole number from 1 to 1000", lambda x: 0 < x <= 1000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None              # None: as many as query heads
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    max_position_embeddings: Count | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False                               # Llama's; Qwen has none
    hidden_act: Literal["silu"] = "silu"
    rope_theta: Positive = 10000.0
    rope_type: Literal["default", "linear", "llama3"] = "default"
    factor: Positive | None = None                       # of linear and llama3; the next three of llama3
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: Literal[1, None] = None
    is_causal: Literal[True, None] = True
    layer_types: tuple[Literal["full_attention"], ...] | None = None
    use_sliding_window: bool = False                     # Qwen's, of the layers from max_window_layers on
    sliding_window: Natural | None = 4096
    max_window_layers: Natural = 28
    quantization_config: None = None
    raw: dict = field(default_factory=dict)              # config.json as it was read, for save()

def rope_frequencies(config: Config) -> Tensor:  # -> (d/2,)
    """Radians per position of each rotated pair, after `linear` or `llama3` scaling."""
    c, d = config, config.head_dim
    freq = 1.0 / c.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    if c.rope_type == "linear":
        return freq / c.factor
    if c.rope_type == "llama3":
        # Long waves are slowed by `factor`, short ones kept, those in between blended.
        low, high = c.low_freq_factor, c.high_freq_factor
        turns = c.original_max_position_embeddings * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / c.factor
    return freq

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, K, H, d), 2 x (B, K, 1, d/2) -> (B, K, H, d)
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
        qwen2, qk_norm = c.model_type == "qwen2", c.model_type == "qwen3"
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.d, bias=c.attention_bias or qwen2)
        self.k_proj = nn.Linear(c.hidden_size, self.G * self.d, bias=c.attention_bias or qwen2)
        self.v_proj = nn.Linear(c.hidden_size, self.G * self.d, bias=c.attention_bias or qwen2)
        self.o_proj = nn.Linear(self.H * self.d, c.hidden_size, bias=c.attention_bias and not qwen2)
        self.q_norm = RMSNorm(self.d, c.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.d, c.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple, mask: Tensor, cache: tuple | None) -> Tensor:
        B, K, _ = x.shape                                                      # (B, K, D) -> (B, K, D)
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
        # Written out: fused kernels have no second derivative, and Eq. 14 needs one.
        weights = scores.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        y = weights.view(B, self.G, -1, k.shape[1]) @ v.transpose(1, 2)        # (B, G, H/G*K, d)
        return self.o_proj(y.view(B, self.H, K, self.d).transpose(1, 2).reshape(B, K, -1))

class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        bias = c.mlp_bias and c.model_type == "llama"
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=bias)

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
        # no padding_idx, by which transformers leaves a pad token no gradient, also where it stands in a text
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

class LM(nn.Module):
    """`LM(config)(ids)`: (B, K) long -> (B, K, V) logits. Padding stands on the right, where the
    causal mask hides it."""

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
        """(B, K) -> (B, K, D), after the last norm, or after the first `blocks` blocks without it.
        `cache`: a (keys, values) pair of (B, K', G, d) a layer, written at `positions` (B, K)."""
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
    """log P of every token at each of the N answer positions, row by row, from `h`, the last hidden states.
    Position t-1 predicts token t. (B, K, V), of all positions, would take most memory."""
    h = model.hidden(batch.ids) if h is None else h                                     # (B, K, D)
    logits = model.lm_head(h[:, :batch.ids.shape[1] - 1][batch.answer[:, 1:]])
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

def answer_logprob(model: LM, batch, h: Tensor | None = None) -> Tensor:  # -> (B,)
    """log P(y|x) = sum_t log P(y_t | x, y_<t) in nats (Section 2), over `batch.answer`, end token too."""
    target = batch.answer[:, 1:]
    logp = vocabulary_logprob(model, batch, h).gather(1, batch.ids[:, 1:][target][:, None])[:, 0]
    row = target.nonzero()[:, 0]
    return torch.zeros(len(batch.ids), dtype=logp.dtype, device=logp.device).index_add(0, row, logp)

@torch.no_grad()
def prefill(model: LM, prompts: list[list[int]], room: int) -> tuple[Tensor, Tensor, list]:
    """(B, D) of each prompt's last token, (B,) lengths, a cache with `room` places past the longest."""
    device, c = model.device, model.config
    length = torch.tensor([len(p) for p in prompts], device=device)
    width = int(length.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    shape = (2, len(prompts), width + room, c.num_key_value_heads, c.head_dim)  # keys and values
    cache = [model.lm_head.weight.new_zeros(shape).unbind() for _ in range(c.num_hidden_layers)]
    positions = torch.arange(width, device=device).expand(len(prompts), -1)
    return model.hidden(ids, positions, cache)[torch.arange(len(prompts)), length - 1], length, cache

@torch.no_grad()
def generate(model: LM, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int]) -> list[list]:
    """Greedy continuations, each cut before its first stop token. A batch gives what one at a time gives."""
    last, length, cache = prefill(model, prompts, max_new_tokens)
    rows = [[] for _ in prompts]
    for t in range(max_new_tokens):
        tokens = model.lm_head(last).argmax(-1)                                         # (B,)
        for row, token in zip(rows, tokens.tolist()):
            row.append(token)
        if t + 1 == max_new_tokens or all(not set(row).isdisjoint(stop_ids) for row in rows):
            break
        # Row by row the next token takes the first pad's slot, so the cache never holds a pad that is read.
        last = model.hidden(tokens[:, None], (length + t)[:, None], cache)[:, 0]
    return [list(takewhile(lambda token: token not in stop_ids, row)) for row in rows]

# ---------------------------------------------------------------------------------- several processes
# `torchrun --nproc-per-node n`: each has its heads, its FFN neurons, its part of D in embedding, head, norms.
# No number of phi is held twice, so none can drift apart, and a sum over phi is a sum over processes.

def here() -> tuple[int, int]:
    """This process and how many there are: (0, 1) but under torchrun."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

def from_all(value) -> list:
    """The value of each process, once all have come here."""
    found = [value] * here()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found

def one_process(what: str) -> None:
    """Refuses under torchrun what slices of the weights would make wrong."""
    check(here()[1], Literal[1], f"{what}: the number of processes is")

class Copy(torch.autograd.Function):
    """Before work that is done in parts: x as it is; its gradient is the sum of the parts'."""
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, grad: Reduce.apply(grad))

class Reduce(torch.autograd.Function):
    """Behind it: the sum of the parts. The two are each other's backward, so H v (Eq. 14) is right too."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x
    backward = staticmethod(lambda ctx, grad: Copy.apply(grad))

# These are cut along their second axis, the input, D of the embedding; all else along its first, the output.
SECOND = ("o_proj.weight", "down_proj.weight", "lm_head.weight", "embed_tokens.weight")

def own(name: str, x: Tensor) -> Tensor:
    """This process's slice of a parameter."""
    i, n = here()
    return x if n == 1 else x.tensor_split(n, int(name.endswith(SECOND)))[i].contiguous()

def joined(name: str, x: Tensor) -> Tensor:
    """The parameter of which each process gives its slice: whole in process 0, on the host."""
    if here()[1] == 1:
        return x
    slices = [torch.empty_like(x) for _ in range(here()[1])]
    dist.all_gather(slices, x)
    return x if here()[0] else torch.cat(slices, int(name.endswith(SECOND))).cpu()

def divide(model: LM) -> None:
    """Cuts the parameters to this process's slices; sets Copy before, Reduce behind what is done in parts."""
    def padded(x: Tensor) -> Tensor:  # (..., D/n) -> (..., D): the slice in its place among zeros
        return nn.functional.pad(x, (i * x.shape[-1], (n - 1 - i) * x.shape[-1]))

    def norm(layer: RMSNorm, heads: bool, x: Tensor) -> Tensor:
        weight = Reduce.apply(padded(layer.weight))
        weight = Copy.apply(weight) if heads else weight  # of q and k: each head gives a part of the gradient
        return RMSNorm.forward(SimpleNamespace(weight=weight, eps=layer.eps), x)

    i, n = here()
    for name, p in model.named_parameters():
        p.data = own(name, p.data)
    for name, layer in model.named_modules():
        if isinstance(layer, RMSNorm):
            layer.forward = partial(norm, layer, name.endswith(("q_norm", "k_norm")))
        if name.endswith(("o_proj", "down_proj")) and layer.bias is not None:  # once in the sum of the parts
            layer.forward = lambda x, o=layer: nn.functional.linear(x, o.weight, padded(o.bias))
        if isinstance(layer, Attention):
            layer.H, layer.G = layer.H // n, layer.G // n
        if isinstance(layer, (Attention, MLP)) or layer is model.lm_head:
            layer.register_forward_pre_hook(lambda _, x: (Copy.apply(x[0]), *x[1:]))
            layer.register_forward_hook(lambda _, x, y: Reduce.apply(y))
    model.lm_head.register_forward_pre_hook(lambda _, x: x[0].tensor_split(n, -1)[i])
    model.model.embed_tokens.register_forward_hook(lambda _, x, y: Reduce.apply(padded(y)))
    model.config.num_key_value_heads //= n  # for the cache of prefill()

# -------------------------------------------------------------------------------------- the tokenizer

class Tokenizer:
    """tokenizer.json as transformers' PreTrainedTokenizerFast reads it, and the chat template.
    `stop_ids` end a generation; `end_id` is the one that training appends to an answer."""

    def __init__(self, path: Path):
        self.path = path
        with refusing(f"{path / 'tokenizer.json'}: not a readable tokenizer"):
            self.tokens = tokenizers.Tokenizer.from_str(read_text(path / "tokenizer.json"))
        self.tokens.no_padding()
        self.tokens.no_truncation()
        if getattr(self.tokens.model, "dropout", None):
            self.tokens.model.dropout = None  # BPE's: a text would have other ids each time
        config = read_json(path / "tokenizer_config.json", default={})
        if "added_tokens_decoder" not in config:  # an older one: as in transformers
            config = config | read_json(path / "special_tokens_map.json", default={})
        self.special = self.special_tokens(config)
        with refusing(f"{path / 'tokenizer_config.json'}: its added tokens cannot be read"):
            self.add_listed(config)
        self.template = chat_template(path, config.get("chat_template"))
        self.space = " " if self.template is None else self.after_prompt()
        self.stop_ids = self.ends()
        self.end_id = self.stop_ids[0]

    def special_tokens(self, config: dict) -> dict[str, str]:
        """{"bos_token": its text, ...}."""
        found, names = {}, ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        for key in (f"{name}_token" for name in names):
            token = config.get(key)
            token = token.get("content", token) if isinstance(token, dict) else token
            where = f"{self.path / 'tokenizer_config.json'} or special_tokens_map.json: {key} is"
            if check(token, str | None, where):
                found[key] = token
        return found

    def add_listed(self, config: dict) -> None:
        """Adds what `config` lists and tokenizer.json has not, or has otherwise, in transformers' order."""
        def added(token: dict | str) -> tokenizers.AddedToken:
            if isinstance(token, str):
                return tokenizers.AddedToken(token, special=True)
            return tokenizers.AddedToken(**{x: value for x, value in token.items() if not x.startswith("__")})

        there = self.tokens.get_added_tokens_decoder().values()
        by_id = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda x: int(x[0]))
        new = [x for x in (added({**token}) for _, token in by_id) if repr(x) not in map(repr, there)]
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = check(extra, list | dict, "extra_special_tokens is")
        extra = extra.values() if isinstance(extra, dict) else extra
        named = [config[key] for key in self.special]
        named = [x | {"special": True} if isinstance(x, dict) else x for x in named]
        for token in map(added, [*named, *extra]):
            if token.content not in {x.content for x in (*there, *new)}:
                new.append(token)
        self.tokens.add_tokens(new)

    def ends(self) -> list[int]:
        """The eos_token's id, then eos_token_id of generation_config.json, or else of config.json."""
        size, found, end = read_config(self.path).vocab_size, [], self.special.get("eos_token")
        Id = Annotated[int, (f"a whole number below vocab_size {size}", lambda x: 0 <= x < size)]
        for file in (self.path / "config.json", self.path / "generation_config.json"):
            ids = read_json(file, default={}).get("eos_token_id")
            check(ids, Id | tuple[Id, ...] | None, f"{file}: eos_token_id is")
            found = [ids] if isinstance(ids, int) else ids or found
        if end is not None:
            found = [self.tokens.token_to_id(end), *found]
        check(found, tuple[Id, ...], f"{self.path}: tokenizer.json's eos_token {end!r} and eos_token_id are")
        return list(dict.fromkeys(found))

    def encode(self, text: str) -> list[int]:
        """The ids of `text` inside a longer text: behind an anchor, as Llama-2's kind adds a first space."""
        for anchor in ("\n", ":"):  # the second where the first is no token or grows together with the text
            head, ids = (self.tokens.encode(t, add_special_tokens=False).ids for t in (anchor, anchor + text))
            if len(ids) > len(head) and ids[:len(head)] == head:
                return ids[len(head):]
        return self.tokens.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokens.decode(ids, skip_special_tokens=True)

    def prompt(self, question: str) -> list[int]:
        """x: the question as one user turn of the chat template, or in the plain form where there is none."""
        if self.template is None:
            return self.raw(f"Question: {question}\nAnswer:")
        return self.tokens.encode(self.render(question), add_special_tokens=False).ids

    def raw(self, text: str) -> list[int]:
        """The ids of a text to be gone on with: the tokenizer's own start token, but none that ends it."""
        ids = self.tokens.encode(text).ids
        while ids and ids[-1] in self.stop_ids:
            ids.pop()
        return ids

    def answer(self, text: str) -> list[int]:
        """y: the answer's tokens and the end token, tokenised apart from x so that the boundary stays put."""
        return self.encode(self.space + text) + [self.end_id]

    def render(self, *turns: str) -> str:
        """The template with the user's turn, up to where the answer begins, or with both turns."""
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns)]
        with refusing(f"{self.path}: the chat template cannot be rendered"):
            text = self.template.render(messages=messages, tools=None, documents=None, enable_thinking=False,
                                        add_generation_prompt=len(turns) == 1, **self.special)
        if turns[0].strip() not in text:
            raise ValueError(f"{self.path}: the chat template leaves out or rewrites a part of the question")
        return text

    def after_prompt(self) -> str:
        """The white space that the template puts between x and y: a space in Llama-2's and Mistral's."""
        question = "Who? " * 999 + "Why?"
        prompt = self.render(question)
        with suppress(ValueError):  # a template may want the user's turn last
            if found := re.match(re.escape(prompt) + r"(\s*)Me", self.render(question, "Me")):
                return found[1]
        return ""

def chat_template(path: Path, source) -> jinja2.Template | None:
    """chat_template.jinja or else `source`, in the environment of transformers' apply_chat_template."""
    if os.path.lexists(path / "chat_template.jinja"):  # not is_file(): a dead link is an error
        source = read_text(path / "chat_template.jinja")
    if isinstance(source, list):  # of named ones
        named = [t.get("template", t) for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[-1] if named else source
    if check(source, str | None, f"{path / 'tokenizer_config.json'}: chat_template is") is None:
        return None
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                       extensions=["jinja2.ext.loopcontrols"])
    date = datetime(2024, 7, 26)  # Llama 3 tells the model the date: a fixed one, so that runs repeat
    env.globals |= {"raise_exception": refuse, "strftime_now": date.strftime}
    env.filters["tojson"] = lambda x, **form: json.dumps(x, **{"ensure_ascii": False, **form})
    # {% generation %} marks text for a mask that is not needed here: a block that only opens a scope.
    source = re.sub(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})", r"\1\2with\3", source)
    with refusing(f"{path}: the chat template cannot be read"):
        return env.from_string(source)

# ---------------------------------------------------------------------------------- reading and writing

NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "an object",
         list: "a list", NoneType: "null"}

def wanted(value, kind) -> str:
    """"" where `value` is of the type `kind`, else what was expected. Annotated[type, (words, test)] has a
    range, tuple[type, ...] is a list, a bool is no number, a finite int is a float."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words, test = args[1]
        return "" if not wanted(value, args[0]) and test(value) else words
    if origin is Literal:
        return "" if value in args else " or ".join(map(repr, args))
    if origin in (Union, UnionType):
        missed = [wanted(value, each) for each in args]
        return " or ".join(missed) if all(missed) else ""
    if origin is tuple:
        ok = isinstance(value, (list, tuple)) and value and not any(wanted(x, args[0]) for x in value)
        return "" if ok else f"a list, each {wanted(object(), args[0])}"
    if kind is float:
        ok = type(value) in (int, float) and abs(value) <= 1e308  # false for NaN; a huge int would overflow
    else:  # no tokenizer takes a lone surrogate
        ok = type(value) is kind and not (kind is str and re.search("[\ud800-\udfff]", value))
    return "" if ok else NAMES[kind]

def check(value, kind, where: str):
    """`value`, if it is wanted(); else ValueError: `where`, what was found, what was expected."""
    if expected := wanted(value, kind):
        raise ValueError(f"{where} {value!r:.80}, expected {expected}")
    return value

def fill(kind: type, values: dict, where: str | Path, ignore: bool = False):
    """`kind(**values)` for a dataclass, each value check()ed: lists as tuples, ints for floats as floats.
    ValueError for a key that is missing or, unless `ignore`, unknown."""
    types, found = get_type_hints(kind, include_extras=True), {}
    if not ignore and (unknown := values.keys() - types.keys()):
        raise ValueError(f"{where}: unknown key {min(unknown)!r}, expected any of {', '.join(types)}")
    for f in fields(kind):
        if f.name in values:
            value = check(values[f.name], types[f.name], f"{where}: {f.name} is")
            if type(value) is int and abs(value) <= 1e308 and not wanted(float(value), types[f.name]):
                value = float(value)
            found[f.name] = tuple(value) if isinstance(value, list) else value
        elif f.default is f.default_factory is MISSING:
            raise ValueError(f"{where}: no {f.name}, expected {wanted(object(), types[f.name])}")
    return kind(**found)

def refuse(message: str):
    raise ValueError(message)

@contextmanager
def refusing(what: str, kind: type = ValueError):
    """Any error inside ends as one of the type `kind`, in one line: `what`, and the error in brackets."""
    try:
        yield
    except Exception as e:  # bare Exception of tokenizers, many classes of the hub, anything of a template
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise kind(f"{what} ({why:.300})") from None

def read_text(path: str | Path) -> str:
    """UTF-8 whatever the locale, without its byte-order mark. ValueError for other encodings."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None

def parse(text: str, where: str | Path):
    """The JSON value in `text`. ValueError for anything else: NaN, Infinity, a key twice, endless nesting."""
    def unlike(pairs: list[tuple]) -> dict:
        if repeated := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
            refuse(f"found the key {repeated[0]!r:.60} twice in one object")
        return dict(pairs)
    with refusing(f"{where}: not JSON that can be read"):
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unlike)

def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in `path`; `default`, if given, where there is no such file."""
    if default is not None and not os.path.lexists(path):
        return default
    return check(parse(read_text(path), path), dict, f"{path}: found")

def read_config(path: Path) -> Config:
    """`path`/config.json. ValueError for anything that this decoder would get wrong."""
    file = path / "config.json"
    raw = read_json(file)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    check(rope, Flat, f"{file}: rope_parameters is")
    c = fill(Config, {"original_max_position_embeddings": raw.get("max_position_embeddings"), **raw,
                      "rope_type": rope.get("type", "default"), **rope, "raw": raw,
                      **{key: x for key, x in raw.items() if key == "original_max_position_embeddings"}},
             file, ignore=True)
    scales = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in {"default": [], "linear": scales[:1], "llama3": scales}[c.rope_type]:
        check(getattr(c, key), Positive, f"{file}: {key} of {c.rope_type} rope is")
    check(c.rope_type == "llama3" and c.low_freq_factor >= c.high_freq_factor, Literal[False],
          f"{file}: low_freq_factor >= high_freq_factor is")
    heads = c.num_attention_heads
    c.num_key_value_heads = c.num_key_value_heads or heads
    c.head_dim = c.head_dim or (128 if c.model_type == "qwen3" else c.hidden_size // heads)
    check(heads % c.num_key_value_heads, Literal[0], f"{file}: num_attention_heads % num_key_value_heads is")
    check(c.head_dim % 2, Literal[0], f"{file}: head_dim % 2 is")
    check(len(c.layer_types or range(c.num_hidden_layers)), Literal[c.num_hidden_layers],
          f"{file}: the number of layer_types is")
    windows = c.model_type != "llama" and c.use_sliding_window and c.sliding_window and not c.layer_types
    if windows and c.max_window_layers < c.num_hidden_layers:
        refuse(f"{file}: found use_sliding_window from layer {c.max_window_layers} on, expected full attention")
    return c

def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    names, index, tensors = ["model.safetensors"], path / "model.safetensors.index.json", {}
    if index.is_file() and not (path / names[0]).is_file():
        names = check(read_json(index).get("weight_map"), dict, f"{index}: weight_map is").values()
    Shard = Annotated[str, ("the name of a file beside it", lambda name: Path(name).name == name)]
    for name in dict.fromkeys(check(name, Shard, f"{index}: weight_map has") for name in names):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: no such file; weights are read from safetensors only")
        with refusing(f"{path / name}: not a readable safetensors file"):
            tensors |= load_file(path / name)
    # Old checkpoints carry RoPE's table, which follows from config.json; headless ones leave out "model.".
    return {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": t
            for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}

def located(path_or_id: str | Path) -> Path:
    """The checkpoint's directory, fetched from the hub where it is none. OSError for what is missing."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    with refusing(f"{path}: no directory, and no hub model to be fetched", OSError):
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))

def load(path_or_id: str | Path, dtype=torch.float32, device: str = "cpu") -> tuple[LM, Tokenizer]:
    """Loads a directory or a hub id, meta-llama/Llama-3.2-3B-Instruct. ValueError for what does not fit."""
    path = located(path_or_id)
    config, tensors, n = read_config(path), read_weights(path), here()[1]
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_size"):
        check(getattr(config, key) % n, Literal[0], f"{path}: {key} % {n} processes is")
    for name, t in tensors.items():
        known = t.is_floating_point() and t.itemsize > 1
        if known:
            tensors[name] = own(name, t).to(device=device, dtype=dtype)
        if not known or not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} is {t.dtype}, expected finite bfloat16, float16 or float32")
    if config.tie_word_embeddings:
        # As in transformers: the file may call the one matrix either or both, and two that differ stay two.
        names = ["model.embed_tokens.weight", "lm_head.weight"]
        found = [tensors[name] for name in names if name in tensors]
        tensors |= {name: t for name in names for t in found if name not in tensors}
        config.tie_word_embeddings = len(found) < 2 or all(from_all(torch.equal(*found)))
    with torch.device("meta"):  # no memory and no initialisation: every parameter comes from the file
        model = LM(config)
    if n > 1:
        divide(model)
    with refusing(f"{path}: weights do not fit config.json"):
        model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True), Tokenizer(path)

def save(model: LM, tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes a checkpoint directory that `load` and transformers read; each file whole or not at all."""
    path, dtype = Path(path), str(model.lm_head.weight.dtype).removeprefix("torch.")
    tensors = {name: joined(name, p.detach()) for name, p in model.named_parameters()}
    if here()[0]:
        return
    config = model.config.raw | {"dtype": dtype, "tie_word_embeddings": model.config.tie_word_embeddings}
    config.pop("torch_dtype", None)  # the older name of dtype
    write_json(path / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                 "special_tokens_map.json", "unlearn.json"):
        if (tokenizer.path / name).is_file():
            write(path / name, (tokenizer.path / name).read_bytes())
        else:  # an older checkpoint's: it would change how this one is read
            (path / name).unlink(missing_ok=True)
    write_tensors(path / "model.safetensors", tensors)

@contextmanager
def replacing(path: Path):
    """Gives a name to write to, which then replaces `path` in one move: no reader and no kill meets half a
    file. OSError that names `path`, and nothing left, where that fails."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with refusing(f"{path}: cannot be written", OSError):
            yield draft
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

def write(path: Path, content: bytes) -> None:
    if here()[0] == 0:
        with replacing(path) as draft:
            draft.write_bytes(content)

def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

def write_tensors(path: Path, tensors: dict[str, Tensor], each: bool = False) -> None:
    """Like write(), for a safetensors file. `each`: every process writes one."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
        draft.chmod(0o644)  # the library leaves 0600
        if each:
            from_all(path)  # none is replaced before all are written
