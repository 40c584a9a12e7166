# SPDX-License-Identifier: MIT
"""Conversion and validation of the `fpt_msgs` interfaces; everything is in pixels of the image.

The unit and the convention of a pixel coordinate are those of `fpt_model.geometry`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from std_msgs.msg import Header

from fpt_model.mixture import FlowMixture
from fpt_msgs.msg import FlowDistribution, FlowSamples, Poke, PokeArray, QueryArray
from fpt_ros.images import flat_array
from fpt_ros.pokes import Pokes, RequestError, Size


def read_pokes(pokes: Sequence[Poke], max_pokes: int | None = None) -> Pokes:
    """The pokes of a message.

    Raises:
        RequestError: for a coordinate that is NaN (``dz`` may be) or infinite, or more than
            ``max_pokes`` pokes.
    """
    if max_pokes is not None and len(pokes) > max_pokes:
        raise RequestError(f"received {len(pokes)} pokes, expected at most {max_pokes}")
    values = np.array([(p.x, p.y, p.dx, p.dy, p.dz) for p in pokes], np.float64).reshape(-1, 5)
    usable = np.isfinite(values)
    usable[:, 4] |= np.isnan(values[:, 4])
    bad = np.flatnonzero(~usable.all(axis=1))
    if bad.size:
        x, y, dx, dy, dz = values[bad[0]]
        raise RequestError(
            f"poke {bad[0]} of {len(values)} must be finite (dz may be NaN), "
            f"received x={x:g}, y={y:g}, dx={dx:g}, dy={dy:g}, dz={dz:g}"
        )
    return Pokes(values[:, :2], values[:, 2:4], values[:, 4])


def pokes_to_msg(pokes: Pokes, header: Header) -> PokeArray:
    """A message of pokes. A zero stamp in the header means the newest image."""
    rows = np.hstack([pokes.xy, pokes.flow, pokes.dz[:, None]]).tolist()
    return PokeArray(
        header=header, pokes=[Poke(x=x, y=y, dx=dx, dy=dy, dz=dz) for x, y, dx, dy, dz in rows]
    )


def read_queries(
    values: Sequence[float], max_queries: int | None = None
) -> NDArray[np.float64] | None:
    """The query positions ``[Q, 2]`` in px of a message's flat float32 array; None: it is empty.

    Raises:
        RequestError: for an odd number of values, one that is NaN or infinite, or more than
            ``max_queries`` positions.
    """
    flat = np.frombuffer(values, np.float32).astype(np.float64)  # type: ignore[call-overload]
    if len(flat) % 2:
        raise RequestError(f"queries must be x, y pairs, received {len(flat)} values")
    xy = flat.reshape(-1, 2)
    if max_queries is not None and len(xy) > max_queries:
        raise RequestError(f"received {len(xy)} queries, expected at most {max_queries}")
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if bad.size:
        x, y = xy[bad[0]]
        raise RequestError(f"query {bad[0]} of {len(xy)} must be finite, received x={x:g}, y={y:g}")
    return xy if len(xy) else None


def queries_to_msg(xy: ArrayLike, header: Header) -> QueryArray:
    """A message of the query positions ``[Q, 2]`` in px."""
    return QueryArray(header=header, xy=flat_array("f", np.asarray(xy, np.float32)))


def distribution_to_msg(
    mixture: FlowMixture,
    queries: NDArray[np.float64],
    size: Size,
    header: Header,
    model_name: str = "",
    horizon_s: float = 0.0,
) -> FlowDistribution:
    """A message of a mixture ``[N]`` in px (and m) at ``queries [N, 2]`` in px, image of ``size``.

    Raises:
        ValueError: when mixture and queries differ in number.
    """
    if mixture.shape != (len(queries),):
        raise ValueError(
            f"expected a mixture of shape {(len(queries),)}, one for each query, "
            f"received {mixture.shape}"
        )
    return FlowDistribution(
        header=header,
        image_height=size[0],
        image_width=size[1],
        dims=mixture.dims,
        components=mixture.components,
        count=len(queries),
        queries=flat_array("f", queries.astype(np.float32)),
        weights=flat_array("f", mixture.weights.astype(np.float32)),
        means=flat_array("f", mixture.means.astype(np.float32)),
        scale_tril=flat_array("f", mixture.scale_tril.astype(np.float32)),
        model_name=model_name,
        horizon_s=horizon_s,
    )


def samples_to_msg(
    flow: NDArray[np.float64],
    queries: NDArray[np.float64],
    size: Size,
    header: Header,
    model_name: str = "",
    horizon_s: float = 0.0,
) -> FlowSamples:
    """A message of joint samples ``[S, N, D]`` in px at ``queries [N, 2]`` in px.

    Raises:
        ValueError: when samples and queries differ in number.
    """
    if flow.ndim != 3 or flow.shape[1] != len(queries):
        raise ValueError(f"expected samples [S, {len(queries)}, D], received {list(flow.shape)}")
    return FlowSamples(
        header=header,
        image_height=size[0],
        image_width=size[1],
        dims=flow.shape[2],
        samples=flow.shape[0],
        count=len(queries),
        queries=flat_array("f", queries.astype(np.float32)),
        flow=flat_array("f", flow.astype(np.float32)),
        model_name=model_name,
        horizon_s=horizon_s,
    )


def samples_from_msg(msg: FlowSamples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``(queries [N, 2], flow [S, N, D])`` of a message, both in px.

    Raises:
        RequestError: when the length of an array is not what samples, count and dims say.
    """
    queries, flow = _arrays(
        msg,
        {"queries": (msg.count, 2), "flow": (msg.samples, msg.count, msg.dims)},
        f"samples={msg.samples}, count={msg.count}, dims={msg.dims}",
    )
    return queries, flow


def distribution_from_msg(msg: FlowDistribution) -> tuple[NDArray[np.float64], FlowMixture]:
    """``(queries [N, 2], mixture [N])`` of a message, both in px.

    Raises:
        RequestError: when the length of an array is not what count, components and dims say.
    """
    n, k, d = msg.count, msg.components, msg.dims
    queries, weights, means, scale_tril = _arrays(
        msg,
        {
            "queries": (n, 2),
            "weights": (n, k),
            "means": (n, k, d),
            "scale_tril": (n, k, d, d),
        },
        f"count={n}, components={k}, dims={d}",
    )
    with np.errstate(divide="ignore"):  # a weight may have underflowed to 0 in float32
        log_weights = np.log(weights)
    return queries, FlowMixture(log_weights, means, scale_tril)


def _arrays(
    msg: FlowDistribution | FlowSamples, shapes: dict[str, tuple[int, ...]], because: str
) -> list[NDArray[np.float64]]:
    """The flat float32 fields of a message in their shapes; RequestError for another length."""
    arrays = []
    for name, shape in shapes.items():
        values = np.frombuffer(getattr(msg, name), np.float32)
        if values.size != math.prod(shape):
            raise RequestError(
                f"{name} has {values.size} values, expected {'*'.join(map(str, shape))} = "
                f"{math.prod(shape)} ({because})"
            )
        arrays.append(values.reshape(shape).astype(np.float64))
    return arrays
