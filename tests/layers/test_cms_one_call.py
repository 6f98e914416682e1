"""`CMS.step` as one call of the CPU engine: results, state, bits, and when levels are served one by one instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hope_kernels import CMS, CMSLevel
from hope_kernels.backends import cpu
from hope_kernels.backends.cpu import step as cpu_step
from hope_kernels.layers.cms_state import CMSBuffer
from tests.layers.common import VARIANTS, assert_same, positions_of, results_of, spread

pytestmark = pytest.mark.skipif(not cpu.status(), reason=f"no CPU engine: {cpu.status().reason}")

# Of outputs and state against the reference in float64, relative to the largest number.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def stack(form: str, rule: str = "gd", *, momentum: bool = False, retention: bool = True) -> list[CMSLevel]:
    """Levels written with each token, every three and every six tokens, and never."""
    common = {"form": form, "rule": rule, "momentum": momentum, "retention": retention, "lr_max": 0.05}
    return [
        CMSLevel(1, expansion=3, **common),
        CMSLevel(3, expansion=2, activation="silu", **common),
        CMSLevel(6, form=form, expansion=1, activation="relu2", lr_max=0.05),
        CMSLevel(None, form=form, expansion=1.5, activation="gelu"),
    ]


def make(levels: list[CMSLevel], dim: int = 6, heads: int = 2, **options) -> CMS:
    torch.manual_seed(0)
    return spread(CMS(dim, levels, heads=heads, **{"dtype": torch.float32, **options}))


def tokens(count: int, batch: int, dim: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, batch, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def serve(cms: CMS, x: Tensor, buffer: CMSBuffer) -> Tensor:
    return torch.stack([cms.step(token, buffer) for token in x])


def held(outputs: Tensor, buffer: CMSBuffer) -> dict[str, Tensor]:
    return {name: value.double() for name, value in results_of(outputs, buffer.to_state()).items()}


def follows_float64(cms: CMS, x: Tensor) -> None:
    truth = CMS(
        cms.dim,
        [level.level for level in cms.levels],
        heads=cms.heads,
        variant=cms.variant,
        backend="reference",
        dtype=torch.float64,
    )
    truth.load_state_dict(cms.state_dict())
    found, wanted = cms.make_buffer(x.shape[1]), truth.make_buffer(x.shape[1])
    assert found.kernel is not None, found.refused
    assert wanted.kernel is None
    got, want = held(serve(cms, x, found), found), held(serve(truth, x.double(), wanted), wanted)
    assert positions_of(found.to_state()) == positions_of(wanted.to_state())
    assert_same(got, want, TOLERANCE[x.dtype])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["mlp", "glu", "linear"])
@pytest.mark.parametrize(
    ("rule", "momentum", "retention"),
    [("gd", False, True), ("gd", True, True), ("gd", True, False), ("gd", False, False), ("dgd", False, True)],
)
def test_steps_follow_the_reference_in_float64(variant, form, rule, momentum, retention) -> None:
    cms = make(stack(form, rule, momentum=momentum, retention=retention), variant=variant, dtype=torch.float64)
    follows_float64(cms, tokens(14, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("variant", "form", "rule"),
    [("sequential", "mlp", "gd"), ("nested", "glu", "dgd"), ("independent", "linear", "gd")],
)
def test_steps_follow_the_reference_in_lower_precision(variant, form, rule, dtype) -> None:
    follows_float64(make(stack(form, rule), dim=34, variant=variant, dtype=dtype), tokens(14, 3, 34, dtype))


@pytest.mark.parametrize(
    ("dim", "heads", "batch"), [(1, 1, 1), (17, 1, 5), (100, 4, 2), (256, 2, 9)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sizes_that_are_no_multiple_of_anything_or_large(dim, heads, batch, dtype) -> None:
    levels = [CMSLevel(2, expansion=3, lr_max=0.3), CMSLevel(None, "glu", expansion=2.7)]
    follows_float64(make(levels, dim, heads, dtype=dtype), tokens(3, batch, dim, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_and_threads_change_no_bit(variant, dtype) -> None:
    """Nine sequences that stand at different tokens, each as if it were alone on one thread."""
    levels = [CMSLevel(1, expansion=2), CMSLevel(3, "glu", momentum=True), CMSLevel(None)]
    cms = make(levels, 128, variant=variant, dtype=dtype)
    x = tokens(5, 9, 128, dtype)
    alone, together = [cms.make_buffer(1) for _ in range(9)], cms.make_buffer(9)
    begun = {2: [1, 2, 8], 4: [0]}  # sequences that begin anew before these tokens
    for t, token in enumerate(x):
        for row in begun.get(t, []):
            alone[row] = cms.make_buffer(1)
        cms.replace_sequences(together, begun.get(t, []))
        torch.set_num_threads(1)
        expected = torch.cat([cms.step(token[row : row + 1], alone[row]) for row in range(9)])
        torch.set_num_threads(2)
        assert torch.equal(cms.step(token, together), expected)
    for row in range(9):
        now, wanted = together.to_state([row]), alone[row].to_state()
        assert positions_of(now) == positions_of(wanted)
        assert_same(results_of(x, now), results_of(x, wanted), 0.0)


def test_a_step_moves_the_buffer_and_nothing_else() -> None:
    cms = make(stack("mlp", momentum=True), variant="nested")
    parameters = {name: value.clone() for name, value in cms.state_dict().items()}
    x = tokens(5, 2)
    buffer = cms.make_buffer(2)
    serve(cms, x[:4], buffer)
    middle = buffer.to_state()
    copy = {name: value.clone() for name, value in results_of(x, middle).items()}
    kept = x.clone()
    output = cms.step(x[4][:, None], cms.make_buffer(middle))
    assert output.shape == (2, 1, 6)
    assert torch.equal(cms.step(x.transpose(0, 1)[:, 4], buffer), output[:, 0])  # rows that do not lie together
    assert torch.equal(cms.step(x[4].t().contiguous().t(), cms.make_buffer(middle)), output[:, 0])
    assert_same(results_of(x, middle), copy, 0.0)
    assert_same(dict(cms.state_dict()), parameters, 0.0)
    assert torch.equal(x, kept)


def test_parameters_that_moved_are_found() -> None:
    cms = make([CMSLevel(2, expansion=1), CMSLevel(None, expansion=1)])
    x = tokens(2, 1)
    buffer, fresh = cms.make_buffer(1), cms.make_buffer(1)
    serve(cms, x[:1], buffer), serve(cms, x[:1], fresh)
    old = cms.levels[1].weights[0]
    cms.levels[1].weights[0] = nn.Parameter(2 * old.detach())
    moved = cms.step(x[1], buffer)
    with torch.no_grad():
        old.mul_(2)
    cms.levels[1].weights[0] = old
    assert torch.equal(moved, cms.step(x[1], fresh))


def test_a_buffer_serves_another_layer_of_its_kind_and_then_its_own_again() -> None:
    layers = [make(stack("mlp"), dtype=torch.float64) for _ in range(2)]
    spread(layers[1], seed=3)
    levels = [level.level for level in layers[0].levels]
    references = [CMS(6, levels, heads=2, backend="reference", dtype=torch.float64) for _ in range(2)]
    for reference, layer in zip(references, layers, strict=True):
        reference.load_state_dict(layer.state_dict())
    found, want = layers[0].make_buffer(2), references[0].make_buffer(2)
    for token, turn in zip(tokens(6, 2, dtype=torch.float64), (0, 0, 1, 0, 1, 1), strict=True):
        output = layers[turn].step(token, found)
        torch.testing.assert_close(output, references[turn].step(token, want), rtol=1e-10, atol=1e-11)


class Doubled(nn.Module):
    """What an adapter does: it stands in a linear map's place and shows that one's weight."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def _replace(cms: CMS) -> None:
    cms.levels[0].target = Doubled(cms.levels[0].target)


