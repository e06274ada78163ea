"""Changes of files that know their structure: JSON values, lines of text, safetensors' headers, and plain bytes."""

import copy
import json
import math
import pathlib
import pickle

from hypothesis import strategies as st

Files = dict[str, bytes | None]  # a file's content by its name; None: a folder of that name

TEXTS = (
    "", " ", "\t", "a", "0", "-1", "1e999", "nan", "true", "null", "~", "..", "../a.jpg", "/", "/etc/hostname", "C:\\a",
    "a b", "a,b", "\ud83d", "a\0b", "\x1b[2J", "\u2028", "\u202eabc", "e\u0301", "é", "😀", "\ufeff", "\r\n", "a" * 300,
    "b" * 70_000, "<image>", "<video>", "<script>alert(1)</script>", "{0}{x}%s%d", "[red]a[/red]", "[/]", "\\", "'\"",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 10**400,
    0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
FOREIGN = (
    b"",
    b"\0" * 64,
    b"\xff\xfe",
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    b"\x1f\x8b\x08\0\0\0\0\0",
    b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n",
    b"null",
    b"[]",
    b"{}",
    b"[7]",
    b'"text"',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    pickle.dumps([1, 2]),
)


class Pairs(list):
    """A JSON object as its (key, value) pairs, so that a key can stand twice."""


class Raw(str):
    """JSON text that is written as it is."""


NESTED = (Raw("[" * 5_000 + "]" * 5_000), Raw('{"a":' * 5_000 + "1" + "}" * 5_000), Raw("1" * 5_000), Raw("-"))


def parsed(content: bytes):
    """What a JSON file holds, objects as Pairs."""
    return json.loads(content.decode("utf-8"), object_pairs_hook=Pairs)


def written(value, plain: bool = True) -> str:
    """JSON text; `plain` escapes what is not ASCII."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=plain)}: {written(v, plain)}" for key, v in value) + "}"
    if isinstance(value, dict):
        return written(Pairs(value.items()), plain)
    if isinstance(value, list):
        return "[" + ", ".join(written(v, plain) for v in value) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return "1" + "0" * 400  # Python refuses to write more digits than a limit
    return json.dumps(value, ensure_ascii=plain)


@st.composite
def atoms(draw):
    """A value of another type or size than any field expects."""
    kind = draw(st.integers(0, 5))
    if kind <= 1:
        return draw(st.sampled_from(NUMBERS))
    if kind <= 3:
        return draw(st.sampled_from(TEXTS))
    if kind == 4:
        return draw(st.sampled_from((None, True, False)))
    values = ([], Pairs(), [[]], [None], Pairs([("", None)]), Pairs([("a", 1)]), ["a"], [1, 2], *NESTED)
    return copy.deepcopy(draw(st.sampled_from(values)))


def _kept(container, place):
    return container[place][1] if isinstance(container, Pairs) else container[place]


def _put(container, place, value) -> None:
    container[place] = (container[place][0], value) if isinstance(container, Pairs) else value


def _somewhere(draw, root):
    """A container and a place in it, by a walk from the root: small parts count as much as long ones."""
    container = root
    while True:
        place = draw(st.integers(0, len(container) - 1))
        child = _kept(container, place)
        if not (isinstance(child, list) and child) or draw(st.integers(0, 4)) == 0:
            return container, place
        container = child


@st.composite
def changed_json(draw, value):
    """A JSON value after one change at one place."""
    root = [copy.deepcopy(value)]
    container, place = _somewhere(draw, root) if draw(st.integers(0, 30)) else (root, 0)
    old = _kept(container, place)
    way = draw(st.integers(0, 11))
    if way == 0 and container is not root:
        del container[place]
    elif way == 1 and container is not root:
        container.insert(draw(st.integers(0, len(container))), copy.deepcopy(container[place]))
    elif way == 2 and isinstance(container, Pairs):
        key = container[place][0]
        container[place] = (draw(st.sampled_from((*TEXTS[:-1], key.upper(), key + "s", key[:-1]))), old)
    elif way == 3:
        _put(
            container,
            place,
            draw(st.sampled_from(([old], Pairs([("a", old)]), str(old) if old != old else [old, old]))),
        )
    elif way == 4:
        other, there = _somewhere(draw, root)
        _put(container, place, copy.deepcopy(_kept(other, there)))
    elif way == 5 and isinstance(old, int | float) and not isinstance(old, bool):
        point = float(old) if abs(old) < 2**1000 else 0.5  # tables write 5 as 5.0; no float is larger
        _put(container, place, draw(st.sampled_from((old + 1, old - 1, -old, point, str(old), old * 1000))))
    elif way == 6 and isinstance(old, str):
        text = draw(
            st.sampled_from((old.upper(), old[:-1], f" {old} ", old + old, old[::-1], f"\ufeff{old}", f"{old}\n"))
        )
        _put(container, place, text)
    elif way == 7 and isinstance(container, Pairs):  # the key a second time, with another value
        container.append((container[place][0], draw(atoms())))
    else:
        _put(container, place, draw(atoms()))
    return root[0]


@st.composite
def changed_bytes(draw, content: bytes, others=()):
    """Bytes cut, flipped, moved, repeated, or another file's."""
    way, size = draw(st.integers(0, 9)), len(content)
    near = draw(st.booleans())  # headers are where most meaning is
    place = draw(st.integers(0, max(min(size, 256) if near else size, 1) - 1))
    count = draw(st.sampled_from((1, 2, 3, 8, 64, 1000)))
    if way == 0:
        return content[:place]
    if way in (1, 2, 3) and size:
        bit = 1 << draw(st.integers(0, 7))
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    if way == 4:
        return (
            content[:place]
            + draw(st.sampled_from((b"\0", b"\xff", b"\x80", b"\n", b"\xed\xa0\xbd"))) * count
            + content[place:]
        )
    if way == 5:
        return content[:place] + content[place + count :]
    if way == 6:
        return content[:place] + b"\0" * min(count, size - place) + content[place + count :]
    if way == 7:
        return content + content[place : place + count]
    if way == 8 and others:
        return draw(st.sampled_from(others))
    return draw(st.sampled_from(FOREIGN))


@st.composite
def changed_lines(draw, content: bytes, once=None):
    """Lines of text dropped, repeated, exchanged, joined, or one of them changed by `once`."""
    lines = content.decode("utf-8").split("\n")
    place = draw(st.integers(0, max(len(lines) - 2, 0)))
    way = draw(st.integers(0, 7))
    if way == 0:
        del lines[place]
    elif way == 1:
        lines.insert(place, lines[place])
    elif way == 2:
        other = draw(st.integers(0, len(lines) - 1))
        lines[place], lines[other] = lines[other], lines[place]
    elif way == 3:
        lines.insert(place, draw(st.sampled_from((*TEXTS, "\t", "\t\t\t"))))
    elif way == 4 and once is None:
        lines[place] = lines[place].replace("\t", draw(st.sampled_from((" ", "", "\t\t", ","))))
    elif once is None:
        cells = lines[place].split("\t")
        cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(TEXTS))
        lines[place] = "\t".join(cells)
    else:
        lines[place] = draw(once(lines[place]))
    end = draw(st.sampled_from(("\n", "\n", "\n", "\r\n", "\r")))
    return end.join(lines).encode("utf-8", "surrogatepass")


