"""The errors a user can cause or meet, each with the exit code its command ends with."""


class NanoGPTError(Exception):
    """Failed while running: disk full, a broken dependency. Exit code 1."""

    exit_code = 1


class UsageError(NanoGPTError):
    """A flag or its value is wrong or impossible on this machine. Exit code 2."""

    exit_code = 2


class InputError(NanoGPTError):
    """An input is missing, empty, damaged, foreign or does not fit. Exit code 3."""

    exit_code = 3
