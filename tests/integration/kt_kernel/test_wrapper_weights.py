"""KTMoEWrapper's weights: from tensors, packed and ordinary directories; maps, biases,
activations.
"""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import ktk
from ktk import backends
from ktk.checkpoint import read_layer
from ktk.convert.run import convert
from ktk.errors import BackendError, CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise.pack import pack_experts
from ktk.reference.moe import ExactExperts
from make import checkpoints
from make.wrapper_cases import (
    NAMES,
    E,
    H,
    K,
    N,
    assert_same_bits,
    exact,
    loaded,
    make,
    random_weights,
    routed,
)

# -- weights ---------------------------------------------------------------------------------------


def packed_bytes(arrays, spec, biases=(None, None, None)):
    """The panels of float32 or bf16-bit experts, straight from the packer."""

    def read(e):
        return ExpertWeights(
            *(a[e] for a in arrays), *(None if b is None else b[e] for b in biases)
        )

    return pack_experts(spec, read).data


def in_slots(wrapper):
    """The spans of the wrapper's slots, uint8 (E, bytes), wherever they lie."""
    packed = wrapper.moe.packed
    return packed.data[[packed.place(slot) for slot in range(E)]]


def test_weights_may_be_any_float_dtype_and_are_read_as_what_they_are():
    spec = MoESpec(E, H, N, "int8")
    arrays = random_weights()
    halves = [a.astype(np.float16) for a in arrays]
    bits = [f32_to_bf16(a) for a in arrays]
    cases = (
        (arrays, arrays),
        (halves, [a.astype(np.float32) for a in halves]),
        ([torch.from_numpy(a) for a in arrays], arrays),
        ([torch.from_numpy(a) for a in halves], [a.astype(np.float32) for a in halves]),
        ([torch.from_numpy(a).bfloat16() for a in arrays], [bf16_to_f32(b) for b in bits]),
        (
            [torch.from_numpy(a).transpose(1, 2).contiguous().transpose(1, 2) for a in arrays],
            arrays,
        ),
    )
    for given, meant in cases:
        wrapper = make()
        wrapper.load_weights_from_tensors(*given)
        assert np.array_equal(packed_bytes(meant, spec), in_slots(wrapper))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weights_are_named(name):
    for change, error, match in (
        (lambda x: x[:, :-1], ValueError, "has shape"),  # too few rows
        (lambda x: x[:-1], ValueError, "has shape"),  # too few experts
        (lambda x: x.transpose(0, 2, 1), ValueError, "has shape"),
        (lambda x: x.astype(np.int32), TypeError, "int32: must be float32"),
        (lambda x: torch.empty(x.shape, device="meta"), ValueError, "is on meta"),
        (lambda x: None, TypeError, "NoneType"),
    ):
        weights = dict(zip(NAMES, random_weights(), strict=True))
        weights[name] = change(weights[name])
        wrapper = make()
        with pytest.raises(error, match=f"{name}_proj.*{match}"):
            wrapper.load_weights_from_tensors(*weights.values())
        with pytest.raises(RuntimeError, match="no weights yet"):
            wrapper.forward(*routed(1))


def test_weights_with_nan_are_refused():
    gate, up, down = random_weights()
    up[3, 1, 1] = np.nan
    with pytest.raises(ValueError, match=r"expert 3: .*NaN"):
        make().load_weights_from_tensors(gate, up, down)


def test_source_weights_are_not_kept():
    tensors = [torch.from_numpy(a).bfloat16() for a in random_weights()]
    watched = [weakref.ref(t) for t in tensors]
    wrapper = make()
    wrapper.load_weights_from_tensors(*tensors)
    wrapper.forward(*routed(2))
    del tensors
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_biases_come_all_or_none():
    rng = np.random.default_rng(5)
    biases = [rng.standard_normal(s).astype(np.float32) for s in ((E, N), (E, N), (E, H))]
    wrapper = make(swiglu_alpha=1.702, swiglu_limit=7.0)
    wrapper.load_weights_from_tensors(*random_weights(), None, *biases)
    spec = wrapper.moe.spec
    assert spec.has_bias
    assert np.array_equal(packed_bytes(random_weights(), spec, biases), in_slots(wrapper))
    assert_same_bits(exact(wrapper, *routed(4)), wrapper.forward(*routed(4)))
    with pytest.raises(ValueError, match="only up_bias given"):
        wrapper.load_weights_from_tensors(*random_weights(), up_bias=biases[1])
    with pytest.raises(ValueError, match="down_bias has shape"):
        wrapper.load_weights_from_tensors(*random_weights(), None, biases[0], biases[1], biases[0])


