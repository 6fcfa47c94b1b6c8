"""Grey, 16-bit and other channel counts than three, from the file to the detection."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import picture, tiny_options
from PIL import Image

from fastrcnn import Detector
from fastrcnn.data import ImageError, as_image, batches, open_dataset, read_image
from fastrcnn.data.images import read_size
from fastrcnn.evaluation import evaluate, evaluate_proposals, predict, write_evaluation
from fastrcnn.models.build import merge
from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile
from fastrcnn.ops import preprocess, preprocess_reference
from fastrcnn.weights import infer_model, save
from fastrcnn.weights.named import named_model

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
FOUR = RNG.integers(0, 256, (20, 30, 4), dtype=np.uint8)
SIX = RNG.integers(0, 256, (20, 30, 6), dtype=np.uint8)


def planes(array):
    array = array[:, :, None] if array.ndim == 2 else array
    found = torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)
    return found / 65535 if array.dtype == np.uint16 else found / 255


@pytest.fixture
def files(tmp_path):
    """name: (channels, what it holds)"""
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    Image.fromarray(DEEP).save(tmp_path / "deep.tif")
    Image.fromarray(DEEP.astype(np.float32) / 65535).save(tmp_path / "float.tif")
    Image.fromarray(FOUR).save(tmp_path / "four.png")
    Image.fromarray(FOUR[:, :, :2], "LA").save(tmp_path / "two.png")
    pages = [Image.fromarray(DEEP + k) for k in range(5)]
    pages[0].save(tmp_path / "five.tif", save_all=True, append_images=pages[1:])
    np.save(tmp_path / "six.npy", SIX)
    np.save(tmp_path / "one.npy", DEEP)
    five = np.stack([DEEP + k for k in range(5)], 2)
    return tmp_path, {"grey.png": GREY, "deep.png": DEEP, "deep.tif": DEEP, "float.tif": DEEP, "four.png": FOUR,
                      "two.png": FOUR[:, :, :2], "five.tif": five, "six.npy": SIX, "one.npy": DEEP}  # fmt: skip


def test_files_keep_their_channels_and_bits(files):
    folder, held = files
    for name, array in held.items():
        expected = planes(array)
        image = read_image(folder / name, len(expected))
        assert image.dtype == (torch.uint8 if array.dtype == np.uint8 else torch.float32), name
        torch.testing.assert_close(
            image.double() / (255 if image.dtype == torch.uint8 else 1), expected, rtol=0, atol=1e-7
        )
        assert read_image(folder / name, None).shape == ((1, 20, 30) if name == "five.tif" else expected.shape)
        if name.endswith((".png", "deep.tif")):
            assert read_image(folder / name).shape == (3, 20, 30)  # RGB, 8 bits, as ever
    with pytest.raises(ImageError, match=r"four\.png: expected 5 channels, got 4"):
        read_image(folder / "four.png", 5)
    with pytest.raises(ImageError, match=r"six\.npy: expected 4 channels, got an array"):
        read_image(folder / "six.npy", 4)
    assert read_image(folder / "four.png", 1).shape == (1, 20, 30)  # any picture has a grey


@pytest.mark.parametrize("damage", [lambda d: d[:90], lambda d: d + b"x", lambda d: d.replace(b"|u1", b"|O "),
                                    lambda d: d.replace(b"(20, 30, 6)", b"(10**9,6,)"), lambda d: d[:6]])  # fmt: skip
def test_damaged_arrays_are_refused(tmp_path, damage):
    np.save(tmp_path / "a.npy", SIX)
    (tmp_path / "a.npy").write_bytes(damage((tmp_path / "a.npy").read_bytes()))
    with pytest.raises(ImageError, match=r"a\.npy: damaged array"):
        read_image(tmp_path / "a.npy", 6)


@pytest.mark.parametrize("shape", [(), (12,), (2, 3, 4, 5)])
def test_an_array_that_is_no_picture_is_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    for read in (read_size, lambda path: read_image(path, None)):
        with pytest.raises(ImageError, match=r"a\.npy: damaged array \(expected \[H, W\] or \[H, W, C\]"):
            read(tmp_path / "a.npy")


def test_the_size_of_an_array_is_read_from_its_head(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(5000, 6000, 30)))
        file.truncate(file.tell() + 5000 * 6000 * 30)  # a hole: nothing that is worth reading
    tracemalloc.start()
    assert read_size(tmp_path / "a.npy") == (5000, 6000)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_arrays_and_tensors():
    assert torch.equal(as_image(SIX, channels=6), torch.from_numpy(SIX).permute(2, 0, 1))
    torch.testing.assert_close(as_image(DEEP, channels=1).double(), planes(DEEP), rtol=0, atol=1e-7)
    deep = torch.from_numpy(DEEP)[None]
    torch.testing.assert_close(as_image(deep, channels=1).double(), planes(DEEP), rtol=0, atol=1e-7)
    for wrong, message in (
        (SIX, "expected 4 channels"),
        (torch.zeros(3, 5, 5), r"\[4, H, W\], got \[3, 5, 5\]"),
        (torch.full((4, 5, 5), 1.5), r"floats in 0\.\.1"),
        (torch.zeros(4, 5, 5).int(), "uint8, uint16"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            as_image(wrong, channels=4)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("rule", ["opencv", "interpolate", "pillow"])
def test_each_channel_is_preprocessed_as_one_of_three(channels, rule):
    """The result of each channel is that of a grey picture of three equal channels, whose own test has the peers."""
    images = [
        torch.from_numpy(RNG.integers(0, 256, (channels, *size), dtype=np.uint8)) for size in ((20, 30), (25, 17))
    ]
    mean, std = [0.1 * (k + 1) for k in range(channels)], [0.5 + 0.1 * k for k in range(channels)]
    how = [(15, 22), (31, 20)], (32, 32)
    for op in (preprocess, preprocess_reference):
        batch = op(images, *how, mean, std, rule)
        assert batch.shape == (2, channels, 32, 32) and batch.is_contiguous(memory_format=torch.channels_last)
        for c in range(channels):
            alone = op([x[c : c + 1].expand(3, -1, -1) for x in images], *how, [mean[c]] * 3, [std[c]] * 3, rule)
            assert torch.equal(batch[:, c], alone[:, 0])
    with pytest.raises(ValueError, match=f"bgr: expected False for images of {channels} channels"):
        preprocess(images, *how, mean, std, rule, bgr=True)
    with pytest.raises(ValueError, match=rf"images\[0\]: expected a dense tensor \[{channels + 1}, H, W\]"):
        preprocess(images, *how, [0.0] * (channels + 1), [1.0] * (channels + 1), rule)


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_sixteen_bits_reach_the_network(profile):
    """Values that differ below the eighth bit: a byte would lose them."""
    pixels = DataPreprocessor(get_profile(profile), 20, 100, in_channels=1, pad_size_divisor=1)
    fine = torch.arange(600, dtype=torch.float32).reshape(1, 20, 30) / 65535
    batch = pixels([fine])[0]
    assert batch.shape == (1, 1, 20, 30) and len(batch.unique()) == 600
    unit = 255 if pixels.profile.resize != "interpolate" else 1
    torch.testing.assert_close(batch[0], (fine * unit - pixels.mean[0]) / pixels.std[0], rtol=1e-5, atol=1e-5)
    mean = get_profile(profile).mean
    assert pixels.mean == (pytest.approx(sum(mean) / 3),) and not pixels.bgr
    with pytest.raises(ValueError, match="mean: expected one for each of 1 channels"):
        DataPreprocessor(get_profile(profile), mean=(1.0, 2, 3), in_channels=1)


@pytest.mark.parametrize("channels, profile", [(1, "mmdet"), (5, "detectron2"), (4, "torchvision")])
def test_from_a_file_through_training_and_back(tmp_path, channels, profile):
    rgb = picture(64, 96, seed=3)
    array = torch.cat([rgb, rgb.flip(0)])[:channels].permute(1, 2, 0).numpy()
    images = []
    (tmp_path / "images").mkdir()
    for n in range(2):
        np.save(tmp_path / "images" / f"{n}.npy", array)
        images.append(dict(id=n, file_name=f"{n}.npy", width=96, height=64))
    boxes = [dict(id=n, image_id=n, category_id=1, bbox=[5, 5, 30, 30]) for n in range(2)]
    content = dict(images=images, annotations=boxes, categories=[dict(id=1, name="cell")])
    (tmp_path / "a.json").write_text(json.dumps(content))
    mean = dict(mean=[100.0 + c for c in range(channels)], std=[50.0] * channels)
    mean = {k: [v / 255 for v in values] for k, values in mean.items()} if profile == "torchvision" else mean
    model = named(channels, profile, mean)
    dataset = open_dataset(tmp_path)
    dataset.channels = channels
    ((pictures, targets, _),) = batches(dataset, 2, seed=0, epoch=0)
    assert pictures[0].shape == (channels, 64, 96)
    sum(model.train()(pictures, model.outside(targets)).values()).backward()
    assert model.backbone.conv1.weight.grad.abs().amax((0, 2, 3)).min() > 0  # every channel counts
    path = save(model.eval(), tmp_path / "model.safetensors")
    again = infer_model(path)
    assert again.data_preprocessor.in_channels == channels
    assert again.data_preprocessor.mean == pytest.approx(mean["mean"])
    ours, theirs = (
        Detector(m, device="cpu", score_threshold=0.0)(tmp_path / "images" / "0.npy")[0] for m in (model, again)
    )
    assert len(ours) > 0 and torch.equal(ours.boxes, theirs.boxes)
    assert ours.draw(pictures[0]).shape == (3, 64, 96)
    fresh = open_dataset(tmp_path)  # nobody has told it of the channels
    assert 0 <= evaluate(model, fresh)["AP"] <= 100 and fresh.channels == channels
    assert 0 <= evaluate_proposals(model, open_dataset(tmp_path))["AR@1000"] <= 100
    pairs = [dataset[i] for i in range(2)]
    write_evaluation(tmp_path / "pairs", pairs, predict(model, pairs))  # without pictures, which have no colours
    with pytest.raises(ValueError, match=rf"images\[0\]: expected {channels} channels"):
        Detector(model, device="cpu")(np.zeros((20, 30, channels + 1), np.uint8))


def test_bytes_and_floats_of_one_shape_are_no_batch(monkeypatch):
    """What is resized by another rule would change the bytes' pixels."""
    detector = Detector(named(4, "mmdet", {}), device="cpu")
    seen, start = [], detector._start
    monkeypatch.setattr(detector, "_start", lambda images: seen.append([x.dtype for x in images]) or start(images))
    bytes_ = torch.from_numpy(RNG.integers(0, 256, (4, 50, 70), dtype=np.uint8))
    detector([bytes_, bytes_ / 255, bytes_], batch_size=2)
    assert seen == [[torch.uint8, torch.uint8], [torch.float32]]


def named(channels, profile, pixels):
    options = merge(
        tiny_options(), dict(backbone=dict(in_channels=channels, frozen_stages=-1), data_preprocessor=pixels)
    )
    torch.manual_seed(0)
    return named_model("r18_fpn", 1, profile, **options)
