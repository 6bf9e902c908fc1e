"""The GPU backend: kernels in triton-lang. Imported only when a CUDA device was asked for (see `kernels/choose.py`)."""
