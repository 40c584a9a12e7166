# SPDX-License-Identifier: MIT
"""Conversion of pokes, queries and distributions, and the refusal of bad ones."""

import re

import numpy as np
import pytest
from node_harness import ROOT
from std_msgs.msg import Header

from fpt_model import FlowMixture
from fpt_msgs.msg import Poke
from fpt_ros.images import flat_array
from fpt_ros.messages import (
    distribution_from_msg,
    distribution_to_msg,
    pokes_to_msg,
    queries_to_msg,
    read_pokes,
    read_queries,
)
from fpt_ros.pokes import Pokes, RequestError, check_inside

NAN, INF = float("nan"), float("inf")


def test_pokes_round_trip() -> None:
    pokes = Pokes(np.array([[1.5, 2.0], [-0.5, 7.0]]), np.array([[3.0, -4.0], [0.0, 0.25]]))
    msg = pokes_to_msg(pokes, Header(frame_id="camera"))
    assert msg.header.frame_id == "camera"
    assert all(np.isnan(p.dz) for p in msg.pokes)
    again = read_pokes(msg.pokes)
    np.testing.assert_array_equal(again.xy, pokes.xy)
    np.testing.assert_array_equal(again.flow, pokes.flow)


def test_no_pokes() -> None:
    pokes = read_pokes([])
    assert len(pokes) == 0
    assert pokes.xy.shape == pokes.flow.shape == (0, 2)


@pytest.mark.parametrize(("field", "value"), [("x", NAN), ("y", INF), ("dx", -INF), ("dy", NAN)])
def test_poke_must_be_finite(field: str, value: float) -> None:
    bad = Poke(x=1.0, y=2.0, dx=3.0, dy=4.0)
    setattr(bad, field, value)
    with pytest.raises(RequestError, match=f"poke 1 of 2 .*{field}={value:g}"):
        read_pokes([Poke(), bad])


def test_too_many_pokes() -> None:
    with pytest.raises(RequestError, match="received 3 pokes, expected at most 2"):
        read_pokes([Poke()] * 3, max_pokes=2)


def test_queries_round_trip() -> None:
    xy = np.array([[0.0, 1.0], [2.5, 3.0]])
    np.testing.assert_array_equal(read_queries(queries_to_msg(xy, Header()).xy), xy)
    assert read_queries(queries_to_msg(np.zeros((0, 2)), Header()).xy) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [([1.0, 2.0, 3.0], "3 values"), ([0.0, 0.0, 1.0, NAN], "query 1 of 2.*nan")],
)
def test_bad_queries(values: list[float], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_queries(flat_array("f", np.array(values, np.float32)))


def test_too_many_queries() -> None:
    with pytest.raises(RequestError, match="received 3 queries, expected at most 2"):
        read_queries(flat_array("f", np.zeros(6, np.float32)), max_queries=2)


def test_the_border_is_inside_and_beyond_is_named() -> None:
    check_inside("poke", np.array([[-0.5, -0.5], [63.5, 47.5]]), (48, 64))
    with pytest.raises(RequestError, match=r"poke 1 of 2 at x=64, y=0 px .* 64 x 48 px image"):
        check_inside("poke", np.array([[0.0, 0.0], [64.0, 0.0]]), (48, 64))


def mixture(n: int) -> FlowMixture:
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(4), n)
    tril = np.tril(rng.normal(0, 1, (n, 4, 2, 2))) + 3 * np.eye(2)
    return FlowMixture(np.log(weights), rng.normal(0, 5, (n, 4, 2)), tril)


def test_distribution_round_trip() -> None:
    queries = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sent = mixture(3)
    msg = distribution_to_msg(sent, queries, (48, 64), Header(frame_id="camera"), "m", 0.5)
    assert (msg.image_height, msg.image_width, msg.dims, msg.components, msg.count) == (
        48, 64, 2, 4, 3,
    )  # fmt: skip
    assert (msg.model_name, msg.horizon_s, msg.header.frame_id) == ("m", 0.5, "camera")
    again_queries, received = distribution_from_msg(msg)
    np.testing.assert_array_equal(again_queries, queries)
    np.testing.assert_allclose(received.weights, sent.weights, atol=1e-6)
    np.testing.assert_allclose(received.means, sent.means, atol=1e-5)
    np.testing.assert_allclose(received.scale_tril, sent.scale_tril, atol=1e-5)


def test_the_documented_way_to_read_a_distribution() -> None:
    page = (ROOT / "docs" / "messages.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    msg = distribution_to_msg(mixture(3), np.arange(6.0).reshape(3, 2), (48, 64), Header())
    read = {"msg": msg}
    exec(code, read)
    queries, expected = distribution_from_msg(msg)
    np.testing.assert_array_equal(read["queries"], queries)
    np.testing.assert_allclose(read["covariances"], expected.component_covariances(), rtol=1e-4)
    np.testing.assert_allclose(read["most_likely"], expected.modes().means[:, 0], rtol=1e-6)


def test_distribution_lengths_are_checked() -> None:
    msg = distribution_to_msg(mixture(2), np.zeros((2, 2)), (4, 4), Header())
    msg.count = 3
    with pytest.raises(RequestError, match=r"queries has 4 values, expected 3\*2 = 6"):
        distribution_from_msg(msg)
    with pytest.raises(ValueError, match="one for each query"):
        distribution_to_msg(mixture(2), np.zeros((3, 2)), (4, 4), Header())
