"""Kernels for GPUs, by Triton's compiler and NVIDIA's assembler, and what their code holds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.compiled.cases import Program
from experiments.harness import files

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
KERNEL = re.compile(
    r'ir = "((?:[^"\\]|\\.)*)", name = "([^"]*)", num_stages = (\d+) : i32, num_warps = (\d+)'
)
INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b.*;", re.MULTILINE
)
KINDS = {
    "matrix": r"HMMA|HGMMA|UTCHMMA|UTCMMA|QGMMA",
    "compare": r"U?ISETP|FSETP|FSEL|SEL",
    "logic": r"U?LOP3|SHF|SHL|SHR|PRMT|BFE",
    "convert": r"I2F|F2F|I2FP|F2FP|HADD2\.F32",
    "exponential": r"MUFU",
    "load": r"LDG|LDGSTS|LDS|LDSM|UTMALDG",
    "narrow load": r"LDG\.E\.(U8|S8|U16|S16)\b",
}


class Kernel(NamedTuple):
    """Triton's code of one kernel of a program."""

    name: str
    ir: bytes
    stages: int
    warps: int


def kernels(program: Program) -> list[Kernel]:
    """Of a program, in its order."""
    traced = jax.jit(program.run).trace(*program.shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return [
        Kernel(match[2], _unescaped(match[1]), int(match[3]), int(match[4]))
        for match in KERNEL.finditer(text)
    ]


def _unescaped(text: str) -> bytes:
    """MLIR's strings: \\XX for a byte, \\\\ for a backslash."""
    found, i, content = bytearray(), 0, text.encode("latin-1", "surrogateescape")
    while i < len(content):
        if content[i] != ord("\\"):
            found.append(content[i])
            i += 1
        elif content[i + 1] in b'\\"nt':
            found += {ord("n"): b"\n", ord("t"): b"\t"}.get(content[i + 1], content[i + 1 : i + 2])
            i += 2
        else:
            found.append(int(content[i + 1 : i + 3], 16))
            i += 3
    return bytes(found)


def report(kernel: Kernel, chip: str) -> dict[str, Any]:
    """Registers, spills, shared memory, and instructions by kind, of all and of the longest loop."""
    import triton
    from jax._src.lib import triton as dialect
    from jax._src.lib.mlir import ir
    from triton.backends.compiler import GPUTarget

    with ir.Context() as context, tempfile.TemporaryDirectory() as folder:
        dialect.dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        path = Path(folder) / "kernel.ttir"
        files.write_text(path, str(ir.Module.parse(kernel.ir, context)))
        options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
        made = triton.compile(str(path), target=GPUTarget("cuda", CHIPS[chip], 32), options=options)
        binary = Path(folder) / "kernel.cubin"
        files.write_bytes(binary, made.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(binary))
        code = _tool("nvdisasm", "-c", str(binary))
    return {
        "warps": kernel.warps,
        "registers": int(_number(r"REG:(\d+)", usage)),
        "spilled bytes": int(_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)),
        "shared KiB": made.metadata.shared / 1024,
        **counts(code),
        **{f"{name} in the loop": n for name, n in counts(loop_of(code)).items()},
    }


def counts(code: str) -> dict[str, int]:
    """Instructions of disassembled code, and of each of `KINDS`."""
    names = Counter(INSTRUCTION.findall(code))
    found = {"instructions": sum(n for name, n in names.items() if name != "NOP")}
    for kind, pattern in KINDS.items():
        found[kind] = sum(n for name, n in names.items() if re.match(pattern, name))
    return found


def loop_of(code: str) -> str:
    """The longest stretch that a branch backward repeats; nothing if there is none."""
    place: dict[str, int] = {}
    best = ""
    position = 0
    for line in code.splitlines(keepends=True):
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            place[label[1]] = position
        if jump := re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line):
            start = place.get(jump[1])
            # A branch to itself behind the end of a kernel is no loop.
            if start is not None and position - start > max(len(best), len(line)):
                best = code[start : position + len(line)]
        position += len(line)
    return best


def _tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run(
        [str(folder / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    return float(found[1]) if found else 0.0
