"""Prepare and check a conversion: plan, softmax heads, calibration, the files of the student, verification."""
