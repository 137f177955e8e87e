# SPDX-License-Identifier: Apache-2.0
"""PageFormat: permission bitmaps, the protection-key mask, reserved bits, against the check vectors and plain rules."""

import re

import numpy as np
import oracle
import pytest
from builders import PageTables
from machines import ACCESSES, NXE, PKE, SMAP, SMEP, WP, oracle_access, vcpu_over

from kvmmu import Acc, Access, CpuModel, Ept, GuestMemory, PageFormat, Vcpu

# Appendix A of the semantics.
PERMISSIONS = """
legacy wp1 nx1 smep1 smap1  f5f5 f3f3 5f5f 3f3f 5555 3333 5f5f 3f3f f0ff f3ff 0fff 3fff f0ff f3ff 0fff 3fff
legacy wp1 nx1 smep0 smap0  5555 3333 5f5f 3f3f 5555 3333 5f5f 3f3f 00ff 33ff 0fff 3fff 00ff 33ff 0fff 3fff
legacy wp0 nx1 smep1 smap1  f5f5 f0f0 5f5f 3f3f 5555 0000 5f5f 3f3f f0ff f0ff 0fff 3fff f0ff f0ff 0fff 3fff
legacy wp0 nx0 smep0 smap0  5555 0000 5f5f 3f3f 5555 0000 5f5f 3f3f 0000 0000 0f0f 3f3f 0000 0000 0f0f 3f3f
legacy wp1 nx0 smep1 smap0  5555 3333 5f5f 3f3f 5555 3333 5f5f 3f3f f0f0 f3f3 0f0f 3f3f f0f0 f3f3 0f0f 3f3f
NPT    wp1 nx1 no GMET      5555 3333 5f5f 3f3f 5555 3333 5f5f 3f3f 00ff 33ff 0fff 3fff 00ff 33ff 0fff 3fff
NPT    wp1 nx1 GMET         5555 3333 5555 3333 5555 3333 5555 3333 f0ff f3ff 00ff 33ff f0ff f3ff 00ff 33ff
EPT    no MBEC              5555 3333 5555 3333 5555 3333 5555 3333 00ff 33ff 00ff 33ff 00ff 33ff 00ff 33ff
EPT    MBEC                 5555 3333 5555 3333 5555 3333 5555 3333 00ff 33ff 0f0f 3f3f 00ff 33ff 0f0f 3f3f
"""
RSVD_BITS = """
PAE maxpa36 nx1
  [0] 7ffffff000000000 7ffffff000000000 fffffff0000001e6 0000000000000000 0000000000000000
  [1] 7ffffff000000000 7ffffff0001fe000 0000000000000000 0000000000000000 0000000000000000
PAE maxpa36 nx0
  [0] fffffff000000000 fffffff000000000 fffffff0000001e6 0000000000000000 0000000000000000
  [1] fffffff000000000 fffffff0001fe000 0000000000000000 0000000000000000 0000000000000000
4-level maxpa40 nx1 gb1 intel
  [0] 000fff0000000000 000fff0000000000 000fff0000000000 000fff0000000080 0000000000000000
  [1] 000fff0000000000 000fff00001fe000 000fff003fffe000 000fff0000000080 0000000000000000
4-level maxpa40 nx0 gb0 amd
  [0] 800fff0000000000 800fff0000000000 800fff0000000080 800fff0000000180 0000000000000000
  [1] 800fff0000000000 800fff00001fe000 800fff003fffe080 800fff0000000180 0000000000000000
5-level maxpa52 nx1 gb1 intel
  [0] 0000000000000000 0000000000000000 0000000000000000 0000000000000080 0000000000000080
  [1] 0000000000000000 00000000001fe000 000000003fffe000 0000000000000080 0000000000000080
EPT maxpa40 1G
  [0] 000fff0000000000 000fff0000000078 000fff0000000078 000fff00000000f8 000fff00000000f8
  [1] 000fff0000000000 000fff00001ff000 000fff003ffff000 000fff00000000f8 000fff00000000f8
EPT maxpa40 2M only
  [0] 000fff0000000000 000fff0000000078 000fff00000000f8 000fff00000000f8 000fff00000000f8
  [1] 000fff0000000000 000fff00001ff000 000fff003ffff080 000fff00000000f8 000fff00000000f8
"""
LEVELS = {"PAE": 3, "4-level": 4, "5-level": 5}
MODES = {"32": 2, "pae": 3, "4l": 4, "5l": 5}
U64 = (1 << 64) - 1


