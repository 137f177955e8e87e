# SPDX-License-Identifier: Apache-2.0
"""A recording of six accesses, made by hand, and the files that it is written to."""

import importlib.util
import io
import json
import shutil
import sys
import zipfile

import numpy as np
import pytest

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
META = {"scenario": "toy", "mode": "4l", "cpu": "max,la57=off", "cr0": "0x80050033", "cr2": "0x0", "cr3": "0x1000",
        "cr4": "0x20", "efer": "0xd01", "cpl": 3, "ip": "0x400000", "pkru_workload": "0x55555554"}


def toy_trace():
    """Six accesses over three page rows, with every kind and every privilege."""
    return {
        "pidx": np.array([0, 1, 2, 0, 1, 2], U16), "off": np.array([0, 8, 4095, 16, 24, 32], U16),
        "kind": np.array([0, 1, 2, 0, 1, 2], U8), "size": np.array([8, 4, 1, 8, 4, 1], U8),
        "priv": np.array([0, 1, 2, 2, 0, 1], U8),
        "page_gva": np.array([0x400000, 0x401000, 0xFFFFFFFFFFFFF000], U64),
        "page_gpa": np.array([0x5000, 0x6000, 0xFEE00000], U64),
        "page_ctx": np.array([0, 0, 1], U32), "page_io": np.array([0, 0, 1], U8),
        "ctx": np.array([[0, 0x1000, 0, 0x80050033, 0x20, 0xD01], [0, 0x2000, 0, 0x80050033, 0x20, 0xD01]], U64),
        "ev_pos": np.array([0, 2, 6], U64), "ev_code": np.array([7, 1, 3], U8),
        "ev_val": np.array([0, 0x2000, 0x400000], U64), "ev_aux": np.zeros(3, U64),
        "pf_pos": np.array([4], U64), "pf_cr2": np.array([0x401018], U64), "pf_err": np.array([6], U32),
        "pf_ctx": np.array([0], U32),
        "npf_pos": np.array([3], U64), "npf_gpa": np.array([0x7000], U64), "npf_info1": np.array([1 << 32], U64),
    }


def toy_tables():
    """Two table pages and two stores to them."""
    return {"pfn": np.array([2, 1], U64), "level": np.array([16, 2], U32),
            "data": np.arange(2 * 4096, dtype=np.int64).astype(U8).reshape(2, 4096),
            "w_pos": np.array([1, 4], U64), "w_gpa": np.array([0x1000, 0x2FF8], U64), "w_val": np.array([7, 0], U64)}


def toy_answers():
    return {"gva": np.array([0x400000, 1], U64), "gpa": np.array([0x5000, 0], U64)}


def write_toy(root):
    """Write the toy recording with both phases; return its directory."""
    root.mkdir()
    (root / "meta.json").write_text(json.dumps(META))
    for phase, prefix in (("static", ""), ("dyn", "dyn_")):
        np.savez(root / f"{phase}_trace.npz", **toy_trace())
        np.savez(root / f"{prefix}tables.npz", **toy_tables())
    np.savez(root / "gva2gpa.npz", **toy_answers(), mapped=np.array([1, 0], U8))
    np.savez(root / "info_tlb.npz", **toy_answers(), flags=np.array([0x1FF, 0], U16))
    np.savez(root / "kvm_translate.npz", **toy_answers(), valid=np.array([1, 0], U8))
    return root


def zip_of(members, method=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return content.getvalue()


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def has_zstd_reader():
    return bool(shutil.which("zstd") or importlib.util.find_spec("zstandard") or sys.version_info >= (3, 14))


NEEDS_ZSTD = pytest.mark.skipif(not has_zstd_reader(), reason="no zstd reader: Python 3.14, zstandard or the zstd tool")
