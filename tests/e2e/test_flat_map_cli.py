"""A model for none of whose classes anything speaks: the command line says so, in words, in JSON and in pictures."""

import json

import cv2
import numpy as np
import pytest

from server_process import wait_settled
from server_toml import model_toml, server_toml
from video_files import one_line, read_film

NOTE = "nothing speaks for it"


@pytest.fixture
def run_on(run, launch):
    server = launch(server_toml(model_toml("negative"), model_toml("tiny")))
    wait_settled(server.address)
    return lambda command, *arguments: run(command, *arguments, "--server", server.address)


def below_banner(picture, photo):
    """Where a picture and the photo are compared: without the banner."""
    top = photo.shape[0] // 5
    return picture[top:].astype(int), photo[top:].astype(int)


def test_a_flat_map_is_said_in_words_in_json_and_in_the_picture(run_on, chelsea_path, chelsea, tmp_path):
    assert NOTE in run_on("explain", chelsea_path, "--method", "grad-cam").stdout
    assert NOTE not in run_on("explain", chelsea_path, "--method", "grad-cam", "--model", "tiny").stdout
    done = run_on("explain", chelsea_path, "--method", "grad-cam", "--json", "-o", tmp_path)
    (told,) = json.loads(one_line(done.stdout))["explanations"]
    assert (told["scale"], told["offset"], told["flat"]) == (0, 0, True)
    assert not np.load(told["map"]).any()
    picture = cv2.imread(told["overlay"], cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(*below_banner(picture, chelsea))
    # The banner says it.
    assert (picture[:20] != chelsea[:20]).any()
    done = run_on("explain", chelsea_path, "--method", "grad-cam", "--json", "--model", "tiny")
    (told,) = json.loads(one_line(done.stdout))["explanations"]
    assert told["scale"] > 0
    assert not told["flat"]


def test_a_flat_map_is_not_tinted_in_a_film(run_on, chelsea_path, chelsea, tmp_path):
    film = tmp_path / "film.mp4"
    run_on("video", chelsea_path, "-o", film, "--method", "grad-cam")
    (frame,) = read_film(film)[1]
    filmed, photo = below_banner(frame[:300, :451, ::-1], chelsea)
    # H.264 loses a little; a tint would change every pixel by far more.
    assert np.abs(filmed - photo).mean() < 5