def permission_vectors():
    """(title, keywords of permission_bitmask(), values) of each line of PERMISSIONS; smep is GMET and MBEC as well."""
    for line in PERMISSIONS.strip().splitlines():
        title, values = re.match(r"(.*?)\s+((?:[0-9a-f]{4} ?){16})$", line).groups()
        form = {"NPT": {"tdp": True}, "EPT": {"tdp": True, "ept": True}, "legacy": {}}[title.split()[0]]
        flags = {name: value == "1" for name, value in re.findall(r"(wp|nx|smep|smap)([01])", title)}
        smep = {"smep": "no " not in title} if form else {}
        yield pytest.param({**form, **flags, **smep}, [int(value, 16) for value in values.split()], id=title)


def rsvd_vectors():
    lines = RSVD_BITS.strip().splitlines()
    for title, *rows in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        yield pytest.param(title, np.array([[int(v, 16) for v in row.split()[1:]] for row in rows], np.uint64), id=title)


def denied(acc, access, *, tdp=False, ept=False, smep=False, smap=False, wp=True, nx=True):
    """Whether rights deny an access, rule by rule.  The judge of the permission tables."""
    readable, writable, user_page, executable = (bool(acc & bit) for bit in (1, 2, 4, 8))
    write, user, ac, fetch = (bool(access & bit) for bit in (2, 4, 8, 16))
    if not write and not fetch and not readable:
        return True
    if ept:
        if write and not writable:
            return True
        if fetch:
            return not (user_page if smep and user else executable)     # bit 2 is XU there, bit 3 is XS
        return False
    gmet = tdp and smep
    if user and not user_page and not gmet:
        return True
    if write and not writable and (user or wp):
        return True
    if fetch and nx and not executable:
        return True
    if not user and user_page:
        if fetch and smep:
            return True
        if not fetch and smap and not ac:
            return True
    return False


def flags_of(number):
    names = ("tdp", "ept", "smep", "smap", "wp", "nx")
    return {name: bool(number >> i & 1) for i, name in enumerate(names)}


def mode_format(mode, on=None, off=None, **cpu):
    """The format that a guest walk has after its registers were loaded."""
    tables = PageTables(mode)
    return vcpu_over(tables, on=on, off=off, **cpu).gva_walk


# ---- permissions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flags", "expected"), [*permission_vectors()])
def test_permission_vectors(flags, expected):
    """Appendix A; rows that are both a write and a fetch, with SMAP, are of no meaning."""
    actual = PageFormat.permission_bitmask(**flags)
    rows = [i for i in range(16) if not (flags.get("smap") and i & 1 and i & 8)]
    assert [expected[i] for i in rows] == actual[rows].tolist()
    assert np.uint16 == actual.dtype


def test_permission_tables_are_the_rules():
    """Every form and control x access x rights: 64 x 16 x 16 cells against one function of plain branches."""
    numbers = np.arange(64)
    tables = PageFormat.permission_bitmask(**{name: numbers >> i & 1 for i, name in enumerate(flags_of(0))})
    assert (64, 16) == tables.shape
    for number in range(64):
        for index in range(16):
            if index & 9 == 9:                                          # write and fetch at once do not exist
                continue
            expected = sum(denied(acc, index << 1, **flags_of(number)) << acc for acc in range(16))
            assert expected == tables[number, index], f"{flags_of(number)} index {index}"


def test_permission_arrays_equal_scalars():
    """Array flags broadcast; each row is the scalar call."""
    wp = np.array([False, True])[:, None]
    smep = np.array([False, True, True])
    tables = PageFormat.permission_bitmask(wp=wp, smep=smep)
    assert (2, 3, 16) == tables.shape
    for i in range(2):
        for j in range(3):
            one = PageFormat.permission_bitmask(wp=bool(wp[i, 0]), smep=bool(smep[j]))
            assert np.array_equal(one, tables[i, j])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("controls", range(16))
