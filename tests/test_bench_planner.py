# SPDX-License-Identifier: MIT
"""The planner acts in simulation, by the benchmark's own command, with the shipped model."""

import json
import subprocess
import sys
from pathlib import Path

from node_harness import ROOT


def test_the_planner_acts_in_simulation(tmp_path: Path) -> None:
    out = tmp_path / "planner.json"
    command = [sys.executable, "benchmarks/bench_planner.py", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["kind"] == "drawer"
    # a drawer: a poke elsewhere on it by the goal's motion moves the goal's point to its goal
    assert row["planner"] < 0.5
    assert row["centre"] < 0.5
    assert len(row["random"]) == 8
    assert max(row["random"]) > 0.5
    assert 0 < row["expected"] <= 1
    assert 0 < row["movable"] < 1
    for line in ("| planner |", "| centre |", "| random |", "| drawer | 1 |"):
        assert line in done.stdout, done.stdout
