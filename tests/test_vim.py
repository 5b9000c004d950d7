"""Vision Mamba: goldens of its options, mixers, tokens, scan orders, checkpoints and dense variants."""

from collections import Counter
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vmamba
from tests import columns, goldens
from vmamba.column_pyramid import RescaledMaps, SimpleFeaturePyramid, hidden
from vmamba.columnar import ColumnBlock, quarters
from vmamba.mixers.bimamba import BiMamba, SharedBiMamba
from vmamba.mixers.hydra import Hydra
from vmamba.mixers.ss2d import SS2D
from vmamba.models.vim import LargestLogit, PairBlock, RotaryBlock, Vim
from vmamba.norm import LayerNorm
from vmamba.scans import Scan, list_scans
from vmamba.tokens import ClassTokens, TokenEmbed, ends, first, middle, order_of, resize_positions, spread

TOLERANCE = 1e-12  # of an output's standard deviation; reached: 2.5e-14
STATES = partial(BiMamba, state=8)


def tokens(count, place):
    return {
        "embed": partial(TokenEmbed, class_tokens=ClassTokens(count, place)),
        "global_pool": "token" if count else "avg",
    }


MICRO = {"img_size": 64, "depth": 4, "dim": 48, "num_classes": 10, "mixer": STATES, **tokens(1, middle)}
PATCHES = tokens(0, middle)
OPTIONS = {
    "vim_opt_base": {},
    "vim_opt_bimamba_v1": {"mixer": partial(SharedBiMamba, state=8)},
    "vim_opt_double_cls": tokens(2, ends),
    "vim_opt_layer_pairs": {"depth": 2, "block": PairBlock, "mixer": partial(STATES, scan="raster"), **PATCHES},
    "vim_opt_layerscale_layernorm": {
        **PATCHES,
        "global_pool": "last",
        "norm": LayerNorm,
        "block": partial(ColumnBlock, layer_scale=1e-4),
    },
    "vim_opt_maxpool": {**PATCHES, "global_pool": "", "head": LargestLogit},
    "vim_opt_nodivide": {"mixer": partial(STATES, average=False)},
    "vim_opt_rope": {"block": RotaryBlock, **PATCHES},
    "vim_opt_rope_cls": {"block": partial(RotaryBlock, residual=False), **tokens(1, first)},
    "vim_opt_rope_midcls": {"block": RotaryBlock},
    "vim_opt_unidirectional": {"mixer": partial(STATES, scan="raster"), **tokens(1, first)},
}
TURNED = {"vim_opt_rope", "vim_opt_rope_cls", "vim_opt_rope_midcls"}  # whose tokens are recorded after the first turn
SIZES = {
    "vim_tiny_patch16_64x96": ("vim_tiny_patch16_224", (64, 96)),
    "vim_tiny_patch16_stride8_64x80": ("vim_tiny_patch16_stride8_224", (64, 80)),
}


def micro(**settings):
    torch.manual_seed(0)
    return Vim(**{**MICRO, "depth": 2, "dim": 16, **settings})


def check_golden(model, golden):
    tables = {key: torch.zeros(golden["state"][key]) for key in golden["skip"]}
    report = vmamba.load_checkpoint(model, {"model": {**goldens.fill_state(golden), **tables}})
    assert report.ok and set(report.ignored) == set(tables)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    for case in golden["cases"]:
        found = columns.outputs(model.double().eval(), *goldens.case_inputs(case))
        assert found.keys() >= case["outputs"].keys()
        for key, summary in case["outputs"].items():
            if key != "tokens" or golden["model"] not in TURNED:
                assert goldens.compare(found[key], summary) < TOLERANCE, key


def test_every_option_is_covered():
    assert set(OPTIONS) == set(goldens.names("vim_opt_*"))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    check_golden(Vim(**{**MICRO, **OPTIONS[name]}).double(), goldens.load(name))


