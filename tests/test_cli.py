"""The command vmamba: what each sub-command prints, and one line and exit code 2 for a mistake of the user's."""

import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vmamba
from tests import goldens, segmentors
from vmamba.doctor import PACKAGES
from vmamba.kernels.backends import ORDER, operators
from vmamba.tools.cli import main, parser

SMALL = "vmamba_tiny_s1l8"


def refusal(capsys, command):
    """The one line with which a wrong command is refused."""
    assert main(shlex.split(command)) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("vmamba: error: ")
    return line


def commands(top):
    """Every parser below ``top`` that runs something, by its name."""
    for action in top._subparsers._group_actions if top._subparsers else ():
        for sub in action.choices.values():
            yield from commands(sub) if sub._subparsers else [(sub.prog, sub)]


@pytest.mark.parametrize(("name", "command"), list(commands(parser())))
def test_help_has_an_example_that_parses(name, command):
    examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("vmamba ")]
    assert examples
    for example in examples:
        words = shlex.split(example.split("  (")[0].split(" > ")[0])
        assert f"vmamba {' '.join(words[1:])}".startswith(name)
        assert callable(parser().parse_args(words[1:]).run)


def test_commands():
    assert {"list", "info", "doctor", "convert"} <= {name.split()[1] for name, _ in commands(parser())}


