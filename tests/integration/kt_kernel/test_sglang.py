"""SGLang's two wrappers, as their wheels have them, on ktk: mainline 0.5.23, which names a count of
GPU experts, and KTransformers' 0.7.2, which names a mask.

Their files come from tests/make/sglang_files.py; without them tests skip and say so.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ktk
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats.floats import bf16_to_f32
from ktk.experts.row_major import RowMajor
from ktk.experts.spec import MoESpec
from ktk.integration.kt_kernel.stand_in import kt_kernel
from make.cases import pack_all, random_experts
from make.forked import forked
from make.sglang_cases import (
    NUM_LAYERS,
    Arguments,
    Dispatched,
    E,
    H,
    K,
    N,
    TopK,
    expert_of,
    hybrid,
    wrapper_module,
    write_layers,
)
from make.sglang_files import KT, MAINLINE, files_of, why_not
from make.sglang_rank import main as rank_main

RELEASES = (MAINLINE, KT)
OPTIONAL = {"kt_kernel_ext", "sft"}  # asked for behind an except ImportError


def needs(release: str) -> None:
    if reason := why_not(release):
        pytest.skip(reason)


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    path = tmp_path_factory.mktemp("packed")
    return path, write_layers(path, "bf16")


@pytest.fixture(autouse=True)
def _no_pending_experts() -> Iterator[None]:
    yield
    ktk.KTMoEWrapper.clear_buffer_cache()
    ktk.KTMoEWrapper.set_capture_batch_sizes([])


def routed(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden bf16, ids int32, weights float32, as SGLang hands them over."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, H, generator=generator).to(torch.bfloat16)
    order = torch.rand(num_tokens, E, generator=generator).argsort(dim=1)[:, :K]
    return hidden, order.to(torch.int32), torch.rand(num_tokens, K, generator=generator)


def dispatched(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Dispatched:
    return Dispatched(x.clone(), TopK(weights.clone(), ids.clone()))


def whole(dense: list[Any], x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Every expert, float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in np.ndindex(*ids.shape):
        gate, up, down = (m.double() for m in dense[int(ids[token, slot])])
        y = expert_of(x[token].double(), torch.cat([gate, up]), down)
        out[token] += w[token, slot].double() * y
    return out


def close(expected: torch.Tensor, got: torch.Tensor, digits: float = 2**-7) -> None:
    """Within a few roundings to bf16 of the largest."""
    assert (expected - got.double()).abs().max() <= digits * expected.abs().max()


# -- names -----------------------------------------------------------------------------------------


def test_every_name_that_sglang_takes_of_kt_kernel_is_there(release: str) -> None:
    files = files_of(release)
    assert len(files) >= 2
    taken, called, passed = set(), set(), set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kt_kernel"):
                deep = (node.module or "").removeprefix("kt_kernel").strip(".")
                taken |= {deep.split(".")[0]} if deep else {alias.name for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called |= {node.attr} if node.value.id == "KTMoEWrapper" else set()
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "KTMoEWrapper":
                passed |= {keyword.arg for keyword in node.keywords if keyword.arg}
    assert taken - OPTIONAL <= set(dir(kt_kernel)) and "KTMoEWrapper" in taken
    assert called == {"set_capture_batch_sizes"}
    assert all(hasattr(kt_kernel.KTMoEWrapper, name) for name in called)
    assert len(passed) > 5
    assert passed <= set(inspect.signature(kt_kernel.KTMoEWrapper).parameters)


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_what_ktk_has_not_is_an_import_error_as_sglang_expects(name: str) -> None:
    with pytest.raises(ImportError):
        exec(f"from ktk.integration.kt_kernel.stand_in.kt_kernel import {name}")


# -- one layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_gpu", [0, 3, E])
def test_the_ranks_outputs_add_up_to_the_layer(
    release: str, layers: tuple[Path, list[list[Any]]], on_gpu: int
) -> None:
    """Two ranks: each device has half of an expert's channels, ktk's experts are rank 0's."""
    path, dense = layers
    given = Arguments(str(path), kt_num_gpu_experts=on_gpu)
    with wrapper_module(release, given, ranks=2) as module:
        module.KTMoEWrapper.set_capture_batch_sizes([1, 4])
        assert module.KTMoEWrapper.get_capture_batch_sizes() == [1, 4]
        made = []
        for rank in range(2):
            module.place.rank = rank
            made.append(hybrid(module, release, given, 1, "bf16", dense[1]))
        assert made[0][0].wrapper.num_gpu_experts == on_gpu
        assert made[1][0].wrapper is None
        for num_tokens in (1, 4, 7, 1):
            x, ids, weights = routed(num_tokens, num_tokens)
            of_ranks = [
                method.apply(layer, dispatched(x, ids, weights)).hidden_states
                for method, layer in made
            ]
            summed = sum(out.float() for out in of_ranks)
            assert isinstance(summed, torch.Tensor)
            close(whole(dense[1], x, ids, weights), summed, 2**-6)


def test_rank_0_adds_what_the_wrapper_alone_gives(
    release: str, layers: tuple[Path, list[list[Any]]]
) -> None:
    path, dense = layers
    given = Arguments(str(path))
    with wrapper_module(release, given) as module:
        method, layer = hybrid(module, release, given, 0, "bf16", dense[0])
        x, ids, weights = routed(5)
        device = method.gpu_method.apply(
            layer, dispatched(x, torch.where(ids < 3, ids, -1), weights)
        ).hidden_states
        alone = ktk.KTMoEWrapper(0, E, K, H, N, 3, weight_path=path, method="auto")
        alone.load_weights()
        want = device + alone.forward(x, ids, weights)
        assert torch.equal(method.apply(layer, dispatched(x, ids, weights)).hidden_states, want)


