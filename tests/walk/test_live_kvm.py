"""``gva_walk`` against a live KVM: ``KVM_TRANSLATE`` on random 4-level tables.

``KVM_TRANSLATE`` is a supervisor read by KVM's software walker, so the walk under test runs with conformance "kvm".
Set ``KVMMU_LIVE_CASES`` for a longer run; every run starts from the same seed.
"""

import errno
import os

import numpy as np
import pytest

import kvmmu
from kvmmu.oracles import kvm

UNAVAILABLE = kvm.available()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"live KVM: {UNAVAILABLE}")

CASES = int(os.environ.get("KVMMU_LIVE_CASES", "5000"))
CASES_PER_BATCH = 160
MEMORY_SIZE = 8 << 20
PAGE_SHIFT = 12
ENTRIES = 512

PT_PRESENT, PT_WRITABLE, PT_USER, PT_ACCESSED, PT_PAGE_SIZE, PT_GLOBAL = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 7, 1 << 8
PT_PAT_LARGE, PT_NX = 1 << 12, 1 << 63
PT_IGNORED = 0x7FF0_0000_0000_0E7A  # 62:52, 11:9, 6:3 and R/W: bits that no supervisor read minds
CR0_WP = 1 << 16
CR4_SMEP, CR4_SMAP = 1 << 20, 1 << 21
EFER_NXE = 1 << 11
RFLAGS_AC = 1 << 18
CPUID7_EBX_SMEP, CPUID7_EBX_SMAP = 1 << 7, 1 << 20

LONG_MODE = {
    "cr0": kvm.CR0_PG | kvm.CR0_ET | kvm.CR0_PE,
    "cr4": kvm.CR4_PAE,
    "efer": kvm.EFER_LME | kvm.EFER_LMA,
}
TABLES_OF_LEVEL = {4: 1, 3: 9, 2: 18, 1: 36}
LEVELS = np.repeat(list(TABLES_OF_LEVEL), list(TABLES_OF_LEVEL.values()))[:, np.newaxis]
SHAPE = (LEVELS.size, ENTRIES)


@pytest.fixture
def live():
    """A live vCPU with a few MiB of zeroed memory."""
    with kvm.LiveKvm(size=MEMORY_SIZE) as vm:
        yield vm


def chance(rng, probability):
    """Return uint64[SHAPE], all ones with `probability` (a number, or one per table) and else zero."""
    return np.where(rng.random(SHAPE) < probability, np.uint64(2**64 - 1), np.uint64(0))


def random_targets(rng, frames, leaf, maxphyaddr):
    """Return where each entry points: leaves anywhere, others mostly at a table of the next level."""
    anywhere = rng.integers(1 << (maxphyaddr - PAGE_SHIFT), size=SHAPE, dtype=np.uint64)
    next_level = np.concatenate(
        [
            rng.choice(frames[LEVELS.ravel() == max(level - 1, 1)], (count, ENTRIES))
            for level, count in TABLES_OF_LEVEL.items()
        ]
    )
    table = np.where(chance(rng, 0.05), rng.choice(frames, SHAPE), next_level)
    return np.where(leaf | chance(rng, 0.02), anywhere, table) << PAGE_SHIFT


def random_entries(rng, frames, maxphyaddr):
    """Return uint64[SHAPE] entries for tables in `frames`, the root first; about half of all walks succeed."""
    large = chance(rng, np.select([LEVELS == 4, LEVELS == 3, LEVELS == 2], [0.01, 0.06, 0.3], 0.5))
    targets = random_targets(rng, frames, large | np.where(LEVELS == 1, 2**64 - 1, 0).astype(np.uint64), maxphyaddr)
    unaligned = np.select([LEVELS == 3, LEVELS == 2], [(1 << 30) - 1, (1 << 21) - 1], 0).astype(np.uint64)
    entries = targets & ~(unaligned & large & ~np.uint64(PT_PAT_LARGE) & chance(rng, 0.9))
    entries |= rng.integers(2**64, size=SHAPE, dtype=np.uint64) & np.uint64(PT_IGNORED)
    entries |= large & np.uint64(PT_PAGE_SIZE)
    entries |= chance(rng, 0.97) & np.uint64(PT_PRESENT)
    entries |= chance(rng, 0.8) & np.uint64(PT_USER)
    entries |= chance(rng, np.where(LEVELS == 4, 0.03, 0.5)) & np.uint64(PT_GLOBAL)
    entries |= chance(rng, 0.12) & np.uint64(PT_NX)
    reserved = np.uint64(1) << rng.integers(maxphyaddr, 53, size=SHAPE, dtype=np.uint64)
    return entries | (chance(rng, 0.03) & reserved)