def test_version_and_help(capsys):
    for option, expected in (("--version", f"vmamba {vmamba.__version__}"), ("--help", "vmamba doctor")):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_list(capsys):
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert sorted(rows) == vmamba.list_models()
    for name in set(rows) & set(goldens.names()):
        golden = goldens.load(name)
        assert rows[name]["parameters"] == golden["params"] or segmentors.settings(name, golden), name
    assert main(["list", "vmamba_tiny"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "name"
    assert [line.split()[0] for line in lines] == vmamba.list_models("vmamba_tiny")
    (line,) = [line for line in lines if line.startswith(SMALL)]
    assert line.split()[1:4] == ["30.2", "224", "82.6"]


def test_list_without_a_match(capsys):
    assert SMALL in refusal(capsys, "list nothing_like_it")


def test_list_into_a_closed_pipe():
    code = "import os, sys\nfrom vmamba.tools.cli import main\nread, write = os.pipe(); os.close(read)\n"
    code += "os.dup2(write, 1)\nsys.exit(main(['list', 'vmunet']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_info(capsys):
    golden = goldens.load(SMALL)
    assert main(["info", SMALL, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == golden["params"]
    assert facts["multiply_adds"] == round(golden["paper"]["gflops_224_exact"] * 1e9)
    assert facts["multiply_adds"] == sum(facts["multiply_adds_by_kind"].values())
    assert facts["strides"] == [4, 8, 16, 32]
    assert facts["channels"] == [96, 192, 384, 768]
    assert facts["weights"]["top1"] == golden["paper"]["imagenet1k_top1"]
    assert main(["info", SMALL]) == 0
    text = capsys.readouterr().out
    for expected in ("30,249,064", "4.906 G", "scan", "96, 192, 384, 768", facts["weights"]["url"], "2401.10166"):
        assert expected in text


def test_info_for_another_size(capsys):
    main(["info", SMALL, "--json", "--input-size", "448", "224"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["input"] == [3, 448, 224]
    assert facts["multiply_adds"] - 768_000 == 2 * (4_905_609_984 - 768_000)  # all but the classifier doubles


@pytest.mark.parametrize("name", ["vmunet", "umamba_enc_3d", f"{SMALL}_backbone"])
def test_info_of_a_head_and_of_a_pyramid(capsys, name):
    assert main(["info", name]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("info vmamba_tiny_s1l9", "did you mean vmamba_tiny_s1l8"),
        ("info vmunet --input-size 100", "multiples of 32"),
        ("info vmunet --input-size 1 2 3", "one or two positive numbers, got 1 2 3"),
        ("info hymamba --input-size 64 64", "one or three positive numbers, got 64 64"),
        ("info vmunet --input-size 0", "one or two positive numbers, got 0"),
        ("convert nowhere.pth -o out.safetensors", "no checkpoint at nowhere.pth"),
        ("convert nowhere.pth -o out.pth", "must end in .safetensors, got 'out.pth'"),
        ("convert nowhere.pth -o nodir/out.safetensors", "no folder 'nodir'"),
        ("convert nowhere.pth -o out.safetensors --model vmamba_tinny_s1l8", "did you mean vmamba_tiny_s1l8"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, command, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, command)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint of VMamba-T in the layout of the original code, and its tensors."""
    state = {name: tensor.float() for name, tensor in goldens.fill_state(goldens.load(SMALL)).items()}
    path = tmp_path_factory.mktemp("official") / "vssm1_tiny.pth"
    torch.save({"model": state, "epoch": 264}, path)
    return path, state


def test_convert_guesses_the_network(official, capsys, tmp_path):
    path, state = official
    out = tmp_path / "tiny.safetensors"
    assert main(["convert", str(path), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"as {SMALL}: official layout" in printed
    assert str(out) in printed
    tensors = load_file(out)
    assert len(tensors) == len(state)
    model = vmamba.create_model(SMALL)
    assert vmamba.load_checkpoint(model, out).layout == "native"
    assert torch.equal(model.state_dict()["head.fc.weight"], state["classifier.head.weight"])
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    assert "--overwrite" in refusal(capsys, f"convert {path} -o {out}")
    assert main(["convert", str(path), "-o", str(out), "--overwrite", "--model", SMALL]) == 0


def test_convert_for_the_wrong_network(official, capsys, tmp_path):
    path, _ = official
    line = refusal(capsys, f"convert {path} -o {tmp_path / 'out.safetensors'} --model vmamba_tiny_s2l5")
    assert "missing" in line or "misshapen" in line
    assert "--model" in line
    assert not list(tmp_path.iterdir())


def test_convert_something_else(capsys, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    line = refusal(capsys, f"convert {tmp_path / 'other.pth'} -o {tmp_path / 'out.safetensors'}")
    assert "fit no network" in line


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv("VMAMBA_BACKEND", raising=False)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["core"]["torch"] == torch.__version__.split("+")[0]
    assert {(c["operator"], c["device"]) for c in found["choices"]} == {
        (operator, device) for operator in operators() for device in ("cpu", "cuda")
    }
    for choice in found["choices"]:
        assert {choice["backend"], *choice["others"]} == set(ORDER)
        assert all(choice["others"].values())
    taken = {(c["operator"], c["device"]): c["backend"] for c in found["choices"]}
    assert taken["selective_scan", "cpu"] == "cpu"
    assert taken["selective_scan", "cuda"] == "triton"
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {found['packages']['core']['torch']}" in text
    assert "not triton: it needs tensors on cuda" in text


@pytest.mark.parametrize(("asked", "taken"), [("reference", "reference"), ("triton", "none"), ("fast", "none")])
def test_doctor_with_a_backend_asked_for(monkeypatch, asked, taken):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VMAMBA_BACKEND", asked)
    report = vmamba.doctor()
    (choice,) = [c for c in report.choices if (c.operator, c.device) == ("selective_scan", "cpu")]
    assert choice.backend == taken
    assert choice.others["cpu"] == f"it could, but VMAMBA_BACKEND asks for {asked}"
    assert f"VMAMBA_BACKEND={asked} is set" in str(report)


def test_doctor_asks_for_all_that_is_required():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    required = {"core": setup["options"]["install_requires"], "medical": setup["options.extras_require"]["medical"]}
    names = {extra: set(re.findall(r"^[\w-]+", text, re.MULTILINE)) for extra, text in required.items()}
    assert {extra: set(packages) - {"vmamba"} for extra, packages in PACKAGES.items()} == names


def test_doctor_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(sys.modules["vmamba.doctor"], "PACKAGES", {"core": ("torch",), "medical": ("not-a-package",)})
    text = str(vmamba.doctor())
    assert "medical: not-a-package MISSING" in text
    assert "pip install 'vmamba[medical]'" in text
