"""`python -m feedbackward` is the command line."""

import sys

from feedbackward.cli import main

sys.exit(main())
