"""Journals: files of one JSON object a line, which a full disk delays and does not end."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A file that lines are added to; those that do not fit on the disk are kept for later.

    Args:
        path: made if it is not there.
    Raises: OSError where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line.

        Raises: OSError where it is not written now; `flush` tries again.
        """
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what has not been written. Raises: OSError where that fails."""
        while self._unwritten:
            written = self._file.write(self._unwritten) or 0  # of a full disk a part
            self._unwritten = self._unwritten[written:]

    def sync(self) -> None:
        """Make what is written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what still can be."""
        with contextlib.suppress(OSError):
            self.flush()
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a journal; lines cut short by a crash, or damaged, are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records
