"""The machine's matrix-multiply rate: float32 on a CPU, bfloat16 on a GPU. Prints one JSON object.

Square products of two sizes, timed for about a second each after a warm-up; the rate is that of the faster size, the
median over its repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch


def rate(size: int, device: torch.device, seconds: float) -> float:
    """Floating-point operations a second of [size, size] @ [size, size]."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (
        torch.randn(size, size, dtype=dtype, device=device),
        torch.randn(size, size, dtype=dtype, device=device),
    )
    out = torch.empty_like(left)
    times: list[float] = []
    spent = 0.0
    torch.mm(left, right, out=out)
    while spent < seconds or len(times) < 5:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        spent += times[-1]
    return 2.0 * size**3 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the matrix-multiply rate of this machine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    rates = {size: rate(size, device, options.seconds) for size in sizes}
    print(json.dumps({"flops_per_second": max(rates.values()), "by_size": rates, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
