"""Say how to install what is missing, by a command that works wherever the package came from."""

from __future__ import annotations

from importlib import metadata


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of this package needs.

    It names the packages themselves: ``csr-vlm[extra]`` works only where pip can find csr-vlm.

    Example:
        >>> install_command("families")
        "pip install 'num2words' 'torchvision'"
    """
    try:
        requirements = metadata.requires("csr-vlm") or []
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        return f"pip install -e '.[{extra}]'"
    needed = []
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        if marker.replace('"', "'").replace(" ", "") == f"extra=='{extra}'":
            needed.append(f"'{name.strip()}'")
    return f"pip install {' '.join(sorted(needed))}"
