# SPDX-License-Identifier: MIT
"""The pictures say what the numbers say: colours, places and opacities are checked in pixels."""

from __future__ import annotations

import numpy as np
import pytest

from fpt_model import visualize
from fpt_model.mixture import FlowMixture
from fpt_model.visualize import canvas_scale, draw_overlay, flow_to_color, legend, side_by_side

GREY = 128
NO_POINTS = np.zeros((0, 2))


def grey_image(height: int = 480, width: int = 480) -> np.ndarray:
    """Large enough that nothing is enlarged."""
    return np.full((height, width, 3), GREY, np.uint8)


def mixture(*modes: tuple[float, tuple[float, float], tuple[float, float]]) -> FlowMixture:
    """A mixture [1] of axis-aligned modes: probability, mean and standard deviations in px."""
    weights, means, stds = (np.array(values, np.float64) for values in zip(*modes, strict=True))
    tril = np.zeros((len(weights), 2, 2))
    tril[:, [0, 1], [0, 1]] = stds
    return FlowMixture(np.log(weights)[None], means[None], tril[None])


def drawn(picture: np.ndarray) -> np.ndarray:
    return (picture != GREY).any(axis=2)


def blueness(picture: np.ndarray) -> np.ndarray:
    """How far a pixel is from grey towards the mode colour, which has the most blue."""
    return picture[..., 2].astype(int) - picture[..., 0]


class TestFlowToColor:
    @pytest.mark.parametrize(
        ("vector", "colour"),
        [
            ((1, 0), (255, 0, 0)),
            ((0, 1), (255, 229, 0)),
            ((-1, 0), (0, 209, 255)),
            ((0, -1), (88, 0, 255)),
            ((0, 0), (255, 255, 255)),
        ],
    )
    def test_directions_have_the_middlebury_colours(self, vector, colour):
        np.testing.assert_array_equal(flow_to_color([[vector]], max_magnitude=1.0)[0, 0], colour)

    def test_negative_zero_is_zero(self):
        """arctan2(-0.0, 1) must not land on the other end of the wheel."""
        np.testing.assert_array_equal(flow_to_color([[(1.0, -0.0)]])[0, 0], (255, 0, 0))

    def test_shorter_vectors_are_paler_and_longer_ones_darker(self):
        half, full, beyond = flow_to_color([[(0.5, 0), (1, 0), (3, 0)]], max_magnitude=1.0)[0]
        np.testing.assert_array_equal(half, (255, 127, 127))
        np.testing.assert_array_equal(full, (255, 0, 0))
        np.testing.assert_array_equal(beyond, (191, 0, 0))

    def test_default_scale_is_the_largest_finite_vector(self):
        colours = flow_to_color([[(np.nan, 1.0), (2.0, 0.0), (np.inf, 0.0), (1.0, 0.0)]])[0]
        np.testing.assert_array_equal(colours[[0, 2]], np.zeros((2, 3)))
        np.testing.assert_array_equal(colours[1], (255, 0, 0))
        np.testing.assert_array_equal(colours[3], (255, 127, 127))

    def test_still_and_empty_fields(self):
        assert (flow_to_color(np.zeros((2, 3, 2))) == 255).all()
        assert flow_to_color(np.zeros((0, 3, 2))).shape == (0, 3, 3)

    @pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (2, 4, 4, 2)])
    def test_refuses_other_shapes(self, shape):
        with pytest.raises(ValueError, match=r"flow must have shape \[h, w, 2\]"):
            flow_to_color(np.zeros(shape))

    @pytest.mark.parametrize("magnitude", [0.0, -1.0, np.nan, np.inf])
    def test_refuses_a_senseless_scale(self, magnitude):
        with pytest.raises(ValueError, match=str(magnitude)):
            flow_to_color(np.zeros((2, 2, 2)), max_magnitude=magnitude)


