"""The command line: `vlmedit doctor | train | edit | eval | export | data | bench | notebook | study`. Each command
takes `--json FILE`.

Exit codes: 0 done, 1 a check of `doctor`, a notebook or an arm of a study failed, 2 bad input (one message, no
traceback, nothing half-written), 130 interrupted.

Every file here whose name does not begin with `_` is a command: the function of the file's own name, called as the file
or as its `NAME`, listed by its `ORDER`. At import these files take the standard library, tyro, rich and the errors
alone, so that help and mistakes are answered at once; everything else is imported by the functions that need it.
"""

from vlmedit.cli._main import main

__all__ = ["main"]
