"""A training step as a CUDA graph: the same numbers as step by step, and step by step wherever a graph does not fit."""

import pytest
import torch
from torch import nn

pytest.importorskip("monai")
pytest.importorskip("lightning")
import vmamba
from vmamba.medical.captured import WARMUP, Captured, Objective, _Known
from vmamba.medical.labelset import classes
from vmamba.medical.losses import LabelLoss, deep_loss

gpu = pytest.mark.gpu
STEPS = WARMUP + 4
SMALL = dict(dims=(16, 32, 64, 128), num_classes=3, in_chans=1)
CONVOLUTIONAL = dict(features=(8, 16, 32), num_classes=3, in_chans=1)
PLAIN = dict(dim=8, num_classes=3, in_chans=1)
SMALL_HYBRID = dict(
    dims=(4, 8, 12), depths=(1, 1), ratios=(2, 2), depth=1, patch=(16, 16, 16), num_classes=3, in_chans=1
)
CUBE = dict(strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), kernels=(3, 3, 3), patch=(16, 16, 16))
NETWORKS = {  # and their patches
    "vmunet": (SMALL, (64, 64)),
    "mhs_unet_4h": (SMALL, (64, 64)),
    "umamba_enc_2d": (dict(CONVOLUTIONAL, strides=((1, 1), (2, 2), (2, 2)), patch=(32, 32)), (32, 32)),
    "umamba_bot_3d": (dict(CONVOLUTIONAL, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=(3, 3, 3)), (8, 16, 16)),
    "umamba_enc_3d": (dict(CONVOLUTIONAL, **CUBE), (16, 16, 16)),
    "lightm_unet_2d": (PLAIN, (32, 32)),
    "lightm_unet_3d": (PLAIN, (16, 16, 16)),
    "hymamba": (SMALL_HYBRID, (16, 16, 16)),
}


