"""Times networks, ours and timm's, inference and training, in one run and interleaved; on a GPU or on the CPU.

    python -m vmamba.tools.bench_models vmamba_tiny_s1l8 convnext_tiny --batch 128 --precision bf16

Training is forward and backward without an optimiser. Random images; medians; the first repetitions are not counted.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

import vmamba  # noqa: F401  registers our networks in timm

RIVALS = ("vmamba_tiny_s1l8", "convnext_tiny", "swin_tiny_patch4_window7_224")
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Parses the command line, measures, prints a table, and writes JSON where asked."""
    args = _parser().parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    jobs = {name: _Job(name, args) for name in args.models}
    times: dict[str, dict[str, list[float]]] = {name: {"infer": [], "train": []} for name in jobs}
    for what in ("infer", "train") if args.train else ("infer",):
        for repetition in range(args.warmup + args.repeat):
            for name, job in jobs.items():
                seconds = job.seconds(what)
                if repetition >= args.warmup:
                    times[name][what].append(seconds)
    rows = [{"model": name, **_row(times[name], jobs[name], args.batch)} for name in jobs]
    print(_machine(args))
    print(_table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"setting": vars(args), "machine": _machine(args), "rows": rows}, file, indent=2)


class _Job:
    """A network and its images, and the peak memory of its training step."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.args, self.peak = args, 0
        self.model = timm.create_model(name).to(args.device)
        if args.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.run: Callable[..., Any] = torch.compile(self.model) if args.compile else self.model
        self.image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)

    def seconds(self, what: str) -> float:
        on_gpu, dtype = self.args.device == "cuda", PRECISIONS[self.args.precision]
        self.model.train(what == "train")
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.set_grad_enabled(what == "train"):
            with torch.autocast(self.args.device, dtype, enabled=dtype != torch.float32):
                logits = self.run(self.image)
            if what == "train":
                logits.float().square().mean().backward()
                self.model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        return time.perf_counter() - start


def _row(times: dict[str, list[float]], job: _Job, batch: int) -> dict[str, Any]:
    medians = {what: statistics.median(values) for what, values in times.items() if values}
    rates = {f"{what} img/s": batch / seconds for what, seconds in medians.items()}
    return {**{f"{k} ms": v * 1e3 for k, v in medians.items()}, **rates, "peak GiB": job.peak / 2**30 or None}


def _table(rows: list[dict[str, Any]]) -> str:
    def text(value: Any) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    mode = "compiled" if args.compile else "eager"
    layout = ", weights channels-last" if args.channels_last else ""
    return f"{device}; {versions}; {args.precision}, {mode}{layout}; batch {args.batch}, {args.size} x {args.size}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=RIVALS, help=f"timm names (default: {' '.join(RIVALS)})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true", help="torch.compile, default mode")
    parser.add_argument("--channels-last", action="store_true", help="weights of convolutions channels-last")
    parser.add_argument("--no-train", dest="train", action="store_false", help="inference only")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    main()
