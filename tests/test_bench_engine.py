# SPDX-License-Identifier: MIT
"""benchmarks/bench_engine.py: it runs, and counts our own operations as torch counts its own."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import bench_engine
import bench_kernels
import pytest
import torch
import torch.nn.functional as F
from compilers import needs_compiler
from torch.utils.flop_counter import FlopCounterMode

from fpt_model.packed import PackedLinear, can_pack

OWN = torch.ops.fpt_model
pytestmark = pytest.mark.usefixtures("build_cache")


def operations(call: Callable[[], object]) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        call()
    return counted.get_total_flops()


def test_products_are_counted() -> None:
    x, weight = torch.randn(2, 300, 64), torch.randn(96, 64)
    expected = 2 * 600 * 64 * 96
    assert operations(lambda: F.linear(x, weight)) == expected
    assert operations(lambda: OWN.linear(x, weight, None)) == expected


@pytest.mark.skipif(not can_pack(), reason="no packed products of bfloat16 here")
def test_packed_products_are_counted() -> None:
    layer = PackedLinear(torch.nn.Linear(64, 96, dtype=torch.bfloat16))
    x = torch.randn(2, 300, 64, dtype=torch.bfloat16)
    assert operations(lambda: layer(x)) == 2 * 600 * 64 * 96
    number = 8  # bytes of the handle
    assert moved(lambda: layer(x)) == 2 * (600 * 64 + 64 * 96 + 96 + 600 * 96) + number


@needs_compiler
def test_attention_is_counted() -> None:
    q, k, v = (torch.randn(1, 3, n, 64) for n in (40, 70, 70))
    expected = 2 * 2 * 3 * 40 * 70 * 64
    for attention in (OWN.attend_in_parts, OWN.attend_natively):
        assert operations(lambda a=attention: a(q, k, v, 1.0)) == expected
    assert operations(lambda: F.scaled_dot_product_attention(q, k, v)) == expected


def moved(call: Callable[[], object]) -> int:
    with torch.inference_mode(), bench_engine.ByteCounter() as counted:
        call()
    return counted.total


def test_bytes_are_counted() -> None:
    """Of float32 [6, 8], unless said: 192 bytes."""
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    for call, expected in (
        (lambda: x + y, 3 * 192),
        (lambda: torch.add(x, y, out=torch.empty(6, 8)), 3 * 192),
        (lambda: x.add_(y), 3 * 192),
        (lambda: x.add_(1), 2 * 192),
        (lambda: torch.zeros(6, 8).copy_(x), 192 + 2 * 192),
        (lambda: torch.equal(x, y), 2 * 192),
        (lambda: x @ y.T, 2 * 192 + 36 * 4),
        (lambda: x.bfloat16(), 192 + 96),
        (lambda: torch.cat([x, y]), 4 * 192),
        (lambda: x[:, :4].contiguous(), 2 * 96),
        (lambda: x.T.reshape(48), 2 * 192),
        (lambda: x.reshape(48), 0),
        (lambda: x.float(), 0),
        (lambda: x.contiguous(), 0),
        (lambda: x.chunk(2), 0),
        (lambda: x[2:].T.flatten(0, 0), 0),
        (lambda: torch.empty(100), 0),
        (lambda: x.new_empty(100), 0),
        (lambda: torch.zeros(100), 400),
        (lambda: torch.ones(1).expand(6, 8) + x, 4 + 4 + 2 * 192),
    ):
        assert moved(call) == expected, inspect.getsource(call)


@needs_compiler
def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process for each path, as small as it gets."""
    out = tmp_path / "rows.json"
    arguments = ["--precision", "fp32", "--joint", "2", "--quick", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", *arguments, "--compile", "--baseline"])
    bench_engine.main()
    report = json.loads(out.read_text())
    paths = {
        path: {row["task"]: row for row in report["rows"] if row["path"] == path}
        for path in ("engine", "compiled", "baseline")
    }
    rows, compiled, plain = paths.values()
    assert rows.keys() == compiled.keys()
    assert len(rows) == 10
    assert plain.keys() < rows.keys()
    for row in report["rows"]:
        assert min(row[name] for name in ("seconds", "gflop", "gbyte", "ceiling")) > 0
    for task, row in compiled.items():
        assert row["gflop"] == rows[task]["gflop"]
    # every cell of a grid costs the same, whether it is large or small
    ratio = rows["dense 128x128"]["gflop"] / rows["dense 64x64"]["gflop"]
    assert ratio == pytest.approx(4, rel=0.01)
    # what places were made of is not made again
    again = rows["dense 64x64, other pokes"]["gflop"] / rows["dense 64x64"]["gflop"]
    assert 0.8 < again < 0.99
    # the baseline projects the image anew in every call
    assert plain["1 query, 1 poke"]["gflop"] > 2 * rows["1 query, 1 poke"]["gflop"]
    assert all(0.1 < peak < 4 for peak in report["peak_gb"].values())
    assert len(report["peak_gb"]) == len(paths)
    ratios = [
        line.split("|")[-2] for line in capsys.readouterr().out.splitlines() if "| fp" in line
    ]
    assert len([x for x in ratios if x.strip() != "not run"]) == 2 * len(plain)


@needs_compiler
def test_kernels_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--times", "1"])
    bench_kernels.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    names, attention = rows[4], rows[6:]
    assert len(attention) == len(bench_kernels.ATTENTION)
    for row in attention:
        assert all(float(figure) > 0 for figure in row[1:])
        errors = {n.strip(): float(x) for n, x in zip(names, row, strict=True) if "error" in n}
        assert all(e < (0.03 if "bf16" in n else 1e-5) for n, e in errors.items())
