"""A pass of your own: it rewrites `torch.relu(x)` into `x.clamp(min=0)` in every graph that may run.

A pass is a frozen dataclass with a name and its options as fields. Registered, it can be named on the command line:

    morphc compile examples/custom_pass.py --passes 'relu-to-clamp{limit=1}'

In an installed package the entry point `morphc.passes` registers it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from morphc.passes.manager import register_pass
from morphc.passes.program import Program


@register_pass
@dataclass(frozen=True)
class ReluToClamp:
    """Replace at most `limit` calls of torch.relu in each graph."""

    name: ClassVar[str] = "relu-to-clamp"
    limit: int = 100

    def apply(self, program: Program) -> None:
        for _, graph in program.graphs():
            found = [node for node in graph.nodes if node.target is torch.relu]
            for node in found[: self.limit]:
                with graph.inserting_before(node):
                    clamp = graph.call_method("clamp", (node.args[0],), {"min": 0})
                clamp.meta.update(node.meta)
                node.replace_all_uses_with(clamp)
                graph.erase_node(node)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


torch.manual_seed(0)
model = Net()
example_inputs = (torch.randn(8, 16),)


def main() -> None:
    from morphc.compiler import compile_program

    compiled = compile_program(model, example_inputs, passes="relu-to-clamp")
    print(compiled.report.graphs[""])
    same = torch.equal(compiled.model(*example_inputs), model(*example_inputs))
    print(f"the rewritten graph runs, and its outputs equal the host's: {same}")


if __name__ == "__main__":
    main()
