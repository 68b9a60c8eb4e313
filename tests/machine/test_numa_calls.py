"""ktk.machine.numa on any machine: what it asks of the kernel needs no second node."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import numpy as np
import pytest

from ktk.machine import cpu, numa
from ktk.machine.memory import aligned_buffer, node_of_pages

PAGE = mmap.PAGESIZE


def refusal() -> str | None:
    """Why this kernel, or the container around it, answers no NUMA call."""
    array = aligned_buffer(PAGE)
    try:
        numa.page_nodes(array.ctypes.data, PAGE)
        numa.bind(array.ctypes.data, PAGE, cpu.numa_nodes()[0].id)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise  # a fault of ours, not a refusal
        return str(error)
    except ValueError as error:
        return str(error)
    return None


calls = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))


def small_pages(num_pages: int) -> np.ndarray:
    """uint8 (num_pages * PAGE,), untouched, each page faulted by itself."""
    memory = mmap.mmap(-1, num_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


@calls
def test_touched_pages_have_a_node_and_others_an_error() -> None:
    array = small_pages(8)
    array[[2 * PAGE, 5 * PAGE + 7]] = 1
    nodes = node_of_pages(array)
    present = {node.id for node in cpu.numa_nodes()}
    assert [int(n) in present for n in nodes] == [page in (2, 5) for page in range(8)]
    assert set(nodes[nodes < 0].tolist()) <= {-errno.ENOENT, -errno.EFAULT}
    assert nodes.dtype == np.int32


@calls
def test_a_page_that_was_only_read_has_no_node() -> None:
    array = small_pages(1)
    assert array[0] == 0
    assert node_of_pages(array).tolist() == [-errno.EFAULT]


@calls
@pytest.mark.parametrize(
    ("begin", "size", "pages"),
    [(0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1), (PAGE - 1, 2, 2), (1, PAGE, 2), (0, 3 * PAGE, 3)],
)
def test_a_range_has_the_pages_it_touches(begin: int, size: int, pages: int) -> None:
    array = aligned_buffer(4 * PAGE)
    array[:] = 1
    assert len(numa.page_nodes(array.ctypes.data + begin, size)) == pages
    assert len(node_of_pages(array[begin : begin + size])) == pages


def test_an_array_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        node_of_pages(np.zeros((4, 4))[:, ::2])


@calls
@pytest.mark.parametrize("touch_first", [False, True])
def test_bound_memory_is_on_its_node_and_keeps_its_bytes(touch_first: bool) -> None:
    for node in cpu.numa_nodes():
        array = small_pages(6)
        if touch_first:
            array[:] = np.arange(len(array)) % 251
        numa.bind(array.ctypes.data + PAGE, 4 * PAGE, node.id)
        if not touch_first:
            array[:] = np.arange(len(array)) % 251
        assert set(node_of_pages(array[PAGE : 5 * PAGE])) == {node.id}
        assert np.array_equal(array, np.arange(len(array)) % 251)


@calls
def test_binding_to_a_node_that_is_not_there_is_an_error_with_its_number() -> None:
    array = small_pages(1)
    absent = max(node.id for node in cpu.numa_nodes()) + 1
    for node in (absent, 63, 64, 1023):
        with pytest.raises(OSError, match=f"4096 bytes to NUMA node {node}") as raised:
            numa.bind(array.ctypes.data, PAGE, node)
        assert raised.value.errno == errno.EINVAL


@calls
def test_binding_memory_that_is_not_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="binding") as raised:
        numa.bind(PAGE, PAGE, cpu.numa_nodes()[0].id)  # below vm.mmap_min_addr
    assert raised.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("address", "num_bytes", "node", "name"),
    [
        (1, PAGE, 0, "address=0x1"),
        (PAGE, 0, 0, "num_bytes=0"),
        (PAGE, PAGE, -1, "node=-1"),
        (PAGE, PAGE, 1024, "node=1024"),
    ],
)
def test_bind_names_the_argument_that_is_out_of_range(
    address: int, num_bytes: int, node: int, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        numa.bind(address, num_bytes, node)


def test_other_systems_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    array = aligned_buffer(PAGE)
    for call in (numa.page_nodes, lambda *range_: numa.bind(*range_, 0)):
        with pytest.raises(ValueError, match="darwin"):
            call(array.ctypes.data, PAGE)


def test_each_allowed_cpu_is_on_the_node_that_lists_it() -> None:
    listed = {number: node.id for node in cpu.numa_nodes() for number in node.cpus}
    for number in cpu.allowed_cpus():
        assert numa.node_of_cpu(number) == listed[number]


def test_the_node_of_a_cpu_on_made_up_machines(tmp_path: Path) -> None:
    for folder in ("cpu0", "cpu3/node12", "cpu3/node_power"):
        (tmp_path / "sys/devices/system/cpu" / folder).mkdir(parents=True, exist_ok=True)
    assert numa.node_of_cpu(0, tmp_path) == 0  # a kernel that tells no nodes
    assert numa.node_of_cpu(3, tmp_path) == 12
    with pytest.raises(ValueError, match="cpu=1"):
        numa.node_of_cpu(1, tmp_path)
