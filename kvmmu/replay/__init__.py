"""Replay: a trace or a recording is run, and what it says is checked."""
# Below: arch, memory, _walk, walk, tlb, mmu, vm, tables, traces
# Order: _recorded_faults, _replay_blocks, _replay_registers, _replay, result, checkpoint, terminal, progress, register_events,
#     trace_memory, row_run, trace_replay, synthetic, scheduling, sharded,
#     recorded_machine, machine_start, machine_replay, replay, many
