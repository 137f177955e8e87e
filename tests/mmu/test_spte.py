# SPDX-License-Identifier: Apache-2.0
"""SPTEs against bit positions of their own and against what each state must mean."""

import itertools

import numpy as np
import pytest

from kvmmu.mmu.core._spte import SpteFormat
from kvmmu.mmu.host import Host

R, W, U, X = 1, 2, 4, 8                                 # rights (ACC_*)
MMU_PRESENT, A_D_OFF, WRPROT_ONLY, BIT63 = 1 << 11, 1 << 60, 2 << 60, 1 << 63
LEVEL_4K, LEVEL_2M, LEVEL_1G = 1, 2, 3
ROLE_AD_DISABLED, ROLE_GUEST_MODE, ROLE_ACCESS_SHIFT = 1 << 16, 1 << 17, 8

HOSTS = {
    "ept": Host(tdp="ept"),
    "ept without mbec": Host(tdp="ept", mbec=False),
    "ept without ad": Host(tdp="ept", ad=False),
    "ept with pml": Host(tdp="ept", pml=True),
    "ept, nx huge pages": Host(tdp="ept", nx_huge_pages=True),
    "npt": Host(tdp="npt", maxphyaddr=48),
    "npt, nx huge pages": Host(tdp="npt", maxphyaddr=48, nx_huge_pages=True),
    "shadow": Host(tdp=None, maxphyaddr=46),
}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def expected_spte(host, pfn, access, role, host_writable, may_write, prefetch, synchronizing):
    """A leaf SPTE bit by bit, one rule after the other."""
    ept = host.tdp == "ept"
    hostw, mmuw, accessed, dirty = (53, 55, 8, 9) if ept else (9, 10, 5, 6)
    ad_off = bool(role & ROLE_AD_DISABLED)
    level = role & 15
    spte = MMU_PRESENT | pfn << 12 | (BIT63 if ept else 1)
    spte |= A_D_OFF if ad_off else WRPROT_ONLY if host.pml and role & ROLE_GUEST_MODE else 0
    if level > LEVEL_4K:
        spte |= 1 << 7
        if host.nx_huge_pages and access & X:
            access &= ~(X | (U if ept else 0))
    rights = access & R
    if ept:
        rights |= (4 if access & X else 0) | (1 << 10 if access & U and host.mbec else 0)
        spte |= 6 << 3 | 1 << 6
    else:
        rights |= (0 if access & X else BIT63) | (4 if access & U else 0)
    if host_writable:
        spte |= 1 << hostw
        if access & W and may_write:
            rights |= 2
            spte |= 1 << mmuw | (1 << dirty if host.ad or not ept else 0)
    spte |= rights
    if not prefetch or synchronizing:
        return spte | 1 << accessed
    if ad_off and ept and spte & (7 | (1 << 10 if host.mbec else 0)):
        spte |= (spte & (1 | 4 | 1 << 10)) << 52
        spte &= ~(7 | (1 << 10 if host.mbec else 0))
    return spte


@each_host
def test_make_spte_in_full(host):
    """Every combination of rights and circumstances."""
    fmt = SpteFormat(host)
    for access, level, hw, mw, pre, sync, bits in itertools.product(
            range(16), (1, 2, 3), (0, 1), (0, 1), (0, 1), (0, 1), (0, ROLE_AD_DISABLED, ROLE_GUEST_MODE)):
        if bits & ROLE_AD_DISABLED and host.tdp != "ept":
            continue
        role = level | bits | 15 << ROLE_ACCESS_SHIFT
        got = fmt.make_spte(0x40000, access, role=role, host_writable=hw, may_write=mw, prefetch=pre, synchronizing=sync)
        want = expected_spte(host, 0x40000, access, role, hw, mw, pre, sync)
        assert want == got, (f"access {access} level {level} host_writable {hw} may_write {mw} prefetch {pre} sync {sync} "
                             f"role {role:#x}: want {want:#x}, got {got:#x}")