@pytest.mark.parametrize("name", SIZES)
def test_other_grids(name):
    variant, size = SIZES[name]
    check_golden(vmamba.create_model(variant, img_size=size).double(), goldens.load(name))


@pytest.mark.parametrize(
    ("name", "count"), [("vim_small_patch16_stride8_224", 26_001_256), ("vim_tiny_patch16_224", 7_148_008)]
)
def test_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in vmamba.create_model(name, scan="cross").parameters()) == count


class TestMixers:
    def test_mamba_block(self):
        golden = goldens.load("op_mamba_block")
        state = goldens.fill_state(golden)
        mixer = BiMamba(32, state=8, scan="raster").double()
        names = {"x_proj.weight": "x_proj", "dt_proj.weight": "dt_proj", "dt_proj.bias": "dt_bias"}
        shared = ("in_proj", "out_proj")
        mixer.load_state_dict({names.get(k, k): t if k.startswith(shared) else t[None] for k, t in state.items()})
        for case in golden["cases"]:
            (x,) = goldens.case_inputs(case)
            assert goldens.compare(mixer(x[:, None])[:, 0], case["outputs"]["out"]) < TOLERANCE

    @pytest.mark.parametrize(
        ("what", "cls", "scan"),
        [
            ("mamba_inner_no_out_proj (v2, one direction)", BiMamba, "raster"),
            ("bimamba_inner (v1)", SharedBiMamba, None),
        ],
    )
    def test_inner(self, what, cls, scan):
        case = next(c for c in goldens.load("op_mamba_inner")["cases"] if c["what"] == what)
        given = goldens.named_inputs(case)
        mixer = cls(4, state=4, rank=3, **({"scan": scan} if scan else {})).double()
        conv = mixer.conv1d if cls is BiMamba else mixer.conv
        values = {
            conv.weight: given["conv1d_weight"],
            conv.bias: given["conv1d_bias"],
            mixer.x_proj: given["x_proj_weight"],
            mixer.dt_proj: given["delta_proj_weight"],
            mixer.dt_bias: given["delta_bias"],
            mixer.D: given["D"],
            mixer.A_log: torch.stack([(-given[name]).log() for name in ("A", "A_b") if name in given]),
        }
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        xz = given["xz"].requires_grad_()
        x, z = xz.mT.chunk(2, -1)
        x = x[:, None] if cls is BiMamba else mixer.conv(x[:, None])
        y = mixer.scan_map(x)[:, 0] * F.silu(z)
        y = y @ given["out_proj_weight"].mT if "out_proj_weight" in given else y.mT
        assert goldens.compare(y, case["outputs"]["out"]) < TOLERANCE
        y.backward(torch.from_numpy(goldens.make_input(y.shape, case["grad"]["seed"])))
        assert goldens.compare(xz.grad, case["outputs"]["dxz"]) < TOLERANCE
        dA = mixer.A_log.grad / -mixer.A_log.exp()
        for gradient, name in zip(dA, ("dA", "dA_b"), strict=False):
            assert goldens.compare(gradient, case["outputs"][name]) < TOLERANCE

    @pytest.mark.parametrize("scan", list_scans())
    @pytest.mark.parametrize("cls", [BiMamba, SharedBiMamba])
    def test_any_scan_of_a_map(self, cls, scan):
        mixer = cls(8, state=2, scan=scan)
        mixer(torch.randn(1, 3, 5, 8)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())

    def test_both_directions_in_one_scan(self):
        calls = Counter()

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                calls[str(function)] += 1
                return function(*args, **(kwargs or {}))

        with Count():
            BiMamba(8)(torch.randn(1, 1, 7, 8))
        assert calls["vmamba.selective_scan.default"] == 1

    def test_reversed_routes_reverse_the_result(self):
        mixer, x = BiMamba(8), torch.randn(2, 1, 9, 8)
        with torch.no_grad():
            for parameter in [mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj, mixer.dt_proj, mixer.dt_bias]:
                parameter[1] = parameter[0]
            assert torch.allclose(mixer(x.flip(2)), mixer(x).flip(2), atol=1e-6)


