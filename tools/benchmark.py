"""vmamba benchmark models | operators | plot: times and memory beside what else there is, in one run, interleaved."""

import argparse
from pathlib import Path
from typing import Any

from vmamba.errors import UserError

MODELS = """examples:
  vmamba benchmark models vmamba_tiny_s1l8 convnext_tiny --batch 128 --precision bf16 --train
  vmamba benchmark models --sizes 224 384 512 768 1024 1536 2048 --batch auto --json models.json --plot models.png
  vmamba benchmark models --batch 1 --cuda-graph                 (latency without the host's part)"""
OPERATORS = """examples:
  vmamba benchmark operators
  vmamba benchmark operators selective_scan scan2d --backend cuda triton --train --json operators.json"""
PLOT = "example:\n  vmamba benchmark plot models.json -o models.png"


def add_parser(subparsers: Any) -> None:
    """Adds ``benchmark`` and its three commands."""
    parser = subparsers.add_parser("benchmark", help="time networks and operators on this machine", description=__doc__)
    commands = parser.add_subparsers(
        dest="benchmark_command", required=True, metavar="models | operators | plot", title="commands"
    )
    _add_models(commands)
    _add_operators(commands)
    text = "draw what benchmark models --json wrote: throughput and memory over resolution"
    plot = _command(commands, "plot", text, PLOT, run_plot)
    plot.add_argument("json", type=Path, help="file of benchmark models")
    plot.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png", help="picture to write")


def _command(commands: Any, name: str, text: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    title = f"{text[0].upper()}{text[1:]}."
    parser = commands.add_parser(name, help=text, description=title, epilog=epilog, formatter_class=shape)
    parser.set_defaults(run=run)
    return parser


def _add_models(commands: Any) -> None:
    text = "time networks, ours and timm's: throughput or latency, peak memory, bytes moved"
    parser = _command(commands, "models", text, MODELS, run_models)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks (default: VMamba-T, ConvNeXt-T, Swin-T)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], metavar="N", help="sides of images (224)")
    parser.add_argument("--batch", default="1", metavar="N", help="images, or auto: about as many pixels at each size")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16", "fp16"), help="default fp32")
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    parser.add_argument("--compile", nargs="?", const="default", default="", choices=modes, help="torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="weights and images channels-last")
    _add_measuring(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw throughput and memory over resolution")


def _add_operators(commands: Any) -> None:
    text = "time operators at published shapes, by every backend and installed package that can run here"
    parser = _command(commands, "operators", text, OPERATORS, run_operators)
    parser.add_argument("names", nargs="*", metavar="OPERATOR", help="selective_scan, scan2d ... (default: all)")
    parser.add_argument("--backend", nargs="+", default=[], metavar="NAME", help="these only, such as cuda, mamba-ssm")
    parser.add_argument("--batch", type=int, metavar="N", help="instead of the published (default on a CPU: 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of inputs (default bf16, CPU: fp32)")
    _add_measuring(parser)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", action="store_true", help="forward and backward too")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--cuda-graph", action="store_true", help="time the replay of a CUDA graph")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="repetitions, 3 or more (default 20)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="repetitions before (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="after which a row is not repeated further (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row as it is measured")
    parser.add_argument("--resume", action="store_true", help="measure only what the JSON file lacks")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run_models(args: argparse.Namespace) -> int:
    """vmamba benchmark models"""
    from vmamba.tools import benchmark_run
    from vmamba.tools.benchmark_models import RIVALS, Setting

    draw = _drawing(args.plot) if args.plot else None
    if args.batch != "auto" and not (args.batch.isdecimal() and int(args.batch)):
        raise UserError(f"--batch takes a positive number or auto, got {args.batch!r}")
    if min(args.sizes) < 1:
        raise UserError(f"--sizes takes positive numbers, got {' '.join(map(str, args.sizes))}")
    batch = None if args.batch == "auto" else int(args.batch)
    device = benchmark_run.device_of(args)
    if args.precision == "tf32" and device.type != "cuda":
        raise UserError("tf32 is a GPU's; on a CPU take fp32 or bf16")
    setting = Setting(device, batch, args.precision, args.compile, args.channels_last)
    results = benchmark_run.models(list(dict.fromkeys(args.names or RIVALS)), args, setting)
    if draw:
        draw(results)
    return 0


def run_operators(args: argparse.Namespace) -> int:
    """vmamba benchmark operators"""
    from vmamba.tools import benchmark_run
    from vmamba.tools.benchmark_cases import OPERATORS
    from vmamba.tools.benchmark_operators import NAMES, Setting

    unknown = [name for name in args.backend if name not in NAMES]
    if unknown:
        raise UserError(f"unknown backend {unknown[0]!r}; choose from {', '.join(NAMES)}")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch takes a positive number, got {args.batch}")
    device = benchmark_run.device_of(args)
    on_cpu = device.type == "cpu"
    batch = args.batch or (1 if on_cpu else None)
    setting = Setting(device, args.precision or ("fp32" if on_cpu else "bf16"), batch, tuple(args.backend))
    benchmark_run.operators(list(dict.fromkeys(args.names or OPERATORS)), args, setting)
    return 0


def run_plot(args: argparse.Namespace) -> int:
    """vmamba benchmark plot"""
    from vmamba.tools.benchmark_results import read

    draw = _drawing(args.output)
    found = read(args.json)
    if found["kind"] != "models":
        raise UserError(f"{args.json} is of benchmark {found['kind']}; only what benchmark models wrote can be drawn")
    draw(found)
    return 0


def _drawing(path: Path) -> Any:
    """A function that draws results into ``path``; refuses before anything is measured."""
    if path.suffix != ".png":
        raise UserError(f"the picture is a PNG; its name must end in .png, got {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    try:
        from vmamba.tools.draw_benchmark import save
    except ImportError as error:
        raise UserError(f"a picture needs matplotlib ({error}); pip install 'vmamba[medical]'") from None

    def draw(results: Any) -> None:
        save(path, results)
        print(f"wrote {path}")

    return draw
