"""Vision state-space models: kernels, scans, backbones and dense-prediction heads.

>>> import timm, vmamba
>>> model = timm.create_model("vmamba_tiny_s1l8", num_classes=10)
"""

from vmamba.checkpoint import LoadReport, load_checkpoint
from vmamba.doctor import doctor
from vmamba.kernels.backends import use_backend
from vmamba.registry import create_model, list_models
from vmamba.scans import Scan, list_scans
from vmamba.timm_models import register_all

__version__ = "0.1.0"
__all__ = [
    "LoadReport",
    "Scan",
    "create_model",
    "doctor",
    "list_models",
    "list_scans",
    "load_checkpoint",
    "use_backend",
]

register_all()
