"""`python -m bilevel`: the command line where its script is not on the path."""

import sys

from bilevel.cli.command import main

sys.exit(main())
