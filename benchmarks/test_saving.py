"""What a checkpoint costs the training that it is taken of.

Training waits for `Saver.save` (a copy) and is slowed by the thread that writes; both are in the
time of the steps from one save to the end of the next. The peers write the same checkpoint while
training waits: our own `RunDirectory.save`, and torch.save of weights and moments to one file that
nothing syncs, as nanoGPT does it.
"""

import statistics
import time

import pytest
import torch

from nanogpt import GPT
from nanogpt.run_directory import RunDirectory
from nanogpt.saver import Saver
from nanogpt.trainer import make_optimizer

_STEPS = 3
"""From one save to the next."""
SHAPES = {
    "10.7M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "30M": {"n_layer": 6, "n_head": 8, "n_embd": 512, "block_size": 256, "vocab_size": 20_000},
}


@pytest.mark.parametrize("size", list(SHAPES))
def test_saving(benchmark, record, ceilings, tmp_path, size):
    model = GPT(**{"vocab_size": 65, **SHAPES[size]}).train()
    optimizer = make_optimizer(model, 1e-4, 0.1, (0.9, 0.95))
    tokens = torch.randint(65, (2, 257))

    def steps() -> None:
        for _ in range(_STEPS):
            _, loss = model(tokens[:, :-1], tokens[:, 1:], return_logits=False)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with RunDirectory(tmp_path / "run", warn=print) as folder:
        folder.begin({"identity": {}}, {})
        saver = Saver(folder, None, print)
        number = 0

        def overlapped() -> None:
            nonlocal number
            number += 1
            saver.save(number, model, optimizer.state_dict(), {}, is_best=True)
            steps()

        def waiting() -> None:
            nonlocal number
            number += 1
            folder.save(number, model, optimizer.state_dict(), {}, model)
            steps()

        def as_nanogpt() -> None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, tmp_path / "ckpt.pt")
            steps()

        variants = {"none": steps, "ours": overlapped, "waiting": waiting, "torch.save": as_nanogpt}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        with saver:
            for run in variants.values():
                run()
            for _ in range(7):
                for name, run in variants.items():
                    started = time.perf_counter()
                    run()
                    saver.wait()  # what is still being written counts as well
                    seconds[name].append(time.perf_counter() - started)
            benchmark.pedantic(overlapped, rounds=3)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    cost = {name: max(1e-6, medians[name] - medians["none"]) for name in variants if name != "none"}
    # A copy reads and writes weights and two moments once.
    floor = 2 * 3 * 4 * model.config.n_parameters() / ceilings["copy_bytes_per_second"]
    shape = {"parameters": size, "training step ms": round(medians["none"] / _STEPS * 1e3)}
    peers = {
        "our save, training waits": cost["waiting"],
        "torch.save, nothing synced": cost["torch.save"],
    }
    record("saving", shape, "float32", cost["ours"], peers, floor)
