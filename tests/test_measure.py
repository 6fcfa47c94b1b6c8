"""evaluation/measure.py and predict.py: own settings as pycocotools has them, shards, processes."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_judge import Fixed, crowded, judge, write
from conftest import tiny_model
from torch.utils.data import Subset
from training_stubs import cells, tiny

from fastrcnn import Detector
from fastrcnn.data import CocoDataset, open_dataset
from fastrcnn.evaluation import Predictions, as_detector, evaluate, measure, predict
from fastrcnn.evaluation.coco import judge_dataset
from fastrcnn.evaluation.predict import opened
from fastrcnn.training import train

IDS = [0, 3, 7, 12]
NAMES = [f"c{i}" for i in IDS]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A dataset, its file's content, rows of detections, and what a model finds that gives them."""
    content, rows = crowded(5)
    dataset = CocoDataset(write(tmp_path_factory.mktemp("case"), content))
    return dataset, content, rows, predict(Fixed(rows, NAMES), dataset)


def means(evaluation) -> tuple:
    """pycocotools' AP by area, AP of each class, and AR by number of detections and by area."""
    mean = lambda values: 100 * values[values > -1].mean() if (values > -1).any() else math.nan  # noqa: E731
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return ([mean(precision[..., a, -1]) for a in range(precision.shape[3])],
            [mean(precision[:, :, k, 0, -1]) for k in range(precision.shape[2])],
            [mean(recall[..., 0, m]) for m in range(recall.shape[3])],
            [mean(recall[..., a, -1]) for a in range(1, recall.shape[2])])  # fmt: skip


def test_own_numbers_of_detections_and_areas_are_pycocotools(case):
    dataset, content, rows, found = case
    areas = {"tiny": (0, 400), "broad": (400, 1e10)}
    expected = judge(content, rows, IDS, maxDets=[2, 7, 30], areaRng=[[0, 1e10], *areas.values()],
                     areaRngLbl=["all", *areas])  # fmt: skip
    ap, classes, by_number, by_area = means(expected)
    scores = measure(dataset, found, max_dets=(30, 2, 7), areas=areas)
    assert list(scores) == ["AP", "AP50", "AP75", "APtiny", "APbroad", "AR2", "AR7", "AR30", "ARtiny", "ARbroad"]
    assert [scores[k] for k in ("AP", "APtiny", "APbroad")] == pytest.approx(ap, abs=1e-9)
    assert [scores[k] for k in ("AR2", "AR7", "AR30")] == pytest.approx(by_number, abs=1e-9)
    assert [scores[k] for k in ("ARtiny", "ARbroad")] == pytest.approx(by_area, abs=1e-9)
    judged = judge_dataset(dataset, found, (2, 7, 30), areas)
    assert [judged.scores(k)["AP"] for k in range(4)] == pytest.approx(classes, abs=1e-9, nan_ok=True)
    assert math.isnan(classes[3]) and len(set(classes[:3])) == 3  # the fourth has no object


@pytest.mark.parametrize("settings, message", [
    (dict(max_dets=()), "max_dets"), (dict(max_dets=(0, 5)), "max_dets"), (dict(max_dets=(1.5,)), "max_dets"),
    (dict(areas={"x": (5, 5)}), "areas: .*'x'"), (dict(areas={"x": (math.nan, 5)}), "areas"),
    (dict(areas={"9": (0, 5)}), "areas"),
])  # fmt: skip
def test_settings_out_of_range_are_named(case, settings, message):
    with pytest.raises(ValueError, match=message):
        measure(case[0], case[3], **settings)


def test_a_folder_that_cannot_be_written_to_is_named_before_the_first_picture(case):
    with pytest.raises(OSError, match="is no folder"):
        evaluate(Fixed([], NAMES), case[0], out=case[0].path)


def same(one: Predictions, other: Predictions) -> bool:
    columns = ("pictures", "images", "boxes", "scores", "labels")
    return all(np.array_equal(getattr(one, key), getattr(other, key)) for key in columns)


def shard_of(dataset, rows, places) -> Predictions:
    return predict(Fixed([rows[i] for i in places], NAMES), Subset(dataset, places))


def test_shards_count_every_picture_once(case):
    dataset, _, rows, whole = case
    count, expected = len(dataset), measure(*case[::3])
    # As DistributedSampler shares them out: the last shards begin again with the first pictures, so that all are as long.
    padded = [[i % count for i in range(rank, 5 * 3, 5)] for rank in range(5)]
    shards = [shard_of(dataset, rows, places) for places in padded]
    assert sum(map(len, shards)) > len(whole)
    merged = Predictions.merge(shards)
    assert same(merged, whole) and measure(dataset, merged) == expected
    assert same(Predictions.merge(shards[::-1]), whole) and same(Predictions.merge([whole, whole]), whole)
    with pytest.raises(ValueError, match=r"predictions: 2 of the 12 pictures were not looked at, .* number 6 "):
        measure(dataset, Predictions.merge([shards[0], *shards[2:]]))
    half = Subset(dataset, range(0, count, 2))
    assert measure(half, whole) == measure(half, shard_of(dataset, rows, half.indices)) != expected
    with pytest.raises(ValueError, match="each picture once"):
        evaluate(Fixed([], NAMES), Subset(dataset, [0, 0]))


