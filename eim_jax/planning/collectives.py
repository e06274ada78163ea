"""Bytes that a compiled program moves between devices, read from its text (`compiled.as_text()`).

Bytes are those that one device sends in ring algorithms over a group of g devices, by the size s of the whole array:
all-gather and reduce-scatter s (g-1)/g, all-reduce twice that, all-to-all s (g-1)/g of the device's own part,
collective-permute its operand. A loop's body counts as often as it runs, where its condition says so.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "bf16": 2, "f16": 2}  # others: the bits in their name
_ARRAY = re.compile(r"\b(pred|bf16|[usf]\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


class Collective(NamedTuple):
    """One collective operation: its kind, devices in a group, bytes that a device sends, and how often a step."""

    kind: str
    group: int
    bytes: float
    times: int


class Moved(NamedTuple):
    """All collectives of a program; `counted_once` loops gave no number of turns."""

    collectives: tuple[Collective, ...]
    counted_once: int

    def total(self, kind: str = "") -> float:
        """Bytes a step that one device sends, by all kinds or by one."""
        return float(sum(c.bytes * c.times for c in self.collectives if kind in ("", c.kind)))


def moved(text: str, devices: int) -> Moved:
    """Reads the collectives of a compiled program for so many devices."""
    computations, entry = _split(text)
    times, once = _turns(computations, entry)
    found, seen = [], set()
    for name, lines in computations.items():
        if not times.get(name):
            continue
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match:
                continue
            result, kind, start = match.groups()
            group = _group(line, devices)
            if group < 2 and kind != "collective-permute":
                continue
            # The TPU compiler spreads one asynchronous collective over the fusions that it hides behind: they share a
            # channel. A reduce-scatter is an all-reduce inside a fusion that keeps one part.
            channel = re.search(r"channel_id=(\d+)", line)
            spread = (channel[1] if channel else line, kind, tuple(_arrays(result)[-1:]))
            if times[name][1]:
                if spread in seen:
                    continue
                seen.add(spread)
            scattered = "all-reduce-scatter" in name
            found.append(_sent(kind, result, bool(start), group, scattered, times[name][0]))
    return Moved(tuple(found), once)


def _sent(kind: str, result: str, start: bool, group: int, scattered: bool, times: int) -> Collective:
    # A collective that is started gives (operands, results, and on TPUs counters), either of them one array or several
    # that were combined; all-reduce-start, which works in place, gives its results alone.
    if start and kind != "all-reduce":
        result = _elements(result)[1]
    size, share = float(sum(_arrays(result))), (group - 1) / group
    if kind == "all-reduce" and scattered:
        return Collective("reduce-scatter", group, size * share, times)
    if kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce":
        share *= 2
    return Collective(kind, group, size if kind == "collective-permute" else size * share, times)


def _elements(text: str) -> list[str]:
    """The outermost parts of a tuple's type, "(f32[2]{0:T(8)}, (f32[4], f32[5]))"."""
    parts, depth = [""], 0
    for letter in text.strip()[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _arrays(text: str) -> list[int]:
    """Bytes of every array type in the text."""
    sizes = []
    for kind, dims in _ARRAY.findall(text):
        width = _SIZES.get(kind) or max(1, int(kind[1:]) // 8)
        sizes.append(width * math.prod(int(n) for n in dims.split(",") if n))
    return sizes


def _group(line: str, devices: int) -> int:
    """Devices that take part in one instance of a collective."""
    # mesh['a'=4,'b'=2] {'a'}; in between may stand device_ids=([2,4]T(1,0)), the order of the mesh's devices.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):  # [groups, size]<=[...]
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    return devices


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The program's computations by name, and the entry's name."""
    computations, entry, lines = {}, "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _turns(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, tuple[int, bool]], int]:
    """How often each computation runs a step and whether it lies inside a fusion; and loops of unknown length."""
    times, once = {}, 0

    def visit(name: str, number: int, fused: bool):
        nonlocal once
        if name not in computations or times.get(name, (0, False))[0] >= number:
            return
        times[name] = (number, fused)
        for line in computations[name]:
            called = {kind: other for kind, other in _CALLED.findall(line)}
            if " while(" in line:
                length = _length(line, computations.get(called.get("condition", ""), []))
                once += length is None and any(_COLLECTIVE.search(x) for x in computations.get(called["body"], []))
                visit(called["body"], number * (length or 1), fused)
                continue
            if "to_apply" in called and not (" call(" in line or "async" in line):
                called.pop("to_apply")  # the arithmetic of a reduction
            for other in called.values():
                visit(other, number, fused or " fusion(" in line)
            for branches in _BRANCHES.findall(line):
                for other in branches.split(","):
                    visit(other.strip().removeprefix("%"), number, fused)

    visit(entry, 1, False)
    return times, once


def _length(line: str, condition: list[str]) -> int | None:
    """How often a loop runs: XLA's own note, or the constant to which its condition counts up from 0."""
    if found := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', line):
        return int(found[1])
    counts = [re.search(r"constant\((\d+)\)", x) for x in condition if " = s32[]" in x]
    counts = [int(found[1]) for found in counts if found]
    return counts[0] if len(counts) == 1 and any("direction=LT" in x for x in condition) else None
