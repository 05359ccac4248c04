"""`python -m lora`: the command line without an installed entry point."""

import sys

from lora.cli import main

sys.exit(main())
