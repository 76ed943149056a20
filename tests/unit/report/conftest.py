"""Puts the module that the tests of the report share in reach: tests are imported by file."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
