"""Lists of terms as a command is given them: `a,b,c`, or the name of a file of lines."""

from pathlib import Path

from nanogpt.errors import InputError, UsageError

_SPACES = " \t\r\n\v\f"


def read_terms(value: str, flag: str) -> list[str]:
    """The lines of a file of that name, or what stands between commas.

    Args:
        value: a file where there is one, or where it ends in .txt.
        flag: where it came from, for the sentences, such as "--reward-terms".
    Returns: terms without the spaces around them; at least one.
    Raises: UsageError where nothing stands between the commas; InputError where the file cannot be
        read or holds nothing.
    """
    if not value:
        raise UsageError(f"{flag} needs at least one term")
    path = Path(value)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        exists = False
    if (exists and not path.is_dir()) or (not exists and value.endswith(".txt")):
        terms = _pieces(_read(path, flag), "\n")
        if not terms:
            raise InputError(f"{value} holds no terms, one a line")
        return terms
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text
        raise UsageError(f"{flag} is not UTF-8 text") from None
    terms = _pieces(value, ",")
    if not terms:
        raise UsageError(f"{flag} needs at least one term")
    return terms


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the terms of {flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: bad byte at {error.start}") from None


def _pieces(text: str, separator: str) -> list[str]:
    stripped = (piece.strip(_SPACES) for piece in text.split(separator))
    return [piece for piece in stripped if piece]
