"""`heatlens explain`: which images its arguments name, how they are drawn, and what it says of them."""

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from heatlens._cli.commands import app
from heatlens._results.images import decode_image
from heatlens.v1 import explain_pb2


@pytest.fixture
def run(peer):
    """Run `heatlens explain`; the scripted server knows images of 4x4 pixels."""

    def run(*arguments, exit_code=0, stdin=None):
        command = ["explain", "--server", peer.address, *map(str, arguments)]
        done = CliRunner().invoke(app, command, input=stdin)
        assert done.exit_code == exit_code, done.output
        return done

    return run


@pytest.fixture
def folder(tmp_path, pixels):
    """Images 1, 2 and 10 in a folder, and what is none."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    encoded = cv2.imencode(".png", pixels)[1].tobytes()
    for name in ("photo1.png", "photo2.JPG", "photo10.png", "inner/photo3.png"):
        (folder / name).write_bytes(encoded)
    (folder / "scan.dcm").write_bytes(b"only the server can read this")
    (folder / "notes.txt").write_text("no image")
    return folder


def paths(done):
    return [json.loads(line)["path"] for line in done.stdout.splitlines()]


def test_a_folder_is_its_images_in_natural_order(run, folder, peer):
    done = run(folder, "--json")
    assert paths(done) == [str(folder / name) for name in ("photo1.png", "photo2.JPG", "photo10.png", "scan.dcm")]
    assert len(peer.requests) == 4


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*.png", ["photo1.png", "photo10.png"]), ("**/*3.png", ["inner/photo3.png"]), ("photo[2].*", ["photo2.JPG"])],
)
def test_a_glob(run, folder, pattern, names):
    assert paths(run(folder / pattern, "--json")) == [str(folder / name) for name in names]


def test_standard_input(run, folder, peer, tmp_path):
    encoded = (folder / "photo1.png").read_bytes()
    done = run("-", folder / "photo2.JPG", "--json", "-o", tmp_path / "out", stdin=encoded)
    assert paths(done) == ["-", str(folder / "photo2.JPG")]
    assert [request.image.encoded for request in peer.requests] == [encoded] * 2
    assert (tmp_path / "out" / "stdin-3.png").exists()
    done = run("-", stdin=b"", exit_code=1)
    assert "heatlens: error: -: image: the encoded image is empty [IMAGE_EMPTY]" in done.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("inner/*.gone", "no images there"), ("empty", "no images there"), ("gone.png", "No such file")]
)
def test_what_is_not_there_is_told_and_the_others_are_explained(run, folder, name, words):
    (folder / "empty").mkdir()
    done = run(folder / name, folder / "photo1.png", "--json", exit_code=1)
    assert paths(done) == [str(folder / "photo1.png")]
    assert done.stderr == f"heatlens: error: {folder / name}: {words}{' or directory' if 'gone.png' in name else ''}\n"


def test_names_that_clash_are_refused_before_any_call(run, folder, peer, tmp_path):
    (tmp_path / "photo1.png").write_bytes(b"x")
    done = run(folder, tmp_path / "photo1.png", "-o", tmp_path / "out", exit_code=1)
    assert "would be written to the same files" in done.stderr
    done = run(folder, "-o", tmp_path / "out", "--colormap", "nope", exit_code=1)
    assert "colormap: expected one of" in done.stderr
    assert peer.requests == []
    assert not (tmp_path / "out").exists()


def test_options_of_maps_and_overlays(run, folder, peer, tmp_path):
    image = folder / "photo1.png"
    done = run(image, "--map-size", "input", "--top-predictions", 2, "--alpha", 0.25, "-o", tmp_path, "--json")
    sent = peer.requests[0].options
    assert (sent.map_size, sent.top_predictions) == (explain_pb2.MAP_SIZE_INPUT, 2)
    (told,) = json.loads(done.stdout)["explanations"]
    light = decode_image(told["overlay"]).astype(int)
    run(image, "--alpha", 1, "-o", tmp_path)
    heavy = decode_image(told["overlay"]).astype(int)
    run(image, "--alpha", 1, "--colormap", "bone", "-o", tmp_path)
    assert (decode_image(told["overlay"]) != heavy).any()
    photo = decode_image(image)
    np.testing.assert_allclose(light, 0.75 * photo + 0.25 * heavy, atol=1)
    run(image, "--alpha", 1.5, exit_code=2)


def test_predictions_and_warnings_are_told(run, folder, peer):
    answer = peer.answer(warnings=["the upper bits are empty"])
    answer.predictions.add(class_id=7, label="dog", logit=1.0, probability=0.125)
    peer.replies[0] = answer
    image = folder / "photo1.png"
    done = run(image)
    assert "  most probable:\n      7   12.5%  dog\n" in done.stdout
    assert done.stderr == f"heatlens: warning: {image}: the upper bits are empty\n"
    assert json.loads(run(image, "--json").stdout)["warnings"] == ["the upper bits are empty"]


def test_a_regression_has_values_and_no_probabilities(run, folder, peer):
    answer = peer.answer(values=[[0.0, 0.0]])
    item = answer.explanations[0]
    item.value, item.label, item.map_scale, item.map_offset = 41.5, "age", 0, 0
    item.ClearField("logit")
    item.ClearField("probability")
    peer.replies[0] = answer
    done = run(folder / "photo1.png")
    assert "    41.5  age  nothing moves it this way\n" in done.stdout
    assert "%" not in done.stdout
    answer.predictions.add(class_id=0, label="age", value=41.5)
    assert "  values:\n      0    41.5  age\n" in run(folder / "photo1.png").stdout


def test_an_image_that_cannot_be_drawn_here_loses_nothing(run, folder, tmp_path):
    done = run(folder / "scan.dcm", "-o", tmp_path, "--json")
    (told,) = json.loads(done.stdout)["explanations"]
    # The map alone, at its own size.
    assert decode_image(told["overlay"]).shape == (2, 2, 3)
    assert np.load(told["map"]).shape == (2, 2)


def detection(peer, **box):
    answer = peer.answer()
    answer.explanations[0].box.CopyFrom(explain_pb2.PixelBox(**box))
    return answer.explanations[0]


@pytest.fixture
def street(tmp_path, peer):
    """A gray photo of 200x120 pixels, on which a detector finds two things."""
    path = tmp_path / "street.png"
    cv2.imwrite(str(path), np.full((120, 200, 3), 128, np.uint8))
    answer = peer.answer()
    del answer.explanations[:]
    answer.explanations.append(detection(peer, left=20, top=40, right=80, bottom=100))
    answer.explanations.append(detection(peer, left=110, top=30, right=190, bottom=110))
    answer.explanations[1].class_id = 4
    answer.source_region.CopyFrom(explain_pb2.PixelBox(left=0, top=0, right=200, bottom=120))
    answer.source_width_px, answer.source_height_px = 200, 120
    peer.replies[0] = answer
    return path


def differs(picture, other):
    return (picture != other).any(2)


def test_detections_are_drawn_with_their_boxes_each_and_all(run, street, tmp_path):
    told = json.loads(run(street, "-o", tmp_path, "--json", "--alpha", 0).stdout)
    photo = decode_image(street)
    first, second = (differs(decode_image(item["overlay"]), photo) for item in told["explanations"])
    everything = differs(decode_image(told["overlay"]), photo)
    np.testing.assert_array_equal(everything, first | second)
    # The box itself, its inside, and the text above it.
    assert first[40, 20:80].all()
    assert first[40:100, [20, 79]].all()
    assert not first[45:95, 25:75].any()
    assert first[30:40, 20:40].any()
    assert not first[:, 110:].any()
    assert second[30:110, 110].all()
    assert not second[:, :100].any()


def test_a_detector_that_finds_nothing(run, street, peer, tmp_path):
    del peer.replies[0].explanations[:]
    assert run(street, "-o", tmp_path / "out").stdout == f"{street}: tiny\n  nothing found\n"
    assert list((tmp_path / "out").iterdir()) == []
