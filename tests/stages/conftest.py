"""Makes the toy beside these tests importable: `from on_policy_toy import ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
