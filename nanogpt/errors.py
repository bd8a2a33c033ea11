"""The errors a user can cause or meet, each with the exit code its command ends with."""


class NanoGPTError(Exception):
    """Failed while running: disk full, a broken dependency. Exit code 1."""

    exit_code = 1


class UsageError(NanoGPTError):
    """A flag or its value is wrong or impossible on this machine. Exit code 2."""

    exit_code = 2


class InputError(NanoGPTError):
    """An input is missing, empty, damaged, foreign or does not fit. Exit code 3."""

    exit_code = 3


_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "Cannot allocate memory",
    "CUDA error: out of memory",  # of pinned memory
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""What the message of a RuntimeError says where memory has run out."""
_ONEDNN_SIGN = "could not create a primitive"
"""All that oneDNN says of it; of an operation that it lacks it says more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on the device or in main memory."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"  # torch's, which costs an import to name
        or message == _ONEDNN_SIGN
        or any(sign in message for sign in _SIGNS)
    )
