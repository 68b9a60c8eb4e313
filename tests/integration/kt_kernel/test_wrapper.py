"""KTMoEWrapper's arguments: KT-Kernel's, checked. Its other tests: test_wrapper_*.py."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import ktk
from ktk.errors import EngineError
from make.wrapper_cases import E, H, K, N, assert_same_bits, make


def test_assert_same_bits_tells_what_array_equal_does_not():
    assert_same_bits(np.float32([0, np.nan]), torch.tensor([0, np.nan]))
    for other in (np.float32([-0.0, np.nan]), np.float64([0, np.nan]), np.float32([[0, np.nan]])):
        with pytest.raises(AssertionError):
            assert_same_bits(np.float32([0, np.nan]), other)


# -- arguments -------------------------------------------------------------------------------------

KT_KERNEL_ORDER = [
    "layer_idx",
    "num_experts",
    "num_experts_per_tok",
    "hidden_size",
    "moe_intermediate_size",
    "gpu_experts_mask",
    "cpuinfer_threads",
    "threadpool_count",
    "weight_path",
    "chunked_prefill_size",
    "cpu_save",
    "max_deferred_experts_per_token",
    "method",
    "numa_nodes",
    "mode",
    "num_gpu_experts",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "max_cache_depth",
    "group_size",
    "zero_point",
    "full_weight_grad",
    "swiglu_limit",
    "swiglu_alpha",
]


def test_arguments_are_kt_kernels_in_its_order():
    parameters = inspect.signature(ktk.KTMoEWrapper).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == KT_KERNEL_ORDER
    assert parameters["method"].default == "AMXINT4"


def test_position_six_is_a_count_or_a_mask():
    by_count = ktk.KTMoEWrapper(0, E, K, H, N, 2, None, None, None, 512)
    by_mask = ktk.KTMoEWrapper(0, E, K, H, N, torch.tensor([1, 1, 0, 0, 0, 0]).bool())
    by_name = make(num_gpu_experts=2)
    for wrapper in (by_count, by_mask, by_name):
        mask = wrapper.gpu_experts_mask
        assert (mask.dtype, mask.device.type, mask.is_pinned()) == (torch.bool, "cpu", False)
        assert mask.tolist() == [True, True, False, False, False, False]
        assert wrapper.num_gpu_experts == 2
    assert make().num_gpu_experts == 0


@pytest.mark.parametrize(
    "mask",
    [
        [1, 0, 0, 1, 0, 0],
        [True, False, False, True, False, False],
        np.array([1, 0, 0, 1, 0, 0], np.int32),
        torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.uint8),
        torch.tensor([1, 0, 0, 1, 0, 0]).bool(),
    ],
)
def test_mask_may_be_list_array_or_tensor(mask):
    assert make(gpu_experts_mask=mask).gpu_experts_mask.nonzero().ravel().tolist() == [0, 3]


def test_mask_and_count_must_agree():
    both = make(gpu_experts_mask=[1, 1, 0, 0, 0, 0], num_gpu_experts=2)
    assert both.num_gpu_experts == 2
    with pytest.raises(ValueError, match="names others"):
        make(gpu_experts_mask=[0, 1, 1, 0, 0, 0], num_gpu_experts=2)
    with pytest.raises(ValueError, match="give one of them"):
        make(gpu_experts_mask=1, num_gpu_experts=2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_experts": 0}, ValueError, "num_experts=0"),
        ({"hidden_size": -1}, ValueError, "hidden_size=-1"),
        ({"moe_intermediate_size": 0}, ValueError, "moe_intermediate_size=0"),
        ({"num_experts_per_tok": 0}, ValueError, "num_experts_per_tok=0"),
        ({"num_experts_per_tok": E + 1}, ValueError, "at most num_experts=6"),
        ({"num_experts": 6.0}, TypeError, "must be an int"),
        ({"layer_idx": -1}, ValueError, "layer_idx=-1"),
        ({"chunked_prefill_size": 0}, ValueError, "chunked_prefill_size=0"),
        ({"max_deferred_experts_per_token": -1}, ValueError, "max_deferred_experts_per_token=-1"),
        ({"method": "AMXINT2"}, ValueError, "(?s)AMXINT2.*AMXINT4.*NUMPY: runs"),
        ({"method": "SYCL_GPTQ_INT4"}, ValueError, "SYCL_GPTQ_INT4.*CPUs alone; GPTQ_INT4"),
        ({"method": "RAWINT4"}, ValueError, "INT4.*runs int4 weights, these are int8"),
        ({"method": None}, ValueError, "method=None is unknown"),
        ({"method": "AMXINT4"}, ValueError, "AMXINT4.*int4.*int8"),
        ({"weight_format": "int3"}, ValueError, "int3"),
        ({"group_size": 48}, ValueError, "group_size=48"),
        ({"activation_group": 7}, ValueError, "activation_group=7"),
        ({"rotation": 32}, ValueError, "rotation=32: the width must be 0, 64 or 256"),
        ({"rotation": "64"}, ValueError, "rotation='64': must be a width"),
        (
            {"rotation": 7, "method": "auto", "weight_format": None},
            ValueError,
            "rotation=7: the width must be 0, 64 or 256",
        ),
        ({"rotation": 64, "weight_format": "bf16"}, ValueError, "rotation=64: bf16 takes 0"),
        ({"mode": "train"}, ValueError, "mode='train'"),
        (
            {"lora_rank": 16, "zero_point": True},
            ValueError,
            "lora_rank, zero_point: only with mode='sft'",
        ),
        ({"gpu_experts_mask": [1, 0]}, ValueError, r"shape \(2,\): must be \(6,\)"),
        ({"gpu_experts_mask": [0, 1, 2, 3, 4, 5]}, ValueError, "not a list of ids"),
        ({"gpu_experts_mask": torch.zeros(E)}, TypeError, "torch.float32: must be bool"),
        ({"gpu_experts_mask": torch.zeros(E, dtype=torch.bfloat16)}, TypeError, "bfloat16"),
        ({"gpu_experts_mask": True}, TypeError, "must be an int"),
        ({"num_gpu_experts": E + 1}, ValueError, "at most num_experts=6"),
        ({"num_gpu_experts": -1}, ValueError, "num_gpu_experts=-1"),
        ({"swiglu_limit": -1.0}, ValueError, "swiglu_limit=-1.0"),
        ({"swiglu_alpha": float("nan")}, ValueError, "swiglu_alpha=nan"),
        ({"threadpool_count": 1, "numa_nodes": [0, 1]}, ValueError, "one per thread pool"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        make(**{"layer_idx": 0, **arguments})


def test_another_thread_layout_is_refused_not_ignored():
    first = make()
    with pytest.raises(EngineError, match="one process has one layout"):
        make(cpuinfer_threads=first.cpuinfer_threads + 1)
    with pytest.raises(EngineError, match="one process has one layout"):
        make(numa_nodes=[first.numa_nodes[0] + 1], threadpool_count=1)
    same = make(cpuinfer_threads=first.cpuinfer_threads, threadpool_count=first.threadpool_count)
    assert same.numa_nodes == first.numa_nodes
