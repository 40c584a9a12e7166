# SPDX-License-Identifier: MIT
"""Products of matrices and attention by torch's code and by ours, alternating in one process.

    python benchmarks/bench_kernels.py

Prints a table of rates and one of times with the largest errors, in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import medians, where

from fpt_model.allocator import keep_freed_memory
from fpt_model.attention import attend_in_parts, attend_natively
from fpt_model.packed import multiply

PRODUCTS = {  # rows, inputs, outputs
    "fpt-tiny's dense flow": (4096, 192, 1152),
    "fpt-base's encoder": (1029, 768, 768),
}
ATTENTION = {  # heads, queries, keys, of 64 channels
    "fpt-tiny's dense flow": (3, 4096, 400),
    "its context": (3, 400, 400),
    "fpt-base's dense flow": (12, 512, 1024),
    "its encoder": (12, 1029, 1029),
}


def products(rows: int, inputs: int, outputs: int, times: int) -> dict[str, float]:
    """GFLOP/s."""
    x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    x16, w16 = x.bfloat16(), w.bfloat16()
    found = medians(
        {
            "torch fp32": lambda: F.linear(x, w),
            "oneDNN fp32": lambda: multiply(x, w, None),
            "torch bf16": lambda: F.linear(x16, w16),
        },
        times,
    )
    return {name: 2e-9 * rows * inputs * outputs / seconds for name, seconds in found.items()}


def attention(heads: int, queries: int, keys: int, times: int) -> dict[str, float]:
    """Milliseconds; and the largest errors."""
    tokens = (torch.randn(1, n, heads, 64).transpose(1, 2) for n in (queries, keys, keys))
    q, k, v = tokens
    q, k = 3 * F.normalize(q, dim=-1), 3 * F.normalize(k, dim=-1)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    errors = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b, c = (t.to(dtype) for t in (q, k, v))
        exact = (a.double() @ b.double().mT).softmax(-1) @ c.double()
        own = {
            "torch": lambda a=a, b=b, c=c: F.scaled_dot_product_attention(a, b, c, scale=1.0),
            "in parts": lambda a=a, b=b, c=c: attend_in_parts(a, b, c, 1.0),
            "C++": lambda a=a, b=b, c=c: attend_natively(a, b, c, 1.0),
        }
        for kind, call in own.items():
            calls[f"{kind} {name}"] = call
            errors[f"{kind} {name}, error"] = float((call() - exact).abs().max())
    found = medians(calls, times)
    return {name: 1e3 * seconds for name, seconds in found.items()} | errors


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3g}" for c in columns) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20, help="each is measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    run = where(args.threads, torch=torch.__version__)
    print(", ".join(f"{k} {v}" for k, v in run.items()) + "\n\nGFLOP/s\n")
    print(table({name: products(*size, args.times) for name, size in PRODUCTS.items()}))
    print("\nms, and largest errors\n")
    print(table({name: attention(*size, args.times) for name, size in ATTENTION.items()}))


if __name__ == "__main__":
    main()
