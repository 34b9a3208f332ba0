"""The Ray edge: clusters, workers, trials, submitted jobs. The only part that imports Ray."""

import os
import sys
from pathlib import Path

# Ray reads this once, when it is imported. Where a token lies, `ray start` starts a cluster that asks for it.
if "ray" not in sys.modules and (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
