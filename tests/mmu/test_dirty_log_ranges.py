# SPDX-License-Identifier: Apache-2.0
"""A part of a dirty log is cleared and protected again (KVM_CLEAR_DIRTY_LOG), the rest of it and other slots are not.

Source: KVM's API documentation, "KVM_CLEAR_DIRTY_LOG" and "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2" with KVM_DIRTY_LOG_INITIALLY_SET.
"""

import numpy as np
import pytest
from builders import PageTables

from kvmmu import Access, GuestMemory, Host, Vm

PAGE, MB2, OTHER = 0x1000, 2 << 20, 1 << 30
SIZE = 8 * MB2
HOSTS = {
    "ept": Host(tdp="ept"), "ept with pml": Host(tdp="ept", pml=True), "ept without ad": Host(tdp="ept", ad=False),
    "ept, lazy split": Host(tdp="ept", eager_split=False), "npt": Host(tdp="npt", maxphyaddr=48), "shadow": Host(tdp=None),
}


def machine(host, backing):
    """A guest whose addresses are guest-physical ones, in two slots."""
    mem = GuestMemory(SIZE)
    mem.add_slot(OTHER, SIZE)
    vm = Vm(mem, host=HOSTS[host], backing=backing)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    return vm, vcpu


def write(vcpu, *frames):
    r = vcpu.access(np.array(frames, np.uint64) * np.uint64(PAGE), int(Access.WRITE))
    assert r.gpa.tolist() == [frame * PAGE for frame in frames]


