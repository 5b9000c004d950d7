"""The device that a command's ``--device`` names."""

import torch

from vmamba.errors import UserError

LONGEST = 100  # characters of PyTorch's reason


def choose_device(name: str) -> torch.device:
    """A device by its name; "auto" is the GPU if there is one.

    Raises:
        UserError: it cannot be used here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:LONGEST]
        raise UserError(f"--device {name} cannot be used here ({reason}); choose auto, cpu or cuda") from error
    return device
