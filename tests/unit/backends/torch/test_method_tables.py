"""The tables of functions by method hold just the methods that their traits say."""

import pytest

from heatlens_server.backends.torch.passes.table import PASSES
from heatlens_server.core.methods import Method, Procedure
from heatlens_server.maps.methods import RAW_MAPS
from heatlens_server.maps.steps.drive import STEPPERS
from heatlens_server.maps.weights import WEIGHTED_ACTIVATIONS


@pytest.mark.parametrize(
    ("procedure", "table"),
    [(Procedure.CLOSED_FORM, RAW_MAPS), (Procedure.ONE_PASS, PASSES), (Procedure.STEPS, STEPPERS)],
)
def test_each_procedure_has_a_function_for_each_of_its_methods(procedure, table):
    assert set(table) == {method for method in Method if method.traits.procedure is procedure}


def test_closed_forms_that_weight_activations_have_a_function_for_it():
    assert set(WEIGHTED_ACTIVATIONS) == {
        method for method in Method if method.traits.exportable and method.traits.weights_activations
    }