def test_shards_of_pairs_keep_their_targets():
    image, side = torch.zeros(3, 8, 8, dtype=torch.uint8), [float(i + 4) for i in range(5)]
    pairs = [(image, dict(boxes=torch.tensor([[0, 0, side[i], 4]]), labels=torch.tensor([i % 2]))) for i in range(5)]
    rows = [[[0, 0, i + 4, 4, 0.9, i % 2]] for i in range(5)]
    shards = [
        predict(Fixed([rows[i] for i in places], ["a", "b"]), Subset(pairs, places)) for places in ([3, 1], [0, 2, 4])
    ]
    merged = Predictions.merge(shards)
    assert measure(pairs, merged)["AP"] == pytest.approx(100)
    assert measure(Subset(pairs, [4, 0]), merged)["AP"] == pytest.approx(100)
    assert [t["boxes"][0, 2].item() for t in merged.on([4, 0]).targets] == [8, 4]
    with pytest.raises(ValueError, match=r"targets\[1\]: expected labels in 0\.\.0"):
        evaluate(Fixed([[]] * 5, ["a"]), pairs)
    with pytest.raises(ValueError, match=r"model: expected labels in 0\.\.1, got 7"):
        evaluate(Fixed([[[0, 0, 1, 1, 0.9, 7]]] * 5, ["a", "b"]), pairs)


PROCESS = """
import sys
import torch.distributed as dist
from coco_judge import Fixed, crowded
from fastrcnn.data import CocoDataset
from fastrcnn.evaluation import evaluate
_, rank, store, path, out = sys.argv
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
rows, names = crowded(5)[1][int(rank)::2], ["c0", "c3", "c7", "c12"]
print(evaluate(Fixed(rows, names), CocoDataset(path), group=dist.group.WORLD, out=out)["AP"].hex())
if rank == "1":
    rows[1] = [[1.0, 2, 3, 4, 0.5, 99]]
try:
    evaluate(Fixed(rows, names), CocoDataset(path), group=dist.group.WORLD)
except ValueError as error:
    print(error)
"""


def test_processes_share_the_pictures_and_all_get_the_numbers(case, tmp_path):
    """Each looks at its own; what goes wrong in one ends all, and none waits for ever."""
    paths = tmp_path / "store", case[0].path, tmp_path / "out"
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), *map(str, paths)], stdout=subprocess.PIPE,
                                text=True, cwd=Path(__file__).parent) for rank in range(2)]  # fmt: skip
    said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert said == [[measure(case[0], case[3])["AP"].hex(), "model: expected labels in 0..3, got 99"]] * 2
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == len(case[3])


def test_a_model_finds_as_many_objects_as_are_counted():
    for name, head in (("r18_fpn", "roi_head"), ("retinanet_r18_fpn", "bbox_head")):
        most = lambda model, head=head: getattr(model, head).test_cfg["max_per_img"]  # noqa: E731
        model = tiny_model(name)
        assert [most(as_detector(model, max_dets=n).model) for n in (300, 10, 0)] == [300, 100, 100]
        assert most(model) == 100


def test_a_detector_that_finds_fewer_objects_than_are_counted_is_warned_of(tmp_path):
    data = open_dataset(cells(tmp_path, 2))
    detector = Detector(tiny(), device="cpu")
    with pytest.warns(
        UserWarning, match="max_dets: 300 detections a picture are to count, and this Detector gives 100"
    ):
        evaluate(detector, data, max_dets=(1, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(detector, data)
        evaluate(detector, data, max_dets=(1, 50))


def test_a_subset_of_a_subset_knows_where_its_pictures_lie(case):
    base, places = opened(Subset(Subset(case[0], [8, 6, 4, 2]), [3, 0]))
    assert base is case[0] and places == [2, 8]


def test_the_path_of_a_dataset_is_no_dataset(tmp_path):
    with pytest.raises(TypeError, match=r"dataset: expected .*open_dataset\('photos'\), got the path"):
        evaluate(tiny_model(), "photos")
    with pytest.raises(TypeError, match=r"val: expected .*open_dataset\('photos/val'\), got the path"):
        train(tiny_model(), [], val=tmp_path.joinpath("photos/val").relative_to(tmp_path))
