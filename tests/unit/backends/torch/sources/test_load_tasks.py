"""Loading models for other tasks than classification: from torchvision, timm, files and factories."""

import sys

import pytest
import timm
import torch
from skimage import data
from torchvision.models import get_model, get_model_weights

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.headless import features_of
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.preprocessing import resolve_preprocess
from heatlens_server.backends.torch.sources.source import DETECTION_PREPROCESS
from heatlens_server.config import ModelConfig, PreprocessConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.targets import Detections, Pixels, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.imaging.preprocess import fit
from random_heads import calibrate_heads
from task_models import DETECTORS, Embedder, Segmenter


def make_segmenter():
    return Segmenter()


def make_detector():
    return DETECTORS["faster-rcnn"]()


def make_embedder():
    return Embedder()


def timm_features():
    return timm.create_model("resnet10t", pretrained=False, num_classes=0)


def cut_resnet():
    """As people make a backbone of torchvision's classifier."""
    network = get_model("resnet18", weights=None)
    network.fc = torch.nn.Identity()
    return network


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo", sys.modules[__name__])


def load(source, **options):
    return load_model(ModelConfig(name="m", source=source, **options))


def refusal(source, **options):
    with pytest.raises(ModelLoadError) as caught:
        load(source, **options)
    return str(caught.value)


def test_random_networks_are_explained():
    """With calibrated heads: as they are drawn, detectors find nothing, and segmentation knows one class."""
    photo = data.chelsea()
    for name, target in (
        ("ssdlite320_mobilenet_v3_large", Detections(0.5, 5)),
        ("lraspp_mobilenet_v3_large", Pixels(TopK(5))),
    ):
        model = load(f"torchvision:{name}", weights="none")
        calibrate_heads(model.module)
        assert model.task is (Task.SEGMENTATION if isinstance(target, Pixels) else Task.DETECTION)
        assert len(model.labels) == model.class_count
        image = fit(photo, model.preprocess).pixels
        assert image.shape == ((520, 781, 3) if model.task is Task.SEGMENTATION else photo.shape)
        engine = TorchEngine(model, device="cpu")
        (result,) = engine.explain(image[None], [target], MapSpec(Method.GRAD_CAM, model.layers[:1], upsample=False))
        engine.close()
        assert len(result.findings) > 1
        assert (result.scales > 0).any()


@pytest.mark.parametrize(
    ("name", "options", "classes", "task"),
    [
        # The auxiliary head is for training only.
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True}, 3, Task.SEGMENTATION),
        ("ssdlite320_mobilenet_v3_large", {}, 4, Task.DETECTION),
        # Four outputs per class for boxes, one for scores: two sizes differ.
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {}, 5, Task.DETECTION),
    ],
)
def test_files_of_other_numbers_of_classes(tmp_path, name, options, classes, task):
    network = get_model(name, weights=None, weights_backbone=None, num_classes=classes, **options)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    model = load(f"torchvision:{name}", weights=str(tmp_path / "own.pth"))
    assert (model.class_count, model.labels, model.task) == (classes, (), task)


def test_official_detection_files_have_their_own_epsilon(tmp_path):
    """As torchvision sets it when it loads these weights itself."""
    name = "retinanet_resnet50_fpn"
    file = tmp_path / get_model_weights(name).COCO_V1.url.rpartition("/")[2]
    torch.save(get_model(name, weights=None, weights_backbone=None).state_dict(), file)
    model = load(f"torchvision:{name}", weights=str(file))
    assert {m.eps for m in model.module.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.0}
    assert model.layers[0] == "backbone.body.layer4"


def test_embeddings_are_what_the_classifier_would_read(tmp_path):
    model = load("embedded:efficientnet_lite0", task="embedding")
    assert (model.task, model.class_count, model.labels) == (Task.EMBEDDING, 1280, ())
    assert model.layers[0] == load("embedded:efficientnet_lite0").layers[0]
    headless = load("timm:resnet18", weights="none", task="embedding")
    assert (headless.class_count, headless.layers[0]) == (512, "layer4")
    file = tmp_path / "headless.pth"
    torch.save(headless.module.state_dict(), file)
    assert load("timm:resnet18", weights=str(file), task="embedding").version == headless.version


@pytest.mark.parametrize(
    ("factory", "task", "classes", "layer"),
    [
        ("make_segmenter", "segmentation", 5, "backbone"),
        ("make_detector", "detection", 7, "backbone.body.layer4"),
        ("make_embedder", "embedding", 24, "body"),
    ],
)
def test_factories(factory, task, classes, layer):
    model = load(f"python:zoo:{factory}", task=task)
    assert (model.task, model.class_count, model.layers[0]) == (task, classes, layer)
    assert (model.preprocess.crop_px is None) == (task != "embedding")
    if task == "detection":
        assert model.preprocess == DETECTION_PREPROCESS


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("torchvision:resnet18", "detection", "torchvision's resnet18 is for classification, not for detection"),
        ("torchvision:lraspp_mobilenet_v3_large", "embedding", "is for segmentation, not for embedding"),
        ("torchvision:resnet18", "embedding", "is for classification, not for embedding"),
        ("timm:resnet18", "segmentation", "timm has no models for segmentation"),
        ("embedded:efficientnet_lite0", "detection", "no models for detection"),
        ("python:zoo:make_embedder", "detection", "a detector takes a list of images"),
        ("python:zoo:make_embedder", "segmentation", "must return scores of shape"),
    ],
)
def test_tasks_that_do_not_fit(source, task, message):
    weights = "default" if source.startswith(("python", "embedded")) else "none"
    assert message in refusal(source, task=task, weights=weights)


