"""The transformed regions as Python that reads well: one assignment a node, the user's line beside it."""

from __future__ import annotations

import keyword
import operator
import re
from typing import Any

from torch import fx

from morphc.passes.program import CapturedRegion, Program
from morphc.passes.sources import source_text

_WIDTH = 60
_OPERATORS = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.matmul: "@",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip


def readable_graphs(program: Program) -> dict[str, str]:
    """Region path -> source text, for every region that has a graph."""
    return {path: _region(region) for path, region in program.regions.items() if region.graphs}


def _region(region: CapturedRegion) -> str:
    head = [
        f'"""{region.path or "<root>"}: {region.module_class}, captured as {region.level}.',
        "",
        *([f"Written at {region.source}."] if region.source else []),
    ]
    if region.level == "matched":
        head.append(f"Why it is not rewritten: {region.reason}.")
        head.append("Recorded in one run: shapes and branches are burnt in, so this is for reading only.")
    elif region.runs:
        head.append("This graph runs in place of the module's own forward.")
    else:
        head.append("The module's own forward runs; its sites hang at the layers' boundaries.")
    head += ['"""', ""]
    graphs = dict(region.graphs)
    if len(graphs) == 2 and _body(graphs["train"]) == _body(graphs["eval"]):
        graphs = {"forward": graphs["train"]}
    body: list[str] = []
    for mode, graph in graphs.items():
        name = "forward" if mode in ("forward", "recorded") else f"forward_{mode}"
        body += ["", *_function(name, graph)]
    return "\n".join([*head, *body]) + "\n"


def _function(name: str, graph: fx.Graph) -> list[str]:
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    lines = [f"def {name}({', '.join(['self', *inputs])}):"]
    return lines + _body(graph)


def _body(graph: fx.Graph) -> list[str]:
    lines = []
    last = ""
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        text = f"    {_statement(node)}"
        source = str(node.meta.get("source", ""))
        if source and not source.startswith("<") and source != last:
            file = source.rpartition("/")[2]
            text = f"{text:<{_WIDTH}}  # {file}: {source_text(source)}"
            last = source
        lines.append(text)
    return lines


def _statement(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    return f"{node.name} = {_call(node)}"


def _call(node: fx.Node) -> str:
    if node.op == "get_attr":
        return (
            f"self.{node.target}"
            if node.target != "_outside"
            else "...  # a tensor made outside of this forward"
        )
    if node.op == "call_module":
        return f"{_attribute(str(node.target))}({_arguments(node.args, node.kwargs)})"
    if node.op == "call_method":
        return f"{_value(node.args[0])}.{node.target}({_arguments(node.args[1:], node.kwargs)})"
    if node.target is operator.getitem and len(node.args) == 2:
        return f"{_value(node.args[0])}[{_index(node.args[1])}]"
    if node.target in _OPERATORS and len(node.args) == 2:
        return f"{_value(node.args[0])} {_OPERATORS[node.target]} {_value(node.args[1])}"
    return _function_call(node)


def _function_call(node: fx.Node) -> str:
    name = str(node.meta.get("function") or _qualified(node.target))
    method = re.fullmatch(r"torch\.Tensor\.(\w+)", name)
    if method and node.args:
        word = method.group(1)
        if word == "__getitem__":
            return f"{_value(node.args[0])}[{_index(node.args[1])}]"
        if word in _DUNDERS and len(node.args) == 2:
            left, right = (node.args[1], node.args[0]) if word.startswith("__r") else node.args
            return f"{_value(left)} {_DUNDERS[word]} {_value(right)}"
        return f"{_value(node.args[0])}.{word}({_arguments(node.args[1:], node.kwargs)})"
    getter = re.fullmatch(r"torch\.Tensor\.(\w+)\.__get__", name)
    if getter and node.args:
        return f"{_value(node.args[0])}.{getter.group(1)}"
    return f"{name}({_arguments(node.args, node.kwargs)})"


_DUNDERS = {
    "__add__": "+", "__radd__": "+", "__iadd__": "+", "__sub__": "-", "__rsub__": "-", "__mul__": "*",
    "__rmul__": "*", "__imul__": "*", "__truediv__": "/", "__rtruediv__": "/", "__matmul__": "@",
    "__rmatmul__": "@", "__pow__": "**", "__rpow__": "**",
    "add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "pow": "**", "eq": "==", "ne": "!=",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip


def _qualified(target: Any) -> str:
    module = (getattr(target, "__module__", "") or "").replace("torch._C._nn", "torch.nn.functional")
    name = getattr(target, "__name__", str(target))
    return f"{module}.{name}" if module and module not in ("builtins", "_operator") else name


def _attribute(path: str) -> str:
    text = "self"
    for part in path.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        text += f".{part}" if plain else f"[{part}]" if part.isdigit() else f"[{part!r}]"
    return text


def _arguments(args: Any, kwargs: Any) -> str:
    return ", ".join([*map(_value, args), *(f"{key}={_value(value)}" for key, value in kwargs.items())])


def _index(value: Any) -> str:
    text = _value(value)
    return text[1:-1].rstrip(",") if isinstance(value, tuple) and value else text


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, slice):
        parts = [("" if part is None else _value(part)) for part in (value.start, value.stop)]
        return ":".join(parts) + (f":{_value(value.step)}" if value.step is not None else "")
    if value is Ellipsis:
        return "..."
    if isinstance(value, tuple):
        inner = ", ".join(map(_value, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and value.startswith("<") and value.endswith(">"):
        return f"{value[1:-1]}(...)"
    return repr(value)
