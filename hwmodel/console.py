"""Tables on the terminal, and how a command line ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

LEFT = ("", "name", "model", "memory", "converter", "family", "source")
"""Columns of words; numbers stand on the right."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, as wide as it needs to be where no terminal limits it; an empty row draws a line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", show_header=any(columns), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def run(app: Callable[..., int | None], program: str) -> NoReturn:
    """Run a typer application and leave with its exit code; one line on stderr for what its argument parser refuses.

    program: its name, where a refusal has none.
    """
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        code = 2
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        context = getattr(error, "ctx", None)
        if message := " ".join(usage().split()):  # empty after help that was asked for by saying nothing
            print(f"error: {message} (see {context.command_path if context else program} --help)", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)
