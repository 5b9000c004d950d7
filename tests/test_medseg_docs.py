"""docs/medical.md: every command parses, and the walk through runs, made short."""

import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("lightning")
pytest.importorskip("nilearn")
from vmamba.medical.networks import TRAINERS
from vmamba.tools.cli import main, parser

TEXT = (Path(__file__).parent.parent / "docs/medical.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for block in BLOCKS for line in block.splitlines() if line.startswith("vmamba ")]
SHORT = {"--spacing": ["8"], "--epochs": ["1"], "--iterations": ["2"], "--val-iterations": ["1"], "--batch-size": ["2"]}
SMALLER = {"--preset": ["--set", "dims=8,16", "--set", "depths=1,1", "--set", "depths_decoder=1,1"]}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_commands_parse(words):
    assert parser().parse_args(words).command == "medseg"


def test_every_command_is_shown():
    shown = {words[1] for words in COMMANDS}
    assert shown == {
        "demo-data",
        "plan",
        "preprocess",
        "train",
        "predict",
        "ensemble",
        "postprocess",
        "evaluate",
        "plot",
    }
    for name in TRAINERS:
        assert name.removesuffix("NoAMP").removeprefix("nnUNetTrainer") in TEXT


def shortened(words):
    """The command with smaller numbers and networks."""
    out = list(words)
    for flag, values in SHORT.items():
        if flag in out:
            out[out.index(flag) + 1] = values[0]
    for flag, values in SMALLER.items():
        if flag in out:
            out[out.index(flag) : out.index(flag) + 2] = values
    return [word.replace("(8,16,32)", "(4,8,8)") for word in out]


def test_the_walk_through(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for words in COMMANDS:
        assert main([*shortened(words), "--no-progress"]) == 0, capsys.readouterr().err
    torch.set_num_threads(before)
    pictures = sorted(path.name for path in Path("demo/pictures").glob("*.png"))
    assert pictures == ["pseudo_12.png", "pseudo_13.png", "pseudo_14.png"] and Path("demo/final/summary.json").exists()
    assert main(shortened(COMMANDS[0])) == 2  # what is there is not replaced
