"""The gateway's certificate as node sees it: checked before the start, then believed. Pure but for reading files."""

from __future__ import annotations

import ssl

from octavo.node.errors import EXIT_BAD_SETTINGS, NodeError
from octavo.settings import Settings


def check_tls(settings: Settings) -> None:
    """Raise NodeError if certificate and key cannot be used."""
    if settings.tls_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certfile, settings.tls_keyfile)
    except (ssl.SSLError, OSError) as error:
        message = f"TLS_CERTFILE={settings.tls_certfile}: cannot be used with TLS_KEYFILE: {error}"
        raise NodeError(message, exit_code=EXIT_BAD_SETTINGS) from None


def own_tls(settings: Settings) -> ssl.SSLContext | None:
    """How node reaches its own gateway; None without TLS.

    It asks for a page of health on this machine: the certificate names the machine as others know it, so it is not
    compared with the address.
    """
    if settings.tls_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