def test_guest_formats_are_the_rules_of_the_manuals(mode, controls):
    """A walk's own format: is_fault(), rule() and the oracle's check of rights agree for all rights and accesses."""
    on = {"cr0": WP * (controls & 1), "cr4": SMEP * (controls >> 1 & 1) | SMAP * (controls >> 2 & 1),
          "efer": NXE * (controls >> 3)}
    walk = mode_format(mode, on, {"cr0": WP, "efer": NXE})
    if mode == "32":
        on["efer"] = 0                                                  # there is no XD bit in 4-byte entries
    walk_regs = oracle.Regs(cr0=on["cr0"], cr3=0, cr4=on["cr4"], efer=on["efer"])
    for acc in range(1, 16, 2):
        if mode == "32" and not acc & Acc.EXEC or not on["efer"] and not acc & Acc.EXEC:
            continue                                                    # without NXE, bit 63 is reserved instead
        for access in ACCESSES:
            expected = oracle_rule(walk_regs, acc, access)
            assert (expected is not None) == walk.fmt.is_fault(acc, access), f"{acc} {access!r}"
            actual = walk.fmt.rule(acc, access)
            assert (expected is None) == (actual is None), f"{acc} {access!r}: {expected} {actual}"
            # a user's write to a read-only supervisor page breaks two rules: either may be named
            assert expected == actual or {expected, actual} == {"user", "write"}, f"{acc} {access!r}"


def oracle_rule(regs, acc, access):
    """The rule by which oracle.py's check of rights denies an access to a page of rights acc."""
    flags = oracle_access(access)
    implicit = flags.pop("implicit")
    flags["user"] = flags["user"] and not implicit
    flags["ac"] = flags["ac"] and not implicit
    walk = oracle.Walk(None, oracle.Cpu(), regs, oracle.Access(**flags))
    walk.steps = [oracle.Step(0, 8, acc & 7 | (0 if acc & Acc.EXEC else oracle.XD), 1)]
    try:
        walk.check_rights()
    except oracle.Fault as fault:
        return fault.rule
    return None


def test_rule_order_is_the_documented_one():
    """rule(): "the first rule by which rights deny": read, write, user, nx, smep, smap, pkey."""
    fmt = mode_format("4l", {"cr4": SMEP | SMAP}).fmt
    assert "write" == fmt.rule(Acc.READ, Access.WRITE | Access.USER)
    assert "user" == fmt.rule(Acc.READ, Access.FETCH | Access.USER)
    assert "nx" == fmt.rule(Acc.READ | Acc.USER, Access.FETCH)
    assert "smep" == fmt.rule(Acc.READ | Acc.USER | Acc.EXEC, Access.FETCH)
    assert "smap" == fmt.rule(Acc.READ | Acc.USER | Acc.EXEC, Access.READ)
    assert "pkey" == fmt.rule(Acc.READ | Acc.USER, Access.READ | Access.AC, pkey_denied=True)
    assert fmt.rule(Acc.READ | Acc.USER, Access.READ | Access.AC) is None


# ---- protection keys ------------------------------------------------------------------------------------------------

def test_pkru_mask_vectors():
    """Appendix A: 0xdd00 with WP, 0xd500 without, nothing without PKE."""
    assert 0xDD00 == PageFormat.pkru_bitmask(wp=True)
    assert 0xD500 == PageFormat.pkru_bitmask(wp=False)
    assert 0 == PageFormat.pkru_bitmask(pke=False, wp=True) == PageFormat.pkru_bitmask(pke=False, wp=False)


@pytest.mark.parametrize(("mode", "pke", "expected"), [
    ("4l", True, 0xDD00), ("5l", True, 0xDD00), ("4l", False, 0), ("pae", True, 0), ("32", True, 0)])
def test_pkru_mask_counts_in_long_mode_only(mode, pke, expected):
    """CR4.PKE has no effect outside long mode."""
    assert expected == mode_format(mode, {"cr4": PKE if pke else 0}).fmt.pkru_mask


@pytest.mark.parametrize("wp", [False, True])
def test_permission_fault_with_keys(wp):
    """All rights x keys of AD/WD settings x accesses: P, and PK exactly where the key forbids; arrays equal scalars."""
    walk = vcpu_over(PageTables("4l"), on={"cr4": PKE, "pkru": 0b11100100}, off={} if wp else {"cr0": WP}).gva_walk
    regs = oracle.Regs(cr0=WP * wp, cr3=0, cr4=PKE, efer=oracle.EFER_LMA | NXE, pkru=0b11100100)
    acc, key, access = (array.ravel() for array in np.meshgrid(np.arange(16), np.arange(5), np.array(ACCESSES, int)))

    actual = walk.permission_fault(acc, key, access)

    assert np.uint32 == actual.dtype
    for a, k, x, got in zip(acc.tolist(), key.tolist(), access.tolist(), actual.tolist(), strict=True):
        flags = oracle_access(x)
        user = flags["user"] and not flags["implicit"]
        judge = oracle.Walk(None, oracle.Cpu(), regs, oracle.Access(flags["write"], flags["fetch"], user, False))
        by_key = judge.key_forbids(k, bool(a & Acc.USER))
        resolved = (x & ~0xC if x & Access.IMPLICIT else x) & ~Access.IMPLICIT
        by_rights = denied(a, resolved, wp=wp)
        expected = (1 | by_key << 5) if by_rights or by_key else 0
        assert expected == got == walk.permission_fault(a, k, x), f"rights {a} key {k} {Access(x)!r}"


