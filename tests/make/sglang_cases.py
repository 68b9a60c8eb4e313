"""SGLang's kt_ep_wrapper.py as its wheel has it, with what surrounds it in SGLang made small: a
device that is the CPU, device experts by their definition, layers, arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ktk.integration.kt_kernel import install
from make.sglang_files import KT, WRAPPER, folder_of

NUM_LAYERS, E, K, H, N = 3, 8, 2, 128, 256
GROUP = 32  # of int4
MODULE = "sglang.srt.layers.moe.kt_ep_wrapper"
BLOCK = 128


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


class Dispatched(NamedTuple):
    hidden_states: torch.Tensor
    topk_output: TopK


class Combined(NamedTuple):
    hidden_states: torch.Tensor


@dataclasses.dataclass
class RunnerConfig:
    activation: str = "silu"
    num_experts: int = E
    num_local_experts: int = E
    routed_scaling_factor: float | None = 2.5
    gemm1_alpha: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None


class FusedMoEMethodBase:
    pass


class DeviceExperts(FusedMoEMethodBase):
    """Experts of the device: bf16; e4m3 with a float32 scale for 128 x 128; or 8 codes of 4 bits in
    an int32, (in_features / 8, out_features), with a bf16 scale for 32.
    """

    num_bits, packed_factor, group_size, actorder = 4, 8, GROUP, None

    def __init__(self, form: str) -> None:
        self.form = form

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
    ) -> None:
        h, i = hidden_size, intermediate_size_per_partition
        is_fp8 = self.form == "fp8"
        dtype = torch.float8_e4m3fn if is_fp8 else params_dtype
        made = {
            "w13_weight": torch.zeros(num_experts, 2 * i, h, dtype=dtype),
            "w2_weight": torch.zeros(num_experts, h, i, dtype=dtype),
        }
        if is_fp8:
            made["w13_weight_scale_inv"] = torch.zeros(num_experts, 2 * i // BLOCK, h // BLOCK)
            made["w2_weight_scale_inv"] = torch.zeros(num_experts, h // BLOCK, i // BLOCK)
        if self.form == "int4":
            made = {
                "w13_weight_packed": torch.zeros(num_experts, h // 8, 2 * i, dtype=torch.int32),
                "w2_weight_packed": torch.zeros(num_experts, i // 8, h, dtype=torch.int32),
                "w13_weight_scale": torch.zeros(num_experts, h // GROUP, 2 * i, dtype=params_dtype),
                "w2_weight_scale": torch.zeros(num_experts, i // GROUP, h, dtype=params_dtype),
            }
        for name, tensor in made.items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def create_moe_runner(self, layer: torch.nn.Module, config: RunnerConfig) -> None:
        self.moe_runner_config = config

    def apply(self, layer: Any, dispatched: Dispatched) -> Combined:
        x, (weights, ids, _) = dispatched
        assert self.moe_runner_config.routed_scaling_factor is None or self.form == "mainline"
        out = torch.zeros(x.shape, dtype=torch.float32)
        for e in range(len(next(layer.parameters()))):
            token, slot = torch.nonzero(ids == e, as_tuple=True)
            y = expert_of(x[token].float(), self.dense(layer, "w13", e), self.dense(layer, "w2", e))
            out.index_add_(0, token, weights[token, slot, None].float() * y)
        return Combined(out.to(x.dtype))

    def dense(self, layer: Any, name: str, expert: int) -> torch.Tensor:
        if self.form == "int4":
            scales = getattr(layer, f"{name}_weight_scale")[expert].float()
            words = getattr(layer, f"{name}_weight_packed")[expert].reshape(-1, scales.shape[1])
            nibbles = torch.stack([words >> 4 * j & 15 for j in range(8)], dim=1).flatten(0, 1)
            return ((nibbles - 8) * scales.repeat_interleave(GROUP, 0)).T
        codes = getattr(layer, f"{name}_weight")[expert].float()
        if self.form != "fp8":
            return codes
        return codes * spread(getattr(layer, f"{name}_weight_scale_inv")[expert])


def spread(scales: torch.Tensor) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def expert_of(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ w13.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ w2.T


class Layer(torch.nn.Module):
    """What the wrapper reads of SGLang's FusedMoE."""

    def __init__(self, form: str, ranks: int) -> None:
        super().__init__()
        self.top_k, self.moe_tp_size, self.num_experts = K, ranks, E
        self.intermediate_size_per_partition = N // ranks
        self.moe_runner_config = RunnerConfig()
        self.use_triton_kernels = False
        self.quant_config = SimpleNamespace(
            get_quant_method=lambda layer, prefix: DeviceExperts(form)
        )


