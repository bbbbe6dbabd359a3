"""``python -m vit_linearizer``: the command line."""

import sys

from .cli import main

sys.exit(main())