def random_gvas(rng, n):
    """Return `n` canonical linear addresses of 48 bits."""
    return (rng.integers(-(2**63), 2**63, size=n, dtype=np.int64) >> 16).view(np.uint64)


def fill_memory(rng, live):
    """Replace the guest memory by fresh random tables and return a CR3 for them."""
    frames = rng.choice(MEMORY_SIZE >> PAGE_SHIFT, LEVELS.size, replace=False).astype(np.uint64)
    live.memory[:] = 0
    live.words.reshape(-1, ENTRIES)[frames] = random_entries(rng, frames, live.maxphyaddr)
    return int(frames[0]) << PAGE_SHIFT


def batch_registers(index, live):
    """Return the control registers and RFLAGS.AC of batch `index`: 32 batches see every combination once."""
    wp, smep, smap, nxe, ac = (index >> bit & 1 for bit in range(5))
    features = live.cpuid(7)[1]
    smep &= bool(features & CPUID7_EBX_SMEP)
    smap &= bool(features & CPUID7_EBX_SMAP)
    return {
        "cr0": LONG_MODE["cr0"] | wp * CR0_WP,
        "cr4": LONG_MODE["cr4"] | smep * CR4_SMEP | smap * CR4_SMAP,
        "efer": LONG_MODE["efer"] | nxe * EFER_NXE,
    }, ac


def make_vcpu(live):
    """Return a vCPU like the live one, and the array that backs its memory."""
    image = np.zeros(MEMORY_SIZE, dtype=np.uint8)
    cpu = kvmmu.CpuModel(vendor=live.vendor, maxphyaddr=live.maxphyaddr, gbpages=live.gbpages, conformance="kvm")
    return kvmmu.Vcpu(kvmmu.GuestMemory(image), cpu=cpu), image


def compare_batch(rng, index, live, vcpu, image):
    """Translate one batch on both sides, compare everything and return how many translations succeeded."""
    cr3 = fill_memory(rng, live)
    image[:] = live.memory
    registers, ac = batch_registers(index, live)
    live.set_sregs(cr3=cr3, **registers)
    live.set_rflags(ac * RFLAGS_AC)
    vcpu.set_regs(cr3=cr3, **registers)
    gvas = random_gvas(rng, CASES_PER_BATCH)

    expected_gpa, expected_valid = live.translate_many(gvas)
    actual = vcpu.gva_walk.translate(gvas, int(kvmmu.Access.AC) if ac else 0)

    where = f"batch {index}, AC {ac}, CR3 {cr3:#x}, {', '.join(f'{k} {v:#x}' for k, v in registers.items())}"
    np.testing.assert_array_equal(actual.status == kvmmu.Status.OK, expected_valid, err_msg=where)
    np.testing.assert_array_equal(actual.gpa, expected_gpa, err_msg=where)
    np.testing.assert_array_equal(image.view(np.uint64), live.words, err_msg=f"memory afterwards, {where}")
    return np.count_nonzero(expected_valid)


