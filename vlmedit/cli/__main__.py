"""`python -m vlmedit.cli`, as launchers of several processes start it."""

import sys

from vlmedit.cli import main

sys.exit(main())
