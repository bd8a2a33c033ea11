"""The README's Python, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from nanogpt import GPT, checkpoint, native
from nanogpt.export.command import export_model
from nanogpt.tokenizer import CharTokenizer

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
SPECIES = {"Adelie": 38, "Chinstrap": 49, "Gentoo": 47}


@pytest.fixture
def in_a_users_folder(tmp_path, monkeypatch):
    """What the blocks find: a model, its export, and a table."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = CharTokenizer("".join(map(chr, range(32, 127))))
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=1, n_head=2, n_embd=16)
    model.tokenizer = tokenizer
    checkpoint.save(model.eval(), Path("gpt.pth"))
    export_model(model, "model.pt")
    table = ["island,species,bill_length_mm"]
    for i in range(60):
        name = list(SPECIES)[i % 3]
        table.append(f"{('Dream', 'Biscoe')[i % 3 == 2]},{name},{SPECIES[name] + i % 7}")
    Path("penguins.csv").write_text("\n".join(table) + "\n")


def test_all_blocks_are_found():
    assert len(BLOCKS) == 7


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_by_itself(number, in_a_users_folder):
    block = BLOCKS[number]
    if "native" in block and not native.available():
        pytest.skip("the native engine is not built")
    if "GPT(vocab_size=tokenizer.vocab_size, block_size=128)" in block:
        # The README's model has the default shape, this one a smaller one.
        block = block.replace("block_size=128)", "block_size=128, n_layer=1, n_head=2, n_embd=16)")
    exec(compile(block, f"README.md, block {number}", "exec"), {"__name__": "readme"})
