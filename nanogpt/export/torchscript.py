"""The TorchScript archive: plain ATen operators, so that any libtorch of this version or newer
runs it, with weights that stay as they are quantized.

    forward(tokens (B, T)) -> (B, T, V)    no cache
    prefill(tokens (B, T)) -> (B, V)       forgets, then fills the cache
    decode(tokens (B, 1)) -> (B, V)        one more token of every row
    reset()                                forgets

The module is frozen with every weight among the preserved attributes, because freezing folds a
dequantization into float32 constants. Torch's own archive is then written once more by
`archive.write`: its debug records hold source paths, and the names of its classes count how many
were scripted before. All of torch.jit stays in this file.
"""

import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.config import GPTConfig
from nanogpt.errors import InputError, UsageError
from nanogpt.export import archive
from nanogpt.export.quantize import SCALE, weights_of
from nanogpt.model import GPT, QK_EPS, ROTARY_BASE, attention_scale

# What is left out of torch's archive: source paths, and a hash of all that nothing reads.
_LEFT_OUT = re.compile(r"\.debug_pkl$|^\.data/serialization_id$")
_TURN = re.compile(rb"\.___torch_mangle_\d+")


class _WithWeight(nn.Module):
    """Buffers of the names that the state dict gives them."""

    if TYPE_CHECKING:  # TorchScript reads annotations, and knows less of them than mypy
        weight: Tensor
        bias: Tensor | None
        weight_scale: Tensor

    def __init__(self, **buffers: Tensor | None) -> None:
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


class Norm(_WithWeight):
    """Layer norm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Linear(_WithWeight):
    """x W^T + b with W in float32 or bfloat16; the product is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(torch.float32), self.bias)


class Int8Linear(_WithWeight):
    """scale * (x W^T) + b with W in int8; the product is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(torch.float32)) * self.weight_scale
        return out if self.bias is None else out + self.bias


class Table(_WithWeight):
    """An embedding in float32 or bfloat16, and the head that is tied to it."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(torch.float32)

    @torch.jit.export
    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(torch.float32))


class Int8Table(_WithWeight):
    """An embedding in int8, and the head that is tied to it."""

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.weight_scale[ids].unsqueeze(-1)
        return F.embedding(ids, self.weight).to(torch.float32) * scale

    @torch.jit.export
    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(torch.float32)) * self.weight_scale