class TestDrawOverlay:
    def test_nothing_to_draw_leaves_the_image_alone(self):
        image = grey_image()
        picture = draw_overlay(image, NO_POINTS, NO_POINTS, NO_POINTS, None)
        np.testing.assert_array_equal(picture, image)
        assert picture is not image

    def test_poke_arrow_spans_from_its_point_to_its_tip(self):
        picture = draw_overlay(grey_image(), [[100, 200]], [[150, 0]], NO_POINTS, None)
        is_poke = (picture == visualize.POKE_COLOUR).all(axis=2)
        rows, columns = np.nonzero(is_poke)
        assert is_poke[200, 112:240].all()
        assert columns.max() == pytest.approx(250, abs=4)
        assert (rows.min() + rows.max()) / 2 == pytest.approx(200, abs=1)

    def test_ellipse_encloses_the_stated_sigmas_around_the_tip(self):
        modes = mixture((1.0, (60.0, -80.0), (30.0, 12.0)))
        picture = draw_overlay(grey_image(), NO_POINTS, NO_POINTS, [[200, 300]], modes)
        ellipse = blueness(picture) > 20
        ellipse[250:] = False  # leaves the shaft and the query's dot
        rows, columns = np.nonzero(ellipse)
        reach = visualize.ELLIPSE_SIGMAS
        assert columns.min() == pytest.approx(260 - reach * 30, abs=2)
        assert columns.max() == pytest.approx(260 + reach * 30, abs=2)
        assert rows.min() == pytest.approx(220 - reach * 12, abs=2)

    def test_ellipse_follows_the_correlation(self):
        covariance = np.array([[900.0, 800.0], [800.0, 900.0]])
        tilted = FlowMixture(
            [[0.0]], np.zeros((1, 1, 2)), np.linalg.cholesky(covariance)[None, None]
        )
        picture = draw_overlay(grey_image(), NO_POINTS, NO_POINTS, [[240, 240]], tilted)
        assert drawn(picture)[240 + 40, 240 + 40]
        assert not drawn(picture)[240 - 40, 240 + 40]

    def test_opacity_is_the_mode_probability(self):
        spread = (1.0, 1.0)
        modes = mixture((0.75, (150.0, 0.0), spread), (0.25, (0.0, 150.0), spread))
        picture = draw_overlay(grey_image(), NO_POINTS, NO_POINTS, [[100, 100]], modes)
        full = np.array(visualize.MODE_COLOUR, np.float64) - GREY
        likely, unlikely = picture[100, 170] - float(GREY), picture[170, 100] - float(GREY)
        np.testing.assert_allclose(likely, 0.75 * full, atol=2)
        np.testing.assert_allclose(unlikely, 0.25 * full, atol=2)

    def test_improbable_modes_are_left_out(self):
        modes = mixture((0.97, (0.0, 0.0), (2.0, 2.0)), (0.03, (150.0, 0.0), (5.0, 5.0)))
        picture = draw_overlay(grey_image(), NO_POINTS, NO_POINTS, [[100, 100]], modes)
        assert not drawn(picture)[:, 130:].any()

    def test_small_images_are_enlarged_about_their_pixel_centres(self):
        assert canvas_scale(120, 160) == 4
        picture = draw_overlay(grey_image(120, 160), [[50, 30]], [[0, 0]], NO_POINTS, None)
        assert picture.shape == (480, 640, 3)
        rows, columns = np.nonzero(drawn(picture))
        assert columns.mean() == pytest.approx(50.5 * 4 - 0.5, abs=0.1)
        assert rows.mean() == pytest.approx(30.5 * 4 - 0.5, abs=0.1)

    @pytest.mark.parametrize(
        ("size", "scale"), [((240, 320), 2), ((480, 640), 1), ((1080, 1920), 1), ((2, 1500), 1)]
    )
    def test_enlargement(self, size, scale):
        assert canvas_scale(*size) == scale

    def test_mask_and_flow_cover_the_whole_image_at_any_resolution(self):
        mask = np.zeros((4, 4), bool)
        mask[:, 2:] = True
        picture = draw_overlay(
            grey_image(480, 640), NO_POINTS, NO_POINTS, NO_POINTS, None, mask=mask
        )
        assert drawn(picture)[240, 400]
        assert not drawn(picture)[240, 200]

        flow = np.where(mask[..., None], (5.0, 0.0), 0.0)
        picture = draw_overlay(grey_image(480, 640), NO_POINTS, NO_POINTS, NO_POINTS, None, flow)
        red, green, _ = picture[240, 620].astype(int)
        assert red > green + 100
        assert not drawn(picture)[240, 100]

    def test_thousands_of_queries_and_far_motion_are_drawn(self):
        queries = np.random.default_rng(0).uniform(0, 480, (10_000, 2))
        far = np.full((10_000, 1, 2), 1e12)
        modes = FlowMixture(np.zeros((10_000, 1)), far, np.tile(1e9 * np.eye(2), (10_000, 1, 1, 1)))
        picture = draw_overlay(grey_image(), NO_POINTS, NO_POINTS, queries, modes)
        assert drawn(picture).mean() > 0.3  # shafts, on to their tips far outside

    def test_three_dimensional_mixtures_show_their_image_plane_part(self):
        tril = np.diag([20.0, 20.0, 5.0])
        tril[2, :2] = 3.0
        spatial = FlowMixture([[0.0]], [[[50.0, 0.0, 9.0]]], tril[None, None])
        planar = FlowMixture([[0.0]], [[[50.0, 0.0]]], tril[None, None, :2, :2])
        pictures = [
            draw_overlay(grey_image(), NO_POINTS, NO_POINTS, [[100, 100]], m)
            for m in (spatial, planar)
        ]
        np.testing.assert_array_equal(*pictures)
        assert drawn(pictures[0])[100, 150]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((grey_image().astype(float), [[0, 0]], [[1, 1]], NO_POINTS, None), "uint8"),
            ((grey_image()[..., 0], [[0, 0]], [[1, 1]], NO_POINTS, None), r"\[H, W, 3\]"),
            ((grey_image(), [[0, 0]], NO_POINTS, NO_POINTS, None), "1 poke positions but 0"),
            ((grey_image(), [[0, np.nan]], [[1, 1]], NO_POINTS, None), "poke_xy_px must be finite"),
            ((grey_image(), [0, 0], [1, 1], NO_POINTS, None), r"\[N, 2\], received \[2\]"),
            ((grey_image(), NO_POINTS, NO_POINTS, [[5, 5]], None), r"batch shape \[1\]"),
            (
                (grey_image(), NO_POINTS, NO_POINTS, NO_POINTS, None, np.zeros((4, 4, 3))),
                r"flow_px must have shape \[h, w, 2\], received \[4, 4, 3\]",
            ),
            (
                (grey_image(), NO_POINTS, NO_POINTS, NO_POINTS, None, None, np.zeros((2, 2, 3))),
                r"mask must have shape \[h, w\], received \[2, 2, 3\]",
            ),
        ],
    )
    def test_refuses_malformed_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            draw_overlay(*arguments)


