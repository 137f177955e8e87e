# SPDX-License-Identifier: Apache-2.0
"""Threads, forks and signals beside a machine that runs: calls take turns, and each finds the machine whole."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from children import outcome

from kvmmu import INVALID_GPA, Access, Accesses, Ept, GuestMemory, Host, Npt, Status, Tracepoints, Vcpu, Vm
from kvmmu.memory._lock import MachineLock
from kvmmu.walk.batch._job import set_rows_of_thread

PAGE = 4096
SECONDS = float(os.environ.get("KVMMU_THREAD_SECONDS", "1"))            # of each race
HOSTS = [Host(tdp="ept", pml=True), Host(tdp="npt", maxphyaddr=46), Host(tdp=None, maxphyaddr=46)]
each_host = pytest.mark.parametrize("host", HOSTS, ids=["ept", "npt", "shadow"])


def two_address_spaces(host, pages=256):
    """(vm, vcpu, gva) of a guest with two CR3s, 0x1000 and 0x6000: page i is at 1M + i pages, or at 2M + i pages."""
    mem = GuestMemory(1 << 22)
    for root, to in ((0x1000, 1 << 20), (0x6000, 2 << 20)):
        for at, entry in ((root, root + 0x1067), (root + 0x1000, root + 0x2067), (root + 0x2000, root + 0x3067)):
            mem.write_u64(at, entry)
        entries = (np.arange(pages, dtype=np.uint64) << np.uint64(12)) + np.uint64(to | 0x67)
        mem.write(root + 0x3000, entries.tobytes())
    vm = Vm(mem, host=host, backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    return vm, vcpu, np.tile(np.arange(pages, dtype=np.uint64) << np.uint64(12), 8)


class Beside:
    """Run a function again and again in another thread; its error is raised at the end."""

    def __init__(self, function):
        self.function, self.error, self.rounds, self.stop = function, None, 0, False
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            while not self.stop:
                self.function()
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stop = True
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert self.rounds > 0


def repeat(*functions, seconds=SECONDS):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for function in functions:
            function()


def count_entries(tlb, gva):
    return sum(tlb.lookup(address) is not None for address in np.unique(gva).tolist())


# ---- calls take turns ------------------------------------------------------------------------------------------------------

@each_host
def test_flushes_beside_accesses(host):
    """The TLB has as many entries as it says, and none after a flush."""
    vm, vcpu, gva = two_address_spaces(host)
    with Beside(lambda: vcpu.access(gva)):
        repeat(lambda: vcpu.invpcid(2), lambda: vcpu.invlpg(0x5000), vcpu.tlb.flush, lambda: vcpu.invpcid(1),
               lambda: len(vcpu.tlb), lambda: vcpu.tlb.invlpg(0x3000), lambda: vcpu.tlb.lookup(0x2000), vcpu.vm_enter)
    vcpu.access(gva)
    assert len(vcpu.tlb) == count_entries(vcpu.tlb, gva) == 256
    vcpu.invpcid(2)
    assert len(vcpu.tlb) == count_entries(vcpu.tlb, gva) == 0
    assert vm.audit(True) == []


@each_host
def test_register_loads_beside_accesses(host):
    """Each batch is of one set of registers, from its first row to its last."""
    vm, vcpu, gva = two_address_spaces(host)
    first = (1 << 20) + gva, (2 << 20) + gva, gva

    def access():
        result = vcpu.access(gva)
        assert any(np.array_equal(result.gpa, gpa) for gpa in first), result.gpa

    with Beside(access):
        repeat(lambda: vcpu.mov_cr(3, 0x6000), lambda: vcpu.set_regs(cr3=0x1000), lambda: vcpu.set_regs(cr0=1, cr4=0, efer=0),
               lambda: vcpu.set_regs(cr0=0x80010001, cr3=0x6000, cr4=0x20, efer=0xD00), lambda: vcpu.mov_cr(3, 0x1000))
    assert vm.audit(True) == []


@each_host
def test_nested_entries_beside_accesses(host):
    """A batch runs in L1 or in L2, not in both."""
    vm, vcpu, gva = two_address_spaces(host)
    stage = {"ept": Ept(0x6000 | 0x1E), "npt": Npt(0x6000), None: None}[host.tdp]
    seen = set()

    def access():
        result = vcpu.access(gva)
        first = int(result.gpa[0])
        assert np.array_equal(result.gpa, gva + np.uint64(first)) or set(result.gpa.tolist()) == {INVALID_GPA}
        seen.add(first)

    with Beside(access):
        repeat(lambda: vcpu.enter_nested(stage, cr0=1, cr3=0, cr4=0, efer=0), vcpu.leave_nested)
    assert 1 << 20 in seen
    assert vm.audit() == []


@each_host
def test_the_host_beside_accesses(host):
    """Slots come, go and move; pages are unmapped; logs are read; what one sees is whole."""
    vm, vcpu, gva = two_address_spaces(host)
    other = vm.create_vcpu()
    other.set_regs(cr0=0x80010001, cr3=0x6000, cr4=0x20, efer=0xD00)

    def slots():
        vm.add_slot(1 << 32, PAGE)
        vm.move_slot(1 << 32, 1 << 33)
        vm.delete_slot(1 << 33)
        vm.mem.add_slot(1 << 34, PAGE)
        vm.mem.remove_slot(1 << 34)

    def trace():
        vm.trace = Tracepoints(capacity=100)
        vm.trace.events()
        vm.trace = None

    def log():
        vm.set_dirty_log(0, True)
        vm.get_dirty_log(0)
        vm.set_dirty_log(0, False)

    with Beside(lambda: vcpu.access(gva, Access.WRITE)), Beside(lambda: other.access(gva)):
        repeat(slots, trace, log, lambda: vm.stats, vm.clear_stats, vm.sptes, vm.zap_all, lambda: vm.age(0, 1 << 22),
               lambda: vm.invalidate(1 << 20, 16 * PAGE), lambda: vm.host_write(0x300000, b"12345678"),
               lambda: vm.write_guest_physical(0x300000, b"12345678"), lambda: vm.set_nr_mmu_pages(64), vm.recover_huge_pages)
    result = vcpu.access(gva)
    assert np.array_equal(result.gpa, (1 << 20) + gva)
    assert vm.audit() == []
    assert vm.stats["bugs"] == 0


def test_vcpus_come_and_go_beside_accesses():
    """A vCPU that nobody holds any more leaves a machine that another thread runs."""
    vm, vcpu, gva = two_address_spaces(Host(tdp=None, maxphyaddr=46))

    def other():
        one = vm.create_vcpu()
        one.set_regs(cr0=0x80010001, cr3=0x6000, cr4=0x20, efer=0xD00)
        one.access(gva[:64])
        vm.vcpus.remove(one)

    with Beside(lambda: vcpu.access(gva)):
        repeat(other)
    assert vm.audit(True) == []
    assert vm.vcpus == [vcpu]


def test_a_vcpu_of_its_own_is_made_once():
    """Threads that use a new vCPU at the same time find one machine."""
    for _ in range(20):
        vcpu, seen = Vcpu(GuestMemory(1 << 20)), []
        vcpu.set_regs(cr0=1)

        def use(vcpu=vcpu, seen=seen):
            vcpu.access(0x1000)
            seen.append(vcpu.vm)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [vcpu.vm] * 4 == seen
        assert vcpu.vm.vcpus == [vcpu]
        assert vcpu.vm.audit() == []


# ---- the lock ----------------------------------------------------------------------------------------------------------------

def test_the_lock_is_reentrant_and_is_one_threads():
    lock = MachineLock()
    order = []

    def other():
        with lock:
            order.append("other")

    with lock:
        with lock:
            thread = threading.Thread(target=other)
            thread.start()
            time.sleep(0.05)
            order.append("first")
        time.sleep(0.05)
        order.append("first again")
    thread.join()
    assert order == ["first", "first again", "other"]
    with pytest.raises(RuntimeError, match="not held"):
        lock.__exit__(None, None, None)


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, even where the tests run in the background and inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_soon(seconds):
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_ends_the_wait_for_the_lock():
    lock, taken, end = MachineLock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            end.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    timer = interrupt_soon(0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            lock.__enter__()
    finally:
        end.set()
        thread.join()
        timer.join()
    with lock:
        pass


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("interrupts")
@each_host
def test_ctrl_c_ends_a_batch_between_two_rows(host):
    """The rows before are done, those after are not, and the machine goes on."""
    vm, _, gva = two_address_spaces(host)
    n = 1 << 23
    tlbs = vm.create_vcpu(tlb=((1, 1), (1, 1), (1, 1)))                 # every row walks: seconds
    tlbs.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    many = np.resize(gva, n)
    out = Accesses.empty(n)
    out.gpa[:] = 1
    timer = interrupt_soon(0.15)
    with pytest.raises(KeyboardInterrupt):
        tlbs.access(many, out=out)
    timer.join()
    done = int(np.argmax(out.gpa == 1))
    assert 0 < done < n
    assert np.array_equal(out.gpa[:done], (1 << 20) + many[:done])
    assert set(out.gpa[done:].tolist()) == {1}
    assert tlbs.tlb.hits + tlbs.tlb.misses == done
    assert vm.audit(True) == []
    exits = vm.stats["exits"]
    assert np.array_equal(tlbs.access(many[:1000]).gpa, (1 << 20) + many[:1000])
    assert exits == vm.stats["exits"]


@pytest.mark.usefixtures("interrupts")
def test_a_signal_handler_may_use_the_machine():
    """It runs between two rows; what it changes counts from the next row on."""
    vm, vcpu, gva = two_address_spaces(Host(tdp="ept"))
    seen = []

    def handler(*_):
        seen.append(vcpu.access(0x3000).gpa)
        vm.mem.add_slot(1 << 32, PAGE)
        vcpu.mov_cr(3, 0x6000)

    many, result = np.resize(gva, 1 << 25), Accesses.empty(1 << 25)
    result.gpa[:] = 1
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        vcpu.access(many, out=result)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == [0x103000]
    at = int(np.argmax(result.gpa == (2 << 20) + many))
    assert at > 0
    assert np.array_equal(result.gpa[:at], (1 << 20) + many[:at])
    assert np.array_equal(result.gpa[at:], (2 << 20) + many[at:])
    assert vm.audit(True) == []


# ---- fork --------------------------------------------------------------------------------------------------------------------

def test_a_fork_beside_a_run_raises_in_the_child():
    """The other thread is gone, in the middle of a row; a machine of the child's own works."""
    vm, vcpu, gva = two_address_spaces(Host(tdp="ept"))
    many = np.resize(gva, 1 << 20)
    calls = (lambda: vcpu.access(0), lambda: vcpu.set_regs(cr3=0x6000), vcpu.tlb.flush, lambda: vm.stats, vm.audit,
             lambda: vm.add_slot(1 << 32, PAGE), lambda: vcpu.mmu.page_fault(0, 0))

    def child():
        for call in calls:
            with pytest.raises(RuntimeError, match="ran in another thread when the process was forked"):
                call()
        other = two_address_spaces(Host(tdp="ept"))
        assert other[1].access(0x3000).gpa == 0x103000
        assert vcpu.gva_walk.gva_to_gpa(0x3000) == 0x103000

    with Beside(lambda: vcpu.access(many)):
        for _ in range(5):
            time.sleep(0.03)
            assert outcome(child) == (0, "ok NoneType")
    assert vcpu.access(0x3000).gpa == 0x103000


