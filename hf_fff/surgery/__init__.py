"""Model surgery: FFNs out, fast feedforward networks in."""

from .calibration import Calibration, CalibrationReport, calibrate
from .convert import convert_ffn_to_fff

__all__ = ["Calibration", "CalibrationReport", "calibrate", "convert_ffn_to_fff"]