@dataclasses.dataclass
class Arguments:
    """SGLang's server arguments that begin with kt_, and where it stands."""

    kt_weight_path: str | None
    kt_method: str = "BF16"
    kt_cpuinfer: int | None = None
    kt_threadpool_count: int | None = 1
    kt_numa_nodes: list[int] | None = None
    kt_num_gpu_experts: int | None = 3
    kt_gpu_experts_ratio: float | None = None
    kt_max_deferred_experts_per_token: int | None = None
    kt_gpu_prefill_token_threshold: int | None = None
    kt_enable_dynamic_expert_update: bool = False
    kt_expert_placement_strategy: str = "uniform"
    init_expert_location: str | None = None
    chunked_prefill_size: int = 64

    def get_hf_config(self) -> Any:
        return SimpleNamespace(num_hidden_layers=NUM_LAYERS, num_experts=E)


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        pass

    wait_event = wait_stream = record = synchronize = _nothing


def _module(name: str, **fields: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(fields)
    module.__path__ = []
    return module


def _surroundings(given: Arguments, place: Any) -> dict[str, dict[str, Any]]:
    """Names that the wrapper imports, by module. place : rank, ranks and group."""
    moe = SimpleNamespace(**{k: v for k, v in vars(given).items() if k.startswith("kt_")})
    location = SimpleNamespace(physical_to_logical_map_cpu=torch.arange(E).repeat(NUM_LAYERS, 1))
    is_bypassed = SimpleNamespace(format_is_bypassed=lambda topk: False)
    group = SimpleNamespace(cpu_group=place.group, device_group=place.group, first_rank=0)
    recorder = SimpleNamespace(on_gpu_expert_mask=lambda layer, mask: None)
    submode = SimpleNamespace(SGLANG_DSV4_2604_SUBMODE=SimpleNamespace(get=lambda: ""))
    srt: dict[str, dict[str, Any]] = {
        "arg_groups.overrides": {
            "model_config_of": lambda a: SimpleNamespace(hf_config=a.get_hf_config())
        },
        "configs.glm5_next": {"GLM5_NEXT_SUPPORTED_TP_SIZES": (1, 2, 4, 8)},
        "distributed": {
            "get_tensor_model_parallel_rank": lambda: place.rank,
            "get_tensor_model_parallel_world_size": lambda: place.ranks,
            "get_tp_group": lambda: group,
        },
        "environ": {"envs": submode},
        "eplb.expert_distribution": {"get_global_expert_distribution_recorder": lambda: recorder},
        "eplb.expert_location_dispatch": {"get_global_expert_location_metadata": lambda: location},
        "layers.moe.fused_moe_triton.layer": {"UnquantizedFusedMoEMethod": DeviceExperts},
        "layers.moe.quant_method_registry": {"register_moe_quant_wrapper": lambda *a, **k: None},
        "layers.moe.token_dispatcher": {"StandardCombineInput": Combined},
        "layers.moe.topk": {"TopKOutputChecker": is_bypassed},
        "layers.moe.utils": {"is_kt_ep_wrapper_disabled": lambda: False},
        "layers.quantization.base_config": {"FusedMoEMethodBase": FusedMoEMethodBase},
        "layers.quantization.marlin_utils": {"marlin_permute_scales": lambda s, *_: s},
        "runtime_context": {
            "get_exec": lambda: SimpleNamespace(moe=moe),
            "get_parallel": lambda: SimpleNamespace(tp_rank=place.rank),
            "get_schedule": lambda: given,
        },
        "utils": {"get_compiler_backend": lambda: "eager", "is_cuda": lambda: False},
    }
    return {f"sglang.srt.{name}": fields for name, fields in srt.items()}


@contextlib.contextmanager
def wrapper_module(
    release: str, given: Arguments, rank: int = 0, ranks: int = 1, group: Any = None
) -> Iterator[Any]:
    """SGLang's module, run as it lies in the wheel, with ktk as its kt_kernel.

    ``module.place.rank`` may be set: what the module asks for its rank then answers so.
    """
    place = SimpleNamespace(rank=rank, ranks=ranks, group=group)
    text = (folder_of(release) / WRAPPER).read_text()
    modules: dict[str, types.ModuleType] = {}
    for name, fields in _surroundings(given, place).items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            modules.setdefault(".".join(parts[:end]), _module(".".join(parts[:end])))
        modules[name] = _module(name, **fields)
    cuda = {
        "synchronize": lambda *a: None,
        "current_stream": lambda *a: _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda s: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        held = {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("sglang", "kt_kernel")}
        path = list(sys.path)

        def back() -> None:
            for name in [n for n in sys.modules if n.split(".")[0] in ("sglang", "kt_kernel")]:
                del sys.modules[name]
            sys.modules.update(held)
            sys.path[:] = path

        stack.callback(back)
        sys.path.insert(0, str(install.DIRECTORY))
        sys.modules.update(modules)
        for owner, fields in (
            (torch.cuda, cuda),
            (torch, {"compile": lambda *a, **k: lambda f: f}),
            (torch.Tensor, {"record_stream": lambda self, s: None}),
        ):
            for name, value in fields.items():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        module: Any = _module(MODULE, place=place)
        sys.modules[MODULE] = module
        module.gptq_marlin_repack = lambda words, *_: words  # imported where there is CUDA
        exec(compile(text, f"{release}/{WRAPPER}", "exec"), module.__dict__)
        yield module


def hybrid(
    module: Any, release: str, given: Arguments, layer_idx: int, form: str, dense: list[Any]
) -> tuple[Any, Layer]:
    """A layer as SGLang sets one up: its method and the layer, device weights in place.

    dense : of each expert gate, up, down, and of fp8 also their scales, whole.
    """
    config = module.create_kt_config_from_server_args(given, layer_idx)
    layer = Layer(form, module.place.ranks)
    method = module.KTEPWrapperMethod(DeviceExperts(form), config)
    method.create_weights(layer, E, H, layer.intermediate_size_per_partition, torch.bfloat16)
    method.create_moe_runner(
        layer, RunnerConfig(routed_scaling_factor=2.5 if release == KT else None)
    )
    mask = [e < given_experts(given) for e in range(E)]
    mask = method.gpu_experts_mask.tolist() if release == KT else mask
    for slot, e in enumerate(e for e in range(E) if mask[e]):
        for name, part in cut(dense[e], module.place.rank, module.place.ranks).items():
            getattr(layer, name).data[slot].copy_(part)
    method.process_weights_after_loading(layer)
    return method, layer


def given_experts(given: Arguments) -> int:
    return given.kt_num_gpu_experts or 0


def cut(expert: Any, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """A rank's device weights of one expert by their names."""
    found = {}
    is_int4 = expert[0].dtype == torch.int32
    ends = ("weight_packed", "weight_scale") if is_int4 else ("weight", "weight_scale_inv")
    for i, end in enumerate(ends[: len(expert) // 3]):
        gate, up, down = expert[3 * i : 3 * i + 3]
        w13 = torch.cat([half.chunk(ranks)[rank] for half in (gate, up)])
        w2 = down.chunk(ranks, dim=1)[rank]
        found[f"w13_{end}"], found[f"w2_{end}"] = (w.T if is_int4 else w for w in (w13, w2))
    return found


def write_layers(path: Path, form: str) -> list[list[Any]]:
    """Packed layers of random experts; the same as tensors: see ``hybrid``."""
    from ktk.checkpoint import write_layer
    from ktk.experts.row_major import RowMajor
    from ktk.experts.spec import MoESpec
    from make.cases import pack_all, random_experts

    layers = []
    for layer in range(NUM_LAYERS):
        spec = MoESpec(E, H, N, form)
        stored = pack_all(spec, random_experts(spec, layer))
        write_layer(path, spec, layer, stored.data)
        experts = []
        for e in range(E):
            rows = [RowMajor(m, e, form) for m in stored.matrices.values()]
            dtypes = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "int4": torch.int32}
            codes = [torch.from_numpy(r.codes()).view(dtypes[form]) for r in rows]
            scales = [torch.from_numpy(r.scales) for r in rows if r.scales is not None]
            if form == "int4":
                scales = [s.view(torch.bfloat16) for s in scales]
            experts.append([*codes, *scales])
        layers.append(experts)
    return layers
