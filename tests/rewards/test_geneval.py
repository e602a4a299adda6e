"""GenEval's check on boxes that are known, and detectors of transformers with random weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.judges import geneval
from dmdr_rewards.judges.geneval import COLOURS, GenEval, read_tasks, relations
from dmdr_rewards.networks.detector import Detector, Found
from dmdr_rewards.networks.frozen_network import FrozenNetwork
from PIL import Image
from torch import Tensor

DOG, LEFT, RIGHT = {"class": "dog", "count": 1}, (0, 10, 10, 20), (30, 10, 40, 20)


class Known:
    """A detector that finds what it is told."""

    classes = frozenset({"dog", "cat", "mouse"})

    def __init__(self, *_: Any) -> None:
        self.found: list[Found] = []

    def __call__(self, picture: Image.Image, threshold: float) -> list[Found]:
        return [each for each in self.found if each.confidence > threshold]


class Clip:
    """Embeds a picture as the colour of its middle, and a text as the colours that it names."""

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([torch.tensor([float(f" {colour}" in text) for colour in COLOURS]) for text in texts])

    def encode_image(self, crops: list[Image.Image]) -> Tensor:
        near = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
        rows = torch.zeros(len(crops), len(COLOURS))
        for row, crop in zip(rows, crops, strict=True):
            assert crop.size == (10, 10)
            middle = np.asarray(crop).astype(int).mean(axis=(0, 1))
            row[COLOURS.index(min(near, key=lambda name: np.abs(middle - near[name]).sum()))] = 1
        return rows


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """score(found, include=…, exclude=…, tag=…) -> the score of a picture, red on its left and blue on its right."""
    monkeypatch.setattr(geneval, "Detector", Known)
    monkeypatch.setattr(geneval, "_clip", lambda *_: Clip())
    picture = Image.new("RGB", (40, 40), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 40, 40))

    def score(found: list[Found], tag: str = "single_object", **row: Any) -> float:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "tag": tag, **row}))
        reward: Any = dmdr_rewards.create("geneval", "folder", metadata=tmp_path / "rows.jsonl", clip="clip")
        reward._detector.found = found
        return reward.score([picture], ["p"]).item()

    return score


def dog(box: Any = LEFT, confidence: float = 0.95, name: str = "dog", mask: Any = None) -> Found:
    return Found(name, confidence, box, mask)


def test_objects_are_counted_above_a_confidence(score: Any) -> None:
    assert score([dog()], include=[DOG]) == 1
    assert score([], include=[DOG]) == 0
    assert score([dog(name="cat")], include=[DOG]) == 0
    assert score([dog(confidence=0.31)], include=[DOG]) == 1
    assert score([dog(confidence=0.29)], include=[DOG]) == 0
    assert score([dog(confidence=0.31)], include=[DOG], tag="counting") == 0
    assert score([dog(name="mouse")], include=[{"class": "computer mouse", "count": 1}]) == 1


def test_an_exact_number_is_asked_for_by_exclusion(score: Any) -> None:
    row = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "tag": "counting"}
    assert [score([dog()] * count, **row) for count in (1, 2, 3)] == [0, 1, 0]
    weak = [dog(), dog(), dog(confidence=0.8)]
    assert score(weak, **row) == 1
    assert score([dog(), dog(), dog()], include=[{"class": "dog", "count": 2}]) == 1


def test_colours_of_the_most_confident_objects(score: Any) -> None:
    red, blue = {**DOG, "color": "red"}, {**DOG, "color": "blue"}
    assert (score([dog()], include=[red]), score([dog()], include=[blue])) == (1, 0)
    assert (score([dog(RIGHT)], include=[red]), score([dog(RIGHT)], include=[blue])) == (0, 1)
    assert score([dog(), dog(RIGHT, 0.9)], include=[blue]) == 0
    assert score([dog(), dog(RIGHT)], include=[{**red, "count": 2}]) == 0
    # What lies beside the mask is grey, which is nearest to white here, if the mask is small.
    mask = np.zeros((40, 40), bool)
    mask[10, 0] = True
    assert score([dog(mask=mask)], include=[{**DOG, "color": "white"}]) == 1
    assert score([dog(mask=~mask)], include=[red]) == 1


def test_positions_to_the_objects_of_another_clause(score: Any) -> None:
    def row(relation: str) -> dict[str, Any]:
        return {"include": [DOG, {"class": "cat", "count": 1, "position": [relation, 0]}]}

    found = [dog(LEFT), dog(RIGHT, name="cat")]
    assert [score(found, **row(each)) for each in ("left of", "right of", "above", "below")] == [0, 1, 0, 0]
    assert score(found[1:], **row("right of")) == 0
    two = {"class": "dog", "count": 2}
    between = [dog(LEFT), dog(RIGHT), dog((15, 10, 25, 20), name="cat")]
    assert score(between, include=[two, row("right of")["include"][1]]) == 0


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 0, 20, 10), {"right of"}),
        ((0, -20, 10, -10), {"above"}),
        ((0, 20, 10, 30), {"below"}),
        ((-20, 20, -10, 30), {"left of", "below"}),
        ((2, 0, 12, 10), set()),  # 2 is just the margin: a tenth of 10 + 10
        ((3, 0, 13, 10), set()),  # a third of the offset is left
        ((4.1, 0, 14.1, 10), {"right of"}),  # more than a half
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations_of_boxes(box: Any, expected: set[str]) -> None:
    assert relations(box, (0, 0, 10, 10)) == expected


ROW = {"prompt": "a", "tag": "x", "include": [DOG]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no row"),
        ([{"prompt": "a"}], r"line 1 is no row of GenEval's metadata: KeyError\('include'\)"),
        ([ROW, {**ROW, "include": []}], r"line 2 is no row .*include is empty"),
        ([{**ROW, "include": [{**DOG, "count": 0}]}], "count is 0"),
        ([{**ROW, "include": [{**DOG, "color": "grey"}]}], "color is 'grey', none of red"),
        ([{**ROW, "include": [{**DOG, "position": ["left of", 0]}]}], r"position is \['left of', 0\]"),
        ([{**ROW, "include": [DOG, {**DOG, "position": ["near", 0]}]}], r"position is \['near', 0\]"),
        ([ROW, {**ROW, "tag": "counting"}], "line 2: the prompt 'a' has another task above"),
    ],
)
def test_metadata_of_another_form_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path / "rows.jsonl")


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(row: dict[str, Any], **options: Any) -> GenEval:
        (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, **row}))
        reward: Any = dmdr_rewards.create("geneval", tmp_path, metadata=tmp_path / "rows.jsonl", **options)
        return reward

    with pytest.raises(
        ValueError, match=r"must hold config.json, .*; the official weights: hf download facebook/mask2f"
    ):
        create({})
    with pytest.raises(
        ValueError, match="reward 'geneval' has one preprocessing, its model's own: leave preprocess out"
    ):
        create({}, preprocess="dmdr")
    monkeypatch.setattr(geneval, "Detector", Known)
    with pytest.raises(ValueError, match="asks for colours: give clip=FOLDER"):
        create({"include": [{**DOG, "color": "red"}]})
    with pytest.raises(ValueError, match="does not know zebra: give a detector of COCO"):
        create({"exclude": [{"class": "zebra", "count": 1}]})
    reward, picture = create({}), Image.new("RGB", (9, 9))
    with pytest.raises(ValueError, match=r"prompt 'b' is not in .*rows.jsonl"):
        reward.score([picture], ["b"])
    with pytest.raises(ValueError, match="'geneval' is not differentiable"):
        reward.score(torch.zeros(1, 3, 9, 9, requires_grad=True), ["a"])


NAMES = {0: "dog", 1: "cat"}


def yolos(folder: Path) -> Any:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=[32, 32],
        patch_size=16, num_detection_tokens=5, use_mid_position_embeddings=False, id2label=NAMES,
    )  # fmt: skip
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return YolosForObjectDetection(config)


def test_a_detector_of_transformers(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yolos(tmp_path).save_pretrained(tmp_path)
    detector = Detector(tmp_path, "cpu", torch.float32)
    assert detector.classes == {"dog", "cat"}
    picture = Image.effect_noise((48, 32), 80).convert("RGB")
    found = detector(picture, 0.0)
    assert len(found) == 5
    assert [each.confidence for each in found] == sorted((each.confidence for each in found), reverse=True)
    least = found[-1].confidence
    assert all(each.confidence > least for each in detector(picture, least))
    for each in found:
        assert each.name in detector.classes
        left, top, right, bottom = each.box
        assert -48 < left < right < 96
        assert -32 < top < bottom < 64


class Masks(torch.nn.Module):
    """A Mask2Former of three queries: a sure dog on the left, a cat of 0.8 in the lower half, and nothing."""

    def forward(self, **_: Tensor) -> Any:
        masks = torch.full((1, 3, 16, 16), -9.0)
        masks[0, 0, :, :8] = 9
        masks[0, 1, 8:] = 9
        classes = torch.tensor([[[20.0, 0, 0], [0, 2.079, 0], [0, 0, 20]]])  # e^2.079 / (e^2.079 + 2) = 0.8
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def test_masks_have_boxes_around_them() -> None:
    from transformers import Mask2FormerImageProcessor

    detector: Any = object.__new__(Detector)
    detector._processor = Mask2FormerImageProcessor(size={"height": 32, "width": 32})
    detector._network, detector._masks, detector._names = FrozenNetwork(Masks(), "cpu", torch.float32), True, NAMES
    dog, cat = detector(Image.new("RGB", (48, 32)), 0.3)
    assert (dog.name, dog.box, dog.mask.shape) == ("dog", (0, 0, 24, 32), (32, 48))
    assert (cat.name, cat.box, cat.mask.sum()) == ("cat", (0, 16, 48, 32), 16 * 48)
    assert (dog.confidence, cat.confidence) == (pytest.approx(1, abs=0.01), pytest.approx(0.8, abs=0.01))
    assert [each.name for each in detector(Image.new("RGB", (48, 32)), 0.9)] == ["dog"]
    assert detector(Image.new("RGB", (48, 32)), 1.0) == []


def test_a_folder_of_another_model_is_refused(vit_folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as an object detector"):
        Detector(vit_folder, "cpu", torch.float32)
