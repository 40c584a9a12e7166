# SPDX-License-Identifier: MIT
"""Procedural surface pictures: grey patterns of many families, coloured through random palettes."""

import colorsys
import functools
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

PATTERN_SIZE = 128
BANK_SIZE = 320

Grey = NDArray[np.float32]


def _grid() -> tuple[Grey, Grey]:
    v, u = np.mgrid[0:PATTERN_SIZE, 0:PATTERN_SIZE].astype(np.float32) / PATTERN_SIZE
    return u, v


def _spectral(rng: np.random.Generator, exponent: float, stretch: float = 1.0) -> Grey:
    """Tileable noise with a power-law spectrum; `stretch` != 1 draws it out along an axis."""
    fy = np.fft.fftfreq(PATTERN_SIZE)[:, None] * stretch
    fx = np.fft.rfftfreq(PATTERN_SIZE)[None, :]
    radius = np.hypot(fx, fy)
    radius[0, 0] = np.inf
    phase = rng.uniform(0, 2 * np.pi, radius.shape)
    noise = np.fft.irfft2(radius**-exponent * np.exp(1j * phase), s=(PATTERN_SIZE, PATTERN_SIZE))
    return noise.astype(np.float32)


def _noise(rng: np.random.Generator) -> Grey:
    return _spectral(rng, rng.uniform(0.4, 2.2), np.exp(rng.normal(0, 0.4)))


def _fibres(rng: np.random.Generator) -> Grey:
    return _spectral(rng, rng.uniform(0.8, 1.6), rng.uniform(6, 30))


