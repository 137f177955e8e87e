"""What an address means: walks set up from registers, their results and records, and `PageWalk`, which carries them out."""
# Below: arch, memory, _walk
# Order: _columns, results, record, _setup, _fast, _vcpu_arch, _second_stage, _register_sets, _arguments, _explain, batch,
#     pagewalk