class TestTokens:
    def test_places(self):
        assert first(6, 2) == [0, 1] and middle(7, 1) == [3] and ends(6, 2) == [0, 7]
        assert spread(196, 12) == [15 + 16 * i for i in range(12)]

    @pytest.mark.parametrize("place", [first, middle, ends, spread])
    @pytest.mark.parametrize("count", [0, 1, 3])
    @pytest.mark.parametrize("patches", [1, 5, 8])
    def test_split_is_the_reverse_of_insert(self, place, count, patches):
        layout = ClassTokens(count, place)
        x, extra = torch.randn(2, patches, 3), torch.randn(2, count, 3)
        y = layout.insert(x, extra)
        assert torch.equal(y[:, place(patches, count)], extra)
        assert all(torch.equal(a, b) for a, b in zip(layout.split(y), (x, extra), strict=True))

    @pytest.mark.parametrize("case", goldens.load("op_pos_embed_resize")["cases"], ids=lambda case: case["what"])
    def test_resize(self, case):
        table, options = goldens.named_inputs(case)["pos_embed"], case["options"]
        extra = options["num_extra"]
        old = options.get("src") or [int((table.shape[1] - extra) ** 0.5)] * 2
        new = options.get("dst") or [int(options["num_patches"] ** 0.5)] * 2
        kept, patches = table[:, : 0 if options.get("drop_first") else extra], table[:, extra:]
        found = torch.cat([kept, resize_positions(patches, tuple(old), tuple(new))], 1)
        assert goldens.compare(found, case["outputs"]["out"]) < TOLERANCE

    def test_input_size(self):
        x, settings = torch.randn(1, 3, 48, 80), {"depth": 2, "dim": 16}
        model = timm.create_model("vim_tiny_patch16_224", **settings)
        expected = model(x)
        model.set_input_size((48, 80))
        assert model.stem.grid == (3, 5) and model.stem.pos_embed.shape == (1, 15, 16)
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert timm.models.get_model_traits(model)["img_size"] == (48, 80)
        rebuilt = timm.create_model("vim_tiny_patch16_224", **timm.models.get_model_args(model))
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt(x), model(x))

    def test_errors(self):
        with pytest.raises(ValueError, match="images must be at least 16 x 16 pixels, got 15 x 40"):
            micro()(torch.randn(1, 3, 15, 40))
        with pytest.raises(ValueError, match="global_pool='token' needs class tokens"):
            micro(**{**PATCHES, "global_pool": "token"})

    def test_the_residual_stream_stays_wide(self):
        model = micro().bfloat16().eval()
        h, r, *_ = model.advance(model.blocks[0], model.begin(torch.randn(1, 3, 64, 64).bfloat16()))
        assert h.dtype == torch.bfloat16 and r.dtype == torch.float32
        assert model.features(torch.randn(1, 3, 64, 64).bfloat16())[0].dtype == torch.bfloat16


