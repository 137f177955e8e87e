"""Make a small recording out of a large one: some accesses of a phase, in the same layout, well compressed.

Kept are the first N accesses with the page rows, events, faults and table writes that belong to them; or one block of
accesses in N, and all events, faults and table writes. Page tables are kept whole. The output is a function of the
input: archive members carry a fixed date.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from kvmmu.traces import Recording, open_npz

ANSWERS = ("gva2gpa", "info_tlb", "kvm_translate")
ZIP_METHODS = {"lzma": zipfile.ZIP_LZMA, "deflate": zipfile.ZIP_DEFLATED, "zst": zipfile.ZIP_STORED}
BLOCK = 4096
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
PER_ACCESS = ("pidx", "off", "kind", "size", "priv")
PER_PAGE_ROW = ("page_gva", "page_gpa", "page_ctx", "page_io")
POSITIONED = {"ev_pos": ("ev_code", "ev_val", "ev_aux"), "pf_pos": ("pf_cr2", "pf_err", "pf_ctx"),
              "npf_pos": ("npf_gpa", "npf_info1"), "w_pos": ("w_gpa", "w_val")}


def clip(arrays, accesses):
    """Return the arrays of a trace or table file, restricted to the first accesses."""
    clipped = dict(arrays)
    for name in PER_ACCESS:
        if name in arrays:
            clipped[name] = arrays[name][:accesses]
    if "pidx" in arrays:
        rows = int(clipped["pidx"].max()) + 1     # rows are numbered in order of first use
        clipped.update((name, arrays[name][:rows]) for name in PER_PAGE_ROW)
    for position, others in POSITIONED.items():
        if position in arrays:
            kept = arrays[position] < accesses
            clipped.update((name, arrays[name][kept]) for name in (position, *others))
    return clipped


def sample(arrays, kept):
    """Return the arrays of a trace or table file with the accesses that `kept` marks, and everything between them.

    What lies before an access that goes lies before the next one that stays.
    """
    sampled = dict(arrays)
    for name in PER_ACCESS:
        if name in arrays:
            sampled[name] = arrays[name][kept]
    if "pidx" in arrays:                              # rows are numbered in order of first use
        rows, first = np.unique(sampled["pidx"], return_index=True)
        rows = rows[np.argsort(first)]
        number = np.zeros(len(arrays["page_gva"]), arrays["pidx"].dtype)
        number[rows] = np.arange(len(rows))
        sampled["pidx"] = number[sampled["pidx"]]
        sampled.update((name, arrays[name][rows]) for name in PER_PAGE_ROW)
    before = np.concatenate([[0], np.cumsum(kept)]).astype(np.uint64)
    for position in POSITIONED:
        if position in arrays:
            sampled[position] = before[arrays[position]]
    return sampled


def histogram(values, name=str):
    """Count equal values: a dict for JSON."""
    return {name(value): int(count) for value, count in zip(*np.unique(values, return_counts=True), strict=True)}


def count_trace(trace):
    """Count what a trace holds, in the words of meta.json."""
    kind, priv, pidx = trace["kind"], trace["priv"], trace["pidx"]
    inside_guest = trace["ctx"][trace["page_ctx"], 0] == 1
    crossing = trace["off"].astype(np.uint32) + trace["size"] > 4096
    counts = {
        "accesses": kind.size, "loads": (kind == 0).sum(), "stores": (kind == 1).sum(), "fetches": (kind == 2).sum(),
        "user": (priv == 1).sum(), "smap_off": (priv == 2).sum(), "guest": inside_guest[pidx].sum(),
        "page_rows": trace["page_gva"].size, "contexts": len(trace["ctx"]), "io": trace["page_io"][pidx].sum(),
        "page_crossing": crossing.sum(), "unique_gva_pages": np.unique(trace["page_gva"]).size,
        "page_faults": trace["pf_pos"].size, "npt_faults": trace["npf_pos"].size,
    }
    return {**{name: int(value) for name, value in counts.items()},
            "pf_errors": histogram(trace["pf_err"], hex), "npf_info1": histogram(trace["npf_info1"], hex),
            "events": histogram(trace["ev_code"])}


def npz_bytes(arrays, method):
    """Serialise arrays as a numpy archive that does not depend on the time of day."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", ZIP_EPOCH)
            info.compress_type = ZIP_METHODS[method]
            info.create_system = 3          # else it would name the system that the tool runs on
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getvalue(), compresslevel=9)
    return content.getvalue()


