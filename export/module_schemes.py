"""Which module is quantised how: one scheme for all, and `--set` for single ones.

modules.down_proj.bits=8        every module with that part in its name
modules.layers.0.bits=16        16: left as it is
modules.layers.3.mlp.group_size=32
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .containers import HEAD, Container, check_one_scheme, check_scheme
from .errors import ExportError
from .formats.scheme import FUSED, Scheme, check_shapes

ROOT = "modules"
FIELDS = ("bits", "group_size", "symmetric")
BITS = (2, 4, 8, 16)
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class Change:
    """`modules.<part>.<field>=<value>`.

    Attributes:
        text: as it was given.
        part: of module names, whole words between dots.
        field: one of FIELDS.
        value: of the field; bits 16 leaves the modules alone.
    """

    text: str
    part: str
    field: str
    value: int | bool


def parse_change(text: str) -> Change:
    """Read one `--set`.

    Raises:
        ExportError: says what is wrong with it, and the nearest that would be right.
    """
    key, equals, value = text.partition("=")
    words = key.strip().split(".")
    if not equals or len(words) < 3 or words[0] != ROOT:
        close = difflib.get_close_matches(words[0], [ROOT], n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([ROOT, *words[1:]])}?" if close and words[0] != ROOT else ""
        raise ExportError(f"--set {text}: must be like {ROOT}.down_proj.bits=8{hint}")
    field = {"sym": "symmetric"}.get(words[-1], words[-1])
    if field not in FIELDS:
        close = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.0)
        raise ExportError(
            f"--set {text}: a module has no '{words[-1]}', it has {', '.join(FIELDS)}; "
            f"did you mean {'.'.join([*words[:-1], close[0]])}?"
        )
    return Change(text, ".".join(words[1:-1]), field, _value(text, field, value.strip()))


def _value(text: str, field: str, value: str) -> int | bool:
    if field == "symmetric":
        if value.lower() not in TRUTH:
            raise ExportError(f"--set {text}: '{value}' must be true or false")
        return TRUTH[value.lower()]
    allowed = BITS if field == "bits" else (32, 64, 128, -1)
    number = int(value) if value.lstrip("-").isdigit() else None
    if number is None or number not in allowed:
        remark = " (16: left as it is)" if field == "bits" else " (-1: the whole row)"
        raise ExportError(f"--set {text}: '{value}' must be one of {', '.join(map(str, allowed))}{remark}")
    return number


def choose_schemes(
    modules: Sequence[str], scheme: Scheme, changes: Iterable[Change]
) -> dict[str, Scheme | None]:
    """A scheme for every module; later changes win.

    Raises:
        ExportError: a change that no module answers to, with the nearest name; nothing is left to quantise.
    """
    chosen: dict[str, Scheme | None] = dict.fromkeys(modules, scheme)
    for change in changes:
        matching = [module for module in modules if _has_part(module, change.part)]
        if not matching:
            raise _unknown(change, modules)
        for module in matching:
            chosen[module] = _changed(chosen[module] or scheme, change)
    if not any(chosen.values()):
        raise ExportError("--set leaves every module in 16 bits; qtrain export merge writes such a model")
    return chosen


def _changed(scheme: Scheme, change: Change) -> Scheme | None:
    if change.field == "bits":
        return None if change.value == 16 else replace(scheme, bits=int(change.value))
    if change.field == "group_size":
        return replace(scheme, group_size=int(change.value))
    return replace(scheme, symmetric=bool(change.value))


def _has_part(module: str, part: str) -> bool:
    return f".{part}." in f".{module}."


def _unknown(change: Change, modules: Sequence[str]) -> ExportError:
    parts: dict[str, None] = {}
    for module in modules:
        words = module.split(".")
        parts[words[-1]] = parts[".".join(words[-2:])] = None
        for end in range(1, len(words)):
            parts[".".join(words[:end])] = parts[".".join(words[1:end]) or words[0]] = None
            parts[words[end]] = None
    close = difflib.get_close_matches(
        change.part, [part for part in parts if not part.isdigit()], n=1, cutoff=0.3
    )
    hint = f"; did you mean {ROOT}.{close[0]}.{change.field}?" if close else ""
    names = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    return ExportError(f"--set {change.text}: no module is called '{change.part}' (they are {names}){hint}")


def check_schemes(
    container: Container,
    scheme: Scheme,
    schemes: Mapping[str, Scheme | None],
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    """Refuse what the format can't hold or the weights' shapes do not permit.

    Args:
        scheme: of modules without a change.
        shapes: (out_features, in_features) of every module.

    Raises:
        ExportError: names the module or the option.
    """
    for its in dict.fromkeys(its for its in schemes.values() if its is not None):
        check_scheme(container, its)
        check_shapes({module: shapes[module] for module, other in schemes.items() if other == its}, its)
    if container == "awq":
        check_one_scheme(schemes, scheme)


def reader_warnings(container: Container, schemes: Mapping[str, Scheme | None], *, tied: bool) -> list[str]:
    """What known readers do not load of a checkpoint that the format itself can hold."""
    known = [its for its in dict.fromkeys(schemes.values()) if its is not None]
    found = []
    if any(its.desc_act for its in known):
        found.append("vLLM refuses full activation order (desc_act); --act-order static is what it serves")
    if container == "gptq" and any(not its.symmetric for its in known):
        found.append(
            "vLLM refuses asymmetric GPTQ, and GPTQModel what it did not write; for zero points take "
            "export awq, or --format compressed-tensors for vLLM"
        )
    if container == "gptq" and any(its.group_size == -1 for its in known):
        found.append("GPTQModel's kernel for CPUs, which transformers uses too, has groups of 32 to 256 only")
    if container == "compressed-tensors" and any(not its.symmetric for its in known):
        found.append("transformers does not load asymmetric compressed-tensors; vLLM does")
    if any(its.bits not in (4, 8) for its in known):
        found.append("vLLM serves 4 and 8 bits only")
    if container == "gptq" and len({*schemes.values()}) > 1:
        found.append(
            "modules of several kinds are written as `dynamic`, which vLLM and GPTQModel read; "
            "transformers alone takes one scheme for all"
        )
    if not tied and schemes.get(HEAD) is not None and container == "compressed-tensors":
        found.append("vLLM does not load a quantised lm_head from compressed-tensors; --format gptq it does")
    split = _split_fused(schemes)
    if split:
        found.append(f"vLLM runs {split} as one layer, and refuses parts that differ")
    return found


def _split_fused(schemes: Mapping[str, Scheme | None]) -> str | None:
    for module in schemes:
        parent, _, last = module.rpartition(".")
        for parts in FUSED.values():
            if last == parts[0]:
                its = {schemes.get(f"{parent}.{part}") for part in parts}
                if len(its) > 1:
                    return f"{parent}'s {', '.join(parts)}"
    return None