def test_deferred_experts_come_with_the_next_layer_and_none_is_lost(
    release: str, layers: tuple[Path, list[list[Any]]]
) -> None:
    path, dense = layers
    given = Arguments(str(path), kt_num_gpu_experts=2, kt_max_deferred_experts_per_token=1)
    with wrapper_module(release, given) as module:
        made = [hybrid(module, release, given, n, "bf16", dense[n]) for n in range(NUM_LAYERS)]
        assert [m.wrapper.max_deferred_experts_per_token for m, _ in made] == [1, 1, 0]
        for num_tokens in (1, 3):
            before = None
            for n, (method, layer) in enumerate(made):
                x, ids, weights = routed(num_tokens, 10 * n + num_tokens)
                got = method.apply(layer, dispatched(x, ids, weights)).hidden_states
                now, later = ids.long(), None
                if n < NUM_LAYERS - 1:
                    now, later = ktk.KTMoEWrapper.select_deferred_experts(ids, weights, K - 1)
                    assert (later >= 0).any()
                device = method.gpu_method.apply(
                    layer, dispatched(x, torch.where(ids < 2, ids, -1), weights)
                ).hidden_states
                moe, skip = method.wrapper.moe, method.wrapper.gpu_experts_mask
                want = device + moe(x, now, weights, skip=skip, add=before)
                assert torch.equal(want, got), f"layer {n}"
                before = None if later is None else moe(x.float(), later, weights, skip=skip)


@pytest.mark.parametrize("strategy", ["uniform", "front-loading", "random", "frequency"])
def test_sglangs_masks_reach_the_wrapper(
    layers: tuple[Path, list[list[Any]]], strategy: str, tmp_path: Path
) -> None:
    needs(KT)
    path, dense = layers
    counts = torch.arange(NUM_LAYERS * E).reshape(1, NUM_LAYERS, E)
    torch.save({"logical_count": counts}, tmp_path / "stats.pt")
    given = Arguments(
        str(path),
        kt_num_gpu_experts=None,
        kt_gpu_experts_ratio=0.5,
        kt_expert_placement_strategy=strategy,
        init_expert_location=str(tmp_path / "stats.pt"),
    )
    with wrapper_module(KT, given) as module:
        method, layer = hybrid(module, KT, given, 1, "bf16", dense[1])
        mask = module._KT_GPU_EXPERTS_MASKS
        assert mask.sum() == NUM_LAYERS * E // 2
        assert torch.equal(method.wrapper.gpu_experts_mask, mask[1])
        if 0 < mask[1].sum() < E:
            x, ids, weights = routed(6)
            got = method.apply(layer, dispatched(x, ids, weights)).hidden_states
            close(whole(dense[1], x, ids, weights), got)


def test_a_mask_changed_in_place_holds_from_the_next_step_on(
    layers: tuple[Path, list[list[Any]]],
) -> None:
    needs(KT)
    path, dense = layers
    given = Arguments(str(path))
    with wrapper_module(KT, given) as module:
        method, _ = hybrid(module, KT, given, 0, "bf16", dense[0])
        x, ids, weights = routed(4)
        for chosen in ([0, 1, 2], [7, 3, 5], []):
            mask = torch.zeros(E, dtype=torch.bool)
            mask[chosen] = True
            module.update_kt_wrapper_masks(method.wrapper, mask)
            left = torch.where(mask[ids.long()], -1, ids.long())
            want = method.wrapper.moe(x, left, weights)
            assert torch.equal(method.wrapper.forward(x, ids, weights), want)
        module.update_kt_wrapper_masks(None, mask)  # a rank without a wrapper


# -- prefill on the device alone -------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_a_long_prompt_runs_on_the_device_with_weights_that_ktk_writes(
    form: str, ranks: int, tmp_path: Path
) -> None:
    """Processes of their own: SGLang shares buffers between ranks, and pins its threads."""
    needs(KT)
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(forked(rank_main, tmp_path, form, rank, ranks))
            for rank in range(ranks)
        ]
        assert [child.wait(120) for child in children] == [0] * ranks, [c.err for c in children]


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_the_device_weights_of_these_tests_are_the_experts_own(form: str) -> None:
    """They come out of the function that the wrapper uses; here they meet another way to read."""
    spec = MoESpec(E, H, N, form)
    stored = pack_all(spec, random_experts(spec, 0))
    for e in range(E):
        floats = expert_weights(stored, e)
        rows = [RowMajor(m, e, form) for m in stored.matrices.values()]
        for want, got in zip((floats.gate, floats.up, floats.down), rows, strict=True):
            if form == "int4":
                codes = got.codes()
                pairs = np.stack([codes & 15, codes >> 4], axis=2)
                values = pairs.reshape(len(pairs), -1).astype(np.float32) - 8
            else:
                dtype = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
                values = torch.from_numpy(got.codes()).view(dtype).float().numpy()
            if got.scales is not None:
                scales = bf16_to_f32(got.scales) if form == "int4" else got.scales
                values = values * np.repeat(np.repeat(scales, got.block[0], 0), got.block[1], 1)
            assert np.array_equal(want, values)
