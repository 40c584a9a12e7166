# SPDX-License-Identifier: MIT
"""fpt_model.native_layers.FewTokens: C++ that runs the layers for a few tokens as PyTorch does."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from compilers import needs_compiler
from layer_runs import TOLERANCE, assert_run_alike
from random_weights import randomised

from fpt_model import FlowPokeTransformer, FlowPredictor, FPTConfig, native, native_layers
from fpt_model.backends import Precision
from fpt_model.engine import prepare, try_few_tokens
from fpt_model.native_layers import FewTokens

pytestmark = pytest.mark.usefixtures("build_cache")


@pytest.fixture(scope="module")
def model() -> FlowPokeTransformer:
    config = FPTConfig(
        name="small",
        encoder="vit_tiny_patch16_224",
        encoder_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=40,  # 25 image tokens: not whole vectors
        width=96,
        depth=3,
        head_dim=32,
        fit="stretch",
    )
    return randomised(FlowPokeTransformer(config))


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_few_tokens_are_run_alike(
    model: FlowPokeTransformer, precision: Precision, threads: int
) -> None:
    """Pokes, queries, hypotheses; a context that grows, with room and without."""
    cases = (
        (1, (0, 1), (0, 3)),
        (1, (1, 1), (1, 0)),
        (2, (3, 4), (1, 1)),
        (5, (2, 1), (0, 1)),
        (1, (6, 10), (2, 9)),
        (1, (20, 30), (1, 5)),  # first too many tokens
        (1, (1, 1), (5, 13)),  # later too many
    )
    used = assert_run_alike(model, precision, FewTokens, cases)
    assert len(used) == 18  # the other 3 are too many tokens


@needs_compiler
def test_each_row_has_its_room_and_its_flag(model: FlowPokeTransformer, threads: int) -> None:
    """As in joint sampling, and beyond: rows with another past and another flag."""
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    few = FewTokens(prepared)
    rng = torch.Generator().manual_seed(0)
    rows, known, pokes, queries, room = 3, 4, 1, 2, 9
    x = torch.randn(rows, pokes + queries, 96, generator=rng)
    rotation = prepared.rope(torch.rand(rows, pokes + queries, 2, generator=rng))
    memory = [tuple(torch.randn(1, 3, 32, 32, generator=rng) for _ in "kv") for _ in range(3)]
    past = [tuple(torch.randn(rows, 3, room, 32, generator=rng) for _ in "kv") for _ in range(3)]
    flags = torch.tensor([1, 0, 1])
    found, expected = (
        run(x, pokes, rotation, flags, memory, copy.deepcopy(past), known)
        for run in (few, prepared.run_layers)
    )
    assert_close(found[0], expected[0], 1e-4)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a[:, :, : known + pokes], b[:, :, : known + pokes], 1e-5)
    with pytest.raises(ValueError, match="expected a context of 4 pokes for 3 rows"):
        few(x, pokes, rotation, flags, memory, [(k[:2], v[:2]) for k, v in past], known)
    for change in (lambda t: t[..., :16], lambda t: t.mT, lambda t: t.double()):
        others = [(k, change(v)) for k, v in memory]
        with pytest.raises(ValueError, match=r"contiguous keys and values \[1, 3, 32, 32\]"):
            few(x, pokes, rotation, flags, others, past, known)


@needs_compiler
def test_threads_may_call_it_at_once(model: FlowPokeTransformer) -> None:
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    few = FewTokens(prepared)

    def ask(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 96, generator=rng)
        rotation = prepared.rope(torch.rand(2, 3, 2, generator=rng))
        memory = [tuple(torch.randn(1, 3, 32, 32, generator=rng) for _ in "kv") for _ in range(3)]
        return few(x, 1, rotation, torch.tensor([1, 0]), memory, 3 * [(None, None)], 0)[0]

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(ask, 25 * [0, 1, 2, 3])):
            assert torch.equal(found, alone[seed % 4])


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_engine_uses_it(
    model: FlowPokeTransformer, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = FewTokens.__call__

    def counted(self: FewTokens, *arguments: Any) -> Any:
        calls.append(arguments)
        return run(self, *arguments)

    monkeypatch.setattr(FewTokens, "__call__", counted)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    poke = [[0.4, 0.5]], [[0.1, 0.0]]
    found, expected = (
        p.predict(p.encode(image), *poke, [[0.3, 0.3]])
        for p in (
            FlowPredictor(model, precision=precision, compile=True),
            FlowPredictor(model, precision=precision),
        )
    )
    assert len(calls) == 1
    assert_close(found.means, expected.means, TOLERANCE[precision])


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "old"])
def test_a_damaged_build_is_made_anew(
    model: FlowPokeTransformer,
    build_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    """As when the power went away; the system would end the process that loads it."""
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    native.function.cache_clear()  # of what other tests built
    FewTokens(prepared)
    whole = {
        tmp_path / built.relative_to(build_cache): built.read_bytes()
        for built in build_cache.rglob("*.so")
    }
    (tmp_path / "fpt_model").mkdir(mode=0o700)
    for library, content in whole.items():
        n = len(content)
        damaged = {
            "empty": b"",
            "half": content[: n // 2],
            "zeros": content[:8192] + bytes(n - 8192),
            "old": content[:-32],
        }
        library.write_bytes(damaged[damage])
    before = {library: library.read_bytes() for library in whole}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.function.cache_clear()
    FewTokens(prepared)
    anew = [library for library in whole if library.read_bytes() != before[library]]
    assert [native._is_whole(library) for library in anew] == [True]
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(whole)


@needs_compiler
def test_where_nothing_can_be_kept_it_is_built_all_the_same(
    model: FlowPokeTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native.function.cache_clear()
    FewTokens(prepare(model, torch.device("cpu"), torch.float32))
    native.function.cache_clear()


def test_without_a_compiler_few_tokens_run_slowly(
    model: FlowPokeTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepared = prepare(model, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_layers, "function", native.function.__wrapped__)
    for compiler, reason in (
        ("no-compiler", "No such file"),
        ("false", "false failed with 1"),
        (" ", "CXX must be a command, received ' '"),
        ("g++ 'x", "CXX must be a command"),
    ):
        monkeypatch.setenv("CXX", compiler)
        caplog.clear()
        assert try_few_tokens(prepared) is None
        assert {record.name for record in caplog.records} == {"fpt_model"}  # as the node listens
        assert reason in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("compiler", ["false", "g++ -O3"])
def test_where_torch_cannot_compile_all_runs_as_it_is(
    model: FlowPokeTransformer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
) -> None:
    """A compiler that fails, and one of several words, which torch takes for one."""
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    torch.compiler.reset()
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native_layers, "function", native.function.__wrapped__)
    # what torch makes of CXX when it is loaded
    no_compiler = {"cpp.cxx": (None, compiler), "force_disable_caches": True}
    with torch._inductor.config.patch(no_compiler):
        compiled = FlowPredictor(model, compile=True)
        compiled.warm_up()
        assert "Head.forward is not compiled: InvalidCxxCompiler: No working" in caplog.text
        caplog.clear()
        found, expected = (
            p.predict(p.encode(image), [[0.4, 0.5]], [[0.1, 0.0]], [[0.3, 0.3]])
            for p in (compiled, FlowPredictor(model))
        )
    assert not caplog.text, "it was tried again"
    assert_close(found.means, expected.means, 1e-6)
