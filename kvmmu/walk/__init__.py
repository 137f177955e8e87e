"""What an address means: walks set up from registers, their results and records, and `PageWalk`, which carries them out."""
# Below: arch, memory, _walk
# Order: _columns, html, results, record, mapped, _setup, _fast, _vcpu_arch, _second_stage, _register_sets, _arguments, _explain,
#     _scan, _mappings, batch, pagewalk
