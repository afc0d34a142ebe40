"""Detections of transformers' detectors equal those of their image processors; folders are loaded without code."""

import json
import socket

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.transformers_detectors import CONFIGS, IMAGES, PROCESSORS, make, pictures, save
from tests.refusals import refuses
from tests.versions import needs
from visionattn.errors import DataError, UsageError
from visionattn.maps import DRISE, ODAM
from visionattn.models import TransformersDetector, load_model
from visionattn.models.architectures import architectures_in, only_known_architectures
from visionattn.models.sources.transformers_detector import create_transformers_detector

pytestmark = needs("transformers", "5.24", "the present arguments of its detectors' configurations")
close = torch.testing.assert_close
every = pytest.mark.parametrize("kind", CONFIGS)


@every
def test_detections_equal_those_of_the_models_image_processor(kind):
    model, images = make(kind), pictures()
    processor = getattr(transformers, PROCESSORS[kind])()
    with torch.no_grad():
        found = TransformersDetector(model, 5)(images)
        expected = processor.post_process_object_detection(
            model(pixel_values=images), threshold=0.01, target_sizes=[(IMAGES, IMAGES)] * 2
        )
    for ours, theirs in zip(found, expected, strict=True):
        order = theirs["scores"].argsort(descending=True, stable=True)
        count = len(order)  # the processor of RT-DETR returns as many detections as there are queries
        assert len(ours["scores"]) == count if "rt" not in kind else len(ours["scores"]) >= count == 12
        close(ours["scores"][:count], theirs["scores"][order])
        close(ours["boxes"][:count], theirs["boxes"][order].clamp(0, IMAGES), atol=1e-3, rtol=1e-4)
        assert ours["labels"][:count].tolist() == theirs["labels"][order].tolist()


@every
def test_the_score_of_a_box_is_that_of_its_query(kind):
    model, images = make(kind), pictures(1)
    with torch.no_grad():
        (found,) = TransformersDetector(model, 5)(images)
        logits_QK = model(pixel_values=images).logits[0]
    scores_QK = logits_QK.sigmoid() if logits_QK.shape[1] == 5 else logits_QK.softmax(1)
    close(found["scores"], scores_QK[found["index"], found["labels"]])


@pytest.mark.filterwarnings("ignore::visionattn.errors.MapWarning")
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "yolos"])
def test_odam_is_the_gradient_times_the_maps_of_the_backbone(kind):
    model, images = make(kind), pictures(1)
    (maps,) = ODAM()(TransformersDetector(model, 5), images, min_score=0.0, max_boxes=3)
    backbone = next(part for part in model.modules() if type(part).__name__.endswith("Backbone"))
    kept = []

    def keep(_, args, out):
        kept.extend(x.requires_grad_() for x in out.feature_maps)

    handle = backbone.register_forward_hook(keep)
    (found,) = TransformersDetector(model, 5)(images)
    handle.remove()
    size = kept[0].shape[2:]
    for rank in range(3):
        gradients = torch.autograd.grad(found["scores"][rank], kept, retain_graph=True)
        expected = torch.zeros(size)
        for level, gradient in zip(kept, gradients, strict=True):
            cells = level.shape[2] * level.shape[3] / (size[0] * size[1])
            level_hw = (gradient * level).sum(1, keepdim=True).relu()
            larger = torch.nn.functional.interpolate(level_hw, size, mode="bilinear", align_corners=False)
            expected += cells * larger[0, 0].detach()
        close(maps.raw[rank], expected, atol=2e-5 * float(expected.max() + 1), rtol=1e-3)
    assert maps.raw.abs().sum() > 0


def test_a_detector_without_feature_maps_is_explained_by_masks():
    detector, images = TransformersDetector(make("yolos"), 5), pictures(1)
    refuses(UsageError, "no part of this TransformersDetector returns a list of maps", lambda: ODAM()(detector, images))
    (maps,) = DRISE(8)(detector, images, min_score=0.0, max_boxes=2)
    assert maps.heatmaps.amax() == 1