def test_a_machine_that_nobody_runs_survives_a_fork():
    vm, vcpu, gva = two_address_spaces(Host(tdp="ept"))
    busy = two_address_spaces(Host(tdp="ept"))

    def child():
        assert np.array_equal(vcpu.access(gva).gpa, (1 << 20) + gva)
        vm.add_slot(1 << 32, PAGE)
        assert vm.audit(True) == []
        assert outcome(lambda: vcpu.access(0x3000)) == (0, "ok Accesses")

    with Beside(lambda: busy[1].access(busy[2])):
        for _ in range(5):
            assert outcome(child) == (0, "ok NoneType")
    with vm.kvm.lock:                                   # held by the thread that forks: it goes on there
        assert outcome(child) == (0, "ok NoneType")
    assert [0] == [slot["gpa"] for slot in vm.slots]


# ---- threads of batches --------------------------------------------------------------------------------------------------

def test_batches_keep_their_threads():
    """The threads of one batch are those of the next; a forked process starts its own."""
    _, vcpu, gva = two_address_spaces(Host())
    many = np.resize(gva, 1 << 16)

    def right():
        out = vcpu.gva_walk.translate(many, threads=3)
        assert np.array_equal(out.gpa, (1 << 20) + many)

    def threads():
        return {thread.ident for thread in threading.enumerate() if thread.name.startswith("kvmmu")}

    for _ in range(50):
        right()
    kept = threads()
    for _ in range(50):
        right()
    assert kept
    assert kept <= threads()
    assert outcome(right) == (0, "ok NoneType")
    right()


