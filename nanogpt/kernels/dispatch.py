"""One rule for all operations: `auto` picks, a named implementation never falls back."""

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def unsupported(impl: str) -> str | None:
    """Why `impl` cannot run in this installation, or None where it can.

    Raises: ValueError for a name that is not in IMPLEMENTATIONS.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")
    if impl == "triton":
        return "this version of nanogpt has no Triton kernels"
    return None


def resolve(impl: str) -> str:
    """The implementation that runs for the requested `impl`: "torch" or "reference".

    Raises: RuntimeError with the reason where a named implementation cannot run.
    """
    reason = unsupported(impl)
    if reason is not None:
        raise RuntimeError(f'impl="{impl}" cannot run: {reason}')
    return "torch" if impl == "auto" else impl


def describe(impl: str) -> str:
    """One line for the user: what `impl` resolves to and why."""
    picked = resolve(impl)
    if impl != "auto":
        return f"{picked} (asked for)"
    return f"{picked} (auto: {unsupported('triton')})"
