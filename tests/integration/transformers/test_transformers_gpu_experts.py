"""Models of transformers with some experts on a device, here torch's "cpu"."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

from ktk.convert.run import convert
from ktk.errors import BackendError, CheckpointError
from ktk.integration.transformers import KtkConfig, linear, load_model
from ktk.integration.transformers.decoder_layers import fuse_decoder_layers, fusion_report
from ktk.integration.transformers.expert_statistics import ExpertStatistics
from ktk.integration.transformers.experts import handle_of
from ktk.integration.transformers.loading import packed_modules
from ktk.ops.device_experts import DeviceExperts, accelerator
from ktk.ops.hybrid import HybridMoE
from ktk.ops.streamed import StreamedMoE
from ktk.placement.masks.files import write_masks, write_statistics
from make.transformers_cases import FAMILIES, experts_of, make_model, prompt, run

pytestmark = pytest.mark.slow
LAYERS, EXPERTS = 2, 8  # of qwen3_moe


def asked(**options: Any) -> KtkConfig:
    return KtkConfig(None, **{"device": "cpu", "gpu_experts": 0.5, **options})


def masks_of(model: Any) -> np.ndarray:
    """bool (layers with experts, num_experts)."""
    found = [handle_of(module) for module in experts_of(model)]
    return np.stack([handle.hybrid.mask for handle in found if handle and handle.hybrid])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    make_model("qwen3_moe").save_pretrained(path)
    return path


@pytest.mark.parametrize("load_gpu_experts", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_eager_logits_and_tokens(
    family: str, load_gpu_experts: bool, tmp_path: Path
) -> None:
    make_model(family).save_pretrained(tmp_path)
    logits, tokens = run(make_model(family), "eager")
    config = asked(load_gpu_experts=load_gpu_experts, placement="random")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model.generation_config.eos_token_id = None
    got_logits, got_tokens = run(model)
    assert (got_logits - logits).abs().max() <= 1e-4
    assert torch.equal(got_tokens, tokens)
    masks = masks_of(model)
    assert masks.sum() == masks.size // 2
    for row, mask in zip(packed_modules(model), masks, strict=True):
        assert (row.gpu_experts, row.device) == (mask.sum(), "cpu")
    for module, mask in zip(experts_of(model), masks, strict=True):
        stored = handle_of(module).moe.packed
        here = [stored.place_or_none(e) is not None for e in range(len(mask))]
        assert here == [bool(load_gpu_experts or not on) for on in mask]


@pytest.mark.parametrize("load_gpu_experts", [True, False])
@pytest.mark.parametrize("method", ["INT8", "bf16"])
def test_a_packed_directory_reads_only_what_the_cpu_runs(
    method: str, load_gpu_experts: bool, saved: Path, tmp_path: Path
) -> None:
    convert(saved, tmp_path / "packed", quant_method=method.lower())
    plain = load_model(tmp_path / "packed")
    want = run(plain)[0]
    config = asked(load_gpu_experts=load_gpu_experts)
    model = load_model(tmp_path / "packed", quantization_config=config)
    rows = [handle_of(module).moe.packed for module in experts_of(model)]
    assert {len(r.spans) for r in rows} == {EXPERTS if load_gpu_experts else EXPERTS // 2}
    error = (run(model)[0] - want).abs().max() / want.abs().max()
    assert error <= (0.05 if method == "INT8" else 1e-5)


def test_every_expert_or_none_may_be_on_the_device(saved: Path) -> None:
    want = run(make_model("qwen3_moe"), "eager")[0]
    for number in (0, 0.0, "0 B", 1.0, EXPERTS, "1 GiB"):
        for load_gpu_experts in (True, False):
            config = asked(gpu_experts=number, load_gpu_experts=load_gpu_experts)
            model = load_model(saved, quantization_config=config)
            assert (run(model)[0] - want).abs().max() <= 1e-4
            assert len(np.unique(masks_of(model))) == 1


def test_room_is_a_number_of_each_layer_a_share_or_bytes(saved: Path) -> None:
    of_one = 4 * 3 * 64 * 48  # float32, as the model
    for number, want in ((3, 6), (0.3, 4), (f"{5 * of_one + 1}B", 5)):
        model = load_model(saved, quantization_config=asked(gpu_experts=number))
        assert masks_of(model).sum() == want
        planes = [handle_of(m).hybrid.device_experts for m in experts_of(model)]
        assert sum(p.num_slots * p.expert_bytes for p in planes) == want * of_one


def test_a_bfloat16_models_experts_are_bfloat16_on_the_device(saved: Path) -> None:
    model = load_model(saved, dtype=torch.bfloat16, quantization_config=asked())
    assert {handle_of(m).hybrid.device_experts.dtype for m in experts_of(model)} == {torch.bfloat16}
    want = run(load_model(saved, dtype=torch.bfloat16))[0]
    assert (run(model)[0] - want).abs().max() <= 0.03 * want.abs().max()


def test_files_of_masks_and_of_statistics_place_experts(saved: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    masks = rng.random((LAYERS, EXPERTS)) < 0.4
    write_masks(tmp_path / "masks.pt", masks)
    config = asked(gpu_experts=None, placement=tmp_path / "masks.pt")
    assert np.array_equal(masks_of(load_model(saved, quantization_config=config)), masks)

    counts = rng.permutation(LAYERS * EXPERTS).reshape(1, LAYERS, EXPERTS)
    write_statistics(tmp_path / "stats.pt", counts)
    config = asked(gpu_experts=0.25, placement=str(tmp_path / "stats.pt"))
    placed = masks_of(load_model(saved, quantization_config=config))
    assert np.array_equal(placed, counts[0] >= 12)


def test_what_a_model_recorded_places_its_next_run(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved, quantization_config=asked())
    statistics = ExpertStatistics(model)
    statistics.start()
    model(prompt())
    statistics.stop()
    counts = statistics.recorder.counts()
    assert counts.sum() == LAYERS * 2 * prompt().numel()
    path = statistics.dump(tmp_path)
    placed = masks_of(load_model(saved, quantization_config=asked(placement=path)))
    assert counts[placed].min() >= counts[~placed].max()


def test_a_dense_layers_row_counts_for_nothing(tmp_path: Path) -> None:
    make_model("deepseek_v3").save_pretrained(tmp_path / "model")
    masks = np.zeros((2, 8), bool)
    masks[0], masks[1, 3] = True, True
    write_masks(tmp_path / "masks.pt", masks)
    config = asked(gpu_experts=None, placement=tmp_path / "masks.pt")
    model = load_model(tmp_path / "model", quantization_config=config)
    assert np.array_equal(masks_of(model), masks[1:])


def test_what_is_asked_of_a_device_is_not_saved(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved, quantization_config=asked())
    model.save_pretrained(tmp_path / "again")
    text = (tmp_path / "again" / "config.json").read_text()
    assert not {"gpu_experts", "placement", "device", "load_gpu_experts", "request"} & set(
        json.loads(text)["quantization_config"]
    )
    again = load_model(tmp_path / "again")
    assert all(row.gpu_experts == 0 for row in packed_modules(again))
    assert (run(again)[0] - run(model)[0]).abs().max() <= 1e-4
    few = load_model(saved, quantization_config=asked(load_gpu_experts=False))
    with pytest.raises(ValueError, match="not all experts in the CPU's memory: .*load_gpu_experts"):
        few.save_pretrained(tmp_path / "few")


def test_gradients_reach_what_trains(saved: Path) -> None:
    def gradient(model: Any) -> torch.Tensor:
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)
        model(prompt()).logits.float().square().mean().backward()
        found: torch.Tensor = model.model.embed_tokens.weight.grad
        return found

    want = gradient(load_model(saved))
    got = gradient(load_model(saved, quantization_config=asked()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_decoder_layers_with_such_experts_keep_their_own_forward(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 1)
    model = load_model(saved, quantization_config=asked(linear="int8"))
    assert fuse_decoder_layers(model) == []
    assert set(fusion_report(model).values()) == {"some of its experts are on cpu"}


def test_experts_with_an_activation_of_their_own_stay_on_the_cpu(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktk.integration.transformers.quantizer.recognise", lambda _: None)
    with pytest.raises(ValueError, match="mlp.experts: its activation is its own"):
        load_model(saved, quantization_config=asked())


@pytest.mark.parametrize("update", ["prefill:8", "online"])
def test_who_is_on_the_device_goes_with_the_text(update: str, saved: Path) -> None:
    """And the tokens stay. Each layer keeps its number."""
    want_logits, want_tokens = run(load_model(saved))
    model = load_model(saved, quantization_config=asked(gpu_update=update, placement="random"))
    model.generation_config.eos_token_id = None
    before = masks_of(model)
    logits, tokens = run(model)
    after = masks_of(model)
    assert (logits - want_logits).abs().max() <= 1e-4
    assert torch.equal(tokens, want_tokens)
    assert not np.array_equal(before, after)
    assert np.array_equal(before.sum(axis=1), after.sum(axis=1))


@pytest.mark.parametrize("update", [None, "online", "prefill:8"])
def test_a_device_has_some_of_the_experts_that_come_and_go(
    update: str | None, saved: Path, tmp_path: Path
) -> None:
    convert(saved, tmp_path / "packed", quant_method="bf16")
    want_logits, want_tokens = run(load_model(tmp_path / "packed"))
    config = asked(gpu_update=update, placement="random")
    model = load_model(tmp_path / "packed", quantization_config=config, expert_memory=6)
    model.generation_config.eos_token_id = None
    before = masks_of(model)
    logits, tokens = run(model)
    assert (logits - want_logits).abs().max() <= 1e-5 * want_logits.abs().max()
    assert torch.equal(tokens, want_tokens)
    masks = masks_of(model)
    assert before.sum() == masks.sum() == LAYERS * EXPERTS // 2
    assert np.array_equal(before, masks) == (update is None)
    for module, mask in zip(experts_of(model), masks, strict=True):
        streamed = handle_of(module).moe
        assert isinstance(streamed, StreamedMoE)
        assert np.array_equal(streamed.elsewhere, mask)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gpu_experts": -1}, ValueError, "gpu_experts=-1: must be at least 0"),
        ({"gpu_experts": 1.5}, ValueError, "gpu_experts=1.5: a share must be 0..1"),
        ({"gpu_experts": float("nan")}, ValueError, "gpu_experts=nan: a share must be 0..1"),
        ({"gpu_experts": "many"}, ValueError, "'many' is no memory: must be bytes, as 8GiB"),
        ({"gpu_experts": "8"}, ValueError, "'8' is no memory: must be bytes, as 8GiB"),
        ({"gpu_experts": True}, TypeError, "gpu_experts=True: must be an int, of each layer"),
        ({"gpu_experts": [1]}, TypeError, r"gpu_experts=\[1\]: must be an int"),
        ({"gpu_experts": None}, ValueError, "for gpu_experts or placement: give one"),
        ({"gpu_experts": None, "placement": "random"}, ValueError, "say how many with gpu_experts"),
        ({"placement": "frequency"}, ValueError, "'frequency' needs statistics: name their file"),
        ({"placement": "optimal"}, ValueError, "'optimal' needs statistics"),
        ({"gpu_update": "daily"}, ValueError, "update 'daily': must be prefill"),
        (
            {"gpu_update": "online", "load_gpu_experts": False},
            ValueError,
            "gpu_update='online': .*leave load_gpu_experts=True",
        ),
        (
            {"gpu_experts": None, "device": None, "gpu_update": "online"},
            ValueError,
            "gpu_update are for gpu_experts or placement",
        ),
        ({"device": "nowhere"}, ValueError, "device='nowhere': "),
    ],
)
def test_options_that_mean_nothing_are_refused_at_once(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        asked(**options)


def test_what_does_not_fit_the_model_is_refused_before_it_is_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktk.integration.transformers.packing.ModulePacker.add", None)
    write_masks(tmp_path / "masks.pt", np.ones((LAYERS, EXPERTS + 1), bool))
    write_statistics(tmp_path / "stats.pt", np.ones((1, LAYERS + 1, EXPERTS), np.int64))
    torch.save({"gpu_expert_masks": torch.ones(LAYERS, EXPERTS)}, tmp_path / "float.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    masks, stats = str(tmp_path / "masks.pt"), str(tmp_path / "stats.pt")
    none = {"gpu_experts": None}
    for options, error, text in (
        ({"gpu_experts": 9}, ValueError, "9 experts of a layer on the GPU: must be 0..8"),
        ({**none, "placement": masks}, ValueError, r"masks.pt: masks are bool \(2, 9\): must be"),
        ({"placement": masks}, ValueError, "masks.pt says which experts: leave gpu_experts out"),
        ({"placement": stats}, ValueError, r"stats.pt: statistics are of \(3, 8\)"),
        ({**none, "placement": tmp_path / "float.pt"}, CheckpointError, "is float32"),
        ({"placement": tmp_path / "junk.pt"}, CheckpointError, "no file of torch.save"),
        ({"placement": "unifrom"}, ValueError, "must be uniform, .* there is no such file"),
    ):
        with pytest.raises(error, match=text):
            load_model(saved, quantization_config=asked(**options))
    write_statistics(tmp_path / "stats.pt", np.ones((1, LAYERS, EXPERTS), np.int64))
    with pytest.raises(ValueError, match="stats.pt has statistics: say how many"):
        load_model(saved, quantization_config=asked(**none, placement=stats))


@pytest.mark.skipif(accelerator() is not None, reason="there is an accelerator")
def test_a_device_that_is_not_there_is_an_error(saved: Path) -> None:
    with pytest.raises(ValueError, match='finds no accelerator here; device="cpu" tries it'):
        load_model(saved, quantization_config=asked(device=None))
    with pytest.raises(ValueError, match="device='cuda:1': torch .* finds no accelerator here"):
        load_model(saved, quantization_config=asked(device="cuda:1"))


def test_a_device_without_memory_says_what_it_lacks(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    make = DeviceExperts._new

    def without(self: DeviceExperts, count: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", full)
            return make(self, count)

    monkeypatch.setattr(DeviceExperts, "_new", without)
    with pytest.raises(BackendError, match=r"cpu: no memory for 4 experts of 36864 bytes"):
        load_model(saved, quantization_config=asked())


def test_copies_share_the_devices_experts(saved: Path) -> None:
    model = load_model(saved, quantization_config=asked())
    same = copy.deepcopy(model)
    for one, other in zip(experts_of(model), experts_of(same), strict=True):
        assert isinstance(handle_of(one).hybrid, HybridMoE)
        assert handle_of(one) is handle_of(other)
    assert torch.equal(run(model)[0], run(same)[0])
