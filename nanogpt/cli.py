"""The command line: dataclasses become flags, errors become one sentence and an exit code.

Nothing here imports torch; a command's module is imported after its flags have been read.
"""

import argparse
import dataclasses
import datetime
import difflib
import errno
import importlib
import math
import os
import sys
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanogpt import config as configuration
from nanogpt.errors import InputError, NanoGPTError, UsageError, is_out_of_memory

COMMANDS: dict[str, tuple[type, str]] = {
    "train": (configuration.TrainConfig, "nanogpt.train"),
    "advanced": (configuration.AdvancedConfig, "nanogpt.advanced"),
    "sample": (configuration.SampleConfig, "nanogpt.sample"),
    "calibrate": (configuration.CalibrateConfig, "nanogpt.calibrate"),
    "explore": (configuration.ExploreConfig, "nanogpt.explore.command"),
    "export": (configuration.ExportConfig, "nanogpt.export.command"),
    "bench": (configuration.BenchConfig, "nanogpt.bench"),
    "doctor": (configuration.DoctorConfig, "nanogpt.doctor"),
}
INTERRUPTED = 130
_LARGEST_CONFIG = 1_000_000
_MOST_BITS = 64  # of a whole number: seeds have that many
_LONGEST_SHOWN = 100


_began: float | None = None


def seconds_since_start() -> float:
    """How long the command runs already, the imports of what it needs included."""
    return 0.0 if _began is None else time.monotonic() - _began


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nanogpt COMMAND …` and return the exit code."""
    global _began
    _began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return 0 if arguments else 2
        if arguments[0] == "--version":
            from nanogpt import __version__

            print(f"nanogpt {__version__}")
            return 0
        return run(arguments[0], arguments[1:])
    except BrokenPipeError:
        # The reader went away (`nanogpt sample | head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(command: str, arguments: Sequence[str]) -> int:
    """Read the flags of one command, run it and turn what goes wrong into an exit code."""
    try:
        if command not in COMMANDS:
            raise UsageError(f"there is no command {command!r}{_nearest(command, COMMANDS)}")
        config_class, module = COMMANDS[command]
        config = parse(command, config_class, arguments)
        return int(importlib.import_module(module).run(config) or 0)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except NanoGPTError as error:
        return _complain(command, str(error), error.exit_code)
    except OSError as error:
        if os.environ.get("NANOGPT_TRACEBACK"):
            raise
        where = f" ({error.filename})" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return _complain(command, f"the disk is full{where}", 1)
        return _complain(command, f"{error.strerror or error}{where}", 1)
    except Exception as error:
        if os.environ.get("NANOGPT_TRACEBACK"):
            raise
        if is_out_of_memory(error):
            hint = "a smaller --batch-size or model needs less"
            return _complain(command, f"out of memory: {hint}", 1)
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "this is a bug of nanogpt; set NANOGPT_TRACEBACK=1 to see where"
        return _complain(command, f"{summary} ({hint})", 1)


def parse(command: str, config_class: type, arguments: Sequence[str]) -> Any:
    """Flags, over the values of --config, over the defaults, as an instance of `config_class`.

    Raises: UsageError for an unknown flag (the nearest is named) or a bad value;
        InputError for a configuration file that is missing or damaged.
    """
    parser = _build_parser(command, config_class)
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        stray = next((word for word in unknown if word.startswith("-")), None)
        if stray is None:
            raise UsageError(f"unexpected argument {unknown[0]!r}: every value follows a flag")
        name = stray.split("=")[0]
        raise UsageError(f"there is no flag {name}{_nearest(name, flags)}")
    given = {name: value for name, value in vars(namespace).items() if name != "config"}
    from_file = _read_config_file(namespace.config, config_class) if "config" in namespace else {}
    return config_class(**{**from_file, **given})


def _build_parser(command: str, config_class: type) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"nanogpt {command}",
        description=config_class.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {"options": parser}
    # A command's own flags stand before those it shares with others.
    own = config_class.__annotations__
    entries = sorted(dataclasses.fields(config_class), key=lambda entry: entry.name not in own)
    order = [*configuration.GROUPS, *(entry.metadata["group"] for entry in entries)]
    for entry in sorted(entries, key=lambda entry: order.index(entry.metadata["group"])):
        title = entry.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        flag = "--" + entry.name.replace("_", "-")
        help_text = f"{entry.metadata['help']} (default: {_shown_default(entry)})".replace(
            "%", "%%"
        )
        kind, many = _value_type(config_class, entry.name)
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
            continue
        group.add_argument(
            flag,
            dest=entry.name,
            nargs="+" if many else None,
            action=_Extend if many else "store",
            type=_Converter(flag, kind, entry.metadata),
            metavar=_placeholder(entry, kind),
            help=help_text,
        )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="set any of these flags from a file (default: none)"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.replace("argument ", "", 1))


