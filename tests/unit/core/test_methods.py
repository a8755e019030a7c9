"""The row of every method: what it says, and how a preset is resolved."""

import pytest

from heatlens_server.core.methods import CLOSED_FORMS, PRESETS, Aggregation, Method, Preset, Score, name_of


def test_exports_hold_the_closed_forms_and_no_other_method():
    assert [method for method in Method if method.traits.exportable] == list(CLOSED_FORMS)
    assert not any(method.traits.in_steps for method in CLOSED_FORMS)


def test_a_class_free_method_needs_no_gradient_and_has_one_score():
    for method in Method:
        if method.traits.class_free:
            assert not method.traits.needs_gradient
            assert method.traits.takes_multi_map_layers
            assert method.traits.exportable_scores == (Score.LOGIT,)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method.GRAD_CAM, Preset(Method.GRAD_CAM)),
        (Method.FINER_CAM, Preset(Method.GRAD_CAM, score=Score.CONTRAST)),
        (Method.REFINE_CAM, Preset(Method.GRAD_CAM, aggregation=Aggregation.PRODUCT, all_layers=True)),
    ],
)
def test_a_preset_stands_for_another_method(method, expected):
    assert method.as_preset == expected
    assert (method in PRESETS) is (expected.method is not method)


def test_a_score_with_a_preset_gives_a_method_the_name_of_the_preset():
    assert name_of(Method.GRAD_CAM, Score.CONTRAST) is Method.FINER_CAM
    assert name_of(Method.GRAD_CAM, Score.LOGIT) is Method.GRAD_CAM
    assert name_of(Method.LAYER_CAM, Score.CONTRAST) is Method.LAYER_CAM
