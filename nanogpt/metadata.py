"""What a model file says about itself: configuration, tokenizer, calibration and check sums.

The metadata is one JSON object. Inside a state dict it travels as a uint8 tensor of its UTF-8
bytes under the key "_extra_state", which torch's `weights_only` reader, safetensors and tools that
average state dicts all let through.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

FORMAT = "nanogpt-1"
KEY = "_extra_state"
_LARGEST_BYTES = 256 * 2**20
_DEEPEST = 64  # as the native engine reads


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON that is the same for equal values: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode("ascii")


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over the tensors in the order of their names.

    Each one adds the line "name dtype shape" and then its bytes in row-major order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = "x".join(str(size) for size in tensor.shape)
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The metadata with its format and two check sums added: of the tensors and of itself.

    A calibration that was fitted to other tensors is marked stale.
    """
    digest = tensor_digest(tensors)
    fitted = content.get("calibration") or {}
    if fitted.get("weights_sha256", digest) != digest and not fitted.get("stale"):
        content = with_stale_calibration(content)
    sealed = {**content, "format": FORMAT, "sha256": digest}
    sealed["metadata_sha256"] = hashlib.sha256(canonical_json(sealed)).hexdigest()
    return sealed


def with_stale_calibration(content: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a model whose weights have changed: no temperature, and a stale record."""
    calibration = content.get("calibration")
    stale = None if calibration is None else {**calibration, "stale": True}
    return {**content, "calibration_temperature": None, "calibration": stale}


def verify(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with sealed metadata or its tensors, in words, or None.

    Metadata without check sums (a state dict that never was a file) passes.
    """
    if "sha256" not in metadata and "metadata_sha256" not in metadata:
        return None
    content = {key: value for key, value in metadata.items() if key != "metadata_sha256"}
    if metadata.get("metadata_sha256") != hashlib.sha256(canonical_json(content)).hexdigest():
        return "its metadata does not match its SHA-256"
    if metadata.get("sha256") != tensor_digest(tensors):
        return "its weights do not match its SHA-256"
    return None


def to_tensor(metadata: Mapping[str, Any]) -> torch.Tensor:
    """Metadata as (n,) uint8."""
    return torch.frombuffer(bytearray(canonical_json(metadata)), dtype=torch.uint8)


def from_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """The inverse of `to_tensor`.

    Raises: ValueError where the bytes are not a JSON object.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1:
        raise ValueError("the metadata is not a one-dimensional tensor")
    return from_bytes(tensor.to(torch.uint8).cpu().numpy().tobytes())


def from_bytes(raw: bytes) -> dict[str, Any]:
    """Metadata from its JSON bytes.

    Raises: ValueError where they are not a JSON object.
    """
    if len(raw) > _LARGEST_BYTES:
        raise ValueError(f"the metadata has {len(raw):,} bytes, too many to be ours")
    try:
        value = json.loads(raw)
        too_deep = _is_deeper(value)
    except RecursionError:
        too_deep = True
    except ValueError as error:
        raise ValueError("the metadata is not JSON") from error
    if too_deep:
        raise ValueError(f"the metadata is nested deeper than {_DEEPEST} levels")
    if not isinstance(value, dict):
        raise ValueError("the metadata is not a JSON object")
    return value


def _is_deeper(value: Any) -> bool:
    """Whether a JSON value is nested too deep for whoever writes it again by recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in inner for child in each if isinstance(child, dict | list)]
        if not level:
            return False
    return True
