"""Fast kernels for x86 processors: C++ behind a C interface, called through ctypes. See backend.py and build.py."""
