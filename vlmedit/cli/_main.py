"""Finds the commands, runs one of them, and turns known errors into a message and an exit code."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from math import inf

import tyro
from tyro.conf import FlagCreatePairsOff

from vlmedit.cli._shared import say
from vlmedit.errors import ConfigError, ImpossibleEdit, InputError, UnknownInstruction

BAD_INPUT, INTERRUPTED = 2, 130
DESCRIPTION = "Image editing learned without image pairs, in miniature."


def commands() -> dict[str, Callable[..., int]]:
    """Every command by its name, in the order of the help: by `ORDER`, and those without one last, by their files'
    names."""
    from vlmedit import cli as package

    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    found = [(name, import_module(f"vlmedit.cli.{name}")) for name in names]
    found.sort(key=lambda pair: getattr(pair[1], "ORDER", inf))
    return {getattr(module, "NAME", name): getattr(module, name) for name, module in found}


def join_parameters(args: Sequence[str]) -> list[str]:
    """papermill's `-p NAME VALUE` as `--p NAME=VALUE`, whichever way it was written."""
    out, rest = [], iter(args)
    for word in rest:
        if word != "-p":
            out.append(word)
            continue
        name = next(rest, "")
        out += ["--p", name if "=" in name else f"{name}={next(rest, '')}"]
    return out


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. The one place where known errors become messages."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["notebook"]:
        args = join_parameters(args)
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands(), args=args, prog="vlmedit", description=DESCRIPTION, config=(FlagCreatePairsOff,)
        )
    except (InputError, UnknownInstruction, ImpossibleEdit, ConfigError) as error:
        say(f"vlmedit: {error}")
        return BAD_INPUT
    except ModuleNotFoundError as error:  # of a library that an extra brings
        from vlmedit.extras import missing

        if not (told := missing(error)):
            raise
        say(f"vlmedit: {told}")
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"vlmedit: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        say("vlmedit: interrupted")
        return INTERRUPTED
    except SystemExit as stop:  # tyro: 0 after --help, 2 for options it does not know
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
