"""Long lines of generated Python, broken as `ruff format` breaks them.

How long a line gets depends on what fills a template's holes, so a template can't know where to break it.
"""

from __future__ import annotations

import io
import itertools
import re
import tokenize

WIDTH = 110
# What has commas outside of its brackets, and isn't arguments out of a bracket that was opened above.
_STATEMENT = re.compile(r"\s*(return|yield|assert|del|for|with|global|nonlocal|[^=(\[{]*[^=<>!(\[{]=[^=])")
_OPEN, _CLOSE = "([{", ")]}"


def wrapped(line: str) -> list[str]:
    """`line` in lines of at most WIDTH columns, as far as its brackets allow it.

    Cases: 1. It is short enough, or a comment, or its brackets aren't whole: left alone. 2. It is some arguments out
    of a bracket that was opened above: filled up. 3. What stands in the last brackets that begin early enough fits
    on a line of its own: three lines. 4. It doesn't: an argument a line, each wrapped in turn.
    """
    if len(line) <= WIDTH:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    found = _brackets(line)
    if found is None:
        return [line]
    brackets, outer = found
    if line.endswith(",") or (outer and not _STATEMENT.match(line)):
        parts = [part.strip() for part in _cut(line, [-1, *outer, len(line)])]
        return _filled([part for part in parts if part], indent, "," if line.endswith(",") else "")
    brackets = [place for place in brackets if place[0] < WIDTH and place[1] > place[0] + 1]
    if not brackets:
        return [line]
    begin, end, commas = brackets[-1]
    head, body, tail = line[: begin + 1], line[begin + 1 : end].strip(), line[end:]
    whole = f"{indent}    {body}"
    if len(whole) <= WIDTH and not body.endswith(","):
        return [head, whole, indent + tail]
    if not commas:
        return [head, *wrapped(whole), indent + tail]
    parts = [part.strip() for part in _cut(line, [begin, *commas, end])]
    inner = [piece for part in parts if part for piece in _argument(f"{indent}    {part}")]
    return [head, *inner, indent + tail]


def _argument(line: str) -> list[str]:
    pieces = wrapped(line) if len(line) >= WIDTH else [line]
    return [*pieces[:-1], f"{pieces[-1]},"]


def _cut(line: str, cuts: list[int]) -> list[str]:
    return [line[a + 1 : b] for a, b in itertools.pairwise(cuts)]


def _filled(parts: list[str], indent: str, end: str) -> list[str]:
    lines = [indent + parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 <= WIDTH:
            lines[-1] += f", {part}"
        else:
            lines[-1] += ","
            lines.append(indent + part)
    return [*lines[:-1], lines[-1] + end]


def _brackets(line: str) -> tuple[list[tuple[int, int, list[int]]], list[int]] | None:
    """The brackets that stand in no others (begin, end, commas inside), and the commas outside of all.

    None where they aren't whole, and for a line with a comment, which could end up elsewhere.
    """
    found: list[tuple[int, int, list[int]]] = []
    opened: list[int] = []
    commas: list[int] = []
    outside: list[int] = []
    offset = len(line) - len(line.lstrip())
    try:
        # A block's first line, or arguments alone, are no whole Python; their tokens are.
        for token in tokenize.generate_tokens(io.StringIO(line.lstrip()).readline):
            at = token.start[1] + offset
            if token.type == tokenize.COMMENT:
                return None
            if token.type != tokenize.OP:
                continue
            if token.string in _OPEN:
                opened.append(at)
                if len(opened) == 1:
                    commas = []
            elif token.string in _CLOSE:
                begin = opened.pop()
                if not opened:
                    found.append((begin, at, commas))
            elif token.string == ",":
                (commas if len(opened) == 1 else outside if not opened else []).append(at)
    except (tokenize.TokenError, IndentationError, IndexError):
        return None
    return found, outside
