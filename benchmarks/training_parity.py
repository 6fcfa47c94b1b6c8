"""The first fifty steps of a training: ResNet-50-FPN in float64, the same weights, pictures and samples, with momentum,
decay, clipping, warm-up and two drops of the rate, beside torchvision's own model and loop, or beside a plain loop with
MMDetection's and Detectron2's formulas (tests/plain_training.py).

    python benchmarks/training_parity.py torchvision|mmdet|detectron2 --out FOLDER

Both sides take the batches that our preprocessing makes, which works in float32. Prints the largest relative difference of
the losses, of the norm of the gradients and of the rate, step by step; exit status 1 where one is above 1e-6.
tests/test_training_parity.py does the same in four steps of a smaller body and torchvision's preprocessing.
"""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_training_parity import SIZES, beside_the_plain_one, beside_torchvision, sample_the_first
from training_stubs import cells

from fastrcnn.data import open_dataset
from fastrcnn.models import faster_rcnn
from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", choices=("torchvision", "mmdet", "detectron2"))
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the pictures and our run")
    parser.add_argument("--epochs", type=int, default=17, help="of three steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_dataset(cells(args.out / "pictures", 5))
    run = data, args.epochs, (args.epochs // 2, args.epochs * 3 // 4), args.out / "run"
    with pytest.MonkeyPatch.context() as patch:
        sample_the_first(patch)
        if args.profile == "torchvision":
            pictures = DataPreprocessor(get_profile("torchvision"), **SIZES)
            found = beside_torchvision(*run, "resnet50", lambda images: pictures(images)[0].double())
        else:
            torch.manual_seed(0)
            found = beside_the_plain_one(*run, faster_rcnn("r50_fpn", 3, args.profile, **SIZES))
    for step, difference in enumerate(found):
        print(f"step {step}: {difference:.1e}")
    print(f"{len(found)} steps, the largest difference {max(found):.1e}")
    raise SystemExit(max(found) > 1e-6)


if __name__ == "__main__":
    main()
