"""The part of kvmmu info that describes memory images."""

import json
import os
from typing import Any

from kvmmu.images import Image
from kvmmu.replay.terminal import printable, say

__all__ = ["image_facts", "print_image"]

_SHOWN = ("rip", "rsp", "cr0", "cr2", "cr3", "cr4")
_RANGES = 40                            # that are printed


def image_facts(image: Image) -> dict[str, Any]:
    """Return what is in an image, as plain data."""
    return {
        "path": image.path, "format": image.format, "bytes": os.path.getsize(image.path) if image.path else None,
        "memory": [{"gpa": gpa, "size": size, "readonly": readonly} for gpa, size, readonly in image.memory.slots],
        "vcpus": [{"number": vcpu.number, "inferred": list(vcpu.inferred), "efer": vcpu.regs.efer, **vcpu.registers}
                  for vcpu in image.vcpus],
        "root": None if image.root is None else image.root.cr3, "damage": list(image.damage),
        "details": {name: value for name, value in image.details.items() if isinstance(value, (int, str, dict))}}


def print_image(image: Image, as_json: bool) -> None:
    """Print what is in an image."""
    facts = image_facts(image)
    if as_json:
        say(json.dumps(facts))
        return
    total = sum(memory["size"] for memory in facts["memory"])
    size = "" if facts["bytes"] is None else f", {facts['bytes']:,} bytes"
    say(f"{printable(image.path)}: {image.format}{size}")
    say(f"memory: {total:#x} bytes in {len(facts['memory'])} ranges")
    for memory in facts["memory"][:_RANGES]:
        last = memory["gpa"] + memory["size"] - 1
        say(f"  {memory['gpa']:#014x}-{last:#014x}{'  read-only' if memory['readonly'] else ''}")
    if len(facts["memory"]) > _RANGES:
        say(f"  ... and {len(facts['memory']) - _RANGES:,} more")
    for vcpu in image.vcpus:
        shown = [f"{name} {vcpu.registers[name]:#x}" for name in _SHOWN if name in vcpu.registers]
        say(f"vCPU {vcpu.number}: {', '.join([*shown, f'efer {vcpu.regs.efer:#x}'])}"
            + (f" ({', '.join(vcpu.inferred)} inferred)" if vcpu.inferred else ""))
    if not image.vcpus:
        say("no registers" + ("" if image.root is None else f"; the kernel's page tables begin at {image.root.cr3:#x}"))
    for name, value in facts["details"].items():
        say(f"{name}: {value if isinstance(value, (int, str)) else f'{len(value)} entries'}")
    for damage in image.damage:
        say(f"damage: {printable(damage)}")