class Attention(nn.Module):
    """Attention of T new tokens over themselves and what the cache holds.

    What asks for an attribute that is not there is not compiled: a model that has no use for it
    gives the program that it gave before there was a choice.
    """

    def __init__(self, config: GPTConfig, c_attn: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.n_head, self.c_attn, self.c_proj = config.n_head, c_attn, c_proj
        if config.rotary:
            self.rotary = True
        if config.qk_norm:
            self.scale = attention_scale(config)
            self.epsilon = QK_EPS

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        cached: bool,
    ) -> Tensor:
        batch, count, width = x.shape
        qkv = self.c_attn(x).view(batch, count, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, T, D)
        if hasattr(self, "epsilon"):
            q, k = self.to_unit_rms(q), self.to_unit_rms(k)
        if hasattr(self, "rotary"):
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if cached:
            end = start + count
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            k, v = keys[:, :, :end], values[:, :, :end]  # (B, H, S, D)
        # Several tokens come only to an empty cache, where the square mask is right.
        if hasattr(self, "scale"):
            scale = self.scale
            out = F.scaled_dot_product_attention(q, k, v, is_causal=count > 1, scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=count > 1)  # (B, H, T, D)
        return self.c_proj(out.transpose(1, 2).reshape(batch, count, width))

    def to_unit_rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.epsilon)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, heads, count, width = x.shape
        x1, x2 = x.view(batch, heads, count, 2, width // 2).unbind(3)  # 2 x (B, H, T, D/2)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class FeedForward(nn.Module):
    """Two linear maps with GELU between them."""

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, ln_1: nn.Module, attn: nn.Module, ln_2: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = ln_1, attn, ln_2, mlp

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        cached: bool,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin, keys, values, start, cached)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Names as in the state dict; no wpe where positions are rotary."""

    def __init__(
        self,
        wte: Table | Int8Table,
        wpe: Table | Int8Table | None,
        h: nn.ModuleList,
        ln_f: nn.Module,
    ) -> None:
        super().__init__()
        self.wte = wte
        if wpe is not None:
            self.wpe = wpe
        self.h, self.ln_f = h, ln_f


class Exported(nn.Module):
    """A GPT with its cache inside; see the module's docstring.

    The cache is empty until the first prefill or decode, and takes the batch size of that call.
    """

    if TYPE_CHECKING:
        keys: Tensor
        values: Tensor

    def __init__(self, config: GPTConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.vocab_size, self.block_size = config.vocab_size, config.block_size
        if config.rotary:
            self.rotary_base = ROTARY_BASE
        self.length = 0

        def scaled(kind: type[_WithWeight], int8: type[_WithWeight], name: str, **more: Any) -> Any:
            weight, scale = weights[name + ".weight"], weights.get(name + ".weight" + SCALE)
            if scale is None:
                return kind(weight=weight, **more)
            return int8(weight=weight, weight_scale=scale, **more)

        def linear(name: str) -> nn.Module:
            return scaled(Linear, Int8Linear, name, bias=weights.get(name + ".bias"))

        def norm(name: str) -> nn.Module:
            return Norm(weight=weights[name + ".weight"], bias=weights.get(name + ".bias"))

        blocks = []
        for layer in range(config.n_layer):
            at = f"transformer.h.{layer}"
            maps = linear(f"{at}.attn.c_attn"), linear(f"{at}.attn.c_proj")
            mlp = FeedForward(linear(f"{at}.mlp.c_fc"), linear(f"{at}.mlp.c_proj"))
            attention = Attention(config, *maps)
            blocks.append(Block(norm(f"{at}.ln_1"), attention, norm(f"{at}.ln_2"), mlp))
        self.transformer = Transformer(
            scaled(Table, Int8Table, "transformer.wte"),
            None if config.rotary else scaled(Table, Int8Table, "transformer.wpe"),
            nn.ModuleList(blocks),
            norm("transformer.ln_f"),
        )
        head_width = config.n_embd // config.n_head
        empty = torch.zeros(config.n_layer, 0, config.n_head, config.block_size, head_width)
        self.register_buffer("keys", empty)  # (L, B, H, block, D)
        self.register_buffer("values", empty.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        self._check(tokens, 0)
        return self.transformer.wte.head(self._hidden(tokens, False))

    @torch.jit.export
    def prefill(self, tokens: Tensor) -> Tensor:
        self._check(tokens, 0)
        self.length = 0
        return self.transformer.wte.head(self._hidden(tokens, True)[:, -1])

    @torch.jit.export
    def decode(self, tokens: Tensor) -> Tensor:
        self._check(tokens, self.length)
        if tokens.size(1) != 1:
            raise ValueError(f"decode takes one token a row, not {tokens.size(1)}")
        if self.length > 0 and tokens.size(0) != self.keys.size(1):
            raise ValueError(
                f"decode takes the {self.keys.size(1)} rows of the last prefill, "
                f"not {tokens.size(0)}"
            )
        return self.transformer.wte.head(self._hidden(tokens, True)[:, -1])

    @torch.jit.export
    def reset(self) -> None:
        self.length = 0

    def _check(self, tokens: Tensor, start: int) -> None:
        if tokens.dim() != 2 or tokens.size(0) < 1 or tokens.size(1) < 1:
            raise ValueError("tokens must be (B, T) with at least one row and one token")
        if start + tokens.size(1) > self.block_size:
            raise ValueError(
                f"{start + tokens.size(1)} tokens do not fit the context of {self.block_size}: "
                "call prefill with the newest part of the text"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self.vocab_size}")

    def _hidden(self, tokens: Tensor, cached: bool) -> Tensor:
        batch, count = tokens.shape
        start = self.length if cached else 0
        if cached and start == 0 and self.keys.size(1) != batch:
            shape = list(self.keys.shape)
            shape[1] = batch
            self.keys = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
            self.values = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        if hasattr(self, "rotary_base"):
            x = self.transformer.wte(tokens)  # (B, T, C)
            # On the CPU, as some devices have no float64. The width is asked for, because freezing
            # would fold what a constant gives into one more record.
            width = self.keys.size(4)
            pairs = torch.arange(0, width, 2, dtype=torch.float64)  # 2i
            turns = torch.pow(self.rotary_base, pairs / -width)  # (D/2)
            places = torch.arange(start, start + count, dtype=torch.float64)
            angles = places.unsqueeze(1) * turns  # (T, D/2)
            cos, sin = angles.cos().to(x), angles.sin().to(x)
        else:
            positions = torch.arange(start, start + count, device=tokens.device)
            x = self.transformer.wte(tokens) + self.transformer.wpe(positions)  # (B, T, C)
            cos, sin = x, x  # which nothing reads
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cos, sin, self.keys[layer], self.values[layer], start, cached)
        if cached:
            self.length = start + count
        return self.transformer.ln_f(x)


def write(model: GPT, quantize: str, file: IO[bytes]) -> None:
    """Write the archive with its index and comment. Equal models give equal bytes.

    Args:
        model: on any device; it is not changed.
        quantize: one of quantize.QUANTIZATIONS.
        file: open for writing, at its beginning.
    Raises: InputError where a weight is not finite.
    """
    _write(model.config, model.describe(), quantize, weights_of(model, quantize), file)


def _write(
    config: GPTConfig,
    described: Mapping[str, Any],
    quantize: str,
    weights: Mapping[str, Tensor],
    file: IO[bytes],
) -> None:
    members, sizes = _scripted_archive(config, weights)
    members = _canonical(members)
    homes = _record_of_each_tensor(members["data.pkl"])
    entries, payloads = {}, []
    for name, weight in weights.items():
        home, payload = homes[name], archive.payload_of(weight)
        assert sizes.pop(home) == len(payload), f"torch gave {name} the record {home}"
        entries[name] = archive.index_entry(home, weight)
        payloads.append(archive.Record(home, payload, indexed=True))
    # What is left is the cache, which is empty.
    members.update({name: b"" for name, size in sizes.items() if size == 0})
    assert not any(sizes.values()), f"records without a name: {sizes}"
    index = archive.describe(described, quantize, entries)
    rest = [archive.Record(name, raw) for name, raw in sorted(members.items())]
    archive.write(file, [archive.Record(archive.INDEX, index), *rest, *payloads])


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Any:
    """The module as torch reads it back.

    An archive is a program. Without `trust` it is written once more from what its index says and
    the tensors it holds, and run only where every byte is the same: then its program is the one of
    this exporter, whoever made the file.

    Args:
        trust: run whatever is in the file.
    Raises: InputError where the file is missing, damaged or foreign; UsageError where its program
        is not the one of this exporter with the torch that is installed.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the archive {path}: {error.strerror}") from None
    if not trust and not _is_own(archive.parse(path, raw), raw):
        raise UsageError(
            f"{path} is a program that nanogpt export with torch {torch.__version__} does not "
            f"write for its configuration: nothing was run; trust=True runs whatever it does"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        return torch.jit.load(io.BytesIO(raw), map_location="cpu")


def _is_own(content: archive.Content, raw: bytes) -> bool:
    """Whether the exporter writes these bytes for what is in them."""
    described = {
        name: value
        for name, value in content.index.items()
        if name not in ("format", "quantize", "tensors")
    }
    records = {name: entry["record"] for name, entry in content.index["tensors"].items()}
    if not all(re.fullmatch(r"data/\d{1,9}", record) for record in records.values()):
        return False
    # In the file in the order of the weights, in the index in the order of their names.
    names = sorted(records, key=lambda name: int(records[name].removeprefix("data/")))
    weights = {name: content.tensors[name] for name in names}
    again = io.BytesIO()
    try:
        config = GPTConfig(**described["config"])
        if config.n_layer > len(weights):
            return False
        _write(config, described, content.index["quantize"], weights, again)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # no model of ours has this configuration and these tensors
    return again.getbuffer() == raw


def _scripted_archive(
    config: GPTConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Members of torch's own archive, without its top folder; of the tensors the sizes alone."""
    module = Exported(config, weights).eval()
    kept = [name for name, _ in module.named_buffers()]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # TorchScript is deprecated and here to stay through the versions that are supported.
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        scripted = torch.jit.script(module)
        frozen = torch.jit.freeze(scripted, preserved_attrs=["prefill", "decode", "reset", *kept])
        torch.jit.save(frozen, buffer)
    members, sizes = {}, {}
    with zipfile.ZipFile(buffer) as opened:
        for entry in opened.infolist():
            name = entry.filename.partition("/")[2]
            if name.startswith("data/"):
                sizes[name] = entry.file_size
            elif not _LEFT_OUT.search(name):
                members[name] = opened.read(entry)
    return members, sizes


def _canonical(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same archive whatever was scripted before in this process.

    Torch numbers classes that were scripted a second time, and gives each number its own file.
    The numbers go, and the classes of one module come into one file, in the order of their names.
    """
    out: dict[str, bytes] = {}
    code: dict[str, list[bytes]] = {}
    for name, raw in members.items():
        if name.startswith("code/"):
            home = re.sub(r"/___torch_mangle_\d+\.py$", ".py", name)
            classes = re.split(rb"^(?=class )", _TURN.sub(b"", raw), flags=re.M)
            code.setdefault(home, []).extend(part for part in classes if part.strip())
        else:
            # Class names in the pickle end at a newline; no length stands before them.
            out[name] = _TURN.sub(b"", raw) if name == "data.pkl" else raw
    for name, classes in code.items():
        heads = [part.partition(b"(")[0] for part in classes]
        assert len(heads) == len(set(heads)), f"two classes of one name in {name}: {heads}"
        assert all(head.startswith(b"class ") for head in heads), f"{name} holds more than classes"
        out[name] = b"".join(sorted(part.rstrip() + b"\n" for part in classes))
    return {name: out[name] for name in sorted(out)}


class _Object:
    """Stands for a module of the archive while its pickle is read."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Structure(pickle.Unpickler):
    """Reads which record each tensor of a TorchScript archive lies in, and runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Object
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, *_: storage
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an archive")

    def persistent_load(self, reference: Any) -> str:
        return f"data/{reference[2]}"


def _record_of_each_tensor(pickled: bytes) -> dict[str, str]:
    """Tensor names to records, by the pickle that holds the module's attributes."""
    out = {}

    def walk(prefix: str, module: _Object) -> None:
        for name, value in module.state.items():
            if isinstance(value, _Object):
                walk(f"{prefix}{name}.", value)
            elif isinstance(value, str):
                # Quantized weights have their scales beside them, under a name Python allows.
                out[prefix + re.sub("_scale$", SCALE, name)] = value

    walk("", _Structure(io.BytesIO(pickled)).load())
    return out
