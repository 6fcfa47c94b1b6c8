"""uint8 images of several sizes to one batch of 800 x 1344, against torchvision's GeneralizedRCNNTransform on the same
device. The rival takes floats: with its conversion from bytes, and without it."""

import timing
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastrcnn.models.preprocess import resized_size
from fastrcnn.models.profiles import PROFILES
from fastrcnn.ops import preprocess, preprocess_reference

SIZES = [(480, 640), (427, 640), (540, 960), (720, 1280), (768, 1024), (600, 800), (1080, 1920), (960, 1280)]


def main() -> None:
    args = timing.arguments(__doc__)
    timing.require_kernel("preprocess", args.device)
    rates = timing.Rates(args.device)
    shrink = 8 if args.quick else 1
    short, long = 800 // shrink, 1333 // shrink
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (h // shrink, w // shrink, 3), dtype=torch.uint8, generator=g) for h, w in SIZES]
    images = [image.to(args.device).permute(2, 0, 1) for image in images]  # as a decoder leaves them
    floats = [image.float() / 255.0 for image in images]
    p = PROFILES["torchvision"]
    transform = GeneralizedRCNNTransform(short, long, list(p.mean), list(p.std))
    expected, _ = transform(floats)
    padded = tuple(expected.tensors.shape[2:])

    def from_bytes():
        return transform([image.float() / 255.0 for image in images])

    rivals = [("torchvision, from bytes", from_bytes), ("torchvision, from floats", lambda: transform(floats))]
    rows = []
    for profile in PROFILES.values():
        sizes = [resized_size(*image.shape[1:], short, long, profile.resize) for image in images]
        for dtype in (torch.float32, torch.bfloat16):

            def ours(profile=profile, sizes=sizes, dtype=dtype):
                return preprocess(images, sizes, padded, profile.mean, profile.std, profile.resize, profile.bgr, dtype)

            batch = ours()
            if profile is p:
                other, allowed = expected.tensors, 2**-7 * 3 if dtype == torch.bfloat16 else 1e-5
            else:  # torchvision has no such resize: the reference proves it, bit for bit
                rules = profile.mean, profile.std, profile.resize, profile.bgr, dtype
                other, allowed = preprocess_reference(images, sizes, padded, *rules), 0.0
            error = timing.check(profile.resize, (batch.float() - other.float()).abs().max().item(), allowed)
            moved = timing.count_bytes(*images) + timing.count_bytes(batch)
            for name, rival in rivals:
                times = timing.paired(ours, rival, args.device, args.quick, budget_s=3.0)
                shape = f"{len(images)} images to {padded[0]}x{padded[1]}, {profile.resize}"
                rows.append(timing.row("preprocess", shape, dtype, args.device, times[0], name, times[1],
                                       rates.floor_ms(moved), error))  # fmt: skip
    timing.report(rows, args)


if __name__ == "__main__":
    main()
