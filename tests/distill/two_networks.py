"""Two networks on one Linux machine, joined by a cable: as far as addresses go, two machines.

With loopback addresses alone all processes are still on one network, and nobody notices a worker that tells the others an
address at which only itself can be reached.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ["10.0.0.1", "10.0.0.2"]
CABLE = "cable"  # the name of the interface on both sides


class NotAllowed(Exception):
    """There are no such networks here; the text says why."""


@contextmanager
def two_networks() -> Iterator[list[list[str]]]:
    """What comes before a command that is to run in the first network, and in the second; nothing else is in them.

    Raises:
        NotAllowed: a tool is missing, or the right to make networks (root has it, but not in every container).
    """
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        raise NotAllowed(f"no {' and no '.join(missing)}")
    # each holds a network for as long as it runs; it ends when its input is closed
    hold = ["unshare", "--net", "sh", "-c", "echo made; exec cat"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    holders = [subprocess.Popen(hold, **pipes) for _ in ADDRESSES]
    try:
        for holder in holders:
            if (said := holder.stdout.readline().strip()) != "made":
                raise NotAllowed(said)
        inside = [["nsenter", "--target", str(holder.pid), "--net"] for holder in holders]
        ends = ["name", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(holders[1].pid)]
        set_up([*inside[0], "ip", "link", "add", *ends])
        for enter, address in zip(inside, ADDRESSES, strict=True):
            set_up([*enter, "ip", "address", "add", f"{address}/24", "dev", CABLE])
            set_up([*enter, "ip", "link", "set", CABLE, "up"])
            set_up([*enter, "ip", "link", "set", "lo", "up"])
        yield inside
    finally:
        for holder in holders:
            holder.communicate()


def set_up(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise NotAllowed(f"{' '.join(command)}: {done.stderr.strip()}")