@each_host
def test_what_make_spte_makes_passes_the_audit(host):
    """Rights that the format can express are never reserved, and W is explained by the software bits."""
    fmt = SpteFormat(host)
    page_format = fmt.tdp_format() if host.tdp else fmt.shadow_format()
    for access, level, hw, mw in itertools.product((R, R | W, R | X, R | W | U | X), (1, 2, 3), (0, 1), (0, 1)):
        role = level | (ROLE_AD_DISABLED if not host.ad and host.tdp == "ept" else 0)
        spte = fmt.make_spte(0x40000, access, role=role, host_writable=hw, may_write=mw)
        assert fmt.audit_page(page_format, np.array([spte], np.uint64), level, role)[0] == 0


@pytest.mark.parametrize(("bits", "bad"), [
    (2, 1), (2 | 1 << 53, 1), (1 << 55, 1), (2 | 1 << 55, 1),
    (2 | 1 << 53 | 1 << 55, 0), (1 << 53 | 1 << 55, 0), (1 << 53, 0), (0, 0)])
def test_writable_invariants(bits, bad):
    """The table of W, MMU-writable and host-writable."""
    fmt = SpteFormat(Host(tdp="ept"))
    spte = MMU_PRESENT | BIT63 | 1 | 6 << 3 | bits
    assert bad == fmt.audit_page(fmt.tdp_format(), np.array([spte], np.uint64), 1)[0]


def test_audit_finds_reserved_bits_and_types():
    """Each kind of damage has its bit; entries that are not present are right whatever they hold."""
    fmt = SpteFormat(Host(tdp="ept", maxphyaddr=46, nx_huge_pages=True))
    zero = fmt.tdp_format()
    good = fmt.make_spte(0x200, R | X, role=LEVEL_4K)
    page = np.array([good, good | 1 << 50, good | A_D_OFF, (good & ~5) | 4, (good | 1 << 50) & ~MMU_PRESENT, BIT63,
                     BIT63 | 0x1A0], np.uint64)
    assert [0, 2, 4, 2, 0, 0, 0] == fmt.audit_page(zero, page, 1).tolist()
    huge = fmt.make_spte(0x200, R | X, role=LEVEL_2M)
    assert [0, 16] == fmt.audit_page(zero, np.array([huge, huge | 4], np.uint64), 2).tolist()


@pytest.mark.parametrize("host", [Host(tdp="ept"), Host(tdp="ept", maxphyaddr=46, l1tf=True), Host(tdp="npt", maxphyaddr=48),
                                  Host(tdp="npt", maxphyaddr=44, l1tf=True)], ids=repr)
def test_mmio_round_trip(host):
    """Frame, rights and an 18-bit generation go in and come out; nothing that is a real entry looks like MMIO."""
    fmt = SpteFormat(host)
    rng = np.random.default_rng(1)
    gfn = rng.integers(0, 1 << (host.maxphyaddr - 13), 1000, np.uint64)
    for gen in (0, 1, 127, 128, 0x3FFFF, 0x40000, 0x15555, 0x2AAAA):
        sptes = fmt.make_mmio_sptes(gfn, R | W, gen)
        columns = fmt.mmio(sptes)
        assert columns["is_mmio"].all()
        np.testing.assert_array_equal(gfn, columns["gfn"])
        assert (columns["gen"] == gen % (1 << 18)).all()
        assert (columns["access"] == (R | W if host.tdp == "npt" else R)).all()
        assert not (sptes & np.uint64(MMU_PRESENT)).any()
    real = [fmt.make_spte(0x123, access, role=1) for access in range(16)] + [BIT63, BIT63 | 0x1A0, 0]
    assert not fmt.mmio(np.array(real, np.uint64))["is_mmio"].any()


