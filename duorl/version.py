"""The version of DuoRL, which runs and checkpoints keep."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("duorl")
except PackageNotFoundError:  # its sources, on a path, without an installation: a machine of a cluster
    VERSION = "unknown"
