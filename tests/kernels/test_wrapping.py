"""Long lines of generated files."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from morphc.kernels.wrapping import WIDTH, wrapped

LONG = [
    "def in_weight(weight_ptr, slot, column, inside, GROUP: tl.constexpr, COLUMNS: tl.constexpr, UNITS: tl.constexpr):",
    "def f(x_ptr, list_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr, rows, stride, inner, n, A: int):",
    "y = tl.load(x_ptr + (row[:, None] * stride + column[None, :]), mask=live[:, None] & inside[None, :]).to(tl.f32)",
    "w_in, b_in = _operands(list_ptr, first, count, slot, column, inside, f(in_weight_ptr, in_bias_ptr), out_ptr)[0]",
    "x = function(a_name_that_is_long_enough, (another_name_that_is_long, and_one_more), [one, two, three, four, 5])",
]


@pytest.mark.parametrize("line", LONG, ids=range(len(LONG)))
def test_a_long_line_is_broken_as_ruff_breaks_it(line: str) -> None:
    body = "\n    pass" if line.endswith(":") else ""
    text = "\n".join(wrapped(line)) + body + "\n"
    assert max(map(len, text.splitlines())) <= WIDTH
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(line + body))
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", str(WIDTH), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert done.stdout == text


@pytest.mark.parametrize(
    "line",
    [
        "x = f(a)",
        "# " + "a comment, " * 20,
        "x = " + "a_name + " * 20 + "b",
        f"x = f({'a, ' * 50}  # opened",
        "x = f(a)  # " + "why, " * 30,
        "    " + "a_name and " * 14 + "b",
        f"x = '{'(' * 120}'",
    ],
)
def test_what_can_not_be_broken_is_left_alone(line: str) -> None:
    assert wrapped(line) == [line]


def test_the_indent_is_kept() -> None:
    arguments = "aaaaaaaaaaaaaa, " * 5 + "bbbbbbbbbbbbbbbb"
    assert wrapped(f"        x = f({arguments})") == [
        "        x = f(",
        f"            {arguments}",
        "        )",
    ]


def test_arguments_from_an_open_bracket_are_filled_up() -> None:
    line = "    " + "list_ptr, f(a, b), count, " * 8
    found = wrapped(line.rstrip())
    assert " ".join(found).split() == line.split()
    assert len(found) == 2
    assert all(piece.startswith("    ") and len(piece) <= WIDTH for piece in found)
    assert wrapped(line.rstrip()[:-1])[:1] == found[:1]
    assert wrapped(line.rstrip()[:-1])[-1] == found[-1][:-1]


def test_several_values_are_not_arguments() -> None:
    for start in ("return ", "a, b = ", "for a, b in "):
        line = "    " + start + ", ".join(f"function_{n}(a_long_argument, another)" for n in range(3))
        text = "\n".join(wrapped(line))
        assert max(map(len, text.splitlines())) <= WIDTH
        assert text.split(",")[0].strip().startswith(start.split(",")[0].strip())
        assert text.count("\n") == 2


def test_a_tuple_of_one_stays_one() -> None:
    line = "x = (" + "a" * 110 + ",)"
    assert ast.dump(ast.parse("\n".join(wrapped(line)))) == ast.dump(ast.parse(line))
