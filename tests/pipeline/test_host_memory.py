"""pipeline/host_memory.py: after the call, a block that is freed and asked for again costs no page faults."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from mmfoundry.pipeline.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def fault(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 << 20)
before = fault()
for _ in range(4):
    bytearray(64 << 20)
print(fault() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    }
    assert faults["keep"] * 8 < faults["plain"]
