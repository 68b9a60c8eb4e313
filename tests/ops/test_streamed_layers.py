"""All layers over one pool of slots: their memory stays below the limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ktk.checkpoint.packed import write_layer
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.ops.streamed_layers import StreamedLayers
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.reader import PackedReader
from make.cases import pack_all, random_experts
from make.children import run_python

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 4, 64, 1024, 768, 4
LIMIT, SLACK = 96 << 20, 256 << 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert, 64 times in each layer."""
    folder = tmp_path_factory.mktemp("layers")
    one = MoESpec(1, HIDDEN, INNER, "int8")
    span = np.asarray(pack_all(one, random_experts(one, 1)).spans)[0]
    for layer in range(LAYERS):
        write_layer(folder, MoESpec(EXPERTS, HIDDEN, INNER, "int8"), layer, [span] * EXPERTS)
    return folder


RUN = """
import sys
from pathlib import Path
import numpy as np
from ktk.ops.moe import MoE
from ktk.ops.streamed_layers import StreamedLayers
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.reader import PackedReader

def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) * 1024

folder, limit, layers, experts, hidden, top_k = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)

def call(layer, tokens):
    x = rng.standard_normal((tokens, hidden), np.float32)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    layer(x, ids, np.full(ids.shape, 0.25, np.float32))

call(MoE.load(folder, 0), 256)  # what code and threads take
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the most
numbers = range(layers)
streamed = StreamedLayers(
    PackedReader(folder, numbers), numbers, ExpertMemory(f"{limit}B"), top_k
)
for tokens in (1, 1, 1, 1024, 1, 1, 1, 300, 1):
    for number in numbers:
        call(streamed[number], tokens)
counted = streamed.slots.counters()
assert counted.evictions > 0
print(memory("VmHWM") - before, counted.read_bytes)
"""


def test_memory_stays_below_the_limit_whatever_is_read(directory: Path) -> None:
    sizes = (LAYERS, EXPERTS, HIDDEN, TOP_K)
    printed = run_python(RUN, str(directory), str(LIMIT), *map(str, sizes))
    most, read = map(int, printed.split()[-2:])
    whole = LAYERS * EXPERTS * MoESpec(EXPERTS, HIDDEN, INNER, "int8").layout.expert_bytes
    assert whole > LIMIT + SLACK  # or all of them would pass
    assert read > whole
    assert most <= LIMIT + SLACK


def test_layers_are_found_by_their_numbers_and_say_what_they_read(directory: Path) -> None:
    numbers = (1, 3)
    layers = StreamedLayers(
        PackedReader(directory, numbers), numbers, ExpertMemory("25%"), TOP_K, where=directory
    )
    assert layers[3].layer == 1
    assert layers[3].where == str(directory)
    assert (layers.room.capacity, layers.room.num_experts) == (EXPERTS // 2, 2 * EXPERTS)
    with pytest.raises(KeyError):
        layers[0]
    layers.slots.close()