# ---- reserved bits --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("title", "expected"), [*rsvd_vectors()])
def test_rsvd_bits_vectors(title, expected):
    """Appendix A."""
    words = title.split()
    maxphyaddr = int(words[1][5:])
    if words[0] == "EPT":
        actual, _ = PageFormat.ept_rsvd_bits(maxphyaddr=maxphyaddr, huge_page_level=3 if words[2] == "1G" else 2)
    else:
        actual = PageFormat.guest_rsvd_bits(LEVELS[words[0]], maxphyaddr=maxphyaddr, nx="nx1" in words,
                                            gbpages="gb0" not in words, amd="amd" in words)
    assert [hex(v) for v in expected.ravel().tolist()] == [hex(v) for v in actual.ravel().tolist()]


def test_bad_mt_xwr_vectors():
    """Appendix A, and the rule itself for each of the 64 patterns."""
    for execonly, expected in ((True, 0xFF444444FFFF4444), (False, 0xFF545454FFFF5454)):
        actual = PageFormat.ept_rsvd_bits(maxphyaddr=40, execonly=execonly)[1]
        assert expected == actual
        for low in range(64):
            memory_type, rwx = low >> 3, low & 7
            bad = memory_type in (2, 3, 7) or rwx in (0b010, 0b110) or (rwx == 0b100 and not execonly)
            assert bad == bool(actual >> low & 1), f"{low:#x} execonly {execonly}"


def is_reserved(bit, level, large, mode, maxphyaddr, nx, gbpages, amd, pse, pse36_bits):
    """Whether this bit of an entry is reserved: SDM vol. 3, the tables of formats of paging-structure entries."""
    if mode == "32":
        return level == 2 and large and pse and 13 + pse36_bits <= bit <= 21
    if mode == "pae" and level == 3:
        return not large and (bit in (1, 2, 5, 6, 7, 8) or bit >= maxphyaddr)
    if level > MODES[mode]:
        return False
    if bit == 63:
        return not nx
    if bit >= maxphyaddr and bit <= (62 if mode == "pae" else 51):
        return True
    if level >= 4:
        return bit == 7 or (bit == 8 and amd)
    if level == 3:
        return (bit == 7 and not gbpages) or (large and 13 <= bit <= 29)
    return level == 2 and large and 13 <= bit <= 20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("maxphyaddr", range(32, 53))
def test_each_reserved_bit_alone(mode, maxphyaddr):
    """Every bit of every entry, by mode, level, bit 7, MAXPHYADDR, NX, 1G support, vendor, PSE and PSE-36."""
    for number in range(32):
        nx, gbpages, amd, pse = (bool(number >> i & 1) for i in range(4))
        pse36_bits = min(maxphyaddr - 32, 8) if number >> 4 else 0
        actual = PageFormat.guest_rsvd_bits(MODES[mode], maxphyaddr=maxphyaddr, nx=nx, gbpages=gbpages, amd=amd,
                                            pse=pse, pse36_bits=pse36_bits)
        for level in range(1, 6):
            for large in (0, 1):
                if mode == "pae" and level == 3 and large:
                    continue                                            # row [1] is unused: PDPTEs are registers
                expected = sum(1 << bit for bit in range(64) if is_reserved(
                    bit, level, large, mode, maxphyaddr, nx, gbpages, amd, pse, pse36_bits))
                assert hex(expected) == hex(int(actual[large, level - 1])), f"level {level} large {large} {number:#b}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("pse36", [False, True])
def test_walks_take_masks_from_the_processor_model(mode, conformance, pse36):
    """MAXPHYADDR, 1G, vendor and PSE-36 of the CpuModel; KVM takes four PSE-36 bits whatever MAXPHYADDR (row D2)."""
    for maxphyaddr in (32, 36, 38, 40, 45, 52):
        walk = mode_format(mode, maxphyaddr=maxphyaddr, conformance=conformance, pse36=pse36, vendor="amd", gbpages=False)
        width = (4 if conformance == "kvm" else min(maxphyaddr, 40) - 32) if pse36 else 0
        expected = PageFormat.guest_rsvd_bits(MODES[mode], maxphyaddr=maxphyaddr, nx=mode != "32", gbpages=False,
                                              pse=mode == "32", pse36_bits=width, amd=True)
        assert np.array_equal(expected, walk.fmt.rsvd_bits_mask), f"MAXPHYADDR {maxphyaddr}"
        assert 0 == walk.fmt.bad_mt_xwr