@st.composite
def changed_record(draw, line: str):
    """A line of JSON Lines after one change."""
    try:
        return written(draw(changed_json(parsed(line.encode()))))
    except ValueError:
        return draw(st.sampled_from(TEXTS))


@st.composite
def encoded(draw, text: str):
    """A text as files hold it: mostly UTF-8, else with a byte-order mark or in another encoding."""
    codec = draw(st.sampled_from(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1")))
    return text.encode(codec, "replace" if codec == "latin-1" else "surrogatepass")


@st.composite
def changed_header(draw, content: bytes):
    """A safetensors file whose header says something else; the length before it is right again."""
    length = int.from_bytes(content[:8], "little")
    header = written(draw(changed_json(parsed(content[8 : 8 + length]))))
    body = header.encode("utf-8", "surrogatepass")
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body + content[8 + length :]


@st.composite
def changed_file(draw, name: str, content: bytes, others=()):
    """A file's content after a change that its form, by its name, suggests; now and then one of plain bytes."""
    kind = pathlib.PurePath(name).suffix
    if content and draw(st.integers(0, 3)):
        try:
            if kind == ".json":
                return draw(encoded(written(draw(changed_json(parsed(content))), draw(st.booleans()))))
            if kind == ".jsonl":
                return draw(changed_lines(content, changed_record))
            if kind == ".txt":
                return draw(changed_lines(content))
            if kind == ".safetensors":
                return draw(changed_header(content))
        except (ValueError, RecursionError):
            pass  # an earlier change has left no such form
    return draw(changed_bytes(content, others))


@st.composite
def changed(draw, files: Files, names: tuple[str, ...] = (), most: int = 3):
    """Files after up to `most` changes of those `names` (all by default)."""
    found = dict(files)
    for _ in range(draw(st.sampled_from([1] * 4 + list(range(1, most + 1))))):
        name = draw(st.sampled_from(names or tuple(files)))
        way = draw(st.integers(0, 40))
        if found.get(name) is None:
            continue  # gone, or a folder
        if way == 0:
            del found[name]
        elif way == 1:
            found[name] = None
        elif way == 2:
            other = draw(st.sampled_from(names or tuple(files)))
            if found.get(other) is not None:
                found[name], found[other] = found[other], found[name]
        elif way == 3:
            place = pathlib.PurePath(name)
            stem = draw(st.sampled_from(("a", ".hidden", "ä", "e\u0301", "a b", place.stem.upper(), place.stem + "~")))
            found[str(place.with_name(stem + place.suffix))] = found.pop(name)
        else:
            others = tuple(content for content in files.values() if content)
            found[name] = draw(changed_file(name, found[name], others))
    return found
