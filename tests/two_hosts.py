"""Two hosts of one machine: network namespaces with names and addresses of their own, and a cable between them."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = ("10.203.17.1", "10.203.17.2")


class TwoHosts:
    """The hosts, while entered; raises CalledProcessError or OSError where this process may not make them."""

    def __init__(self) -> None:
        self.names = [f"handloop-{os.getpid()}-{number}" for number in (0, 1)]
        self.settings = [Path("/etc/netns") / name for name in self.names]

    def __enter__(self) -> "TwoHosts":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name, folder in zip(self.names, self.settings, strict=True):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> "subprocess.Popen[bytes]":
        """Starts a command on a host, in a session of its own; its output goes to a file."""
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c"]
        named = [*inside, f'hostname host-{host} && exec "$@"', "sh", *command]
        settings = {**os.environ, **environment}
        with log.open("ab") as file:
            return subprocess.Popen(named, env=settings, stdout=file, stderr=file, start_new_session=True)

    def pids(self, host: int) -> list[int]:
        """All processes on a host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def _make(self) -> None:
        hosts = "127.0.0.1 localhost\n" + "".join(f"{ip} host-{number}\n" for number, ip in enumerate(ADDRESSES))
        for name, folder in zip(self.names, self.settings, strict=True):
            _ip("netns", "add", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
        ends = [f"hl{os.getpid() % 10**6}-{number}" for number in (0, 1)]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def refusal() -> str:
    """Why this process may not make two hosts, or nothing."""
    try:
        with TwoHosts() as hosts:
            command = ["ip", "netns", "exec", hosts.names[0], "unshare", "--uts", "hostname", "host-0"]
            subprocess.run(command, check=True, capture_output=True)
            subprocess.run(
                ["ip", "netns", "exec", hosts.names[0], "ping", "-c1", "-W2", ADDRESSES[1]],
                check=shutil.which("ping") is not None,
                capture_output=True,
            )
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.decode().strip()}"
    except OSError as error:
        return f"there is no ip command: {error}"
    return ""
