"""Run Python in a virtual machine with two NUMA nodes: python tests/numa/run.py -- -m pytest
tests/machine/test_numa.py

qemu emulates four AVX2 CPUs, so neither KVM nor a NUMA machine is needed. The guest's root is this
machine's, by virtio-9p and read-only under a tmpfs overlay: the interpreter that runs this file,
its packages and this tree are there under the same paths, and what the guest writes is gone with
it. Kernel and busybox are Debian's packages, unpacked into a cache folder, never installed. Exit
code: the guest command's, 124 past the time limit.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
# What the mounts of INIT need; what these depend on follows by itself.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
MODULE_FOLDERS = r"/(?:fs/(?:9p|netfs|fscache|overlayfs)|net/9p|drivers/virtio)/"
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev && mount -t proc proc /proc
exec </dev/null >/dev/ttyS0 2>&1
stty -F /dev/ttyS0 -opost
stop() { echo "$*"; poweroff -f; }
for module in /modules/*; do insmod $module || stop $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=512000,ro host /host || stop 9p
mount -t tmpfs tmpfs /writes && mkdir /writes/upper /writes/work
mount -t overlay -o lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work root /root \\
    || stop overlay
mount -t proc proc /root/proc && mount -t sysfs sys /root/sys && mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/shm && mount -t tmpfs tmpfs /root/dev/shm
# Or every test would be skipped, and nothing said.
test -d /root/sys/devices/system/node/node1 || stop the guest has one NUMA node
grep -qw avx2 /proc/cpuinfo || stop the guest has no AVX2: take qemu 7.2 or newer
chroot /root /bin/sh -c "$(cat /command)"
echo $? >/dev/ttyS1
poweroff -f
"""


def need_qemu(install: bool) -> None:
    """Exit with the line that helps, or install the package where asked to and allowed to."""
    if shutil.which(QEMU) is None:
        line = ["apt-get", "install", "-y", "--no-install-recommends", "qemu-system-x86"]
        if not install or os.geteuid() != 0:
            sys.exit(f"no {QEMU}: run as root: {shlex.join(line)}")
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def download(name: str, folder: Path) -> tarfile.TarFile:
    """The files of a Debian package; the kernel's meta package stands for its newest version."""
    if name == "linux-image-amd64":
        depends = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True)
        found = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
        name = found[1] if found else name
    quiet = ["-qq", "-o", "APT::Sandbox::User=root"]
    if subprocess.run(["apt-get", *quiet, "download", name], cwd=folder).returncode:
        sys.exit(f"cannot download the Debian package {name}: run as root: apt-get update")
    (deb,) = folder.glob(f"{name}_*.deb")
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True)
    return tarfile.open(fileobj=io.BytesIO(data.stdout))


def unpack(guest: Path) -> None:
    """Into ``guest``, whole or not at all: vmlinuz,
    busybox and the modules that might be needed.
    """
    guest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=guest.parent) as folder:
        taken = Path(folder, "guest")
        taken.mkdir()
        for name in ("busybox-static", "linux-image-amd64"):
            with download(name, Path(folder)) as files:
                for member in filter(tarfile.TarInfo.isfile, files):
                    path, reader = member.name, files.extractfile(member)
                    module = re.search(MODULE_FOLDERS + r"([\w-]+)\.ko(\.xz)?$", path)
                    other = re.search(r"/bin/(busybox)$|/boot/(vmlinuz)-", path)
                    if reader and module:
                        data = lzma.decompress(reader.read()) if module[2] else reader.read()
                        (taken / f"{module[1].replace('-', '_')}.ko").write_bytes(data)
                    elif reader and other:
                        (taken / (other[1] or other[2])).write_bytes(reader.read())
        taken.rename(guest)


