"""Ends a command with one message where a stranger's package stands in the place of Longspan's.

It is imported before everything else, for the first import of the stranger's would be a traceback.
"""

import sys

from longspan.own_packages import stranger

BAD_START = 2

if message := stranger():
    print(message, file=sys.stderr)
    sys.exit(BAD_START)
