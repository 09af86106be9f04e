"""Says in one line what `make cluster` lacks here, and ends with 2; silent where it can run."""

import sys

from tests.cluster import test_slurm, test_ssh
from tests.cluster.lab import missing

if reason := missing(test_ssh.PACKAGES | test_slurm.PACKAGES):
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
