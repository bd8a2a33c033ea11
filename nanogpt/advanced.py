"""Train on rewarded texts, or align a model with terms: `python -m nanogpt.advanced`.

`run` checks the flags and hands over to one of the two stories: offline_run.py or align_run.py.
"""

if __name__ == "__main__":
    # Before torch is imported, so that --help is quick; the module then runs under its own name.
    import sys

    from nanogpt.cli import main

    sys.exit(main(["advanced", *sys.argv[1:]]))

import sys
from dataclasses import fields
from pathlib import Path

from nanogpt import checkpoint
from nanogpt.align_run import align
from nanogpt.config import AdvancedConfig
from nanogpt.errors import UsageError
from nanogpt.interruption import terminable
from nanogpt.offline_run import train_offline
from nanogpt.plan import check_against_initial, machine_choices


def run(config: AdvancedConfig) -> int:
    """Check, then train on records or align with terms. Returns the exit code."""
    _check_flags(config)
    checkpoint.check_output(Path(config.output))
    machine = machine_choices(config)
    initial = checkpoint.load(config.init)[0] if config.init else None
    check_against_initial(config, initial)
    say = _quiet if config.json else _say
    with terminable():
        if config.align_terms is not None:
            assert initial is not None
            return align(config, initial, machine, say)
        return train_offline(config, initial, machine, say)


def _check_flags(config: AdvancedConfig) -> None:
    """Raises: UsageError for flags that contradict each other."""
    if (config.offline_data is None) == (config.align_terms is None):
        raise UsageError(
            "give either --offline-data (rewarded texts) or --align-terms (terms to write more of)"
        )
    aligning = config.align_terms is not None
    _refuse_foreign(config, "self-alignment" if not aligning else "offline data")
    if aligning:
        for name in ("val_fraction", "plain_epochs", "warmup_steps", "beta1", "beta2", "dropout"):
            if _given(config, name):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is not used with --align-terms: leave it out")
        if config.scale_rewards == "group":
            raise UsageError("--scale-rewards group needs prompts, which --align-terms has not")
    if config.weighting not in ("exp", "rank") and (config.target_ess or config.target_kl):
        raise UsageError(
            f"--weighting {config.weighting} has no beta, so --target-ess and --target-kl do not "
            f"apply: use exp or rank"
        )
    if config.target_ess is not None and config.target_kl is not None:
        raise UsageError("--target-ess and --target-kl exclude each other")
    if config.align_terms is not None and config.init is None:
        raise UsageError("--align-terms needs --init MODEL: there must be a model to align")
    if config.objective != "weighted":
        if config.init is None and config.plain_epochs == 0:
            raise UsageError(
                f"--objective {config.objective} needs --init MODEL or --plain-epochs: it is "
                f"measured against the model that it starts from"
            )
        if config.compare:
            raise UsageError("--compare compares weighted training: use --objective weighted")
    if config.kl_coef and config.init is None and config.plain_epochs == 0:
        raise UsageError("--kl-coef needs --init MODEL or --plain-epochs: a model to stay close to")


# Flags of the offline part that rewards of both stories share.
_SHARED = ("beta", "scale_rewards", "max_weight")


def _given(config: AdvancedConfig, name: str) -> bool:
    return bool(getattr(config, name) != AdvancedConfig.__dataclass_fields__[name].default)


def _refuse_foreign(config: AdvancedConfig, group: str) -> None:
    """Raises: UsageError for a flag of the other story."""
    for entry in fields(config):
        foreign = entry.metadata["group"] == group and entry.name not in _SHARED
        if foreign and _given(config, entry.name):
            flag, story = entry.name.replace("_", "-"), "--align-terms"
            if group == "offline data":
                story = "--offline-data"
            raise UsageError(f"--{flag} is of {story}, which is not given")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _quiet(message: str) -> None:
    pass
