"""A graph as ONNX files."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.onnx._internal.fx.passes import type_promotion

from heatlens_server.core.errors import ExportError

OPSET = 20


def to_onnx(
    program: ExportedProgram, *, input_names: Sequence[str], output_names: Sequence[str]
) -> torch.onnx.ONNXProgram:
    """Translate a graph to ONNX.

    Args:
        program: the graph.
        input_names: of its inputs.
        output_names: of its outputs.

    Raises:
        ExportError: an operator has no translation.
    """
    _decompose_only_if_needed(program)
    try:
        with warnings.catch_warnings(), _promotion_by_recorded_values():
            # Torch's exporter warns of its own deprecated internals.
            warnings.simplefilter("ignore")
            translated = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                # Its rewrite rules take time in the square of the graph's size; `_simplify` does the rest.
                optimize=False,
                verbose=False,
            )
    # Its message holds a whole report; its cause is what matters.
    except Exception as error:
        cause = error.__cause__ or error
        # Of a node's dump, what it calls is enough.
        called = re.search(r"target=([\w.]+)", str(cause))
        reason = called[1] if called else str(cause).split("\n", maxsplit=1)[0][:200]
        raise ExportError(f"the graph cannot be translated to ONNX ({type(cause).__name__}: {reason})") from error
    if translated is None:
        raise ExportError("the graph cannot be translated to ONNX")
    _simplify(translated.model)
    return translated


def _decompose_only_if_needed(program: ExportedProgram) -> None:
    """Spare torch's exporter its decomposition pass where it would change nothing.

    It traces the whole program twice more, which is most of the time that an export takes. Nothing would change if no
    operator is in the exporter's table and none writes to its input; our graphs are made of such operators.
    """
    decompose = program.run_decompositions

    def run_decompositions(table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:  # noqa: ANN401
        operators = {node.target for node in program.graph.nodes if isinstance(node.target, OpOverload)}
        if table is not None and not any(
            operator in table or operator._schema.is_mutable  # noqa: SLF001 - the only way to ask
            for operator in operators
        ):
            return program
        decomposed: ExportedProgram = decompose(None if table is None else dict(table), **options)
        return decomposed

    program.run_decompositions = run_decompositions


@contextmanager
def _promotion_by_recorded_values() -> Iterator[None]:
    """Spare torch's exporter to run the graph on fake tensors once more.

    It does so to insert casts where operands differ in type, and offers no option for it. The values that it would
    compute are those that tracing left at the nodes; only nodes that it adds or changes need to run.
    """
    interpreter = type_promotion._TypePromotionInterpreter  # noqa: SLF001 - there is no other way in
    run_node = interpreter.run_node

    def run_or_recall(self: Any, node: Node) -> Any:  # noqa: ANN401
        if node.op != "call_function":
            return Interpreter.run_node(self, node)
        rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    interpreter.run_node = run_or_recall  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        interpreter.run_node = run_node  # type: ignore[method-assign]


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants and sizes, store equal tensors once, drop what is unused."""
    onnx_ir.passes.Sequential(
        common.InlinePass(),
        # Stack traces with paths of this machine, several times the size of a small graph.
        common.ClearMetadataAndDocStringPass(),
    )(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    onnx_ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