class _Extend(argparse.Action):
    """Collects `--text a b --text c` into the tuple ("a", "b", "c")."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


class _Converter:
    """Turns a flag's text into its value and checks the limits of its field."""

    def __init__(self, flag: str, kind: type, limits: Any) -> None:
        self.flag, self.kind, self.limits = flag, kind, limits

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            noun = {int: "a whole number", float: "a number"}[self.kind]
            shown = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
            raise UsageError(f"{self.flag} must be {noun}, not {shown!r}") from None
        choices = self.limits["choices"]
        if choices and value not in choices:
            words = ", ".join(choices)
            raise UsageError(f"{self.flag} must be one of {words}, not {text!r}")
        if self.kind in (int, float):
            self._check_limits(value, text)
        return value

    def _check_limits(self, value: float, text: str) -> None:
        limits = self.limits
        checks = (
            (limits["minimum"], "at least", lambda limit: value >= limit),
            (limits["above"], "above", lambda limit: value > limit),
            (limits["below"], "below", lambda limit: value < limit),
            (limits["maximum"], "at most", lambda limit: value <= limit),
        )
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise UsageError(f"{self.flag} must be a number of at most {_MOST_BITS} bits")
        if not math.isfinite(value):
            raise UsageError(f"{self.flag} must be finite, not {text!r}")
        for limit, word, holds in checks:
            if limit is not None and not holds(limit):
                raise UsageError(f"{self.flag} must be {word} {limit:g}, not {text!r}")


def _value_type(config_class: type, name: str) -> tuple[type, bool]:
    """The type of one value of a field, and whether the field takes several."""
    annotation = typing.get_type_hints(config_class)[name]
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation, False


def _placeholder(entry: Any, kind: type) -> str:
    if entry.metadata["metavar"]:
        return str(entry.metadata["metavar"])
    if entry.metadata["choices"]:
        return "|".join(entry.metadata["choices"])
    return {int: "N", float: "X"}.get(kind, "NAME")


def _shown_default(entry: Any) -> str:
    if entry.metadata["auto"] is not None and entry.default in (None, ()):
        return str(entry.metadata["auto"])
    if isinstance(entry.default, bool):
        return "yes" if entry.default else "no"
    return str(entry.default)


def _read_config_file(path: str, config_class: type) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Without aliases, with which a short text stands for a huge value."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(
                    None, None, "an alias", self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            raise InputError(f"{path} is no configuration: it is longer than {_LARGEST_CONFIG:,}")
        loader = Loader(text)
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
    except InputError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the configuration {path}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        aliases = " without aliases" if getattr(error, "problem", "") == "an alias" else ""
        raise InputError(f"{path} is not valid YAML{aliases}{line}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep for a configuration") from None
    except ValueError:
        raise InputError(f"{path} holds a number or a date that is impossible") from None
    except Exception:  # what its tags make of values that they do not fit
        raise InputError(f"{path} is not valid YAML") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold 'flag: value' lines, one for each flag it sets")
    assert root is not None
    names = [key.value for key, _ in root.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: {twice} stands there twice")
    fields = {entry.name: entry for entry in dataclasses.fields(config_class)}
    values = {}
    for key, value in content.items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in fields:
            near = _nearest(name.replace("_", "-"), [n.replace("_", "-") for n in fields])
            raise UsageError(f"{path}: there is no flag {key!r}{near}")
        values[name] = _value_from_file(path, config_class, fields[name], value)
    return values


def _value_from_file(path: str, config_class: type, entry: Any, value: Any) -> Any:
    if value is None:
        return entry.default
    kind, many = _value_type(config_class, entry.name)
    label = f"{path}: {entry.name.replace('_', '-')}"
    if kind is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{label} must be true or false, not {_named(value)}")
        return value
    converter = _Converter(label, kind, entry.metadata)
    if many:
        words = value if isinstance(value, list) else [value]
        for word in words:
            if not _is_single(word):
                raise UsageError(f"{label} must be a list of single values, not of {_named(word)}")
        return tuple(converter(str(word)) for word in words)
    if not _is_single(value) or isinstance(value, bool):
        raise UsageError(f"{label} must be a single value, not {_named(value)}")
    return converter(str(value))


def _is_single(value: Any) -> bool:
    return isinstance(value, str | int | float | datetime.date)


def _named(value: Any) -> str:
    """A value of a file, in few words: what it holds may be without end."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if _is_single(value):
        return f"{value!r:.40}"
    words = {list: "a list", dict: "a mapping", bytes: "binary data", type(None): "nothing"}
    return words.get(type(value), "something else")


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""


def _overview() -> str:
    lines = ["usage: nanogpt COMMAND [flags]      (nanogpt COMMAND --help lists the flags)", ""]
    for name, (config_class, _) in COMMANDS.items():
        lines.append(f"  {name:10} {(config_class.__doc__ or '').strip()}")
    return "\n".join(lines)


def _complain(command: str, message: str, code: int) -> int:
    print(f"nanogpt {command}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
