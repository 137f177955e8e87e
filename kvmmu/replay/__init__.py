"""Replay: a trace or a recording is run, and what it says is checked."""
# Below: arch, memory, _walk, walk, tlb, mmu, vm, tables, traces
# Order: _replay_blocks, _replay, result, terminal, progress, recorded_faults, trace_memory, trace_replay, synthetic, replay,
#     recorded_machine
