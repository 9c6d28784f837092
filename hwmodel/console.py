"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

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
