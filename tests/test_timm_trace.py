"""Tracing of every kind of timm model in the zoo: FX, torch.compile without graph breaks, torch.export, TorchScript."""

import pytest
import torch
from timm.models._features_fx import GraphExtractNet, get_graph_node_names

from tests.timm_zoo import KINDS, image, shallow, small

OPTIONS = {"num_classes": 5, "drop_path_rate": 0.0}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing the model in eval mode")
def test_fx(name):
    model, x = small(name, num_classes=5).eval(), image(2)
    train, evaluate = get_graph_node_names(model)
    traced = GraphExtractNet(model, [evaluate[-1]]).eval()
    assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(x[:1, :, :50, :33]), model(x[:1, :, :50, :33]))
    traced = GraphExtractNet(small(name, num_classes=5).train(), [train[-1]])
    traced.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in traced.parameters())


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_compile_without_graph_breaks(name):
    model = small(name, **shallow(name), **OPTIONS).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in image(2, 3, 33, 40), image(2, 3, 40, 64):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_compile_for_training(name):
    model, x = small(name, **shallow(name), **OPTIONS).train(), image(2, 3, 33, 40)
    model(x).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())


@pytest.mark.parametrize("name", KINDS)
def test_compile_features(name):
    model, x = small(name, features_only=True, **shallow(name)).eval(), image()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        for y, z in zip(compiled, model(x), strict=True):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_export(name):
    model = small(name, **shallow(name), **OPTIONS).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image(2, 3, 52, 44),), dynamic_shapes=({0: batch},))
    x = image(3, 3, 52, 44)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_torchscript_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"use torch\.compile or torch\.export instead"):
        torch.jit.script(small(name))
