"""What a user can set right: the errors that the command line turns into a message.

This module imports nothing of ours, so that everybody may import it.
"""

from collections.abc import Iterable


class InputError(ValueError):
    """What was given cannot be used. `problems` lists everything found; `hint` says once what would be possible."""

    def __init__(self, problems: str | Iterable[str], hint: str = ""):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        self.hint = hint
        head = self.problems[0]
        if len(self.problems) != 1:
            head = f"{len(self.problems)} problems:\n  " + "\n  ".join(self.problems)
        super().__init__(f"{head}\n{hint}" if hint else head)


class ConfigError(ValueError):
    """A setting that cannot be used: the message names it, its value and the remedy."""


class ImpossibleEdit(ValueError):
    """The edit cannot be made on this scene: the message says why and what would be possible."""


class UnknownInstruction(ValueError):
    """The text is not an instruction of the world's grammar; the message names the nearest known words."""
