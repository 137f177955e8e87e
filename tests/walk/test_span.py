# SPDX-License-Identifier: Apache-2.0
"""Accesses that cross a page: two walks, in order, each with its own faults and accessed and dirty bits.

Source: SDM vol. 3, "Page-Fault Exceptions" (CR2 has the address in the page that faulted), "Accessed and Dirty Flags".
"""

import warnings

import builders
import numpy as np
import oracle
import pytest
from machines import A, D, oracle_access, oracle_cpu

from kvmmu import INVALID_GPA, Access, CpuModel, GeneralProtection, GuestMemory, PageFault, Regs, Span, Status, Vcpu

U8, U32, U64 = np.uint8, np.uint32, np.uint64
LOW, HIGH = 0x9000, 0x4000                  # where the two pages lie: apart, and not in order
MODES = ("32", "pae", "4l", "5l")
OFF = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}


def two_pages(mode="4l", gva=0x5000, next_gva=0x6000, first="p w u", second="p w u"):
    """(tables, vCPU): gva at LOW, and next_gva at HIGH unless `second` is empty."""
    tables = builders.PageTables(mode)
    tables.map(gva, LOW, first)
    if second:
        tables.map(next_gva, HIGH, second)
    return tables, over(tables)


def over(tables, **cpu):
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()), cpu=CpuModel(**cpu))
    vcpu.set_regs(**tables.regs())
    return vcpu


def flags(tables, vcpu, gva, level=1):
    """A and D of the entry for gva as it is in memory now."""
    gpa = tables.entry_gpa(gva, level)
    return vcpu.mem.read_u64(gpa & ~7) >> 8 * (gpa & 4) & (A | D)


def row_of(spans, row):
    """One row of a Span, as a dict of plain integers."""
    return {name: int(getattr(spans, name)[row]) for name in Span.__slots__}


def span_of(vcpu, gva, size, access=0, **how):
    """translate_span() of one access, as a dict of plain integers."""
    return row_of(vcpu.gva_walk.translate_span(np.array([gva], U64), size, access, **how), 0)


def result(gpa, gpa_next=INVALID_GPA, status=Status.OK, error_code=0, address=0):
    return {"gpa": gpa, "gpa_next": gpa_next, "status": status, "error_code": error_code, "address": address}


@pytest.mark.parametrize("mode", MODES)
def test_two_pages_two_walks(mode):
    """Each part lies where its own page is; their lengths add up; both forms agree."""
    _, vcpu = two_pages(mode)
    assert vcpu.gva_walk.span(0x5FFD, 8) == [(LOW + 0xFFD, 3), (HIGH, 5)]
    assert span_of(vcpu, 0x5FFD, 8) == result(LOW + 0xFFD, HIGH)
    assert vcpu.gva_walk.span(0x5FF8, 8) == [(LOW + 0xFF8, 8)]
    assert span_of(vcpu, 0x5FF8, 8) == result(LOW + 0xFF8)


@pytest.mark.parametrize("offset", [0, 1, 8, 0x7FF, 0xFF8, 0xFFE, 0xFFF])
def test_every_size(offset):
    """Sizes 1 to 4096 at an offset: a second part exactly if the last byte lies in the next page."""
    _, vcpu = two_pages()
    sizes = np.arange(1, 4097)
    spans = vcpu.gva_walk.translate_span(np.full(sizes.size, 0x5000 + offset, U64), sizes.astype(np.uint16))
    crossing = offset + sizes - 1 >= 4096
    np.testing.assert_array_equal(spans.gpa, LOW + offset)
    np.testing.assert_array_equal(spans.gpa_next, np.where(crossing, U64(HIGH), U64(INVALID_GPA)))
    assert not spans.status.any()
    for size, crosses in zip(sizes.tolist()[::7], crossing[::7], strict=True):
        first = 4096 - offset if crosses else size
        parts = [(LOW + offset, first)] + ([(HIGH, size - first)] if crosses else [])
        assert vcpu.gva_walk.span(0x5000 + offset, size) == parts


