import io
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    assert torch.equal(read_image(path), pillow(path))


def test_a_jpeg_does_not_need_torchvisions_decoder(tmp_path, picture, monkeypatch):
    path = saved(tmp_path / "a.jpg", picture, quality=90)
    expected = read_image(path)
    monkeypatch.setattr("fastrcnn.data.decode._jpeg", lambda data: None)
    assert torch.equal(read_image(path), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
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
    for image in (read_image(path), as_image(Image.open(path))):
        assert image.shape[1:] == expected.shape[:2]
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 8


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
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def damaged_png() -> bytes:
    """8 x 8 pixels, a row of which has a filter that does not exist."""
    rows = b"".join((b"\x09" if y == 3 else b"\0") + bytes(24) for y in range(8))
    parts = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_damaged_png_does_not_end_the_process(tmp_path):
    (tmp_path / "a.png").write_bytes(damaged_png())
    with pytest.raises(ImageError, match=r"a\.png.*damaged"):
        read_image(tmp_path / "a.png")


def test_damaged_exif_data_does_not_spoil_a_picture(tmp_path, picture):
    saved(tmp_path / "a.png", picture, exif=b"Exif\0\0MM\0*\xff\xff\xff")
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(picture).permute(2, 0, 1))


def claims(kind: str) -> bytes:
    """A file of some hundred bytes that claims 12,000 x 12,000 pixels."""
    file, options = io.BytesIO(), dict(compression="tiff_lzw") if kind == "TIFF" else {}
    Image.new("L", (16, 16)).save(file, kind, **options)
    data = bytearray(file.getvalue())
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", 12_000, 12_000)
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 12_000, 12_000)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", 12_000, 12_000)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 12_000, 12_000)
    else:
        for tag in (256, 257):
            at = data.index(struct.pack("<HHIH", tag, 3, 1, 16)) + 8
            data[at : at + 2] = struct.pack("<H", 12_000)
    return bytes(data)


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own, about the same
@pytest.mark.parametrize("kind", ["GIF", "JPEG", "PNG", "BMP", "TIFF"])
def test_the_size_is_bounded_before_a_picture_is_decoded(tmp_path, kind, monkeypatch):
    (tmp_path / "a").write_bytes(claims(kind))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("fastrcnn.data.decode._jpeg", lambda data: pytest.fail("decoded"))
    for source in (tmp_path / "a", lambda: Image.open(tmp_path / "a")):
        with pytest.raises(ImageError, match=r"pixels.*limit"):
            as_image(source() if callable(source) else source)


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_limit_is_the_users(tmp_path, picture, monkeypatch):
    path = saved(tmp_path / "a.png", picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)
    with pytest.raises(ImageError, match=r"60 x 40 pixels.*2,399.*FASTRCNN_MAX_PIXELS"):
        read_image(path)
    monkeypatch.setenv("FASTRCNN_MAX_PIXELS", "2400")
    assert read_image(path).shape == (3, 40, 60)
    (tmp_path / "long.ppm").write_bytes(bytes(4 * 2400 + 1))
    with pytest.raises(ImageError, match=r"long\.ppm.*more than 9,600 bytes"):
        read_image(tmp_path / "long.ppm")
    monkeypatch.setenv("FASTRCNN_MAX_PIXELS", "many")
    with pytest.raises(ImageError, match=r"FASTRCNN_MAX_PIXELS.*'many'"):
        read_image(path)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(ImageError, match="no regular file"):
            read_image(path)


@pytest.fixture
def server(picture, tmp_path, monkeypatch):
    """A server's address, whose answers are good, break off, never end, or come byte by byte."""
    data = saved(tmp_path / "served.png", picture).read_bytes()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.close_connection = True
            if "dripping" in self.path:
                head = b"HTTP/1.0 200 OK\r\nX-Slow: " + 100 * b"x" + b"\r\n\r\n"
                for byte in head:
                    self.wfile.write(bytes([byte]))
                    if over.wait(0.02):
                        return
                self.wfile.write(data)
                return
            if "moved" in self.path:
                self.send_response(302)
                self.send_header("Location", "ftp://127.0.0.1/a.png")
                self.end_headers()
                return
            self.send_response(200)
            if "endless" not in self.path:
                self.send_header("Content-Length", len(data))
            self.end_headers()
            self.wfile.write(data[:99] if "broken" in self.path else data)
            while "endless" in self.path and not over.is_set():
                self.wfile.write(bytes(1000))

        def log_message(self, *_):
            pass

    monkeypatch.setattr("fastrcnn.data.fetch.TIMEOUT_S", 0.5)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    over.set()
    httpd.shutdown()
    httpd.server_close()


