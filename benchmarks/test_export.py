"""What an export costs, with and without its proof, beside the shortest way to a TorchScript file.

The peer traces one length of input and saves it: no cache inside, no tokenizer, no check sums, and
nothing read back. test_native.py measures the binary that reads the export.
"""

import statistics
import time
import warnings

import pytest
import torch

from nanogpt import GPT
from nanogpt.export import export_model
from nanogpt.tokenizer import CharTokenizer

ROUNDS = 3
SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
FORMATS = {
    "torchscript": ("none", True),
    "torchscript, not verified": ("none", False),
    "torchscript int8": ("int8", True),
    "safetensors": ("none", True),
    "gguf": ("none", True),
    "hf": ("none", True),
}
ENDINGS = {"torchscript": "model.pt", "safetensors": "m.safetensors", "gguf": "m.gguf", "hf": "m"}


class OnlyLogits(torch.nn.Module):
    """What torch.jit.trace takes: tensors in, a tensor out."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_export(benchmark, record, ceilings, tmp_path, name):
    """M with a vocabulary of 96 characters."""
    quantize, verify = FORMATS[name]
    form = name.split(",")[0].split()[0]
    tokenizer = CharTokenizer("".join(map(chr, range(32, 127))))
    torch.manual_seed(0)
    model = GPT(vocab_size=tokenizer.vocab_size, **SHAPE).eval()
    model.tokenizer = tokenizer
    if form == "gguf":
        pytest.importorskip("gguf")
    path = tmp_path / ENDINGS[form]

    def ours() -> None:
        export_model(model, path, format=form, quantize=quantize, verify=verify)

    def traced() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            example = torch.zeros(1, SHAPE["block_size"], dtype=torch.int64)
            torch.jit.trace(OnlyLogits(model), example).save(str(tmp_path / "traced.pt"))

    def saved() -> None:
        torch.save(model.state_dict(), tmp_path / "state.pth")

    peer, theirs = ("torch.jit.trace and save", traced)
    if form != "torchscript":
        peer, theirs = "torch.save", saved
    taken: dict[str, list[float]] = {"ours": [], peer: []}
    for _ in range(ROUNDS + 1):
        for variant, run in (("ours", ours), (peer, theirs)):
            started = time.perf_counter()
            run()
            taken[variant].append(time.perf_counter() - started)
    benchmark.pedantic(ours, rounds=1)
    seconds = {variant: statistics.median(each[1:]) for variant, each in taken.items()}
    files = [path] if path.is_file() else list(path.iterdir())
    size = sum(file.stat().st_size for file in files)
    weights = 4 * model.config.n_parameters()
    record(
        "export",
        {"model": "M", "format": name},
        "int8" if quantize == "int8" else "float32",
        seconds["ours"],
        {peer: seconds[peer]},
        # The weights are read, and what the file holds is written.
        (weights + size) / ceilings["copy_bytes_per_second"],
        also={"bytes": f"{size:,}"},
    )
