"""evaluation/diagnosis.py on cases worked out by hand: hotcoco's answers are checked before they are trusted."""

import numpy as np
import pytest
from test_voc import found, target

from fastrcnn.evaluation import diagnosis
from fastrcnn.evaluation.coco import judge, truth_of_targets
from fastrcnn.evaluation.predict import Predictions

A, B, C = [10.0, 10, 110, 110], [200.0, 200, 300, 300], [350.0, 20, 400, 70]
BESIDE_A, OVER_A = [60.0, 10, 160, 110], [15.0, 10, 115, 110]  # IoU 1/3 and 19/21


def judged(targets, results, classes=2):
    names = [f"class {i}" for i in range(classes)]
    return judge(truth_of_targets(targets, classes), Predictions.of(results, None, names), range(len(targets)), names)


BOTH = target(A, B, labels=[0, 1])
CASES = {  # targets of a picture, what is found in it, kinds of errors: gain in AP50 and count
    "all right": (BOTH, found(A, B, labels=[0, 1]), {}),
    # Class 1 is right at the second place: AP50 (0 + 1/2) / 2.
    "another class": (BOTH, found(A, B, labels=[1, 1]), dict(Cls=(75, 1))),
    "badly placed": (target(A), found(BESIDE_A), dict(Loc=(100, 1))),
    "class and place": (BOTH, found(BESIDE_A, B, labels=[1, 1]), dict(Both=(25, 1), Miss=(None, 1))),
    "found twice": (target(A), found(A, OVER_A), dict(Dupe=(0, 1))),
    "nothing there": (target(A), found(C, A), dict(Bkg=(50, 1))),
    # Half of the objects: 51 of COCO's 101 recalls are reached.
    "missed": (target(A, B), found(A), dict(Miss=(100 * 50 / 101, 1))),
    "in a crowd": (target(A, difficult=[B]), found(B, A), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_tide_tells_the_kinds_of_errors_apart(case):
    picture, detections, expected = CASES[case]
    errors = diagnosis.tide(judged([picture], [detections]))
    assert {kind: e["count"] for kind, e in errors.items() if e["count"]} == {k: n for k, (_, n) in expected.items()}
    for kind, (gain, _) in expected.items():
        assert gain is None or errors[kind]["dAP"] == pytest.approx(gain, abs=1e-6)


MATRICES = {  # rows are annotated, columns detected, last nothing
    "all right": [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
    "another class": [[0, 1, 0], [0, 1, 0], [0, 0, 0]],
    "badly placed": [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
    "found twice": [[1, 0, 0], [0, 0, 0], [1, 0, 0]],
    "missed": [[1, 0, 1], [0, 0, 0], [0, 0, 0]],
    "in a crowd": [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize("case", MATRICES)
def test_confusion_counts_objects_by_row(case):
    picture, detections, _ = CASES[case]
    pictures = [target(C, labels=[1]), picture]  # one more, on which nothing is sure
    sure = diagnosis.at_score(judged(pictures, [found(C, labels=[1], scores=[0.3]), detections]), 0.4)
    assert (diagnosis.confusion(sure) - [[0, 0, 0], [0, 0, 1], [0, 0, 0]]).tolist() == MATRICES[case]


def test_right_and_wrong_by_score():
    case = judged(
        [target(A, B), target(C)], [found(A, OVER_A, C, scores=[0.905, 0.305, 0.705]), found(C, scores=[0.405])], 1
    )
    by_score = diagnosis.by_score(case)
    assert {i: n for i, n in enumerate(by_score.right.tolist()) if n} == {90: 1, 40: 1}
    assert {i: n for i, n in enumerate(by_score.wrong.tolist()) if n} == {70: 1, 30: 1} and by_score.objects == 3
    assert by_score.precision[[0, 35, 50, 80]] == pytest.approx([1 / 2, 2 / 3, 1 / 2, 1]) and np.isnan(
        by_score.precision[95]
    )
    assert by_score.recall[[0, 35, 50, 80, 95]] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])
    assert by_score.f1[[0, 35, 80, 95]] == pytest.approx([4 / 7, 2 / 3, 1 / 2, 0])
    assert by_score.best == 0.36  # the middle of 0.31 ... 0.40
    error, bins = diagnosis.calibration(case)
    assert bins.tolist() == pytest.approx(np.array([[0.305, 0, 1], [0.405, 1, 1], [0.705, 0, 1], [0.905, 1, 1]]))
    assert error == pytest.approx((0.305 + 0.595 + 0.705 + 0.095) / 4)
    nothing = diagnosis.by_score(judged([target(A)], [found()], 1))
    assert nothing.best == 0.5 and nothing.right.sum() == nothing.wrong.sum() == 0


def test_precision_over_recall():
    case = judged([BOTH], [found(A, C, labels=[0, 1], scores=[0.9, 0.8])], 3)
    assert diagnosis.precision_recall(case, 0.5, 0).tolist() == pytest.approx([1] * 101)
    assert diagnosis.precision_recall(case, 0.5, 1).tolist() == [0] * 101
    assert diagnosis.precision_recall(case, 0.9).tolist() == pytest.approx(
        [0.5] * 101
    )  # of the two classes that have objects
    assert np.isnan(diagnosis.precision_recall(case, 0.5, 2)).all()
    assert np.isnan(diagnosis.precision_recall(judged([target()], [found(A)], 1), 0.5)).all()


def test_the_worst_pictures_come_first_with_what_went_wrong():
    pictures = [target(A), target(A, B), target(C), target(difficult=[A])]
    results = [found(A), found(C, A, labels=[0, 1]), found(), found(A)]
    worst, suspects = diagnosis.worst_pictures(diagnosis.at_score(judged(pictures, results), 0.4), 5)
    assert [one.picture for one in worst] == [1, 2]  # two wrong and two missed, one missed; a crowd is no error
    first = worst[0]
    assert first.right.tolist() == [False, False] and first.boxes.tolist() == [C, A] and first.labels.tolist() == [0, 1]
    assert first.missed.tolist() == [A, B] and first.missed_labels.tolist() == [0, 0]
    assert worst[1].missed.tolist() == [C] and not len(worst[1].boxes)
    told = [(s["picture"], s["found"], s["annotated"], round(s["iou"], 3)) for s in suspects]
    assert told == [(1, "class 0", None, 0), (1, "class 1", "class 0", 1)]
    assert [s["score"] for s in suspects] == pytest.approx([0.9, 0.5])
    assert diagnosis.worst_pictures(diagnosis.at_score(judged(pictures[:1], results[:1]), 0.4), 5) == ([], [])