def test_mmio_sptes_stop_the_processor():
    """An EPT misconfiguration, and a reserved bit under NPT; a 52-bit host has no such bit to spare."""
    ept, npt = SpteFormat(Host(tdp="ept")), SpteFormat(Host(tdp="npt", maxphyaddr=51))
    gfn = np.arange(64, dtype=np.uint64)
    for gen in (0, 0x3FFFF):
        assert ept.tdp_format().is_rsvd_bits_set(ept.make_mmio_sptes(gfn, 3, gen), 1).all()
        assert npt.tdp_format().is_rsvd_bits_set(npt.make_mmio_sptes(gfn, 3, gen), 1).all()
    assert not SpteFormat(Host(tdp="npt", maxphyaddr=52)).mmio_caching


def test_l1tf_inverts_the_top_address_bits():
    """The five top physical-address bits are all set, whatever the address."""
    fmt = SpteFormat(Host(tdp="ept", maxphyaddr=46, l1tf=True))
    sptes = fmt.make_mmio_sptes(np.array([0, 1, 1 << 29, (1 << 34) - 1], np.uint64), 1, 0)
    assert (sptes >> np.uint64(41) & np.uint64(31) == 31).all()


@pytest.mark.parametrize("mbec", [True, False])
def test_access_tracking(mbec):
    """Without A/D bits an old entry has no rights; restoring gives back all but W, which a fast page fault must earn."""
    fmt = SpteFormat(Host(tdp="ept", ad=False, mbec=mbec))
    for access in range(1, 16):
        spte = fmt.make_spte(0x77, access, role=LEVEL_4K | ROLE_AD_DISABLED)
        old = fmt.mark_for_access_track(np.array([spte], np.uint64))
        if spte & (7 | (1 << 10 if mbec else 0)):
            assert fmt.is_access_tracked(old)[0]
        assert int(fmt.access(old)[0]) == 0
        again = fmt.mark_for_access_track(old)
        assert old[0] == again[0]
        back = int(fmt.restore_access_track(old)[0])
        assert back == spte & ~(2 | 1 << 8)


def test_aging_with_ad_bits_clears_a():
    fmt = SpteFormat(Host(tdp="npt", maxphyaddr=48))
    spte = fmt.make_spte(0x77, 15, role=1)
    assert spte & ~(1 << 5) == int(fmt.mark_for_access_track(np.array([spte], np.uint64))[0])


def test_permission_fault_is_by_the_formats_own_table():
    """XS and XU apart under MBEC, reads from execute-only pages, and GMET: what an 'is executable' test cannot say."""
    ept = SpteFormat(Host(tdp="ept"))
    xs, xu = MMU_PRESENT | BIT63 | 1 | 4, MMU_PRESENT | BIT63 | 1 | 1 << 10
    entries = np.array([xs, xu, xs | xu, MMU_PRESENT | BIT63 | 4], np.uint64)
    mbec, plain = ept.tdp_format(smep=True), ept.tdp_format()
    read, fetch, user_fetch, write = 0, 16, 20, 2
    assert [False, True, False, False] == ept.permission_fault(mbec, entries, fetch).tolist()
    assert [True, False, False, True] == ept.permission_fault(mbec, entries, user_fetch).tolist()
    assert [False, True, False, False] == ept.permission_fault(plain, entries, user_fetch).tolist()
    assert [False, False, False, True] == ept.permission_fault(plain, entries, read).tolist()
    assert ept.permission_fault(plain, entries, write).all()
    # present, reserved, key and shadow-stack bits of an error code are no access
    assert [False, False, False, True] == ept.permission_fault(plain, entries, 1 | 8 | 32 | 64).tolist()

    npt = SpteFormat(Host(tdp="npt", maxphyaddr=48, gmet=True))
    user, supervisor = MMU_PRESENT | 1 | 4, MMU_PRESENT | 1
    pages = np.array([user, supervisor, user | BIT63, supervisor | BIT63], np.uint64)
    gmet = npt.tdp_format(smep=True)
    assert [True, False, True, True] == npt.permission_fault(gmet, pages, fetch).tolist()
    assert [False, False, True, True] == npt.permission_fault(gmet, pages, user_fetch).tolist()
    assert not npt.permission_fault(gmet, pages, 4).any()