class Drawn(nn.Module):
    """A network with stochastic depth, a buffer that is learned, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.unused = nn.Conv2d(4, 3, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        y = self.norm(self.first(x))
        return self.last(y * torch.empty_like(y[:, :1]).bernoulli_(0.5))


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """Of cuDNN; some of PyTorch's own backwards still add up in changing orders (interpolation, for one)."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trained(network, loss, batches, captured, precision=None, lr=1e-3):
    """Losses and gradients of steps of gradient descent."""
    step = Captured(loss, network) if captured else loss
    optimizer, found = torch.optim.SGD(network.parameters(), lr), []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        with torch.autocast("cuda", precision, enabled=precision is not None):
            total = step(*batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        found.append((total.item(), [None if p.grad is None else p.grad.clone() for p in network.parameters()]))
        optimizer.step()
    return step, found


def same(found, expected, bound=0.0):
    """Losses and the gradients of all parameters differ by ``bound`` of their norm at most."""
    for (one, grads), (other, wanted) in zip(found, expected, strict=True):
        assert abs(one - other) <= bound * abs(other)
        assert [g is None for g in grads] == [w is None for w in wanted]
        g, w = (torch.cat([t.flatten() for t in ts if t is not None]) for ts in (grads, wanted))
        assert (g - w).norm() <= bound * w.norm()


def task(name, device):
    options, patch = NETWORKS[name]
    torch.manual_seed(0)
    network, loss = vmamba.create_model(name, **options).to(device), LabelLoss(classes(2), False)
    if len(network.outputs) > 1:
        network.deep_supervision = True
    batches = [(torch.randn(2, 1, *patch), torch.randint(0, 3, (2, 1, *patch))) for _ in range(STEPS)]
    return network, lambda x, t: deep_loss(loss, network(x), t), [tuple(t.to(device) for t in b) for b in batches]


def small(device):
    torch.manual_seed(0)
    network = Drawn().to(device)
    return network, lambda x: network(x).square().mean(), [(torch.randn(2, 1, 9, 7).to(device),) for _ in range(STEPS)]


def test_a_loss_that_knows_its_gradients():
    """They are multiplied by what comes back, and are no memory that the next step writes to."""
    network, loss, batches = small("cpu")
    learned, objective = list(network.parameters()), Objective(loss, network)
    assert [*objective.learned.values()] == learned
    torch.manual_seed(1)
    total, grads = objective.with_gradients(batches[0])
    (3 * _Known.apply(total, grads, *learned)).backward()
    torch.manual_seed(1)
    expected = torch.autograd.grad(3 * loss(*batches[0]), learned, allow_unused=True)
    for p, own, e in zip(learned, grads, expected, strict=True):
        assert (p.grad is None) == (e is None)
        if e is not None:
            assert torch.allclose(p.grad, e, atol=1e-6) and p.grad.data_ptr() != own.data_ptr()


def test_a_cpu_computes_the_loss_itself():
    step, found = trained(*small("cpu"), True)
    assert step.graph is None and step.seen == 0
    same(found, trained(*small("cpu"), False)[1])


@gpu
def test_the_graph_draws_and_counts_as_its_steps_do():
    """Random numbers follow the seed of each step, running averages go on, what is unused has no gradient."""
    network, loss, batches = small("cuda")
    step, found = trained(network, loss, batches, True)
    other, plain, again = small("cuda")
    same(found, trained(other, plain, again, False)[1], 1e-6)
    assert step.graph is not None and torch.allclose(network.norm.running_mean, other.norm.running_mean)
    assert found[-1][1][-1] is None and len({total for total, _ in found}) == STEPS


@gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_same_gradients(name, precision):
    """Some of these small networks make 3e-3 of a gradient of 1e-7 of an image, and the more the longer they train."""
    step, found = trained(*task(name, "cuda"), True, precision, lr=0)
    assert step.graph is not None
    same(found, trained(*task(name, "cuda"), False, precision, lr=0)[1], 5e-2)


@gpu
def test_steps_that_fit_no_graph_are_computed_as_they_are():
    network, loss, batches = small("cuda")
    plain = trained(network, loss, batches, False)[1]

    def waits(x):
        total = loss(x)
        return total if total.item() > -1 else -total

    network.load_state_dict(small("cuda")[0].state_dict())
    step, found = trained(network, waits, batches, True)
    assert step.graph is None and not step.fits
    same(found, plain, 1e-5)
    handle = network.register_forward_hook(lambda *_: None)
    assert trained(network, loss, batches, True)[0].graph is None
    handle.remove()
    kept = network.first.weight  # the graph knows it by its name only
    assert trained(network, lambda x: loss(x) + kept.square().mean(), batches, True)[0].graph is None
    assert trained(network, loss, batches, True, torch.float16)[0].graph is None


@gpu
@pytest.mark.parametrize("why", ["full", "waits"])
def test_training_goes_on_where_the_capture_fails(why):
    network, loss, batches = small("cuda")
    plain = trained(network, loss, batches, False)[1]
    network.load_state_dict(small("cuda")[0].state_dict())

    def fails(x):
        total = loss(x)
        if torch.cuda.is_current_stream_capturing():
            if why == "full":
                raise torch.OutOfMemoryError("full")
            total.item()
        return total

    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="no CUDA graph"):
        step, found = trained(network, fails, batches, True)
    assert step.graph is None and not step.fits and torch.cuda.current_stream() == stream
    same(found, plain, 1e-5)


@gpu
def test_no_graph_where_half_of_the_memory_is_needed(monkeypatch):
    network, loss, batches = small("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: torch.cuda.mem_get_info(device)[1] // 2 + 2)
    step, found = trained(network, loss, batches, True)
    assert step.graph is None and not step.fits
    same(found, trained(*small("cuda"), False)[1], 1e-6)


@gpu
def test_another_shape_is_computed_as_it_is():
    network, loss, batches = small("cuda")
    step, _ = trained(network, loss, batches, True)
    x = torch.randn(1, 1, 5, 5, device="cuda")
    torch.manual_seed(0)
    expected = loss(x)
    torch.manual_seed(0)
    assert step.graph is not None
    assert torch.allclose(step(x), expected)