FORMS = {"scalar": lambda vcpu, gva, size, access: vcpu.gva_walk.span(gva, size, access), "array": span_of}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("access", "set_bits"), [(Access.READ, A), (Access.WRITE, A | D), (Access.FETCH, A)])
def test_accessed_and_dirty_of_both_pages(form, mode, access, set_bits):
    """A crossing access marks both leaves, D only for a write; one that does not cross leaves the next page alone."""
    tables, vcpu = two_pages(mode)
    FORMS[form](vcpu, 0x5FF8, 8, access)
    assert (flags(tables, vcpu, 0x5000), flags(tables, vcpu, 0x6000)) == (set_bits, 0)
    FORMS[form](vcpu, 0x5FF9, 8, access)
    assert (flags(tables, vcpu, 0x5000), flags(tables, vcpu, 0x6000)) == (set_bits, set_bits)
    assert flags(tables, vcpu, 0x5000, 2) == A


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("second", "access", "code"), [
    ("", Access.READ, 0x0), ("", Access.WRITE | Access.USER, 0x6), ("p u", Access.WRITE, 0x3), ("p w", Access.USER, 0x5)])
def test_the_second_page_faults(mode, second, access, code):
    """CR2 is the first byte of the next page; the first page has its A and D by then, the second none."""
    tables, vcpu = two_pages(mode, second=second)
    with pytest.raises(PageFault) as caught:
        vcpu.gva_walk.span(0x5FFE, 4, access)
    assert (caught.value.address, caught.value.error_code, caught.value.level) == (0x6000, code, 1)
    marks = (A | D if access & Access.WRITE else A, 0)
    assert (flags(tables, vcpu, 0x5000), flags(tables, vcpu, 0x6000)) == marks
    tables, vcpu = two_pages(mode, second=second)
    assert span_of(vcpu, 0x5FFE, 4, int(access)) == result(LOW + 0xFFE, INVALID_GPA, Status.PAGE_FAULT, code, 0x6000)
    assert (flags(tables, vcpu, 0x5000), flags(tables, vcpu, 0x6000)) == marks


@pytest.mark.parametrize("mode", MODES)
def test_the_first_page_faults(mode):
    """CR2 is the access's own address; the second page is never walked."""
    tables, vcpu = two_pages(mode, first="p u")
    with pytest.raises(PageFault) as caught:
        vcpu.gva_walk.span(0x5FFE, 4, Access.WRITE)
    assert (caught.value.address, caught.value.error_code) == (0x5FFE, 0x3)
    assert span_of(vcpu, 0x5FFE, 4, 2) == result(INVALID_GPA, INVALID_GPA, Status.PAGE_FAULT, 0x3, 0x5FFE)
    assert (flags(tables, vcpu, 0x5000), flags(tables, vcpu, 0x6000)) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mapped", [True, False])
def test_the_page_after_the_last_is_page_0(mode, mapped):
    """Addresses wrap at 2**64 in long mode, at 2**32 outside it: the second page is page 0, and so is its CR2."""
    top = (1 << (64 if mode in ("4l", "5l") else 32)) - 0x1000
    _, vcpu = two_pages(mode, gva=top, next_gva=0, second="p w u" if mapped else "")
    if mapped:
        assert vcpu.gva_walk.span(top + 0xFFF, 2) == [(LOW + 0xFFF, 1), (HIGH, 1)]
        assert span_of(vcpu, top + 0xFFF, 2) == result(LOW + 0xFFF, HIGH)
    else:
        with pytest.raises(PageFault) as caught:
            vcpu.gva_walk.span(top + 0xFFF, 2)
        assert caught.value.address == 0
        assert span_of(vcpu, top + 0xFFF, 2) == result(LOW + 0xFFF, INVALID_GPA, Status.PAGE_FAULT, 0, 0)


@pytest.mark.parametrize("mode", ["32", "pae"])
def test_high_bits_of_an_address_are_nothing_outside_long_mode(mode):
    """The address, the next page's and CR2 are taken modulo 2**32."""
    _, vcpu = two_pages(mode)
    assert vcpu.gva_walk.span(0xABC00005FFE, 4) == [(LOW + 0xFFE, 2), (HIGH, 2)]
    assert span_of(vcpu, 0xABC00005FFE, 4) == result(LOW + 0xFFE, HIGH)
    assert span_of(vcpu, 0xABC00006FFE, 4)["address"] == 0x7000
    assert span_of(vcpu, 0xABC00007FFE, 4)["address"] == 0x7FFE


def test_paging_off_wraps_at_4g():
    vcpu = Vcpu(GuestMemory(0x1000))
    vcpu.set_regs(**OFF)
    assert vcpu.gva_walk.span(0xFFFFFFFF, 3) == [(0xFFFFFFFF, 1), (0, 2)]
    assert span_of(vcpu, 0x1FFFFFFFF, 3) == result(0xFFFFFFFF, 0)


