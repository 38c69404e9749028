"""Every GPU kernel compiled for every target on a machine without a GPU, and what the compilers made of it.

    make aot             compiles, and compares with ratchet.json
    make aot ACCEPT=1    ... and writes better or new values there

Triton kernels are compiled through their Python wrappers with a driver that only names a target (targets.py), for the
calls listed in cases.py. CUDA C++ was compiled by `make build`, which keeps what is measured here.
"""
