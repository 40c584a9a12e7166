# SPDX-License-Identifier: MIT
"""Executable of the FPT node, see `fpt_ros.inference_node`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fpt_ros.first_thread import FirstThread
from fpt_ros.spin import run

if TYPE_CHECKING:
    from fpt_ros.inference_node import FptNode


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT; returns the exit code."""

    first = FirstThread()

    def load() -> Callable[[], FptNode]:
        from fpt_model.allocator import keep_freed_memory
        from fpt_ros.inference_node import FptNode

        keep_freed_memory()
        return partial(FptNode, first_thread=first)

    return run(load, args, first)


if __name__ == "__main__":
    sys.exit(main())