def _hook(cms: CMS) -> None:
    cms.levels[0].target.register_forward_hook(lambda module, args, output: 2 * output)


def _patch(cms: CMS) -> None:
    forward = cms.levels[0].target.forward
    cms.levels[0].target.forward = lambda x: 2 * forward(x)


def _hook_the_plain_level(cms: CMS) -> None:
    cms.levels[1].register_forward_hook(lambda module, args, output: (2 * output[0], None))


@pytest.mark.parametrize("change", [_replace, _hook, _patch, _hook_the_plain_level])
def test_what_was_put_into_the_layer_has_its_effect(change) -> None:
    """Also where it comes after the buffer: levels are then served one by one."""
    x = tokens(3, 2, dtype=torch.float64)
    outputs = {}
    for backend in (None, "reference"):
        levels = [CMSLevel(1, expansion=1, lr_max=0.3), CMSLevel(None, expansion=1)]
        cms = make(levels, backend=backend, dtype=torch.float64)
        buffer = cms.make_buffer(2)
        first = cms.step(x[0], buffer)
        change(cms)
        outputs[backend] = torch.stack([first, *serve(cms, x[1:], buffer)])
    torch.testing.assert_close(outputs[None], outputs["reference"], rtol=1e-10, atol=1e-11)
    cms.backend = cms.levels[0].backend = None
    assert "of the layer was replaced or has hooks" in cms.make_buffer(2).refused


def test_levels_may_be_served_one_by_one_in_between() -> None:
    cms = make(stack("mlp"), dtype=torch.float64)
    x = tokens(9, 2, dtype=torch.float64)
    whole, buffer = cms.make_buffer(2), cms.make_buffer(2)
    expected, outputs = serve(cms, x, whole), []
    for t, token in enumerate(x):
        for layer in (cms, *cms.levels[:3]):
            layer.backend = "reference" if t in (3, 4) else None
        outputs.append(cms.step(token, buffer))
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-10, atol=1e-11)
    assert_same(held(expected, buffer), held(expected, whole), 1e-10)


def test_what_the_engine_refuses(monkeypatch) -> None:
    level = CMSLevel(1, expansion=1)
    assert make([level], backend="cpu").make_buffer(1).kernel is not None
    assert make([level], backend="reference").make_buffer(1).refused == "backend 'reference' was asked for"
    assert make([CMSLevel(1, expansion=1)] * 17).make_buffer(1).refused == "it takes 1 to 16 levels"
    mixed = make([level])
    mixed.levels[0].gates.bfloat16()
    assert mixed.make_buffer(1).refused == (
        "it wants all parameters in one dtype, got torch.bfloat16 beside torch.float32"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert make([level]).make_buffer(1).refused == "under autocast tokens and parameters differ in dtype"
    buffer = make([level]).make_buffer(1)
    with torch.overrides.BaseTorchFunctionMode():
        assert not buffer.kernel.serves(make([level]))
    monkeypatch.setattr(cpu_step, "refuses", lambda device: "it is not built")
    assert make([level]).make_buffer(1).refused.endswith("cpu: it is not built")