def _wood(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    warp = 0.04 * _spectral(rng, 1.8, 4) / 0.02
    x = u * rng.uniform(0.6, 2) + rng.uniform(-1, 1)
    y = v * rng.uniform(0.05, 0.3)
    rings = np.sin(rng.uniform(15, 60) * np.hypot(x, y) + rng.uniform(0.5, 3) * warp)
    return rings + rng.uniform(0.1, 0.8) * _spectral(rng, 0.8, 12) / 0.02


def _marble(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    angle = rng.uniform(0, np.pi)
    phase = rng.uniform(3, 14) * (u * np.cos(angle) + v * np.sin(angle))
    noise = _spectral(rng, 1.7)
    return np.abs(np.sin(phase + rng.uniform(1, 4) * noise / noise.std()))


def _checker(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    n, m = rng.integers(1, 9, 2)
    return ((np.floor(u * 2 * n) + np.floor(v * 2 * m)) % 2).astype(np.float32)


def _stripes(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
    wave = np.sin(2 * np.pi * rng.uniform(1, 14) * (u * np.cos(angle) + v * np.sin(angle)))
    return wave if rng.random() < 0.5 else (wave > rng.uniform(-0.8, 0.8)).astype(np.float32)


def _bricks(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    rows, columns = rng.integers(2, 12), rng.integers(1, 8)
    mortar = rng.uniform(0.03, 0.12)
    row = np.floor(v * rows)
    x = u * columns + (row % 2) * rng.choice([0.0, 0.5])
    tone = rng.random((rows + 1, 2 * columns + 2))[row.astype(int), np.floor(x).astype(int)]
    joint = ((v * rows) % 1 < mortar) | (x % 1 < mortar * columns / rows)
    return np.where(joint, rng.choice([-0.6, 1.6]), rng.uniform(0, 1) * tone).astype(np.float32)


def _gradient(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    if rng.random() < 0.4:
        return np.hypot(u - rng.random(), v - rng.random())
    angle = rng.uniform(0, 2 * np.pi)
    return u * np.cos(angle) + v * np.sin(angle)


def _blotches(rng: np.random.Generator) -> Grey:
    noise = _spectral(rng, rng.uniform(1.2, 2.2))
    levels = rng.integers(1, 5)
    return np.digitize(noise, np.sort(rng.choice(noise.ravel(), levels))).astype(np.float32)


def _speckle(rng: np.random.Generator) -> Grey:
    picture = (rng.random((PATTERN_SIZE, PATTERN_SIZE)) < rng.uniform(0.01, 0.2)).astype(np.float32)
    return cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.6))


def _dots(rng: np.random.Generator) -> Grey:
    u, v = _grid()
    n, m = rng.integers(2, 14, 2)
    distance = np.hypot((u * n) % 1 - 0.5, (v * m) % 1 - 0.5)
    return (distance < rng.uniform(0.15, 0.45)).astype(np.float32)


def _cells(rng: np.random.Generator) -> Grey:
    seeds = rng.random((rng.integers(5, 60), 2)).astype(np.float32)
    u, v = _grid()
    step = np.stack([u, v], -1)[:, :, None] - seeds
    distance = np.sort(np.hypot(step[..., 0], step[..., 1]), axis=-1)
    if rng.random() < 0.5:
        return distance[..., 1] - distance[..., 0]
    nearest = np.hypot(step[..., 0], step[..., 1]).argmin(-1)
    return rng.random(len(seeds)).astype(np.float32)[nearest]


def _marks(rng: np.random.Generator) -> Grey:
    """Lines of small marks: what print on a package looks like from afar."""
    picture = np.zeros((PATTERN_SIZE, PATTERN_SIZE), np.float32)
    y = int(rng.integers(2, 12))
    while y < PATTERN_SIZE - 8:
        height = int(rng.choice([3, 4, 6, 10, 18]))
        x = int(rng.integers(2, 30))
        while x < PATTERN_SIZE - 6 and rng.random() < 0.95:
            width = int(rng.integers(1, max(2, height)))
            top = y + int(rng.integers(0, max(1, height // 3)))
            picture[top : y + height, x : x + width] = 1
            x += width + int(rng.integers(1, 4 if rng.random() < 0.8 else 9))
        y += height + int(rng.integers(2, 14))
    return picture


def _patches(rng: np.random.Generator) -> Grey:
    """Overlapping rectangles and discs, as on labels, book covers and boxes."""
    picture = np.zeros((PATTERN_SIZE, PATTERN_SIZE), np.float32)
    for _ in range(rng.integers(2, 16)):
        x, y = (int(i) for i in rng.integers(0, PATTERN_SIZE, 2))
        w, h = (int(i) for i in rng.integers(4, PATTERN_SIZE // 2, 2))
        tone = float(rng.random())
        if rng.random() < 0.7:
            cv2.rectangle(picture, (x, y), (x + w, y + h), tone, -1)
        else:
            cv2.ellipse(picture, (x, y), (w // 2, h // 2), 0, 0, 360, tone, -1)
    return picture


def _strokes(rng: np.random.Generator) -> Grey:
    picture = np.zeros((PATTERN_SIZE, PATTERN_SIZE), np.float32)
    for _ in range(rng.integers(4, 60)):
        a = rng.integers(0, PATTERN_SIZE, 2)
        b = a + rng.normal(0, rng.uniform(5, 60), 2).astype(int)
        thickness = int(rng.integers(1, 4))
        start, end = (int(a[0]), int(a[1])), (int(b[0]), int(b[1]))
        cv2.line(picture, start, end, float(rng.random()), thickness, cv2.LINE_AA)
    return picture


_FAMILIES: tuple[Callable[[np.random.Generator], Grey], ...] = (
    *(_noise, _noise, _fibres, _wood, _wood, _marble, _checker, _stripes, _bricks, _gradient),
    *(_blotches, _speckle, _dots, _cells, _marks, _patches, _strokes),
)


@functools.cache
def pattern_bank(number: int) -> NDArray[np.uint8]:
    """[BANK_SIZE, PATTERN_SIZE, PATTERN_SIZE] grey patterns, the same on each call and machine.

    Banks of different `number` hold different patterns (one for the training kinds, one for the
    held-out kinds). About 0.4 s for the first call.
    """
    bank = np.empty((BANK_SIZE, PATTERN_SIZE, PATTERN_SIZE), np.uint8)
    for i in range(BANK_SIZE):
        rng = np.random.default_rng([number, i])
        picture = _FAMILIES[i % len(_FAMILIES)](rng)
        if rng.random() < 0.4:  # some wear and grain over a clean pattern
            grain = _spectral(rng, rng.uniform(0, 1.8))
            picture = picture / (picture.std() + 1e-6) + rng.uniform(0.1, 0.7) * grain / grain.std()
        low, high = np.percentile(picture, [1, 99])
        if high - low < 1e-6:
            low, high = picture.min(), picture.max() + 1e-6
        bank[i] = np.clip((picture - low) / (high - low) * 255, 0, 255)
    return bank


def random_colour(rng: np.random.Generator) -> NDArray[np.float64]:
    """[3] RGB in 0..1: about a third greys, a third muted, a third saturated."""
    style = rng.random()
    if style < 0.3:
        saturation = rng.uniform(0, 0.12)
    elif style < 0.65:
        saturation = rng.uniform(0.1, 0.5)
    else:
        saturation = rng.uniform(0.5, 1)
    # Wood, skin and paper tones are more frequent around us than the other hues.
    hue = rng.normal(0.085, 0.03) % 1 if rng.random() < 0.3 else rng.random()
    return np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.08, 1) ** 0.7))


def _palette(rng: np.random.Generator) -> NDArray[np.uint8]:
    """[256, 3] colours for grey values: a ramp through 2 to 4 colours, often low in contrast."""
    base = random_colour(rng)
    count = int(rng.choice([2, 2, 2, 3, 4]))
    if rng.random() < 0.6:  # shades of one colour
        contrast = rng.uniform(0.05, 0.6)
        colours = np.clip(base + rng.normal(0, contrast / 2, (count, 1)), 0, 1)
        colours = np.clip(colours + rng.normal(0, 0.04, (count, 3)), 0, 1)
    else:
        colours = np.stack([base, *(random_colour(rng) for _ in range(count - 1))])
    position = np.linspace(0, 1, 256)
    knots = np.linspace(0, 1, count)
    return np.stack(
        [np.interp(position, knots, colours[:, c]) * 255 for c in range(3)], axis=-1
    ).astype(np.uint8)


def surface(rng: np.random.Generator, bank: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[PATTERN_SIZE, PATTERN_SIZE, 3] uint8 RGB picture of a random surface."""
    pattern = bank[rng.integers(len(bank))]
    if rng.random() < 0.5:
        pattern = pattern.T
    shift = rng.integers(0, PATTERN_SIZE, 2)
    pattern = np.roll(pattern, (int(shift[0]), int(shift[1])), (0, 1))
    zoom = int(rng.choice([1, 1, 1, 2, 4]))
    if zoom > 1:
        part = PATTERN_SIZE // zoom
        pattern = cv2.resize(pattern[:part, :part], (PATTERN_SIZE, PATTERN_SIZE))
    picture = _palette(rng)[pattern]
    if rng.random() < 0.35:  # a second pattern on top: marks on wood, dirt on tiles
        mask = bank[rng.integers(len(bank))].astype(np.uint16)[..., None]
        mask = mask * int(rng.integers(60, 256)) >> 8
        other = random_colour(rng) * 255
        mixed = picture * (255 - mask) + other.astype(np.uint16) * mask
        picture = (mixed >> 8).astype(np.uint8)
    return picture


def cube_faces(
    picture: NDArray[np.uint8], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """[6 * size, size, 3]: the picture on six faces, turned and mirrored at random.

    Either the whole picture or a part of it; some faces are plain, as labels and fronts differ
    from sides.
    """
    if rng.random() < 0.5:
        x, y = rng.integers(0, len(picture) - size + 1, 2)
        picture = picture[y : y + size, x : x + size]
    else:
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    faces = np.empty((6, size, size, 3), np.uint8)
    for face, choice in zip(faces, rng.integers(0, 20, 6), strict=True):
        if choice < 17:
            turned = picture.transpose(1, 0, 2) if choice & 1 else picture
            face[:] = turned[:, ::-1] if choice & 2 else turned
        else:
            face[:] = picture[size // 2, size // 2]
    return faces.reshape(6 * size, size, 3)


def sky(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """[6 * size, size, 3] faces of a sky box: a vertical gradient of two colours."""
    top, bottom = random_colour(rng), random_colour(rng)
    ramp = np.linspace(0, 1, size)[:, None, None]
    side = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (size, size, 3))
    up, down = np.broadcast_to(top, side.shape), np.broadcast_to(bottom, side.shape)
    # MuJoCo's order: right, left, up, down, front, back.
    return (np.concatenate([side, side, up, down, side, side]) * 255).astype(np.uint8)
