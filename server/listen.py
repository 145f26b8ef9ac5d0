"""The listening socket, opened before anything heavy is imported or loaded."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from ..core.args import ServerArgs
from ..core.errors import ConfigError

BACKLOG = 2_048


def open_socket(args: ServerArgs) -> socket.socket:
    """Bound and listening. Raises `ConfigError` that names the address and the flag to change."""
    return _unix_socket(args.uds) if args.uds else _tcp_socket(args.host, args.port)


def base_url(sock: socket.socket, args: ServerArgs) -> str:
    """Where clients find the server."""
    if args.uds:
        return f"unix:{args.uds}"
    port = sock.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(args.host, args.host)
    return f"http://[{host}]:{port}" if ":" in host and host[0] != "[" else f"http://{host}:{port}"


def _tcp_socket(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port is {port}; it must be in [0, 65535].")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"--host {host}: this address is not known ({error}).") from None
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Listening at once: two sockets that only bind an address do not notice each other.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(_why(error, host, port)) from None
    sock.setblocking(False)
    return sock


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} on {host} is in use: stop what listens there, or choose another "
            "with --port (0 takes any free one)."
        )
    if error.errno == errno.EACCES:
        return f"Port {port} may not be opened by this user: choose one above 1023 with --port."
    return f"Cannot listen on {host}, port {port} (--host, --port): {error.strerror}."


def _unix_socket(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"Cannot listen on --uds {path}: {error.strerror or error}.") from None
    sock.setblocking(False)
    return sock


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on any more may go; a live one, or another file, stays."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
