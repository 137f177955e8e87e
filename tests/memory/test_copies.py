# SPDX-License-Identifier: Apache-2.0
"""Copies of guest memory: the same slots and bytes, and nobody sees the other's stores."""

import gc
import mmap
import os
import resource
from pathlib import Path

import numpy as np
import pytest

import kvmmu
from kvmmu import GuestMemory, Vm
from kvmmu.memory import _mapping, saved_bytes
from kvmmu.memory._mapping import PrivateFile, PrivateMapping, put_pages
from kvmmu.memory.saved_bytes import SavedBytes, copies_of

PAGE = 4096


def file_of(tmp_path, pages=600):
    path = tmp_path / "memory.raw"
    path.write_bytes(np.random.default_rng(1).integers(0, 256, pages * PAGE, np.uint8).tobytes())
    return path



def mapped_zeros(size):
    """Memory that is mapped as large memory is."""
    large, _mapping.LARGE = _mapping.LARGE, size
    try:
        return GuestMemory(size)
    finally:
        _mapping.LARGE = large


def kinds(tmp_path):
    """Memory of every kind, by name."""
    path = file_of(tmp_path)
    several = GuestMemory.from_slots([(0, 8 * PAGE), (1 << 30, bytearray(b"x" * 3 * PAGE)), (1 << 40, b"read-only" * 1000)])
    several.add_slot(1 << 20, 4 * PAGE, readonly=True)
    random = np.random.default_rng(2)
    return {"zeros": GuestMemory(1 << 16), "large": GuestMemory(1 << 23), "several": several,
            "mapped zeros": mapped_zeros(1 << 21),
            "pages": GuestMemory.from_pages([0, 5 * PAGE, 6 * PAGE], random.integers(0, 256, (3, PAGE), np.uint8)),
            "image": kvmmu.open_image(path, format="raw").memory, "empty": GuestMemory.from_slots([])}


def no_scan(*arguments):
    raise OSError("an older kernel")


@pytest.fixture(params=["pagemap", "older pagemap", "no pagemap", "no memfd"])
def system(request, monkeypatch):
    """Linux, one without PAGEMAP_SCAN, a system that does not tell which pages were written, one without files in memory."""
    if request.param == "older pagemap":
        monkeypatch.setattr(saved_bytes, "_scan", no_scan)
    elif request.param != "pagemap":
        monkeypatch.setattr(saved_bytes, "_written", lambda address, count, over_file: None)
    if request.param == "no memfd":
        monkeypatch.delattr(os, "memfd_create", raising=False)


