"""The pieces of PTX text: comments and source locations, literals, lists, variable declarations."""

from __future__ import annotations

import re
import struct

from .isa import TYPE_SIZE, Imm, Kernel, align

_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|gridid|laneid|warpid|nwarpid|smid|nsmid|clock|clock64|clock_hi|globaltimer"
    r"|globaltimer_lo|globaltimer_hi|lanemask_\w+|envreg\d+|dynamic_smem_size|total_smem_size"
    r"|cluster\w*|is_explicit_cluster)(\.[xyz])?$"
)
_NUMBER = re.compile(
    r"[-+]?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+U?"
    r"|\d*\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"
)


def is_special(name: str) -> bool:
    """Whether it names a special register."""
    return bool(_SPECIAL.match(name))


def number(text: str) -> Imm | None:
    """A literal, or None if it is none."""
    if not _NUMBER.match(text):
        return None
    negative, digits = text.startswith("-"), text.lstrip("+-")
    if digits[:2] in ("0f", "0F") and len(digits) == 10:
        return Imm(int(digits[2:], 16) ^ (negative << 31), 4)
    if digits[:2] in ("0d", "0D") and len(digits) == 18:
        return Imm(int(digits[2:], 16) ^ (negative << 63), 8)
    is_hex = digits.lower().startswith("0x")
    if "." in digits or (not is_hex and "e" in digits.lower()):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    digits = digits.rstrip("U")
    octal = len(digits) > 1 and digits[0] == "0"
    value = int(digits, 16 if is_hex else 8 if octal else 10)
    return Imm(-value if negative else value)


def split(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside all brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += char in "[{("
        depth -= char in "]})"
        if char == separator and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        parts.append(current.strip())
    return parts


def clean(text: str) -> tuple[str, dict[int, str]]:
    """Blank comments, .loc and .file lines; returns the text and line -> source location."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    lines, locations, current = [], {}, ""
    for number_, line in enumerate(text.split("\n"), 1):
        stripped = line.lstrip()
        kept = line.split("//")[0]
        if stripped.startswith((".loc ", ".loc\t")):
            match = re.search(r"//\s*(\S+:\d+):\d+", line)
            current = match.group(1) if match else " ".join(stripped.split()[1:3])
            kept = ""
        elif stripped.startswith((".file", ".pragma")):
            kept = ""
        locations[number_] = current
        lines.append(kept)
    return "\n".join(lines), locations


def matched(pattern: str, text: str) -> re.Match[str]:
    """re.search that has to succeed."""
    match = re.search(pattern, text)
    if match is None:
        raise NotImplementedError(f"declaration {text!r}")
    return match


def declare(kernel: Kernel, text: str) -> None:
    """Enter a .shared, .local, .global or .const variable into the kernel."""
    text, _, initial = text.partition("=")
    aligned = re.search(r"\.align\s+(\d+)", text)
    alignment = int(aligned.group(1)) if aligned else 1
    type_ = matched(r"\.([bsuf]\d+)\b", text).group(1)
    name, dimensions = matched(r"^([$\w]+)((?:\[\d*\])*)$", text.split()[-1]).groups()
    count = 1
    for dimension in re.findall(r"\[(\d*)\]", dimensions):
        count *= int(dimension or 0)
    size = count * TYPE_SIZE[type_]
    if ".shared" in text:
        if ".extern" in text:
            kernel.shared[name] = None
        else:
            kernel.shared[name] = align(kernel.static_shared, alignment)
            kernel.static_shared = align(kernel.static_shared, alignment) + size
    elif ".local" in text:
        kernel.local[name] = align(kernel.local_bytes, alignment)
        kernel.local_bytes = kernel.local[name] + size
    else:
        kernel.module_variables[name] = _initialised(size, TYPE_SIZE[type_], initial.strip())


def _initialised(size: int, width: int, initial: str) -> bytearray:
    data = bytearray(size)
    if initial:
        literals = [number(literal.strip()) for literal in initial.strip("{}").split(",")]
        if None in literals:
            raise NotImplementedError(f"initial value {initial!r}")
        mask = (1 << 8 * width) - 1
        raw = b"".join((literal.value & mask).to_bytes(width, "little") for literal in literals if literal)
        data[: len(raw)] = raw
    return data