def test_is_rsvd_bits_set_arrays_equal_scalars():
    """Random entries at every level: the mask chosen by bit 7, arrays, scalars and broadcasting."""
    rng = np.random.default_rng(5)
    fmt = mode_format("5l", vendor="amd", maxphyaddr=46).fmt
    pte = np.array([0, 1, U64, *(1 << bit for bit in range(64)), *(1 << bit | 0x80 for bit in range(64)),
                    *rng.integers(0, 1 << 63, 50).tolist()], np.uint64)
    levels = np.arange(1, 6)[:, None]

    actual = fmt.is_rsvd_bits_set(pte, levels)

    assert (5, pte.size) == actual.shape
    for level in range(1, 6):
        for i, entry in enumerate(pte.tolist()):
            expected = bool(entry & int(fmt.rsvd_bits_mask[entry >> 7 & 1, level - 1]))
            assert expected == actual[level - 1, i]
            assert expected is fmt.is_rsvd_bits_set(entry, level)


def test_is_fault_arrays_equal_scalars():
    """Rights and accesses broadcast; IMPLICIT clears AC and USER."""
    fmt = mode_format("4l", {"cr4": SMAP | SMEP}).fmt
    acc = np.arange(16)[:, None]
    actual = fmt.is_fault(acc, np.array(ACCESSES, np.uint8))
    assert (16, len(ACCESSES)) == actual.shape
    for a in range(16):
        for i, access in enumerate(ACCESSES):
            assert actual[a, i] == fmt.is_fault(a, access)
            if access & Access.IMPLICIT:
                assert actual[a, i] == fmt.is_fault(a, access & Access.WRITE)


# ---- arrays ---------------------------------------------------------------------------------------------------------

SHAPES = [((), ()), ((5,), (1,)), ((1, 1), (7,)), ((3, 0), (1,)), ((0,), ()), ((4, 1), (1, 6)), ((2, 3), (2, 3)), ((3,), (2, 3))]


def array_of(rng, high, shape, dtype, layout):
    """Random integers from 0 to high, in memory as the layout says."""
    values = rng.integers(0, high + 1, shape).astype(dtype)
    if layout == "transposed" and shape:
        return np.asfortranarray(values)
    return np.repeat(values, 2, axis=-1)[..., ::2] if layout == "strided" and shape else values


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">u4"])
@pytest.mark.parametrize("layout", ["dense", "strided", "transposed"])
def test_arrays_of_any_layout_equal_scalars(shapes, dtype, layout):
    """Shapes broadcast as NumPy's do; each element is what the scalar call returns; 0-d arrays give scalars."""
    rng = np.random.default_rng(7)
    walk = vcpu_over(PageTables("4l"), on={"cr4": PKE | SMAP, "pkru": 0xE4E4E4E4}).gva_walk
    first, second = shapes
    acc, key = (array_of(rng, 15, shape, dtype, layout) for shape in (first, second))
    access = np.array(ACCESSES)[array_of(rng, len(ACCESSES) - 1, second, int, "dense")].astype(dtype)
    pte, level = array_of(rng, (1 << 31) - 1, first, np.uint64, layout), array_of(rng, 4, second, dtype, layout) + 1
    calls = [(walk.fmt.is_fault, (acc, access), np.bool_), (walk.fmt.is_rsvd_bits_set, (pte, level), np.bool_),
             (walk.permission_fault, (acc, key, access), np.uint32)]

    for call, arrays, kind in calls:
        actual = call(*arrays)
        expected = np.vectorize(call, otypes=[kind])(*arrays)
        np.testing.assert_array_equal(expected, actual)
        assert np.broadcast_shapes(*shapes) == np.shape(actual)
        assert kind == np.asarray(actual).dtype
        assert isinstance(actual, np.ndarray) == (np.broadcast_shapes(*shapes) != ())