@pytest.mark.parametrize(
    ("limit", "alpha", "activation"),
    [
        (0.0, 0.0, Activation()),
        (0.5, 0.0, Activation(gate_max=0.5, up_min=-0.5, up_max=0.5)),
        (0.0, 1.5, Activation(alpha=1.5, up_offset=1.0)),
        (
            0.5,
            1.5,
            Activation(
                alpha=1.5, gate_min=-0.5, gate_max=0.5, up_min=-0.5, up_max=0.5, up_offset=1.0
            ),
        ),
    ],
)
def test_swiglu_arguments_are_kt_kernels_activation(limit, alpha, activation):
    wrapper = loaded(swiglu_limit=limit, swiglu_alpha=alpha)
    assert wrapper.moe.spec.activation == activation
    hidden = routed(3)[0]
    w = ExactExperts(wrapper.moe.packed).dequantised(0)
    x = hidden.astype(np.float64)
    g, u = x @ w.gate.T.astype(np.float64), x @ w.up.T.astype(np.float64)
    if limit:
        g = np.clip(g, -limit if alpha else None, limit)
        u = np.clip(u, -limit, limit)
    h = g / (1 + np.exp(-(alpha or 1.0) * g)) * (u + (1.0 if alpha else 0.0))
    got = wrapper.forward(hidden, np.int64([[0, -1, -1]] * 3), np.ones((3, K), np.float32))
    want = h @ w.down.T.astype(np.float64)
    assert (
        np.abs(got - want).max() < 0.03 * np.abs(want).max()
    )  # activations are quantised to 8 bits


BAD_MAPS = (
    (np.arange(E, dtype=np.int32), TypeError, "int32: must be int64"),
    (torch.arange(E).float(), TypeError, "float32: must be int64"),
    (np.arange(E + 1), ValueError, r"\(7,\): must be \(6,\)"),
    (torch.arange(E).reshape(2, 3), ValueError, r"\(2, 3\)"),
    (np.arange(1, E + 1), ValueError, "from 1 to 6: must stay in 0..5"),
    (np.arange(-1, E - 1), ValueError, "from -1 to 4"),
    (torch.arange(E, device="meta"), ValueError, "is on meta"),
    ([0, 1, 2, 3, 4, 5], TypeError, "is a list"),
)


@pytest.mark.parametrize(("order", "error", "match"), BAD_MAPS)
def test_bad_maps_are_refused_on_both_ways(tmp_path, order, error, match):
    with pytest.raises(error, match=match):
        make(weight_path=tmp_path).load_weights(order)
    with pytest.raises(error, match=match):
        make().load_weights_from_tensors(*random_weights(), order)


def test_map_is_the_identity_for_tensors_as_in_kt_kernel():
    wrapper = make()
    wrapper.load_weights_from_tensors(*random_weights(), torch.tensor([5, 4, 3, 2, 1, 0]))
    assert np.array_equal(loaded().moe.packed.data, in_slots(wrapper))


# -- directories -----------------------------------------------------------------------------------


def save(directory: Path, layer=0, **arguments):
    """A packed layer written by cpu_save; returns its wrapper."""
    wrapper = make(layer, weight_path=directory, cpu_save=True, **arguments)
    wrapper.load_weights_from_tensors(*random_weights(layer))
    return wrapper


@pytest.mark.parametrize(
    "order", [None, np.arange(E), np.int64([2, 0, 1, 5, 4, 3]), np.int64([1] * E)]
)
def test_saved_layer_loads_again_in_the_maps_order(tmp_path, order):
    saved = save(tmp_path, 3)
    again = make(3, weight_path=str(tmp_path))
    again.load_weights(order)
    slots = np.arange(E) if order is None else order
    assert np.array_equal(in_slots(saved)[slots], in_slots(again))
    hidden, ids, weights = routed(5)
    assert_same_bits(
        saved.forward(hidden, slots[ids], weights), again.forward(hidden, ids, weights)
    )


