"""How the command line speaks: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from quantkit.errors import InputError


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn InputError into one line and exit code 2; any other exception is our fault, exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except _input_errors() as error:
            fail(str(error), 2)
        except KeyboardInterrupt:
            fail("interrupted; finished work is kept", 130)
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except OSError as error:
            fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            import traceback

            traceback.print_exc()
            fail(f"internal error ({type(error).__name__}); please report it with the lines above", 1)

    return run


def _input_errors() -> tuple[type[Exception], ...]:
    hardware = sys.modules.get("hwmodel.cost")  # not imported for the sake of an error it cannot have raised
    return (InputError,) if hardware is None else (InputError, hardware.HwError)


def fail(message: str, code: int) -> None:
    """Print one `error:` line on stderr and leave with this exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def print_json(document: Any) -> None:
    """One JSON document on stdout; NaN and infinities become null."""
    print(json.dumps(_plain(document), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(title: str, columns: dict[str, str], rows: list[list[str]], *, highlight: int | None = None) -> None:
    """A rich table on stdout; `columns` maps a heading to "left" or "right"."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for index, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style="bold green" if index == highlight else None)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width of its own
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)


def note(text: str) -> None:
    """A remark for people, one line on stderr."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr)


def warn(text: str) -> None:
    """A warning, one yellow line on stderr (without color where that is no terminal)."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(
        Text(f"warning: {' '.join(text.split())}", style="yellow")
    )


def remarks(gaps: Mapping[str, Any]) -> list[str]:
    """What `quantkit.loading.gaps` found, a sentence each.

    >>> remarks({"float_layers": {"fc": "it has code of its own"}, "untraced": None, "idle": [], "silent_channels": 0})
    ['fc stays in float: it has code of its own']
    """
    found = [f"{name} stays in float: {why}" for name, why in gaps["float_layers"].items()]
    if gaps["untraced"]:
        found.append(
            "the network cannot be followed, so only layers found by their type are quantized, and products and"
            f" normalizations in its code stay in float: {gaps['untraced']}"
        )
    if estimated := gaps.get("estimated"):
        found.append(f"the normalization of observations is {estimated}")
    if idle := gaps["idle"]:
        names = ", ".join(idle[:6]) + (f" and {len(idle) - 6} more" if len(idle) > 6 else "")
        found.append(f"{names} never ran on the calibration inputs: their inputs stay in float")
    if silent := gaps["silent_channels"]:
        found.append(
            f"{silent} input channel{'s are' if silent > 1 else ' is'} zero on all calibration inputs:"
            " no weight behind them can matter there (quantkit analyze tells the layers)"
        )
    return found


def say(text: str) -> None:
    """A line for people, on stdout."""
    print(text)


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and remaining time on stderr; yields `update(done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed
            rate = f"{speed:.3g} {unit}/s" if speed else ""
            progress.update(task, completed=done, total=total, rate=rate)

        yield update
