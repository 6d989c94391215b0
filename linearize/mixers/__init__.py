"""The mixers: one file each, maths only, found by name through `registry.py`.

Add a mixer:
1. Write its file: a subclass of `Mixer` (mixer.py) with `update`, `read` and `chunked`, under its paper's equations.
2. Add its entry to `MIXERS` in registry.py: options with their limits, gates, and whether its weights are positive.
3. Add a row to `STRUCTURES` in tests/helpers.py; the tests hold `chunked` against `update` and `read`.

The portable file puts all modules into one namespace, so every top-level name of a mixer must be unique in the package.
"""
