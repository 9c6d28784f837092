"""Constant memories: their words, Verilog and contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hwmodel.memory import rom


@dataclass(frozen=True, slots=True)
class Rom:
    """Constants: `words` of `width` bits, read with one cycle of delay."""

    name: str
    width: int
    words: tuple[int, ...]


def rom_text(memory: Rom) -> str:
    """A module with the memory's contents from NAME.mem, or its one word as a constant."""
    depth, width = len(memory.words), memory.width
    address = max(1, (depth - 1).bit_length())
    # Constants in LUTs: seen apart from the logic around them, Yosys finds the one LUT per 64 bits that they are.
    apart = "`ifdef YOSYS\n(* keep_hierarchy *)\n`endif\n" if rom(width, depth).kind == "lutram" else ""
    head = f"{apart}module {memory.name} (\n    input clk,\n    input [{address - 1}:0] address,\n"
    if depth == 1:
        return (
            f"{head}    output [{width - 1}:0] q\n);\n  assign q = {width}'h{memory.words[0]:x};\n"
            "  wire unused = &{1'b0, clk, address};\nendmodule\n"
        )
    style = '(* rom_style = "block" *)'
    if rom(width, depth).kind != "bram":  # Yosys maps no constant memory to LUTRAM, but to plain LUTs
        style = '`ifdef YOSYS\n  (* rom_style = "logic" *)\n`else\n  (* rom_style = "distributed" *)\n`endif\n '
    return (
        f"{head}    output reg [{width - 1}:0] q\n);\n"
        f"  {style} reg [{width - 1}:0] words [0:{depth - 1}];\n"
        f'  initial $readmemh("{memory.name}.mem", words);\n'
        "  always @(posedge clk) q <= words[address];\nendmodule\n"
    )


def mem_text(memory: Rom) -> str:
    """The words in hexadecimal, one a line."""
    digits = -(-memory.width // 4)
    return "".join(f"{word:0{digits}x}\n" for word in memory.words)


def with_roms(text: str, memories: Sequence[Rom]) -> str:
    """Verilog with the modules of the memories that it instantiates behind it."""
    return "\n".join([text, *map(rom_text, memories)])


def mem_files(memories: Sequence[Rom]) -> dict[str, str]:
    """The contents of the memories that are read from files, by file name."""
    return {f"{memory.name}.mem": mem_text(memory) for memory in memories if len(memory.words) > 1}