def zst_bytes(content):
    """Compress with zstd, level 19, long window."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


def save(path, arrays, method):
    """Write `path`.npz, or `path`.npz.zst if that is the method."""
    content = npz_bytes(arrays, method)
    if method == "zst":
        path.with_name(f"{path.name}.npz.zst").write_bytes(zst_bytes(content))
    else:
        path.with_name(f"{path.name}.npz").write_bytes(content)


def bundle(source, out, accesses, phase="dyn", answers=(), method="lzma", one_in=1):
    """Write the first `accesses` accesses of a phase of the recording `source` (all if None) to the directory `out`.

    With one_in, of these one block of 4,096 in so many, the last one, and the accesses around events, faults and table writes.

    Returns
    -------
    Recording
        What was written, read back.
    """
    source, out = Path(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trace = open_npz(source / f"{phase}_trace.npz")
    whole = trace["kind"].size
    accesses = whole if accesses is None else min(accesses, whole)
    tables_name = "dyn_tables" if phase == "dyn" else "tables"
    trace, tables = clip(trace, accesses), clip(open_npz(source / f"{tables_name}.npz"), accesses)
    if one_in > 1:
        block = np.arange(accesses) // BLOCK
        kept = (block % one_in == 0) | (block == block[-1])
        for arrays in (trace, tables):                  # the accesses around each event: their order stays that of the guest
            for position in POSITIONED.keys() & arrays.keys():
                kept[arrays[position].astype(np.int64)] = kept[np.maximum(arrays[position].astype(np.int64) - 1, 0)] = True
        trace, tables = sample(trace, kept), sample(tables, kept)
    save(out / f"{phase}_trace", trace, method)
    save(out / tables_name, tables, method)

    counts = count_trace(trace) | {"table_pages": tables["pfn"].size}
    if "w_pos" in tables:
        counts["table_writes"] = tables["w_pos"].size
    meta = json.loads((source / "meta.json").read_bytes())
    meta = {key: value for key, value in meta.items() if key not in ("phases", "table_pages", *ANSWERS)}
    meta["phases"] = {phase: counts}
    if one_in > 1:
        meta["sampled_from"] = {phase: {"accesses": whole, "one_in": one_in, "block": BLOCK}}
    elif accesses < whole:
        meta["clipped_from"] = {phase: {"accesses": whole}}
    for name in answers:
        save(out / name, open_npz(source / f"{name}.npz"), method)
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return Recording.open(out, phase)


def positive(text):
    """Parse a count of at least one."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not a count of at least one")
    return count


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE_DIR", help="directory of the recording")
    parser.add_argument("out", metavar="OUT_DIR", help="directory to write; made if it does not exist")
    parser.add_argument("--accesses", type=positive, metavar="N", help="keep the first N accesses (default: all)")
    parser.add_argument("--one-in", type=positive, default=1, metavar="N",
                        help="of these keep one block of 4,096 in N, with all events, faults and table writes")
    parser.add_argument("--phase", choices=("static", "dyn"), default="dyn", help="which phase (default: %(default)s)")
    parser.add_argument("--with", dest="answers", nargs="+", choices=ANSWERS, default=(),
                        help="recorded answers to keep beside it")
    parser.add_argument("--method", choices=sorted(ZIP_METHODS), default="lzma",
                        help="compression; zst writes .npz.zst and needs the zstandard package (default: %(default)s)")
    arguments = parser.parse_args()
    print(bundle(**vars(arguments)))


if __name__ == "__main__":
    main()
