"""vmamba convert: an official checkpoint as native safetensors, with a report of what became of each tensor."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.zoo import add_command, entry_of, skeleton


def add_parser(subparsers: Any) -> None:
    """Adds ``convert``."""
    text = "turn a checkpoint of the original code into native safetensors"
    example = "vmamba convert vssm1_tiny_0230s_ckpt_epoch_264.pth -o vmamba_tiny_s1l8.safetensors"
    parser = add_command(subparsers, "convert", text, example)
    parser.add_argument("checkpoint", type=Path, help=".pth, .pt, .ckpt or .safetensors; no code in it is run")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--model", metavar="NAME", help="network it belongs to (default: the one whose shapes fit)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes it was trained on (default: published)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba convert"""
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output must end in .safetensors, got {str(args.output)!r}")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; choose another --output, or add --overwrite to replace it")
    if not args.output.parent.is_dir():
        raise UserError(f"there is no folder {str(args.output.parent)!r} to write {args.output.name} to; make it first")
    from vmamba.checkpoint import read

    if args.model:
        entry_of(args.model)
    try:
        content = read(args.checkpoint)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    name = args.model or guess(content, **options)
    print(f"{args.checkpoint} as {name}: {convert(content, name, args.output, **options)}")
    print(f"wrote {args.output}")
    return 0


def convert(content: Mapping, name: str, output: Path, **overrides: Any) -> Any:
    """Writes ``content``, a checkpoint in any known layout, as native tensors of the network ``name``.

    Returns:
        The :class:`vmamba.LoadReport`.

    Raises:
        UserError: the tensors do not fit the network; the message counts what is missing, left over and misshapen.
    """
    from safetensors.torch import save_file

    from vmamba.checkpoint import load_checkpoint
    from vmamba.registry import create_model

    model = create_model(name, **overrides)
    try:
        report = load_checkpoint(model, content)
    except ValueError as error:
        raise UserError(f"{' '.join(str(error).split())}; name the right network with --model") from None
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    partial = output.with_name(f"{output.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt", "model": name, "license": entry_of(name).license})
    partial.replace(output)
    return report


def guess(content: Mapping, **overrides: Any) -> str:
    """The one network of the zoo that has exactly the tensors of ``content``.

    Raises:
        UserError: none has, or several have.
    """
    from vmamba.registry import list_models

    fitting = [name for name in list_models() if _fits(content, skeleton(name, **overrides))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"the tensors fit {' and '.join(fitting)}; name one with --model")
    raise UserError(
        "the tensors fit no network of the zoo; name the nearest with --model NAME to see what differs, and give"
        " --num-classes if it was trained on other classes"
    )


def _fits(content: Mapping, model: Any) -> bool:
    from vmamba.checkpoint import convert as native_names

    try:
        native = native_names(content, model)
    except ValueError:
        return False
    return {k: t.shape for k, t in native.items()} == {k: t.shape for k, t in model.state_dict().items()}
