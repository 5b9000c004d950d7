"""ShuffleMamba: classifiers with registers, checkpoints, dense backbones, ViT-Adapter and its deformable attention."""

import itertools

import pytest
import torch
from torch import nn

import vmamba
from tests import columns, goldens
from vmamba.columnar import RMSNorm
from vmamba.deformable import DeformableAttention, centres
from vmamba.models.hydra_vit import HydraViT
from vmamba.models.shufflemamba import RegisterMamba, RegisterPool, ShuffleMamba
from vmamba.models.shufflemamba_dense import ShuffleMambaAdapter, ShuffleMambaDense
from vmamba.shuffle import LayerShuffle
from vmamba.tokens import ClassTokens, spread
from vmamba.vit_adapter import ViTAdapter

TOLERANCE = 1e-12  # of an output's standard deviation; reached: 3e-14
PARAMETERS = {
    "shufflemamba_tiny_patch16_224": 7_148_008,
    "shufflemamba_small_patch16_224": 25_796_584,
    "shufflemamba_middle_patch16_224": 74_236_456,
    "shufflemamba_base_patch16_224": 97_598_440,
    "shufflemamba_large_patch16_224_40": 283_698_152,
    "shufflemamba_large_patch16_224": 340_034_536,
    "shufflemamba_reg_tiny_patch16_224": 9_264_232,
    "shufflemamba_reg_small_patch16_224": 27_801_064,
    "shufflemamba_reg_base_patch16_224": 99_301_096,
    "shufflemamba_reg_large_patch16_224": 341_222_376,
}
DETECTOR = 2.36e6 + 0.59e6 + 14.3e6 + 2.6e6  # FPN beside its 1x1 convolutions, RPN, box and mask heads of Mask R-CNN
ADAPTERS = {"shufflemamba_adapter_middle": 103e6, "shufflemamba_adapter_large": 383e6}  # with Mask R-CNN, as published


def micro(cls=ShuffleMambaAdapter, **settings):
    torch.manual_seed(0)
    options = {"heads": 2, "width": 8} if cls is ShuffleMambaAdapter else {}
    return cls(**{"depth": 4, "dim": 16, **options, **settings})


def official(name, blocks):
    """The checkpoint of a golden file with its first blocks alone."""
    state = goldens.fill_state(goldens.load(name))
    return {k: t for k, t in state.items() if not k.startswith("layers.") or int(k.split(".")[1]) < blocks}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert sum(p.numel() for p in vmamba.create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ADAPTERS)
def test_parameters_of_adapters(name):
    model = vmamba.create_model(name, device="meta")
    found = sum(p.numel() for p in model.parameters()) + 4 * 256 * model.channels[0] + DETECTOR
    assert found == pytest.approx(ADAPTERS[name], abs=0.6e6)


class TestRegisters:
    @torch.no_grad()
    def test_more_registers_than_a_segment_holds(self):
        golden = goldens.load("shufflemamba_reg_base_patch16_64")
        model = vmamba.create_model("shufflemamba_reg_base_patch16_224", img_size=64).double().eval()
        assert vmamba.load_checkpoint(model, {"model": goldens.fill_state(golden)}).ok
        assert sum(p.numel() for p in model.parameters()) == golden["params"]
        (case,) = golden["cases"]
        found = columns.outputs(model, *goldens.case_inputs(case))
        assert found.keys() >= case["outputs"].keys()
        assert all(goldens.compare(found[key], summary) < TOLERANCE for key, summary in case["outputs"].items())

    @pytest.mark.parametrize("size", [(16, 16), (33, 70), (224, 240)])
    def test_any_size(self, size):
        assert micro(RegisterMamba, reduce=4, num_classes=3)(torch.randn(2, 3, *size)).shape == (2, 3)

    def test_pool(self):
        pool = RegisterPool("token", 6, class_tokens=ClassTokens(4, spread), reduce=2)
        x, places = torch.randn(3, 14, 6), [2, 5, 8, 11]
        narrow = [x[:, i] @ pool.neck.weight.mT for i in places]
        assert torch.allclose(pool(x), pool.norm_neck(torch.cat(narrow, 1)), atol=1e-6)
        assert pool(x).shape[1] == 6 * pool.feat_mult() == pool.norm_neck.weight.numel() == 12
        plain = RegisterPool("token", 6, class_tokens=ClassTokens(4, spread))
        assert torch.equal(plain(x), x[:, places].flatten(1)) and not list(plain.parameters())
        mean = RegisterPool("avg", 6, class_tokens=ClassTokens(4, spread), reduce=2)
        assert torch.allclose(mean(x), x[:, [i for i in range(14) if i not in places]].mean(1), atol=1e-6)
        assert mean.feat_mult() == 1 and not list(mean.parameters())

    def test_errors(self):
        with pytest.raises(ValueError, match="reduce=5 must divide the number of class tokens, 12, and channels, 16"):
            micro(RegisterMamba, reduce=5)
        with pytest.raises(TypeError, match="register"):
            micro(RegisterMamba, register=3)

    def test_a_new_classifier_keeps_the_neck(self):
        model = micro(RegisterMamba, reduce=4)
        neck = model.head.global_pool.neck.weight
        model.reset_classifier(7)
        assert model.head.global_pool.neck.weight is neck and model.head.fc.in_features == 3 * 16


