from typing import Any

VERSION: int
address: int
table: Any
