# SPDX-License-Identifier: MIT
"""Executable of the FPT node, see `fpt_ros.inference_node`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fpt_ros.spin import run


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT; returns the exit code."""

    def load() -> type:
        from fpt_model.allocator import keep_freed_memory
        from fpt_ros.inference_node import FptNode

        keep_freed_memory()
        return FptNode

    return run(load, args)


if __name__ == "__main__":
    sys.exit(main())
