"""`heatlens explain`: what it sends and writes for detections, masks, embeddings and measures."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from heatlens._cli.commands import app
from heatlens._wire.names import METRICS
from heatlens.v1 import explain_pb2, faithfulness_pb2, method_pb2


@pytest.fixture
def photo(tmp_path, pixels):
    path = tmp_path / "photo.png"
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return path


@pytest.fixture
def run(peer, photo):
    return lambda *options: CliRunner().invoke(
        app, ["explain", "--server", peer.address, *map(str, options), str(photo)]
    )


def test_options_are_sent(run, peer, photo, tmp_path):
    np.save(tmp_path / "embedding.npy", np.float32([1, 2]))
    options = "--target-score contrast --aggregation product --augment --principal-component --min-score 0.25".split()  # noqa: SIM905
    done = run(*options, "--reference", tmp_path / "embedding.npy", "--mask", photo, "--faithfulness", "all")
    assert done.exit_code == 0, done.output
    sent = peer.requests[0].options
    assert sent.target_score == method_pb2.TARGET_SCORE_CONTRAST
    assert sent.aggregation == method_pb2.AGGREGATION_PRODUCT
    assert sent.smoothing.augmentation
    assert sent.smoothing.principal_component
    assert sent.min_score == 0.25
    assert list(sent.reference_embedding.shape) == [2]
    assert list(sent.mask.shape) == [4, 4]
    assert list(sent.faithfulness.metrics) == list(METRICS.values())
    assert run("--reference", photo, "--faithfulness", "insertion, sparseness").exit_code == 0
    assert peer.requests[1].options.reference_image.encoded == photo.read_bytes()
    assert list(peer.requests[1].options.faithfulness.metrics) == [2, 8]
    assert run().exit_code == 0
    assert peer.requests[2].options == explain_pb2.ExplainOptions()


def test_detections_of_one_class_are_files_of_their_own(run, peer, tmp_path):
    answer = peer.answer()
    answer.explanations[0].box.CopyFrom(explain_pb2.PixelBox(left=1, top=1, right=3, bottom=2))
    answer.explanations.append(answer.explanations[0])
    peer.replies[0] = answer
    done = run("--json", "-o", tmp_path / "out")
    found = json.loads(done.stdout)["explanations"]
    assert [item["box"] for item in found] == [{"left": 1, "top": 1, "right": 3, "bottom": 2}] * 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "photo-3-2.npy",
        "photo-3-2.png",
        "photo-3.npy",
        "photo-3.png",
        "photo-all.png",
    ]
    assert json.loads(done.stdout)["overlay"] == str(tmp_path / "out" / "photo-all.png")
    assert "at 1,1 to 3,2" in run().stdout


def test_masks_embeddings_and_measures(run, peer, tmp_path):
    answer = peer.answer()
    answer.explanations[0].area = 0.25
    answer.explanations[0].faithfulness.CopyFrom(faithfulness_pb2.Faithfulness(deletion=0.125))
    mask = np.array([[0, 7], [255, 1]], np.uint8)
    answer.predicted_mask.CopyFrom(
        explain_pb2.Tensor(data_type=explain_pb2.DATA_TYPE_UINT8, shape=mask.shape, data=mask.tobytes())
    )
    answer.embedding.CopyFrom(
        explain_pb2.Tensor(data_type=explain_pb2.DATA_TYPE_FLOAT32, shape=[2], data=np.float32([3, 4]).tobytes())
    )
    answer.source_width_px = answer.source_height_px = 4
    peer.replies[0] = answer
    done = run("--json", "--return-mask", "-o", tmp_path / "out")
    told = json.loads(done.stdout)
    assert peer.requests[0].options.return_mask
    assert told["explanations"][0]["area"] == 0.25
    assert told["explanations"][0]["faithfulness"] == {"deletion": 0.125}
    # The mask of the model's input, placed on the image of 4x4 pixels.
    with Image.open(told["predicted_mask"]) as written:
        np.testing.assert_array_equal(np.asarray(written), np.kron(mask, np.ones((2, 2), np.uint8)))
        colors = np.asarray(written.convert("RGB"))
    # Its colours are seen, and 0, which is black, is what does not count in a mask.
    assert len(np.unique(colors[::2, ::2].reshape(-1, 3), axis=0)) == 4
    assert colors[0, 0].tolist() == [0, 0, 0]
    assert run("--mask", told["predicted_mask"]).exit_code == 0
    sent = peer.requests[-1].options.mask
    np.testing.assert_array_equal(np.frombuffer(sent.data, np.uint8).reshape(sent.shape) != 0, colors.any(2))
    assert np.load(told["embedding"]).tolist() == [3, 4]
    text = run("-o", tmp_path / "out").stdout
    for part in ("on 25.0% of the image", "deletion 0.125", "photo-mask.png", "photo-embedding.npy"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--return-mask"], 2, "give -o DIR, too"),
        (["--faithfulness", "roar"], 1, "faithfulness: expected one of deletion"),
        (["--target-score", "loss"], 1, "target_score: expected one of logit"),
        (["--reference", "gone.npy"], 1, "gone.npy"),
        (["--mask", "gone.png"], 1, "gone.png"),
    ],
)
def test_wrong_options(run, peer, options, code, message):
    done = run(*options)
    assert done.exit_code == code
    assert message in done.stderr
    assert peer.requests == []


def test_a_file_that_holds_no_embedding(run, tmp_path):
    for content in (b"", b"\x93NUMPY rubbish"):
        (tmp_path / "broken.npy").write_bytes(content)
        done = run("--reference", tmp_path / "broken.npy")
        assert done.exit_code == 1
        assert "holds no array" in done.stderr
