"""Parquet traces: what decoding costs by column, encoding and compression, and replay against decoding alone.

    python benchmarks/bench_parquet.py [RECORDING] [--phase static] [--repeat 4] [--rounds 3]

Needs the extra arrow. Files go to a temporary directory. Times are the best of the rounds, wall clock, and also the CPU time of
all threads for replay; ns are per row.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import kvmmu
from kvmmu.traces import Chunk, ParquetTrace, Recording, Trace, bundled, convert
from kvmmu.traces._places import find_places
from kvmmu.traces.conversion import recording_chunks, recording_header
from kvmmu.traces.parquet import COMPRESSIONS, ROW_GROUP

ENCODINGS = {"plain": {"use_dictionary": False}, "dictionary": {"use_dictionary": True, "dictionary_pagesize_limit": 8 << 20},
             "delta": {"use_dictionary": False, "column_encoding": "DELTA_BINARY_PACKED"},
             "byte stream split": {"use_dictionary": False, "column_encoding": "BYTE_STREAM_SPLIT"}}


def best(rounds, work):
    """Wall-clock seconds of the fastest of some rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def decode(path):
    """Read a file as the reader of traces does, by one thread."""
    file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
    for group in range(file.num_row_groups):
        file.read_row_group(group, use_threads=False)


def columns_table(recording, rounds, path):
    """Bytes and ns per row of each column under each encoding and compression."""
    columns = recording.columns()
    named = {"op": columns["kind"], "access": recording.access_bytes(), "addr": columns["gva"], "gpa": columns["gpa"]}
    places = [find_places(*(named[name][first:first + ROW_GROUP] for name in ("op", "addr", "access", "gpa")))
              for first in range(0, len(recording), ROW_GROUP)]
    print(f"{np.mean([page.size for _, page, *_ in places]):.0f} uses of pages in a row group")
    named["place"] = np.concatenate([place for place, *_ in places])
    print(f"{'column':8} {'encoding':18} {'compression':12} {'B/row':>6} {'ns/row':>7}")
    for name, column in named.items():
        for encoding, options in ENCODINGS.items():
            if column.dtype == np.uint8 and encoding in ("delta", "byte stream split"):
                continue
            for compression in COMPRESSIONS:
                settings = dict(options)
                if "column_encoding" in settings:
                    settings["column_encoding"] = {name: settings["column_encoding"]}
                field = pa.field(name, pa.from_numpy_dtype(column.dtype), nullable=name == "gpa")
                table = pa.table([pa.array(column)], schema=pa.schema([field]))
                pq.write_table(table, path, row_group_size=ROW_GROUP, compression=compression, write_page_checksum=True,
                               **settings)
                seconds = best(rounds, lambda: decode(path))
                print(f"{name:8} {encoding:18} {compression:12} {path.stat().st_size / column.size:6.2f} "
                      f"{seconds / column.size * 1e9:7.2f}")


def replay_table(recording, repeat, rounds, path):
    """Rates of decoding, of replay from the file, of replay of the same chunks in memory, and of the recording itself."""
    for compression in ("lz4", "zstd"):
        rows = convert(recording, path, repeat=repeat, compression=compression)
        print(f"\n{compression}: {rows:,} accesses, {path.stat().st_size / rows:.2f} bytes each")
        for decoders in (1, 2):
            seconds = best(rounds, lambda n=decoders: sum(map(len, ParquetTrace(path, decoders=n).chunks())))
            print(f"  decoded and checked by {decoders} thread(s): {rows / seconds / 1e6:8.1f} M accesses/s")
        reports, processor = [], []
        for _ in range(rounds):
            started = time.process_time()
            reports.append(kvmmu.replay(path))
            processor.append(time.process_time() - started)
        report = min(reports, key=lambda report: report.seconds)
        assert report.verified == rows
        print(f"  replayed: {report.rate / 1e6:8.1f} M accesses/s ({rows / min(processor) / 1e6:.1f} M per CPU second), "
              f"the walk waited {100 * report.waited / report.seconds:.0f}% of the time")
    header = recording_header(recording)
    chunks = [Chunk.checked(columns, header) for columns in recording_chunks(recording)]
    for name, source in (("chunks in memory", Trace(header, chunks)), ("the recording", recording)):
        rate = max(kvmmu.replay(source).rate for _ in range(rounds))
        print(f"\n{name}: {rate / 1e6:.1f} M accesses/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", nargs="?", default=bundled())
    parser.add_argument("--phase", choices=("static", "dyn"))
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    recording = Recording.open(args.recording, args.phase)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.parquet"
        columns_table(recording, args.rounds, path)
        replay_table(recording, args.repeat, args.rounds, path)


if __name__ == "__main__":
    main()
