"""Commands beside `python -m trainer`, each `python -m scripts.NAME`."""

import longspan.at_start  # noqa: F401