class TestHeadless:
    @pytest.mark.parametrize(
        ("source", "length"),
        [("timm:vit_tiny_patch16_dinov3_qkvb", 192), ("python:zoo:timm_features", 512), ("python:zoo:cut_resnet", 512)],
    )
    def test_a_network_without_a_classifier_is_an_embedding(self, source, length):
        weights = "default" if source.startswith("python") else "none"
        model = load(source, weights=weights)
        assert (model.task, model.class_count, model.labels) == (Task.EMBEDDING, length, ())
        assert [said for said in model.assumptions if 'task = "embedding"' in said and "features" in said]
        declared = load(source, weights=weights, task="classification")
        assert (declared.task, declared.class_count) == (Task.CLASSIFICATION, length)

    def test_a_file_without_a_classifier_is_an_embedding(self, tmp_path):
        file = tmp_path / "headless.pth"
        torch.save(load("timm:resnet18", weights="none", task="embedding").module.state_dict(), file)
        assert load("timm:resnet18", weights=str(file)).task is Task.EMBEDDING

    def test_clip_keeps_its_projection(self, tmp_path):
        """So that an image's embedding can be compared with a text's."""
        name = "timm:vit_xsmall_patch16_clip_224"
        found = load(f"{name}.tinyclip_yfcc15m", weights="none")
        assert (found.task, found.class_count) == (Task.EMBEDDING, 512)
        assert any("CLIP's projection" in said for said in found.assumptions)
        assert found.module.head.weight.shape[0] == 512
        # The weights of an architecture that projects may be called by its name alone, or come from a file.
        file = tmp_path / "clip.pth"
        torch.save(found.module.state_dict(), file)
        for weights in ("none", str(file)):
            declared = load(name, weights=weights, task="embedding")
            assert (declared.class_count, declared.module.head.out_features) == (512, 512)

    def test_an_architecture_of_clip_with_classes_is_a_classifier(self):
        name = "timm:vit_base_patch32_clip_224.laion2b_ft_in1k"
        assert not features_of(timm.create_model(name.removeprefix("timm:"), pretrained=False, depth=1))
        model = load(name, weights="none", task="embedding")
        assert model.class_count == 768
        assert any("not CLIP's projection" in said for said in model.assumptions)

    def test_a_network_of_ones_own_is_taken_as_it_is_declared(self):
        assert features_of(Embedder()) == ""

    def test_a_classifier_of_somebodys_hub_is_no_embedding(self):
        """Its configuration says the number of its own classes, as a CLIP tower's says its projection's width."""
        network = timm.create_model("resnet10t", pretrained=False, num_classes=300)
        network.pretrained_cfg = {**network.pretrained_cfg, "num_classes": 300}
        assert features_of(network) == ""
        tower = timm.create_model("vit_base_patch32_clip_224", pretrained=False, num_classes=7, depth=1)
        tower.pretrained_cfg = {**tower.pretrained_cfg, "num_classes": 7}
        assert features_of(tower) == ""


def test_a_multi_label_model_is_loaded_as_a_classifier():
    model = load("timm:resnet18", weights="none", task="multi-label-classification")
    assert (model.task, model.class_count) == (Task.MULTI_LABEL, 1000)


class TestPreprocess:
    ANY = PreprocessSpec(520, None, (0.5,) * 3, (0.5,) * 3, "bilinear", 1333)

    @pytest.mark.parametrize(
        ("changes", "resize_px", "crop_px", "max_side_px"),
        [
            ({}, 520, None, 1333),
            ({"resize_px": 300, "max_side_px": 400}, 300, None, 400),
            ({"crop_px": [96, 128]}, 128, (96, 128), None),
            ({"crop_px": 96, "resize_px": 120}, 120, (96, 96), None),
        ],
    )
    def test_sizes(self, changes, resize_px, crop_px, max_side_px):
        spec = resolve_preprocess(self.ANY, PreprocessConfig(**changes)).spec
        assert (spec.resize_px, spec.crop_px, spec.max_side_px) == (resize_px, crop_px, max_side_px)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"resize_px": [64, 64]}, "is an exact size: set crop_px as well"),
            ({"crop_px": 64, "max_side_px": 100}, "max_side_px is for inputs of any size"),
        ],
    )
    def test_refusals(self, changes, message):
        with pytest.raises(ModelLoadError, match=f"preprocess: .*{message}"):
            resolve_preprocess(self.ANY, PreprocessConfig(**changes))
