# SPDX-License-Identifier: MIT
"""Pictures and videos in and out, as uint8 RGB [H, W, 3]; unusable files are a UserError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fpt_ros.commands.arguments import UserError

# A file that is no video is reported by an error of ours, not by pages from the decoder.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

RGBImage = NDArray[np.uint8]

FALLBACK_FPS = 30.0  # Hz, for videos that do not state their rate
VIDEO_CODECS = {".mp4": "mp4v", ".avi": "MJPG"}


def read_picture(path: Path) -> RGBImage:
    """The picture in a file, turned upright as its EXIF data says."""
    picture = _read_picture(path)
    if picture is None:
        raise UserError(f"expected a picture that OpenCV reads, received {str(path)!r}")
    return picture


def _read_picture(path: Path) -> RGBImage | None:
    if not path.is_file():
        raise UserError(f"no such file {str(path)!r}")
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    return None if picture is None else _swap_red_and_blue(picture)


def _swap_red_and_blue(picture: cv2.typing.MatLike) -> RGBImage:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


class Frames:
    """The frames of a picture (one) or a video file, read one at a time.

    Attributes:
        first: the first frame, which iteration gives again.
        is_video: False for a picture.
        count: number of frames, None when the file does not tell.
        fps: frames a second of a video.
    """

    def __init__(self, path: Path) -> None:
        picture = _read_picture(path)
        self.is_video = picture is None
        self.count: int | None = 1
        self.fps = 0.0
        if picture is None:
            self._capture = cv2.VideoCapture(str(path))
            picture = self._next()
            if picture is None:
                raise UserError(
                    f"expected a picture or video that OpenCV reads, received {str(path)!r}"
                )
            count, fps = (
                self._capture.get(p) for p in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS)
            )
            self.count = int(count) if count > 0 else None
            self.fps = fps if fps > 0 else FALLBACK_FPS
        self.first: RGBImage = picture

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.first.shape[0], self.first.shape[1]

    def __iter__(self) -> Iterator[RGBImage]:
        frame: RGBImage | None = self.first
        while frame is not None:
            yield frame
            frame = self._next() if self.is_video else None

    def _next(self) -> RGBImage | None:
        read, frame = self._capture.read()
        return _swap_red_and_blue(frame) if read else None


class FramesWriter:
    """Writes a picture, or a video at ``fps``; a context manager. Refuses bad paths at once."""

    def __init__(self, path: Path, is_video: bool, fps: float) -> None:
        if not path.resolve().parent.is_dir():
            raise UserError(f"--out must be in an existing folder, received {str(path)!r}")
        if is_video and path.suffix.lower() not in VIDEO_CODECS:
            raise UserError(
                f"--out must end in {' or '.join(VIDEO_CODECS)} for a video, received {str(path)!r}"
            )
        if not is_video and not cv2.haveImageWriter(str(path)):
            raise UserError(
                f"--out must end in a picture format such as .png or .jpg, received {str(path)!r}"
            )
        self._path, self._is_video, self._fps = path, is_video, fps
        self._video: cv2.VideoWriter | None = None

    def __enter__(self) -> FramesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._video is not None:
            self._video.release()

    def write(self, frame: RGBImage) -> None:
        """Write the picture, or append to the video."""
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if not self._is_video:
            if not cv2.imwrite(str(self._path), bgr):
                raise UserError(f"cannot write the picture {str(self._path)!r}")
            return
        if self._video is None:
            codec = cv2.VideoWriter.fourcc(*VIDEO_CODECS[self._path.suffix.lower()])
            size = (frame.shape[1], frame.shape[0])
            self._video = cv2.VideoWriter(str(self._path), codec, self._fps, size)
            if not self._video.isOpened():
                raise UserError(f"cannot write the video {str(self._path)!r}")
        self._video.write(bgr)
