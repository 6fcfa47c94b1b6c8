import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn.data import ImageError, as_image, list_images, read_image
from fastrcnn.data.rendered_cells import render_cells


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return render_cells(3, 40, 60)[0]


def saved(path: Path, picture: np.ndarray, mode: str = "RGB", **options) -> Path:
    Image.fromarray(picture).convert(mode).save(path, **options)
    return path


def pillow(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "A.PNG"])
def test_lossless_formats_are_read_exactly(tmp_path, picture, name):
    options = dict(lossless=True) if name.endswith("webp") else {}
    image = read_image(saved(tmp_path / name, picture, **options))
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    assert torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1))


def test_jpeg_is_read_as_pillow_reads_it(tmp_path, picture):
    path = saved(tmp_path / "a.jpg", picture, quality=90)
    assert (read_image(path).int() - pillow(path).int()).abs().max() <= 3  # decoders differ in the last bits


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    # Four flat quarters, so that the turned picture is known and JPEG changes nothing.
    quarters = np.zeros((32, 48, 3), np.uint8)
    quarters[:16, :24], quarters[:16, 24:], quarters[16:, :24], quarters[16:, 24:] = 30, 90, 160, 230
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a{suffix}", quarters, exif=exif)
    flips = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    expected = quarters.transpose(1, 0, 2) if orientation > 4 else quarters
    expected = expected[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
    image = read_image(path)
    assert image.shape[1:] == expected.shape[:2]
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_png_modes_become_rgb(tmp_path, picture, mode):
    path = saved(tmp_path / "a.png", picture, mode)
    image = read_image(path)
    assert image.shape == (3, 40, 60) and torch.equal(image, pillow(path))


def test_the_alpha_channel_is_dropped_not_blended(tmp_path):
    transparent = np.full((8, 8, 4), 200, np.uint8)
    transparent[..., 3] = 0
    Image.fromarray(transparent).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 200).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_pictures_keep_their_high_byte(tmp_path, suffix):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    expected = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert (read_image(path).int() - expected.int()).abs().max() <= 1


def test_a_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (12, 10), c) for c in ((200, 10, 20), (0, 0, 250))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image = read_image(tmp_path / "a.gif")
    assert image.shape == (3, 10, 12) and image[:, 5, 5].tolist() == [200, 10, 20]


def test_a_cmyk_jpeg_is_rgb(tmp_path, picture):
    path = saved(tmp_path / "a.jpg", picture, "CMYK", quality=95)
    assert (read_image(path).float() - pillow(path).float()).abs().mean() < 6


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".gif"])
def test_a_truncated_file_is_an_image_error(tmp_path, picture, suffix):
    path = saved(tmp_path / f"a{suffix}", picture)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=f"a{suffix}"):
        read_image(path)


@pytest.mark.parametrize(
    "content, reason", [(b"", "empty"), (b"hello", "not .*image"), (bytes(range(256)), "not .*image")]
)
def test_a_file_that_is_no_image_is_an_image_error(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"a\.jpg.*{reason}") as error:
        read_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.jpg.*No such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


def test_an_address_is_read_and_its_failure_named(tmp_path, picture, monkeypatch):
    data = saved(tmp_path / "a.png", picture).read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(data))
    assert torch.equal(read_image("https://example.com/a.png"), torch.from_numpy(picture).permute(2, 0, 1))

    def time_out(url, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", time_out)
    with pytest.raises(ImageError, match=r"https://example\.com/a\.png.*timed out"):
        read_image("https://example.com/a.png")


def test_arrays_tensors_and_pil_images_agree(tmp_path, picture):
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    path = saved(tmp_path / "a.png", picture)
    sources = [path, str(path), picture, picture[:, ::-1][:, ::-1], picture / np.float32(255), picture / 255.0]
    sources += [expected, expected / 255.0, expected.double() / 255.0, Image.fromarray(picture)]
    for source in sources:
        image = as_image(source)
        assert image.dtype == torch.uint8 and torch.equal(image, expected)


def test_grey_arrays_tensors_and_pil_images(picture):
    grey = picture[..., 0]
    expected = torch.from_numpy(grey.copy()).expand(3, -1, -1)
    for source in (grey, grey[..., None], expected[:1], Image.fromarray(grey)):
        assert torch.equal(as_image(source), expected)


def test_floats_are_clamped_to_the_range_of_bytes():
    assert as_image(torch.tensor([[[-0.2, 0.5, 1.7]]]))[0, 0].tolist() == [0, 128, 255]


def test_a_pil_image_with_a_palette_or_alpha(picture):
    for mode in ("P", "RGBA", "L"):
        image = Image.fromarray(picture).convert(mode)
        assert torch.equal(as_image(image), torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


@pytest.mark.parametrize(
    "source, error",
    [
        (None, TypeError),
        (17, TypeError),
        ([[1, 2], [3, 4]], TypeError),
        (b"bytes", TypeError),
        (np.zeros((4, 5, 2), np.uint8), ValueError),
        (np.zeros((3, 40, 60), np.uint8), ValueError),  # channels first
        (np.zeros((4, 5, 3), np.int64), TypeError),
        (np.zeros((0, 5, 3), np.uint8), ValueError),
        (torch.zeros(40, 60, 3), ValueError),  # channels last
        (torch.zeros(1, 3, 4, 5), ValueError),
        (torch.zeros(3, 4, 5, dtype=torch.bool), TypeError),
    ],
)
def test_other_things_are_refused_by_name(source, error):
    with pytest.raises(error, match=r"images\[4\]"):
        as_image(source, "images[4]")


def test_listing_a_folder_a_pattern_and_a_file(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.txt", "d.tiff", "e.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "inner.jpg").touch()
    at = lambda *names: [str(tmp_path / n) for n in names]  # noqa: E731
    assert list_images(tmp_path) == at("a.PNG", "b.jpg", "d.tiff", "e.webp")
    assert list_images(tmp_path / "*.jpg") == at("b.jpg", "folder.jpg")
    assert list_images(tmp_path / "**" / "inner.jpg") == at("folder.jpg/inner.jpg")
    assert list_images(tmp_path / "c.txt") == at("c.txt")
    assert list_images(tmp_path / "none.jpg") == at("none.jpg")  # reading it says what is wrong
    assert list_images(tmp_path / "no*.jpg") == []
    assert list_images("https://example.com/a.jpg?size=*") == ["https://example.com/a.jpg?size=*"]


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "a[1].jpg").touch()
    assert list_images(tmp_path / "a[1].jpg") == [str(tmp_path / "a[1].jpg")]
