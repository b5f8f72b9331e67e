"""Model surgery: FFNs out, fast feedforward networks in."""

from .calibration import Calibration, CalibrationReport, calibrate
from .convert import convert_ffn_to_fff
from .modules import load_fff, save_fff

__all__ = ["Calibration", "CalibrationReport", "calibrate", "convert_ffn_to_fff", "load_fff", "save_fff"]
