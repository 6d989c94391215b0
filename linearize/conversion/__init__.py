"""What a conversion needs before it writes: inspection, the choice of softmax heads, calibration, verification."""
