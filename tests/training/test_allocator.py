"""What a step frees stays with the process, in huge pages."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_a_step_frees_is_kept_for_the_next():
    """Its pages do not fault in again, as they do where each large tensor is mapped anew."""
    code = (
        "import resource, torch\n"
        "from wds_convnext.training.allocator import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(4):\n"
        "        torch.ones(2**22)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "mapped = faults()\n"
        "keep_freed_memory()\n"
        "faults()\n"
        "print(mapped > 10 * faults())\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "True\n"


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="a kernel without huge pages")
def test_large_tensors_are_in_memory_for_which_huge_pages_are_asked():
    """`hg` in proc_pid_smaps(5); whether the kernel has some left is another thing."""
    code = (
        "import re, torch\n"
        "from wds_convnext.training.allocator import keep_freed_memory\n"
        "def advised(tensor):\n"
        "    place = tensor.data_ptr() + tensor.nbytes // 2\n"
        "    for area in re.split(r'(?m)^(?=[0-9a-f]+-)', open('/proc/self/smaps').read())[1:]:\n"
        "        start, end = (int(word, 16) for word in area.split()[0].split('-'))\n"
        "        if start <= place < end:\n"
        "            return 'hg' in area.split()\n"
        "before = advised(torch.ones(2**24))\n"
        "keep_freed_memory()\n"
        "print(before, advised(torch.ones(2**24)))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False True\n"
