"""kvmmu diff: tell where the two conformances answer differently."""

import argparse
import json

from kvmmu.cli.image_target import add_target, image_of, space_of, target_vcpu
from kvmmu.cli.output import MISMATCH, OK
from kvmmu.cli.parsing import Commands, command
from kvmmu.replay.terminal import say
from kvmmu.report.conformance import differences

__all__ = ["add"]


def add(commands: Commands) -> None:
    diff = command(commands, "diff", _diff, "tell where the manuals and KVM's walker answer differently",
                   "Ask both conformances, the manuals (sdm) and KVM's software walker (kvm), for every page that a memory "
                   "image, a recording or a trace maps, and for an address in each gap between, by every kind of access. "
                   "docs/conformance.md lists all differences that there can be. Exit status 1 if the answers differ.",
                   "diff dump.elf", "diff ram.raw --cr3 0x1000 --cr4 0x10 --efer 0x800", "diff dump.elf --json")
    add_target(diff)
    diff.add_argument("--json", action="store_true", help="print one JSON object")


def _diff(args: argparse.Namespace) -> int:
    name, vcpu = target_vcpu(args, image_of(args))
    found = differences(vcpu)
    if args.json:
        say(json.dumps({"source": str(args.recording), "differences": [difference.to_dict() for difference in found]}))
    else:
        say(f"{name}: {space_of(vcpu)}")
        for difference in found:
            say(f"  {difference}")
        if not found:
            say("the answers are the same")
    return MISMATCH if found else OK
