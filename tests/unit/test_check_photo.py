"""What `heatlens-server check --image` says of a model's answers to a photo."""

import cv2
import numpy as np
import pytest

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.check_photo import Sight, explain_photo, warnings_of
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.build import BuiltModel
from loaded_models import loaded

RAMP = np.tile(np.linspace(0, 1, 4, dtype=np.float32), (1, 3, 1))


def info(task: Task = Task.CLASSIFICATION) -> Capabilities:
    return Capabilities("torch", "cpu", "fp32", 32, 32, 4, (Method.GRAD_CAM,), ("body",), task)


def sight(logits=(4.0, 0.0, 0.0, 0.0), *, class_id: int = 0, maps=RAMP, scale: float = 1.0) -> Sight:
    one = np.ones(1, np.float32)
    result = ImageResult(np.array(logits, np.float32), (class_id,), maps, scale * one, 0 * one)
    return Sight(None, result)  # the warnings are about the results


BLACK = sight((1.0, 1.0, 0.0, 0.0))
MIRRORED = sight(maps=RAMP[:, :, ::-1])


def test_a_model_that_is_right_has_no_warning():
    assert list(warnings_of(info(), sight(), MIRRORED, BLACK)) == []


@pytest.mark.parametrize(
    ("seen", "mirrored", "black", "words"),
    [
        (sight(maps=0 * RAMP, scale=0.0), MIRRORED, BLACK, "flat"),
        (sight(), MIRRORED, sight(), "those of a black image"),
        (sight((0.1, 0.0, 0.0, 0.0)), MIRRORED, BLACK, "little more than chance"),
        (sight(), sight(class_id=2), BLACK, "another class"),
        (sight(), sight(), BLACK, "mirrored back"),
    ],
)
def test_what_looks_wrong_is_one_warning(seen, mirrored, black, words):
    (warning,) = warnings_of(info(), seen, mirrored, black)
    assert words in warning


def test_masks_and_boxes_are_not_mirrored_with_the_image():
    empty = sight(())
    assert list(warnings_of(info(Task.SEGMENTATION), empty, sight((), class_id=1), empty)) == []


@pytest.fixture
def model():
    own = loaded(tiny_models.tiny(), ("body", "stem"))
    engine = TorchEngine(own, device="cpu")
    labels = tuple(f"thing {n}" for n in range(own.class_count))
    yield BuiltModel(engine, own.preprocess, "1", labels, Method.SCORE_CAM)
    engine.close()


def test_a_photo_is_explained_and_drawn(model, tmp_path):
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    lines = list(explain_photo(model, photo, tmp_path / "new" / "m.png"))
    assert lines[0].startswith("photo.png: class ")
    assert "(thing " in lines[0]
    assert lines[1].startswith("maps of the layers, width x height: body ")
    assert lines[2].startswith("photo.png mirrored: class ")
    assert lines[-1] == f"the map over the photo: {tmp_path / 'new' / 'm.png'}"
    drawn = cv2.imread(str(tmp_path / "new" / "m.png"))
    assert drawn.shape == (90, 120, 3)
    assert (drawn != cv2.imread(str(photo))).any()


def test_a_photo_that_is_none_is_refused(model, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no image")
    with pytest.raises(InvalidArgument, match=r"photo\.png"):
        list(explain_photo(model, tmp_path / "photo.png", tmp_path / "m.png"))
