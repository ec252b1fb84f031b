"""Accuracy of merged networks over several trained pairs; see ``__main__.py``."""

import sys
from pathlib import Path

for _folder in ("benchmarks", "examples"):  # modules shared with other benchmarks and with the examples
    sys.path.insert(0, str(Path(__file__).parents[2] / _folder))
