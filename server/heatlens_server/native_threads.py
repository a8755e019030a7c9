"""How the threads of native libraries wait for each other, so that a busy machine does not slow every small operation.

numpy's OpenBLAS and PyTorch's OpenMP divide an operation among threads that wait for each other by spinning. Where a
core is taken, by another model's run for example, the one that spins keeps the core that the other one waits for: each
operation then takes milliseconds, whatever it computes. Measured on two busy cores: a class of Eigen-Grad-CAM in 1
instead of 44 ms, by all layers in 57 instead of 278 ms; a class of FullGrad in 0.2 instead of 0.6 to 5 s.
"""

import os

_SETTINGS = {
    # numpy works on single maps here: matrices that are too small to be divided.
    "OPENBLAS_NUM_THREADS": "1",
    # Rounds of spinning before a thread sleeps: microseconds, not milliseconds.
    "GOMP_SPINCOUNT": "1000",
}


def wait_briefly() -> None:
    """Have OpenBLAS run on one thread, and OpenMP's threads sleep soon, unless the environment sets these.

    To be called before numpy and torch are imported. Processes that are begun later have the same settings.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
