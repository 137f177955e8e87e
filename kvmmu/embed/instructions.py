"""The instructions that read memory only to write it, which an emulator has to know.

A processor asks for the right to write at the read of such an operand, so that its #PF says W. Emulators load first and store
then.

Source: SDM vol. 2, "Opcode Map"; vol. 3, "Page-Fault Exceptions".
"""

__all__ = ["writes_what_it_reads"]

_LEGACY_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_CMP = 7
# Opcodes with a memory destination that they read, and of groups the values of ModRM.reg that do.
_ONE_BYTE = {0x86: None, 0x87: None, **{8 * op + width: None for op in range(_CMP) for width in (0, 1)},
             **dict.fromkeys((0x80, 0x81, 0x83), range(_CMP)), **dict.fromkeys((0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3), range(8)),
             **dict.fromkeys((0xF6, 0xF7), range(2, 4)), **dict.fromkeys((0xFE, 0xFF), range(2))}
_TWO_BYTES = {**dict.fromkeys((0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xB0, 0xB1, 0xB3, 0xBB, 0xC0, 0xC1)), 0xBA: range(5, 8),
              0xC7: range(1, 2)}
_LONGEST = 15


def writes_what_it_reads(code: bytes) -> bool:
    """True if an instruction of 64-bit mode has a memory operand that it reads and writes.

    Parameters
    ----------
    code : bytes
        The instruction, and maybe what follows it.
    """
    at = 0
    while at < min(len(code), _LONGEST) and code[at] in _LEGACY_PREFIXES:
        at += 1
    if at < len(code) and code[at] & 0xF0 == 0x40:          # REX
        at += 1
    table = _ONE_BYTE
    if at < len(code) and code[at] == 0x0F:
        table = _TWO_BYTES
        at += 1
    if at + 1 >= len(code) or code[at] not in table or code[at + 1] >> 6 == 3:
        return False
    fields = table[code[at]]
    return fields is None or code[at + 1] >> 3 & 7 in fields