def test_random_tables_translate_as_live_kvm_does(live, capsys):
    """Status, GPA and every byte of memory afterwards agree, and neither outcome is rare."""
    rng = np.random.default_rng(0)
    vcpu, image = make_vcpu(live)
    batches = -(-CASES // CASES_PER_BATCH)
    valid = sum(compare_batch(rng, index, live, vcpu, image) for index in range(batches))
    cases = batches * CASES_PER_BATCH
    with capsys.disabled():
        print(f"\n{cases} KVM_TRANSLATE cases compared, {valid} of them valid")
    assert 0.2 < valid / cases < 0.8


def map_one_page(live, leaf):
    """Map linear page 1 by tables at 0x1000 .. 0x4000 that grant everything, with `leaf` as its PTE, and turn it on."""
    rights = PT_PRESENT | PT_WRITABLE | PT_USER
    tables = live.words.reshape(-1, ENTRIES)
    tables[[1, 2, 3], 0] = np.array([0x2000, 0x3000, 0x4000], dtype=np.uint64) | np.uint64(rights)
    tables[4, 1] = leaf
    live.set_sregs(cr3=0x1000, **LONG_MODE)


def test_live_kvm_ignores_canonicality(live):
    """Row D23 of the oracles: only bits 47:0 count for KVM_TRANSLATE, while the walk reports the address."""
    map_one_page(live, 0x5000 | PT_PRESENT)
    gvas = np.array([0x1234, 0x1234 | 1 << 48, 0x1234 | 0xABCD << 48], dtype=np.uint64)
    vcpu, image = make_vcpu(live)
    image[:] = live.memory
    vcpu.set_regs(cr3=0x1000, **LONG_MODE)

    gpa, valid = live.translate_many(gvas)
    assert valid.all()
    assert gpa.tolist() == [0x5234] * 3

    non_canonical = kvmmu.Status.NON_CANONICAL
    assert vcpu.gva_walk.translate(gvas, 0).status.tolist() == [kvmmu.Status.OK, non_canonical, non_canonical]


def test_live_kvm_sees_rewritten_tables_at_once(live):
    """The software walk of KVM_TRANSLATE caches nothing."""
    for frame in (5, 6, 7):
        map_one_page(live, frame << PAGE_SHIFT | PT_PRESENT)
        assert live.translate(0x1234)[:2] == (frame << PAGE_SHIFT | 0x234, True)
    live.words[4 * ENTRIES + 1] = 0
    assert live.translate(0x1234)[:2] == (kvm.INVALID_GPA, False)


@pytest.mark.parametrize("cpl", [0, 3])
def test_live_kvm_reads_as_supervisor_and_honours_smap(live, cpl):
    """A user page translates under SMAP only with AC set, at any CPL; a walk that fails sets no accessed bit."""
    if not live.cpuid(7)[1] & CPUID7_EBX_SMAP:
        pytest.skip("the vCPU has no SMAP")
    leaf = 0x5000 | PT_PRESENT | PT_USER
    map_one_page(live, leaf)
    live.set_sregs(cr3=0x1000, cpl=cpl, **LONG_MODE | {"cr4": kvm.CR4_PAE | CR4_SMAP})
    before = live.memory.copy()
    assert not live.translate(0x1234)[1]
    np.testing.assert_array_equal(live.memory, before)

    live.set_rflags(RFLAGS_AC)
    assert live.translate(0x1234)[:2] == (0x5234, True)
    assert live.words[4 * ENTRIES + 1] == leaf | PT_ACCESSED


def test_other_paging_modes_are_refused(live):
    """The driver only does 4-level paging, and says so; what KVM refuses comes with its errno."""
    for change in ({"cr0": kvm.CR0_PE}, {"cr4": 0}, {"efer": 0}, {"cr4": kvm.CR4_PAE | kvm.CR4_LA57}):
        with pytest.raises(ValueError, match="do not select 4-level paging"):
            live.set_sregs(**{"cr3": 0x1000} | LONG_MODE | change)
    with pytest.raises(OSError, match="KVM_SET_SREGS") as refused:
        live.set_sregs(cr3=1 << live.maxphyaddr, **LONG_MODE)
    assert refused.value.errno == errno.EINVAL


def test_memory_outlives_the_vm():
    """An array taken from the guest memory stays valid after the VM is gone."""
    with kvm.LiveKvm(size=MEMORY_SIZE) as vm:
        memory = vm.memory
        memory[0] = 42
    vm.close()
    assert memory[0] == 42
