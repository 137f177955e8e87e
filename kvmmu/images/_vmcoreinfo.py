"""The text that a Linux kernel leaves in its dumps (VMCOREINFO)."""

__all__ = ["kernel_root", "parse_vmcoreinfo"]

_KERNEL_MAP = 0xFFFFFFFF80000000            # __START_KERNEL_map of x86-64
_LIMIT = 1 << 16                            # bytes of the text that are looked at


def parse_vmcoreinfo(text: bytes) -> dict[str, str]:
    """Return the lines NAME=VALUE of the text; damaged ones are left out."""
    lines = text[:_LIMIT].split(b"\0")[0].decode("latin-1").splitlines()
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}


def kernel_root(info: dict[str, str]) -> tuple[int, bool] | None:
    """Return CR3 of the kernel's own page tables, and whether they have five levels; None if the text does not tell."""
    try:
        root, base = int(info["SYMBOL(swapper_pg_dir)"], 16), int(info["NUMBER(phys_base)"], 0)
        five = int(info.get("NUMBER(pgtable_l5_enabled)", "0"), 0) != 0
    except (KeyError, ValueError):
        return None
    cr3 = root - _KERNEL_MAP + base
    return (cr3, five) if 0 <= cr3 < 1 << 52 and cr3 % 4096 == 0 else None
