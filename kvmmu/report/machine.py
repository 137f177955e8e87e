"""Tables that tell of a replay on a machine."""

from kvmmu.replay.machine_replay import MachineReport
from kvmmu.report.tables import Table

__all__ = ["machine_tables"]


def machine_tables(report: MachineReport) -> list[Table]:
    """Return a report as tables: a list of (title, column names, rows of text)."""
    built: list[tuple[str, ...]] = [
        ("pages of SPTEs", f"{report.shadow_pages:,} ({report.table_bytes:,} bytes)"),
        *((f"SPTEs of {size.upper()} pages", f"{count:,}") for size, count in report.sptes.items()),
        *((f"KVM's {name}", f"{count:,}") for name, count in report.flushes.items()),
        ("pages written by the guest", f"{report.dirty_over_time[-1][1] if report.dirty_over_time else 0:,}")]
    exits: list[tuple[str, ...]] = [(reason, f"{count:,}") for reason, count in report.exits.items()]
    exits.append(("all", f"{sum(report.exits.values()):,}"))
    if report.exits_to_l1:
        exits.append(("of them to the nested guest's hypervisor", f"{report.exits_to_l1:,}"))
    return [(f"Exits to a host with {report.host}, {report.backing} backing", ("reason", "exits"), exits),
            ("Exits by what KVM did", ("RET_PF", "accesses"), [(code, f"{count:,}") for code, count in report.by_ret.items()]),
            ("What the host built", ("", ""), built)]
