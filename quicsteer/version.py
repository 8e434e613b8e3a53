"""The version of this package."""

import importlib.metadata


def package_version() -> str:
    """Return the version of the installed package."""
    try:
        return importlib.metadata.version("quicsteer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