def test_memory_types_and_rights_of_ept_entries_in_arrays():
    """An EPT format: every pattern of the low six bits with and without user execute (bit 10), and a reserved bit."""
    vcpu = Vcpu(GuestMemory(0x4000), cpu=CpuModel(maxphyaddr=40), tdp="ept")
    vcpu.enter_nested(Ept(0x1000 | 3 << 3 | 6), cr0=0)
    fmt = vcpu.ngpa_walk.fmt
    low = np.arange(64, dtype=np.uint64)
    patterns = np.stack([low, low | np.uint64(1 << 10), low | np.uint64(1 << 51)])
    assert fmt.bad_mt_xwr

    actual = fmt.is_rsvd_bits_set(patterns, 1)

    for i, bits in enumerate(low.tolist()):
        assert actual[0, i] == bool(fmt.bad_mt_xwr >> bits & 1), f"{bits:#x}"
        assert actual[1, i] == bool(fmt.bad_mt_xwr >> (bits | 4) & 1), f"{bits:#x}"
    assert actual[2].all()


def test_arrays_that_change_after_their_check():
    """What another thread, or the conversion of a later argument, writes into an array that was checked indexes no table."""
    walk = vcpu_over(PageTables("4l"), on={"cr4": PKE, "pkru": U64 >> 32}).gva_walk

    class Writer:
        def __init__(self, array):
            self.array = array

        def __index__(self):
            self.array[:] = 0xF1
            return int(Access.WRITE)

    acc = np.zeros(3, np.uint8)
    assert walk.fmt.is_fault(acc, Writer(acc)).tolist() == [walk.fmt.is_fault(1, Access.WRITE)] * 3 == [True] * 3
    key = np.zeros(3, np.uint8)
    assert walk.permission_fault(7, key, Writer(key)).tolist() == [walk.permission_fault(7, 1, Access.WRITE)] * 3 == [0x21] * 3


# ---- bad arguments --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("call", "names"), [
    (lambda f: PageFormat.guest_rsvd_bits(1, maxphyaddr=40), "level.*1"),
    (lambda f: PageFormat.guest_rsvd_bits(6, maxphyaddr=40), "level.*6"),
    (lambda f: PageFormat.guest_rsvd_bits(4, maxphyaddr=31), "maxphyaddr.*31"),
    (lambda f: PageFormat.guest_rsvd_bits(4, maxphyaddr=53), "maxphyaddr.*53"),
    (lambda f: PageFormat.guest_rsvd_bits(2, maxphyaddr=40, pse36_bits=9), "pse36_bits.*9"),
    (lambda f: PageFormat.guest_rsvd_bits(2, maxphyaddr=40, pse36_bits=-1), "pse36_bits.*-1"),
    (lambda f: PageFormat.ept_rsvd_bits(maxphyaddr=53), "maxphyaddr.*53"),
    (lambda f: PageFormat.ept_rsvd_bits(maxphyaddr=40, huge_page_level=4), "huge_page_level.*4"),
    (lambda f: f.is_fault(16, 0), "pte_access.*16"),
    (lambda f: f.is_fault(-1, 0), "pte_access.*-1"),
    (lambda f: f.is_fault(1, 1), "access.*0x1"),
    (lambda f: f.is_fault(1, -2), "access.*-2"),
    (lambda f: f.is_fault(1, 64), "access.*0x40"),
    (lambda f: f.is_fault(1, np.array([2, 128], np.uint8)), "access.*0x80"),
    (lambda f: f.is_fault(1, np.array(0.5)), "access.*float"),
    (lambda f: f.is_rsvd_bits_set(0, 0), "level.*0"),
    (lambda f: f.is_rsvd_bits_set(0, 6), "level.*6"),
    (lambda f: f.is_rsvd_bits_set(0, np.ones(1)), "level.*float"),
    (lambda f: f.is_rsvd_bits_set(-1, 1), "pte.*-"),
    (lambda f: f.is_rsvd_bits_set(1 << 64, 1), "pte.*"),
    (lambda f: f.rule(16, 0), "pte_access.*16"),
    (lambda f: f.rule(1, 1), "access.*0x1"),
    (lambda f: f.permission_fault(16, 0, 0, 0), "pte_access.*16"),
    (lambda f: f.permission_fault(1, 16, 0, 0), "pkey.*16"),
    (lambda f: f.permission_fault(1, 0, 1, 0), "access.*0x1"),
    (lambda f: f.permission_fault(1, 0, 0, 1 << 32), "pkru.*"),
])
def test_bad_arguments_are_named(call, names):
    """ValueError, saying which argument and which value."""
    fmt = mode_format("4l").fmt
    with pytest.raises(ValueError, match=names):
        call(fmt)