def test_auto_takes_the_files_format_and_activation(tmp_path):
    save(tmp_path, weight_format="int4", group_size=64, swiglu_limit=3.0, activation_group=64)
    wrapper = make(weight_path=tmp_path, method="auto", weight_format=None)
    wrapper.load_weights(physical_to_logical_map_cpu=torch.arange(E))
    spec = wrapper.moe.spec
    assert (spec.weight_format, spec.group_size, spec.activation_group) == ("int4", 64, 64)
    assert spec.activation == Activation.silu(3.0)
    other = make(weight_path=tmp_path, method="auto", weight_format=None, activation_group=128)
    other.load_weights()
    assert other.moe.spec.activation_group == 128  # not part of the layout: the caller's choice


@pytest.mark.parametrize("weight_format", ["int8", "nl4"])
@pytest.mark.parametrize("rotation", [None, 0, 64, (256, 3)])
def test_weights_are_rotated_as_asked_and_a_saved_layer_keeps_it(tmp_path, weight_format, rotation):
    given = {"weight_format": weight_format, "rotation": rotation}
    saved = save(tmp_path, **given)
    turns = Rotation.of(64 if rotation is None else rotation)
    assert saved.moe.spec.turns == turns
    spec = MoESpec(E, H, N, weight_format, rotation=rotation)
    want = ktk.MoE.from_weights(*random_weights(), **given, method="NUMPY")
    assert want.spec == spec
    hidden, ids, weights = routed(5)
    out = saved.forward(hidden, ids, weights)
    assert_same_bits(out, want(hidden, ids, weights))
    for asked in (None, turns):
        again = make(weight_path=tmp_path, weight_format=weight_format, rotation=asked)
        again.load_weights()
        assert again.moe.spec == spec
        assert_same_bits(again.forward(hidden, ids, weights), out)
    for other in {(0, 0), (64, 0), (64, 3)} - {turns}:
        wrapper = make(weight_path=tmp_path, weight_format=None, method="auto", rotation=other)
        with pytest.raises(ValueError, match=re.escape(f"has rotation={list(turns)}, the wrapper")):
            wrapper.load_weights()


def test_an_ordinary_directory_is_rotated_when_it_is_quantised(tmp_path):
    checkpoints.make(tmp_path, "mixtral", sizes=(1, E, H, N))
    wrapper = make(weight_path=tmp_path, rotation=64)
    wrapper.load_weights()
    convert(tmp_path, tmp_path.with_name("packed"), quant_method="int8", rotation=64)
    assert np.array_equal(wrapper.moe.packed.data, read_layer(tmp_path.with_name("packed"), 0).data)
    assert wrapper.moe.spec.turns == (64, 0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_experts": E + 1}, "num_experts=6, the wrapper was made for 7"),
        ({"hidden_size": H * 2}, "hidden_size=64, the wrapper was made for 128"),
        ({"moe_intermediate_size": N * 2}, "intermediate_size=32, the wrapper was made for 64"),
        ({"method": "AMXINT4", "weight_format": None}, "int8 weights, .*AMXINT4.* asks for int4"),
    ],
)
def test_packed_layer_of_another_kind_is_refused(tmp_path, arguments, match):
    save(tmp_path)
    with pytest.raises(ValueError, match=match):
        make(weight_path=tmp_path, **arguments).load_weights()


@pytest.mark.parametrize(
    ("recorded", "asked", "runs"),
    [
        ({}, {"swiglu_limit": 2.0}, Activation.silu(2.0)),  # plain SiLU says nothing
        ({"swiglu_limit": 2.0}, {}, Activation.silu(2.0)),
        ({"swiglu_limit": 2.0}, {"swiglu_limit": 2.0}, Activation.silu(2.0)),
        ({"swiglu_limit": 2.0}, {"swiglu_limit": 3.0}, None),
        ({"swiglu_alpha": 1.5}, {"swiglu_limit": 3.0}, None),
    ],
    ids=str,
)
def test_recorded_and_asked_activation_agree_or_are_refused(tmp_path, recorded, asked, runs):
    save(tmp_path, **recorded)
    wrapper = make(weight_path=tmp_path, **asked)
    if runs is None:
        with pytest.raises(ValueError, match="records .* ask for"):
            wrapper.load_weights()
        return
    wrapper.load_weights()
    assert wrapper.moe.spec.activation == runs


def test_kt_kernels_swigluoai_arguments_take_the_models_own_form():
    """KT-Kernel clamps the gate from below too, gpt-oss and MiniMax-M3 do not:
    what is recorded wins.
    """
    own = Activation.swigluoai(1.702, 7.0)
    wrapper = make(swiglu_alpha=1.702, swiglu_limit=7.0)
    assert wrapper.weights.agreed_activation(own, "file") == own
    floored = Activation.swigluoai(1.702, 7.0, gate_floor=True)
    assert wrapper.weights.agreed_activation(Activation(), "file") == floored


