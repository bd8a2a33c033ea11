"""Hugging Face's GPT-2: a folder that `transformers` loads.

    config.json, model.safetensors       GPT2LMHeadModel, names and Conv1D layout of GPT-2
    generation_config.json
    tokenizer.json, tokenizer_config.json

GPT-2 has biases everywhere; a model without them gets zeros. Characters and bytes are written in
the words of the tokenizers library: bytes as BPE without merges, characters as a list of words.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from nanogpt.errors import NanoGPTError
from nanogpt.export.quantize import weights_of
from nanogpt.model import GPT
from nanogpt.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    byte_symbols,
)

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
ALWAYS = FILES[:3]  # also of a model without a tokenizer
# GPT-2's linear maps are Conv1D: (in, out).
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write(model: GPT, folder: Path) -> None:
    """Write the folder, which must not exist. Raises: InputError where a weight is not finite."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(
        safetensors.torch.save(tensors_of(model), metadata={"format": "pt"})
    )
    _write_json(folder / "config.json", _config(model))
    last = model.config.vocab_size - 1
    _write_json(folder / "generation_config.json", {"bos_token_id": last, "eos_token_id": last})
    if model.tokenizer is not None:
        _write_json(folder / "tokenizer.json", tokenizer_json(model.tokenizer))
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "model_max_length": model.config.block_size,
                "clean_up_tokenization_spaces": False,
            },
        )


def verify(model: GPT, folder: Path) -> None:
    """Read the weights back and compare them bit by bit.

    Raises: NanoGPTError where they differ.
    """
    expected = tensors_of(model)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if set(found) != set(expected):
        raise NanoGPTError("what was exported holds other tensors than the model")
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            raise NanoGPTError(f"what was exported differs from the model in {name}")


def tensors_of(model: GPT) -> dict[str, torch.Tensor]:
    """GPT-2's state dict, (in, out) where it has Conv1D, with biases."""
    return {
        name: weight.t().contiguous() if name.endswith(_TRANSPOSED) else weight
        for name, weight in with_biases(weights_of(model, "none")).items()
    }


def with_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, and zeros for the biases that GPT-2 has and they lack."""
    out = {}
    for name, weight in weights.items():
        out[name] = weight
        owner = name.removesuffix(".weight")
        if owner != name and not owner.endswith(("wte", "wpe")):
            out[owner + ".bias"] = weights.get(owner + ".bias", torch.zeros(weight.shape[0]))
    return out


def _config(model: GPT) -> dict[str, Any]:
    shape = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": shape.vocab_size - 1,
        "eos_token_id": shape.vocab_size - 1,
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer in the format of the tokenizers library, with the same ids."""
    if isinstance(tokenizer, BPETokenizer):
        return dict(tokenizer.to_dict()["tokenizer"])
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        # No word for unknown characters, so that they are refused as they are here.
        backend = Backend(models.WordLevel(vocab, unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), behavior="isolated")
        backend.decoder = decoders.Fuse()
    else:
        vocab = {symbol: value for value, symbol in byte_symbols().items()}
        backend = Backend(models.BPE(vocab, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return dict(json.loads(backend.to_str()))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
