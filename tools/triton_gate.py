"""What the compiler makes of every Triton kernel, held to a committed table. Needs no GPU.

python tools/triton_gate.py [--write] [NAME ...]

Kernels are launched as a model launches them, on a device that is not there (tests/kernels/triton/absent.py): compiled
for sm_90 and sm_80, and disassembled with the tools that come with Triton. Nothing is spilled to local memory, nothing
takes more shared memory than there is, and nothing may grow beyond the table: registers, shared memory and
instructions (per number of the cache or the state in the longest innermost loop, or in all where a kernel has no
loop). --write takes what is found into the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).parent.parent

if TYPE_CHECKING:
    from kernels.triton.absent import Compiled

TABLE = ROOT / "tests" / "kernels" / "triton" / "gate.toml"
CAPABILITIES = (90, 80)


class Found(NamedTuple):
    """What was made of a kernel."""

    registers: int
    """Of one thread."""
    shared: int
    """Bytes of a program."""
    instructions: float
    """Of all threads of a program in the longest innermost loop, per number; else of one thread in all."""
    local: int
    """Bytes of stack, and loads and stores there; of the other kernels that are launched with it too."""


def examine(name: str, capability: int) -> Found | str:
    """Launch once and look at what was compiled; return why it was not."""
    from kernels.triton.absent import absent
    from kernels.triton.launches import launches
    from triton import CompilationError
    from triton.runtime.errors import OutOfResources

    launch = launches()[name]
    try:
        with absent(capability) as device:
            launch.run()
            numbers = launch.numbers()
    except (CompilationError, OutOfResources) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return str(cause).strip().splitlines()[-1]
    local = 0
    found = None
    for kernel in device.compiled:
        registers, instructions, spilled = _looked_at(kernel, numbers)
        local += spilled
        if kernel.name == launch.kernel and found is None:
            found = Found(registers, kernel.shared, instructions, 0)
    assert found is not None, f"no {launch.kernel} is launched for {name}"
    return found._replace(local=local)


def _looked_at(kernel: Compiled, numbers: int) -> tuple[int, float, int]:
    """Return registers, instructions and what is spilled."""
    usage, code = _disassembled(kernel.cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    instructions, loops = _loops(code)
    spilled = found["STACK"] + found["LOCAL"] + sum(text.split()[0].startswith(("LDL", "STL")) for text in instructions)
    longest = max((end - start for start, end in loops), default=0)
    count = longest * 32 * kernel.warps / numbers if numbers else len(instructions)
    return found["REG"], round(count, 2), spilled


def _disassembled(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", "-res-usage", file.name], [tools / "nvdisasm", "-c", file.name])
        usage, code = (subprocess.run(item, capture_output=True, text=True, check=True).stdout for item in commands)
    return usage, code


def _loops(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the instructions, without their predicates, and (first, end) of every innermost loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif text := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s*(?:@!?U?P\w+ )?\s*([A-Z].*?);", line):
            instructions.append(text[1])
    jumps = [(re.search(r"BRA.*(\.L_\w+)", text), place) for place, text in enumerate(instructions)]
    loops = [(labels[jump[1]], place + 1) for jump, place in jumps if jump and labels[jump[1]] < place]
    innermost = [
        (start, end)
        for start, end in loops
        if not any((start, end) != (s, e) and start <= s and e <= end for s, e in loops)
    ]
    return instructions, innermost


def faults(name: str, capability: int, found: Found) -> list[str]:
    """Return what no table may allow."""
    if not found.local:
        return []
    what = f"{found.local} bytes, loads and stores of local memory"
    return [f"{name} for sm_{capability}: {what}; take a smaller tile or more warps"]


def complaints(name: str, capability: int, found: Found, table: dict[str, Any]) -> list[str]:
    """Return what is worse than the table says."""
    where = f"{name} for sm_{capability}"
    row = table.get(name, {}).get(f"sm_{capability}")
    if row is None:
        return [f"{where} is not in {TABLE.name}: look at what it takes, then run make triton-gate WRITE=--write"]
    return [
        f"{where}: {value} {what} instead of {row.get(what, 0)}"
        for what, value in found._asdict().items()
        if value > row.get(what, 0)
    ]


def written(rows: dict[str, dict[str, dict[str, Any]]], version: str) -> str:
    """Return the table as TOML."""
    lines = [f"# Made by tools/triton_gate.py --write with triton {version}.", f'triton = "{version}"']
    for name, levels in rows.items():
        lines += ["", f'["{name}"]']
        for level, found in levels.items():
            values = ", ".join(f"{what} = {value}" for what, value in found.items() if what != "local" or value)
            lines.append(f"{level} = {{ {values} }}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Examine the launches that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    import triton
    from kernels.triton.launches import launches

    every = launches()
    if unknown := [name for name in given.names if name not in every]:
        parser.error(f"nothing is launched under the name {unknown[0]!r}; {TABLE.name} has all of them")
    names = given.names or list(every)
    pairs = [(name, capability) for name in names for capability in CAPABILITIES]
    # A fork of a process whose torch has threads may wait for them forever.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        made = dict(zip(pairs, pool.map(examine, *zip(*pairs, strict=True)), strict=True))
    wrong = [
        f"{name} for sm_{level} does not compile: {why}" for (name, level), why in made.items() if isinstance(why, str)
    ]
    results = {pair: found for pair, found in made.items() if isinstance(found, Found)}
    wrong += [text for (name, level), found in results.items() for text in faults(name, level, found)]
    for (name, capability), found in results.items():
        print(
            f"{name:44} sm_{capability} {found.registers:4} registers {found.shared:7} shared "
            f"{found.instructions:8} instructions {found.local:4} local"
        )
    table = tomllib.loads(TABLE.read_text())
    if given.write:
        # What was not named stays as it is, in the order of the launches.
        rows = {name: table.get(name, {}) for name in every if name in table or name in names}
        for (name, level), found in results.items():
            rows[name][f"sm_{level}"] = found._asdict()
        TABLE.write_text(written(rows, triton.__version__))
        print(*wrong, sep="\n")
        return int(bool(wrong))
    if table["triton"] != triton.__version__:
        print(f"the table was made with triton {table['triton']}, this is {triton.__version__}: nothing to compare")
        return 3
    wrong += [
        text for (name, capability), found in results.items() for text in complaints(name, capability, found, table)
    ]
    if not given.names:
        wrong += [f"{name} is in {TABLE.name}, but is launched no more" for name in {*table} - {*names, "triton"}]
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    # Before Triton is imported: compiled, not interpreted.
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.exit(main())