@pytest.mark.parametrize(("mode", "width"), [("4l", 48), ("5l", 57)])
def test_crossing_the_canonical_boundary(mode, width):
    """Out of the lower half: #GP for the second page, after the first was walked; into the upper half: for the first."""
    edge = 1 << (width - 1)
    tables, vcpu = two_pages(mode, gva=edge - 0x1000, next_gva=(1 << 64) - edge)
    with pytest.raises(GeneralProtection) as caught:
        vcpu.gva_walk.span(edge - 1, 2)
    assert (caught.value.rule, caught.value.address) == ("non-canonical", edge)
    assert flags(tables, vcpu, edge - 0x1000) == A
    assert span_of(vcpu, edge - 1, 2, 2) == result(LOW + 0xFFF, INVALID_GPA, Status.NON_CANONICAL, 0, edge)
    assert flags(tables, vcpu, edge - 0x1000) == A | D
    upper = (1 << 64) - edge - 1
    with pytest.raises(GeneralProtection) as caught:
        vcpu.gva_walk.span(upper, 2)
    assert caught.value.address == upper
    assert span_of(vcpu, upper, 2) == result(INVALID_GPA, INVALID_GPA, Status.NON_CANONICAL, 0, upper)
    assert flags(tables, vcpu, (1 << 64) - edge) == 0


@pytest.mark.parametrize(("mode", "level"), [("32", 2), ("pae", 2), ("4l", 2), ("4l", 3), ("5l", 3)])
def test_a_large_page_is_crossed_every_4k(mode, level):
    """The unit is 4 KiB whatever maps it: both parts lie in the large page, one after the other."""
    tables = builders.PageTables(mode)
    tables.map(0, 0x40000000, "p w u", level=level)
    vcpu = over(tables)
    assert vcpu.gva_walk.span(0x7FFF, 0x20) == [(0x40007FFF, 1), (0x40008000, 0x1F)]
    assert span_of(vcpu, 0x7FFF, 0x20) == result(0x40007FFF, 0x40008000)


def test_eflags_ac_counts_in_the_scalar_form_only():
    """SMAP: the vCPU's AC allows span(); an array says Access.AC itself, for both pages."""
    _, vcpu = two_pages()
    vcpu.set_regs(cr4=vcpu.regs.cr4 | 1 << 21, rflags=1 << 18 | 2)
    assert len(vcpu.gva_walk.span(0x5FFE, 4)) == 2
    assert span_of(vcpu, 0x5FFE, 4)["error_code"] == 0x1
    assert span_of(vcpu, 0x5FFE, 4, Access.AC) == result(LOW + 0xFFE, HIGH)


def test_set_ad_false_stores_nothing():
    tables, vcpu = two_pages()
    assert span_of(vcpu, 0x5FFE, 4, 2, set_ad=False) == result(LOW + 0xFFE, HIGH)
    assert (flags(tables, vcpu, 0x5000), flags(tables, vcpu, 0x5000, 4), flags(tables, vcpu, 0x6000)) == (0, 0, 0)


# -- random tables: the oracle, the scalar form and the array form ------------------------------------------------------

def expected_span(mem, cpu, regs, gva, size, access):
    """The columns of one access by the oracle, which walks page by page and stores A and D in `mem`."""
    long_mode = bool(regs.efer & oracle.EFER_LMA)
    width = (1 << (64 if long_mode else 32)) - 1
    first = oracle.translate(mem, cpu, regs, gva, **oracle_access(access))
    crosses = (gva & 0xFFF) + size > 0x1000
    following = (gva & ~0xFFF) + 0x1000 & width
    second = oracle.translate(mem, cpu, regs, following, **oracle_access(access)) if first.status == "ok" and crosses else None
    failed = first if first.status != "ok" else second if second and second.status != "ok" else None
    status = {"ok": Status.OK, "page_fault": Status.PAGE_FAULT, "non_canonical": Status.NON_CANONICAL}
    return result(first.gpa if first.status == "ok" else INVALID_GPA,
                  second.gpa if second and second.status == "ok" else INVALID_GPA,
                  status[failed.status] if failed else Status.OK, failed.error_code if failed else 0,
                  0 if not failed else gva & width if failed is first else following)


