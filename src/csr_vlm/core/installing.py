"""Say how to install what is missing, by a command that works wherever the package came from."""

from __future__ import annotations

from importlib import import_module, metadata
from importlib.util import find_spec

from csr_vlm.core.errors import CsrError, reason_of


def is_installed(module: str) -> bool:
    """Return whether a module can be imported; a mere folder of its name, such as W&B's own ``wandb/``, is none.

    Example:
        >>> is_installed("json"), is_installed("no_such_module")
        (True, False)
    """
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def require_import(option: str, module: str, install: str) -> None:
    """Verify that a module can be imported; one that was built for another machine may be installed and fail.

    Args:
        option: What needs the module, for the message.
        module: Name of the module.
        install: Command that installs it.

    Raises:
        CsrError: It cannot be imported.
    """
    if not is_installed(module):
        raise CsrError(f"{option}: {module} is not installed", install)
    try:
        import_module(module)
    except Exception as error:  # Whatever its code raises.
        raise CsrError(
            f"{option}: {module} is installed but cannot be imported: {reason_of(error)}",
            f"install one that fits this machine: {install}",
        ) from None


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
