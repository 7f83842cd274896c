"""Models on their way in and out: bases, devices, masked adapters, calibration text."""
