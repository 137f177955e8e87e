"""The architecture in numbers and values: bits, roles, formats, registers, faults and their delivery."""
# Below: nothing
# Order: _bits, words, extras, arguments, files, faults, second_stages, _roles, registers, delivery, control_blocks, _format,
#     _gpte, _linear
