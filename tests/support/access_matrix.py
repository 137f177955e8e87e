# SPDX-License-Identifier: Apache-2.0
"""The access matrix: every combination of entry bits, control bits and kinds of access, one flag per condition.

A *case* is an integer whose bit i is the condition FLAGS[i].  Its meaning comes from the manuals' formats alone.

Names and scalars::

    FLAGS                        ordered names of the conditions
    flags_of(bits)               {name: bool}
    bits_of(**flags)             the integer, e.g. bits_of(mode=4, pte_p=1, write=1); `mode` is the number of levels
    illegal(bits, cpu=CPU)       why a combination is dropped, or None
    decode(bits, cpu=CPU)        a Case: registers, access, entries
    expected(case, cpu=CPU)      an Expected(status, error_code, level, ad), from oracle.py

Arrays::

    generate(rng, n, cpu=CPU)            Cases, n legal ones
    cases_from_bits(bits, cpu=CPU)       Cases of an array of integers
    expected_array(cases, cpu=CPU)       ExpectedArray(fault, error_code, level, ad), rule by rule on whole arrays

`Cases` holds one array per attribute (see its docstring); `cases[i]` is a Case, `cases[mask]` are Cases, and iterating
gives Case after Case.  An entry of a case has everything but the table pointers: those depend on where the tables lie,
which `layout()` of access_layout.py decides.  `ad` is, per level, the mask of A and D bits that turn from 0 to 1.

Conditions: the reserved physical bit of a PTE is bit 51, of a PDE bit MAXPHYADDR; `pte_hi` is bit 52 (ignored in long
mode, reserved in PAE paging); `pde_rsvd_low` is bit 13 of a large page, bit 21 in 32-bit paging; `pkey` selects key 5
instead of 0, `pkru_ad` and `pkru_wd` are this key's bits in PKRU if `pkey` is set, else key 0's; `pkrs_ad` and `pkrs_wd`
are those in IA32_PKRS.  `shadow_stack` is an access to a shadow stack, with CR4.CET.  `pdpte_p` is, in PAE paging, the
present bit of one of the four PDPTE registers.  PML4E and PML5E are P, R/W, U/S, A.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import oracle

CPU = oracle.Cpu(vendor="intel", maxphyaddr=40, gbpages=True, pse36=True, conformance="sdm")

PTE_FLAGS = ("pte_p", "pte_w", "pte_u", "pte_nx", "pte_a", "pte_d", "pte_pat", "pte_rsvd", "pte_hi")
PDE_FLAGS = ("pde_p", "pde_w", "pde_u", "pde_nx", "pde_a", "pde_d", "pde_ps", "pde_rsvd", "pde_rsvd_low")
PDPTE_FLAGS = ("pdpte_p", "pdpte_w", "pdpte_u", "pdpte_nx")
ACCESS_FLAGS = ("write", "fetch", "user", "ac", "implicit", "shadow_stack")
REG_FLAGS = ("pkru_ad", "pkru_wd", "pkey", "cr0_wp", "efer_nx", "cr4_pse", "cr4_smep", "cr4_smap", "cr4_pke", "pkrs_ad",
             "pkrs_wd", "cr4_pks")
FLAGS = ("mode0", "mode1", *PTE_FLAGS, *PDE_FLAGS, *PDPTE_FLAGS, *ACCESS_FLAGS, *REG_FLAGS)

# Chance in 256 that generate() sets a condition; 128 where nothing is said.
CHANCES = {
    "pte_p": 240,
    "pde_p": 244,
    "pdpte_p": 248,
    "pte_w": 160,
    "pde_w": 176,
    "pdpte_w": 192,
    "pte_u": 160,
    "pde_u": 176,
    "pdpte_u": 192,
    "pte_nx": 48,
    "pde_nx": 32,
    "pdpte_nx": 32,
    "pte_rsvd": 12,
    "pte_hi": 32,
    "pde_rsvd": 12,
    "pde_rsvd_low": 32,
    "pde_ps": 80,
    "fetch": 85,
    "implicit": 48,
    "shadow_stack": 48,
    "cr4_pse": 208,
    "efer_nx": 192,
}

KEY = 5
LEVEL_NAMES = ("pte", "pde", "pdpte")
ENTRY_BITS = {"p": 0, "w": 1, "u": 2, "a": 5, "d": 6, "pat": 7, "ps": 7, "nx": 63, "rsvd": None, "hi": 52}
PTE_RESERVED_BIT = 51
FULL_ENTRY = oracle.P | oracle.RW | oracle.US | oracle.ACCESSED
BASE_CR0 = oracle.CR0_PG | 1
CR4_CET = 1 << 23
EFER_LME = 1 << 8
LARGE_FRAMES = 0x80000000
SMALL_FRAMES = 0x40000000


@dataclass(frozen=True)
class Case:
    """One combination as plain integers and bools.

    `levels` is 2 (32-bit paging), 3 (PAE), 4 or 5.  `entries[level - 1]` has no table pointer; `frame` is where the
    page lies and is to be ORed into the leaf.  `large`: the PDE maps the page.
    """

    bits: int
    levels: int
    cr0: int
    cr4: int
    efer: int
    pkru: int
    pkrs: int
    write: bool
    fetch: bool
    user: bool
    ac: bool
    implicit: bool
    shadow_stack: bool
    large: bool
    frame: int
    entries: tuple


@dataclass
class Cases:
    """Many cases: each attribute of Case as an array of n, `entries` as uint64[n, 5]."""

    bits: np.ndarray
    levels: np.ndarray
    cr0: np.ndarray
    cr4: np.ndarray
    efer: np.ndarray
    pkru: np.ndarray
    pkrs: np.ndarray
    write: np.ndarray
    fetch: np.ndarray
    user: np.ndarray
    ac: np.ndarray
    implicit: np.ndarray
    shadow_stack: np.ndarray
    large: np.ndarray
    frame: np.ndarray
    entries: np.ndarray

    def __len__(self):
        return len(self.bits)

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            return next(iter(self[np.array([key])]))
        return Cases(*(getattr(self, field.name)[key] for field in fields(self)))

    def __iter__(self):
        columns = [getattr(self, field.name).tolist() for field in fields(self)]
        for row in zip(*columns, strict=True):
            yield Case(*row[:-1], tuple(row[-1]))


class Expected(NamedTuple):
    """status "ok" or "page_fault"; `level` as in oracle.Result; `ad[level - 1]` are the A/D bits newly set."""

    status: str
    error_code: int
    level: int
    ad: tuple


class ExpectedArray(NamedTuple):
    """bool[n], uint32[n], uint8[n], uint64[n, 5]."""

    fault: np.ndarray
    error_code: np.ndarray
    level: np.ndarray
    ad: np.ndarray


def flags_of(bits):
    """{name: bool} of a combination."""
    return {name: bool(bits >> position & 1) for position, name in enumerate(FLAGS)}


def bits_of(mode=4, **flags):
    """The combination with these conditions; `mode` is the number of levels."""
    bits = mode - 2
    for name, value in flags.items():
        bits |= bool(value) << FLAGS.index(name)
    return bits


# Legality.  Each rule takes the conditions, scalars or arrays alike, and returns where it drops the combination.


def _long(f):
    return f["mode1"]


def _two_level(f):
    return ~(f["mode0"] | f["mode1"])


def _pae(f):
    return f["mode0"] & ~f["mode1"]


def _large(f):
    return f["pde_ps"] & (~_two_level(f) | f["cr4_pse"])


def _any(f, names):
    found = f[names[0]]
    for name in names[1:]:
        found = found | f[name]
    return found


def _more_than_one_reserved(f):
    one = [f["pte_rsvd"], f["pde_rsvd"], f["pde_rsvd_low"], f["pte_hi"] & _pae(f)]
    return sum(condition.astype(np.uint8) for condition in one) > 1


RULES = (
    ("no XD bit in 4-byte entries", lambda f: _two_level(f) & (f["pte_nx"] | f["pde_nx"])),
    ("no such bit in 4-byte entries", lambda f: _two_level(f) & (f["pte_rsvd"] | f["pte_hi"] | f["pde_rsvd"])),
    ("no PDPTE in 32-bit paging", lambda f: _two_level(f) & _any(f, PDPTE_FLAGS)),
    ("no rights in PAE PDPTEs", lambda f: _pae(f) & _any(f, PDPTE_FLAGS[1:])),
    ("no keys outside long mode", lambda f: ~_long(f) & f["pkey"]),
    ("bit 13 or 21 is reserved in large pages only", lambda f: f["pde_rsvd_low"] & ~_large(f)),
    ("a large page has no PTE", lambda f: _large(f) & _any(f, PTE_FLAGS)),
    ("more than one reserved bit", _more_than_one_reserved),
    ("write and fetch at once", lambda f: f["write"] & f["fetch"]),
    ("implicit accesses are data accesses", lambda f: f["implicit"] & f["fetch"]),
    ("no fetches from shadow stacks", lambda f: f["shadow_stack"] & f["fetch"]),
    ("CR4.CET needs CR0.WP", lambda f: f["shadow_stack"] & ~f["cr0_wp"]),
)
NO_ADDRESS_BIT, NO_PKS = "no reserved address bit on this CPU", "KVM offers no PKS"


def _no_reserved_address_bit(f, cpu):
    """Bit 51, or bit MAXPHYADDR, is an address bit or ignored on this CPU."""
    return (f["pte_rsvd"] | f["pde_rsvd"]) & (cpu.maxphyaddr > PTE_RESERVED_BIT)


def _no_pks(f, cpu):
    return f["cr4_pks"] & (cpu.conformance == "kvm")


def _columns(bits):
    bits = np.asarray(bits, np.uint64)
    return {name: (bits >> np.uint64(position) & np.uint64(1)).astype(bool) for position, name in enumerate(FLAGS)}


def illegal(bits, cpu=CPU):
    """Why this combination makes no sense, or None."""
    columns = _columns([bits])
    if _no_reserved_address_bit(columns, cpu)[0]:
        return NO_ADDRESS_BIT
    if _no_pks(columns, cpu)[0]:
        return NO_PKS
    for reason, dropped in RULES:
        if dropped(columns)[0]:
            return reason
    return None


def legal_array(bits, cpu=CPU):
    """bool[n]: illegal() is None."""
    columns = _columns(bits)
    good = ~_no_reserved_address_bit(columns, cpu) & ~_no_pks(columns, cpu)
    for _, dropped in RULES:
        good &= ~dropped(columns)
    return good


# Cases from combinations.


def cases_from_bits(bits, cpu=CPU):
    """Cases of an array of combinations."""
    bits = np.asarray(bits, np.uint64)
    f = _columns(bits)
    n = len(bits)
    levels = (2 + f["mode0"] + 2 * f["mode1"].astype(np.uint8)).astype(np.uint8)
    large = _large(f)

    cr0 = np.full(n, BASE_CR0, np.uint64) | _put(f["cr0_wp"], oracle.CR0_WP)
    cr4 = _put(levels > 2, oracle.CR4_PAE) | _put(levels == 5, oracle.CR4_LA57)
    cr4 |= _put(f["cr4_pse"], oracle.CR4_PSE) | _put(f["cr4_smep"], oracle.CR4_SMEP)
    cr4 |= _put(f["cr4_smap"], oracle.CR4_SMAP) | _put(f["cr4_pke"], oracle.CR4_PKE)
    cr4 |= _put(f["cr4_pks"], oracle.CR4_PKS) | _put(f["shadow_stack"], CR4_CET)
    efer = _put(levels > 3, EFER_LME | oracle.EFER_LMA) | _put(f["efer_nx"], oracle.EFER_NXE)
    key = np.where(f["pkey"], np.uint64(KEY), np.uint64(0))
    pkru = (_put(f["pkru_ad"], 1) | _put(f["pkru_wd"], 2)) << (np.uint64(2) * key)
    pkrs = (_put(f["pkrs_ad"], 1) | _put(f["pkrs_wd"], 2)) << (np.uint64(2) * key)

    entries = np.zeros((n, 5), np.uint64)
    for name in PTE_FLAGS + PDE_FLAGS + PDPTE_FLAGS:
        prefix, _, condition = name.partition("_")
        entries[:, LEVEL_NAMES.index(prefix)] |= _put(f[name], 1) << _bit_position(prefix, condition, levels, cpu)
    entries[:, 1] |= np.where(large, key << np.uint64(59), np.uint64(0))
    entries[:, 0] |= np.where(large, np.uint64(0), key << np.uint64(59))
    entries[:, 3] = _put(levels > 3, FULL_ENTRY)
    entries[:, 4] = _put(levels > 4, FULL_ENTRY)

    number = bits * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    frame = np.where(
        large,
        np.uint64(LARGE_FRAMES) + (number % np.uint64(64) << np.uint64(22)),
        np.uint64(SMALL_FRAMES) + (number % np.uint64(0x10000) << np.uint64(12)),
    )
    access = [f[name] for name in ACCESS_FLAGS]
    return Cases(bits, levels, cr0, cr4, efer, pkru, pkrs, *access, large, frame, entries)


def _put(condition, mask):
    return np.where(condition, np.uint64(mask), np.uint64(0))


def _bit_position(prefix, condition, levels, cpu):
    if condition == "rsvd_low":
        return np.where(levels == 2, np.uint64(21), np.uint64(13))
    if condition == "rsvd":
        return np.uint64(PTE_RESERVED_BIT if prefix == "pte" else cpu.maxphyaddr)
    return np.uint64(ENTRY_BITS[condition])


def decode(bits, cpu=CPU):
    """The Case of one combination."""
    return cases_from_bits([bits], cpu)[0]


def random_bits(rng, n):
    """n random combinations, biased by CHANCES; mostly not legal as they stand."""
    bits = np.zeros(n, np.uint64)
    for position, name in enumerate(FLAGS):
        drawn = rng.integers(0, 256, n, dtype=np.uint8) < CHANCES.get(name, 128)
        bits |= drawn.astype(np.uint64) << np.uint64(position)
    return bits


def _without(bits, where, names):
    mask = np.uint64(sum(1 << FLAGS.index(name) for name in names))
    return np.where(where, bits & ~mask, bits)


def made_applicable(bits):
    """Clear the conditions that do not exist in a combination's mode; what is left may still be illegal."""
    f = _columns(bits)
    two_level = _two_level(f)
    bits = _without(bits, two_level, ("pte_nx", "pde_nx", "pte_rsvd", "pte_hi", "pde_rsvd", *PDPTE_FLAGS))
    bits = _without(bits, _pae(f), PDPTE_FLAGS[1:])
    bits = _without(bits, ~_long(f), ("pkey",))
    bits = _without(bits, _large(f), PTE_FLAGS)
    bits = _without(bits, ~_large(f), ("pde_rsvd_low",))
    bits = _without(bits, f["write"] & f["fetch"], ("write",))
    return _without(bits, f["fetch"] | ~f["cr0_wp"], ("shadow_stack",)) & _without(bits, f["fetch"], ("implicit",))


