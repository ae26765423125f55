"""The errors that a user may see: one line, naming the thing, its value, the range and the remedy."""


class QtrainError(Exception):
    """Something failed that is not the user's mistake; the command ends with exit code 1."""

    exit_code = 1


class UserError(QtrainError):
    """A mistake in what the user gave (recipe, flag, file, row); exit code 2."""

    exit_code = 2


class DataError(UserError):
    """Bad rows of a data file. `problems` holds one `file:line: reason` for each of them.

    The message shows the first few and the count of all.
    """

    def __init__(self, summary: str, problems: list[str], shown: int = 20) -> None:
        self.problems = problems
        lines = [summary, *(f"  {problem}" for problem in problems[:shown])]
        if len(problems) > shown:
            lines.append(f"  ... and {len(problems) - shown} more (all of them: qtrain data check FILE)")
        super().__init__("\n".join(lines))


class GateError(QtrainError):
    """A check that the result had to pass was not passed; exit code 1."""