class TestCheckpoints:
    def test_hub(self):
        state = official("shufflemamba_reg_small_patch16_224", 2)
        hub = {"model": state, "model_ema": {"epoch": 1}, "optimizer": {"state": {}}, "epoch": 299, "scaler": {}}
        model = RegisterMamba(depth=2, dim=384, reduce=2).double()
        report = vmamba.load_checkpoint(model, hub)
        assert report.ok and len(report.loaded) < len(state) and not report.ignored  # directions are stacked
        assert torch.equal(model.stem.cls_pos, state["pos_embed_cls"])
        assert torch.equal(model.head.global_pool.neck.weight, state["neck.weight"])

    def test_another_size(self):
        small, large = micro(RegisterMamba, img_size=64), micro(RegisterMamba, img_size=96)
        assert vmamba.load_checkpoint(large, small.state_dict()).ok and large.stem.pos_embed.shape == (1, 36, 16)

    @pytest.mark.parametrize(
        ("name", "dim", "left_out"),
        [
            ("shufflemamba_tiny_patch16_224", 192, {"cls_token", "head.weight", "head.bias"}),
            (
                "shufflemamba_reg_small_patch16_224",
                384,
                {"cls_token", "pos_embed_cls", "neck.weight", "norm_neck.weight", "head.weight", "head.bias"},
            ),
        ],
    )
    def test_a_classifier_for_dense_prediction(self, name, dim, left_out):
        state = official(name, 4)
        model = ShuffleMambaDense(depth=4, dim=dim, norm=RMSNorm).double()
        report = vmamba.load_checkpoint(model, {"model": state})
        assert (
            report.ok
            and {key.removeprefix("body.stem.").replace("cls_pos", "pos_embed_cls") for key in report.ignored}
            == left_out
        )
        assert torch.equal(model.body.stem.pos_embed, state["pos_embed"][:, -196:])
        assert torch.equal(model.neck.norm.weight, state["norm_f.weight"])
        adapter = ShuffleMambaAdapter(depth=4, dim=dim, norm=RMSNorm).double()
        report = vmamba.load_checkpoint(adapter, {"model": state}, strict=False)
        assert not report.unexpected and not any(key.startswith("body.") for key in report.missing)


class TestTraining:
    @pytest.mark.parametrize("name", ["shufflemamba_tiny_patch16_224", "shufflemamba_reg_tiny_patch16_224"])
    def test_published_rates(self, name):
        model = vmamba.create_model(name, depth=3, dim=16)
        assert [getattr(b, "shuffle_probability", None) for b in model.blocks] == pytest.approx([0, 0.05, 0.1])

    @pytest.mark.parametrize("cls", [ShuffleMamba, RegisterMamba, ShuffleMambaDense, ShuffleMambaAdapter])
    def test_shuffled(self, cls):
        model = micro(cls, shuffle_rate=1.0)
        assert sum(isinstance(module, LayerShuffle) for module in model.modules()) == 3
        x, runs = torch.randn(2, 3, 64, 64), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            y = model(x)
            runs.append(torch.cat([z.flatten() for z in (y if isinstance(y, list) else [y])]))
        assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=1e-5)

    def test_initialisation(self):
        torch.manual_seed(0)
        plain = vmamba.create_model("shufflemamba_tiny_patch16_224", depth=2, dim=64)
        registers = vmamba.create_model("shufflemamba_reg_tiny_patch16_224", depth=2, dim=64)
        mixer = plain.blocks[1].mixer
        for weight in (mixer.in_proj.weight, mixer.x_proj, mixer.dt_proj):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not mixer.dt_bias.any() and not plain.stem.cls_token.any()
        assert registers.blocks[1].mixer.dt_bias.all() and registers.stem.cls_token.all()


class TestDense:
    def test_maps(self):
        model = micro(ShuffleMambaDense, out_indices=(0, 2, 3))
        maps = model(torch.randn(1, 3, 50, 70))
        assert [tuple(y.shape) for y in maps] == [(1, 16, 3, 4)] * 3 and model.strides == (16,) * 3
        assert all(y.is_contiguous() for y in maps)
        last = maps[2].permute(0, 2, 3, 1)
        assert last.mean(-1).abs().max() < 1e-5 and maps[0].permute(0, 2, 3, 1).mean(-1).abs().max() > 1e-4


