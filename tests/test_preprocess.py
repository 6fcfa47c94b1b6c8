import numpy as np
import pytest
import torch
from conftest import picture as cells
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastrcnn.models.preprocess import DataPreprocessor, resized_size
from fastrcnn.models.profiles import IMAGENET_MEAN, IMAGENET_STD, PROFILES
from fastrcnn.ops.preprocess import resize_opencv


def preprocessor(profile: str, min_size=192, max_size=256) -> DataPreprocessor:
    return DataPreprocessor(PROFILES[profile], min_size, max_size)


@pytest.mark.parametrize(
    "size, mmdet, torchvision, detectron2",
    [
        ((480, 640), (800, 1067), (800, 1066), (800, 1067)),  # 1066.67
        ((427, 640), (800, 1199), (800, 1199), (800, 1199)),  # 1199.06
        ((500, 375), (1067, 800), (1066, 800), (1067, 800)),
        ((333, 500), (800, 1201), (800, 1201), (800, 1201)),
        ((400, 800), (667, 1333), (666, 1333), (667, 1333)),  # the long side decides
        ((800, 800), (800, 800), (800, 800), (800, 800)),
        ((2160, 3840), (750, 1333), (749, 1333), (750, 1333)),
        ((1, 10000), (1, 1333), (1, 1333), (1, 1333)),  # a pixel at least
        ((20000, 1), (1333, 1), (1333, 1), (1333, 1)),
    ],
)
def test_sizes(size, mmdet, torchvision, detectron2):
    assert resized_size(*size, 800, 1333, "opencv") == mmdet
    assert resized_size(*size, 800, 1333, "interpolate") == torchvision
    assert resized_size(*size, 800, 1333, "pillow") == detectron2


def test_detectron2s_sizes_to_the_last_pixel():
    def shortest_edge(height, width, short, longest):  # Detectron2's ResizeShortestEdge.get_output_shape
        scale = short / min(height, width)
        h, w = (float(short), scale * width) if height < width else (scale * height, float(short))
        if max(h, w) > longest:
            scale = longest * 1.0 / max(h, w)
            h, w = h * scale, w * scale
        return int(h + 0.5), int(w + 0.5)

    sizes = [(h, w) for h in range(50, 1000, 6) for w in range(50, 1400, 6)]
    wrong = [s for s in sizes if resized_size(*s, 800, 1333, "pillow") != shortest_edge(*s, 800, 1333)]
    assert wrong == []


@pytest.mark.parametrize("size", [(480, 640), (151, 333), (640, 480), (97, 61), (192, 256), (200, 200), (40, 500)])
def test_torchvisions_batch_bit_for_bit(size, device, two_threads):
    image = cells(*size).to(device) / 255.0
    transform = GeneralizedRCNNTransform(192, 256, list(IMAGENET_MEAN), list(IMAGENET_STD))
    expected, _ = transform([image])
    batch, sizes, factors = preprocessor("torchvision")([image])
    assert torch.equal(batch, expected.tensors)
    assert sizes.tolist() == [list(s) for s in expected.image_sizes]
    assert factors[0].tolist() == pytest.approx([sizes[0, 1].item() / size[1], sizes[0, 0].item() / size[0]])


def test_torchvisions_mixed_batch_bit_for_bit(two_threads):
    images = [cells(h, w) / 255.0 for h, w in ((120, 160), (333, 200), (90, 240))]
    expected, _ = GeneralizedRCNNTransform(192, 256, list(IMAGENET_MEAN), list(IMAGENET_STD))(images)
    batch, sizes, _ = preprocessor("torchvision")(images)
    assert torch.equal(batch, expected.tensors)
    assert sizes.tolist() == [list(s) for s in expected.image_sizes]


def test_resize_known_values_of_opencv():
    # cv2.resize(image, (5, 5)), OpenCV 5.0: a row on the border is cut off twice, so that 99 becomes 98.
    image = torch.tensor([[[95, 130], [194, 217]]], dtype=torch.uint8)
    expected = [[95, 98, 112, 126, 130], [105, 108, 122, 135, 138], [145, 147, 159, 170, 174]]
    expected += [[184, 186, 196, 206, 208], [194, 196, 205, 215, 217]]
    assert resize_opencv(image, (5, 5))[0].tolist() == expected
    p = DataPreprocessor(PROFILES["mmdet"], 5, 5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    batch, _, _ = p([image.expand(3, 2, 2)])
    assert batch[0, :, :5, :5].tolist() == [expected] * 3


@pytest.mark.parametrize("size", [(480, 640), (151, 333), (97, 61)])
def test_the_pillow_profile_resizes_as_pillow(size):
    image = cells(*size)
    batch, sizes, _ = preprocessor("detectron2")([image])
    height, width = sizes[0].tolist()
    bgr = batch[0, :, :height, :width] + torch.tensor(PROFILES["detectron2"].mean)[:, None, None]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).flip(0).float()
    assert (bgr - expected).abs().max() < 1.01


