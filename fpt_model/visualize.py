# SPDX-License-Identifier: MIT
"""Pictures of flow, pokes, motion mixtures and moving parts (numpy and OpenCV only).

Everything here speaks pixels of the source image in the convention of ``fpt_model.geometry``:
(x, y), x right, y down, integer coordinates at pixel centres. Images are uint8 RGB [H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from fpt_model.mixture import FlowMixture

RGBImage = NDArray[np.uint8]
Colour = tuple[int, int, int]

POKE_COLOUR: Colour = (255, 40, 120)
MODE_COLOUR: Colour = (40, 215, 255)
MASK_COLOUR: Colour = (190, 255, 60)
HALO_COLOUR: Colour = (15, 15, 20)
PAPER_COLOUR: Colour = (255, 255, 255)
INK_COLOUR: Colour = (35, 38, 45)
RULE_COLOUR: Colour = (200, 203, 208)

ELLIPSE_SIGMAS = 2.0
"""Covariance ellipses enclose this many standard deviations: 86 % of their mode's probability."""

MIN_DRAWN_WEIGHT = 0.05
"""Modes less probable than this are left out of the picture."""

MAX_DRAWN_QUERIES = 100
"""Of more queries than this an even selection is drawn: more would hide the picture."""

MIN_CANVAS_SIDE = 480
"""Images with a shorter side below this are enlarged, so that arrows stay thinner than objects."""

MAX_CANVAS_SIDE = 1920
"""No image is enlarged beyond this longer side."""

_SUBPIXEL_BITS = 4  # OpenCV's fixed-point drawing coordinates
_MASK_OPACITY = 0.30
_FLOW_OPACITY = 0.85  # of the longest vector
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)
_UNIT_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


# ------------------------------------------------------------------------------ dense pictures


@cache
def _colour_wheel() -> NDArray[np.float64]:
    """The 55 colours [55, 3] of the Middlebury flow wheel.

    Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011;
    its segments (red-yellow 15, yellow-green 6, ...) are spaced by perceived similarity.
    """
    segments = (  # steps, channel held at 255, channel that changes, its direction
        (15, 0, 1, +1),  # red -> yellow
        (6, 1, 0, -1),  # yellow -> green
        (4, 1, 2, +1),  # green -> cyan
        (11, 2, 1, -1),  # cyan -> blue
        (13, 2, 0, +1),  # blue -> magenta
        (6, 0, 2, -1),  # magenta -> red
    )
    rows = []
    for steps, full, changing, direction in segments:
        ramp = np.floor(255 * np.arange(steps) / steps)
        colours = np.zeros((steps, 3))
        colours[:, full] = 255
        colours[:, changing] = ramp if direction > 0 else 255 - ramp
        rows.append(colours)
    return np.concatenate(rows)


def _check_flow(name: str, flow: ArrayLike) -> None:
    if np.ndim(flow) != 3 or np.shape(flow)[2] != 2:
        raise ValueError(f"{name} must have shape [h, w, 2], received {list(np.shape(flow))}")


def flow_to_color(flow: ArrayLike, max_magnitude: float | None = None) -> RGBImage:
    """Colour a flow field [h, w, 2] with the Middlebury wheel: hue is direction, white no motion.

    Motion to the right is red, down yellow, left cyan-blue, up violet. ``max_magnitude`` (in the
    flow's unit; None: the largest in ``flow``) is fully saturated, longer vectors are darkened.
    Non-finite flow is black. Returns uint8 RGB [h, w, 3]; raises ValueError for other shapes or
    a ``max_magnitude`` that is not positive and finite.
    """
    flow = np.asarray(flow, dtype=np.float64)
    _check_flow("flow", flow)
    valid = np.isfinite(flow).all(axis=2)
    flow = np.where(valid[..., None], flow, 0.0) + 0.0  # + 0.0 makes -0.0 positive for arctan2
    magnitude = np.hypot(flow[..., 0], flow[..., 1])
    if max_magnitude is None:
        max_magnitude = float(magnitude.max(initial=0.0)) or 1.0
    elif not (np.isfinite(max_magnitude) and max_magnitude > 0):
        raise ValueError(f"max_magnitude must be positive and finite, received {max_magnitude}")

    wheel = _colour_wheel()
    turn = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1.0
    position = turn * (len(wheel) - 1)
    lower = position.astype(np.intp)
    fraction = (position - lower)[..., None]
    hue = wheel[lower] * (1 - fraction) + wheel[(lower + 1) % len(wheel)] * fraction

    radius = (magnitude / max_magnitude)[..., None]
    colour = np.where(radius <= 1, 255 - radius * (255 - hue), 0.75 * hue)
    colour[~valid] = 0
    return np.floor(colour).astype(np.uint8)


