"""Instructions as a disassembler writes them, for the tests of what is counted."""

from __future__ import annotations

from contrastile.bench.static.disassembly import Instruction

PRODUCT = "HMMA.16816.F32 R0, R1, R2, R0"


def in_order(*lines: str) -> list[Instruction]:
    return [Instruction(*line.split(" ", 1)) if " " in line else Instruction(line, "") for line in lines]
