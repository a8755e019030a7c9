"""A network that disagrees with itself is no judge: random operations, state, images that meet."""

import pytest
from torch import nn

import export_networks
from export_networks import make
from heatlens_server.backends.torch.export.verify import verify
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec
from loaded_models import user_export


def check(model, exported, lines=None):
    folder, manifest = exported
    return verify(model, folder, manifest, report=(lines if lines is not None else []).append)


class Dropping(export_networks.Staged):
    """Drops values out whatever mode it is in."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, training=True))


class Remembering(export_networks.Staged):
    """Counts its calls outside of its buffers."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls * 0.01)


class Alternating(export_networks.Staged):
    """Does every other call differently: in as many calls over the same photos, the same."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2 * 0.01)


class Mixing(export_networks.Staged):
    """Centres what it sees over the batch."""

    def forward(self, x):
        logits = super().forward(x)
        return logits - 0.5 * logits.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Dropping, "different results for the same image: random operations, or state kept between calls"),
        (Remembering, "different results for the same image: random operations, or state kept between calls"),
        (Alternating, "in another batch: they depend on the other images, or on state kept between calls"),
        (Mixing, "different results for the same image in another batch: they depend on the other images"),
    ],
)
def test_a_network_that_disagrees_with_itself_is_no_judge(kind, message):
    model = make(export_networks.Staged)
    exported = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))
    lines = []
    with pytest.raises(ExportError, match=message):
        check(make(kind), exported, lines)
    assert lines == ["running the network in float64"]
