"""Times of the selective scan on this machine's GPU, beside published kernels on one H200: ``make bench``.

Milliseconds: medians of CUDA-event timings after warm-up, random bfloat16 inputs (A, D, bias in float32), softplus on.
"oflex" and "mamba" are the CUDA kernels of MzeroMiko/VMamba and state-spaces/mamba (nvcc 13.0, -O3 --use_fast_math,
sm_90), measured on one NVIDIA H200 with torch 2.11.0+cu130 and Triton 3.6.0 on 2026-11-20.
"""

import torch
import triton
from triton.testing import do_bench

from vmamba.kernels.selective_scan import route_scan

# what, (b, k, l, d, n): (forward, forward + backward) of oflex, of mamba
CASES = {
    ("VMamba-T stage 1", (128, 4, 3136, 96, 1)): (1.05, 3.64, 1.06, 3.76),
    ("VMamba-T stage 3", (128, 4, 196, 384, 1)): (0.29, 0.96, 0.30, 1.18),
    ("Vim-Ti 224", (128, 1, 197, 384, 16)): (0.38, 1.30, 0.38, 1.51),
    ("Vim-Ti 1248", (8, 1, 6085, 384, 16)): (0.54, 2.21, 0.54, 2.67),
    ("VMamba-T stage 1 at 1024", (4, 4, 65536, 96, 1)): (0.38, 1.55, 0.38, 1.36),
    ("Vanilla-VMamba stage 1", (8, 4, 3136, 192, 16)): (0.69, 2.69, 0.69, 3.01),
}


def inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> dict[str, torch.Tensor]:
    """Random arguments of ``route_scan`` for a shape (b, k, l, d, n), with gradients; A, D, bias in float32."""
    b, k, length, d, n = shape

    def normal(*size, dtype=torch.float32, **factor):
        return torch.randn(size, device=device).mul_(factor.get("scale", 1)).add_(factor.get("shift", 0)).to(dtype)

    tensors = {
        "u": normal(b, k, length, d, dtype=dtype),
        "delta": normal(b, k, length, d, dtype=dtype, scale=0.5),
        "A": -normal(k, d, n, scale=0.5).exp(),
        "B": normal(b, k, length, n, dtype=dtype),
        "C": normal(b, k, length, n, dtype=dtype),
        "D": normal(k, d),
        "delta_bias": normal(k, d, scale=0.5, shift=-3.0),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def times(shape: tuple[int, int, int, int, int], backend: str = "triton") -> tuple[float, float]:
    """Milliseconds of the forward, and of the forward and backward together."""
    tensors = inputs(shape)

    def forward() -> torch.Tensor:
        return route_scan(**tensors, delta_softplus=True, backend=backend)

    gradient = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), list(tensors.values()), gradient)

    with torch.no_grad():
        first = do_bench(forward, warmup=50, rep=200, quantiles=[0.5])
    return float(first), float(do_bench(both, warmup=50, rep=300, quantiles=[0.5]))  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Print a Markdown table of all cases."""
    if not torch.cuda.is_available():
        print("the scans alone are timed on a CUDA GPU, and there is none here")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}; ms\n")
    print("| case | b, k, l, d, n | forward | + backward | oflex | mamba |\n|---|---|---|---|---|---|")
    for (what, shape), anchor in CASES.items():
        forward, both = times(shape)
        print(
            f"| {what} | {', '.join(map(str, shape))} | {forward:.2f} | {both:.2f} "
            f"| {anchor[0]:.2f}, {anchor[1]:.2f} | {anchor[2]:.2f}, {anchor[3]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
