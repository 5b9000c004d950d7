"""vmamba benchmark: measuring in turn, what becomes of failures, the file, the picture, the operators."""

import json
import platform
import resource
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from tests.test_cli import refusal
from vmamba import benchmark, memory
from vmamba.benchmark import Job, Plan, Work, measure
from vmamba.clock import graphed, with_room
from vmamba.kernels.causal_conv1d import causal_conv1d
from vmamba.kernels.delta_rule import delta_rule
from vmamba.kernels.selective_scan import selective_scan
from vmamba.kernels.ssd import chunk_scan
from vmamba.tools import benchmark_anchors, benchmark_cases
from vmamba.tools.benchmark_table import with_ratios
from vmamba.tools.cli import main

CPU = torch.device("cpu")
MIB = 2**20


def _faults(depth: int, calls: int = 200) -> int:
    """Pages that calls of a function in a loop, so many calls deep, take from the system."""
    if depth:
        return _faults(depth - 1, calls)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        _empty(0, 0, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _empty(a, b, c):
    pass


@pytest.mark.skipif(platform.python_implementation() != "CPython", reason="it is about CPython's frames")
def test_with_room():
    depths = range(300)
    assert max(map(_faults, depths)) >= 200  # a page for each call somewhere: there is something to avoid
    assert max(with_room(lambda depth=depth: _faults(depth)) for depth in depths) < 100


def test_peak_of_a_step():
    def step(count: int) -> Tensor:
        x = torch.ones(count * MIB // 4)
        y = x + 1
        del x
        return (y + 1).sum()

    for size in (64, 16):  # the second fits into what the first freed
        assert memory.peak(lambda size=size: step(size), CPU) == pytest.approx(2 * size * MIB, rel=0.1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda x: x + 1, 2 * 400),
        (lambda x: x.t()[3:].reshape(-1), 2 * 280),  # a copy of what was cut out
        (lambda x: x.view(-1)[5:], 0),
        (lambda x: x.add_(1), 2 * 400),
        (lambda x: x[:1].expand(10, 10) + x, 40 + 2 * 400),  # a row that is repeated is read once
        (lambda x: (x @ x).sum(), 3 * 400 + 404),
    ],
)
def test_bytes_moved(step, expected):
    x = torch.ones(10, 10)
    assert memory.moved(lambda: step(x)) == expected


def test_bytes_moved_backwards():
    x = torch.ones(10, 10, requires_grad=True)
    forward = memory.moved(lambda: x * x)
    both = memory.moved(lambda: torch.autograd.grad(x * x, x, torch.ones(10, 10)))
    assert both > 2 * forward


def test_an_operator_that_differentiates_inside_counts_as_one():
    x, weight = torch.randn(2, 4, 9, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    found = []

    def step():
        found.append(torch.autograd.grad(causal_conv1d(x, weight), [x, weight], torch.ones(2, 4, 9)))

    maps, weights = 4 * x.numel(), 4 * weight.numel()
    assert memory.moved(step) == (2 * maps + weights) + (3 * maps + 2 * weights) + maps  # forward, backward, ones
    for plain, counted in zip(*found, strict=True):
        assert torch.equal(plain, counted)


def test_bytes_moved_by_compiled_code(monkeypatch):
    from torch._inductor import async_compile, cpu_vec_isa

    # what the C++ compiler would make does not matter, and takes long
    monkeypatch.setattr(async_compile.AsyncCompile, "cpp_pybinding", lambda *args: lambda *tensors: None)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)
    compiled = torch.compile(lambda x: (x + 1).sin() * 2)
    x = torch.ones(1000)
    assert memory.moved_compiled(lambda: compiled(x)) == 2 * 4000  # one kernel, where eager code has three


def job(name, step, smaller=None):
    return Job({"name": name}, lambda: Work(step, 0), smaller or (lambda: None))


def test_candidates_take_turns():
    calls = []
    jobs = [job(name, lambda name=name: calls.append(name)) for name in "abc"]
    rows = measure(jobs, Plan(CPU, repeat=4, warmup=2))
    assert "".join(calls[-12:]) == "abccbaabccba"
    assert [row["repeats"] for row in rows] == [4, 4, 4]
    assert all(row["failure"] is None and row["beside"] == list("abc") for row in rows)
    assert all(row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1] for row in rows)


def test_slow_candidates_are_repeated_less(monkeypatch):
    taken = {"slow": 1.0, "fast": 0.01}
    monkeypatch.setattr(benchmark, "seconds", lambda step, device, cold=None: taken[step()])
    rows = measure([job(name, lambda name=name: name) for name in taken], Plan(CPU, repeat=9, warmup=1, seconds=2.5))
    assert {row["name"]: row["repeats"] for row in rows} == {"slow": 3, "fast": 9}
    assert [row["ms"] for row in rows] == [1000, 10]


