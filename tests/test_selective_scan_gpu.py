"""The scans in Triton and CUDA C++ on a GPU against the float64 reference: ``make test-gpu`` (``-s`` prints errors).

Errors are ||got - reference|| / ||reference||. The reference sees the same rounded inputs, so y (float32) must be right
to float32 in every type, and gradients to the rounding of their own type.
"""

import pytest
import torch

from vmamba.kernels import selective_scan_cuda, selective_scan_plan, selective_scan_reference, selective_scan_triton
from vmamba.kernels.gpu import gpu_of

pytestmark = pytest.mark.gpu
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # half types: about 2 roundings
FLOAT32 = 1e-5


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scan_inputs(length, n, dtype, *, b=2, k=2, d=40, device="cuda"):
    generator = torch.Generator(device).manual_seed(length * 100 + n)

    def normal(*size):
        return torch.randn(size, device=device, generator=generator)

    rows = [normal(b, k, length, d), normal(b, k, length, d), normal(b, k, length, n), normal(b, k, length, n)]
    u, delta, B, C, z = (t.to(dtype) for t in (*rows, normal(b, k, length, d)))
    return u, delta, -torch.exp(0.5 * normal(k, d, n)), B, C, normal(k, d), z, 0.5 * normal(k, d) - 2


def errors(got, expected):
    return [float((g.double() - e).norm() / e.norm().clamp(min=1e-30)) for g, e in zip(got, expected, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("n", [1, 4, 16, 64])
@pytest.mark.parametrize("length", [1, 7, 63, 196, 1000, 3136])
def test_values_and_gradients(length, n, dtype):
    tensors = scan_inputs(length, n, dtype)
    dy = torch.randn_like(tensors[0], dtype=torch.float32)
    exact = [t.double() for t in tensors]
    expected = selective_scan_reference.forward(*exact, True)
    got = selective_scan_triton.forward(*tensors, True)
    values = errors(got, expected)
    gradients = errors(
        selective_scan_triton.backward(dy, got[2], True, *tensors),
        selective_scan_reference.backward(dy.double(), expected[2], True, *exact),
    )
    figures = " ".join(f"{e:.0e}" for e in (values[0], *gradients))
    print(f"\n| {length} | {n} | {str(dtype)[6:]} | {figures.replace(' ', ' | ')} |", end=" ")
    assert max(values[:2]) < FLOAT32
    assert errors(got[2][:, :, 1:], expected[2][:, :, 1:])[0] < FLOAT32 if length > 64 else not got[2].any()
    for name, error, tensor in zip(NAMES, gradients, tensors, strict=True):
        assert error < TOLERANCE[tensor.dtype], f"gradient of {name}: {error:.1e}"


def check_cuda(tensors: tuple) -> None:
    """y, last state, kept states and gradients of the CUDA scan, in float32 and in u's type, against float64."""
    dtype, length = tensors[0].dtype, tensors[0].shape[2]
    assert selective_scan_cuda.why_not(*(t for t in tensors if t is not None)) is None
    exact = [None if t is None else t.double() for t in tensors]
    y, last, states = selective_scan_cuda.forward(*tensors, True)
    right = selective_scan_reference.forward(*exact, True)
    assert max(errors((y, last), right[:2])) < FLOAT32
    assert errors([states[:, :, 1:]], [right[2][:, :, 1:]])[0] < FLOAT32 if length > 64 else not states.any()
    narrow = selective_scan_cuda.values(True, dtype, *tensors)
    assert narrow.dtype == dtype and errors([narrow], right[:1])[0] < TOLERANCE[dtype]
    dy = torch.randn_like(y)
    got = selective_scan_cuda.backward(dy, states, True, *tensors)
    expected = selective_scan_reference.backward(dy.double(), right[2], True, *exact)
    for name, gradient, correct, tensor in zip(NAMES, got, expected, tensors, strict=True):
        assert (gradient is None) == (tensor is None)
        if gradient is not None:
            assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
            error = errors([gradient], [correct])[0]
            assert error < TOLERANCE[tensor.dtype], f"gradient of {name}: {error:.1e}"


PLANS = {  # how the backward is planned, and for how many multiprocessors both ways are
    "lanes share states": (selective_scan_plan.backward, 1),
    "lanes share steps, large blocks": (selective_scan_plan.steps, 1),
    "lanes share steps, small blocks; segments": (selective_scan_plan.steps, 1 << 20),
}
CUDA_CASES = [  # type, whether there are D, z and bias, channels
    (torch.float32, (1, 1, 1), 133),
    (torch.bfloat16, (1, 0, 1), 40),
    (torch.bfloat16, (1, 1, 1), 40),
    (torch.float16, (0, 0, 0), 133),
]


@pytest.mark.parametrize("dtype, extras, d", CUDA_CASES)
@pytest.mark.parametrize("n", [4, 5, 16, 20, 64])
@pytest.mark.parametrize("length", [1, 63, 65, 197, 600])
@pytest.mark.parametrize("plan", PLANS)
def test_values_and_gradients_of_cuda(length, n, dtype, plan, extras, d, monkeypatch):
    backward, processors = PLANS[plan]
    gpu = gpu_of(torch.device("cuda"))._replace(processors=processors)
    forward = selective_scan_plan.forward
    monkeypatch.setattr(selective_scan_plan, "MANY_WARPS", 0)
    monkeypatch.setattr(selective_scan_cuda, "_forward_plan", lambda *sizes: forward(*sizes[:3], gpu, length))
    monkeypatch.setattr(selective_scan_cuda, "_backward_plan", lambda *sizes: backward(*sizes[:3], gpu))
    u, delta, A, B, C, *rest = scan_inputs(length, n, dtype, d=d)
    check_cuda((u, delta, A, B, C, *(t if there else None for t, there in zip(rest, extras, strict=True))))


@pytest.mark.parametrize("length", [639, 640, 641, 672, 705, 1500])
@pytest.mark.parametrize("gated", [True, False])
def test_few_long_sequences(length, gated):
    """As they are planned: cut into segments in the forward, chunks of several lengths at the end."""
    u, delta, A, B, C, D, z, bias = scan_inputs(length, 16, torch.bfloat16, b=1, k=1, d=48)
    assert selective_scan_plan.forward(1, 48, 16, gpu_of(u.device), length).segments >= 4
    check_cuda((u, delta, A, B, C, D, z if gated else None, bias))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("segments, length", [(2, 128), (3, 600), (4, 1100), (8, 705)])
def test_a_backward_in_segments(segments, length, dtype, gated, monkeypatch):
    plan = selective_scan_plan.StepLanes(8, 8, 2, segments)
    monkeypatch.setattr(selective_scan_cuda, "_backward_plan", lambda *sizes: plan)
    u, delta, A, B, C, D, z, bias = scan_inputs(length, 16, dtype, d=26)
    check_cuda((u, delta, A, B, C, D, z if gated else None, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, stride, first", [(16, 40, 8), (16, 37, 3), (12, 40, 8), (16, 40, 2)])
def test_strided_maps(n, stride, first, dtype):
    """B and C as networks have them: parts of wider rows, aligned for wide reads or not; and as mamba-ssm's are."""
    u, delta, A, *_, D, z, bias = scan_inputs(150, n, dtype)
    rows = torch.randn(2, 2, 150, 2 * stride, device="cuda").to(dtype)
    check_cuda((u, delta, A, rows[..., first : first + n], rows[..., stride : stride + n], D, z, bias))
    transposed = rows[..., : 2 * n].transpose(2, 3).contiguous().transpose(2, 3)
    check_cuda((u, delta, A, transposed[..., :n], transposed[..., n:], D, z, bias))


@pytest.mark.parametrize("segments", sorted({s for _, s in selective_scan_triton.SEGMENTS}))
def test_every_tile(segments, monkeypatch):
    monkeypatch.setattr(selective_scan_triton, "SEGMENTS", ((float("inf"), segments),))
    for length, n in ((63, 1), (300, 5)):
        test_values_and_gradients(length, n, torch.float32)
        test_values_and_gradients(length, n, torch.bfloat16)


@pytest.mark.parametrize("d", [1, 5, 33, 384])
@pytest.mark.parametrize("module", [selective_scan_cuda, selective_scan_triton])
def test_two_runs_are_equal_to_the_bit(d, module):
    tensors = scan_inputs(196, 4, torch.bfloat16, d=d)
    runs = []
    for _ in range(2):
        y, last, states = module.forward(*tensors, True)
        runs.append((y, last, states, *module.backward(y, states, True, *tensors)))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_float64():
    tensors = [t.double() for t in scan_inputs(196, 4, torch.float32)]
    expected = selective_scan_reference.forward(*tensors, True)
    got = selective_scan_triton.forward(*tensors, True)
    assert max(errors(got, expected)) < 1e-12
    gradients = selective_scan_triton.backward(got[0], got[2], True, *tensors)
    assert max(errors(gradients, selective_scan_reference.backward(got[0], got[2], True, *tensors))) < 1e-12


@pytest.mark.parametrize("module", [selective_scan_cuda, selective_scan_triton])
def test_runs_on_the_device_of_its_tensors(module):
    device = f"cuda:{torch.cuda.device_count() - 1}"
    tensors = [t.to(device) for t in scan_inputs(70, 4, torch.float32)]
    y, _, states = module.forward(*tensors, True)
    assert errors([y], selective_scan_reference.forward(*[t.double() for t in tensors], True)[:1])[0] < FLOAT32
    assert {str(g.device) for g in module.backward(y, states, True, *tensors)} == {device}
