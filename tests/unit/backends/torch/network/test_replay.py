"""Replaying a network from a layer on: the part before it on one row where that is right, in full where it is not."""

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from heatlens_server.backends.torch.network.replay import same
from loaded_models import noise
from step_jobs import one_by_one, placed


class Early(nn.Module):
    """What all networks here begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        return self.head(self.joined(early, self.body(early)))


class Residual(Early):
    """What bypasses the layer is added."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        late += early
        return late.mean((-2, -1))


class InPlace(Early):
    """The layer's output is added to what bypasses it, in the memory of the latter."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        early += late
        return early.mean((-2, -1))


class Gated(Early):
    """What bypasses the layer is pooled and multiplies its channels, as in squeeze and excitation."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return (late * early.mean((-2, -1), keepdim=True).sigmoid()).mean((-2, -1))


class Concatenating(Early):
    """What bypasses the layer is put beside its output."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return torch.cat([early[:, :4], late[:, :4]], dim=1).mean((-2, -1))


class Viewing(Early):
    """The batch's size is taken before the layer: pooling runs over all rows."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return late.transpose(0, 1).reshape(8, len(early), -1).mean(-1).T


class Mixing(Early):
    """The same, with as many rows in the end as there should be: all rows' tokens attend to each other."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        tokens = late.flatten(2).mT.reshape(len(early), -1, 8)
        mixed = (tokens @ tokens.mT).softmax(-1) @ tokens
        return mixed.reshape(-1, late[0, 0].numel(), 8).mean(1)


def network(kind: type[Early]) -> Early:
    torch.manual_seed(5)
    return kind()


ONE_ROW = {Residual: True, Gated: True, InPlace: False, Concatenating: False, Viewing: False, Mixing: False}


def five(output: Tensor) -> Tensor:
    """Five changed rows, none like another."""
    return torch.stack([output[0], output[0] * 0, -output[0], output[0].flip(0), output[0] + 1])


@pytest.mark.parametrize("kind", ONE_ROW, ids=lambda kind: kind.__name__)
def test_scores_are_those_of_whole_runs_row_by_row(kind):
    model = placed(network(kind), "body")
    inputs = model.inputs(noise(1))
    rows: list[int] = []
    model.module.stem.register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    expected = one_by_one(model, inputs, "body", five, 5)
    rows.clear()
    for _ in range(2):
        found = model.replay(inputs, "body", five, 5)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    before = 1 if ONE_ROW[kind] else 5
    assert rows[-1] == before
    assert rows.count(5) == (0 if ONE_ROW[kind] else 2), "the way is found once"


@pytest.mark.parametrize("kind", ONE_ROW, ids=lambda kind: kind.__name__)
def test_one_row_needs_no_trial(kind):
    model = placed(network(kind), "body")
    inputs = model.inputs(noise(1))
    rows: list[int] = []
    model.module.stem.register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    found = model.replay(inputs, "body", lambda output: output * 2, 1)
    assert rows == [1]
    torch.testing.assert_close(found, one_by_one(model, inputs, "body", lambda output: output * 2, 1))


def test_rows_that_mix_are_noticed_even_if_the_layer_is_dead():
    module = network(Mixing)
    torch.nn.init.zeros_(module.body[0].weight)
    torch.nn.init.constant_(module.body[0].bias, -1)
    model = placed(module, "body")
    inputs = model.inputs(noise(1))

    def changed(output: Tensor) -> Tensor:
        return torch.cat([output, output + torch.arange(8.0)[:, None, None]])

    expected = one_by_one(model, inputs, "body", changed, 2)
    torch.testing.assert_close(model.replay(inputs, "body", changed, 2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs_on_one_row_too(precision):
    model = placed(tiny_models.tiny_mlp(), "body", precision=precision)
    inputs = model.inputs(noise(1))
    rows: list[int] = []
    model.module.stem.register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    model.replay(inputs, "body", five, 5)
    assert rows[-1] == 1


def test_changed_outputs_have_the_layers_own_layout():
    model = placed(tiny_models.tiny(), "body")
    seen: list[Tensor] = []
    model.module.body.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model.replay(model.inputs(noise(1)), "body", lambda output: five(output).contiguous(), 5)
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


def test_a_device_out_of_memory_is_no_answer():
    model = placed(tiny_models.tiny(), "body")
    inputs = model.inputs(noise(1))

    def fails(_module, _args):
        raise torch.OutOfMemoryError("none left")

    handle = model.module.head.register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.replay(inputs, "body", five, 5)
    handle.remove()
    rows: list[int] = []
    model.module.stem.register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    model.replay(inputs, "body", five, 5)
    assert rows[-1] == 1


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.tensor([1.0, 100.0]), torch.tensor([1.01, 100.0]), True),
        (torch.tensor([1.0, 100.0]), torch.tensor([2.0, 100.0]), False),
        (torch.ones(2), torch.ones(3), False),
        (torch.tensor([torch.nan, torch.inf, 1]), torch.tensor([torch.nan, torch.inf, 1]), True),
        (torch.tensor([torch.nan, 1]), torch.tensor([1.0, 1]), False),
        ([{"a": torch.ones(1), "b": torch.tensor([3])}], [{"a": torch.ones(1), "b": torch.tensor([3])}], True),
        ([{"a": torch.ones(1), "b": torch.tensor([3])}], [{"a": torch.ones(1), "b": torch.tensor([4])}], False),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], False),
        (torch.zeros(0, 4), torch.zeros(0, 4), True),
        ((torch.ones(1), (64, 64)), (torch.ones(1), (64, 65)), False),
    ],
)
def test_outputs_are_compared_number_by_number(one, other, equal):
    assert same(one, other, torch.float32) is equal
