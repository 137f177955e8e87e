"""What an address means: walks set up from registers, their results and records, and `PageWalk`, which carries them out."""
# Below: arch, memory, _walk
# Order: results, record, mapped, _setup, _fast, _contexts, _arguments, _explain, _scan, _mappings, batch, pagewalk
