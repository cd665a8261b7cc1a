"""What a step frees stays with the process, in huge pages, until processes are forked."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wds_convnext.shards.opening import open_dataset
from wds_convnext.stream import loader
from wds_convnext.stream.order import EvalOrder
from wds_convnext.stream.stream import ShardStream
from wds_convnext.stream.transforms import EvalTransform
from wds_convnext.training import feed
from wds_convnext.training.distributed import Machine, World

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def printed_by(code: str) -> str:
    imports = "import re, resource, torch\nfrom wds_convnext.training.allocator import *\n"
    command = [sys.executable, "-c", imports + code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_a_step_frees_is_kept_for_the_next_until_it_is_given_back():
    """Pages do not fault in again, as they do where each large tensor is mapped anew."""
    code = """
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

mapped = faults()
keep_freed_memory()
for _ in range(16):
    faults()
print(mapped > 10 * faults())
kept = resident()
give_back_freed_memory()
print(kept - resident() > 2**25)
"""

    assert printed_by(code) == "True\nTrue\n"


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="a kernel without huge pages")
def test_large_tensors_are_in_memory_for_which_huge_pages_are_asked():
    """`hg` in proc_pid_smaps(5), unless address space is limited; the kernel may have none left."""
    code = """
def advised(tensor):
    address = tensor.data_ptr() + tensor.nbytes // 2
    for area in re.split(r"(?m)^(?=[0-9a-f]+-)", open("/proc/self/smaps").read())[1:]:
        start, end = (int(word, 16) for word in area.split()[0].split("-"))
        if start <= address < end:
            return "hg" in area.split()

print(advised(torch.ones(2**24)))
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (2**40, unlimited[1]))
keep_freed_memory()
print(advised(torch.ones(2**24)))
resource.setrlimit(resource.RLIMIT_AS, unlimited)
keep_freed_memory()
print(advised(torch.ones(2**24)))
"""

    assert printed_by(code) == "False\nFalse\nTrue\n"


@pytest.mark.parametrize(
    ("workers", "order"),
    [(1, ["give back", "load", "keep"]), (0, ["load", "keep"])],
)
def test_memory_is_given_back_before_workers_are_forked_and_kept_after(
    monkeypatch, shards, workers, order
):
    events = []

    def make_loader(*args, **options):
        for batch in loader.make_loader(*args, **options):
            if "load" not in events:
                events.append("load")
            yield batch

    monkeypatch.setattr(feed, "give_back_freed_memory", lambda: events.append("give back"))
    monkeypatch.setattr(feed, "keep_freed_memory", lambda: events.append("keep"))
    monkeypatch.setattr(feed, "make_loader", make_loader)
    dataset = open_dataset(str(shards / "train.json"))
    stream = ShardStream(
        dataset, EvalOrder(dataset.sizes), batch_size=8, transform=EvalTransform(32)
    )
    machine = Machine(World(), torch.device("cpu"), "off")

    with feed.loading(stream, workers, machine) as batches:
        assert len(list(batches)) > 1

    assert events == order