def test_small_batches_start_no_thread():
    _, vcpu, gva = two_address_spaces(Host())
    set_rows_of_thread()

    def count():
        before = threading.active_count()
        vcpu.gva_walk.translate(np.resize(gva, 16384), threads=8)
        few = threading.active_count()
        vcpu.gva_walk.translate(np.resize(gva, 32768), threads=8)
        return few - before, threading.active_count() - few

    assert (0, "ok tuple") == outcome(lambda: count() == (0, 1) and ())


def test_a_lock_that_was_waited_for_at_a_fork_is_free_in_the_child():
    lock = MachineLock()

    def take():
        with lock:
            return True

    with lock:
        waiting = threading.Thread(target=take)
        waiting.start()
        time.sleep(0.05)
        assert outcome(take) == (0, "ok bool")
    waiting.join()
    assert outcome(take) == (0, "ok bool")


def test_an_interrupted_batch_leaves_no_threads():
    """Those of a batch that Ctrl-C ended are gone soon; the next batch has others."""
    def stop(*_):
        raise KeyboardInterrupt

    vcpu = Vcpu(GuestMemory(1 << 20))
    vcpu.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    walk, gva = vcpu.gva_walk, np.arange(60_000_000, dtype=np.uint64) << np.uint64(14)      # a quarter of a second
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            walk.translate(gva, threads=2, fields=("status",))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("kvmmu_") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvmmu_")]
    assert (walk.translate(gva[:1_000_000], threads=2).status == Status.PAGE_FAULT).all()