def log(vm, gpa=0):
    return vm.get_dirty_log(gpa, clear=False).tolist()


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_range_and_pages_of_it(host, backing):
    """What is cleared is logged again at the next write, whatever the TLB had; what is not stays in the log."""
    vm, vcpu = machine(host, backing)
    frames = [0, 5, 6, 7, 62, 63, 64, 65, 127, 128, 511, 512, 513, SIZE // PAGE - 1]
    vm.set_dirty_log(0)
    vm.set_dirty_log(OTHER)
    write(vcpu, *frames, OTHER // PAGE, OTHER // PAGE + 6)
    assert log(vm) == frames
    for first, count, pages in ((6, 1, None), (62, 4, None), (0, 512, [5, 511]), (512, 0, None), (0, SIZE // PAGE, None)):
        before = log(vm)
        vm.clear_dirty_log(first * PAGE, count * PAGE, None if pages is None else np.array(pages, np.uint64))
        gone = [frame for frame in before if first <= frame < first + count and (pages is None or frame in pages)]
        assert log(vm) == [frame for frame in before if frame not in gone]
        assert log(vm, OTHER) == [OTHER // PAGE, OTHER // PAGE + 6], "another slot"
        assert vm.audit() == []
        if gone:
            write(vcpu, *gone)
        assert log(vm) == before
    vm.clear_dirty_log(OTHER, PAGE)
    assert (log(vm), log(vm, OTHER)) == (frames, [OTHER // PAGE + 6])


@pytest.mark.parametrize("host", [name for name in HOSTS if name != "ept with pml"])
def test_only_what_is_cleared_is_protected(host):
    """A write to a page that is still in the log needs no exit; to one that was cleared it does."""
    vm, vcpu = machine(host, "4k")
    vm.set_dirty_log(0)
    write(vcpu, 5, 6, 70)
    vm.clear_dirty_log(6 * PAGE, 100 * PAGE, np.array([6], np.uint64))
    vcpu.vm_enter()
    for frame, exits in ((5, 0), (70, 0), (6, 1)):
        before = vm.stats["exits"]
        write(vcpu, frame)
        assert vm.stats["exits"] - before == exits, frame


@pytest.mark.parametrize("host", HOSTS)
def test_a_log_that_begins_full(host):
    """Nothing is protected and no huge page split until a part is cleared; then those of the part are, and others not."""
    vm, vcpu = machine(host, "2m")
    write(vcpu, *range(0, SIZE // PAGE, 512))
    huge = vm.stats["pages_2m"]
    assert huge >= SIZE // MB2
    vm.set_dirty_log(0, initially_set=True)
    assert log(vm) == list(range(SIZE // PAGE))
    assert vm.stats["pages_2m"] == huge
    before = vm.stats["exits"]
    write(vcpu, 513, 1025)
    assert vm.stats["exits"] == before, "nothing was protected"
    vm.clear_dirty_log(MB2 + PAGE, 64 * PAGE)
    assert log(vm) == [frame for frame in range(SIZE // PAGE) if not 513 <= frame < 513 + 64]
    assert vm.audit() == []
    write(vcpu, 513, 520, 1025)
    assert {513, 520, 1025} <= set(log(vm))
    assert 521 not in log(vm)
    split = huge - vm.stats["pages_2m"]
    assert split == 1, "the huge page of the range alone"
    vm.get_dirty_log(0)
    write(vcpu, 3, 1536)
    assert log(vm) == [3, 1536]
    assert vm.audit() == []


def test_a_word_of_the_log_over_two_huge_pages():
    """64 pages that lie on both sides of an edge of 2M: both are split or protected."""
    for name in ("ept", "ept, lazy split", "shadow"):
        vm, vcpu = machine(name, "2m")
        mem_gpa = 4 * MB2 - 32 * PAGE
        write(vcpu, *range(0, SIZE // PAGE, 512))
        vm.set_dirty_log(0, initially_set=True)
        vm.clear_dirty_log(mem_gpa, 64 * PAGE)
        assert {3 * 512 + 500, 4 * 512 + 10}.isdisjoint(log(vm))
        write(vcpu, 3 * 512 + 500, 4 * 512 + 10)
        assert {3 * 512 + 500, 4 * 512 + 10} <= set(log(vm))
        assert vm.audit() == []


def test_page_tables_that_a_shadow_protects_stay_protected():
    """Clearing the log of a shadowed table's frame does not let the guest write it unseen."""
    mem = GuestMemory(SIZE)
    tables = PageTables("4l")
    tables.map(0x400000, 0x5000)
    tables.map(0x401000, tables.entry_gpa(0x400000, 1) & -PAGE)
    for gpa, page in zip(*tables.pages(), strict=True):
        mem.write(int(gpa), page.tobytes())
    vm = Vm(mem, host=Host(tdp=None), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**tables.regs())
    vm.set_dirty_log(0)
    vcpu.access(0x400000, Access.WRITE)
    vm.clear_dirty_log(0, SIZE)
    entry = tables.entry_gpa(0x400000, 1)
    vcpu.store(0x401000 + entry % PAGE, (0x6067).to_bytes(8, "little"))
    assert entry // PAGE in log(vm)
    vcpu.invlpg(0x400000)
    assert vcpu.access(0x400000).gpa == 0x6000


def test_errors_of_the_caller():
    vm, _ = machine("ept", "4k")
    with pytest.raises(ValueError, match="no dirty log"):
        vm.clear_dirty_log(0, PAGE)
    vm.set_dirty_log(0)
    for gpa, size in ((1, PAGE), (0, PAGE + 1), (0, SIZE + PAGE), (SIZE - PAGE, 2 * PAGE)):
        with pytest.raises(ValueError, match="whole pages of the slot|not a multiple"):
            vm.clear_dirty_log(gpa, size)
    for pages in ([4], [8], [1 << 40]):
        with pytest.raises(ValueError, match="pages: want frames"):
            vm.clear_dirty_log(5 * PAGE, 3 * PAGE, np.array(pages, np.uint64))
    with pytest.raises((TypeError, ValueError), match="pages: want"):
        vm.clear_dirty_log(0, PAGE, [0])
    for gpa in (-PAGE, 1 << 52, True, 0.5):
        with pytest.raises((TypeError, ValueError), match="gpa: want"):
            vm.clear_dirty_log(gpa, PAGE)
    with pytest.raises(ValueError, match="no slot|hole|slot"):
        vm.clear_dirty_log(SIZE * 2, PAGE)
