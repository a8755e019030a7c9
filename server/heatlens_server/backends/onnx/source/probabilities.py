"""Files that return probabilities by operators of their own: found by running them, and logits computed from them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import ImageInput, Scores
from heatlens_server.backends.onnx.gradient.tape import Known
from heatlens_server.backends.onnx.gradient.values import open_graph, part_of
from heatlens_server.backends.onnx.source.added import Added
from heatlens_server.core.output_form import (
    OutputForm,
    Rows,
    about_form,
    about_range,
    about_unseen,
    declared_form,
    found_form,
    possible_forms,
    probes,
)
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Activation, OutputKind

_MADE_OF_PROBABILITIES = frozenset(
    {"Cast", "Clip", "Concat", "DequantizeLinear", "Flatten", "Gather", "Identity", "Mul", "QuantizeLinear", "Reshape"}
    | {"Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)
_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
_LAID_OUT = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_SIGMOIDS = frozenset({"HardSigmoid", "Sigmoid"})


def as_logits(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    scores: Scores,
    *,
    preprocess: PreprocessSpec,
    kind: OutputKind | None,
) -> tuple[Scores, Known, OutputForm | None, tuple[str, ...]]:
    """Find what the scores of a file are, and compute logits of them if they are none.

    Args:
        model: from `read_file`; what makes logits is added to it.
        known: its shapes.
        image: its input.
        scores: of the image, from `find_scores`.
        preprocess: how images become its input.
        kind: what it returns; None to find it.

    Returns:
        Scores that are logits, what is known then, what the file's own are if they are none and no activation could be
        left behind, and what was found, one sentence each.

    Raises:
        ModelLoadError: the scores are not of the kind that is asked for.
    """
    if kind is OutputKind.LOGITS:
        return replace(scores, value=scores.output, activation=""), known, None, ()
    if scores.activation and kind is not None:
        # What is left behind must be what the configuration says all the same.
        declared_form(kind, _run(model, image, scores.output, preprocess))
    if scores.activation or (kind is None and _is_linear(scores.value)):
        return scores, known, None, ()
    rows = _run(model, image, scores.value, preprocess)
    shows_sigmoid = _shows_sigmoid(scores.value)
    form = found_form(rows, shows_sigmoid=shows_sigmoid) if kind is None else declared_form(kind, rows)
    if form is None:
        return scores, known, None, (about_range(len(rows)),) if possible_forms(rows) else ()
    told = (*((about_form(form),) if kind is None else ()), about_unseen(form))
    added = Added(model, known)
    value = _logits(added, scores.value, form, known)
    return replace(scores, value=value, activation=str(form.activation)), added.finish(), form, told


def _run(model: ir.Model, image: ImageInput, value: ir.Value, preprocess: PreprocessSpec) -> Sequence[Rows]:
    """What a network says about each of a few images: (1, C)."""
    session = open_graph(part_of(model, [value]))
    dtype = np.dtype(np.float32) if image.value.dtype is None else np.dtype(image.value.dtype.numpy())
    batch = None if image.value.shape is None else image.value.shape[0]
    copies = batch if isinstance(batch, int) else 1
    said = []
    for probe in probes(preprocess):
        given = (probe if image.channels_last else probe.transpose(2, 0, 1))[None].astype(dtype).repeat(copies, axis=0)
        (found,) = session.run([str(value.name)], {str(image.value.name): given})
        said.append(np.asarray(found[:1], np.float32).reshape(1, -1))
        # Most networks are known to return logits after one image.
        if not possible_forms(said):
            break
    return said


def _is_linear(value: ir.Value) -> bool:
    """Whether a linear layer returns the scores: its outputs are in no range, and most networks end so."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _LAID_OUT and node.inputs[0] is not None:
        return _is_linear(node.inputs[0])
    is_biased = node.op_type == "Add" and any(one is not None and one.const_value is not None for one in node.inputs)
    return is_biased or node.op_type in _LINEAR


def _shows_sigmoid(value: ir.Value) -> bool:
    """Whether all that scores are made of is what sigmoids return, and constants."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _SIGMOIDS:
        return True
    computed = [one for one in node.inputs if one is not None and one.const_value is None]
    return node.op_type in _MADE_OF_PROBABILITIES and bool(computed) and all(map(_shows_sigmoid, computed))


def _logits(added: Added, value: ir.Value, form: OutputForm, known: Known) -> ir.Value:
    """Logits that have these probabilities or log-probabilities, as far as their precision tells.

    Of a softmax the logarithms, which differ from the network's logits by what is added to all classes.
    """
    shape = added.shape(value)
    limits = np.finfo(known.dtype.numpy())
    least, most, one = limits.tiny, 1 - limits.epsneg, 1.0

    def constant(number: float) -> ir.Value:
        return added.constant(np.array(number, known.dtype.numpy()))

    if form.kind is OutputKind.LOG_PROBABILITIES:
        if form.activation is Activation.SOFTMAX:
            return value
        value = added.op("Exp", [value], shape)
    if form.activation is Activation.SOFTMAX:
        return added.op("Log", [added.op("Clip", [value, constant(least), constant(one)], shape)], shape)
    inside = added.op("Clip", [value, constant(least), constant(most)], shape)
    rest = added.op("Sub", [constant(one), inside], shape)
    return added.op("Sub", [added.op("Log", [inside], shape), added.op("Log", [rest], shape)], shape)