@every
def test_the_loss_is_the_models_own_and_has_gradients(kind):
    detector, images = TransformersDetector(make(kind), 5), pictures()
    boxes = [torch.tensor([[32.0, 64, 96, 128]]), torch.tensor([[0.0, 0, 64, 32], [0, 0, 128, 128]])]
    loss = detector.losses(images, boxes, [torch.tensor([1]), torch.tensor([0, 4])])["loss"]
    targets = [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.75, 0.5, 0.5]])},
        {"class_labels": torch.tensor([0, 4]), "boxes": torch.tensor([[0.25, 0.125, 0.5, 0.25], [0.5, 0.5, 1, 1]])},
    ]
    close(loss, detector.model(pixel_values=images, labels=targets).loss)
    loss.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in detector.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_a_folder_is_loaded_with_names_and_preprocessing(kind, tmp_path):
    model, images = save(tmp_path, kind), pictures()
    loaded = load_model(f"hf:{tmp_path}")
    with torch.no_grad():
        for ours, theirs in zip(loaded(images), TransformersDetector(model, 5)(images), strict=True):
            close(ours["scores"], theirs["scores"])
    assert loaded.class_names == tuple(f"kind {index}" for index in range(5))
    size, fit = (IMAGES, "stretch") if kind == "rt_detr" else ((IMAGES, 160), "letterbox")
    assert (loaded.preprocess.size, loaded.preprocess.fit) == (size, fit)
    close(torch.tensor(loaded.preprocess.mean), torch.tensor((0.485, 0.456, 0.406) if kind == "detr" else (0.0,) * 3))


def test_a_changed_number_of_classes_makes_a_new_head(tmp_path):
    save(tmp_path, "detr")
    detector = create_transformers_detector(f"hf:{tmp_path}", num_classes=2, pretrained=True).eval()
    assert detector(pictures(1))[0]["labels"].max() <= 1
    random = create_transformers_detector(f"hf:{tmp_path}", num_classes=2, num_queries=4)
    assert random.model.config.num_queries == 4
    with torch.no_grad():
        assert len(random.eval()(pictures(1))[0]["scores"]) <= 4


def test_no_backbone_is_downloaded(tmp_path, monkeypatch):
    save(tmp_path, "detr")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_pretrained_backbone": True}))

    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    create_transformers_detector(f"hf:{tmp_path}")
    create_transformers_detector(f"hf:{tmp_path}", pretrained=True)


def test_the_architecture_of_a_checkpoint_is_enough_to_build_the_detector(tmp_path):
    save(tmp_path, "rt_detr")
    name = f"hf:{tmp_path}"
    known = json.loads(json.dumps(architectures_in(create_transformers_detector(name))))
    path = tmp_path / "config.json"
    path.unlink()
    with only_known_architectures(known):
        detector = create_transformers_detector(name, num_classes=5)
    assert detector.model.state_dict().keys() == make("rt_detr").state_dict().keys()


def test_folders_that_cannot_be_used_are_errors(tmp_path):
    model = save(tmp_path, "detr")
    refuses(UsageError, "leave out --new-head", load_model, f"hf:{tmp_path}", weights="x.pth", new_head=True)
    state = {name: value for name, value in model.state_dict().items() if "bbox" not in name}
    torch.save(state, tmp_path / "part.pth")
    refuses(DataError, "missing", load_model, f"hf:{tmp_path}", weights=tmp_path / "part.pth")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": print}, tmp_path / "pytorch_model.bin")
    refuses(DataError, "could not be loaded", load_model, f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/net"}, "use_timm_backbone": True},
        {"backbone_config": None, "backbone": "evil/net", "use_timm_backbone": False},
    ],
)
def test_a_backbone_on_the_hub_is_not_asked_for(fields, tmp_path, monkeypatch):
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise OSError("no network")

    save(tmp_path, "detr")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    for call in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, call, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    refuses(DataError, "could not be loaded|cannot be made", load_model, f"hf:{tmp_path}", pretrained=False)
    fields = {name: value for name, value in json.loads(path.read_text()).items() if value is not None}
    with only_known_architectures({f"hf:{tmp_path}": fields}):
        refuses(DataError, "cannot be", create_transformers_detector, f"hf:{tmp_path}")
    assert not asked


def test_with_another_number_of_classes_all_other_weights_are_needed(tmp_path):
    save(tmp_path, "rt_detr")
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in state.items() if "backbone" not in name}, tmp_path / "model.safetensors")
    refuses(DataError, "incomplete", create_transformers_detector, f"hf:{tmp_path}", num_classes=2, pretrained=True)
