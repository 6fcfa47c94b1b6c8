"""The first fifty steps of a training beside torchvision's own loop: ResNet-50-FPN in float64, the same weights, pictures
and samples, with momentum, decay, clipping, warm-up and two drops of the rate.

    python benchmarks/training_parity.py --out FOLDER

Prints the largest relative difference of the losses, of the norm of the gradients and of the rate, step by step; exit
status 1 where one is above 1e-6. tests/test_training_parity.py does the same with six steps of a smaller body.
"""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_training_parity import sample_the_first, worst
from training_stubs import cells

from fastrcnn.data import open_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the pictures and our run")
    parser.add_argument("--epochs", type=int, default=17, help="of three steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_dataset(cells(args.out / "pictures", 5))
    with pytest.MonkeyPatch.context() as patch:
        sample_the_first(patch)
        drops = (args.epochs // 2, args.epochs * 3 // 4)
        differences = worst(data, args.epochs, drops, args.out / "run", "resnet50")
    for step, difference in enumerate(differences):
        print(f"step {step}: {difference:.1e}")
    print(f"{len(differences)} steps, the largest difference {max(differences):.1e}")
    raise SystemExit(max(differences) > 1e-6)


if __name__ == "__main__":
    main()
