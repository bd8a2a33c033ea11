"""GGUF for llama.cpp: architecture gpt2 with its tokenizer inside.

Every tokenizer becomes the one form that llama.cpp loads for GPT-2, byte-level BPE, with the same
ids: bytes are BPE that never merges, and a character of several bytes is what its bytes merge
into, first with second, the pair with the third, … No merge crosses from one character to the
next, because each begins with a first byte of UTF-8. (A character that the vocabulary lacks is
left out by llama.cpp, where we refuse it.)

    none   F32       bf16   matrices BF16       int8   matrices Q8_0: 32 weights share a scale

Position embeddings and vectors stay F32. Needs the package `gguf`.
"""

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.export.hf import with_biases
from nanogpt.export.quantize import POSITIONS, weights_of
from nanogpt.model import GPT
from nanogpt.tokenizer import END_OF_TEXT, BPETokenizer, Tokenizer, byte_symbols

_TYPES = {"none": "F32", "bf16": "BF16", "int8": "Q8_0"}
_BLOCK = 32  # weights that share a scale in Q8_0
_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# A pair that no text can hold; the list of merges must not be empty.
_NEVER = f"{END_OF_TEXT} {END_OF_TEXT}"


def check(model: GPT, quantize: str) -> None:
    """Raises: UsageError or InputError where this model cannot become such a file."""
    _package()
    if model.tokenizer is None:
        raise InputError("the model holds no tokenizer, and llama.cpp loads no model without one")
    if quantize == "int8" and model.config.n_embd % _BLOCK:
        raise UsageError(
            f"--quantize int8 in gguf packs {_BLOCK} weights together, and the model's width "
            f"{model.config.n_embd} is no multiple of that: use none or bf16"
        )


def write(model: GPT, quantize: str, path: Path) -> None:
    """Write the file. Raises: what `check` raises; InputError where a weight is not finite."""
    check(model, quantize)
    assert model.tokenizer is not None
    package, shape = _package(), model.config
    writer = package.GGUFWriter(path, "gpt2")
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(4 * shape.n_embd)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    kinds = {"none": "ALL_F32", "bf16": "MOSTLY_BF16", "int8": "MOSTLY_Q8_0"}
    writer.add_file_type(package.LlamaFileType[kinds[quantize]])
    tokens, merges = vocabulary(model.tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    normal, control = package.TokenType.NORMAL, package.TokenType.CONTROL
    writer.add_token_types([normal] * (len(tokens) - 1) + [control])
    writer.add_token_merges(merges or [_NEVER])
    last = shape.vocab_size - 1
    writer.add_bos_token_id(last)
    writer.add_eos_token_id(last)
    writer.add_add_bos_token(False)
    for name, data, kind in _tensors(model, quantize):
        writer.add_tensor(name, data, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        with contextlib.suppress(OSError):
            writer.close()
        if error.errno is None:  # numpy says how much it wrote, and not why no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def verify(model: GPT, quantize: str, path: Path) -> None:
    """Read tensors and vocabulary back and compare them.

    Raises: NanoGPTError where they differ.
    """
    assert model.tokenizer is not None
    reader = _package().GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = list(_tensors(model, quantize))
    if set(found) != {name for name, _, _ in expected}:
        raise NanoGPTError("what was exported holds other tensors than the model")
    for name, data, kind in expected:
        there = found[name]
        same = there.tensor_type == kind and there.data.tobytes() == data.tobytes()
        if not same:
            raise NanoGPTError(f"what was exported differs from the model in {name}")
    tokens, _ = vocabulary(model.tokenizer)
    if reader.get_field("tokenizer.ggml.tokens").contents() != tokens:
        raise NanoGPTError("what was exported differs from the model in its vocabulary")


def vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Tokens in GPT-2's visible letters for bytes, and merges, each "left right"."""
    symbols = byte_symbols()
    tokens = ["".join(symbols[value] for value in raw) for raw in tokenizer.token_bytes[:-1]]
    if isinstance(tokenizer, BPETokenizer):
        pairs = tokenizer.to_dict()["tokenizer"]["model"]["merges"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    else:
        # Without repetition: characters with the same first bytes share their first merges.
        merges = list(
            dict.fromkeys(
                f"{token[:end]} {token[end]}" for token in tokens for end in range(1, len(token))
            )
        )
    return [*tokens, END_OF_TEXT], merges


def _tensors(model: GPT, quantize: str) -> Iterator[tuple[str, np.ndarray, Any]]:
    package = _package()
    types = package.GGMLQuantizationType
    for name, weight in with_biases(weights_of(model, "none")).items():
        plain = weight.numpy()
        matrix = weight.dim() == 2 and name != POSITIONS
        if not matrix or quantize == "none":
            yield _name(name), plain, types.F32
        elif quantize == "bf16":
            # torch rounds to the nearest; numpy has no bfloat16, so the bytes travel as they are.
            rounded = weight.to(torch.bfloat16).view(torch.uint8).numpy()
            yield _name(name), rounded, types.BF16
        else:
            yield _name(name), package.quants.quantize(plain, types.Q8_0), types.Q8_0


def _name(name: str) -> str:
    parts = name.removeprefix("transformer.").split(".")
    if parts[0] == "h":
        return f"blk.{parts[1]}.{_NAMES['.'.join(parts[2:-1])]}.{parts[-1]}"
    return f"{_NAMES[parts[0]]}.{parts[-1]}"


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UsageError("--format gguf needs the package gguf: pip install gguf") from None