def random_case(seed, mode, rows=120):
    """(vCPU, its Regs, oracle memory and registers, gva, size, access): addresses near the ends of interesting pages."""
    rng = np.random.default_rng([seed, MODES.index(mode)])
    tables = builders.random_tables(rng, mode, gvas=rows)
    vcpu = over(tables, maxphyaddr=40, vendor=("intel", "amd")[seed % 2])
    rights = {"cr4": vcpu.regs.cr4 | int(rng.integers(0, 4)) << 20, "cr0": vcpu.regs.cr0 & ~(int(rng.integers(0, 2)) << 16)}
    vcpu.set_regs(**rights)
    regs = vcpu.regs
    judge = oracle.Regs(regs.cr0, regs.cr3, regs.cr4, regs.efer, regs.pkru, regs.pdptrs)
    gva = np.array(tables.gvas, U64) | rng.integers(0xFE0, 0x1000, rows, U64)
    access = rng.choice(np.array([0, 2, 4, 6, 8, 10, 16, 20], U8), rows)
    return vcpu, regs, oracle.Memory(dict(tables.words)), judge, gva, rng.integers(1, 64, rows, np.uint16), access


def random_cases(mode, count):
    """`count` random cases; tables whose PDPTEs no CPU loads are skipped."""
    seed = made = 0
    while made < count:
        try:
            case = random_case(seed, mode)
        except GeneralProtection:
            assert mode == "pae"
        else:
            made += 1
            yield case
        seed += 1


def words_in(vcpu, words):
    return {gpa: vcpu.mem.read_u64(gpa) for gpa in words}


@pytest.mark.parametrize("mode", MODES)
def test_both_forms_equal_the_oracle(mode):
    """Every column, and every A and D bit left in memory, on adversarial tables."""
    seen = {}
    for (vcpu, _, mem, regs, gva, size, access), (again, *_) in zip(
            random_cases(mode, 12), random_cases(mode, 12), strict=True):
        spans = vcpu.gva_walk.translate_span(gva, size, access)
        for row, (addr, n, how) in enumerate(zip(gva.tolist(), size.tolist(), access.tolist(), strict=True)):
            expected = expected_span(mem, oracle_cpu(vcpu.cpu), regs, addr, n, Access(how))
            raised = {"gpa": None, "gpa_next": None} if expected["status"] else {}
            assert row_of(spans, row) == expected, (hex(addr), n, Access(how))
            assert scalar_span(again.gva_walk, addr, n, how) == expected | raised, (hex(addr), n, Access(how))
            kind = (expected["status"].name, expected["gpa"] != INVALID_GPA, expected["gpa_next"] != INVALID_GPA)
            seen[kind] = seen.get(kind, 0) + 1
        assert words_in(vcpu, mem.words) == mem.words == words_in(again, mem.words)
    wanted = [("OK", True, False), ("OK", True, True), ("PAGE_FAULT", False, False), ("PAGE_FAULT", True, False)]
    assert [kind for kind in wanted if seen.get(kind, 0) < 10] == []


def scalar_span(walk, gva, size, access):
    """The columns of span(); an exception does not tell where the first page lies."""
    try:
        parts = walk.span(gva, size, access)
    except PageFault as fault:
        return result(None, None, Status.PAGE_FAULT, fault.error_code, fault.address)
    except GeneralProtection as fault:
        return result(None, None, Status.NON_CANONICAL, 0, fault.address)
    assert sum(length for _, length in parts) == size
    return result(parts[0][0], parts[1][0] if len(parts) == 2 else INVALID_GPA)