def spread(mem):
    """Addresses of words all over a memory that can be written."""
    return [gpa + offset for gpa, size, readonly in mem.slots if not readonly
            for offset in {0, size // 2 & -8, size - 8, min(size - 8, 5 * PAGE + 16)}]


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("name", ["zeros", "large", "mapped zeros", "several", "pages", "image", "empty"])
def test_copies_have_bytes_of_their_own(tmp_path, name):
    mem = kinds(tmp_path)[name]
    for gpa in spread(mem):
        mem.write_u64(gpa, gpa ^ 0x1234)
    copies = [mem.copy()]
    copies += [copies[0].copy(), copies[0].copy().copy()]
    for i, copy in enumerate(copies):
        assert copy.slots == mem.slots
        for gpa, size, _ in mem.slots:
            assert copy.read(gpa, size) == mem.read(gpa, size)
        for gpa in spread(copy):
            copy.write_u64(gpa, i)
    for gpa in spread(mem):
        assert [mem.read_u64(gpa), *(copy.read_u64(gpa) for copy in copies)] == [gpa ^ 0x1234, 0, 1, 2]
    for gpa in spread(mem):
        mem.write_u64(gpa, 77)
    assert [copies[1].read_u64(gpa) for gpa in spread(mem)] == [1] * len(spread(mem))
    copies[0].add_slot(1 << 45, PAGE)
    assert len(mem.slots) == len(copies[0].slots) - 1


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("name", ["zeros", "large", "mapped zeros", "several", "pages", "image"])
def test_saved_bytes_come_back(tmp_path, name):
    """Those that were there, zeros or the file's where nothing was written before, and none that are equal are touched."""
    mem = kinds(tmp_path)[name]
    first, *others = spread(mem)
    mem.write_u64(first, 0x5AFE)
    before = [mem.read(gpa, size) for gpa, size, _ in mem.slots]
    table = [piece for gpa, size, readonly in mem.slots for _, _, piece in mem._pieces(gpa, size)]
    saved = [SavedBytes(piece) for piece in table]
    for gpa in (first, *others):
        mem.write_u64(gpa, 0xBAD)
    assert [mem.read(gpa, size) for gpa, size, _ in mem.slots] != before
    for each in saved:
        each.restore()
    assert [mem.read(gpa, size) for gpa, size, _ in mem.slots] == before


def test_read_only_buffers(tmp_path):
    """A copy of one is read-only and does not change with it; a file that is mapped read-only is shared."""
    buffer = bytearray(b"a" * PAGE)
    mem = GuestMemory(memoryview(buffer).toreadonly())
    with open(file_of(tmp_path), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mem.add_slot(1 << 20, mapped)
        copy = mem.copy()
        buffer[0] = ord("b")
        assert (mem.read(0, 1), copy.read(0, 1)) == (b"b", b"a")
        assert copy.slots == mem.slots
        with pytest.raises(ValueError, match="read-only"):
            copy.write(0, b"x")
        assert copy.read(1 << 20, 100) == mapped[:100]
        with pytest.raises(BufferError):
            mapped.close()
        del mem, copy
        gc.collect()


def test_a_copy_of_an_image_takes_what_was_changed(tmp_path):
    """The file is mapped again: a terabyte is copied at once, and the pages that were written go with it."""
    path = tmp_path / "huge.raw"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    mem = kvmmu.open_image(path, format="raw").memory
    mem.write_u64(1 << 39, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    copy = mem.copy()
    assert copy.read_u64(1 << 39) == 1
    copy.write_u64(1 << 38, 2)
    again = copy.copy()
    assert (mem.read_u64(1 << 38), again.read_u64(1 << 38), again.read_u64(1 << 39)) == (0, 2, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 6 << 20          # KiB: the page map, not the memory


def test_a_copy_of_large_memory_takes_what_was_written():
    """64 GiB of which three pages were written: neither the copy nor a snapshot is larger than that."""
    mem = GuestMemory(1 << 36)
    for gpa in (0, 1 << 33, (1 << 36) - 8):
        mem.write_u64(gpa, gpa + 1)
    snapshot = Vm(mem).snapshot()
    assert 3 * PAGE <= snapshot.nbytes <= 64 * PAGE     # the kernel may give more than a page at once
    copy = mem.copy()
    assert [copy.read_u64(gpa) for gpa in (0, 1 << 33, (1 << 36) - 8)] == [1, (1 << 33) + 1, (1 << 36) - 7]
    assert copy.read_u64(1 << 30) == 0


def test_copies_of_copies_share_a_file():
    """The first copy of many pages goes to one file; every further one is a mapping of it. No descriptor is left open."""
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    mem = GuestMemory(4 << 20)
    mem.write(0, np.random.default_rng(3).integers(0, 256, 4 << 20, np.uint8).tobytes())
    before = descriptors()
    first = mem.copy()
    assert descriptors() == before + 1
    others = [first.copy() for _ in range(50)]
    assert descriptors() == before + 1
    for i, other in enumerate(others):
        other.write_u64(8 * i, i)
    base = saved_bytes._Base(next(iter(others[7]._pieces(0, 4 << 20)))[2])
    assert isinstance(base.file, PrivateFile)
    assert base.written().size == 1
    assert others[7].read(64, 1 << 20) == mem.read(64, 1 << 20)
    del first, others, other, base
    gc.collect()
    assert descriptors() == before


def test_no_descriptors_left(tmp_path):
    """Memory is copied all the same, to memory."""
    mem = GuestMemory(4 << 20)
    mem.write(0, b"x" * (4 << 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(3, min(used - 1, soft)), hard))
    held = []
    try:
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        copy = mem.copy()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert copy.read(0, 4 << 20) == mem.read(0, 4 << 20)


def test_memory_of_callbacks_is_not_copied():
    mem = GuestMemory.from_callbacks(lambda gpas: np.zeros((gpas.size, PAGE), np.uint8))
    with pytest.raises(ValueError, match="callbacks has no bytes of its own"):
        mem.copy()
    with pytest.raises(RuntimeError, match="has no slots"):
        GuestMemory.__new__(GuestMemory).copy()


def test_private_files(tmp_path):
    """Mappings of one file do not see each other's stores, outlive it, and zeros are behind its end."""
    path = Path(tmp_path / "three")
    path.write_bytes(b"a" * 5000)
    with open(path, "rb") as file:
        private = PrivateFile(file.fileno())
    path.unlink()
    one, two = private.map(), private.map()
    view = np.frombuffer(one, np.uint8)
    view[0] = 7
    assert memoryview(two)[:2].tobytes() == b"aa"
    assert private.read(4998, 6) == b"aa\0\0\0\0"
    assert (len(one), private.size, one.file is private) == (5000, 5000, True)
    del private, one, two
    gc.collect()
    assert view[:2].tolist() == [7, ord("a")]
    with pytest.raises(TypeError, match="made by"):
        PrivateMapping()
    with pytest.raises(OSError, match="Bad file descriptor"):
        PrivateFile(1 << 20)
    with open(path, "wb") as file, pytest.raises(ValueError, match="empty"):
        PrivateFile(file.fileno())
    with pytest.raises(RuntimeError, match="no file"):
        PrivateFile.__new__(PrivateFile).map()


def test_put_pages_checks_its_numbers():
    data, pages = np.zeros(2 * PAGE, np.uint8), np.ones((1, PAGE), np.uint8)
    with pytest.raises(ValueError, match="numbers: want less than 2, got 2"):
        put_pages(data, np.array([2], np.uint64), pages)
    with pytest.raises(ValueError, match="pages: want shape"):
        put_pages(data, np.array([0, 1], np.uint64), pages)
    put_pages(data, np.array([1], np.uint64), pages)
    assert data.sum() == PAGE
    assert copies_of([data])[0].tolist() == data.tolist()
