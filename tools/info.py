"""vmamba info: size, cost, shapes and origin of one network, of the zoo or of a configuration."""

import argparse
import json
from typing import Any

from vmamba.errors import UserError
from vmamba.tools.zoo import add_command, entry_of, parameters, skeleton


def add_parser(subparsers: Any) -> None:
    """Adds ``info``."""
    text = "parameters, multiply-adds, strides, channels and weights of a network"
    example = "vmamba info vmamba_tiny_s1l8 --input-size 384 512\n  vmamba info configs/detection/NAME.py"
    parser = add_command(subparsers, "info", text, example)
    parser.add_argument(
        "name",
        metavar="NAME",
        help="a name of vmamba list, a backbone's with _backbone at its end, or a configuration of mmengine (.py)",
    )
    parser.add_argument("--input-size", type=int, nargs="+", metavar="N", help="sides counted for (default: published)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """vmamba info"""
    if args.name.endswith(".py"):
        from vmamba.tools import mm_info

        facts = mm_info.describe(args.name, args.input_size)
    else:
        facts = describe(args.name, args.input_size)
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def describe(name: str, input_size: "list[int] | None" = None) -> dict[str, Any]:
    """What ``vmamba info`` prints; ``input_size`` is [n], [height, width] or [depth, height, width] of a volume.

    Raises:
        UserError: the name is unknown, or the network does not take that size.
    """
    from vmamba.flops import CONVENTION, count

    entry, model = entry_of(name), skeleton(name)
    size, axes = input_size or entry.sides or [entry.input_size], getattr(model, "axes", 2)
    if len(size) not in (1, axes) or min(size) < 1:
        numbers = {2: "one or two", 3: "one or three"}[axes]
        raise UserError(f"--input-size takes {numbers} positive numbers, got {' '.join(map(str, size))}")
    sides = list(size) if len(size) == axes else list(size) * axes
    channels = getattr(model, "in_chans", 3)
    try:
        cost = count(model, (1, channels, *sides))
    except (ValueError, RuntimeError) as error:
        shown = " x ".join(map(str, sides))
        raise UserError(f"{name} does not take images of {shown}: {str(error).splitlines()[0]}") from error
    weights = entry.weights
    return {
        "name": name,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": parameters(model),
        "input": [channels, *sides],
        "multiply_adds": sum(cost.values()),
        "multiply_adds_by_kind": cost,
        "convention": CONVENTION,
        "strides": list(getattr(model, "strides", ())),
        "channels": list(getattr(model, "channels", ())),
        "weights": {"url": weights.url, "top1": weights.top1, "license": entry.license} if weights else None,
        "paper": f"https://arxiv.org/abs/{entry.paper}",
        "origin": entry.origin,
        "in_timm": entry.timm is not None and name == entry.name,
    }


def _text(facts: dict[str, Any]) -> str:
    cost, parts = facts["multiply_adds_by_kind"], facts.get("parameters_by_part", {})
    shares = ", ".join(f"{kind} {n / 1e9:.3f} G" for kind, n in sorted(cost.items(), key=lambda item: -item[1]))
    of_parts = ", ".join(f"{name} {number:,}" for name, number in parts.items())
    rows = {
        **({"configuration": facts["name"], "network": facts["class"]} if parts else {facts["name"]: facts["class"]}),
        "parameters": f"{facts['parameters']:,}",
        " ": of_parts,
        "multiply-adds": f"{facts['multiply_adds'] / 1e9:.3f} G for an image of {' x '.join(map(str, facts['input']))}",
        "": shares,
        "convention": facts["convention"],
        **(_zoo_rows(facts) if "origin" in facts else {}),
    }
    width = max(map(len, rows))
    return "\n".join(f"{key:{width}}  {value}" for key, value in rows.items() if value)


def _zoo_rows(facts: dict[str, Any]) -> dict[str, str]:
    weights = facts["weights"]
    top1 = f", ImageNet-1k top-1 {weights['top1']} % as published" if weights and weights["top1"] else ""
    return {
        "strides": ", ".join(map(str, facts["strides"])),
        "channels": ", ".join(map(str, facts["channels"])),
        "weights": f"{weights['url']} ({weights['license']}){top1}" if weights else "none linked",
        "paper": facts["paper"],
        "original": facts["origin"],
        "timm": f'timm.create_model("{facts["name"]}") after import vmamba' if facts["in_timm"] else "",
    }
