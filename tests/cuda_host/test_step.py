"""The CUDA kernel of `CMS.step`, run on the CPU through `CMS.step` itself: results, state, bits, refusals and barriers.

Truth is the eager step in float64 from the same parameters and tokens. A result may err by twice what the eager step
errs in the tokens' dtype, plus a band of eight roundings of the largest number.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hope_kernels import CMS, CMSLevel
from hope_kernels.backends.cuda import step as cuda_step
from hope_kernels.layers import CMSState
from hope_kernels.layers.cms_state import CMSBuffer
from tests.cases import state_results
from tests.cuda_host import backend as backend_on_host
from tests.cuda_host import build
from tests.layers.common import spread

KERNEL = build.ROOT / "csrc/cuda"
SOURCES = ("step.cu", "step_products.h", "step_read.h", "step_write.h")
HEADS, DIM = 2, 16
ALL_SPLIT, NONE_SPLIT = 10**9, 0

on_host = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
sanitized = pytest.mark.skipif(
    build.thread_sanitizer_unavailable() is not None, reason=str(build.thread_sanitizer_unavailable())
)


@pytest.fixture(scope="module")
def cuda_on_host(cuda_module: ModuleType, cuda_host: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """Makes the CUDA engine take CPU tensors; returns what it says about its launches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend_on_host.on_host(cuda_module):
        yield cuda_host
    torch.set_num_threads(threads)


def make(
    levels: list[CMSLevel], variant: str = "sequential", *, dim: int = DIM, heads: int = HEADS, backend: str = "cuda"
) -> CMS:
    torch.manual_seed(0)
    return spread(CMS(dim, levels, heads=heads, variant=variant, backend=backend, dtype=torch.float32))


def twin(cms: CMS, dtype: torch.dtype) -> CMS:
    """The same parameters, served eagerly."""
    levels = [level.level for level in cms.levels]
    eager = CMS(cms.dim, levels, heads=cms.heads, variant=cms.variant, backend="reference", dtype=dtype)
    eager.load_state_dict(cms.state_dict())
    return eager


