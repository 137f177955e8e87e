from typing import Any

VERSION: int
address: int
table: Any

def error_text(code: int) -> str: ...