def test_registers_per_row():
    """One batch over register sets of every mode equals one call per set; each row wraps at its own width."""
    bases = {mode: 0x100000 * (number + 1) for number, mode in enumerate(MODES)}
    tables = [builders.PageTables(mode, base) for mode, base in bases.items()]
    for number, table in enumerate(tables):
        top = builders.sign_extend(-0x1000 & (1 << 64) - 1, table.mode)
        for page, gva in enumerate((top, 0, 0x5000, 0x6000)):
            table.map(gva, 0x1000000 * (number + 1) + 0x2000 * page)
    gpas, pages = (np.concatenate(parts) for parts in zip(*(table.pages() for table in tables), strict=True))
    vcpu = Vcpu(GuestMemory.from_pages(gpas, pages))
    regs = [Regs(**table.regs()) for table in tables] + [Regs(**OFF)]
    rng = np.random.default_rng(5)
    gva = rng.choice(np.array([0x5FFE, 0x6FFE, 0xFFFFFFFE, (1 << 64) - 2, 0x7FFFFFFFFFFE, 0x5100005FFE], U64), 600)
    ctx, size, access = rng.integers(0, 5, 600, U32), rng.integers(1, 8, 600, U8), rng.choice(np.array([0, 2], U8), 600)
    together = vcpu.gva_walk.translate_span(gva, size, access, regs=regs, ctx=ctx)
    threaded = vcpu.gva_walk.translate_span(gva, size, access, regs=vcpu.gva_walk.prepare(regs), ctx=ctx, threads=3)
    for number, one in enumerate(regs):
        rows = np.flatnonzero(ctx == number)
        vcpu.set_regs(**one.__dict__)
        alone = vcpu.gva_walk.translate_span(gva[rows], size[rows], access[rows])
        single = vcpu.gva_walk.translate_span(gva[rows], size[rows], access[rows], regs=[one])
        for name in Span.__slots__:
            for other in (together, threaded):
                np.testing.assert_array_equal(getattr(other, name)[rows], getattr(alone, name), name)
            np.testing.assert_array_equal(getattr(single, name), getattr(alone, name), name)
    wrapped = gva == (1 << 64) - 2
    assert len(set(together.gpa_next[wrapped & (size > 2)].tolist())) == 5, "page 0 of each set"


# -- values -------------------------------------------------------------------------------------------------------------

def test_columns():
    """dtypes and shapes, and an empty batch."""
    _, vcpu = two_pages()
    for gva, text in ((np.array([0x5FFF, 0x5000, 0x7000], U64), "3 rows, 2 OK, 1 PAGE_FAULT"), (np.zeros(0, U64), "0 rows")):
        spans = vcpu.gva_walk.translate_span(gva, 2)
        dtypes = {name: getattr(spans, name).dtype for name in Span.__slots__}
        assert dtypes == {"gpa": U64, "gpa_next": U64, "status": U8, "error_code": U32, "address": U64}
        assert {getattr(spans, name).shape for name in Span.__slots__} == {gva.shape}
        assert repr(spans) == f"Span({text})"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_sizes_of_any_unsigned_type(dtype):
    _, vcpu = two_pages()
    spans = vcpu.gva_walk.translate_span(np.array([0x5FFE, 0x5FFE], U64), np.array([2, 3], dtype))
    assert spans.gpa_next.tolist() == [INVALID_GPA, HIGH]


@pytest.mark.parametrize("size", [0, -1, 4097, 1 << 62, 1 << 63, 1 << 64, 2.5, "8", None])
def test_bad_sizes(size):
    """0, more than a page, and what is no integer: an error that says what is allowed."""
    _, vcpu = two_pages()
    for call in (vcpu.gva_walk.span, lambda gva, n: vcpu.gva_walk.translate_span(np.array([gva], U64), n)):
        with pytest.raises((TypeError, ValueError), match="size: want"):
            call(0x5000, size)


@pytest.mark.parametrize("size", [np.array([1, 0], U8), np.array([1, 4097], np.uint16), np.array([1, (1 << 64) - 1], U64),
                                  np.array([1], U8), np.array([[1, 2]], U8), np.array([1, 2]), np.array([1.0, 2.0]), [1, 2]])
def test_bad_size_columns(size):
    _, vcpu = two_pages()
    with pytest.raises((TypeError, ValueError), match="size: want"):
        vcpu.gva_walk.translate_span(np.array([0x5000, 0x5000], U64), size)


@pytest.mark.parametrize("gva", [-1, 1 << 64, 1.5, "0x5000", None])
def test_bad_addresses(gva):
    _, vcpu = two_pages()
    with pytest.raises((TypeError, ValueError), match="gva: want"):
        vcpu.gva_walk.span(gva, 4)


def test_numpy_scalars_are_integers():
    """A uint64 from a column works like an int, at the wrap too, without a warning of numpy's."""
    _, vcpu = two_pages(gva=(1 << 64) - 0x1000, next_gva=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = vcpu.gva_walk.span(np.uint64((1 << 64) - 1), np.uint8(3))
    assert parts == [(LOW + 0xFFF, 1), (HIGH, 2)]
    assert {type(value) for part in parts for value in part} == {int}
