"""Where the accesses of a subcommand come from."""

import argparse

from kvmmu.traces import ParquetTrace, Recording, bundled, is_parquet

__all__ = ["open_any", "open_recording"]


def open_recording(args: argparse.Namespace) -> Recording:
    path = bundled() if args.recording in (None, "bundled") else args.recording
    return Recording.open(path, args.phase)


def open_any(args: argparse.Namespace) -> Recording | ParquetTrace:
    if args.recording in (None, "bundled") or not is_parquet(args.recording):
        return open_recording(args)
    if args.phase is not None:
        raise ValueError(f"--phase {args.phase}: a trace has one phase")
    return ParquetTrace(args.recording)