class TestOrders:
    @pytest.mark.parametrize("place", [first, middle])
    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_a_block_sees_the_patches_in_the_order_of_the_scan(self, count, place):
        layout, grid = ClassTokens(count, place), (3, 5)
        torch.manual_seed(0)
        plain = ColumnBlock(8, mixer=BiMamba)
        ordered = ColumnBlock(8, mixer=BiMamba, order=order_of("hilbert", 0), class_tokens=layout)
        ordered.load_state_dict(plain.state_dict())
        route = Scan("hilbert").routes(*grid)[0]
        patches, extra = torch.randn(2, 15, 8), torch.randn(2, count, 8)
        moved, _ = plain(layout.insert(patches[:, route], extra), None, grid)
        found, _ = ordered(layout.insert(patches, extra), None, grid)
        for a, b in zip(layout.split(moved), layout.split(found), strict=True):
            assert torch.allclose(a, b[:, route] if b.shape[1] == 15 else b, atol=1e-6)

    def test_blocks_take_the_routes_in_turn(self):
        cross = Scan("cross").routes(2, 3)
        assert order_of("cross", 0) is None and order_of("raster", 5) is None
        assert all(torch.equal(order_of("cross", i).routes(2, 3)[0], cross[i % 4]) for i in (1, 2, 3, 5, 6, 7))

    @pytest.mark.parametrize("scan", list_scans())
    def test_any_scan(self, scan):
        model = micro(scan=scan)
        model.load_state_dict(micro().state_dict())  # the order changes no parameter
        model(torch.randn(2, 3, 64, 80)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_no_order(self):
        with pytest.raises(ValueError, match="is no order of tokens: its routes do not go through the 2 x 2 patches"):
            micro(scan=lambda h, w: torch.zeros(1, h * w).long())

    @pytest.mark.parametrize("mixer", [Hydra, SS2D, partial(SS2D, scan="hilbert")])
    def test_mixers_of_maps_see_the_grid(self, mixer):
        model = micro(mixer=mixer, **PATCHES)
        seen = []
        model.blocks[0].mixer.register_forward_hook(lambda module, inputs, result: seen.append(inputs[0].shape))
        assert model(torch.randn(1, 3, 48, 80)).shape == (1, 10) and seen == [(1, 3, 5, 16)]


class TestCheckpoints:
    def state(self, **changes):
        return {**goldens.fill_state(goldens.load("vim_opt_base")), **changes}

    def test_another_grid(self):
        table = torch.randn(1, 26, 48, dtype=torch.float64)  # 5 x 5 and the class token's row in the middle
        model = Vim(**MICRO).double()
        report = vmamba.load_checkpoint(model, {"model": self.state(pos_embed=table)})
        assert report.layout == "official" and torch.equal(model.stem.cls_pos, table[:, 12:13])
        patches = torch.cat([table[:, :12], table[:, 13:]], 1)
        assert torch.equal(model.stem.pos_embed, resize_positions(patches, (5, 5), (4, 4)))

    def test_no_square_grid(self):
        with pytest.raises(
            ValueError, match=r"misshapen: stem.pos_embed: checkpoint \(1, 22, 48\), model \(1, 16, 48\)"
        ):
            vmamba.load_checkpoint(Vim(**MICRO), self.state(pos_embed=torch.randn(1, 23, 48)))

    def test_a_classifier_without_its_class_token(self):
        state = self.state()
        model = Vim(
            **{**MICRO, "embed": partial(TokenEmbed, class_tokens=ClassTokens(0, middle)), "global_pool": "avg"}
        )
        report = vmamba.load_checkpoint(model.double(), state)
        assert report.ok and report.ignored == ["stem.cls_token"]
        patches = torch.cat([state["pos_embed"][:, :8], state["pos_embed"][:, 9:]], 1)
        assert torch.equal(model.stem.pos_embed, patches)

    def test_half_of_the_directions(self):
        with pytest.raises(
            ValueError, match=r"misshapen: blocks.0.mixer.A_log: checkpoint \(2, 96, 8\), model \(1, 96, 8\)"
        ):
            vmamba.load_checkpoint(Vim(**{**MICRO, "mixer": partial(STATES, scan="raster")}), self.state())
        state = self.state()
        del state["layers.1.mixer.A_log"]
        with pytest.raises(ValueError, match=r"unexpected: blocks.1.mixer.A_log\[1\]"):
            vmamba.load_checkpoint(Vim(**MICRO), state)

    def test_native_of_another_size(self):
        large, model = micro(img_size=96), micro()
        vmamba.load_checkpoint(model, large.state_dict())
        assert torch.equal(model.stem.cls_pos, large.stem.cls_pos) and model.stem.grid == (4, 4)


class TestDense:
    @pytest.mark.parametrize(
        ("name", "figures"),
        [
            ("vim_tiny_patch16_seg", "vim_seg_tiny_64"),
            ("vim_small_patch16_seg", "vim_seg_small_64"),
            ("vim_tiny_patch16_det", "vim_det_tiny_128"),
        ],
    )
    @torch.no_grad()
    def test_golden(self, name, figures):
        golden = goldens.load(figures)
        (case,) = golden["cases"]
        (x,) = goldens.case_inputs(case)
        model = vmamba.create_model(name, img_size=x.shape[2]).double().eval()
        state = {f"backbone.{key}": tensor for key, tensor in goldens.fill_state(golden).items()}
        report = vmamba.load_checkpoint(model, {"state_dict": {**state, "decode_head.weight": torch.ones(1)}})
        idle = golden["state"].get("norm_f.weight", [0])[0]  # the original keeps a final norm that it does not use
        assert report.ok and sum(p.numel() for p in model.parameters()) == golden["params"] - idle
        found, maps = case["outputs"], [*model.maps(x)[-1:], *model(x)][-len(case["outputs"]) :]
        for y, summary in zip(maps, found.values(), strict=True):
            assert goldens.compare(y, summary) < TOLERANCE

    @pytest.mark.parametrize("stride", ["", "_stride8"])
    @pytest.mark.parametrize("options", [{}, {"tap": hidden}, {"neck": SimpleFeaturePyramid}])
    def test_pyramid(self, stride, options):
        name = f"vim_tiny_patch16{stride}_224_backbone"
        model = vmamba.create_model(name, depth=5, dim=16, in_chans=2, **options)
        maps = model(torch.randn(2, 2, 96, 80))
        assert len(maps) == len(model.channels) == len(model.strides)
        for y, c, s in zip(maps, model.channels, model.strides, strict=True):
            assert y.shape[:2] == (2, c) and y.is_contiguous()
            assert all(
                side // s - 2 <= found <= side // s + 1 for side, found in zip((96, 80), y.shape[2:], strict=True)
            )
        sum(y.square().mean() for y in maps).backward()
        assert all(p.grad is not None for p in model.parameters())  # the class token is gone

    def test_compile(self):
        torch.manual_seed(0)
        model = vmamba.create_model("vim_small_patch16_seg", depth=2, dim=16, out_indices=(0, 0, 1, 1)).eval()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            x = torch.randn(1, 3, 64, 80)
            for y, z in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()

    def test_errors(self):
        with pytest.raises(
            ValueError, match=r"strides \(4, 8, 16, 32\) of 3 maps at stride 16; choose from 4, 8, 16, 32, 64"
        ):
            RescaledMaps([8, 8, 8], 16)
        with pytest.raises(ValueError, match=r"strides \(2,\) of one map at stride 16"):
            SimpleFeaturePyramid([8], 16, strides=(2,))

    def test_levels(self):
        assert quarters(24) == (5, 11, 17, 23) and quarters(2) == (0, 1) and quarters(1) == (0,)


def test_initialisation():
    model = micro(depth=4, dim=64)
    weights = model.blocks[1].mixer.out_proj.weight
    bound = (1 / weights.shape[1]) ** 0.5 / 4**0.5
    assert 0.95 * bound < weights.abs().max() <= bound
    delta = F.softplus(model.blocks[0].mixer.dt_bias)
    assert delta.min() >= 0.99e-4 and delta.max() <= 0.101
    assert model.stem.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert model.stem.proj.bias.abs().max() == 0 and model.stem.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)


def test_a_pair_needs_both():
    block = PairBlock(8, mixer=partial(BiMamba, scan="raster"))
    with torch.no_grad():
        block.pair[1].mixer.out_proj.weight.zero_()
        h = torch.randn(1, 4, 8)
        y, r = block(h, None, (2, 2))
        assert torch.equal(y, block.pair[0](h, None, (2, 2))[0]) and torch.equal(r, 2 * h)
    assert isinstance(block.pair, nn.ModuleList)
