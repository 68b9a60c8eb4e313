"""One rank of sglang-kt's prefill on the device alone."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from make.sglang_cases import (
    NUM_LAYERS,
    Arguments,
    DeviceExperts,
    Dispatched,
    E,
    H,
    K,
    Layer,
    RunnerConfig,
    TopK,
    cut,
    hybrid,
    wrapper_module,
    write_layers,
)
from make.sglang_files import KT

THRESHOLD, ON_GPU = 6, 3


def on_device(form: str, dense: list[Any], rank: int, ranks: int, given: Dispatched) -> Any:
    """All experts of a layer on the rank's device, from the experts that the files were made of."""
    layer, experts = Layer(form, ranks), DeviceExperts(form)
    experts.create_weights(layer, E, H, layer.intermediate_size_per_partition, torch.bfloat16)
    experts.create_moe_runner(layer, RunnerConfig(routed_scaling_factor=None))
    for e in range(E):
        for name, part in cut(dense[e], rank, ranks).items():
            getattr(layer, name).data[e].copy_(part)
    return experts.apply(layer, given).hidden_states


def prompt(num_tokens: int, seed: int, favour: list[int]) -> Dispatched:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, H, generator=generator).to(torch.bfloat16)
    scores = torch.rand(num_tokens, E, generator=generator)
    scores[:, favour] -= 2
    ids = scores.argsort(dim=1)[:, :K]
    return Dispatched(hidden, TopK(torch.rand(num_tokens, K, generator=generator), ids))


class Barriers:
    """torch.distributed for SGLang's module: a rank that only copies waits once more, for rank 0.

    SGLang has rank 0 write expert e + 1 over e - 1 once itself has copied that, and does not ask
    the other ranks. With a device's copies and barriers they have; here they may not.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def barrier(self, group: Any = None) -> None:
        dist.barrier(group=group)
        dist.barrier(group=group)


def wait_for_copies(wrapper: Any) -> None:
    """Rank 0's side of ``Barriers``: before it goes on to write."""
    written = wrapper.sync_write_weight_scale_to_buffer

    def sync() -> None:
        dist.barrier()
        written()

    wrapper.sync_write_weight_scale_to_buffer = sync


def check_residents(
    method: Any, layer: Layer, dense: list[Any], long: Dispatched, rank: int, ranks: int
) -> None:
    """The prompt's most used experts are on the device, with their own weights."""
    counts = torch.bincount(long.topk_output.topk_ids.flatten(), minlength=E)
    chosen = method.gpu_experts_mask
    assert int(chosen.sum()) == ON_GPU
    assert counts[chosen].min() >= counts[~chosen].max(), f"{chosen}, {counts}"
    for slot, e in enumerate(torch.nonzero(chosen).flatten().tolist()):
        for name, part in cut(dense[e], rank, ranks).items():
            held = getattr(layer, name).data[slot].view(torch.uint8).flatten()
            assert torch.equal(held, part.contiguous().view(torch.uint8).flatten())


def run(module: Any, given: Arguments, form: str, layers: list[Any], rank: int, ranks: int) -> None:
    made = [hybrid(module, KT, given, n, form, layers[n]) for n in range(NUM_LAYERS)]
    if ranks > 1 and rank == 0:
        for method, _ in made:
            wait_for_copies(method.wrapper)
    for round_, favour in enumerate(([5, 6, 7], [0, 4, 7])):
        for n, (method, layer) in enumerate(made):
            long = prompt(THRESHOLD + 3, 10 * round_ + n, favour)
            if form == "int4":
                module._SHARED_FULL_CONTEXT = None
            got = method.apply(layer, long).hidden_states
            want = on_device(form, layers[n], rank, ranks, long)
            assert torch.equal(want, got), f"layer {n}: the prompt"
            chosen = method.gpu_experts_mask
            if given.kt_enable_dynamic_expert_update:
                check_residents(method, layer, layers[n], long, rank, ranks)
            short = prompt(2, 50 + n, favour)
            x, (weights, ids, _) = short
            local = torch.where(chosen[ids], method.logical_to_gpu_index[ids], -1)
            device = method.gpu_method.apply(layer, Dispatched(x, TopK(weights, local)))
            want = device.hidden_states
            if rank == 0:
                assert torch.equal(method.wrapper.gpu_experts_mask, chosen)
                left = torch.where(chosen[ids], -1, ids)
                want = want + method.wrapper.moe(x, left, weights)
            assert torch.equal(want, method.apply(layer, short).hidden_states), f"layer {n}: decode"


def main(folder: Path, form: str, rank: int, ranks: int) -> None:
    group = None
    if ranks > 1:
        store = f"file://{folder}/store"
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store, limit, world_size=ranks, rank=rank)
        group = dist.group.WORLD
    own = folder / f"packed{rank}"
    own.mkdir()
    layers = write_layers(own, form)
    given = Arguments(
        str(own),
        kt_method={"int4": "RAWINT4"}.get(form, form.upper()),
        kt_num_gpu_experts=ON_GPU,
        kt_gpu_prefill_token_threshold=THRESHOLD,
        # Of int4, sglang-kt 0.7.2 loads one layer: for the next it makes Parameters of integers,
        # which torch refuses. So each layer has a new context there, and no updates.
        kt_enable_dynamic_expert_update=form != "int4",
    )
    with torch.no_grad(), wrapper_module(KT, given, rank, ranks, group) as module:
        if rank:
            module.dist = Barriers()
        run(module, given, form, layers, rank, ranks)
    if ranks > 1:
        dist.destroy_process_group()
