# SPDX-License-Identifier: MIT
"""Image conversion: all encodings, both ways, and every way in which a message can be wrong."""

import importlib.util
import struct

import cv2
import numpy as np
import pytest
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from fpt_ros.images import (
    ENCODINGS,
    ImageError,
    array_to_image,
    flat_array,
    image_to_array,
    image_to_rgb,
)

HEIGHT, WIDTH = 3, 5


def pixels_of(encoding: str) -> np.ndarray:
    layout = ENCODINGS[encoding]
    shape = (HEIGHT, WIDTH) + ((layout.channels,) if layout.channels > 1 else ())
    return np.random.default_rng(0).uniform(0, 250, shape).astype(layout.dtype)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_round_trip(encoding: str) -> None:
    pixels = pixels_of(encoding)
    header = Header(frame_id="camera")
    msg = array_to_image(pixels, encoding, header)
    assert (msg.height, msg.width, msg.encoding) == (HEIGHT, WIDTH, encoding)
    assert msg.header == header
    assert msg.step * msg.height == len(msg.data) == pixels.nbytes
    np.testing.assert_array_equal(image_to_array(msg), pixels)


@pytest.mark.parametrize("encoding", ["rgb8", "16UC1", "32FC1", "32FC2"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_row_padding_and_byte_order(encoding: str, big_endian: bool) -> None:
    pixels = pixels_of(encoding)
    rows = pixels.astype(pixels.dtype.newbyteorder(">" if big_endian else "<"))
    row_bytes = rows.reshape(HEIGHT, -1).view(np.uint8)
    padded = np.full((HEIGHT, row_bytes.shape[1] + 3), 0xAB, np.uint8)
    padded[:, :-3] = row_bytes
    msg = Image(
        height=HEIGHT,
        width=WIDTH,
        encoding=encoding,
        is_bigendian=int(big_endian),
        step=padded.shape[1],
        data=flat_array("B", padded),
    )
    read = image_to_array(msg)
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize(
    ("encoding", "order"), [("rgb8", (0, 1, 2)), ("bgr8", (2, 1, 0)), ("bgra8", (2, 1, 0))]
)
def test_colour_order(encoding: str, order: tuple[int, ...]) -> None:
    pixels = pixels_of(encoding)
    rgb = image_to_rgb(array_to_image(pixels, encoding, Header()))
    assert rgb.flags.c_contiguous
    np.testing.assert_array_equal(rgb, pixels[..., order])


def test_mono_is_grey() -> None:
    pixels = pixels_of("mono8")
    rgb = image_to_rgb(array_to_image(pixels, "mono8", Header()))
    np.testing.assert_array_equal(rgb, np.stack([pixels] * 3, axis=-1))


def image(**changes: object) -> Image:
    msg = array_to_image(pixels_of("rgb8"), "rgb8", Header())
    for name, value in changes.items():
        setattr(msg, name, value)
    return msg


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": flat_array("B", np.zeros(44, np.uint8))}, ("44 bytes", "15 * 3 = 45")),
        ({"data": flat_array("B", np.zeros(0, np.uint8))}, ("0 bytes", "45")),
        ({"height": 0}, ("empty", "5 x 0")),
        ({"width": 0}, ("empty", "0 x 3")),
        ({"step": 14}, ("14 bytes", "at least 15")),
        ({"width": 2**32 - 1, "height": 2**32 - 1}, ("step", "at least")),
        ({"encoding": "32FC1"}, ("32FC1", "no colour")),
        ({"encoding": ""}, ("''",)),
    ],
)
def test_malformed_images_are_named(changes: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ImageError) as caught:
        image_to_rgb(image(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_encoding_is_named() -> None:
    with pytest.raises(ImageError, match=r"'yuv9'.*rgb8"):
        image_to_array(image(encoding="yuv9"))


@pytest.mark.skipif(
    importlib.util.find_spec("cv_bridge") is not None, reason="cv_bridge is installed"
)
def test_other_encodings_ask_for_cv_bridge() -> None:
    with pytest.raises(ImageError, match=r"'bayer_rggb8' needs cv_bridge"):
        image_to_rgb(image(encoding="bayer_rggb8"))


@pytest.mark.parametrize(
    ("pixels", "encoding", "words"),
    [
        (np.zeros((2, 2, 3), np.float32), "rgb8", "received float32 of shape (2, 2, 3)"),
        (np.zeros((2, 2), np.uint8), "rgb8", "('H', 'W', 3), received uint8 of shape (2, 2)"),
        (np.zeros((2, 2, 1), np.uint8), "mono8", "('H', 'W'), received uint8 of shape (2, 2, 1)"),
        (np.zeros((0, 2), np.uint8), "mono8", "received uint8 of shape (0, 2)"),
        (np.zeros(4, np.uint8), "mono8", "received uint8 of shape (4,)"),
        (np.zeros((2, 2), np.uint8), "yuv9", "'yuv9' is unknown, expected one of ['rgb8', "),
    ],
)
def test_arrays_that_do_not_fit_are_refused(pixels: np.ndarray, encoding: str, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        array_to_image(pixels, encoding, Header())
    assert words in str(caught.value)


def compressed(data: bytes, declared: str = "") -> CompressedImage:
    return CompressedImage(format=declared, data=flat_array("B", np.frombuffer(data, np.uint8)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 5), np.uint8), ((3, 5, 3), np.uint8), ((3, 5, 4), np.uint8), ((3, 5, 3), np.uint16)],
    ids=["mono", "colour", "alpha", "16 bit"],
)
def test_png_is_read_to_the_pixel(shape: tuple[int, ...], dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    scale = 256 if dtype == np.uint16 else 1
    data = cv2.imencode(".png", pixels * scale)[1].tobytes()
    # what image_transport's plugin declares, though the bytes alone count
    read = image_to_rgb(compressed(data, "rgb8; png compressed bgr8"))
    expected = pixels[..., 2::-1] if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, -1)
    np.testing.assert_array_equal(read, expected)


def test_jpeg_pixels_stay_where_the_file_has_them() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = (0, 0, 255)  # red, as OpenCV writes it
    data = cv2.imencode(".jpg", pixels)[1].tobytes()
    # an EXIF segment with the orientation "rotate by 90 degrees", as phones write it
    entry = struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry
    tagged = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR).shape == (16, 8, 3)
    read = image_to_rgb(compressed(tagged, "jpeg"))
    assert read.shape == (8, 16, 3)
    np.testing.assert_allclose(read[4, 12], (255, 0, 0), atol=12)
    np.testing.assert_allclose(read[4, 3], 0, atol=12)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "begins with b''"), (b"\xff\xd8\xff\xe0..", "JPEG image of 6 bytes is damaged")],
)
def test_other_compressed_data_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        image_to_rgb(compressed(data))