def generate(rng, n, cpu=CPU):
    """n random legal Cases; `rng` is a numpy Generator.  Combinations may repeat."""
    found = []
    missing = n
    while missing:
        bits = made_applicable(random_bits(rng, missing + missing // 8 + 16))
        bits = bits[legal_array(bits, cpu)][:missing]
        found.append(bits)
        missing -= len(bits)
    return cases_from_bits(np.concatenate(found), cpu)


# Expectations.

_TABLES = (0x1000, 0x2000, 0x3000, 0x4000, 0x5000)


def expected(case, cpu=CPU):
    """What oracle.py says about `case`, in a memory of its own with entry 0 of every table in use."""
    memory = oracle.Memory({_TABLES[level]: _filled(case, level) for level in range(case.levels)})
    cr3 = _TABLES[case.levels - 1]
    pdptrs = (_filled(case, 2), 0, 0, 0) if case.levels == 3 else None
    regs = oracle.Regs(case.cr0, cr3, case.cr4, case.efer, case.pkru, pdptrs, case.pkrs)
    result = oracle.translate(
        memory,
        cpu,
        regs,
        0,
        write=case.write,
        fetch=case.fetch,
        user=case.user,
        ac=case.ac,
        implicit=case.implicit,
        shadow_stack=case.shadow_stack,
        set_ad=False,
    )
    ad = [0] * 5
    for gpa, _, old, new in result.writes:
        ad[_TABLES.index(gpa)] = old ^ new
    return Expected(result.status, result.error_code, result.level, tuple(ad))


def _filled(case, index):
    """Entry `index` of a case, with the table below or the page in its address field."""
    if index == 0 or (index == 1 and case.large):
        return case.entries[index] | case.frame
    return case.entries[index] | _TABLES[index - 1]


def expected_array(cases, cpu=CPU):
    """The same judgement on whole arrays: one boolean expression per rule of the manuals.

    Read from the entries, not from the conditions they were made of.  Sections "Access Rights", "Protection Keys",
    "Page-Fault Exceptions" and "Accessed and Dirty Flags".
    """
    n = len(cases)
    user = cases.user & ~cases.implicit
    ac = cases.ac & ~cases.implicit
    data = ~cases.fetch
    wp = cases.cr0 & np.uint64(oracle.CR0_WP) != 0
    nxe = cases.efer & np.uint64(oracle.EFER_NXE) != 0
    long_mode = cases.efer & np.uint64(oracle.EFER_LMA) != 0
    pae_bit, pse, smep, smap, pke, pks = (
        cases.cr4 & np.uint64(mask) != 0
        for mask in (oracle.CR4_PAE, oracle.CR4_PSE, oracle.CR4_SMEP, oracle.CR4_SMAP, oracle.CR4_PKE, oracle.CR4_PKS)
    )
    shadow_stack = cases.shadow_stack & (cpu.conformance == "sdm")

    walking = np.ones(n, bool)
    reached = np.zeros(n, np.uint8)
    not_present = np.zeros(n, bool)
    reserved = np.zeros(n, bool)
    writable = np.ones(n, bool)
    upper_writable = np.ones(n, bool)
    user_page = np.ones(n, bool)
    executable = np.ones(n, bool)
    used = np.zeros((n, 5), bool)
    leaf_entry = np.zeros(n, np.uint64)
    for level in (5, 4, 3, 2, 1):
        entry = cases.entries[:, level - 1]
        here = walking & (cases.levels >= level)
        reached[here] = level
        pdpte_register = here & ~long_mode & (level == 3)

        not_present |= here & ~_has(entry, oracle.P)
        here &= _has(entry, oracle.P)
        bad = _reserved_bits(entry, level, long_mode, pae_bit, pse, nxe, cpu) & ~pdpte_register
        reserved |= here & bad
        here &= ~bad
        walking &= here | (cases.levels < level)

        counts = here & ~pdpte_register
        writable &= ~counts | _has(entry, oracle.RW)
        user_page &= ~counts | _has(entry, oracle.US)
        executable &= ~(counts & _has(entry, oracle.XD))
        used[:, level - 1] = counts
        leaf = here & (_maps_large_page(entry, level, long_mode, pae_bit, pse) | (level == 1))
        leaf_entry[leaf] = entry[leaf]
        upper_writable &= ~counts | leaf | _has(entry, oracle.RW)
        walking &= ~leaf
    mapped = ~not_present & ~reserved

    is_shadow_stack = upper_writable & ~_has(leaf_entry, oracle.RW) & _has(leaf_entry, oracle.DIRTY)
    shadow_stack_fault = shadow_stack & (~is_shadow_stack | (user != user_page))
    user_fault = user & ~user_page
    write_fault = cases.write & ~writable & (user | wp) & ~shadow_stack
    fetch_fault = cases.fetch & ~executable
    smep_fault = cases.fetch & ~user & user_page & smep
    smap_fault = data & ~user & user_page & smap & ~ac & ~shadow_stack
    key = leaf_entry >> np.uint64(59) & np.uint64(15)
    register = np.where(user_page, cases.pkru, cases.pkrs)
    access_disable = register >> (np.uint64(2) * key) & np.uint64(1) != 0
    write_disable = register >> (np.uint64(2) * key + np.uint64(1)) & np.uint64(1) != 0
    key_applies = mapped & long_mode & np.where(user_page, pke, pks) & data
    key_fault = key_applies & (access_disable | (write_disable & cases.write & (wp | (user & user_page))))
    no_right = mapped & (user_fault | write_fault | fetch_fault | smep_fault | smap_fault | shadow_stack_fault | key_fault)
    fault = not_present | reserved | no_right

    reports_fetch = smep | (nxe & (pae_bit | (cpu.conformance == "kvm")))
    code = _put(~not_present, oracle.PF_PRESENT) | _put(cases.write, oracle.PF_WRITE) | _put(user, oracle.PF_USER)
    code |= _put(reserved, oracle.PF_RESERVED) | _put(key_fault, oracle.PF_PKEY)
    code |= _put(cases.fetch & reports_fetch, oracle.PF_FETCH) | _put(shadow_stack, oracle.PF_SHADOW_STACK)

    ad = np.zeros((n, 5), np.uint64)
    for level in (1, 2, 3, 4, 5):
        entry = cases.entries[:, level - 1]
        ok = used[:, level - 1] & ~fault
        ad[:, level - 1] = _put(ok & ~_has(entry, oracle.ACCESSED), oracle.ACCESSED)
        dirtied = ok & cases.write & (reached == level) & ~_has(entry, oracle.DIRTY)
        ad[:, level - 1] |= _put(dirtied, oracle.DIRTY)
    return ExpectedArray(fault, np.where(fault, code, np.uint64(0)).astype(np.uint32), reached, ad)


def _has(entry, mask):
    return entry & np.uint64(mask) != 0


def _maps_large_page(entry, level, long_mode, pae_bit, pse):
    """PS of a PDE (with CR4.PSE in 32-bit paging) or of a long-mode PDPTE; no other entry maps a large page."""
    if level == 2:
        return _has(entry, oracle.PS) & (pae_bit | pse)
    return _has(entry, oracle.PS) & long_mode & (level == 3)


def _reserved_bits(entry, level, long_mode, pae_bit, pse, nxe, cpu):
    """Where a present entry has a reserved bit set, by paging mode and level."""
    large = _maps_large_page(entry, level, long_mode, pae_bit, pse)
    pae = pae_bit & ~long_mode
    physical = (long_mode | pae) & _has(entry, oracle.bits(cpu.maxphyaddr, 51))
    high = pae & _has(entry, oracle.bits(52, 62))
    xd = (long_mode | pae) & ~nxe & _has(entry, oracle.XD)
    bad = physical | high | xd
    if level >= 4:
        bad = bad | _has(entry, oracle.PS)
        if cpu.vendor == "amd":
            bad = bad | _has(entry, 1 << 8)
    if level == 3:
        bad = bad | (large & _has(entry, oracle.bits(13, 29)))
        if not cpu.gbpages:
            bad = bad | large
    if level == 2:
        bad = bad | (large & pae_bit & _has(entry, oracle.bits(13, 20)))
        width = min(40, cpu.maxphyaddr) if cpu.conformance == "sdm" else 36
        if not cpu.pse36:
            width = 32
        bad = bad | (large & ~pae_bit & _has(entry, oracle.bits(width - 19, 21)))
    return bad