def test_what_a_server_may_do(server, picture, monkeypatch):
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    for name in ("a.png", "a b.png", "ä.png"):
        assert torch.equal(read_image(f"{server}/{name}"), expected)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    wrong = dict(broken="breaks off", endless="more than 40,000 bytes", dripping="timed out", moved="it leads to ftp")
    for name, reason in wrong.items():
        with pytest.raises(ImageError, match=f"{name}.*{reason}"):
            read_image(f"{server}/{name}")
    for address in ("http://[::1/a.png", "http://127.0.0.1:x/a.png", "http:///a.png"):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(address)


def test_a_missing_file_and_a_folder_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.jpg.*No such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


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


@pytest.mark.parametrize("values", [[0.0, 100.0, 255.0], [-0.2, 0.5, 0.9], [0.1, 0.5, 1.7], [0.1, float("nan"), 0.2]])
def test_floats_outside_0_to_1_are_refused(values):
    array = np.array([values], np.float32)
    for source in (array, array[..., None].repeat(3, -1), torch.from_numpy(array)[None], Image.fromarray(array)):
        with pytest.raises(ValueError, match=r"images\[2\].*floats in 0\.\.1"):
            as_image(source, "images[2]")


def test_an_alpha_channel_is_dropped_from_every_kind_of_image(picture):
    rgba = np.dstack([picture, np.full(picture.shape[:2], 7, np.uint8)])
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    for source in (rgba, rgba / 255.0, torch.from_numpy(rgba).permute(2, 0, 1), Image.fromarray(rgba)):
        assert torch.equal(as_image(source), expected)


def test_wide_values_keep_their_high_byte_and_are_not_clipped(tmp_path):
    wide = np.array([[0, 255, 256, 40_000, 65_535]], np.uint16)
    expected = [0, 0, 1, 156, 255]
    whole = Image.fromarray(wide.astype(np.int32))
    whole.save(tmp_path / "a.tif")
    Image.fromarray(wide.astype(np.float32) / 65_535).save(tmp_path / "b.tif")
    for source in (
        wide,
        wide.astype(">u2"),
        torch.from_numpy(wide)[None],
        Image.fromarray(wide),
        whole,
        tmp_path / "a.tif",
    ):
        assert as_image(source)[0, 0].tolist() == expected
    assert read_image(tmp_path / "b.tif")[1, 0].tolist() == [0, 1, 1, 156, 255]
    for values in (wide.astype(np.int32) * 2, wide.astype(np.int32) - 1, wide.astype(np.int32) // 256):
        with pytest.raises(ImageError, match="mode I"):
            as_image(Image.fromarray(values))


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
        (bytearray(b"bytes"), TypeError),
        (np.zeros((4, 5, 2), np.uint8), ValueError),
        (np.zeros((3, 40, 60), np.uint8), ValueError),  # channels first
        (np.zeros((4, 5, 3), np.int64), TypeError),
        (np.zeros((4, 5, 3), np.uint32), TypeError),
        (np.zeros((4, 5, 3), object), TypeError),
        (np.zeros((4, 5, 3), np.complex64), TypeError),
        (torch.zeros(3, 4, 5).to_sparse(), TypeError),
        (torch.zeros(3, 4, 5, device="meta"), TypeError),
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
    for name in ("b.jpg", "a.PNG", "c.txt", "d.tiff", "e.webp", "f.jfif", "g.jpe", "h.avif", "i.jp2", "j.ppm", "k.pgm"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "inner.jpg").touch()
    at = lambda *names: [str(tmp_path / n) for n in names]  # noqa: E731
    assert list_images(tmp_path) == at(
        "a.PNG", "b.jpg", "d.tiff", "e.webp", "f.jfif", "g.jpe", "h.avif", "i.jp2", "j.ppm", "k.pgm"
    )  # fmt: skip
    assert list_images(tmp_path / "*.jpg") == at("b.jpg", "folder.jpg")
    assert list_images(tmp_path / "**" / "inner.jpg") == at("folder.jpg/inner.jpg")
    assert list_images(tmp_path / "c.txt") == at("c.txt")
    assert list_images(tmp_path / "none.jpg") == at("none.jpg")  # reading it says what is wrong
    assert list_images(tmp_path / "no*.jpg") == []
    assert list_images("https://example.com/a.jpg?size=*") == ["https://example.com/a.jpg?size=*"]
    for odd in ("a\0b.jpg", "~nobody-here/a.jpg", "x" * 300 + ".jpg"):
        assert list_images(odd) == [odd]
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(odd)


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "a[1].jpg").touch()
    assert list_images(tmp_path / "a[1].jpg") == [str(tmp_path / "a[1].jpg")]
