from typing import Any

import numpy as np

COLUMNS: dict[str, np.dtype[Any]]