def test_packed_layer_of_another_group_size_is_refused(tmp_path):
    save(tmp_path, weight_format="int4", group_size=32)
    with pytest.raises(ValueError, match="group_size=32, the wrapper asks for 64"):
        make(weight_path=tmp_path, weight_format="int4", group_size=64).load_weights()


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="weight_path is None"):
        make().load_weights()
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            make(weight_path=path).load_weights()


def test_a_layer_that_was_not_packed_is_named(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(
        CheckpointError, match=r"packed layers are \(3,\), layer 4 is not among them"
    ):
        make(4, weight_path=tmp_path).load_weights()


def mixtral(directory: Path):
    """A one-layer Mixtral directory with the experts of random_weights(); bf16."""
    from safetensors.torch import save_file

    tensors = {}
    for name, array in zip(("w1", "w3", "w2"), random_weights(), strict=True):
        for e in range(E):
            key = f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"
            tensors[key] = torch.from_numpy(array[e]).bfloat16()
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": E,
        "num_experts_per_tok": K,
        "hidden_size": H,
        "intermediate_size": N,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("order", [None, np.int64([2, 0, 1, 5, 4, 3])])
@pytest.mark.parametrize("cpu_save", [False, True])
def test_ordinary_directory_is_quantised_at_load(tmp_path, order, cpu_save):
    mixtral(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    wrapper = make(weight_path=tmp_path, cpu_save=cpu_save)
    wrapper.load_weights(order)
    slots = np.arange(E) if order is None else order
    meant = [bf16_to_f32(f32_to_bf16(a)) for a in random_weights()]
    logical = packed_bytes(meant, MoESpec(E, H, N, "int8"))
    assert np.array_equal(logical[slots], in_slots(wrapper))
    if not cpu_save:
        assert {p.name for p in tmp_path.iterdir()} == before
        return
    again = make(weight_path=tmp_path)
    again.load_weights()
    assert np.array_equal(logical, in_slots(again))


def test_ordinary_directory_of_another_shape_is_refused(tmp_path):
    mixtral(tmp_path)
    with pytest.raises(ValueError, match="hidden_size=64, the wrapper was made for 128"):
        make(weight_path=tmp_path, hidden_size=128).load_weights()
    with pytest.raises(CheckpointError, match="layer 7"):
        make(7, weight_path=tmp_path).load_weights()


@pytest.mark.parametrize("method", [m for m in backends.methods() if m != "LLAMAFILE"])
def test_every_method_loads_and_matches_the_reference(method):
    backend = backends.backends().get(method)
    reason = None if backend is None or method.startswith("AMX") else backend.why_not()
    if reason is not None:  # AMX methods have stand-ins
        pytest.skip(f"{method}: {reason}")
    wrapper = make(method=method, weight_format=None if backends.method_format(method) else "int8")
    wrapper.load_weights_from_tensors(*random_weights())
    case = routed(4)
    if wrapper.moe.spec.weight_format in ("int4", "int8"):
        assert_same_bits(exact(wrapper, *case), wrapper.forward(*case))
    else:  # float formats agree over batch and threads, not over kernels
        want = exact(wrapper, *case)
        assert np.abs(wrapper.forward(*case) - want).max() <= 1e-5 * np.abs(want).max()


def test_experts_of_the_mask_need_not_be_loaded(tmp_path):
    """Those that stay give the same bits; one that is unmasked later is named until weights are
    loaded again.
    """
    save(tmp_path)
    mask = np.arange(E) % 2 == 0
    order = np.arange(E)[::-1].copy()
    whole = make(weight_path=tmp_path, method="auto", gpu_experts_mask=mask)
    part = make(weight_path=tmp_path, method="auto", gpu_experts_mask=mask, load_gpu_experts=False)
    for wrapper in (whole, part):
        wrapper.load_weights(order)
    assert part.moe.packed.num_stored == E - mask.sum()
    case = routed(5)
    assert_same_bits(whole.forward(*case), part.forward(*case))
    part.gpu_experts_mask[:] = False
    with pytest.raises(BackendError, match="not in memory"):
        part.forward(*case)
    part.load_weights(order)
    whole.gpu_experts_mask[:] = False
    assert_same_bits(whole.forward(*case), part.forward(*case))
    with pytest.raises(ValueError, match="load_gpu_experts"):
        make(cpu_save=True, load_gpu_experts=False)
