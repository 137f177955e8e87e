"""`python -m kvmmu`: the kvmmu command."""

import sys

from kvmmu.cli import main

if __name__ == "__main__":
    sys.exit(main())