def tokens(count: int, batch: int, dim: int = DIM, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(count, batch, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(buffer: CMSBuffer | CMSState) -> dict[str, Tensor]:
    """Everything a state holds, by name."""
    state = buffer.to_state() if isinstance(buffer, CMSBuffer) else buffer
    named = {"position": torch.tensor(float(state.position))}
    for index, level in enumerate(state.levels):
        if level is not None:
            named |= {f"level {index} {name}": value for name, value in state_results(level).items()}
    return named


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


def serve(cms: CMS, x: Tensor, buffer: CMSBuffer) -> Tensor:
    return torch.stack([cms.step(token, buffer) for token in x])


def follows_float64(cms: CMS, x: Tensor, state: CMSState | None = None, seen: Tensor | None = None) -> None:
    """Steps of the kernel in the dtype of ``x``, after ``seen`` tokens that a stream took."""
    dtype = x.dtype
    cms = cms.to(dtype)

    def run(layer: CMS, tokens: Tensor, seen: Tensor | None) -> tuple[dict[str, Tensor], CMSBuffer]:
        state = layer.init_state(tokens.shape[1])
        if seen is not None:
            with torch.no_grad():
                _, state = layer.stream(seen.transpose(0, 1), state)
        buffer = layer.make_buffer(state)
        outputs = serve(layer, tokens, buffer)
        return {"outputs": outputs} | results(buffer), buffer

    def wide(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.double()

    truth, _ = run(twin(cms, torch.float64), x.double(), wide(seen))
    eager, _ = run(twin(cms, dtype), x, seen)
    if seen is None:
        found, buffer = run(cms, x, None)
    else:  # the kernel has no stream of its own: it goes on from the eager one's state
        with torch.no_grad():
            _, state = twin(cms, dtype).stream(seen.transpose(0, 1), cms.init_state(x.shape[1]))
        buffer = cms.make_buffer(state)
        found = {"outputs": serve(cms, x, buffer)} | results(buffer)
    assert buffer.kernel is not None, buffer.refused
    assert found.keys() == truth.keys()
    wrong = []
    for name, want in truth.items():
        got = found[name]
        assert got.shape == want.shape, name
        if want.numel() == 0:
            continue
        error = (got.double() - want).abs().max().item()
        allowed = 2 * (eager[name].double() - want).abs().max().item()
        band = 8 * torch.finfo(got.dtype).eps * max(1.0, want.abs().max().item())
        if not error <= allowed + band:  # so that NaN is wrong
            wrong.append(f"{name}: error {error:.2e}, allowed {allowed:.2e} + {band:.2e}")
    assert not wrong, "; ".join(wrong)


def stack(form: str = "mlp", *, momentum: bool = False, retention: bool = True, slow: bool = False) -> list[CMSLevel]:
    """Levels of every kind: written with each token, every three, (every six,) never."""
    common = {"form": form, "retention": retention, "momentum": momentum, "lr_max": 0.3}
    levels = [CMSLevel(1, expansion=5, **common), CMSLevel(3, expansion=2, activation="silu", **common)]
    if slow:
        levels.append(CMSLevel(6, expansion=3, activation="relu2", form=form, lr_max=0.2))
    return [*levels, CMSLevel(None, form=form, expansion=2, activation="gelu")]


@on_host
@pytest.mark.parametrize(
    ("variant", "form", "dtype", "momentum", "batch", "pairs"),
    [
        ("sequential", "mlp", torch.bfloat16, False, 3, NONE_SPLIT),
        ("sequential", "mlp", torch.float32, True, 1, ALL_SPLIT),
        ("nested", "mlp", torch.float32, True, 3, NONE_SPLIT),
        ("nested", "glu", torch.bfloat16, True, 1, ALL_SPLIT),
        ("independent", "linear", torch.float16, False, 3, ALL_SPLIT),
        ("independent", "glu", torch.float32, False, 1, NONE_SPLIT),
    ],
)
def test_steps_follow_the_eager_step_in_float64(
    cuda_on_host, monkeypatch, variant, form, dtype, momentum, batch, pairs
) -> None:
    monkeypatch.setattr(cuda_step, "SPLIT_PAIRS", pairs)
    follows_float64(make(stack(form, momentum=momentum), variant), tokens(6, batch, dtype=dtype))


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("pairs", [ALL_SPLIT, NONE_SPLIT])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["mlp", "glu", "linear"])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_every_kind_of_stack_follows_the_eager_step_in_float64(
    cuda_on_host, monkeypatch, variant, form, dtype, momentum, batch, pairs
) -> None:
    monkeypatch.setattr(cuda_step, "SPLIT_PAIRS", pairs)
    levels = stack(form, momentum=momentum, retention=not momentum, slow=True)
    follows_float64(make(levels, variant), tokens(12, batch, dtype=dtype))


@on_host
@pytest.mark.parametrize("pairs", [ALL_SPLIT, NONE_SPLIT])
def test_a_long_chunk_goes_on_from_the_state_of_a_stream(cuda_on_host, monkeypatch, pairs) -> None:
    """Chunks of 40 and 80 tokens, several tiles of a write: all but the last two tokens come from elsewhere."""
    monkeypatch.setattr(cuda_step, "SPLIT_PAIRS", pairs)
    levels = [CMSLevel(40, expansion=2, momentum=True, lr_max=0.05), CMSLevel(80, expansion=1, lr_max=0.05)]
    follows_float64(make(levels), tokens(3, 2, seed=2), seen=tokens(78, 2))


@on_host
@pytest.mark.parametrize(
    ("form", "dim", "heads", "expansion", "batch"),
    [("glu", 72, 1, 1, 1), ("mlp", 16, 2, 34, 1), ("mlp", 16, 2, 1, 9)],
    ids=["wide-heads", "many-pieces", "two-tiles-of-sequences"],
)
def test_sizes_beyond_one_tile(cuda_on_host, monkeypatch, form, dim, heads, expansion, batch) -> None:
    monkeypatch.setattr(cuda_step, "SPLIT_PAIRS", NONE_SPLIT)
    level = CMSLevel(2, form=form, expansion=expansion, momentum=True, lr_max=0.3)
    follows_float64(make([level], dim=dim, heads=heads), tokens(2, batch, dim=dim))


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("pairs", [ALL_SPLIT, NONE_SPLIT])
@pytest.mark.parametrize(("dim", "heads"), [(576, 8), (128, 1), (640, 5)])
def test_wide_layers(cuda_on_host, monkeypatch, dim, heads, pairs) -> None:
    monkeypatch.setattr(cuda_step, "SPLIT_PAIRS", pairs)
    levels = [CMSLevel(1, expansion=1, lr_max=0.3), CMSLevel(2, expansion=4, lr_max=0.3), CMSLevel(None, expansion=1)]
    follows_float64(make(levels, dim=dim, heads=heads), tokens(2, 2, dim=dim, dtype=torch.bfloat16))


@on_host
@pytest.mark.parametrize("variant", ["nested", "independent"])
def test_sequences_at_different_tokens_step_as_if_each_were_alone(cuda_on_host, variant) -> None:
    """The same bits, too: whatever the batch, the split and the number of blocks."""
    cms = make(stack(momentum=True), variant)
    x = tokens(8, 3)
    alone, together = [cms.make_buffer(1) for _ in range(3)], cms.make_buffer(3)
    begun = {3: [1], 5: [2]}  # sequences that begin anew before these tokens
    for t, token in enumerate(x):
        for row in begun.get(t, []):
            alone[row] = cms.make_buffer(1)
        cms.replace_sequences(together, begun.get(t, []))
        expected = torch.cat([cms.step(token[row : row + 1], alone[row]) for row in range(3)])
        cuda_on_host.cuda_host_set_device(9, 0, 1 + t % 3, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_step, "SPLIT_PAIRS", ALL_SPLIT if t % 2 else NONE_SPLIT)
            together.kernel._described = ()
            assert torch.equal(cms.step(token, together), expected)
        cuda_on_host.cuda_host_set_device(9, 0, 2, 1)
    assert together.position.tolist() == [8, 5, 3]
    for row in range(3):
        assert_same_bits(results(together.to_state([row])), results(alone[row]))


@on_host
def test_a_sequence_with_a_prompt_takes_anothers_place(cuda_on_host) -> None:
    """In the middle of its chunks, whose predictions the kernel has not made itself."""
    cms = make(stack(momentum=True), "nested")
    eager = twin(cms, torch.float64)
    x = tokens(9, 3)
    with torch.no_grad():
        server = twin(cms, torch.float32)
        _, prompt = server.stream(x[:5, :2].transpose(0, 1).contiguous(), server.init_state(2))
    buffer = cms.make_buffer(3)
    for token in x[:2]:
        cms.step(token, buffer)
    positions = buffer.kernel.positions
    cms.replace_sequences(buffer, [2, 0], prompt)
    assert buffer.kernel.positions is positions and positions.tolist() == [5, 2, 5]
    stepped = torch.stack([cms.step(token[[1, 2, 0]], buffer) for token in x[5:]])
    whole = eager(x[:, :2].double().transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(stepped[:, [2, 0]].double(), whole[5:], rtol=1e-3, atol=1e-4)


@on_host
def test_a_token_is_one_launch_and_moves_nothing_else(cuda_on_host) -> None:
    cms = make(stack(momentum=True), "nested")
    parameters = {k: v.clone() for k, v in cms.state_dict().items()}
    x = tokens(5, 2)
    buffer = cms.make_buffer(2)
    before = cuda_on_host.cuda_host_launches()
    serve(cms, x[:4], buffer)
    assert cuda_on_host.cuda_host_launches() - before == 4
    middle = buffer.to_state()
    copy = {k: v.clone() for k, v in results(middle).items()}
    other = cms.make_buffer(middle)
    kept = x[4].clone()
    out = cms.step(x[4][:, None], other)
    assert out.shape == (2, 1, DIM)
    # A step from a column of a longer tensor: rows that do not lie together.
    assert torch.equal(cms.step(x.transpose(0, 1)[:, 4], buffer), out[:, 0])
    assert torch.equal(cms.step(x[4].t().contiguous().t(), cms.make_buffer(middle)), out[:, 0])
    assert_same_bits(results(middle), copy)
    assert_same_bits(results(buffer), results(other))
    assert_same_bits(dict(cms.state_dict()), parameters)
    assert torch.equal(x[4], kept)
    assert not torch.equal(results(buffer)["level 0 weight0"], copy["level 0 weight0"])


@on_host
def test_positions_are_the_devices(cuda_on_host) -> None:
    """A replayed graph launches without Python: what the kernel did must be in the state all the same."""
    cms = make(stack(), "nested")
    x = tokens(5, 1)
    replayed, stepped = cms.make_buffer(1), cms.make_buffer(1)
    serve(cms, x, stepped)
    cms.step(x[0], replayed)
    for token in x[1:]:
        replayed.kernel.step(token)
    assert replayed.counted == 1
    assert_same_bits(results(replayed), results(stepped))
    assert (replayed.position, replayed.counted, replayed.levels[0].position) == (5, 5, 2)


@on_host
def test_levels_may_be_served_one_by_one_in_between(cuda_on_host) -> None:
    """Under autocast the kernel is not used; it goes on afterwards, with predictions of the tokens kept meanwhile."""
    cms = make([CMSLevel(4, expansion=1, lr_max=0.3), CMSLevel(8, expansion=1, lr_max=0.3)])
    for level in cms.levels:
        level.backend = "reference"
    x = tokens(8, 2)
    cms.backend = "reference"
    plain = cms.make_buffer(2)
    assert plain.kernel is None
    assert plain.refused == "backend 'reference' was asked for"
    expected = serve(cms, x, plain)

    def choose(backend: str) -> None:
        cms.backend = backend
        for level in cms.levels:
            level.backend = backend

    choose("cuda")
    buffer = cms.make_buffer(2)
    outputs = []
    for t, token in enumerate(x):
        if t == 3:
            buffer.kernel.step(token)  # as a replay would: the levels' own count is behind
            outputs.append(expected[3])
            continue
        choose("reference" if t in (4, 5) else "cuda")
        outputs.append(cms.step(token, buffer))
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results(buffer), results(plain), rtol=1e-5, atol=1e-6)


@on_host
def test_parameters_that_moved_are_found(cuda_on_host) -> None:
    cms = make([CMSLevel(2, expansion=1), CMSLevel(None, expansion=1)])
    x = tokens(2, 1)
    buffer, fresh = cms.make_buffer(1), cms.make_buffer(1)
    cms.step(x[0], buffer)
    cms.step(x[0], fresh)
    old = cms.levels[1].weights[0]
    cms.levels[1].weights[0] = torch.nn.Parameter(2 * old.detach())
    moved = cms.step(x[1], buffer)
    with torch.no_grad():
        old.mul_(2)
    cms.levels[1].weights[0] = old
    assert torch.equal(moved, cms.step(x[1], fresh))
    cms.step(x[1], buffer)
    cms.levels[1].weights[0] = torch.nn.Parameter(old.detach().t())  # at the same address
    assert not buffer.kernel.serves(cms)


@on_host
def test_what_the_kernel_refuses(cuda_on_host) -> None:
    def refused(level: CMSLevel, dtype: torch.dtype = torch.float32, batch: int = 1, **options) -> str:
        options = {"dim": 16, "heads": 2, **options}
        cms = CMS(options.pop("dim"), [level], **options, dtype=dtype)
        buffer = cms.make_buffer(batch)
        assert buffer.kernel is None
        cms.step(torch.zeros(batch, cms.dim, dtype=dtype), buffer)  # served level by level instead
        assert buffer.position == 1
        return buffer.refused

    mlp = CMSLevel(1)
    assert refused(CMSLevel(1, rule="dgd")).startswith("rule 'dgd' solves a triangular system")
    assert refused(mlp, torch.float64) == "tokens must be float32, bfloat16 or float16"
    assert refused(mlp, dim=12) == "a head's features must be a multiple of 8, up to 128"
    assert refused(mlp, dim=272) == "a head's features must be a multiple of 8, up to 128"
    assert refused(mlp, batch=257) == "it takes up to 256 sequences"
    assert refused(mlp, backend="cpu") == "backend 'cpu' was asked for"
    with torch.autocast("cpu", torch.bfloat16):
        assert CMS(16, [mlp], heads=2).make_buffer(1).refused == "under autocast tokens and parameters differ in dtype"
    mixed = CMS(16, [mlp], heads=2)
    mixed.levels[0].gates.bfloat16()
    assert (
        mixed.make_buffer(1).refused == "it wants all parameters in one dtype, got torch.bfloat16 beside torch.float32"
    )
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this"):
        CMS(16, [CMSLevel(1, rule="dgd")], heads=2, backend="cuda").make_buffer(1)


@on_host
def test_an_input_that_does_not_fit_leaves_the_buffer_as_it_was(cuda_on_host) -> None:
    cms = make(stack(), "nested")
    x = tokens(3, 2)
    buffer = cms.make_buffer(2)
    cms.step(x[0], buffer)
    before = {k: v.clone() for k, v in results(buffer).items()}
    with pytest.raises(ValueError, match="buffer has batch size 2, x has 3 rows"):
        cms.step(tokens(1, 3)[0], buffer)
    with pytest.raises(TypeError, match=r"x is torch\.float64, the parameters are torch\.float32"):
        cms.step(x[1].double(), buffer)
    with pytest.raises(ValueError, match="x has shape"):
        cms.step(x, buffer)
    for token in x[:2]:
        cms.step(token, buffer)
    with pytest.raises(ValueError, match="level 0 starts again every 3 tokens; want never, as in variant 'sequential'"):
        make(stack()).step(x[1], buffer)
    assert cms.step(torch.zeros(0, DIM), cms.make_buffer(0)).shape == (0, DIM)
    again = cms.make_buffer(2)
    cms.step(x[0], again)
    assert_same_bits(results(again), before)


# ------------------------------------------------------------------------------------------------------------ barriers


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [KERNEL / "step.cu", build.HERE / "step_cases.cpp", build.HERE / "case_main.cpp"]
    return build.build(tmp_path_factory.mktemp("cases") / "step", sources, thread_sanitizer=True)


CASES = [
    *("one_split", "whole", "split", "whole_independent", "whole_glu", "split_independent", "whole_independent_linear"),
    *("one_split_long", "one_whole_many"),
]


def written_barriers() -> set[str]:
    found = set()
    for source in SOURCES:
        lines = enumerate((KERNEL / source).read_text().splitlines(), 1)
        found |= {f"{source}:{n}" for n, line in lines if re.search(r"__sync\w+\(|\.sync\(", line)}
    return found


@sanitized
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in ("one_split", "whole") else pytest.mark.slow) for c in CASES]
)
def test_the_kernel_has_no_race(cases: Path, case: str) -> None:
    assert build.races(cases, case) == []


@sanitized
def test_taking_out_the_grid_barrier_is_seen(cases: Path, tmp_path: Path) -> None:
    lines = (KERNEL / "step.cu").read_text().splitlines()
    first = next(n for n, line in enumerate(lines, 1) if "this_grid().sync()" in line)
    assert f"step.cu:{first}" in build.barriers(cases, tmp_path / "barriers", "one_split")
    assert build.races(cases, "one_split", without=f"step.cu:{first}")


@sanitized
@pytest.mark.slow
def test_taking_out_any_barrier_is_seen(cases: Path, tmp_path: Path) -> None:
    reached = {case: set(build.barriers(cases, tmp_path / case, case)) for case in CASES}
    assert set().union(*reached.values()) == written_barriers()
    for barrier in sorted(written_barriers()):
        seen = any(build.races(cases, case, without=barrier) for case in CASES if barrier in reached[case])
        assert seen, f"taking out {barrier} goes unnoticed"
