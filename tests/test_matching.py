"""models/matching.py: what assigner dicts say beyond `ops.match_boxes`."""

import torch

from fastrcnn.models.matching import assign, check_assigner
from fastrcnn.models.profiles import get_profile


def test_an_image_without_boxes_is_background_whatever_the_lower_threshold():
    anchors, none = torch.tensor([[0.0, 0, 9, 9], [20, 20, 30, 30]]), dict(boxes=torch.zeros(0, 4))
    rules = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=(0.1, 0.5), match_low_quality=False)
    one = dict(boxes=torch.tensor([[0.0, 0, 9, 9]]))
    matches, _ = assign(anchors, [none, one], check_assigner(rules), get_profile("mmdet"))
    assert matches.tolist() == [[-1, -1], [0, -2]]  # beside a box, what overlaps too little is left out


def test_only_the_first_best_anchor_of_a_box_where_the_assigner_says_so():
    twins = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [40, 40, 50, 50], [80, 80, 90, 90]])
    target = [
        dict(
            boxes=torch.tensor([[0.0, 0, 10, 20], [41, 41, 52, 52]]),
            ignore_boxes=torch.tensor([[39.0] * 2 + [51.0] * 2]),
        )
    ]
    rules = dict(type="MaxIoUAssigner", pos_iou_thr=0.9, neg_iou_thr=0.3, min_pos_iou=0.3)
    for options, expected in (({}, [0, 0, 1, -1]), (dict(gt_max_assign_all=False), [0, -2, 1, -1]),
                              (dict(gt_max_assign_all=False, ignore_iof_thr=0.5), [0, -2, -2, -1])):  # fmt: skip
        matches, _ = assign(twins, target, check_assigner({**rules, **options}), get_profile("mmdet"))
        assert matches.tolist() == [expected]
