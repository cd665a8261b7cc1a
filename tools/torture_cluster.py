"""Kill the machines of a conversion at many random moments, and compare the bytes.

A Dask scheduler and its workers, all processes of this machine that share nothing but a folder,
convert a source. Every few seconds a worker, the scheduler or the client is killed with SIGKILL;
what is missing is started again, and the conversion is begun again where its client has died.
After the last kill it ends undisturbed. The same is done with two or more parts of `--part`. At
the end all files must equal those that one process writes. Prints one line per kill and a summary;
exit code 1 if a byte differs.
"""

import hashlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

SMALL_UNITS = (
    "from wds_convnext.conversion import layout; layout.UNIT_BYTES = 1 << 20; "
    "from wds_convnext.cli import main; main()"
)


def converting(source: str, out: Path, *options: str) -> list[str]:
    """A conversion with many steps, of a megabyte each."""
    sizes = ["--samples-per-shard", "500"]
    return [
        sys.executable,
        "-c",
        SMALL_UNITS,
        "shards",
        source,
        "--out",
        str(out),
        *sizes,
        *options,
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def sums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


class Processes:
    """Processes by role, started when they are not there."""

    def __init__(self, commands: dict[str, list[str]], scratch: Path):
        self.commands, self.scratch = commands, scratch
        self.running: dict[str, subprocess.Popen] = {}

    def start_missing(self) -> None:
        for role, command in self.commands.items():
            process = self.running.get(role)
            if process is None or process.poll() not in (None, 0):
                with open(self.scratch / f"{role}.log", "ab") as log:
                    self.running[role] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, role: str) -> None:
        self.running[role].kill()
        self.running[role].wait()

    def are_done(self, roles: list[str]) -> bool:
        return all(role in self.running and self.running[role].poll() == 0 for role in roles)

    def kill_all(self) -> None:
        for role in self.running:
            self.kill(role)


def torture(
    processes: Processes, clients: list[str], *, kills: int, longest: float, rng: random.Random
) -> Counter:
    """Kill so often, each time within `longest` seconds, then wait until the clients are done."""
    counts: Counter = Counter()
    while not processes.are_done(clients):
        processes.start_missing()
        time.sleep(rng.uniform(0.2, longest) if counts.total() < kills else 0.2)
        alive = [role for role, process in processes.running.items() if process.poll() is None]
        if counts.total() < kills and alive and not processes.are_done(clients):
            victim = rng.choice(alive)
            processes.kill(victim)
            counts[victim.split("-")[0]] += 1
            click.echo(f"{counts.total()}/{kills} killed: {victim}")
    processes.kill_all()
    return counts


def dask_commands(source: str, out: Path, scratch: Path, num_workers: int) -> dict[str, list[str]]:
    port, dask = free_port(), [sys.executable, "-m", "dask"]
    local = ["--local-directory", str(scratch), "--no-dashboard", "--nthreads", "1"]
    worker = [*dask, "worker", f"tcp://127.0.0.1:{port}", *local, "--death-timeout", "60"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    return {
        "scheduler": [*dask, "scheduler", *place],
        **{f"worker-{number}": worker for number in range(num_workers)},
        "client": converting(source, out, "--engine", f"dask://127.0.0.1:{port}"),
    }


def part_commands(source: str, out: Path, num_parts: int) -> dict[str, list[str]]:
    return {
        f"part-{n}": converting(source, out, "--part", f"{n}/{num_parts}", "--jobs", "1")
        for n in range(1, num_parts + 1)
    }


@click.command()
@click.argument("source", type=click.Path(exists=True))
@click.option("--kills", default=20, show_default=True, help="Of each way.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=[2, 4], show_default=True, multiple=True, help="Of Dask.")
@click.option("--parts", default=[2], show_default=True, multiple=True, help="Of --part.")
def main(
    source: str, kills: int, seed: int, workers: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    """Torture the conversion of a SOURCE of some megabytes."""
    rng, whole = random.Random(seed), True
    source = str(Path(source).resolve())
    with tempfile.TemporaryDirectory() as folder:
        scratch, straight, out = Path(folder), Path(folder, "straight"), Path(folder, "out")
        subprocess.run(converting(source, straight, "--jobs", "1"), check=True, capture_output=True)
        ways = [("dask workers", number, 4.0) for number in workers]
        ways += [("parts", number, 2.0) for number in parts]
        for kind, number, longest in ways:
            started = time.monotonic()
            if kind == "parts":
                commands = part_commands(source, out, number)
                clients = list(commands)
            else:
                commands, clients = dask_commands(source, out, scratch, number), ["client"]
            processes = Processes(commands, scratch)
            counts = torture(processes, clients, kills=kills, longest=longest, rng=rng)
            if kind == "parts":
                finishing = converting(source, out, "--finish")
                subprocess.run(finishing, check=True, capture_output=True)
            equal = sums(out) == sums(straight)
            whole = whole and equal
            killed = ", ".join(f"{role} {times}" for role, times in sorted(counts.items()))
            result = "all files equal" if equal else "FILES DIFFER"
            seconds = time.monotonic() - started
            click.echo(f"{number} {kind}: {seconds:.0f} s, killed {killed}; {result}")
            shutil.rmtree(out)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
