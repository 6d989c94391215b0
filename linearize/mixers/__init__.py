"""The gated structures. One file each, maths only; registering one is one line of `registry.py`."""
