"""Network addresses."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is one of this machine that others cannot reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
