"""`python -m megatron_sps2` is `sps2`."""

import sys

from megatron_sps2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