def test_failures_are_rows():
    times = iter(range(100))

    def late():
        if next(times) > 6:
            raise RuntimeError("worn out\nfurther lines")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def too_much():
        return torch.empty(1 << 50)

    jobs = [job("late", late), job("full", full), job("much", too_much), job("well", lambda: None)]
    jobs.append(job("first", full, lambda: job("second", full, lambda: job("third", lambda: None))))
    rows = {row["name"]: row for row in measure(jobs, Plan(CPU, repeat=5, warmup=1))}
    assert {name: row["failure"] for name, row in rows.items()} == {
        "late": "RuntimeError: worn out",
        "full": "OOM",
        "much": "OOM",
        "well": None,
        "third": None,
    }
    assert set(rows["late"]) == {"name", "failure"}
    assert rows["well"]["repeats"] == 5 and rows["well"]["beside"] == ["well", "third"]


def test_memory_is_kept_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SYSTEM", tmp_path / "meminfo")
    memory.SYSTEM.write_text(f"MemTotal: 9 kB\nMemAvailable: {200 * 1024} kB\n")
    with memory.kept_free(CPU):
        (row,) = measure([job("big", lambda: torch.ones(256 * MIB // 4))], Plan(CPU, repeat=3))
        assert row["failure"] == "OOM"
    (row,) = measure([job("big", lambda: torch.ones(256 * MIB // 4))], Plan(CPU, repeat=3))
    assert row["failure"] is None


SMALL = "--no-progress --device cpu --repeat 3 --warmup 0 --seconds 1"
MODELS = f"benchmark models efficientvmamba_tiny test_vit --sizes 32 48 --batch 2 --train {SMALL}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The file of a small run over networks, and what the run printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    with redirect_stdout(StringIO()) as printed:
        assert main(shlex.split(f"{MODELS} --json {folder / 'models.json'} --plot {folder / 'models.png'}")) == 0
    return folder / "models.json", printed.getvalue()


def test_models(measured):
    path, printed = measured
    found = json.loads(path.read_text())
    keys = [(row["size"], row["task"], row["name"]) for row in found["rows"]]
    assert keys == [(s, t, n) for s in (32, 48) for t in ("inference", "training") for n in MODELS.split()[2:4]]
    for row in found["rows"]:
        assert row["failure"] is None and row["ms"] > 0 and row["batch"] == 2
    ours = {(row["size"], row["task"]): row for row in found["rows"] if row["name"] == "efficientvmamba_tiny"}
    weights = 4 * 6_493_660
    assert all(row["peak_bytes"] > weights and row["moved_bytes"] > weights for row in ours.values())
    for size in (32, 48):
        assert ours[size, "training"]["moved_bytes"] > 2 * ours[size, "inference"]["moved_bytes"]
    assert ours[48, "inference"]["moved_bytes"] > ours[32, "inference"]["moved_bytes"]
    for expected in (
        torch.__version__.split("+")[0],
        "timm",
        "fp32",
        "TF32",
        "contiguous",
        "eager",
        "views move nothing",
    ):
        assert expected in printed
    assert sum(line.startswith("| efficientvmamba_tiny") for line in printed.splitlines()) == 4


def test_the_picture(measured, tmp_path, capsys):
    path, _ = measured
    pixels = imread(path.with_suffix(".png"))
    assert pixels.shape[0] > 800 and pixels.std() > 0.05
    found = json.loads(path.read_text())
    found["rows"][-1] = {**found["rows"][-1], "failure": "OOM"}
    (tmp_path / "some.json").write_text(json.dumps(found))
    assert main(["benchmark", "plot", str(tmp_path / "some.json"), "-o", str(tmp_path / "some.png")]) == 0
    assert "some.png" in capsys.readouterr().out
    other = imread(tmp_path / "some.png")
    assert other.shape != pixels.shape or (other != pixels).any()


def test_resuming(measured, tmp_path, capsys):
    path, _ = measured
    whole = json.loads(path.read_text())
    part = tmp_path / "part.json"
    broken = {**whole["rows"][2], "failure": "RuntimeError: worn out"}
    part.write_text(json.dumps({**whole, "rows": [*whole["rows"][:2], broken, *whole["rows"][3:]]}))
    command = f"{MODELS} --json {part}"
    assert "exists; --resume" in refusal(capsys, command)
    assert main(shlex.split(f"{command} --resume")) == 0
    after = {(row["size"], row["task"], row["name"]): row for row in json.loads(part.read_text())["rows"]}
    for i, row in enumerate(whole["rows"]):
        found = after[row["size"], row["task"], row["name"]]
        assert (found == row) != (i == 2)
    assert after[32, "training", "efficientvmamba_tiny"]["beside"] == ["efficientvmamba_tiny"]
    assert "precision 'fp32', this run has 'bf16" in refusal(capsys, f"{command} --resume --precision bf16")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("models convnext_tinny", "did you mean convnext_tiny"),
        ("models --batch none", "--batch takes a positive number or auto, got 'none'"),
        ("models --sizes 0", "--sizes takes positive numbers, got 0"),
        ("models --precision tf32 --device cpu", "on a CPU take fp32 or bf16"),
        ("models --device cpu --cuda-graph", "needs a CUDA GPU"),
        ("models --device tpu", "got 'tpu'"),
        ("models --device cuda:99", "there is no cuda:99"),
        ("models --device cpu --repeat 2", "--repeat takes 3 or more"),
        ("models --device cpu --seconds nan", "--seconds takes a positive number, got nan"),
        ("operators --device cpu --seconds -1", "got -1"),
        ("models --device cpu --resume", "name it by --json"),
        ("models --plot picture.jpg", "must end in .png, got 'picture.jpg'"),
        ("models --plot nodir/picture.png", "no folder 'nodir'"),
        ("models --device cpu --json nodir/rows.json", "no folder 'nodir'"),
        ("operators scan3d --device cpu", "unknown operator 'scan3d'; choose from scan2d"),
        ("operators --backend fast", "unknown backend 'fast'; choose from cuda"),
        ("plot nothing.json -o picture.png", "there is no file nothing.json"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, command, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(capsys, f"benchmark {command}")


def test_files_of_something_else(capsys, tmp_path):
    for text, expected in (("{", "is not a file of vmamba benchmark"), ('{"kind": "models"}', "it lacks")):
        (tmp_path / "other.json").write_text(text)
        assert expected in refusal(capsys, f"benchmark plot {tmp_path / 'other.json'} -o {tmp_path / 'x.png'}")


def test_no_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vmamba.tools.draw_benchmark", None)
    line = refusal(capsys, f"benchmark models --plot {tmp_path / 'x.png'}")
    assert "needs matplotlib" in line and "pip install 'vmamba[medical]'" in line


TINY = {
    "scan2d": (1, 3, 5, 16, 2),
    "ss2d": (1, 3, 5, 16),
    "selective_scan": (2, 2, 9, 8, 3),
    "ssd": (2, 2, 9, 3, 4, 5),
    "causal_conv1d": (2, 6, 9, 4),
    "layer_norm": (2, 9, 16),
    "instance_norm": (2, 3, 4, 5, 6),
    "delta_rule": (2, 3, 9, 4, 5),
}


@pytest.fixture
def tiny(monkeypatch):
    for name, case in TINY.items():
        operator = benchmark_cases.OPERATORS[name]
        monkeypatch.setitem(
            benchmark_cases.OPERATORS, name, benchmark_cases.Operator(operator.letters, operator.inputs, {"tiny": case})
        )


@pytest.fixture
def rivals(monkeypatch):
    """Packages of the rivals' names whose functions take the rivals' arguments and are computed by ours."""

    def simple_gla(q, k, v, g, scale):
        ones, zero = torch.ones(q.shape[:3]), torch.zeros(q.shape[2])
        y = chunk_scan(v / ones[..., None], ones, zero, k, q) if g is None else _decayed(q, k, v, g)
        return y * scale, None

    def _decayed(q, k, v, g):
        state, ys = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None]
            ys.append((state * q[:, t, :, :, None]).sum(2))
        return torch.stack(ys, 1)

    def gated_delta_rule(q, k, v, g, beta):
        y = delta_rule(*(t.transpose(1, 2) for t in (q, k, v, beta, g)))
        assert isinstance(y, Tensor)
        return y.transpose(1, 2), None

    contents = {
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": chunk_scan},
        "fla.ops.simple_gla": {"chunk_simple_gla": simple_gla},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": gated_delta_rule},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d},
    }
    for path, functions in contents.items():
        parts = path.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            module = sys.modules.get(name) or ModuleType(name)
            module.__spec__ = SimpleNamespace(name=name)  # pyright: ignore[reportAttributeAccessIssue]
            vars(module).setdefault("__path__", [])
            monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[path]).update(functions)


@pytest.mark.usefixtures("tiny", "rivals")
def test_operators(capsys, tmp_path):
    path = tmp_path / "operators.json"
    assert main(shlex.split(f"benchmark operators --train {SMALL} --json {path}")) == 0
    rows = json.loads(path.read_text())["rows"]
    assert not [row for row in rows if row["failure"]]
    by = {operator: {row["name"] for row in rows if row["operator"] == operator} for operator in TINY}
    assert by["scan2d"] == {"cpu", "reference"}
    assert by["selective_scan"] == {"cpu", "reference", "mamba-ssm"}
    assert by["ssd"] == {"vmamba", "reference", "mamba-ssm", "fla"}
    assert by["causal_conv1d"] == {"cpu", "reference", "torch", "causal-conv1d"}
    assert by["instance_norm"] == {"reference"}
    assert by["delta_rule"] == {"vmamba", "reference", "fla"}
    forward, both = (row for row in rows if (row["operator"], row["name"]) == ("layer_norm", "torch"))
    x, weights = 4 * 9 * 16, 4 * 2 * 16  # the batch on a CPU is 1
    assert forward["moved_bytes"] == 2 * x + weights
    assert both["moved_bytes"] == 2 * (2 * x + weights) + x + weights
    assert "selective_scan (b, k, l, d, n)" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny", "rivals")
def test_a_rival_that_computes_something_else(monkeypatch, tmp_path):
    wrong = {"selective_scan_fn": lambda u, *rest, **options: u}
    vars(sys.modules["mamba_ssm.ops.selective_scan_interface"]).update(wrong)
    path = tmp_path / "operators.json"
    command = f"benchmark operators selective_scan --backend triton cpu mamba-ssm {SMALL} --json {path}"
    assert main(shlex.split(command)) == 0
    failures = {row["name"]: row["failure"] for row in json.loads(path.read_text())["rows"]}
    assert failures["cpu"] is None
    assert "differs from that of cpu" in failures["mamba-ssm"]
    assert "needs tensors on cuda" in failures["triton"]  # asked for by name, so it is not left out


def test_what_was_recorded_elsewhere():
    for operator, recorded in benchmark_anchors.OPERATORS.items():
        cases = {", ".join(map(str, case)) for case in benchmark_cases.OPERATORS[operator].cases.values()}
        assert {numbers for numbers, _ in recorded} <= cases
    like = {"name": "ours", "task": "training", "size": 224, "batch": 128, "ms": 50.0}
    rows = with_ratios([like, *benchmark_anchors.of_networks([like], "bf16")])
    assert [row["name"] for row in rows][:2] == ["ours", "official VMamba-T s1l8 *"]
    assert rows[1]["ms"] == pytest.approx(1e3 * 128 / 1157) and rows[1]["ratio"] == pytest.approx(2.213, rel=1e-3)
    assert not benchmark_anchors.of_networks([{**like, "batch": 64}], "bf16")
    like = {"name": "cpu", "operator": "scan2d", "numbers": "128, 56, 56, 96, 1", "task": "forward"}
    assert [row["ms"] for row in benchmark_anchors.of_operators([like], "bf16")] == [4.06]
    assert not benchmark_anchors.of_operators([{**like, "task": "forward + backward"}], "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--cuda-graph",
        "--train --cuda-graph",
        "--precision bf16 --train",
        "--compile",
        "--train --compile reduce-overhead",
    ],
)
def test_models_on_a_gpu(tmp_path, options):
    path = tmp_path / "models.json"
    command = (
        f"benchmark models efficientvmamba_tiny test_vit --sizes 64 --batch auto --repeat 5 --json {path} {options}"
    )
    assert main(shlex.split(command)) == 0
    for row in json.loads(path.read_text())["rows"]:
        assert row["failure"] is None and row["ms"] > 0
        assert row["batch"] == 1024 and row["moved_bytes"] > 0 and row["peak_bytes"] > 1024 * 3 * 64 * 64 * 4


@pytest.mark.gpu
def test_what_graphs_keep_counts():
    x, device = torch.ones(1 << 22, device="cuda"), torch.device("cuda")
    before = memory.kept_by_graphs(device)
    replay = graphed(lambda: x * 2)
    assert memory.kept_by_graphs(device) - before >= x.nbytes and not memory.peak(replay, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("options", ["--train", "--cuda-graph", "--precision fp32"])
def test_operators_on_a_gpu(tmp_path, options):
    path = tmp_path / "operators.json"
    assert main(shlex.split(f"benchmark operators --repeat 5 --json {path} {options}")) == 0
    rows = json.loads(path.read_text())["rows"]
    assert not [row for row in rows if row["failure"]]
    assert "triton" in {row["name"] for row in rows if row["operator"] == "selective_scan"}
