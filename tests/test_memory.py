import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from clip_train.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for step in range(10):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again_without_asking_the_system():
    answers = {}
    for how in ("keep", "default"):
        out = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
        answers[how] = out.split()
    kept, faults = answers["keep"]
    if kept == "True":  # not on musl
        assert int(faults) * 10 < int(answers["default"][1])
