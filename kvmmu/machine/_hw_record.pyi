from kvmmu.machine._machine import Machine
from kvmmu.walk.record import WalkRecord

def hw_walk_record(machine: Machine, gva: int, access: int) -> WalkRecord: ...