def modules_in_order(guest: Path, names: tuple[str, ...]) -> list[str]:
    """``names`` and what they depend on, dependencies first.

    Source: the modinfo section's depends=.
    """
    order: list[str] = []
    for name in names:
        found = re.search(rb"\0depends=([^\0]*)\0", (guest / f"{name}.ko").read_bytes())
        depends = found[1].decode().replace("-", "_").split(",") if found else []
        below = (n for n in depends if (guest / f"{n}.ko").exists())
        order += [n for n in (*modules_in_order(guest, tuple(below)), name) if n not in order]
    return order


def initramfs(files: dict[str, bytes]) -> bytes:
    """A cpio archive, newc format, of executable files, their folders and the mount points."""
    entries = dict.fromkeys(("bin", "modules", "dev", "proc", "host", "writes", "root"), b"")
    archive = b""
    for number, (name, data) in enumerate({**entries, **files, "TRAILER!!!": b""}.items(), 1):
        mode = 0o040755 if name in entries else 0o100755
        # inode, mode, uid, gid, links, mtime, size, device and rdevice (4), name size, checksum
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        archive += head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
    return archive


def run(command: str, guest: Path, node_mib: int, time_limit: float) -> int:
    """Boot, run ``command`` by the guest's /bin/sh, return its exit code."""
    order = enumerate(modules_in_order(guest, MODULES))
    files = {f"modules/{i:02}-{name}": (guest / f"{name}.ko").read_bytes() for i, name in order}
    files |= {"bin/busybox": (guest / "busybox").read_bytes()}
    files |= {"init": INIT.encode(), "command": command.encode()}
    with tempfile.TemporaryDirectory() as folder:
        initrd, code = Path(folder, "initrd"), Path(folder, "code")
        initrd.write_bytes(initramfs(files))
        # setpriv: no machine outlives this process, however it ends.
        line = ["setpriv", "--pdeathsig", "KILL", "nice", QEMU, "-nodefaults", "-no-reboot"]
        line += ["-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-display", "none"]
        line += ["-smp", "4,sockets=2,cores=2,threads=1", "-m", f"{2 * node_mib}M"]
        for node, cpus in enumerate(("0-1", "2-3")):
            line += ["-object", f"memory-backend-ram,id=memory{node},size={node_mib}M"]
            line += ["-numa", f"node,nodeid={node},cpus={cpus},memdev=memory{node}"]
        line += ["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"]
        line += ["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"]
        line += ["-serial", "stdio", "-serial", f"file:{code}"]
        line += ["-kernel", str(guest / "vmlinuz"), "-initrd", str(initrd)]
        # Nothing watches for stalls: where the host is busy the guest stalls as it will.
        quiet = "quiet nowatchdog rcupdate.rcu_cpu_stall_suppress=1"
        line += ["-append", f"console=ttyS0 {quiet} panic=-1 random.trust_cpu=on"]
        code.touch()
        try:
            subprocess.run(line, stdin=subprocess.DEVNULL, timeout=time_limit)
        except subprocess.TimeoutExpired:
            print(f"the virtual machine ran past its limit of {time_limit:g} s", file=sys.stderr)
            return 124
        said = code.read_text().strip()
        return int(said) if said else sys.exit("the virtual machine stopped before the command did")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options] -- ARGUMENT...")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/numa", help="keeps 12 MB")
    parser.add_argument("--node-mib", type=int, default=1536, help="memory of each node, MiB")
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds")
    parser.add_argument("--install", action="store_true", help="apt-get install qemu if missing")
    parser.add_argument("arguments", nargs="+", help="what python shall run")
    options = parser.parse_args()
    need_qemu(options.install)
    guest = options.cache / "guest"
    if not guest.exists():
        unpack(guest)
    # PATH for tests that start programs; no bytecode, which would only fill the guest's memory.
    env = {"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONPATH": str(ROOT)}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1"}
    words = [f"{k}={v}" for k, v in env.items()]
    command = shlex.join(["env", *words, sys.executable, *options.arguments])
    command = f"cd {shlex.quote(str(ROOT))} && exec {command}"
    return run(command, guest, options.node_mib, options.time_limit)


if __name__ == "__main__":
    sys.exit(main())
