"""``python -m nbrnn``: the command line."""

import sys

from nbrnn.cli import main

sys.exit(main())
