"""The inference server: settings, engine and HTTP. Imports `cache` and `rope`, never the other way round."""

from importlib import metadata


def version() -> str:
    """The version of the installed package; 0 where it runs from a source folder that was never installed."""
    try:
        return metadata.version("prerope")
    except metadata.PackageNotFoundError:
        return "0"
