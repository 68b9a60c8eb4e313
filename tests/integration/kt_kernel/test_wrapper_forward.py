"""What KTMoEWrapper.forward gives and refuses. submit and sync: test_wrapper_submit.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ktk
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.machine import queue as fifo
from make.wrapper_cases import (
    E,
    H,
    K,
    assert_same_bits,
    exact,
    loaded,
    make,
    routed,
    spy,
    worker_held,
)

# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_output_is_the_references_in_every_kind_and_dtype(num_tokens):
    wrapper = loaded()
    hidden, ids, weights = routed(num_tokens)
    assert_same_bits(exact(wrapper, hidden, ids, weights), wrapper.forward(hidden, ids, weights))
    t_ids, t_weights = torch.from_numpy(ids), torch.from_numpy(weights)
    half = hidden.astype(np.float16)
    want = exact(wrapper, half.astype(np.float32), ids, weights).astype(np.float16)
    assert_same_bits(want, wrapper.forward(half, ids, weights))
    assert_same_bits(want, wrapper.forward(torch.from_numpy(half), t_ids, t_weights))
    bits = f32_to_bf16(hidden)
    want = f32_to_bf16(exact(wrapper, bf16_to_f32(bits), ids, weights))
    got = wrapper.forward(torch.from_numpy(hidden).bfloat16(), t_ids.int(), t_weights)
    assert got.dtype == torch.bfloat16
    assert_same_bits(want, got.view(torch.uint16))
    got = wrapper(torch.from_numpy(hidden), t_ids.to(torch.uint8), weights, 0)  # kinds may be mixed
    assert_same_bits(exact(wrapper, hidden, ids, weights), got)


def test_leading_dimensions_are_flattened():
    wrapper = loaded()
    hidden, ids, weights = routed(6)
    want = exact(wrapper, hidden, ids, weights)
    assert_same_bits(want, wrapper.forward(hidden.reshape(2, 3, H), ids, weights))
    assert_same_bits(want, wrapper.forward(torch.from_numpy(hidden).view(1, 2, 3, H), ids, weights))
    assert_same_bits(want[:1], wrapper.forward(hidden[0], ids[:1], weights[:1]))


@pytest.mark.parametrize("shape", [(0, H), (2, 0, H)])
def test_zero_tokens_give_zero_rows(shape):
    wrapper = loaded(max_deferred_experts_per_token=1)
    none = np.empty((0, K))
    assert wrapper.forward(np.empty(shape, np.float32), none.astype(int), none).shape == (0, H)
    got = wrapper.forward(torch.empty(shape).bfloat16(), none.astype(int), none)
    assert (got.shape, got.dtype) == ((0, H), torch.bfloat16)


def test_strides_gradients_and_inference_mode_change_nothing():
    with torch.inference_mode():
        wrapper = loaded(num_gpu_experts=1)
        hidden, ids, weights = (torch.from_numpy(a) for a in routed(5))
        inside = wrapper.forward(hidden.bfloat16(), ids, weights)
    wrapper.gpu_experts_mask.copy_(torch.zeros(E, dtype=torch.bool))
    wrapper.gpu_experts_mask[0] = True
    hidden, ids, weights = (torch.from_numpy(a) for a in routed(5))
    strided = hidden.bfloat16().T.contiguous().T.requires_grad_()
    outside = wrapper.forward(strided, ids.T.contiguous().T, weights)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


def test_ids_outside_and_masked_experts_add_exactly_zero():
    wrapper = loaded(gpu_experts_mask=[0, 1, 0, 0, 0, 0])
    hidden, _, weights = routed(4)
    ids = np.int64([[0, -1, 2], [1, 1, 1], [E, -7, 2**40], [3, 1, 4]])
    skip = np.arange(E) == 1
    got = wrapper.forward(hidden, ids, weights)
    assert_same_bits(exact(wrapper, hidden, ids, weights, skip), got)
    assert not got[1:3].any()


def test_mask_is_updated_in_place_and_seen_by_the_next_forward():
    mine = torch.zeros(E, dtype=torch.bool)
    wrapper = loaded(gpu_experts_mask=mine)
    shared = wrapper.gpu_experts_mask
    hidden, ids, weights = routed(8)
    for experts in ([], [0, 3], list(range(E)), [5]):
        new = torch.isin(torch.arange(E), torch.tensor(experts))
        shared.copy_(new)
        want = exact(wrapper, hidden, ids, weights, new.numpy())
        assert_same_bits(want, wrapper.forward(hidden, ids, weights))
    assert not mine.any()  # the caller's own tensor serves other layers too
    wrapper.gpu_experts_mask = [1, 1, 0, 0, 0, 0]
    assert wrapper.gpu_experts_mask is shared
    assert shared.tolist() == [True, True, False, False, False, False]
    with pytest.raises(ValueError, match="gpu_experts_mask has shape"):
        wrapper.gpu_experts_mask = [1, 1]


def test_mask_counts_as_it_was_at_submit():
    wrapper = loaded()
    hidden, ids, weights = routed(3)
    with worker_held():
        wrapper.submit_forward(hidden, ids, weights)
        wrapper.gpu_experts_mask.fill_(True)
    assert_same_bits(exact(wrapper, hidden, ids, weights), wrapper.sync_forward(hidden))
    assert not wrapper.forward(hidden, ids, weights).any()


def test_the_same_expert_twice_in_a_token_adds_up():
    wrapper = loaded()
    for num_tokens in (1, 3):
        hidden, ids, weights = routed(num_tokens)
        ids[:, 1] = ids[:, 0]
        assert_same_bits(
            exact(wrapper, hidden, ids, weights), wrapper.forward(hidden, ids, weights)
        )
        ones = np.ones_like(weights)
        ids[:, 2] = -1
        twice = wrapper.forward(hidden, ids, ones)
        ids[:, 1] = -1
        assert np.array_equal(2 * wrapper.forward(hidden, ids, ones), twice)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_own_row_and_never_become_finite(poison):
    wrapper = loaded()
    hidden, ids, weights = routed(5)
    clean = wrapper.forward(hidden, ids, weights)
    hidden[2, 7] = poison
    got = wrapper.forward(hidden, ids, weights)
    assert not np.isfinite(got[2]).any()
    keep = [0, 1, 3, 4]
    assert_same_bits(clean[keep], got[keep])


@pytest.mark.parametrize("chunk", [1, 4, 9])
@pytest.mark.parametrize("max_deferred", [0, 2])
def test_more_tokens_than_the_chunk_run_in_chunks_with_the_same_result(
    monkeypatch, chunk, max_deferred
):
    case = routed(9)
    results = []
    for size in (512, chunk):
        first = loaded(0, chunked_prefill_size=size, max_deferred_experts_per_token=max_deferred)
        second = loaded(1, chunked_prefill_size=size)
        calls = spy(first, monkeypatch), spy(second, monkeypatch)
        hidden = torch.from_numpy(case[0]).bfloat16()
        results.append([w.forward(hidden, *case[1:]).view(torch.uint16) for w in (first, second)])
        fifo.drain()
        assert max(calls[0] + calls[1]) == min(size, 9)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_output_belongs_to_the_caller():
    wrapper = loaded()
    ktk.KTMoEWrapper.set_capture_batch_sizes([3])
    try:
        outputs = []
        for seed in range(4):
            case = routed(3, seed)
            outputs.append((case, wrapper.forward(torch.from_numpy(case[0]), *case[1:])))
        for case, got in outputs:
            assert_same_bits(exact(wrapper, *case), got)
    finally:
        ktk.KTMoEWrapper.set_capture_batch_sizes([])


def test_nothing_is_printed(capfd):
    wrapper = loaded(max_deferred_experts_per_token=1)
    wrapper.forward(*routed(2))
    fifo.drain()
    assert tuple(capfd.readouterr()) == ("", "")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda h, i, w: (h[:, :-1], i, w), ValueError, r"hidden_states has shape \(3, 63\)"),
        (lambda h, i, w: (h.astype(np.int8), i, w), TypeError, "hidden_states has dtype int8"),
        (
            lambda h, i, w: (h.astype(np.float64), i, w),
            TypeError,
            "hidden_states has dtype float64",
        ),
        (lambda h, i, w: (h.tolist(), i, w), TypeError, "hidden_states is a list"),
        (lambda h, i, w: (h, i.astype(np.float32), w), TypeError, "topk_ids has dtype float32"),
        (lambda h, i, w: (h, i[:2], w), ValueError, r"topk_ids has shape \(2, 3\)"),
        (lambda h, i, w: (h, i, w.astype(int)), TypeError, "topk_weights has dtype int64"),
        (lambda h, i, w: (h, i, w[:, :2]), ValueError, r"topk_weights has shape \(3, 2\)"),
        (
            lambda h, i, w: (h, i[:, :2], w[:, :2]),
            ValueError,
            "2 experts per token: .*num_experts_per_tok=3",
        ),
        (lambda h, i, w: (h, np.tile(i, 2), np.tile(w, 2)), ValueError, "6 experts per token"),
        (lambda h, i, w: (h, i, w, 1234), ValueError, "cuda_stream=1234: this process has no CUDA"),
        (lambda h, i, w: (h, i, w, "0x0"), TypeError, "cuda_stream='0x0'"),
    ],
)
def test_bad_input_is_named_and_the_wrapper_lives_on(change, error, match):
    if "no CUDA" in match and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    wrapper = loaded()
    case = routed(3)
    with pytest.raises(error, match=match):
        wrapper.forward(*change(*case))
    assert_same_bits(exact(wrapper, *case), wrapper.forward(*case))


def test_forward_before_load_weights_says_so():
    for call in (make().forward, make().submit_forward):
        with pytest.raises(
            RuntimeError, match=r"layer 0 has no weights yet: call load_weights\(\)"
        ):
            call(*routed(1))
