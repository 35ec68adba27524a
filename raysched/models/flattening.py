"""A recorded forward as one flat list of operators, split by what each of them depends on.

torch.jit.trace records a call per submodule, and with them operators that change nothing:
dropout in eval mode, division by 1. Inlined and without those, the rest gives the same bits for
less. What depends on time and label alone (their embeddings, each block's projection of them) is
separated from what depends on the sample: a rollout knows all its times beforehand and computes
the former for all its forwards at once.

Legend: n rows; C, H, W image dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torch's graphs have Python bindings, but no type stubs.
Graph = Any
Value = Any
_C: Any = torch._C


@dataclass(frozen=True)
class FlatForward:
    """A forward in two parts, run without gradient.

    Attributes:
        parameters: the network's own tensors, so that the parts follow every update.
        whole: (sample, timestep, class_labels, *parameters) -> prediction.
        head: the same arguments -> tensors that depend on timestep and labels alone, (n, …)
            each; None if nothing does.
        body: the same arguments and then the head's tensors -> prediction.
    """

    parameters: Sequence[Tensor]
    whole: Callable[..., Tensor]
    head: Callable[..., tuple[Tensor, ...]] | None
    body: Callable[..., Tensor] | None


def flatten_recording(recording: Any, count: int) -> FlatForward:
    """Inline a recording of (sample, timestep, class_labels) -> prediction, and split it.

    Args:
        recording: from torch.jit.trace.
        count: rows that it was recorded with, no other dimension of the network.

    Raises:
        RuntimeError: the recording has a form that the graph passes do not take.
    """
    graph = recording.graph.copy()
    _C._jit_pass_inline(graph)
    graph, parameters = _C._jit_pass_lower_graph(graph, recording._c)
    _C._jit_pass_cse(graph)
    _C._jit_pass_constant_propagation(graph)
    for node in graph.nodes():
        if _changes_nothing(node):
            node.output().replaceAllUsesWith(node.inputsAt(0))
    _C._jit_pass_lower_all_tuples(graph)
    _C._jit_pass_cse(graph)
    _C._jit_pass_dce(graph)
    border = _border(graph, count)
    head = _function("head", _head(graph, border)) if border else None
    body = _function("body", _body(graph, border)) if border else None
    return FlatForward(parameters, _function("whole", graph), head, body)


def _function(name: str, graph: Graph) -> Any:
    return _C._create_function_from_graph(name, graph)


def _changes_nothing(node: Any) -> bool:
    """Dropout in eval mode, or division by one."""
    if node.kind() == "aten::dropout":
        return node.inputsAt(2).toIValue() is False
    if node.kind() == "aten::div" and node.inputsSize() == 2:
        divisor = node.inputsAt(1).toIValue()
        constant = node.inputsAt(1).node().kind() == "prim::Constant"
        if not constant or (isinstance(divisor, Tensor) and divisor.numel() != 1):
            return False
        return bool(divisor == 1) and _is_rows(node.inputsAt(0))
    return False


def _is_rows(value: Value, count: int | None = None) -> bool:
    """Whether a value is a floating tensor (of so many rows, if a number is given)."""
    kind = value.type()
    if kind.kind() != "TensorType" or not kind.sizes() or kind.scalarType() != "Float":
        return False
    return count is None or kind.sizes()[0] == count


def _outputs(graph: Graph) -> list[Value]:
    """All values that nodes make, in an order that copies of the graph share."""
    return [output for node in graph.nodes() for output in node.outputs()]


def _border(graph: Graph, count: int) -> list[int]:
    """Places in `_outputs` of what depends on time and label, and is used with the sample."""
    sample, *conditions = list(graph.inputs())[:3]
    on_sample, on_condition = {sample.unique()}, {value.unique() for value in conditions}
    for node in graph.nodes():
        if node.kind() == "aten::size":  # the number of rows; the head gets it as well
            continue
        used = {value.unique() for value in node.inputs()}
        made = {value.unique() for value in node.outputs()}
        if used & on_sample:
            on_sample |= made
        elif used & on_condition:
            on_condition |= made
    users = [node for node in graph.nodes() if _names(node.inputs()) & on_sample]
    crossing = set().union(*(_names(node.inputs()) for node in users)) & on_condition
    return [
        place
        for place, value in enumerate(_outputs(graph))
        if value.unique() in crossing and _is_rows(value, count)
    ]


def _names(values: Iterable[Value]) -> set[int]:
    return {value.unique() for value in values}


def _head(graph: Graph, border: list[int]) -> Graph:
    """The graph up to the border."""
    head = graph.copy()
    values = _outputs(head)
    while len(list(head.outputs())):
        head.eraseOutput(0)
    bundle = head.create("prim::TupleConstruct", [values[place] for place in border], 1)
    head.appendNode(bundle)
    bundle.output().setType(_C.TupleType([values[place].type() for place in border]))
    head.registerOutput(bundle.output())
    _C._jit_pass_dce(head)
    return head


def _body(graph: Graph, border: list[int]) -> Graph:
    """The graph from the border on, whose values become further inputs."""
    body = graph.copy()
    values = _outputs(body)
    for place in border:
        given = body.addInput()
        given.setType(values[place].type())
        values[place].replaceAllUsesWith(given)
    _C._jit_pass_dce(body)
    return body
