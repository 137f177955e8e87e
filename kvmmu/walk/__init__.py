"""Walks: how they are set up from registers, what they return, and `PageWalk`, which carries them out.

`_setup`   from a role and a processor model to a walk: address bits that are ignored, error codes that tell fetches.
`_vcpu_arch`, `_second_stage`, `_register_sets`  registers of a vCPU, of a second stage, and sets of both for batches.
`_fast`    the short cut of scalar translations.
`_explain` the rule that a walk broke, as a record and as an exception; `record` shows it.
`_scan`, `_mappings`, `mapped`  all that an address space maps.
"""
# Below: arch, memory, _walk
# Order: _columns, html, results, record, mapped, _setup, _fast, _vcpu_arch, _second_stage, _register_sets, _arguments, _explain,
#     _scan, _mappings, batch, pagewalk