def test_mmdetections_values_by_hand():
    image = cells(192, 256)  # already of the network's size
    batch, _, _ = preprocessor("mmdet")([image])
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (image.float() - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(batch[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "profile, expected",
    [
        ("mmdet", [(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375]),
        ("torchvision", [(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225]),
        ("detectron2", [50 - 103.53, 100 - 116.28, 200 - 123.675]),  # blue first
    ],
)
def test_one_colour_in_each_peers_network(profile, expected):
    orange = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    batch, _, _ = preprocessor(profile, 32, 32)([orange])
    assert batch.shape == (1, 3, 32, 32)
    for channel, value in zip(batch[0], expected):
        torch.testing.assert_close(channel, torch.full((32, 32), value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "profile, unit, expected",
    [
        ("mmdet", 1.0, 16),  # the mean of the middle columns, 15.5, as a byte
        ("torchvision", 1 / 255, 15.5),  # the same, but of floats
        ("detectron2", 1.0, 59),  # all columns count, by 5, 7, 7 and 5 parts of 24: 59.04 as a byte
    ],
)
def test_one_picture_made_smaller_by_each_peer(profile, unit, expected):
    image = torch.tensor([0, 10, 21, 240], dtype=torch.uint8).expand(3, 4, 4)
    p = DataPreprocessor(PROFILES[profile], 1, 1, mean=(0.0, 0.0, 0.0), std=(unit, unit, unit))
    batch, sizes, _ = p([image])
    assert sizes.tolist() == [[1, 1]]
    assert batch[0, :, 0, 0].tolist() == pytest.approx([expected] * 3)


def test_the_caffe_input_is_bgr_without_a_deviation():
    caffe = dict(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
    p, image = DataPreprocessor(PROFILES["mmdet"], 192, 256, **caffe), cells(192, 256)
    batch, _, _ = p([image])
    expected = image.flip(0).float() - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    torch.testing.assert_close(batch[0], expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("profile", ["mmdet", "detectron2", "torchvision"])
def test_bytes_and_floats_agree(profile):
    image = cells(97, 131)
    a, b = preprocessor(profile)([image])[0], preprocessor(profile)([image / 255.0])[0]
    assert torch.equal(a, b)


@pytest.mark.parametrize("profile", ["mmdet", "detectron2", "torchvision"])
def test_padding_is_zero_and_follows_normalisation(profile):
    batch, sizes, _ = preprocessor(profile)([cells(100, 120), cells(150, 80)])
    assert batch.shape[2] % 32 == batch.shape[3] % 32 == 0
    assert (batch.shape[2] - 32 < sizes[:, 0].max()) and (batch.shape[3] - 32 < sizes[:, 1].max())
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for row, (height, width) in zip(batch, sizes.tolist()):
        assert not row[:, height:].any() and not row[:, :, width:].any()
        assert row[:, :height, :width].abs().min(0).values.max() > 0
        assert row[:, height - 1, width - 1].any()


def test_dtype_own_statistics_and_scale_factors():
    p = DataPreprocessor(PROFILES["mmdet"], 64, 128, mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 4.0))
    batch, sizes, factors = p([torch.full((3, 32, 64), 11, dtype=torch.uint8)], torch.bfloat16)
    assert batch.dtype == torch.bfloat16 and sizes.tolist() == [[64, 128]]
    assert batch[0, :, 0, 0].tolist() == [5.0, 4.5, 2.0]
    assert factors.dtype == torch.float32 and factors.tolist() == [[2.0, 2.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["mmdet", "detectron2", "torchvision"])
def test_waits_for_nothing_on_a_gpu(profile, need_kernel):
    need_kernel("preprocess", "cuda")
    images = [cells(100, 120), cells(150, 80)]
    expected = preprocessor(profile)(images)
    images = [image.cuda() for image in images]
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = preprocessor(profile)(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(actual, expected):
        assert a.is_cuda and torch.equal(a.cpu(), b)


@pytest.mark.parametrize(
    "image, error",
    [
        (torch.zeros(1, 32, 32), ValueError),
        (torch.zeros(3, 32), ValueError),
        (torch.zeros(3, 0, 32), ValueError),
        (np.zeros((3, 32, 32), np.float32), ValueError),
        (torch.zeros(3, 32, 32, dtype=torch.int64), TypeError),
    ],
)
def test_a_wrong_image_is_named(image, error):
    with pytest.raises(error, match=r"images\[1\]"):
        preprocessor("mmdet")([torch.zeros(3, 32, 32), image])
