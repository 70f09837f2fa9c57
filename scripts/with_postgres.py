"""Run a command beside a real PostgreSQL, which lives as long as the command: LAMELLA_TEST_STORE is its URL, and
LAMELLA_TEST_STORE_CONTROL the words that kill and start it, as JSON.

Run: scripts/with_postgres.py pytest tests/service/test_store.py

Needs PostgreSQL's server programs; listens on 127.0.0.1 alone. Exit code: the command's; 77 where they are missing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

MISSING = 77


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; None where there is none."""
    asked = shutil.which("pg_config")
    said = subprocess.run([asked, "--bindir"], capture_output=True, text=True, check=False).stdout if asked else ""
    places = [Path(said.strip() or "/nowhere"), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return next((place for place in places if (place / "initdb").is_file()), None)


def main(command: list[str]) -> int:
    """The exit code of the command."""
    found = programs()
    if found is None:
        print("no PostgreSQL here", file=sys.stderr)
        return MISSING
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgres.") as name:
        folder = Path(name)
        if as_user:
            shutil.chown(folder, "postgres")
        data, quiet = folder / "data", {"stdout": subprocess.DEVNULL, "cwd": folder}
        initdb = [found / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8"]
        subprocess.run([*as_user, *initdb], check=True, **quiet)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [*as_user, found / "pg_ctl", "-D", data]
        start = [*control, "-w", "-l", folder / "log", "-o", options, "start"]
        subprocess.run(start, check=True, **quiet)
        try:
            words = {"kill": [*control, "-w", "-m", "immediate", "stop"], "start": start}
            environment = os.environ | {
                "LAMELLA_TEST_STORE": f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres",
                "LAMELLA_TEST_STORE_CONTROL": json.dumps({name: [*map(str, said)] for name, said in words.items()}),
            }
            return subprocess.run(command, env=environment, check=False).returncode
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=False, **quiet)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