class TestSideBySide:
    def test_panels_keep_aspect_and_content(self):
        red, blue = np.zeros((40, 80, 3), np.uint8), np.zeros((20, 20, 3), np.uint8)
        red[..., 0], blue[..., 2] = 255, 255
        page = side_by_side([red, blue], ["left", "right"], panel_height=200)
        rows, columns = np.nonzero((page == (255, 0, 0)).all(axis=2))
        assert np.ptp(rows) + 1 == 200
        assert np.ptp(columns) + 1 == 400
        rows, columns = np.nonzero((page == (0, 0, 255)).all(axis=2))
        assert np.ptp(rows) + 1 == 200
        assert np.ptp(columns) + 1 == 200

    def test_caption_and_title_are_written_above(self):
        panel = grey_image(200, 300)
        plain = side_by_side([panel], [""])
        captioned = side_by_side([panel], ["predicted flow"])
        titled = side_by_side([panel], ["predicted flow"], title="drawer")
        assert plain.shape[0] < captioned.shape[0] < titled.shape[0]
        for page in (captioned, titled):
            assert (page[: page.shape[0] - plain.shape[0]] < 100).any()

    def test_long_captions_stay_over_their_panel(self):
        panel = np.full((200, 100, 3), 255, np.uint8)
        page = side_by_side([panel, panel], ["a very long caption " * 4, ""])
        second = page.shape[1] // 2 + 8
        assert (page[:20, second:] == 255).all()

    def test_refuses_mismatched_captions(self):
        with pytest.raises(ValueError, match="2 panels and 1 captions"):
            side_by_side([grey_image(), grey_image()], ["one"])
        with pytest.raises(ValueError, match="0 panels"):
            side_by_side([], [])

    @pytest.mark.parametrize("width", [300, 1200])
    def test_legend_fits_its_width(self, width):
        strip = legend(width)
        assert strip.shape == (40, width, 3)
        assert (strip[:, -2:] == 255).all()
        assert (strip < 100).any()
