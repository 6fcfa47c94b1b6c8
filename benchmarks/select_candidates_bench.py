"""The best scores above a threshold against torch: a mask, its indices and a stable sort, which the host waits for."""

from functools import partial

import timing
import torch

from fastrcnn import ops


def rival(scores: torch.Tensor, threshold: float, most: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for row in scores:
        index = (row > threshold).nonzero()[:, 0]
        best = row[index].sort(descending=True, stable=True)
        found.append((best.values[:most], index[best.indices[:most]]))
    return found


def bench(name, shape, threshold, most, args, rates):
    # As softmax and sigmoid give them: few are large.
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)).pow(40).to(args.device)
    ours, theirs = (partial(f, scores, threshold, most) for f in (ops.select_candidates, rival))
    values, indices, counts, _ = ours()
    for i, (expected, index) in enumerate(theirs()):
        same = torch.equal(indices[i, : counts[i]], index) and torch.equal(values[i, : counts[i]], expected)
        timing.check(f"{name}: what is selected", int(not same), 0)
    times = timing.paired(ours, theirs, args.device, args.quick, budget_s=2.0)
    floor = rates.floor_ms(timing.count_bytes(scores, values, indices))
    return timing.row("select_candidates", name, scores.dtype, args.device, times[0], "torch", times[1], floor, 0.0)


def main() -> None:
    args = timing.arguments(__doc__)
    timing.require_kernel("select_candidates", args.device)
    rates = timing.Rates(args.device)
    cases = [("one image, 1,000 proposals x 80", (1, 80_000), 0.05, 16384),
             ("8 images, 1,000 proposals x 80", (8, 80_000), 0.05, 16384),
             ("RetinaNet's finest level, 100 x 168 x 9 x 80", (1, 12_096_000), 0.05, 1000)]  # fmt: skip
    if args.quick:
        cases = [("4 x 5,000", (4, 5000), 0.05, 100)]
    timing.report([bench(*case, args, rates) for case in cases], args)


if __name__ == "__main__":
    main()
