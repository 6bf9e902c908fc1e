"""Making an int8 checkpoint of a float one: `quantize` in `sweep.py` does it, layer by layer. Offline, one process."""
