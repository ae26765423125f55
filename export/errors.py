"""What an export can end with besides a checkpoint; each message is one line with a remedy."""

from __future__ import annotations


class ExportError(Exception):
    """The export can't be done as asked: a file, an option, a module, a full disk. Exit code 2."""

    exit_code = 2


class GateFailed(Exception):
    """The checkpoint was written and measured, and is below the gate. Exit code 1."""

    exit_code = 1