class TestAdapter:
    @torch.no_grad()
    def test_golden(self):
        golden = goldens.load("shufflemamba_adapter_micro")
        model = ShuffleMambaAdapter(dim=192, depth=12, heads=6).double().eval()
        report = vmamba.load_checkpoint(model, {"model": goldens.fill_state(golden)})
        assert report.ok and sum(p.numel() for p in model.parameters()) == golden["params"]
        for case in golden["cases"]:
            maps = model(*goldens.case_inputs(case))
            for y, summary in zip(maps, case["outputs"].values(), strict=True):
                assert goldens.compare(y, summary) < TOLERANCE

    @pytest.mark.parametrize("size", [(16, 16), (33, 70), (96, 64)])
    def test_any_size(self, size):
        model = micro(in_chans=2).eval()
        maps = model(torch.randn(2, 2, *size))
        for y, stride in zip(maps, model.strides, strict=True):
            assert y.shape == (2, 16, *(-(-side // stride) for side in size)) and y.is_contiguous()

    def test_training_reaches_every_parameter(self):
        model = micro(drop_path_rate=0.1)
        with torch.no_grad():
            for injector in model.injectors:
                injector.gamma.fill_(0.1)
        sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 96))).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_a_new_adapter_leaves_the_column_alone(self):
        model, x = micro().eval(), torch.randn(1, 3, 64, 64)
        seen = {}
        model.body.blocks[3].register_forward_hook(lambda module, inputs, pair: seen.update(h=pair[0]))
        model(x)
        alone = micro(ShuffleMambaDense, out_indices=(2, 3), neck=None).eval()
        alone.body.load_state_dict(model.body.state_dict())
        alone.body.blocks[3].register_forward_hook(lambda module, inputs, pair: seen.update(alone=pair[0]))
        alone(x)
        assert torch.equal(seen["h"], seen["alone"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_types_and_devices(self, dtype):
        model = micro(dtype=dtype).eval()
        assert {y.dtype for y in model(torch.randn(1, 3, 64, 64, dtype=dtype))} == {dtype}
        model = micro(dtype=dtype, device="meta").eval()
        assert model(torch.empty(1, 3, 64, 64, dtype=dtype, device="meta"))[3].shape == (1, 16, 2, 2)

    @torch.no_grad()
    def test_compile_and_export(self):
        model, x = micro().eval(), torch.randn(1, 3, 48, 64)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
        torch.compiler.reset()
        for y, z, expected in zip(compiled, exported, model(x), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)

    def test_any_column(self):
        body = HydraViT(depth=5, dim=24, num_classes=0, scan="hilbert")
        assert ViTAdapter(body, heads=3, width=4).eval()(torch.randn(1, 3, 64, 48))[0].shape == (1, 24, 16, 12)

    def test_errors(self):
        stride8 = vmamba.create_model("vim_tiny_patch16_stride8_224", depth=4, dim=16)
        with pytest.raises(ValueError, match="at least 4 blocks at stride 16, got 4 at stride 8"):
            ViTAdapter(stride8)
        with pytest.raises(ValueError, match=r"8 channels of the values \(ratio 0\.5\) do not divide into 3 heads"):
            micro(heads=3)


class TestDeformableAttention:
    GRIDS = ((3, 5), (2, 1))

    def attention(self):
        torch.manual_seed(0)
        attention = DeformableAttention(8, levels=2, heads=2, points=3, ratio=0.5).double()
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.7)
        return attention

    def test_by_the_formula(self):
        attention, grids = self.attention(), self.GRIDS
        query, value = torch.randn(2, 4, 8).double(), torch.randn(2, 17, 8).double()
        places = torch.rand(4, 2).double()
        offsets = attention.sampling_offsets(query).view(2, 4, 2, 2, 3, 2)
        weights = attention.attention_weights(query).view(2, 4, 2, 6).softmax(-1).view(2, 4, 2, 2, 3)
        V = attention.value_proj(value).view(2, 17, 2, 2)
        y, start = torch.zeros(2, 4, 2, 2).double(), 0
        for level, (h, w) in enumerate(grids):
            for b, q, g, p in itertools.product(range(2), range(4), range(2), range(3)):
                dx, dy = offsets[b, q, g, level, p]
                column, row = places[q, 0] * w + dx - 0.5, places[q, 1] * h + dy - 0.5
                for i, j in itertools.product(range(h), range(w)):
                    near = (1 - (row - i).abs()).clamp(min=0) * (1 - (column - j).abs()).clamp(min=0)
                    y[b, q, g] += weights[b, q, g, level, p] * near * V[b, start + i * w + j, g]
            start += h * w
        expected = attention.output_proj(y.flatten(2))
        assert torch.allclose(attention(query, places, value, grids), expected, atol=1e-12)

    def test_places(self):
        assert centres([(1, 2), (2, 1)], torch.ones(1)).tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
        assert centres([(1, 1)], torch.ones(1).half()).dtype == torch.float32

    def test_initialisation(self):
        attention = DeformableAttention(8, levels=1, heads=4, points=2)
        ring = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        expected = torch.tensor([[(x, y), (2 * x, 2 * y)] for x, y in ring]).float()
        assert torch.allclose(attention.sampling_offsets.bias.view(4, 2, 2), expected, atol=1e-6)
        x = torch.randn(1, 6, 8)
        assert torch.allclose(
            attention(x, centres([(2, 3)], x), x, [(2, 3)]), attention(-x, centres([(2, 3)], x), x, [(2, 3)])
        )
