"""pip's configuration on this machine, for a build that shares its network but not its files.

    python3 ci/docker/pip_config.py FOLDER

Writes FOLDER/pip.conf and FOLDER/ca.pem. Indexes and folders of packages on this machine are served
on the loopback until standard input ends; `ready` is printed when they are.
"""

import ast
import functools
import http.server
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

CERTIFICATES = "/run/secrets/ca"  # where the image files mount ca.pem
KEPT = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout")


def settings(listing: str) -> dict[str, str]:
    """`pip config list` as one section; what stands further down wins, the environment last."""
    found = {}
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            found[key.replace("default-", "")] = str(ast.literal_eval(value))
    return found


def local_folder(word: str) -> Path | None:
    """The folder that a file URL or a path names, if it is on this machine."""
    url = urllib.parse.urlsplit(word)
    if url.scheme not in ("", "file") or not url.path.startswith("/"):
        return None
    folder = Path(urllib.parse.unquote(url.path))
    return folder if folder.is_dir() else None


def publish(words: str, site: Path, address: str) -> str:
    """`words` with folders of this machine replaced by addresses below `address`."""
    public = []
    for word in words.split():
        folder = local_folder(word)
        if folder is not None:
            link = site / str(len(list(site.iterdir())))
            # An index may link to files beside itself; of a folder of wheels it alone is served.
            is_index = folder.name == "simple"
            link.symlink_to(folder.parent if is_index else folder)
            word = f"{address}/{link.name}/simple/" if is_index else f"{address}/{link.name}/"
        public.append(word)
    return " ".join(public)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Not a line for each file."""


def main(out: Path) -> None:
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = settings(listing)
    site = out / "site"
    site.mkdir()
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    lines = [f"{key} = {publish(found[key], site, address)}" for key in KEPT if key in found]
    certificates = Path(found.get("cert", ""))
    if certificates.is_file():
        (out / "ca.pem").write_bytes(certificates.read_bytes())
        lines.append(f"cert = {CERTIFICATES}")
    else:
        (out / "ca.pem").touch()
    (out / "pip.conf").write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
