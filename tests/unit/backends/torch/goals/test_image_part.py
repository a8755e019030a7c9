"""Where images lie in what a network's first layer gets: padded, cropped, scaled, mirrored at the edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foreign_detectors import PADDED_PX, Wrapped, boxes, cropped, padded, padding_of, wrapped
from heatlens_server.backends.torch.cam.saliency import WHOLE, Part
from heatlens_server.backends.torch.goals.detection import Detection
from heatlens_server.backends.torch.goals.image_part import find_part


class Changed(nn.Module):
    """A layer behind a change of its input."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.layer(self.change(images))


def part_of(change, size=(60, 80)):
    module = Changed(change)
    found = find_part(module, module, (3, *size))
    assert not module._forward_pre_hooks
    assert not module.layer._forward_pre_hooks
    return found


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (256, 256), (97, 640), (20, 700), (1, 5)])
def test_letterbox(size):
    height, width, top, left = padding_of(size)
    expected = Part(top / PADDED_PX, left / PADDED_PX, (top + height) / PADDED_PX, (left + width) / PADDED_PX)
    detection = Detection()
    assert detection.part_on_image(padded(), (3, *size)) == expected
    assert detection.part_on_image(boxes(), (3, *size)) == expected  # once for each size


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (20, 700)])
def test_the_whole_image_on_the_whole_input(size):
    assert Detection().part_on_image(boxes(), (3, *size)) == WHOLE


@pytest.mark.parametrize("size", [(96, 130), (130, 96), (70, 101)])
def test_what_torchvisions_transform_pads_is_found_where_it_is_out_of_sight(size):
    module = wrapped()
    assert Detection().part_on_image(module, (3, *size)) == Detection().part_on_image(module.inner, (3, *size))
    assert Detection().part_on_image(Wrapped(boxes()), (3, *size)) == WHOLE


def test_a_crop_shows_less_than_the_image():
    found = Detection().part_on_image(cropped(), (3, 164, 232))
    assert (found.top, found.bottom) == (pytest.approx(-32 / 100), pytest.approx(132 / 100))
    assert (found.left, found.right) == (pytest.approx(-16 / 200), pytest.approx(216 / 200))


def test_normalised_reflected_and_resized():
    assert part_of(lambda x: (x - 0.4) / 0.2) == WHOLE
    # Edges that change with the image, too, are told by what they show.
    found = part_of(lambda x: F.pad(x, (8, 16, 4, 0), mode="reflect"))
    assert (found.top, found.bottom) == (pytest.approx(4 / 64), pytest.approx(1))
    assert (found.left, found.right) == (pytest.approx(8 / 104), pytest.approx(88 / 104))
    assert part_of(lambda x: F.interpolate(x, size=(31, 200), mode="bilinear")) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        # Nothing of the image, several maps, no map, and an image whose sides are swapped.
        torch.ones_like,
        lambda x: torch.cat([x, x]),
        lambda x: x[0],
        lambda x: x.mT,
    ],
)
def test_what_cannot_be_told_is_taken_as_the_whole(change):
    assert part_of(change) == WHOLE


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x.mT])
def test_a_turned_image_is_told_in_the_log(caplog, change):
    part_of(change)
    assert "does not lay an image of 60x80 pixels on its input by scaling alone" in caplog.text
