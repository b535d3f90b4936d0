"""`python -m fusiontree` is the `fusiontree` command."""

import sys

from fusiontree.cli import main

sys.exit(main())