@pytest.mark.parametrize("host", [Host(tdp="ept", nx_huge_pages=nx) for nx in (False, True)] +
                         [Host(tdp="npt", maxphyaddr=48, nx_huge_pages=nx) for nx in (False, True)], ids=repr)
def test_split_and_recovery_are_inverse(host):
    """512 small entries cover the huge page; the mitigation makes 4K parts executable again and the whole not."""
    fmt = SpteFormat(host)
    for access in (R, R | W, R | X | U, R | W | X | U):
        huge = fmt.make_spte(0x40000, access, role=LEVEL_1G | access << ROLE_ACCESS_SHIFT)
        parts = fmt.split(huge, LEVEL_2M | access << ROLE_ACCESS_SHIFT)
        assert parts.tolist() == [huge + (i << 21) for i in range(512)]
        small = fmt.split(int(parts[3]), LEVEL_4K | access << ROLE_ACCESS_SHIFT)
        for i in (0, 1, 511):
            assert int(small[i]) == fmt.make_spte(0x40000 + 3 * 512 + i, access, role=LEVEL_4K | access << ROLE_ACCESS_SHIFT)
        assert int(parts[3]) == fmt.make_huge_spte(int(small[17]), 2)
        assert huge == fmt.make_huge_spte(int(parts[100]), 3)


@each_host
def test_nonleaf_entries_restrict_nothing(host):
    fmt = SpteFormat(host)
    spte = fmt.make_nonleaf_spte(0x123000)
    want = R | W | X | (U if host.mbec or host.tdp != "ept" else 0)
    assert want == int(fmt.access(np.array([spte], np.uint64))[0])
    assert spte & 0xFFFFFFFFFF000 == 0x123000
    assert spte & MMU_PRESENT
    assert not spte & 1 << 7
    assert fmt.make_nonleaf_spte(0x123000, ad_disabled=True) & A_D_OFF


def test_shadow_zero_bits():
    """The four forms of the shadow-zero check, from the tables of reserved bits."""
    host = Host(tdp="ept", maxphyaddr=40)
    tdp = SpteFormat(host).tdp_format()
    assert tdp.bad_mt_xwr == 0xFF545454FFFF5454
    assert [0xFFF0000000000, 0xFFF0000000078, 0xFFF0000000078, 0xFFF00000000F8] == tdp.rsvd_bits_mask[0, :4].tolist()
    assert SpteFormat(host).shadow_format(nested=True, execonly=True).bad_mt_xwr == 0xFF444444FFFF4444
    only_2m = SpteFormat(Host(tdp="ept", maxphyaddr=40, max_page="2m")).tdp_format()
    assert 0xFFF003FFFF080 == int(only_2m.rsvd_bits_mask[1, 2])
    npt = SpteFormat(Host(tdp="npt", maxphyaddr=40, max_page="2m")).tdp_format()
    assert [0xFFF0000000000, 0xFFF0000000000, 0xFFF0000000080, 0xFFF0000000180] == npt.rsvd_bits_mask[0, :4].tolist()
    shadow = SpteFormat(Host(tdp=None, maxphyaddr=40)).shadow_format(gbpages=False)
    assert 0xFFF003FFFE080 == int(shadow.rsvd_bits_mask[1, 2])
    assert shadow.bad_mt_xwr == 0


def test_bad_arguments():
    fmt = SpteFormat(Host())
    with pytest.raises(ValueError, match="uint64"):
        fmt.access(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="level: want 2 to 3"):
        fmt.make_huge_spte(0, 1)
    with pytest.raises(ValueError, match="maxphyaddr: want 36 to 52, got 53"):
        Host(maxphyaddr=53)
    with pytest.raises(ValueError, match="page-modification"):
        Host(tdp="npt", pml=True)