def resize(picture: RGBImage, size: tuple[int, int]) -> RGBImage:
    """A resampled copy of an RGB picture, ``size`` = (height, width)."""
    height, width = size
    if picture.shape[:2] == size:
        return picture.copy()
    method = cv2.INTER_AREA if height < picture.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=method), np.uint8)


# ---------------------------------------------------------------------------- vector primitives


def canvas_scale(height: int, width: int) -> int:
    """The whole number by which ``draw_overlay`` enlarges an image of this size."""
    wanted = -(-MIN_CANVAS_SIDE // min(height, width))
    return max(1, min(wanted, MAX_CANVAS_SIDE // max(height, width)))


def _fixed_point(points: NDArray[np.float64]) -> NDArray[np.int32]:
    far = 1 << (30 - _SUBPIXEL_BITS)  # keeps far points within int32
    return np.round(np.clip(points, -far, far) * (1 << _SUBPIXEL_BITS)).astype(np.int32)


class _Patch:
    """The part of a canvas that a shape can touch, so that small shapes cost little."""

    def __init__(self, canvas: RGBImage, points: NDArray[np.float64], margin: float) -> None:
        height, width = canvas.shape[:2]
        first = np.floor(points.min(axis=0) - margin - 2)
        last = np.ceil(points.max(axis=0) + margin + 3)
        x0, y0 = np.clip(first, 0, (width, height)).astype(int)
        x1, y1 = np.clip(last, 0, (width, height)).astype(int)
        self.pixels = canvas[y0:y1, x0:x1]
        self._corners = [_fixed_point(points - (x0, y0))]

    def filled(self) -> NDArray[np.float32]:
        """Anti-aliased coverage [h, w, 1] of the closed polygon."""
        coverage = np.zeros(self.pixels.shape[:2], np.uint8)
        if coverage.size:
            cv2.fillPoly(coverage, self._corners, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return (coverage[..., None] / 255).astype(np.float32)

    def stroked(self, width: float) -> NDArray[np.float32]:
        """Anti-aliased coverage [h, w, 1] of the polygon's border, ``width`` pixels wide."""
        coverage = np.zeros(self.pixels.shape[:2], np.uint8)
        if coverage.size:
            thickness = max(1, round(width))
            cv2.polylines(
                coverage, self._corners, True, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS
            )
        return (coverage[..., None] / 255).astype(np.float32)

    def blend(self, colour: ArrayLike, alpha: NDArray[np.float32]) -> None:
        """Mix ``colour`` [3] or [h, w, 3] in, by ``alpha`` [h, w, 1]."""
        mixed = self.pixels * (1 - alpha) + np.asarray(colour, np.float32) * alpha
        self.pixels[:] = np.round(mixed)


def _paint_filled(
    canvas: RGBImage, points: NDArray[np.float64], colour: Colour, opacity: float
) -> None:
    patch = _Patch(canvas, points, margin=0)
    patch.blend(colour, opacity * patch.filled())


def _paint_stroked(
    canvas: RGBImage, points: NDArray[np.float64], colour: Colour, opacity: float, width: float
) -> None:
    patch = _Patch(canvas, points, margin=width)
    patch.blend(colour, opacity * patch.stroked(width))


def _paint_haloed(
    canvas: RGBImage, points: NDArray[np.float64], colour: Colour, opacity: float, halo: float
) -> None:
    """A filled polygon with a dark rim, legible on light and dark ground alike.

    Rim and filling are joined before they are blended, so that a translucent shape shows the
    picture beneath it and not its own rim.
    """
    patch = _Patch(canvas, points, margin=2 * halo)
    filled = patch.filled()
    either: NDArray[np.float32] = np.maximum(filled, patch.stroked(2 * halo))
    joined = np.array(HALO_COLOUR) * (1 - filled) + np.array(colour) * filled
    patch.blend(joined, opacity * either)


def _circle(centre: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    return centre + radius * _UNIT_CIRCLE


def _arrow(
    start: NDArray[np.float64], vector: NDArray[np.float64], thickness: float
) -> NDArray[np.float64]:
    """The outline [7, 2] of an arrow whose tip lies exactly at start + vector."""
    length = float(np.hypot(*vector))
    along = vector / length
    across = np.array([-along[1], along[0]])
    head = min(4.5 * thickness, 0.6 * length)
    half_shaft = 0.5 * min(thickness, 0.35 * head)
    half_head = 0.45 * head
    neck, tip = start + vector - head * along, start + vector
    return np.array(
        [
            start + half_shaft * across,
            neck + half_shaft * across,
            neck + half_head * across,
            tip,
            neck - half_head * across,
            neck - half_shaft * across,
            start - half_shaft * across,
        ]
    )


# ------------------------------------------------------------------------------------- overlay


def _points(name: str, values: ArrayLike) -> NDArray[np.float64]:
    points = np.asarray(values, dtype=np.float64)
    if points.size == 0:
        return np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} must have shape [N, 2], received {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name} must be finite, received {points.tolist()}")
    return points


def _tint_flow(canvas: RGBImage, flow: ArrayLike, max_magnitude: float | None) -> None:
    """Lay the flow's colours over the canvas; non-finite flow is left out."""
    flow = np.nan_to_num(np.asarray(flow, np.float32), posinf=0, neginf=0)
    magnitude = np.hypot(flow[..., 0], flow[..., 1])[..., None]
    largest = max_magnitude or float(magnitude.max()) or 1.0
    alpha = _FLOW_OPACITY * np.minimum(magnitude / largest, 1)
    hue = flow_to_color(flow / np.maximum(magnitude, 1e-12), 1.0 + 1e-6)
    # Coloured at the flow's own size (cheap), enlarged premultiplied so that edges keep their hue.
    tint = np.concatenate([alpha * hue, alpha], axis=2)
    height, width = canvas.shape[:2]
    tint = cv2.resize(tint, (width, height), interpolation=cv2.INTER_LINEAR)
    canvas[:] = np.round(canvas * (1 - tint[..., 3:]) + tint[..., :3])


def _tint_mask(canvas: RGBImage, mask: ArrayLike, line: float, fill: bool) -> None:
    height, width = canvas.shape[:2]
    soft = cv2.resize(
        np.asarray(mask, dtype=np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )
    inside = soft >= 0.5
    if fill:
        mixed = canvas[inside] * (1 - _MASK_OPACITY) + np.array(MASK_COLOUR) * _MASK_OPACITY
        canvas[inside] = np.round(mixed)
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        outline = contour[:, 0].astype(np.float64)
        _paint_stroked(canvas, outline, HALO_COLOUR, 0.6, 2 * line)
        _paint_stroked(canvas, outline, MASK_COLOUR, 1.0, line)


def evenly(count: int, most: int) -> NDArray[np.intp]:
    """Which of ``count`` things to show where at most ``most`` can be: an even selection."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.intp)


def draw_overlay(
    image: RGBImage,
    poke_xy_px: ArrayLike,
    poke_flow_px: ArrayLike,
    query_xy_px: ArrayLike,
    mixture_px: FlowMixture | None,
    flow_px: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    max_flow_px: float | None = None,
) -> RGBImage:
    """Draw pokes, predicted motion modes and the moving part over a picture.

    Pokes are thick arrows from ``poke_xy_px`` [P, 2] by ``poke_flow_px`` [P, 2]. At each query
    [Q, 2] every mode of ``mixture_px`` (a FlowMixture in pixels with batch shape [Q]; None when
    Q = 0) is an arrow whose opacity is the mode's probability, with its ELLIPSE_SIGMAS covariance
    ellipse around the tip; modes below MIN_DRAWN_WEIGHT are left out, and
    of more queries than MAX_DRAWN_QUERIES an even selection is drawn. ``flow_px`` [h, w, 2] tints
    the picture with the hues of ``flow_to_color``, in proportion to its length up to
    ``max_flow_px`` (None or 0: its largest vector); ``mask`` [h, w] outlines the moving part, and
    tints it when there is no flow. Both may have any resolution and cover the whole image.

    Returns a new uint8 RGB picture [s * H, s * W, 3] with s = ``canvas_scale(H, W)``.
    Raises ValueError for wrong shapes or non-finite coordinates.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"image must be uint8 [H, W, 3], received {image.dtype} {list(image.shape)}"
        )
    poke_xy, poke_flow = _points("poke_xy_px", poke_xy_px), _points("poke_flow_px", poke_flow_px)
    query_xy = _points("query_xy_px", query_xy_px)
    if poke_xy.shape != poke_flow.shape:
        raise ValueError(f"received {len(poke_xy)} poke positions but {len(poke_flow)} poke flows")
    modes_shape = (0,) if mixture_px is None else mixture_px.shape
    if modes_shape != (len(query_xy),):
        raise ValueError(
            f"mixture_px must have batch shape [{len(query_xy)}] as there are that many "
            f"queries, received {list(modes_shape)}"
        )

    if mixture_px is not None and not np.isfinite(mixture_px.means[..., :2]).all():
        raise ValueError(f"mixture_px must have finite means, received {mixture_px.means.tolist()}")
    if flow_px is not None:
        _check_flow("flow_px", flow_px)
    if max_flow_px is not None and not max_flow_px >= 0:
        raise ValueError(f"max_flow_px must be >= 0, received {max_flow_px}")
    if mask is not None and np.ndim(mask) != 2:
        raise ValueError(f"mask must have shape [h, w], received {list(np.shape(mask))}")

    height, width = image.shape[:2]
    scale = canvas_scale(height, width)
    canvas = resize(image, (scale * height, scale * width))
    unit = min(canvas.shape[:2]) / MIN_CANVAS_SIDE  # line widths follow the picture's size
    if flow_px is not None:
        _tint_flow(canvas, flow_px, max_flow_px)
    if mask is not None:
        _tint_mask(canvas, mask, 2 * unit, fill=flow_px is None)

    def to_canvas(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        return (xy + 0.5) * scale - 0.5  # pixel centres stay pixel centres

    if mixture_px is not None:
        # The leading 2x2 block of a Cholesky factor is the factor of the (x, y) marginal.
        weights = mixture_px.weights
        means = mixture_px.means[..., :2] * scale
        factors = mixture_px.scale_tril[..., :2, :2] * scale
        starts = to_canvas(query_xy)
        for q in evenly(len(starts), MAX_DRAWN_QUERIES):
            for k in np.argsort(weights[q]):  # likeliest last, on top
                if weights[q, k] >= MIN_DRAWN_WEIGHT:
                    _paint_mode(canvas, starts[q], means[q, k], factors[q, k], weights[q, k], unit)
            _paint_haloed(canvas, _circle(starts[q], 4 * unit), PAPER_COLOUR, 1.0, unit)
    for start, vector in zip(to_canvas(poke_xy), poke_flow * scale, strict=True):
        if np.hypot(*vector) >= unit:
            _paint_haloed(canvas, _arrow(start, vector, 7.5 * unit), POKE_COLOUR, 1.0, 1.5 * unit)
        _paint_haloed(canvas, _circle(start, 7.5 * unit), POKE_COLOUR, 1.0, 1.5 * unit)
    return canvas


def _paint_mode(
    canvas: RGBImage,
    start: NDArray[np.float64],
    mean: NDArray[np.float64],
    factor: NDArray[np.float64],
    weight: float,
    unit: float,
) -> None:
    ellipse = start + mean + ELLIPSE_SIGMAS * _UNIT_CIRCLE @ factor.T
    _paint_filled(canvas, ellipse, MODE_COLOUR, 0.15 * weight)
    _paint_stroked(canvas, ellipse, MODE_COLOUR, weight, 2.2 * unit)
    if np.hypot(*mean) >= unit:
        _paint_haloed(canvas, _arrow(start, mean, 4.6 * unit), MODE_COLOUR, weight, unit)


# -------------------------------------------------------------------------------- composition


def _put_text(canvas: RGBImage, text: str, x: int, baseline: int, size: float) -> None:
    cv2.putText(canvas, text, (x, baseline), _FONT, size, INK_COLOUR, 1, cv2.LINE_AA)


def _text_width(text: str, size: float) -> int:
    return int(cv2.getTextSize(text, _FONT, size, 1)[0][0])


def _fitted_size(text: str, size: float, width: int) -> float:
    """``size``, or smaller where ``text`` would be wider than ``width`` pixels."""
    return min(size, size * width / max(1, _text_width(text, size)))


def side_by_side(
    panels: Sequence[RGBImage],
    captions: Sequence[str],
    title: str = "",
    panel_height: int | None = None,
) -> RGBImage:
    """Set RGB panels [h, w, 3] in a row on white, each under its caption, an optional title above.

    Without any text, no room is left for it.
    Panels are resized to ``panel_height`` pixels (None: the tallest panel), keeping their aspect.
    Returns uint8 RGB. Raises ValueError when there is no panel or the captions do not match.
    """
    if not panels or len(panels) != len(captions):
        raise ValueError(
            "side_by_side needs one caption for each of at least one panel, "
            f"received {len(panels)} panels and {len(captions)} captions"
        )
    panel_height = panel_height or max(panel.shape[0] for panel in panels)
    text_size = max(0.45, panel_height / 500)
    line = round(34 * text_size)
    gap = max(6, panel_height // 40)
    top = gap + line * (bool(title) + any(captions))

    placed = [
        resize(panel, (panel_height, max(1, round(panel.shape[1] * panel_height / panel.shape[0]))))
        for panel in panels
    ]
    page_width = gap + sum(panel.shape[1] + gap for panel in placed)
    page = np.full((top + panel_height + gap, page_width, 3), PAPER_COLOUR, np.uint8)

    if title:
        size = _fitted_size(title, 1.1 * text_size, page_width - 2 * gap)
        _put_text(page, title, gap, gap + round(0.6 * line), size)
    x = gap
    for panel, caption in zip(placed, captions, strict=True):
        width = panel.shape[1]
        size = _fitted_size(caption, text_size, width)
        _put_text(page, caption, x, top - round(0.35 * line), size)
        page[top : top + panel_height, x : x + width] = panel
        cv2.rectangle(page, (x - 1, top - 1), (x + width, top + panel_height), RULE_COLOUR, 1)
        x += width + gap
    return page


def legend(width: int) -> RGBImage:
    """A strip [40, width, 3] that explains the marks and hues of the functions above.

    The entries shrink together where they need more than ``width``.
    """
    entries = (
        ("poke", _legend_poke),
        ("predicted mode: opacity is its probability", _legend_mode),
        (f"its covariance, {ELLIPSE_SIGMAS:g} sigma", _legend_ellipse),
        ("moving part", _legend_mask),
        ("flow: hue is direction, strength is length", _legend_wheel),
    )
    height = 40
    symbol, gap, size = round(1.1 * height), round(0.5 * height), height / 55
    ends = gap + np.cumsum(
        [symbol + gap // 3 + _text_width(text, size) + gap for text, _ in entries]
    )
    row = np.full((height, ends[-1], 3), PAPER_COLOUR, np.uint8)
    for x, (text, paint) in zip([gap, *ends[:-1]], entries, strict=True):
        paint(row[:, x : x + symbol])
        _put_text(row, text, x + symbol + gap // 3, round(height / 2 + 10 * size), size)
    if ends[-1] > width:
        row = resize(row, (max(1, height * width // ends[-1]), width))
    strip = np.full((height, width, 3), PAPER_COLOUR, np.uint8)
    top = (height - row.shape[0]) // 2
    strip[top : top + row.shape[0], : row.shape[1]] = row
    return strip


def _legend_arrow(patch: RGBImage, colour: Colour, thickness: float) -> None:
    height, width = patch.shape[:2]
    start, vector = np.array([0.12 * width, 0.5 * height]), np.array([0.76 * width, 0.0])
    _paint_haloed(patch, _arrow(start, vector, thickness), colour, 1.0, height / 40)


def _legend_poke(patch: RGBImage) -> None:
    _legend_arrow(patch, POKE_COLOUR, patch.shape[0] / 7)
    centre = np.array([0.12 * patch.shape[1], 0.5 * patch.shape[0]])
    _paint_haloed(patch, _circle(centre, patch.shape[0] / 8), POKE_COLOUR, 1.0, 1.0)


def _legend_mode(patch: RGBImage) -> None:
    _legend_arrow(patch, MODE_COLOUR, patch.shape[0] / 11)


def _legend_ellipse(patch: RGBImage) -> None:
    centre = np.array([patch.shape[1], patch.shape[0]]) / 2
    ellipse = centre + _UNIT_CIRCLE * (0.4 * patch.shape[1], 0.28 * patch.shape[0])
    _paint_filled(patch, ellipse, MODE_COLOUR, 0.3)
    _paint_stroked(patch, ellipse, MODE_COLOUR, 1.0, patch.shape[0] / 20)


def _legend_mask(patch: RGBImage) -> None:
    patch[:] = (90, 94, 100)
    mask = np.zeros((8, 8))
    mask[2:6, 2:6] = 1
    _tint_mask(patch, mask, patch.shape[0] / 20, fill=True)


def _legend_wheel(patch: RGBImage) -> None:
    side = min(patch.shape[:2])
    axis = np.linspace(-1, 1, 4 * side)
    wheel = np.stack(np.meshgrid(axis, axis), axis=2)
    wheel[np.hypot(wheel[..., 0], wheel[..., 1]) > 1] = 0
    disc = resize(flow_to_color(wheel, 1.0), (side, side))
    left = (patch.shape[1] - side) // 2
    patch[:side, left : left + side] = disc
