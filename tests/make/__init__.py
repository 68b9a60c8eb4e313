"""What tests are made of: random experts, checkpoints, files, models, servers;
and tables of cases.
"""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
