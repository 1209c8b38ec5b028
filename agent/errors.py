"""What the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is not as it should be: a file, an argument, a config key.

    The message names the thing, says what was expected and what to do. The command line prints it
    as one sentence and exits with :attr:`exit_code`.
    """

    exit_code = 2
