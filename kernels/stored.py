"""How numbers are stored that a CUDA C++ kernel reads and writes: in float32, or in one narrower type."""

from functools import cache

import torch

NARROW = {torch.bfloat16: "T_BF16", torch.float16: "T_FP16"}


@cache
def mixed(*dtypes: torch.dtype) -> str | None:
    """Why one kernel cannot have these types together; None where it can."""
    odd = sorted(str(t) for t in set(dtypes) - {*NARROW, torch.float32})
    if odd:
        return f"it takes float16, bfloat16 and float32, got {', '.join(odd)}"
    return "it takes either float16 or bfloat16 beside float32, got both" if NARROW.keys() <= set(dtypes) else None


@cache
def defines(**dtypes: torch.dtype) -> tuple[str, ...]:
    """What a source is compiled with: the narrow type, and for each name ``float`` or ``real_t``, that type."""
    narrow = next((NARROW[t] for t in dtypes.values() if t in NARROW), "T_FP32")
    return narrow, *(f"{name}={'real_t' if t in NARROW else 'float'}" for name, t in dtypes.items())
