"""What a compiled kernel reads of uniform registers before any instruction writes them.

The ptxas of CUDA 12.8, which Triton 3.6 brings, drops the first half of a computed matrix descriptor where the same
shared memory holds operands of two layouts, one after the other. The product then reads what some earlier kernel left
in the register: wrong numbers that differ between runs, or an illegal access. The code that it makes shows it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

from triton import knobs

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")


def unwritten(binary: bytes) -> list[str]:
    """The instructions of a cubin whose uniform registers nothing before them in the program wrote."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, file.name]
        program = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return unwritten_in(program)


def unwritten_in(program: str) -> list[str]:
    """The same of what nvdisasm prints."""
    written: set[int] = set()
    found = []
    for line in program.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        name, (first, *others) = instruction[1], instruction[2].split(", ")
        target = re.fullmatch(r"UR(\d+)", first)
        sources = ", ".join(others if target else [first, *others])
        read = {int(number) for number in re.findall(r"\bUR(\d+)\b", sources)}
        if (product := re.match(r"(R\d+, )?gdesc\[UR(\d+)\]", ", ".join(others))) is not None:
            read = {int(product[2]) + i for i in ((2, 3) if product[1] else range(4))}  # the left one is in registers
        if not read <= written:
            found.append(" ".join(instruction[0].split()))
            written |= read  # said once
        if target:
            count = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= {int(target[1]) + i for i in range(count)}
    return found
